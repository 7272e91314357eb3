"""The Triton row's own: elementary functions, lanes, and the blocks and threads that tuning may choose.

On the GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import math

import pytest
import torch

import fused_kd as fk

from .. import interpreter
from ..problems import eager_rows, relative
from .contract import ALL, BUDGET, GPU, INTERPRETED, TRITON, call, cases, check, make, oracle

pytest.importorskip("triton", reason="needs triton")
if not (INTERPRETED or GPU):
    pytest.skip(interpreter.NEEDED, allow_module_level=True)

import triton
import triton.language as tl

from fused_kd.divergences import TINY
from fused_kd.rows.triton import math as triton_math
from fused_kd.rows.triton import row as triton_row
from fused_kd.tuning import current, tuned

DEVICE = "cpu" if INTERPRETED else "cuda"
BLOCK = current().row_block
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@triton.jit
def _tanh_kernel(x_ptr, tanh_ptr, slope_ptr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tanh, slope = triton_math.tanh(tl.load(x_ptr + lanes))
    tl.store(tanh_ptr + lanes, tanh)
    tl.store(slope_ptr + lanes, slope)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # in the branch not taken
def test_tanh_keeps_relative_precision_at_both_ends():
    """Small and saturated arguments, where 1 - exp and 1 - tanh^2 would cancel; and no overflow beyond."""
    x = torch.logspace(-6, 1.4, 2048)
    x = torch.cat([x, -x]).to(DEVICE)
    tanh, slope = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    _tanh_kernel[(1,)](x, tanh, slope, N=4096)
    exact = x.double()
    assert ((tanh.double() - exact.tanh()).abs() / exact.tanh().abs()).max() <= 4e-7
    assert ((slope.double() - exact.cosh() ** -2).abs() * exact.cosh() ** 2).max() <= 1e-5
    x[0], x[1] = 1e30, -1e30
    _tanh_kernel[(1,)](x, tanh, slope, N=4096)
    assert tanh[:2].tolist() == [1.0, -1.0] and slope[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("T, objective, backend", cases([1.0, 1.5], ALL, backends=[TRITON]))
def test_lanes_of_any_height(T, objective, backend):
    """Each of a program's threads has its own maxima: far apart, rising late, or of nothing but excluded tokens."""
    V = 3 * BLOCK + 21
    z, z_t, _ = make(3, V, near=False)
    lane, block = torch.arange(V) // 4 % 256, torch.arange(V) // BLOCK
    heights = torch.randn(2, 256, generator=torch.Generator().manual_seed(1)) * 3
    z += heights[0, lane] + (lane % 3 == 0) * block
    z_t += heights[1, lane] - (lane % 5 == 0) * block
    out = (lane % 7 == 2) | (lane % 11 == block)
    z[:, out] = z_t[:, out] = -math.inf
    kept = ~out
    labels = kept.nonzero()[torch.tensor([3, 500, -1])].squeeze(1)
    places = (kept.cumsum(0) - 1)[labels]
    expected = oracle(z[:, kept], z_t[:, kept], places, objective, T=T)
    actual = call(backend, z, z_t, labels, objective, T=T)
    budget = BUDGET
    if T == 1.0:  # such rows ask for digits that eager PyTorch does not have either
        leaf = z[:, kept].clone().requires_grad_()
        eager = eager_rows(leaf, z_t[:, kept], places, objective)
        budget = max(budget, relative(torch.autograd.grad(eager.sum(), leaf)[0], expected.dlogits))
    check(actual._replace(dlogits=actual.dlogits.cpu()[:, kept]), expected, budget)
    assert actual.dlogits.cpu()[:, out].abs().max() <= TINY  # what both exclude has ratios of it


@pytest.mark.parametrize(("block", "threads"), [(1024, 128), (1024, 512), (4096, 512)])
@pytest.mark.parametrize("objective", [fk.SFT(), fk.SelfEvolution(), fk.GeneralizedJSD()], ids=lambda o: o.name)
def test_other_blocks_and_threads(objective, block, threads):
    data = make(2, 4500, near=False)
    with tuned(row_block=block, row_threads=threads):
        check(call("triton", *data, objective, T=1.5), oracle(*data, objective, T=1.5))


def test_odd_vocabularies_in_rows_of_whole_64_move_four_elements_at_a_time():
    rows = torch.empty(3, 128, device=DEVICE)[:, :77]
    assert triton_row.launch_constants(False, rows)["PACK"] == 4


def test_scalars_are_no_constants_of_the_kernel():
    """Annealing changes a tensor on the device, and compiles nothing."""
    constants = triton_row.formula_constants(fk.SelfEvolution().spec, False)
    assert not {"lam", "beta", "gamma"} & set(constants) and not {0.5, 0.4} & set(constants.values())


@triton.jit
def _ratio_kernel(x_ptr, y_ptr, ratio_ptr, log_ptr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    x = tl.load(x_ptr + lanes)
    y = tl.load(y_ptr + lanes)
    root = tl.rsqrt(y)
    tl.store(ratio_ptr + lanes, triton_math.quotient(x, y, root * root))
    tl.store(log_ptr + lanes, triton_math.log_positive(x))


def test_ratios_and_logarithms_keep_relative_precision():
    """Also near 1, where near teachers have all of theirs, and at both ends of what a row can ask for."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(
        [
            torch.logspace(-30, 7, 2048),
            1 + torch.randn(2048, generator=generator) * 10.0 ** -torch.arange(1, 9).repeat(256),
        ]
    )
    y = x[torch.randperm(4096, generator=generator)].clamp(max=2.0)
    ratio, log = torch.full_like(x, math.nan, device=DEVICE), torch.full_like(x, math.nan, device=DEVICE)
    _ratio_kernel[(1,)](x.to(DEVICE), y.to(DEVICE), ratio, log, N=4096)
    exact = x.double().log()
    near = (log.cpu().double() - exact).abs() <= 2.5e-7 * exact.abs()
    assert near.all(), x[~near]
    assert ((ratio.cpu().double() * y / x - 1).abs() <= 1.3e-7).all()


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU with room for 2^31 logits")
def test_rows_beyond_2_31_elements():
    V, C = 2**20, 2**11 + 2
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip(f"needs 10 GiB of free GPU memory for {C} x {V} bf16 logits twice")
    z = torch.zeros(C, V, dtype=torch.bfloat16, device="cuda")
    z[-1] = torch.randn(V, device="cuda")
    labels = torch.full((C,), -1)
    labels[-1] = 17
    expected = oracle(z[-1:], None, labels[-1:], fk.SFT())
    loss = call("triton", z, None, labels, fk.SFT(), dlogits=torch.zeros_like(z)).loss
    assert relative(loss[-1:], expected.loss) <= 1e-6
