"""Stages are done once, again where anything that they are made from changes, and go on after a kill."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from pathlib import Path

import pytest

from fused_kd.training.pipeline import Pipeline, Stage, with_needs
from fused_kd.training.sharing import helpers


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


def test_a_prefix_of_parallel_text_counts_by_content(tmp_path):
    text = tmp_path / "corpus.en"
    text.write_text("one")
    names = []
    for content in ("one", "two", "one"):
        text.write_text(content)
        names.append(chain(tmp_path / "run", [], corpus=tmp_path / "corpus")[1].name)
    assert names[0] == names[2] != names[1]


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


def test_work_does_what_is_wanted_and_needed_and_asks_again(tmp_path):
    log: list[str] = []
    p, a, b, c = chain(tmp_path, log)
    assert with_needs([c, b, a]) == [a, c, b]
    told: list[str] = []
    wanted = [c]
    for stage in p.work(wanted.copy, lambda stage: told.append(stage.title)):
        assert stage.done
        wanted += [b] if stage is c else []
    assert log == told == ["a", "c", "b"]
    assert list(p.work()) == [], "everything is done"


def test_a_stage_held_by_another_is_passed_over_and_not_done_again(tmp_path, monkeypatch):
    log: list[str] = []
    p, a, b, c = chain(tmp_path, log)
    list(p.work(lambda: [a]))

    def other_finishes(seconds: float) -> None:
        assert log == ["a", "c"], "what nobody holds first"
        b.folder.mkdir()
        (b.folder / "done.json").touch()

    monkeypatch.setattr("fused_kd.training.sharing.time.sleep", other_finishes)
    with Pipeline(tmp_path).run.lock(f".claims/{b.name}"):
        assert [stage.title for stage in p.work(lambda: [b, c])] == ["c"]
    assert log == ["a", "c"]


def test_two_processes_do_each_stage_once(tmp_path):
    log: list[str] = []
    threads = [threading.Thread(target=lambda: list(chain(tmp_path, log)[0].work())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(log) == ["a", "b", "c"] and log[0] == "a"


HELPER = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
assert sys.argv[2] == "--worker"
print("here", flush=True)
(folder / str(os.getpid())).touch()
if (folder / "fail").exists():
    sys.exit(3)
time.sleep(600)
"""


def started(folder: Path, count: int) -> list[int]:
    deadline = time.monotonic() + 60
    while len(found := [int(path.name) for path in folder.iterdir() if path.name.isdigit()]) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_helpers_end_with_the_first_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(HELPER)
    with helpers(str(script), [str(tmp_path)], 3, tmp_path) as check:
        pids = started(tmp_path, 2)
        check()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert (tmp_path / "worker-2.log").read_text() == "here\n"


def test_a_helper_that_fails_is_said_once(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text(HELPER)
    (tmp_path / "fail").touch()
    with helpers(str(script), [str(tmp_path)], 2, tmp_path) as check:
        said = ""
        for _ in range(3000):
            check()
            if said := capsys.readouterr().err:
                break
            time.sleep(0.02)
        assert "worker-1.log" in said
        check()
        assert not capsys.readouterr().err
    with helpers("missing.py", [], 2, tmp_path, helper=True) as check:
        check()  # starts none, and its first process is there
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"), helpers("x.py", [], 0, tmp_path):
        pass
