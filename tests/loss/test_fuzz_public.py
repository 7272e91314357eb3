"""Every argument of the public calls, good and odd ones mixed: the reference's answer, or an error that names one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fused_kd as fk
from fused_kd.objectives import OBJECTIVES
from fused_kd.reference import reference_kd_loss

from ..kernels.ways import refused
from ..problems import gradients, needs_compiler

ORACLE = ("ignore_index", "reduction", "temperature", "vocab_size", "shift")
NAMES = ("objective", "hidden", "weight", "bias", "logit_scale", "softcap", "log_probs", "indices", "tail", "log_rest",
         "student", "teacher", "labels", "token_weights", "num_items", "memory_budget", "backend", "validate", "engine",
         "grad_filter_eps", *ORACLE, "lam", "beta", "gamma", "alpha", "fraction", "floor", "gate", "tau")  # fmt: skip
NUMBERS = [0, -1, math.nan, math.inf, 1e300, 1e-300, True, "1", None, 2**70, 10**400]
NOT_ONE_ARRAY = [torch.eye(3).to_sparse(), None, 3.0, [1.0]]

# For each option its good values, then odd ones: some are refused, some mean something.
OPTIONS: dict[str, tuple[list[Any], list[Any]]] = {
    "ignore_index": ([-100, -1, 2], [2**63, -(2**63), None, True, "x"]),
    "reduction": (["mean", "sum", "none"], ["meen", None, 3]),
    "temperature": ([1.0, 2, 0.5], NUMBERS),
    "vocab_size": ([None, 2], [10**9, 2**70, *NUMBERS]),
    "shift": ([False, True], ["no", 1, None]),
    "memory_budget": ([None, 10**6, 2**63], [1, *NUMBERS]),
    "backend": ([None, "torch"], ["gpu", "cuda", 3, ["torch"]]),
    "validate": ([False, True], ["yes", 0]),
    "engine": ([None, "chunked"], ["stream", 1]),
    "grad_filter_eps": ([0.0], NUMBERS),
}


class Draw:
    """Draws good values, and now and then an odd one; ``odd`` says whether there was any."""

    def __init__(self, data: st.DataObject) -> None:
        self._data, self.odd = data, False

    def one(self, good: list[Any], odd: list[Any] | None = None) -> Any:
        if odd and self._data.draw(st.integers(0, 24)) == 0:
            self.odd = True
            return odd[self._data.draw(st.integers(0, len(odd) - 1))]
        return good[self._data.draw(st.integers(0, len(good) - 1))]


def objective_of(draw: Draw) -> fk.objectives.Objective:
    cls = draw.one(list(OBJECTIVES.values()))
    good = [0.3, 0.5] if cls.name in ("alpha_beta", "renyi") else [0.0, 0.3, 0.5, 1.0]
    names = ["difficulty", "excess", "kl"]
    objective = cls(
        **{k: draw.one(names, [None, 1.0]) if k == "gate" else draw.one(good, NUMBERS) for k in vars(cls())}
    )
    return draw.one([objective, objective, 0.5 * objective + fk.SFT(), objective + 0.5 * fk.NoEvo()])


def head_of(draw: Draw, shape: tuple[int, ...], V: int) -> fk.LMHead:
    H = draw.one([1, 3, 8])
    weight = torch.randn(V, H)
    return fk.LMHead(
        torch.randn(*shape, H),
        draw.one([weight], [weight.T.contiguous(), weight[:, :0], weight[:0], weight.double(), *NOT_ONE_ARRAY]),
        draw.one([None, torch.randn(V)], [torch.randn(V + 1), torch.randn(V).long(), *NOT_ONE_ARRAY[2:]]),
        logit_scale=draw.one([1.0, 0.5, -2], NUMBERS),
        softcap=draw.one([None, 5.0], NUMBERS[:-3]),
    )


def top_k_of(draw: Draw, shape: tuple[int, ...], V: int) -> fk.TopK:
    values, indices = torch.randn(*shape, V).log_softmax(-1).topk(draw.one([1, min(2, V)]))
    odd_values = [values + 1, values * math.nan, values.double(), values[..., :0], *NOT_ONE_ARRAY]
    odd_indices = [indices + V, indices - 1, torch.zeros_like(indices), indices.float(), *NOT_ONE_ARRAY]
    return fk.TopK(
        draw.one([values, values - 1], odd_values),
        draw.one([indices, indices.int()], odd_indices),
        draw.one(["renormalize", "uniform", "bucket", "listed"], ["ignore", None]),
        draw.one([1.0, 1.0, 2.0], NUMBERS),
        draw.one(
            [None, torch.full(shape, -3.0)],
            [torch.full(shape, 0.5), torch.zeros(*shape, 1), torch.zeros(shape).double(), *NOT_ONE_ARRAY],
        ),
    )


def given_arguments(draw: Draw) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    objective = objective_of(draw)
    shape = draw.one([(4,), (2, 3), (1,), (0,), (2, 0)])
    V = draw.one([7, 3, 2])
    ways = [lambda: head_of(draw, shape, V), lambda: torch.randn(*shape, V)]
    student = draw.one(ways, [lambda: torch.eye(3).to_sparse(), lambda: None])()
    teacher = draw.one([*ways, lambda: top_k_of(draw, shape, V)], [lambda: head_of(draw, shape, V + 1), lambda: None])()
    options = {name: draw.one(*values) for name, values in OPTIONS.items()}
    ignored = options["ignore_index"] if isinstance(options["ignore_index"], int) else -100
    labels = torch.randint(0, min(V, 2), shape)  # in any vocabulary here
    if labels.numel() and -(2**63) <= ignored < 2**63:
        labels.view(-1)[0] = ignored
    labels = draw.one([labels, labels.int() if abs(ignored) < 2**31 else labels],
                      [labels + V, labels - 5, labels.float(), labels[..., :-1], *NOT_ONE_ARRAY])  # fmt: skip
    weights = torch.rand(shape) + 0.1
    call = {
        "token_weights": draw.one(
            [None, weights, weights.double()],
            [-weights, weights * math.nan, weights.long(), weights[..., None], weights * 0, *NOT_ONE_ARRAY[:1]],
        ),
        "num_items": draw.one([None, 3] if options["reduction"] == "mean" else [None],
                              [torch.tensor(x) for x in (0, 2, -1, math.nan, True)] + NUMBERS),
    }  # fmt: skip
    return (student, teacher, labels, objective), options, call


def apart(objective: Any, teacher: Any, options: dict[str, Any]) -> bool:
    """Good arguments that do not go together, as their documentation says."""
    if not isinstance(teacher, fk.TopK) or not objective.spec.needs_teacher:
        return False
    beyond = options["vocab_size"] is not None  # which entries may be
    refusable = refused(objective.spec, teacher.tail)
    return beyond or refusable or (teacher.tail == "bucket" and options["temperature"] != teacher.temperature)


def check(data: st.DataObject, backend: str | None) -> None:
    draw, refusable = Draw(data), False
    torch.manual_seed(0)
    try:
        (student, teacher, labels, objective), options, call = given_arguments(draw)
        refusable = apart(objective, teacher, options)
        if backend and options["backend"] in (None, "torch"):
            options["backend"] = backend
        out = fk.kd_loss(student, teacher, labels, objective, **options, **call)
    except (TypeError, ValueError) as error:
        assert any(name in str(error) for name in NAMES), f"which argument? {error}"
        assert draw.odd or refusable, f"refused: {error}"
        return
    items = call["num_items"]
    asked = {name: options[name] for name in ORACLE} | call
    asked["num_items"] = float(items) if isinstance(items, int) else items  # PyTorch divides by 64-bit integers alone
    leaf = student.hidden if isinstance(student, fk.LMHead) else student
    leaf.requires_grad_()
    ours = fk.kd_loss(student, teacher, labels, objective, **options, **call)
    truth = reference_kd_loss(student, teacher if objective.spec.needs_teacher else None, labels, objective, **asked)
    infinite = truth.loss > 1e18
    for found, expected in ((ours.loss, truth.loss), (ours.difficulty, truth.difficulty)):
        assert found.shape == expected.shape and torch.equal(found > 1e18, expected > 1e18)
        finite = expected <= 1e18
        torch.testing.assert_close(found[finite].double(), expected[finite].double(), rtol=1e-4, atol=1e-5)
    assert torch.equal(out.loss, ours.loss)
    if not infinite.any():
        found, expected = (gradients(x.loss.sum(), [leaf])[0] for x in (ours, truth))
        size = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * (1 + size))


QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))
BACKENDS = [None, "torch", pytest.param("native", marks=needs_compiler)]


@QUICK
@given(st.data())
def test_right_or_refused(data):
    check(data, None)


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", BACKENDS[1:])
@LONG
@given(st.data())
def test_right_or_refused_often(backend, data):
    check(data, backend)
