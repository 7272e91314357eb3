"""Row implementation in Triton: one launch of :mod:`fused_kd.rows.triton_kernel`, a program per row."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import torch
import triton
from torch import Tensor

from ..divergences import DIVERGENCES
from ..objectives import RowSpec
from .base import Logits, RowInputs, RowOutputs, Sparse
from .triton_kernel import row_kernel

# 2048 elements are 8 per thread: whole 16-byte loads in any dtype, 16 KB of fp32 in flight per program, and
# at 64 registers four programs on a multiprocessor, which hide each other's latency and barriers.
BLOCK = 2048
THREADS = 256


def row(inputs: RowInputs, outputs: RowOutputs) -> None:
    """Fill ``outputs`` for one chunk. Shapes and meaning: :mod:`fused_kd.rows.base`; the teacher may be a uniform tail.

    Launches one kernel on the current stream and never synchronises. Vectors must be contiguous, else a
    ``ValueError``. Logits with another stride than 1 along the vocabulary are copied.
    """
    for name, vector in (
        ("loss", outputs.loss),
        ("difficulty", outputs.difficulty),
        ("is_hard", outputs.is_hard),
        ("scalars", inputs.scalars),
    ):
        if not vector.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {vector.stride()}")
    C, V = inputs.student.raw.shape
    if C == 0:
        return
    student, teacher = inputs.student, inputs.teacher if inputs.spec.divergence is not None else None
    entries = rest = None
    if isinstance(teacher, Sparse):
        assert teacher.tail == "uniform", "other tails have no dense row"
        entries, rest = teacher.indices, teacher.rest
        teacher = Logits(teacher.log_probs, 1.0, None, False)
    student_raw = unit_stride(student.raw)
    teacher_raw = None if teacher is None else unit_stride(teacher.raw)
    if outputs.dlogits is None:
        dlogits = None
    elif outputs.dlogits is student.raw:
        dlogits = student_raw
    else:
        dlogits = unit_stride(outputs.dlogits)
    capped = student.softcap is not None or (teacher is not None and teacher.softcap is not None)
    with guard(inputs.labels.device):
        row_kernel[(C,)](
            student_raw,
            teacher_raw,
            dlogits,
            inputs.labels.contiguous(),
            None if inputs.weights is None else inputs.weights.contiguous(),
            inputs.scalars,
            outputs.loss,
            outputs.difficulty,
            outputs.is_hard.view(torch.uint8),
            None if inputs.hard is None else inputs.hard.contiguous().view(torch.uint8),
            entries,
            rest,
            0 if entries is None else entries.shape[1],
            V,
            student_raw.stride(0),
            0 if teacher_raw is None else teacher_raw.stride(0),
            0 if dlogits is None else dlogits.stride(0),
            student.scale,
            student.softcap,
            1.0 if teacher is None else teacher.scale,
            None if teacher is None else teacher.softcap,
            **row_constants(inputs.spec, inputs.cold_labels, capped),
            num_warps=THREADS // warp_size(),
        )
    if outputs.dlogits is not None and dlogits is not None and dlogits is not outputs.dlogits:
        outputs.dlogits.copy_(dlogits)


@functools.cache
def row_constants(spec: RowSpec, cold_labels: bool, capped: bool) -> dict[str, Any]:
    """What the kernel is compiled for, besides dtypes, alignment, softcaps and which pointers are None."""
    # A tanh and two ratios need registers too: with whole blocks some targets would spill.
    heavy = capped or DIVERGENCES[spec.divergence or "kl"].reads >= {"r", "s"}
    return formula_constants(spec, cold_labels) | {"BLOCK": BLOCK // 2 if heavy else BLOCK}


@functools.cache
def formula_constants(spec: RowSpec, cold_labels: bool) -> dict[str, Any]:
    """What makes one kernel an objective's: its formulas and which parts of the loss it has."""
    divergence = DIVERGENCES[spec.divergence or "kl"]
    return {
        "h": _FUNCTIONS[divergence.h],
        "g": _FUNCTIONS[divergence.g],
        "free_g": _FUNCTIONS[DIVERGENCES["kl"].g],
        "FREE": divergence.free,
        "MIXTURE": 2 if "s" in divergence.reads else int(divergence.mixture),
        "KL_AT_ONE": divergence.kl_at_one,
        "ADAPTIVE": divergence.adaptive,
        "MIXED": spec.mixed,
        "HARD_LABEL": spec.hard_label,
        "GATED": spec.gated,
        "COLD": cold_labels and spec.hard_label and spec.divergence is not None,
    }


def guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors' own."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def warp_size() -> int:
    return 32 if _INTERPRET else triton.runtime.driver.active.get_current_target().warp_size


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


# The interpreter calls plain functions and asserts on jitted ones.
_INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
_FUNCTIONS = {
    f: f if _INTERPRET else triton.jit(f) for divergence in DIVERGENCES.values() for f in (divergence.h, divergence.g)
}
