"""Several processes do the work of one folder: each takes what nobody holds and whose needs are met."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from fused_kd.training.runs import Run

POLL_SECONDS = 2.0


class Piece(Protocol):
    """Work with a name that no other has."""

    @property
    def name(self) -> str: ...


P = TypeVar("P", bound=Piece)


def share(
    run: Run,
    wanted: Callable[[], Sequence[P]],
    *,
    done: Callable[[P], bool],
    needs: Callable[[P], Sequence[P]],
    do: Callable[[P], None],
) -> Iterator[P]:
    """Do what is left, yielding each piece that this process did; returns when all of it is done, by whomever.

    Args:
        run: whose folder the processes share.
        wanted: all pieces, in the order of preference; asked again after each.
        done: whether a piece is done.
        needs: what must be done before a piece.
        do: does a piece, after which ``done`` is true of it.
    """
    while left := [piece for piece in wanted() if not done(piece)]:
        for piece in left:
            if not all(map(done, needs(piece))):
                continue
            with run.lock(f".claims/{piece.name.replace('/', '.')}", wait=False) as mine:
                if not mine or done(piece):
                    continue
                do(piece)
            yield piece
            break  # what comes first may have become possible
        else:
            time.sleep(POLL_SECONDS)


@contextmanager
def helpers(
    script: str, arguments: Sequence[str] | None, jobs: int, folder: Path, *, helper: bool = False
) -> Iterator[Callable[[], None]]:
    """``jobs - 1`` more processes of a script, each with ``--worker`` and a log in ``folder/worker-N.log``.

    Yields a function to be called between pieces of work: it says which process failed, whose work is then left to this
    one, and ends a helper whose first process is gone. Those still at work at the end are terminated.

    Args:
        script: its path. arguments: as of its ``main``; None takes ``sys.argv``'s.
        helper: this process is one of them, and starts none.

    Raises:
        ValueError: jobs below 1.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs!r}")
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, script, *(sys.argv[1:] if arguments is None else arguments), "--worker"]
    logs = [folder / f"worker-{number}.log" for number in range(1, 1 if helper else jobs)]
    running: dict[Path, subprocess.Popen[bytes]] = {}
    first = os.getppid()

    def check() -> None:
        if helper and os.getppid() != first:
            raise SystemExit("the first process is gone")
        for log in [log for log, process in running.items() if process.poll() not in (None, 0)]:
            print(f"a process failed and its work is done here: see {log}", file=sys.stderr)
            del running[log]

    try:
        for log in logs:
            with open(log, "a") as file:
                running[log] = subprocess.Popen(command, stdout=file, stderr=file)
        yield check
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
