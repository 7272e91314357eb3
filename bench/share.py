"""A plugin of pytest: a share of the chosen tests, each told to a file as it starts and ends, with a limit of its own.

``-p bench.share --share 0/12 --part others --lines FILE --done FOLDER --each 60``; see gpu_tests.py, which starts them.
"""

from __future__ import annotations

import faulthandler
import hashlib
import os
from pathlib import Path

import pytest

from .lines import append, read
from .process import BROKEN, device_works

PARTS = ("others", "cuda row", "all")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("share")
    group.addoption("--share", default="0/1", help="which of how many shares")
    group.addoption("--part", choices=PARTS, default="all", help="without the CUDA row's tests, or they alone")
    group.addoption("--lines", type=Path, help="what happens is appended to this file, as lines of JSON")
    group.addoption("--done", type=Path, help="tests that a .jsonl of this folder names as done are left out")
    group.addoption("--each", type=float, default=60.0, help="seconds for one test; then the process ends")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--lines") is not None:
        config.pluginmanager.register(_Share(config), "share")


def done(folder: Path) -> set[str]:
    """Tests that need not run again: those that passed or were skipped, and what this run has begun."""
    found = [row for path in folder.glob("*.jsonl") for row in read(path)]
    return {row["test"] for row in found if "test" in row}


def of_cuda_row(item: pytest.Item) -> bool:
    """Whether a test needs the row that cuda-core launches: only those carry this mark."""
    return any("extra cuda" in mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif"))


class _Share:
    def __init__(self, config: pytest.Config) -> None:
        self.lines: Path = config.getoption("--lines")
        self.part: str = config.getoption("--part")
        self.index, self.count = map(int, config.getoption("--share").split("/"))
        self.done: Path | None = config.getoption("--done")
        self.limit: float = config.getoption("--each")
        self.traces = self.lines.with_suffix(".log").open("a")
        self.outcome, self.reason, self.seconds = "passed", "", 0.0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        part = [item for item in items if self.part == "all" or of_cuda_row(item) == (self.part == "cuda row")]
        # Every twelfth of tests with parameters can be the same slow parameter.
        order = sorted(part, key=lambda item: hashlib.sha256(item.nodeid.encode()).digest())
        chosen = set(order[self.index :: self.count])
        mine = [item for item in part if item in chosen]
        append(self.lines, {"selected": [item.nodeid for item in mine]})
        before = done(self.done) if self.done else set()
        kept = [item for item in mine if item.nodeid not in before]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

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
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.outcome, self.reason = "skipped", why[:300]

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        row = {"test": nodeid, "outcome": self.outcome, "seconds": round(self.seconds, 2), "reason": self.reason}
        append(self.lines, row)
        if self.outcome == "failed" and not device_works():
            os._exit(BROKEN)
