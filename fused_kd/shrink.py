"""Make a student from some of a teacher's layers.

    python -m fused_kd.shrink TEACHER --layers 12 --output student
    python -m fused_kd.shrink TEACHER --layers 12 --keep importance --text chat.jsonl --output student

OUTPUT becomes an ordinary model folder: configuration, weights, tokenizer and chat template.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fused_kd.training.cut_configs import text_config
from fused_kd.training.exporting import check_output
from fused_kd.training.hidden_codes import LONG_NAMES, long_name
from fused_kd.training.models import check_device, load_any, load_tokenizer, save_whole
from fused_kd.training.script import Parser, make_console, run_script
from fused_kd.training.shrinking import Plan, check_options, cut, plan_cut


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m fused_kd.shrink", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("teacher", help="a folder, hub name or GGUF file of a causal LM, with its tokenizer")
    add("--layers", type=_layers, help="how many layers to keep, or which: 0,2,4,29; default: all")
    add("--keep", default="first_last", choices=("first_last", "even", "importance"),
        help="which, where --layers is a number; default %(default)s")  # fmt: skip
    add("--width", type=int, help="hidden size to keep; default: all of it")
    add("--intermediate", type=int, help="feed-forward size to keep; default: all of it")
    add("--text", help="a .txt file or data set: importance, width and intermediate are measured on it")
    add("--tokens", type=int, default=16_384, help="tokens of it that are read; default %(default)s")
    add("--dtype", type=long_name, default="auto", choices=("auto", *LONG_NAMES.values()),
        help="of the student: or bf16, fp16, fp32; default %(default)s: that of the teacher's files")  # fmt: skip
    add("--device", default="cpu", help="where text is measured; default %(default)s")
    add("--output", required=True, type=Path, help="the student's folder; what is there must be an older student")
    return parser.parse_args(argv)


def _layers(text: str) -> int | list[int]:
    try:
        return [int(part) for part in text.split(",")] if "," in text else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number, or indices such as 0,2,4, got {text!r}") from error


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    check_options(args.layers, args.width, args.intermediate, args.keep, args.text)
    check_output(args.output, args.teacher)
    check_device(args.device)
    tokenizer = load_tokenizer(args.teacher)
    teacher: Any = load_any(args.teacher, dtype=args.dtype).to(args.device)
    plan = plan_cut(
        teacher, args.layers, width=args.width, intermediate=args.intermediate, keep=args.keep, text=args.text,
        tokenizer=tokenizer, tokens=args.tokens,
    )  # fmt: skip
    student: Any = cut(teacher, plan)
    save_whole(student, tokenizer, args.output)
    show(teacher, student, plan, args.output)


def show(teacher: Any, student: Any, plan: Plan, folder: Path) -> None:
    """Print what stayed: layers, sizes, parameters."""
    from rich.table import Table

    console = make_console(soft_wrap=True)
    table = Table("", "teacher", "student")
    old, new = text_config(teacher.config), text_config(student.config)
    for name in ("num_hidden_layers", "hidden_size", "intermediate_size"):
        if isinstance(getattr(old, name, None), int):
            table.add_row(name, f"{getattr(old, name):,}", f"{getattr(new, name):,}")
    body, head = (
        [model.num_parameters(exclude_embeddings=without) for model in (teacher, student)] for without in (True, False)
    )
    table.add_row("parameters", *(f"{count:,}" for count in head))
    table.add_row("without embeddings", *(f"{count:,}" for count in body))
    table.add_row("dtype", *(str(model.dtype).removeprefix("torch.") for model in (teacher, student)))
    console.print(table)
    console.print(f"layers kept: {' '.join(map(str, plan.layers))}")
    if plan.influence is not None:
        console.print("block influence: " + " ".join(f"{i}:{value:.3f}" for i, value in enumerate(plan.influence)))
    console.print(f"student in {folder}")


if __name__ == "__main__":
    run_script(main)
