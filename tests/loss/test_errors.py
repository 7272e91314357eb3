"""Bad input gets an exception that names the argument, its value and what is allowed, before any work."""

from __future__ import annotations

import re

import pytest
import torch

import fused_kd as fk

from ..problems import problem

_G = torch.Generator().manual_seed(0)
H, W, H_T, W_T = (torch.randn(shape, generator=_G) for shape in ((5, 4), (9, 4), (5, 6), (9, 6)))
LABELS = torch.tensor([0, 1, -100, 8, 3])
NESTED = torch.nested.nested_tensor([H[:2], H])


def call(student=None, teacher=None, labels=LABELS, objective=None, **options):
    student = fk.LMHead(H, W) if student is None else student
    teacher = fk.LMHead(H_T, W_T) if teacher is None else teacher
    return fk.kd_loss(student, teacher, labels, objective or fk.NoEvo(), **options)


@pytest.mark.parametrize(
    "error, message, make",
    [
        # objectives
        (ValueError, "lam must be in [0, 1], got 1.5", lambda: fk.NoEvo(lam=1.5)),
        (ValueError, "beta must be in [0, 1], got -0.1", lambda: fk.Skew(beta=-0.1)),
        (ValueError, "gamma must be in [0, inf], got -1", lambda: fk.SelfEvolution(gamma=-1)),
        (ValueError, "beta must be in [0, 1], got nan", lambda: fk.Skew(beta=float("nan"))),
        (TypeError, "lam must be a number in [0, 1], or a tensor of such, got '0.5'", lambda: fk.NoEvo(lam="0.5")),
        (ValueError, "lam must be in [0, 1], got 1000", lambda: fk.NoEvo(lam=10**400)),
        (TypeError, "objective must be one of", lambda: fk.KDLoss("self_evolution")),
        # heads
        (TypeError, "hidden must be a tensor, got list", lambda: fk.LMHead([1.0], W)),
        (TypeError, "hidden must be float32, bfloat16 or float16, got torch.float64", lambda: fk.LMHead(H.double(), W)),
        (ValueError, "weight must have shape (V, H), got (9,)", lambda: fk.LMHead(H, W[:, 0])),
        (ValueError, "hidden must have shape (..., H) with weight's H=6, got (5, 4)", lambda: fk.LMHead(H, W_T)),
        (ValueError, "weight must have at least one row and column, got (0, 4)", lambda: fk.LMHead(H, W[:0])),
        (ValueError, "weight must have at least one row and column, got (9, 0)", lambda: fk.LMHead(H[:, :0], W[:, :0])),
        (TypeError, "weight must be a dense tensor, got one that is torch.sparse_coo", lambda: fk.LMHead(H, W.to_sparse())),
        (TypeError, "hidden must be a dense tensor, got one that is torch._mkldnn", lambda: fk.LMHead(H.to_mkldnn(), W)),
        (TypeError, "hidden must be a dense tensor, got one that is nested", lambda: fk.LMHead(NESTED, W)),
        (TypeError, "student must be a dense tensor, got one that is torch.sparse_csr", lambda: call(student=H.to_sparse_csr())),
        (TypeError, "labels must be a dense tensor, got one that is torch.sparse_coo", lambda: call(labels=LABELS.to_sparse())),
        (TypeError, "indices must be a dense tensor, got one that is torch.sparse_coo", lambda: fk.TopK(H, LABELS.to_sparse())),
        (ValueError, "bias must have shape (V,) = (9,), got (8,)", lambda: fk.LMHead(H, W, torch.zeros(8))),
        (ValueError, "weight is on meta, hidden on cpu", lambda: fk.LMHead(H, W.to("meta"))),
        (ValueError, "logit_scale must be in [-1e+12, 1e+12], got inf", lambda: fk.LMHead(H, W, logit_scale=float("inf"))),
        (ValueError, "softcap must be in [1e-12, 1e+12], got 0.0", lambda: fk.LMHead(H, W, softcap=0.0)),
        # options
        (ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'", lambda: call(reduction="avg")),
        (ValueError, "temperature must be in [1e-08, 1e+12], got 0", lambda: call(temperature=0)),
        (ValueError, "temperature must be in [1e-08, 1e+12], got 1e-39", lambda: call(temperature=1e-39)),
        (ValueError, "temperature must be in [1e-08, 1e+12], got 1000", lambda: call(temperature=10**400)),
        (ValueError, "softcap must be in [1e-12, 1e+12], got 1e+300", lambda: fk.LMHead(H, W, softcap=1e300)),
        (ValueError, "softcap must be in [1e-12, 1e+12], got 1e-46", lambda: fk.LMHead(H, W, softcap=1e-46)),
        (ValueError, "logit_scale must be in [-1e+12, 1e+12], got 1e+38", lambda: fk.LMHead(H, W, logit_scale=1e38)),
        (TypeError, "shift must be True or False, got 'no'", lambda: fk.KDLoss(fk.SFT(), shift="no")),
        (TypeError, "validate must be True or False, got 1", lambda: fk.KDLoss(fk.SFT(), validate=1)),
        (ValueError, "ignore_index must be a 64-bit integer, got 9223372036854775808", lambda: call(ignore_index=2**63)),
        (ValueError, "grad_filter_eps must be at least 0, got -1", lambda: call(grad_filter_eps=-1)),
        (ValueError, "grad_filter_eps must be in [-1e+12, 1e+12], got nan", lambda: call(grad_filter_eps=float("nan"))),
        (ValueError, "vocab_size must be a positive integer or None, got 0", lambda: call(vocab_size=0)),
        (TypeError, "memory_budget must be a positive integer or None, got 1.5", lambda: call(memory_budget=1.5)),
        (TypeError, "ignore_index must be an integer, got None", lambda: call(ignore_index=None)),
        (ValueError, "backend must be None or one of 'torch', 'triton', 'cuda', 'native', got 'gpu'", lambda: fk.KDLoss(fk.SFT(), backend="gpu")),
        (ValueError, "vocab_size must be at most 9, the smaller vocabulary, got 10", lambda: call(vocab_size=10)),
        (ValueError, "memory_budget must be at least", lambda: call(memory_budget=10)),
        # inputs that do not fit each other
        (
            ValueError,
            "student and teacher have unequal vocabularies, 9 and 8; if one is padded, pass vocab_size",
            lambda: call(teacher=fk.LMHead(H_T, W_T[:8])),
        ),
        (ValueError, "teacher must be an LMHead, logits or a TopK for NoEvo(lam=0.5), got None", lambda: fk.kd_loss(fk.LMHead(H, W), None, LABELS, fk.NoEvo())),
        (TypeError, "student must be an LMHead or a tensor of logits, got tuple", lambda: call(student=(H, W))),
        (ValueError, "teacher must hold the student's tokens, shape (5,), got (4,)", lambda: call(teacher=fk.LMHead(H_T[:4], W_T))),
        (TypeError, "labels must be a tensor, got list", lambda: call(labels=[1, 2])),
        (TypeError, "labels must be int64 or int32, got torch.float32", lambda: call(labels=LABELS.float())),
        (ValueError, "labels must have the tokens' shape (5,), got (4,)", lambda: call(labels=LABELS[:4])),
        (ValueError, "labels must be in [0, 9) or ignore_index=-100, got 9 at token 1", lambda: call(labels=torch.tensor([0, 9, 1, 1, 1]))),
        (ValueError, "labels must be in [0, 9) or ignore_index=-100, got -1 at token 0", lambda: call(labels=torch.tensor([-1, 0, 1, 1, 1]))),
        (ValueError, "labels must be in [0, 7)", lambda: call(vocab_size=7)),
        (TypeError, "student hidden is torch.bfloat16 and weight torch.float32", lambda: call(student=fk.LMHead(H.bfloat16(), W))),
        (ValueError, "token_weights must have the tokens' shape (5,), got (4,)", lambda: call(token_weights=torch.ones(4))),
        (TypeError, "token_weights must be a floating-point tensor", lambda: call(token_weights=torch.ones(5).int())),
        (ValueError, "token_weights must be constants", lambda: call(token_weights=torch.ones(5, requires_grad=True))),
        (ValueError, "num_items must be positive, a number in [1e-37, 1e+37], got 0", lambda: call(num_items=0)),
        (TypeError, "num_items must be a positive number", lambda: call(num_items="3")),
        (ValueError, "num_items needs reduction='mean', got reduction='sum'", lambda: call(num_items=3, reduction="sum")),
        (TypeError, "unexpected keyword argument 'tempreature'", lambda: call(tempreature=2.0)),
    ],
    ids=lambda x: x[:40] if isinstance(x, str) else "",
)  # fmt: skip
def test_message(error, message, make):
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_labels_out_of_range_are_caught_in_a_compiled_step_too():
    @torch.compile(backend="aot_eager")
    def step(hidden):
        return call(student=fk.LMHead(hidden, W), labels=torch.tensor([0, 9, 1, 1, 1])).loss

    with pytest.raises(ValueError, match="got 9 at token 1"):
        step(H)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_validate_names_the_first_token_with_non_finite_logits(side, value):
    h, h_t = H.clone(), H_T.clone()
    (h if side == "student" else h_t)[3, 0] = value
    with pytest.raises(ValueError, match=r"must be finite or -inf; .* token 3"):
        call(student=fk.LMHead(h, W), teacher=fk.LMHead(h_t, W_T), validate=True)


def test_validate_passes_good_input():
    p = problem()
    plain = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.SelfEvolution())
    checked = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.SelfEvolution(), validate=True)
    assert torch.equal(plain.loss, checked.loss)


def test_annealing_cannot_change_the_objective_s_class():
    criterion = fk.KDLoss(fk.Skew())
    with pytest.raises(TypeError, match="objective must stay a Skew, got NoEvo"):
        criterion.objective = fk.NoEvo()
    with pytest.raises(TypeError, match="objective must stay a EntropyGated, got NoEvo"):
        fk.KDLoss(fk.EntropyGated()).objective = fk.NoEvo()


def test_triton_on_cpu_tensors_is_refused_not_replaced(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend='triton' needs"):
        call(backend="triton")


def test_reprs_say_what_matters():
    assert repr(fk.SelfEvolution()) == "SelfEvolution(lam=0.5, beta=0.5, gamma=0.4)"
    assert repr(fk.LMHead(H, W, softcap=30.0)) == "LMHead(hidden=(5, 4), weight=(9, 4), float32, softcap=30.0)"
    shown = repr(fk.KDLoss(fk.SFT(), reduction="sum", temperature=2.0))
    assert shown == "KDLoss(SFT(), reduction='sum', temperature=2.0)"
