"""The cache of compiled rows: whom it believes, and what it takes for damaged."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fused_kd.rows import build_cache
from fused_kd.rows.build_cache import CACHE_VARIABLE


def entry(folder: Path) -> Path:
    path = folder / "entry"
    build_cache.keep(path, "key", b"data", {})
    assert build_cache.kept(path, "key") == b"data"
    return path


@pytest.mark.parametrize("mode, believed", [(0o600, True), (0o644, True), (0o666, False), (0o646, False)], ids=oct)
def test_entries_that_others_can_write_are_not_read(mode, believed, tmp_path):
    path = entry(tmp_path)
    path.chmod(mode)
    assert (build_cache.kept(path, "key") == b"data") is believed


def test_entries_of_other_users_are_not_read(monkeypatch, tmp_path):
    path = entry(tmp_path)
    monkeypatch.setattr(build_cache, "_trusted_owner", lambda found: False)
    assert build_cache.kept(path, "key") is None


def test_neither_links_nor_pipes_nor_giants_are_read(monkeypatch, tmp_path):
    path, link, pipe = entry(tmp_path), tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(path)
    os.mkfifo(pipe)
    assert build_cache.kept(link, "key") is None
    assert build_cache.kept(pipe, "key") is None
    monkeypatch.setattr(build_cache, "LARGEST_ENTRY", 10)
    assert build_cache.kept(path, "key") is None


DAMAGES = {
    "cut short": lambda whole: whole[:-1],
    "a bit": lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
    "head alone": lambda whole: whole.split(b"\n")[0],
    "data alone": lambda whole: whole.split(b"\n", 1)[1],
    "empty": lambda whole: b"",
    "a script": lambda whole: b"#!/bin/sh\n",
    "nested too deeply": lambda whole: b"[" * 200_000 + b"\ndata",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_none(damage, tmp_path):
    path = entry(tmp_path)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert build_cache.kept(path, "key") is None
    build_cache.keep(path, "key", b"data", {})
    assert build_cache.kept(path, "key") == b"data" and build_cache.kept(path, "another") is None
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_nothing_and_stops_nothing(monkeypatch, tmp_path):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    build_cache.keep(tmp_path / "entry", "key", b"data", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "of_parent, of_folder, believed",
    [
        (0o755, 0o700, True),
        (0o1777, 0o700, True),
        (0o755, 0o1777, True),  # each entry's owner is looked at
        (0o777, 0o700, False),
        (0o755, 0o777, False),
        (0o757, 0o755, False),
    ],
    ids=oct,
)
def test_folders_that_others_can_change_are_not_used(of_parent, of_folder, believed, monkeypatch, tmp_path):
    chosen = tmp_path / "parent" / "cache"
    chosen.mkdir(parents=True)
    chosen.parent.chmod(of_parent)
    chosen.chmod(of_folder)
    monkeypatch.setenv(CACHE_VARIABLE, str(chosen))
    if believed:
        assert build_cache.cache_folder() == chosen.resolve()
        return
    with pytest.warns(RuntimeWarning, match="are not kept in .* can be written by other users: .*chmod go-w"):
        assert build_cache.cache_folder() is None


def test_folders_of_other_users_are_not_used_through_a_link_either(monkeypatch, tmp_path):
    (tmp_path / "theirs" / "cache").mkdir(parents=True)
    (tmp_path / "mine").symlink_to(tmp_path / "theirs")
    theirs = (tmp_path / "theirs").stat().st_ino
    monkeypatch.setattr(build_cache, "_trusted_owner", lambda found: found.st_ino != theirs)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "mine" / "cache"))
    with pytest.warns(RuntimeWarning, match="theirs belongs to user"):
        assert build_cache.cache_folder() is None


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users")
def test_a_group_of_the_user_alone_may_write(monkeypatch):
    grp, pwd = pytest.importorskip("grp"), pytest.importorskip("pwd")
    user = pwd.struct_passwd(("ann", "x", 7, 7, "", "", ""))
    groups = {7: ["ann", "x", 7, []], 8: ["users", "x", 8, []], 9: ["ann", "x", 9, ["ann", "bob"]]}
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: user)
    monkeypatch.setattr(grp, "getgrgid", lambda gid: grp.struct_group(groups[gid]))
    assert [build_cache._own_group(gid) for gid in (7, 8, 9, 10)] == [True, False, False, False]


def test_no_home_no_cache(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert build_cache.cache_folder() is None and not list(tmp_path.iterdir())
