"""Cases in processes of their own, their rows into the store as they come, a deadline over all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from .environment import ROOT
from .process import kill, why
from .store import Store, row_key
from .worker import Case

# Less than this and a case would only be started to be killed.
LEAST_SECONDS = 20.0


class Deadline:
    """Seconds left of a run; None never ends."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        return float("inf") if self._end is None else self._end - time.monotonic()


def run_cases(cases: list[Case], store: Store, deadline: Deadline, limit: float, tick: Callable[[str], None]) -> None:
    """Run what is not finished yet. A case gets ``limit`` seconds; what no longer fits says so in its
    rows."""
    for batch in batches(cases):
        tick(f"{batch[0].implementation}, {batch[0].shape.name}" + (" ..." if len(batch) > 1 else ""))
        todo = []
        for case in batch:
            variants = tuple(
                v for v, key in zip(case.variants, case.row_keys(), strict=True) if not store.finished(key)
            )
            reason = case.missing() if variants else None
            late = reason is None and deadline.left() < LEAST_SECONDS
            if late:
                reason = "no time left in this run"
            if reason is None:
                todo += [replace(case, variants=variants)] if variants else []
                continue
            for variant in variants:
                store.add(case.row(variant, status="skipped" if late else "missing", reason=reason))
        if todo:
            run_batch(todo, store, min(limit * len(todo), deadline.left()))


def batches(cases: list[Case]) -> list[list[Case]]:
    """Cases that share a process: those of one implementation in tables, and the points of its curves."""
    found: dict[tuple[str, bool], list[Case]] = {}
    for case in cases:
        found.setdefault((case.implementation, case.purpose == "table"), []).append(case)
    return list(found.values())


def run_batch(cases: list[Case], store: Store, limit: float) -> None:
    """One worker process; rows that it did not deliver are stored with the reason."""
    with tempfile.TemporaryDirectory() as folder:
        path, log_path = Path(folder, "rows"), Path(folder, "log")
        path.touch()
        with log_path.open("w") as log, path.open() as lines:
            options = "-q -s -p pytest_benchmark.plugin -p no:cacheprovider -p no:warnings --benchmark-disable-gc"
            command = [sys.executable, "-m", "pytest", "bench/suite.py", *options.split()]
            command += ["--benchmark-timer", "bench.measure.clock", "--rows", str(path), "--parent", str(os.getpid())]
            command += [text for case in cases for text in ("--case", case.to_json())]
            # No other plugin: they take seconds to import. Nothing of a pytest that this may run in.
            environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
            environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
            began = time.monotonic()
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True
            )
            delivered: set[tuple] = set()
            try:
                while process.poll() is None and time.monotonic() - began < limit:
                    time.sleep(0.1)
                    _collect(lines, store, delivered)
                late = process.poll() is None
            finally:
                kill(process)
            _collect(lines, store, delivered)
        reason = f"stopped after {limit:.0f} s" if late else why(process.returncode, log_path.read_text())
        for case in cases:
            for variant, key in zip(case.variants, case.row_keys(), strict=True):
                if key not in delivered:
                    store.add(case.row(variant, status="skipped" if late else "failed", reason=reason))


def _collect(lines: TextIO, store: Store, delivered: set[tuple]) -> None:
    while True:
        position = lines.tell()
        line = lines.readline()
        if not line.endswith("\n"):
            lines.seek(position)
            return
        row = json.loads(line)
        delivered.add(row_key(row))
        store.add(row)
