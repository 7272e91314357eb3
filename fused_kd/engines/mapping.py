"""A teacher of another vocabulary: which of its columns the student's are, and their logits.

Where the teacher's other columns count for nothing, the student's alone are multiplied, by rows of the weight; else all
of them, a tile at a time: neither a second head nor logits of the teacher's whole vocabulary are held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..checks import check_columns
from ..divergences import EXCLUDED
from ..rows.contract import Beyond, Leading, Logits
from ..rows.largest import take
from ..rows.torch.mapped import block_bytes
from ..rows.torch.math import finish_logits_
from ..terms import RowSpec, Term
from ..workspace import empty
from .gemm import Projection, slab_rows
from .listing import tile_stride
from .mixing import Place
from .problem import Side

# Columns that follow each other in the teacher too, at least so many, need no copy of their rows.
LONG = 512
# Columns of a tile of the teacher's logits, which should stay in the cache until they are read.
CPU_COLUMNS, DEVICE_COLUMNS = 1024, 8192


class Piece(NamedTuple):
    """``columns`` of the student that are ``rows`` of the teacher's weight: a slice, or a list."""

    columns: slice
    rows: slice | Tensor


class Tile(NamedTuple):
    """``rows`` of the teacher's weight, of which those at ``places`` are the student's ``columns``, both (n,) int64."""

    rows: slice
    places: Tensor
    columns: Tensor


class Mapping(NamedTuple):
    """What is known of a map once it has been looked at: the ``pieces`` of the student's columns that have one of the
    teacher's, the ``unmapped`` (U,) int64 that have none, and all of the teacher's in ``tiles``, of which
    ``other_count`` are no column of the student."""

    pieces: tuple[Piece, ...]
    tiles: tuple[Tile, ...]
    unmapped: Tensor
    other_count: int


# A map stays the same over a training, and looking at it would wait for the device.
_known: Any = WeakTensorKeyDictionary()


def mapping_of(teacher: Side, vocab: int) -> Mapping:
    """The map of a teacher's side on the student's first ``vocab`` columns.

    What is known of a tensor is used again until it changes: on the CPU its contents tell, on an accelerator its
    version, which writes through ``.data`` do not raise.

    Raises:
        ValueError: columns that are none of the teacher's, one of them twice, none at all.
    """
    columns, weight = teacher.columns, teacher.weight
    assert columns is not None and weight is not None
    on_cpu = columns.device.type == "cpu"
    version = -1 if on_cpu or columns.is_inference() else columns._version
    key = (version, vocab, tuple(weight.shape))
    known = _known.get(columns)
    if known is None or known[0] != key or (on_cpu and not torch.equal(known[1], columns)):
        if not on_cpu and columns.is_inference():
            return _looked_at(columns, vocab, *weight.shape)
        known = key, columns.detach().clone() if on_cpu else None, _looked_at(columns, vocab, *weight.shape)
        _known[columns] = known
    mapping: Mapping = known[2]
    return mapping


def _looked_at(columns: Tensor, vocab: int, V_t: int, H: int) -> Mapping:
    host = columns.detach().to("cpu", torch.int64)
    check_columns("columns", host, V_t)
    host = host[:vocab]
    if not bool((host >= 0).any()):
        raise ValueError("columns must map at least one column of the student, got -1 for all")
    mapped = (host >= 0).nonzero().squeeze(1)
    place = torch.full((V_t,), -1)
    place[host[mapped]] = mapped
    device = columns.device
    width = CPU_COLUMNS if device.type == "cpu" else DEVICE_COLUMNS
    return Mapping(
        tuple(_pieces(host, slab_rows(V_t, H), device)),
        tuple(_tiles(place, width, device)),
        (host < 0).nonzero().squeeze(1).to(device),
        V_t - len(mapped),
    )


def _tiles(place: Tensor, width: int, device: torch.device) -> Iterator[Tile]:
    """``place`` (V_t,) holds the student's columns of the teacher's, or -1."""
    for start in range(0, len(place), width):
        own = place[start : start + width]
        places = (own >= 0).nonzero().squeeze(1)
        yield Tile(slice(start, start + len(own)), places.to(device), own[places].to(device))


def _pieces(host: Tensor, step: int, device: torch.device) -> list[Piece]:
    """Of teacher columns ``host``, or -1, in this order: long runs as slices, the rest in lists of at most ``step``."""
    starts = [0, *((host[1:] != host[:-1] + 1).nonzero().squeeze(1) + 1).tolist()]
    ends = [*starts[1:], len(host)]
    pieces, first = [], 0

    def listed(start: int, stop: int) -> None:
        for at in range(start, stop, step):
            own = slice(at, min(at + step, stop))
            if bool((host[own] >= 0).any()):
                pieces.append(Piece(own, host[own].clamp(min=0).to(device)))

    for start, stop in zip(starts, ends, strict=True):
        if stop - start < LONG:
            continue
        listed(first, start)
        begin = int(host[start])
        start, begin = (start + 1, 0) if begin < 0 else (start, begin)  # -1 is followed by 0
        for at in range(start, stop, step):
            end = min(at + step, stop)
            pieces.append(Piece(slice(at, end), slice(begin + at - start, begin + end - start)))
        first = stop
    listed(first, len(host))
    return pieces


def check_map(teacher: Side, vocab: int, spec: RowSpec) -> None:
    """
    Raises:
        ValueError: as :func:`mapping_of`, and for a tail with which the loss of every token is infinite.
    """
    mapping, tail = mapping_of(teacher, vocab), teacher.tail
    lacking = len(mapping.unmapped)
    nothing = tail == "renormalize" or (tail != "listed" and not mapping.other_count)
    if lacking and nothing and any(term.of.everywhere for term in spec.terms):
        others = "'bucket', 'uniform' or 'listed'" if mapping.other_count else "'listed'"
        raise ValueError(
            f"tail must be {others} for an objective with KL(q||p), which is infinite where the teacher is 0, as on "
            f"the {lacking} of the student's columns that have none of the teacher's, got {tail!r}"
        )
    if tail == "bucket" and not lacking and mapping.other_count and any(map(_asks_for_all, spec.terms)):
        raise ValueError(
            "tail must be 'renormalize' or 'listed' for an objective with KL(p||q) where all of the student's columns "
            "are mapped: it has none for the rest of the teacher's, so that the loss is infinite, got 'bucket'"
        )


def _asks_for_all(term: Term) -> bool:
    """Whether a term, or ``KL(t||q)`` beside it, is infinite where the student is 0 and the target is not."""
    if term.divergence is None:
        return False
    of = term.of
    return of.free or of.covers or of.outer == "mix" or term.gate != ""


class MappedSource:
    """The teacher's logits of the student's first ``vocab`` columns, chunk by chunk."""

    def __init__(self, side: Side, vocab: int, dtype: torch.dtype | None) -> None:
        assert side.weight is not None
        self._mapping, self._side = mapping_of(side, vocab), side
        self.source = side.source.detach()
        self._weight, self._dtype = side.weight.detach(), dtype or side.source.dtype
        self._bias = None if side.bias is None else side.bias.detach()
        lacking = len(self._mapping.unmapped)
        self._has_category = side.tail == "bucket" or (side.tail == "listed" and lacking > 0)
        reads_all = side.tail == "bucket" or (side.tail == "uniform" and lacking > 0)
        self._tiles = self._mapping.tiles if reads_all and self._mapping.other_count else ()
        self.width = max((tile.rows.stop - tile.rows.start for tile in self._tiles), default=0)

    def fixed_bytes(self, vocab: int) -> int:
        """Of the blocks of rows of :mod:`fused_kd.rows.torch.mapped`, and of rows of the weight that are gathered or
        made fp32."""
        H, size = self._weight.shape[1], self._weight.element_size()
        upcast = 4 if self._projection(slice(0, 1)).upcast else 0
        found = block_bytes(len(self.source), vocab, self.source.device) if self._has_category else 0
        if self._tiles:
            return found + self.width * H * upcast
        rows: int = max(piece.columns.stop - piece.columns.start for piece in self._mapping.pieces)
        gathered = any(isinstance(piece.rows, Tensor) for piece in self._mapping.pieces)
        return found + rows * H * (upcast + size * gathered)

    def chunk(
        self, tokens: slice | Tensor, out: Tensor, temperature: Tensor, backend: str
    ) -> tuple[Logits, Beyond | None, Tensor | None]:
        """Logits (C, V) in ``out``; what is not mapped, where that is a category of its own; and which rows (C,) have
        no distribution, as the teacher excludes all that is mapped.

        ``temperature`` is (1,) or (C,) fp32.
        """
        side, unmapped = self._side, self._mapping.unmapped
        if side.tail == "uniform":  # one mass of its own a column, which the loss flattens like any other
            temperature = torch.ones_like(temperature[:1])
        hidden = self._projection(slice(0, 1)).operand(self.source[tokens])
        others = Leading.none(len(hidden), 0, hidden.device)
        if self._tiles:
            self._read_all(hidden, out, others, temperature, backend)
        else:
            for piece in self._mapping.pieces:
                self._projection(piece.rows).logits(hidden, out[:, piece.columns])
            finish_logits_(out, self._final(out))
        if len(unmapped):
            out.index_fill_(1, unmapped, -math.inf)
        bad = None
        if side.tail in ("renormalize", "listed") and side.bias is not None:
            bad = out.amax(1) < EXCLUDED
        if not (self._has_category or self._tiles):
            return Logits(out, 1.0, None, False), None, bad
        # Over the largest of all: a large common offset would swallow the digits of the logarithm.
        origin = torch.maximum(out.amax(1), others.top)
        out.sub_(origin.unsqueeze(1))
        rest = (others.top - origin) + others.total.log() * temperature
        if self._has_category:
            return Logits(out, 1.0, None, False), Beyond(rest, unmapped, side.tail), bad
        each = rest - math.log(len(unmapped))
        out.index_copy_(1, unmapped, each.unsqueeze(1).expand(-1, len(unmapped)))
        return Logits(out, 1.0, None, False), None, None

    def read(self, place: Place) -> tuple[Logits, Tensor | None]:
        """As one of several teachers: of a tail that leaves nothing beyond the student's columns."""
        logits, _, bad = self.chunk(place.tokens, place.into, place.temperature, place.backend)
        return logits, bad

    def _read_all(self, hidden: Tensor, out: Tensor, others: Leading, temperature: Tensor, backend: str) -> None:
        """The student's columns into ``out``, the exponentials of all others into ``others``."""
        buffer = empty((len(hidden), tile_stride(self.width)), torch.float32, hidden.device)
        for tile in self._tiles:
            z = buffer[:, : tile.rows.stop - tile.rows.start]
            self._projection(tile.rows).logits(hidden, z)
            finish_logits_(z, self._final(z))
            out.index_copy_(1, tile.columns, z.index_select(1, tile.places))
            z.index_fill_(1, tile.places, -math.inf)
            take(Logits(z, 1.0, None, False), 0, others, temperature, backend)

    def _projection(self, rows: slice | Tensor) -> Projection:
        return Projection(self._weight[rows], None if self._bias is None else self._bias[rows], self._dtype)

    def _final(self, z: Tensor) -> Logits:
        return Logits(z, self._side.logit_scale, self._side.softcap, True)  # -inf stays
