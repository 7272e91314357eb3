"""Lists made from a head, against the whole log-softmax in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_kd as fk
from fused_kd.engines import listing
from fused_kd.engines.problem import Side

from ..budget import LIMIT, UNIT
from ..kernels.contract import NATIVE, TORCH, TRITON, backend_first, cases, device_of, slow
from ..problems import relative

BACKENDS = [TORCH, NATIVE, TRITON]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"bias": True, "logit_scale": 0.25},
    "softcap": {"softcap": 6.0},
}


def make(
    N: int = 9, H: int = 24, V: int = 403, *, dtype: torch.dtype = torch.float32, std: float = 3.0, device: str = "cpu",
    bias: bool = False, **options: Any,
) -> fk.LMHead:  # fmt: skip
    hidden, weight = torch.randn(N, H) * std / H**0.5, torch.randn(V, H)
    made = torch.randn(V) if bias else None
    return fk.LMHead(*(None if x is None else x.to(device, dtype) for x in (hidden, weight, made)), **options)


def exact(head: fk.LMHead, T: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-softmax, and what fp32 products cost each of its entries, (N, V) float64."""
    hidden, weight = head.hidden.cpu().double().flatten(0, -2), head.weight.cpu().double()
    z = hidden @ weight.T
    rounding = UNIT * (hidden.shape[1] / 6) ** 0.5 * (hidden**2 @ (weight**2).T).sqrt()
    if head.bias is not None:
        z = z + head.bias.cpu().double()
    z, rounding = z * head.logit_scale, rounding * abs(head.logit_scale)
    rounding = rounding + 2 * UNIT * z.abs()
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    log_p = (z / T).log_softmax(1)
    return log_p, (rounding + UNIT * z.abs()) / T + UNIT * log_p.abs()


def check(found: fk.TopK, log_p: Tensor, cost: Tensor, ids: Tensor, T: float) -> None:
    """Entries at ``ids`` (N, K), -1 for none, and the rest exactly."""
    listed = ids >= 0
    index = ids.clamp(min=0)
    got, K = found.log_probs.cpu().flatten(0, -2), ids.shape[1]
    assert torch.equal(found.indices.cpu().reshape(-1, K), ids)
    assert torch.equal(got == -math.inf, ~listed) and found.temperature == T
    expected = log_p.gather(1, index)
    budget = LIMIT * float(cost.gather(1, index)[listed].norm()) + 1e-6
    assert float((got - expected)[listed].norm()) <= budget
    mask = torch.zeros_like(log_p).scatter_add_(1, index, listed.double()) > 0
    rest = log_p.masked_fill(mask, -math.inf).logsumexp(1)
    error = torch.where(found.log_rest.cpu().flatten() == rest, 0.0, found.log_rest.cpu().flatten() - rest)
    assert float(error.abs().max()) <= LIMIT * float(cost.max()) + 1e-6


def descending(log_p: Tensor, k: int) -> Tensor:
    return log_p.sort(dim=1, descending=True, stable=True).indices[:, :k]


LARGEST = cases(list(OPTIONS), [1.0, 0.5, 3.0], backends=BACKENDS)
GIVEN = cases(list(OPTIONS), [1.0, 2.0], backends=BACKENDS)


@pytest.mark.parametrize("backend, name, T", backend_first(LARGEST))
def test_the_k_largest(backend, name, T):
    options = OPTIONS[name]
    head = make(4 if slow(backend) else 9, device=device_of(backend), **options)
    found, lse = fk.top_k_of(head, 8, temperature=T, backend=backend, return_log_sum_exp=True)
    log_p, cost = exact(head, T)
    check(found, log_p, cost, descending(log_p, 8), T)
    z = log_p + lse.cpu().double().unsqueeze(1)  # final logits over T
    assert lse.dtype == torch.float32
    own = (head.hidden @ head.weight.T).cpu().double()
    if not options:
        assert relative(z, own / T) < 1e-6


@pytest.mark.parametrize("backend, name, T", backend_first(GIVEN))
def test_at_given_ids(backend, name, T):
    """In their order, whatever it is, and without those that are none."""
    head = make(device=device_of(backend), **OPTIONS[name])
    log_p, cost = exact(head, T)
    ids = torch.stack([torch.randperm(403)[:7] for _ in range(9)])
    ids[2, 3:], ids[4] = -1, -1
    ids[5, :3], ids[5, 3] = torch.tensor([402, 0, 401]), -1
    found, lse = fk.log_probs_at(
        head, ids.to(head.hidden.device), temperature=T, backend=backend, return_log_sum_exp=True
    )
    check(found, log_p, cost, ids, T)
    _, other = fk.top_k_of(head, 3, temperature=T, backend=backend, return_log_sum_exp=True)
    assert relative(lse, other) < 1e-6


@pytest.mark.parametrize("budget", [None, 60_000, 4_000])
@pytest.mark.parametrize("backend", [TORCH, NATIVE])
def test_tiles(backend, budget, monkeypatch):
    """Several slabs and several pieces of tokens, whatever their size."""
    monkeypatch.setattr(listing, "CPU_TILE", 1 << 12)
    monkeypatch.setattr(listing, "CPU_TOKENS", 40)
    head = make(N=61, V=1003, bias=True)
    log_p, cost = exact(head)
    ids = descending(log_p, 8)
    check(fk.top_k_of(head, 8, backend=backend, memory_budget=budget), log_p, cost, ids, 1.0)
    ids = ids.flip(1).contiguous()
    check(fk.log_probs_at(head, ids, backend=backend, memory_budget=budget), log_p, cost, ids, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_heads_have_fp32_logits(dtype):
    head = make(dtype=dtype, bias=True)
    log_p, cost = exact(head)
    check(fk.top_k_of(head, 8), log_p, cost, descending(log_p, 8), 1.0)
    ids = torch.stack([torch.randperm(403)[:7] for _ in range(9)])
    check(fk.log_probs_at(head, ids), log_p, cost, ids, 1.0)


def test_autocast_rounds_operands():
    head = make()
    with torch.autocast("cpu", torch.bfloat16):
        found = fk.top_k_of(head, 8)
    low = fk.LMHead(head.hidden.bfloat16(), head.weight.bfloat16())
    log_p, cost = exact(low)
    check(found, log_p, cost, descending(log_p, 8), 1.0)


@pytest.mark.parametrize("T", [1.0, 0.5])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 1.0])
def test_top_p_is_the_smallest_prefix(top_p, T):
    """At least one entry, no more than k; what is cut off goes to the rest."""
    head = make(N=40)
    log_p, cost = exact(head, T)
    ids = descending(log_p, 12)
    before = torch.nn.functional.pad(log_p.gather(1, ids).exp().cumsum(1)[:, :-1], (1, 0))
    assert float((before - top_p).abs().min()) > 1e-6 or top_p == 1e-9  # rounding decides nowhere
    ids = ids.where(before < top_p, -1)
    found = fk.top_k_of(head, 12, top_p=top_p, temperature=T)
    check(found, log_p, cost, ids, T)
    assert {1e-9: 40, 1.0: 480}.get(top_p, int((ids >= 0).sum())) == int((found.indices >= 0).sum())


def test_the_rest_of_a_certain_teacher_keeps_its_digits():
    """1 - sum p would be 0."""
    z = torch.full((2, 50), -40.0)
    z[:, 7] = 0.0
    z[1, 3] = -20.0
    found = fk.top_k_of(z, 2)
    exact_rest = torch.tensor([math.log(48) - 40, math.log(48) - 40], dtype=torch.float64)
    assert relative(found.log_rest, exact_rest) < 1e-7
    at = fk.log_probs_at(z, torch.tensor([[7, 0], [3, 7]]))
    assert relative(at.log_rest, exact_rest) < 1e-7


def test_an_offset_costs_no_digits():
    z = (torch.randn(4, 300) * 64).round() / 64
    for a, b in (
        (fk.top_k_of(z, 5), fk.top_k_of(z + 8192, 5)),
        (fk.log_probs_at(z, IDS), fk.log_probs_at(z - 8192, IDS)),
    ):
        assert relative(b.log_probs, a.log_probs) < 1e-6 and relative(b.log_rest, a.log_rest) < 1e-6


IDS = torch.tensor([[0, 5, 299]] * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_logits_excluded_tokens_and_shapes(dtype):
    z = (torch.randn(2, 3, 90) * 3).to(dtype)
    z[..., 40:80], z[0, 1, 1:] = -math.inf, -math.inf
    log_p = z.double().log_softmax(-1).reshape(6, 90)
    found = fk.top_k_of(z, 60)
    assert found.log_probs.shape == found.indices.shape == (2, 3, 60) and found.log_rest.shape == (2, 3)
    some = found.indices.reshape(6, 60) >= 0
    assert some.sum(1).tolist() == [50, 1, 50, 50, 50, 50] and bool((found.log_rest == -math.inf).all())
    check(found, log_p, UNIT * log_p.abs().clamp(max=99), torch.where(some, descending(log_p, 60), -1), 1.0)
    ids = torch.tensor([1, 45, 0]).expand(2, 3, 3)
    at = fk.log_probs_at(z, ids)
    assert bool((at.log_probs[..., 1] < -1e29).all()) and bool((at.indices[..., 1] == 45).all())
    assert relative(at.log_probs[0, 0, ::2], log_p[0, [1, 0]]) < 1e-6
    assert float(at.log_rest[0, 1]) == -math.inf
    one = fk.top_k_of(fk.LMHead(torch.randn(4), torch.randn(90, 4)), 2)  # a single token
    assert one.log_probs.shape == (2,) and one.log_rest.shape == ()
    none = fk.top_k_of(z[:0], 2)
    assert none.log_probs.shape == (0, 3, 2)


def test_broken_logits_are_nan():
    z = torch.randn(3, 50)
    z[1, 4], z[2, 9] = math.nan, math.inf
    for found in (fk.top_k_of(z, 3), fk.top_k_of(z, 3, top_p=0.5), fk.log_probs_at(z, torch.tensor([[0, 1, 2]] * 3))):
        assert found.log_probs.isnan().any(1).tolist() == [False, True, True]
        assert found.log_rest.isnan().tolist() == [False, True, True]


def test_a_token_without_any_is_empty():
    z = torch.full((1, 9), -math.inf)
    found, lse = fk.top_k_of(z, 3, return_log_sum_exp=True)
    assert bool((found.log_probs == -math.inf).all()) and found.indices.tolist() == [[-1, -1, -1]]
    assert float(lse) == float(found.log_rest) == -math.inf


def test_vocab_size_cuts():
    head = make(V=410)
    found, at = fk.top_k_of(head, 5, vocab_size=403), fk.log_probs_at(head, IDS[:1].expand(9, 3), vocab_size=403)
    log_p, cost = exact(fk.LMHead(head.hidden, head.weight[:403]))
    check(found, log_p, cost, descending(log_p, 5), 1.0)
    check(at, log_p, cost, IDS[:1].expand(9, 3), 1.0)


def test_no_gradient_flows():
    head = make()
    hidden, weight = head.hidden.requires_grad_(), head.weight.requires_grad_()
    found = fk.top_k_of(fk.LMHead(hidden, weight), 3)
    assert not found.log_probs.requires_grad and not found.log_rest.requires_grad
    assert not fk.log_probs_at(hidden @ weight.T, IDS[:1].expand(9, 3)).log_probs.requires_grad


@pytest.mark.parametrize("tail", ["renormalize", "uniform", "bucket"])
def test_it_is_a_teacher(tail):
    """A loss by the lists of a head is that by the lists of its logits."""
    teacher, student = make(), make(H=16)
    labels = torch.randint(0, 403, (9,))
    log_p, _ = exact(teacher)
    values, ids = log_p.topk(8, 1)
    cached = fk.TopK(values.float(), ids, tail)
    losses = [fk.kd_loss(student, t, labels, fk.NoEvo()).loss for t in (fk.top_k_of(teacher, 8, tail=tail), cached)]
    assert relative(*losses) < 1e-5
    again = fk.log_probs_at(teacher, ids, tail=tail)
    assert relative(fk.kd_loss(student, again, labels, fk.NoEvo()).loss, losses[1]) < 1e-5


# Memory.


class Widest(TorchDispatchMode):
    """The most elements of a tensor made inside."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("backend", [TORCH, NATIVE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [False, True], ids=["largest", "at"])
def test_nothing_is_as_wide_as_the_vocabulary(given, dtype, backend, monkeypatch):
    """Of a single token's logits no copy is held, nor of the weight."""
    monkeypatch.setattr(listing, "empty", lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device=device))
    N, V, H = 3, 40_000, 4
    head = make(N=N, V=V, H=H, dtype=dtype, bias=True)
    request = listing.Request(
        side=Side(head.hidden, head.weight, head.bias), vocab=V, temperature=1.0, dtype=None, backend=backend,
        memory_budget=None,
    )  # fmt: skip
    with Widest() as seen:
        if given:
            listing.at(request, torch.arange(15).view(3, 5))
        else:
            listing.largest(request, 5, 1.0)
    _, columns = listing.tile_size(request)
    assert columns < V / 4 and 0 < seen.numel <= (columns + 32) * max(N, H)


def test_the_least_budget_is_named():
    head = make(H=24)
    with pytest.raises(ValueError, match=r"memory_budget must be at least 128 bytes .*one logit at a time.*got 127"):
        fk.top_k_of(head, 2, memory_budget=127, backend="native")
    assert fk.top_k_of(head, 2, memory_budget=128, backend="native").log_probs.shape == (9, 2)


# Compilation.


def test_compiled_and_checked_as_an_op():
    head = make(bias=True)

    def lists(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        side = fk.LMHead(hidden, weight, bias)
        found, lse = fk.top_k_of(side, 5, top_p=0.9, return_log_sum_exp=True)
        read = fk.log_probs_at(side, found.indices)
        return found.log_probs, found.indices, found.log_rest, lse, read.log_probs

    inputs = head.hidden, head.weight, head.bias
    compiled = torch.compile(lists, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*inputs), lists(*inputs), strict=True):
        assert torch.equal(a, b)
    for indices in (None, torch.arange(18).view(9, 2)):
        torch.library.opcheck(
            torch.ops.fused_kd.listed.default,
            (*inputs, 1.0, None, indices, 5, 0.9, 403, 1.0, None, "torch", None, "", 0, ()),
        )


# Bad input.

Z = torch.zeros(3, 10)
MIXED = fk.LMHead(Z, Z.bfloat16())


@pytest.mark.parametrize("error, message, call", [
    (TypeError, "head must be an LMHead or a tensor of logits, got list", lambda: fk.top_k_of([1.0], 2)),
    (TypeError, "head must be float32, bfloat16 or float16, got torch.int64", lambda: fk.top_k_of(Z.long(), 2)),
    (TypeError, "k must be a positive integer, got 2.0", lambda: fk.top_k_of(Z, 2.0)),
    (ValueError, "k must be in [1, 10], the vocabulary, got 11", lambda: fk.top_k_of(Z, 11)),
    (ValueError, "k must be in [1, 8], the vocabulary, got 9", lambda: fk.top_k_of(Z, 9, vocab_size=8)),
    (ValueError, "k must be a positive integer, got 0", lambda: fk.top_k_of(Z, 0)),
    (ValueError, "top_p must be a number in (0, 1] or None, got 0.0", lambda: fk.top_k_of(Z, 2, top_p=0.0)),
    (ValueError, "top_p must be a number in (0, 1] or None, got 1.5", lambda: fk.top_k_of(Z, 2, top_p=1.5)),
    (TypeError, "top_p must be a number", lambda: fk.top_k_of(Z, 2, top_p="0.9")),
    (ValueError, "top_p must be", lambda: fk.top_k_of(Z, 2, top_p=math.nan)),
    (ValueError, "temperature must be in [1e-08, 1e+12], got 0.0", lambda: fk.top_k_of(Z, 2, temperature=0.0)),
    (TypeError, "temperature must be a number, one for all tokens", lambda: fk.top_k_of(Z, 2, temperature=Z[0])),
    (ValueError, "vocab_size must be at most 10", lambda: fk.top_k_of(Z, 2, vocab_size=11)),
    (ValueError, "tail must be one of", lambda: fk.top_k_of(Z, 2, tail="ignore")),
    (ValueError, "backend must be None or one of", lambda: fk.top_k_of(Z, 2, backend="numpy")),
    (ValueError, "backend='cuda' needs tensors on an NVIDIA GPU", lambda: fk.top_k_of(Z, 2, backend="cuda")),
    (ValueError, "memory_budget must be a positive integer or None", lambda: fk.top_k_of(Z, 2, memory_budget=0)),
    (TypeError, "tp_group must be a process group", lambda: fk.top_k_of(Z, 2, tp_group=3)),
    (TypeError, "return_log_sum_exp must be True or False", lambda: fk.top_k_of(Z, 2, return_log_sum_exp=1)),
    (TypeError, "head hidden is torch.float32 and weight torch.bfloat16", lambda: fk.top_k_of(MIXED, 2)),
    (TypeError, "indices must be an int64 or int32 tensor, got torch.int16", lambda: fk.log_probs_at(Z, Z.short())),
    (TypeError, "indices must be an int64 or int32 tensor, got list", lambda: fk.log_probs_at(Z, [[1]])),
    (ValueError, "indices must have the shape of the head's tokens (3,) and K >= 1", lambda: fk.log_probs_at(Z, IDS)),
    (ValueError, "indices must have the shape", lambda: fk.log_probs_at(Z, IDS[:3, :0])),
    (ValueError, "indices must be below the vocabulary 10, got 299 at token 0", lambda: fk.log_probs_at(Z, IDS[:3])),
    (ValueError, "indices of a token must differ, got 4 twice at token 2", lambda: fk.log_probs_at(Z, TWICE)),
])  # fmt: skip
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


TWICE = torch.tensor([[1, 2, 3], [3, -1, -1], [4, 0, 4]])


def test_malformed_ids_are_nan_where_looking_would_synchronise(monkeypatch):
    monkeypatch.setattr("fused_kd.lists._check_indices", lambda *_: None)
    ids = TWICE.clone()
    ids[0, 0] = 10
    found, lse = fk.log_probs_at(Z, ids, return_log_sum_exp=True)
    for x in (found.log_probs[:, 1], found.log_rest, lse):
        assert x.isnan().tolist() == [True, False, True]
