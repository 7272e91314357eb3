"""Answers of a server that are asked for before they are needed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from torch import Tensor

from fused_kd.serving.forks import renew_in_children


class Answers:
    """Hidden states by the content of their request, a bounded number, asked for ahead or when they are needed.

    Batches are used in the order in which they are collated, and may be used again within a step: an answer is kept
    until the place is needed after it, or one that was asked for later, has been used.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.renew()
        renew_in_children(self)

    def renew(self) -> None:
        """With no answers."""
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Future[Tensor]] = OrderedDict()
        self._used: set[str] = set()

    def start(self, key: str, ask: Callable[[], Tensor]) -> None:
        """Ask in the background, unless that is known already or there is no place."""
        with self._lock:
            if key not in self._known and self._make_room():
                self._known[key] = future = Future[Tensor]()
                # a daemon: a training that ends does not wait for a server that is away
                threading.Thread(target=_fulfil, args=(future, ask), name="served-teacher", daemon=True).start()

    def take(self, key: str, ask: Callable[[], Tensor]) -> Tensor:
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
                self._known.pop(key, None)
                self._used.discard(key)
            raise

    def _make_room(self) -> bool:
        while len(self._known) >= self.most:
            oldest = next((key for key in self._known if key in self._used), None)
            if oldest is None:
                return False
            del self._known[oldest]
            self._used.discard(oldest)
        return True


def _fulfil(future: Future[Tensor], ask: Callable[[], Tensor]) -> None:
    try:
        future.set_result(ask())
    except BaseException as error:
        future.set_exception(error)
