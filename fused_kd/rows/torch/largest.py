"""The k largest logits of rows, see :mod:`fused_kd.rows.largest`, in PyTorch operations for any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...divergences import EXCLUDED
from ..contract import Leading, Logits
from .math import Scratch, finish_logits_, rows_of_block

# Keys are 32 bits of a value above 32 bits of an index.
_INDICES = (1 << 32) - 1


def take(logits: Logits, first: int, so_far: Leading, temperature: Tensor) -> None:
    """As :func:`fused_kd.rows.largest.take`."""
    C, W = logits.raw.shape
    B = min(C, rows_of_block(W, logits.raw.device))
    scratch = Scratch(B, W, logits.raw.device)
    for start in range(0, C, B):
        rows = slice(start, min(start + B, C))
        z = scratch("z", rows.stop - start).copy_(logits.raw[rows])
        finish_logits_(z, logits)
        own = temperature if len(temperature) == 1 else temperature[rows].unsqueeze(1)
        _take_block(z, first, Leading(*(x[rows] for x in so_far)), own)


def _take_block(z: Tensor, first: int, so_far: Leading, temperature: Tensor) -> None:
    """Overwrites the final logits ``z``."""
    broken = z.isnan().any(1)
    z.masked_fill_(~(z >= EXCLUDED), -math.inf)
    displaced = so_far.values  # none
    if so_far.values.shape[1]:
        displaced = _list(z, first, so_far)
    top = torch.maximum(so_far.top, z.amax(1))
    if displaced.shape[1]:
        top = torch.maximum(top, displaced.amax(1))
    origin = top.masked_fill(top == -math.inf, 0.0).unsqueeze(1)
    total = so_far.total.unsqueeze(1) * ((so_far.top.unsqueeze(1) - origin) / temperature).exp()
    for others in (displaced, z):
        total += others.sub_(origin).div_(temperature).exp_().sum(1, keepdim=True)
    so_far.top.copy_(top)
    so_far.total.copy_(total.squeeze(1).masked_fill_(broken, math.nan))


def _list(z: Tensor, first: int, so_far: Leading) -> Tensor:
    """Moves what is to be listed from ``z``, where -inf takes its place; the entries (B, k) that had to leave, -inf
    where one stays."""
    before = keys_of(so_far.values, so_far.indices)
    k = before.shape[1]
    keys = torch.cat([before, _candidates(z, first, k)], 1).topk(k, dim=1).values
    least = keys[:, -1:]
    displaced = so_far.values.masked_fill(before >= least, -math.inf)
    values, indices = split_keys(keys)
    so_far.values.copy_(values)
    so_far.indices.copy_(indices)
    last, last_index = split_keys(least)
    ids = torch.arange(first, first + z.shape[1], device=z.device)
    z.masked_fill_((z > last) | ((z == last) & (ids <= last_index)), -math.inf)
    return displaced


def _candidates(z: Tensor, first: int, k: int) -> Tensor:
    """Keys of columns among which are the k largest: those of the k groups with the largest maxima.

    An element outside of these groups has k larger ones before it, their maxima.
    """
    B, W = z.shape
    size = math.isqrt(W // k)
    if size < 2:
        return keys_of(z, torch.arange(first, first + W, device=z.device))
    groups = W // size
    whole = z[:, : groups * size].view(B, groups, size)
    largest = keys_of(whole.amax(2), torch.arange(groups, device=z.device)).topk(min(k, groups), dim=1, sorted=False)
    of = split_keys(largest.values)[1].unsqueeze(2)
    values = whole.gather(1, of.expand(-1, -1, size)).flatten(1)
    ids = (of * size + torch.arange(first, first + size, device=z.device)).flatten(1)
    rest = torch.arange(first + groups * size, first + W, device=z.device)
    return torch.cat([keys_of(values, ids), keys_of(z[:, groups * size :], rest)], 1)


def keys_of(values: Tensor, indices: Tensor) -> Tensor:
    """int64 that are in the order of the values and, where these are equal, in the inverse one of their indices."""
    return (_ordered((values + 0.0).view(torch.int32)).long() << 32) + (_INDICES - indices)  # 0.0: -0.0 equals it


def split_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Values and indices again."""
    return _ordered((keys >> 32).int()).view(torch.float32), _INDICES - (keys & _INDICES)


def _ordered(bits: Tensor) -> Tensor:
    """Integers in the order of the floats that these are the bits of, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
