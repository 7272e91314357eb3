"""Row implementations: a chunk of logits in; losses and logit gradients out. Which one runs is decided here."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch

from .base import Logits, RowInputs, RowOutputs, Sparse

Row = Callable[[RowInputs, RowOutputs], None]

BACKENDS = ("torch", "triton")


def choose_backend(backend: str | None, device: torch.device) -> str:
    """Name of the row implementation; an explicit one is used or refused, never replaced."""
    has_triton = _installed("triton")
    if backend is None:
        return "triton" if device.type == "cuda" and has_triton else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "triton":
        if not has_triton:
            raise ValueError("backend='triton' needs the package triton, which is not installed; use backend='torch'")
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1":
            raise ValueError(
                "backend='triton' needs a GPU, got tensors on the CPU; use backend='torch' "
                "(TRITON_INTERPRET=1, set before the first import of triton, runs it on the CPU for tests)"
            )
    return backend


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def get_row(backend: str) -> Row:
    """The row of a backend, for dense and top-k teachers alike."""
    if backend == "triton":
        from .top_k_triton import row as sparse
        from .triton_row import row as dense
    else:
        from .top_k import row as sparse
        from .torch_row import row as dense

    def row(inputs: RowInputs, outputs: RowOutputs) -> None:
        if isinstance(inputs.teacher, Sparse):
            sparse(dense, inputs, outputs)
        else:
            dense(inputs, outputs)

    return row


__all__ = ["BACKENDS", "Logits", "Row", "RowInputs", "RowOutputs", "Sparse", "choose_backend", "get_row"]
