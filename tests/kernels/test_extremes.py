"""Logits, lists, scalars, sizes and addresses at the edge: finite, right results where the mathematics has one."""

from __future__ import annotations

import math
import mmap
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fused_kd as fk
from fused_kd.inputs import TAILS
from fused_kd.objectives import OBJECTIVES as CLASSES
from fused_kd.objectives import Sum
from fused_kd.reference import reference_kd_loss
from fused_kd.rows.contract import Logits, RowInputs, RowOutputs
from fused_kd.rows.select import get_row
from fused_kd.rows.top_k import sparse_teacher

from ..problems import (
    JUMPS,
    OBJECTIVES,
    amplified,
    gradients,
    label,
    may_overflow,
    problem,
    reads_level,
    relative,
    with_numbers,
)
from .contract import FP16, GPU, KINDS, NATIVE, TORCH, TRITON, cases, scalars_of, slow
from .test_lists import TEACHED, allowed, cached

pytestmark = pytest.mark.skipif(GPU, reason="small CPU tensors")
TEACHERS = ["dense", *TAILS]
# What surrounds the dense row does not look at the objective: a label term of its own, a gate and a mixture are enough
# where rows are slow.
FEW = ("forward_kd", "self_evolution", "generalized_jsd")


def objectives(backend: str, tail: str) -> list:
    named = [o for o in TEACHED if not slow(backend) or label(o) in FEW]
    return [o for o in named if tail == "dense" or allowed(o, tail)]


def logits_case(name: str) -> tuple[Tensor, Tensor, Tensor]:
    z, z_t, y = torch.randn(6, 67) * 3, torch.randn(6, 67) * 3, torch.randint(0, 60, (6,))
    if name == "huge":
        z, z_t = z * 3000, z_t * 3000
    elif name == "tail masked in both":
        z[:, 60:], z_t[:, 60:] = -math.inf, -math.inf
    elif name == "teacher masked":
        z_t[:, 60:] = -math.inf
    elif name == "equal":
        z_t = z.clone()
    elif name == "one-hot":
        z[:, 1], z_t[:, 2] = 200.0, 200.0
    elif name == "constant offset":
        z = z + 1e4
    return z, z_t, y


CASES = ["huge", "tail masked in both", "teacher masked", "equal", "one-hot", "constant offset"]
KINDS_AND_TOP_K = (*KINDS, "forward_kd")


@pytest.mark.parametrize(
    "case, objective, backend", cases(CASES, OBJECTIVES, kinds=KINDS_AND_TOP_K), indirect=["backend"]
)
def test_logits(case, objective, backend):
    z, z_t, y = logits_case(case)
    z.requires_grad_()
    out = fk.kd_loss(z, z_t, y, objective, backend=backend, reduction="none")
    (dz,) = gradients(out.loss.sum(), [z])
    z64 = z.detach().double().requires_grad_()
    expected = reference_kd_loss(z64, z_t, y, objective, reduction="none")
    (ref,) = gradients(expected.loss.sum(), [z64])
    infinite = expected.loss > 1e18  # positive probability where the other side has none
    if may_overflow(objective):
        infinite |= (out.loss == math.inf) & (expected.loss > 80.0)
    assert (out.loss[infinite] == math.inf).all() and torch.isfinite(out.loss[~infinite]).all()
    a, r = out.loss[~infinite], expected.loss[~infinite]
    assert relative(a, r) < 1e-5 or (a - r).abs().max() < 2e-7 * amplified(
        objective
    )  # equal rows leave nothing but rounding
    if infinite.any():
        everywhere = any(term.of.everywhere for term in objective.spec.terms)
        assert (case == "teacher masked" and everywhere) or may_overflow(objective)
        return
    scale = 30 if case == "constant offset" else 1  # the offset itself costs digits of the logits
    assert relative(dz, ref) < 1e-5 * scale or (dz - ref).abs().max() < 1e-6 * scale


SCALARS = cases([0.0, 1.0], [0.0, 1.0], [0.0, math.inf])


@pytest.mark.parametrize("lam, beta, gamma, backend", SCALARS, indirect=["backend"])
def test_scalars_at_their_limits(lam, beta, gamma, backend):
    p = problem(N=4 if slow(backend) else 9, V=61)
    for cls in CLASSES.values():
        own = vars(cls())
        reads_lam, reads_beta = "lam" in own or "fraction" in own, "beta" in own or "alpha" in own
        if (lam == 1.0 and not reads_lam) or (beta == 1.0 and not reads_beta) or (gamma > 0 and "gamma" not in own):
            continue  # the same objective as with the other value
        if cls.name in ("alpha_beta", "renyi"):  # other ranges, see test_objectives_math.py
            continue
        objective = with_numbers(cls, lam=lam, beta=beta, gamma=gamma)
        out = fk.kd_loss(p.student(), p.teacher(), p.labels, objective, backend=backend)
        expected = reference_kd_loss(p.student(), p.teacher(), p.labels, objective)
        assert abs(out.loss - expected.loss) < 2e-6 * (1 + abs(expected.loss)), objective
        for a, r in zip(gradients(out.loss, p.leaves), gradients(expected.loss, p.leaves), strict=True):
            assert (a - r).norm() < 3e-6 * r.norm() + 1e-7, objective
        assert torch.equal(out.is_hard, expected.is_hard)


@pytest.mark.parametrize("objective, backend", cases(OBJECTIVES), indirect=["backend"])
def test_no_nan_from_low_precision_underflow(objective, backend):
    p = problem(N=5 if slow(backend) else 29, std=4.0, dtype=FP16)
    p.hidden.data.mul_(8)
    out = fk.kd_loss(p.student(), p.teacher(), p.labels, objective, backend=backend)
    assert torch.isfinite(out.loss)
    scale = 1 if objective.name == "z_loss" else 1024  # it is in the thousands itself
    assert all(torch.isfinite(g).all() for g in gradients(out.loss * scale, p.leaves))


NEAR_ZERO = cases([fk.NoEvo(), fk.ReverseKD(), fk.SkewForward()], backends=[TORCH, NATIVE, TRITON])


@pytest.mark.parametrize("objective, backend", NEAR_ZERO, indirect=["backend"])
def test_a_temperature_near_zero(objective, backend):
    p = problem(N=5, V=67)
    out = fk.kd_loss(p.student(), p.teacher(), p.labels, objective, temperature=1e-6, backend=backend)
    expected = reference_kd_loss(p.student(), p.teacher(), p.labels, objective, temperature=1e-6)
    assert relative(out.loss, expected.loss) < 1e-5
    assert all(g.isfinite().all() for g in gradients(out.loss, p.leaves))


def evaluate(z, teacher, y, objective, **options) -> tuple[fk.KDOutput, Tensor]:
    leaf = z.detach().clone().requires_grad_()
    out = fk.kd_loss(leaf, teacher, y, objective, **options)
    return out, gradients(out.loss.sum(), [leaf])[0]


def truth(z, teacher, y, objective, **options) -> tuple[fk.KDOutput, Tensor]:
    leaf = z.detach().double().clamp(min=-1e30).requires_grad_()
    out = reference_kd_loss(leaf, teacher, y, objective, **options)
    return out, gradients(out.loss.sum(), [leaf])[0]


def check(
    actual: tuple[fk.KDOutput, Tensor],
    expected: tuple[fk.KDOutput, Tensor],
    tight: float = 1e-5,
    logarithm: bool = False,
) -> None:
    """Per token; relative in norm, or below one rounding of 1 where the truth is that small."""
    (out, dz), (ref, dz_ref) = actual, expected
    infinite, finite = ref.loss == math.inf, ref.difficulty != math.inf
    if logarithm:  # of what is 0 in fp32
        infinite |= (out.loss == math.inf) & (ref.loss > 80.0)
    assert (out.loss[infinite] == math.inf).all() and (out.difficulty[~finite] == math.inf).all()
    assert torch.isfinite(dz).all()
    pairs = [(out.loss[~infinite], ref.loss[~infinite]), (dz[~infinite], dz_ref[~infinite])]
    pairs.append((out.difficulty[finite], ref.difficulty[finite]))
    for a, r in pairs:
        assert torch.isfinite(a).all()
        assert not a.numel() or relative(a, r) < tight or (a - r).abs().max() < 2e-7
    assert torch.equal(out.is_hard, ref.is_hard)


def top_k_case(name: str, K: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student logits (4, 67), the teacher's lists, and labels: the first two listed, the others likely not."""
    z, z_t, y = torch.randn(4, 67) * 3, torch.randn(4, 67) * 3, torch.tensor([0, 0, 33, 64])
    log_probs, indices = (z_t * (3000 if name == "huge" else 1)).log_softmax(-1).topk(K)
    y[:2] = indices[[0, 1], [0, 2]]
    listed = torch.zeros(4, 67, dtype=torch.bool).scatter(1, indices, True).scatter(1, y[:, None], True)
    if name == "huge":
        z = z * 3000
    elif name == "offset":
        z = (z * 256).round() / 256 + 1e4  # exact sums: the offset takes no digits of the logits themselves
    elif name == "some unlisted at -inf":
        z[:, 20:60] = z[:, 20:60].where(listed[:, 20:60], -math.inf)
    elif name == "all unlisted at -inf":
        z = z.where(listed, -math.inf)
    elif name == "a listed one at -inf":
        z[2].scatter_(0, indices[2, 1:2], -math.inf)
    elif name == "the label at -inf":
        z[2, y[2]] = -math.inf
    elif name == "peak on a listed one":
        z.scatter_(1, indices[:, :1], 1e4)
    elif name == "peak on an unlisted one":
        z[:, 1], listed[:, 1] = 1e4, True
    elif name == "trough on a listed one":
        z.scatter_(1, indices[:, :1], -1e4)
    elif name == "one-hot teacher":
        log_probs = torch.tensor([0.0, -120.0, -200.0, -1e4, -math.inf]).expand(4, K)
    elif name == "no tail":
        log_probs = log_probs.log_softmax(-1)
    return z, log_probs, indices, y


TOP_K_CASES = [
    "huge", "offset", "some unlisted at -inf", "all unlisted at -inf", "a listed one at -inf", "the label at -inf",
    "peak on a listed one", "peak on an unlisted one", "trough on a listed one", "one-hot teacher", "no tail",
]  # fmt: skip


LISTS = cases(TOP_K_CASES, TAILS, backends=[TORCH, NATIVE, TRITON], pairs=True)


@pytest.mark.parametrize("case, tail, backend", LISTS, indirect=["backend"])
def test_logits_with_a_top_k_teacher(case, tail, backend):
    z, *lists, y = top_k_case(case)
    teacher = fk.TopK(*lists, tail)
    chosen = objectives(backend, tail)
    for objective in chosen if not slow(backend) else chosen[TOP_K_CASES.index(case) % len(chosen) :][:1]:
        options = {"reduction": "none"}
        tight = 2e-5 if tail == "listed" else 1e-5  # of few entries, gradients are small
        if tail in ("renormalize", "listed") and "unlisted" in case:
            check(
                evaluate(z, teacher, y, objective, backend=backend, temperature=0.5, **options),
                truth(z, teacher, y, objective, temperature=0.5, **options),
                tight,
                may_overflow(objective),
            )
        check(
            evaluate(z, teacher, y, objective, backend=backend, **options),
            truth(z, teacher, y, objective, **options),
            tight,
            may_overflow(objective),
        )


LIMITS = cases([0.0, 1.0], [(0.0, 0.0), (1.0, 0.0), (0.0, math.inf)], TAILS, backends=[TORCH, NATIVE, TRITON])


@pytest.mark.parametrize("lam, others, tail, backend", LIMITS, indirect=["backend"])
def test_scalars_at_their_limits_with_a_top_k_teacher(lam, others, tail, backend):
    beta, gamma = others
    z, *lists, y = top_k_case("plain")
    teacher = fk.TopK(*lists, tail)
    for plain in objectives(backend, tail):
        if isinstance(plain, Sum) or plain.name in ("alpha_beta", "renyi"):
            continue
        objective = with_numbers(type(plain), lam=lam, beta=beta, gamma=gamma)
        if allowed(objective, tail):
            options = {"reduction": "none"}
            actual = evaluate(z, teacher, y, objective, backend=backend, **options)
            check(actual, truth(z, teacher, y, objective, **options), 5e-6, may_overflow(objective))
            if gamma == math.inf and objective.name == "self_evolution":
                assert not actual[0].is_hard.any()


@pytest.mark.parametrize("form, backend", cases(TEACHERS, backends=[TORCH, NATIVE, TRITON]), indirect=["backend"])
def test_one_word_vocabulary(form, backend):
    teacher = torch.randn(2, 1)
    if form != "dense":
        teacher = fk.TopK(torch.tensor([[0.0], [-0.5]]), torch.zeros(2, 1, dtype=torch.long), form)
    for objective in objectives(backend, form):
        out, dz = evaluate(torch.randn(2, 1), teacher, torch.tensor([0, 0]), objective, backend=backend)
        level = 1e-3 * 4 * 10 if reads_level(objective) else 0.0
        assert out.loss.abs() < 1e-7 + level and dz.abs().max() <= 1e-7 + level


VALID = [pytest.param(x, id=name) for x, name in ((None, "no token"), (0, "all ignored"), (1, "one valid"))]
HARDLY = cases(VALID, TEACHERS, backends=[TORCH, NATIVE, TRITON])


@pytest.mark.parametrize("valid, form, backend", HARDLY, indirect=["backend"])
def test_hardly_any_token(valid, form, backend):
    """The mean over nothing is 0; the mean over one token is that token, wherever it stands."""
    p = problem(N=0 if valid is None else 4, V=61, ignored=1.1, bias=True)
    if valid:
        p.labels[2] = 5
    teacher = p.teacher() if form == "dense" else cached(p, 8, form)
    for objective in [*objectives(backend, form), fk.SelfEvolutionTopK(), fk.SFT()]:
        for reduction in ("mean", "none"):
            out = fk.kd_loss(p.student(), teacher, p.labels, objective, reduction=reduction, backend=backend)
            grads = gradients(out.loss.sum(), p.leaves)
            assert out.loss.shape == (() if reduction == "mean" else p.labels.shape)
            assert [g.shape for g in grads] == [x.shape for x in p.leaves]
            if not valid:
                assert not out.loss.any() and not out.difficulty.any() and not out.is_hard.any()
                assert not any(g.any() for g in grads)
                continue
            expected = reference_kd_loss(p.student(), teacher, p.labels, objective, reduction=reduction)
            assert relative(out.loss, expected.loss) < 2e-6 and torch.equal(out.is_hard, expected.is_hard)
            for g, r in zip(grads, gradients(expected.loss.sum(), p.leaves), strict=True):
                assert relative(g, r) < 1e-5
            assert not grads[0][[0, 1, 3]].any()


@pytest.mark.parametrize("form", ["dense", "uniform", "bucket"])
def test_a_real_padded_vocabulary(form):
    """Heads of 151936 and 152064 rows and a tokenizer of 151643: padding gets neither mass nor gradient."""
    V, wide, tokens = 151936, 152064, 151643
    p = problem(N=3, H=6, H_t=5, V=V, std=3.0, ignored=0.0, bias=True)
    p.labels.copy_(torch.tensor([0, 17, tokens - 1]))
    teacher: fk.LMHead | fk.TopK = fk.LMHead(p.hidden_t, torch.cat([p.weight_t, 9 * torch.ones(wide - V, 5)]))
    if form != "dense":
        cut = fk.LMHead(p.hidden_t, p.weight_t[:tokens])
        values, indices = (cut.hidden @ cut.weight.T).log_softmax(-1).topk(64)
        teacher = fk.TopK(values, indices, form)
    options = {"vocab_size": tokens}
    out = fk.kd_loss(p.student(), teacher, p.labels, fk.NoEvo(lam=0.7), **options)
    grads = gradients(out.loss, p.leaves)
    expected = reference_kd_loss(p.student(), teacher, p.labels, fk.NoEvo(lam=0.7), **options)
    assert relative(out.loss, expected.loss) < 1e-6
    for g, r in zip(grads, gradients(expected.loss, p.leaves), strict=True):
        assert relative(g, r) < 4e-6
    assert not grads[1][tokens:].any() and not grads[2][tokens:].any()
    with pytest.raises(ValueError, match="labels must be in \\[0, 151643\\)"):
        fk.kd_loss(p.student(), teacher, p.labels + 1, fk.NoEvo(), **options)


LAYOUTS = cases(["hidden", "logits"], TEACHERS, backends=[TORCH, NATIVE, TRITON])


@pytest.mark.parametrize("student, form, backend", LAYOUTS, indirect=["backend"])
def test_no_layout_matters(student, form, backend):
    """Transposed storage, slices with gaps and stride 0, on every tensor at once."""

    def repeated(x: Tensor) -> Tensor:
        return x[:1].expand(4, *x.shape[1:])

    def transposed(x: Tensor) -> Tensor:
        return x.T.contiguous().T

    def gaps(x: Tensor) -> Tensor:
        wide = torch.full((x.shape[0], *(2 * n for n in x.shape[1:])), math.nan).to(x.dtype)
        view = wide[:, : x.shape[1]] if x.dim() == 2 else torch.stack([x, x], 1).view(-1)[::2]
        return view.copy_(x)

    p = problem(N=4, V=61, ignored=0.0)
    weights = torch.rand(4)
    for layout in (repeated, transposed, gaps):
        vector = gaps if layout is transposed else layout
        leaf = (p.hidden @ p.weight.T).detach() if student == "logits" else p.hidden.detach()
        h_t = p.hidden_t @ p.weight_t.T if student == "logits" else p.hidden_t
        lists = cached(p, 8, form if form != "dense" else "bucket")
        results = []
        for strided in (False, True):

            def lay(x: Tensor, how=layout, strided=strided) -> Tensor:
                x = how(x)
                return x if strided else x.contiguous()

            source = lay(leaf).detach().requires_grad_()
            W, W_t = (x.detach() if layout is repeated else lay(x.detach()) for x in (p.weight, p.weight_t))
            leaves = [source] if student == "logits" else [source, W.requires_grad_()]
            teacher = lay(h_t) if student == "logits" else fk.LMHead(lay(h_t), W_t)
            if form != "dense":
                teacher = fk.TopK(lay(lists.log_probs), lay(lists.indices), form)
            out = fk.kd_loss(
                source if student == "logits" else fk.LMHead(source, W), teacher, lay(p.labels, vector),
                fk.SelfEvolution(gamma=1.0), token_weights=lay(weights, vector), backend=backend,
            )  # fmt: skip
            results.append([out.loss, out.difficulty, *gradients(out.loss, leaves)])
        for a, b in zip(*results, strict=True):
            assert relative(b, a) < 1e-6


@pytest.mark.parametrize("teacher, backend", cases(TEACHERS), indirect=["backend"])
def test_rows_left_out_and_weighted(teacher, backend):
    """As rows see them where labels are on an accelerator: whatever an ignored row holds, nothing comes of it."""
    V, y = 61, torch.tensor([4, -1, 60, 17])
    z, z_t, weights = torch.randn(4, V), torch.randn(4, V), torch.tensor([0.5, 3.0, 2.0, 0.0])
    objective = fk.SelfEvolution(gamma=2.0)
    scalars = scalars_of(objective)
    results = []
    for weighted in (None, weights):
        side = Logits(z_t, 1.0, None, True)
        if teacher != "dense":
            side, _ = sparse_teacher(*z_t.log_softmax(-1).topk(5), y, V, teacher)
        loss, difficulty, dlogits = (torch.full(shape, math.nan) for shape in ((4,), (4,), (4, V)))
        is_hard = torch.ones(4).bool()
        get_row(backend)(
            RowInputs(Logits(z, 1.0, None, True), side, y, weighted, scalars, objective.spec, False),
            RowOutputs(loss, difficulty, is_hard, dlogits),
        )
        assert loss[1] == difficulty[1] == 0 and not is_hard[1] and not dlogits[1].any()
        assert (loss[[0, 2, 3]] > 0).all()
        results.append((loss, difficulty, is_hard, dlogits))
    plain, scaled = results
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], scaled[:3], strict=True))
    assert plain[3][0].any() and relative(scaled[3], plain[3] * weights[:, None]) < 1e-6


@pytest.mark.parametrize("teacher, backend", cases(["dense", "bucket"]), indirect=["backend"])
def test_rows_beyond_2_31_elements(teacher, backend):
    """Rows 2^30 elements apart in memory of which only what is touched exists.

    The first lies 2^31 elements into it, so that an offset that wraps at 32 bits reads zeros instead of crashing.
    """
    V, gap, bf16 = 700, 2**30, torch.bfloat16
    memory = mmap.mmap(-1, 2 * (4 * gap + 4 * V), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    elements = torch.frombuffer(memory, dtype=bf16)

    def far(x: Tensor, slot: int) -> Tensor:
        return elements.as_strided((3, V), (gap, 1), 2 * gap + slot * V).copy_(x)

    def close_by(x: Tensor, slot: int) -> Tensor:
        """Aligned as the far ones are, which the order of sums may depend on."""
        return torch.empty(slot * V + 3 * 1024, dtype=bf16).as_strided((3, V), (1024, 1), slot * V).copy_(x)

    z, z_t, y = torch.randn(3, V).mul(2).to(bf16), torch.randn(3, V).mul(2).to(bf16), torch.tensor([4, -1, V - 1])
    values, indices = z_t.float().log_softmax(-1).topk(5)
    results = []
    for spread in (close_by, far):
        side = Logits(spread(z_t, 1), 1.0, None, True)
        if teacher == "bucket":
            side, malformed = sparse_teacher(values, indices, y, V, "bucket")
            assert not malformed.any()
        loss, difficulty, is_hard = torch.full((3,), math.nan), torch.full((3,), math.nan), torch.ones(3).bool()
        dlogits = spread(torch.full((3, V), math.nan, dtype=bf16), 2)
        objective = fk.SelfEvolution(gamma=1.0)
        scalars, spec = scalars_of(objective), objective.spec
        get_row(backend)(
            RowInputs(Logits(spread(z, 0), 1.0, None, False), side, y, None, scalars, spec, False),
            RowOutputs(loss, difficulty, is_hard, dlogits),
        )
        results.append([loss, difficulty, is_hard, dlogits.clone()])
    assert results[0][0].isfinite().all() and results[0][3].isfinite().all()
    for near, distant in zip(*results, strict=True):
        assert torch.equal(near, distant)


_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def test_a_list_without_entries_has_nothing_to_renormalize(monkeypatch):
    values, indices = torch.full((3, 2), -math.inf), torch.zeros(3, 2, dtype=torch.long)
    values[0] = -1.0
    indices[0, 1] = 1
    z, labels = torch.randn(3, 9), torch.tensor([0, -100, 2])
    with pytest.raises(ValueError, match=r"log_probs must list an entry above -inf .* got none at token 2"):
        fk.kd_loss(z, fk.TopK(values, indices, "renormalize"), labels, fk.NoEvo())
    for tail in ("uniform", "bucket"):  # all of its mass is in the tail
        check(
            evaluate(z, fk.TopK(values, indices, tail), labels, fk.NoEvo(), reduction="none"),
            truth(z, fk.TopK(values, indices, tail), labels, fk.NoEvo(), reduction="none"),
        )
    monkeypatch.setattr("fused_kd.ops.check_top_k", lambda *_: None)
    loss = fk.kd_loss(z, fk.TopK(values, indices, "renormalize"), labels, fk.NoEvo(), reduction="none").loss
    assert loss.isnan().tolist() == [False, False, True]


VALIDATED = cases([math.nan, math.inf], TEACHERS, backends=[TORCH, NATIVE, TRITON])


@pytest.mark.parametrize("value, form, backend", VALIDATED, indirect=["backend"])
def test_validate_names_the_first_bad_token_past_ignored_ones(value, form, backend):
    p = problem(N=6, V=61, ignored=0.0)
    p.labels[:2] = -100
    z = (p.hidden @ p.weight.T).detach()
    z[0, 3] = z[4, 60] = z[5, 0] = value
    teacher = p.teacher() if form == "dense" else cached(p, 8, form, padded=False)
    for objective in (fk.NoEvo(), fk.TotalVariation(), fk.SelfEvolution(gamma=0.0)):
        with pytest.raises(ValueError, match=r"must be finite or -inf; .* token 4"):
            fk.kd_loss(z, teacher, p.labels, objective, backend=backend, validate=True)


@pytest.mark.parametrize("tail, backend", cases(TAILS, backends=[TORCH, NATIVE, TRITON]), indirect=["backend"])
def test_uninitialised_memory_is_never_read_with_a_top_k_teacher(tail, backend, monkeypatch):
    def poisoned(shape, dtype, device, **_):
        x = torch.empty(shape, dtype=dtype, device=device)
        return x.fill_(math.nan if dtype.is_floating_point else True)

    for module in ("engines.chunks", "engines.head_gradient", "rows.torch.math", "rows.native.row"):
        monkeypatch.setattr(f"fused_kd.{module}.empty", poisoned)
    torch.use_deterministic_algorithms(True)  # torch.empty holds NaN too
    try:
        for dtype in (torch.float32, torch.bfloat16):
            p = problem(N=3, V=61, dtype=dtype, bias=True)
            for objective in objectives(backend, tail):
                cold = {} if tail == "bucket" else {"temperature": 2.0}
                labels, teacher = p.labels.clamp(max=59), cached(replace(p, weight_t=p.weight_t[:60]), 5, tail)
                out = fk.kd_loss(p.student(), teacher, labels, objective, backend=backend, vocab_size=60, **cold)
                assert out.loss.isfinite() and out.difficulty.isfinite().all()
                assert all(g.isfinite().all() for g in gradients(out.loss, p.leaves))
    finally:
        torch.use_deterministic_algorithms(False)


# Classes whose gradients do not jump, but where a gate does, and whose numbers may all be anything in [0, 1].
NOT_ANY = {*JUMPS, "adaptive_kl", "alpha_beta", "renyi", "entropy_gated"}
ANY = [o for o in TEACHED if not isinstance(o, Sum) and o.name not in NOT_ANY]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    N=st.integers(1, 9), V=st.integers(1, 40), share=st.floats(0, 1), std=st.floats(0.5, 6.0),
    tail=st.sampled_from(TAILS),
    lam=st.floats(0, 1), beta=st.floats(0, 1), gamma=st.floats(0, 3), T=st.floats(0.3, 4), padded=st.booleans(),
    objective=st.sampled_from(ANY),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_list_and_scalar(N, V, share, std, tail, lam, beta, gamma, T, padded, objective, seed):
    objective = with_numbers(type(objective), lam=lam, beta=beta, gamma=gamma)
    if not allowed(objective, tail):
        return
    p = problem(N, 5, 7, V, std=std, seed=seed)
    torch.manual_seed(seed)
    teacher = cached(p, 1 + round(share * (V - 1)), tail, padded=padded)
    z = (p.hidden @ p.weight.T).detach()
    options = {"reduction": "none", "temperature": T}
    if tail == "bucket":
        teacher = replace(teacher, temperature=T)
    out, dz = evaluate(z, teacher, p.labels, objective, **options)
    ref, dz_ref = truth(z, teacher, p.labels, objective, **options)
    same = out.is_hard == ref.is_hard
    if objective.name == "self_evolution":  # a gate may fall either way where it stands, and nowhere else
        assert ((ref.difficulty - gamma).abs()[~same] < 1e-5).all()
    elif not same.all():  # equal difficulties
        return
    assert ((out.loss - ref.loss).abs() <= 3e-6 * (1 + ref.loss.abs()))[same].all()
    assert ((out.difficulty - ref.difficulty).abs() <= 3e-6 * (1 + ref.difficulty)).all()
    assert ((dz - dz_ref).norm(dim=-1) <= 2e-5 * dz_ref.norm(dim=-1) + 1e-6)[same].all()
