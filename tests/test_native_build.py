"""The native row's build: what is reused, what is compiled again, what is done without."""

from __future__ import annotations

import errno
import functools
import os
import re
import shlex
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


def compiler(folder: Path, script: str) -> Path:
    """A compiler that is a shell script."""
    path = folder / "some-cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


# Each use in a child, where nothing of the row is loaded yet; one import of torch does for all.
USES = """
import os, pathlib, sys, torch, fused_kd as fk

def use(cache):
    if child := os.fork():
        return child
    os.environ["FUSED_KD_CACHE"] = str(cache)
    z = torch.eye(3)
    print(float(fk.kd_loss(z, z.flip(0), torch.arange(3), fk.Skew(), backend="native").loss), flush=True)
    os._exit(0)

def wait(*children):
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)

folder = pathlib.Path(sys.argv[1])
cache = folder / "not" / "there yet"
wait(use(cache), use(cache))
built = [(path, path.stat().st_mtime_ns) for path in cache.iterdir()]
wait(use(cache))
assert built == [(path, path.stat().st_mtime_ns) for path in cache.iterdir()] and len(built) == 1
assert cache.stat().st_mode & 0o077 == 0
wait(use(folder / "file" / "cache"))
"""


@needs_compiler
def test_processes_race_to_one_library_later_ones_reuse_it_and_no_cache_is_done_without(tmp_path):
    (tmp_path / "file").touch()
    fast = compiler(tmp_path, f'exec {shlex.join(native_build.find_compiler())} "$@" -O0')
    environment = os.environ | {"CC": str(fast), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", USES, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = done.stdout.split()
    assert len(losses) == 4 and len(set(losses)) == 1 and float(losses[0]) > 0
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", "not", fast.name}


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has not used the native row yet, with its own cache."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    caches = (native_build.load, native_build.thread_pool, select.native_works)
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


FAILS = '[ "$1" = --version ] || { echo out of registers >&2; exit 1; }'


@needs_linux
def test_what_is_missing_is_named_and_never_replaced(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-cc -m64")
    with pytest.raises(ValueError, match="needs a C compiler, but CC='no-such-cc' is not found"):
        loss("native")
    monkeypatch.setenv("CC", str(compiler(tmp_path, FAILS)))
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
    select.native_works.cache_clear()
    monkeypatch.setenv("CC", str(compiler(tmp_path, FAILS)))
    with pytest.warns(RuntimeWarning, match="the slower torch row is used: .*out of registers"):
        assert torch.equal(loss(), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(loss(), expected)


@needs_linux
@pytest.mark.parametrize("wrapper", ["sleep 100", "sleep 100 & wait"], ids=["itself", "what it has started"])
def test_a_compiler_that_hangs_is_ended(wrapper, fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(compiler(tmp_path, wrapper)))
    monkeypatch.setattr(native_build, "VERSION_SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(
        ValueError, match=r"some-cc --version did not end in 0.2 seconds; fix CC or use backend='torch'"
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


@pytest.mark.parametrize("damage", ["cut short", "a folder"])
def test_a_damaged_library_is_compiled_again(damage, compiled, tmp_path):
    expected = loss("native")
    (path,) = (tmp_path / "cache").glob("kd_row-*")
    whole = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    else:
        path.write_bytes(whole[:-5000])
    for times in (2, 2) if damage != "a folder" else (2, 3):  # in a folder's place nothing is kept
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


def test_a_planted_library_is_not_loaded(compiled, monkeypatch, tmp_path):
    """By another user, in a folder like /tmp, under the name that is looked for."""
    expected = loss("native")
    (path,) = (tmp_path / "cache").glob("kd_row-*")
    path.parent.chmod(0o1777)
    planted, trusted = path.stat().st_ino, build_cache._trusted_owner
    monkeypatch.setattr(build_cache, "_trusted_owner", lambda found: found.st_ino != planted and trusted(found))
    native_build.load.cache_clear()
    assert torch.equal(loss("native"), expected) and compiled == [1, 1]
