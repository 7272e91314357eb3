"""The chunked engine as it runs on an NVIDIA GPU: low-precision GEMMs into fp32, padded rows, chunks in groups."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fused_kd as fk
from fused_kd.engines import chunked, chunks, gemm, head_gradient
from fused_kd.engines.plan import BudgetTooSmall, Plan, Workspace, plan_chunks
from fused_kd.engines.problem import Side, Wanted
from fused_kd.forecast import chunked_plan
from fused_kd.tuning import tuned

from ..budget import check_budget
from ..problems import NAMES, OBJECTIVES, gradients, needs_compiler, problem, relative, rows_for

BF16, FP16 = torch.bfloat16, torch.float16
LOW = [pytest.param(BF16, id="bf16"), pytest.param(FP16, id="fp16")]
A = {"H_s": 4096, "H_t": 5120, "V": 128256}
B = {"H_s": 896, "H_t": 3584, "V": 151936}


class Device:
    """What a GPU does differently, on CPU tensors; records the shapes of the GEMMs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.products: list[tuple[int, int, int]] = []
        self.plans: list = []
        plan = chunked.plan_chunks
        for module in (chunks, chunked):
            monkeypatch.setattr(module, "row_stride", lambda V, device_type: -(-V // 64) * 64)
        for module in (chunks, head_gradient):
            monkeypatch.setattr(module, "empty", self.poisoned)
        monkeypatch.setattr(gemm, "has_fp32_output", lambda device, dtype: True)
        monkeypatch.setattr(gemm, "wide_product", self.product)
        monkeypatch.setattr(chunked, "preferred_chunk", lambda *_: 32)
        monkeypatch.setattr(chunked, "plan_chunks", lambda *a, **k: self.plans.append(plan(*a, **k)) or self.plans[-1])

    @staticmethod
    def poisoned(shape, dtype, device, **_) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=device)
        return x.fill_(math.nan if dtype.is_floating_point else True)

    def product(self, a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
        assert a.dtype == b.dtype != torch.float32 == out.dtype
        self.products.append((*a.shape, b.shape[1]))
        exact = (a.double() @ b.double()).float()
        out.copy_(out + exact if add else exact)


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def run(p, objective, backend, **options):
    out = fk.kd_loss(p.student(), p.teacher(), p.labels, objective, backend=backend, **options)
    return out, gradients(out.loss, p.leaves)


# Triton's interpreter truncates to bf16 where a GPU rounds.
@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_compiler)])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_budget_with_all_tokens_in_one_group(objective, dtype, backend, device):
    p = problem(rows_for(objective, backend), std=3.0, dtype=dtype, bias=True)
    with tuned(device_chunk=4):
        check_budget(p, objective, *run(p, objective, backend))
    n = int((p.labels != -100).sum())
    assert device.plans[0].chunk <= 4 and device.plans[0].group == n


SEVERAL = [fk.SFT(), fk.NoEvo(), fk.SelfEvolution(gamma=1.0), fk.SelfEvolutionTopK(fraction=0.3), fk.GeneralizedJSD()]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("group", [53, 17, 4], ids=["whole", "groups", "chunks"])
@pytest.mark.parametrize("objective", SEVERAL, ids=lambda o: o.name)
def test_any_grouping_gives_the_same(objective, group, dtype, device, monkeypatch):
    """Chunks and groups with short last ones, token weights, an upstream gradient, padding in the vocabulary."""
    p = problem(53, std=3.0, dtype=dtype, bias=True)
    weights = torch.rand(53, generator=torch.Generator().manual_seed(1)) * 2

    def gradients_of(plan: Plan) -> list[Tensor]:
        monkeypatch.setattr(chunked, "plan_chunks", lambda *a, **k: plan)
        out = fk.kd_loss(p.student(), p.teacher(), p.labels, objective, vocab_size=500, token_weights=weights)
        return gradients(out.loss * 3.0, p.leaves)

    once, found = gradients_of(Plan(53, 0, 53)), gradients_of(Plan(4, 0, group))
    for actual, expected in zip(found, once, strict=True):
        # Sums in another order, rounded to the dtype.
        assert relative(actual, expected) < (4e-3 if dtype == BF16 else 5e-4)
    assert not found[1][500:].any() and not found[2][500:].any()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("objective", SEVERAL, ids=lambda o: o.name)
def test_budget_of_groups(objective, dtype, device, monkeypatch):
    p = problem(53, std=3.0, dtype=dtype, bias=True)
    monkeypatch.setattr(chunked, "plan_chunks", lambda *a, **k: Plan(4, 0, 17))
    check_budget(p, objective, *run(p, objective, None))


def test_one_group_adds_nothing_up_and_makes_each_gradient_once(device):
    p = problem(40, H=24, V=517, dtype=BF16, ignored=0.0)
    with tuned(device_chunk=8):
        run(p, fk.NoEvo(), "torch")
    logits = [(8, 24, 517), (8, 40, 517)] * 5
    assert device.products == [*logits, (40, 517, 24), (517, 40, 24)]


def test_slabs_of_the_weight_gradient_cover_it(device, monkeypatch):
    p = problem(30, H=24, V=517, dtype=BF16, bias=True)
    whole = run(p, fk.NoEvo(), "torch")[1]
    monkeypatch.setattr(head_gradient, "weight_slab", lambda V, H: 100)
    assert all(torch.equal(a, b) for a, b in zip(run(p, fk.NoEvo(), "torch")[1], whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
def test_no_tokens_give_zeros(dtype, device):
    p = problem(6, dtype=dtype, bias=True)
    p.labels.fill_(-100)
    out, grads = run(p, fk.NoEvo(), "torch")
    assert out.loss == 0 and not any(g.any() for g in grads)


def test_weights_in_another_dtype_than_the_gemm_s(device):
    """fp32 masters under autocast: the weight gradient is its own fp32 sum. bf16 ones under fp16's, too."""
    p = problem(30, std=3.0)
    with torch.autocast("cpu", dtype=BF16), tuned(device_chunk=4):
        out, grads = run(p, fk.NoEvo(), "torch")
    low = problem(30, std=3.0, dtype=BF16)
    check_budget(low, fk.NoEvo(), out, [g.to(BF16) for g in grads])
    assert all(g.dtype == torch.float32 for g in grads)
    low = problem(30, std=3.0, dtype=BF16)
    with torch.autocast("cpu", dtype=FP16), tuned(device_chunk=4):
        check_budget(low, fk.NoEvo(), *run(low, fk.NoEvo(), "torch"))


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_what_is_not_wanted_costs_no_gemm(frozen, device):
    p = problem(40, dtype=BF16, ignored=0.0)
    getattr(p, frozen).requires_grad_(False)
    with tuned(device_chunk=8):
        fk.kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo(), backend="torch").loss.backward()
    assert len(device.products) == 10 + 1


def at(N: int, H_s: int, H_t: int, V: int, dtype=BF16, memory_budget=None):
    """The engine's own plan on a GPU, of tensors without data."""
    return chunked_plan(
        N, H_s, H_t, V, dtype=dtype, device=torch.device("cuda"), upcast=False, memory_budget=memory_budget
    )


@pytest.mark.parametrize("shape", [A, B], ids="AB")
def test_plans_at_real_shapes(shape):
    """8192 tokens share one product where that takes less than chunks of 2048 and an fp32 accumulator did."""
    V, H_s, H = shape["V"], shape["H_s"], shape["H_s"] + shape["H_t"]
    before = 2048 * (16 + 10 * V + 8 * H + 2 * H_s) + 4 * V * H_s + (32 << 20)
    found = at(8192, **shape)
    assert found.chunk == 1024 and found.group in (8192, 4096)
    whole = found.group == 8192
    assert found.workspace <= before
    expected = 1024 * (16 + 8 * V + 2 * H_s + 8 * shape["H_t"]) + found.group * (2 * V + 8 * H_s) + (32 << 20)
    assert found.workspace == expected + (0 if whole else 4 * V * H_s)
    assert whole == (shape is A)
    assert all(at(N, **shape).workspace <= before for N in (1, 2048, 4096, 16384, 131072))
    with tuned(device_chunk=0):
        assert at(8192, **shape)[:3] == (2048, before, 2048)


def test_memory_under_autocast_goes_by_the_weight_s_own_dtype(monkeypatch):
    """An fp32 dW is a result, not workspace; an fp16 one is held in fp32 whatever the group; a bf16 one may be rounded.

    A copy of the weight counts for as many columns as were said, so that ranks with slices of other widths agree.
    """
    monkeypatch.setattr(gemm, "has_fp32_output", lambda device, dtype: True)
    wanted = Wanted(source=True, weight=True, bias=False)

    def workspace(weight: torch.dtype, operands: torch.dtype, columns: int = 600) -> Workspace:
        hidden, head = torch.empty(5, 40, dtype=weight), torch.empty(512, 40, dtype=weight)
        side = chunks.LogitSource(Side(hidden, head), 512, operands)
        return chunks.workspace_bytes(side, None, (), columns, wanted, 640)

    accumulator, slab, copy = 4 * 600 * 40, 32 << 20, 2 * 600 * 40
    assert workspace(torch.float32, BF16)[2:] == (0, copy)
    assert workspace(FP16, BF16)[2:] == (0, accumulator + copy)
    assert workspace(BF16, FP16)[2:] == (accumulator, slab + copy)
    assert workspace(BF16, BF16)[2:] == (accumulator, slab)
    assert workspace(torch.float32, torch.float32)[2:] == (0, 0)


def test_fp32_and_tight_budgets_group_nothing():
    found = at(8192, **A, dtype=torch.float32)
    assert found.group == found.chunk == 2048
    tight = at(8192, **A, memory_budget=4 * A["V"] * A["H_s"] + (200 << 20))
    assert tight.group == tight.chunk < 1024


sizes = st.integers(1, 5000)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    N=st.integers(0, 10_000), token=sizes, grouped=st.integers(1, 5000), accumulator=st.integers(0, 10**7),
    fixed=st.integers(0, 10**5), preferred=st.integers(1, 4096), chunk=st.integers(0, 2048),
    budget=st.none() | st.integers(1, 10**8),
)  # fmt: skip
def test_any_plan_covers_the_tokens_within_its_limit(N, token, grouped, accumulator, fixed, preferred, chunk, budget):
    workspace = Workspace(token, grouped, accumulator, fixed)
    limit = workspace.of(preferred, preferred, False) if budget is None else budget
    try:
        plan = plan_chunks(N, workspace=workspace, preferred=preferred, memory_budget=budget, grouped=chunk)
    except BudgetTooSmall as error:
        assert error.minimum > limit
        return
    assert 1 <= plan.chunk <= plan.group <= max(N, 1) and plan.workspace <= limit
    assert plan.workspace == workspace.of(plan.chunk, plan.group, plan.group >= max(N, 1) and chunk > 0)
    tokens = [i for group in plan.groups(N) for span in group for i in range(span.start, span.stop)]
    assert tokens == list(range(N))
    for group in plan.groups(N):
        assert sum(span.stop - span.start for span in group) <= plan.group
        assert all(span.stop - span.start <= plan.chunk for span in group)


@pytest.mark.parametrize(
    "V, H, rows", [(128256, 4096, 2048), (151936, 896, 8448), (1000, 64, 1000), (151643, 70000, 128)]
)
def test_slabs_are_whole_tiles_in_whole_waves(V, H, rows):
    """At H = 896 two waves of 132 tiles; 9362 rows, which 32 MiB would hold, take three."""
    assert head_gradient.weight_slab(V, H) == rows
