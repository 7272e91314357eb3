"""``python -m bench gpu`` rehearsed on a CPU: stages that crash, hang or are cut, a second run, the tables."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import gpu, gpu_choices, gpu_report, measure  # noqa: E402
from bench.bandwidth import RowProblem  # noqa: E402
from bench.checkout import LIBRARY, checkout, digest  # noqa: E402
from bench.gpu import Stage  # noqa: E402
from bench.gpu_tests import run_tests  # noqa: E402
from bench.lines import Lines, append, read  # noqa: E402
from bench.process import BROKEN  # noqa: E402
from bench.stages import run_stage  # noqa: E402

TESTS = """
import os, time, pytest
def test_good(): pass
def test_bad(): assert 1 == 2
def test_absent(): pytest.skip("no")
def test_crash(): os.kill(os.getpid(), 11)
def test_hang(): time.sleep(100)
def test_after(): pass
@pytest.mark.skipif(False, reason="needs the extra cuda")
def test_row(): pass
"""


@pytest.fixture
def lines(tmp_path) -> Lines:
    return Lines(tmp_path / "gpu.jsonl", "code")


def python(script: str) -> list[str]:
    """A stage's process: it begins when it reads a line."""
    return [sys.executable, "-c", f"import os, sys, time\nsys.stdin.readline()\n{script}"]


def run(lines: Lines, *stages: tuple[str, float, str], minutes: float = 1.0) -> dict[str, dict]:
    todo = [(Stage(name, seconds), python(script)) for name, seconds, script in stages]
    gpu.run_stages(todo, lines, time.monotonic() + 60 * minutes, lines.path.parent)
    return {row["stage"]: row for row in lines.rows().values() if row["key"] == "stage"}


def test_a_stage_that_crashes_or_hangs_costs_no_other(lines):
    path = str(lines.path.parent / "went")
    ended = run(
        lines,
        ("crash", 20, "os.abort()"),
        ("hang", 0.5, "time.sleep(60)"),
        ("fail", 20, "sys.exit('no luck')"),
        ("good", 20, f"open({path!r}, 'w')"),
    )
    assert {name: row["status"] for name, row in ended.items()} == {
        "crash": "failed", "hang": "cut", "fail": "failed", "good": "ok",
    }  # fmt: skip
    assert "SIGABRT" in ended["crash"]["reason"] and "no luck" in ended["fail"]["reason"]
    assert Path(path).exists()


def test_a_second_run_tries_only_what_has_not_ended_well(lines):
    count = f"open({str(lines.path.parent / 'count')!r}, 'a').write('x')"
    run(lines, ("good", 20, count), ("bad", 20, f"{count}; sys.exit(1)"))
    run(lines, ("good", 20, count), ("bad", 20, f"{count}; sys.exit(1)"))
    assert (lines.path.parent / "count").read_text() == "xxx"
    assert Lines(lines.path, "other code").rows() == {}


def test_a_stage_that_loses_its_context_goes_on_in_another_process(lines):
    path = lines.path.parent / "count"
    script = f"open({str(path)!r}, 'a').write('x'); sys.exit({BROKEN} if len(open({str(path)!r}).read()) < 3 else 0)"
    assert run(lines, ("rows", 30, script))["rows"]["status"] == "ok"
    assert path.read_text() == "xxx"


def test_what_finds_no_time_says_so(lines):
    assert run(lines, ("late", 60, ""), minutes=0.01)["late"]["status"] == "not reached"


def test_a_torn_line_is_no_row_and_spoils_no_other(tmp_path):
    path = tmp_path / "x.jsonl"
    append(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2')
    append(path, {"a": float("nan")})
    assert read(path) == [{"a": 1}, {"a": "nan"}]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux kills a parent's children")
def test_nothing_outlives_a_killed_run(tmp_path):
    """The runner is killed; its stage, which waits, ends with it."""
    pid, script = tmp_path / "pid", tmp_path / "runner.py"
    stage = python(f"open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    script.write_text(
        f"import sys, time\nsys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nfrom bench import gpu\n"
        f"lines = gpu.Lines(Path({str(tmp_path / 'gpu.jsonl')!r}), 'code')\n"
        f"gpu.run_stages([(gpu.Stage('s', 600), {stage!r})], lines, time.monotonic() + 600, Path({str(tmp_path)!r}))\n"
    )
    runner = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < deadline and runner.poll() is None
        time.sleep(0.05)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    while state_of(int(pid.read_text())) not in (None, "Z"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def state_of(pid: int) -> str | None:
    """Linux's letter for it, None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def test_tests_in_shares_survive_crashes_and_hangs(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    options = {"select": ["test_some.py"], "processes": 2, "each": 2.0, "root": tmp_path}
    found = run_tests(tmp_path / "out", 120, **options)
    counts = ("passed", "failed", "crashed", "timed out", "skipped", "not reached")
    assert [found[kind] for kind in counts] == [3, 1, 1, 1, 1, 0] and not found["errors"]
    assert found["failing"]["test_some.py::test_bad"] == "failed: assert 1 == 2"
    assert "SIGSEGV" in found["failing"]["test_some.py::test_crash"]
    assert "test_hang" in found["failing"]["test_some.py::test_hang"]
    row = read(tmp_path / "out" / "cuda-row-0-of-2.jsonl")
    assert [line["test"] for line in row if "test" in line] == ["test_some.py::test_row"]
    assert (tmp_path / "out" / "junit.xml").read_text().count("<failure") == 3

    (tmp_path / "test_some.py").write_text(TESTS.replace("1 == 2", "1 == 1").replace("(100)", "(0)"))
    found = run_tests(tmp_path / "out", 120, **options)  # of the seven only the three that had failed
    assert [found[kind] for kind in counts] == [5, 0, 1, 0, 1, 0]
    begun = [line["started"] for path in (tmp_path / "out").glob("*.jsonl") for line in read(path) if "started" in line]
    assert {name.split("::")[1] for name in begun} == {"test_bad", "test_crash", "test_hang"}


def test_tests_that_are_cut_are_not_reached(tmp_path):
    (tmp_path / "test_some.py").write_text("import time\ndef test_a(): time.sleep(60)\ndef test_b(): pass\n")
    found = run_tests(tmp_path / "out", 9, select=["test_some.py"], processes=1, root=tmp_path)
    assert found["not reached"] == 2 and not found["failing"]
    found = run_tests(tmp_path / "none", 0.01, select=["test_some.py"], processes=1, root=tmp_path)
    assert found["errors"] == [f"share 0/1 of {part}: cut before it had begun" for part in ("cuda row", "others")]


def test_tests_that_cannot_be_collected_are_an_error(tmp_path):
    (tmp_path / "test_some.py").write_text("import nothing_of_that_name\n")
    found = run_tests(tmp_path / "out", 60, select=["test_some.py"], processes=1, root=tmp_path)
    assert found["errors"]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> Path:
    """A stage as a user starts it, then more in this process: another takes seconds to import everything."""
    out = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, "-m", "bench", "gpu", "--out", str(out), "--rehearse", "--only", "machine"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "machine | ok" in done.stdout
    for stage in ("rows", "gemms:B", "steps:A", "choices:step", "peers:eager", "ncu:cuda"):
        with mock.patch.object(sys, "stdin", io.StringIO("\n")):
            assert run_stage(stage, out, rehearse=True) == 0
    gpu.report(out)
    return out


def test_a_rehearsal_measures_what_a_gpu_would(rehearsal):
    rows = {(row["stage"], row["key"]): row for row in read(rehearsal / "gpu.jsonl")}
    assert rows["environment", "environment"]["versions"]["torch"] == torch.__version__
    assert rows["ncu:cuda", "ncu"]["status"] == "missing" or shutil.which("ncu")
    assert {"copy", "torch"} <= rows["rows", "odd hard"]["seconds"].keys()
    step = rows["steps:A", "fused_kd torch mixed"]
    assert step["error"]["d_hidden"] < 1e-5 and {"step", "floor", "half_ignored"} <= step["seconds"].keys()
    assert rows["peers:eager", "eager"]["status"] == "ok"


def test_the_report_needs_nothing_but_the_lines(rehearsal, tmp_path, capsys):
    (tmp_path / "gpu.jsonl").write_bytes((rehearsal / "gpu.jsonl").read_bytes() + b'{"stage": "st')
    assert gpu.report(tmp_path) == 0
    text = (tmp_path / "report.md").read_text()
    assert text == (rehearsal / "report.md").read_text()
    assert "A fused_kd torch" in text and "row backend: not measured" in text
    steps = text.split("## Steps")[1].split("##")[0].strip().splitlines()
    column = [cell.strip() for cell in steps[0].split("|")].index("predicted / measured")
    assert len(steps) == 8 and all(float(line.split("|")[column]) > 0 for line in steps[2:])
    assert "`--gemm-tflops" in text and "- no compiled kernels" in text
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert all(len({line.count("|") for line in block}) == 1 for block in blocks)
    assert gpu.report(tmp_path / "nowhere") == 2


def test_another_checkout_is_known_by_its_content(tmp_path):
    package = tmp_path / "other" / "fused_kd"
    package.mkdir(parents=True)
    with pytest.raises(ValueError, match="no fused_kd"):
        checkout(str(package.parent), tmp_path)
    (package / "__init__.py").write_text("")
    with pytest.raises(ValueError, match=r"it lacks what this bench imports: \w+Error: .*fused_kd\.") as error:
        checkout(str(package.parent), tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no commit"):
        checkout("no-such-commit", tmp_path)
    before = digest(package.parent, LIBRARY)
    (package / "__init__.py").write_text("x = 1")
    assert digest(package.parent, LIBRARY) != before


def test_two_other_checkouts_are_not_mixed():
    rows = [
        {"stage": f"against:{other}:{whose}:{turn}", "key": "A", "seconds": {"step": [seconds]}}
        for other, seconds in (("abc", 2.0), ("def", 4.0))
        for whose, factor in (("theirs", 1), ("ours", 0.5))
        for turn, seconds in ((1, seconds * factor), (2, seconds * factor))
    ]
    text = gpu_report._against(gpu_report._by_stage(rows))
    assert "| abc | A | 2000.000" in text and "| def | A | 4000.000" in text and text.count("| 0.500 |") == 2


def test_rows_of_other_code_do_not_count():
    old = {"stage": "rows", "key": "A easy", "status": "failed", "code": "1"}
    about = {"stage": "environment", "key": "environment", "status": "ok", "code": "2"}
    assert gpu_report.current([old, about]) == [about]
    assert not gpu_report.failed([old, about]) and gpu_report.failed([about, {**old, "code": "2"}])


def row_times(triton: float, cuda: float) -> list[dict]:
    tests = {"stage": "tests", "key": "tests", "status": "ok"}
    rows = [
        {"stage": "rows", "key": place, "seconds": {"triton": [triton] * 3, "cuda": [cuda] * 3}}
        for place in gpu_choices.PLACES
    ]
    return [tests, *rows]


def test_the_cuda_row_must_earn_its_place():
    assert gpu_choices.row_backend(row_times(1.16, 1.0)).startswith("row backend: cuda")
    assert gpu_choices.row_backend(row_times(1.14, 1.0)).startswith("row backend: triton")
    slower_once = row_times(1.5, 1.0)
    slower_once[-1]["seconds"] = {"triton": [1.0], "cuda": [1.0]}
    assert gpu_choices.row_backend(slower_once).startswith("row backend: triton")
    broken = row_times(1.5, 1.0)
    broken[0]["status"] = "failed"
    assert gpu_choices.row_backend(broken).startswith("row backend: triton")
    assert gpu_choices.row_backend(row_times(1.5, 1.0)[:-1]).startswith("row backend: not measured")


def choice(ratio: list[float], what: str = "A easy") -> dict:
    seconds = {"default": [1.0] * len(ratio), "other": ratio}
    fields = {"field": "fast", "default": "True", "value": "False", "what": what}
    return {"stage": "choices:row", "key": what, "seconds": seconds, **fields}


def test_a_field_changes_only_where_nothing_gets_slower():
    assert gpu_choices.fields([choice([0.9, 0.91])])[0].startswith("fast: False")
    assert gpu_choices.fields([choice([0.99, 0.99])])[0].startswith("fast: True")
    assert gpu_choices.fields([choice([0.5, 0.5]), choice([1.1, 1.2])])[0].startswith("fast: True")
    assert "none measured" in gpu_choices.fields([])[0]


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
    samples = measure.interleaved({"a": lambda: order.append("a")}, 1, lambda: order.append("before"))
    assert samples == {"a": [0.002]}
    assert order == ["before", "done", "sleep", "event", "a", "event", "wait"]


def test_a_row_and_what_it_is_compared_with():
    problem = RowProblem(4, 100, torch.device("cpu"), torch.float32)
    problem.copy()
    problem.call("torch", "hard")()
    assert problem.outputs.is_hard.all() and problem.outputs.dlogits is not None
    problem.call("torch", "easy")()
    assert not problem.outputs.is_hard.any()
    assert (problem.copy_bytes, problem.least_bytes) == (8 * 400, 12 * 400)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_at_once(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-m", "bench", "gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "bench gpu: no stage can run: no NVIDIA GPU is available to torch"
    ]  # fmt: skip
    assert not (tmp_path / "gpu.jsonl").exists()


def test_it_needs_no_pytest():
    """Which is optional where a GPU is."""
    script = "import sys; sys.modules['pytest'] = None; import bench.__main__, bench.stages, bench.model, bench.run"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [(["--minutes", "0"], "--minutes must be above 0"), (["--only", "stpes"], "--only knows no stpes")],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    from bench.__main__ import main

    assert main(["gpu", "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_field_s_alternatives_are_timed_in_turns(tmp_path, monkeypatch):
    from bench import stages
    from fused_kd.tuning import Alternative

    run = stages.Run("choices:row", tmp_path, True, "code")
    alternative = Alternative("fast", True, False)
    seen = []
    monkeypatch.setattr(stages, "tuned", lambda **changes: __import__("contextlib").nullcontext(seen.append(changes)))
    stages._compare(run, "A easy", lambda: None, [alternative], lambda: None)
    (row,) = read(tmp_path / "gpu.jsonl")
    assert row["field"] == "fast" and {len(x) for x in row["seconds"].values()} == {6}
    assert seen == [{"fast": False}] * 8
    assert json.loads(json.dumps(row)) == row
