"""Lists that are drawn, against the whole softmax in float64: right on average, and reproducible."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.engines import drawing, listing
from fused_kd.engines.problem import Side

from ..kernels.contract import NATIVE, TORCH, TRITON, backend_first, cases, device_of, slow
from ..problems import relative
from .test_top_k_of import OPTIONS, Widest, descending, exact, make


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense(found: fk.TopK, V: int) -> Tensor:
    """(N, V) float64 probabilities that lists give each entry."""
    p = found.log_probs.cpu().double().exp().flatten(0, -2)
    ids = found.indices.cpu().reshape(len(p), -1)
    assert bool(((ids >= 0) == (p > 0)).all()) and int(ids.max()) < V
    made = torch.zeros(len(p), V, dtype=torch.float64)
    assert int(torch.zeros_like(made).scatter_add_(1, ids.clamp(min=0), (ids >= 0).double()).max()) <= 1
    return made.scatter_add_(1, ids.clamp(min=0), p)


@pytest.mark.parametrize("backend, name, T", backend_first(cases(list(OPTIONS), [1.0, 0.5, 3.0],
                                                                 backends=[TORCH, NATIVE, TRITON])))  # fmt: skip
def test_the_k_largest_and_draws_from_the_others(backend, name, T):
    """The first k are a teacher's own; every draw has an n-th of the rest; all together are 1."""
    n, k, N = 12, 5, 4 if slow(backend) else 9
    head = make(N, device=device_of(backend), **OPTIONS[name])
    log_p, _ = exact(head, T)
    found = fk.sample_of(head, n, k=k, temperature=T, backend=backend, generator=seeded())
    assert found.log_probs.shape == found.indices.shape == (N, k + n)
    assert found.log_probs.dtype == torch.float32 and found.indices.dtype == torch.int64
    assert found.tail == "renormalize" and found.temperature == T
    p = dense(found, 403)
    best = descending(log_p, k)
    assert torch.equal(found.indices[:, :k].cpu(), best)
    assert relative(p.gather(1, best), log_p.exp().gather(1, best)) < 1e-5
    rest = 1 - log_p.exp().gather(1, best).sum(1, keepdim=True)
    times = p.scatter(1, best, 0.0) / rest * n
    assert float((times - times.round()).abs().max()) < 1e-3 and times.round().sum(1).tolist() == [n] * N
    assert float((p.sum(1) - 1).abs().max()) < 1e-6


@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("k", [0, 6])
def test_right_on_average(k, T):
    """Over 40,000 lists of each of three tokens, 8 draws each: no entry is further from its probability than five
    standard deviations of draws that do not know of each other, and all together not by more than these explain."""
    V, n, many = 60, 8, 40_000
    z = torch.randn(3, V) * 2
    z[1, 10:20] = -math.inf
    p = (z.double() / T).softmax(1)
    rows = z.repeat_interleave(many, 0)
    mean = dense(fk.sample_of(rows, n, k=k, temperature=T, generator=seeded(1)), V).view(3, many, V).mean(1)
    listed = torch.zeros_like(p, dtype=torch.bool).scatter_(1, p.topk(k, 1).indices, True)
    rest = p.masked_fill(listed, 0.0).sum(1, keepdim=True)
    assert relative(mean[listed], p[listed]) < 1e-6 or k == 0
    share = p.masked_fill(listed, 0.0) / rest
    spread = rest * (share * (1 - share) / (n * many)).sqrt()
    assert bool(((mean - p).abs() <= 5 * spread + 1e-7).all())
    assert float(mean[1, 10:20].abs().max()) == 0.0, "excluded tokens"
    distance = ((mean - p).square().sum() / spread.square().sum()).sqrt()
    assert 0.05 < float(distance) < 1.2


@pytest.mark.parametrize("objective", [fk.ForwardKD(lam=1), fk.ForwardKD(), fk.NoEvo(), 0.5 * fk.SFT() + fk.NoEvo()])
@pytest.mark.parametrize("T", [1.0, 2.0])
def test_the_gradient_is_right_on_average(objective, T):
    """Of 4,000 lists of the same token; by the k largest alone it is not."""
    V, many = 40, 4_000
    teacher, student = torch.randn(1, V) * 2, torch.randn(1, V) * 2
    labels = torch.full((many,), 3)

    def gradient(of: Any) -> Tensor:
        z = student.expand(many, V).clone().requires_grad_()
        fk.kd_loss(z, of, labels, objective, temperature=T).loss.backward()
        return z.grad.sum(0)

    online = gradient(teacher.expand(many, V))
    sampled = fk.sample_of(teacher.expand(many, V), 8, temperature=T, generator=seeded(2))
    assert relative(gradient(sampled), online) < 0.02
    alone = fk.top_k_of(teacher.expand(many, V), 8, temperature=T, tail="renormalize")
    assert relative(gradient(alone), online) > 0.03


def test_what_is_drawn_varies_less_than_by_draws_alone():
    """One draw in each n-th: an entry that holds more than an n-th is drawn every time."""
    z = torch.tensor([0.3, 0.25, 0.25, 0.1, 0.1]).log().repeat(500, 1)
    p = dense(fk.sample_of(z, 4, generator=seeded()), 5)
    assert set((4 * p[:, 0]).round().tolist()) == {1.0, 2.0}


def test_all_entries_are_the_teacher():
    """k = V leaves nothing to draw, and k = V - 1 one entry."""
    head = make(V=30)
    log_p, _ = exact(head)
    for k in (29, 30):
        found = fk.sample_of(head, 3, k=k)
        assert relative(dense(found, 30), log_p.exp()) < 1e-5
        assert (found.indices >= 0).sum(1).tolist() == [30] * 9


def test_a_state_gives_the_same_lists():
    head = make()
    same = [fk.sample_of(head, 6, k=2, generator=seeded(3)) for _ in range(2)]
    assert torch.equal(same[0].indices, same[1].indices) and torch.equal(same[0].log_probs, same[1].log_probs)
    other = fk.sample_of(head, 6, k=2, generator=seeded(4))
    assert not torch.equal(same[0].indices, other.indices)
    torch.manual_seed(7)
    first = fk.sample_of(head, 6)
    assert not torch.equal(first.indices, fk.sample_of(head, 6).indices)
    torch.manual_seed(7)
    assert torch.equal(first.indices, fk.sample_of(head, 6).indices)


@pytest.mark.parametrize("backend", [TORCH, NATIVE])
@pytest.mark.parametrize("budget", [None, 90_000, 6_000])
def test_tiles_do_not_count(budget, backend, monkeypatch):
    """The same draws, however tokens and vocabulary are divided."""
    head = make(N=61, V=1003, bias=True)
    whole = fk.sample_of(head, 9, k=3, generator=seeded(), backend=backend)
    monkeypatch.setattr(listing, "CPU_TILE", 1 << 12)
    monkeypatch.setattr(listing, "CPU_TOKENS", 40)
    parts = fk.sample_of(head, 9, k=3, generator=seeded(), backend=backend, memory_budget=budget)
    assert torch.equal(parts.indices, whole.indices)
    assert relative(parts.log_probs.exp(), whole.log_probs.exp()) < 1e-5
    logits = fk.LMHead(head.hidden, head.weight, head.bias)
    given = fk.sample_of(logits.hidden @ logits.weight.T + logits.bias, 9, k=3, generator=seeded(), backend=backend)
    assert torch.equal(given.indices, whole.indices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_heads_have_fp32_logits(dtype):
    low = make(dtype=dtype, bias=True)
    same = fk.LMHead(low.hidden.float(), low.weight.float(), low.bias.float())
    a, b = (fk.sample_of(head, 8, k=4, generator=seeded()) for head in (low, same))
    assert torch.equal(a.indices, b.indices) and relative(a.log_probs.exp(), b.log_probs.exp()) < 1e-5


def test_vocab_size_cuts_and_shapes():
    z = torch.randn(2, 3, 410)
    z[..., 403:] = 50.0
    found = fk.sample_of(z, 4, k=2, vocab_size=403, generator=seeded())
    assert found.log_probs.shape == found.indices.shape == (2, 3, 6) and int(found.indices.max()) < 403
    one = fk.sample_of(fk.LMHead(torch.randn(4), torch.randn(90, 4)), 2)
    assert one.log_probs.shape == (2,)
    assert fk.sample_of(z[:0], 2).log_probs.shape == (0, 3, 2)


def test_an_offset_costs_nothing():
    z = (torch.randn(9, 300) * 64).round() / 64
    a, b = fk.sample_of(z, 7, k=2, generator=seeded()), fk.sample_of(z + 8192, 7, k=2, generator=seeded())
    assert torch.equal(a.indices, b.indices) and relative(a.log_probs.exp(), b.log_probs.exp()) < 1e-6


def test_excluded_tokens_are_not_drawn():
    """Nor are there draws where nothing is left; a token without any is empty."""
    z = torch.full((3, 9), -math.inf)
    z[0, 4], z[1, [2, 7]] = 0.0, torch.tensor([0.0, 1.0])
    found = fk.sample_of(z, 5, k=1, generator=seeded())
    assert found.indices[0].tolist() == [4, -1, -1, -1, -1, -1]
    assert found.indices[1].tolist() == [7, 2, -1, -1, -1, -1]
    assert (found.log_probs > -math.inf).sum(1).tolist() == [1, 2, 0]
    assert relative(dense(fk.TopK(found.log_probs[:2], found.indices[:2]), 9), z[:2].double().softmax(1)) < 1e-6


def test_a_certain_teacher_keeps_its_rest():
    """Entries of e-40 and of e-200 beside one of 1 are drawn as if they were alone."""
    z = torch.full((2, 50), -40.0)
    z[:, 7] = 0.0
    z[1] *= 5
    found = fk.sample_of(z, 10, k=1, generator=seeded())
    assert bool((found.indices[:, 0] == 7).all()) and all(len(set(row)) == 11 for row in found.indices.tolist())
    rest = found.log_probs[:, 1:].double().logsumexp(1)
    assert relative(rest, math.log(49) + torch.tensor([-40.0, -200.0], dtype=torch.float64)) < 1e-6


def test_a_sum_that_falls_short_by_rounding():
    """What no running sum reaches is the largest of the others."""
    head = make(N=4)
    side = Side(head.hidden, head.weight)
    request = listing.Request(
        side=side, vocab=403, temperature=1.0, dtype=None, backend="torch", memory_budget=None
    )  # fmt: skip
    found = drawing.drawn(request, 2, torch.full((4, 3), 1.0001, dtype=torch.float64))
    assert torch.equal(found.draws, descending(exact(head)[0], 3)[:, 2:].expand(4, 3))


def test_broken_logits_are_nan():
    z = torch.randn(3, 50)
    z[1, 4], z[2, 9] = math.nan, math.inf
    for k in (0, 3):
        found = fk.sample_of(z, 3, k=k)
        assert found.log_probs.isnan().any(1).tolist() == [False, True, True]


def test_no_gradient_flows_and_an_op():
    head = make(bias=True)
    hidden = head.hidden.requires_grad_()
    assert not fk.sample_of(fk.LMHead(hidden, head.weight), 3, k=1).log_probs.requires_grad
    torch.library.opcheck(
        torch.ops.fused_kd.drawn.default,
        (hidden.detach(), head.weight, head.bias, 1.0, None, torch.rand(9, 4, dtype=torch.float64), 2, 403, 1.0, None,
         "torch", None),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_as_wide_as_the_vocabulary(dtype, monkeypatch):
    """Of a single token's logits no copy is held, nor of the weight."""
    monkeypatch.setattr(listing, "empty", lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device=device))
    N, V, H = 3, 40_000, 4
    head = make(N=N, V=V, H=H, dtype=dtype, bias=True)
    request = listing.Request(
        side=Side(head.hidden, head.weight, head.bias), vocab=V, temperature=1.0, dtype=None, backend="torch",
        memory_budget=None,
    )  # fmt: skip
    with Widest() as seen:
        drawing.drawn(request, 2, torch.rand(N, 5, dtype=torch.float64))
    _, columns = listing.tile_size(request)
    assert columns < V / 4 and 0 < seen.numel <= (columns + 32) * max(N, H)


Z = torch.zeros(3, 10)


@pytest.mark.parametrize("error, message, call", [
    (TypeError, "head must be an LMHead or a tensor of logits, got list", lambda: fk.sample_of([1.0], 2)),
    (TypeError, "n must be a positive integer, got 2.0", lambda: fk.sample_of(Z, 2.0)),
    (ValueError, "n must be a positive integer, got 0", lambda: fk.sample_of(Z, 0)),
    (TypeError, "k must be an integer, got None", lambda: fk.sample_of(Z, 2, k=None)),
    (ValueError, "k must be in [0, 10], up to the vocabulary, got 11", lambda: fk.sample_of(Z, 2, k=11)),
    (ValueError, "k must be in [0, 8], up to the vocabulary, got -1", lambda: fk.sample_of(Z, 2, k=-1, vocab_size=8)),
    (ValueError, "temperature must be in", lambda: fk.sample_of(Z, 2, temperature=0.0)),
    (TypeError, "generator must be a torch.Generator or None, got 3", lambda: fk.sample_of(Z, 2, generator=3)),
    (ValueError, "memory_budget must be at least", lambda: fk.sample_of(Z, 2, memory_budget=8)),
    (ValueError, "backend must be None or one of", lambda: fk.sample_of(Z, 2, backend="numpy")),
])  # fmt: skip
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)
