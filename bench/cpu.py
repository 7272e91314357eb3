"""``python -m bench run``: what a CPU can measure, most important first, into a results file and its report."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import end_to_end, environment, machine
from .problems import (
    CPU_CURVES,
    CPU_PEER_SHAPE,
    CPU_SHAPES,
    EVERY,
    FAR,
    QUICK_CURVES,
    QUICK_SHAPE,
    VALID,
    Shape,
    Variant,
)
from .registry import IMPLEMENTATIONS, JSD, KL, SFT
from .report import write_report
from .session import ROOT, Lines, Row, Stage, json_safe, run_stages
from .worker import Case

SCHEMA = 2
CASE_SECONDS = 600.0
MIXED: tuple[Variant, ...] = (Variant(),)
# Beyond these a step of plain PyTorch takes two cores a quarter of a minute.
EAGER_LOGITS = 34_000_000


def make_plan(quick: bool = False) -> list[Case]:
    """fp32. Every implementation that a CPU has, the gated objective at two shapes, the peers' at smaller ones; with
    ``quick`` all at tiny shapes, to see whether it works."""
    shapes, peer_shape = ((QUICK_SHAPE,), QUICK_SHAPE) if quick else (CPU_SHAPES, CPU_PEER_SHAPE)
    curves, rounds = (QUICK_CURVES, 3) if quick else (CPU_CURVES, 5)

    def case(shape: Shape, name: str, variants: tuple[Variant, ...], **changes: Any) -> Case:
        settings = {"warmup": 1, "error_tokens": 64, "seconds": 8.0, **changes}
        return Case(shape, name, variants, "cpu", "float32", rounds, **settings)

    plan = [case(shape, "fused_kd", EVERY, seconds=12.0) for shape in shapes]
    plan += [case(shape, "torch.compile", MIXED) for shape in shapes]
    beside = ("eager", "fused_kd top-k 64", "fused_kd top-k 64 bucket", "fused_kd torch")
    plan += [case(shapes[0], name, MIXED) for name in beside]
    for group in (JSD, KL, SFT):  # plain PyTorch costs much the same in every group
        names = [name for name, known in IMPLEMENTATIONS.items() if known.group == group]
        plan += [case(peer_shape, name, MIXED, seconds=3.5) for name in names if not name.startswith("eager")]
    plan += [case(peer_shape, name, (FAR,), seconds=3.5) for name in ("fused_kd", "torch.compile")]

    points = [(axis, shape, MIXED) for axis, along in curves.items() for shape in along]
    points.append(("valid", curves["N"][1]._replace(name="valid"), tuple(Variant(valid=valid) for valid in VALID)))
    for name in ("fused_kd", "torch.compile", "eager"):
        for axis, shape, variants in points:
            if name != "eager" or (axis != "valid" and shape.N * shape.V <= EAGER_LOGITS):
                plan.append(case(shape, name, variants, purpose=axis, error_tokens=0, seconds=2.0))
    return plan


def chosen(cases: list[Case], shapes: list[str] | None, only: list[str] | None) -> list[Case]:
    """The cases of some shapes and implementations; ValueError for a name that the plan does not have."""
    for argument, names, known in (
        ("--shapes", shapes, {case.shape.name for case in cases}),
        ("--only", only, {case.implementation for case in cases}),
    ):
        if unknown := sorted(set(names or ()) - known):
            raise ValueError(f"{argument} must name some of {', '.join(sorted(known))}; got {', '.join(unknown)}")
    found = [
        case
        for case in cases
        if (shapes is None or case.shape.name in shapes) and (only is None or case.implementation in only)
    ]
    if not found:
        raise ValueError("--shapes and --only leave nothing of the plan to measure")
    return found


def batches(cases: list[Case]) -> list[list[Case]]:
    """Cases that share a process: those of one implementation in tables, and the points of its curves."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(_stage(case), []).append(case)
    return list(found.values())


def _stage(case: Case) -> str:
    return f"{case.implementation}:{'table' if case.purpose == 'table' else 'curves'}"


def _key(case: Case, variant: Variant) -> tuple[str, str]:
    return _stage(case), f"{case.shape.name} {variant}"


def run_cases(cases: list[Case], lines: Lines) -> None:
    """Measure what is not finished yet, each batch in a process with a limit."""
    for batch in batches(cases):
        records, todo = lines.rows(), []
        for case in batch:
            missing = tuple(v for v in case.variants if records.get(_key(case, v), {}).get("status") != "ok")
            if missing and case.missing() is None:
                todo.append(replace(case, variants=missing))
        if todo:
            stage = _stage(todo[0])
            command = [sys.executable, "-m", "bench.worker", str(lines.path), lines.code, stage]
            command += [case.to_json() for case in todo]
            # One at a time: what the next one imports would cost this one's time.
            run_stages([Stage(stage, CASE_SECONDS * len(todo), command)], lines, math.inf, lines.path.parent / "logs")


def results(plan: list[Case], cases: list[Case], lines: Lines) -> list[Row]:
    """Every row of the plan that was ever measured; what is missing of the ``cases`` says why."""
    records = lines.rows()
    wanted = {_key(case, variant) for case in cases for variant in case.variants}
    found = [(_key(case, v), _result(case, v, records)) for case in plan for v in case.variants]
    return [row for key, row in found if row["status"] == "ok" or key in wanted]


def _result(case: Case, variant: Variant, records: dict[tuple[str, str], Row]) -> Row:
    found = records.get(_key(case, variant))
    if found is not None:
        return {name: value for name, value in found.items() if name not in ("stage", "key", "code", "at")}
    if reason := case.missing():
        return case.row(variant, status="missing", reason=reason)
    ended = records.get((_stage(case), "stage"), {"status": "not reached"})
    status = "failed" if ended["status"] == "failed" else "skipped"
    return case.row(variant, status=status, reason=ended.get("reason", "ended before it was measured"))


def run(args: argparse.Namespace) -> Path:
    """Measure on the CPU what is not finished yet; the results file, with its report beside it.

    Raises:
        ValueError: for unknown names.
    """
    whole = make_plan(args.quick)
    cases = chosen(whole, args.shapes, args.only)
    hardware = environment.hardware("cpu")
    header: dict[str, Any] = {
        "suite": "cpu",
        "hardware": hardware,
        "versions": environment.versions(),
        "source": environment.source(),
        "settings": {"quick": args.quick, "rounds": whole[0].rounds, "dtype": "float32", "device": "cpu"},
    }
    trial = args.quick or args.trial
    build = ROOT / "build" / "bench"
    folder = args.output or (build if trial else ROOT / "bench" / "results" / environment.machine_name(hardware))
    name = "cpu-quick" if args.quick else "cpu-trial" if args.trial else "cpu"
    # Only rows of the same code, settings, hardware and versions count.
    identity = {key: value for key, value in header.items() if key != "source"} | {"digest": header["source"]["digest"]}
    code = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    lines = Lines((args.output or build) / f"{name}.jsonl", code)
    if args.fresh or args.trial:
        lines.path.unlink(missing_ok=True)

    if ("machine", "numbers") not in lines.rows():
        lines.put("machine", "numbers", "ok", machine=machine.measure_machine("cpu", torch.float32))
    run_cases(cases, lines)
    if not args.trial and len(cases) == len(whole):
        pair = end_to_end.PAIRS["tiny" if args.quick else "llama-3-small"]
        header["end_to_end"] = end_to_end.measure_pair(pair, end_to_end.WAYS, lines)
    header["machine"] = lines.rows()["machine", "numbers"]["machine"]
    path = folder / f"{name}.json"
    write_results(path, header | {"rows": results(whole, cases, lines)})
    print(write_report(path))
    return path


def write_results(path: Path, data: dict[str, Any]) -> None:
    """At once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    temporary = path.with_suffix(".tmp")
    whole = json_safe({"schema": SCHEMA, **data, "written": written})
    temporary.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="everything at tiny shapes: does it work?")
    parser.add_argument("--trial", action="store_true", help="into build/bench/ instead of bench/results/, and anew")
    parser.add_argument("--fresh", action="store_true", help="measure finished cases again")
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="shapes to measure (default: all of the plan)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="implementations to measure (default: all)")
    parser.add_argument("--output", type=Path, help="folder of the results (default bench/results/<machine>)")
    try:
        run(parser.parse_args(arguments))
    except ValueError as error:
        print(f"bench run: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
