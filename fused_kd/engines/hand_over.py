"""A finished gradient times the upstream one, nearly always 1: then a GPU reads the factor and nothing else."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows.triton.row import guard, warp_size

BLOCK, THREADS = 4096, 256
# Enough to fill any current GPU, few enough to be gone in microseconds where there is nothing to do.
PROGRAMS = 1024


@triton.jit
def scale_kernel(gradient_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, count, step):
            offsets = start + tl.arange(0, BLOCK)
            x = tl.load(gradient_ptr + offsets, mask=offsets < count, other=0.0)
            tl.store(gradient_ptr + offsets, x.to(tl.float32) * factor, mask=offsets < count)


@functools.cache
def works(device: torch.device) -> bool:
    """Whether Triton can launch anything there: it may be installed without a compiler, or beside another GPU."""
    try:
        gradient = torch.ones(1, dtype=torch.float32, device=device)
        scale_in_place(gradient, gradient.new_ones(()))
    except Exception:  # Triton's own, of any kind
        return False
    return True


def scale_in_place(gradient: Tensor, factor: Tensor) -> None:
    """``gradient *= factor``: a contiguous tensor and one number of the same device; waits for nothing."""
    programs = min(PROGRAMS, triton.cdiv(gradient.numel(), BLOCK))
    if programs:
        with guard(gradient.device):
            scale_kernel[(programs,)](gradient, factor, gradient.numel(), BLOCK=BLOCK, num_warps=THREADS // warp_size())
