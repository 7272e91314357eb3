"""The tests marked gpu in parallel processes: a crash costs one of them, a cut keeps every outcome so far.

Also the plugin of pytest that each process runs: a share of the chosen tests, each told to a file as it starts and
ends, with a limit of its own (``-p bench.gpu_tests --share 0/12 --part others --lines FILE --done FOLDER --each 60``).
"""

from __future__ import annotations

import faulthandler
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .session import BROKEN, ROOT, append, device_works, kill, python_path, read, start, why

if TYPE_CHECKING:
    import pytest

PROCESSES = 12
# For all of them, and for one.
TEST_SECONDS = 190.0
EACH_SECONDS = 60.0
# Of the time, kept for the CUDA row's tests.
CUDA_SHARE = 0.3
# Starts of one share: more often than so it is the share that is broken.
MOST_STARTS = 10
# pytest's exit codes after which nothing is left to do (all passed, some failed, none chosen) or nothing can be done.
FINISHED, HOPELESS = (0, 1, 5), (2, 3, 4)
OTHERS, CUDA_ROW = "others", "cuda row"
OUTCOMES = ("passed", "failed", "crashed", "timed out", "skipped", "cut")
BAD = ("failed", "crashed", "timed out")


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

    @property
    def log(self) -> str:
        return self.lines.with_suffix(".log").read_text(errors="replace")

    def collected(self) -> bool:
        return any("selected" in row for row in read(self.lines))


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

    The CUDA row's tests come last, in processes of their own. ``folder`` gets a .jsonl and a .log for each share;
    what :func:`summary` returns is a matter of the .jsonl alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    _forget_failures(folder)

    def begun(part: str, share: str, starts: int) -> _Process:
        lines = folder / f"{part.replace(' ', '-')}-{share.replace('/', '-of-')}.jsonl"
        command = [sys.executable, "-m", "pytest", "-p", "bench.gpu_tests", "-p", "no:cacheprovider"]
        command += ["-p", "no:faulthandler", "--share", share, "--part", part, "--lines", str(lines)]
        command += ["--done", str(folder), "--each", str(each), *select]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": python_path(root)}
        process = start(command, lines.with_suffix(".log"), environment, root)
        return _Process(process, part, share, lines, starts)

    def after(one: _Process) -> _Process | None:
        """The process, what goes on in its place after a crash, or None where its share is done."""
        code = one.process.poll()
        if code is None:
            return one
        died = _close(one, "crashed")
        if not died and one.collected() and code in FINISHED:
            return None
        if one.starts == MOST_STARTS or not one.collected() or code in HOPELESS:
            append(one.lines, {"error": f"share {one.share} of {one.part}: {why(code, one.log)}"})
            return None
        return begun(one.part, one.share, one.starts + 1)

    for part, until in ((OTHERS, 1 - CUDA_SHARE), (CUDA_ROW, 1.0)):
        end = begin + seconds * until
        running = [begun(part, f"{i}/{processes}", 1) for i in range(processes)]
        tell(f"{part}: {processes} processes")
        try:
            while running and time.monotonic() < end:
                time.sleep(0.05)
                running = [again for one in running if (again := after(one)) is not None]
        finally:
            for one in running:
                kill(one.process)
                if not _close(one, "cut") and not one.collected():
                    append(one.lines, {"error": f"share {one.share} of {one.part}: cut before it had begun"})
    return summary(folder)


def _close(one: _Process, outcome: str) -> bool:
    """Give the test that was under way an outcome; whether there was one."""
    rows = read(one.lines)
    if not rows or "started" not in rows[-1]:
        return False
    log = one.log
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
    """The latest row of every test that has one: that need not run again, or that this run has begun."""
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


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("share")
    group.addoption("--share", default="0/1", help="which of how many shares")
    group.addoption("--part", choices=(OTHERS, CUDA_ROW), help="without the CUDA row's tests, or they alone")
    group.addoption("--lines", type=Path, help="what happens is appended to this file, as lines of JSON")
    group.addoption("--done", type=Path, help="tests that a .jsonl of this folder names as done are left out")
    group.addoption("--each", type=float, default=EACH_SECONDS, help="seconds for one test; then the process ends")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--lines") is not None:
        config.pluginmanager.register(_Share(config), "share")


def of_cuda_row(item: pytest.Item) -> bool:
    """Whether a test needs the row that cuda-core launches: only those carry this mark."""
    return any("extra cuda" in mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif"))


class _Share:
    def __init__(self, config: pytest.Config) -> None:
        self.lines: Path = config.getoption("--lines")
        self.part: str | None = config.getoption("--part")
        self.index, self.count = map(int, config.getoption("--share").split("/"))
        self.done: Path | None = config.getoption("--done")
        self.limit: float = config.getoption("--each")
        self.traces = self.lines.with_suffix(".log").open("a")
        self.outcome, self.reason, self.seconds = "passed", "", 0.0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """After other plugins have chosen by marks and names."""
        part = [x for x in session.items if self.part is None or of_cuda_row(x) == (self.part == CUDA_ROW)]
        # Every twelfth of tests with parameters can be the same slow parameter.
        order = sorted(part, key=lambda item: hashlib.sha256(item.nodeid.encode()).digest())
        chosen = set(order[self.index :: self.count])
        mine = [item for item in part if item in chosen]
        append(self.lines, {"selected": [item.nodeid for item in mine]})
        before = outcomes(self.done) if self.done else {}
        session.items[:] = [item for item in mine if item.nodeid not in before]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        append(self.lines, {"started": nodeid})
        self.outcome, self.reason, self.seconds = "passed", "", 0.0
        faulthandler.dump_traceback_later(self.limit, exit=True, file=self.traces)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        if report.failed:
            lines = (report.longreprtext or "").strip().splitlines()
            errors = [line[1:].strip() for line in lines if line.startswith("E ")]
            self.outcome, self.reason = "failed", (errors or lines or ["?"])[0][:300]
        elif report.skipped and self.outcome == "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.outcome, self.reason = "skipped", reason[:300]

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        row = {"test": nodeid, "outcome": self.outcome, "seconds": round(self.seconds, 2), "reason": self.reason}
        append(self.lines, row)
        if self.outcome == "failed" and not device_works():
            os._exit(BROKEN)
