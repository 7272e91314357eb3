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
# A kept block serves requests down to this share of itself.
FIT = 0.8

_HUGE_PAGES = hasattr(mmap, "MADV_HUGEPAGE")
_blocks: list[mmap.mmap] = []
_lock = threading.Lock()


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``; large ones on Linux CPUs come from blocks that outlive them, on huge pages.

    Page faults on fresh memory take 5-15 % of a step. The CUDA allocator keeps its blocks for the same reason.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if device.type != "cpu" or size < MIN_BYTES or not _HUGE_PAGES:
        return torch.empty(shape, dtype=dtype, device=device)
    with _lock:
        fitting = [i for i in _free() if FIT * len(_blocks[i]) <= size <= len(_blocks[i])]
        if fitting:
            chosen = min(fitting, key=lambda i: len(_blocks[i]))
        else:
            _drop_free()
            chosen = len(_blocks)
            _blocks.append(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            _blocks[chosen].madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(_blocks[chosen], dtype=dtype, count=count).view(shape)


def empty_cache() -> None:
    """Return the CPU memory that no tensor uses any more to the system; on GPUs ``torch.cuda.empty_cache()`` does.

    Between calls fused_kd keeps its chunk buffers: they take as much as its workspace (see ``memory_budget`` of
    :class:`fused_kd.KDLoss`), and as weight gradients that have been dropped since.
    """
    with _lock:
        _drop_free()


def _free() -> list[int]:
    # A tensor holds a reference to its block; a free block has that of the list and getrefcount's own.
    return [i for i in range(len(_blocks)) if sys.getrefcount(_blocks[i]) == 2]


def _drop_free() -> None:
    for i in reversed(_free()):
        del _blocks[i]
