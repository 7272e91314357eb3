"""What the tests of the benchmarks share: small problems, and the FLOPs that PyTorch dispatches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.problems import Shape, Variant
from bench.worker import Case
from fused_kd import ops
from fused_kd.engines import gemm

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
WIDE = Shape("wide", 12, 8, 10, 150)
MIXED = Variant()
HEADER = {
    "suite": "cpu",
    "written": "now",
    "source": {"digest": "0", "commit": "0123456789abcdef", "dirty": False},
    "settings": {"dtype": "float32", "rounds": 3, "device": "cpu"},
    "hardware": {"cpu": "x", "usable_cores": 1, "threads": 1},
    "versions": {"torch": "2"},
}


def case(implementation: str, **changes) -> Case:
    base = Case(WIDE, implementation, (MIXED,), "cpu", "float32", rounds=2, warmup=1, error_tokens=8)
    return replace(base, **changes)


def measured_flops(call: Callable[[], object]) -> int:
    """FLOPs of the matrix products that PyTorch dispatches in ``call``, those inside fused_kd's opaque op included."""
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

    product = gemm.product

    def counted_product(kind, a, b, *args, **kwargs):
        nonlocal total
        total += 2 * a.shape[0] * a.shape[1] * b.shape[1]  # of C, which PyTorch does not see
        product(kind, a, b, *args, **kwargs)

    with (
        mock.patch.object(ops, "run", counted_engine),
        mock.patch.object(gemm, "product", counted_product),
        counting(),
    ):
        call()
    return total


def _addmm_flop(base, a, b, *args, **kwargs) -> int:
    return 2 * a[0] * a[1] * b[1]


def _linear_flop(x, weight, *args, **kwargs) -> int:
    return 2 * x[0] * x[1] * weight[0]


# Shapes to FLOPs, where PyTorch's table has none: products in place, and oneDNN's.
_FORMULAS = {torch.ops.aten.addmm: _addmm_flop, torch.ops.aten.addmm_: _addmm_flop}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    _FORMULAS[torch.ops.mkldnn._linear_pointwise] = _linear_flop
