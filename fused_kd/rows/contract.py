"""The signature that every row implementation shares.

A *row* turns a chunk of logits into per-token losses and overwrites a buffer with their gradient in the logits.
Implementations never import each other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import DIVERGENCES
from ..terms import GATES, RowSpec, Term


class Logits(NamedTuple):
    """Raw logits (C, V) of one side, and how they become final ones: ``x = cap * tanh(scale * raw / cap)``.

    ``softcap`` None leaves out the cap. ``finite`` promises that no token is excluded.
    """

    raw: Tensor
    scale: float
    softcap: float | None
    finite: bool


class Sparse(NamedTuple):
    """A top-k teacher of one chunk, see :class:`fused_kd.inputs.TopK`; labels that the objective reads are
    among the entries.

    ``indices`` (C, K + 1) int64, ascending, V where there is no entry; ``log_probs`` (C, K + 1) fp32, -inf where there
    is none; ``rest`` (C,) fp32, the logarithm of what the tail gives to
    all other entries together ("bucket"), to each of them ("uniform"), or -inf ("renormalize", "listed"). Both are
    times the temperature at which the list was taken: final logits, as a dense teacher's.
    """

    indices: Tensor
    log_probs: Tensor
    rest: Tensor
    tail: str


class Beyond(NamedTuple):
    """What student and teacher of different vocabularies do not share, see :class:`fused_kd.inputs.LMHead`, where it is
    a category of its own: of the student its ``unmapped`` (U,) int64 columns, on which the teacher's logits are -inf;
    of the teacher ``rest`` (C,) fp32, T times the log-sum-exp over T of the columns that the student lacks.
    """

    rest: Tensor
    unmapped: Tensor
    tail: str


# Longer lists of a :class:`Leading` do not fit a GPU's registers.
LONGEST_IN_TRITON = 2048


class Leading(NamedTuple):
    """A running selection of C rows, see :mod:`fused_kd.rows.largest`.

    ``values`` (C, k) fp32 are the largest final logits so far, in any order and -inf where there is none yet, and
    ``indices`` (C, k) int64 their vocabulary ids. Of all others seen, ``top`` (C,) fp32 is the largest, -inf where
    there is none, and ``total`` (C,) fp32 ``sum exp((z - top) / T)``.
    """

    values: Tensor
    indices: Tensor
    top: Tensor
    total: Tensor

    @staticmethod
    def none(C: int, k: int, device: torch.device) -> Leading:
        """Of no columns yet."""
        return Leading(
            torch.full((C, k), -math.inf, dtype=torch.float32, device=device),
            torch.zeros(C, k, dtype=torch.int64, device=device),
            torch.full((C,), -math.inf, dtype=torch.float32, device=device),
            torch.zeros(C, dtype=torch.float32, device=device),
        )


class RowInputs(NamedTuple):
    """One chunk. ``labels`` (C,) int64 in [0, V), or negative for rows to be left out (loss and gradient 0).

    ``weights`` (C,) fp32 or None multiplies the gradient, not the returned loss. ``scalars`` (1, terms, n) fp32 on the
    chunk's device, or (C, terms, n) where each token has its own: of each term of ``spec`` those of
    :class:`fused_kd.terms.Scalars`. ``cold_labels`` says that the label's own cross-entropy is taken at temperature 1
    while the rest is taken at another temperature or over a list alone. ``hard`` (C,) bool or None says of a gated
    objective's rows which are hard, in place of their difficulty. ``beyond`` says that the teacher has another
    vocabulary; final logits of it are then given.
    """

    student: Logits
    teacher: Logits | Sparse | None
    labels: Tensor
    weights: Tensor | None
    scalars: Tensor
    spec: RowSpec
    cold_labels: bool
    hard: Tensor | None = None
    beyond: Beyond | None = None


class RowOutputs(NamedTuple):
    """Written by a row: ``loss``, ``difficulty`` (C,) fp32, ``is_hard`` (C,) bool, ``dlogits`` (C, V) or None.

    ``dlogits`` may be the student's raw logits themselves. ``statistics`` (C, n) fp32 or None: the first n of
    :data:`fused_kd.terms.STATISTICS`, all of them or those that need no sweep of their own.
    """

    loss: Tensor
    difficulty: Tensor
    is_hard: Tensor
    dlogits: Tensor | None
    statistics: Tensor | None = None


Row = Callable[[RowInputs, RowOutputs], None]


OUTERS = ("", "minus_log", "mix")
_DIVERGENCES = {name: i for i, name in enumerate(DIVERGENCES)}


@functools.cache
def traits(term: Term) -> dict[str, int]:
    """What makes a term of a compiled row what it is; ``divergence``, ``gate`` and ``outer`` are numbered."""
    of = term.of
    return {
        "divergence": _DIVERGENCES[term.divergence or "kl"],
        "has_teacher": int(term.divergence is not None),
        "free": int(term.free),
        "mixture": int(of.mixture),
        "reads_d": int("d" in of.reads and not of.free),
        "powers": int(of.powers),
        "kl_at_one": int(of.kl_at_one),
        "adaptive": int(of.adaptive),
        "everywhere": int(of.everywhere),
        "covers": int(of.covers),
        "outer": OUTERS.index(of.outer),
        "mixed": int(term.mixed),
        "hard_label": int(term.hard_label),
        "gate": ("", *GATES).index(term.gate),
        "z_loss": int(term.z_loss),
    }


def scalars_stride(scalars: Tensor) -> int:
    """Elements from a row's scalars to the next one's: none where all rows share them."""
    return 0 if len(scalars) == 1 else scalars.stride(0)


def compiled(row: Row) -> Row:
    """The prologue and epilogue of a row that reads and writes by address: ``row`` for any strides, or no rows at all.

    ``row`` is called as :func:`prepared` says. The result raises a ``ValueError`` for vectors of ``outputs``, or
    scalars, that are not contiguous.
    """

    @functools.wraps(row)
    def whole(inputs: RowInputs, outputs: RowOutputs) -> None:
        vectors = {name: getattr(outputs, name) for name in ("loss", "difficulty", "is_hard", "statistics")}
        for name, vector in (vectors | {"scalars": inputs.scalars}).items():
            if vector is not None and not vector.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {vector.stride()}")
        if len(inputs.labels) == 0:
            return
        own_inputs, own_outputs = prepared(inputs, outputs)
        row(own_inputs, own_outputs)
        copy_back(own_outputs, outputs)

    return whole


def prepared(inputs: RowInputs, outputs: RowOutputs) -> tuple[RowInputs, RowOutputs]:
    """Both with unit stride along the vocabulary and the rest contiguous, copied where they are not, and without a
    teacher that the objective does not read.

    dlogits that are the student's raw logits stay so; what is written elsewhere is for :func:`copy_back`.
    """
    student, teacher, dlogits = inputs.student, inputs.teacher, outputs.dlogits
    raw = unit_stride(student.raw)
    if dlogits is not None:
        dlogits = raw if dlogits is student.raw else unit_stride(dlogits)
    if not inputs.spec.needs_teacher:
        teacher = None
    elif isinstance(teacher, Logits):
        teacher = teacher._replace(raw=unit_stride(teacher.raw))
    elif isinstance(teacher, Sparse):
        indices, log_probs, rest, tail = teacher
        teacher = Sparse(indices.contiguous(), log_probs.contiguous(), rest.contiguous(), tail)
    own = inputs._replace(
        student=student._replace(raw=raw),
        teacher=teacher,
        labels=inputs.labels.contiguous(),
        weights=None if inputs.weights is None else inputs.weights.contiguous(),
        hard=None if inputs.hard is None else inputs.hard.contiguous(),
    )
    return own, outputs._replace(dlogits=dlogits)


def copy_back(written: RowOutputs, outputs: RowOutputs) -> None:
    """What a row has written to :func:`prepared` outputs, to where it was wanted."""
    if outputs.dlogits is not None and written.dlogits is not None and written.dlogits is not outputs.dlogits:
        outputs.dlogits.copy_(written.dlogits)


def check_per_row(name: str, x: Tensor, C: int) -> None:
    """
    Raises:
        ValueError: for what is not one fp32 number for all of C rows, or one for each.
    """
    if x.shape not in ((1,), (C,)) or x.dtype != torch.float32 or not x.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, float32 and of shape (1,) or ({C},), got {x.dtype}, "
            f"{tuple(x.shape)} with strides {x.stride()}"
        )


def unit_stride(x: Tensor) -> Tensor:
    """(C, V), copied where its rows are not contiguous."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


@dataclass(frozen=True)
class Shards:
    """The vocabulary's slices over a group, after the cut to ``vocab_size``.

    ``sizes`` are the columns of each rank, from 0 on; ``group`` is the process group's name.
    """

    group: str
    rank: int
    sizes: tuple[int, ...]

    @property
    def start(self) -> int:
        """The vocabulary id of this rank's first column."""
        return sum(self.sizes[: self.rank])

    @property
    def size(self) -> int:
        return self.sizes[self.rank]

    @property
    def widest(self) -> int:
        return max(self.sizes)

    @property
    def vocab(self) -> int:
        return sum(self.sizes)
