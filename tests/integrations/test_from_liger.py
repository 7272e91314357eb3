"""docs/from_liger.md against the real liger-kernel: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_kd as fk

from .. import interpreter

pytest.importorskip("liger_kernel", reason="needs the package that the page compares with")
pytest.importorskip("transformers")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip(interpreter.NEEDED, allow_module_level=True)

from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # noqa: E402
from liger_kernel.transformers import (  # noqa: E402
    LigerFusedLinearCrossEntropyLoss,
    LigerFusedLinearJSD,
    LigerFusedLinearKLDivLoss,
)

from fused_kd.integrations.transformers import hidden_states, lm_head_of  # noqa: E402
from fused_kd.training.collate import Collator  # noqa: E402

from ..training.tiny import rows, tiny  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")]
if not INTERPRETED:
    pytestmark.append(pytest.mark.gpu)
PAGE = Path(__file__).parents[2] / "docs" / "from_liger.md"
# relative: one call, and a whole run
CALL, RUN = 1e-5, 1e-4
BETAS = [0.0, 0.1, 0.5, 1.0]
N, H_S, H_T, V = 10, 8, 12, 37


class Problem:
    """Hidden states, heads and labels, three of them ignored; ``labels`` on the device, as Liger wants them."""

    def __init__(self, teacher_vocab: int = V) -> None:
        self.h_s = torch.randn(N, H_S, device=DEVICE).requires_grad_()
        self.W_s = torch.randn(V, H_S, device=DEVICE).requires_grad_()
        self.h_t, self.W_t = torch.randn(N, H_T, device=DEVICE), torch.randn(teacher_vocab, H_T, device=DEVICE)
        self.labels = torch.randint(V, (N,), device=DEVICE)
        self.labels[[1, 4, 9]] = -100

    def liger(self, criterion: Any, labels: Tensor | None) -> Tensor:
        return criterion(self.h_s, self.W_s, self.h_t, self.W_t, labels)

    def ours(self, objective: fk.objectives.Objective, labels: Tensor, **options: Any) -> Tensor:
        teacher = None if isinstance(objective, fk.SFT) else fk.LMHead(self.h_t, self.W_t)
        return fk.KDLoss(objective, **options)(fk.LMHead(self.h_s, self.W_s), teacher, labels)

    def assert_equal(self, found: Tensor, expected: Tensor, limit: float = CALL) -> None:
        """Values, and the gradients of three times their sum: Liger scales those of 1 in a way of its own."""
        gradients = [torch.autograd.grad(3 * loss.sum(), (self.h_s, self.W_s)) for loss in (found, expected)]
        for mine, theirs in ((found.detach(), expected.detach()), *zip(*gradients, strict=True)):
            assert float(theirs.norm()) > 0
            assert float((mine - theirs).norm()) <= limit * float(theirs.norm())


@pytest.fixture
def problem() -> Problem:
    return Problem()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_fused_linear_jsd(problem: Problem, beta: float, temperature: float) -> None:
    """β and its limits, the mean over valid tokens, no factor T²."""
    expected = problem.liger(LigerFusedLinearJSD(jsd_beta=beta, temperature=temperature), problem.labels)
    problem.assert_equal(problem.ours(fk.GeneralizedJSD(beta=beta), problem.labels, temperature=temperature), expected)


def test_fused_linear_jsd_reads_no_label(problem: Problem) -> None:
    """Only which tokens are ignored; None ignores none; none left is 0. Ours must be labels nevertheless."""
    criterion, beyond = LigerFusedLinearJSD(), torch.full_like(problem.labels, V + 7)
    for labels in (None, beyond):
        every = problem.ours(fk.GeneralizedJSD(), torch.zeros_like(problem.labels))
        problem.assert_equal(every, problem.liger(criterion, labels))
    with pytest.raises(ValueError, match="labels"):
        problem.ours(fk.GeneralizedJSD(), beyond.cpu())
    with pytest.raises(AssertionError, match="shape of shift_labels"):
        problem.liger(criterion, beyond[None])
    ignored = torch.full_like(problem.labels, -100)
    with torch.no_grad():
        assert float(problem.liger(criterion, ignored)) == float(problem.ours(fk.GeneralizedJSD(), ignored)) == 0.0


def generalized_jsd(log_p: Tensor, log_q: Tensor, labels: Tensor) -> Tensor:
    """At β = 0.5, from any numbers, of which the mean over valid tokens is taken."""
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
    rows = 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)
    return rows[labels != -100].mean()


def test_unequal_vocabularies() -> None:
    """A teacher of six more columns: cut after the softmax, given to the student as zeros, or refused."""
    problem = Problem(teacher_vocab=V + 6)
    z_t = problem.h_t @ problem.W_t.T
    with torch.no_grad():
        z_s = problem.h_s @ problem.W_s.T
        cut_late = generalized_jsd(z_t.log_softmax(-1)[:, :V], z_s.log_softmax(-1), problem.labels)
        value = problem.liger(LigerFusedLinearJSD(), problem.labels)
    assert float(value) == pytest.approx(float(cut_late), rel=CALL)
    zeros = F.pad(problem.h_s @ problem.W_s.T, (0, 6)).log_softmax(-1)
    chunked = LigerFusedLinearJSDLoss(0.0, 1.0, compiled=False)
    expected = problem.liger(chunked, problem.labels)
    problem.assert_equal(generalized_jsd(z_t.log_softmax(-1), zeros, problem.labels), expected)
    with pytest.raises(ValueError, match="unequal vocabularies"):
        problem.ours(fk.GeneralizedJSD(), problem.labels)
    both = generalized_jsd(z_t[:, :V].log_softmax(-1), (problem.h_s @ problem.W_s.T).log_softmax(-1), problem.labels)
    problem.assert_equal(problem.ours(fk.GeneralizedJSD(), problem.labels, vocab_size=V), both)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("weights", [None, (0.0, 1.0), (0.3, 0.9)], ids=["defaults", "soft", "both"])
def test_chunked_jsd(problem: Problem, beta: float, temperature: float, weights: tuple[float, float] | None) -> None:
    """Its weights of cross-entropy, at temperature 1, and divergence: one half each unless told."""
    options: dict[str, Any] = (
        {} if weights is None else {"weight_hard_loss": weights[0], "weight_soft_loss": weights[1]}
    )
    criterion = LigerFusedLinearJSDLoss(beta=beta, temperature=temperature, compiled=False, chunk_size=4, **options)
    hard, soft = weights or (0.5, 0.5)
    objectives = [hard * fk.SFT() + soft * fk.GeneralizedJSD(beta=beta)]
    if beta in (0.0, 1.0):
        objectives.append((hard + soft) * (fk.ForwardKD if beta == 0.0 else fk.ReverseKD)(lam=soft / (hard + soft)))
    for objective in objectives:
        found = problem.ours(objective, problem.labels, temperature=temperature)
        problem.assert_equal(found, problem.liger(criterion, problem.labels))


def test_chunked_jsd_with_biases(problem: Problem) -> None:
    biases = torch.randn(V, device=DEVICE), torch.randn(V, device=DEVICE)
    tensors = problem.h_s, problem.W_s, problem.h_t, problem.W_t, problem.labels
    expected = LigerFusedLinearJSDLoss(0.0, 1.0, compiled=False)(*tensors, *biases)
    student, teacher = fk.LMHead(*tensors[:2], bias=biases[0]), fk.LMHead(*tensors[2:4], bias=biases[1])
    problem.assert_equal(fk.KDLoss(fk.GeneralizedJSD())(student, teacher, problem.labels), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_fused_linear_kl_div(problem: Problem, reduction: str, temperature: float) -> None:
    """The temperature is the student's alone; "mean" divides by V as well."""
    p = (problem.h_t @ problem.W_t.T).softmax(-1)
    criterion = LigerFusedLinearKLDivLoss(reduction=reduction, temperature=temperature)
    expected = criterion(problem.h_s, problem.W_s, p, problem.labels)
    options: dict[str, Any] = {"temperature": temperature, "reduction": "sum" if reduction == "sum" else "mean"}
    criterion = fk.KDLoss(fk.GeneralizedJSD(beta=0.0), **options)
    found = criterion(fk.LMHead(problem.h_s, problem.W_s), temperature * p.log(), problem.labels)
    problem.assert_equal(found / V if reduction == "mean" else found, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_fused_linear_cross_entropy(problem: Problem, reduction: str) -> None:
    bias = torch.randn(V, device=DEVICE)
    criterion = LigerFusedLinearCrossEntropyLoss(reduction=reduction)
    expected = criterion(problem.W_s, problem.h_s, problem.labels, bias)
    head = fk.LMHead(problem.h_s, problem.W_s, bias=bias)
    problem.assert_equal(fk.KDLoss(fk.SFT(), reduction=reduction)(head, None, problem.labels), expected)


def test_options_of_cross_entropy(problem: Problem) -> None:
    """The page's table: the z-loss, class weights, smoothed labels."""
    head, labels = fk.LMHead(problem.h_s, problem.W_s), problem.labels

    def theirs(**options: Any) -> Tensor:
        return LigerFusedLinearCrossEntropyLoss(**options)(problem.W_s, problem.h_s, labels)

    z_loss = fk.KDLoss(fk.SFT() + 0.1 * fk.ZLoss())(head, None, labels)
    problem.assert_equal(z_loss, theirs(lse_square_scale=0.1))
    w = torch.rand(V, device=DEVICE) + 0.5
    weighted = fk.KDLoss(fk.SFT())(head, None, labels, token_weights=w[labels.clamp(min=0)])
    # of PyTorch's, which Liger's means: its own does not run in the interpreter
    problem.assert_equal(weighted, F.cross_entropy(problem.h_s @ problem.W_s.T, labels, weight=w))
    eps = 0.2
    zeros = torch.zeros(V, device=DEVICE).expand(N, V)
    smoothed = fk.KDLoss(fk.NoEvo(lam=eps))(head, zeros, labels)
    target = torch.full((V,), eps / V)
    target[0] += 1 - eps
    problem.assert_equal(smoothed - torch.xlogy(target, target).sum().to(DEVICE), theirs(label_smoothing=eps))


def blocks() -> list[tuple[bool, str]]:
    """The page's Python: whether it is Liger's, and the code."""
    fences = re.findall(r"^```python( no-run)?\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [(bool(theirs), code) for theirs, code in fences]


@pytest.mark.skipif(not INTERPRETED, reason="the page's tensors are on the CPU")
def test_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block of Liger's and the one after it: the same loss and gradients."""
    # compiled=True, its default, takes a minute
    monkeypatch.setattr(
        LigerFusedLinearJSDLoss.__init__, "__defaults__", (0.5, 0.5, 0.5, -100, 1.0, False, 1024, False)
    )
    page = blocks()
    names: dict[str, Any] = {}
    pairs = 0
    for number, (theirs, code) in enumerate(page):
        exec(compile(code, f"{PAGE} {number}", "exec"), names)
        if number and page[number - 1][0]:
            assert not theirs
            inputs = names["h_s"], names["W_s"]
            if names["after"].grad_fn is not None and "backward" in code:
                mine = [x.grad.clone() for x in inputs]
            else:
                mine = list(torch.autograd.grad(names["after"], inputs))
            for found, expected in zip(mine, torch.autograd.grad(names["before"], inputs), strict=True):
                assert float((found - expected).norm()) <= CALL * float(expected.norm())
            assert float(names["after"]) == pytest.approx(float(names["before"]), rel=CALL)
            pairs += 1
    assert pairs == sum(theirs for theirs, _ in page) == 7
    # the block with shift=True: six tokens a row, of which each but the last predicts the next
    z_s, z_t = ((names[f"h_{x}"] @ names[f"W_{x}"].T).view(2, 6, -1)[:, :-1].log_softmax(-1) for x in "st")
    expected = generalized_jsd(z_t, z_s, names["labels"].view(2, 6)[:, 1:])
    assert float(names["rows"]) == pytest.approx(float(expected), rel=CALL)


def curve(loss_of: Callable[..., Tensor], steps: int = 12) -> tuple[list[float], list[Tensor]]:
    """Losses and final weights of a tiny Llama distilled with AdamW."""
    student, teacher = tiny(16, seed=1).to(DEVICE), tiny(24, seed=2).to(DEVICE).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    data, losses = rows(2 * steps), []
    for step in range(steps):
        inputs = {name: value.to(DEVICE) for name, value in Collator(0)(data[2 * step : 2 * step + 2]).items()}
        labels = inputs.pop("labels")
        with torch.no_grad():
            target = lm_head_of(teacher, hidden_states(teacher, **inputs))
        loss = loss_of(lm_head_of(student, hidden_states(student, **inputs)), target, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses, [value.detach() for value in student.parameters()]


def test_swap_in_a_training_run() -> None:
    """The same loss curve and the same final weights."""
    liger = LigerFusedLinearJSD(jsd_beta=0.1, temperature=1.5)
    ours = fk.KDLoss(fk.GeneralizedJSD(beta=0.1), temperature=1.5, shift=True)

    def theirs(student: fk.LMHead, teacher: fk.LMHead, labels: Tensor) -> Tensor:
        flat = [head.hidden[:, :-1].reshape(-1, head.hidden.shape[-1]) for head in (student, teacher)]
        return liger(flat[0], student.weight, flat[1], teacher.weight, labels[:, 1:].reshape(-1))

    (before, expected), (after, found) = curve(theirs), curve(ours)
    assert after == pytest.approx(before, rel=RUN)
    assert min(before) < 0.8 * before[0], "it must learn"
    for mine, his in zip(found, expected, strict=True):
        assert float((mine - his).norm()) <= RUN * float(his.norm())
