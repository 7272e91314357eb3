"""Gradient GEMMs of the chunked engine that leave out negligible tiles: within the bound, and really left out."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.engines import chunked, head_gradient, tile_filter
from fused_kd.engines.dispatch import choose_engine
from fused_kd.engines.gemm import Projection
from fused_kd.engines.plan import Plan
from fused_kd.engines.tile_filter import HostTiles
from fused_kd.rows import select

from ..kernels.contract import DTYPES, NATIVE, TORCH, TRITON, cases
from ..problems import Problem, furthest, gradients, problem, relative
from .peaked import EPS, LIKELY, check_left_out, peak
from .test_gradient_groups import Device

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")


def peaked(dtype: torch.dtype = torch.float32) -> Problem:
    return problem(V=300, std=2.0, near=True, bias=True, dtype=dtype)


@pytest.fixture
def kept(monkeypatch):
    """Columns that the host's blocks of tokens were left with."""
    seen: list[int] = []
    init = HostTiles.__init__

    def record(self, *arguments) -> None:
        init(self, *arguments)
        seen.extend(len(columns) for _, columns in self._blocks)

    monkeypatch.setattr(HostTiles, "__init__", record)
    return seen


STEERING = [fk.SFT(), fk.SelfEvolution(gamma=0.5), fk.Skew()]
FILTERED = [
    *cases([False, True], DTYPES[:2], STEERING, backends=[TORCH, NATIVE]),
    # The filter comes after the row, so that of the slow one a case will do.
    pytest.param(True, torch.bfloat16, fk.Skew(), "triton", id="True-bf16-skew-triton", marks=TRITON.marks),
]


@pytest.mark.parametrize("weighted, dtype, objective, backend", FILTERED)
def test_within_the_bound_and_left_out(weighted, dtype, objective, backend, kept):
    p = peaked(dtype)
    student, teacher = peak(p)
    weights = torch.linspace(0, 3, len(p.labels)) if weighted else None
    options = {"backend": backend, "token_weights": weights}
    exact = fk.kd_loss(student, teacher, p.labels, objective, **options)
    grads = gradients(exact.loss, p.leaves)
    assert not kept
    filtered = fk.kd_loss(student, teacher, p.labels, objective, grad_filter_eps=EPS, **options)
    found = gradients(filtered.loss, p.leaves)
    assert torch.equal(filtered.loss, exact.loss) and torch.equal(found[2], grads[2])
    assert kept and all(n <= LIKELY for n in kept)
    factors = (1.0 if weights is None else weights.double()) * (p.labels != -100).double()
    check_left_out(p, grads, found, factors / factors.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_leaves_nothing_out_is_exact(dtype, kept, monkeypatch):
    """More tokens than a block of the host holds, several chunks, padding in the vocabulary."""
    p = problem(300, dtype=dtype, bias=True, ignored=0.1)
    monkeypatch.setattr(chunked, "preferred_chunk", lambda *_: 200)
    options = {"vocab_size": 400}
    p.labels[p.labels >= 400] = 3
    refs = gradients(fk.kd_loss(p.student(), p.teacher(), p.labels, fk.Skew(), **options).loss, p.leaves)
    found = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.Skew(), grad_filter_eps=1e-30, **options).loss
    assert furthest(gradients(found, p.leaves), refs) < (1e-6 if dtype == torch.float32 else 2e-3)
    assert len(kept) > 2 and all(n > 390 for n in kept)


def device_tiles() -> type:
    from fused_kd.engines.tile_filter_triton import DeviceTiles  # needs Triton

    return DeviceTiles


def tiles(dlogits: Tensor, weight: Tensor, factors: Tensor | None, place: str):
    kind = HostTiles if place == "host" else device_tiles()
    return kind(Projection(weight, None, weight.dtype), dlogits, factors, EPS)


@pytest.mark.parametrize("place", ["host", pytest.param("device", marks=needs_interpreter)])
def test_products_of_what_is_left(place):
    """Both ways against the dense product of dlogits with the negligible tiles zeroed by hand."""
    g = torch.Generator().manual_seed(0)
    G, V, H, tile = 150, 300, 20, 128 if place == "host" else 64
    dlogits = torch.randn(G, V, generator=g) * 1e-6
    dlogits[3, 70:90] = dlogits[149, 299] = 1.0
    factors = torch.rand(G, generator=g) + 0.5
    dlogits[140] = 1e-2
    factors[140] = 1e5  # large by its factor alone
    dlogits[3, 10] = 2e-4  # the only entry of its tile that is not
    factors[3] = 1.0
    weight, hidden = torch.randn(V, H, generator=g), torch.randn(G, H, generator=g)
    left = torch.zeros_like(dlogits)
    width = 1 if place == "host" else tile
    for rows in torch.arange(G).split(tile):
        for columns in torch.arange(V).split(width):
            inside = dlogits[rows][:, columns]
            if (inside.abs() >= EPS * factors[rows].unsqueeze(1)).any():
                left[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = inside
    assert 0 < left.count_nonzero() < dlogits.count_nonzero()
    found = tiles(dlogits, weight, factors, place)
    assert relative(found.hidden(), left @ weight) < 1e-6
    whole = torch.full((V, H), math.nan)
    found.weight(whole, slice(0, V), hidden, first=True)
    assert relative(whole, left.t() @ hidden) < 1e-6
    part = torch.ones(V - 128, H)
    found.weight(part, slice(128, V), hidden, first=False)
    assert relative(part - 1, left[:, 128:].t() @ hidden) < 1e-5


def test_the_host_gathers_a_slab_at_a_time(monkeypatch):
    g = torch.Generator().manual_seed(0)
    dlogits, weight, hidden = (torch.randn(*size, generator=g) for size in ((150, 300), (300, 20), (150, 20)))
    monkeypatch.setattr(tile_filter, "slab_rows", lambda V, H: 70)
    found = tiles(dlogits, weight, None, "host")
    assert relative(found.hidden(), dlogits @ weight) < 1e-6
    whole = torch.full((300, 20), math.nan)
    found.weight(whole, slice(0, 300), hidden, first=True)
    assert relative(whole, dlogits.t() @ hidden) < 1e-6


@pytest.mark.parametrize("place", ["host", pytest.param("device", marks=needs_interpreter)])
def test_nan_is_never_left_out(place):
    dlogits, weight = torch.zeros(5, 200), torch.ones(200, 3)
    dlogits[2, 150] = math.nan
    found = tiles(dlogits, weight, torch.zeros(5), place).hidden()
    assert found[2].isnan().all() and (found[[0, 1, 3, 4]] == 0).all()


@needs_interpreter
@pytest.mark.parametrize("group", [29, 16], ids=["whole", "groups"])
def test_the_engine_of_a_gpu(group, monkeypatch):
    """Kernels in place of the host's blocks, fp16 dlogits in padded rows, slabs of the weight gradient."""
    DeviceTiles = device_tiles()
    Device(monkeypatch)
    monkeypatch.setattr(chunked, "plan_chunks", lambda *a, **k: Plan(8, 0, group))
    monkeypatch.setattr(head_gradient, "SLAB_BYTES", 4 * 24 * 128)
    monkeypatch.setattr(head_gradient, "tiles_of", DeviceTiles)
    flags = []
    init = DeviceTiles.__init__
    monkeypatch.setattr(DeviceTiles, "__init__", lambda self, *a: (init(self, *a), flags.append(self._flags))[0])
    p = peaked(torch.float16)
    student, teacher = peak(p)
    exact = gradients(fk.kd_loss(student, teacher, p.labels, fk.Skew()).loss, p.leaves)
    found = gradients(fk.kd_loss(student, teacher, p.labels, fk.Skew(), grad_filter_eps=EPS).loss, p.leaves)
    assert 0 < torch.cat([f.flatten() for f in flags]).float().mean() < 1
    valid = p.labels != -100
    check_left_out(p, exact, found, valid.double() / valid.sum(), behind=128)
    assert relative(found[1][:LIKELY], exact[1][:LIKELY]) < 2e-3


def test_a_gpu_without_triton_is_told(monkeypatch):
    monkeypatch.setattr(select, "installed", lambda package: False)
    with pytest.raises(ValueError, match=r"grad_filter_eps=0.001 must be 0 here: .* the package triton"):
        choose_engine(None, None, fk.ForwardKD().spec, 1e-3, torch.device("cuda"))


@needs_interpreter
@pytest.mark.parametrize("H", [24, 40])
def test_slabs_begin_where_tiles_do(H, monkeypatch):
    """One group, low-precision weights, a hidden size whose slab is no multiple of a tile."""
    g = torch.Generator().manual_seed(0)
    dlogits, hidden = (torch.randn(*size, generator=g).to(torch.float16) for size in ((30, 700), (30, H)))
    weight = torch.randn(700, H, generator=g).to(torch.bfloat16)
    monkeypatch.setattr(head_gradient, "SLAB_BYTES", 4 * H * 300)
    monkeypatch.setattr(head_gradient, "tiles_of", device_tiles())
    projection = Projection(weight, None, torch.float16)
    projection.upcast = False
    made = head_gradient.HeadGradient(
        weight, None, projection, torch.tensor(0.5), want_weight=True, want_bias=False, whole=True, grad_filter_eps=1e-6
    )
    made.add(dlogits, hidden, None, want_hidden=False)
    d_weight, _ = made.finished()
    assert relative(d_weight, 0.5 * (dlogits.float().t() @ hidden.float())) < 4e-3


def test_another_default_dtype_changes_nothing():
    p = peaked()
    student, teacher = peak(p)

    def filtered() -> list[Tensor]:
        return gradients(fk.kd_loss(student, teacher, p.labels, fk.Skew(), grad_filter_eps=1e-6).loss, p.leaves)

    expected = filtered()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = filtered()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))
