"""Objects with threads, locks or connections, in processes that are forked from theirs."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Renewed(Protocol):
    """Has something that is its process's own."""

    def renew(self) -> None:
        """Begin without it, with new locks: in a child, whatever the parent's other threads were about is left."""


_KNOWN: weakref.WeakSet[Renewed] = weakref.WeakSet()


def renew_in_children(each: Renewed) -> None:
    """Have it renewed in every process that is forked from this one."""
    _KNOWN.add(each)


def _renew_all() -> None:
    for each in list(_KNOWN):
        each.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
