"""Top-k teachers against the float64 oracle: every tail, objective and backend; and what malformed lists get."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_kd as fk
from fused_kd.inputs import TAILS
from fused_kd.reference import reference_kd_loss
from fused_kd.rows.top_k import sparse_teacher

from ..problems import JUMPS, OBJECTIVES, Problem, _Head, gradients, problem, relative, summands
from .contract import DTYPES, FP32, INTERPRETED, NEAR, ROUNDED, ROWS, cases, device_of, slow
from .ways import refused

TEACHED = [o for o in OBJECTIVES if not refused(o.spec, "uniform")]
TIGHT = 4e-6


def cached(p: Problem, K: int, tail: str = "renormalize", *, temperature: float = 1.0, padded: bool = True) -> fk.TopK:
    """The problem's teacher as a server would send it: K entries in no order, some lists shorter than K."""
    values, indices = (p.hidden_t @ p.weight_t.T).float().log_softmax(-1).topk(K)
    order = torch.rand(values.shape).argsort(-1).to(values.device)
    values, indices = values.gather(-1, order), indices.gather(-1, order)
    if padded and K > 2:
        values[::3, 1] = -math.inf
        indices[::3, 1] = -1
    return fk.TopK(values, indices, tail)


def compare(p: Problem, teacher: fk.TopK, objective, *, tight: float = TIGHT, head: dict | None = None, **options):
    """Fused loss and gradients against the oracle's."""
    head = head or {}
    backend = options.pop("backend", "torch")
    out = fk.kd_loss(
        fk.LMHead(p.hidden, p.weight, p.bias, **head), teacher, p.labels, objective, backend=backend, **options
    )
    grads = torch.autograd.grad(out.loss.sum(), p.leaves, retain_graph=True)
    options.pop("memory_budget", None)
    copies = [x.detach().double().requires_grad_() for x in p.leaves]
    student = _Head(*copies, *([None] * (3 - len(copies))), **head)
    expected = reference_kd_loss(student, teacher, p.labels, objective, **options)
    refs = gradients(expected.loss.sum(), copies)
    valid = p.labels != -100
    assert relative(out.loss, expected.loss) < tight
    assert torch.allclose(out.difficulty.double(), expected.difficulty, rtol=tight, atol=2e-6)
    assert torch.equal(out.is_hard, expected.is_hard) and out.is_hard[~valid].sum() == 0
    for a, r in zip(grads, refs, strict=True):
        assert relative(a, r) < tight
    return out


def rows(backend: str) -> int:
    return 5 if slow(backend) else 29


def allowed(objective, tail: str) -> bool:
    return not refused(objective.spec, tail)


@pytest.mark.parametrize("near, tail, objective, backend", cases(NEAR, TAILS, TEACHED), indirect=["backend"])
def test_matrix(near, tail, objective, backend):
    p = problem(rows(backend), std=3.0, near=near, bias=True, device=device_of(backend))
    if allowed(objective, tail):
        loose = near or summands(objective) & JUMPS
        compare(p, cached(p, 8, tail), objective, backend=backend, tight=2e-5 if loose else 1.5 * TIGHT)


SIZES = [(1, 5), (3, 3), (4, 5), (5, 5), (64, 300), (256, 2311)]


@pytest.mark.parametrize("sizes, tail, backend", cases(SIZES, TAILS), indirect=["backend"])
def test_sizes(sizes, tail, backend):
    """Lists of one and of the whole vocabulary, with the label in or out; rows longer than a kernel's block."""
    K, V = sizes
    p = problem(
        3 if slow(backend) else 7, V=1030 if backend == "cuda" and V > 1030 else V, std=2.0, device=device_of(backend)
    )
    compare(p, cached(p, K, tail, padded=False), fk.SelfEvolution(gamma=1.0), backend=backend)


RENORMALIZED = [o for o in TEACHED if allowed(o, "renormalize")]


@pytest.mark.parametrize("temperature, objective, backend", cases([0.7, 2.0], RENORMALIZED), indirect=["backend"])
def test_temperature(temperature, objective, backend):
    p = problem(rows(backend), std=2.0, device=device_of(backend))
    compare(p, cached(p, 8), objective, temperature=temperature, backend=backend, tight=1e-5)


OPTIONS = {
    "scale": {"head": {"logit_scale": 0.4}},
    "softcap": {"head": {"logit_scale": 2.0, "softcap": 5.0}},
    "vocab_size": {"vocab_size": 480},
    "none": {"reduction": "none"},
    "weights": {"token_weights": torch.rand(29, generator=torch.Generator().manual_seed(1))},
    "num_items": {"num_items": 7.0},
    "budget": {"memory_budget": 6 * (4 * 517 + 8 * 24 + 64 * 10 + 16)},
}


@pytest.mark.parametrize("option, tail, backend", cases(list(OPTIONS), TAILS), indirect=["backend"])
def test_options(option, tail, backend):
    p, options = problem(rows(backend), device=device_of(backend)), dict(OPTIONS[option])
    if "token_weights" in options:
        options["token_weights"] = options["token_weights"][: len(p.labels)].to(p.labels.device)
    p.labels.clamp_(max=479)
    teacher = cached(p, 8, tail)
    if "vocab_size" in options:
        outside = teacher.indices >= 480
        teacher = fk.TopK(teacher.log_probs.masked_fill(outside, -math.inf), teacher.indices, tail)
    tight = 1e-5 if slow(backend) else TIGHT  # of few rows one can be most of the norm
    compare(p, teacher, fk.SelfEvolution(gamma=1.0), backend=backend, tight=tight, **options)


@pytest.mark.parametrize("dtype, tail, backend", cases(DTYPES, TAILS), indirect=["backend"])
def test_dtypes(dtype, tail, backend):
    """Of hidden states, lists and ids; and of logits at hand, which are read alone."""
    p = problem(rows(backend), dtype=dtype, device=device_of(backend))
    teacher = cached(p, 8, tail)
    for ids in (torch.int32, torch.int64):
        lists = fk.TopK(teacher.log_probs.to(dtype), teacher.indices.to(ids), tail)
        compare(p, lists, fk.NoEvo(), backend=backend, tight=TIGHT if dtype == FP32 else 4e-3)
    z = (p.hidden @ p.weight.T).detach().requires_grad_()
    before = z.detach().clone()
    scale = 1024.0  # keeps fp16 gradients out of the subnormals, as a GradScaler does
    (dz,) = gradients(scale * fk.kd_loss(z, teacher, p.labels, fk.SelfEvolution(), backend=backend).loss, [z])
    z64 = z.detach().double().requires_grad_()
    (ref,) = gradients(scale * reference_kd_loss(z64, teacher, p.labels, fk.SelfEvolution()).loss, [z64])
    truncates = 2 if INTERPRETED and backend == "triton" else 1  # the interpreter truncates where a GPU rounds
    assert relative(dz, ref) < max(TIGHT, ROUNDED[dtype] * truncates)
    assert torch.equal(z.detach(), before)


@pytest.mark.parametrize("backend", ROWS, indirect=True)
def test_the_whole_vocabulary_listed_is_the_dense_teacher(backend):
    p = problem(rows(backend), V=61, device=device_of(backend))
    for tail in TAILS:
        dense, sparse = (
            fk.kd_loss(p.student(), teacher, p.labels, fk.SelfEvolution(), backend=backend)
            for teacher in (p.teacher(), cached(p, 61, tail, padded=False))
        )
        assert relative(sparse.loss, dense.loss) < 1e-6
        for a, r in zip(gradients(sparse.loss, p.leaves), gradients(dense.loss, p.leaves), strict=True):
            assert relative(a, r) < TIGHT


LABELLESS = [fk.GeneralizedJSD(), fk.SkewForward(), fk.SkewReverse(), fk.TotalVariation(), fk.AdaptiveKL()]


@pytest.mark.parametrize("objective, backend", cases(LABELLESS, kinds=("generalized_jsd",)), indirect=["backend"])
def test_a_label_that_is_not_read_stays_in_the_bucket(objective, backend):
    """Whatever label a token has, in the list or out of it, objectives without one have the same loss and gradient."""
    p, listed = problem(N=2, V=50, ignored=0.0, device=device_of(backend)), torch.tensor([3, 7, 9])
    teacher = fk.TopK(torch.tensor([[-1.0, -1.5, -3.0]] * 2), listed.expand(2, 3), "bucket")
    teacher = fk.TopK(teacher.log_probs.to(p.hidden.device), teacher.indices.to(p.hidden.device), "bucket")
    made = []
    for label in (7, 20, 49):
        p.labels = torch.full((2,), label, device=p.hidden.device)
        out = compare(p, teacher, objective, backend=backend, tight=2e-5)
        made.append((out.loss, out.difficulty, *gradients(out.loss, p.leaves)))
    for other in made[1:]:
        assert all(relative(a, b) < 1e-6 for a, b in zip(other, made[0], strict=True))


def test_lists_one_token_off_are_another_loss():
    """The mistake to fear with caches; here only that it cannot pass unnoticed."""
    p = problem(N=40, near=True, std=3.0, ignored=0.0)
    teacher = cached(p, 8)
    shifted = fk.TopK(teacher.log_probs.roll(1, 0), teacher.indices.roll(1, 0), teacher.tail)
    right, wrong = (fk.kd_loss(p.student(), t, p.labels, fk.NoEvo(lam=1.0)).loss for t in (teacher, shifted))
    assert wrong > 3 * right


def test_ids_beyond_16_bits():
    p = problem(N=5, H=8, H_t=8, V=70001, ignored=0.0)
    indices = torch.tensor([[70000, 65536, 4], [1, 65537, 69999], [65535, 70000, 2], [3, 4, 5], [65536, 0, 1]])
    values = torch.tensor([0.7, 0.2, 0.05]).log().expand(5, 3)
    compare(p, fk.TopK(values, indices, "bucket"), fk.NoEvo())


class Largest(TorchDispatchMode):
    """Remembers the largest tensor made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_no_row_of_the_teacher_is_made():
    """With logits at hand and no gradient wanted, nothing larger than a block of student rows is made."""
    p = problem(N=64, V=40000, H=4, H_t=4, ignored=0.0)
    z, teacher = (p.hidden @ p.weight.T).detach(), cached(p, 8)
    with Largest() as mode:
        fk.kd_loss(z, teacher, p.labels, fk.NoEvo())
    assert mode.numel <= 64 * 40000  # the chunk's view of z itself


@pytest.mark.parametrize("backend", ROWS, indirect=True)
def test_malformed_lists_cost_nan_where_looking_would_synchronise(backend, monkeypatch):
    monkeypatch.setattr("fused_kd.ops.check_top_k", lambda *_: None)
    p = problem(N=6, V=50, ignored=0.0, device=device_of(backend))
    teacher = cached(p, 4, padded=False)
    teacher.indices[1, 2] = 50
    teacher.indices[2, 0] = -3
    teacher.indices[3, 0] = teacher.indices[3, 1]
    teacher.log_probs[4, 0] = math.nan
    out = fk.kd_loss(p.student(), teacher, p.labels, fk.NoEvo(), backend=backend, reduction="none")
    assert out.loss.isnan().tolist() == [False, True, True, True, True, False]


LOG_PROBS, INDICES = torch.tensor([[-1.0, -2.0]] * 3), torch.tensor([[0, 1]] * 3)


@pytest.mark.parametrize("error, message, make", [
    (TypeError, "log_probs must be a tensor, got list", lambda: fk.TopK([[-1.0]], INDICES)),
    (TypeError, "log_probs must be float32, bfloat16 or float16, got torch.int64", lambda: fk.TopK(INDICES, INDICES)),
    (TypeError, "indices must be an int64 or int32 tensor, got torch.int16", lambda: fk.TopK(LOG_PROBS, INDICES.short())),
    (ValueError, "indices must have log_probs' shape (3, 2), got (2, 2)", lambda: fk.TopK(LOG_PROBS, INDICES[:2])),
    (ValueError, "log_probs must have shape (..., K) with K >= 1", lambda: fk.TopK(LOG_PROBS[:, :0], INDICES[:, :0])),
    (ValueError, "tail must be one of 'renormalize', 'uniform', 'bucket', 'listed', got 'ignore'", lambda: fk.TopK(LOG_PROBS, INDICES, "ignore")),
])  # fmt: skip
def test_errors_of_the_lists(error, message, make):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.parametrize("message, log_probs, indices, objective, options", [
    ("indices must be in [0, 9) where log_probs is not -inf, got 9 at token 1", None, [[0, 1], [9, 1], [0, 1]], fk.NoEvo(), {}),
    ("indices of a token must differ, got 4 twice at token 2", None, [[0, 1], [0, 1], [4, 4]], fk.NoEvo(), {}),
    ("with tail='bucket' (logits need 'renormalize' or 'listed'), got 0.5 at token 0", [[0.5, -1.0]] * 3, None, fk.NoEvo(), {"tail": "bucket"}),
    ("log_probs must be finite or -inf, got nan at token 0", [[math.nan, -1.0]] * 3, None, fk.NoEvo(), {}),
    ("log_probs must be finite or -inf, got inf at token 0", [[math.inf, -1.0]] * 3, None, fk.NoEvo(), {}),
    ("tail must be 'uniform', 'bucket' or 'listed' for ReverseKD", None, None, fk.ReverseKD(), {}),
    ("temperature must be 1 with tail='bucket'", None, None, fk.NoEvo(), {"tail": "bucket", "temperature": 2.0}),
    ("teacher must hold the student's tokens, shape (3,), got (2,)", [[-1.0, -2.0]] * 2, [[0, 1]] * 2, fk.NoEvo(), {}),
])  # fmt: skip
def test_errors_of_the_loss(message, log_probs, indices, objective, options):
    tail = options.pop("tail", "renormalize")
    teacher = fk.TopK(
        LOG_PROBS if log_probs is None else torch.tensor(log_probs),
        INDICES if indices is None else torch.tensor(indices),
        tail,
    )
    with pytest.raises(ValueError) as caught:
        fk.kd_loss(torch.randn(3, 9), teacher, torch.tensor([0, 1, 2]), objective, **options)
    options["tail"] = tail
    assert message in str(caught.value)


@pytest.mark.parametrize("tail", ["uniform", "bucket"])
def test_a_log_probability_of_one_rounded_up_is_one(tail):
    z, y = torch.randn(3, 9), torch.tensor([0, 1, 8])
    found, exact = (
        fk.kd_loss(z, fk.TopK(torch.tensor([[value, -18.0]] * 3), INDICES, tail), y, fk.ForwardKD(), reduction="none")
        for value in (1e-7, 0.0)
    )
    assert relative(found.loss, exact.loss) < 1e-6


@pytest.mark.parametrize("tail, value", [("uniform", 0.5), ("bucket", 0.5), ("renormalize", math.inf)])
def test_where_looking_would_wait_such_a_list_is_malformed(tail, value):
    values = LOG_PROBS.clone()
    values[1, 0] = value
    assert sparse_teacher(values, INDICES, torch.tensor([0, 1, 2]), 9, tail)[1].tolist() == [False, True, False]


def test_a_top_k_student_is_refused():
    with pytest.raises(TypeError, match="student must be an LMHead or a tensor of logits, got TopK"):
        fk.kd_loss(fk.TopK(LOG_PROBS, INDICES), LOG_PROBS, torch.tensor([0, 1, 0]), fk.NoEvo())


def test_compiles_whole_and_agrees():
    p = problem(V=61)
    criterion = fk.KDLoss(fk.SelfEvolution())
    teacher = cached(p, 8)

    def step(hidden, weight, log_probs, indices, labels):
        return criterion(fk.LMHead(hidden, weight), fk.TopK(log_probs, indices, "bucket"), labels)

    args = (p.hidden, p.weight, teacher.log_probs, teacher.indices, p.labels)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), step(*args))
    for a, r in zip(gradients(compiled(*args), p.leaves), gradients(step(*args), p.leaves), strict=True):
        assert relative(a, r) < 1e-6
