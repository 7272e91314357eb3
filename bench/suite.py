"""A step of each implementation under pytest-benchmark: ``pytest bench/suite.py --benchmark-group-by=param:shape``.

For a look with its own tables, histograms and comparisons (``--benchmark-compare``); ``python -m bench`` is what the
reports come from: processes of their own, the GEMMs in turns, memory and errors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .problems import CPU_PEER_SHAPE, GPU_SHAPES, QUICK_SHAPE, Shape, make_inputs
from .registry import IMPLEMENTATIONS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SHAPES = GPU_SHAPES if DEVICE.type == "cuda" else (QUICK_SHAPE, CPU_PEER_SHAPE)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_step(shape: Shape, name: str, benchmark: Any) -> None:
    """Forward and backward, half of the tokens hard; the gradients are dropped before each."""
    implementation = IMPLEMENTATIONS[name]
    if (reason := implementation.missing(DEVICE.type)) is not None:
        pytest.skip(reason)
    inputs = implementation.prepare(make_inputs(shape, DEVICE, DTYPE))
    step = implementation.build(inputs, inputs.gamma("mixed"))

    def run() -> None:
        step(inputs.labels).backward()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    run()  # compiles
    benchmark.extra_info["tokens"] = shape.N
    benchmark.pedantic(run, setup=inputs.drop_gradients, rounds=5)
    assert inputs.hidden_s.grad is not None and inputs.hidden_s.grad.isfinite().all()
