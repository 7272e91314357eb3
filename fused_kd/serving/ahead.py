"""Answers of a server that are asked for before they are needed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Answers(Generic[T]):
    """A bounded number of answers by their requests' keys, asked for ahead or when they are needed.

    Batches are used in the order in which they are collated, and may be used again within a step: an answer is kept
    until the place is needed after it, or one that was asked for later, has been used. A failed one is asked for again.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Future[T]] = OrderedDict()
        self._used: set[str] = set()

    def start(self, key: str, ask: Callable[[], T]) -> None:
        """Ask in the background, unless that is known already or there is no place."""
        with self._lock:
            known = self._known.get(key)
            if known is not None and known.done() and known.exception() is not None:
                self._forget(key)  # of a time when the server was away
            if key not in self._known and self._make_room():
                self._known[key] = future = Future[T]()
                # a daemon: a training that ends does not wait for a server that is away
                threading.Thread(target=_fulfil, args=(future, ask), name="served-teacher", daemon=True).start()

    def take(self, key: str, ask: Callable[[], T]) -> T:
        """The answer; asks now where that was not done before."""
        with self._lock:
            found = self._known.get(key)
            names = list(self._known)
            # without it the order is another one than expected: nothing that waits may be needed any more
            self._used |= set(names if found is None else names[: names.index(key) + 1])
        if found is None:
            found = Future()
            found.set_result(ask())
            with self._lock:
                if key not in self._known and self._make_room():
                    self._known[key] = found
                    self._used.add(key)
            return found.result()
        try:
            return found.result()
        except BaseException:
            with self._lock:
                self._forget(key)
            raise

    def _forget(self, key: str) -> None:
        self._known.pop(key, None)
        self._used.discard(key)

    def _make_room(self) -> bool:
        while len(self._known) >= self.most:
            oldest = next((key for key in self._known if key in self._used), None)
            if oldest is None:
                return False
            self._forget(oldest)
        return True


def _fulfil(future: Future[T], ask: Callable[[], T]) -> None:
    try:
        future.set_result(ask())
    except BaseException as error:
        future.set_exception(error)
