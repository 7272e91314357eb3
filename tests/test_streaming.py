"""The streaming engine against the float64 oracle, in tiles small enough that every loop runs more than once."""

from __future__ import annotations

import os
import re

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_kd as fk
from fused_kd.reference import reference_kd_loss

from . import interpreter
from .budget import check_budget
from .problems import NAMES, OBJECTIVES, Problem, _Head, gradients, oracle64, problem, relative
from .test_error_budget import LOSS_SCALE

pytest.importorskip("triton", reason="the streaming engine needs triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip(interpreter.NEEDED, allow_module_level=True)

from fused_kd.engine import gemm, streaming, streaming_plan, streaming_sweeps  # noqa: E402
from fused_kd.engine.chunked import Side, Wanted  # noqa: E402
from fused_kd.engine.streaming_plan import Plan, Tiles, plan_streaming  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
STREAMED = [objective for objective in OBJECTIVES if objective.name != "adaptive_kl"]
STREAMED_NAMES = [name for name in NAMES if name != "adaptive_kl"]
SMALL = Tiles(16, 64, 32, 4, 2)
TIGHT = 3e-6


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of tokens, three tiles of columns, two splits, a tile a slab; uninitialised memory is poison."""
    monkeypatch.setattr(streaming_plan, "choose_tiles", lambda *_, **__: SMALL)
    monkeypatch.setattr(streaming_plan, "PROGRAMS", 4)
    for name in ("SLAB_BYTES", "CHUNK_BYTES", "LATE_BYTES"):
        monkeypatch.setattr(streaming_plan, name, 1)
    for module in (streaming, streaming_sweeps):
        monkeypatch.setattr(module, "empty", poisoned)


def poisoned(shape, dtype, device):
    return torch.full(shape, float("nan") if dtype.is_floating_point else 1, dtype=dtype, device=device)


def make(**options) -> Problem:
    return problem(**({"N": 26, "V": 150, "std": 3.0, "ignored": 0.12, "device": DEVICE} | options))


def run(p: Problem, objective, **options) -> tuple[fk.KDOutput, list[Tensor]]:
    out = fk.kd_loss(p.student(), p.teacher(), p.labels, objective, engine="streaming", **options)
    return out, gradients(out.loss, p.leaves)


@pytest.fixture
def one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of tokens, one slab: programs and launches are what costs time in the interpreter."""
    monkeypatch.setattr(streaming_plan, "choose_tiles", lambda *_, **__: Tiles(32, 64, 32, 4, 2))
    for name in ("SLAB_BYTES", "CHUNK_BYTES", "LATE_BYTES"):
        monkeypatch.setattr(streaming_plan, name, 1 << 20)


@pytest.mark.parametrize("near", [False, True], ids=["far", "near"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("objective", STREAMED, ids=STREAMED_NAMES)
def test_heads(objective, dtype, near, one_piece):
    p = make(dtype=dtype, near=near, N=22, V=100)
    check_budget(p, objective, *run(p, objective))


@pytest.mark.parametrize("mutation", [0.0, -1.0, 1.02], ids=["zeroed", "negated", "scaled"])
def test_the_check_catches_wrong_gradients(mutation, one_piece):
    for dtype in (torch.float32, torch.bfloat16):
        p = make(dtype=dtype, N=22, V=100)
        out, (dh, dw) = run(p, fk.Skew())
        for grads, name in (([dh * mutation, dw], "dH"), ([dh, dw * mutation], "dW")):
            with pytest.raises(AssertionError, match=name):
                check_budget(p, fk.Skew(), out, grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("objective", STREAMED, ids=STREAMED_NAMES)
def test_logits(objective, dtype, one_piece):
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
def test_sides_differ_in_form_and_dtype(form):
    p = make(dtype_t=torch.bfloat16 if form == "mixed dtypes" else None)
    objective = fk.SelfEvolution(gamma=1.0)
    expected, refs = oracle64(p, objective)
    student, teacher, leaves = p.student(), p.teacher(), p.leaves
    if form == "student logits":
        student = (p.hidden @ p.weight.T).detach().requires_grad_()
        leaves = [student]
    elif form == "teacher logits":
        teacher = p.hidden_t @ p.weight_t.T
    out = fk.kd_loss(student, teacher, p.labels, objective, engine="streaming")
    grads = gradients(out.loss, leaves)
    if form == "student logits":
        grads = [grads[0] @ p.weight, grads[0].T @ p.hidden]
    assert relative(out.loss, expected.loss) < 1e-6
    assert max(relative(g, r) for g, r in zip(grads, refs, strict=True)) < TIGHT


def compare(p: Problem, objective, *, upstream=None, head=None, **options) -> None:
    """Loss, gradients, difficulty and hardness against the oracle's with the same options."""
    head = head or {}
    out = fk.kd_loss(
        fk.LMHead(p.hidden, p.weight, p.bias, **head), p.teacher(), p.labels, objective, engine="streaming", **options
    )
    copies = [x.detach().double().requires_grad_() for x in p.leaves]
    student64 = _Head(*copies, *([None] * (3 - len(copies))), **head)
    teacher64 = _Head(p.hidden_t.double(), p.weight_t.double())
    expected = reference_kd_loss(student64, teacher64, p.labels, objective, **options)
    up = torch.ones_like(out.loss) if upstream is None else upstream
    actual = torch.autograd.grad(out.loss, p.leaves, up)
    refs = torch.autograd.grad(expected.loss, copies, up.double())
    assert relative(out.loss, expected.loss) < TIGHT
    assert max(relative(a, r) for a, r in zip(actual, refs, strict=True)) < TIGHT
    assert torch.equal(out.is_hard, expected.is_hard)
    assert relative(out.difficulty, expected.difficulty) < TIGHT


@pytest.mark.parametrize("objective", STREAMED, ids=STREAMED_NAMES)
def test_temperature_bias_scale_softcap_and_vocab_size(objective):
    p = make(bias=True)
    p.labels[p.labels >= 141] = 7
    assert (p.labels != -100).sum() > SMALL.tokens
    head = {"logit_scale": 1.5, "softcap": 6.0}
    compare(p, objective, temperature=1.7, head=head, vocab_size=141)


@pytest.mark.parametrize("reduction, weighted", [("mean", True), ("sum", False), ("none", False), ("none", True)])
def test_reductions_with_any_upstream_gradient(reduction, weighted):
    p = make(bias=True)
    weights = torch.rand(26, device=DEVICE) if weighted else None
    upstream = torch.randn(26, device=DEVICE) if reduction == "none" else torch.tensor(-3.7, device=DEVICE)
    compare(p, fk.SelfEvolution(gamma=1.0), reduction=reduction, token_weights=weights, upstream=upstream)


def test_weights_and_num_items_in_low_precision():
    """The factor of all gradients is applied after the GEMMs there, token weights before."""
    p = make(dtype=torch.bfloat16, bias=True)
    options = {"token_weights": torch.rand(26, device=DEVICE), "num_items": 900}
    out, grads = run(p, fk.ForwardKD(), **options)
    expected, refs = oracle64(p, fk.ForwardKD(), **options)
    assert relative(out.loss, expected.loss) < 1e-6
    assert max(relative(g, r) for g, r in zip(grads, refs, strict=True)) < 4e-3


def test_shift():
    p = make(N=24)
    y = p.labels.reshape(4, 6)
    student = fk.LMHead(p.hidden.reshape(4, 6, -1), p.weight)
    teacher = fk.LMHead(p.hidden_t.reshape(4, 6, -1), p.weight_t)
    actual = fk.kd_loss(student, teacher, y, fk.NoEvo(), shift=True, engine="streaming")
    expected = reference_kd_loss(student, teacher, y, fk.NoEvo(), shift=True)
    assert relative(actual.loss, expected.loss) < 1e-6
    for a, r in zip(gradients(actual.loss, p.leaves), gradients(expected.loss, p.leaves), strict=True):
        assert relative(a, r) < TIGHT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_is_not_wanted_is_not_made(dtype):
    p = make(dtype=dtype, bias=True)
    _, (dh, dw, db) = run(p, fk.Skew())
    for frozen in ((1,), (0, 2), (0, 1)):
        leaves = [x.detach().requires_grad_(i not in frozen) for i, x in enumerate(p.leaves)]
        out = fk.kd_loss(fk.LMHead(*leaves), p.teacher(), p.labels, fk.Skew(), engine="streaming")
        kept = [x for x in leaves if x.requires_grad]
        refs = [g for i, g in enumerate((dh, dw, db)) if i not in frozen]
        for g, r in zip(gradients(out.loss, kept), refs, strict=True):
            assert relative(g, r) < (1e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_two_runs_are_bitwise_equal(dtype):
    p = make(dtype=dtype, bias=True)
    (a, grads_a), (b, grads_b) = (run(p, fk.SelfEvolution(gamma=1.0)) for _ in range(2))
    for x, y in zip((*a, *grads_a), (*b, *grads_b), strict=True):
        assert torch.equal(x, y)


def test_a_second_backward_gives_the_same_gradients():
    p = make(dtype=torch.bfloat16)
    out = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.SelfEvolutionTopK(), engine="streaming")
    first = torch.autograd.grad(out.loss, p.leaves, torch.tensor(0.5, device=DEVICE), retain_graph=True)
    second = torch.autograd.grad(out.loss, p.leaves, torch.tensor(0.5, device=DEVICE))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_labels_on_the_device_ignored_or_out_of_range(dtype, monkeypatch):
    """As on an accelerator, where nothing looks at labels: the ignored are unknown, others past the end are NaN."""
    from fused_kd.engine import ops

    monkeypatch.setattr(ops, "check_labels", lambda *_: None)

    def on_device(labels, ignore_index, device):
        return None, torch.where(labels == ignore_index, -1, torch.where(labels < 0, 2**62, labels))

    p = make(dtype=dtype, bias=True)
    expected, refs = run(p, fk.SelfEvolution(gamma=1.0))
    monkeypatch.setattr(streaming, "valid_tokens", on_device)
    out, grads = run(p, fk.SelfEvolution(gamma=1.0))
    assert torch.equal(out.is_hard, expected.is_hard)
    for a, r in zip((out.loss, out.difficulty, *grads), (expected.loss, expected.difficulty, *refs), strict=True):
        assert relative(a, r) < 1e-6 or torch.equal(a, r)
    p.labels[3], p.labels[5] = 150, -1
    out, grads = run(p, fk.NoEvo(), reduction="sum")
    assert out.loss.isnan() and all(g.isfinite().all() for g in grads)
    assert grads[0][3].abs().sum() == 0 and grads[0][5].abs().sum() == 0


def test_beta_one_is_the_plain_divergence():
    p = make()
    (a, grads_a), (b, grads_b) = run(p, fk.Skew(lam=0.4, beta=1.0)), run(p, fk.NoEvo(lam=0.4))
    assert torch.equal(a.loss, b.loss)
    assert max(relative(g, r) for g, r in zip(grads_a, grads_b, strict=True)) < 1e-6


def test_excluded_entries_and_extreme_logits():
    p = make(bias=True)
    with torch.no_grad():
        p.bias[40:110] = -float("inf")
        p.labels[(p.labels >= 40) & (p.labels < 110)] = 3
        p.hidden[0] *= 3e3
    out, grads = run(p, fk.SelfEvolution(gamma=1.0))
    expected, refs = oracle64(p, fk.SelfEvolution(gamma=1.0))
    assert relative(out.loss, expected.loss) < 1e-6
    assert torch.equal(grads[2][40:110], torch.zeros_like(grads[2][40:110]))
    assert relative(grads[0][1:], refs[0][1:]) < TIGHT and all(g.isfinite().all() for g in grads)


def test_nan_is_not_hidden():
    p = make(ignored=0.0)
    with torch.no_grad():
        p.hidden[4, 0] = float("nan")
    for eps in (0.0, 1e-3):
        out = fk.kd_loss(
            p.student(), p.teacher(), p.labels, fk.Skew(), engine="streaming", reduction="none", grad_filter_eps=eps
        )
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
        out = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.SelfEvolution(gamma=1.0), engine="streaming")
    rounded = make(dtype=torch.bfloat16)
    expected, refs = oracle64(rounded, fk.SelfEvolution(gamma=1.0))
    assert relative(out.loss, expected.loss) < (2e-2 if INTERPRETED else 1e-6)  # the interpreter's rounding is coarse
    for g, r in zip(gradients(out.loss, p.leaves), refs, strict=True):
        assert g.dtype == torch.float32
        assert relative(g, r) < (5e-2 if INTERPRETED else 4e-3)


def test_compiled_step():
    p = make()
    criterion = fk.KDLoss(fk.SelfEvolution(gamma=1.0), engine="streaming").to(DEVICE)
    step = torch.compile(lambda h, w: criterion(fk.LMHead(h, w), p.teacher(), p.labels), backend="aot_eager", fullgraph=True)  # fmt: skip  # noqa: E501
    _, refs = run(p, fk.SelfEvolution(gamma=1.0))
    for g, r in zip(gradients(step(p.hidden, p.weight), p.leaves), refs, strict=True):
        assert relative(g, r) < 1e-6


# Memory and selection.


def plan_of(
    N: int, H: int, V: int, dtype: torch.dtype, budget: int | None = None, wanted: Wanted | None = None
) -> Plan:
    """The plan of a call with these shapes on a GPU."""
    student = Side(*(torch.empty(shape, dtype=dtype, device="meta") for shape in ((N, H), (V, H))), None, 1.0, None)
    labels = torch.empty(N, dtype=torch.int64, device="meta")
    scalars = torch.empty(5, device="meta")
    sweeps = streaming_sweeps.Sweeps(student, student, None, labels, scalars, fk.SelfEvolution().spec, False, V, None)
    assert student.weight is not None
    head = streaming._Head(student, student.weight, None, wanted or Wanted(True, True, False))
    return plan_streaming(streaming._sizes(sweeps, head, N, V, True), sweeps.tiles, budget)


def test_memory_at_full_size(monkeypatch):
    """Under 64 MB where one set of fp32 logits alone would be 4.2 GB."""
    monkeypatch.undo()
    monkeypatch.setattr(gemm, "has_fp32_output", lambda device: True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert plan_of(8192, 4096, 128256, dtype).workspace < 64e6
        assert plan_of(8192, 896, 151936, dtype).workspace < 64e6
    base, longer = (plan_of(N, 4096, 128256, torch.float32).workspace for N in (8192, 65536))
    assert longer - base < 1000 * (65536 - 8192)  # bytes a token
    assert plan_of(8192, 4096, 128256, torch.bfloat16, budget=16 << 20).workspace <= 16 << 20


class Allocations(TorchDispatchMode):
    """The largest tensor made inside, results included."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)}
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


def test_workspace_is_what_the_plan_says(monkeypatch):
    """With both passes of the backward: seen by torch's own profiler and by the largest tensor, a slab, never C x V."""
    from torch.profiler import ProfilerActivity, profile

    if not INTERPRETED:
        pytest.skip("test_gpu.py measures the device's memory")
    plans = []
    monkeypatch.setattr(streaming, "plan_streaming", lambda *a: plans.append(plan_streaming(*a)) or plans[-1])
    p = make(N=48, V=500, dtype=torch.bfloat16)
    with Allocations() as seen, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run(p, fk.SelfEvolution(gamma=1.0))
    results = sum(x.nbytes for x in p.leaves) + 9 * 48  # loss, difficulty and is_hard too
    live = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    (plan,) = plans
    assert plan.workspace / 4 < peak <= plan.workspace + results
    assert seen.largest <= p.weight.nbytes < 16 * 500 * 4


def test_a_budget_too_small_for_the_chunked_engine_selects_streaming(monkeypatch):
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
    "error, message, options",
    [
        (ValueError, "engine must be None or one of 'chunked', 'streaming', got 'stream'", {"engine": "stream"}),
        (
            ValueError,
            "engine='streaming' needs backend='triton' or None, got backend='torch'",
            {"engine": "streaming", "backend": "torch"},
        ),
        (ValueError, "can not run AdaptiveKL", {"engine": "streaming", "objective": fk.AdaptiveKL()}),
        (ValueError, "grad_filter_eps=0.001 needs engine='streaming', got engine=None", {"grad_filter_eps": 1e-3}),
        (ValueError, "grad_filter_eps must be at least 0, got -1", {"grad_filter_eps": -1, "engine": "streaming"}),
        (ValueError, "grad_filter_eps must be a finite number, got nan", {"grad_filter_eps": float("nan")}),
    ],
    ids=lambda x: x[:30] if isinstance(x, str) else "",
)
def test_messages(error, message, options):
    p = make()
    objective = options.pop("objective", fk.NoEvo())
    with pytest.raises(error, match=re.escape(message)):
        fk.kd_loss(p.student(), p.teacher(), p.labels, objective, **options)


def test_streaming_is_refused_where_triton_can_not_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    p = problem()
    with pytest.raises(ValueError, match="engine='streaming' runs in Triton alone: backend='triton' needs a GPU"):
        fk.kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo(), engine="streaming")


# The gradient filter.


def peaked(dtype: torch.dtype = torch.float32) -> tuple[fk.LMHead, fk.LMHead, Problem]:
    """Probabilities beyond the first tile of columns are below 1e-6, on both sides."""
    p = make(dtype=dtype, std=2.0, bias=True, near=True)
    p.labels[p.labels >= 64] = 5
    with torch.no_grad():
        p.bias[64:] = -30.0
    return p.student(), fk.LMHead(p.hidden_t, p.weight_t, p.bias.detach()), p


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


@pytest.mark.parametrize(
    "objective, dtype",
    [(fk.SFT(), torch.float32), (fk.SelfEvolution(gamma=0.5), torch.float32), (fk.Skew(), torch.bfloat16)],
    ids=["sft-fp32", "self_evolution-fp32", "skew-bf16"],
)
def test_filter_skips_tiles_within_its_bound(objective, dtype, flags):
    eps = 1e-4
    student, teacher, p = peaked(dtype)
    exact = fk.kd_loss(student, teacher, p.labels, objective, engine="streaming")
    dh, dw, db = (g.double() for g in gradients(exact.loss, p.leaves))
    assert not flags
    filtered = fk.kd_loss(student, teacher, p.labels, objective, engine="streaming", grad_filter_eps=eps)
    dh_f, dw_f, db_f = (g.double() for g in gradients(filtered.loss, p.leaves))
    assert torch.equal(filtered.loss, exact.loss)
    kept = torch.cat([f.flatten() for f in flags])
    assert 0.2 < 1 - kept.float().mean() < 0.8
    assert dw_f[64:].abs().sum() == 0 < dw[64:].abs().sum()  # skipped, and not by being zero anyway
    n = (p.labels != -100).sum()
    rounding = 2**-7 if dtype == torch.bfloat16 else 1e-6
    bound_h = eps / n * p.weight.double().norm(dim=1).sum()
    bound_w = eps / n * p.hidden.double().norm(dim=1).sum()
    assert ((dh_f - dh).norm(dim=1) <= bound_h + rounding * dh.norm(dim=1)).all()
    assert ((dw_f - dw).norm(dim=1) <= bound_w + rounding * dw.norm(dim=1)).all()
    assert ((db_f - db).abs() <= eps * 1.01 + rounding * db.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_filter_that_skips_nothing_is_exact(dtype, flags):
    p = make(dtype=dtype, bias=True)
    _, refs = run(p, fk.Skew())
    _, grads = run(p, fk.Skew(), grad_filter_eps=1e-30)
    assert flags and all(f.all() for f in flags)
    for g, r in zip(grads, refs, strict=True):
        assert relative(g, r) < (1e-6 if dtype == torch.float32 else 2e-3)


def test_filter_of_given_logits():
    _, teacher, p = peaked()
    z = (p.hidden @ p.weight.T + p.bias).detach().requires_grad_()
    z_t = p.hidden_t @ p.weight_t.T + teacher.bias
    exact, filtered = (
        gradients(fk.kd_loss(z, z_t, p.labels, fk.Skew(), engine="streaming", grad_filter_eps=eps).loss, [z])[0]
        for eps in (0.0, 1e-4)
    )
    assert filtered[:, 64:].abs().sum() == 0 < exact[:, 64:].abs().sum()
    assert torch.equal(filtered[:, :64], exact[:, :64])
