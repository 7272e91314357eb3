"""A progress bar where rich is installed, else a line per case."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """Yields ``tick(what)``, to be called as each of ``total`` pieces of work begins."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        begun = 0

        def tell(what: str) -> None:
            nonlocal begun
            begun += 1
            print(f"{title} {begun}/{total}: {what}", file=sys.stderr, flush=True)

        yield tell
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        finished = 0

        def advance(what: str) -> None:
            nonlocal finished
            bar.update(task, completed=finished, description=f"{title}: {what}")
            finished += 1

        yield advance
        bar.update(task, completed=total, description=title)
