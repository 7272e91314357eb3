"""The gradients of a student's head from its logit gradients, a group of tokens at a time.

A group's dlogits lie in one buffer, which the chunks' rows fill; then one GEMM adds to dW and one makes dH. The fewer
the groups, the less often the V x H sums of dW are read and written again, and the better the narrow GEMM of dH fills a
GPU. Where one group holds all tokens nothing is added up at all: dW is made once, in fp32 a slab of vocabulary rows at
a time, and rounded while the slab is still in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..workspace import empty
from .gemm import SLAB_BYTES, Dense, Products, Projection
from .problem import gradient_dtype
from .tile_filter import tiles_of
from .waves import TILE, fitting, gemm_waves


def carries_scale(projection: Projection | None) -> bool:
    """Whether the row's weights take the factor of all gradients, so that no later pass need apply it.

    Given logits have no GEMM that could take it. bf16 dlogits lose nothing by it, as their exponents reach as far as
    fp32's; fp16's would underflow. fp32 ones leave it to the smaller operands of the GEMMs, a rounding less.
    """
    return projection is None or projection.gradient_dtype == torch.bfloat16


def weight_slab(V: int, H: int) -> int:
    """Vocabulary rows of dW at a time on their way to a low precision: whole tiles in whole waves, in the cache."""
    return fitting(SLAB_BYTES // (4 * H), TILE, V, lambda rows: gemm_waves(rows, H))


def made_at_once(weight: torch.dtype, *, whole: bool, upcast: bool) -> bool:
    """Whether dW of this dtype is made once, by slabs, instead of being added up in fp32 and rounded at the end."""
    return whole and not upcast and gradient_dtype(weight) != torch.float32


class HeadGradient:
    """dW and db, one group of tokens after the other; and dH of a group.

    Args:
        weight, bias: the student's.
        projection: its GEMMs, on the first rows of both; gradients of the others are 0.
        scale: 0-d fp32 factor of all gradients.
        whole: one group holds all tokens.
        grad_filter_eps: of :mod:`.tile_filter`, 0 for exact gradients.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        projection: Projection,
        scale: Tensor,
        *,
        want_weight: bool,
        want_bias: bool,
        whole: bool,
        grad_filter_eps: float = 0.0,
    ) -> None:
        self._weight, self._bias, self._projection, self._scale = weight, bias, projection, scale
        self._vocab = projection.weight.shape[0]
        self._scaled = carries_scale(projection)
        self._at_once = made_at_once(weight.dtype, whole=whole, upcast=projection.upcast)
        self._d_weight = self._d_bias = None
        if want_weight:
            dtype = gradient_dtype(weight.dtype) if self._at_once else torch.float32
            self._d_weight = empty(tuple(weight.shape), dtype, weight.device, result=True)
            self._d_weight[self._vocab :].zero_()
        if want_bias and bias is not None:
            self._d_bias = torch.zeros(bias.shape, dtype=torch.float32, device=weight.device)
        self._eps = grad_filter_eps
        self._first = True

    def add(self, dlogits: Tensor, hidden: Tensor, factors: Tensor | None, *, want_hidden: bool) -> Tensor | None:
        """Take up a group's part of dW and db; return dH (G, H) fp32, times the factor, where wanted.

        Args:
            dlogits: (G, V). hidden: (G, H), the GEMM's operand.
            factors: (G,) fp32 that the rows of ``dlogits`` have been multiplied by; None for 1.
        """
        products: Products = Dense(self._projection, dlogits)
        if self._eps > 0:
            products = tiles_of(self._projection, dlogits, factors, self._eps)
        d_hidden = None
        if want_hidden:
            d_hidden = products.hidden()
            if not self._scaled:
                d_hidden.mul_(self._scale)
        if self._d_weight is not None:
            out = self._d_weight[: self._vocab]
            if self._at_once:
                self._round_by_slabs(products, out, hidden)
            else:
                # In fp32 the factor rides on the small operand; rounding it there would cost digits otherwise.
                operand = hidden * self._scale if hidden.dtype == torch.float32 else hidden
                products.weight(out, slice(0, self._vocab), operand, first=self._first)
        if self._d_bias is not None:
            self._d_bias[: self._vocab] += dlogits.sum(0, dtype=torch.float32)
        self._first = False
        return d_hidden

    def _round_by_slabs(self, products: Products, out: Tensor, hidden: Tensor) -> None:
        step = weight_slab(*out.shape)
        slab = empty((step, out.shape[1]), torch.float32, out.device)
        for start in range(0, self._vocab, step):
            rows = slice(start, min(start + step, self._vocab))
            total = slab[: rows.stop - rows.start]
            products.weight(total, rows, hidden, first=True)
            out[rows] = total if self._scaled else total.mul_(self._scale)

    def finished(self) -> tuple[Tensor | None, Tensor | None]:
        """dW and db, scaled, in the dtypes that the engine returns."""
        d_weight, d_bias = self._d_weight, self._d_bias
        if d_weight is not None:
            if self._first:
                d_weight.zero_()
            elif not self._scaled and not self._at_once and self._projection.gradient_dtype != torch.float32:
                d_weight.mul_(self._scale)
            d_weight = d_weight.to(gradient_dtype(self._weight.dtype))
        if d_bias is not None and self._bias is not None:
            if not self._scaled:
                d_bias.mul_(self._scale)
            d_bias = d_bias.to(gradient_dtype(self._bias.dtype))
        return d_weight, d_bias
