"""The row in C: its formulas, elementary functions, and what its signature promises."""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.divergences import DIVERGENCES
from fused_kd.objectives import Objective, RowSpec
from fused_kd.reference import reference_rows
from fused_kd.rows import select
from fused_kd.rows.contract import Logits, RowInputs, RowOutputs
from fused_kd.rows.expressions import c_expression, c_header
from fused_kd.rows.native import build as native_build
from fused_kd.rows.native import row as native_row

from .problems import OBJECTIVES, needs_compiler, relative

ALL = [objective for objective in OBJECTIVES if not objective.kind.ranked]
NAMES = [objective.name for objective in ALL]
BLOCK = 1024  # of csrc/kd_row.c


# ---- formulas and elementary functions


def library(tmp_path: Path, text: str, *flags: str) -> ctypes.CDLL:
    """``csrc/kd_row.c`` with ``text`` behind it."""
    (tmp_path / "table.h").write_text(c_header())
    (tmp_path / "test.c").write_text(f'#include "table.h"\n#include "{native_build.SOURCE}"\n{text}')
    output = tmp_path / "test.so"
    compiler = native_build.find_compiler()
    subprocess.run([*compiler, *native_build.FLAGS, *flags, tmp_path / "test.c", "-o", output, "-lm"], check=True)
    return ctypes.CDLL(str(output))


@needs_compiler
def test_formulas_in_c_are_those_of_the_table(tmp_path):
    text = """void both(int which, const float *x, float *hg) {
        formulas(which, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], hg, hg + 1);
    }"""
    both = library(tmp_path, text).both
    for which, (name, divergence) in enumerate(DIVERGENCES.items()):
        for x in np.random.default_rng(which).normal(size=(50, 9)).astype(np.float32):
            hg = np.full(2, np.nan, np.float32)
            both(which, x.ctypes.data_as(ctypes.c_void_p), hg.ctypes.data_as(ctypes.c_void_p))
            arguments = x.astype(np.float64)
            assert hg[0] == pytest.approx(divergence.h(*arguments), rel=1e-5, abs=1e-6), name
            assert hg[1] == pytest.approx(divergence.g(*arguments), rel=1e-5, abs=1e-6), name


@needs_compiler
def test_both_languages_agree_on_the_call(tmp_path):
    assert library(tmp_path, "int size(void) { return sizeof(Call); }").size() == ctypes.sizeof(native_row._Call)


def test_integers_become_floats_and_comparisons_numbers():
    def formula(t, q):
        return 1 - (t > q) * -t / 2

    assert c_expression(formula) == "(1.0f - (((t > q ? 1.0f : 0.0f) * (-t)) / 2.0f))"


def two_statements(t):
    u = t * t
    return u


@pytest.mark.parametrize(
    "function, quoted",
    [
        (lambda t: t, "a single return"),
        (two_statements, "a single return"),
        *((text, text) for text in ("t**2", "0.5 * t", "t.log()", "t >= 1", "0 > t > 1", "u")),
        *((text, text) for text in ("True * t", "max(t, 1)", "t if t > 0 else 1", "+t", "t % 2")),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_anything_else_is_refused(function, quoted, tmp_path, monkeypatch):
    if isinstance(function, str):
        (tmp_path / "formulas.py").write_text(f"def formula(t):\n    return {function}\n")
        namespace: dict = {"__name__": "formulas"}
        exec(compile((tmp_path / "formulas.py").read_text(), tmp_path / "formulas.py", "exec"), namespace)
        function = namespace["formula"]
        quoted = {"0.5 * t": "0.5", "True * t": "True"}.get(quoted, quoted.replace("**", " ** "))
    with pytest.raises(ValueError) as raised:
        c_expression(function)
    assert quoted in str(raised.value)


ELEMENTARY = """
void apply(int which, int n, const float *x, float *y) {
    float slope;
#define EACH(name, value) if (which == name) for (int i = 0; i < n; i++) y[i] = (value)
    EACH(0, exp_nonpositive(x[i]));
    EACH(1, log_positive(x[i]));
    EACH(2, tanh_and_slope(x[i], &slope));
    EACH(3, (tanh_and_slope(x[i], &slope), slope));
    EACH(4, from_fp16(to_fp16(x[i])));
    EACH(5, from_bf16(to_bf16(x[i])));
}
"""


@pytest.fixture(scope="module", params=[(), (native_build.MACHINE_FLAG,)], ids=["any machine", "this machine"])
def apply(tmp_path_factory, request):
    function = library(tmp_path_factory.mktemp("elementary"), ELEMENTARY, *request.param).apply

    def call(which: int, x: Tensor) -> Tensor:
        y = torch.full_like(x, math.nan)
        function(which, len(x), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()))
        return y

    return call


def ulps(actual: Tensor, exact: Tensor) -> float:
    spacing = torch.nextafter(exact.float().abs(), torch.tensor(math.inf)).double() - exact.float().abs().double()
    return float(((actual.double() - exact).abs() / spacing).max())


@needs_compiler
def test_exponential(apply):
    x = torch.cat([-torch.logspace(-9, math.log10(86.9), 100_000), torch.linspace(-87, 0, 100_000)])
    assert ulps(apply(0, x), x.double().exp()) < 1.2
    assert apply(0, torch.tensor([0.0, -0.0, -87.5, -1e4, -1e30, -math.inf])).tolist() == [1, 1, 0, 0, 0, 0]
    assert apply(0, torch.tensor([math.nan])).isnan().all()


@needs_compiler
def test_logarithm(apply):
    x = torch.cat([torch.logspace(-36, 36, 100_000), 1 + torch.linspace(-0.5, 1, 100_000)])
    assert ulps(apply(1, x), x.double().log()) < 1.5
    assert apply(1, torch.tensor([1.0])).item() == 0
    assert apply(1, torch.tensor([math.nan])).isnan().all()


@needs_compiler
def test_tanh_and_its_slope(apply):
    x = torch.logspace(-6, 1.4, 50_000)
    x = torch.cat([x, -x])
    assert ((apply(2, x).double() / x.double().tanh()) - 1).abs().max() < 4e-7
    assert ((apply(3, x).double() * x.double().cosh() ** 2) - 1).abs().max() < 1e-5
    far = torch.tensor([1e30, -1e30])
    assert apply(2, far).tolist() == [1, -1] and apply(3, far).tolist() == [0, 0]


@needs_compiler
@pytest.mark.parametrize("which, dtype", [(4, torch.float16), (5, torch.bfloat16)], ids=["fp16", "bf16"])
def test_conversions_are_those_of_pytorch(apply, which, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()  # inf, NaN and subnormals too
    between = (every[:-1].double() + every[1:].double()).div(2).float()  # ties go to even
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    for x in (every, between, bits):
        assert torch.equal(apply(which, x).nan_to_num(7.0), x.to(dtype).float().nan_to_num(7.0))
        assert torch.equal(apply(which, x).isnan(), x.isnan())


@needs_compiler
def test_the_default_on_cpus_is_native():
    name = select.choose_backend(None, torch.device("cpu"))
    assert select.get_row(name) is native_row.row
    losses = (
        fk.kd_loss(torch.eye(3), torch.ones(3, 3), torch.arange(3), fk.SelfEvolution(), backend=backend).loss
        for backend in (None, "native")
    )
    assert torch.equal(*losses)


@needs_compiler
def test_no_thread_pool_but_pytorch_s():
    code = (
        "import os, torch, fused_kd as fk\n"
        "torch.set_num_threads(3)\n"
        "z = torch.randn(64, 5000)\n"
        "(z @ z.T).exp().sum(), z.exp().sum()\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "fk.kd_loss(z, z.flip(0), torch.arange(64), fk.Skew(), backend='native')\n"
        "runtimes = {l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l.split()[-1].rsplit('/', 1)[-1]}\n"
        "print(before, len(os.listdir('/proc/self/task')), *runtimes)"
    )
    before, after, *runtimes = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert before == after and int(before) >= 3
    assert len(runtimes) == 1


# ---- the row


def make(C: int, V: int, std: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    z, labels = torch.randn(C, V) * std, torch.randint(V, (C,))
    z_t = z + torch.randn(C, V)
    labels[::2] = z_t[::2].argmax(1)
    return z, z_t, labels


def call(
    z: Tensor,
    z_t: Tensor | None,
    labels: Tensor,
    objective: Objective,
    *,
    T: float = 1.0,
    weights: Tensor | None = None,
    dlogits: Tensor | None = None,
    gradient: bool = True,
    scale: float = 1.0,
    cap: float | None = None,
    spec: RowSpec | None = None,
    hard: Tensor | None = None,
) -> RowOutputs:
    """Outputs start as NaN (is_hard as True)."""
    spec = spec or objective.spec
    C, V = z.shape
    if gradient and dlogits is None:
        dlogits = torch.full((C, V), math.nan)
    outputs = RowOutputs(
        torch.full((C,), math.nan), torch.full((C,), math.nan), torch.ones(C, dtype=torch.bool), dlogits
    )
    teacher = None if z_t is None or spec.divergence is None else Logits(z_t, 1.0, None, False)
    scalars = torch.tensor(objective.scalars(T))
    cold = T != 1.0 and spec.hard_label and spec.divergence is not None
    native_row.row(
        RowInputs(Logits(z, scale, cap, False), teacher, labels, weights, scalars, spec, cold, hard), outputs
    )
    return outputs


def oracle(z: Tensor, z_t: Tensor, labels: Tensor, objective: Objective, *, T: float = 1.0, scale=1.0, cap=None):
    raw = z.double().requires_grad_()
    final = raw.clamp(min=-1e30) * scale
    if cap is not None:
        final = cap * torch.tanh(final / cap)
    loss, difficulty, hard = reference_rows(final, z_t.double(), labels, objective, T)
    return loss.detach(), difficulty, hard, torch.autograd.grad(loss.sum(), raw)[0]


def check(actual: RowOutputs, expected: tuple, budget: float = 2e-6) -> None:
    for value, truth in zip(actual[:2], expected[:2], strict=True):
        # Near-equal rows leave little to be relative to.
        assert (value - truth).norm() <= 1e-6 * truth.norm() + 1e-7 * len(truth) ** 0.5
    assert torch.equal(actual.is_hard, expected[2])
    assert actual.dlogits is not None and relative(actual.dlogits, expected[3]) <= budget


@needs_compiler
@pytest.mark.parametrize("objective", ALL, ids=NAMES)
@pytest.mark.parametrize("V", [2, 3, 127, BLOCK - 1, BLOCK, 2 * BLOCK + 1])
def test_any_vocabulary(V, objective):
    data = make(4, V)
    data[2][-1] = V - 1
    check(call(*data, objective), oracle(*data, objective))


@needs_compiler
@pytest.mark.parametrize("objective", ALL, ids=NAMES)
def test_loss_alone_in_place_and_any_number_of_threads_agree_bit_by_bit(objective):
    data = make(9, 2500)
    full = call(*data, objective)
    alone = call(*data, objective, gradient=False)
    z = data[0].clone()
    in_place = call(z, *data[1:], objective, dlogits=z)
    torch.set_num_threads(2)
    try:
        two = call(*data, objective)
    finally:
        torch.set_num_threads(1)
    for other in (alone, in_place, two):
        for a, b in zip(full, other, strict=True):
            assert b is None or torch.equal(a, b)
    assert in_place.dlogits is z and alone.dlogits is None


@needs_compiler
@pytest.mark.parametrize("objective", ALL, ids=NAMES)
@pytest.mark.parametrize("T, scale, cap", [(0.7, 1.0, None), (2.0, 0.3, None), (1.0, 1.0, 3.0), (1.5, 0.5, 5.0)])
def test_temperature_scale_and_softcap(T, scale, cap, objective):
    data = make(5, 1500, std=4.0)
    budget = 1e-5 if objective.name in ("total_variation", "generalized_jsd") else 2e-6  # cancel on peaked rows
    options = {"T": T, "scale": scale, "cap": cap}
    check(call(*data, objective, **options), oracle(*data, objective, **options), budget)


@needs_compiler
@pytest.mark.parametrize("objective", ALL, ids=NAMES)
def test_ignored_rows_and_weights(objective):
    z, z_t, labels = make(6, 1100)
    weights = torch.tensor([1.0, 0.0, 2.5, -1.0, 0.3, 7.0])
    loss, difficulty, hard, gradient = oracle(z, z_t, labels, objective)
    gradient = gradient * weights[:, None]
    z[4] = math.nan  # left out, hence never seen
    for left_out, label in ((1, -100), (4, -(2**40))):
        labels[left_out] = label
        loss[left_out] = difficulty[left_out] = gradient[left_out] = 0.0
        hard[left_out] = False
    for dlogits in (None, z.clone(), torch.full(z.shape, math.nan, dtype=torch.bfloat16)):
        actual = call(z, z_t, labels, objective, weights=weights, dlogits=dlogits)
        check(actual, (loss, difficulty, hard, gradient), 2**-8 if dlogits is not None else 2e-6)
        assert not actual.dlogits[labels < 0].any()


@needs_compiler
@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_independent_and_rounded_once(student, teacher):
    objective, (z, z_t, labels) = fk.SelfEvolution(gamma=1.0), make(6, 2500)
    z, z_t = z.to(student), z_t.to(teacher)
    exact = call(z, z_t, labels, objective)
    check(exact, oracle(z, z_t, labels, objective))
    for dtype in (torch.bfloat16, torch.float16):
        narrow = call(z, z_t, labels, objective, dlogits=torch.full(z.shape, math.nan, dtype=dtype))
        assert torch.equal(narrow.dlogits, exact.dlogits.to(dtype))
    z = z.clone()
    assert torch.equal(call(z, z_t, labels, objective, dlogits=z).dlogits, exact.dlogits.to(student))


@needs_compiler
def test_strided_inputs_and_outputs():
    objective, (z, z_t, labels) = fk.SelfEvolution(gamma=1.0), make(5, 1300)
    expected = oracle(z, z_t, labels, objective)

    def wide(x: Tensor) -> Tensor:
        return torch.cat([x, torch.full((len(x), 13), math.nan)], 1)[:, : x.shape[1]]

    def transposed(x: Tensor) -> Tensor:
        return x.t().contiguous().t()

    for view in (wide, transposed):
        out = view(torch.full(z.shape, math.nan))
        check(call(view(z), view(z_t), labels, objective, dlogits=out), expected)
        in_place = view(z)
        check(call(in_place, view(z_t), labels, objective, dlogits=in_place), expected)
        if view is wide:
            assert out._base is not None and out._base[:, z.shape[1] :].isnan().all(), "written beyond the row"
    expanded = call(z[:1].expand(5, -1), z_t[:1].expand(5, -1), labels[:1].expand(5), objective)
    assert (expanded.dlogits == expanded.dlogits[0]).all()
    with pytest.raises(ValueError, match=r"loss must be contiguous, got strides \(2,\)"):
        vectors = torch.zeros(2), torch.zeros(2, dtype=torch.bool)
        teacher = Logits(z_t[:2], 1.0, None, False)
        scalars = torch.tensor(objective.scalars())
        inputs = RowInputs(Logits(z[:2], 1.0, None, False), teacher, labels[:2], None, scalars, objective.spec, False)
        native_row.row(inputs, RowOutputs(torch.zeros(4)[::2], *vectors, None))


@needs_compiler
@pytest.mark.parametrize("objective", ALL, ids=NAMES)
def test_excluded_tokens_and_large_offsets(objective):
    """-inf on both sides, also over whole blocks, changes nothing; nor does a constant on all logits of a side."""
    V, kept = 4 * BLOCK, slice(BLOCK + 5, 2 * BLOCK + 300)
    z, z_t, labels = make(3, kept.stop - kept.start)
    z, z_t = (z * 256).round() / 256, (z_t * 256).round() / 256  # so that the sums below are exact
    expected = oracle(z, z_t, labels, objective)
    wide, wide_t = (torch.full((3, V), -math.inf) for _ in range(2))
    wide[:, kept], wide_t[:, kept] = z + 8000.0, z_t - 8000.0
    actual = call(wide, wide_t, labels + kept.start, objective)
    check(actual._replace(dlogits=actual.dlogits[:, kept]), expected)
    assert not actual.dlogits[:, : kept.start].any() and not actual.dlogits[:, kept.stop :].any()
    assert torch.equal(
        call(wide, wide_t, labels + kept.start, objective, T=1e-9).loss.isnan().any(), torch.tensor(False)
    )


@needs_compiler
@pytest.mark.parametrize("objective", ALL, ids=NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_not_hidden(value, objective):
    for side in (0, 1) if objective.name != "sft" else (0,):
        data = make(2, 2500)
        data[side][0, 2400] = value
        loss, difficulty, _, gradient = call(*data, objective)
        assert loss[0].isnan() and difficulty[0].isnan()
        assert gradient[0].isnan().any() or (side == 1 and objective.name == "total_variation")  # compares only
        assert loss[1].isfinite() and difficulty[1].isfinite() and gradient[1].isfinite().all()


@needs_compiler
def test_a_label_beyond_the_row_reads_nothing():
    z, z_t, labels = make(2, 300)
    for label in (300, BLOCK, 2**40):
        labels[0] = label
        loss, _, _, gradient = call(z, z_t, labels, fk.NoEvo())
        assert loss[0] == math.inf and loss[1].isfinite() and gradient.isfinite().all()


@needs_compiler
def test_hardness_can_be_given():
    data = make(4, 300)
    given = torch.tensor([True, False, True, False])
    actual = call(*data, fk.SelfEvolution(gamma=math.inf), hard=given)
    assert torch.equal(actual.is_hard, given)
    hard, easy = call(*data, fk.Skew()), call(*data, fk.NoEvo())
    assert torch.equal(actual.dlogits, torch.where(given[:, None], hard.dlogits, easy.dlogits))


@needs_compiler
def test_mixed_target_in_a_divergence_of_differences():
    """No objective pairs them yet, but the specification allows ``KL(q||yt)``."""
    z, z_t, labels = make(4, 2500)
    raw = z.double().requires_grad_()
    log_q, p = raw.log_softmax(1), z_t.double().softmax(1)
    target = 0.3 * p + 0.7 * torch.nn.functional.one_hot(labels, z.shape[1])
    loss = (log_q.exp() * (log_q - target.log())).sum(1)
    (gradient,) = torch.autograd.grad(loss.sum(), raw)
    actual = call(z, z_t, labels, fk.NoEvo(lam=0.3), spec=RowSpec("reverse_kl", mixed=True))
    assert relative(actual.loss, loss) <= 1e-6 and relative(actual.dlogits, gradient) <= 2e-6


@needs_compiler
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.6, 0.9, 0.999, 1.0])
def test_ties_share_their_side_of_the_head(fraction):
    p = torch.tensor([0.25, 0.125, 0.125, 0.125, 0.125] + [0.25 / 16] * 16).repeat(2, 1)
    z = torch.randn(2, 21)
    objective, labels = fk.AdaptiveKL(fraction=fraction), torch.tensor([0, 3])
    check(call(z, p.log(), labels, objective), oracle(z, p.log(), labels, objective))


@needs_compiler
def test_no_rows():
    z = torch.empty(0, 5)
    out = call(z, z, torch.empty(0, dtype=torch.int64), fk.NoEvo())
    assert out.loss.shape == (0,) and out.dlogits.shape == (0, 5)
