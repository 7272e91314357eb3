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
from typing import Any

import torch

from .build_cache import CACHE_VARIABLE as CACHE_VARIABLE
from .build_cache import cache_folder
from .expressions import c_table

SOURCE = Path(__file__).resolve().parents[1] / "_csrc" / "kd_row.c"
FLAGS = ["-std=c11", "-O3", "-fPIC", "-shared", "-fopenmp-simd"]
# Vector loops need the absence of traps and errno, not of NaN or infinities; a*b + c may become one instruction.
FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
MACHINE_FLAG = "-march=native" if platform.machine() in ("x86_64", "i686") else "-mcpu=native"
INSTEAD = "or use backend='torch'"


class NativeRowError(ValueError):
    """The native row cannot run here; the message says why and what to do."""


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled library, from the cache where a process has compiled it before.

    Raises:
        NativeRowError: where platform or compiler do not fit or the compiler fails.
    """
    compiler = find_compiler()
    header = c_table()
    source = "".join(path.read_text() for path in [SOURCE, *sorted(SOURCE.parent.glob("*.h"))])
    flags = [*FLAGS, MACHINE_FLAG]
    key = "\0".join([header, source, *compiler, *flags, _version(compiler), _processor(), *platform.libc_ver()])
    name = f"kd_row-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    folder = cache_folder()
    if folder is not None:
        library = folder / name
        if not library.exists():
            _compile(compiler, flags, header, folder, library)
        return _open(library)
    # Nobody else's folder: code that others could replace must not be loaded.
    with tempfile.TemporaryDirectory(prefix="fused_kd-") as private:
        library = Path(private) / name
        _compile(compiler, flags, header, library.parent, library)
        return _open(library)


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
        if result.returncode != 0 or not output.exists():
            message = (result.stderr or result.stdout).strip()
            raise NativeRowError(f"backend='native' failed to compile ({shlex.join(command)}): {message} -- {INSTEAD}")
        output.replace(library)  # whole or not at all, whoever else compiles the same


def _open(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NativeRowError(f"backend='native' cannot load {library} ({error}); delete it {INSTEAD}") from error


def _version(compiler: list[str]) -> str:
    try:
        return subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise NativeRowError(
            f"backend='native' cannot run {shlex.join(compiler)!r} ({error}); fix CC {INSTEAD}"
        ) from error


def _processor() -> str:
    """What ``native`` depends on: folders may be shared by machines that differ."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({platform.machine(), *(line for line in lines if line.startswith(wanted))}))


@functools.cache
def thread_pool() -> Any:
    """``GOMP_parallel`` of the OpenMP runtime that PyTorch runs on; every OpenMP runtime for Linux has it.

    Through it the row shares PyTorch's threads, whichever runtime the C compiler would have linked: a second pool
    would fight with the first over the cores.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        entry = ctypes.CDLL(str(library)).GOMP_parallel  # looked up in what libtorch_cpu.so is linked with
    except (OSError, AttributeError):
        raise NativeRowError(
            f"backend='native' needs a PyTorch with OpenMP, which {library} is not; use backend='torch'"
        ) from None
    entry.restype = None
    return entry
