"""``python -m bench gpu --out FOLDER``: what a machine with an NVIDIA GPU can tell in six minutes (--minutes), first
things first.

Each stage is a process with a limit of its own, whose results are lines of FOLDER/gpu.jsonl, each on the disk before
the next is measured. A run that is cut keeps them; the next one in the same folder goes on from there, and measures
again only with other code or ``--fresh``. Needs no network and nothing installed; what is missing is a row that says
so. ``--rehearse`` does the same on a CPU at tiny shapes: does the script work? ``--report FOLDER`` writes the tables
again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from .checkout import checkout
from .gpu_tests import TEST_SECONDS
from .lines import Lines, read
from .process import BROKEN, NO_GPU, ROOT, kill, start, why

MINUTES = 6.0
# Less is not worth the start of a process.
LEAST_SECONDS = 12.0
# Kept back for the tables, which take torch for the performance model.
SPARE_SECONDS = 10.0
# Of a stage whose rows keep losing the GPU's context.
MOST_RESTARTS = 4


class Stage(NamedTuple):
    """``name``, ``seconds`` at the most."""

    name: str
    seconds: float


FIRST = Stage("environment", 60)
STAGES = (
    Stage("machine", 40),
    Stage("tests", TEST_SECONDS + 20),
    Stage("sanitizer", 50),
    Stage("gemms:A", 40),
    Stage("gemms:B", 40),
    Stage("rows", 70),
    Stage("steps:A", 70),
    Stage("steps:B", 60),
    Stage("streaming:A", 45),
    Stage("streaming:B", 40),
    Stage("choices:row", 50),
    Stage("choices:step", 90),
    Stage("profile", 45),
    Stage("ncu:triton", 45),
    Stage("ncu:cuda", 45),
)
PEER_SECONDS = 60.0
# Turns of another checkout and this one.
AGAINST = ("theirs:1", "ours:1", "theirs:2", "ours:2")
AGAINST_SECONDS = 50.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", type=Path, metavar="FOLDER", help="where results go; an earlier run there is continued")
    place.add_argument("--report", type=Path, metavar="FOLDER", help="the tables of a run, from its lines alone")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"the whole run's limit (default {MINUTES:g})")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="stages, as steps:A or, for all of a kind, steps")
    parser.add_argument("--against", metavar="COMMIT_OR_FOLDER", help="steps of another checkout too, in turns")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="compiled kernels, of `python -m bench.kernels`")
    parser.add_argument("--fresh", action="store_true", help="measure again what the folder has")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at tiny shapes")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--tree", type=Path, help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> int:
    if args.stage is not None:
        if args.tree is not None:
            sys.path.insert(0, str(args.tree))  # another fused_kd under this bench
        from .stages import run_stage

        return run_stage(args.stage, args.out, rehearse=args.rehearse, cache=args.cache)
    if args.report is not None:
        return report(args.report)
    if not args.minutes > 0:
        print(f"bench gpu: --minutes must be above 0, got {args.minutes}", file=sys.stderr)
        return 2
    names = [*(stage.name for stage in STAGES), "against", "peers:", FIRST.name]
    known = {name for s in names for name in (s, s.split(":")[0])}
    if unknown := [name for name in args.only or () if name not in known and not name.startswith("peers:")]:
        print(f"bench gpu: --only knows no {', '.join(unknown)}; stages: {', '.join(sorted(known))}", file=sys.stderr)
        return 2
    return run(args)


def run(args: argparse.Namespace) -> int:
    """All stages that fit the time; the exit code: 1 where something failed, 2 without a GPU."""
    end = time.monotonic() + 60 * args.minutes - SPARE_SECONDS
    out: Path = args.out.resolve()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    results = out / "gpu.jsonl"
    if args.fresh:
        for path in (results, *(out / "tests").glob("*/*.jsonl")):
            path.unlink(missing_ok=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    environment.pop("TRITON_INTERPRET", None)
    cache = (args.cache or out / "cache").resolve()
    environment |= {"TRITON_CACHE_DIR": str(cache / "triton"), "FUSED_KD_CACHE": str(cache / "cuda")}
    command = [sys.executable, "-m", "bench", "gpu", "--out", str(out)] + ["--rehearse"] * args.rehearse
    given = ["--cache", str(cache)] if args.cache else []

    first = [*command, *given, "--stage", FIRST.name]
    log = out / "logs" / "environment.log"
    code, reason = in_time(prepare(first, log, environment), min(FIRST.seconds, end - time.monotonic()), log)
    if code != 0:
        print(f"bench gpu: {reason}", file=sys.stderr)
        return NO_GPU if code == NO_GPU else 1
    about = [row for row in read(results) if row["stage"] == FIRST.name][-1]
    lines = Lines(results, about["code"])
    stages = list(STAGES) + [Stage(f"peers:{name}", PEER_SECONDS) for name in about["peers"]]
    tree = []
    if args.against:
        try:
            other = checkout(args.against, out)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            print(f"bench gpu: --against {args.against}: {error}", file=sys.stderr)
            return 2
        tree = ["--tree", str(other.folder)]
        place = next(i for i, stage in enumerate(stages) if stage.name == "streaming:A")
        stages[place:place] = [Stage(f"against:{other.name}:{turn}", AGAINST_SECONDS) for turn in AGAINST]
    todo = [
        (stage, [*command, *(tree if ":theirs:" in stage.name else []), "--stage", stage.name])
        for stage in stages
        if not args.only or stage.name in args.only or stage.name.split(":")[0] in args.only
    ]
    run_stages(todo, lines, end, out / "logs", environment)
    return report(out)


def run_stages(
    stages: list[tuple[Stage, list[str]]],
    lines: Lines,
    end: float,
    logs: Path,
    environment: dict[str, str] | None = None,
) -> None:
    """Those that are not finished, each until its limit or ``end``, and a row of what became of each.

    While one measures, the process of the next imports what it needs and waits for a line.
    """
    ended = lines.rows()
    todo = [(s, c) for s, c in stages if ended.get((s.name, "stage"), {}).get("status") != "ok"]
    waiting: list[subprocess.Popen] = []
    try:
        for number, (stage, command) in enumerate(todo):
            log = _log(logs, stage)
            seconds = min(stage.seconds, end - time.monotonic())
            if seconds < min(LEAST_SECONDS, stage.seconds):
                lines.put(stage.name, "stage", "not reached", reason="no time left in this run")
                continue
            print(f"{stage.name} ...", file=sys.stderr, flush=True)
            began = time.monotonic()
            process = waiting.pop() if waiting else prepare(command, log, environment)
            if number + 1 < len(todo):
                waiting.append(prepare(todo[number + 1][1], _log(logs, todo[number + 1][0]), environment))
            code, reason = in_time(process, seconds, log)
            for _ in range(MOST_RESTARTS):
                left = began + seconds - time.monotonic()
                if code == BROKEN and left > 0:  # goes on with the rows after the one that cost the GPU's context
                    code, reason = in_time(prepare(command, log, environment), left, log)
            status = "ok" if code == 0 else "cut" if code is None else "failed"
            more = {"reason": reason} if reason else {}
            lines.put(stage.name, "stage", status, took=round(time.monotonic() - began, 1), **more)
    finally:
        for process in waiting:
            kill(process)


def _log(logs: Path, stage: Stage) -> Path:
    return logs / f"{stage.name.replace(':', '-').replace(' ', '-')}.log"


def prepare(command: list[str], log: Path, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """A process that begins when it reads a line, see :func:`in_time`."""
    log.write_text("")
    return start(command, log, environment, ROOT, stdin=subprocess.PIPE)


def in_time(process: subprocess.Popen, seconds: float, log: Path) -> tuple[int | None, str]:
    """Let it begin, and run at most so long; its exit code (None: cut) and, where that is not 0, what it last said."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(b"\n")
        process.stdin.close()
    try:
        code: int | None = process.wait(max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        code = None
    finally:
        kill(process)
    if code is None:
        return None, f"stopped after {seconds:.0f} s"
    text = log.read_text(errors="replace")
    if code == NO_GPU:
        return code, (text.strip().splitlines() or ["no GPU"])[-1]
    return code, "" if code == 0 else why(code, text)


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
