"""``bench run``, ``report`` and ``compare``: plans, a run of tiny shapes, tables from rows written by hand."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest

from bench import __main__, caches, cpu, machine, report
from bench.compare import compare
from bench.compare import markdown as comparison
from bench.cpu import batches, chosen, make_plan, results
from bench.problems import CPU_SHAPES, EVERY, FAR, Shape, Variant
from bench.registry import IMPLEMENTATIONS
from bench.session import Lines

from .helpers import HEADER, MIXED, ROOT, case

SHAPE = Shape("32k", 1024, 512, 1024, 32000)
GB = 10**9


def test_plans_cover_what_they_should():
    planned = make_plan()
    for shape in CPU_SHAPES:
        here = [(c.implementation, v) for c in planned if c.shape == shape and c.purpose == "table" for v in c.variants]
        assert {("fused_kd", variant) for variant in EVERY} | {("torch.compile", MIXED)} <= set(here)
    assert {c.implementation for c in planned} >= {
        n for n, i in IMPLEMENTATIONS.items() if i.group != "self-evolution" and not n.startswith("eager")
    }
    assert {c.purpose for c in planned} == {"table", "N", "V", "valid"}
    assert {v for c in planned for v in c.variants} >= {FAR, Variant(valid=0.25)}
    for plan in (planned, make_plan(quick=True)):
        keys = [cpu._key(c, v) for c in plan for v in c.variants]
        assert len(keys) == len(set(keys))

    (found,) = chosen(planned, ["32k"], ["fused_kd torch"])
    assert found.variants == (MIXED,)
    for arguments, message in (
        ((["a"], None), "--shapes must name some of .*32k.*; got a"),
        ((None, ["eagre"]), "--only must name some of .*eager.*; got eagre"),
        ((["128k"], ["trl chunked kl"]), "leave nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            chosen(planned, *arguments)


def test_cases_of_an_implementation_share_a_process_curves_apart():
    found = batches([case("fused_kd"), case("eager", purpose="N"), case("eager"), case("eager", purpose="V")])
    assert [[(c.implementation, c.purpose) for c in batch] for batch in found] == [
        [("fused_kd", "table")], [("eager", "N"), ("eager", "V")], [("eager", "table")],
    ]  # fmt: skip


def test_what_was_not_measured_says_why(tmp_path):
    lines = Lines(tmp_path / "lines.jsonl", "code")
    cases = [case("fused_kd", variants=EVERY), case("eager"), case("liger fused jsd"), case("eager kl")]
    lines.put("fused_kd:table", "wide hard", "ok", **case("fused_kd").row(Variant("hard"), gamma=0.0))
    lines.put("fused_kd:table", "stage", "cut", reason="stopped after 3 s")
    lines.put("eager:table", "stage", "cut", reason="killed")
    lines.put("eager kl:table", "stage", "failed", reason="exit code 1")
    found = [(row["implementation"], row["status"], row.get("reason")) for row in results(cases, cases, lines)]
    assert found == [
        ("fused_kd", "skipped", "stopped after 3 s"),
        ("fused_kd", "ok", None),
        ("fused_kd", "skipped", "stopped after 3 s"),
        ("eager", "skipped", "killed"),
        ("liger fused jsd", "missing", "liger-kernel needs an NVIDIA GPU here"),
        ("eager kl", "failed", "exit code 1"),
    ]
    assert [row["tokens"] for row in results(cases, cases[1:2], lines)] == ["hard", "mixed"]


def test_a_quick_run_and_what_it_does_not_repeat(tmp_path, monkeypatch, capsys):
    for name, value in {"SECONDS": 0.0, "CPU_GEMM": (64, 64, 512), "CPU_COPY_BYTES": 1 << 20}.items():
        monkeypatch.setattr(machine, name, value)
    command = ["run", "--quick", "--only", "fused_kd", "--shapes", "tiny", "--output", str(tmp_path)]
    assert __main__.main(command) == 0
    data = json.loads((tmp_path / "cpu-quick.json").read_text())
    assert {"schema", "suite", "hardware", "versions", "source", "settings", "machine", "written"} <= data.keys()
    assert [(row["shape"]["name"], str(Variant.of(row))) for row in data["rows"]] == [
        ("tiny", "easy"), ("tiny", "hard"), ("tiny", "mixed"), ("tiny", "hard, far teacher"),
    ]  # fmt: skip
    assert {row["status"] for row in data["rows"]} == {"ok"} and data["rows"][0]["gamma"] == "inf"
    assert {len(samples) for row in data["rows"] for samples in row["seconds"].values()} == {3}

    text = (tmp_path / "cpu-quick.md").read_text()
    assert text.strip() in capsys.readouterr().out
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "Where fused_kd stands", "Forward + backward", "Work counted, and what it predicts",
        "How it was measured",
    ]  # fmt: skip
    blocks = [b.splitlines() for b in text.split("\n\n") if b.startswith("| ")]
    assert all(len({line.replace("\\|", "").count("|") for line in block}) == 1 for block in blocks)
    assert '`python -m bench run --trial --shapes tiny --only "fused_kd"`' in text

    monkeypatch.setattr(cpu, "run_stages", lambda *a, **k: pytest.fail("a finished case was started"))
    assert __main__.main(command) == 0
    assert json.loads((tmp_path / "cpu-quick.json").read_text())["rows"] == data["rows"]


def row(name: str, step: list[float], memory: float, error: float = 2e-7, variant: Variant = MIXED, **fields) -> dict:
    shape, purpose = fields.pop("shape", SHAPE), fields.pop("purpose", "table")
    seconds = {"floor": [1.0, 2.0, 4.0], "step": step, **fields.pop("seconds", {})}
    return replace(case(name), shape=shape, purpose=purpose).row(
        variant, status="ok", seconds=seconds, interleaved=True, top_k="top-k" in name, hard_fraction=0.5,
        memory={"over_inputs_and_gradients": int(memory * GB), "over_inputs": int((memory + 1) * GB)},
        error={"loss": 1e-7, "d_hidden": error, "d_weight": 3e-7, "tokens": 8}, **fields,
    )  # fmt: skip


@pytest.fixture
def data() -> dict:
    forward = {"forward": [0.6, 0.9, 1.0], "forward_floor": [0.5, 0.6, 1.0], "half_ignored": [0.77] * 3}
    failed = replace(case("fused_kd"), shape=SHAPE).row(Variant("easy"), status="failed", reason="Error: a | b")
    rows = [row("fused_kd", [1.1, 2.4, 4.4], 1.0, seconds=forward), row("torch.compile", [1.3, 2.6, 4.4], 3.0), failed]
    return {**HEADER, "rows": rows}


def test_numbers_of_the_tables(data):
    steps = report.steps(data)
    numbers = "| 1.10 (1.10-1.15) | 1.20 (1.10-1.35) | 0.32 | 2400 | 1.000 | 2.000 | 1.0e-07 | 2.0e-07 | 3.0e-07 |"
    assert numbers in steps and "failed: Error: a \\| b" in steps
    data["rows"][0] |= {"interleaved": False, "seconds": {"floor": [1.0, 2.0, 4.0], "step": [1.0, 2.6, 5.2]}}
    assert "1.30 (0.90-1.95)" in report.steps(data)
    del data["rows"][0]["seconds"]["floor"]
    data["rows"][0]["floor_status"] = "out of memory"
    assert "floor out of memory" in report.steps(data)


def test_verdict_says_where_a_rival_wins(data):
    (found,) = report.standings(data)
    assert found.floor == pytest.approx(1.1) and not found.lost
    names = ("torch.compile",) * 3
    for (ratio, name), expected, rival in zip(found[2:], (1.1 / 1.3, 1 / 3, 1.0), names, strict=True):
        assert (ratio, name) == (pytest.approx(expected), rival)
    assert "Of 1 rows of fused_kd that have a rival, 1 beat the best" in report.verdict(data)
    for change in ({"step": [1.4, 2.9, 5.6]}, {"memory": 3.5}, {"error": 3e-7}):
        worse = {
            **data,
            "rows": [row("fused_kd", **{"step": [1.1, 2.4, 4.4], "memory": 1.0, **change}), data["rows"][1]],
        }
        text = report.verdict(worse)
        assert "1 rows of fused_kd that have a rival, 0 beat" in text and "Rows that do not" in text
    # A peer of another group, or a far teacher's row, is no rival.
    other = [row("trl chunked jsd", [0.1] * 3, 0.1), row("eager", [0.1] * 3, 0.1, variant=Variant(teacher="far"))]
    assert report.standings({**data, "rows": [*data["rows"], *other]}) == [found]


def test_curves(data):
    for name, times in (("fused_kd", [4.0, 2.0]), ("eager", [1.0])):
        for N, t in zip((100, 1000), times, strict=False):
            data["rows"].append(row(name, [t, 2 * t, 4 * t], t, purpose="N", shape=SHAPE._replace(name=f"N={N}", N=N)))
    text = report.scaling(data)
    assert "At H_s = 512, H_t = 1024, V = 32000." in text
    assert "| 100 | 8000 | 4.00 | 4.000 | 2000 | 1.00 | 1.000 |" in text
    assert "| 1000 | 4000 | 2.00 | 2.000 |  |  |  |" in text


def test_comparison_tells_regressions_from_noise(data):
    data["rows"] = data["rows"][:2]
    same = compare(data, copy.deepcopy(data), 1.1)
    assert [c.worse for c in same] == [(), ()] and same[0].time == 1.0
    after = copy.deepcopy(data)
    after["rows"][0]["seconds"]["step"] = [1.3, 2.6, 5.2]
    assert compare(data, after, 1.1)[0].worse == ("time",) and compare(data, after, 1.2)[0].worse == ()
    after["rows"][0]["seconds"]["step"] = [1.1, 2.5, 5.6]  # 1.25 against 1.1, but quartiles from 1.175 to 1.325 ...
    data["rows"][0]["seconds"]["step"] = [1.0, 2.2, 5.2]  # ... and from 1.05 to 1.2
    assert compare(data, after, 1.1)[0].worse == ()
    after["rows"][0]["memory"]["over_inputs_and_gradients"] *= 1.2
    after["rows"][0]["error"]["d_hidden"] *= 2.5
    after["rows"][1] |= {"status": "failed", "reason": "why"}
    changes = compare(data, after, 1.1)
    assert [change.worse for change in changes] == [("memory", "dH error"), ("failed: why",)]
    assert "2 of 2 rows are worse" in comparison(changes, 1.1)
    with pytest.raises(ValueError, match="the same dtype, got float32 and bfloat16"):
        compare(data, {**data, "settings": {**data["settings"], "dtype": "bfloat16"}}, 1.1)
    with pytest.raises(ValueError, match=r"limit must be above 1, got 1\.0"):
        compare(data, data, 1.0)


def test_commands_on_files(data, tmp_path, capsys):
    def bench(*arguments) -> tuple[int, str, str]:
        code = __main__.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    before, after = tmp_path / "a.json", tmp_path / "b.json"
    before.write_text(json.dumps(data))
    data["rows"][0]["memory"]["over_inputs_and_gradients"] *= 2
    after.write_text(json.dumps(data))
    assert bench("compare", before, before)[0] == 0
    code, said, _ = bench("compare", before, after)
    assert code == 1 and "| 2.000 |" in said and bench("compare", before, after, "--limit", "3")[0] == 0
    code, _, error = bench("compare", before, tmp_path / "none.json")
    assert code == 2 and "none.json" in error
    said = bench("report", before)[1]
    assert "# fused_kd, cpu suite" in said and (tmp_path / "a.md").read_text() == said.removesuffix("\n")
    pytest.importorskip("matplotlib")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_readme_shows_the_committed_results(data, tmp_path):
    mark = report._BLOCK.search(report.README.read_text())
    assert mark is not None
    committed = json.loads((ROOT / mark[2]).read_text())
    assert mark[0] == f"{mark[1]}{report.summary(committed)}\n{mark[3]}"
    # Written only by the file that it names.
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- measured: bench/results/x.json -->\nold\n<!-- end -->\nb\n")
    assert not report.write_readme(tmp_path / "x.json", data, readme) and "old" in readme.read_text()
    assert report.write_readme(ROOT / "bench/results/x.json", data, readme)
    text = readme.read_text()
    assert "old" not in text and text.startswith("a\n") and text.endswith("b\n")
    assert "| self-evolution | 1024, 512, 1024, 32000 | fused_kd | 1.10 | 1.00 | 2.0e-07 |" in text


def test_committed_reports_are_those_of_their_results():
    for path in (ROOT / "bench" / "results").glob("*/*.json"):
        page = caches.markdown if path.name == "caches.json" else report.markdown
        assert path.with_suffix(".md").read_text() == page(json.loads(path.read_text())), path
