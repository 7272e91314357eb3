"""Objectives as values: sums, multiples, texts, and what bad numbers get."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_kd as fk
from fused_kd import objectives as o
from fused_kd.objectives import OBJECTIVES as CLASSES
from fused_kd.objectives import Objective, Sum, parse

from ..problems import NAMES, OBJECTIVES, problem, relative

NUMBERS = st.floats(0, 1) | st.sampled_from([0.0, 1.0, 1e-300, 1 / 3, 1e-3])
RANGES = {
    "gamma": st.floats(0, allow_nan=False),
    "tau": st.floats(0, allow_nan=False),
    "gate": st.sampled_from(["difficulty", "excess", "kl"]),
}
POWERS = {"alpha": st.floats(1e-3, 1 - 1e-3), "beta": st.floats(1e-3, 1)}


def single(name: str) -> st.SearchStrategy[Objective]:
    own = POWERS if name in ("alpha_beta", "renyi") else RANGES
    return st.builds(CLASSES[name], **{f.name: own.get(f.name, NUMBERS) for f in fields(CLASSES[name])})


SINGLES = st.sampled_from(list(CLASSES)).flatmap(single)
UNGATED = st.sampled_from([name for name, cls in CLASSES.items() if not cls().spec.gate]).flatmap(single)
WEIGHTS = st.floats(0, 1e12)
SUMS = st.lists(st.tuples(WEIGHTS, UNGATED), min_size=2, max_size=4).map(
    lambda parts: sum((weight * each for weight, each in parts[1:]), parts[0][0] * parts[0][1])
)
NAMESPACE = {name: getattr(o, name) for name in o.__all__} | {"inf": math.inf}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(SINGLES | SUMS)
def test_text_and_repr_say_all_of_it(objective):
    assert parse(str(objective)) == objective
    assert eval(repr(objective), NAMESPACE) == objective
    assert parse(f" {objective} ".replace("+", " + ") if "e+" not in str(objective) else str(objective)) == objective
    assert hash(parse(str(objective))) == hash(objective)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_they_are_plain_values(objective):
    for made in (pickle.loads(pickle.dumps(objective)), copy.deepcopy(objective), replace(objective)):
        assert made == objective and hash(made) == hash(objective) and repr(made) == repr(objective)
    assert parse(str(objective)) == objective
    assert objective in {objective: 1} and objective != fk.SFT() * 0.1
    assert objective.spec == type(objective.spec).decode(objective.spec.code)
    with pytest.raises(AttributeError):
        objective.name = "other"


def test_those_with_tensors_are_equal_where_all_their_numbers_are():
    x = torch.rand(3)
    for make in (lambda x: fk.ForwardKD(lam=x), lambda x: x * fk.SFT() + fk.NoEvo(), lambda x: fk.SFT() + fk.NoEvo(x)):
        assert make(x) == make(x.clone()) and hash(make(x)) == hash(make(x.clone()))
        assert make(x) not in [make(0.5 * x), make(x[:1]), make(0.5)]
    assert o.SkewReverse() != o.SkewReverseDetached()


def test_one_number_needs_no_name():
    assert fk.GeneralizedJSD(0.3) == fk.GeneralizedJSD(beta=0.3) and fk.EntropyGated(2) == fk.EntropyGated(tau=2)
    assert sum([fk.SFT(), 0.5 * fk.NoEvo(0.2)]) == fk.SFT() + 0.5 * fk.NoEvo(lam=0.2)


def test_texts():
    assert str(fk.SelfEvolution()) == "self_evolution"
    assert str(fk.SelfEvolution(gamma=1, gate="kl")) == "self_evolution:gamma=1.0,gate=kl"
    assert repr(fk.SelfEvolution()) == "SelfEvolution(lam=0.5, beta=0.5, gamma=0.4)"
    assert repr(fk.SelfEvolution(floor=0.1)) == "SelfEvolution(lam=0.5, beta=0.5, gamma=0.4, floor=0.1)"
    both = 0.5 * fk.SFT() + 0.5 * fk.GeneralizedJSD(beta=0.3)
    assert str(both) == "0.5*sft+0.5*generalized_jsd:beta=0.3"
    assert repr(both) == "0.5 * SFT() + 0.5 * GeneralizedJSD(beta=0.3)"
    assert str(fk.SFT() + fk.NoEvo()) == "sft+no_evo" and repr(fk.SFT() + fk.NoEvo()) == "SFT() + NoEvo(lam=0.5)"
    assert parse("1e-3*z_loss+sft") == 1e-3 * o.ZLoss() + fk.SFT()
    assert parse("1e+3*z_loss + 2 * sft") == 1e3 * o.ZLoss() + 2 * fk.SFT()
    assert parse("1E+3*sft+no_evo:lam=1e-3+sft") == 1e3 * fk.SFT() + fk.NoEvo(lam=1e-3) + fk.SFT()
    assert parse("todi+sft") == o.ToDi() + fk.SFT()  # the e and the + are no exponent
    assert parse("self_evolution : gamma = inf , lam=0.2") == fk.SelfEvolution(gamma=math.inf, lam=0.2)
    assert repr(torch.rand(3) * fk.SFT()) == "tensor(3,) * SFT()"


@pytest.mark.parametrize("text, error, message", [
    ("kd", ValueError, "objective must be one of sft, forward_kd"),
    ("", ValueError, "objective must be one of sft"),
    ("sft+", ValueError, "objective must be one of sft"),
    ("sft++sft", ValueError, "objective must be one of sft"),
    ("2*", ValueError, "objective must be one of sft"),
    ("sum", ValueError, "objective must be one of sft"),
    ("sft-no_evo", ValueError, "objective must be one of sft"),
    ("no_evo:gamma=1", ValueError, "no_evo takes lam, got 'gamma=1' in 'no_evo:gamma=1'"),
    ("sft:lam=1", ValueError, "sft takes no settings, got 'lam=1'"),
    ("no_evo:lam", ValueError, "lam must be a number, got ''"),
    ("no_evo:lam=much", ValueError, "lam must be a number, got 'much' in 'no_evo:lam=much'"),
    ("no_evo:lam=0.1,lam=0.2", ValueError, "lam must be given once, got it twice in 'no_evo:lam=0.1,lam=0.2'"),
    ("no_evo:lam=2", ValueError, "lam must be in [0, 1], got 2.0"),
    ("self_evolution:gate=hard", ValueError, "gate must be one of 'difficulty', 'excess', 'kl', got 'hard'"),
    ("x*sft", ValueError, "the weight must be a number, got 'x' in 'x*sft'"),
    ("*sft", ValueError, "the weight must be a number, got ''"),
    ("2*3*sft", ValueError, "the weight must be a number, got '2*3'"),
    ("-1*sft", ValueError, "weight must be in [0, 1e12], got -1.0"),
    ("nan*sft", ValueError, "weight must be in [0, 1e12], got nan"),
    ("self_evolution+entropy_gated", ValueError, "a sum takes one objective with a gate, got SelfEvolution("),
    (None, TypeError, "objective must be a text such as"),
    (fk.SFT(), TypeError, "objective must be a text such as"),
])  # fmt: skip
def test_texts_that_say_nothing(text, error, message):
    with pytest.raises(error) as caught:
        parse(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("make, error, message", [
    (lambda: -1 * fk.SFT(), ValueError, "weight must be in [0, 1e12], got -1"),
    (lambda: fk.SFT() * math.nan, ValueError, "weight must be in [0, 1e12], got nan"),
    (lambda: math.inf * fk.SFT(), ValueError, "weight must be in [0, 1e12], got inf"),
    (lambda: 1e9 * (1e9 * fk.SFT()), ValueError, "weight must be in [0, 1e12], got 1e+18"),
    (lambda: fk.SFT() * True, TypeError, "weight must be a number in [0, 1e12], or a tensor of such, got True"),
    (lambda: fk.SFT() * "2", TypeError, "weight must be a number in [0, 1e12], or a tensor of such, got '2'"),
    (lambda: fk.SFT() / 0, ValueError, "divisor must be in [1e-12, inf], got 0"),
    (lambda: fk.SFT() / -2.0, ValueError, "divisor must be in [1e-12, inf], got -2.0"),
    (lambda: fk.SFT() * fk.SFT(), TypeError, "unsupported operand"),
    (lambda: fk.SFT() / fk.SFT(), TypeError, "unsupported operand"),
    (lambda: fk.SFT() + 1, TypeError, "unsupported operand"),
    (lambda: 2 / fk.SFT(), TypeError, "unsupported operand"),
    (lambda: fk.SFT() - fk.SFT(), TypeError, "unsupported operand"),
    (lambda: torch.tensor([0.5, -0.5]) * fk.SFT(), ValueError, "weight must be in [0, 1e12], got -0.5 in a tensor"),
    (lambda: torch.tensor([True]) * fk.SFT(), TypeError, "weight must be a tensor of real numbers in [0, 1e12]"),
    (lambda: fk.SelfEvolution() + fk.SelfEvolutionTopK(), ValueError, "a sum takes one objective with a gate"),
    (lambda: o.EntropyGated() + 0.0 * fk.SelfEvolution(), ValueError, "a sum takes one objective with a gate"),
    (lambda: fk.NoEvo(lam=torch.tensor([0.5, 1.5])), ValueError, "lam must be in [0, 1], got 1.5 in a tensor"),
    (lambda: fk.NoEvo(lam=torch.tensor(math.nan)), ValueError, "lam must be in [0, 1], got nan in a tensor"),
    (lambda: fk.NoEvo(lam=torch.tensor([1j])), TypeError, "lam must be a tensor of real numbers in [0, 1]"),
    (lambda: fk.Skew(floor=-0.1), ValueError, "floor must be in [0, 1], got -0.1"),
    (lambda: fk.SelfEvolution(gate="rank"), ValueError, "gate must be one of 'difficulty', 'excess', 'kl', got 'rank'"),
    (lambda: fk.SelfEvolution(gate=None), ValueError, "gate must be one of 'difficulty', 'excess', 'kl', got None"),
    (lambda: o.EntropyGated(tau=-1), ValueError, "tau must be in [0, inf], got -1"),
    (lambda: o.Renyi(alpha=1.0), ValueError, "alpha must be in [0.001, 0.999], got 1.0"),
    (lambda: o.Renyi(alpha=0), ValueError, "alpha must be in [0.001, 0.999], got 0"),
    (lambda: o.AlphaBeta(alpha=0, beta=0), ValueError, "alpha must be in [0.001, 1], where alpha and beta are not"),
    (lambda: o.AlphaBeta(alpha=0.5, beta=0), ValueError, "beta must be in [0.001, 1], where alpha and beta are not"),
    (lambda: o.AlphaBeta(alpha=torch.tensor([0.5, 1e-9])), ValueError, "alpha must be in [0.001, 1], where alpha"),
    (lambda: o.AlphaBeta(alpha=2), ValueError, "alpha must be in [0.001, 1], where alpha and beta are not (1, 0)"),
    (lambda: o.SymmetricKL(beta=1.1), ValueError, "beta must be in [0, 1], got 1.1"),
    (lambda: np.ones(3) * fk.SFT(), TypeError, "weight must be a number in [0, 1e12], or a tensor of such, got array"),
    (lambda: fk.SFT() * np.ones(3), TypeError, "weight must be a number in [0, 1e12], or a tensor of such, got array"),
    (lambda: torch.eye(2).to_sparse() * fk.SFT(), TypeError, "weight must be a dense tensor"),
    (lambda: Sum(((-1.0, fk.SFT()),)), ValueError, "weight must be in [0, 1e12], got -1.0"),
    (lambda: Sum(()), TypeError, "parts must be a tuple of (weight, objective), at least one, got ()"),
    (lambda: Sum((fk.SFT(),)), TypeError, "parts must be a tuple of (weight, objective), at least one, got (SFT()"),
    (lambda: Objective(), TypeError, "Objective is what objectives have in common; take one of"),
    (lambda: fk.KDLoss("0.5*sft"), TypeError, "got '0.5*sft'; fused_kd.objectives.parse reads a text"),
    (lambda: fk.Skew(0.5, 0.5), TypeError, "positional"),
])  # fmt: skip
def test_what_is_refused(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


def test_sums_are_flat_and_keep_their_order():
    a, b, c = fk.SFT(), fk.NoEvo(lam=0.3), o.SymmetricKL(beta=0.25)
    assert a + b + c == a + (b + c) == Sum(((1.0, a), (1.0, b), (1.0, c)))
    assert 2 * (a + 0.5 * b) == 2 * a + 1.0 * b and (a + b) / 4 == 0.25 * a + 0.25 * b
    assert a * 3 == 3 * a and 3 * a != a and 1 * a != a
    assert [each for _, each in (0.5 * c + a).summands] == [fk.ForwardKD(lam=1.0), fk.ReverseKD(lam=1.0), a]
    assert [weight for weight, _ in (0.5 * c + a).summands] == [0.125, 0.375, 1.0]
    assert (a + b).spec.code != (b + a).spec.code and (2 * a + b).spec == (a + 3 * b).spec
    weights = torch.tensor([0.5, 2.0])
    for made in (weights * (a + 2 * b), (a + 2 * b) * weights, (a + 2 * b) / (1 / weights)):
        assert made.per_token and torch.equal(made.parts[0][0], weights) and torch.equal(made.parts[1][0], 2 * weights)
    assert not (a + b).per_token


def test_a_multiple_is_that_multiple_of_the_loss():
    p = problem()
    out, half = (
        fk.kd_loss(p.student(), p.teacher(), p.labels, x, backend="torch")
        for x in (fk.SelfEvolution(gamma=2.0), 0.5 * fk.SelfEvolution(gamma=2.0))
    )
    assert relative(2 * half.loss, out.loss) < 1e-6
    assert torch.equal(half.difficulty, out.difficulty) and torch.equal(half.is_hard, out.is_hard)
