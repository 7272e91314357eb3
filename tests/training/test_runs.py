"""A run's folder that something else has been at: links, pipes, lost and damaged files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from fused_kd.training.runs import Run, remove_folder


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
def test_a_lock_is_a_file_of_its_own(tmp_path: Path, kind: str) -> None:
    run, other = Run(tmp_path / "run", {}), tmp_path / "other.txt"
    lock = run.stage("train") / ".lock"
    lock.parent.mkdir()
    if kind in ("link", "dangling"):
        lock.symlink_to(other)
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    if kind == "link":
        other.write_text("precious")
    with (
        pytest.raises(ValueError, match=r"\.lock is a lock, and must be a regular file .*: remove it"),
        run.lock("train"),
    ):
        pass
    assert other.read_text() == "precious" if kind == "link" else not other.exists()


def test_a_lock_keeps_what_its_file_holds(tmp_path: Path) -> None:
    run = Run(tmp_path, {})
    with run.lock("train") as mine, run.lock("train", wait=False) as again:
        assert (mine, again) == (True, False)
    (tmp_path / "train" / ".lock").write_text("note")
    with run.lock("train"):
        assert (tmp_path / "train" / ".lock").read_text() == "note"


@pytest.mark.parametrize("text", ["[]", "null", "5", '{"lr"', "", "[" * 100_000])
def test_arguments_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    Run(tmp_path, {"lr": 0.1})
    (tmp_path / "arguments.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"arguments\.json says what .* is damaged .*put it back as it was, or give anoth"
    ):
        Run(tmp_path, {"lr": 0.2})
    assert (tmp_path / "arguments.json").read_text() == text


def test_arguments_lost_beside_stages(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", {"lr": 0.1})
    (tmp_path / "run" / "arguments.json").unlink()
    Run(tmp_path / "run", {"lr": 0.2})  # nothing was begun
    with run.lock("cache/seed0"):
        pass
    Run(tmp_path, {"lr": 0.3})  # what lies there is a run of its own
    (tmp_path / "run" / "arguments.json").unlink()
    with pytest.raises(
        ValueError, match=r"has stages, but no arguments\.json, .*: put it back as it was, or give another"
    ):
        Run(tmp_path / "run", {"lr": 0.2})


@pytest.mark.parametrize("text", ["5", "[", '["aa"]'])
def test_content_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    run = Run(tmp_path, {})
    run.bind(data="one")
    (tmp_path / "content" / "data.json").write_text(text)
    with pytest.raises(ValueError, match=r"data\.json says what its folder was made with, and is damaged"):
        run.bind(data="two")


def test_removing_a_folder_leaves_what_a_link_leads_to(tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "within").mkdir(parents=True)
    (tmp_path / "link").symlink_to(other)
    for name in ("link", "none"):
        remove_folder(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["other"] and (other / "within").is_dir()
    remove_folder(other)
    assert not other.exists()
