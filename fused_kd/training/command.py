"""What every script has around its ``main``: a console, one line for a user's error, an end by signal."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import Trainer

TRACEBACK = "FUSED_KD_TRACEBACK"
_OURS = tuple(str(folder) for folder in (Path(__file__).parents[1], Path(sys.argv[0]).resolve().parent))


def make_console(**options: Any) -> Console:
    """A console that shows every text as it is, such as a path with brackets; options are those of ``rich``'s."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, **options)


def run_script(main: Callable[[], object]) -> None:
    """Call a script's ``main``.

    Exits with 2 and one line where the user's input is wrong, with 130 and 143 after Ctrl-C and SIGTERM, and with a
    traceback for everything else; ``FUSED_KD_TRACEBACK=1`` shows it for all errors.
    """

    def terminate(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)  # so that helpers are ended and files closed

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        main()
    except KeyboardInterrupt:
        _stop("interrupted: the same command goes on", 130)
    except SystemExit as error:
        if isinstance(error.code, str):
            _stop(f"error: {error.code}", 2)
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        deliberate = (last.line or "").startswith("raise ") and last.filename.startswith(_OURS)
        if os.environ.get(TRACEBACK) or (isinstance(error, TypeError) and not deliberate):
            raise
        _stop(f"error: {error}", 2)
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(message: str, code: int) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def stoppable(trainer: Trainer) -> Iterator[None]:
    """Around a training in one process: the first Ctrl-C or SIGTERM ends its step, writes a checkpoint and then acts.

    Several processes would stop at different steps: there, as at the second signal, it acts at once.
    """
    from transformers import TrainerCallback

    received: list[int] = []

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if received:
                control.should_save = control.should_training_stop = True

    if trainer.args.world_size > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number: int, frame: object) -> None:
        received.append(number)
        restore()
        print("stopping after this step and its checkpoint; once more to stop at once", file=sys.stderr)

    trainer.add_callback(Stop())
    for number in before:
        signal.signal(number, receive)
    try:
        yield
    finally:
        restore()
    if received:
        signal.raise_signal(received[0])
