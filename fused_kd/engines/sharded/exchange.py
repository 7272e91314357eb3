"""What the ranks of a vocabulary-parallel loss send each other, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch import distributed as dist


@dataclass
class Traffic:
    """Bytes that one rank sends, with ring algorithms: b(P - 1) in an all-gather of b bytes a rank, 2b(P - 1)/P in an
    all-reduce of b.

    Attributes:
        statistics: of the rows' statistics. hidden: of the hidden states' gradient. messages: collectives.
    """

    statistics: float = 0.0
    hidden: float = 0.0
    messages: int = 0

    @property
    def total(self) -> float:
        return self.statistics + self.hidden


# torch 2.13 renames it
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_counting: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what vocabulary-parallel losses send within the block, backward passes included."""
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


_resolve: Callable[[str], dist.ProcessGroup] = getattr(dist.distributed_c10d, "_resolve_process_group")  # noqa: B009


class Exchange:
    """Collectives of a group that run beside the device's own work until they are waited for."""

    def __init__(self, name: str) -> None:
        self._group: dist.ProcessGroup = _resolve(name)
        self.size = dist.get_world_size(self._group)

    def gather(self, x: Tensor) -> Gathering:
        """Begin to gather (...) of every rank into (P, ...)."""
        x = x.contiguous()
        out = x.new_empty((self.size, *x.shape))
        work = _all_gather(out.flatten(), x.flatten(), group=self._group, async_op=True)
        for traffic in _counting:
            traffic.statistics += x.numel() * x.element_size() * (self.size - 1)
            traffic.messages += 1
        return Gathering(out, work)

    def sum(self, x: Tensor) -> Gathering:
        """Begin to add up ``x`` over the ranks, in place."""
        work = dist.all_reduce(x, group=self._group, async_op=True)
        for traffic in _counting:
            traffic.hidden += 2 * x.numel() * x.element_size() * (self.size - 1) / self.size
            traffic.messages += 1
        return Gathering(x, work)


class Gathering:
    """A collective under way."""

    def __init__(self, out: Tensor, work: Any) -> None:
        self._out, self._work = out, work

    def wait(self) -> Tensor:
        """Its result; on an accelerator the stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._out
