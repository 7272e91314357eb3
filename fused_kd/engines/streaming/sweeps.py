"""The streaming engine's sweeps over the vocabulary: what the Triton kernels are launched with."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rows.contract import scalars_stride
from ...rows.triton.terms import INTERPRET, formula_constants
from ...terms import Term
from ...workspace import empty
from ..problem import INVALID, Problem, Result, Side, largest
from . import plan as streaming_plan
from .gradient import flagged_product_kernel, gradient_kernel
from .kernels import NORMS, combine_kernel, statistics_kernel
from .plan import FIELDS, Plan, Tiles
from .sums import sums_combine_kernel, sums_kernel

# Tokens of a program that combines the splits: no more than a few such programs, so small ones.
COMBINE_BLOCK = 128
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Sweeps:
    """One call's tokens, in the order in which they are worked on, and the sweeps over their logits.

    Attributes:
        n: positions, those of the valid tokens first.
        tokens: (n,) which token is at a position.
        tiles: what each kernel is compiled for.
    """

    def __init__(self, problem: Problem, index: Tensor | None, labels: Tensor) -> None:
        """``index`` and ``labels`` as of :func:`..problem.valid_tokens`."""
        student, teacher, spec, vocab = problem.student, problem.teacher, problem.spec, problem.vocab
        teacher = teacher if spec.needs_teacher else None
        self.n = labels.shape[0]
        self._order, self._count = _front(labels >= 0)
        self.tokens = self._order if index is None else index[self._order]
        self._labels = labels[self._order]
        self._problem, self._scalars, self._vocab = problem, problem.scalars, vocab
        self._terms = len(spec.tabled)
        sides = [student] if teacher is None else [student, teacher]
        operands = [None if side.weight is None else problem.dtype or side.source.dtype for side in sides]
        capped = any(side.softcap is not None for side in sides)
        plain = all(_plain(side, operand) for side, operand in zip(sides, operands, strict=True))
        self.tiles = streaming_plan.choose_tiles(
            *operands, capped=capped, plain=plain, target=_target(), terms=self._terms
        )  # fmt: skip
        self._student, self._teacher = _side(student, vocab), None if teacher is None else _side(teacher, vocab)
        self._norms = empty((NORMS + 3 * self._terms, self.n), torch.float32, labels.device)
        # Heads make finite logits, unless by their bias.
        excludes = teacher is not None and any(side.weight is None or side.bias is not None for side in sides)
        self._formulas = formula_constants(spec, problem.cold_labels) | {
            "EXCLUDES": excludes,
            "PER_TOKEN": len(self._scalars) > 1,
        }
        self._scalars_stride = scalars_stride(self._scalars)
        self._constants: dict[str, Any] = {
            "ROUND_S": _TYPES[operands[0] or torch.float32],
            "ROUND_T": _TYPES[operands[-1] or torch.float32],
            "UPCAST": INTERPRET,
            "GROUP": streaming_plan.GROUP,
        }

    @property
    def needs_sums(self) -> bool:
        return self._terms > 0

    def measure(self, plan: Plan, result: Result) -> None:
        """Fill ``loss`` (NaN of invalid labels), ``difficulty``, ``is_hard``, and keep the norms for the gradient."""
        device = self._labels.device
        loss, difficulty = (empty((self.n,), torch.float32, device) for _ in range(2))
        hard = empty((self.n,), torch.bool, device)
        chosen = self._statistics(plan.splits, loss, difficulty, hard)
        if chosen is not None:
            self._sums(plan.sum_splits, chosen, loss)
        result.loss[self.tokens] = loss.masked_fill(self._labels == INVALID, math.nan)
        result.difficulty[self.tokens] = difficulty
        result.is_hard[self.tokens] = hard

    def _statistics(self, splits: int, loss: Tensor, difficulty: Tensor, hard: Tensor) -> Tensor | None:
        """Which positions take sums; None for none."""
        partials = empty((splits, FIELDS, self.n), torch.float32, self._labels.device)
        tiles = self.tiles.statistics
        statistics_kernel[(_cdiv(self.n, tiles.tokens), splits)](
            self._student, self._teacher, self.tokens, self._labels, self._count, self._scalars, self._scalars_stride,
            partials, self.n, self._vocab, self._span(splits, tiles),
            TEACHER=self._teacher is not None, **_only(self._formulas, "PER_TOKEN", "ROW", "EXCLUDES"),
            **self._constants, **_of(tiles),
        )  # fmt: skip
        spec = self._problem.spec
        some = self.needs_sums and all(_may_go_without(spec.terms[i]) for i in spec.tabled)
        chosen = empty((self.n,), torch.bool, self._labels.device) if some else None
        self._combine(partials, splits, loss, difficulty, hard, None, chosen)
        if spec.ranked:  # by what all tokens together have told
            given = largest(difficulty, self._labels, self._problem.fraction)
            self._combine(partials, splits, loss, difficulty, hard, given, chosen)
        if not self.needs_sums:
            return None
        return self._labels >= 0 if chosen is None else chosen

    def _combine(
        self,
        partials: Tensor,
        splits: int,
        loss: Tensor,
        difficulty: Tensor,
        hard: Tensor,
        given: Tensor | None,
        chosen: Tensor | None,
    ) -> None:
        combine_kernel[(_cdiv(self.n, COMBINE_BLOCK),)](
            partials, self._norms, self._count, self.tokens, self._scalars, self._scalars_stride, loss, difficulty,
            hard.view(torch.uint8), None if given is None else given.view(torch.uint8),
            None if chosen is None else chosen.view(torch.uint8), self.n, splits,
            TEACHER=self._teacher is not None, BLOCK=COMBINE_BLOCK,
            **_only(self._formulas, "TERMS", "TABLED", "ROW", "EXCLUDES"),
        )  # fmt: skip

    def _sums(self, splits: int, chosen: Tensor, loss: Tensor) -> None:
        order, count = _front(chosen)
        partials = empty((splits, 2 * self._terms, self.n), torch.float32, chosen.device)
        tiles = self.tiles.sums
        sums_kernel[(_cdiv(self.n, tiles.tokens), splits)](
            self._student, self._teacher, order, count, self.tokens, self._labels, self._norms, self._scalars,
            self._scalars_stride, partials, self.n, self._vocab, self._span(splits, tiles),
            **_only(self._formulas, "PER_TOKEN", "TABLED", "EXCLUDES"), **self._constants, **_of(tiles),
        )  # fmt: skip
        sums_combine_kernel[(_cdiv(self.n, COMBINE_BLOCK),)](
            partials, order, count, self.tokens, self._norms, self._scalars, self._scalars_stride, loss, self.n, splits,
            BLOCK=COMBINE_BLOCK, TABLED=self._formulas["TABLED"],
        )  # fmt: skip

    def gradient(
        self,
        out: Tensor,
        positions: slice,
        columns: slice,
        *,
        by_token: bool,
        weights: Tensor | None,
        flags: Tensor | None = None,
        threshold: float = 0.0,
    ) -> None:
        """Write dlogits, times ``weights`` (n,), of some positions and columns.

        Row i of ``out`` is the i-th of the positions, whose ignored tokens get zeros, or ``by_token`` token i, where
        those of ignored tokens stay as they are. ``flags``, from :meth:`flags`, asks for the filter.
        """
        gradient_kernel[self._grid(positions, columns)](
            self._student, self._teacher, self.tokens, self._labels, self._count, self._norms,
            weights, self._scalars, self._scalars_stride, out, out.stride(0), flags, threshold,
            positions.start, positions.stop, columns.start, columns.stop, self.n, self._vocab,
            TEACHER=self._teacher is not None, BY_TOKEN=by_token,
            **_only(self._formulas, "PER_TOKEN", "TABLED", "ROW", "EXCLUDES"),
            **self._constants, **_of(self.tiles.gradient),
        )  # fmt: skip

    def flags(self, positions: slice, columns: slice) -> Tensor:
        """Room for a flag for each tile of :meth:`gradient`."""
        return empty(self._grid(positions, columns), torch.uint8, self._labels.device)

    def flagged_product(
        self,
        out: Tensor,
        dlogits: Tensor,
        other: Tensor,
        flags: Tensor,
        *,
        dtype: torch.dtype,
        add: bool,
        tokens: Tensor | None = None,
        transposed: bool = False,
    ) -> None:
        """``out (+)= dlogits @ other``, or ``dlogits.T @ other[tokens]``, without the tiles whose flags are 0."""
        tiles = self.tiles.gradient
        BI, BC = tiles.tokens, tiles.columns
        if transposed:
            dlogits, flags, BI, BC = dlogits.t(), flags.t(), BC, BI
        (I, K), J = dlogits.shape, out.shape[1]  # noqa: E741
        flagged_product_kernel[(flags.shape[0], _cdiv(J, tiles.columns))](
            dlogits, other, tokens, flags, out, (I, J, K), dlogits.stride(), other.stride(), flags.stride(),
            ADD=add, ROUND=_TYPES[dtype], BI=BI, BJ=tiles.columns, BC=BC, num_warps=tiles.warps,
        )  # fmt: skip

    def _grid(self, positions: slice, columns: slice) -> tuple[int, int]:
        """Of :meth:`gradient`."""
        tiles = self.tiles.gradient
        return _cdiv(positions.stop - positions.start, tiles.tokens), _cdiv(columns.stop - columns.start, tiles.columns)

    def _span(self, splits: int, tiles: Tiles) -> int:
        return _cdiv(_cdiv(self._vocab, tiles.columns), splits) * tiles.columns


def _side(side: Side, vocab: int) -> tuple[Any, ...]:
    """As the kernels take it."""
    if side.weight is None:
        return (side.source, *side.source.stride(), None, 0, 0, None, 0, side.logit_scale, side.softcap)
    bias = None if side.bias is None else side.bias.contiguous()
    return (
        side.source, *side.source.stride(), side.weight, *side.weight.stride(), bias, side.source.shape[1],
        side.logit_scale, side.softcap,
    )  # fmt: skip


def _plain(side: Side, operand: torch.dtype | None) -> bool:
    """As :func:`.streaming_plan.choose_tiles` has it."""
    if side.weight is None or side.bias is not None or side.source.shape[1] % streaming_plan.ALIGNED:
        return False
    return all(
        x.dtype == operand and x.stride(1) == 1 and x.stride(0) % streaming_plan.ALIGNED == 0
        for x in (side.source, side.weight)
    )


def _may_go_without(term: Term) -> bool:
    """Whether some rows take KL in place of a term's sums."""
    return term.of.kl_at_one or term.chooses


def _front(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Positions with those where ``mask`` holds first, each part in order; and how many they are, as int32."""
    count = mask.sum(dtype=torch.int32)
    place = torch.where(mask, mask.cumsum(0), count + (~mask).cumsum(0)) - 1
    order = torch.empty_like(place).scatter_(0, place, torch.arange(len(place), device=mask.device))
    return order, count


def _target() -> str:
    if INTERPRET:
        return "sm_90"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def _of(tiles: Tiles) -> dict[str, int]:
    """A kernel's compile-time sizes."""
    made = {
        "BM": tiles.tokens, "BN": tiles.columns, "BK": tiles.units, "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }  # fmt: skip
    return made if tiles.registers is None else made | {"maxnreg": tiles.registers}


def _cdiv(size: int, step: int) -> int:
    return -(-size // step)


def _only(constants: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: constants[name] for name in names}
