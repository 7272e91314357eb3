"""The Triton row's loss where products are fused into sums, as compilers for GPUs do and the interpreter does not.

A fused difference of two equal products is the rounding of one of them, not 0: of logits that stand for what is beyond
the vocabulary that is a huge number.
"""

from __future__ import annotations

import pytest
import torch

import fused_kd as fk

from ..budget import check_budget
from ..interpreter import fused_products
from ..problems import NAMES, OBJECTIVES, gradients, problem
from .contract import INTERPRETED, cases

FUSED = cases(OBJECTIVES, backends=[pytest.param("triton", id="fused")], kinds=NAMES)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("objective, backend", FUSED)
def test_rows(objective, backend):
    """Of a vocabulary that ends within a block."""
    p = problem(7, std=1.0)
    with fused_products():
        out = fk.kd_loss(p.student(), p.teacher(), p.labels, objective, backend=backend)
    check_budget(p, objective, out, gradients(out.loss, p.leaves))


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
def test_products_are_fused():
    import triton
    import triton.language as tl

    @triton.jit
    def difference(x_ptr, out_ptr):
        x = tl.load(x_ptr)
        tl.store(out_ptr, x * x - x * x)

    x, found = torch.tensor([1.1]), torch.full((1,), -1.0)
    difference[(1,)](x, found)
    assert found.item() == 0.0
    with fused_products():
        difference[(1,)](x, found)
    assert found.double().item() == x.double().item() ** 2 - (x * x).double().item() != 0.0
