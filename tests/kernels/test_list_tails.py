"""What a list's tail says: over which entries both sides are, at which temperature, and with which mass beside."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fused_kd as fk
from fused_kd import objectives as o
from fused_kd.inputs import TAILS
from fused_kd.reference import reference_kd_loss

from ..problems import (
    CPU_BACKENDS,
    OBJECTIVES,
    amplified,
    gradients,
    label,
    may_overflow,
    needs_compiler,
    problem,
    relative,
)
from .contract import HOSTED, cases, device_of, slow
from .test_lists import allowed, cached, compare, rows

V, K = 23, 4
# In which nothing, one target or one term beside the divergence holds the label; all of it; and KL(q||p).
KINDS = (fk.GeneralizedJSD(beta=0.3), fk.NoEvo(lam=0.7), fk.ForwardKD(lam=0.3), fk.ReverseKD(lam=0.6))


def lists(N: int = 5, *, listed_label: bool | None = None, seed: int = 0) -> tuple[Tensor, fk.TopK, Tensor]:
    """Student's logits, a list and labels; ``listed_label`` None: some are in the list."""
    g = torch.Generator().manual_seed(seed)
    z, z_t = (2 * torch.randn(N, V, generator=g) for _ in range(2))
    values, indices = z_t.log_softmax(-1).topk(K)
    labels = torch.randint(0, V, (N,), generator=g) if listed_label is None else indices[:, 2]
    if listed_label is False:
        labels = z_t.argmin(-1)
    return z, fk.TopK(values, indices, "listed"), labels


def of(z: Tensor, teacher: fk.TopK, labels: Tensor, objective, **options) -> tuple[fk.KDOutput, Tensor]:
    leaf = z.detach().clone().requires_grad_()
    out = fk.kd_loss(leaf, teacher, labels, objective, reduction="none", **options)
    return out, gradients(out.loss.sum(), [leaf])[0]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("T", [1.0, 2.0])
def test_listed_is_a_dense_loss_over_the_list_alone(backend, T):
    """Whatever the others' logits; they get no gradient."""
    z, teacher, labels = lists(3 if slow(backend) else 5)
    objectives = (fk.GeneralizedJSD(beta=0.3), fk.SkewReverse(), o.SymmetricKL(), fk.TotalVariation())
    for objective in objectives[int(T) - 1 :: 2] if slow(backend) else objectives:
        alone, dz = of(
            z.gather(1, teacher.indices), teacher.log_probs, torch.zeros_like(labels), objective, temperature=T
        )
        moved = (5 * torch.randn_like(z)).scatter(1, teacher.indices, z.gather(1, teacher.indices))
        out, found = of(moved, teacher, labels, objective, temperature=T, backend=backend)
        assert relative(out.loss, alone.loss) < 2e-6
        assert relative(out.difficulty, alone.difficulty) < 4e-6
        assert relative(found.gather(1, teacher.indices), dz) < 4e-6
        assert not found.scatter(1, teacher.indices, 0.0).any()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("listed_label", [True, False])
def test_a_cross_entropy_beside_a_list_stays_over_the_vocabulary(backend, listed_label):
    """And the label out of the divergence and the difficulty; in a target, it joins the list."""
    z, teacher, labels = lists(3 if slow(backend) else 5, listed_label=listed_label)
    ce = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    log_p, log_q = (x.double().log_softmax(1) for x in (teacher.log_probs, z.gather(1, teacher.indices)))
    kl = (log_p.exp() * (log_p - log_q)).sum(1)
    out, dz = of(z, teacher, labels, fk.ForwardKD(lam=0.3), backend=backend)
    assert relative(out.loss, 0.7 * ce + 0.3 * kl) < 1e-6
    assert relative(out.difficulty, kl) < 1e-6
    assert dz.ne(0).all()  # the cross-entropy's
    entries = teacher.indices if listed_label else torch.cat([teacher.indices, labels[:, None]], 1)
    log_p = teacher.log_probs if listed_label else torch.nn.functional.pad(teacher.log_probs, (0, 1), value=-math.inf)
    position = torch.full_like(labels, 2 if listed_label else K)
    alone, own = of(z.gather(1, entries), log_p, position, fk.NoEvo(lam=0.7))
    out, dz = of(z, teacher, labels, fk.NoEvo(lam=0.7), backend=backend)
    assert relative(out.loss, alone.loss) < 1e-6 and relative(dz.gather(1, entries), own) < 4e-6
    whole, _ = of(z, teacher, labels, fk.NoEvo(lam=0.7) + fk.GeneralizedJSD(), backend=backend)
    jsd, _ = of(z.gather(1, entries), log_p, position, fk.GeneralizedJSD())
    assert relative(whole.loss, alone.loss + jsd.loss) < 2e-6


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_list_far_below_the_others_keeps_its_digits(backend):
    z, teacher, labels = lists()
    z[:, ::2] += 4096 * (~(torch.arange(V)[None, ::2, None] == teacher.indices[:, None]).any(2))
    out, dz = of(z, teacher, labels, fk.ReverseKD(lam=1.0), backend=backend)
    leaf = z.double().requires_grad_()
    expected = reference_kd_loss(leaf, teacher, labels, fk.ReverseKD(lam=1.0), reduction="none")
    assert relative(out.loss, expected.loss) < 1e-6
    assert relative(dz, gradients(expected.loss.sum(), [leaf])[0]) < 2e-6


TEACHED = [objective for objective in OBJECTIVES if objective.spec.needs_teacher]
# In the interpreter: a label beside a list of each tail, a gate, and KL(q||p).
IN_THE_INTERPRETER = [
    *(("forward_kd", tail) for tail in TAILS),
    ("self_evolution", "uniform"),
    ("reverse_kd", "bucket"),
]
FLATTENED = cases(TEACHED, TAILS, backends=HOSTED, few=lambda of, tail: (label(of), tail) in IN_THE_INTERPRETER)


@pytest.mark.parametrize("objective, tail, backend", [case for case in FLATTENED if allowed(*case.values[:2])])
def test_lists_taken_at_another_temperature(objective, tail, backend):
    """Against the oracle; a bucket at its own temperature alone."""
    p = problem(rows(backend), V=211, std=3.0, bias=True, device=device_of(backend))
    teacher = replace(cached(p, 8, tail), temperature=1.7)
    at = {"bucket": (1.7,), "uniform": (1.7, 1.0)}.get(tail, (1.0, 1.7))
    for T in at if backend == "torch" else at[:1]:
        compare(p, teacher, objective, temperature=T, backend=backend, tight=4e-5 if may_overflow(objective) else 2e-5)


@pytest.mark.parametrize("objective, tail, backend", cases(KINDS, ["uniform", "bucket"]), indirect=["backend"])
def test_an_exact_rest(objective, tail, backend):
    """Of a sharp teacher, whose ``1 - sum p`` is 0 after a softmax in fp32."""
    p = problem(rows(backend), V=211, std=2.0, device=device_of(backend))
    z_t = (p.hidden_t @ p.weight_t.T).double()
    z_t = z_t.scatter_add(1, z_t.argmax(1, keepdim=True), torch.full_like(z_t[:, :1], 25.0))
    log_p, order = z_t.log_softmax(1).sort(1, descending=True)
    listed = z_t.float().log_softmax(1).gather(1, order[:, :6])
    teacher = fk.TopK(listed, order[:, :6], tail, log_rest=log_p[:, 6:].logsumexp(1).float())
    found = compare(p, teacher, objective, backend=backend, tight=1e-5)
    if tail == "bucket" and objective == fk.ReverseKD(lam=0.6):
        guessed = replace(teacher, log_rest=None)
        assert fk.kd_loss(p.student(), guessed, p.labels, objective, backend=backend).loss == math.inf
        assert found.loss < 60.0


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_bucket_is_the_sum_of_the_others_at_the_temperature_of_both(backend):
    z, teacher, labels = lists()
    z_t, T = 3 * torch.randn(len(z), V), 2.5
    log_p, order = (z_t / T).log_softmax(1).sort(1, descending=True)
    teacher = fk.TopK(log_p[:, :K], order[:, :K], "bucket", temperature=T, log_rest=log_p[:, K:].logsumexp(1))
    leaf = z.double().requires_grad_()
    log_q = (leaf / T).log_softmax(1).gather(1, order)
    merged = [torch.cat([x[:, :K], x[:, K:].logsumexp(1, keepdim=True)], 1) for x in (log_p.double(), log_q)]
    expected = (merged[1].exp() * (merged[1] - merged[0])).sum(1)
    out, dz = of(z, teacher, labels, fk.GeneralizedJSD(beta=1.0), temperature=T, backend=backend)
    assert relative(out.loss, expected) < 4e-6 and relative(dz, gradients(expected.sum(), [leaf])[0]) < 4e-6


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_uniform_tail_is_flattened_whole(backend):
    z, teacher, labels = lists()
    teacher = replace(teacher, tail="uniform", temperature=0.5)
    rest = (1 - teacher.log_probs.exp().sum(1, keepdim=True)) / (V - K)
    dense = rest.log().expand(-1, V).scatter(1, teacher.indices, teacher.log_probs) * 0.5
    for objective in (fk.ReverseKD(lam=0.4), fk.NoEvo()):
        out, dz = of(z, teacher, labels, objective, temperature=3.0, backend=backend)
        expected, own = of(z, dense, labels, objective, temperature=3.0)
        assert relative(out.loss, expected.loss) < 2e-6 and relative(dz, own) < 4e-6


def test_an_exact_rest_is_not_read_where_the_list_is_all():
    z, teacher, labels = lists()
    for tail in ("renormalize", "listed"):
        made = [of(z, replace(teacher, tail=tail, log_rest=x), labels, fk.NoEvo()) for x in (None, z[:, 0] * math.nan)]
        assert torch.equal(made[0][0].loss, made[1][0].loss)


# Divergences that are never negative: KL in both directions, mixtures, and total variation.
NEVER_NEGATIVE = [
    *(fk.ForwardKD(lam=1.0), fk.ReverseKD(lam=1.0), fk.GeneralizedJSD(beta=0.3), fk.SkewForward(), fk.SkewReverse()),
    *(fk.NoEvo(lam=0.9), fk.Skew(lam=0.9, beta=0.3), fk.SkewTeacher(lam=1.0), fk.SelfEvolution(lam=0.8, gamma=0.5)),
    *(fk.TotalVariation(), fk.AdaptiveKL(), o.SymmetricKL(), o.AlphaBeta(), o.ToDi(), o.Acceptance()),
    *(o.SkewReverseDetached(), o.EntropyGated(tau=0.5), fk.ForwardKD(lam=1.0) + fk.ReverseKD(lam=1.0)),
]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    objective=st.sampled_from(NEVER_NEGATIVE), tail=st.sampled_from(TAILS), exact=st.booleans(),
    V=st.sampled_from([1, 2, 7, 300]), share=st.sampled_from([0.0, 0.2, 0.9, 1.0]),
    std=st.sampled_from([0.01, 1.0, 5.0, 50.0]), apart=st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 3.0]),
    T=st.sampled_from([1.0, 0.3, 4.0]), dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 9),
    backend=st.sampled_from(["torch"] if needs_compiler.args[0] else ["torch", "native"]),
)  # fmt: skip
def test_never_negative(objective, tail, exact, V, share, std, apart, T, dtype, seed, backend):
    """Beyond rounding: near sides, sharp teachers, lists that hold nearly all, all of the vocabulary, or one entry."""
    if not allowed(objective, tail):
        return
    g = torch.Generator().manual_seed(seed)
    z_t = std * torch.randn(8, V, generator=g)
    z = z_t + apart * torch.randn(8, V, generator=g)
    taken_at = T if tail == "bucket" else 1.0
    count = 1 + round(share * (V - 1))
    log_p, order = (z_t.double() / taken_at).log_softmax(1).sort(1, descending=True)
    log_rest = log_p[:, count:].logsumexp(1).float() if exact and count < V else None
    teacher = fk.TopK(log_p[:, :count].to(dtype), order[:, :count], tail, taken_at, log_rest)
    labels = torch.randint(0, V, (8,), generator=g)
    out, dz = of(z, teacher, labels, objective, temperature=T, backend=backend)
    # a rounding of 1, and those of logits over T
    rounding = 1e-6 * amplified(objective) + 2**-23 * z.abs().maximum(z_t.abs()).amax(1) / T
    assert (out.loss >= -rounding).all()
    assert (out.difficulty >= 0).all() and dz.isfinite().all()


MATRIX = torch.full((3, 2), -1.0)
IDS = torch.tensor([[0, 1]] * 3)


@pytest.mark.parametrize("error, message, make", [
    (ValueError, "temperature must be in [1e-08, 1e+12], got 0", lambda: fk.TopK(MATRIX, IDS, temperature=0)),
    (TypeError, "temperature must be a number in [1e-08, 1e+12], got tensor(1.)", lambda: fk.TopK(MATRIX, IDS, temperature=torch.tensor(1.0))),
    (TypeError, "log_rest must be a tensor, got float", lambda: fk.TopK(MATRIX, IDS, log_rest=-1.0)),
    (TypeError, "log_rest must be float32, bfloat16 or float16, got torch.float64", lambda: fk.TopK(MATRIX, IDS, log_rest=MATRIX[:, 0].double())),
    (ValueError, "log_rest must have log_probs' shape without K, (3,), got (3, 1)", lambda: fk.TopK(MATRIX, IDS, log_rest=MATRIX[:, :1])),
    (ValueError, "log_rest is on meta, log_probs on cpu; they must share one", lambda: fk.TopK(MATRIX, IDS, log_rest=MATRIX[:, 0].to("meta"))),
])  # fmt: skip
def test_errors_of_the_list(error, message, make):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.parametrize("message, objective, tail, options", [
    ("temperature must be 1 with tail='bucket', whose mass is known at that of the list alone, got 2.0; list at the temperature of the loss, as fk.top_k_of(head, k, temperature=T)", fk.NoEvo(), "bucket", {"temperature": 2.0}),
    ("temperature must be 1 with tail='bucket'", fk.NoEvo(), "bucket", {"temperature": torch.ones(3)}),
    ("temperature must be 2 with tail='bucket'", fk.NoEvo(), "bucket", {"taken_at": 2.0}),
    ("tail must be 'uniform' for SFT", fk.SFT() + 0.1 * fk.NoEvo() + 1e-3 * o.ZLoss(), "listed", {}),
    ("tail must be 'uniform' or 'bucket' for NoEvo(lam=0.5) + ReverseKD(lam=0.5), which is infinite where the teacher is 0, got 'listed'", fk.NoEvo() + fk.ReverseKD(), "listed", {}),
    ("log_rest must be at most 0 and not NaN, got 0.5 at token 1", fk.NoEvo(), "bucket", {"log_rest": [-1.0, 0.5, -1.0]}),
    ("log_rest must be at most 0 and not NaN, got nan at token 0", fk.NoEvo(), "uniform", {"log_rest": [math.nan, 0.5, -1.0]}),
    ("log_probs must list an entry above -inf with tail='listed', got none at token 0", fk.NoEvo(), "listed", {"log_probs": MATRIX - math.inf}),
    ("log_probs must be finite or -inf, got inf at token 0", fk.NoEvo(), "listed", {"log_probs": MATRIX + math.inf}),
])  # fmt: skip
def test_errors_of_the_loss(message, objective, tail, options):
    given = dict(options)
    log_rest = given.pop("log_rest", None)
    teacher = fk.TopK(
        given.pop("log_probs", MATRIX), IDS, tail, given.pop("taken_at", 1.0),
        None if log_rest is None else torch.tensor(log_rest),
    )  # fmt: skip
    with pytest.raises(ValueError) as caught:
        fk.kd_loss(torch.randn(3, 9), teacher, torch.tensor([0, 1, 2]), objective, **given)
    assert message in str(caught.value)


def test_repr_says_what_is_not_the_default():
    assert repr(fk.TopK(MATRIX, IDS)) == "TopK((3, 2), float32, tail='bucket')"
    long = fk.TopK(MATRIX, IDS, "bucket", 2.0, MATRIX[:, 0])
    assert repr(long) == "TopK((3, 2), float32, tail='bucket', temperature=2.0, log_rest)"


@pytest.mark.parametrize("objective, tail, backend", cases(KINDS, ["uniform", "listed"]), indirect=["backend"])
def test_numbers_of_each_token(objective, tail, backend):
    p = problem(rows(backend), V=211, std=2.0, device=device_of(backend))
    T, lam = (0.5 + torch.rand(len(p.labels), device=p.labels.device) for _ in range(2))
    if objective.spec.reads_label:
        objective = type(objective)(lam=lam - 0.5)
    compare(p, cached(p, 8, tail), objective, temperature=T, backend=backend, tight=2e-5)


def test_compiles_whole_with_an_exact_rest():
    z, teacher, labels = lists()
    rest = torch.full_like(z[:, 0], -3.0)

    def step(z, log_probs, indices, log_rest, labels):
        lists = fk.TopK(log_probs, indices, "bucket", temperature=2.0, log_rest=log_rest)
        return fk.kd_loss(z, lists, labels, fk.ReverseKD(), temperature=2.0).loss

    args = (z, teacher.log_probs, teacher.indices, rest, labels)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(*args), step(*args))
