"""Products of bf16 matrices on CPUs with fp32 results, of which PyTorch has none.

MKL's where the processor has AMX tiles, ``csrc/kd_gemm.h`` where it has AVX512-BF16 only: there, on AMD's, MKL's is no
faster than fp32.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import build as native_build

_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = 101, 111, 112


class _Operand(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("line_stride", ctypes.c_int64), ("k_stride", ctypes.c_int64))


class _Product(ctypes.Structure):
    _fields_ = (
        ("M", ctypes.c_int64),
        ("N", ctypes.c_int64),
        ("K", ctypes.c_int64),
        ("a", _Operand),
        ("b", _Operand),
        ("c", ctypes.c_void_p),
        ("c_stride", ctypes.c_int64),
        ("add", ctypes.c_int32),
    )


@functools.cache
def features() -> frozenset[str]:
    """What the processor says that it can do; empty where the system does not tell."""
    try:
        found = re.search(r"^flags\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return frozenset(found[1].split()) if found else frozenset()


@functools.cache
def mkl_entry() -> Callable[..., None] | None:
    """MKL's product, where PyTorch has MKL in it and lets others call it."""
    if not torch.backends.mkl.is_available():
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        entry = library.cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):
        return None
    integer, pointer, real = ctypes.c_int, ctypes.c_void_p, ctypes.c_float
    entry.argtypes = (*[integer] * 6, real, pointer, integer, pointer, integer, real, pointer, integer)
    entry.restype = None
    return entry


def compiled_product() -> bool:
    """Whether the compiled library has a product for this processor.

    Raises:
        NativeRowError: as :func:`fused_kd.rows.native.row.prepare`.
    """
    return bool(native_build.load().fkd_has_gemm())


def product(kind: str, a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """``out (+)= a @ b``, (M, K) and (K, N) bf16, (M, N) fp32; ``kind`` "mkl" or "native"."""
    if not a.shape[1]:
        if not add:
            out.zero_()
    elif not _by_rows(out):
        result = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        product(kind, a, b, result, add=False)
        out.copy_(out + result if add else result)
    elif out.numel():
        a, b = (x if _by_rows(x) or _by_rows(x.t()) else x.contiguous() for x in (a, b))
        (_mkl if kind == "mkl" else _native)(a, b, out, add)


def _by_rows(x: Tensor) -> bool:
    """Whether the elements of a row are neighbours, and rows do not overlap."""
    (rows, columns), (apart, unit) = x.shape, x.stride()
    return (unit == 1 or columns == 1) and (apart >= columns or rows == 1)


def _mkl(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    entry = mkl_entry()
    assert entry is not None, "asked for only where there is MKL"
    (M, K), N = a.shape, b.shape[1]
    (a_flag, a_apart), (b_flag, b_apart) = _lines(a), _lines(b)
    entry(
        _ROW_MAJOR, a_flag, b_flag, M, N, K, 1.0, a.data_ptr(), a_apart, b.data_ptr(), b_apart,
        float(add), out.data_ptr(), _lines(out)[1],
    )  # fmt: skip


def _lines(x: Tensor) -> tuple[int, int]:
    """Whether a matrix lies transposed, and elements from line to line."""
    flag, x = (_AS_IT_IS, x) if _by_rows(x) else (_TRANSPOSED, x.t())
    return flag, max(x.stride(0), x.shape[1])


def _native(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    call = _Product(len(a), b.shape[1], a.shape[1], _operand(a), _operand(b.t()), out.data_ptr(), out.stride(0), add)
    native_build.load().fkd_gemm(ctypes.byref(call), native_build.thread_pool(), torch.get_num_threads())


def _operand(lines: Tensor) -> _Operand:
    apart, along = lines.stride()
    if _by_rows(lines):
        return _Operand(lines.data_ptr(), apart, 1)
    return _Operand(lines.data_ptr(), 1, along)
