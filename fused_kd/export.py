"""Write a trained model as an ordinary folder, with its adapters added.

    python -m fused_kd.export runs/chat --output chat-model
    python -m fused_kd.export runs/adapters --base BASE_MODEL --dtype bf16 --output chat-model

transformers, vLLM and llama.cpp's convert_hf_to_gguf.py read OUTPUT.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fused_kd.training.exporting import export
from fused_kd.training.hidden_codes import LONG_NAMES, long_name
from fused_kd.training.script import Parser, run_script


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m fused_kd.export", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("source", help="a training's folder, or a folder, hub name or GGUF file of a model, or LoRA adapters")
    add("--base", help="folder or hub name of what the adapters belong to; default: the one that they name")
    add("--dtype", type=long_name, default="auto", choices=("auto", *LONG_NAMES.values()),
        help="of the weights: or bf16, fp16, fp32; default %(default)s: that of the files")  # fmt: skip
    add("--output", required=True, type=Path, help="the folder; what is there must be an older model")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    model: Any = export(args.source, args.output, base=args.base, dtype=args.dtype)
    files = sorted(path.name for path in args.output.iterdir())
    print(f"{type(model).__name__}, {model.num_parameters():,} parameters, {str(model.dtype).removeprefix('torch.')}")
    print(f"{args.output}: {' '.join(files)}")


if __name__ == "__main__":
    run_script(main)
