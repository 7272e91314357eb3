"""The four GEMMs of a distillation step, always with fp32 results.

On NVIDIA GPUs (sm_80 and later) low-precision operands go straight into an fp32 result, and bf16 ones on CPUs with AMX
or AVX512-BF16, see :mod:`fused_kd.rows.native.gemm`. Elsewhere they are upcast, the weight one slab of vocabulary rows
at a time, so that no fp32 copy of it is held.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..rows.native.gemm import compiled_product, features, mkl_entry, product
from ..rows.select import native_works
from .plan import rounded_rows

SLAB_BYTES = 32 << 20
NARROW = 32


def has_fp32_output(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether operands of this low precision go straight into an fp32 result on this device."""
    if device.type == "cpu":
        return dtype == torch.bfloat16 and cpu_product() is not None
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def interpreted(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton's kernels for this device make no low-precision operands: its interpreter, on CPUs, cuts bf16 off
    instead of rounding it, and takes it for integers outside of ``tl.dot``."""
    return device.type == "cpu" and dtype != torch.float32


@functools.cache
def cpu_product() -> str | None:
    """What makes fp32 products of bf16 matrices on this CPU: "mkl", "native" (``csrc/kd_gemm.h``) or, if nothing, None.

    Compiles the native library where no process has done so before and the processor may have a use for it.
    """
    if "amx_bf16" in features() and mkl_entry() is not None:
        return "mkl"
    if "avx512_bf16" in features() and native_works() and compiled_product():
        return "native"
    return None


def slab_rows(V: int, H: int) -> int:
    """Vocabulary rows whose fp32 copy fits :data:`SLAB_BYTES`."""
    return max(1, min(V, SLAB_BYTES // (4 * H)))


def wide_product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """``out (+)= a @ b`` of low-precision operands, in fp32 throughout; ``NotImplementedError`` on a CPU without
    :func:`has_fp32_output`."""
    if a.device.type == "cpu":
        kind = cpu_product() if a.dtype == torch.bfloat16 else None
        if kind is None:
            raise NotImplementedError(f"no fp32 product of {a.dtype} on this CPU")
        product(kind, a, b, out, add=add)
    elif add:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)


class Projection:
    """``hidden @ weight.T + bias`` and its two gradients, with operands rounded to ``dtype`` first."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.upcast = dtype != torch.float32 and not has_fp32_output(weight.device, dtype)
        # What autocast does; on the upcast path it is done slab by slab.
        self.weight = weight.detach() if self.upcast else weight.detach().to(dtype)
        # The weight's own dtype, and whether there is a copy of it in that of the GEMMs.
        self.weight_dtype = weight.dtype
        self.copied = self.weight.dtype != weight.dtype
        self.bias = None if bias is None else bias.detach().to(dtype).float()

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The dtype in which :meth:`hidden_gradient` and :meth:`accumulate` want the logit gradient."""
        return torch.float32 if self.upcast else self.dtype

    def operand(self, hidden: Tensor) -> Tensor:
        """A chunk of hidden states as the GEMMs below take it."""
        hidden = hidden.detach().to(self.dtype)
        return hidden.float() if self.upcast else hidden

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """(C, H) operand → (C, V) fp32 in ``out``."""
        if self.dtype == torch.float32:
            if self.bias is None:
                torch.mm(hidden, self.weight.t(), out=out)
            else:
                torch.addmm(self.bias, hidden, self.weight.t(), out=out)
            return
        if self.upcast:
            for rows, slab in self._slabs():
                out[:, rows] = hidden @ slab.t()
        else:
            wide_product(hidden, self.weight.t(), out)
        if self.bias is not None:
            out.add_(self.bias)

    def hidden_gradient(self, dlogits: Tensor) -> Tensor:
        """(C, V) → (C, H) fp32; zeros of a rank without columns, for which not every GEMM is defined."""
        if not dlogits.shape[1]:
            return torch.zeros(dlogits.shape[0], self.weight.shape[1], dtype=torch.float32, device=dlogits.device)
        if self.dtype == torch.float32:
            return _product(dlogits, self.weight)
        if self.upcast:
            out = torch.zeros(dlogits.shape[0], self.weight.shape[1], dtype=torch.float32, device=dlogits.device)
            for rows, slab in self._slabs():
                out.addmm_(dlogits[:, rows], slab)
            return out
        out = torch.empty(dlogits.shape[0], self.weight.shape[1], dtype=torch.float32, device=dlogits.device)
        wide_product(dlogits, self.weight, out)
        return out

    @staticmethod
    def accumulate(out: Tensor, dlogits: Tensor, hidden: Tensor, first: bool) -> None:
        """``out (V, H) += dlogits.T @ hidden`` in fp32; ``first`` overwrites instead."""
        if dlogits.dtype == torch.float32:
            out.addmm_(dlogits.t(), hidden, beta=0.0 if first else 1.0)
        else:
            wide_product(dlogits.t(), hidden, out, add=not first)

    def _slabs(self) -> Iterator[tuple[slice, Tensor]]:
        V, H = self.weight.shape
        step = slab_rows(V, H)
        for start in range(0, V, step):
            rows = slice(start, min(start + step, V))
            yield rows, self.weight[rows].to(self.dtype).float()


class Products(Protocol):
    """The two products of a group's dlogits (G, V)."""

    def hidden(self) -> Tensor:
        """(G, H) fp32: dlogits @ weight."""

    def weight(self, out: Tensor, columns: slice, hidden: Tensor, *, first: bool) -> None:
        """``out (columns, H) += dlogits[:, columns].T @ hidden`` in fp32; ``first`` overwrites instead."""


class Dense:
    """Of all of dlogits."""

    def __init__(self, projection: Projection, dlogits: Tensor) -> None:
        self._projection, self._dlogits = projection, dlogits

    def hidden(self) -> Tensor:
        return self._projection.hidden_gradient(self._dlogits)

    def weight(self, out: Tensor, columns: slice, hidden: Tensor, *, first: bool) -> None:
        self._projection.accumulate(out, self._dlogits[:, columns], hidden, first)


def fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` on the CPU, of operands in the dtype of a :class:`Projection`'s GEMMs."""
    if a.dtype == torch.float32:
        return a @ b
    out = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    wide_product(a, b, out)
    return out


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in fp32.

    The shape (a long inner dimension, a small result) asks for care on CPUs. Where there is AVX-512, oneDNN is up to
    twice as fast as the BLAS behind ``mm``; elsewhere some 20 % slower. And for a narrow result that BLAS switches to
    kernels that round up to ten times worse at V = 151936. Logits stay with ``mm``, which rounds them better.
    """
    narrow = min(a.shape[0], b.shape[1]) < NARROW
    if a.device.type == "cpu" and _HAS_ONEDNN and (narrow or _HAS_AVX512):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(_with_rows_behind(a), b.t(), None, "none", [], "")
        return out[: a.shape[0]]
    return a @ b


def _with_rows_behind(a: Tensor) -> Tensor:
    """``a`` and, where its buffer has room, what lies behind it, up to :func:`rounded_rows`.

    oneDNN keeps about 0.7 MB for each shape that it has seen, and how many tokens are valid differs from step to step.
    """
    rows, (stride, unit) = rounded_rows(a.shape[0]), a.stride()
    room = a.untyped_storage().nbytes() // a.element_size() - a.storage_offset()
    if unit != 1 or stride < a.shape[1] or (rows - 1) * stride + a.shape[1] > room:
        return a
    return a.as_strided((rows, a.shape[1]), a.stride())


_HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
