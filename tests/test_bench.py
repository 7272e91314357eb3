"""The benchmarks at tiny shapes: files, tables, adapters, deadlines; their numbers mean nothing here."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import report  # noqa: E402
from bench import run as bench_run  # noqa: E402
from bench.floor import Floor  # noqa: E402
from bench.implementations import IMPLEMENTATIONS, preferred_chunk  # noqa: E402
from bench.inputs import IGNORE, make_inputs  # noqa: E402
from bench.measure import interleaved, peak_memory  # noqa: E402
from bench.plans import cpu_plan, quick_plan  # noqa: E402
from bench.runner import Deadline, batches, run_batch, run_cases  # noqa: E402
from bench.shapes import CPU_SHAPES, EVERY, FAR, GPU_SHAPES, QUICK_SHAPES, Shape, Variant  # noqa: E402
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
    base = Case(SMALL, implementation, (Variant(),), "cpu", "float32", rounds=2, warmup=1, error_tokens=8)
    return replace(base, **changes)


QUICK = ("fused_kd", "fused_kd top-k 64", "eager", "torch.compile")


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    """The folder of one ``python -m bench run --quick``, of some implementations."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "bench", "run", "--quick", "--only", *QUICK]
    done = subprocess.run([*command, "--output", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (folder / "cpu-quick.md").read_text().strip() in done.stdout
    return folder


def test_quick_run_writes_a_row_per_variant(quick):
    data = json.loads((quick / "cpu-quick.json").read_text())
    fields = {"schema", "suite", "hardware", "versions", "source", "settings", "machine", "written", "rows"}
    assert fields <= data.keys()
    assert data["hardware"]["cpu"] and data["versions"]["torch"] and len(data["source"]["digest"]) == 16
    planned = [c for c in quick_plan() if c.implementation in QUICK]
    assert {row_key(r) for r in data["rows"]} == {key for c in planned for key in c.row_keys()}
    for row in data["rows"]:
        if row["implementation"] == "torch.compile" and row["status"] != "ok":
            assert row["reason"]  # no compiler here
            continue
        assert row["status"] == "ok", row
        assert all(x > 0 for samples in row["seconds"].values() for x in samples)
        assert {len(s) for s in row["seconds"].values()} == {3}
        ours, plain = (
            row["implementation"].startswith("fused_kd"),
            Variant(*(row[f] for f in Variant._fields)) == Variant(),
        )
        assert ("half_ignored" in row["seconds"]) == (ours and plain and row["purpose"] == "table")
        assert ("forward" in row["seconds"]) == (plain and row["purpose"] == "table")
        assert row.get("measured_flops") in (sum(row["counts"]["flops"].values()), None)
        tallied = row["tokens"] == "mixed" and row["purpose"] == "table" and row["implementation"] != "torch.compile"
        assert ("measured_flops" in row) == tallied
        assert all(float(row["error"][k]) < 1e-5 for k in ("loss", "d_hidden", "d_weight"))
        if "memory" in row:
            m, s = row["memory"], row["shape"]
            assert (
                m["over_inputs"]
                == m["over_inputs_and_gradients"] + m["gradients"]
                == m["peak"] - m["baseline"] + m["gradients"]
            )
            assert m["gradients"] == 4 * s["H_s"] * (s["N"] + s["V"])
    table = [r for r in data["rows"] if r["purpose"] == "table" and r["implementation"] == "fused_kd"]
    hard = {row["tokens"]: row["hard_fraction"] for row in table if row["teacher"] == "near"}
    assert hard["easy"] == 0 and hard["hard"] == 1 and 0.4 < hard["mixed"] < 0.6
    assert [float(r["gamma"]) for r in table if r["tokens"] == "easy"] == [math.inf]
    flops = {r["valid"]: sum(r["counts"]["flops"].values()) for r in data["rows"] if r["purpose"] == "valid"}
    assert flops[0.5] == flops[1.0] / 2 and flops[0.25] == flops[1.0] / 4
    assert data["machine"].keys() == {"gemm_flops_per_s", "copy_bytes_per_s"}


def test_report_needs_nothing_but_the_json(quick, tmp_path):
    copy = tmp_path / "results.json"
    copy.write_text((quick / "cpu-quick.json").read_text())
    text = report.write_report(copy)
    assert text == (tmp_path / "results.md").read_text() == (quick / "cpu-quick.md").read_text()
    blocks = [b.splitlines() for b in text.split("\n\n") if b.startswith("| ")]
    assert len(blocks) > 8
    assert all(len({line.replace("\\|", "").count("|") for line in block}) == 1 for block in blocks)
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "Where fused_kd stands", "Targets", "Forward + backward", "Scaling", "Work, counted beside measured",
        "The performance model, beside what was measured", "Expected on GPUs", "How it was measured",
    ]  # fmt: skip
    pytest.importorskip("matplotlib")
    for name in ("results.png", "results-scaling.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (quick / "cpu-quick.png").exists()


def test_second_run_measures_nothing_again(quick, monkeypatch):
    before = json.loads((quick / "cpu-quick.json").read_text())
    store = Store(quick / "cpu-quick.json", before)
    done = [r for r in before["rows"] if r["status"] == "ok"]
    assert all(store.finished(row_key(r)) for r in done)
    monkeypatch.setattr("bench.runner.subprocess.Popen", lambda *a, **k: pytest.fail("a finished case was started"))
    run_cases([case("fused_kd", shape=QUICK_SHAPES[0], variants=(*EVERY, FAR))], store, Deadline(None), 1.0, print)
    assert store.data["rows"] == before["rows"]


def test_printed_command_measures_that_row_again(quick, tmp_path):
    text = (quick / "cpu-quick.md").read_text()
    commands = [line for line in text.splitlines() if "| eager |" in line and "bench run --trial" in line]
    command = commands[0].split("`")[1]
    assert command == 'python -m bench run --trial --shapes tiny --only "eager"'
    for planned in (cpu_plan(), quick_plan()):
        here = bench_run.chosen(planned, [planned[0].shape.name], ["eager"], None)
        assert {(c.shape.name, c.implementation) for c in here} == {(planned[0].shape.name, "eager")}


def test_eager_and_fused_agree_with_half_of_the_tokens_ignored():
    inputs = make_inputs(SMALL, CPU, torch.float32)
    labels = inputs.ignoring(0.5)
    assert int((labels == IGNORE).sum()) == 6 and int((inputs.ignoring(0.25) == IGNORE).sum()) == 9
    gamma = inputs.gamma("mixed")
    losses = [IMPLEMENTATIONS[name].build(inputs, gamma)(labels).item() for name in ("eager", "fused_kd")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    full = IMPLEMENTATIONS["eager"].build(inputs, gamma)(inputs.labels).item()
    assert losses[0] != pytest.approx(full, rel=1e-3)


def test_inputs_are_the_same_in_every_process_and_differ_by_seed():
    a, b, c = (make_inputs(SMALL, CPU, torch.float32, seed) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a[:6], b[:6], strict=True))
    assert not torch.equal(a.weight_s, c.weight_s)
    with pytest.raises(ValueError, match="tokens must be"):
        a.gamma("some")
    with pytest.raises(ValueError, match="teacher must be one of near, far"):
        make_inputs(SMALL, CPU, torch.float32, teacher="absent")


def test_a_near_teacher_agrees_with_the_student_and_a_far_one_does_not():
    shape = Shape("wide", 64, 32, 48, 200)
    agreement = {}
    for teacher in ("near", "far"):
        inputs = make_inputs(shape, CPU, torch.float32, teacher=teacher)
        top, top_t = (inputs.hidden_s @ inputs.weight_s.T).argmax(1), (inputs.hidden_t @ inputs.weight_t.T).argmax(1)
        agreement[teacher] = float((top == top_t).float().mean())
    assert agreement["near"] > 0.4 > 0.1 > agreement["far"]


def test_floor_is_the_four_products():
    inputs = make_inputs(SMALL, CPU, torch.float32)
    floor = Floor(inputs)
    floor()
    z_t = inputs.hidden_t @ inputs.weight_t.t()
    torch.testing.assert_close(floor.logits, z_t)
    torch.testing.assert_close(floor.d_hidden, z_t @ inputs.weight_s.detach())
    torch.testing.assert_close(floor.d_weight, z_t.t() @ inputs.hidden_s.detach())
    student = Floor(inputs, teacher=False, tokens=5)
    student.forward()
    torch.testing.assert_close(student.logits, inputs.hidden_s.detach()[:5] @ inputs.weight_s.detach().t())
    assert not student.d_weight.any()


def test_without_a_floor_the_step_is_still_measured():
    (row,) = rows(case("fused_kd torch", dtype="bfloat16"))  # fp32-out GEMMs are CUDA's
    assert row["status"] == "ok" and row["interleaved"] is False
    assert row["seconds"].keys() == {"step", "forward", "half_ignored"} and len(row["seconds"]["step"]) == 2
    assert row["floor_status"] == "failed" and "dtype_out" in row["floor_reason"]
    assert 1e-5 < row["error"]["d_weight"] < 0.02
    assert "floor failed" in report.markdown({**HEADER, "written": "now", "rows": [row]})


def test_calls_take_turns(monkeypatch):
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    monkeypatch.setattr("bench.measure.clock", lambda: float(len(order)) ** 2)
    samples = interleaved(calls, 3, before=lambda: order.append("-"))
    assert "".join(order) == "-a-b" * 3
    assert samples == {"a": [3.0, 11.0, 19.0], "b": [7.0, 15.0, 23.0]}


def test_rounds_are_as_many_as_fit_but_three(monkeypatch):
    now = iter(range(10**6))
    monkeypatch.setattr("bench.measure.clock", lambda: float(next(now)))
    for seconds, rounds in ((0.0, 3), (12.0, 6), (1e9, 8)):  # floor and step take a second each
        (row,) = rows(case("eager", purpose="N", rounds=8, seconds=seconds))
        assert {name: len(samples) for name, samples in row["seconds"].items()} == {"floor": rounds, "step": rounds}


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
    from fused_kd.engines import chunked

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
    Store(path, HEADER).add(case("eager").row(Variant(), status="ok", gamma=math.inf))
    Store(path, HEADER).add(case("fused_kd").row(Variant(), status="failed", reason="x"))
    again = Store(path, HEADER)
    assert [r["status"] for r in again.data["rows"]] == ["ok", "failed"] and again.data["rows"][0]["gamma"] == "inf"
    assert again.finished(case("eager").row_keys()[0]) and not again.finished(case("fused_kd").row_keys()[0])
    assert Store(path, HEADER, fresh=True).data["rows"] == []
    assert Store(path, {**HEADER, "source": {"digest": "1"}}).data["rows"] == []
    assert Store(path, {**HEADER, "settings": {}}).data["rows"] == []


def test_no_time_left_is_a_row_that_says_so(tmp_path):
    store = Store(tmp_path / "r.json", HEADER)
    run_cases([case("fused_kd"), case("liger fused jsd")], store, Deadline(0.0), 1.0, lambda what: None)
    assert [(r["status"], r["reason"]) for r in store.data["rows"]] == [
        ("skipped", "no time left in this run"),
        ("missing", IMPLEMENTATIONS["liger fused jsd"].missing("cpu")),
    ]


def test_cases_of_an_implementation_share_a_process_curves_apart():
    found = batches([case("fused_kd"), case("eager", purpose="N"), case("eager"), case("eager", purpose="V")])
    assert [[(c.implementation, c.purpose) for c in batch] for batch in found] == [
        [("fused_kd", "table")], [("eager", "N"), ("eager", "V")], [("eager", "table")],
    ]  # fmt: skip


def test_late_and_broken_workers_are_rows_that_say_so(tmp_path):
    store = Store(tmp_path / "r.json", HEADER)
    run_batch([case("fused_kd")], store, limit=0.3)
    assert store.data["rows"][0]["status"] == "skipped" and "stopped after" in store.data["rows"][0]["reason"]
    run_batch([case("fused_kd", dtype="float12")], store, limit=120)
    (row,) = store.data["rows"]
    assert row["status"] == "failed" and "float12" in row["reason"]


@pytest.mark.skipif(sys.platform != "linux", reason="workers follow their parent on Linux only")
def test_no_worker_outlives_a_killed_run(tmp_path):
    psutil = pytest.importorskip("psutil")
    command = [sys.executable, "-m", "bench", "run", "--quick", "--only", "eager"]
    command += ["--rounds", "1000000"]
    run = subprocess.Popen([*command, "--output", str(tmp_path)], cwd=ROOT, stderr=subprocess.DEVNULL)
    workers: list = []
    try:
        while not workers:
            assert run.poll() is None, "the run ended before its worker was seen"
            time.sleep(0.1)
            for child in psutil.Process(run.pid).children():
                with contextlib.suppress(psutil.Error):  # one that has just ended
                    workers += [child] * ("bench/suite.py" in child.cmdline())
    finally:
        run.kill()
        run.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def test_compile_without_a_compiler_is_a_row_that_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    store = Store(tmp_path / "r.json", HEADER)
    run_batch([case("torch.compile")], store, limit=120)
    (row,) = store.data["rows"]
    assert row["status"] == "failed" and row["reason"], row
    assert "failed: " in report.markdown({**store.data, "written": "now"})


def test_plans_cover_what_they_should():
    planned = cpu_plan()
    for shape in CPU_SHAPES:
        names: dict[str, tuple[Variant, ...]] = {}
        for c in planned:
            if c.shape == shape and c.purpose == "table":
                names[c.implementation] = names.get(c.implementation, ()) + c.variants
        assert {"fused_kd", "torch.compile"} <= names.keys()
        assert set(EVERY) <= set(names["fused_kd"])
    assert {c.implementation for c in planned} >= {
        n for n, i in IMPLEMENTATIONS.items() if i.group != "self-evolution" and not n.startswith("eager")
    }
    assert {c.purpose for c in planned} == {"table", "N", "V", "valid", "chunk"}
    assert {v for c in planned for v in c.variants} >= {FAR, Variant(valid=0.25)}
    assert {c.shape.V for c in planned} >= {32000, 128256, 262144}
    assert all(Case.from_json(c.to_json()) == c for c in planned)
    keys = [key for c in planned for key in c.row_keys()]
    assert len(keys) == len(set(keys))
    assert [tuple(s) for s in GPU_SHAPES] == [("A", 8192, 4096, 5120, 128256), ("B", 8192, 896, 3584, 151936)]
    assert [s[1:] for s in CPU_SHAPES] == [(1024, 512, 1024, 32000), (512, 256, 512, 128256)]


def test_choosing_cases():
    planned = quick_plan()
    (found,) = bench_run.chosen(planned, ["tiny"], ["fused_kd torch"], ["mixed"])
    assert found.variants == (Variant(),)
    for arguments, message in (
        ((["a"], None, None), "--shapes must name some of .*tiny.*; got a"),
        ((None, ["eagre"], None), "--only must name some of .*eager.*; got eagre"),
        ((None, ["eager"], ["hard"]), "leave nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            bench_run.chosen(planned, *arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rounds", "0"], "--rounds must be above 0, got 0"),
        (["--minutes", "-1"], "--minutes must be above 0, got -1.0"),
        (["--only", "nothing"], "--only must name some of"),
    ],
)
def test_bad_arguments_of_a_run(arguments, message, capsys):
    from bench.__main__ import main

    assert main(["run", "--quick", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["fused_kd", "fused_kd torch", "eager"])
def test_worker_on_a_gpu(name):
    shape = Shape("small", 64, 32, 48, 1000)
    for row in rows(case(name, shape=shape, variants=EVERY, device="cuda", dtype="bfloat16", error_tokens=64)):
        assert row["status"] == "ok" and "error_status" not in row, row
        assert row["memory"]["over_inputs"] > 0 and min(row["seconds"]["step"] + row["seconds"]["floor"]) > 0
        assert max(row["error"][k] for k in ("d_hidden", "d_weight")) < (0.3 if name == "eager" else 0.02), row
