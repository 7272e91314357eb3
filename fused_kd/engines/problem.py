"""What an engine is given and gives back: a call's tensors and options, the labels' encoding, the ranking of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..rows.contract import RowOutputs, Shards
from ..terms import RowSpec, Scalars

# Labels of tokens that are left out, and of those whose loss is NaN; all others are in [0, vocab).
IGNORED, INVALID = -1, -2
# No log-probability of a token that is not excluded is below it.
NO_LOGIT = -1e16


@dataclass(frozen=True, eq=False)
class Side:
    """Student or teacher, on all N tokens.

    ``source`` is (N, H) with ``weight`` (V, H); or logits (N, V) with neither weight nor indices; or, of a top-k
    teacher, log-probabilities (N, K) with ``indices`` (N, K), ``tail``, ``temperature`` and ``log_rest`` (N,) or None,
    see :class:`fused_kd.inputs.TopK`; of one of another vocabulary with ``columns`` (V of the student,) and ``tail``,
    see :class:`fused_kd.inputs.LMHead`. Where the vocabulary is divided over ranks, V are this rank's rows.
    """

    source: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    indices: Tensor | None = None
    tail: str = ""
    temperature: float = 1.0
    log_rest: Tensor | None = None
    columns: Tensor | None = None

    @property
    def vocab(self) -> int | None:
        """V, of the student where there is a map; None of a top-k teacher, which does not know."""
        if self.columns is not None:
            return len(self.columns)
        if self.indices is not None:
            return None
        return self.source.shape[1] if self.weight is None else self.weight.shape[0]


class Listing(NamedTuple):
    """The lists to choose in each chunk, see :class:`fused_kd.inputs.Lists`; ``k`` 0: none."""

    k: int = 0
    of_student: bool = False
    tail: str = ""
    top_p: float = 1.0


NO_LISTING = Listing()


class Wanted(NamedTuple):
    """Which gradients of the student to make; what is not wanted costs nothing."""

    source: bool
    weight: bool
    bias: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """One call of an engine.

    Attributes:
        teacher: None where the objective has none.
        others: further teachers, whose probabilities are mixed with those of ``teacher``.
        shares: with others, (1, n) or (N, n) fp32, logarithms of what each of the n teachers has of a token; -inf:
            nothing, whatever it holds there.
        which: (N,) int64 on the CPU, each token's only teacher, where shares are 0 and -inf alone; else None.
        labels: (N,) int64 in [0, vocab), :data:`IGNORED` or :data:`INVALID`, on the student's device or on the CPU. On
            the CPU, ignored tokens are dropped without a synchronisation; on an accelerator their number is unknown to
            the host, so their rows are skipped instead.
        weights: (N,) fp32 token weights or None.
        scale: 0-d fp32 factor of all gradients.
        scalars: (1, terms, n) fp32, or (N, terms, n) where each token has its own, see :class:`fused_kd.terms.Scalars`.
        wanted: gradients.
        spec_code: what a row must know before it is compiled, see :class:`fused_kd.terms.RowSpec`.
        cold_labels: see :class:`fused_kd.rows.contract.RowInputs`.
        vocab: both sides are cut to their first ``vocab`` logits; with a map, the student and the map.
        dtype: of the GEMM operands under autocast; None takes that of each side.
        memory_budget: bytes of workspace, or None.
        grad_filter_eps: see :mod:`.tile_filter`.
        engine, backend: as :func:`.dispatch.choose_engine` has chosen them.
        validate: whether to look at values that are not on the host.
        shards: the vocabulary's slices over ranks; None: all of it is here.
        statistics: how many of :data:`fused_kd.terms.STATISTICS` to tell.
        listing: which lists to choose, in each chunk, of a teacher with logits.
        sum_hidden: add up the hidden gradient over the ranks; else each has the part of its own slice.
    """

    student: Side
    teacher: Side | None
    labels: Tensor
    weights: Tensor | None
    scale: Tensor
    scalars: Tensor
    wanted: Wanted
    spec_code: str
    cold_labels: bool
    vocab: int
    dtype: torch.dtype | None
    memory_budget: int | None
    engine: str
    backend: str
    grad_filter_eps: float = 0.0
    validate: bool = False
    shards: Shards | None = None
    sum_hidden: bool = True
    statistics: int = 0
    listing: Listing = NO_LISTING
    others: tuple[Side, ...] = ()
    shares: Tensor | None = None
    which: Tensor | None = None

    @property
    def spec(self) -> RowSpec:
        return RowSpec.decode(self.spec_code)

    @property
    def teachers(self) -> tuple[Side, ...]:
        return () if self.teacher is None else (self.teacher, *self.others)

    @property
    def fraction(self) -> Tensor:
        """0-d: the share of hard tokens, of an objective that ranks them."""
        # not [0]: there may be no token with numbers of its own
        return self.scalars[:1, self.spec.main, Scalars._fields.index("fraction")].sum()

    def labels_for(self, teacher: int) -> Tensor:
        """:data:`IGNORED` also where the mixture has nothing of this one of its teachers."""
        if self.which is not None:
            absent = self.which != teacher
        elif self.shares is not None:
            absent = self.shares[:, teacher] == -math.inf
        else:
            return self.labels
        return self.labels.masked_fill(absent.to(self.labels.device, non_blocking=True), IGNORED)

    def scalars_of(self, tokens: slice | Tensor) -> Tensor:
        """Those of some tokens."""
        return self.scalars if len(self.scalars) == 1 else self.scalars[tokens]

    def temperature_of(self, tokens: slice | Tensor) -> Tensor:
        """(1,) fp32, or that of each of some tokens."""
        return self.scalars_of(tokens)[:, 0, Scalars._fields.index("temperature")].contiguous()


class Result(NamedTuple):
    """Unweighted ``loss``, ``difficulty``, ``is_hard`` (N,), ``statistics`` (N, n); gradients of
    ``scale * sum(weights * loss)``."""

    loss: Tensor
    difficulty: Tensor
    is_hard: Tensor
    statistics: Tensor
    d_source: Tensor | None
    d_weight: Tensor | None = None
    d_bias: Tensor | None = None

    @staticmethod
    def allocate(problem: Problem, *, sparse: bool) -> Result:
        """Of no token yet; ``sparse`` says that some are never written."""
        student, device, N = problem.student, problem.student.source.device, len(problem.student.source)
        d_source = None
        if problem.wanted.source:
            # Dropped tokens (and dropped columns) are never written, so their gradient must start as zero.
            make = torch.zeros if sparse or student.weight is None else torch.empty
            d_source = make(student.source.shape, dtype=gradient_dtype(student.source.dtype), device=device)
        return Result(
            torch.zeros(N, dtype=torch.float32, device=device),
            torch.zeros(N, dtype=torch.float32, device=device),
            torch.zeros(N, dtype=torch.bool, device=device),
            torch.zeros(N, problem.statistics, dtype=torch.float32, device=device),
            d_source,
        )

    def record(self, tokens: slice | Tensor, rows: RowOutputs, bad: Tensor, *, sparse_logits: bool) -> None:
        """A chunk's losses, NaN for ``bad`` tokens; for ``sparse_logits`` also their gradient, of some tokens."""
        self.loss[tokens] = rows.loss.masked_fill(bad, math.nan)
        self.difficulty[tokens] = rows.difficulty
        self.is_hard[tokens] = rows.is_hard
        if rows.statistics is not None:
            # what stands for log 0 in a row is -inf outside
            self.statistics[tokens] = rows.statistics.masked_fill(rows.statistics < NO_LOGIT, -math.inf)
        if sparse_logits and rows.dlogits is not None and self.d_source is not None:
            self.d_source[:, : rows.dlogits.shape[1]][tokens] = rows.dlogits


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp16 gradients wait in fp32 for the loss scale, which comes with the backward pass; else they would underflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def valid_tokens(labels: Tensor, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """Positions of the tokens to process (None: all of them) and their labels, both on ``device``."""
    if labels.device.type != "cpu":
        return None, labels
    index = (labels != IGNORED).nonzero().squeeze(1)
    if index.shape[0] == labels.shape[0]:
        return None, labels.to(device, non_blocking=True)
    return index.to(device, non_blocking=True), labels[index].to(device, non_blocking=True)


def largest(difficulty: Tensor, labels: Tensor, fraction: Tensor) -> Tensor:
    """Which valid tokens are among the ``ceil(fraction * n)`` most difficult of n; ties go by position."""
    valid, fraction = labels >= 0, fraction.double()
    # fp32 scalars but 1 are off by 6e-8: 0.1 * 10 must not become 2.
    count = (torch.where(fraction < 1.0, fraction * (1 - 2**-24), fraction) * valid.sum()).ceil()
    order = torch.where(valid, difficulty, -1.0).argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return valid & (rank < count)
