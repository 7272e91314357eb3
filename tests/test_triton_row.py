"""The Triton row against the float64 oracle: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_kd.objectives import (
    OBJECTIVES,
    SFT,
    ForwardKD,
    NoEvo,
    Objective,
    ReverseKD,
    RowSpec,
    SelfEvolution,
    Skew,
    SkewTeacher,
)
from fused_kd.reference import reference_rows
from fused_kd.rows.contract import Logits, RowInputs, RowOutputs

from . import interpreter
from .problems import eager_rows

pytest.importorskip("triton", reason="the Triton row needs triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip(interpreter.NEEDED, allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from fused_kd.rows.triton import math as triton_math  # noqa: E402
from fused_kd.rows.triton import row as triton_row  # noqa: E402
from fused_kd.tuning import current, tuned  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
BLOCK = current().row_block
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
ALL = [cls() for cls in OBJECTIVES.values() if not cls.kind.ranked]
LOSS_BUDGET = 1e-6
GRADIENT_BUDGET = 2e-6


def make(
    C: int, V: int, *, std: float = 2.0, distance: float | None = 0.5, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits (C, V) and labels, half of them likely; no ``distance``: an unrelated p."""
    generator = torch.Generator().manual_seed(seed)
    z_s = torch.randn(C, V, generator=generator) * std
    z_t = torch.randn(C, V, generator=generator) * (std if distance is None else distance)
    if distance is not None:
        z_t += z_s
    labels = torch.randint(V, (C,), generator=generator)
    labels[::2] = z_t[::2].argmax(1)
    return z_s, z_t, labels


def call(
    z_s: Tensor,
    z_t: Tensor | None,
    labels: Tensor,
    objective: Objective,
    *,
    T: float = 1.0,
    scale: tuple[float, float] = (1.0, 1.0),
    cap: tuple[float | None, float | None] = (None, None),
    weights: Tensor | None = None,
    dlogits: Tensor | None = None,
    in_place: bool = False,
    gradient: bool = True,
    spec: RowSpec | None = None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Loss, difficulty, is_hard and dlogits on the CPU; outputs start as NaN (is_hard as True).

    ``in_place`` in a copy, ``overwrite`` in ``z_s`` itself."""
    spec = spec or objective.spec
    C, V = z_s.shape
    z_s = (z_s.clone() if in_place and not overwrite else z_s).to(DEVICE)
    if in_place:
        dlogits = z_s
    elif gradient and dlogits is None:
        dlogits = torch.full((C, V), math.nan, device=DEVICE)
    outputs = RowOutputs(
        torch.full((C,), math.nan, device=DEVICE),
        torch.full((C,), math.nan, device=DEVICE),
        torch.ones(C, dtype=torch.bool, device=DEVICE),
        dlogits,
    )
    before = None if in_place else z_s.clone()
    inputs = RowInputs(
        Logits(z_s, scale[0], cap[0], False),
        None if spec.divergence is None or z_t is None else Logits(z_t.to(DEVICE), scale[1], cap[1], False),
        labels.to(DEVICE),
        None if weights is None else weights.to(DEVICE),
        torch.tensor(objective.scalars(T), device=DEVICE),
        spec,
        T != 1.0 and spec.hard_label,
    )
    triton_row.row(inputs, outputs)
    if before is not None:
        assert torch.equal(z_s.nan_to_num(), before.nan_to_num()), "the student's logits were changed"
    return (
        outputs.loss.cpu(),
        outputs.difficulty.cpu(),
        outputs.is_hard.cpu(),
        None if dlogits is None else dlogits.cpu(),
    )


def oracle(
    z_s: Tensor,
    z_t: Tensor | None,
    labels: Tensor,
    objective: Objective,
    *,
    T: float = 1.0,
    scale: tuple[float, float] = (1.0, 1.0),
    cap: tuple[float | None, float | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raw = z_s.double().requires_grad_()

    def final(z: Tensor, i: int) -> Tensor:
        z = z.clamp(min=-1e30) * scale[i]
        limit = cap[i]
        return z if limit is None else limit * torch.tanh(z / limit)

    teacher = None if z_t is None else final(z_t.double(), 1)
    loss, difficulty, hard = reference_rows(final(raw, 0), teacher, labels, objective, T)
    # A student's share of 0 leaves a constant.
    gradient = torch.autograd.grad(loss.sum(), raw)[0] if loss.requires_grad else torch.zeros_like(raw)
    return loss.detach(), difficulty.detach(), hard, gradient


def error(value: Tensor | None, truth: Tensor) -> float:
    assert value is not None
    return ((value.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def rounded_once(truth: Tensor, dtype: torch.dtype) -> float:
    """The error of a gradient that is rounded to ``dtype`` once. A few large values can make it all of one rounding."""
    if INTERPRETED and dtype == torch.bfloat16:
        return 2**-7  # the interpreter truncates
    return GRADIENT_BUDGET + 1.01 * error(truth.to(dtype), truth)


def check(actual: tuple, expected: tuple, budget: float = GRADIENT_BUDGET) -> None:
    for value, truth in zip(actual[:2], expected[:2], strict=True):
        # Near-equal rows leave little to be relative to: there the budget is in nats.
        assert (value.double() - truth).norm() <= LOSS_BUDGET * (truth.norm() + len(truth) ** 0.5)
    assert torch.equal(actual[2], expected[2])
    assert error(actual[3], expected[3]) <= budget


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.name)
@pytest.mark.parametrize(("std", "distance"), [(1.0, 0.1), (4.0, 0.3), (2.0, None)], ids=["close", "peaked", "far"])
def test_within_the_error_of_eager_pytorch(objective: Objective, std: float, distance: float | None) -> None:
    data = make(8, 5003, std=std, distance=distance)
    actual, expected = call(*data, objective), oracle(*data, objective)
    z = data[0].clone().requires_grad_()
    loss = eager_rows(z, *data[1:], objective)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    check(actual, expected)
    assert error(actual[0], expected[0]) <= max(2 * error(loss, expected[0]), 1e-7)
    assert error(actual[3], expected[3]) <= max(2 * error(gradient, expected[3]), 1e-7)


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.name)
@pytest.mark.parametrize("V", [1, 3, 127, 1025, BLOCK, 2 * BLOCK + 1])
def test_any_vocabulary(objective: Objective, V: int) -> None:
    z_s, z_t, labels = make(3, V, distance=None)
    labels[-1] = V - 1
    actual, expected = call(z_s, z_t, labels, objective), oracle(z_s, z_t, labels, objective)
    if V == 1:  # nothing to learn: the truth is 0
        assert all(x.abs().max() <= 1e-7 for x in (actual[0], actual[1], actual[3]))  # type: ignore[union-attr]
    else:
        check(actual, expected)


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.name)
def test_loss_alone_and_in_place_agree_with_out_of_place(objective: Objective) -> None:
    data = make(6, 2500)
    full = call(*data, objective)
    alone = call(*data, objective, gradient=False)
    in_place = call(*data, objective, in_place=True)
    for i in range(3):
        # Of another kernel, in which a compiler may contract other products and sums.
        assert error(alone[i], full[i].double()) <= (0.0 if INTERPRETED else LOSS_BUDGET)  # type: ignore[union-attr]
        assert torch.equal(in_place[i], full[i])  # type: ignore[arg-type]
    assert alone[3] is None
    assert torch.equal(in_place[3], full[3])  # type: ignore[arg-type]


@pytest.mark.parametrize("T", [0.7, 2.0])
@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.name)
def test_temperature(objective: Objective, T: float) -> None:
    data = make(6, 2500, distance=None)
    check(call(*data, objective, T=T), oracle(*data, objective, T=T))


@pytest.mark.parametrize("objective", [SFT(), ReverseKD(), SkewTeacher(), SelfEvolution()], ids=lambda o: o.name)
@pytest.mark.parametrize(
    ("scale", "cap"),
    [
        ((0.25, 3.0), (None, None)),
        ((1.0, 1.0), (3.0, None)),
        ((1.0, 0.5), (None, 2.0)),
        ((0.3, 1.0), (5.0, 30.0)),
    ],
    ids=["scale", "student_cap", "teacher_cap", "all"],
)
def test_scale_and_softcap(objective: Objective, scale: tuple, cap: tuple) -> None:
    data = make(5, 1500, std=4.0, distance=None)
    actual = call(*data, objective, scale=scale, cap=cap, T=1.5)
    check(actual, oracle(*data, objective, scale=scale, cap=cap, T=1.5))


@triton.jit
def _tanh_kernel(x_ptr, tanh_ptr, slope_ptr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tanh, slope = triton_math.tanh(tl.load(x_ptr + lanes))
    tl.store(tanh_ptr + lanes, tanh)
    tl.store(slope_ptr + lanes, slope)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # in the branch not taken
def test_tanh_keeps_relative_precision_at_both_ends() -> None:
    """Small and saturated arguments, where 1 - exp and 1 - tanh^2 would cancel; and no overflow beyond."""
    x = torch.logspace(-6, 1.4, 2048)
    x = torch.cat([x, -x]).to(DEVICE)
    tanh, slope = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    _tanh_kernel[(1,)](x, tanh, slope, N=4096)
    exact = x.double()
    assert ((tanh.double() - exact.tanh()).abs() / exact.tanh().abs()).max() <= 4e-7
    assert ((slope.double() - exact.cosh() ** -2).abs() * exact.cosh() ** 2).max() <= 1e-5
    x[0], x[1] = 1e30, -1e30
    _tanh_kernel[(1,)](x, tanh, slope, N=4096)
    assert tanh[:2].tolist() == [1.0, -1.0] and slope[:2].tolist() == [0.0, 0.0]


def test_strided_inputs_and_outputs() -> None:
    objective, (C, V) = SelfEvolution(), (5, 2100)
    z_s, z_t, labels = make(C, V)
    expected = oracle(z_s, z_t, labels, objective)

    def wide(x: Tensor) -> Tensor:
        padded = torch.full((C, V + 13), math.nan, device=DEVICE)
        padded[:, :V] = x.to(DEVICE)
        return padded[:, :V]

    def transposed(x: Tensor) -> Tensor:
        return x.to(DEVICE).t().contiguous().t()

    for view in (wide, transposed):
        out = view(torch.full((C, V), math.nan))
        check(call(view(z_s), view(z_t), labels, objective, dlogits=out), expected)
        base = out._base
        if view is wide and base is not None:
            assert base[:, V:].isnan().all(), "written beyond the row"


def padded(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``x`` in the first columns of rows of whole 64, NaN in the others."""
    C, V = x.shape
    wider = torch.full((C, -(-V // 64) * 64), math.nan, dtype=dtype, device=DEVICE)
    wider[:, :V] = x.to(DEVICE)
    return wider[:, :V]


def padding(view: Tensor) -> Tensor:
    assert view._base is not None
    return view._base[:, view.shape[1] :]


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.name)
@pytest.mark.parametrize("V", [77, 2 * BLOCK + 337])
def test_rows_of_wider_buffers(objective: Objective, V: int) -> None:
    """As vectors want odd vocabularies: what lies between the rows is neither used nor changed."""
    z_s, z_t, labels = make(3, V, distance=None)
    labels[1] = V - 1
    expected = oracle(z_s, z_t, labels, objective)
    student, teacher = padded(z_s), padded(z_t)
    assert triton_row.launch_constants(False, student)["PACK"] == 4
    for dtype in (torch.float32, torch.bfloat16):
        out = padded(torch.full((3, V), math.nan), dtype)
        actual = call(student, teacher, labels, objective, dlogits=out)
        check(actual, expected, rounded_once(expected[3], dtype))
        assert padding(out).isnan().all()
    check(call(student, teacher, labels, objective, in_place=True, overwrite=True), expected)
    assert padding(student).isnan().all() and padding(teacher).isnan().all()


def test_ignored_rows_of_wider_buffers() -> None:
    z_s, z_t, labels = make(2, 2 * BLOCK + 5)
    labels[0] = -100
    student = padded(z_s)
    gradient = call(student, padded(z_t), labels, SelfEvolution(), in_place=True, overwrite=True)[3]
    assert gradient is not None and not gradient[0].any() and gradient[1].all()
    assert padding(student).isnan().all()


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.name)
@pytest.mark.parametrize("T", [1.0, 1.5])
def test_lanes_of_any_height(objective: Objective, T: float) -> None:
    """Each of a program's threads has its own maxima: far apart, rising late, or of nothing but excluded tokens."""
    V = 3 * BLOCK + 21
    z_s, z_t, labels = make(3, V, distance=None)
    lane = torch.arange(V) // 4 % 256
    heights = torch.randn(2, 256, generator=torch.Generator().manual_seed(1)) * 3
    block = torch.arange(V) // BLOCK
    z_s += heights[0, lane] + (lane % 3 == 0) * block
    z_t += heights[1, lane] - (lane % 5 == 0) * block
    out = (lane % 7 == 2) | (lane % 11 == block)
    z_s[:, out] = z_t[:, out] = -math.inf
    kept = ~out
    place = kept.cumsum(0) - 1
    labels = kept.nonzero()[torch.tensor([3, 500, -1])].squeeze(1)
    expected = oracle(z_s[:, kept], z_t[:, kept], place[labels], objective, T=T)
    loss, difficulty, hard, gradient = call(z_s, z_t, labels, objective, T=T)
    assert gradient is not None
    budget = GRADIENT_BUDGET
    if T == 1.0:  # such rows ask for digits that eager PyTorch does not have either
        z = z_s[:, kept].clone().requires_grad_()
        eager = eager_rows(z, z_t[:, kept], place[labels], objective)
        budget = max(budget, error(torch.autograd.grad(eager.sum(), z)[0], expected[3]))
    check((loss, difficulty, hard, gradient[:, kept]), expected, budget)
    assert not gradient[:, out].any()


@pytest.mark.parametrize(("block", "threads"), [(1024, 128), (1024, 512), (4096, 512)])
@pytest.mark.parametrize("objective", [SFT(), SelfEvolution(), OBJECTIVES["generalized_jsd"]()], ids=lambda o: o.name)
def test_other_blocks_and_threads(objective: Objective, block: int, threads: int) -> None:
    data = make(3, 4500, distance=None)
    with tuned(row_block=block, row_threads=threads):
        check(call(*data, objective, T=1.5), oracle(*data, objective, T=1.5))


@triton.jit
def _ratio_kernel(x_ptr, y_ptr, ratio_ptr, log_ptr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    x = tl.load(x_ptr + lanes)
    y = tl.load(y_ptr + lanes)
    root = tl.rsqrt(y)
    tl.store(ratio_ptr + lanes, triton_math.quotient(x, y, root * root))
    tl.store(log_ptr + lanes, triton_math.log_positive(x))


def test_ratios_and_logarithms_keep_relative_precision() -> None:
    """Also near 1, where near teachers have all of theirs, and at both ends of what a row can ask for."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(
        [
            torch.logspace(-30, 7, 2048),
            1 + torch.randn(2048, generator=generator) * 10.0 ** -torch.arange(1, 9).repeat(256),
        ]
    )
    y = x[torch.randperm(4096, generator=generator)].clamp(max=2.0)
    ratio, log = torch.full_like(x, math.nan, device=DEVICE), torch.full_like(x, math.nan, device=DEVICE)
    _ratio_kernel[(1,)](x.to(DEVICE), y.to(DEVICE), ratio, log, N=4096)
    exact = x.double().log()
    near = (log.cpu().double() - exact).abs() <= 2.5e-7 * exact.abs()
    assert near.all(), x[~near]
    assert ((ratio.cpu().double() * y / x - 1).abs() <= 1.3e-7).all()


def test_vectors_must_be_contiguous() -> None:
    z = torch.zeros(2, 4, device=DEVICE)
    inputs = RowInputs(
        Logits(z, 1.0, None, True), None, torch.zeros(2, dtype=torch.int64, device=DEVICE), None,
        torch.zeros(5, device=DEVICE), SFT.kind, False,
    )  # fmt: skip
    vector = torch.zeros(2, device=DEVICE)
    outputs = RowOutputs(torch.zeros(5, device=DEVICE)[::2], vector, torch.zeros_like(vector, dtype=torch.bool), None)
    with pytest.raises(ValueError, match=r"loss must be contiguous, got strides \(2,\)"):
        triton_row.row(inputs, outputs)


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.name)
def test_ignored_rows_and_weights(objective: Objective) -> None:
    z_s, z_t, labels = make(6, 2100)
    weights = torch.tensor([1.0, 0.0, 2.5, -1.0, 0.3, 7.0])
    loss, difficulty, hard, gradient = oracle(z_s, z_t, labels, objective)
    gradient = gradient * weights[:, None]
    for left_out in (1, 4):
        labels[left_out] = -100 if left_out == 1 else -(2**40)
        loss[left_out] = difficulty[left_out] = 0.0
        hard[left_out] = False
        gradient[left_out] = 0.0
    for in_place in (False, True):
        actual = call(z_s, z_t, labels, objective, weights=weights, in_place=in_place)
        check(actual, (loss, difficulty, hard, gradient))
        for value in (actual[0], actual[1], actual[3]):
            assert value is not None and not value[1].any() and not value[4].any()


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
    ],
)
def test_dtypes_are_independent_and_rounded_once(student: torch.dtype, teacher: torch.dtype) -> None:
    objective = SelfEvolution()
    z_s, z_t, labels = make(6, 2500)
    z_s, z_t = z_s.to(student), z_t.to(teacher)
    expected = oracle(z_s, z_t, labels, objective)
    check(call(z_s, z_t, labels, objective), expected)  # the gradient into fp32
    narrow = torch.full(z_s.shape, math.nan, dtype=torch.bfloat16, device=DEVICE)
    actual = call(z_s, z_t, labels, objective, dlogits=narrow)
    assert actual[3] is not None and actual[3].dtype == torch.bfloat16
    check(actual, expected, rounded_once(expected[3], torch.bfloat16))
    check(call(z_s, z_t, labels, objective, in_place=True), expected, rounded_once(expected[3], student))


@pytest.mark.parametrize(
    "objective",
    [cls(lam=lam) for cls in (ForwardKD, ReverseKD, NoEvo, Skew, SkewTeacher, SelfEvolution) for lam in (0.0, 1.0)]
    + [Skew(beta=0.0), SkewTeacher(beta=0.0), SelfEvolution(beta=0.0, gamma=0.0)]
    + [Skew(beta=1.0), SkewTeacher(beta=1.0), SelfEvolution(beta=1.0, gamma=0.0)]
    + [SelfEvolution(gamma=0.0), SelfEvolution(gamma=math.inf)],
    ids=repr,
)
@pytest.mark.parametrize("extreme", [False, True], ids=["ordinary", "1e4"])
def test_ends_of_the_scalars(objective: Objective, extreme: bool) -> None:
    z_s, z_t, labels = make(4, 700, distance=None)
    if extreme:  # probabilities of exactly 0 and 1
        z_s[0, 3], z_t[0, 3], z_t[1, 9], z_s[2, 5], z_t[3] = 1e4, 1e4, 1e4, -1e4, z_t[3] * 1e4
        labels[:3] = torch.tensor([3, 11, 5])
    actual, expected = call(z_s, z_t, labels, objective), oracle(z_s, z_t, labels, objective)
    assert torch.equal(actual[2], expected[2])
    for i in (0, 1, 3):
        value, truth = actual[i], expected[i]
        assert value is not None and value.isfinite().all()
        if truth.norm() < 1e-12:
            assert value.abs().max() <= 1e-6
        else:
            assert error(value, truth) <= GRADIENT_BUDGET


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.name)
def test_offsets_of_the_logits_do_not_matter(objective: Objective) -> None:
    z_s, z_t, labels = make(4, 2500, distance=0.1)
    z_s, z_t = (z_s * 256).round() / 256, (z_t * 256).round() / 256  # so that the sums below are exact
    check(call(z_s + 8000.0, z_t - 8000.0, labels, objective), oracle(z_s, z_t, labels, objective))


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.name)
def test_excluded_tokens(objective: Objective) -> None:
    """-inf on both sides, also over whole blocks, changes nothing; an excluded target costs inf."""
    V = 3 * BLOCK
    z_s, z_t, labels = make(3, V, distance=None)
    kept = slice(BLOCK + 5, 2 * BLOCK - 3)
    for z in (z_s, z_t):
        z[:, : kept.start] = z[:, kept.stop :] = -math.inf
    labels = labels % (kept.stop - kept.start)
    expected = oracle(z_s[:, kept], z_t[:, kept], labels, objective)
    loss, difficulty, hard, gradient = call(z_s, z_t, labels + kept.start, objective)
    assert gradient is not None
    check((loss, difficulty, hard, gradient[:, kept]), expected)
    assert not gradient[:, : kept.start].any() and not gradient[:, kept.stop :].any()

    loss, difficulty, hard, gradient = call(z_s, z_t, torch.zeros_like(labels), objective)  # an excluded label
    targets_the_label = hasattr(objective, "lam") or isinstance(objective, SFT)
    bounded = isinstance(objective, (Skew, SelfEvolution)) or not targets_the_label
    assert (loss.isfinite() if bounded else loss == math.inf).all()
    assert (difficulty == math.inf if targets_the_label else difficulty.isfinite()).all()
    assert gradient is not None and gradient.isfinite().all()


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.name)
def test_nan_is_not_hidden(objective: Objective) -> None:
    z_s, z_t, labels = make(2, 2500)
    z_s[0, 2400] = math.nan
    loss, difficulty, _, gradient = call(z_s, z_t, labels, objective)
    assert gradient is not None
    assert loss[0].isnan() and gradient[0].isnan().any()
    assert loss[1].isfinite() and difficulty[1].isfinite() and gradient[1].isfinite().all()


def test_label_beyond_the_row_reads_nothing() -> None:
    z_s, z_t, labels = make(2, 300)
    for label in (300, 2**40):
        labels[0] = label
        loss, _, _, gradient = call(z_s, z_t, labels, NoEvo())
        assert loss[0] == math.inf and loss[1].isfinite()
        assert gradient is not None and gradient.isfinite().all()


def test_mixed_target_in_a_divergence_of_differences() -> None:
    """No objective pairs them yet, but the specification allows ``KL(q||yt)``."""
    z_s, z_t, labels = make(4, 2500)
    z = z_s.double().requires_grad_()
    log_q, p = z.log_softmax(1), z_t.double().softmax(1)
    target = 0.3 * p + 0.7 * F.one_hot(labels, z.shape[1])
    loss = (log_q.exp() * (log_q - target.log())).sum(1)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    spec = RowSpec("reverse_kl", mixed=True, hard_label=False, gated=False)
    actual = call(z_s, z_t, labels, NoEvo(lam=0.3), spec=spec)
    assert error(actual[0], loss.detach()) <= LOSS_BUDGET
    assert error(actual[3], gradient) <= GRADIENT_BUDGET


def test_scalars_are_read_at_run_time() -> None:
    """Annealing changes a device tensor, not the kernel: the compile-time arguments do not depend on it."""
    data = make(4, 900, distance=None)
    for objective in (
        SelfEvolution(lam=0.2, beta=0.9, gamma=1.0),
        SelfEvolution(lam=0.8, beta=0.1, gamma=5.0),
    ):
        check(call(*data, objective), oracle(*data, objective))
    constants = triton_row.formula_constants(SelfEvolution.kind, False)
    assert not {0.2, 0.9, 0.8, 0.1} & set(constants.values())


def test_no_rows() -> None:
    loss, _, _, gradient = call(torch.empty(0, 5), torch.empty(0, 5), torch.empty(0, dtype=torch.int64), NoEvo())
    assert loss.shape == (0,) and gradient is not None and gradient.shape == (0, 5)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU with room for 2^31 logits")
def test_rows_beyond_2_31_elements() -> None:
    V = 2**20
    C = 2**11 + 2
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip(f"needs 10 GiB of free GPU memory for {C} x {V} bf16 logits twice")
    z = torch.zeros(C, V, dtype=torch.bfloat16, device="cuda")
    z[-1] = torch.randn(V, device="cuda")
    tail, labels = z[-1:].cpu(), torch.full((C,), -1)
    labels[-1] = 17
    expected = oracle(tail, None, labels[-1:], SFT())
    loss, _, _, _ = call(z, None, labels, SFT(), dlogits=torch.zeros_like(z))
    assert error(loss[-1:], expected[0]) <= LOSS_BUDGET
