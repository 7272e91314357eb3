"""A run: records as lines of JSON, and the processes with deadlines that write them.

Each record is whole on the disk before the next is measured, so a run that is cut keeps them and the next one goes on
from there. Nothing here imports torch: who starts the processes leaves it to them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# The exit code after which a new process must go on: this one's GPU context is lost.
BROKEN = 70
# What a stage of a run on a GPU ends with where there is none: nothing else can be done.
NO_GPU = 2
# Less is not worth the start of a process.
LEAST_SECONDS = 12.0
# Of a stage whose rows keep losing the GPU's context.
MOST_RESTARTS = 4

Row = dict[str, Any]


class Lines:
    """A file of records. ``code`` names what was measured: rows of other code do not count as measured."""

    def __init__(self, path: Path, code: str = "") -> None:
        self.path, self.code = path, code
        path.parent.mkdir(parents=True, exist_ok=True)

    def put(self, stage: str, key: str, status: str, **fields: Any) -> Row:
        """Add a row; the latest of a stage and key counts."""
        row = {"stage": stage, "key": key, "status": status, "code": self.code, "at": round(time.time(), 1), **fields}
        append(self.path, row)
        return row

    def rows(self) -> dict[tuple[str, str], Row]:
        """The rows of this code, by stage and key."""
        return {(row["stage"], row["key"]): row for row in read(self.path) if row["code"] == self.code}

    def finished(self, stage: str) -> set[str]:
        """Keys of the stage that need not be tried again: what failed once fails again with the same code."""
        return {key for s, key in self.rows() if s == stage}


def append(path: Path, row: Row) -> None:
    """One line, by one write, flushed to the disk. After a torn line it starts a new one."""
    text = json.dumps(json_safe(row), allow_nan=False) + "\n"
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """All whole lines; a torn one is no row."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                found.append(row)
    return found


def current(rows: list[Row]) -> list[Row]:
    """The latest row of each stage and key, of the code that ran last."""
    code = next((row["code"] for row in reversed(rows) if row["stage"] == "environment"), None)
    return list({(row["stage"], row["key"]): row for row in rows if row["code"] == code}.values())


def machine_of(rows: list[Row]) -> dict[str, float] | None:
    """The machine's numbers, which bench/prediction.py takes, among the records of a run."""
    return next((row["machine"] for row in rows if "machine" in row), None)


def json_safe(value: Any) -> Any:
    """Infinite and undefined numbers become text ("inf", "nan"), which ``float`` reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(v) for v in value]
    return value


_SET_PARENT_DEATH_SIGNAL = 1
# Found before a fork: afterwards only what cannot wait for another thread's lock is safe.
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def start(
    command: list[str],
    log: Path,
    environment: dict[str, str] | None = None,
    cwd: Path = ROOT,
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen:
    """A process in a group of its own, its output appended to ``log``. On Linux it is killed when the thread that
    started it ends, however that comes about."""
    with log.open("a") as file:
        return subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=file, stderr=file, stdin=stdin, start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip


def _die_with_parent() -> None:
    assert _PRCTL is not None
    _PRCTL(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def kill(process: subprocess.Popen) -> None:
    """End the process and the compilers that it may have started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def why(code: int, log: str) -> str:
    """In a line: how a process ended and the last thing it said."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    last = lines[-1][:300] if lines else "no output"
    if code < 0:
        return f"killed by {signal.Signals(-code).name} (out of memory?): {last}"
    return f"exit code {code}: {last}"


def device_works() -> bool:
    """False where an illegal access has made every later call of this process fail."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def python_path(*first: Path) -> str:
    """PYTHONPATH with this checkout in front."""
    return os.pathsep.join(filter(None, [*map(str, first), str(ROOT), os.environ.get("PYTHONPATH")]))


class Stage(NamedTuple):
    """A process of a run: ``name``, ``seconds`` at the most, its ``command``."""

    name: str
    seconds: float
    command: list[str]


def prepare(command: list[str], log: Path, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """A process that imports what it needs and begins when it reads a line, see :func:`in_time`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    return start(command, log, environment, stdin=subprocess.PIPE)


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


def run_stages(
    stages: list[Stage], lines: Lines, end: float, logs: Path, environment: dict[str, str] | None = None
) -> None:
    """Each until its limit or ``end`` (of time.monotonic), and a row, with the key "stage", of what became of it.

    While one measures, the process of the next imports what it needs and waits.
    """
    waiting: list[subprocess.Popen] = []
    try:
        for number, stage in enumerate(stages):
            log = _log(logs, stage)
            seconds = min(stage.seconds, end - time.monotonic())
            if seconds < min(LEAST_SECONDS, stage.seconds):
                lines.put(stage.name, "stage", "not reached", reason="no time left in this run")
                continue
            print(f"{stage.name} ...", file=sys.stderr, flush=True)
            began = time.monotonic()
            process = waiting.pop() if waiting else prepare(stage.command, log, environment)
            if number + 1 < len(stages):
                following = stages[number + 1]
                waiting.append(prepare(following.command, _log(logs, following), environment))
            code, reason = in_time(process, seconds, log)
            for _ in range(MOST_RESTARTS):
                left = began + seconds - time.monotonic()
                if code == BROKEN and left > 0:  # goes on with the rows after the one that cost the GPU's context
                    code, reason = in_time(prepare(stage.command, log, environment), left, log)
            status = "ok" if code == 0 else "cut" if code is None else "failed"
            more = {"reason": reason} if reason else {}
            lines.put(stage.name, "stage", status, took=round(time.monotonic() - began, 1), **more)
    finally:
        for process in waiting:
            kill(process)


def _log(logs: Path, stage: Stage) -> Path:
    return logs / f"{stage.name.replace(':', '-').replace(' ', '-')}.log"
