"""Row implementation in C for CPUs, dense and top-k teachers: one parallel region a chunk. See ``csrc/kd_row.c``."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ...terms import RowSpec, Term
from ...workspace import empty
from ..contract import Logits, RowInputs, RowOutputs, Sparse, compiled, scalars_stride, traits
from . import build as native_build

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class LogitsOfC(ctypes.Structure):
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
        *((name, ctypes.c_int32) for name in ("uniform", "listed")),
    )


class _Term(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int32) for name in traits(Term(None)))


class _Call(ctypes.Structure):
    _fields_ = (
        ("C", ctypes.c_int64),
        ("V", ctypes.c_int64),
        ("student", LogitsOfC),
        ("teacher", LogitsOfC),
        ("lists", _Lists),
        ("dlogits", ctypes.c_void_p),
        ("dlogits_stride", ctypes.c_int64),
        ("dlogits_dtype", ctypes.c_int32),
        *((name, ctypes.c_int32) for name in ("needs_teacher", "cold", "term_count", "main")),
        ("terms", ctypes.POINTER(_Term)),
        ("scalars", ctypes.c_void_p),
        ("scalars_stride", ctypes.c_int64),
        ("labels", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("given", ctypes.c_void_p),
        ("loss", ctypes.c_void_p),
        ("difficulty", ctypes.c_void_p),
        ("is_hard", ctypes.c_void_p),
        ("statistics", ctypes.c_void_p),
        ("told", ctypes.c_int32),
        ("scratch", ctypes.c_void_p),
    )


@compiled
def row(inputs: RowInputs, outputs: RowOutputs) -> None:
    """Fill ``outputs`` for one chunk. Shapes and meaning: :mod:`fused_kd.rows.contract`.

    Runs on ``torch.get_num_threads()`` threads of PyTorch's own pool; results do not depend on their number.

    Raises:
        NativeRowError: as :func:`prepare`.
    """
    library, pool = native_build.load(), native_build.thread_pool()
    spec, student, teacher = inputs.spec, inputs.student, inputs.teacher
    C, V = student.raw.shape
    lists = teacher if isinstance(teacher, Sparse) else None
    if not isinstance(teacher, Logits):
        teacher = student._replace(finite=False)  # not read; lists may exclude what they do not hold
    dlogits, told = outputs.dlogits, outputs.statistics
    terms = _terms(spec)
    threads = min(torch.get_num_threads(), C)
    K = 0 if lists is None else lists.indices.shape[1]
    scratch = empty((threads, library.fkd_scratch(V, K, len(terms)) // 4), torch.float32, inputs.labels.device)
    call = _Call(
        C=C,
        V=V,
        student=logits_of_c(student),
        teacher=logits_of_c(teacher),
        lists=_Lists() if lists is None else _lists(lists),
        dlogits=pointer(dlogits),
        dlogits_stride=0 if dlogits is None else dlogits.stride(0),
        dlogits_dtype=0 if dlogits is None else _DTYPES[dlogits.dtype],
        needs_teacher=spec.needs_teacher,
        cold=inputs.cold_labels and spec.needs_teacher,
        term_count=len(terms),
        main=spec.main,
        terms=terms,
        scalars=pointer(inputs.scalars),
        scalars_stride=scalars_stride(inputs.scalars),
        labels=pointer(inputs.labels),
        weights=pointer(inputs.weights),
        given=pointer(inputs.hard),
        loss=pointer(outputs.loss),
        difficulty=pointer(outputs.difficulty),
        is_hard=pointer(outputs.is_hard),
        statistics=pointer(told),
        told=0 if told is None else told.shape[1],
        scratch=pointer(scratch),
    )
    library.fkd_row(ctypes.byref(call), pool, threads)


def prepare() -> None:
    """Compile, or raise ``NativeRowError`` (a ``ValueError``) where there is no compiler, or it fails."""
    native_build.load()
    native_build.thread_pool()


@functools.cache
def _terms(spec: RowSpec) -> ctypes.Array[_Term]:
    return (_Term * len(spec.terms))(*(_Term(**traits(term)) for term in spec.terms))


def logits_of_c(logits: Logits) -> LogitsOfC:
    raw, scale, softcap, finite = logits
    return LogitsOfC(raw.data_ptr(), raw.stride(0), _DTYPES[raw.dtype], finite, scale, softcap or 0.0)


def _lists(teacher: Sparse) -> _Lists:
    indices, log_probs, rest, tail = teacher
    tails = (tail == name for name in ("uniform", "listed"))
    return _Lists(pointer(indices), pointer(log_probs), pointer(rest), indices.shape[1], *tails)


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
