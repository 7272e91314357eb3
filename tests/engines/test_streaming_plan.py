"""Sizes that the streaming engine chooses, from shapes alone: memory, whole waves, tiles."""

from __future__ import annotations

import os

import pytest
import torch

import fused_kd as fk
from fused_kd.engines import gemm, waves
from fused_kd.engines.problem import Problem, Side, Wanted
from fused_kd.engines.streaming import plan as streaming_plan
from fused_kd.engines.streaming.plan import Plan, plan_streaming, sizes_of
from fused_kd.terms import Scalars

pytest.importorskip("triton", reason="the streaming engine needs triton")
if not (os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before the first import of triton", allow_module_level=True)

from fused_kd.engines.streaming import sweeps as streaming_sweeps


@pytest.fixture
def fp32_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an NVIDIA GPU."""
    monkeypatch.setattr(gemm, "has_fp32_output", lambda device, dtype: True)


def plan_of(
    N: int, H: int, V: int, dtype: torch.dtype, budget: int | None = None, wanted: Wanted | None = None
) -> Plan:
    """The plan of a call with these shapes on a GPU."""
    student = Side(*(torch.empty(shape, dtype=dtype, device="meta") for shape in ((N, H), (V, H))))
    labels = torch.empty(N, dtype=torch.int64, device="meta")
    scale = torch.empty((), device="meta")
    scalars = torch.empty(1, 1, len(Scalars._fields), device="meta")
    problem = Problem(
        student=student, teacher=student, labels=labels, weights=None, scale=scale, scalars=scalars,
        wanted=wanted or Wanted(True, True, False), spec_code=fk.SelfEvolution().spec.code, cold_labels=False, vocab=V,
        dtype=None, memory_budget=budget, engine="streaming", backend="triton",
    )  # fmt: skip
    sweeps = streaming_sweeps.Sweeps(problem, None, labels)
    return plan_streaming(sizes_of(problem, N, upcast=False), sweeps.tiles, budget)


def test_memory_at_full_size(fp32_output):
    """Under 64 MB where one set of fp32 logits alone would be 4.2 GB."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for H in (1024, 1536, 2048, 3072, 4096):
            assert plan_of(8192, H, 128256, dtype).workspace < 62e6
        assert plan_of(8192, 896, 151936, dtype).workspace < 62e6
    base, longer = (plan_of(N, 4096, 128256, torch.float32).workspace for N in (8192, 65536))
    assert longer - base < 1000 * (65536 - 8192)  # bytes a token
    assert plan_of(8192, 4096, 128256, torch.bfloat16, budget=16 << 20).workspace <= 16 << 20


def test_slabs_fill_whole_waves(fp32_output):
    """H100: dW's GEMM of 1024 x 4096 is 128 tiles of 128 x 256, its dlogits 512 of 128 x 128; 132 at a time."""
    plan = plan_of(8192, 4096, 128256, torch.bfloat16)
    assert (plan.tokens, plan.columns, plan.columns_of_all, plan.together) == (1024, 4096, 1024, False)
    for N, H in ((8192, 4096), (8192, 2048), (4096, 3072), (2048, 1024)):
        plan = plan_of(N, H, 128256, torch.bfloat16)
        grids = [(N // 128) * (plan.columns_of_all // 128)]
        if not plan.together:
            grids += [(plan.tokens // 128) * (plan.columns // 128), (plan.tokens // 128) * (H // 256)]
        assert min(grid / (132 * -(-grid // 132)) for grid in grids) > 0.85, (N, H, plan)
    assert waves.fitting(1000, 128, 5000, lambda size: 1 + (size > 640)) == 640  # two waves for little more
    assert waves.fitting(1000, 128, 5000, lambda size: size) == 896  # the larger of equals
    assert waves.fitting(1000, 128, 70, lambda size: 1) == 70


def test_one_pass_where_memory_allows(fp32_output):
    """A third of the products for 4 N H bytes: 29 MB at H = 896, and 134 MB, which a budget must grant, at 4096."""
    assert plan_of(8192, 896, 151936, torch.bfloat16).together
    for budget, expected in ((None, False), (128 << 20, False), (256 << 20, True)):
        plan = plan_of(8192, 4096, 128256, torch.bfloat16, budget=budget)
        assert plan.together == expected and plan.workspace <= (budget or 62e6)
    assert not plan_of(8192, 896, 151936, torch.float32).together
    assert not plan_of(8192, 896, 151936, torch.bfloat16, wanted=Wanted(False, True, True)).together


def side(dtype: torch.dtype, H: int = 32, stride: int = 1, bias: bool = False) -> Side:
    source, weight = (torch.empty(n, H * stride, dtype=dtype)[:, ::stride] for n in (4, 8))
    return Side(source, weight, torch.empty(8) if bias else None)


def test_tiles_are_wide_where_registers_allow(fp32_output):
    bf16 = torch.bfloat16
    wide = streaming_plan.choose_tiles(bf16, bf16)
    assert [tiles[:2] for tiles in wide] == [(128, 128), (64, 128), (128, 128)]
    narrow = {streaming_plan.choose_tiles(bf16, bf16, plain=False)}
    narrow |= {streaming_plan.choose_tiles(bf16, bf16, target=target) for target in ("sm_80", "sm_89", "sm_100")}
    assert [[tiles[:2] for tiles in kernels] for kernels in narrow] == [[(64, 128)] * 3]
    assert {tiles[:3] for tiles in streaming_plan.choose_tiles(bf16, bf16, capped=True)} == {(64, 128, 32)}
    amd = streaming_plan.choose_tiles(bf16, bf16, target="gfx942")
    assert {(*tiles[:2], tiles.registers) for tiles in amd} == {(128, 64, None)}
    for change, plain in (({}, True), ({"bias": True}, False), ({"H": 40}, False), ({"stride": 2}, False)):
        assert streaming_sweeps._plain(side(bf16, **change), bf16) == plain
    assert not streaming_sweeps._plain(side(torch.float32), bf16)
