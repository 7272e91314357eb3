"""The performance model: arithmetic by hand, limits, the planner's own plans, tables and the command line."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fused_kd as fk
from bench import machine, model
from bench.counts import Plan, count_chunked, planned
from bench.counts_streaming import FIELDS, count_streaming
from bench.implementations import IMPLEMENTATIONS
from bench.inputs import make_inputs
from bench.machine import measure_machine
from bench.model import best_chunk, best_for, compare, predict
from bench.shapes import GPU_SHAPES, Shape
from bench.tally import measured_flops
from fused_kd.tuning import tuned

FP32, BF16 = torch.float32, torch.bfloat16
CPU = torch.device("cpu")
SMALL = Shape("small", N=10, H_s=2, H_t=3, V=7)
WIDE = Shape("wide", N=300, H_s=8, H_t=10, V=150)
A, B = (next(shape for shape in GPU_SHAPES if shape.name == name) for name in "AB")
H200 = {"gemm_flops_per_s": 790e12, "copy_bytes_per_s": 4.3e12}
FURTHER = {**H200, "multiprocessors": 132, "clock_hz": 1.83e9}
UNIT = {"gemm_flops_per_s": 10.0, "copy_bytes_per_s": 5.0}


def free_memory(**changes: float) -> dict[str, float]:
    return {"gemm_flops_per_s": 10.0, "copy_bytes_per_s": math.inf, **changes}


def test_fp32_by_hand():
    """Chunks of 4, 4 and 2 tokens; rate 10, bandwidth 5."""
    found = predict(SMALL, FP32, UNIT, on_host=True, chunk=4)
    student = 2 * 10 * 7 * 2 / 10  # 28 seconds of arithmetic
    hidden, weight, logits = 10 * 2, 7 * 2, 10 * 7
    assert found.parts == pytest.approx(
        {
            "student_logits": max(student, 4 * (hidden + 3 * weight + logits) / 5),  # 105.6: the weight thrice
            "teacher_logits": max(2 * 10 * 7 * 3 / 10, 4 * (30 + 3 * 21 + logits) / 5),
            "d_hidden": max(student, 4 * (logits + 3 * weight + hidden) / 5),
            "d_weight": max(student, 4 * (logits + hidden + weight) / 5),
            "traffic": 4 * 2 * 2 * weight / 5,  # read and written by the second and third chunk
            "row": 12 * logits / 5,  # two logits read, one gradient written
        }
    )
    once = 4 * (2 * (hidden + weight + logits) + (30 + 21 + logits) + (logits + hidden + weight)) / 5
    assert found.floor_seconds == pytest.approx(once)
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    assert found.ratio == pytest.approx(found.seconds / once)
    per_token = 16 + (4 * 7 + 8 * 2) + (4 * 7 + 8 * 3)
    assert (found.chunk, found.workspace_bytes) == (4, 4 * per_token)
    assert found.gradient_bytes == 4 * (10 * 2 + 7 * 2)
    assert found.memory_bytes == found.workspace_bytes + found.gradient_bytes


def test_bf16_on_a_gpu_by_hand():
    """Shape A: the GEMMs are bound by arithmetic, what is left is traffic and the row."""
    found = predict(A, BF16, H200, on_host=False, hard=0.25)
    nV, VH = 8192 * 128256, 128256 * 4096
    rate, bandwidth = 790e12, 4.3e12
    assert (found.chunk, found.group) == (1024, 8192)
    assert found.parts["d_weight"] == pytest.approx(2 * nV * 4096 / rate)
    rounded = 2 * VH  # a slab at a time, from the cache
    assert found.parts["traffic"] == pytest.approx(rounded / bandwidth)
    assert found.parts["row"] == pytest.approx((2.25 * 8 + 2) * nV / bandwidth)
    floor = 2 * nV * (3 * 4096 + 5120) / rate
    assert found.floor_seconds == pytest.approx(floor)
    assert found.seconds == pytest.approx(floor + (rounded + (2.25 * 8 + 2) * nV) / bandwidth)
    of_chunk, of_group = 16 + 2 * 4 * 128256 + 8 * 5120 + 2 * 4096, 2 * 128256 + 8 * 4096
    assert found.workspace_bytes == 1024 * of_chunk + 8192 * of_group + (32 << 20)
    on_chip = predict(A, BF16, H200, on_host=False, hard=0.25, backend="cuda")
    assert on_chip.parts["row"] == pytest.approx((8 + 2) * nV / bandwidth)
    assert on_chip.seconds - on_chip.parts["row"] == pytest.approx(found.seconds - found.parts["row"])
    with tuned(device_chunk=0):
        before = predict(A, BF16, H200, on_host=False, hard=0.25)
    assert before.chunk == before.group == 2048
    assert before.parts["traffic"] == pytest.approx((3 * 8 + 6) * VH / bandwidth)  # three additions, rounded
    assert before.workspace_bytes == 2048 * (of_chunk + of_group) + 4 * VH + (32 << 20)
    assert before.floor_seconds == found.floor_seconds


def test_several_groups_by_hand():
    """Shape B, two groups of 4096 tokens: dW written twice, read once, rounded; fp16 is scaled, too."""
    VH = 151936 * 896
    for dtype, passes in ((BF16, 6), (torch.float16, 6 + 8)):
        found = predict(B, dtype, H200, on_host=False)
        assert (found.chunk, found.group) == (1024, 4096)
        assert found.parts["traffic"] == pytest.approx((8 + passes) * VH / 4.3e12)


def test_bf16_on_a_cpu_is_upcast():
    """A weight is read in bf16, written and read in fp32; logits and dH move through a slab's products."""
    low, full = (predict(SMALL, dtype, UNIT, on_host=True, chunk=4) for dtype in (BF16, FP32))
    weights = 3 * (2 * 7 * 2 + 7 * 3)  # in three chunks: student's logits and dH, teacher's logits
    upcasts = (2 + 4) * weights + 8 * 2 * 10 * 7
    passes = (4 + 2) * 7 * 2  # dW rounded
    assert low.parts["traffic"] - full.parts["traffic"] == pytest.approx((upcasts + passes) / 5)
    for name in ("student_logits", "teacher_logits", "d_hidden", "d_weight", "row"):
        assert low.parts[name] == pytest.approx(full.parts[name])


def test_addition_to_dw_costs_what_was_seen():
    """10-16 % at 1024 tokens a chunk (fused_kd/engines/plan.py), against one chunk and its bf16 dW."""
    for shape, share in ((A, 0.159), (B, 0.096)):
        with tuned(device_chunk=0):
            at = [predict(shape, BF16, H200, on_host=False, chunk=chunk) for chunk in (1024, 8192)]
        assert [found.group for found in at] == [1024, 8192]
        assert (at[0].seconds - at[1].seconds) / at[1].floor_seconds == pytest.approx(share, abs=0.005)


def test_streaming_by_hand():
    """bf16: logits for the statistics, for the sums of half the tokens, and twice for gradients."""
    found = predict(A, BF16, free_memory(gemm_flops_per_s=790e12), on_host=False, engine="streaming", hard=0.5)
    logits, student = (2 * 8192 * 128256 * H / 790e12 for H in (4096 + 5120, 4096))
    expected = dict.fromkeys(("statistics", "dlogits", "dlogits_again"), logits) | {
        "sums": logits / 2, "d_hidden": student, "d_weight": student, "traffic": 0.0,
    }  # fmt: skip
    assert found.parts == pytest.approx(expected)
    assert found.workspace_bytes < 48e6  # what the engine's docstring promises
    single = predict(A, FP32, free_memory(), on_host=False, engine="streaming", valid=0.5)
    assert single.parts["dlogits_again"] == single.parts["sums"] == 0
    assert single.parts["d_weight"] == pytest.approx(2 * 4096 * 128256 * 4096 / 10)
    half = predict(A, BF16, free_memory(), on_host=False, engine="streaming", valid=0.5)
    assert half.parts["d_weight"] == pytest.approx(2 * half.parts["d_hidden"])  # ignored tokens are zeros there
    alone = predict(A, BF16, free_memory(), on_host=False, engine="streaming", teacher=False, hard=1.0)
    assert alone.parts["sums"] == 0
    assert alone.parts["statistics"] == pytest.approx(2 * 8192 * 128256 * 4096 / 10)


def test_streaming_bytes_by_hand():
    """32 MiB of bf16 dlogits of all tokens and fp32 dW are 1024 columns; of fp32 dH and its rounding, 1024 tokens.

    132 tiles of 128 x 128 at a time: 11 blocks of tokens beside 12 of columns, or all 8 of a chunk beside 16, or 16
    beside the 8 of 1024 columns; the sums' are of 64 tokens.
    """
    counts = count_streaming(A, BF16, hard=0.5)
    m, s = 8192 // 1024, math.ceil(128256 / 1024)
    assert (counts.plan.tokens, counts.plan.columns, counts.plan.columns_of_all) == (1024, 4096, 1024)
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
    assert joined.plan.together and joined.plan.columns_of_all == 4096
    # The last of 32 slabs is 10 tiles wide: 13 blocks.
    assert joined.gemm_bytes["dlogits"] == 2 * (8192 * (3 * 31 + 1) + 126976 * 6 + 1280 * 5) * 9216
    assert joined.gemm_bytes["dlogits_again"] == 0
    assert joined.gemm_bytes["d_weight"] == 2 * s * 8192 * 4096 + 2 * 128256 * 4096
    assert joined.traffic == 8 * (s - 1) * 8192 * 4096
    assert joined.flops | {"dlogits_again": counts.flops["dlogits_again"]} == count_streaming(A, BF16).flops
    single = count_streaming(A, FP32)
    m = math.ceil(8192 / single.plan.tokens)
    assert single.gemm_bytes["d_weight"] == 4 * 8192 * 4096 + 4 * 128256 * 4096
    assert single.traffic == 8 * (m - 1) * 128256 * 4096


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
@pytest.mark.parametrize("teacher", [True, False])
def test_streaming_plan_is_the_one_that_runs(teacher, monkeypatch):
    pytest.importorskip("triton")
    from fused_kd.engines.streaming import engine as streaming
    from fused_kd.engines.streaming.kernels import FIELDS as kernels

    assert kernels.value == FIELDS
    seen, plan = [], streaming.plan_streaming
    monkeypatch.setattr(streaming, "plan_streaming", lambda *a: seen.append(plan(*a)) or seen[-1])
    shape = WIDE._replace(N=20)
    inputs = make_inputs(shape, CPU, FP32)
    student = fk.LMHead(inputs.hidden_s, inputs.weight_s)
    objective = fk.SelfEvolution() if teacher else fk.SFT()
    target = fk.LMHead(inputs.hidden_t, inputs.weight_t) if teacher else None
    fk.kd_loss(student, target, inputs.labels, objective, engine="streaming").loss.sum()
    assert count_streaming(shape, FP32, teacher=teacher).plan == seen[0]


def test_infinite_bandwidth_leaves_the_floor():
    for on_host, dtype in ((True, FP32), (True, BF16), (False, BF16)):
        for options in ({}, {"hard": 1.0}, {"top_k": True}, {"teacher": False}, {"valid": 0.3}, {"chunk": 7}):
            found = predict(WIDE, dtype, free_memory(), on_host=on_host, **options)
            n, H = (90 if "valid" in options else 300), (34 if options.keys() & {"top_k", "teacher"} == set() else 24)
            assert found.ratio == pytest.approx(1.0, abs=1e-12)
            assert found.seconds == pytest.approx(2 * n * 150 * H / 10)
    assert predict(A, BF16, free_memory(), on_host=False, engine="streaming").ratio == pytest.approx(
        (3 * 9216 + 2 * 4096) / (3 * 4096 + 5120)
    )


@pytest.mark.parametrize("engine", ["chunked", "streaming"])
@pytest.mark.parametrize("size", ["N", "H_s", "H_t", "V"])
def test_more_work_takes_longer(engine, size):
    for moved in (H200, free_memory(gemm_flops_per_s=790e12), {**H200, "copy_bytes_per_s": 1e10}):
        sizes = [A._replace(**{size: getattr(A, size) * k}) for k in (1, 2, 3)]
        seconds = [predict(s, BF16, moved, on_host=False, engine=engine).seconds for s in sizes]
        assert seconds[0] < seconds[1] < seconds[2]


def test_what_costs_and_what_spares():
    easy = predict(A, BF16, H200, on_host=False)
    hard = predict(A, BF16, H200, on_host=False, hard=1.0)
    assert hard.parts["row"] / easy.parts["row"] == pytest.approx((3 * 8 + 2) / (2 * 8 + 2))
    assert {**hard.parts, "row": 0} == {**easy.parts, "row": 0}
    assert predict(A, BF16, H200, on_host=False, valid=0.5).seconds < 0.6 * easy.seconds
    listed = predict(A, BF16, H200, on_host=False, top_k=True)
    alone = predict(A, BF16, H200, on_host=False, teacher=False)
    assert listed.seconds == alone.seconds < easy.seconds and "teacher_logits" not in listed.parts
    per_token = 64 * (64 + 2)
    assert listed.workspace_bytes - alone.workspace_bytes == 1024 * per_token
    slower = predict(A, BF16, {**H200, "copy_bytes_per_s": 2e12}, on_host=False)
    assert slower.seconds > easy.seconds
    assert slower.floor_seconds == easy.floor_seconds


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", ["fused_kd", "fused_kd top-k 64"])
def test_memory_is_the_planners(name, dtype):
    inputs = IMPLEMENTATIONS[name].prepare(make_inputs(WIDE, CPU, dtype))
    found = predict(WIDE, dtype, UNIT, on_host=True, top_k=inputs.top_k is not None)
    assert (found.chunk, found.workspace_bytes, found.group) == planned(inputs)[:3]


def test_budget_is_kept():
    whole = predict(WIDE, FP32, UNIT, on_host=True)
    tight = predict(WIDE, FP32, UNIT, on_host=True, memory_budget=whole.workspace_bytes // 2)
    assert whole.workspace_bytes // 4 < tight.workspace_bytes <= whole.workspace_bytes // 2
    assert predict(WIDE, FP32, UNIT, on_host=True, chunk=10**9, memory_budget=tight.workspace_bytes) == tight
    with pytest.raises(ValueError, match=r"memory_budget must be at least 1\d{3} bytes .* got 1000"):
        predict(WIDE, FP32, UNIT, on_host=True, memory_budget=1000)
    streaming = [
        predict(A, BF16, FURTHER, on_host=False, engine="streaming", memory_budget=budget)
        for budget in (None, 2 * 10**7)
    ]
    assert streaming[1].workspace_bytes <= 2e7 < streaming[0].workspace_bytes
    assert streaming[1].seconds > streaming[0].seconds


@pytest.mark.parametrize("budget", [None, 60_000])
@pytest.mark.parametrize("within", [0.0, 0.05])
@pytest.mark.parametrize("bandwidth", [5.0, 40.0, math.inf])
def test_best_chunk_by_brute_force(budget, within, bandwidth):
    shape, numbers = WIDE._replace(N=77), free_memory(copy_bytes_per_s=bandwidth)
    options = {"on_host": True, "memory_budget": budget}
    tried = [predict(shape, FP32, numbers, chunk=chunk, **options) for chunk in range(1, 78)]
    least = min(p.seconds for p in tried)
    chunk = min(p.chunk for p in tried if p.seconds <= (1 + within) * least)
    found = best_chunk(shape, FP32, numbers, within=within, **options)
    assert found.chunk == found.prediction.chunk == chunk
    assert found.planned == predict(shape, FP32, numbers, **options)
    assert found.slower == pytest.approx(found.planned.seconds / least - 1)
    if bandwidth == math.inf:
        assert (found.chunk, found.slower) == (1, 0.0)
    elif within == 0 and budget is None:
        assert found.chunk == 77


COUNTS = {  # by hand: SMALL in chunks of 4
    "chunk": 4,
    "flops": {"student_logits": 280, "teacher_logits": 420, "d_hidden": 280, "d_weight": 280},
    "gemm_bytes": {"student_logits": 528, "teacher_logits": 652, "d_hidden": 528, "d_weight": 640},
    "row_specials": 140, "row_bytes_once": 840, "row_bytes_swept": 1400, "workspace_bytes": 448,
}  # fmt: skip


def measured_row(**changes) -> dict:
    return {
        "shape": SMALL._asdict(), "implementation": "fused_kd", "tokens": "easy", "valid": 1.0, "teacher": "near",
        "chunk": 4, "device": "cpu", "dtype": "float32", "status": "ok", "hard_fraction": 0.0, "top_k": False,
        "seconds": {"floor": [100.0, 400.0, 300.0], "step": [500.0, 900.0, 1000.0]}, "counts": COUNTS,
        "memory": {"over_inputs_and_gradients": 400}, **changes,
    }  # fmt: skip


def test_compare_by_hand():
    found = compare(measured_row(), UNIT)
    parts = found.pop("parts")
    logits = 528 / 5 + 652 / 5 + 528 / 5 + (640 - 4 * 4 * 14) / 5
    seconds = logits + 4 * 4 * 14 / 5 + 840 / 5
    floor = (4 * (20 + 14 + 70) * 3 + 4 * (30 + 21 + 70)) / 5
    assert found == pytest.approx(
        {
            "chunk": 4, "group": 4,
            "predicted_seconds": seconds, "measured_seconds": 900.0, "seconds_error": seconds / 900 - 1,
            "predicted_floor_seconds": floor, "measured_floor_seconds": 300.0, "floor_seconds_error": floor / 300 - 1,
            "predicted_ratio": seconds / floor, "measured_ratio": 3.0, "ratio_error": seconds / floor / 3 - 1,
            "predicted_memory": 448, "measured_memory": 400, "memory_error": 0.12,
        }
    )  # fmt: skip
    assert sum(parts.values()) == pytest.approx(seconds)
    # The counts of the row are what is used.
    more = {**COUNTS, "row_bytes_once": 1840, "workspace_bytes": 800}
    other = compare(measured_row(counts=more), UNIT)
    assert other["predicted_seconds"] == pytest.approx(seconds + 200)
    assert other["memory_error"] == 1.0


@pytest.mark.parametrize("numbers", [H200, FURTHER], ids=["two", "further"])
@pytest.mark.parametrize("grouped", [True, False])
def test_compare_is_what_predict_says(numbers, grouped):
    """Of the plan that the row holds, whatever plans would be made here."""
    options = {"on_host": False, "hard": 0.5, "valid": 0.5}
    half = A._replace(N=4096)
    for name, backend in (("fused_kd", None), ("fused_kd cuda", "cuda")):
        with tuned(device_chunk=1024 if grouped else 0):
            said = predict(A, BF16, numbers, backend=backend, **options)
        plan = Plan(said.chunk, said.workspace_bytes, said.group)
        counts = count_chunked(half, BF16, plan, hard=0.5, recomputes=True)._asdict()
        row = {"shape": A._asdict(), "implementation": name, "dtype": "bfloat16", "device": "cuda", "counts": counts}
        found = compare(measured_row(**row, hard_fraction=0.5, valid=0.5), numbers)
        assert found["predicted_seconds"] == pytest.approx(said.seconds)
        assert (found["chunk"], found["group"]) == ((1024, 4096) if grouped else (2048, 2048))
        assert found["predicted_floor_seconds"] == pytest.approx(said.floor_seconds)
    row |= {"implementation": "fused_kd streaming", "counts": {"flops": {"student_logits": 1, "teacher_logits": 1}}}
    found = compare(measured_row(**row, hard_fraction=0.5, valid=0.5), numbers)
    assert found["parts"] == predict(A, BF16, numbers, engine="streaming", **options).parts
    assert best_for(measured_row(**row), numbers, 0.03) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"implementation": "eager"},
        {"implementation": "row: triton"},
        {"status": "out of memory"},
        {"seconds": {"floor": [1.0]}},
        {"seconds": None},
        {"counts": {"flops": {"student_logits": 1}}},
        {"implementation": "fused_kd streaming"},  # Triton's interpreter on a CPU
    ],
)
def test_nothing_to_compare(changes):
    assert compare(measured_row(**changes), UNIT) is None
    without = measured_row(**changes)
    del without["counts"]
    assert compare(without, UNIT) is None
    assert best_for(without, UNIT, 0.0) is None


def test_what_was_not_measured_has_no_error():
    found = compare(measured_row(memory=None, seconds={"step": [900.0]}), UNIT)
    assert found["seconds_error"] is not None
    assert {found[name] for name in ("memory_error", "measured_memory", "ratio_error", "floor_seconds_error")} == {None}


def test_table_beside_the_measurements():
    data = {"machine": UNIT, "rows": [measured_row(), measured_row(implementation="eager")]}
    text = model.markdown(data)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 3
    seconds = (528 + 652 + 528 + 640 + 840) / 5
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[:6] == ["small: 10, 2, 3, 7", "easy, chunk 4", "fused_kd", "6.376e+05", "9e+05", "-29.2 %"]
    assert seconds == 637.6 and cells[8] == "-38.6 %" and cells[11] == "+12.0 %"
    best = best_chunk(SMALL, FP32, UNIT, within=0.03, on_host=True)
    assert cells[-2:] == [str(best.chunk), "+0.0 %"]  # all ten tokens at once, as planned
    assert model.markdown({"rows": data["rows"]}) == model.markdown({**data, "rows": []}) == ""


def test_errors_of_results_files(tmp_path):
    assert model.markdown_errors(tmp_path).startswith("Nothing was measured")
    half = 637.6 / 1200 - 1
    rows = [measured_row(), measured_row(seconds={"step": [1200.0]}), measured_row(implementation="eager")]
    for name, device in (("one", "cpu"), ("two", "cuda"), ("three", None)):
        folder = tmp_path / name
        folder.mkdir()
        machine = {} if device is None else {"machine": UNIT}
        (folder / "x.json").write_text(json.dumps({**machine, "rows": rows, "settings": {"device": device}}))
    environment = {"stage": "environment", "key": "environment", "code": "a"}
    steps = [{"stage": "steps:A", "key": str(i), "code": "a"} | row for i, row in enumerate(rows)]
    found = [environment, {"stage": "machine", "key": "numbers", "code": "a", "machine": UNIT}, *steps]
    (tmp_path / "one" / "gpu.jsonl").write_text("\n".join(map(json.dumps, found)))
    text = model.markdown_errors(tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + 3  # nothing is known of the third's machine
    ends = f"-38.0 % ({100 * half:+.1f} % to -29.2 %) | -38.6 % (-38.6 % to -38.6 %) | +12.0 % (+12.0 % to +12.0 %) |"
    assert lines[2:4] == [f"| one/gpu.jsonl | cuda | 2 | {ends}", f"| one/x.json | cpu | 2 | {ends}"]


BAD = [
    ({"valid": 0.0}, r"valid must be in \(0, 1\].*10 tokens, got 0.0"),
    ({"valid": 0.01}, r"valid must .*leave one of 10 tokens, got 0.01"),
    ({"hard": 1.5}, r"hard must be in \[0, 1\], got 1.5"),
    ({"hard": math.nan}, r"hard must be in \[0, 1\], got nan"),
    ({"chunk": 0}, "chunk must be None or at least 1, got 0"),
    ({"memory_budget": 0}, "memory_budget must be None or at least 1 byte, got 0"),
    ({"engine": "fast"}, "engine must be one of 'chunked', 'streaming', got 'fast'"),
    ({"backend": "c"}, "backend must be None or one of .*'triton'.*, got 'c'"),
    ({"engine": "streaming"}, "engine='streaming' needs a GPU, .*on_host=True"),
    ({"engine": "streaming", "on_host": False, "top_k": True}, "engine='streaming' needs .*top_k=True"),
]


@pytest.mark.parametrize("options, message", BAD)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        predict(SMALL, FP32, UNIT, **{"on_host": True, **options})


def test_bad_inputs():
    with pytest.raises(ValueError, match="V must be at least 1, got 0"):
        predict(SMALL._replace(V=0), FP32, UNIT, on_host=True)
    with pytest.raises(ValueError, match=r"dtype must be one of torch.float32, .*, got torch.int64"):
        predict(SMALL, torch.int64, UNIT, on_host=True)
    for numbers in ({"gemm_flops_per_s": 1.0}, {**UNIT, "copy_bytes_per_s": 0.0}, {**UNIT, "copy_bytes_per_s": -1.0}):
        with pytest.raises(ValueError, match=r"machine\['copy_bytes_per_s'\] must be above 0, got"):
            predict(SMALL, FP32, numbers, on_host=True)
    with pytest.raises(ValueError, match="within must be at least 0, got -1"):
        best_chunk(SMALL, FP32, UNIT, within=-1, on_host=True)
    with pytest.raises(ValueError, match="leave out engine and chunk"):
        best_chunk(SMALL, FP32, UNIT, chunk=3, on_host=True)


SIZES = ["8192", "4096", "5120", "128256"]
RATES = ["--gemm-tflops", "790", "--bandwidth-gb", "4300"]


def test_command_line(capsys):
    assert model.main([]) == 0
    assert capsys.readouterr().out.strip() == f"{model.markdown_expected()}\n\n{model.markdown_errors()}"
    assert model.main([*SIZES, *RATES, "--hard", "1"]) == 0
    found = predict(A, BF16, H200, on_host=False, hard=1.0)
    text = capsys.readouterr().out
    assert text.startswith("predicted, not measured\n")
    assert f"{1e3 * found.seconds:.3f} ms   {found.ratio:.3f} of the floor, 46.304 ms" in text
    assert "3.504 GB   1024 tokens a chunk, 8192 a group\n" in text and "the planner's plan is 0.0 % slower" in text
    further = ["--multiprocessors", "132", "--clock-ghz", "1.83", "--backend", "cuda"]
    assert model.main([*SIZES, *RATES, "--hard", "1", *further]) == 0
    found = predict(A, BF16, FURTHER, on_host=False, hard=1.0, backend="cuda")
    assert f"{1e3 * found.seconds:.3f} ms   {found.ratio:.3f} of the floor" in capsys.readouterr().out
    assert model.main([*SIZES, *RATES, "--memory-budget-gb", "3", "--valid", "0.5"]) == 0
    capped = predict(A, BF16, H200, on_host=False, valid=0.5, memory_budget=3 * 10**9)
    assert f"{capped.workspace_bytes / 1e9:.3f} GB   {capped.chunk} tokens a chunk" in capsys.readouterr().out
    assert model.main([*SIZES, *RATES, "--engine", "streaming"]) == 0
    text = capsys.readouterr().out
    assert "dlogits_again" in text and "fastest" not in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["1", "2", "3"], "sizes must be the four integers N H_s H_t V, got 3"),
        (["0", "2", "3", "4", *RATES], "argument N H_s H_t V: must be an integer of at least 1, got '0'"),
        (["1.5", "2", "3", "4", *RATES], "must be an integer of at least 1, got '1.5'"),
        (SIZES, "--gemm-tflops must be a number above 0, got none"),
        ([*SIZES, *RATES[:2]], "--bandwidth-gb must be a number above 0, got none"),
        ([*SIZES, "--gemm-tflops", "0"], "argument --gemm-tflops: must be a number above 0, got '0'"),
        ([*SIZES, *RATES, "--hard", "2"], "argument --hard: must be in [0, 1], got '2'"),
        ([*SIZES, *RATES, "--valid", "0"], "argument --valid: must be in (0, 1], got '0'"),
        ([*SIZES, *RATES, "--valid", "nan"], "argument --valid: must be in (0, 1], got 'nan'"),
        ([*SIZES, *RATES, "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        ([*SIZES, *RATES, "--memory-budget-gb", "0.1"], "memory_budget must be at least 2136265232 bytes"),
        ([*SIZES, *RATES, "--multiprocessors", "0"], "argument --multiprocessors: must be an integer of at least 1"),
        (["--hard", "0.5"], "sizes must be the four integers N H_s H_t V where options are given, got none"),
    ],
)
def test_command_line_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        model.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_machine_is_work_over_the_median_second(dtype, monkeypatch):
    """The seconds are made up, the work is what the calls do."""
    made_up = iter([9.0, 1.0, 4.0, 2.0])  # the first is the warm-up's
    seen = {}

    def interleaved(calls, rounds, before):
        seen.update(calls)
        s = next(made_up)
        return {name: [s * k] for name, k in zip(calls, (1, 3), strict=True)}

    for name, value in {
        "interleaved": interleaved,
        "SECONDS": 0.0,
        "CPU_GEMM": (3, 5, 7),
        "CPU_COPY_BYTES": 64,
    }.items():
        monkeypatch.setattr(machine, name, value)
    found = measure_machine(CPU, dtype)
    assert found == {"gemm_flops_per_s": 2 * 3 * 5 * 7 / 2.0, "copy_bytes_per_s": 2 * 64 / 6.0}
    assert measured_flops(seen["gemm_flops_per_s"]) == 2 * 3 * 5 * 7


def test_machine_measures(monkeypatch, capsys):
    for name, value in {"SECONDS": 0.0, "CPU_GEMM": (64, 64, 512), "CPU_COPY_BYTES": 1 << 20}.items():
        monkeypatch.setattr(machine, name, value)
    found = measure_machine("cpu", FP32)
    assert found.keys() == UNIT.keys()
    assert 1e6 < found["gemm_flops_per_s"] < 1e14 and 1e6 < found["copy_bytes_per_s"] < 1e14
    assert machine.main(["--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("--gemm-tflops ")
    with pytest.raises(ValueError, match="device must be a CPU or CUDA device, got meta"):
        measure_machine("meta", FP32)
    with pytest.raises(ValueError, match=r"dtype must be torch.float32, .*, got torch.int8"):
        measure_machine("cpu", torch.int8)
