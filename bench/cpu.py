"""The CPU benchmark: fused_kd against its bare GEMMs, eager PyTorch and torch.compile, in fp32.

    python -m bench.cpu            # about forty minutes on two cores; resumes where it was stopped
    python -m bench.cpu --quick    # a tiny shape: does it work?

Writes cpu.json, and from it cpu.md and cpu.png, to bench/results/<machine>/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import environment
from .implementations import IMPLEMENTATIONS
from .progress import progress
from .report import write_report
from .runner import Deadline, run_cases
from .shapes import CPU_SHAPES, QUICK_SHAPES, TOKENS
from .store import Store
from .worker import Case

DEFAULT = ("fused_kd", "fused_kd top-k 64", "fused_kd top-k 64 bucket", "eager", "torch.compile")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shape and few rounds")
    parser.add_argument("--fresh", action="store_true", help="measure finished cases again")
    parser.add_argument("--rounds", type=int, help="timed rounds after warm-up (default 9; 7 with --quick)")
    parser.add_argument("--shapes", nargs="+", choices=[s.name for s in CPU_SHAPES], help="default: all")
    parser.add_argument("--implementations", nargs="+", choices=list(IMPLEMENTATIONS), default=list(DEFAULT))
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: PyTorch's own; 1 with --quick)")
    parser.add_argument("--output", type=Path, help="folder of the results (default bench/results/<machine>)")
    args = parser.parse_args(arguments)
    rounds = args.rounds or (7 if args.quick else 9)
    if rounds < 1:
        parser.error(f"--rounds must be at least 1, got {rounds}")
    environment.use_threads(args.threads or (1 if args.quick else None))
    shapes = QUICK_SHAPES if args.quick else [s for s in CPU_SHAPES if args.shapes is None or s.name in args.shapes]

    hardware = environment.hardware("cpu")
    folder = args.output or environment.results_folder(hardware, args.quick)
    settings = {"quick": args.quick, "rounds": rounds, "dtype": "float32", "device": "cpu"}
    header = {
        "suite": "cpu",
        "hardware": hardware,
        "versions": environment.versions(),
        "source": environment.source(),
        "settings": settings,
    }
    store = Store(folder / ("cpu-quick.json" if args.quick else "cpu.json"), header, args.fresh)
    cases = [
        Case(
            shape, name, tuple((tokens, None) for tokens in TOKENS), "cpu", "float32", rounds,
            warmup=2, error_tokens=1024,
        )
        for shape in shapes
        for name in args.implementations
    ]  # fmt: skip
    with progress(f"CPU, {torch.get_num_threads()} threads", len(cases)) as tick:
        run_cases(cases, store, Deadline(None), limit=3600.0, tick=tick)
    print(write_report(store.path))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
