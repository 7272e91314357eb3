"""Token weights and denominators: right where tokens are ignored, refused where they make no sense."""

from __future__ import annotations

import math
import re

import pytest
import torch

import fused_kd as fk
from fused_kd.reference import reference_kd_loss
from fused_kd.tokens import _tokens

from ..problems import furthest, gradients, problem, relative

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("options", [{}, {"num_items": 6}, {"num_items": torch.tensor(6)}, {"reduction": "sum"},
                                     {"reduction": "none"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("value", [NAN, INF, -1.0, 7.0])
def test_weights_of_ignored_tokens_are_not_read(value, options):
    p = problem()
    weights = torch.rand(29)
    weights[p.labels == -100] = value
    given = {"token_weights": weights, **options}
    out = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.SelfEvolution(), **given)
    expected = reference_kd_loss(p.student(), p.teacher(), p.labels, fk.SelfEvolution(), **given)
    assert relative(out.loss, expected.loss) < 4e-6
    assert furthest(gradients(out.loss.sum(), p.leaves), gradients(expected.loss.sum(), p.leaves)) < 4e-6


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen head"])
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_what_is_done_with_the_zero_of_an_ignored_token_does_not_matter(compiled, frozen):
    p = problem()
    factors = torch.where(p.labels == -100, NAN, 2.0)
    criterion = fk.KDLoss(fk.Skew(), reduction="none")

    def step(hidden, weight):
        return criterion(fk.LMHead(hidden, weight), p.teacher(), p.labels)

    leaves = [p.hidden] if frozen else p.leaves
    make = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    loss = make(p.hidden, p.weight.detach() if frozen else p.weight)
    found = torch.autograd.grad(loss, leaves, factors)
    expected = gradients(2.0 * fk.kd_loss(p.student(), p.teacher(), p.labels, fk.Skew(), reduction="sum").loss, leaves)
    assert furthest(found, expected) < 1e-6


def test_weight_zero_takes_an_infinite_loss_out():
    z, z_t, y = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5), torch.tensor([0, 1, 2])
    with torch.no_grad():
        z[1, 1] = -INF
    out = fk.kd_loss(z, z_t, y, fk.NoEvo(), token_weights=torch.tensor([1.0, 0.0, 2.0]))
    expected = fk.kd_loss(z[[0, 2]], z_t[[0, 2]], y[[0, 2]], fk.NoEvo(), token_weights=torch.tensor([1.0, 2.0]))
    assert relative(out.loss, expected.loss) < 1e-6
    assert gradients(out.loss, [z])[0][1].abs().sum() == 0


def weighted(value: float, at: int = 3) -> torch.Tensor:
    return torch.ones(29).index_fill(0, torch.tensor([at]), value)


BAD = [
    ({"num_items": torch.tensor(NAN)}, "num_items must be a number in [1e-37, 1e+37], got nan"),
    ({"num_items": torch.tensor(-3)}, "num_items must be a number in [1e-37, 1e+37], got -3"),
    ({"num_items": torch.tensor(0)}, "num_items must be a number in [1e-37, 1e+37], got 0"),
    ({"num_items": torch.tensor(INF)}, "num_items must be a number in [1e-37, 1e+37], got inf"),
    ({"num_items": NAN}, "num_items must be positive, a number in [1e-37, 1e+37], got nan"),
    ({"num_items": INF}, "num_items must be positive, a number in [1e-37, 1e+37], got inf"),
    ({"num_items": -2}, "num_items must be positive, a number in [1e-37, 1e+37], got -2"),
    ({"num_items": 1e-46}, "num_items must be positive, a number in [1e-37, 1e+37], got 1e-46"),
    ({"num_items": torch.tensor(True)}, "num_items must be a real number, got a tensor of torch.bool"),
    ({"num_items": torch.tensor(1j)}, "num_items must be a real number, got a tensor of torch.complex64"),
    ({"num_items": torch.tensor(2.0, requires_grad=True)}, "num_items must be a constant"),
    ({"num_items": torch.ones(2)}, "num_items must be one number, got a tensor of shape (2,)"),
    ({"token_weights": weighted(-0.5)}, "token_weights must be finite and at least 0 (or signed=True), got -0.5 at token 3"),
    ({"token_weights": weighted(NAN)}, "token_weights must be finite and at least 0 (or signed=True), got nan at token 3"),
    ({"token_weights": weighted(INF), "reduction": "sum"}, "token_weights must be finite and at least 0 (or signed=True), got inf"),
    ({"token_weights": weighted(1.0).double() * 1e39}, "token_weights must be finite and at least 0 (or signed=True), got inf at token"),
    ({"token_weights": torch.full((29,), 1e-40)}, "token_weights of the valid tokens must add up to 0 or a number in"),
]  # fmt: skip


@pytest.mark.parametrize("options, message", BAD, ids=lambda x: x[-30:] if isinstance(x, str) else "")
def test_refused(options, message):
    p = problem(ignored=0.0)
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        fk.kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo(), **options)


def test_refused_in_a_compiled_step_too():
    p = problem(ignored=0.0)
    criterion = fk.KDLoss(fk.NoEvo())
    step = torch.compile(lambda n: criterion(p.student(), p.teacher(), p.labels, num_items=n), backend="aot_eager")
    assert relative(step(torch.tensor(29.0)), criterion(p.student(), p.teacher(), p.labels)) < 1e-6
    with pytest.raises(ValueError, match="got nan"):
        step(torch.tensor(NAN))


@pytest.mark.parametrize("bad", ["weights", "num_items"])
def test_where_looking_would_wait_bad_ones_are_nan(bad, monkeypatch):
    """Tensors that say they are elsewhere stand for an accelerator's."""

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

    labels = torch.tensor([0, 1, -100]).as_subclass(Elsewhere)
    weights = torch.tensor([1.0, -1.0 if bad == "weights" else 1.0, NAN])
    items = torch.tensor(NAN if bad == "num_items" else 2.0).as_subclass(Elsewhere)
    cpu = torch.device("cpu")
    _, found, scale = _tokens(labels, weights, items, 2, -100, True, False, False, cpu)
    assert found.isnan().tolist() == [False, bad == "weights", False]
    assert scale.isnan().item() == (bad == "num_items")
    with pytest.raises(ValueError, match="must be"):
        _tokens(labels, weights, items, 2, -100, True, True, False, cpu)


def test_no_token_needs_no_denominator():
    p = problem()
    out = fk.kd_loss(p.student(), p.teacher(), torch.full_like(p.labels, -100), fk.NoEvo(), num_items=torch.tensor(0))
    assert out.loss.item() == 0
    assert all(g.abs().sum() == 0 for g in gradients(out.loss, p.leaves))
