"""Gradient GEMMs that leave out what is negligible of dlogits.

With a near teacher, blocks of tokens give nearly all of the vocabulary hardly any gradient. dlogits are looked at in
tiles of tokens x columns; where every entry of a tile, before token weights and the factor of all gradients, is below
``eps`` in size, the tile counts as zero in both products. So a token's hidden gradient is off by less than
``eps * sum_v |W_v|``, a vocabulary entry's weight gradient by less than ``eps * sum_i |h_i|``, the terms of each times
their token's factor; a bias's gradient stays exact. On the host a tile is one column of a block of tokens, and the
columns that are left are gathered for a dense product; on a GPU, which must not wait for counts, kernels skip tiles by
their flags.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gemm import SLAB_BYTES, Products, Projection, fp32_product, slab_rows

# Fewer tokens leave out more, but make smaller products.
HOST_TOKENS = 128


def tiles_of(projection: Projection, dlogits: Tensor, factors: Tensor | None, eps: float) -> Products:
    """``factors`` (G,) fp32 are those that the rows of ``dlogits`` have been multiplied by (None: 1)."""
    if dlogits.device.type == "cpu":
        return HostTiles(projection, dlogits, factors, eps)
    from .tile_filter_triton import DeviceTiles

    return DeviceTiles(projection, dlogits, factors, eps)


class HostTiles:
    """Columns by blocks of tokens."""

    def __init__(self, projection: Projection, dlogits: Tensor, factors: Tensor | None, eps: float) -> None:
        self._projection, self._dlogits = projection, dlogits
        self._blocks: list[tuple[slice, Tensor]] = []
        for start in range(0, len(dlogits), HOST_TOKENS):
            rows = slice(start, start + HOST_TOKENS)
            threshold = eps if factors is None else (eps * factors[rows].abs()).unsqueeze(1)
            # Compared so that a NaN, too, keeps its column; 0 is left out whatever the factor.
            negligible = (dlogits[rows].abs() < threshold) | (dlogits[rows] == 0)
            self._blocks.append((rows, (~negligible.all(0)).nonzero().squeeze(1)))

    def hidden(self) -> Tensor:
        projection = self._projection
        V, H = projection.weight.shape
        out = torch.zeros(len(self._dlogits), H, dtype=torch.float32, device=self._dlogits.device)
        for rows, kept in self._blocks:
            for columns in kept.split(slab_rows(V, H)):
                weight = projection.weight[columns].to(projection.dtype).to(self._dlogits.dtype)
                out[rows] += fp32_product(self._dlogits[rows][:, columns], weight)
        return out

    def weight(self, out: Tensor, columns: slice, hidden: Tensor, *, first: bool) -> None:
        if first:
            out.zero_()
        for rows, kept in self._blocks:
            inside = kept[(kept >= columns.start) & (kept < columns.stop)]
            for part in inside.split(slab_rows(*self._projection.weight.shape)):
                product = fp32_product(self._dlogits[rows][:, part].t(), hidden[rows])
                out.index_add_(0, part - columns.start, product)


def host_bytes(V: int) -> int:
    """What the blocks of :class:`HostTiles` take for V columns: looking at one, and a gathered slab."""
    return HOST_TOKENS * V * 6 + 2 * SLAB_BYTES
