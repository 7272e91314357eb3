"""What is made of results: tables, verdicts, curves, comparisons, the README; from rows written by hand."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import measurements, report, scaling, standing, summary  # noqa: E402
from bench.__main__ import main  # noqa: E402
from bench.compare import compare  # noqa: E402
from bench.compare import markdown as comparison  # noqa: E402
from bench.shapes import Shape, Variant  # noqa: E402
from bench.worker import Case  # noqa: E402

SHAPE = Shape("32k", 1024, 512, 1024, 32000)
MIXED = Variant()
CASE = Case(SHAPE, "fused_kd", (MIXED,), "cpu", "float32", rounds=3, warmup=1, error_tokens=8)
HEADER = {
    "suite": "cpu",
    "written": "now",
    "source": {"digest": "0", "commit": "0123456789abcdef", "dirty": False},
    "settings": {"dtype": "float32", "rounds": 3, "device": "cpu"},
    "hardware": {"cpu": "x", "usable_cores": 1, "threads": 1},
    "versions": {"torch": "2"},
}
GB = 10**9


def row(name: str, step: list[float], memory: float, error: float = 2e-7, variant: Variant = MIXED, **fields) -> dict:
    case = replace(CASE, implementation=name, purpose=fields.pop("purpose", "table"), shape=fields.pop("shape", SHAPE))
    seconds = {"floor": [1.0, 2.0, 4.0], "step": step, **fields.pop("seconds", {})}
    return case.row(
        variant, status="ok", seconds=seconds, interleaved=True, top_k="top-k" in name, hard_fraction=0.5,
        memory={"over_inputs_and_gradients": int(memory * GB), "over_inputs": int((memory + 1) * GB)},
        error={"loss": 1e-7, "d_hidden": error, "d_weight": 3e-7, "tokens": 8}, **fields,
    )  # fmt: skip


@pytest.fixture
def data() -> dict:
    return {
        **HEADER,
        "rows": [
            row("fused_kd", [1.1, 2.4, 4.4], 1.0, seconds={"half_ignored": [0.77] * 3}),
            row("torch.compile", [1.3, 2.6, 4.4], 3.0),
            CASE.row(Variant("easy"), status="out of memory", reason="OutOfMemoryError: much | too much"),
        ],
    }


def test_numbers_and_judgements_of_the_tables(data):
    targets = measurements.targets(data)
    assert (
        "| 32k: 1024, 512, 1024, 32000 | mixed | fused_kd | 1.10 met |  | 0.85 met | 0.32 met | 0.33 met |" in targets
    )
    steps = measurements.steps(data)
    assert "| 1.10 (1.10-1.15) | 91 % |  | 2400 | 1.000 | 2.000 | 1.0e-07 | 2.0e-07 | 3.0e-07 |" in steps
    assert "out of memory: OutOfMemoryError: much \\| too much" in steps
    data["rows"][0]["seconds"]["step"] = [1.3, 2.6, 5.2]
    assert "1.30 not met |  | 1.00 not met" in measurements.targets(data)
    data["rows"][0]["seconds"]["step"][0] = 1.0
    data["rows"][0]["interleaved"] = False
    assert "1.30 (0.90-1.95)" in measurements.steps(data)


def test_forward_is_held_against_the_logits_alone(data):
    data["rows"][0]["seconds"] |= {"forward": [0.6, 0.9, 1.0], "forward_floor": [0.5, 0.6, 1.0]}
    assert "| 1.20 (1.10-1.35) | 2400 |" in measurements.steps(data)


def test_verdict_says_where_a_rival_wins(data):
    (found,) = standing.standings(data)
    assert (found.floor, found.fastest) == (pytest.approx(1.1), "torch.compile")
    assert (found.time, found.memory, found.error) == tuple(pytest.approx(x) for x in (1.1 / 1.3, 1 / 3, 1.0))
    assert "Of 1 rows of fused_kd that have a rival, 1 beat the best" in standing.verdict(data)
    for change in ({"step": [1.4, 2.9, 5.6]}, {"memory": 3.5}, {"error": 3e-7}):
        fields = {"step": [1.1, 2.4, 4.4], "memory": 1.0, **change}
        worse = {**data, "rows": [row("fused_kd", **fields), data["rows"][1]]}
        text = standing.verdict(worse)
        assert "1 rows of fused_kd that have a rival, 0 beat" in text and "Rows that do not" in text
    # A peer of another group, or a far teacher's row, is no rival.
    other = [row("trl chunked jsd", [0.1] * 3, 0.1), row("eager", [0.1] * 3, 0.1, variant=Variant(teacher="far"))]
    (same,) = standing.standings({**data, "rows": [*data["rows"], *other]})
    assert same.time == found.time


def test_weakest_rows_are_listed_with_the_best(data):
    rows = [row("fused_kd", [k, 2 * k, 4 * k], 1.0, variant=Variant(chunk=int(100 * k))) for k in (1.05, 1.5, 1.2)]
    text = standing.verdict({**data, "rows": rows})
    weakest, best = text.split("weakest rows")[1].split("And the")
    assert [c in weakest.splitlines()[4] for c in ("1.50", "chunk 150")] == [True, True]
    assert [c in best.splitlines()[4] for c in ("1.05", "chunk 105")] == [True, True]


def curve(name: str, times: list[float]) -> list[dict]:
    return [
        row(name, [t, 2 * t, 4 * t], t, purpose="N", shape=SHAPE._replace(name=f"N={n}", N=n), counts={"chunk": 64})
        for n, t in zip((100, 1000, 10000), times, strict=True)
    ]


def test_curves_and_where_they_cross(data):
    data["rows"] += curve("fused_kd", [4.0, 2.0, 1.0]) + curve("eager", [1.0, 4.0, 8.0])
    text = scaling.markdown(data)
    # Ratios 4, 1/2, 1/8: on logarithmic axes two thirds of the way from 100 to 1000.
    assert "time: eager is below fused_kd at N = 100; they change places near N = " in text
    near = float(text.split("change places near N = ")[1].split(".\n")[0].rstrip("."))
    assert near == pytest.approx(100 * 10 ** (2 / 3), rel=1e-3)
    assert "| 1000 | 4000 | 2.00 | 2.000 | 8000 | 4.00 | 4.000 | 64, the planner's |" in text
    data["rows"] = curve("fused_kd", [1.0, 1.0, 1.0]) + curve("eager", [2.0, 3.0, 4.0])
    assert "time: fused_kd is below eager throughout, by 2.00 to 4.00 times." in scaling.markdown(data)


def test_plots_are_drawn(data, tmp_path):
    pytest.importorskip("matplotlib")
    data["rows"] += curve("fused_kd", [1.0, 2.0, 3.0])
    scaling.draw(data, tmp_path / "curves.png")
    report.draw(data, tmp_path / "bars.png")
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert len(list(tmp_path.iterdir())) == 2


def test_comparison_tells_regressions_from_noise(data):
    same = compare(data, copy.deepcopy(data), 1.1)
    assert [c.worse for c in same] == [(), ()] and same[0].time == 1.0
    after = copy.deepcopy(data)
    after["rows"][0]["seconds"]["step"] = [1.3, 2.6, 5.2]
    assert compare(data, after, 1.1)[0].worse == ("time",)
    assert compare(data, after, 1.2)[0].worse == ()
    after["rows"][0]["seconds"]["step"] = [1.1, 2.5, 5.6]  # 1.25 against 1.1, but quartiles from 1.175 to 1.325 ...
    data["rows"][0]["seconds"]["step"] = [1.0, 2.2, 5.2]  # ... and from 1.05 to 1.2
    assert compare(data, after, 1.1)[0].worse == ()
    after["rows"][0]["memory"]["over_inputs_and_gradients"] *= 1.2
    after["rows"][0]["error"]["d_hidden"] *= 2.5
    assert compare(data, after, 1.1)[0].worse == ("memory", "dH error")
    after["rows"][1] |= {"status": "failed", "reason": "why"}
    changes = compare(data, after, 1.1)
    assert changes[1].worse == ("failed: why",) and "2 of 2 rows are worse" in comparison(changes, 1.1)


def test_comparison_of_what_cannot_be_compared(data):
    other = {**data, "settings": {**data["settings"], "dtype": "bfloat16"}}
    with pytest.raises(ValueError, match="the same dtype, got float32 and bfloat16"):
        compare(data, other, 1.1)
    with pytest.raises(ValueError, match=r"limit must be above 1, got 1\.0"):
        compare(data, data, 1.0)


def test_commands(data, tmp_path, capsys):
    def bench(*arguments) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    before, after = tmp_path / "a.json", tmp_path / "b.json"
    before.write_text(json.dumps(data))
    data["rows"][0]["memory"]["over_inputs_and_gradients"] *= 2
    after.write_text(json.dumps(data))
    assert bench("compare", before, before)[0] == 0
    code, said, _ = bench("compare", before, after)
    assert code == 1 and "| 2.000 |" in said
    assert bench("compare", before, after, "--limit", "3")[0] == 0
    code, _, error = bench("compare", before, tmp_path / "none.json")
    assert code == 2 and "none.json" in error
    assert "# fused_kd, cpu suite" in bench("report", before)[1]


def test_readme_shows_the_committed_results(data, tmp_path):
    mark = summary._BLOCK.search(summary.README.read_text())
    assert mark is not None
    committed = json.loads((ROOT / mark[2]).read_text())
    assert mark[0] == f"{mark[1]}{summary.summary(committed)}\n{mark[3]}"
    # Written only by the file that it names.
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- measured: bench/results/x.json -->\nold\n<!-- end -->\nb\n")
    assert not summary.write_readme(tmp_path / "x.json", data, readme) and "old" in readme.read_text()
    assert summary.write_readme(ROOT / "bench/results/x.json", data, readme)
    text = readme.read_text()
    assert "old" not in text and text.startswith("a\n") and text.endswith("b\n")
    assert "| self-evolution | 1024, 512, 1024, 32000 | fused_kd | 1.10 | 1.00 | 2.0e-07 |" in text


def test_committed_reports_are_those_of_their_results():
    for path in (ROOT / "bench" / "results").glob("*/*.json"):
        assert path.with_suffix(".md").read_text() == report.markdown(report.load(path)), path
