"""What one call does, tallied while it runs: the FLOPs of its GEMMs, and the scratch that rows ask for."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from fused_kd import ops


def measured_flops(call: Callable[[], object]) -> int:
    """FLOPs of the matrix products that PyTorch dispatches in ``call``, those inside fused_kd's opaque op included.

    Products inside a Triton kernel are not seen. Code under torch.compile runs uncompiled here.
    """
    total = 0

    @contextlib.contextmanager
    def counting() -> Iterator[None]:
        nonlocal total
        with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
            yield
        total += counter.get_total_flops()

    engine = ops.run

    def counted_engine(*args, **kwargs):
        with counting():  # a mode around the op does not reach into it
            return engine(*args, **kwargs)

    with mock.patch.object(ops, "run", counted_engine), counting():
        call()
    return total


def _addmm_flop(base, a, b, *args, **kwargs) -> int:
    return 2 * a[0] * a[1] * b[1]


def _linear_flop(x, weight, *args, **kwargs) -> int:
    return 2 * x[0] * x[1] * weight[0]


# Shapes to FLOPs, where PyTorch's table has none: products in place, oneDNN's, and addmm with a dtype of its own.
_FORMULAS: dict[object, Callable[..., int]] = {
    torch.ops.aten.addmm: _addmm_flop,
    torch.ops.aten.addmm_: _addmm_flop,
}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    _FORMULAS[torch.ops.mkldnn._linear_pointwise] = _linear_flop


def row_scratch_bytes(call: Callable[[], object]) -> int:
    """The most bytes of :func:`fused_kd.workspace.empty` that row implementations hold at a time in ``call``.

    What they leave to PyTorch's allocator (results of plain operations) is not seen, nor a row first imported there.
    """
    held = most = 0

    def release(size: int) -> None:
        nonlocal held
        held -= size

    def counted(empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate(*args, **kwargs) -> torch.Tensor:
            nonlocal held, most
            buffer = empty(*args, **kwargs)
            held += buffer.nbytes
            most = max(most, held)
            weakref.finalize(buffer, release, buffer.nbytes)
            return buffer

        return allocate

    rows = [module for name, module in sys.modules.items() if name.startswith("fused_kd.rows.")]
    with contextlib.ExitStack() as patches:
        for module in rows:
            if hasattr(module, "empty"):
                patches.enter_context(mock.patch.object(module, "empty", counted(module.empty)))
        call()
    return most
