"""Stages are done once, again where anything that they are made from changes, and go on after a kill."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from fused_kd.training.stage import (
    Stages,
    bind,
    check_writable,
    helpers,
    lock,
    read_json,
    remove_folder,
    replace_folder,
    tell,
    told,
    write_json,
)
from tests.training.forking import ended, fork


@dataclasses.dataclass
class Plan:
    epochs: float = 1.0


def chain(folder: Path, log: list[str], *, first: int = 1, second: int = 2, files: tuple = ()) -> tuple[Path, Path]:
    """Two stages: the second reads what the first wrote."""
    stages = Stages(folder)

    def begin(out: Path) -> None:
        log.append("a")
        write_json(out / "value.json", first)

    def go_on(out: Path) -> None:
        log.append("b")
        write_json(out / "value.json", read_json(a / "value.json") + second)

    a = stages("a", begin, {"first": first, "plan": Plan()}, files=files)
    return a, stages("b", go_on, {"second": second}, needs=[a])


def test_a_changed_setting_is_another_stage_and_reaches_those_after_it(tmp_path: Path, capsys) -> None:
    log: list[str] = []
    for first, second in ((1, 2), (1, 5), (4, 2), (1, 2)):
        assert read_json(chain(tmp_path, log, first=first, second=second)[1] / "value.json") == first + second
    assert log == ["a", "b", "b", "a", "b"], "a changed second leaves a; the first pair is still there"
    assert len(capsys.readouterr().out.splitlines()) == 5, "a line a stage that is begun"


def test_files_count_by_content(tmp_path: Path) -> None:
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for folder in (corpus, elsewhere):
        folder.mkdir()
        (folder / "x.en").write_text("one")

    def name(file: object) -> str:
        return chain(tmp_path / "run", [], files=(file,))[0].name

    names = [name(corpus), name(elsewhere), name(corpus / "x"), name("no-such")]
    (corpus / "x.en").write_text("two")
    names += [name(corpus), name(corpus / "x")]
    (corpus / "x.en").rename(corpus / "y.en")
    names += [name(corpus)]
    same, moved, prefix, missing, changed, changed_prefix, renamed = names
    assert same == moved and prefix != changed_prefix and len({same, missing, changed, renamed}) == 4


def test_a_stage_that_died_is_done_again_in_its_folder(tmp_path: Path, capsys) -> None:
    tries: list[int] = []

    def work(out: Path) -> None:
        tries.append(len(list(out.glob("part*"))))
        (out / f"part{len(tries)}").touch()
        if len(tries) == 1:
            raise KeyboardInterrupt

    Stages(tmp_path)("first", lambda _: None, {})
    with pytest.raises(KeyboardInterrupt):
        Stages(tmp_path)("s", work, {})
    capsys.readouterr()
    again = Stages(tmp_path)
    again("first", lambda _: None, {})
    folder = again("s", work, {})
    assert capsys.readouterr().out.endswith(f" {folder.name} goes on; finished before: 1\n")
    again("last", lambda _: None, {})
    assert "before" not in capsys.readouterr().out, "said once"
    Stages(tmp_path)("s", work, {})
    assert tries == [0, 1] and json.loads((folder / "stage.json").read_text())["title"] == "s"


def test_what_is_finished_is_told_without_doing_it(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    assert stages.finished("a", {"x": 1}) is None and not list(tmp_path.glob("a-*"))
    folder = stages("a", lambda folder: None, {"x": 1}, needs=[tmp_path / "b-1"])
    assert stages.finished("a", {"x": 1}, needs=[tmp_path / "b-1"]) == folder
    assert stages.finished("a", {"x": 1}) is None and stages.finished("a", {"x": 2}, needs=[tmp_path / "b-1"]) is None
    (folder / "done.json").unlink()
    assert stages.finished("a", {"x": 1}, needs=[tmp_path / "b-1"]) is None
    with pytest.raises(ValueError, match="title"):
        stages.finished("a/b", {})


def test_bad_titles_and_settings(tmp_path: Path) -> None:
    for title in ("", "a/b", "a b"):
        with pytest.raises(ValueError, match="title="):
            Stages(tmp_path)(title, print, {})
    with pytest.raises(TypeError, match="settings"):
        Stages(tmp_path)("a", print, {"model": object()})
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output='.*file' cannot be written to: File exists"):
        check_writable(tmp_path / "file")


def test_processes_share_pieces_and_do_each_stage_once(tmp_path: Path) -> None:
    """Each takes what nobody holds, and waits for the rest."""
    log: list[tuple[str, str]] = []
    both = threading.Barrier(2, timeout=60)

    def share(worker: str) -> None:
        stages = Stages(tmp_path)

        def piece(title: str) -> Path:
            def work(out: Path) -> None:
                log.append((title, worker))
                both.wait()  # both work at the same time, or this breaks

            return stages(title, work, {})

        stages.share({title: lambda title=title: piece(title) for title in ("x", "y")})

    threads = [threading.Thread(target=share, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(title for title, _ in log) == ["x", "y"] and len({worker for _, worker in log}) == 2
    assert all((folder / "done.json").is_file() for folder in tmp_path.glob("[xy]-*"))


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    def work(out: Path) -> None:
        (out / "begun").touch()
        time.sleep(600)

    pid = fork(lambda: Stages(tmp_path)("s", work, {}))
    wait_for(lambda: list(tmp_path.glob("s-*/begun")))
    with lock(next((tmp_path / ".locks").iterdir()), wait=False) as mine:
        assert not mine
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    folder = Stages(tmp_path)("s", lambda out: (out / "made").touch(), {})
    assert (folder / "made").exists() and (folder / "begun").exists()


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_lock_is_a_file_of_its_own(tmp_path: Path, kind: str) -> None:
    other, path = tmp_path / "other.txt", tmp_path / ".lock"
    path.symlink_to(other) if kind == "link" else path.mkdir()
    with pytest.raises(ValueError, match=r"\.lock is a lock, and must be a file"), lock(path):
        pass
    assert not other.exists()


@pytest.mark.parametrize("work", ["training.json", "model/x", "checkpoints/checkpoint-2/x", "batches/000000.jsonl"])
def test_a_folder_is_bound_to_its_arguments(tmp_path: Path, work: str) -> None:
    for rate in (0.3, 0.1):
        bind(tmp_path, {"lr": rate, "plan": Plan()})  # nothing was made: bound anew
    (tmp_path / work).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / work).touch()
    bind(tmp_path, {"lr": 0.1, "plan": Plan()})
    with pytest.raises(ValueError, match=r"made with other arguments \(lr: 0\.1 -> 0\.2\): give another folder"):
        bind(tmp_path, {"lr": 0.2, "plan": Plan()})
    (tmp_path / "arguments.json").write_text("[")
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match=r"arguments\.json says what .* is damaged"),
    ):
        bind(tmp_path, {"lr": 0.1, "plan": Plan()})
    (tmp_path / "arguments.json").unlink()
    with pytest.raises(ValueError, match=r"has work of an earlier run, but no arguments\.json"):
        bind(tmp_path, {"lr": 0.2})


@pytest.mark.parametrize("place", [".lock", "batches/.lock"])
def test_a_folder_that_a_run_is_at_is_not_bound_anew(tmp_path: Path, place: str) -> None:
    bind(tmp_path, {"lr": 0.1})
    with lock(tmp_path / place), pytest.raises(ValueError, match="made with other arguments"):
        bind(tmp_path, {"lr": 0.2})
    bind(tmp_path, {"lr": 0.2})


def test_removing_a_folder_leaves_what_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "other" / "within").mkdir(parents=True)
    for name in ("link", "place"):
        (tmp_path / name).symlink_to(tmp_path / "other")
    remove_folder(tmp_path / "link")
    (tmp_path / "made.partial").mkdir()
    replace_folder(tmp_path / "made.partial", tmp_path / "place")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["other", "place", "within"]


HELPER = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
assert sys.argv[2] == "--worker"
(folder / str(os.getpid())).touch()
print("here", flush=True)
if (folder / "fail").exists():
    sys.exit(3)
while (folder / "slow").exists():
    time.sleep(0.02)
from fused_kd.training import stage
stage._POLL_SECONDS = 0.05
with stage.helpers("none", [], 2, folder, helper=True):
    (folder / f"ready{os.getpid()}").touch()
    time.sleep(600)
"""


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z"


def test_helpers_end_with_the_first_process(tmp_path: Path, capsys) -> None:
    script = tmp_path / "script.py"
    script.write_text(HELPER)

    def pids() -> list[int]:
        return [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]

    with helpers(str(script), [str(tmp_path)], 3, tmp_path):
        wait_for(lambda: len(pids()) == 2)
    assert all(map(gone, pids())) and (tmp_path / "worker-2.log").read_text() == "here\n"

    def first() -> None:
        with helpers(str(script), [str(tmp_path)], 2, tmp_path):
            time.sleep(600)

    pid = fork(first)
    wait_for(lambda: list(tmp_path.glob("ready*")))
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    wait_for(lambda: all(map(gone, pids())))

    (tmp_path / "slow").touch()
    before = len(pids())
    pid = fork(first)
    wait_for(lambda: len(pids()) > before)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    (tmp_path / "slow").unlink()
    wait_for(lambda: all(map(gone, pids())))  # the first process was gone before they looked for it

    (tmp_path / "fail").touch()
    before = len(pids())
    with helpers(str(script), [str(tmp_path)], 2, tmp_path):
        wait_for(lambda: len(pids()) > before)
        time.sleep(0.3)
    assert "its work was done here: see" in capsys.readouterr().err
    with pytest.raises(ValueError, match="jobs must be an int of at least 1, got 0"), helpers("x.py", [], 0, tmp_path):
        pass


def test_results_are_told_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "new" / "pieces.jsonl"
    assert told(path) == {}
    for value in ({"a": (1, 2)}, {"a": (1, 2)}, {"a": "ü"}):
        tell(path, "one", value)
    assert path.read_bytes().count(b"title") == 2 and told(path) == {"one": {"a": "ü"}}
    with open(path, "ab") as file:  # a kill in the middle of a line, and of a letter
        file.write('\n{"title": "two", "value": "ü'.encode()[:-1])
    tell(path, "three", None)
    assert told(path) == {"one": {"a": "ü"}, "three": None}
