"""What is assigned to a loss counts, is checked, and outlives whatever is done to the module's tensors."""

from __future__ import annotations

import copy
import re

import pytest
import torch

import fused_kd as fk
from fused_kd.reference import reference_kd_loss

from ..problems import problem, relative

ASSIGNED = {
    "ignore_index": 5,
    "reduction": "none",
    "temperature": 3.0,
    "vocab_size": 60,
    "shift": True,
    "memory_budget": 2**63,  # more than the op's integers hold
    "validate": True,
    "signed": True,
    "grad_filter_eps": 1e-30,
    "engine": "chunked",
    "backend": "torch",
}


@pytest.mark.parametrize("name", ASSIGNED)
@pytest.mark.parametrize("objective", [fk.ForwardKD(), fk.AdaptiveKL()], ids=lambda o: o.name)
def test_assigned_is_as_if_given(objective, name):
    p = problem(ignored=0.0)
    p.labels[p.labels >= 60] = 5
    given = fk.KDLoss(objective, **{name: ASSIGNED[name]})
    assigned = fk.KDLoss(objective)
    setattr(assigned, name, ASSIGNED[name])
    found = assigned(p.student(), p.teacher(), p.labels)
    assert torch.equal(found, given(p.student(), p.teacher(), p.labels))
    assert repr(assigned) == repr(given)
    oracle = {k: v for k, v in {name: ASSIGNED[name]}.items() if k in reference_kd_loss.__kwdefaults__}
    assert relative(found, reference_kd_loss(p.student(), p.teacher(), p.labels, objective, **oracle).loss) < 4e-6


@pytest.mark.parametrize(
    "error, name, value, message",
    [
        (ValueError, "reduction", "meen", "reduction must be one of 'mean', 'sum', 'none', got 'meen'"),
        (ValueError, "vocab_size", -5, "vocab_size must be a positive integer or None, got -5"),
        (ValueError, "temperature", 0.0, "temperature must be in [1e-08, 1e+12], got 0.0"),
        (ValueError, "engine", "stream", "engine must be None or one of 'chunked', 'streaming', got 'stream'"),
        (TypeError, "shift", 1, "shift must be True or False, got 1"),
        (TypeError, "tp_group", "tp", "tp_group must be a process group or a device mesh, got str"),
    ],
)
def test_assigning_checks(error, name, value, message):
    criterion = fk.KDLoss(fk.ForwardKD())
    with pytest.raises(error, match=re.escape(message)):
        setattr(criterion, name, value)
    assert getattr(criterion, name) == getattr(fk.KDLoss(fk.ForwardKD()), name), "a refused value is not kept"


def meta() -> fk.KDLoss:
    with torch.device("meta"):
        return fk.KDLoss(fk.SelfEvolution(gamma=1.0), temperature=2.0)


@pytest.mark.parametrize(
    "move",
    [
        lambda: meta().to_empty(device="cpu"),
        meta,
        lambda: fk.KDLoss(fk.SelfEvolution(gamma=1.0), temperature=2.0).bfloat16(),
        lambda: fk.KDLoss(fk.SelfEvolution(gamma=1.0), temperature=2.0).to("meta").to_empty(device="cpu"),
        lambda: copy.deepcopy(fk.KDLoss(fk.SelfEvolution(gamma=1.0), temperature=2.0)).double(),
        lambda: torch.nn.Sequential(meta()).to_empty(device="cpu")[0],
    ],
    ids=["to_empty", "left on meta", "bfloat16", "to meta", "deepcopy", "child"],
)
def test_scalars_are_right_after_any_move(move):
    p = problem()
    criterion = move()
    expected = fk.KDLoss(fk.SelfEvolution(gamma=1.0), temperature=2.0)(p.student(), p.teacher(), p.labels)
    assert torch.equal(criterion(p.student(), p.teacher(), p.labels), expected)
    criterion.objective, criterion.temperature = fk.SelfEvolution(gamma=0.1), 1.5
    again = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.SelfEvolution(gamma=0.1), temperature=1.5).loss
    assert torch.equal(criterion(p.student(), p.teacher(), p.labels), again)


def test_nothing_of_it_is_saved_or_trained():
    criterion = fk.KDLoss(fk.SelfEvolution())
    assert not criterion.state_dict() and not list(criterion.parameters())
    assert criterion.to(torch.bfloat16) is criterion
    assert torch.equal(criterion.scalars, torch.tensor([fk.SelfEvolution().scalars()]))


def test_labels_of_32_bits_with_an_ignore_index_of_64():
    p = problem(ignored=0.0)
    far = {"ignore_index": -(2**40), "shift": True}
    found = fk.kd_loss(p.student(), p.teacher(), p.labels.int(), fk.NoEvo(), **far).loss
    assert torch.equal(found, fk.kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo(), **far).loss)


def test_a_copy_is_annealed_alone():
    p = problem()
    first = fk.KDLoss(fk.ForwardKD())
    second = copy.copy(first)
    second.temperature = 3.0
    for criterion, temperature in ((first, 1.0), (second, 3.0)):
        fresh = fk.KDLoss(fk.ForwardKD(), temperature=temperature)
        assert torch.equal(*(c(p.student(), p.teacher(), p.labels) for c in (criterion, fresh)))


def test_made_in_inference_mode_and_annealed_outside():
    with torch.inference_mode():
        criterion = fk.KDLoss(fk.ForwardKD())
    criterion.temperature = 3.0
    assert torch.equal(criterion.scalars, fk.KDLoss(fk.ForwardKD(), temperature=3.0).scalars)
