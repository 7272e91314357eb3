"""The native row's build and the cache of compiled rows: what is believed, what is healed, what is done without."""

from __future__ import annotations

import errno
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.rows import build_cache, select
from fused_kd.rows.build_cache import CACHE_VARIABLE
from fused_kd.rows.expressions import c_header
from fused_kd.rows.native import build as native_build

from .problems import needs_compiler

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the native row runs on Linux only")


def first_use(cache: Path | str, **environment: str) -> subprocess.Popen:
    code = (
        "import torch, fused_kd as fk\n"
        "z = torch.eye(3)\n"
        "print(float(fk.kd_loss(z, z.flip(0), torch.arange(3), fk.Skew(), backend='native').loss))"
    )
    environment = {**os.environ, CACHE_VARIABLE: str(cache), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@needs_compiler
def test_processes_race_to_one_library_and_later_ones_reuse_it(tmp_path):
    cache = tmp_path / "not" / "there yet"
    losses = {process.communicate(timeout=120)[0] for process in [first_use(cache) for _ in range(2)]}
    assert len(losses) == 1 and float(losses.pop()) > 0
    (built,) = cache.iterdir()
    before = built.stat().st_mtime_ns
    assert first_use(cache).wait(120) == 0
    assert list(cache.iterdir()) == [built] and built.stat().st_mtime_ns == before
    assert cache.stat().st_mode & 0o077 == 0


@needs_compiler
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").touch()
    process = first_use(tmp_path / "file" / "cache", TMPDIR=str(tmp_path))
    output, errors = process.communicate(timeout=120)
    assert float(output) > 0, errors
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has not used the native row yet, with its own cache."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    caches = (native_build.load, native_build.thread_pool, select._native_works)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@functools.cache
def _library() -> bytes:
    return native_build._compile(native_build.find_compiler(), [*native_build.FLAGS, "-O0"], c_header())


@pytest.fixture
def compiled(fresh, monkeypatch):
    """A 1 for each time that the library is compiled, which here takes no time."""
    try:
        native_build.find_compiler()
    except native_build.NativeRowError as error:
        pytest.skip(str(error))
    library, times = _library(), []
    monkeypatch.setattr(native_build, "_compile", lambda *_: times.append(1) or library)
    return times


def loss(backend: str | None = None) -> Tensor:
    return fk.kd_loss(torch.eye(3), torch.ones(3, 3), torch.arange(3), fk.SelfEvolution(), backend=backend).loss


def failing_compiler(folder: Path) -> Path:
    path = folder / "broken-cc"
    path.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo out of registers >&2; exit 1; }\n')
    path.chmod(0o755)
    return path


@needs_linux
def test_what_is_missing_is_named_and_never_replaced(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-cc -m64")
    with pytest.raises(ValueError, match="needs a C compiler, but CC='no-such-cc' is not found"):
        loss("native")
    monkeypatch.setenv("CC", str(failing_compiler(tmp_path)))
    with pytest.raises(ValueError, match=r"failed to compile.*out of registers.*use backend='torch'"):
        loss("native")
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="needs a C compiler; install gcc or clang, set CC, or use backend='torch'"):
        loss("native")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="runs on Linux only, not on darwin"):
        loss("native")
    with pytest.raises(ValueError, match="backend='native' needs tensors on the CPU, got tensors on cuda:0"):
        select.choose_backend("native", torch.device("cuda:0"))


@needs_linux
def test_the_default_falls_back_quietly_without_a_compiler_and_warns_once_where_it_fails(fresh, monkeypatch, tmp_path):
    expected = loss("torch")
    monkeypatch.setenv("CC", "no-such-cc")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(loss(), expected)
    select._native_works.cache_clear()
    monkeypatch.setenv("CC", str(failing_compiler(tmp_path)))
    with pytest.warns(RuntimeWarning, match="the slower torch row is used: .*out of registers"):
        assert torch.equal(loss(), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(loss(), expected)


@needs_linux
@pytest.mark.parametrize("wrapper", ["sleep 100", "sleep 100 & wait"], ids=["itself", "what it has started"])
def test_a_compiler_that_hangs_is_ended(wrapper, fresh, monkeypatch, tmp_path):
    path = tmp_path / "slow-cc"
    path.write_text(f"#!/bin/sh\n{wrapper}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    monkeypatch.setattr(native_build, "VERSION_SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(
        ValueError, match=r"slow-cc --version did not end in 0.2 seconds; fix CC or use backend='torch'"
    ):
        loss("native")
    assert time.monotonic() - start < 20


@needs_linux
@pytest.mark.parametrize(
    "value, message",
    [('gcc "', "cannot read CC='gcc \"'"), (f"{sys.executable} -c 1/0", "cannot run"), ("/", "CC='/' is not found")],
)
def test_a_compiler_that_is_none_is_done_without(value, message, fresh, monkeypatch):
    monkeypatch.setenv("CC", value)
    with pytest.raises(ValueError, match=re.escape(message)):
        loss("native")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(loss(), loss("torch"))


@needs_compiler
@pytest.mark.parametrize("where", ["write_bytes", "write_text"], ids=["loading", "compiling"])
def test_a_full_disk_is_done_without(where, fresh, monkeypatch):
    if where == "write_bytes":
        monkeypatch.setattr(native_build, "_compile", lambda *_: b"")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, where, full)
    with pytest.raises(ValueError, match=r"cannot be built or loaded \(OSError: .*No space left.*use backend='torch'"):
        loss("native")
    with pytest.warns(RuntimeWarning, match="the slower torch row is used"):
        assert torch.equal(loss(), loss("torch"))


def test_a_full_cache_folder_is_not_the_end(compiled, monkeypatch):
    expected = loss("native")
    native_build.load.cache_clear()
    real = tempfile.TemporaryDirectory

    def full(*, prefix: str, dir: Path | None = None) -> tempfile.TemporaryDirectory[str]:
        if dir is not None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(prefix=prefix)

    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    assert torch.equal(loss("native"), expected) and compiled == [1]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def overwrite(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1000:9000] = bytes(8000)
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def shell_script(path: Path) -> None:
    path.write_text("#!/bin/sh\n")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [truncate, overwrite, empty, shell_script, folder])
def test_a_damaged_library_is_compiled_again(damage, compiled, tmp_path):
    expected = loss("native")
    (path,) = (tmp_path / "cache").glob("kd_row-*")
    for times in (2, 2) if damage is not folder else (2, 3):  # in a folder's place nothing is kept
        if len(compiled) == 1:
            damage(path)
        native_build.load.cache_clear()
        assert torch.equal(loss("native"), expected) and len(compiled) == times
    assert [x.name for x in path.parent.iterdir()] == [path.name]


def test_a_library_without_our_functions_is_compiled_again(compiled, monkeypatch, tmp_path):
    """Whole as it was kept: what a compiler of the same name and version once made."""
    (tmp_path / "other.c").write_text("int other;")
    command = [*native_build.find_compiler(), "-shared", "-o", tmp_path / "other.so", tmp_path / "other.c"]
    subprocess.run(command, check=True)
    monkeypatch.setattr(native_build, "kept", lambda *_: (tmp_path / "other.so").read_bytes())
    assert loss("native") > 0 and compiled == [1]


# ---- whom the cache believes


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


def test_an_entry_nested_too_deeply_is_damaged(tmp_path):
    path = entry(tmp_path)
    path.write_bytes(b"[" * 200_000 + b"\ndata")
    assert build_cache.kept(path, "key") is None


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


def test_a_planted_library_is_not_loaded(compiled, monkeypatch, tmp_path):
    """By another user, in a folder like /tmp, under the name that is looked for."""
    expected = loss("native")
    (path,) = (tmp_path / "cache").glob("kd_row-*")
    path.parent.chmod(0o1777)
    planted, trusted = path.stat().st_ino, build_cache._trusted_owner
    monkeypatch.setattr(build_cache, "_trusted_owner", lambda found: found.st_ino != planted and trusted(found))
    native_build.load.cache_clear()
    assert torch.equal(loss("native"), expected) and compiled == [1, 1]


def test_no_home_no_cache(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert build_cache.cache_folder() is None and not list(tmp_path.iterdir())
