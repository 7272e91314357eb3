"""The benchmarks at tiny shapes: files, tables, adapters, deadlines; their numbers mean nothing here."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import cpu, gpu, report  # noqa: E402
from bench.accuracy import relative_errors  # noqa: E402
from bench.floor import Floor  # noqa: E402
from bench.implementations import IMPLEMENTATIONS, preferred_chunk  # noqa: E402
from bench.inputs import IGNORE, make_inputs  # noqa: E402
from bench.measure import interleaved, peak_memory  # noqa: E402
from bench.runner import Deadline, run_case, run_cases  # noqa: E402
from bench.shapes import CPU_SHAPES, GPU_SHAPES, QUICK_SHAPES, TOKENS, Shape  # noqa: E402
from bench.store import Store, row_key  # noqa: E402
from bench.worker import Case, rows  # noqa: E402

CPU = torch.device("cpu")
SMALL = Shape("small", 12, 8, 10, 37)
WIDE = Shape("wide", 12, 8, 10, 150)
HEADER = {
    "suite": "cpu",
    "source": {"digest": "0", "commit": None, "dirty": None},
    "settings": {"dtype": "float32", "rounds": 1, "device": "cpu"},
    "hardware": {"cpu": "x", "usable_cores": 1, "threads": 1},
    "versions": {},
}


def case(implementation: str, **changes) -> Case:
    base = Case(SMALL, implementation, (("mixed", None),), "cpu", "float32", rounds=2, warmup=1, error_tokens=8)
    return replace(base, **changes)


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    """The folder of one ``python -m bench.cpu --quick``."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "bench.cpu", "--quick", "--output", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def test_quick_cpu_writes_a_row_per_case(quick):
    data = json.loads((quick / "cpu-quick.json").read_text())
    assert {"schema", "suite", "hardware", "versions", "source", "settings", "written", "rows"} <= data.keys()
    assert data["hardware"]["cpu"] and data["versions"]["torch"] and len(data["source"]["digest"]) == 16
    assert {row_key(r) for r in data["rows"]} == {
        ("tiny", name, tokens, None) for name in cpu.DEFAULT for tokens in TOKENS
    }
    for row in data["rows"]:
        if row["implementation"] == "torch.compile" and row["status"] != "ok":
            assert row["reason"]  # no compiler here
            continue
        assert row["status"] == "ok", row
        assert {len(s) for s in row["seconds"].values()} == {7}
        assert ("half_ignored" in row["seconds"]) == row["implementation"].startswith("fused_kd")
        assert row.get("measured_flops") in (sum(row["counts"]["flops"].values()), None)
        assert ("measured_flops" in row) == (row["implementation"] != "torch.compile")
        assert all(x > 0 for samples in row["seconds"].values() for x in samples)
        assert all(float(row["error"][k]) < 1e-5 for k in ("loss", "d_hidden", "d_weight"))
        if "memory" in row:
            m = row["memory"]
            assert (
                m["over_inputs"]
                == m["over_inputs_and_gradients"] + m["gradients"]
                == m["peak"] - m["baseline"] + m["gradients"]
            )
            assert m["gradients"] == 4 * (96 * 32 + 1000 * 32)
    hard = {row["tokens"]: row["hard_fraction"] for row in data["rows"]}
    assert hard["easy"] == 0 and hard["hard"] == 1 and 0.4 < hard["mixed"] < 0.6
    assert [float(r["gamma"]) for r in data["rows"] if r["tokens"] == "easy"] == [math.inf] * 5


def test_report_needs_nothing_but_the_json(quick, tmp_path):
    copy = tmp_path / "results.json"
    copy.write_text((quick / "cpu-quick.json").read_text())
    text = report.write_report(copy)
    assert text == (tmp_path / "results.md").read_text() == (quick / "cpu-quick.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("| tiny: 96, 32, 48, 1000 |")]
    assert len(table) == 9 + 15 + 15
    parts = table[:9], table[9:24], table[24:]
    assert all(len({line.count("|") for line in part}) == 1 for part in parts)
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "## Targets", "## Forward + backward", "## Work, counted beside measured", "## How it was measured",
    ]  # fmt: skip
    pytest.importorskip("matplotlib")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert (quick / "cpu-quick.png").exists()


def test_second_run_measures_nothing_again(quick, monkeypatch):
    before = json.loads((quick / "cpu-quick.json").read_text())
    store = Store(quick / "cpu-quick.json", before)
    done = [r for r in before["rows"] if r["status"] == "ok"]
    assert all(store.finished(row_key(r)) for r in done)
    monkeypatch.setattr("bench.runner.subprocess.Popen", lambda *a, **k: pytest.fail("a finished case was started"))
    cases = [case("fused_kd", shape=QUICK_SHAPES[0], variants=tuple((t, None) for t in TOKENS))]
    run_cases(cases, store, Deadline(None), 1.0, lambda what: None)
    assert store.data["rows"] == before["rows"]


def test_judgement_and_numbers_of_the_table():
    def row(name: str, seconds: dict, memory: int) -> dict:
        return case(name).row(
            "mixed", None, status="ok", seconds=seconds, interleaved=True,
            memory={"over_inputs_and_gradients": memory, "over_inputs": memory + 10**9},
            error={"loss": 1e-7, "d_hidden": 2e-7, "d_weight": 3e-7, "tokens": 8},
        )  # fmt: skip

    data = {
        **HEADER,
        "written": "now",
        "rows": [
            row(
                "fused_kd",
                {"floor": [1.0, 2.0, 4.0], "step": [1.1, 2.4, 4.4], "half_ignored": [0.77] * 3},
                10**9,
            ),
            row("torch.compile", {"floor": [1.0, 2.0, 4.0], "step": [1.3, 2.6, 4.4]}, 3 * 10**9),
            case("eager").row("mixed", None, status="out of memory", reason="OutOfMemoryError: much | too much"),
        ],
    }
    text = report.markdown(data)
    assert "| small: 12, 8, 10, 37 | mixed | fused_kd | 1.10 met |  | 0.85 met | 0.32 met | 0.33 met |" in text
    assert "| 1.10 (1.10-1.15) | 91 % | 2400 | 1.000 | 2.000 | 1.0e-07 | 2.0e-07 | 3.0e-07 |" in text
    assert "out of memory: OutOfMemoryError: much \\| too much" in text
    data["rows"][0]["seconds"]["step"] = [1.3, 2.6, 5.2]
    assert "1.30 not met |  | 1.00 not met" in report.markdown(data)
    data["rows"][0]["seconds"]["step"][0] = 1.0
    data["rows"][0]["interleaved"] = False
    assert "1.30 (0.90-1.95)" in report.markdown(data)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    "name", ["fused_kd", "fused_kd torch", "eager", "fused_kd top-k 64", "fused_kd top-k 64 bucket"]
)
def test_adapters_agree_with_float64(name, tokens):
    implementation = IMPLEMENTATIONS[name]
    inputs = implementation.prepare(make_inputs(WIDE, CPU, torch.float32))
    gamma = inputs.gamma(tokens)
    loss = implementation.build(inputs, gamma)(inputs.labels)
    loss.backward()

    def errors(d_hidden, d_weight):
        return relative_errors(
            inputs, lambda z, teacher, y: implementation.truth(z, teacher, y, gamma), loss, d_hidden, d_weight
        )

    found = errors(inputs.hidden_s.grad, inputs.weight_s.grad)
    assert all(found[k] < 2e-6 for k in ("loss", "d_hidden", "d_weight")), found
    wrong = errors(torch.zeros_like(inputs.hidden_s), -inputs.weight_s.grad)
    assert wrong["d_hidden"] == pytest.approx(1) and wrong["d_weight"] == pytest.approx(2, rel=1e-4)


def test_eager_and_fused_agree_with_half_of_the_tokens_ignored():
    inputs = make_inputs(SMALL, CPU, torch.float32)
    labels = inputs.half_ignored()
    assert int((labels == IGNORE).sum()) == 6
    gamma = inputs.gamma("mixed")
    losses = [IMPLEMENTATIONS[name].build(inputs, gamma)(labels).item() for name in ("eager", "fused_kd")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    full = IMPLEMENTATIONS["eager"].build(inputs, gamma)(inputs.labels).item()
    assert losses[0] != pytest.approx(full, rel=1e-3)


@pytest.mark.parametrize("name", ["liger chunked jsd", "trl chunked jsd", "trl chunked kl"])
def test_peers_compute_what_is_said(name):
    if reason := IMPLEMENTATIONS[name].missing("cpu"):
        pytest.skip(reason)
    (row,) = rows(case(name, shape=QUICK_SHAPES[0]))
    assert row["status"] == "ok", row
    assert max(row["error"][k] for k in ("loss", "d_hidden", "d_weight")) < 1e-5


def test_inputs_are_the_same_in_every_process_and_differ_by_seed():
    a, b, c = (make_inputs(SMALL, CPU, torch.float32, seed) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a[:6], b[:6], strict=True))
    assert not torch.equal(a.weight_s, c.weight_s)
    with pytest.raises(ValueError, match="tokens must be"):
        a.gamma("some")


def test_floor_is_the_four_products():
    inputs = make_inputs(SMALL, CPU, torch.float32)
    floor = Floor(inputs)
    floor()
    z_t = inputs.hidden_t @ inputs.weight_t.t()
    torch.testing.assert_close(floor.logits, z_t)
    torch.testing.assert_close(floor.d_hidden, z_t @ inputs.weight_s.detach())
    torch.testing.assert_close(floor.d_weight, z_t.t() @ inputs.hidden_s.detach())


def test_without_a_floor_the_step_is_still_measured():
    (row,) = rows(case("fused_kd torch", dtype="bfloat16"))  # fp32-out GEMMs are CUDA's
    assert row["status"] == "ok" and row["interleaved"] is False
    assert list(row["seconds"]) == ["step"] and len(row["seconds"]["step"]) == 2
    assert row["floor_status"] == "failed" and "dtype_out" in row["floor_reason"]
    assert 1e-5 < row["error"]["d_weight"] < 0.02
    assert "floor failed" in report.markdown({**HEADER, "written": "now", "rows": [row]})


def test_calls_take_turns():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}

    class Clock:
        def __call__(self, call):
            call()
            return float(len(order))

    samples = interleaved(calls, 3, Clock(), before=lambda: order.append("-"))
    assert "".join(order) == "-a-b" * 3
    assert samples == {"a": [2.0, 6.0, 10.0], "b": [4.0, 8.0, 12.0]}


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


def test_chunk_is_applied():
    from fused_kd.engine import chunked

    seen = []
    inputs = make_inputs(SMALL, CPU, torch.float32)
    step = IMPLEMENTATIONS["fused_kd"].build(inputs, 0.4)
    plan = chunked.plan_chunks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "plan_chunks", lambda *a, **k: seen.append(plan(*a, **k)) or seen[-1])
        with preferred_chunk(4):
            step(inputs.labels)
        step(inputs.labels)
    assert [p.chunk for p in seen] == [4, 12]


def test_store_keeps_rows_only_of_the_same_code(tmp_path):
    path = tmp_path / "r.json"
    Store(path, HEADER).add(case("eager").row("mixed", None, status="ok", gamma=math.inf))
    Store(path, HEADER).add(case("fused_kd").row("mixed", None, status="failed", reason="x"))
    again = Store(path, HEADER)
    assert [r["status"] for r in again.data["rows"]] == ["ok", "failed"] and again.data["rows"][0]["gamma"] == "inf"
    assert again.finished(case("eager").keys()[0]) and not again.finished(case("fused_kd").keys()[0])
    assert Store(path, HEADER, fresh=True).data["rows"] == []
    assert Store(path, {**HEADER, "source": {"digest": "1"}}).data["rows"] == []
    assert Store(path, {**HEADER, "settings": {}}).data["rows"] == []


def test_no_time_left_is_a_row_that_says_so(tmp_path):
    store = Store(tmp_path / "r.json", HEADER)
    run_cases([case("fused_kd"), case("liger fused jsd")], store, Deadline(0.0), 1.0, lambda what: None)
    assert [(r["status"], r["reason"]) for r in store.data["rows"]] == [
        ("skipped", "no time left in this run"),
        ("missing", "liger-kernel needs an NVIDIA GPU here"),
    ]


def test_late_and_broken_workers_are_rows_that_say_so(tmp_path):
    store = Store(tmp_path / "r.json", HEADER)
    run_case(case("fused_kd"), store, limit=0.3)
    assert store.data["rows"][0]["status"] == "skipped" and "stopped after" in store.data["rows"][0]["reason"]
    run_case(case("fused_kd", dtype="float12"), store, limit=120)
    (row,) = store.data["rows"]
    assert row["status"] == "failed" and "float12" in row["reason"]


@pytest.mark.skipif(sys.platform != "linux", reason="workers follow their parent on Linux only")
def test_no_worker_outlives_a_killed_run(tmp_path):
    psutil = pytest.importorskip("psutil")
    command = [sys.executable, "-m", "bench.cpu", "--quick", "--implementations", "eager", "--rounds", "1000000"]
    run = subprocess.Popen([*command, "--output", str(tmp_path)], cwd=ROOT, stderr=subprocess.DEVNULL)
    workers: list = []
    while not workers:
        assert run.poll() is None, "the run ended before its worker was seen"
        time.sleep(0.1)
        workers = [c for c in psutil.Process(run.pid).children() if "bench.worker" in c.cmdline()]
    run.kill()
    run.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def test_compile_without_a_compiler_is_a_row_that_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    store = Store(tmp_path / "r.json", HEADER)
    run_case(case("torch.compile"), store, limit=120)
    (row,) = store.data["rows"]
    assert row["status"] == "failed" and row["reason"], row
    assert "failed: " in report.markdown({**store.data, "written": "now"})


def test_gpu_plan_covers_the_suite():
    cases = gpu.plan(GPU_SHAPES, "cuda", "bfloat16", 10, quick=False)
    for shape in GPU_SHAPES:
        names = {c.implementation: c.variants for c in cases if c.shape == shape}
        assert {"fused_kd", "row: triton", "eager", "torch.compile", *gpu.PEERS} <= names.keys()
        assert {(t, None) for t in TOKENS} | {("mixed", c) for c in (1024, 2048, 4096)} == set(names["fused_kd"])
    assert [tuple(s) for s in GPU_SHAPES] == [("A", 8192, 4096, 5120, 128256), ("B", 8192, 896, 3584, 151936)]
    assert [s[1:] for s in CPU_SHAPES] == [(1024, 512, 1024, 32000), (512, 256, 512, 128256)]
    assert all(Case.from_json(c.to_json()) == c for c in cases)


def test_gpu_suite_on_the_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    try:
        arguments = ["--device", "cpu", "--skip-tests", "--output", str(tmp_path)]
        only = ["fused_kd", "row: torch", "liger fused jsd"]
        assert gpu.main([*arguments, "--only", *only]) == 0
    finally:
        torch.set_num_threads(threads)
    data = json.loads((tmp_path / "gpu-quick.json").read_text())
    status = {row_key(r)[1:]: r["status"] for r in data["rows"]}
    assert status == {
        **{("fused_kd", tokens, None): "ok" for tokens in TOKENS},
        **{("fused_kd", "mixed", chunk): "ok" for chunk in (16, 32, 64)},
        **{("row: torch", tokens, 16): "ok" for tokens in TOKENS},
        ("liger fused jsd", "mixed", None): "missing",
    }
    swept = {r["tokens"]: r["row_bytes_swept"] for r in data["rows"] if r["implementation"] == "row: torch"}
    assert (swept["easy"], swept["hard"]) == (20 * 16 * 1000, 28 * 16 * 1000)
    printed = capsys.readouterr().out
    assert "not run" in printed and "The row alone" in printed and "fused_kd, chunk 32" in printed
    assert (tmp_path / "gpu-quick.md").read_text().strip() in printed


def test_gpu_tests_are_counted(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.gpu\ndef test_good(): pass\n"
        "@pytest.mark.gpu\ndef test_bad(): assert 0\n"
        "@pytest.mark.gpu\ndef test_absent(): pytest.skip('no')\n"
        "def test_other(): assert 0\n"
    )
    monkeypatch.setattr("bench.runner.ROOT", tmp_path)
    from bench.runner import run_tests

    found = run_tests(limit=120)
    assert [found[k] for k in ("status", "passed", "failed", "errors", "skipped")] == ["failed", 1, 1, 0, 1]
    assert found["failing"] == ["tests.test_some::test_bad"]
    assert run_tests(limit=0.01)["reason"].startswith("stopped after")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_suite_without_a_gpu_says_so():
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == ["bench.gpu: no NVIDIA GPU is available to torch"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["fused_kd", "fused_kd torch", "eager"])
def test_worker_on_a_gpu(name):
    variants = tuple((tokens, None) for tokens in TOKENS)
    shape = Shape("small", 64, 32, 48, 1000)
    for row in rows(case(name, shape=shape, variants=variants, device="cuda", dtype="bfloat16", error_tokens=64)):
        assert row["status"] == "ok" and "error_status" not in row, row
        assert row["memory"]["over_inputs"] > 0 and min(row["seconds"]["step"] + row["seconds"]["floor"]) > 0
        assert max(row["error"][k] for k in ("d_hidden", "d_weight")) < (0.3 if name == "eager" else 0.02), row
