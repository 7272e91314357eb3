"""A group's dlogits in tiles with flags, on a GPU; see :mod:`.tile_filter`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows.triton.row import guard, warp_size
from ..workspace import empty
from .gemm import Projection
from .streaming.gradient import flagged_product_kernel
from .waves import TILE

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# fp32 products, on the ordinary cores, hold their operands in registers.
FP32_TILE, THREADS = TILE // 2, 256


@triton.jit(do_not_specialize=["G"])
def flags_kernel(
    dlogits_ptr,  # (G, V)
    stride,
    factors_ptr,  # (G,) what the rows have been multiplied by, or None for 1
    flags_ptr,  # (blocks of G, tiles of V): whether a tile is left
    eps,
    G,
    V,
    TILE: tl.constexpr,
):
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (rows < G)[:, None] & (columns < V)[None, :]
    x = tl.load(dlogits_ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    x = tl.abs(x.to(tl.float32))
    threshold = tl.full((TILE,), 1.0, tl.float32) * eps
    if factors_ptr is not None:
        threshold *= tl.abs(tl.load(factors_ptr + rows, mask=rows < G, other=0.0))
    # Compared so that a NaN, too, keeps its tile; 0 is left out whatever the factor.
    kept = ~((x < threshold[:, None]) | (x == 0.0))
    flag = tl.max(tl.max(kept.to(tl.int32), axis=1), axis=0)
    tl.store(flags_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), flag)


class DeviceTiles:
    """``TILE`` x ``TILE`` entries each."""

    def __init__(self, projection: Projection, dlogits: Tensor, factors: Tensor | None, eps: float) -> None:
        G, V = dlogits.shape
        self._projection = projection
        self._dlogits, self._tile = dlogits, FP32_TILE if dlogits.dtype == torch.float32 else TILE
        self._flags = empty((triton.cdiv(G, self._tile), triton.cdiv(V, self._tile)), torch.uint8, dlogits.device)
        factors = None if factors is None else factors.contiguous()
        if self._flags.numel():
            with guard(dlogits.device):
                flags_kernel[self._flags.shape](
                    dlogits, dlogits.stride(0), factors, self._flags, eps, G, V,
                    TILE=self._tile, num_warps=THREADS // warp_size(),
                )  # fmt: skip

    def hidden(self) -> Tensor:
        weight = self._projection.weight
        shape = len(self._dlogits), weight.shape[1]
        out = torch.empty(shape, dtype=torch.float32, device=self._dlogits.device)
        self._product(out, self._dlogits, weight, self._flags, self._projection.dtype, add=False)
        return out

    def weight(self, out: Tensor, columns: slice, hidden: Tensor, *, first: bool) -> None:
        assert columns.start % self._tile == 0, "columns must begin where a tile does"
        tiles = slice(columns.start // self._tile, triton.cdiv(columns.stop, self._tile))
        flags = self._flags[:, tiles].t()
        self._product(out, self._dlogits[:, columns].t(), hidden, flags, hidden.dtype, add=not first)

    def _product(self, out: Tensor, a: Tensor, b: Tensor, flags: Tensor, dtype: torch.dtype, *, add: bool) -> None:
        """``out (+)= a @ b``, without the tiles of ``a`` whose flags are 0."""
        (I, K), J, tile = a.shape, out.shape[1], self._tile  # noqa: E741
        if not out.numel():
            return
        with guard(out.device):
            flagged_product_kernel[(flags.shape[0], triton.cdiv(J, tile))](
                a, b, None, flags, out, (I, J, K), a.stride(), b.stride(), flags.stride(),
                ADD=add, ROUND=_TYPES[dtype], BI=tile, BJ=tile, BC=tile, num_warps=THREADS // warp_size(),
            )  # fmt: skip
