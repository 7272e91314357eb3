"""CUDA sweeps of :mod:`fused_kd.rows.top_k`: two launches of ``csrc/kd_top_k.cu``, a block per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contract import RowInputs, RowOutputs, Sparse, compiled, scalars_stride
from ..top_k import categories, category_rows
from . import build as cuda_build
from .launch import Cut, Launch, gradient_arguments, records_bytes, side_arguments, side_macros
from .row import row as dense


@compiled
def row(inputs: RowInputs, outputs: RowOutputs) -> None:
    """Fill ``outputs`` for one chunk, as :mod:`fused_kd.rows.contract` says, of a teacher's lists without a uniform
    tail.

    Reads the student's logits twice (once without dlogits) and writes dlogits once.

    Raises:
        ValueError: as :func:`fused_kd.rows.cuda.row.row`.
    """
    teacher, (C, V), where = inputs.teacher, inputs.student.raw.shape, inputs.labels.device
    assert isinstance(teacher, Sparse)
    small = categories(inputs)
    origins = torch.empty(C, dtype=torch.float32, device=where)
    cold = torch.empty_like(origins) if inputs.cold_labels else None
    shared = {
        **side_arguments("student", inputs.student),
        "entries": teacher.indices,
        "K": teacher.indices.shape[1],
        "C": C,
        "V": V,
        "labels": inputs.labels,
        "scalars": inputs.scalars,
        "scalars_stride": scalars_stride(inputs.scalars),
        "categories": small.student,
        "origins": origins,
        "cold": cold,
    }
    cuda_build.launch(where, _launch("fkd_condense", inputs, None, shared))
    gradient = category_rows(dense, inputs, outputs, small, cold)
    if gradient is None:
        return
    names = ("entry_gradient", "rest_gradient", "cold_gradient")
    parts = {name: None if x is None else x.contiguous() for name, x in zip(names, gradient, strict=True)}
    expand = {**shared, **gradient_arguments(outputs.dlogits), **parts}
    cuda_build.launch(where, _launch("fkd_expand", inputs, outputs.dlogits, expand))


def _launch(kernel: str, inputs: RowInputs, dlogits: Tensor | None, arguments: dict[str, Any]) -> Launch:
    device = cuda_build.device(inputs.labels.device)
    threads = device.threads[1]
    macros = side_macros(inputs.student, None, dlogits) | {
        "FKD_WHOLE": 0,
        "FKD_THREADS": threads,
        "FKD_COLD": int(inputs.cold_labels),
        "FKD_EXPAND": int(kernel == "fkd_expand"),
    }
    cut = Cut(1, threads, 0, records_bytes(threads, device))
    return Launch(kernel, tuple(sorted(macros.items())), cut, len(inputs.labels), arguments)
