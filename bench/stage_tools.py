"""Stages of ``python -m bench gpu`` that other programs do: the tests, and tools of the CUDA toolkit."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from . import gpu_tests

if TYPE_CHECKING:
    from .stages import Run


def tests(run: Run) -> int:
    if importlib.util.find_spec("pytest") is None:
        run.add("tests", "missing", reason="pytest is not installed")
        return 0
    select = ["tests/test_tuning.py", "-m", ""] if run.rehearse else [*gpu_tests.gpu_files(), "-m", "gpu"]
    found = gpu_tests.run_tests(
        run.out / "tests" / run.lines.code,  # what passed with other code must pass again
        gpu_tests.TEST_SECONDS,
        select=select,
        processes=2 if run.rehearse else gpu_tests.PROCESSES,
        tell=partial(print, flush=True),
    )
    clean = not found["failing"] and not found["errors"] and not found["not reached"]
    run.add("tests", "ok" if clean else "failed", reason=_first(found), **found)
    print(_first(found))
    return int(not clean)


def _first(found: dict[str, Any]) -> str:
    bad = [f"{name}: {reason}" for name, reason in found["failing"].items()] + found["errors"]
    return bad[0][:300] if bad else f"{found['not reached']} not reached" if found["not reached"] else ""


def _tool(run: Run, name: str, options: list[str], command: list[str], log: str) -> None:
    """A tool of the CUDA toolkit around a command of Python's, where it is on the PATH."""
    path = shutil.which(name)
    if path is None:
        run.add(name, "missing", reason=f"{name} is not on the PATH")
        return
    done = subprocess.run([path, *options, sys.executable, *command], capture_output=True, text=True)
    text = done.stdout + done.stderr
    (run.out / log).write_text(text)
    said = [line for line in text.splitlines() if line.startswith(("=====", "==ERROR"))]
    reason = "" if done.returncode == 0 else (said or text.strip().splitlines() or ["?"])[-1][:300]
    run.add(name, "failed" if reason else "ok", reason=reason, file=log)


def sanitizer(run: Run) -> None:
    share = ["-p", "bench.share", "--share", "0/10", "--lines", str(run.out / "sanitizer" / "lines.jsonl")]
    (run.out / "sanitizer").mkdir(exist_ok=True)
    pytest = ["-m", "pytest", "tests/test_gpu.py", "-m", "gpu", "-k", "cuda_row and small", "-p", "no:cacheprovider"]
    # cuda-bindings asks for functions that a driver may lack: refused calls are no fault of a kernel.
    options = ["--tool", "memcheck", "--error-exitcode", "3", "--report-api-errors", "no"]
    _tool(run, "compute-sanitizer", options, [*pytest, *share], "sanitizer.log")


def ncu(run: Run, backend: str) -> None:
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats", "LaunchStats")
    # ncu would lock the clocks, which are not ours to set.
    options = ["--clock-control", "none", *(text for section in sections for text in ("--section", section))]
    options += ["--kernel-name", "regex:row", "--launch-count", "1"]
    command = ["-m", "bench", "gpu", "--out", str(run.out), "--stage", f"one-row:{backend}"]
    _tool(run, "ncu", options, command, f"ncu-{backend}.log")
