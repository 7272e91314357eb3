"""What the performance model knows of GPUs beside two numbers, and the tables of what it expects of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import machine, model
from bench.counts_streaming import choose_tiles, count_streaming
from bench.machine import assumed_machine
from bench.model import predict
from bench.multiprocessors import ISSUED, SPECIAL, RowCost, Sweep, row_seconds, waste

from .test_bench_model import BF16, FURTHER, H200, UNIT, A, B


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
    assert found.workspace_bytes == two.workspace_bytes


def test_slabs_with_multiprocessors_write_nothing_but_bf16():
    """62 slabs of 16 x 16 tiles in two waves each, and one of 1280 rows: 10 x 16 tiles, or 5 x 32, in two as well."""
    found = predict(A, BF16, FURTHER, on_host=False)
    waves = (62 * 2 + 2) * 132 * 128 * 256 / (128256 * 4096)
    assert found.parts["d_weight"] == pytest.approx(2 * 8192 * 128256 * 4096 / 790e12 * waves)
    assert found.parts["traffic"] == pytest.approx(2 * 128256 * 4096 / 4.3e12)
    assert found.floor_seconds > predict(A, BF16, H200, on_host=False).floor_seconds


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
    nV = 8192 * 128256
    rate = 132 * 128 * 1.83e9
    easy, hard = (predict(A, BF16, FURTHER, on_host=False, hard=h).parts["row"] for h in (0.0, 1.0))
    assert easy == pytest.approx((8 + 10) * nV / 4.3e12)
    assert hard == pytest.approx((8 + 8 + 10) * nV / 4.3e12)
    held = [predict(A, BF16, FURTHER, on_host=False, hard=h, backend="cuda").parts["row"] for h in (0.0, 1.0)]
    assert held[0] == pytest.approx(10 * nV / 4.3e12)
    assert held[1] == pytest.approx(10 * nV / 4.3e12 + 49.8 * nV / rate)
    # Rows whose instructions nobody counted: by their bytes.
    for options in ({"top_k": True}, {"teacher": False}, {"backend": "torch", "hard": 1.0}):
        found = [predict(A, BF16, numbers, on_host=False, **options).parts["row"] for numbers in (FURTHER, H200)]
        assert found[0] == found[1]


def test_streaming_is_bound_by_the_cache():
    """A tile of 64 x 128: 2 x 64 x 128 FLOPs for 2 x (64 + 128) bytes; with 128 x 128 ones fewer."""
    cached = {**H200, "l2_bytes_per_s": 5e12}
    found = predict(A, BF16, cached, on_host=False, engine="streaming", hard=0.5)
    work = 2 * 8192 * 128256 * (4096 + 5120)
    tiles = choose_tiles(BF16, BF16)
    for part, tile, share in (
        ("statistics", tiles.statistics, 1), ("sums", tiles.sums, 0.5), ("dlogits", tiles.gradient, 1),
    ):  # fmt: skip
        seconds = share * work * (tile.tokens + tile.columns) / (tile.tokens * tile.columns) / 5e12
        assert found.parts[part] == pytest.approx(seconds)
    assert found.parts["d_weight"] == predict(A, BF16, H200, on_host=False, engine="streaming").parts["d_weight"]
    waves = predict(A, BF16, FURTHER, on_host=False, engine="streaming").parts
    counts = count_streaming(A, BF16)
    assert waves["d_weight"] == pytest.approx(
        2 * 8192 * 128256 * 4096 / 790e12 * waste([(counts.plan.late_columns, 4096)], 132)
    )


def test_floors_are_the_designs():
    """Section 8: at N=8192 and 790 TFLOP/s, 46.3 ms at A and 19.8 ms at B."""
    for shape, floor in ((A, 46.3), (B, 19.8)):
        assert 1e3 * predict(shape, BF16, H200, on_host=False).floor_seconds == pytest.approx(floor, rel=0.01)


def test_expected_of_gpus():
    rows = {(row["gpu"], row["shape"], row["way"], row["tokens"]): row for row in model.expected()}
    assert len(rows) == (4 + 2 + 3) * 2 * 2  # the CUDA row on two of four GPUs, streaming on three
    for shape, (chunk, group) in ((A, (1024, 8192)), (B, (1024, 4096))):
        for gpu in ("H100 SXM", "H200"):
            for way in ("Triton row", "CUDA row"):
                easy, hard = (rows[gpu, str(shape), way, tokens] for tokens in ("easy", "hard"))
                assert easy["floor_ms"] + easy["row_ms"] < easy["total_ms"] < hard["total_ms"] < 1.5 * easy["floor_ms"]
                assert easy["ratio"] == pytest.approx(easy["total_ms"] / easy["floor_ms"])
                assert (easy["chunk"], easy["group"]) == (chunk, group)
            cuda, triton, streaming = (rows[gpu, str(shape), way, "hard"]["total_ms"] for way in sorted(model.WAYS))
            assert cuda < triton < streaming
        gpus = ("B200", "H200", "H100 SXM", "A100-80G SXM")
        order = [rows[gpu, str(shape), "Triton row", "easy"]["total_ms"] for gpu in gpus]
        assert order == sorted(order)
    assert rows["H200", str(A), "Triton row", "easy"]["workspace_gb"] == pytest.approx(3.50, abs=0.005)


def test_assumed_machines():
    assert assumed_machine("H200") == pytest.approx({**FURTHER, "l2_bytes_per_s": 0.6 * 5120 * 1.83e9})
    assert assumed_machine("A100-80G SXM")["gemm_flops_per_s"] == pytest.approx(312e12 * 790 / 989.4)
    assert assumed_machine("B200").keys() == UNIT.keys()
    # The clock is the one that the data sheet's FLOPs are stated at.
    for gpu, each in (("A100-80G SXM", 2048), ("H100 SXM", 4096), ("H200", 4096)):
        peak = machine.GPUS[gpu]
        assert peak.multiprocessors * peak.clock * each == pytest.approx(peak.flops, rel=1e-3)
    with pytest.raises(ValueError, match=r"gpu must be one of A100-80G SXM, .* got 'V100'"):
        assumed_machine("V100")


def test_expected_table_says_that_it_is_predicted():
    text = model.markdown_expected()
    assert text.startswith("**Predicted, not measured**")
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert [len(lines) for lines in tables] == [2 + 8]
    assert all(len({line.count("|") for line in lines}) == 1 for lines in tables)
    found = {row["way"]: row for row in model.expected() if row["gpu"] == "H200" and row["shape"] == str(A)}
    (line,) = (line for line in tables[0] if line.startswith(f"| H200 | {A} |"))
    assert f"{found['CUDA row']['total_ms']:.1f}" in line and line.endswith("| 3.50 | 1024 | 8192 |")
    assert all(gpu in text and peak.source in text for gpu, peak in machine.GPUS.items())
