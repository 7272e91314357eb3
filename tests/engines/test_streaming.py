"""The streaming engine against the float64 oracle, in tiles small enough that every loop runs more than once."""

from __future__ import annotations

import os
import re

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fused_kd as fk
from fused_kd import tokens
from fused_kd.reference import reference_kd_loss

from .. import interpreter
from ..budget import ROUNDING, check_budget
from ..kernels.contract import DTYPES, NEAR, TRITON, cases
from ..kernels.test_error_budget import LOSS_SCALE
from ..problems import (
    OBJECTIVES,
    Allocations,
    Problem,
    compare,
    furthest,
    gradients,
    label,
    oracle64,
    problem,
    relative,
    summands,
)
from .peaked import EPS, check_left_out, peak

triton = pytest.importorskip("triton", reason="the streaming engine needs triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip(interpreter.NEEDED, allow_module_level=True)

import triton.language as tl  # noqa: E402

from fused_kd.engines import waves  # noqa: E402
from fused_kd.engines.streaming import engine as streaming  # noqa: E402
from fused_kd.engines.streaming import plan as streaming_plan  # noqa: E402
from fused_kd.engines.streaming import sweeps as streaming_sweeps  # noqa: E402
from fused_kd.engines.streaming.plan import KernelTiles, Plan, Tiles, plan_streaming  # noqa: E402
from fused_kd.engines.streaming.tiles import placed  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
STREAMED = [objective for objective in OBJECTIVES if "adaptive_kl" not in summands(objective)]
SMALL = Tiles(16, 64, 32, 4, 2)
SMALL_TILES = KernelTiles(SMALL, Tiles(16, 32, 32, 4, 2), SMALL)
TIGHT = 3e-6
STREAMING = {"engine": "streaming"}
GATED = fk.SelfEvolution(gamma=1.0)
BOTH = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of tokens, three tiles of columns, two splits, a tile a slab; uninitialised memory is poison."""
    monkeypatch.setattr(streaming_plan, "choose_tiles", lambda *_, **__: SMALL_TILES)
    monkeypatch.setattr(streaming_plan, "PROGRAMS", 4)
    for module in (waves, streaming_plan):
        monkeypatch.setattr(module, "MULTIPROCESSORS", 4)
    monkeypatch.setattr(streaming_plan, "LEAST_SPLITS", 2)
    monkeypatch.setattr(streaming_plan, "GROUP", 1)
    for name in ("SLAB_BYTES", "CHUNK_BYTES", "WEIGHT_BYTES", "DEFAULT_BYTES"):
        monkeypatch.setattr(streaming_plan, name, 1)
    for module in (streaming, streaming_sweeps):
        monkeypatch.setattr(module, "empty", poisoned)


def poisoned(shape, dtype, device):
    return torch.full(shape, float("nan") if dtype.is_floating_point else 1, dtype=dtype, device=device)


def make(**options) -> Problem:
    return problem(**({"N": 26, "V": 150, "std": 3.0, "ignored": 0.12, "device": DEVICE} | options))


def run(p: Problem, objective, **options) -> tuple[fk.KDOutput, list[Tensor]]:
    out = fk.kd_loss(p.student(), p.teacher(), p.labels, objective, **STREAMING, **options)
    return out, gradients(out.loss, p.leaves)


@pytest.fixture
def one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of tokens, one slab: programs and launches are what costs time in the interpreter."""
    monkeypatch.setattr(streaming_plan, "choose_tiles", lambda *_, **__: KernelTiles(*[Tiles(32, 64, 32, 4, 2)] * 3))
    for name in ("SLAB_BYTES", "CHUNK_BYTES", "WEIGHT_BYTES"):
        monkeypatch.setattr(streaming_plan, name, 1 << 20)


@pytest.mark.parametrize("near, dtype, objective, backend", cases(NEAR, DTYPES, STREAMED, backends=[TRITON]))
def test_heads(near, dtype, objective, backend, one_piece):
    p = make(dtype=dtype, near=near, N=22, V=100)
    check_budget(p, objective, *run(p, objective))


@pytest.mark.parametrize("dtype, objective, backend", cases(DTYPES, STREAMED, backends=[TRITON]))
def test_logits(dtype, objective, backend, one_piece):
    p = make(N=22, V=100)
    z = (p.hidden @ p.weight.T).detach().to(dtype).requires_grad_()
    z_t = (p.hidden_t @ p.weight_t.T).to(dtype)
    out = fk.kd_loss(z, z_t, p.labels, objective, engine="streaming")
    (actual,) = gradients(out.loss * LOSS_SCALE, [z])
    z64 = z.detach().double().requires_grad_()
    expected = reference_kd_loss(z64, z_t.double(), p.labels, objective)
    (ref,) = gradients(expected.loss * LOSS_SCALE, [z64])
    assert relative(out.loss, expected.loss) < 2e-6
    budget = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert relative(actual, ref) < budget * (2 if INTERPRETED else 1)  # it truncates where a GPU rounds
    assert actual[p.labels == -100].abs().sum() == 0


@pytest.mark.parametrize("form", ["student logits", "teacher logits", "mixed dtypes"])
def test_sides_differ_in_form_and_dtype(form, one_piece):
    p = make(dtype_t=torch.bfloat16 if form == "mixed dtypes" else None)
    expected, refs = oracle64(p, GATED)
    student, teacher, leaves = p.student(), p.teacher(), p.leaves
    if form == "student logits":
        student = (p.hidden @ p.weight.T).detach().requires_grad_()
        leaves = [student]
    elif form == "teacher logits":
        teacher = p.hidden_t @ p.weight_t.T
    out = fk.kd_loss(student, teacher, p.labels, GATED, engine="streaming")
    grads = gradients(out.loss, leaves)
    if form == "student logits":
        grads = [grads[0] @ p.weight, grads[0].T @ p.hidden]
    assert relative(out.loss, expected.loss) < 1e-6
    assert furthest(grads, refs) < TIGHT


# No teacher, a mixture, a gate over all tokens, both divergences, one whose label counts by itself.
SHAPED = [fk.SFT(), fk.Skew(), fk.SelfEvolutionTopK(), fk.GeneralizedJSD(), fk.ReverseKD()]


@pytest.mark.parametrize("objective", SHAPED, ids=label)
def test_temperature_bias_scale_softcap_and_vocab_size(objective):
    p = make(bias=True)
    p.labels[p.labels >= 141] = 7
    assert (p.labels != -100).sum() > SMALL.tokens
    head = {"logit_scale": 1.5, "softcap": 6.0}
    compare(p, objective, tight=TIGHT, where=STREAMING, temperature=1.7, head=head, vocab_size=141)


@pytest.mark.parametrize("reduction, weighted", [("mean", True), ("sum", False), ("none", False), ("none", True)])
def test_reductions_with_any_upstream_gradient(reduction, weighted, one_piece):
    weights = torch.rand(26, device=DEVICE) if weighted else None
    upstream = torch.randn(26, device=DEVICE) if reduction == "none" else torch.tensor(-3.7, device=DEVICE)
    options = {"reduction": reduction, "token_weights": weights, "upstream": upstream}
    compare(make(bias=True), GATED, tight=TIGHT, where=STREAMING, **options)


def test_weights_and_num_items_in_low_precision():
    """The factor of all gradients is applied after the GEMMs there, token weights before."""
    p = make(dtype=torch.bfloat16, bias=True)
    options = {"token_weights": torch.rand(26, device=DEVICE), "num_items": 900}
    out, grads = run(p, fk.ForwardKD(), **options)
    expected, refs = oracle64(p, fk.ForwardKD(), **options)
    assert relative(out.loss, expected.loss) < 1e-6
    assert furthest(grads, refs) < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("dtype", BOTH)
def test_what_is_not_wanted_is_not_made(dtype, one_piece):
    p = make(dtype=dtype, bias=True)
    _, grads = run(p, fk.Skew())
    for frozen in ((1,), (0, 2), (0, 1)):
        leaves = [x.detach().requires_grad_(i not in frozen) for i, x in enumerate(p.leaves)]
        out = fk.kd_loss(fk.LMHead(*leaves), p.teacher(), p.labels, fk.Skew(), engine="streaming")
        refs = [g for i, g in enumerate(grads) if i not in frozen]
        kept = gradients(out.loss, [x for x in leaves if x.requires_grad])
        assert furthest(kept, refs) < (1e-6 if dtype == torch.float32 else 2e-3)


@triton.jit
def number_kernel(out_ptr, GROUP: tl.constexpr):
    block, part = placed(GROUP)
    started = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(out_ptr + started, block * tl.num_programs(1) + part)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("blocks, parts", [(7, 5), (4, 3), (2, 6), (1, 1)])
def test_every_tile_is_made_once_group_after_group(blocks, parts, group):
    out = torch.full((blocks * parts,), -1, dtype=torch.int32, device=DEVICE)
    number_kernel[(blocks, parts)](out, group)
    assert sorted(out.tolist()) == list(range(blocks * parts))
    groups = [number // parts // group for number in out.tolist()]
    assert groups == sorted(groups)


def test_the_order_of_programs_changes_nothing(monkeypatch):
    p = make(dtype=torch.bfloat16, bias=True)
    (a, grads_a) = run(p, GATED)
    monkeypatch.setattr(streaming_plan, "GROUP", 64)  # all blocks of tokens: as a device would start them
    (b, grads_b) = run(p, GATED)
    assert all(map(torch.equal, (*a[:3], *grads_a), (*b[:3], *grads_b)))


@pytest.fixture
def together(monkeypatch):
    """dH and a low-precision dW from the same dlogits, still a tile a slab; the plans that were made."""
    monkeypatch.setattr(streaming_plan, "DEFAULT_BYTES", 1 << 30)
    monkeypatch.setattr(streaming_plan, "JOINT_BYTES", 1)
    monkeypatch.setattr(streaming_plan, "LEAST_JOINT_COLUMNS", 1)
    made: list[Plan] = []
    monkeypatch.setattr(streaming, "plan_streaming", lambda *a: made.append(plan_streaming(*a)) or made[-1])
    return made


@pytest.mark.parametrize("objective", [fk.SFT(), GATED], ids=label)
def test_both_gradients_from_the_same_dlogits(objective, together):
    p = make(dtype=torch.bfloat16, bias=True)
    weights = {"token_weights": torch.rand(26, device=DEVICE)}
    out, grads = run(p, objective, **weights)
    expected, refs = oracle64(p, objective, **weights)
    assert relative(out.loss, expected.loss) < 1e-6
    assert furthest(grads, refs) < ROUNDING[torch.bfloat16]
    assert grads[0][p.labels == -100].abs().sum() == 0
    p.hidden.requires_grad_(False)  # with one gradient there is nothing to join
    out = fk.kd_loss(p.student(), p.teacher(), p.labels, objective, **STREAMING, **weights)
    assert furthest(gradients(out.loss, p.leaves[1:]), grads[1:]) < ROUNDING[torch.bfloat16]
    assert [plan.together for plan in together] == [True, False]


def test_both_gradients_from_the_same_dlogits_where_labels_are_on_the_device(together, monkeypatch):
    p = make(dtype=torch.bfloat16, bias=True)
    _, refs = run(p, fk.Skew())
    monkeypatch.setattr(streaming, "valid_tokens", lambda labels, *_: (None, torch.where(labels == -100, -1, labels)))
    _, grads = run(p, fk.Skew())
    assert all(plan.together for plan in together)
    assert all(map(torch.equal, grads, refs))


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.skipif(INTERPRETED, reason="the interpreter has one order of everything")
def test_two_runs_are_bitwise_equal(dtype):
    p = make(dtype=dtype, bias=True)
    (a, grads_a), (b, grads_b) = (run(p, GATED) for _ in range(2))
    assert all(map(torch.equal, (*a[:3], *grads_a), (*b[:3], *grads_b)))


def test_a_second_backward_gives_the_same_gradients(one_piece):
    p = make(dtype=torch.bfloat16)
    out = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.SelfEvolutionTopK(), engine="streaming")
    first = torch.autograd.grad(out.loss, p.leaves, torch.tensor(0.5, device=DEVICE), retain_graph=True)
    second = torch.autograd.grad(out.loss, p.leaves, torch.tensor(0.5, device=DEVICE))
    assert all(map(torch.equal, first, second))


def test_no_result_is_left_uninitialised():
    torch.use_deterministic_algorithms(True)  # torch.empty fills with NaN
    try:
        for dtype in (torch.float32, torch.bfloat16):
            p = make(dtype=dtype, bias=True, N=20, V=100)
            out, grads = run(p, fk.SelfEvolution())
            assert all(x.isfinite().all() for x in (out.loss, out.difficulty, *grads))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("labels", ["none", "all ignored"])
def test_nothing_to_learn(labels):
    p = make(N=0 if labels == "none" else 5, ignored=1.1, bias=True)
    out, grads = run(p, fk.SelfEvolution())
    assert out.loss == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize("dtype", BOTH)
def test_labels_on_the_device_ignored_or_out_of_range(dtype, monkeypatch, one_piece):
    """As on an accelerator, where nothing looks at labels: the ignored are unknown, others past the end are NaN."""
    monkeypatch.setattr(tokens, "check_labels", lambda *_: None)
    p = make(dtype=dtype, bias=True)
    expected, refs = run(p, GATED)
    monkeypatch.setattr(streaming, "valid_tokens", lambda labels, device: (None, labels))
    out, grads = run(p, GATED)
    assert torch.equal(out.is_hard, expected.is_hard)
    values, refs = (out.loss, out.difficulty, *grads), (expected.loss, expected.difficulty, *refs)
    assert furthest(values, refs) < 1e-6
    p.labels[3], p.labels[5] = 150, -1
    out, grads = run(p, fk.NoEvo(), reduction="sum")
    assert out.loss.isnan() and all(g.isfinite().all() for g in grads)
    assert grads[0][3].abs().sum() == 0 and grads[0][5].abs().sum() == 0


def test_beta_one_is_the_plain_divergence(one_piece):
    p = make()
    (a, grads_a), (b, grads_b) = run(p, fk.Skew(lam=0.4, beta=1.0)), run(p, fk.NoEvo(lam=0.4))
    assert torch.equal(a.loss, b.loss)
    assert furthest(grads_a, grads_b) < 1e-6


def test_excluded_entries_and_extreme_logits():
    p = make(bias=True)
    with torch.no_grad():
        p.bias[40:110] = -float("inf")
        p.labels[(p.labels >= 40) & (p.labels < 110)] = 3
        p.hidden[0] *= 3e3
    out, grads = run(p, GATED)
    expected, refs = oracle64(p, GATED)
    assert relative(out.loss, expected.loss) < 1e-6
    assert torch.equal(grads[2][40:110], torch.zeros_like(grads[2][40:110]))
    assert relative(grads[0][1:], refs[0][1:]) < TIGHT and all(g.isfinite().all() for g in grads)


def test_nan_is_not_hidden(one_piece):
    p = make(ignored=0.0)
    with torch.no_grad():
        p.hidden[4, 0] = float("nan")
    for eps in (0.0, 1e-3):
        options = {"reduction": "none", "grad_filter_eps": eps}
        out = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.Skew(), **STREAMING, **options)
        assert out.loss.isnan().nonzero().flatten().tolist() == [4]
        assert gradients(out.loss.sum(), p.leaves)[0][4].isnan().all()
    with pytest.raises(ValueError, match=r"must be finite or -inf; .* token 4"):
        run(p, fk.Skew(), validate=True)


def test_strided_inputs_are_not_copied():
    p = make()
    wide = torch.cat([p.weight.detach().T, torch.full((24, 3), float("nan"), device=DEVICE)], 1)
    weight = wide.requires_grad_()[:, :150].T  # a transposed view: unit stride along the vocabulary
    hidden = p.hidden.detach().T.contiguous().T.requires_grad_()
    out = fk.kd_loss(fk.LMHead(hidden, weight), p.teacher(), p.labels, fk.Skew(), engine="streaming")
    d_hidden, d_wide = gradients(out.loss, [hidden, wide])
    _, (dh, dw) = oracle64(p, fk.Skew())
    assert relative(d_hidden, dh) < TIGHT and relative(d_wide[:, :150].T, dw) < TIGHT


def test_autocast():
    p = make()
    with torch.autocast(DEVICE, torch.bfloat16):
        out, grads = run(p, GATED)
    expected, refs = oracle64(make(dtype=torch.bfloat16), GATED)
    assert relative(out.loss, expected.loss) < (2e-2 if INTERPRETED else 1e-6)  # the interpreter's rounding is coarse
    assert {g.dtype for g in grads} == {torch.float32}
    assert furthest(grads, refs) < (5e-2 if INTERPRETED else 4e-3)


def test_compiled_step(one_piece):
    p = make()
    criterion = fk.KDLoss(GATED, engine="streaming").to(DEVICE)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(hidden, weight):
        return criterion(fk.LMHead(hidden, weight), p.teacher(), p.labels)

    assert furthest(gradients(step(p.hidden, p.weight), p.leaves), run(p, GATED)[1]) < 1e-6


# Memory and selection.


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "together"])
def test_workspace_is_what_the_plan_says(joined, monkeypatch, request):
    """With both passes of the backward: seen by torch's own profiler and by the largest tensor, a slab, never C x V."""
    if not INTERPRETED:
        pytest.skip("test_gpu.py measures the device's memory")
    if joined:
        plans = request.getfixturevalue("together")
    else:
        plans = []
        monkeypatch.setattr(streaming, "plan_streaming", lambda *a: plans.append(plan_streaming(*a)) or plans[-1])
    p = make(N=32, V=400, dtype=torch.bfloat16)
    with Allocations() as seen, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run(p, GATED)
    results = sum(x.nbytes for x in p.leaves) + 9 * 32  # loss, difficulty and is_hard too
    live = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    (plan,) = plans
    assert plan.together == joined
    assert plan.workspace / 4 < peak <= plan.workspace + results
    assert seen.largest <= p.weight.nbytes < 16 * 400 * 4


def test_a_budget_too_small_for_the_chunked_engine_selects_streaming(monkeypatch, one_piece):
    p = make(V=600, dtype=torch.bfloat16)
    calls = []
    original = streaming.run
    monkeypatch.setattr(streaming, "run", lambda *a, **k: calls.append(1) or original(*a, **k))
    with pytest.raises(
        ValueError, match=r"memory_budget must be at least (\d+) .*got 1; engine='streaming' would"
    ) as e:
        fk.kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo(), memory_budget=1)
    chunked, streamed = map(int, re.findall(r"\d\d+", str(e.value)))
    assert streamed < chunked
    for budget, expected in ((chunked, 1), (streamed, 2)):
        fk.kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo(), memory_budget=budget)
        assert len(calls) == expected
    for options in ({"engine": "chunked"}, {"backend": "torch"}):
        with pytest.raises(ValueError, match=f"at least {chunked} bytes .*, got {streamed}$"):
            fk.kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo(), memory_budget=streamed, **options)
    with pytest.raises(ValueError, match=f"at least {streamed} bytes .*, got {streamed - 1}$"):
        fk.kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo(), memory_budget=streamed - 1, engine="streaming")


@pytest.mark.parametrize(
    "objective, backend, message",
    [
        (fk.NoEvo(), "torch", "engine='streaming' needs backend='triton' or None, got backend='torch'"),
        (fk.AdaptiveKL(), None, "can not run AdaptiveKL"),
    ],
)
def test_messages(objective, backend, message):
    p = make()
    with pytest.raises(ValueError, match=re.escape(message)):
        fk.kd_loss(p.student(), p.teacher(), p.labels, objective, engine="streaming", backend=backend)


def test_streaming_is_refused_where_triton_can_not_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    p = problem()
    with pytest.raises(ValueError, match="engine='streaming' runs in Triton alone: backend='triton' needs a GPU"):
        fk.kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo(), engine="streaming")


# The gradient filter.


@pytest.fixture
def flags(monkeypatch):
    """The flags of the tiles that the gradient GEMMs were given."""
    seen: list[Tensor] = []
    original = streaming_sweeps.Sweeps.flagged_product

    def record(self, out, dlogits, other, flags, **options):
        seen.append(flags.clone())
        original(self, out, dlogits, other, flags, **options)

    monkeypatch.setattr(streaming_sweeps.Sweeps, "flagged_product", record)
    return seen


def both(student, teacher, p: Problem, objective, leaves: list[Tensor]) -> list[tuple[Tensor, list[Tensor]]]:
    """Loss and gradients without and with the filter."""
    losses = [
        fk.kd_loss(student, teacher, p.labels, objective, engine="streaming", grad_filter_eps=eps).loss
        for eps in (0.0, EPS)
    ]
    return [(loss, gradients(loss, leaves)) for loss in losses]


@pytest.mark.parametrize(
    "objective, dtype, slab_bytes",
    [
        pytest.param(fk.SFT(), torch.float32, 1 << 20, id="sft-fp32-one_slab"),  # more than one tile each way
        pytest.param(fk.SelfEvolution(gamma=0.5), torch.float32, 1, id="self_evolution-fp32"),
        pytest.param(fk.Skew(), torch.bfloat16, 1, id="skew-bf16"),
    ],
)
def test_filter_skips_tiles_within_its_bound(objective, dtype, slab_bytes, flags, monkeypatch):
    for name in ("SLAB_BYTES", "CHUNK_BYTES", "WEIGHT_BYTES"):
        monkeypatch.setattr(streaming_plan, name, slab_bytes)
    p = make(dtype=dtype, std=2.0, bias=True, near=True)
    (exact, grads), (filtered, found) = both(*peak(p), p, objective, p.leaves)
    assert torch.equal(filtered, exact)
    kept = torch.cat([f.flatten() for f in flags])
    assert 0.2 < 1 - kept.float().mean() < 0.8
    valid = p.labels != -100
    check_left_out(p, grads, found, valid.double() / valid.sum())
    rounding = 2**-7 if dtype == torch.bfloat16 else 1e-6
    assert ((found[2] - grads[2]).abs() <= EPS * 1.01 + rounding * grads[2].abs()).all()


@pytest.mark.parametrize("dtype", BOTH)
def test_filter_that_skips_nothing_is_exact_and_takes_each_gradient_apart(dtype, flags, together):
    p = make(dtype=dtype, bias=True)
    _, refs = run(p, fk.Skew())
    assert not flags
    _, grads = run(p, fk.Skew(), grad_filter_eps=1e-30)
    assert flags and all(f.all() for f in flags) and not together[-1].together
    assert furthest(grads, refs) < (1e-6 if dtype == torch.float32 else 2e-3)


def test_filter_of_given_logits():
    p = make(std=2.0, bias=True, near=True)
    _, teacher = peak(p)
    z = (p.hidden @ p.weight.T + p.bias).detach().requires_grad_()
    (_, (exact,)), (_, (filtered,)) = both(z, p.hidden_t @ p.weight_t.T + teacher.bias, p, fk.Skew(), [z])
    assert filtered[:, 64:].abs().sum() == 0 < exact[:, 64:].abs().sum()
    assert torch.equal(filtered[:, :64], exact[:, :64])
