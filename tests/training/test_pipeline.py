"""Stages are done once, again where anything that they are made from changes, and go on after a kill."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from fused_kd.training.pipeline import Pipeline, Stage


@dataclasses.dataclass
class Plan:
    epochs: float = 1.0


def chain(folder: Path, log: list[str], *, first: int = 1, second: int = 2, corpus: Path | None = None) -> tuple:
    """Three stages: ``b`` and ``c`` read what ``a`` wrote."""

    def work(name: str, value: int, earlier: Stage | None = None):
        def do(out: Path) -> None:
            log.append(name)
            seen = json.loads((earlier.folder / "value").read_text()) if earlier else 0
            (out / "value").write_text(json.dumps(seen + value))

        return do

    p = Pipeline(folder)
    files = [] if corpus is None else [corpus]
    a = p.add("a", work("a", first), {"first": first, "plan": Plan()}, files=files)
    b = p.add("b", work("b", second, a), {"second": second}, needs=[a])
    c = p.add("c", work("c", 0, a), {}, needs=[a])
    return p, a, b, c


def test_a_stage_and_what_it_needs_are_done_once(tmp_path):
    log: list[str] = []
    p, a, b, c = chain(tmp_path, log)
    assert log == [] and [state for state, _ in p.plan()] == ["to do"] * 3
    told: list[str] = []
    assert json.loads((p.finish(b, lambda stage: told.append(stage.title)) / "value").read_text()) == 3
    assert log == told == ["a", "b"] and (a.done, b.done, c.done) == (True, True, False)
    p, a, b, c = chain(tmp_path, log)
    p.finish(b)
    p.finish(c)
    assert log == ["a", "b", "c"]
    assert [state for state, _ in p.plan()] == ["done"] * 3


def test_a_changed_setting_is_another_stage_and_reaches_those_after_it(tmp_path):
    log: list[str] = []
    for first, second in ((1, 2), (1, 5), (4, 2), (1, 2)):
        p, _, b, _ = chain(tmp_path, log, first=first, second=second)
        assert json.loads((p.finish(b) / "value").read_text()) == first + second
    # a changed second leaves a; a changed first does both again; the first pair is still there
    assert log == ["a", "b", "b", "a", "b"]


def test_files_count_by_content(tmp_path):
    log: list[str] = []
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "x").write_text("one")
    names = [chain(tmp_path / "run", log, corpus=corpus)[1].name]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_text("one")
    names.append(chain(tmp_path / "run", log, corpus=tmp_path / "elsewhere")[1].name)
    (corpus / "x").write_text("two")
    names.append(chain(tmp_path / "run", log, corpus=corpus)[1].name)
    (corpus / "x").rename(corpus / "y")
    names.append(chain(tmp_path / "run", log, corpus=corpus)[1].name)
    names.append(chain(tmp_path / "run", log, corpus=tmp_path / "no-such")[1].name)
    assert names[0] == names[1] and len(set(names)) == 4


def test_a_stage_that_died_is_begun_and_done_again(tmp_path):
    tries: list[int] = []

    def work(out: Path) -> None:
        tries.append(len(list(out.glob("part*"))))
        (out / f"part{len(tries)}").touch()
        if len(tries) == 1:
            raise KeyboardInterrupt

    p = Pipeline(tmp_path)
    stage = p.add("s", work, {})
    with pytest.raises(KeyboardInterrupt):
        p.finish(stage)
    assert not stage.done and p.plan() == [("begun", stage.name)]
    p.finish(stage)
    assert tries == [0, 1] and stage.done
    assert json.loads((stage.folder / "stage.json").read_text())["title"] == "s"


def test_a_stage_of_a_script_is_what_the_trainers_use(tmp_path):
    """Inside its work a stage may hold the run's own lock of its name, as train_stage does."""
    p = Pipeline(tmp_path)

    def work(out: Path) -> None:
        with p.run.lock(stage.name, wait=False) as mine:
            assert mine and p.run.stage(stage.name) == out
        (out / "model").touch()

    stage = p.add("train", work, {})
    assert (p.finish(stage) / "model").exists()


@pytest.mark.parametrize("title", ["", "a/b", "a b"])
def test_titles_are_checked(tmp_path, title):
    with pytest.raises(ValueError, match="title="):
        Pipeline(tmp_path).add(title, lambda out: None, {})


def test_settings_must_be_json(tmp_path):
    with pytest.raises(TypeError, match="settings"):
        Pipeline(tmp_path).add("a", lambda out: None, {"model": object()})
