"""Teachers' probabilities mixed, a teacher after the other, against their weighted sum in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fused_kd.rows.contract import Logits
from fused_kd.rows.mixing import add

from ..problems import needs_compiler, relative
from .contract import BF16, DTYPES, FP16, FP32, NATIVE, TORCH, TRITON, backend_first, cases, device_of, slow

BACKENDS = [TORCH, NATIVE, TRITON]
INF, NAN = math.inf, math.nan
Numbers = float | Sequence[float]
# Relative norms over a row's tokens. Log-probabilities are rounded in units of their own size, some 10, and of 1; their
# errors are the relative ones of probabilities.
OF_P, OF_LOG_P = 1e-6, 2e-7


class Teacher(NamedTuple):
    raw: Tensor
    weight: Numbers = 1.0
    scale: float = 1.0
    softcap: float | None = None
    finite: bool = False


def numbers(x: Numbers, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(x, dtype=dtype).reshape(-1)


def mixed_of(teachers: Sequence[Teacher], backend: str, T: Numbers = 1.0, mixed: Tensor | None = None) -> Tensor:
    """(C, V), in ``mixed`` or in what held NaN before."""
    device = device_of(backend)
    if mixed is None:
        mixed = torch.full(teachers[0].raw.shape, NAN, device=device)
    for i, (raw, weight, *rest) in enumerate(teachers):
        share = numbers(weight, FP32).log().to(device)
        add(mixed, Logits(raw.to(device), *rest), share, numbers(T, FP32).to(device), backend, first=i == 0)
    return mixed.cpu()


def expected(teachers: Sequence[Teacher], T: Numbers = 1.0) -> Tensor:
    """(C, V) ``log sum w p`` in float64."""
    logs = []
    for raw, weight, scale, softcap, _finite in teachers:
        z = raw.double() * scale
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        share = numbers(weight).log().unsqueeze(1)
        logs.append((share + (z / numbers(T).unsqueeze(1)).log_softmax(1)).where(share > -INF, -INF))
    return torch.stack(logs).logsumexp(0)


def check(found: Tensor, log_p: Tensor, T: Numbers = 1.0) -> None:
    actual = found.double() / numbers(T).unsqueeze(1)
    assert torch.equal(actual.isnan(), log_p.isnan())
    assert torch.equal(actual == -INF, log_p == -INF)
    for a, e in zip(actual, log_p, strict=True):
        a, e = a[e.isfinite()], e[e.isfinite()]
        assert relative(a.exp(), e.exp()) <= OF_P
        assert float((a - e).norm()) <= OF_LOG_P * float((1.0 + e.abs()).norm())


def compare(teachers: Sequence[Teacher], backend: str, T: Numbers = 1.0) -> None:
    check(mixed_of(teachers, backend, T), expected(teachers, T), T)


NUMBERS = cases([1, 2, 3], DTYPES, backends=BACKENDS, few=lambda count, dtype: dtype == FP32 or count == 2)


@pytest.mark.parametrize("backend, count, dtype", backend_first(NUMBERS))
def test_teachers(backend, count, dtype):
    """Of all dtypes, near and far; widths that are no multiple of a block or a vector."""
    shape = (2, 2100) if slow(backend) else (7, 5001)
    near = torch.randn(shape) * 3
    weights = [(1.0,), (0.3, 0.7), (0.2, 0.5, 0.3)][count - 1]
    raws = [near, near + torch.randn(shape) / 2, torch.randn(shape) * 4][:count]
    teachers = [Teacher(raw.to(dtype), weight) for raw, weight in zip(raws, weights, strict=True)]
    compare(teachers, backend)
    if not slow(backend):
        compare([teacher._replace(finite=True) for teacher in teachers], backend)


@pytest.mark.parametrize("C, V", [(1, 1), (3, 1), (1, 2), (5, 31), (2, 1024), (1, 2049)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend, C, V):
    compare([Teacher(torch.randn(C, V) * 2, 0.25), Teacher(torch.randn(C, V).to(BF16), 0.75)], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_no_columns(backend):
    for shape in ((0, 5), (3, 0)):
        assert mixed_of([Teacher(torch.randn(shape))] * 2, backend).shape == shape


@pytest.mark.parametrize("T", [0.3, 4.0, (0.1, 1.0, 2.0, 1e-8, 1e12)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_temperatures(backend, T):
    compare([Teacher(torch.randn(5, 400) * 3, 0.4), Teacher(torch.randn(5, 400) * 3, 0.6)], backend, T)


@pytest.mark.parametrize("T", [1.0, (2.0, 1.0, 0.5, 3.0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_each_row(backend, T):
    """0 among them: there, what the teacher's logits hold does not count."""
    raws = [torch.randn(4, 300) * 3 for _ in range(3)]
    raws[0][1], raws[1][0], raws[2][0, ::2] = NAN, NAN, INF
    weights = ((1.0, 0.0, 0.2, 0.1), (0.0, 0.5, 0.3, 0.8), (0.0, 0.5, 0.5, 0.1))
    compare([Teacher(raw, weight) for raw, weight in zip(raws, weights, strict=True)], backend, T)
    usable = [raw.nan_to_num(posinf=1.0) for raw in raws]
    compare([Teacher(usable[0], 0.3), Teacher(raws[1], 0.0), Teacher(usable[2], 0.7)], backend, T)


@pytest.mark.parametrize("T", [1.0, 0.7])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_share_a_row_stays_as_it_is(backend, T):
    """Bit by bit; and a row of one teacher alone is what that teacher gives."""
    raws = [torch.randn(4, 300) * 3 for _ in range(2)]
    weights = ((1.0, 0.0, 1.0, 0.0), (0.0, 1.0, 0.0, 1.0))
    chosen = mixed_of([Teacher(raw, weight) for raw, weight in zip(raws, weights, strict=True)], backend, T)
    alone = [mixed_of([Teacher(raw)], backend, T) for raw in raws]
    assert torch.equal(chosen[::2], alone[0][::2])
    assert relative(chosen[1::2], alone[1][1::2]) < 1e-7  # times T and over T again
    nobody = mixed_of([Teacher(raws[0], 0.0), Teacher(raws[1], (0.0, 1.0, 0.0, 0.0))], backend, T)
    assert (nobody == -INF).all(1).tolist() == [True, False, True, True]


@pytest.mark.parametrize("finite", [False, True])
@pytest.mark.parametrize("scale, softcap", [(0.25, None), (-3.0, None), (1.0, 5.0), (-0.5, 30.0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_and_softcap(backend, scale, softcap, finite):
    raws = [torch.randn(3, 500) * 4 for _ in range(2)]
    compare([Teacher(raw, 0.5, scale, softcap, finite) for raw in raws], backend, 2.0)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("least", [-INF, torch.finfo(FP32).min, -1e20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_excluded_tokens(backend, least, scale):
    """By one teacher: the other's share is left; by all: -inf; a teacher that excludes all of a row spoils it."""
    raws = [torch.randn(5, 300) * 3 for _ in range(3)]
    raws[0][0, :200], raws[1][0, 100:250], raws[2][0, 150:] = least, least, least
    raws[0][1, 1:], raws[1][1, :1] = least, least
    raws[1][2], raws[2][3] = least, least
    for raw in raws:
        raw[4, 7:290] = least
    teachers = [Teacher(raw, 0.2 * (i + 1), scale) for i, raw in enumerate(raws)]
    excluding = [
        teacher._replace(raw=raw.masked_fill(raw == least, -INF)) for teacher, raw in zip(teachers, raws, strict=True)
    ]
    log_p = expected(excluding)
    assert log_p.isnan().all(1).tolist() == [False, False, True, True, False]
    found = mixed_of(teachers, backend)
    check(found, log_p)
    assert (found[4] == -INF).sum() == 283 and (found[0] == -INF).sum() == 50


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("wrong", [NAN, INF])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_numbers_spoil_their_row_alone(backend, place, wrong):
    """All of it, also tokens that are excluded, whichever teacher has them and whatever others follow."""
    raws = [torch.randn(4, 300) for _ in range(3)]
    raws[place][1, 0], raws[place][2, 150], raws[place][3, 299] = wrong, wrong, wrong
    for raw in raws:
        raw[2, 10:20] = -INF
    for given in (raws, raws[: place + 1]):
        found = mixed_of([Teacher(raw, 0.5) for raw in given], backend)
        assert found.isnan().all(1).tolist() == found.isnan().any(1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_unlike_teachers_keep_their_digits(backend):
    """Logits of 1e4, probabilities of e**-500 and less beside each other and beside larger ones."""
    z = torch.randn(4, 300) * 3
    first, second = z * 1e4, z.roll(7, 1) * 1e4
    first[1:], second[1:] = z[1:] - 500.0, torch.randn(3, 300) - 520.0
    first[1:, 5], second[1:, 5] = 0.0, 0.0
    second[2] = torch.randn(300)
    second[3, :150] = -INF
    compare([Teacher(first, 0.5), Teacher(second, 0.5)], backend)
    compare([Teacher(second, 1e-30), Teacher(first, 1.0)], backend)


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset_costs_no_digits(backend, offset):
    raws = [(torch.randn(3, 300) * 64).round() / 64 for _ in range(2)]
    found, shifted = (mixed_of([Teacher(raw + by, 0.5) for raw in raws], backend) for by in (0.0, offset))
    assert torch.equal(found, shifted)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("softcap", [None, 10.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_in_place(backend, softcap):
    raw = torch.randn(3, 2500) * 3
    raw[1], raw[2, ::5] = NAN, -INF
    teacher, other = Teacher(raw, (0.5, 0.0, 0.3), 1.0, softcap), Teacher(torch.randn(3, 2500), 0.5)
    own = raw.clone().to(device_of(backend))
    found = mixed_of([teacher._replace(raw=own), other], backend, 2.0, mixed=own)
    assert torch.equal(found, mixed_of([teacher, other], backend, 2.0))


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_any_stride(backend, dtype):
    """Of the logits, and of what is written: nothing beside it."""
    raw, other = torch.randn(3, 900).to(dtype), Teacher(torch.randn(3, 699), 0.5)
    around = torch.full((3, 750), 7.0, device=device_of(backend))
    for own in (raw[:, 1:700], torch.randn(3, 1398).to(dtype)[:, ::2], raw.T.contiguous().T[:, 201:]):
        teachers = [Teacher(own, 0.5), other]
        check(mixed_of(teachers, backend, mixed=around[:, 3:702]), expected(teachers))
    assert bool((around[:, :3] == 7.0).all()) and bool((around[:, 702:] == 7.0).all())


@needs_compiler
def test_threads_do_not_change_the_native_result():
    teachers = [Teacher(torch.randn(37, 3000), 0.5) for _ in range(2)]
    one = mixed_of(teachers, "native")
    torch.set_num_threads(2)
    try:
        two = mixed_of(teachers, "native")
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one, two)


def test_what_does_not_fit_is_refused():
    mixed, logits, one = torch.zeros(3, 10), Logits(torch.randn(3, 10), 1.0, None, True), torch.ones(1)
    for wrong in (mixed.double(), mixed[:2], mixed[:, :9], torch.zeros(10, 3).T, torch.zeros(3, 20)[:, ::2]):
        with pytest.raises(ValueError, match=r"mixed must be float32, of shape \(3, 10\) and with unit stride"):
            add(wrong, logits, one, one, "torch", first=True)
    with pytest.raises(ValueError, match=r"temperature must be .*\(1,\) or \(3,\), got torch.float32, \(2,\)"):
        add(mixed, logits, one, torch.ones(2), "torch", first=True)
    with pytest.raises(ValueError, match=r"log_share must be .*\(1,\) or \(3,\), got torch.float64, \(3,\)"):
        add(mixed, logits, torch.zeros(3).double(), one, "torch", first=True)
    assert not mixed.any()
