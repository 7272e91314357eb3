"""How a row is measured: time, memory, the floor, errors; the rows of a worker."""

from __future__ import annotations

import math

import pytest
import torch

from bench import measure
from bench.measure import Floor, RowProblem, interleaved, peak_memory
from bench.problems import EVERY, Shape, Variant, make_inputs
from bench.registry import IMPLEMENTATIONS
from bench.worker import Case, rows

from .helpers import CPU, FP32, WIDE, case


@pytest.fixture
def untrimmed(monkeypatch):
    """Without the garbage collections that only the numbers of memory need."""
    monkeypatch.setattr(measure, "_trim", lambda: None)


def test_calls_take_turns(monkeypatch):
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    monkeypatch.setattr(measure, "clock", lambda: float(len(order)) ** 2)
    samples = interleaved(calls, 3, before=lambda: order.append("-"))
    assert "".join(order) == "-a-b" * 3
    assert samples == {"a": [3.0, 11.0, 19.0], "b": [7.0, 15.0, 23.0]}


def test_a_gpu_is_timed_by_events_behind_a_sleep(monkeypatch):
    """In this order: all is done, the GPU sleeps, an event, the call, an event."""
    order = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")

        def synchronize(self) -> None:
            order.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("done"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    assert interleaved({"a": lambda: order.append("a")}, 1, lambda: order.append("before")) == {"a": [0.002]}
    assert order == ["before", "done", "sleep", "event", "a", "event", "wait"]


def test_peak_memory_counts_what_a_call_takes():
    held = [torch.ones(8 << 20)]  # 32 MiB of "gradients"

    def call():
        held.append(torch.ones(8 << 20))
        torch.ones(32 << 20)

    memory = peak_memory(call, held.clear, 32 << 20, CPU)
    if memory is None:
        pytest.skip("this system does not offer a resettable high-water mark")
    assert 120 << 20 < memory.over_inputs_and_gradients < 150 << 20
    assert memory.over_inputs == memory.over_inputs_and_gradients + (32 << 20)


def test_floor_is_the_four_products_or_the_students_three():
    inputs = make_inputs(WIDE, CPU, FP32)
    floor = Floor(inputs)
    floor()
    z_t = inputs.hidden_t @ inputs.weight_t.t()
    torch.testing.assert_close(floor.logits, z_t)
    torch.testing.assert_close(floor.d_hidden, z_t @ inputs.weight_s.detach())
    torch.testing.assert_close(floor.d_weight, z_t.t() @ inputs.hidden_s.detach())
    z = inputs.hidden_s.detach()[:5] @ inputs.weight_s.detach().t()
    lists = IMPLEMENTATIONS["fused_kd top-k 64"].prepare(inputs)
    for student in (Floor(inputs, teacher=False, tokens=5), Floor(lists, tokens=5)):
        student.forward()
        torch.testing.assert_close(student.logits, z)
        assert not student.d_weight.any()


def test_a_row_and_what_it_is_compared_with():
    problem = RowProblem(4, 100, CPU, FP32)
    problem.copy()
    problem.call("torch", "hard")()
    assert problem.outputs.is_hard.all() and problem.outputs.dlogits is not None
    problem.call("torch", "easy")()
    assert not problem.outputs.is_hard.any()
    assert (problem.copy_bytes, problem.least_bytes) == (8 * 400, 12 * 400)


@pytest.mark.parametrize("name", ["fused_kd", "fused_kd top-k 64 bucket", "eager sft"])
def test_the_numbers_of_a_row(name, untrimmed):
    variants = (*EVERY, Variant(valid=0.5))
    for variant, row in zip(variants, rows(case(name, variants=variants)), strict=True):
        assert row["status"] == "ok" and "work_status" not in row, row
        assert Variant.of(row) == variant and row["shape"] == WIDE._asdict()
        ours, plain = name.startswith("fused_kd"), variant == Variant()
        further = {"forward", "forward_floor"} if plain else set()
        further |= {"half_ignored"} if plain and ours else set()
        assert row["seconds"].keys() == {"floor", "step"} | further and row["interleaved"]
        assert all(len(samples) == 2 and min(samples) > 0 for samples in row["seconds"].values())
        error = row["error"]
        assert error["tokens"] == 8 and all(float(error[k]) < 1e-5 for k in ("loss", "d_hidden", "d_weight"))
        if "memory" in row:
            found = row["memory"]
            assert found["over_inputs"] == found["peak"] - found["baseline"] + found["gradients"]
            assert found["gradients"] == 4 * WIDE.H_s * (WIDE.N + WIDE.V)
        assert row["counts"]["flops"]["d_hidden"] == 2 * 12 * 150 * 8 * variant.valid
        assert row["gamma"] == {"easy": math.inf, "hard": 0.0}.get(variant.tokens, row["gamma"])
        assert row["hard_fraction"] == {"easy": 0.0, "hard": 1.0}.get(variant.tokens, 0.5)


def test_rounds_are_as_many_as_fit_but_three(monkeypatch, untrimmed):
    now = iter(range(10**6))
    monkeypatch.setattr(measure, "clock", lambda: float(next(now)))
    for seconds, rounds in ((0.0, 3), (12.0, 6), (1e9, 8)):  # floor and step take a second each
        (row,) = rows_of("eager", purpose="N", rounds=8, seconds=seconds)
        assert {name: len(samples) for name, samples in row["seconds"].items()} == {"floor": rounds, "step": rounds}


def rows_of(name: str, **changes) -> list[dict]:
    return list(rows(case(name, **changes)))


def test_without_a_floor_the_step_is_still_measured(untrimmed):
    (row,) = rows_of("fused_kd torch", dtype="float16")  # fp32-out GEMMs of fp16 are CUDA's
    assert row["status"] == "ok" and row["interleaved"] is False
    assert row["seconds"].keys() == {"step", "forward", "half_ignored"} and len(row["seconds"]["step"]) == 2
    assert row["floor_status"] == "failed" and "fp32 product" in row["floor_reason"]
    assert 1e-5 < row["error"]["d_weight"] < 0.02


def test_what_fails_is_a_row_that_says_why(monkeypatch):
    (row,) = rows_of("fused_kd", dtype="float12")
    assert row["status"] == "failed" and "float12" in row["reason"]

    def refuse(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("bench.worker.make_inputs", refuse)
    (row,) = rows_of("fused_kd")
    assert (row["status"], row["reason"]) == ("out of memory", "OutOfMemoryError: CUDA out of memory.")
    assert Case.from_json(case("eager").to_json()) == case("eager")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["fused_kd", "fused_kd torch", "eager"])
def test_worker_on_a_gpu(name):
    shape = Shape("small", 64, 32, 48, 1000)
    for row in rows(case(name, shape=shape, variants=EVERY, device="cuda", dtype="bfloat16", error_tokens=64)):
        assert row["status"] == "ok" and "error_status" not in row, row
        assert row["memory"]["over_inputs"] > 0 and min(row["seconds"]["step"] + row["seconds"]["floor"]) > 0
        assert max(row["error"][k] for k in ("d_hidden", "d_weight")) < (0.3 if name == "eager" else 0.02), row
