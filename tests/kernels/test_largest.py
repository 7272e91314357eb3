"""The k largest logits of rows and the sum of all others, slab by slab, against sorting in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fused_kd.rows.contract import LONGEST_IN_TRITON, Leading, Logits
from fused_kd.rows.largest import take

from ..problems import needs_compiler
from .contract import DTYPES, FP32, NATIVE, TORCH, TRITON, backend_first, cases, device_of, slow

BACKENDS = [TORCH, NATIVE, TRITON]
# Of a row's logarithm, in units of its size.
BUDGET = 4e-7


def taken(
    raw: Tensor, k: int, backend: str, *, slabs: Sequence[int] = (), T: float | Sequence[float] = 1.0,
    scale: float = 1.0, softcap: float | None = None, finite: bool = False, start: int = 0,
) -> Leading:  # fmt: skip
    """Of the logits in slabs of these widths, and the rest of them; the first one is vocabulary id ``start``."""
    device = device_of(backend)
    raw, temperature = raw.to(device), torch.tensor(T, dtype=FP32, device=device).reshape(-1)
    so_far, first = Leading.none(len(raw), k, raw.device), 0
    for width in [*slabs, raw.shape[1] - sum(slabs)]:
        part = Logits(raw[:, first : first + width], scale, softcap, finite)
        take(part, start + first, so_far, temperature, backend)
        first += width
    return Leading(*(x.cpu() for x in so_far))


def final(raw: Tensor, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    z = raw.double() * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def check(found: Leading, z: Tensor, T: float | Sequence[float] = 1.0, exact: bool = True, start: int = 0) -> None:
    """Against final logits in float64, -inf where excluded; of equal ones the lower id is listed."""
    k, T = found.values.shape[1], torch.tensor(T, dtype=torch.float64).reshape(-1, 1)
    values, ids = z.sort(dim=1, descending=True, stable=True)
    some = values[:, :k] > -math.inf
    listed = torch.where(found.values > -math.inf, found.indices, -1).sort(1).values
    assert torch.equal(listed, (ids[:, :k] + start).where(some, -1).sort(1).values)
    order = found.values.sort(dim=1, descending=True).values.double()
    own = z.gather(1, (found.indices - start).clamp(0, z.shape[1] - 1))
    if exact:
        assert torch.equal(order, values[:, :k])
        assert torch.equal(own.where(found.values > -math.inf, -math.inf), found.values.double())
    else:
        assert float((order - values[:, :k]).norm() / values[:, :k].norm().clamp(min=1e-30)) < 4e-7
    rest = torch.full_like(values[:, :1], -math.inf) if k >= z.shape[1] else values[:, k:]
    expected = (rest / T).logsumexp(1)
    none = expected == -math.inf
    assert torch.equal(found.total == 0.0, none) and bool((found.top[none] == -math.inf).all())
    actual = found.top.double() / T.squeeze(1) + found.total.double().log()
    size = 1.0 + expected.abs() + (0.0 if exact else (rest[:, 0] / T.squeeze(1)).abs())
    assert bool(((actual - expected).abs() <= BUDGET * size)[~none].all())


LENGTHS = cases([0, 1, 5, 64], DTYPES, backends=BACKENDS, few=lambda k, dtype: dtype == FP32 or k == 5)


@pytest.mark.parametrize("backend, k, dtype", backend_first(LENGTHS))
def test_all_rows(backend, k, dtype):
    """Widths that are no multiple of a block or a vector."""
    raw = (torch.randn(*((2, 530) if slow(backend) else (7, 5001))) * 3).to(dtype)
    check(taken(raw, k, backend), raw.double())
    if not (slow(backend) and k == 64):
        check(taken(raw, k, backend, finite=True), raw.double())
    check(taken(raw, k, backend, slabs=(1, 130, 33, 257), start=1000), raw.double(), start=1000)


@pytest.mark.parametrize("V", [1, 2, 31, 515])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_list_of_all(backend, V):
    """k = V: nothing is left; and slabs that are narrower than the list."""
    raw = torch.randn(1 if slow(backend) and V > 31 else 3, V)
    check(taken(raw, V, backend), raw.double())
    check(taken(raw, V, backend, slabs=(V // 3, V // 2)), raw.double())


@pytest.mark.parametrize("order", ["ascending", "descending", "alternating"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sorted_rows(backend, order):
    """Each logit enters the list, or none after the first k."""
    raw = torch.linspace(-8, 8, 400).repeat(2, 1)
    if order == "descending":
        raw = raw.flip(1)
    elif order == "alternating":
        raw = raw * (1 - 2 * (torch.arange(400) % 2))
    check(taken(raw, 9, backend, slabs=(150,)), raw.double())


@pytest.mark.parametrize("k", [1, 4, 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_logits_the_lower_id_is_listed(backend, k):
    raw = (torch.randn(5, 600) * 1.5).round()
    raw[1], raw[2] = 0.0, torch.where(torch.arange(600) % 3 == 0, -0.0, 0.0)
    check(taken(raw, k, backend), raw.double() + 0.0)
    check(taken(raw, k, backend, slabs=(64, 100, 200)), raw.double() + 0.0)


@pytest.mark.parametrize("k", [0, 3, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_excluded_tokens_are_nothing(backend, k):
    """Some, all but fewer than k, and all; with a scale too."""
    raw = torch.randn(6, 300) * 3
    raw[torch.rand(6, 300) < 0.5] = -math.inf
    raw[1, 2:], raw[2], raw[3, :299] = -math.inf, -math.inf, -math.inf
    for slabs in ((), (100, 100)):
        check(taken(raw, k, backend, slabs=slabs), raw.double())
    check(taken(raw, k, backend, scale=0.5), raw.double() * 0.5)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of the interpreter
@pytest.mark.parametrize("k", [0, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_not_listed_and_spoils_the_sum(backend, k):
    raw = torch.randn(4, 300)
    raw[1, 0], raw[2, 150], raw[3, 299] = math.nan, math.nan, math.nan
    found = taken(raw, k, backend, slabs=(128,))
    assert found.total.isnan().tolist() == [False, True, True, True]
    order = raw.nan_to_num(nan=-math.inf).topk(k, 1).values
    assert torch.equal(found.values.sort(dim=1, descending=True).values, order)


@pytest.mark.parametrize("T", [0.3, 4.0, (0.1, 1.0, 2.0, 1e-8, 1e12)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_temperatures(backend, T):
    raw = torch.randn(5, 400) * 3
    found = taken(raw, 6, backend, slabs=(200,), T=T)
    assert bool(found.total.isfinite().all())
    of_row = torch.tensor(T).expand(5) if isinstance(T, float) else torch.tensor(T)
    usual = of_row > 1e-6
    some = Leading(*(x[usual] for x in found))
    check(some, raw.double()[usual], of_row[usual].tolist())
    assert bool((found.total[~usual] == 1.0).all())  # the largest of the others alone


@pytest.mark.parametrize("scale, softcap", [(0.25, None), (-3.0, None), (1.0, 5.0), (-0.5, 30.0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_and_softcap(backend, scale, softcap):
    raw = torch.randn(4, 500) * 6
    if softcap == 5.0:
        raw = raw / 4  # saturated logits are equal in fp32
    found = taken(raw, 7, backend, slabs=(300,), scale=scale, softcap=softcap)
    check(found, final(raw, scale, softcap), exact=False)


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset_costs_no_digits(backend, offset):
    raw = (torch.randn(3, 300) * 64).round() / 64
    found, shifted = taken(raw, 5, backend), taken(raw + offset, 5, backend)
    assert torch.equal(found.indices.sort(1).values, shifted.indices.sort(1).values)
    assert float((found.total / shifted.total - 1).abs().max()) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_any_stride(backend):
    raw = torch.randn(3, 900)
    check(taken(raw[:, 1:700], 5, backend), raw[:, 1:700].double())
    check(taken(raw[:, ::2], 5, backend), raw[:, ::2].double())
    check(taken(raw.T.contiguous().T, 5, backend), raw.double())
    nothing = taken(raw[:, :0], 5, backend)
    assert bool((nothing.values == -math.inf).all()) and bool((nothing.total == 0).all())
    assert taken(raw[:0], 5, backend).values.shape == (0, 5)


@pytest.mark.parametrize("k", [129, 700])
@pytest.mark.parametrize("backend", BACKENDS)
def test_long_lists(backend, k):
    raw = torch.randn(1 if slow(backend) else 2, 900) * 2
    check(taken(raw, k, backend, slabs=(400, 300)), raw.double())


@needs_compiler
def test_threads_do_not_change_the_native_result():
    raw = torch.randn(37, 3000)
    one = taken(raw, 20, "native")
    torch.set_num_threads(2)
    try:
        two = taken(raw, 20, "native")
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_what_does_not_fit_is_refused():
    logits, so_far = Logits(torch.randn(3, 10), 1.0, None, True), Leading.none(3, 2, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"temperature must be .*\(1,\) or \(3,\), got torch.float32, \(2,\)"):
        take(logits, 0, so_far, torch.ones(2), "torch")
    with pytest.raises(ValueError, match=r"so_far\.top must be .*\(3,\), got torch.float32, \(2,\)"):
        take(logits, 0, so_far._replace(top=so_far.top[:2]), torch.ones(1), "torch")
    with pytest.raises(ValueError, match=r"so_far\.indices must be contiguous, torch.int64"):
        take(logits, 0, so_far._replace(indices=so_far.indices.int()), torch.ones(1), "torch")


@pytest.mark.parametrize("backend", [TRITON])
def test_a_list_too_long_for_registers_is_refused(backend):
    with pytest.raises(ValueError, match=f"k must be at most {LONGEST_IN_TRITON} with backend='triton', got 2049"):
        taken(torch.randn(1, 3000), LONGEST_IN_TRITON + 1, backend)
