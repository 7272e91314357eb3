"""The row in C: its formulas and elementary functions, and whose threads it uses; test_rows.py has the row."""

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
from fused_kd.rows import select
from fused_kd.rows.expressions import c_expression, c_header
from fused_kd.rows.native import build as native_build
from fused_kd.rows.native import row as native_row

from ..problems import label, needs_compiler
from .contract import ALL, call, make

NAMES = [label(objective) for objective in ALL]


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
        formulas(which, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9], x[10], x[11], hg, hg + 1);
    }"""
    both = library(tmp_path, text).both
    for which, (name, divergence) in enumerate(DIVERGENCES.items()):
        for x in np.random.default_rng(which).normal(size=(50, 12)).astype(np.float32):
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
    assert set(select.get_row(name).args) == {native_row.row}
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


@needs_compiler
@pytest.mark.parametrize("objective", ALL, ids=NAMES)
def test_any_number_of_threads_gives_the_same_bits(objective):
    data = make(9, 2500)
    one = call("native", *data, objective)
    torch.set_num_threads(2)
    try:
        two = call("native", *data, objective)
    finally:
        torch.set_num_threads(1)
    for a, b in zip(one, two, strict=True):
        assert a is b or torch.equal(a, b)  # no statistics
