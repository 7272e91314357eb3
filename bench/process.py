"""Processes that others start: they end with who started them, and what they leave says why they ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The exit code after which a new process must go on: this one's GPU context is lost.
BROKEN = 70
# What a stage of a run on a GPU ends with where there is none: nothing else can be done.
NO_GPU = 2

_SET_PARENT_DEATH_SIGNAL = 1


def start(
    command: list[str],
    log: Path,
    environment: dict[str, str] | None = None,
    cwd: Path | None = None,
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen:
    """A process in a group of its own, its output appended to ``log``. On Linux it is killed when the thread that
    started it ends, however that comes about."""
    with log.open("a") as file:
        return subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=file, stderr=file, stdin=stdin, start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip


# Found before a fork: afterwards only what cannot wait for another thread's lock is safe.
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def _die_with_parent() -> None:
    assert _PRCTL is not None
    _PRCTL(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def die_with(parent: int) -> None:
    """End this process when ``parent`` does (Linux)."""
    if sys.platform == "linux":
        _die_with_parent()
    if os.getppid() != parent:
        raise SystemExit("the runner is gone")


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
