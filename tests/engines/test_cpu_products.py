"""bf16 products with fp32 results on CPUs: against float64, in every layout, and a step with them within its budget."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.engines import gemm
from fused_kd.rows.native import gemm as native_gemm
from fused_kd.rows.select import native_works

SIZES = [(1, 1, 1), (6, 64, 2), (7, 65, 3), (5, 100, 33), (200, 130, 600), (13, 64, 257), (3, 17, 512), (1, 40, 300)]


def has(kind: str) -> bool:
    if kind == "mkl":
        return native_gemm.mkl_entry() is not None
    return "avx512_bf16" in native_gemm.features() and native_works() and native_gemm.compiled_product()


kinds = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.skipif(not has(kind), reason=f"no bf16 product of {kind!r} here"))
        for kind in ("native", "mkl")
    ],
)


def bf16(rows: int, columns: int, layout: str, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g).bfloat16()
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "part":
        return torch.full((rows + 1, columns + 3), torch.nan).bfloat16().index_copy_(
            0, torch.arange(rows), torch.cat([x, x.new_full((rows, 3), torch.nan)], 1)
        )[:rows, :columns]  # fmt: skip
    if layout == "strided":
        return x.repeat_interleave(2, 1).repeat_interleave(3, 0)[::3, ::2]
    return x.t().clone().t().contiguous()


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@kinds
@pytest.mark.parametrize("size", SIZES)
def test_every_layout(kind, size):
    M, N, K = size
    for a_layout, b_layout in itertools.product(("rows", "transposed", "part", "strided"), repeat=2):
        a, b = bf16(M, K, a_layout, 0), bf16(K, N, b_layout, 1)
        exact = a.double() @ b.double()
        whole = torch.full((M + 1, N + 5), 7.0)
        out = whole[:M, 2 : N + 2]
        native_gemm.product(kind, a, b, out, add=False)
        assert error(out, exact) < 5e-7, (a_layout, b_layout)
        native_gemm.product(kind, a, b, out, add=True)
        assert error(out, 2 * exact) < 5e-7, (a_layout, b_layout)
        assert bool((whole[M] == 7).all() and (whole[:, :2] == 7).all() and (whole[:, N + 2 :] == 7).all())


@kinds
def test_a_transposed_result(kind):
    a, b = bf16(9, 40, "rows", 0), bf16(40, 21, "rows", 1)
    out = torch.ones(21, 9).t()
    native_gemm.product(kind, a, b, out, add=True)
    assert error(out, 1 + a.double() @ b.double()) < 5e-7


@kinds
def test_nothing_to_add_up(kind):
    out = torch.full((3, 4), 5.0)
    empty_a, empty_b = torch.empty(3, 0).bfloat16(), torch.empty(0, 4).bfloat16()
    native_gemm.product(kind, empty_a, empty_b, out, add=True)
    assert bool((out == 5).all())
    native_gemm.product(kind, empty_a, empty_b, out, add=False)
    assert bool((out == 0).all())
    native_gemm.product(kind, torch.empty(0, 3).bfloat16(), torch.ones(3, 4).bfloat16(), out[:0], add=False)


@kinds
def test_values_that_are_not_numbers_stay_in_their_rows(kind):
    a, b = bf16(14, 70, "rows", 0), bf16(70, 66, "rows", 1)
    a[3, 5], a[9, 69] = torch.nan, torch.inf
    out = torch.empty(14, 66)
    native_gemm.product(kind, a, b, out, add=False)
    rest = [i for i in range(14) if i not in (3, 9)]
    assert bool(out[3].isnan().all() and out[9].isinf().all() and out[rest].isfinite().all())


@kinds
def test_threads_change_nothing(kind):
    a, b = bf16(300, 513, "transposed", 0), bf16(513, 700, "rows", 1)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(torch.empty(300, 700))
            native_gemm.product(kind, a, b, found[-1], add=False)
    finally:
        torch.set_num_threads(before)
    assert kind == "mkl" or all(torch.equal(found[0], x) for x in found)
    assert error(found[-1], a.double() @ b.double()) < 5e-7


@pytest.mark.parametrize(
    "flags, entry, compiled, chosen",
    [
        ({"amx_bf16", "avx512_bf16"}, True, True, "mkl"),
        ({"amx_bf16", "avx512_bf16"}, False, True, "native"),
        ({"avx512_bf16"}, True, True, "native"),
        ({"avx512_bf16"}, True, False, None),
        ({"avx512f"}, True, True, None),
        (set(), True, True, None),
    ],
)
def test_which_is_chosen(flags, entry, compiled, chosen, monkeypatch):
    monkeypatch.setattr(gemm, "features", lambda: frozenset(flags))
    monkeypatch.setattr(gemm, "mkl_entry", lambda: print if entry else None)
    monkeypatch.setattr(gemm, "native_works", lambda: compiled)
    monkeypatch.setattr(gemm, "compiled_product", lambda: True)
    assert gemm.cpu_product.__wrapped__() == chosen


def step(dtype: torch.dtype, *, budget: int | None = None, autocast: bool = False) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    N, H_s, H_t, V = 150, 48, 40, 1003
    shapes = ((N, H_s), (V, H_s), (N, H_t), (V, H_t))
    h_s, W_s, h_t, W_t = (torch.randn(s, generator=g) * (1 if s[0] == N else 2 / s[1] ** 0.5) for s in shapes)
    labels = torch.randint(V, (N,), generator=g)
    labels[::7] = -100
    # the same numbers in every dtype
    h_s, W_s, h_t, W_t = (x.bfloat16().to(torch.float32 if autocast else dtype) for x in (h_s, W_s, h_t, W_t))
    h_s.requires_grad_(), W_s.requires_grad_()
    student, teacher = fk.LMHead(h_s, W_s), fk.LMHead(h_t, W_t)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = fk.kd_loss(student, teacher, labels, fk.SelfEvolution(), memory_budget=budget).loss
    loss.backward()
    return [loss.detach(), h_s.grad, W_s.grad]


@pytest.fixture(params=["native", "mkl", None])
def made_by(request, monkeypatch):
    if request.param is not None and not has(request.param):
        pytest.skip(f"no bf16 product of {request.param!r} here")
    used: list[str] = []
    product = native_gemm.product
    monkeypatch.setattr(gemm, "cpu_product", lambda: request.param)
    monkeypatch.setattr(gemm, "product", lambda kind, *a, **k: used.append(kind) or product(kind, *a, **k))
    yield request.param
    assert set(used) == ({request.param} if request.param else set())


@pytest.mark.parametrize("budget, autocast", [(None, False), (34_200_000, False), (None, True)])
def test_a_step_in_bf16(made_by, budget, autocast):
    """Rounded once where dlogits become an operand, and once as results: losses are those of fp32."""
    exact = step(torch.float32)
    loss, d_hidden, d_weight = step(torch.bfloat16, budget=budget, autocast=autocast)
    assert abs(float(loss - exact[0])) < 2e-6 * float(exact[0])
    assert error(d_hidden, exact[1].double()) < 3e-3
    assert error(d_weight, exact[2].double()) < 3e-3


def test_other_dtypes_are_refused():
    a, out = torch.randn(3, 4).half(), torch.empty(3, 3)
    with pytest.raises(NotImplementedError, match="float16"):
        gemm.wide_product(a, a.t(), out)
