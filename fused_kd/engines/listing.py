"""Lists of a head's entries with what all others hold, streamed: some vocabulary rows and some tokens at a time.

A tile of logits stays in the last-level cache, is read once and then written over by the next one: nothing is as wide
as the vocabulary. Slabs of the vocabulary are the outer loop, so that each part of the weight is read, and cast, once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import EXCLUDED
from ..rows.contract import Leading, Logits, Shards
from ..rows.largest import take
from ..rows.torch.largest import keys_of, split_keys
from ..rows.torch.math import finish_logits_, known_all
from ..workspace import empty
from .gemm import Projection
from .plan import BudgetTooSmall
from .problem import Side

# Logits of a tile and its most tokens and columns: 8 MB on a CPU, 32 MB on a GPU. Smaller ones are as fast on idle
# cores, but where one is busy each GEMM waits for it once more.
CPU_TILE, CPU_TOKENS, CPU_COLUMNS = 1 << 21, 512, 8192
DEVICE_TILE, DEVICE_TOKENS, DEVICE_COLUMNS = 1 << 23, 2048, 16384
COLUMN_MULTIPLE = 64
# fp32 logits of a cache line.
LINE = 16
# Tokens whose lists are finished at a time, alike on all ranks.
FINISHED = 1024


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """What is read, and how.

    Attributes:
        side: of all N tokens; where the vocabulary is divided over ranks, with this rank's rows.
        vocab: read its first ``vocab`` logits; of this rank.
        temperature: of the distribution.
        dtype: of the GEMM operands under autocast; None takes the side's.
        backend: of :func:`fused_kd.rows.largest.take`.
        memory_budget: bytes of workspace, or None.
        shards: the vocabulary's slices over ranks; None: all of it is here.
    """

    side: Side
    vocab: int
    temperature: float
    dtype: torch.dtype | None
    backend: str
    memory_budget: int | None
    shards: Shards | None = None

    @property
    def whole(self) -> int:
        """The vocabulary of all ranks."""
        return self.vocab if self.shards is None else self.shards.vocab

    @property
    def start(self) -> int:
        """The vocabulary id of the first logit here."""
        return 0 if self.shards is None else self.shards.start


class Listed(NamedTuple):
    """``log_probs`` (N, K) fp32 and ``indices`` (N, K) int64, -inf and -1 where there is no entry; ``log_rest`` and
    ``log_sum_exp`` (N,) fp32."""

    log_probs: Tensor
    indices: Tensor
    log_rest: Tensor
    log_sum_exp: Tensor


def largest(request: Request, k: int, top_p: float) -> Listed:
    """The k largest entries of each token, descending, without those after the first that make up ``top_p``.

    Raises:
        BudgetTooSmall: where no tile fits ``memory_budget``.
    """
    return in_order(request, leading(request, k), k, top_p)


def leading(request: Request, k: int) -> Leading:
    """The k largest of each token here, as logits in any order, and what all others have; errors of :func:`largest`."""
    side, device = request.side, request.side.source.device
    found, temperature = Leading.none(len(side.source), k, device), _temperature(request)
    if side.weight is None:
        logits = Logits(side.source[:, : request.vocab], side.logit_scale, side.softcap, False)
        take(logits, request.start, found, temperature, request.backend)
    else:
        for rows, first, logits in tiles(request):
            take(logits, first, Leading(*(x[rows] for x in found)), temperature, request.backend)
    return found


def at(request: Request, indices: Tensor) -> Listed:
    """The entries at ``indices`` (N, K) int64, negative for none: -inf of those that are out of range, and
    :data:`fused_kd.divergences.LOG_ZERO` over T of excluded ones, which are listed all the same.

    Raises:
        BudgetTooSmall: as :func:`largest`.
    """
    N, K = indices.shape
    found, temperature = Leading.none(N, K, indices.device), _temperature(request)
    found.indices.copy_(indices)
    for rows, first, logits in tiles(request, spare=1):
        tile, width = logits.raw, logits.raw.shape[1] - 1
        finish_logits_(tile, logits)
        columns = indices[rows] - first
        here = (columns >= 0) & (columns < width)
        columns = columns.where(here, width)  # the spare one
        found.values[rows] = tile.gather(1, columns).where(here, found.values[rows])
        tile.scatter_(1, columns, -math.inf)
        others = Leading(found.values[rows, :0], found.indices[rows, :0], found.top[rows], found.total[rows])
        take(Logits(tile[:, :width], 1.0, None, False), first, others, temperature, request.backend)
    return in_order(request, found, None, 1.0)


def _temperature(request: Request) -> Tensor:
    return torch.full((1,), request.temperature, dtype=torch.float32, device=request.side.source.device)


def tiles(request: Request, spare: int = 0) -> Iterator[tuple[slice, int, Logits]]:
    """Tokens, the vocabulary id of the first column, and raw logits of each tile, which may be written over; with
    ``spare`` uninitialised columns behind it."""
    side, V = request.side, request.vocab
    N, device = len(side.source), side.source.device
    tokens, columns = tile_size(request)
    buffer = empty((tokens, tile_stride(columns)), torch.float32, device)
    for start in range(0, V, columns):
        width = min(columns, V - start)
        slab = None if side.weight is None else _Slab(side, slice(start, start + width), request.dtype)
        for at in range(0, N, tokens):
            rows = slice(at, min(at + tokens, N))
            tile, finite = buffer[: rows.stop - at, : width + spare], False
            if slab is None:
                tile[:, :width] = side.source[rows, start : start + width]
            else:
                slab.logits(side.source[rows], tile[:, :width])
                finite = slab.finite
            yield rows, request.start + start, Logits(tile, side.logit_scale, side.softcap, finite)


class _Slab:
    """Some vocabulary rows of a head, cast once where the GEMMs want them otherwise."""

    def __init__(self, side: Side, rows: slice, dtype: torch.dtype | None) -> None:
        assert side.weight is not None
        bias = None if side.bias is None else side.bias.detach()[rows]
        self._own = self._wide = Projection(side.weight[rows], bias, dtype or side.source.dtype)
        rounded = self._own.bias
        self.finite = rounded is None or known_all(rounded * side.logit_scale > EXCLUDED)
        if self._own.upcast:
            wide = self._own.weight.to(self._own.dtype).float()
            self._wide = Projection(wide, rounded, torch.float32)

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        self._wide.logits(self._own.operand(hidden), out)


def tile_size(request: Request) -> tuple[int, int]:
    """Tokens and columns of a tile.

    Raises:
        BudgetTooSmall: where none fits ``memory_budget``.
    """
    side, V, N = request.side, request.vocab, len(request.side.source)
    on_cpu = side.source.device.type == "cpu"
    most, tokens, columns = (
        (CPU_TILE, CPU_TOKENS, CPU_COLUMNS) if on_cpu else (DEVICE_TILE, DEVICE_TOKENS, DEVICE_COLUMNS)
    )
    tokens = max(1, min(tokens, N))
    columns = min(columns, max(1, most // tokens))
    budget = request.memory_budget
    while budget is not None and _bytes(request, tokens, min(columns, V)) > budget:
        if tokens == columns == 1:
            raise BudgetTooSmall(_bytes(request, 1, 1), "one token and one logit at a time", budget)
        tokens, columns = (-(-tokens // 2), columns) if tokens >= columns else (tokens, columns // 2)
    if columns >= V:
        return tokens, max(V, 1)
    # Equal slabs: a short last one wastes a GEMM.
    columns = min(columns, _up(-(-V // -(-V // columns)), COLUMN_MULTIPLE))
    return tokens, columns


def tile_stride(columns: int) -> int:
    """Of a tile's rows, with room for a spare column: whole cache lines, or a GEMM that writes them takes a third
    longer, and no power of 2, whose rows contend for the same ones."""
    return _up(columns, LINE) + LINE


def _bytes(request: Request, tokens: int, columns: int) -> int:
    """Of workspace: the tile, and operands that are cast."""
    side = request.side
    size = 4 * tokens * tile_stride(columns)
    if request.backend == "torch":
        size *= 3
    if side.weight is not None:
        dtype, H = request.dtype or side.source.dtype, side.source.shape[1]
        if dtype != torch.float32 or side.weight.dtype != dtype:
            size += columns * H * (4 + dtype.itemsize)
        if dtype != torch.float32 or side.source.dtype != dtype:
            size += tokens * H * (4 + dtype.itemsize)
    return size


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def in_order(request: Request, found: Leading, k: int | None, top_p: float) -> Listed:
    """Of the ranks' entries together; writes over ``found``."""
    log_rest, log_sum_exp = torch.empty_like(found.top), torch.empty_like(found.top)
    for start in range(0, len(found.top), FINISHED):
        rows = slice(start, start + FINISHED)
        own = Leading(*(x[rows] for x in found))
        if request.shards is not None:
            own = _joined(request, own, k)
        done = finished(own, request.temperature, k, top_p)
        for whole, part in zip((found.values, found.indices, log_rest, log_sum_exp), done, strict=True):
            whole[rows] = part
    return Listed(found.values, found.indices, log_rest, log_sum_exp)


def _joined(request: Request, own: Leading, k: int | None) -> Leading:
    """All ranks' entries beside each other, or without a ``k`` that of the rank that has it; and their sums."""
    from .sharded.exchange import Exchange

    assert request.shards is not None
    exchange = Exchange(request.shards.group)
    parts = [exchange.gather(x) for x in (own.values, own.top, own.total)]
    ids = exchange.gather(own.indices) if k is not None else None
    values, tops, totals = (part.wait() for part in parts)
    top = tops.amax(0)
    origin = top.masked_fill(top == -math.inf, 0.0)
    total = (totals * ((tops - origin) / request.temperature).exp()).sum(0)
    if ids is None:
        return Leading(values.amax(0), own.indices, top, total)
    return Leading(values.movedim(0, 1).flatten(1), ids.wait().movedim(0, 1).flatten(1), top, total)


def finished(found: Leading, temperature: float | Tensor, k: int | None = None, top_p: float = 1.0) -> Listed:
    """Log-probabilities in place of logits: in descending order the first k, unless those before make up ``top_p``;
    without a ``k`` all, as they are. ``temperature`` may be (1,) or (C,)."""
    if k is not None:
        values, indices = split_keys(keys_of(found.values, found.indices).sort(1, descending=True).values)
        found = found._replace(values=values, indices=indices)
    values = found.values.double()
    # Only differences count: a large common offset would swallow the digits of the sums' logarithms.
    origin = torch.maximum(found.top.double(), values.amax(1))
    origin = origin.masked_fill(origin == -math.inf, 0.0)
    T = temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature
    share = ((values - origin.unsqueeze(1)) / T).exp()
    others = found.total * ((found.top - origin) / temperature).exp()
    whole = share.sum(1) + others
    kept = torch.ones_like(share, dtype=torch.bool)
    if k is not None:
        kept[:, k:] = False
        if top_p < 1.0:
            before = torch.nn.functional.pad(share.cumsum(1)[:, :-1], (1, 0))
            kept &= (before < top_p * whole.unsqueeze(1)) | whole.isnan().unsqueeze(1)
    others = others + share.masked_fill(kept, 0.0).sum(1)
    k, log_whole, sound = k or values.shape[1], whole.log(), ~whole.isnan()
    log_probs = (values - origin.unsqueeze(1)) / T - log_whole.unsqueeze(1)
    none = ~kept | (values == -math.inf)
    log_probs = log_probs.masked_fill(none & sound.unsqueeze(1), -math.inf)
    log_rest = (others.log() - log_whole).masked_fill((others == 0.0) & sound, -math.inf)
    return Listed(
        log_probs[:, :k].float(),
        found.indices.masked_fill(none, -1)[:, :k],
        log_rest.float(),
        (origin / temperature + log_whole).float(),
    )
