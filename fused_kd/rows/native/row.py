"""Row implementation in C for CPUs, dense and top-k teachers: one parallel region a chunk. See ``csrc/kd_row.c``."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...divergences import DIVERGENCES
from ...objectives import Scalars
from ...workspace import empty
from ..contract import Logits, RowInputs, RowOutputs, Sparse
from . import build as native_build

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_LIST_TENSORS = ("indices", "log_probs", "rest")
_DIVERGENCES = {name: i for i, name in enumerate(DIVERGENCES)}


class _Logits(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("finite", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class _Lists(ctypes.Structure):
    _fields_ = (
        ("indices", ctypes.c_void_p),
        ("log_probs", ctypes.c_void_p),
        ("rest", ctypes.c_void_p),
        ("K", ctypes.c_int64),
        ("uniform", ctypes.c_int32),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        ("C", ctypes.c_int64),
        ("V", ctypes.c_int64),
        ("student", _Logits),
        ("teacher", _Logits),
        ("lists", _Lists),
        ("dlogits", ctypes.c_void_p),
        ("dlogits_stride", ctypes.c_int64),
        ("dlogits_dtype", ctypes.c_int32),
        ("divergence", ctypes.c_int32),
        *((name, ctypes.c_int32) for name in ("free", "mixture", "reads_d", "kl_at_one", "adaptive", "everywhere")),
        *((name, ctypes.c_int32) for name in ("mixed", "hard_label", "gated", "cold")),
        *((name, ctypes.c_float) for name in Scalars._fields),
        ("labels", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("given", ctypes.c_void_p),
        ("loss", ctypes.c_void_p),
        ("difficulty", ctypes.c_void_p),
        ("is_hard", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    )


def row(inputs: RowInputs, outputs: RowOutputs) -> None:
    """Fill ``outputs`` for one chunk. Shapes and meaning: :mod:`fused_kd.rows.contract`.

    Runs on ``torch.get_num_threads()`` threads of PyTorch's own pool; results do not depend on their number. Vectors
    of ``outputs`` must be contiguous, else a ``ValueError``. Logits with another stride than 1 along the vocabulary
    are copied.

    Raises:
        NativeRowError: as :func:`prepare`.
    """
    for name, vector in (("loss", outputs.loss), ("difficulty", outputs.difficulty), ("is_hard", outputs.is_hard)):
        if not vector.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {vector.stride()}")
    library, pool = native_build.load(), native_build.thread_pool()
    C, V = inputs.student.raw.shape
    if C == 0:
        return
    spec = inputs.spec
    divergence = DIVERGENCES[spec.divergence or "kl"]
    student = inputs.student._replace(raw=_unit_stride(inputs.student.raw))
    teacher, lists = student._replace(finite=False), None  # lists may exclude what they do not hold
    if spec.divergence is not None:
        if isinstance(inputs.teacher, Sparse):
            lists = inputs.teacher._replace(**{x: getattr(inputs.teacher, x).contiguous() for x in _LIST_TENSORS})
        else:
            assert isinstance(inputs.teacher, Logits)
            teacher = inputs.teacher._replace(raw=_unit_stride(inputs.teacher.raw))
    dlogits = outputs.dlogits
    if dlogits is not None:
        dlogits = student.raw if dlogits is inputs.student.raw else _unit_stride(dlogits)
    labels = inputs.labels.contiguous()
    weights = None if inputs.weights is None else inputs.weights.contiguous()
    given = None if inputs.hard is None else inputs.hard.contiguous()
    threads = min(torch.get_num_threads(), C)
    K = 0 if lists is None else lists.indices.shape[1]
    scratch = empty((threads, library.fkd_scratch(V, K) // 4), torch.float32, labels.device)
    call = _Call(
        C=C,
        V=V,
        student=_logits(student),
        teacher=_logits(teacher),
        lists=_Lists() if lists is None else _lists(lists),
        dlogits=_pointer(dlogits),
        dlogits_stride=0 if dlogits is None else dlogits.stride(0),
        dlogits_dtype=0 if dlogits is None else _DTYPES[dlogits.dtype],
        divergence=-1 if spec.divergence is None else _DIVERGENCES[spec.divergence],
        free=divergence.free,
        mixture=divergence.mixture,
        reads_d="d" in divergence.reads,
        kl_at_one=divergence.kl_at_one,
        adaptive=divergence.adaptive,
        everywhere=divergence.everywhere,
        mixed=spec.mixed,
        hard_label=spec.hard_label,
        gated=spec.gated,
        cold=inputs.cold_labels and spec.hard_label,
        **Scalars(*inputs.scalars.tolist())._asdict(),
        labels=_pointer(labels),
        weights=_pointer(weights),
        given=_pointer(given),
        loss=_pointer(outputs.loss),
        difficulty=_pointer(outputs.difficulty),
        is_hard=_pointer(outputs.is_hard),
        scratch=_pointer(scratch),
    )
    library.fkd_row(ctypes.byref(call), pool, threads)
    if outputs.dlogits is not None and dlogits is not None and dlogits is not outputs.dlogits:
        outputs.dlogits.copy_(dlogits)


def prepare() -> None:
    """Compile, or raise ``NativeRowError`` (a ``ValueError``) where there is no compiler, or it fails."""
    native_build.load()
    native_build.thread_pool()


def _logits(logits: Logits) -> _Logits:
    raw, scale, softcap, finite = logits
    return _Logits(raw.data_ptr(), raw.stride(0), _DTYPES[raw.dtype], finite, scale, softcap or 0.0)


def _lists(teacher: Sparse) -> _Lists:
    tensors = {name: _pointer(getattr(teacher, name)) for name in _LIST_TENSORS}
    return _Lists(**tensors, K=teacher.indices.shape[1], uniform=teacher.tail == "uniform")


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
