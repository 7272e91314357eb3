"""Work counted from the algorithm: by hand, as PyTorch dispatches it, by the plans that run."""

from __future__ import annotations

import math
import os

import pytest
import torch

import fused_kd as fk
from bench.counts import FIELDS, Plan, count_chunked, count_streaming, gemm_flops, gemm_products, planned
from bench.problems import GPU_SHAPES, Shape, make_inputs
from bench.registry import IMPLEMENTATIONS, JSD, KL, OURS, SELF_EVOLUTION, SFT
from fused_kd.engines import chunked
from fused_kd.forecast import chunked_plan
from fused_kd.tuning import tuned

from .helpers import BF16, CPU, FP32, WIDE, measured_flops

A, B = GPU_SHAPES
HAND = Shape("by hand", N=10, H_s=2, H_t=3, V=7)


def prepared(name: str, dtype: torch.dtype = FP32):
    """Inputs of one implementation, and a forward and backward on all labels or those given."""
    inputs = IMPLEMENTATIONS[name].prepare(make_inputs(WIDE, CPU, dtype))
    step = IMPLEMENTATIONS[name].build(inputs, inputs.gamma("mixed"))
    return inputs, lambda labels=inputs.labels: step(labels).backward()


@pytest.mark.parametrize("name", [*OURS.values(), "fused_kd torch", "fused_kd top-k 64", "eager", "eager sft"])
def test_counted_flops_are_those_that_run(name):
    implementation = IMPLEMENTATIONS[name]
    inputs, call = prepared(name)
    alone = inputs.top_k is not None or not implementation.teacher
    flops = implementation.work(WIDE, inputs, 0.5)["flops"]
    assert flops == gemm_flops(WIDE, top_k=alone) and ("teacher_logits" in flops) == (not alone)
    assert measured_flops(call) == sum(flops.values())
    if implementation.drops_ignored:
        half = gemm_flops(WIDE, top_k=alone, valid=0.5)
        assert measured_flops(lambda: call(inputs.ignoring(0.5))) == sum(half.values())


def test_flops_follow_what_runs():
    _, call = prepared("fused_kd", BF16)
    assert measured_flops(call) == sum(gemm_flops(WIDE).values())
    for frozen, saved in (("hidden_s", "d_hidden"), ("weight_s", "d_weight")):
        inputs, call = prepared("fused_kd")
        getattr(inputs, frozen).requires_grad_(False)
        flops = gemm_flops(WIDE)
        assert measured_flops(call) == sum(flops.values()) - flops[saved]


def test_counts_by_hand():
    plan = Plan(chunk=4, workspace=99, group=4)
    easy = count_chunked(HAND, FP32, plan)
    assert easy.flops == {"student_logits": 280, "teacher_logits": 420, "d_hidden": 280, "d_weight": 280}
    assert easy.gemm_bytes == {
        "student_logits": 4 * (20 + 3 * 14 + 70),  # hidden, weight three times, logits
        "teacher_logits": 4 * (30 + 3 * 21 + 70),
        "d_hidden": 4 * (70 + 3 * 14 + 20),
        "d_weight": 4 * (70 + 20 + 5 * 14),  # written thrice, read twice
    }
    assert (easy.row_specials, easy.row_bytes_once, easy.row_bytes_swept) == (2 * 70, 12 * 70, 20 * 70)
    assert (easy.chunk, easy.group, easy.workspace_bytes) == (4, 4, 99)

    half = count_chunked(HAND, FP32, plan, valid=0.5, hard=1.0)
    assert half.gemm_bytes["d_weight"] == 4 * (35 + 10 + 3 * 14)
    assert (half.row_specials, half.row_bytes_once, half.row_bytes_swept) == (4 * 35, 12 * 35, 28 * 35)
    assert sum(half.flops.values()) == 630
    remade = [count_chunked(HAND, FP32, plan, hard=h, recomputes=True).row_specials for h in (0.0, 1.0)]
    assert remade == [4 * 70, 9 * 70]

    lists = count_chunked(HAND, FP32, plan, top_k=True, hard=1.0)
    assert lists.flops.keys() == lists.gemm_bytes.keys() == {"student_logits", "d_hidden", "d_weight"}
    assert (lists.row_specials, lists.row_bytes_once, lists.row_bytes_swept) == (70, 8 * 70, 12 * 70)

    gpu = count_chunked(HAND, BF16, plan, recomputes=True)
    assert gpu.gemm_bytes["student_logits"] == 2 * (20 + 3 * 14) + 4 * 70
    assert gpu.gemm_bytes["d_weight"] == 2 * (70 + 20) + 4 * 5 * 14 + 6 * 14  # rounded
    assert gpu.row_bytes_once == 10 * 70
    scaled = count_chunked(HAND, torch.float16, plan)
    assert scaled.gemm_bytes["d_weight"] == gpu.gemm_bytes["d_weight"] + 8 * 14
    cpu = count_chunked(HAND, BF16, plan, upcasts=True)
    assert cpu.gemm_bytes["student_logits"] == 4 * 20 + 10 * 3 * 14 + 12 * 70
    assert cpu.gemm_bytes["d_weight"] == 4 * (70 + 20) + 4 * 5 * 14 + 6 * 14


def test_groups_by_hand():
    """Chunks of 3, 3, 1 and 3 tokens, in groups of 7 and 3; then all in one."""
    several = Plan(chunk=3, workspace=0, group=7)
    assert count_chunked(HAND, BF16, several).gemm_bytes == {
        "student_logits": 2 * (20 + 4 * 14) + 4 * 70,
        "teacher_logits": 2 * (30 + 4 * 21) + 4 * 70,
        "d_hidden": 2 * (70 + 2 * 14) + 4 * 20,
        "d_weight": 2 * (70 + 20) + 4 * 3 * 14 + 6 * 14,  # written twice, read once, rounded
    }
    products = gemm_products(HAND, BF16, several)
    assert products["student_logits"].results == [(3, 7), (3, 7), (1, 7), (3, 7)]
    assert products["d_hidden"].results == [(7, 2), (3, 2)] and products["d_weight"].results == [(7, 2), (7, 2)]
    at_once = Plan(chunk=3, workspace=0, group=10)
    for dtype, extra in ((BF16, 2), (torch.float16, 4 + 6 + 8), (FP32, 4)):
        found = count_chunked(HAND, dtype, at_once).gemm_bytes
        assert found["d_weight"] == dtype.itemsize * (70 + 20) + extra * 14
        assert found["d_hidden"] == dtype.itemsize * (70 + 14) + 4 * 20


def test_slabs_are_those_of_the_engine(monkeypatch):
    """All tokens in one group, the weight's gradient in slabs of 3, 3 and 1 rows."""
    monkeypatch.setattr("bench.counts.weight_slab", lambda V, H: 3)
    plan = Plan(chunk=3, workspace=0, group=10)
    product = gemm_products(HAND, BF16, plan, slabs=True)["d_weight"]
    assert product == (2 * (70 + 3 * 20), 0, [(3, 2), (3, 2), (1, 2)])
    assert count_chunked(HAND, BF16, plan).gemm_bytes["d_weight"] == product.read + 2 * 14


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=lambda shape: shape.name)
def test_counts_at_real_shapes(shape, grouped):
    """bf16 on a GPU: at A one group and 63 slabs of 2048 rows, at B two groups; else four chunks of 2048 tokens."""
    N, H, H_t, V = shape[1:]
    with tuned(gradient_groups=grouped):
        plan = chunked_plan(N, H, H_t, V, dtype=BF16, device=torch.device("cuda"), upcast=False)
    found = count_chunked(shape, BF16, plan)
    m, k = ((8, 1) if shape.name == "A" else (8, 2)) if grouped else (4, 4)
    assert (found.chunk, found.group) == (N // m, N // k)
    sums = 2 * V * H if k == 1 else (4 * (2 * k - 1) + 6) * V * H
    assert found.gemm_bytes == {
        "student_logits": 2 * (N * H + m * V * H) + 4 * N * V,
        "teacher_logits": 2 * (N * H_t + m * V * H_t) + 4 * N * V,
        "d_hidden": 2 * (N * V + k * V * H) + 4 * N * H,
        "d_weight": 2 * (N * V + (63 if k == 1 else 1) * N * H) + sums,
    }


@pytest.mark.parametrize("name", ["fused_kd", "fused_kd sft", "fused_kd top-k 64"])
def test_counted_plan_is_the_one_that_runs(name, monkeypatch):
    seen = []
    inputs, call = prepared(name)
    plan = chunked.plan_chunks
    monkeypatch.setattr(chunked, "plan_chunks", lambda *a, **k: seen.append(plan(*a, **k)) or seen[-1])
    for tokens in (None, 5):
        if tokens:
            monkeypatch.setattr(chunked, "preferred_chunk", lambda *_: 5)
        call()
        assert planned(inputs, teacher=IMPLEMENTATIONS[name].teacher) == seen[-1] == seen[-2]
        counts = IMPLEMENTATIONS[name].work(WIDE, inputs, 0.0)
        assert (counts["chunk"], counts["workspace_bytes"], counts["group"]) == tuple(seen[-1][:3])
    assert seen[0] != seen[-1]


def test_counted_rows_by_hand():
    NV = WIDE.N * WIDE.V
    specials, swept = {}, {}
    for group, name in OURS.items():
        counts = IMPLEMENTATIONS[name].work(WIDE, make_inputs(WIDE, CPU, FP32), 0.5)
        specials[group], swept[group] = counts["row_specials"] / NV, counts["row_bytes_swept"] / NV
    # Exponentials of both sides; of t / m and q / m a division and a logarithm each, of half the tokens t / m's alone.
    assert specials == {SELF_EVOLUTION: 3, JSD: 6, KL: 2, SFT: 1}
    # fp32 logits of both sides, sweep by sweep, and the gradient.
    assert swept == {SELF_EVOLUTION: 8 * 2.5 + 4, JSD: 8 * 3 + 4, KL: 8 * 2 + 4, SFT: 4 * 2 + 4}


def test_streaming_bytes_by_hand():
    """32 MiB of bf16 dlogits of all tokens and fp32 dW are 1024 columns; of fp32 dH and its rounding, 1024 tokens.

    132 tiles of 128 x 128 at a time: 11 blocks of tokens beside 12 of columns, or all 8 of a chunk beside 16, or 16
    beside the 8 of 1024 columns; the sums' are of 64 tokens.
    """
    counts = count_streaming(A, BF16, hard=0.5)
    m, s = 8192 // 1024, math.ceil(128256 / 1024)
    assert (counts.plan.tokens, counts.plan.columns, counts.plan.late_columns) == (1024, 4096, 1024)
    assert counts.gemm_bytes == {
        "statistics": 2 * (8192 * math.ceil(128256 / (12 * 128)) + 128256 * math.ceil(64 / 11)) * 9216,
        "sums": 2 * (4096 * math.ceil(128256 / (12 * 128)) + 128256 * math.ceil(64 / 11)) * 9216,
        "dlogits": 2 * m * (1024 * (2 * 31 + 1) + 128256) * 9216,
        "dlogits_again": 2 * (s * 8192 + 128000 * 4 + 256) * 9216,  # the last slab is two tiles wide: 64 blocks
        "d_hidden": 2 * m * 128256 * 4096 + 4 * 8192 * 4096,
        "d_weight": 2 * s * 8192 * 4096 + 2 * 128256 * 4096,
    }
    assert counts.traffic == 0
    joined = count_streaming(A, BF16, memory_budget=1 << 30)
    s = math.ceil(128256 / 4096)
    assert joined.plan.together and joined.plan.late_columns == 4096
    # The last of 32 slabs is 10 tiles wide: 13 blocks.
    assert joined.gemm_bytes["dlogits"] == 2 * (8192 * (3 * 31 + 1) + 126976 * 6 + 1280 * 5) * 9216
    assert joined.gemm_bytes["dlogits_again"] == 0
    assert joined.traffic == 8 * (s - 1) * 8192 * 4096
    assert joined.flops | {"dlogits_again": counts.flops["dlogits_again"]} == count_streaming(A, BF16).flops
    single = count_streaming(A, FP32)
    assert single.gemm_bytes["d_weight"] == 4 * 8192 * 4096 + 4 * 128256 * 4096
    assert single.traffic == 8 * (math.ceil(8192 / single.plan.tokens) - 1) * 128256 * 4096


def test_streaming_flops_by_hand():
    """bf16: logits for the statistics, for the sums of half the tokens, and twice for gradients."""
    logits, student = (2 * 8192 * 128256 * H for H in (4096 + 5120, 4096))
    expected = dict.fromkeys(("statistics", "dlogits", "dlogits_again"), logits)
    assert count_streaming(A, BF16, hard=0.5).flops == expected | {
        "sums": logits // 2, "d_hidden": student, "d_weight": student,
    }  # fmt: skip
    single = count_streaming(A, FP32, valid=0.5).flops
    assert single["dlogits_again"] == single["sums"] == 0 and single["d_weight"] == student // 2
    half = count_streaming(A, BF16, valid=0.5).flops
    assert half["d_weight"] == 2 * half["d_hidden"] == student  # ignored tokens are zeros there
    alone = count_streaming(A, BF16, teacher=False, hard=1.0).flops
    assert alone["sums"] == 0 and alone["statistics"] == student


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
@pytest.mark.parametrize("teacher", [True, False])
def test_streaming_plan_is_the_one_that_runs(teacher, monkeypatch):
    pytest.importorskip("triton")
    from fused_kd.engines.streaming import engine
    from fused_kd.engines.streaming.kernels import FIELDS as kernels

    assert kernels.value == FIELDS
    seen, plan = [], engine.plan_streaming
    monkeypatch.setattr(engine, "plan_streaming", lambda *a: seen.append(plan(*a)) or seen[-1])
    shape = WIDE._replace(N=20)
    inputs = make_inputs(shape, CPU, FP32)
    student = fk.LMHead(inputs.hidden_s, inputs.weight_s)
    target = fk.LMHead(inputs.hidden_t, inputs.weight_t) if teacher else None
    fk.kd_loss(student, target, inputs.labels, fk.SelfEvolution() if teacher else fk.SFT(), engine="streaming")
    assert count_streaming(shape, FP32, teacher=teacher).plan == seen[0]
