"""``python -m bench COMMAND``: how much memory, how fast, how exact; ``COMMAND --help`` says more."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "run": ("cpu", "measure what this CPU can, resuming where it was stopped; then report"),
    "gpu": ("gpu", "tests and measurements on a machine with an NVIDIA GPU"),
    "report": ("report", "Markdown, plots and the README's table again, from the JSON alone"),
    "compare": ("compare", "two results files, row by row; exit code 1 past a regression"),
    "model": ("model", "what the performance model predicts"),
    "machine": ("machine", "the numbers of this machine that the model takes"),
    "end_to_end": ("end_to_end", "a training step of whole models"),
    "training": ("training", "training steps of whole models on a GPU, beside eager, torch.compile and Liger"),
    "vocab_parallel": ("vocab_parallel", "a vocabulary-parallel step, predicted"),
    "sums": ("sums", "sums of objectives beside the dearest of their terms"),
    "teachers": ("teachers", "a step by what the teacher is"),
    "low_precision": ("low_precision", "steps in bf16 on a CPU beside fp32 and their bare GEMMs"),
    "lists": ("lists", "lists made from a head beside the GEMM of its logits"),
    "caches": ("caches", "teachers on disk: bytes a token beside the error of the gradient"),
    "kernels": ("kernels", "compiled kernels to carry to a machine with a GPU"),
}
"""The module whose ``main(arguments)`` does it, and what it does."""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name:<15} {what}" for name, (_, what) in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args(arguments[:1]).command
    # Imported when asked for: a run on a GPU leaves torch to its stages.
    module = importlib.import_module(f".{COMMANDS[command][0]}", __package__)
    return int(module.main(arguments[1:]))


if __name__ == "__main__":
    raise SystemExit(main())
