"""The performance model: arithmetic by hand, limits, the planner's own plans, tables and the command line."""

from __future__ import annotations

import json
import math

import pytest

from bench import machine, model
from bench.counts import Plan, count_chunked, planned
from bench.machine import measure_machine
from bench.model import assumed_machine
from bench.prediction import ISSUED, SPECIAL, RowCost, Sweep, beside_model, predict, row_seconds, waste
from bench.problems import GPU_SHAPES, Shape, make_inputs
from bench.registry import IMPLEMENTATIONS
from fused_kd.tuning import tuned

from .helpers import BF16, CPU, FP32, measured_flops

A, B = GPU_SHAPES
SMALL = Shape("small", N=10, H_s=2, H_t=3, V=7)
WIDE = Shape("wide", N=300, H_s=8, H_t=10, V=150)
H200 = {"gemm_flops_per_s": 790e12, "copy_bytes_per_s": 4.3e12}
FURTHER = {**H200, "multiprocessors": 132, "clock_hz": 1.83e9}
UNIT = {"gemm_flops_per_s": 10.0, "copy_bytes_per_s": 5.0}
FREE = {"gemm_flops_per_s": 10.0, "copy_bytes_per_s": math.inf}


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
    assert found.gradient_bytes == 2 * (8192 + 128256) * 4096
    on_chip = predict(A, BF16, H200, on_host=False, hard=0.25, backend="cuda")
    assert on_chip.parts["row"] == pytest.approx((8 + 2) * nV / bandwidth)
    with tuned(device_chunk=0):
        before = predict(A, BF16, H200, on_host=False, hard=0.25)
    assert before.chunk == before.group == 2048
    assert before.parts["traffic"] == pytest.approx((3 * 8 + 6) * VH / bandwidth)  # three additions, rounded


def test_waves_of_tiles():
    assert waste([(128 * 11, 256 * 12)], 132) == 1.0
    assert waste([(2048, 896)], 132) == 132 * 128 * 256 / (2048 * 896)  # 64 tiles of 132
    assert waste([(151936, 896)], 132) == pytest.approx(32 * 132 * 128 * 256 / (151936 * 896))  # 594 x 7 upright
    assert waste([(1, 1), (128, 256)], 2) == 2 * 2 * 128 * 256 / (1 + 128 * 256)


def test_gemms_with_multiprocessors_by_hand():
    """fp32 results are written when tiles are done; at B dH has two groups of 32 x 4 tiles, dW 594 x 7 for each."""
    found, two = (predict(B, BF16, numbers, on_host=False) for numbers in (FURTHER, H200))
    nV, VH, tile = 8192 * 151936, 151936 * 896, 128 * 256 * 132
    logits = 8 * 36 * tile / nV  # a chunk: 8 x 594 tiles, exactly 36 waves
    assert found.parts == pytest.approx(
        {
            "student_logits": 2 * nV * 896 / 790e12 * logits + 4 * nV / 4.3e12,
            "teacher_logits": 2 * nV * 3584 / 790e12 * logits + 4 * nV / 4.3e12,
            "d_hidden": 2 * nV * 896 / 790e12 * tile / (4096 * 896) + 4 * 8192 * 896 / 4.3e12,
            "d_weight": 2 * nV * 896 / 790e12 * 32 * tile / VH + 4 * VH / 4.3e12,
            "traffic": 14 * VH / 4.3e12,
            "row": two.parts["row"],  # memory is what an easy row waits for
        }
    )
    slabs = predict(A, BF16, FURTHER, on_host=False)  # 62 of 16 x 16 tiles in two waves each, and one of 1280 rows
    assert slabs.parts["d_weight"] == pytest.approx(2 * 8192 * 4096 / 790e12 * (62 * 2 + 2) * tile / 4096)


COST = {"statistics": Sweep(10, 1), "sums": Sweep(30, 1), "hard": Sweep(20, 5), "easy": Sweep(8, 0)}


@pytest.mark.parametrize("hard", [0.0, 0.25, 1.0])
def test_row_takes_the_longest_of_bytes_and_instructions(hard):
    gradient = max((hard * 20 + (1 - hard) * 8) / ISSUED, hard * 5 / SPECIAL) / 6
    swept = row_seconds(RowCost(**COST, on_chip=False), 7, hard, 2, 40.0, 2, 3)
    assert swept == pytest.approx(7 * (8 / 40 + hard * 8 / 40 + max(10 / 40, gradient)))
    slow = row_seconds(RowCost(**COST, on_chip=False), 7, hard, 2, 1e9, 2, 3)
    assert slow == pytest.approx(7 * (10 / ISSUED / 6 + hard * 30 / ISSUED / 6 + gradient), rel=1e-3)
    # On chip nothing is read between the first sweep and the last.
    held = row_seconds(RowCost(**COST, on_chip=True), 7, hard, 2, 40.0, 2, 3)
    assert held == pytest.approx(7 * (10 / 40 + hard * 30 / ISSUED / 6))


def test_row_with_a_clock_by_hand():
    """At 1.83 GHz the sums' 45.8 instructions an element take 1.56 ms, their 8 bytes 1.95 at 4.3 TB/s."""
    nV, rate = 8192 * 128256, 132 * 128 * 1.83e9
    hard = predict(A, BF16, FURTHER, on_host=False, hard=1.0).parts["row"]
    assert hard == pytest.approx((8 + 8 + 10) * nV / 4.3e12)
    held = predict(A, BF16, FURTHER, on_host=False, hard=1.0, backend="cuda").parts["row"]
    assert held == pytest.approx(10 * nV / 4.3e12 + 49.8 * nV / rate)
    # Rows whose instructions nobody counted: by their bytes.
    for options in ({"top_k": True}, {"teacher": False}, {"backend": "torch", "hard": 1.0}):
        found = [predict(A, BF16, numbers, on_host=False, **options).parts["row"] for numbers in (FURTHER, H200)]
        assert found[0] == found[1]


def test_streaming_keeps_its_workspace():
    streaming = {"engine": "streaming", "on_host": False, "hard": 0.5}
    assert predict(A, BF16, H200, **streaming).workspace_bytes < 48e6  # what the engine's docstring promises
    assert predict(A, BF16, H200, **streaming, memory_budget=2 * 10**7).workspace_bytes <= 2e7


def test_infinite_bandwidth_leaves_the_floor():
    for on_host, dtype in ((True, FP32), (True, BF16), (False, BF16)):
        for options in ({}, {"hard": 1.0}, {"top_k": True}, {"teacher": False}, {"valid": 0.3}):
            found = predict(WIDE, dtype, FREE, on_host=on_host, **options)
            n, H = (90 if "valid" in options else 300), (24 if options.keys() & {"top_k", "teacher"} else 34)
            assert found.ratio == pytest.approx(1.0, abs=1e-12)
            assert found.seconds == pytest.approx(2 * n * 150 * H / 10)
    streaming = predict(A, BF16, FREE, on_host=False, engine="streaming")
    assert streaming.ratio == pytest.approx((3 * 9216 + 2 * 4096) / (3 * 4096 + 5120))


@pytest.mark.parametrize("name", ["fused_kd", "fused_kd top-k 64"])
def test_memory_is_the_planners_and_a_budget_is_kept(name):
    inputs = IMPLEMENTATIONS[name].prepare(make_inputs(WIDE, CPU, FP32))
    found = predict(WIDE, FP32, UNIT, on_host=True, top_k=inputs.top_k is not None)
    assert (found.chunk, found.workspace_bytes, found.group) == planned(inputs)[:3]
    half = found.workspace_bytes // 2
    assert predict(WIDE, FP32, UNIT, on_host=True, memory_budget=half).workspace_bytes <= half
    with pytest.raises(ValueError, match=r"memory_budget must be at least 1\d{3} bytes .* got 1000"):
        predict(WIDE, FP32, UNIT, on_host=True, memory_budget=1000)


COUNTS = {  # by hand: SMALL in chunks of 4
    "chunk": 4,
    "flops": {"student_logits": 280, "teacher_logits": 420, "d_hidden": 280, "d_weight": 280},
    "gemm_bytes": {"student_logits": 528, "teacher_logits": 652, "d_hidden": 528, "d_weight": 640},
    "row_specials": 140, "row_bytes_once": 840, "row_bytes_swept": 1400, "workspace_bytes": 448,
}  # fmt: skip


def measured_row(**changes) -> dict:
    return {
        "shape": SMALL._asdict(), "implementation": "fused_kd", "tokens": "easy", "valid": 1.0, "teacher": "near",
        "device": "cpu", "dtype": "float32", "status": "ok", "hard_fraction": 0.0, "counts": COUNTS,
        "seconds": {"floor": [100.0, 400.0, 300.0], "step": [500.0, 900.0, 1000.0]},
        "memory": {"over_inputs_and_gradients": 400}, **changes,
    }  # fmt: skip


def test_compare_by_hand():
    """Chunks of 4, 4 and 2 tokens; rate 10, bandwidth 5; the counts of the row are what is used."""
    # dW is read and written again by the second and third chunk.
    seconds = (528 + 652 + 528 + (640 - 4 * 4 * 14) + 4 * 4 * 14 + 840) / 5
    floor = (4 * (20 + 14 + 70) * 3 + 4 * (30 + 21 + 70)) / 5
    assert beside_model(measured_row(), UNIT) == pytest.approx(
        {
            "predicted_seconds": seconds, "seconds_error": seconds / 900 - 1,
            "predicted_ratio": seconds / floor, "ratio_error": seconds / floor / 3 - 1,
            "predicted_memory": 448, "memory_error": 0.12,
        }
    )  # fmt: skip
    other = beside_model(measured_row(counts={**COUNTS, "row_bytes_once": 1840, "workspace_bytes": 800}), UNIT)
    assert other["predicted_seconds"] == pytest.approx(seconds + 200) and other["memory_error"] == 1.0
    unknown = beside_model(measured_row(memory=None, seconds={"step": [900.0]}), UNIT)
    assert unknown["seconds_error"] is not None and unknown["memory_error"] is unknown["ratio_error"] is None


@pytest.mark.parametrize("numbers", [H200, FURTHER], ids=["two", "further"])
@pytest.mark.parametrize("grouped", [True, False])
def test_compare_is_what_predict_says(numbers, grouped):
    """Of the plan that the row holds, whatever plans would be made here."""
    options = {"on_host": False, "hard": 0.5, "valid": 0.5}
    for name, backend in (("fused_kd", None), ("fused_kd cuda", "cuda")):
        with tuned(device_chunk=1024 if grouped else 0):
            said = predict(A, BF16, numbers, backend=backend, **options)
        plan = Plan(said.chunk, said.workspace_bytes, said.group)
        counts = count_chunked(A._replace(N=4096), BF16, plan, hard=0.5, recomputes=True)._asdict()
        row = {"shape": A._asdict(), "implementation": name, "dtype": "bfloat16", "device": "cuda", "counts": counts}
        found = beside_model(measured_row(**row, hard_fraction=0.5, valid=0.5), numbers)
        assert found["predicted_seconds"] == pytest.approx(said.seconds)
        assert found["predicted_ratio"] == pytest.approx(said.ratio)
    row |= {"implementation": "fused_kd streaming", "counts": {"flops": {"student_logits": 1, "teacher_logits": 1}}}
    found = beside_model(measured_row(**row, hard_fraction=0.5, valid=0.5), numbers)
    assert found["predicted_seconds"] == predict(A, BF16, numbers, engine="streaming", **options).seconds


def test_nothing_to_compare():
    for changes in (
        {"implementation": "eager"},
        {"status": "out of memory"},
        {"seconds": {"floor": [1.0]}},
        {"seconds": None},
        {"counts": {"flops": {"student_logits": 1}}},
        {"implementation": "fused_kd streaming"},  # Triton's interpreter on a CPU
    ):
        assert beside_model(measured_row(**changes), UNIT) is None


def test_errors_of_results_files(tmp_path):
    assert model.markdown_errors(tmp_path).startswith("Nothing was measured")
    rows = [measured_row(), measured_row(seconds={"step": [1200.0]}), measured_row(implementation="eager")]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "x.json").write_text(json.dumps({"machine": UNIT, "rows": rows}))
    (tmp_path / "one" / "y.json").write_text(json.dumps({"rows": rows}))  # nothing is known of its machine
    environment = {"stage": "environment", "key": "environment", "code": "a"}
    steps = [{"stage": "steps:A", "key": str(i), "code": "a"} | row for i, row in enumerate(rows)]
    found = [environment, {"stage": "machine", "key": "numbers", "code": "a", "machine": UNIT}, *steps]
    (tmp_path / "one" / "gpu.jsonl").write_text("\n".join(map(json.dumps, found)))
    lines = [line for line in model.markdown_errors(tmp_path).splitlines() if line.startswith("| ")]
    half = f"{100 * (637.6 / 1200 - 1):+.1f} %"
    ends = f"2 | -38.0 % ({half} to -29.2 %) | -38.6 % (-38.6 % to -38.6 %) | +12.0 % (+12.0 % to +12.0 %) |"
    assert lines[2:] == [f"| one/gpu.jsonl | {ends}", f"| one/x.json | {ends}"]


def test_expected_of_gpus():
    assert assumed_machine("H200") == pytest.approx(FURTHER)
    assert assumed_machine("H100 SXM")["copy_bytes_per_s"] == pytest.approx(3.35e12 * 4.3 / 4.8)
    for gpu in model.GPUS.values():  # the clock is the one that the data sheet's FLOPs are stated at
        assert gpu.multiprocessors * gpu.clock * 4096 == pytest.approx(gpu.flops, rel=1e-3)
    for shape, plan in ((A, (1024, 8192)), (B, (1024, 4096))):
        found = model.expected("H200", shape)
        easy = found["Triton row", "easy"]
        assert easy.seconds < model.expected("H100 SXM", shape)["Triton row", "easy"].seconds
        assert (easy.chunk, easy.group) == plan
        cuda, triton, streaming = (found[way, "hard"].seconds for way in sorted(model.WAYS))
        assert easy.floor_seconds < easy.seconds < triton and cuda < triton < streaming
    text = model.markdown_expected()
    assert text.startswith("**Predicted, not measured**")
    (line,) = (line for line in text.splitlines() if line.startswith(f"| H200 | {A} |"))
    assert line.endswith("| 3.50 | 1024 | 8192 |")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"valid": 0.01}, r"valid must .*leave one of 10 tokens, got 0.01"),
        ({"hard": math.nan}, r"hard must be in \[0, 1\], got nan"),
        ({"memory_budget": 0}, "memory_budget must be None or at least 1 byte, got 0"),
        ({"engine": "fast"}, "engine must be one of 'chunked', 'streaming', got 'fast'"),
        ({"backend": "c"}, "backend must be None or one of .*'triton'.*, got 'c'"),
        ({"engine": "streaming"}, "engine='streaming' needs a GPU, .*on_host=True"),
        ({"shape": SMALL._replace(V=0)}, "V must be at least 1, got 0"),
        ({"machine": {"gemm_flops_per_s": 1.0}}, r"machine\['copy_bytes_per_s'\] must be above 0, got None"),
        ({"machine": {**UNIT, "clock_hz": 0}}, r"machine\['clock_hz'\] must be above 0, got 0"),
    ],
)
def test_bad_options(options, message):
    arguments = {"shape": SMALL, "dtype": FP32, "machine": UNIT, "on_host": True}
    with pytest.raises(ValueError, match=message):
        predict(**arguments | options)


SIZES = ["8192", "4096", "5120", "128256"]
RATES = ["--gemm-tflops", "790", "--bandwidth-gb", "4300"]


def test_command_line(capsys):
    further = ["--multiprocessors", "132", "--clock-ghz", "1.83", "--backend", "cuda"]
    for options, numbers, backend in (([], H200, None), (further, FURTHER, "cuda")):
        assert model.main([*SIZES, *RATES, "--hard", "1", *options]) == 0
        found = predict(A, BF16, numbers, on_host=False, hard=1.0, backend=backend)
        text = capsys.readouterr().out
        assert text.startswith("predicted, not measured\n")
        assert f"{1e3 * found.seconds:.3f} ms   {found.ratio:.3f} of the floor" in text
        assert "3.504 GB   1024 tokens a chunk, 8192 a group\n" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["1", "2", "3"], "sizes must be the four integers N H_s H_t V, got 3"),
        (SIZES, "--gemm-tflops and --bandwidth-gb must be given"),
        ([*SIZES, *RATES, "--memory-budget-gb", "0.1"], "memory_budget must be at least 2136265232 bytes"),
        (["--hard", "0.5"], "sizes must be the four integers N H_s H_t V where options are given, got none"),
    ],
)
def test_command_line_errors(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        model.main(arguments)
    assert message in capsys.readouterr().err


def test_machine_is_work_over_the_median_second(monkeypatch):
    """The seconds are made up, the work is what the calls do."""
    seen = {}

    def interleaved(calls, rounds, before):
        seen.update(calls)
        return {name: [k * s for s in (1.0, 4.0, 2.0)[:rounds]] for name, k in zip(calls, (1, 3), strict=True)}

    changes = {"interleaved": interleaved, "SECONDS": 0.0, "CPU_GEMM": (3, 5, 7), "CPU_COPY_BYTES": 64}
    for name, value in changes.items():
        monkeypatch.setattr(machine, name, value)
    found = measure_machine(CPU, BF16)
    assert found == {"gemm_flops_per_s": 2 * 3 * 5 * 7 / 2.0, "copy_bytes_per_s": 2 * 64 / 6.0}
    assert measured_flops(seen["gemm_flops_per_s"]) == 2 * 3 * 5 * 7
    assert machine.options(FURTHER, "bfloat16").endswith("--dtype bfloat16 --multiprocessors 132 --clock-ghz 1.83")
