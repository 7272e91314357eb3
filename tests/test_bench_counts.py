"""Work counted beside work measured, and the top-k benchmark."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fused_kd as fk
from fused_kd.engines import chunked
from fused_kd.engines.plan import Plan
from fused_kd.forecast import chunked_plan
from fused_kd.tuning import tuned

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import report
from bench.counts import count_chunked, gemm_flops, gemm_products, planned
from bench.floor import Floor
from bench.implementations import IMPLEMENTATIONS, preferred_chunk
from bench.inputs import cut_top_k, make_inputs
from bench.samples import rates
from bench.shapes import GPU_SHAPES, Shape, Variant
from bench.tally import measured_flops, row_scratch_bytes

from .test_bench import CPU, HEADER, WIDE, case

TOP_K = ["fused_kd top-k 64", "fused_kd top-k 64 bucket"]


def prepared(name: str, dtype: torch.dtype = torch.float32):
    """Inputs of one implementation, and a forward and backward on all labels or those given."""
    inputs = IMPLEMENTATIONS[name].prepare(make_inputs(WIDE, CPU, dtype))
    step = IMPLEMENTATIONS[name].build(inputs, inputs.gamma("mixed"))
    return inputs, lambda labels=inputs.labels: step(labels).backward()


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("name", ["fused_kd", "fused_kd torch", "eager", *TOP_K])
def test_counted_flops_are_those_that_run(name, chunk):
    inputs, call = prepared(name)
    with preferred_chunk(chunk):
        counts = IMPLEMENTATIONS[name].work(WIDE, inputs, 0.5)
        assert measured_flops(call) == sum(counts["flops"].values())
        assert measured_flops(lambda: (call(), call())) == 2 * sum(counts["flops"].values())
        if name != "eager":
            half = gemm_flops(WIDE, top_k=name in TOP_K, valid=0.5)
            assert measured_flops(lambda: call(inputs.ignoring(0.5))) == sum(half.values())


@pytest.mark.parametrize("frozen, saved", [("hidden_s", "d_hidden"), ("weight_s", "d_weight")])
def test_measured_flops_follow_what_runs(frozen, saved):
    inputs, call = prepared("fused_kd")
    getattr(inputs, frozen).requires_grad_(False)
    flops = gemm_flops(WIDE)
    assert measured_flops(call) == sum(flops.values()) - flops[saved]


def test_low_precision_runs_the_same_flops():
    _, call = prepared("fused_kd", torch.bfloat16)
    assert measured_flops(call) == sum(gemm_flops(WIDE).values())


def test_products_with_an_fp32_result_are_measured():
    a, b = (
        torch.empty(5, 7, device="meta", dtype=torch.bfloat16),
        torch.empty(7, 3, device="meta", dtype=torch.bfloat16),
    )
    out = torch.empty(5, 3, device="meta")
    aten = torch.ops.aten
    for call in (
        lambda: aten.mm.dtype_out(a, b, torch.float32, out=out),
        lambda: aten.mm.dtype(a, b, torch.float32),
        lambda: aten.addmm.dtype_out(out, a, b, torch.float32, out=out),
    ):
        assert measured_flops(call) == 2 * 5 * 7 * 3


def test_counts_by_hand():
    shape, plan = Shape("by hand", N=10, H_s=2, H_t=3, V=7), Plan(chunk=4, workspace=99, group=4)
    easy = count_chunked(shape, torch.float32, plan)
    assert easy.flops == {"student_logits": 280, "teacher_logits": 420, "d_hidden": 280, "d_weight": 280}
    assert easy.gemm_bytes == {
        "student_logits": 4 * (20 + 3 * 14 + 70),  # hidden, weight three times, logits
        "teacher_logits": 4 * (30 + 3 * 21 + 70),
        "d_hidden": 4 * (70 + 3 * 14 + 20),
        "d_weight": 4 * (70 + 20 + 5 * 14),  # written thrice, read twice
    }
    assert (easy.row_specials, easy.row_bytes_once, easy.row_bytes_swept) == (2 * 70, 12 * 70, 20 * 70)
    assert (easy.chunk, easy.group, easy.workspace_bytes) == (4, 4, 99)

    half = count_chunked(shape, torch.float32, plan, valid=0.5, hard=1.0)
    assert half.gemm_bytes["d_weight"] == 4 * (35 + 10 + 3 * 14)
    assert (half.row_specials, half.row_bytes_once, half.row_bytes_swept) == (4 * 35, 12 * 35, 28 * 35)
    assert sum(half.flops.values()) == 630
    remade = [count_chunked(shape, torch.float32, plan, hard=h, recomputes=True).row_specials for h in (0.0, 1.0)]
    assert remade == [4 * 70, 9 * 70]

    lists = count_chunked(shape, torch.float32, plan, top_k=True, hard=1.0)
    assert lists.flops.keys() == lists.gemm_bytes.keys() == {"student_logits", "d_hidden", "d_weight"}
    assert (lists.row_specials, lists.row_bytes_once, lists.row_bytes_swept) == (70, 8 * 70, 12 * 70)

    gpu = count_chunked(shape, torch.bfloat16, plan, recomputes=True)
    assert gpu.gemm_bytes["student_logits"] == 2 * (20 + 3 * 14) + 4 * 70
    assert gpu.gemm_bytes["d_weight"] == 2 * (70 + 20) + 4 * 5 * 14 + 6 * 14  # rounded
    assert gpu.row_bytes_once == 10 * 70
    half = count_chunked(shape, torch.float16, plan)
    assert half.gemm_bytes["d_weight"] == gpu.gemm_bytes["d_weight"] + 8 * 14  # scaled
    cpu = count_chunked(shape, torch.bfloat16, plan, upcasts=True)
    assert cpu.gemm_bytes["student_logits"] == 4 * 20 + 10 * 3 * 14 + 12 * 70
    assert cpu.gemm_bytes["d_weight"] == 4 * (70 + 20) + 4 * 5 * 14 + 6 * 14


def test_groups_by_hand():
    """Chunks of 3, 3, 1 and 3 tokens, in groups of 7 and 3; then all in one, its dW in slabs of 3, 3 and 1 rows."""
    shape = Shape("by hand", N=10, H_s=2, H_t=3, V=7)
    several = Plan(chunk=3, workspace=0, group=7)
    found = count_chunked(shape, torch.bfloat16, several)
    assert found.gemm_bytes == {
        "student_logits": 2 * (20 + 4 * 14) + 4 * 70,
        "teacher_logits": 2 * (30 + 4 * 21) + 4 * 70,
        "d_hidden": 2 * (70 + 2 * 14) + 4 * 20,
        "d_weight": 2 * (70 + 20) + 4 * 3 * 14 + 6 * 14,  # written twice, read once, rounded
    }
    products = gemm_products(shape, torch.bfloat16, several)
    assert products["student_logits"].results == [(3, 7), (3, 7), (1, 7), (3, 7)]
    assert products["d_hidden"].results == [(7, 2), (3, 2)] and products["d_weight"].results == [(7, 2), (7, 2)]
    assert products["d_weight"].written == 4 * 14
    at_once = Plan(chunk=3, workspace=0, group=10)
    for dtype, extra in ((torch.bfloat16, 2), (torch.float16, 4 + 6 + 8), (torch.float32, 4)):
        found = count_chunked(shape, dtype, at_once).gemm_bytes
        assert found["d_weight"] == dtype.itemsize * (70 + 20) + extra * 14
        assert found["d_hidden"] == dtype.itemsize * (70 + 14) + 4 * 20
    assert count_chunked(shape, torch.bfloat16, at_once, upcasts=True).gemm_bytes["d_weight"] == 4 * 90 + (4 + 6) * 14


def test_slabs_are_those_of_the_engine(monkeypatch):
    shape = Shape("by hand", N=10, H_s=2, H_t=3, V=7)
    monkeypatch.setattr("bench.counts.weight_slab", lambda V, H: 3)
    plan = Plan(chunk=3, workspace=0, group=10)
    product = gemm_products(shape, torch.bfloat16, plan, slabs=True)["d_weight"]
    assert product == (2 * (70 + 3 * 20), 0, [(3, 2), (3, 2), (1, 2)])
    assert count_chunked(shape, torch.bfloat16, plan).gemm_bytes["d_weight"] == product.read + 2 * 14


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=lambda shape: shape.name)
def test_counts_at_real_shapes(shape, grouped):
    """bf16 on a GPU: at A one group and 63 slabs of 2048 rows, at B two groups; else four chunks of 2048 tokens."""
    N, H, H_t, V = shape[1:]
    with tuned(device_chunk=1024 if grouped else 0):
        plan = chunked_plan(
            N, H, H_t, V, dtype=torch.bfloat16, device=torch.device("cuda"), upcast=False
        )  # fmt: skip
    found = count_chunked(shape, torch.bfloat16, plan)
    m, k = ((8, 1) if shape.name == "A" else (8, 2)) if grouped else (4, 4)
    assert (found.chunk, found.group) == (N // m, N // k)
    sums = 2 * V * H if k == 1 else (4 * (2 * k - 1) + 6) * V * H
    assert found.gemm_bytes == {
        "student_logits": 2 * (N * H + m * V * H) + 4 * N * V,
        "teacher_logits": 2 * (N * H_t + m * V * H_t) + 4 * N * V,
        "d_hidden": 2 * (N * V + k * V * H) + 4 * N * H,
        "d_weight": 2 * (N * V + (63 if k == 1 else 1) * N * H) + sums,
    }


@pytest.mark.parametrize("name", ["fused_kd", *TOP_K])
def test_counted_plan_is_the_one_that_runs(name, monkeypatch):
    seen = []
    inputs, call = prepared(name)
    plan = chunked.plan_chunks
    monkeypatch.setattr(chunked, "plan_chunks", lambda *a, **k: seen.append(plan(*a, **k)) or seen[-1])
    for chunk in (None, 5):
        with preferred_chunk(chunk):
            call()
            assert planned(inputs) == seen[-1] == seen[-2]
    assert seen[0] != seen[-1]


def test_row_scratch_is_what_rows_hold_at_a_time():
    _, call = prepared("fused_kd torch")
    call()  # imports the row
    block = 4 * WIDE.N * WIDE.V
    most = row_scratch_bytes(call)
    assert most % block == 0 and 3 <= most // block <= 12  # p, the difference, and what hard rows need
    assert row_scratch_bytes(lambda: (call(), call())) == most
    _, call = prepared("eager")
    assert row_scratch_bytes(call) == 0


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_top_k_inputs_are_the_teachers_head_and_their_own_difficulty(tail):
    dense = make_inputs(WIDE, CPU, torch.float32)
    inputs = cut_top_k(dense, 16, tail)
    assert inputs.top_k is not None and inputs.top_k.tail == tail
    log_p = (dense.hidden_t @ dense.weight_t.t()).double().log_softmax(1)
    kept = torch.zeros_like(log_p, dtype=torch.bool).scatter_(1, inputs.top_k.indices, True)
    assert kept.sum(1).eq(16).all()
    assert (log_p.masked_fill(~kept, 0).amin(1) >= log_p.masked_fill(kept, -1e9).amax(1) - 1e-5).all()
    torch.testing.assert_close(
        inputs.top_k.log_probs.double(), log_p.gather(1, inputs.top_k.indices), rtol=1e-5, atol=1e-5
    )
    out = fk.kd_loss(
        fk.LMHead(dense.hidden_s, dense.weight_s),
        inputs.top_k,
        dense.labels,
        fk.SelfEvolution(gamma=inputs.gamma("mixed")),
    )
    torch.testing.assert_close(out.difficulty, inputs.difficulty, rtol=1e-5, atol=1e-5)
    assert out.is_hard.float().mean().item() == inputs.hard_fraction(inputs.gamma("mixed"))
    first = inputs.first(5)
    assert first.top_k is not None and torch.equal(first.top_k.indices, inputs.top_k.indices[:5])


def test_floor_of_a_top_k_teacher_is_the_students_three_products():
    inputs, _ = prepared(TOP_K[0])
    floor = Floor(inputs)
    assert measured_flops(floor) == sum(gemm_flops(WIDE, top_k=True).values())
    z = inputs.hidden_s.detach() @ inputs.weight_s.detach().t()
    torch.testing.assert_close(floor.logits, z)
    torch.testing.assert_close(floor.d_weight, z.t() @ inputs.hidden_s.detach())
    dense, _ = prepared("fused_kd")
    assert measured_flops(Floor(dense)) == sum(gemm_flops(WIDE).values())


def test_rates_and_tables():
    counts = {
        "chunk": 4, "flops": {"a": 10**9, "b": 10**9}, "gemm_bytes": {"a": 10**9, "b": 2 * 10**9},
        "row_specials": 5 * 10**9, "row_bytes_once": 10**9, "row_bytes_swept": 3 * 10**9, "workspace_bytes": 4 * 10**9,
    }  # fmt: skip
    seconds = {"floor": [1.0, 1.0], "step": [2.0, 2.0], "half_ignored": [1.0, 1.0]}

    def row(name: str, shape: str, seconds: dict = seconds, **fields) -> dict:
        return replace(case(name), shape=WIDE._replace(name=shape)).row(
            Variant(), status="ok", seconds=seconds, interleaved=True, **{"top_k": False, **fields}
        )

    one = row("fused_kd", "32k", counts=counts)
    assert rates(one) == (1e9, 0.5, 2e9)
    one["measured_flops"] = 4 * 10**9  # recomputes
    assert rates(one) == (2e9, 1.0, 2e9)
    assert rates(row("eager", "32k", counts={"flops": counts["flops"]}))[2] is None
    assert rates(row("eager", "32k")) == rates(row("eager", "32k", {}, counts=counts)) == (None, None, None)

    one |= {"row_scratch_bytes": 10**8, "memory": {"over_inputs_and_gradients": 5 * 10**9, "over_inputs": 6 * 10**9}}
    fast = {"floor": [1.0, 1.0], "step": [1.05, 1.05], "half_ignored": [0.8, 0.8]}
    rows = [
        one,
        row(TOP_K[0], "32k", fast, top_k=True),
        row(TOP_K[1], "32k", top_k=True),
        row(TOP_K[1], "128k", top_k=True),
    ]
    text = report.markdown({**HEADER, "written": "now", "rows": rows})
    shape = "12, 8, 10, 150 | mixed"
    assert (
        f"| 32k: {shape} | fused_kd | 4 | 2 | 4 | 2 | 100 % | 3 | 1.00 - 3.00 | 2 | 5 | 4.000 | 0.100 | 5.000 |" in text
    )
    assert f"| 32k: {shape} | {TOP_K[0]} |  | 1.05 met |  | 0.76 not met |  |" in text
    assert f"| 32k: {shape} | {TOP_K[1]} |  | 2.00 not met |  | 0.50 met |  |" in text
    assert f"| 128k: {shape} | {TOP_K[1]} |  | 2.00 |  | 0.50 met |  |" in text
