"""The buffers of a chunk's logits and a group's dlogits, allocated once and used by each in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from ..workspace import empty
from .plan import Plan

# 128 bytes of bf16, 256 of fp32.
ROW_MULTIPLE = 64


class Buffers:
    """Made when first asked for; ``V`` columns each."""

    def __init__(self, plan: Plan, V: int, device: torch.device) -> None:
        self._plan, self._V, self._device = plan, V, device
        self._held: dict[str, Tensor] = {}

    def logits(self, name: str, rows: int) -> Tensor:
        most = max(self._plan.rows, self._plan.chunk) if name == "student" else self._plan.chunk
        return self._matrix(name, torch.float32, most)[:rows]

    def dlogits(self, dtype: torch.dtype, rows: slice) -> Tensor:
        return self._matrix("dlogits", dtype, self._plan.group)[rows]

    def vector(self, name: str, dtype: torch.dtype, span: slice) -> Tensor:
        if name not in self._held:
            self._held[name] = empty((self._plan.chunk,), dtype, self._device)
        return self._held[name][: span.stop - span.start]

    def _matrix(self, name: str, dtype: torch.dtype, rows: int) -> Tensor:
        if name not in self._held:
            self._held[name] = empty((rows, row_stride(self._V, self._device.type)), dtype, self._device)
        return self._held[name][:, : self._V]


def row_stride(V: int, device_type: str) -> int:
    """Elements from row to row of a buffer: on a GPU rows begin where vector loads and the BLAS's fast kernels can."""
    return V if device_type == "cpu" else -(-V // ROW_MULTIPLE) * ROW_MULTIPLE
