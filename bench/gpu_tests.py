"""The tests marked gpu in parallel processes: a crash costs one of them, a cut keeps every outcome so far."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from .lines import append, read
from .process import ROOT, kill, start, why

PROCESSES = 12
# For all of them, and for one.
TEST_SECONDS = 130.0
EACH_SECONDS = 60.0
# Of the time, kept for the CUDA row's tests.
CUDA_SHARE = 0.3
# Starts of one share: more often than so it is the share that is broken.
MOST_STARTS = 10
# pytest's exit codes after which nothing is left to do (all passed, some failed, none chosen) or nothing can be done.
FINISHED, HOPELESS = (0, 1, 5), (2, 3, 4)


def gpu_files(root: Path = ROOT) -> list[str]:
    """The files that have tests marked gpu: collecting the others would take every process seconds."""
    found = sorted((root / "tests").rglob("test_*.py"))
    return [str(path.relative_to(root)) for path in found if "mark.gpu" in path.read_text()]


class _Process(NamedTuple):
    process: subprocess.Popen
    part: str
    share: str
    lines: Path
    starts: int


def run_tests(
    folder: Path,
    seconds: float,
    *,
    select: list[str],
    processes: int = PROCESSES,
    each: float = EACH_SECONDS,
    tell: Callable[[str], None] = lambda text: None,
    root: Path = ROOT,
) -> dict[str, Any]:
    """Run what ``select`` (arguments of pytest) chooses, without what an earlier run in ``folder`` has passed.

    The CUDA row's tests come last, in processes of their own. ``folder`` gets a .jsonl and a .log for each share and,
    at the end, junit.xml; what :func:`summary` returns is a matter of the .jsonl alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    _forget_failures(folder)
    for part, until in (("others", 1 - CUDA_SHARE), ("cuda row", 1.0)):
        end = begin + seconds * until
        shares = [f"{i}/{processes}" for i in range(processes)]
        running = [_start(folder, part, share, select, each, root, 1) for share in shares]
        tell(f"{part}: {processes} processes")
        try:
            while running and time.monotonic() < end:
                time.sleep(0.05)
                running = [again for one in running if (again := _next(one, folder, select, each, root)) is not None]
        finally:
            for one in running:
                kill(one.process)
                if not _close(one, "cut") and not any("selected" in row for row in read(one.lines)):
                    append(one.lines, {"error": f"share {one.share} of {one.part}: cut before it had begun"})
    found = summary(folder)
    write_junit(folder)
    return found


def _start(folder: Path, part: str, share: str, select: list[str], each: float, root: Path, starts: int) -> _Process:
    lines = folder / f"{part.replace(' ', '-')}-{share.replace('/', '-of-')}.jsonl"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "bench.share",
        *["-p", "no:cacheprovider", "-p", "no:faulthandler"],
    ]
    command += ["--share", share, "--part", part, "--lines", str(lines), "--done", str(folder), "--each", str(each)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": _python_path(root)}
    process = start([*command, *select], lines.with_suffix(".log"), environment, root)
    return _Process(process, part, share, lines, starts)


def _python_path(root: Path) -> str:
    return os.pathsep.join(filter(None, [str(root), str(ROOT), os.environ.get("PYTHONPATH")]))


def _next(one: _Process, folder: Path, select: list[str], each: float, root: Path) -> _Process | None:
    """The process, what goes on in its place after a crash, or None where its share is done."""
    code = one.process.poll()
    if code is None:
        return one
    died, collected = _close(one, "crashed"), any("selected" in row for row in read(one.lines))
    if not died and collected and code in FINISHED:
        return None
    if one.starts == MOST_STARTS or not collected or code in HOPELESS:
        reason = why(code, one.lines.with_suffix(".log").read_text(errors="replace"))
        append(one.lines, {"error": f"share {one.share} of {one.part}: {reason}"})
        return None
    return _start(folder, one.part, one.share, select, each, root, one.starts + 1)


def _close(one: _Process, outcome: str) -> bool:
    """Give the test that was under way an outcome; whether there was one."""
    rows = read(one.lines)
    if not rows or "started" not in rows[-1]:
        return False
    log = one.lines.with_suffix(".log").read_text(errors="replace")
    reason = why(one.process.returncode or 0, log)
    dump = log.rfind("Timeout (")  # what faulthandler's limit writes as it ends a process, innermost frame first
    if outcome == "crashed" and one.process.returncode == 1 and dump >= 0:
        frames = [line.strip() for line in log[dump:].splitlines() if line.startswith("  File")]
        outcome, reason = "timed out", f"in {frames[0]}" if frames else "no frame"
    append(one.lines, {"test": rows[-1]["started"], "outcome": outcome, "reason": reason})
    return True


def _forget_failures(folder: Path) -> None:
    """What has not passed in an earlier run is run again; its log stays."""
    for path in folder.glob("*.jsonl"):
        kept = [row for row in read(path) if row.get("outcome") in ("passed", "skipped")]
        path.unlink()
        for row in kept:
            append(path, row)


def outcomes(folder: Path) -> dict[str, dict[str, Any]]:
    """The latest row of every test that has one."""
    return {row["test"]: row for path in sorted(folder.glob("*.jsonl")) for row in read(path) if "test" in row}


def summary(folder: Path) -> dict[str, Any]:
    """Counts of outcomes and of what was ``not reached``; names and reasons of what has not passed."""
    found = outcomes(folder)
    rows = [row for path in sorted(folder.glob("*.jsonl")) for row in read(path)]
    selected = {name for row in rows for name in row.get("selected", ())}
    counts = {kind: sum(row["outcome"] == kind for row in found.values()) for kind in OUTCOMES}
    counts["not reached"] = len(selected - found.keys()) + counts.pop("cut")
    bad = {name: f"{row['outcome']}: {row['reason']}" for name, row in found.items() if row["outcome"] in BAD}
    errors = [row["error"] for row in rows if "error" in row]
    return {**counts, "failing": bad, "errors": errors}


OUTCOMES = ("passed", "failed", "crashed", "timed out", "skipped", "cut")
BAD = ("failed", "crashed", "timed out")


def write_junit(folder: Path) -> None:
    """The outcomes as other tools read them."""
    suite = ElementTree.Element("testsuite", name="gpu")
    for name, row in outcomes(folder).items():
        where, _, title = name.partition("::")
        case = ElementTree.SubElement(
            suite, "testcase", classname=where.removesuffix(".py").replace("/", "."), name=title,
            time=str(row.get("seconds", 0)),
        )  # fmt: skip
        if row["outcome"] in BAD:
            ElementTree.SubElement(case, "failure", message=f"{row['outcome']}: {row['reason']}")
        elif row["outcome"] != "passed":
            ElementTree.SubElement(case, "skipped", message=row["reason"])
    ElementTree.ElementTree(suite).write(folder / "junit.xml", encoding="utf-8", xml_declaration=True)
