"""Show which tokens a student finds difficult, checkpoint by checkpoint: an HTML page, and the terminal.

    python examples/inspect_tokens.py --data pairs.jsonl.gz --direction en-de --teacher runs/mine/teacher/model \
        --student runs/mine/student/model runs/mine/self_evolution/model --limit 20 --output inspect.html --terminal

Each response token is coloured by its difficulty KL(yt||q) and marked where the objective calls it hard.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.progress import track
from transformers.utils import logging

import fused_kd as fk
from fused_kd.training.command import make_console, run_script
from fused_kd.training.data.pairs import load_pairs
from fused_kd.training.data.prompts import PROMPTS, tokenize_pairs
from fused_kd.training.evaluation.token_view import checkpoint_labels, token_difficulties
from fused_kd.training.evaluation.token_view_render import render_html, render_terminal
from fused_kd.training.presets import load_model, load_tokenizer
from fused_kd.training.runs import write_text
from fused_kd.training.specs import parse_objective


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--student", nargs="+", required=True, metavar="PATH", help="checkpoints, in the order of the page's rows")
    add("--teacher", required=True, metavar="PATH", help="a folder or hub name; its tokenizer serves all models")
    add("--data", default="builtin", help="builtin, a JSONL(.gz) file, a folder of them, or a hub name")
    add("--direction", default="en-de")
    add("--split", default="valid", help="split, or file name stem in a folder")
    add("--limit", type=int, default=10, help="the first so many pairs of the split")
    add("--ids", type=int, nargs="+", metavar="ROW", help="these pairs of the split instead, counted from 1")
    specs = f"name or name:key=value,...; of {', '.join(fk.OBJECTIVES)}: its target and its hard tokens"
    add("--objective", default="self_evolution", metavar="SPEC", help=specs)
    add("--prompt", choices=PROMPTS, default="tiny")
    add("--max-length", type=int, default=256, help="tokens of prompt and response")
    add("--batch", type=int, default=8, help="sentences at once")
    add("--scale-max", type=float, metavar="NATS", help="difficulty of the last colour; default: 98th percentile")
    add("--output", default="inspect.html", metavar="HTML")
    add("--terminal", action="store_true", help="print the sentences as well")
    args = parser.parse_args(argv)
    if args.limit < 1 or args.batch < 1:
        parser.error(f"--limit and --batch must be at least 1, got {args.limit} and {args.batch}")
    if args.ids and min(args.ids) < 1:
        parser.error(f"--ids count from 1, got {min(args.ids)}")
    return args


def main(argv: list[str] | None = None) -> Path:
    args = parse_arguments(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = make_console()
    objective = parse_objective(args.objective).objective
    pairs = load_pairs(args.data, args.split, args.direction, limit=max(args.ids) if args.ids else args.limit)
    if args.ids:
        if max(args.ids) > len(pairs):
            raise SystemExit(f"--ids: {args.split} has {len(pairs)} pairs, got {max(args.ids)}")
        pairs = [pairs[number - 1] for number in args.ids]

    tokenizer = load_tokenizer(args.teacher)
    rows = tokenize_pairs(tokenizer, args.prompt, pairs, args.direction, args.max_length, skip_long=False)
    titles = [pair.source for pair in pairs]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_model(args.teacher, tokenizer, seed=0).to(device)
    views = []
    labels = checkpoint_labels(args.student)
    for path, label in track(
        list(zip(args.student, labels, strict=True)), "checkpoints", console=make_console(stderr=True)
    ):
        student = load_model(path, tokenizer, seed=0).to(device)
        views += token_difficulties(
            student, teacher, rows, tokenizer, objective, checkpoint=label, titles=titles, batch_size=args.batch
        )

    output = Path(args.output)
    write_text(output, render_html(views, teacher=args.teacher, scale_max=args.scale_max))
    if args.terminal:
        console.print(render_terminal(views, scale_max=args.scale_max))
    console.print(f"{len(views)} sentences of {len(labels)} checkpoints are in {output}")
    return output


if __name__ == "__main__":
    run_script(main)
