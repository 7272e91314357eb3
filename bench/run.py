"""A plan, measured: rows into a results file, from that a report."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from . import end_to_end, environment, machine
from .architectures import suite as suite_of_pairs
from .plans import cpu_plan, gpu_plan, quick_plan, unsupported
from .progress import progress
from .report import write_report
from .runner import Deadline, batches, run_cases, run_tests
from .shapes import TOKENS
from .store import Store
from .trial import WAYS
from .worker import Case

GPU_MINUTES = 9.0
TEST_SECONDS = 150.0
CASE_SECONDS = {"cpu": 600.0, "cuda": 120.0}
# Kept back for the report.
SPARE_SECONDS = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is an NVIDIA GPU")
    parser.add_argument("--quick", action="store_true", help="everything at tiny shapes: does it work?")
    parser.add_argument("--trial", action="store_true", help="into build/bench/ instead of bench/results/, and anew")
    parser.add_argument("--fresh", action="store_true", help="measure finished cases again")
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="shapes to measure (default: all of the plan)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="implementations to measure (default: all)")
    parser.add_argument("--tokens", nargs="+", choices=TOKENS, help="which tokens are hard (default: all of the plan)")
    parser.add_argument("--rounds", type=int, help="timed rounds at the most (default 5 on a CPU, 10 on a GPU)")
    parser.add_argument("--minutes", type=float, help="the whole run's limit (default: none; 9 on a GPU)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: PyTorch's own; 1 with --quick)")
    parser.add_argument("--skip-tests", action="store_true", help="on a GPU: do not run the tests marked gpu")
    parser.add_argument("--output", type=Path, help="folder of the results (default bench/results/<machine>)")


def run(args: argparse.Namespace) -> Path:
    """Measure what is not finished yet; the results file, with its report beside it.

    Raises:
        ValueError: for arguments out of range, unknown names, or a device that is not here.
    """
    for name in ("rounds", "minutes", "threads"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} must be above 0, got {value}")
    device = args.device or ("cpu" if unsupported() else "cuda")
    if device == "cuda" and (reason := unsupported()):
        raise ValueError(f"--device cuda: {reason}")
    environment.use_threads(args.threads or (1 if args.quick and device == "cpu" else None))
    whole = plan(device, args.quick, args.rounds)
    cases = chosen(whole, args.shapes, args.only, args.tokens)
    minutes = args.minutes or (GPU_MINUTES if device == "cuda" else None)
    deadline = Deadline(None if minutes is None else 60.0 * minutes - SPARE_SECONDS)

    hardware = environment.hardware(device)
    quick = args.quick or args.trial
    folder = args.output or environment.results_folder(hardware, quick)
    suite = "gpu" if device == "cuda" else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    settings = {"quick": args.quick, "rounds": whole[0].rounds, "dtype": str(dtype).removeprefix("torch.")}
    header = {
        "suite": suite,
        "hardware": hardware,
        "versions": environment.versions(),
        "source": environment.source(),
        "settings": {**settings, "device": device},
    }
    name = f"{suite}-quick" if args.quick else f"{suite}-trial" if args.trial else suite
    store = Store(folder / f"{name}.json", header, args.fresh or args.trial)
    partial = args.trial or len(cases) < len(whole)
    # Two cores take minutes for a pair; the other is measured by `python -m bench.end_to_end`.
    pairs = suite_of_pairs(device, args.quick)[: 1 if device == "cpu" else None]
    pieces = 0 if partial else end_to_end.pieces(len(pairs), len(WAYS))
    with progress(f"{suite} suite", len(batches(cases)) + 2 + pieces) as tick:
        tick("tests marked gpu")
        if device == "cuda" and not args.skip_tests and not partial:
            store.write(tests=run_tests(min(TEST_SECONDS, deadline.left())))
        tick("this machine's two numbers")
        if "machine" not in store.data:
            store.write(machine=machine.measure_machine(torch.device(device), dtype))
        run_cases(cases, store, deadline, CASE_SECONDS[device], tick)
        # What found no time is looked for again.
        if not partial and any(r["status"] == "skipped" for r in store.data.get("end_to_end", [{"status": "skipped"}])):
            store.write(
                end_to_end=end_to_end.measure_end_to_end(device, args.quick, tick, deadline, architectures=pairs)
            )
    print(write_report(store.path))
    return store.path


def plan(device: str, quick: bool, rounds: int | None) -> list[Case]:
    own = {} if rounds is None else {"rounds": rounds}
    if quick:
        return quick_plan(device, **own)
    return gpu_plan(**own) if device == "cuda" else cpu_plan(**own)


def chosen(cases: list[Case], shapes: list[str] | None, only: list[str] | None, tokens: list[str] | None) -> list[Case]:
    """The cases of some shapes, implementations and tokens; ValueError for a name that the plan does not have."""
    for argument, names, known in (
        ("--shapes", shapes, {case.shape.name for case in cases}),
        ("--only", only, {case.implementation for case in cases}),
    ):
        if unknown := sorted(set(names or ()) - known):
            raise ValueError(f"{argument} must name some of {', '.join(sorted(known))}; got {', '.join(unknown)}")
    found = []
    for case in cases:
        variants = tuple(v for v in case.variants if tokens is None or v.tokens in tokens)
        here = (shapes is None or case.shape.name in shapes) and (only is None or case.implementation in only)
        if here and variants:
            found.append(replace(case, variants=variants))
    if not found:
        raise ValueError("--shapes, --only and --tokens leave nothing of the plan to measure")
    return found


def main(args: argparse.Namespace) -> int:
    try:
        run(args)
    except ValueError as error:
        print(f"bench run: {error}", file=sys.stderr)
        return 2
    return 0
