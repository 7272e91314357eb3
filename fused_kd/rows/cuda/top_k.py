"""CUDA sweeps of :mod:`fused_kd.rows.top_k`: two launches of ``csrc/kd_top_k.cu``, a block per row."""

from __future__ import annotations

from typing import Any

import torch

from ..contract import RowInputs, RowOutputs, Sparse
from ..top_k import DenseRow, categories, category_rows
from . import build as cuda_build
from .row import (
    DTYPES,
    F32,
    I32,
    I64,
    NO_TEACHER,
    POINTER,
    Cut,
    Device,
    Launch,
    aligned,
    records_bytes,
    row_bytes,
    side_arguments,
    unit_stride,
)

_STUDENT = (POINTER, I64, F32, F32)
CONDENSE_TYPES = (*_STUDENT, POINTER, I32, I64, I32, *[POINTER] * 5)
EXPAND_TYPES = (*_STUDENT, POINTER, I64, POINTER, I32, I64, I32, *[POINTER] * 8)


def row(dense: DenseRow, inputs: RowInputs, outputs: RowOutputs) -> None:
    """Fill ``outputs`` for one chunk; shapes and meaning as in :func:`fused_kd.rows.top_k.row`.

    Reads the student's logits twice (once without dlogits) and writes dlogits once; a uniform tail is a dense row.

    Raises:
        ValueError: as :func:`fused_kd.rows.cuda.row.row`.
    """
    teacher, student, C = inputs.teacher, inputs.student, len(inputs.labels)
    assert isinstance(teacher, Sparse)
    if C == 0:
        return
    if teacher.tail == "uniform":
        dense(inputs, outputs)
        return
    where = inputs.labels.device
    device = cuda_build.device(where)
    small = categories(teacher, inputs.labels)
    student = student._replace(raw=unit_stride(student.raw))
    labels, entries = inputs.labels.contiguous(), teacher.indices.contiguous()
    V, K = student.raw.shape[1], entries.shape[1]
    origin = torch.empty(C, dtype=torch.float32, device=where)
    cold_rest = torch.empty_like(origin) if inputs.cold_labels else None
    shared = (entries, K, C, V, labels, inputs.scalars, small.student, origin, cold_rest)
    # The rest's column is not condense's alone: categories are (C, K + 1) there and here.
    condense = (*side_arguments(student), *shared)
    cuda_build.launch(where, _launch("fkd_condense", inputs, student.raw, None, device, condense, CONDENSE_TYPES))
    gradient = category_rows(dense, inputs, outputs, small, cold_rest)
    if gradient is None or outputs.dlogits is None:
        return
    out = outputs.dlogits
    dlogits = student.raw if out is inputs.student.raw else unit_stride(out)
    parts = tuple(None if x is None else x.contiguous() for x in gradient)
    expand = (*side_arguments(student), dlogits, row_bytes(dlogits), *shared, *parts)
    cuda_build.launch(where, _launch("fkd_expand", inputs, student.raw, dlogits, device, expand, EXPAND_TYPES))
    if dlogits is not out:
        out.copy_(dlogits)


def _launch(
    kernel: str,
    inputs: RowInputs,
    raw: torch.Tensor,
    dlogits: torch.Tensor | None,
    device: Device,
    arguments: tuple[Any, ...],
    types: tuple[Any, ...],
) -> Launch:
    streams = [raw] if dlogits is None else [raw, dlogits]
    width = 16 // max(x.element_size() for x in streams)
    threads = device.threads[1]
    macros = {
        "FKD_STUDENT": DTYPES[raw.dtype],
        "FKD_TEACHER": NO_TEACHER,
        "FKD_DLOGITS": DTYPES[streams[-1].dtype],
        "FKD_LISTED": 0,
        "FKD_WHOLE": 0,
        "FKD_WIDTH": width,
        "FKD_VECTOR": int(all(aligned(x, width) for x in streams)),
        "FKD_SHAPED": int(inputs.student.scale != 1.0 or inputs.student.softcap is not None),
        "FKD_THREADS": threads,
        "FKD_COLD": int(inputs.cold_labels),
        "FKD_EXPAND": int(kernel == "fkd_expand"),
    }
    cut = Cut(1, threads, 0, records_bytes(threads, device))
    return Launch(kernel, tuple(sorted(macros.items())), cut, raw.shape[0], arguments, types)
