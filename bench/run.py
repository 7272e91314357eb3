"""A plan, measured: rows into a results file, from that a report."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from . import end_to_end, environment, machine
from .architectures import suite as suite_of_pairs
from .plans import cpu_plan, quick_plan
from .progress import progress
from .report import write_report
from .runner import Deadline, batches, run_cases
from .shapes import TOKENS
from .store import Store
from .trial import WAYS
from .worker import Case

CASE_SECONDS = 600.0
# Kept back for the report.
SPARE_SECONDS = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="everything at tiny shapes: does it work?")
    parser.add_argument("--trial", action="store_true", help="into build/bench/ instead of bench/results/, and anew")
    parser.add_argument("--fresh", action="store_true", help="measure finished cases again")
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="shapes to measure (default: all of the plan)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="implementations to measure (default: all)")
    parser.add_argument("--tokens", nargs="+", choices=TOKENS, help="which tokens are hard (default: all of the plan)")
    parser.add_argument("--rounds", type=int, help="timed rounds at the most (default 5)")
    parser.add_argument("--minutes", type=float, help="the whole run's limit (default: none)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: PyTorch's own; 1 with --quick)")
    parser.add_argument("--output", type=Path, help="folder of the results (default bench/results/<machine>)")


def run(args: argparse.Namespace) -> Path:
    """Measure on the CPU what is not finished yet; the results file, with its report beside it.

    Raises:
        ValueError: for arguments out of range or unknown names.
    """
    for name in ("rounds", "minutes", "threads"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} must be above 0, got {value}")
    environment.use_threads(args.threads or (1 if args.quick else None))
    own = {} if args.rounds is None else {"rounds": args.rounds}
    whole = quick_plan(**own) if args.quick else cpu_plan(**own)
    cases = chosen(whole, args.shapes, args.only, args.tokens)
    deadline = Deadline(None if args.minutes is None else 60.0 * args.minutes - SPARE_SECONDS)

    hardware = environment.hardware("cpu")
    folder = args.output or environment.results_folder(hardware, args.quick or args.trial)
    header = {
        "suite": "cpu",
        "hardware": hardware,
        "versions": environment.versions(),
        "source": environment.source(),
        "settings": {"quick": args.quick, "rounds": whole[0].rounds, "dtype": "float32", "device": "cpu"},
    }
    name = "cpu-quick" if args.quick else "cpu-trial" if args.trial else "cpu"
    store = Store(folder / f"{name}.json", header, args.fresh or args.trial)
    partial = args.trial or len(cases) < len(whole)
    # Two cores take minutes for a pair; the other is measured by `python -m bench.end_to_end`.
    pairs = suite_of_pairs("cpu", args.quick)[:1]
    pieces = 0 if partial else end_to_end.pieces(len(pairs), len(WAYS))
    with progress("cpu suite", len(batches(cases)) + 1 + pieces) as tick:
        tick("this machine's two numbers")
        if "machine" not in store.data:
            store.write(machine=machine.measure_machine(torch.device("cpu"), torch.float32))
        run_cases(cases, store, deadline, CASE_SECONDS, tick)
        # What found no time is looked for again.
        if not partial and any(r["status"] == "skipped" for r in store.data.get("end_to_end", [{"status": "skipped"}])):
            store.write(
                end_to_end=end_to_end.measure_end_to_end("cpu", args.quick, tick, deadline, architectures=pairs)
            )
    print(write_report(store.path))
    return store.path


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
