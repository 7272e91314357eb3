"""``python -m bench gpu`` rehearsed on a CPU: stages that crash, hang or are cut, a second run, the tables."""

from __future__ import annotations

import contextlib
import io
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

from bench import __main__, gpu, gpu_report, machine, measure, stages
from bench.gpu_tests import run_tests
from bench.session import BROKEN, Lines, Stage, append, current, read, run_stages
from fused_kd.tuning import Alternative

from .helpers import ROOT

TESTS = """
import os, time, pytest
def test_good(): pass
def test_bad(): assert 1 == 2
def test_absent(): pytest.skip("no")
def test_crash(): os.kill(os.getpid(), 11)
def test_hang(): time.sleep(100)
@pytest.mark.skipif(False, reason="needs the extra cuda")
def test_row(): pass
"""


@pytest.fixture
def lines(tmp_path) -> Lines:
    return Lines(tmp_path / "gpu.jsonl", "code")


def stage(name: str, seconds: float, script: str) -> Stage:
    """Its process begins when it reads a line."""
    return Stage(name, seconds, [sys.executable, "-c", f"import os, sys, time\nsys.stdin.readline()\n{script}"])


def run(lines: Lines, *todo: Stage, seconds: float = 60.0) -> dict[str, dict]:
    run_stages(list(todo), lines, time.monotonic() + seconds, lines.path.parent / "logs")
    return {row["stage"]: row for row in lines.rows().values() if row["key"] == "stage"}


def test_a_stage_that_crashes_or_hangs_costs_no_other(lines):
    """And one that loses the GPU's context goes on in another process."""
    path = str(lines.path.parent / "went")
    broken = f"open({path!r}, 'a').write('x'); sys.exit({BROKEN} if len(open({path!r}).read()) < 3 else 0)"
    ended = run(
        lines,
        stage("crash", 20, "os.abort()"),
        stage("hang", 0.5, "time.sleep(60)"),
        stage("fail", 20, "sys.exit('no luck')"),
        stage("broken", 30, broken),
    )
    assert {name: row["status"] for name, row in ended.items()} == {
        "crash": "failed", "hang": "cut", "fail": "failed", "broken": "ok",
    }  # fmt: skip
    assert "SIGABRT" in ended["crash"]["reason"] and "no luck" in ended["fail"]["reason"]
    assert Path(path).read_text() == "xxx"
    assert run(lines, stage("late", 60, ""), seconds=0.5)["late"]["status"] == "not reached"
    assert Lines(lines.path, "other code").rows() == {}


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
    pid = tmp_path / "pid"
    waits = stage("s", 600, f"open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    script = (
        "import time\nfrom pathlib import Path\nfrom bench.session import Lines, Stage, run_stages\n"
        f"folder = Path({str(tmp_path)!r})\n"
        f"run_stages([Stage(*{tuple(waits)!r})], Lines(folder / 'x', ''), time.monotonic() + 600, folder)\n"
    )
    runner = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
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
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return None


def test_tests_in_shares_survive_crashes_and_hangs(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    options = {"select": ["test_some.py"], "processes": 2, "each": 1.0, "root": tmp_path}
    found = run_tests(tmp_path / "out", 120, **options)
    assert [found[kind] for kind in gpu_report.COUNTS] == [2, 1, 1, 1, 1, 0] and not found["errors"]
    assert found["failing"]["test_some.py::test_bad"] == "failed: assert 1 == 2"
    assert "SIGSEGV" in found["failing"]["test_some.py::test_crash"]
    assert "test_hang" in found["failing"]["test_some.py::test_hang"]
    of_row = [
        row["test"] for path in (tmp_path / "out").glob("cuda-row-*.jsonl") for row in read(path) if "test" in row
    ]
    assert of_row == ["test_some.py::test_row"]

    (tmp_path / "test_some.py").write_text(TESTS.replace("1 == 2", "1 == 1").replace("(100)", "(0)"))
    found = run_tests(tmp_path / "out", 120, **options)  # of the six only the three that had failed
    assert [found[kind] for kind in gpu_report.COUNTS] == [4, 0, 1, 0, 1, 0]
    begun = [row["started"] for path in (tmp_path / "out").glob("*.jsonl") for row in read(path) if "started" in row]
    assert {name.split("::")[1] for name in begun} == {"test_bad", "test_crash", "test_hang"}


def test_tests_that_are_cut_or_cannot_be_collected(tmp_path):
    (tmp_path / "test_some.py").write_text("import time\ndef test_a(): time.sleep(60)\ndef test_b(): pass\n")
    found = run_tests(tmp_path / "out", 6, select=["test_some.py"], processes=1, root=tmp_path)
    assert found["not reached"] == 2 and not found["failing"]
    found = run_tests(tmp_path / "none", 0.01, select=["test_some.py"], processes=1, root=tmp_path)
    assert found["errors"] == [f"share 0/1 of {part}: cut before it had begun" for part in ("cuda row", "others")]
    (tmp_path / "test_some.py").write_text("import nothing_of_that_name\n")
    assert run_tests(tmp_path / "bad", 60, select=["test_some.py"], processes=1, root=tmp_path)["errors"]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> Path:
    """A stage in a process of its own, then more in this one: another takes seconds to import everything."""
    out = tmp_path_factory.mktemp("rehearsal")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert gpu.main(["--out", str(out), "--rehearse", "--only", "ncu:cuda"]) == 0
    assert "ncu:cuda | ok" in said.getvalue()
    small = {"SECONDS": 0.0, "CPU_GEMM": (64, 64, 512), "CPU_COPY_BYTES": 1 << 20}
    with mock.patch.multiple(machine, **small), mock.patch.object(measure, "_trim"):
        for name in ("machine", "rows", "steps:A", "peers:eager", "profile"):
            with mock.patch.object(sys, "stdin", io.StringIO("\n")):
                assert stages.run_stage(name, out, rehearse=True) == 0
    gpu.report(out)
    return out


def test_a_rehearsal_measures_what_a_gpu_would(rehearsal):
    rows = {(row["stage"], row["key"]): row for row in read(rehearsal / "gpu.jsonl")}
    assert rows["environment", "environment"]["versions"]["torch"] == torch.__version__
    assert rows["ncu:cuda", "ncu"]["status"] == "missing" or shutil.which("ncu")
    assert {"copy", "torch"} <= rows["rows", "odd hard"]["seconds"].keys()
    step = rows["steps:A", "fused_kd torch mixed"]
    assert step["error"]["d_hidden"] < 1e-5 and {"step", "floor", "half_ignored"} <= step["seconds"].keys()
    assert rows["peers:eager", "eager"]["status"] == "ok" and rows["profile", "A"]["top"]


def test_the_report_needs_nothing_but_the_lines(rehearsal, tmp_path):
    (tmp_path / "gpu.jsonl").write_bytes((rehearsal / "gpu.jsonl").read_bytes() + b'{"stage": "st')
    assert gpu.report(tmp_path) == 0
    text = (tmp_path / "report.md").read_text()
    assert text == (rehearsal / "report.md").read_text()
    assert "A fused_kd torch" in text and "row backend: not measured" in text
    steps = [line for line in text.split("## Steps")[1].split("##")[0].splitlines() if "fused_kd torch" in line]
    titles = text.split("## Steps")[1].strip().splitlines()[0].split("|")
    column = [title.strip() for title in titles].index("predicted / measured")
    assert len(steps) == 3 and all(float(line.split("|")[column]) > 0 for line in steps)
    assert "`--gemm-tflops" in text and "- no compiled kernels" in text
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert all(len({line.count("|") for line in block}) == 1 for block in blocks)
    assert gpu.report(tmp_path / "nowhere") == 2


def test_committed_reports_are_those_of_their_lines():
    for path in (ROOT / "bench" / "results").rglob("gpu.jsonl"):
        assert path.with_name("report.md").read_text() == gpu_report.markdown(read(path)), path


def test_rows_of_other_code_do_not_count():
    old = {"stage": "rows", "key": "A easy", "status": "failed", "code": "1"}
    about = {"stage": "environment", "key": "environment", "status": "ok", "code": "2"}
    assert current([old, about]) == [about]
    assert not gpu_report.failed([old, about]) and gpu_report.failed([about, {**old, "code": "2"}])


def row_times(triton: float, cuda: float, tests: str = "ok") -> list[dict]:
    rows = [
        {"stage": "rows", "key": place, "seconds": {"triton": [triton] * 3, "cuda": [cuda] * 3}}
        for place in gpu_report.PLACES
    ]
    return [{"stage": "tests", "key": "tests", "status": tests}, *rows]


def test_the_cuda_row_must_earn_its_place():
    slower_once = [*row_times(1.5, 1.0)[:-1], {**row_times(1.0, 1.0)[-1]}]
    for found, backend in (
        (row_times(1.16, 1.0), "cuda"),
        (row_times(1.14, 1.0), "triton"),
        (slower_once, "triton"),
        (row_times(1.5, 1.0, tests="failed"), "triton"),
        (row_times(1.5, 1.0)[:-1], "not measured"),
    ):
        assert gpu_report.row_backend(found).startswith(f"row backend: {backend} (")


def choice(ratio: list[float], what: str = "A easy") -> dict:
    seconds = {"default": [1.0] * len(ratio), "other": ratio}
    fields = {"field": "fast", "default": "True", "value": "False", "what": what}
    return {"stage": "choices:row", "key": what, "seconds": seconds, **fields}


def test_a_field_changes_only_where_nothing_gets_slower():
    for found, said in (
        ([choice([0.9, 0.91])], "fast: False (False / True: 0.905 over 1; "),
        ([choice([0.99, 0.99])], "fast: True ("),
        (
            [choice([0.5, 0.5]), choice([1.1, 1.2], "B hard")],
            "fast: True (False / True: 0.758 over 2, slower at B hard; ",
        ),
        ([choice([1.5, 1.5]), choice([1.1, 1.2], "B")], "fast: True (False / True: 1.313 over 2, slower everywhere; "),
        ([], "fields of fused_kd.tuning: none measured"),
    ):
        assert gpu_report.fields(found)[0].startswith(said)


def test_a_field_s_alternatives_are_timed_in_turns(tmp_path, monkeypatch):
    run = stages.Run("choices:row", tmp_path, True, "code")
    seen = []
    monkeypatch.setattr(stages, "tuned", lambda **changes: contextlib.nullcontext(seen.append(changes)))
    stages._compare(run, "A easy", lambda: None, [Alternative("fast", True, False)], lambda: None)
    (row,) = read(tmp_path / "gpu.jsonl")
    assert row["field"] == "fast" and {len(x) for x in row["seconds"].values()} == {6}
    assert seen == [{"fast": False}] * 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_at_once(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-m", "bench", "gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip() == "bench gpu: no stage can run: no NVIDIA GPU is available to torch"
    assert not (tmp_path / "gpu.jsonl").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [(["--minutes", "0"], "--minutes must be above 0"), (["--only", "stpes"], "--only knows no stpes")],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    assert __main__.main(["gpu", "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_memcheck_runs_the_tests_of_the_cuda_row():
    assert "def test_cuda_row" in stages.SANITIZED.read_text()
