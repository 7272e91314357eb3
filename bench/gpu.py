"""``python -m bench gpu --out FOLDER``: what a machine with an NVIDIA GPU can tell in six minutes (--minutes), first
things first.

Each stage is a process with a limit of its own, whose results are lines of FOLDER/gpu.jsonl, each on the disk before
the next is measured. A run that is cut keeps them; the next one in the same folder goes on from there, and measures
again only with other code or ``--fresh``. Needs no network and nothing installed; what is missing is a row that says
so. ``--rehearse`` does the same on a CPU at tiny shapes: does the script work?
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from .gpu_tests import TEST_SECONDS
from .session import NO_GPU, Lines, Stage, in_time, prepare, python_path, read, run_stages

MINUTES = 6.0
# Kept back for the tables, which take torch for the performance model.
SPARE_SECONDS = 10.0
FIRST, FIRST_SECONDS = "environment", 60.0
STAGES = {
    "machine": 40.0,
    "tests": TEST_SECONDS + 20,
    "sanitizer": 50.0,
    "rows": 70.0,
    "steps:A": 70.0,
    "steps:B": 60.0,
    "streaming:A": 45.0,
    "streaming:B": 40.0,
    "choices:row": 50.0,
    "choices:step": 90.0,
    "profile": 45.0,
    "ncu:triton": 45.0,
    "ncu:cuda": 45.0,
    "peers": 60.0,
}
"""In order, each with its limit in seconds; ``peers`` once a peer."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", required=True, help="where results go; an earlier run there is continued"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"the whole run's limit (default {MINUTES:g})")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="stages, as steps:A or, for all of a kind, steps")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="compiled kernels, of `python -m bench kernels`")
    parser.add_argument("--fresh", action="store_true", help="measure again what the folder has")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at tiny shapes")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.stage is not None:
        from .stages import run_stage

        return run_stage(args.stage, args.out, rehearse=args.rehearse, cache=args.cache)
    if not args.minutes > 0:
        print(f"bench gpu: --minutes must be above 0, got {args.minutes}", file=sys.stderr)
        return 2
    known = {name for stage in (FIRST, *STAGES) for name in (stage, stage.split(":")[0])}
    if unknown := [name for name in args.only or () if name not in known and not name.startswith("peers:")]:
        print(f"bench gpu: --only knows no {', '.join(unknown)}; stages: {', '.join(sorted(known))}", file=sys.stderr)
        return 2
    return run(args)


def run(args: argparse.Namespace) -> int:
    """All stages that fit the time; the exit code: 1 where something failed, 2 without a GPU."""
    end = time.monotonic() + 60 * args.minutes - SPARE_SECONDS
    out: Path = args.out.resolve()
    logs, results = out / "logs", out / "gpu.jsonl"
    logs.mkdir(parents=True, exist_ok=True)
    if args.fresh:
        for path in (results, *(out / "tests").glob("*/*.jsonl")):
            path.unlink(missing_ok=True)
    cache = (args.cache or out / "cache").resolve()
    environment = os.environ | {"PYTHONPATH": python_path()}
    environment |= {"TRITON_CACHE_DIR": str(cache / "triton"), "FUSED_KD_CACHE": str(cache / "cuda")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "bench", "gpu", "--out", str(out)] + ["--rehearse"] * args.rehearse

    first = [*command, *(["--cache", str(cache)] if args.cache else []), "--stage", FIRST]
    log = logs / f"{FIRST}.log"
    code, reason = in_time(prepare(first, log, environment), min(FIRST_SECONDS, end - time.monotonic()), log)
    if code != 0:
        print(f"bench gpu: {reason}", file=sys.stderr)
        return NO_GPU if code == NO_GPU else 1
    about = [row for row in read(results) if row["stage"] == FIRST][-1]
    lines = Lines(results, about["code"])
    ended = {stage for (stage, key), row in lines.rows().items() if key == "stage" and row["status"] == "ok"}
    todo = [
        Stage(name, seconds, [*command, "--stage", name])
        for kind, seconds in STAGES.items()
        for name in ([f"peers:{peer}" for peer in about["peers"]] if kind == "peers" else [kind])
        if name not in ended and (not args.only or name in args.only or name.split(":")[0] in args.only)
    ]
    run_stages(todo, lines, end, logs, environment)
    return report(out)


def report(out: Path) -> int:
    """Write FOLDER/report.md and print the short tables; the exit code of a run."""
    from .gpu_report import failed, markdown, short

    rows = read(out / "gpu.jsonl")
    if not rows:
        print(f"bench gpu: {out / 'gpu.jsonl'} has no lines", file=sys.stderr)
        return 2
    (out / "report.md").write_text(markdown(rows))
    print(short(rows))
    print(f"{out / 'report.md'}")
    return int(failed(rows))


if __name__ == "__main__":
    raise SystemExit(main())
