"""Uninitialised workspace."""

from __future__ import annotations

import math
import mmap
import sys
import threading

import torch
from torch import Tensor

# Below this the page faults of fresh memory do not matter.
MIN_BYTES = 2 << 20
# A kept block serves requests down to this share of itself: how many tokens are valid differs from step to step.
FIT = 0.4

_HUGE_PAGES = hasattr(mmap, "MADV_HUGEPAGE")
_lock = threading.Lock()


class _Blocks:
    """Memory that outlives the tensors in it; what is free goes when it fits no request."""

    def __init__(self, fit: float) -> None:
        self.fit = fit
        self.held: list[mmap.mmap] = []

    def take(self, size: int) -> mmap.mmap:
        fitting = [i for i in self._free() if self.fit * len(self.held[i]) <= size <= len(self.held[i])]
        if fitting:
            return self.held[min(fitting, key=lambda i: len(self.held[i]))]
        self.drop_free()
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.madvise(mmap.MADV_HUGEPAGE)
        self.held.append(block)
        return block

    def drop_free(self) -> None:
        for i in reversed(self._free()):
            del self.held[i]

    def _free(self) -> list[int]:
        # A tensor holds a reference to its block; a free block has that of the list and getrefcount's own.
        return [i for i in range(len(self.held)) if sys.getrefcount(self.held[i]) == 2]


# Results stay with the caller for as long as it likes, so they share no block with workspace and waste none.
_workspace, _results = _Blocks(FIT), _Blocks(1.0)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, result: bool = False) -> Tensor:
    """``torch.empty``; large ones on Linux CPUs come from blocks that outlive them, on huge pages.

    Page faults on fresh memory take 5-15 % of a step. The CUDA allocator keeps its blocks for the same reason.
    ``result`` says that the caller of the engine will hold it.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if device.type != "cpu" or size < MIN_BYTES or not _HUGE_PAGES:
        return torch.empty(shape, dtype=dtype, device=device)
    with _lock:
        block = (_results if result else _workspace).take(size)
        return torch.frombuffer(block, dtype=dtype, count=count).view(shape)


def empty_cache() -> None:
    """Return the CPU memory that no tensor uses any more to the system; on GPUs ``torch.cuda.empty_cache()`` does.

    Between calls fused_kd keeps its chunk buffers: they take as much as its workspace (see ``memory_budget`` of
    :class:`fused_kd.KDLoss`), and as weight gradients that have been dropped since.
    """
    with _lock:
        _workspace.drop_free()
        _results.drop_free()
