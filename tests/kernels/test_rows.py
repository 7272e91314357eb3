"""What every row promises, one test a promise: results to a rounding, whatever the shape, layout, dtype and content."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fused_kd as fk
from fused_kd import objectives as o
from fused_kd.divergences import TINY
from fused_kd.rows.contract import Logits, RowInputs, RowOutputs
from fused_kd.rows.select import get_row
from fused_kd.terms import RowSpec, Term
from fused_kd.tuning import current

from ..problems import JUMPS, amplified, eager_rows, has_powers, reads_level, relative, summands
from .contract import (
    ALL,
    BF16,
    BUDGET,
    CUDA,
    DTYPES,
    FP16,
    FP32,
    INTERPRETED,
    KINDS,
    NATIVE,
    ROUNDED,
    ROWS,
    TRITON,
    call,
    cases,
    check,
    device_of,
    loose,
    make,
    oracle,
    rounded,
    scalars_of,
    slow,
)

NATIVE_BLOCK = 1024  # of csrc/kd_row.c
BLOCK = current().row_block
# Around the blocks, vectors and lanes of each; beyond them only where a row is fast.
VOCABS = {
    "torch": (1, 2, 3, 127, 2049),
    "native": (1, 2, 3, 127, NATIVE_BLOCK - 1, NATIVE_BLOCK, 2 * NATIVE_BLOCK + 1),
    "triton": (1, 3, 127, 1025, BLOCK, 2 * BLOCK + 1),
    "cuda": (1, 2, 31, 33, 64, 65, 255, 1030),
}


def a_few(backend: str, many: int) -> int:
    """Columns of a row of several blocks, where its cost allows."""
    return min(many, {"triton": 2 * BLOCK + 400, "cuda": 300}[backend]) if slow(backend) else many


def vocabularies() -> list:
    kinds = (*KINDS, "forward_kd")
    return [case for row in ROWS for case in cases(VOCABS[row.values[0]], ALL, backends=[row], kinds=kinds)]


@pytest.mark.parametrize("V, objective, backend", vocabularies(), indirect=["backend"])
def test_any_vocabulary(V, objective, backend):
    data = make(3, V, near=False)
    data[2][-1] = V - 1
    actual, expected = call(backend, *data, objective), oracle(*data, objective)
    if V == 1 and not reads_level(objective):  # nothing to learn: the truth is 0
        assert all(x.abs().max() <= 2e-7 for x in (actual.loss, actual.difficulty, actual.dlogits))
    else:
        check(actual, expected, 2 * BUDGET if loose(objective) else BUDGET)


KINDS_OF_ROWS = {"close": {"std": 1.0}, "peaked": {"std": 4.0}, "far": {"near": False}}


# The torch row is eager PyTorch itself: tests/kernels/test_error_budget.py holds it.
COMPARED = cases(list(KINDS_OF_ROWS), ALL, backends=[NATIVE, TRITON])


@pytest.mark.parametrize("kind, objective, backend", COMPARED, indirect=["backend"])
def test_within_the_error_of_eager_pytorch(kind, objective, backend):
    z, z_t, labels = make(4, a_few(backend, 5003), **KINDS_OF_ROWS[kind])
    actual, expected = call(backend, z, z_t, labels, objective), oracle(z, z_t, labels, objective)
    leaf = z.clone().requires_grad_()
    loss = eager_rows(leaf, z_t, labels, objective)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    budget = 2 * BUDGET if loose(objective) or has_powers(objective) else BUDGET
    check(actual, expected, budget, least=2e-7 * amplified(objective))
    least = 2e-7 * amplified(objective) * len(z) ** 0.5 / float(expected.loss.norm())
    assert relative(actual.loss, expected.loss) <= max(
        2 * relative(loss, expected.loss), least, 1e-6 if backend == "cuda" else 2e-7
    )
    assert relative(actual.dlogits, expected.dlogits) <= max(
        2 * relative(gradient, expected.dlogits), 2e-6 if has_powers(objective) else 5e-7
    )


SHAPES = {
    "T": {"T": 0.7},
    "T, scale": {"T": 2.0, "scale": (0.3, 3.0)},
    "student's cap": {"cap": (3.0, None)},
    "teacher's cap": {"cap": (None, 2.0), "T": 1.5, "scale": (1.0, 0.5)},
    "all": {"cap": (5.0, 30.0), "T": 1.5, "scale": (0.5, 1.0)},
}


@pytest.mark.parametrize("shape, objective, backend", cases(list(SHAPES), ALL), indirect=["backend"])
def test_temperature_scale_and_softcap(shape, objective, backend):
    data, options = make(4, a_few(backend, 1500), std=4.0), SHAPES[shape]
    actual, expected = call(backend, *data, objective, **options), oracle(*data, objective, **options)
    budget = 1e-5 if loose(objective) or backend == "torch" else 2 * BUDGET
    check(actual, expected, budget, loss=4e-6 if backend == "torch" else 1e-6, least=2e-7 * amplified(objective))


@pytest.mark.parametrize("objective, backend", cases(ALL), indirect=["backend"])
def test_loss_alone_and_in_place(objective, backend):
    """Bit by bit the same as with a gradient beside the logits."""
    z, z_t, labels = make(5, a_few(backend, 2500))
    full = call(backend, z, z_t, labels, objective)
    alone = call(backend, z, z_t, labels, objective, gradient=False)
    student = z.to(device_of(backend)).clone()
    in_place = call(backend, student, z_t, labels, objective, dlogits=student)
    for name in ("loss", "difficulty", "is_hard"):
        value = getattr(full, name)
        # Without a gradient it is another kernel, in which a compiler may contract other products and sums.
        same = relative(getattr(alone, name).double(), value) <= (0.0 if device_of(backend) == "cpu" else 1e-6)
        assert same and torch.equal(getattr(in_place, name), value)
    assert alone.dlogits is None and in_place.dlogits is student and torch.equal(student, full.dlogits)


@pytest.mark.parametrize("objective, backend", cases(ALL), indirect=["backend"])
def test_ignored_rows_and_weights(objective, backend):
    z, z_t, labels = make(6, a_few(backend, 2500))
    weights = torch.tensor([1.0, 0.0, 2.5, -1.0, 0.3, 7.0])
    expected = oracle(z, z_t, labels, objective)
    expected.dlogits.mul_(weights[:, None])
    z[4] = math.nan  # left out, hence never seen
    for left_out, label in ((1, -100), (4, -(2**40))):
        labels[left_out] = label
        for value in expected[:4]:
            value[left_out] = 0
    for dtype in (FP32, BF16):
        into = torch.full(z.shape, math.nan, dtype=dtype, device=device_of(backend))
        actual = call(backend, z, z_t, labels, objective, weights=weights, dlogits=into)
        check(actual, expected, max(2 * BUDGET, 2 * rounded(expected.dlogits, dtype)))
        assert not actual.dlogits[labels.to(into.device) < 0].any()


@pytest.mark.parametrize("student, teacher, backend", cases(DTYPES, DTYPES, pairs=True), indirect=["backend"])
def test_dtypes_are_independent_and_rounded_once(student, teacher, backend):
    objective = fk.SelfEvolution(gamma=1.0)
    for V in (517, 520) if backend == "cuda" else (a_few(backend, 2500),):
        z, z_t, labels = make(4, V)
        z, z_t = z.to(student), z_t.to(teacher)
        exact, expected = call(backend, z, z_t, labels, objective), oracle(z, z_t, labels, objective)
        check(exact, expected)
        for dtype in (BF16, FP16):
            into = torch.full(z.shape, math.nan, dtype=dtype, device=device_of(backend))
            narrow = call(backend, z, z_t, labels, objective, dlogits=into)
            if backend in ("torch", "native"):
                assert torch.equal(narrow.dlogits, exact.dlogits.to(dtype))
            check(narrow, expected, rounded(expected.dlogits, dtype))
        own = z.to(device_of(backend)).clone()
        check(call(backend, own, z_t, labels, objective, dlogits=own), expected, rounded(expected.dlogits, student))


def wide(x: Tensor, by: int = 13) -> Tensor:
    return torch.cat([x, torch.full((len(x), by), math.nan, device=x.device).to(x.dtype)], 1)[:, : x.shape[1]]


def aligned(x: Tensor) -> Tensor:
    """Rows that begin at multiples of 64 elements, as vectors want odd vocabularies."""
    return wide(x, -x.shape[1] % 64 or 64)


def shifted(x: Tensor) -> Tensor:
    return torch.cat([torch.full((len(x), 1), math.nan, device=x.device).to(x.dtype), wide(x, 5)], 1)[:, 1:]


def transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


VIEWS = [pytest.param(view, id=view.__name__) for view in (wide, aligned, shifted, transposed)]


@pytest.mark.parametrize(
    "view, objective, backend", cases(VIEWS, ALL, kinds=("sft", "forward_kd", "reverse_kd")), indirect=["backend"]
)
def test_strided_inputs_and_outputs(view, objective, backend):
    """What lies between the rows is NaN: never read, and still there afterwards."""
    z, z_t, labels = (x.to(device_of(backend)) for x in make(3, a_few(backend, 2337), near=False))
    labels[1] = z.shape[1] - 1
    expected, budget = oracle(z, z_t, labels, objective), 2 * BUDGET if loose(objective) else BUDGET
    student, teacher = view(z), view(z_t)
    for dtype in (FP32, BF16):
        out = view(torch.full(z.shape, math.nan, device=z.device, dtype=dtype))
        check(
            call(backend, student, teacher, labels, objective, dlogits=out),
            expected,
            max(budget, rounded(expected.dlogits, dtype)),
        )
        assert _between_is_nan(out, view)
    check(call(backend, student, teacher, labels, objective, dlogits=student), expected, budget)
    assert _between_is_nan(student, view) and _between_is_nan(teacher, view)


def _between_is_nan(x: Tensor, view) -> bool:
    return view is transposed or bool(x._base[:, x.shape[1] + (view is shifted) :].isnan().all())


@pytest.mark.parametrize("backend", ROWS, indirect=True)
def test_a_row_for_all(backend):
    z, z_t, labels = make(1, 100)
    found = call(backend, z.expand(5, -1), z_t.expand(5, -1), labels.expand(5), fk.SelfEvolution())
    assert (found.dlogits == found.dlogits[0]).all() and (found.loss == found.loss[0]).all()


@pytest.mark.parametrize("backend", [NATIVE, TRITON, CUDA], indirect=True)
def test_vectors_must_be_contiguous(backend):
    z, device = torch.zeros(2, 4, device=device_of(backend)), device_of(backend)
    labels, scalars = torch.zeros(2, dtype=torch.int64, device=device), scalars_of(fk.SFT()).to(device)
    inputs = RowInputs(Logits(z, 1.0, None, False), None, labels, None, scalars, fk.SFT().spec, False)
    vectors = torch.zeros(2, device=device), torch.zeros(2, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match=r"loss must be contiguous, got strides \(2,\)"):
        get_row(backend)(inputs, RowOutputs(torch.zeros(4, device=device)[::2], *vectors, None))


LEVEL = [objective for objective in ALL if not reads_level(objective)]


@pytest.mark.parametrize("objective, backend", cases(LEVEL), indirect=["backend"])
def test_excluded_tokens_and_large_offsets(objective, backend):
    """-inf on both sides, also over whole blocks, changes nothing; nor does a constant on all logits of a side."""
    block = {"native": NATIVE_BLOCK, "triton": BLOCK, "cuda": 64}.get(backend, 500)
    V, kept = 3 * block + 8, slice(block + 5, 2 * block + 3)
    z, z_t, labels = make(3, kept.stop - kept.start)
    z, z_t = (z * 256).round() / 256, (z_t * 256).round() / 256  # so that the sums below are exact
    expected = oracle(z, z_t, labels, objective)
    wider, wider_t = (torch.full((3, V), -math.inf) for _ in range(2))
    wider[:, kept], wider_t[:, kept] = z + 8000.0, z_t - 8000.0
    actual = call(backend, wider, wider_t, labels + kept.start, objective)
    check(actual._replace(dlogits=actual.dlogits[:, kept]), expected, 2 * BUDGET if loose(objective) else BUDGET)
    beside = torch.cat([actual.dlogits[:, : kept.start], actual.dlogits[:, kept.stop :]], 1)
    assert beside.abs().max() <= (TINY if "todi" in summands(objective) else 0.0)  # its ratios are of TINY there
    assert not call(backend, wider, wider_t, labels + kept.start, objective, T=1e-8).loss.isnan().any()


@pytest.mark.parametrize("value, objective, backend", cases([math.nan, math.inf], ALL), indirect=["backend"])
def test_a_number_that_is_none_is_not_hidden(value, objective, backend):
    V = a_few(backend, 2500)
    for side in (0, 1) if objective.spec.needs_teacher else (0,):
        data = make(2, V)
        data[side][0, V - 100] = value
        loss, difficulty, _, gradient, _ = call(backend, *data, objective)
        assert loss[0].isnan() and difficulty[0].isnan()
        assert gradient[0].isnan().any() or (side == 1 and summands(objective) & JUMPS)  # compares only
        assert loss[1].isfinite() and difficulty[1].isfinite() and gradient[1].isfinite().all()


@pytest.mark.parametrize("backend", [NATIVE, TRITON, CUDA], indirect=True)
def test_a_label_beyond_the_row_reads_nothing(backend):
    z, z_t, labels = make(2, 300)
    for label in (300, 303, 304, NATIVE_BLOCK, 2**40):
        labels[0] = label
        loss, _, _, gradient, _ = call(backend, z, z_t, labels, fk.NoEvo())
        assert loss[0] == math.inf and loss[1].isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("backend", ROWS, indirect=True)
def test_hardness_can_be_given(backend):
    data, given = make(4, 300), torch.tensor([True, False, True, False])
    actual = call(backend, *data, fk.SelfEvolution(gamma=math.inf), hard=given)
    assert torch.equal(actual.is_hard.cpu(), given)
    hard, easy = (call(backend, *data, objective).dlogits for objective in (fk.Skew(), fk.NoEvo()))
    same = torch.equal(actual.dlogits, torch.where(given[:, None].to(hard.device), hard, easy))
    assert same or relative(actual.dlogits, torch.where(given[:, None].to(hard.device), hard, easy)) < 1e-6


@pytest.mark.parametrize("backend", [NATIVE, TRITON, CUDA], indirect=True)
def test_mixed_target_in_a_divergence_of_differences(backend):
    """No objective pairs them yet, but the specification allows ``KL(q||yt)``."""
    z, z_t, labels = make(4, a_few(backend, 2500))
    raw = z.double().requires_grad_()
    log_q, p = raw.log_softmax(1), z_t.double().softmax(1)
    target = 0.3 * p + 0.7 * torch.nn.functional.one_hot(labels, z.shape[1])
    loss = (log_q.exp() * (log_q - target.log())).sum(1)
    (gradient,) = torch.autograd.grad(loss.sum(), raw)
    spec = RowSpec.of(Term("reverse_kl", mixed=True))
    actual = call(backend, z, z_t, labels, fk.NoEvo(lam=0.3), spec=spec)
    assert relative(actual.loss, loss) <= 1e-6 and relative(actual.dlogits, gradient) <= BUDGET


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.6, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("backend", ROWS, indirect=True)
def test_ties_share_their_side_of_the_head(fraction, backend):
    p = torch.tensor([0.25, 0.125, 0.125, 0.125, 0.125] + [0.25 / 16] * 16).repeat(2, 1)
    z, objective, labels = torch.randn(2, 21), fk.AdaptiveKL(fraction=fraction), torch.tensor([0, 3])
    check(call(backend, z, p.log(), labels, objective), oracle(z, p.log(), labels, objective))


@pytest.mark.parametrize("backend", ROWS, indirect=True)
def test_ties_in_several_blocks_share_their_side(backend):
    """Blocks have maxima of their own, equal logits one probability."""
    g = torch.Generator().manual_seed(0)
    N, V = 2 if slow(backend) else 16, a_few(backend, 3000)
    z, z_t = 2 * torch.randn(N, V, generator=g), torch.randn(N, V, generator=g).mul(4).round() / 2
    labels, objective = torch.arange(N), fk.AdaptiveKL()
    check(call(backend, z, z_t, labels, objective), oracle(z, z_t, labels, objective))


@pytest.mark.parametrize("gap", [60.0, 72.0, 84.0])
@pytest.mark.parametrize("objective", [o.Acceptance(), o.Renyi(alpha=0.5)], ids=lambda x: x.name)
@pytest.mark.parametrize("backend", ROWS, indirect=True)
def test_the_logarithm_of_a_small_sum(objective, gap, backend):
    """Its gradient is a quotient of the sum's, which is near the end of fp32."""
    gap = gap * (2 if objective.name == "renyi" else 1)
    z, z_t = torch.tensor([[gap, 0.3, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, gap, 0.2]])
    labels = torch.tensor([0])
    check(call(backend, z, z_t, labels, objective), oracle(z, z_t, labels, objective), 1e-5)


@pytest.mark.parametrize("backend", ROWS, indirect=True)
def test_an_offset_of_both_sides(backend):
    """Exact sums: it takes no digit of the logits."""
    z, z_t, labels = make(5, 300, near=False)
    z, z_t = ((x * 64).round() / 64 for x in (z, z_t))
    for objective in (fk.ReverseKD(lam=1.0), o.AlphaBeta()):
        plain, moved = (call(backend, z + by, z_t + by, labels, objective) for by in (0.0, 4096.0))
        for key in ("loss", "dlogits"):
            assert relative(getattr(moved, key), getattr(plain, key)) < 5e-6, (objective, key)


@pytest.mark.parametrize("backend", ROWS, indirect=True)
def test_no_rows(backend):
    z = torch.empty(0, 5)
    out = call(backend, z, z, torch.empty(0, dtype=torch.int64), fk.NoEvo())
    assert out.loss.shape == (0,) and out.dlogits.shape == (0, 5)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter truncates")
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("backend", [TRITON], indirect=True)
def test_a_gpu_rounds_to_nearest(dtype, backend):
    data = make(4, 2500)
    into = torch.full(data[0].shape, math.nan, dtype=dtype, device=device_of(backend))
    narrow, exact = call(backend, *data, fk.Skew(), dlogits=into), call(backend, *data, fk.Skew())
    assert relative(narrow.dlogits, exact.dlogits) <= ROUNDED[dtype]
