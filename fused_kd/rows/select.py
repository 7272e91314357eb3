"""Row implementations: a chunk of logits in; losses and logit gradients out. Which one runs is decided here."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from .contract import Row, RowInputs, RowOutputs, Sparse

_Answer = TypeVar("_Answer", bound=Callable[..., object])

BACKENDS = ("torch", "triton", "cuda", "native")
# What None means on a CPU. Compilers are looked for when the row is fetched, in an opaque op: torch.compile would trip
# over it where the backend is chosen.
NATIVE_OR_TORCH = "native or torch"
# What None means on GPUs of these compute capabilities, the CUDA row wherever it works: those where it was measured at
# least 15 % faster than Triton's. On an H200 they are equally fast; an H100, whose memory is slower, was not measured.
CUDA_FIRST: frozenset[tuple[int, int]] = frozenset()
CUDA_OR_TRITON = "cuda or triton"


def choose_backend(backend: str | None, device: torch.device) -> str:
    """Name of the row implementation for :func:`get_row`; an explicit one is used or refused, never replaced."""
    has_triton = installed("triton")
    if backend is None:
        if device.type == "cpu":
            return NATIVE_OR_TORCH
        if device.type != "cuda" or not has_triton:
            return "torch"
        return CUDA_OR_TRITON if _cuda_first(device) else "triton"
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
    if backend == "cuda":
        if not on_nvidia(device):
            raise ValueError(
                f"backend='cuda' needs tensors on an NVIDIA GPU, got tensors on {device}; use backend='torch'"
            )
        if not installed("cuda.core"):
            raise ValueError(
                "backend='cuda' needs the package cuda-core, which is not installed: pip install 'fused_kd[cuda]', "
                "or use backend='triton'"
            )
    if backend == "native" and device.type != "cpu":
        raise ValueError(f"backend='native' needs tensors on the CPU, got tensors on {device}; use backend='torch'")
    return backend


def on_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def _constant_to_compile(function: _Answer) -> _Answer:
    """What ``torch.compiler.assume_constant_result`` does, without importing the whole of Dynamo for it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_to_compile
def _cuda_first(device: torch.device) -> bool:
    return bool(CUDA_FIRST) and on_nvidia(device) and torch.cuda.get_device_capability(device) in CUDA_FIRST


@_constant_to_compile
def installed(package: str) -> bool:
    """Whether a package can be imported. A constant to torch.compile: Dynamo of torch 2.11 refuses ``find_spec``."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def get_row(backend: str) -> Row:
    """The row of a name from :func:`choose_backend`, for teachers of all kinds alike.

    Compiles the native one where no process has done so before.

    Raises:
        ValueError: for ``"native"`` where it cannot be compiled, for ``"cuda"`` where it cannot run; the message says
            why.
    """
    if backend == CUDA_OR_TRITON:
        return _cuda_or_triton()
    if backend == "triton":
        from .triton.row import row as dense
        from .triton.top_k import row as listed
    elif backend == "cuda":
        from .cuda import build as cuda_build
        from .cuda.row import row as dense
        from .cuda.top_k import row as listed

        cuda_build.require()
    elif backend == "native" or (backend == NATIVE_OR_TORCH and native_works()):
        from .native.row import prepare
        from .native.row import row as dense

        prepare()
        listed = dense
    else:
        from .torch.row import row as dense
        from .torch.top_k import row as listed

    return functools.partial(_row, dense, listed)


def without_cuda(backend: str) -> str:
    """What a name of :func:`choose_backend` runs where CUDA has no kernel of its own: "triton", "native" or "torch"."""
    if backend in ("triton", "cuda", CUDA_OR_TRITON):
        return "triton"
    return "native" if backend == "native" or (backend == NATIVE_OR_TORCH and native_works()) else "torch"


def _row(dense: Row, listed: Row, inputs: RowInputs, outputs: RowOutputs) -> None:
    if inputs.beyond is not None:
        from .torch.mapped import row

        return row(dense, inputs, outputs)
    condensed = isinstance(inputs.teacher, Sparse) and inputs.teacher.tail != "uniform"
    (listed if condensed else dense)(inputs, outputs)


@functools.cache
def _cuda_or_triton() -> Row:
    """The CUDA row; without a word Triton's where that can not run: a package missing, an old driver, a longer row."""
    from .cuda import build as cuda_build

    triton = get_row("triton")
    try:
        cuda = get_row("cuda")
    except cuda_build.CudaRowError:
        return triton
    works = True

    def row(inputs: RowInputs, outputs: RowOutputs) -> None:
        nonlocal works
        if works and inputs.student.raw.shape[1] <= cuda_build.LARGEST_VOCAB:
            try:
                return cuda(inputs, outputs)
            except cuda_build.CudaRowError:  # nothing of `outputs` is written yet
                works = False
        return triton(inputs, outputs)

    return row


@functools.cache
def native_works() -> bool:
    """Silently false where something is missing; a compiler that fails deserves a warning."""
    from .native import build as native_build

    try:
        native_build.find_compiler()
        native_build.thread_pool()
    except native_build.NativeRowError:
        return False
    try:
        native_build.load()
    except native_build.NativeRowError as error:
        warnings.warn(f"the slower torch row is used: {error}", RuntimeWarning, stacklevel=2)
        return False
    return True
