"""The k largest logits of rows, see :mod:`fused_kd.rows.largest`, in C for CPUs: ``csrc/kd_largest.h``."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...workspace import empty
from ..contract import Leading, Logits
from . import build as native_build
from .row import LogitsOfC, logits_of_c, pointer


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("C", "W", "k", "first")),
        ("logits", LogitsOfC),
        ("temperature", ctypes.c_void_p),
        ("temperature_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in (*Leading._fields, "scratch")),
    )


def take(logits: Logits, first: int, so_far: Leading, temperature: Tensor) -> None:
    """As :func:`fused_kd.rows.largest.take`, in one parallel region.

    Raises:
        NativeRowError: as :func:`fused_kd.rows.native.row.prepare`.
    """
    library, pool = native_build.load(), native_build.thread_pool()
    (C, W), k = logits.raw.shape, so_far.values.shape[1]
    threads = min(torch.get_num_threads(), C)
    scratch = empty((threads, library.fkd_largest_scratch(k) // 4), torch.float32, logits.raw.device)
    call = _Call(
        C=C,
        W=W,
        k=k,
        first=first,
        logits=logits_of_c(logits),
        temperature=pointer(temperature),
        temperature_stride=0 if len(temperature) == 1 else 1,
        scratch=pointer(scratch),
        **{name: pointer(tensor) for name, tensor in so_far._asdict().items()},
    )
    library.fkd_largest(ctypes.byref(call), pool, threads)
