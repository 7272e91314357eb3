"""A teacher's share in a mixture, see :mod:`fused_kd.rows.mixing`, in C for CPUs: ``csrc/kd_mixing.h``."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..contract import Logits
from . import build as native_build
from .row import LogitsOfC, logits_of_c, pointer


class _Call(ctypes.Structure):
    _fields_ = (
        ("C", ctypes.c_int64),
        ("V", ctypes.c_int64),
        ("logits", LogitsOfC),
        ("mixed", ctypes.c_void_p),
        ("mixed_stride", ctypes.c_int64),
        ("log_share", ctypes.c_void_p),
        ("temperature", ctypes.c_void_p),
        ("share_stride", ctypes.c_int64),
        ("temperature_stride", ctypes.c_int64),
        ("first", ctypes.c_int32),
    )


def add(mixed: Tensor, logits: Logits, log_share: Tensor, temperature: Tensor, *, first: bool) -> None:
    """As :func:`fused_kd.rows.mixing.add`, in one parallel region.

    Raises:
        NativeRowError: as :func:`fused_kd.rows.native.row.prepare`.
    """
    library, pool = native_build.load(), native_build.thread_pool()
    C, V = mixed.shape
    call = _Call(
        C=C,
        V=V,
        logits=logits_of_c(logits),
        mixed=pointer(mixed),
        mixed_stride=mixed.stride(0),
        log_share=pointer(log_share),
        temperature=pointer(temperature),
        share_stride=0 if len(log_share) == 1 else 1,
        temperature_stride=0 if len(temperature) == 1 else 1,
        first=first,
    )
    library.fkd_add(ctypes.byref(call), pool, min(torch.get_num_threads(), C))
