"""A teacher's share in a mixture, see :mod:`fused_kd.rows.mixing`, in PyTorch operations for any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...divergences import EXCLUDED
from ..contract import Logits
from .math import Scratch, cool, finish_logits_, maybe_any, on_host, rows_of_block, scale


def add(mixed: Tensor, logits: Logits, log_share: Tensor, temperature: Tensor, *, first: bool) -> None:
    """As :func:`fused_kd.rows.mixing.add`."""
    C, V = mixed.shape
    B = min(C, rows_of_block(V, mixed.device))
    scratch = Scratch(B, V, mixed.device)
    share, T = log_share.expand(C).unsqueeze(1), temperature.expand(C).unsqueeze(1)
    only = float(temperature) if len(temperature) == 1 and on_host(temperature) else None
    for start in range(0, C, B):
        rows = slice(start, min(start + B, C))
        z = scratch("z", rows.stop - start).copy_(logits.raw[rows])
        finish_logits_(z, logits._replace(finite=True))  # -inf stays
        if not logits.finite:
            z.masked_fill_(z < EXCLUDED, -math.inf)
        work = scratch("work", rows.stop - start)
        _add_block(mixed[rows], z, share[rows], T[rows] if only is None else only, first, work)


def _add_block(mixed: Tensor, z: Tensor, share: Tensor, T: float | Tensor, first: bool, work: Tensor) -> None:
    """Overwrites the final logits ``z``; ``share`` is (B, 1)."""
    z.sub_(z.amax(1, keepdim=True))
    cool(z, T, z)
    z.add_(share - torch.exp(z, out=work).sum(1, keepdim=True).log_())
    if not first:
        torch.logaddexp(cool(mixed, T, work), z, out=z)
    scale(z, T)
    none = share == -math.inf
    if maybe_any(none):
        z = z.masked_fill_(none, -math.inf) if first else torch.where(none, mixed, z, out=z)
    mixed.copy_(z)
