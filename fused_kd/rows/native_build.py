"""Compiles ``csrc/kd_row.c`` for this machine at first use and keeps the library for later processes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch  # brings its OpenMP runtime into the process

from .expressions import c_table

CACHE_VARIABLE = "FUSED_KD_CACHE"
SOURCE = Path(__file__).resolve().parents[1] / "_csrc" / "kd_row.c"
# Vector loops need the absence of traps and errno, not of NaN or infinities; a*b + c may become one instruction.
FLAGS = "-std=c11 -O3 -fopenmp-simd -ffp-contract=fast -fno-math-errno -fno-trapping-math -fPIC -shared".split()
INSTEAD = "or use backend='torch'"


class NativeRowError(ValueError):
    """The native row cannot run here; the message says why and what to do."""


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled library, from the cache where a process has compiled it before.

    Raises:
        NativeRowError: where platform or compiler are missing or the compiler fails.
    """
    compiler = find_compiler()
    header, source = c_table(), SOURCE.read_text()
    flags = [*FLAGS, "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"]
    key = "\0".join([header, source, *compiler, *flags, _version(compiler), _processor(), *platform.libc_ver()])
    name = f"kd_row-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    folder = _cache_folder()
    if folder is not None:
        library = folder / name
        if not library.exists():
            _compile(compiler, flags, header, folder, library)
        return ctypes.CDLL(str(library))
    # Nobody else's folder: code that others could replace must not be loaded.
    with tempfile.TemporaryDirectory(prefix="fused_kd-") as private:
        library = Path(private) / name
        _compile(compiler, flags, header, library.parent, library)
        return ctypes.CDLL(str(library))


def find_compiler() -> list[str]:
    """The compiler's command line: ``$CC``, else cc, gcc or clang, whichever is found first."""
    if sys.platform != "linux":
        raise NativeRowError(f"backend='native' runs on Linux only, not on {sys.platform}; use backend='torch'")
    chosen = shlex.split(os.environ.get("CC", ""))
    if chosen:
        if shutil.which(chosen[0]) is None:
            raise NativeRowError(
                f"backend='native' needs a C compiler, but CC={chosen[0]!r} is not found; unset CC {INSTEAD}"
            )
        return chosen
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise NativeRowError(f"backend='native' needs a C compiler; install gcc or clang, set CC, {INSTEAD}")


def _compile(compiler: list[str], flags: list[str], header: str, folder: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as build:
        table, output = Path(build) / "table.h", Path(build) / library.name
        table.write_text(header)
        command = [*compiler, *flags, "-include", str(table), str(SOURCE), "-o", str(output), "-lm"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            message = (result.stderr or result.stdout).strip()
            raise NativeRowError(f"backend='native' failed to compile ({shlex.join(command)}): {message} -- {INSTEAD}")
        output.replace(library)  # whole or not at all, whoever else compiles the same


def _cache_folder() -> Path | None:
    """A writable folder that outlives the process, or None."""
    chosen = os.environ.get(CACHE_VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(chosen) if chosen else Path(base) / "fused_kd"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


def _version(compiler: list[str]) -> str:
    try:
        return subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise NativeRowError(f"backend='native' cannot run {shlex.join(compiler)!r} ({error}); fix CC {INSTEAD}") from error


def _processor() -> str:
    """What ``native`` depends on: folders may be shared by machines that differ."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({platform.machine(), *(line for line in lines if line.startswith(wanted))}))


@functools.cache
def thread_pool() -> ctypes._FuncPointer | None:
    """``GOMP_parallel`` of the OpenMP runtime that PyTorch runs on, or None where that has none.

    Every OpenMP runtime exports it. Through it the row shares PyTorch's threads, whichever runtime the C compiler
    would have linked; a second pool would fight with the first over the cores.
    """
    if not torch.backends.openmp.is_available():
        return None
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if os.path.basename(path).startswith(("libgomp", "libiomp5", "libomp")):
            entry = ctypes.CDLL(path).GOMP_parallel
            entry.restype = None
            return entry
    return None
