"""Compiles ``csrc/kd_row.c`` for this machine at first use and keeps the library for later processes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..build_cache import cache_folder, keep, kept
from ..expressions import c_header

SOURCE = Path(__file__).resolve().parents[2] / "_csrc" / "kd_row.c"
FLAGS = ["-std=c11", "-O3", "-fPIC", "-shared", "-fopenmp-simd"]
# Vector loops need the absence of traps and errno, not of NaN or infinities; a*b + c may become one instruction.
FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
MACHINE_FLAG = "-march=native" if platform.machine() in ("x86_64", "i686") else "-mcpu=native"
INSTEAD = "or use backend='torch'"
# Some 3 seconds are usual; a machine may be busy, a wrapper may ask a server that does not answer.
COMPILE_SECONDS, VERSION_SECONDS = 300.0, 60.0


class NativeRowError(ValueError):
    """The native row cannot run here; the message says why and what to do."""


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled library, from the cache where a process has compiled it before.

    Raises:
        NativeRowError: where platform or compiler do not fit or the compiler fails.
    """
    compiler = find_compiler()
    try:
        header = c_header()
        source = "".join(path.read_text() for path in [SOURCE, *sorted(SOURCE.parent.glob("*.h"))])
        flags = [*FLAGS, MACHINE_FLAG]
        version = _version(compiler)
        key = "\0".join([header, source, *compiler, *flags, version, _processor(), *platform.libc_ver()])
        folder = cache_folder()
        path = None if folder is None else folder / f"kd_row-{hashlib.sha256(key.encode()).hexdigest()[:24]}.library"
        code = None if path is None else kept(path, key)
        if code is not None:
            with contextlib.suppress(OSError, AttributeError):
                return _opened(code, folder)
        code = _compile(compiler, flags, header)
        library = _opened(code, folder)
        if path is not None:
            keep(path, key, code, {"compiler": version.partition("\n")[0]})
        return library
    except (OSError, AttributeError) as error:
        raise NativeRowError(
            f"backend='native' cannot be built or loaded ({type(error).__name__}: {error}); see whether there is room "
            f"in {os.environ.get('TMPDIR', '/tmp')} {INSTEAD}"
        ) from error


def find_compiler() -> list[str]:
    """The compiler's command line: ``$CC``, else cc, gcc or clang, whichever is found first."""
    if sys.platform != "linux":
        raise NativeRowError(f"backend='native' runs on Linux only, not on {sys.platform}; use backend='torch'")
    try:
        chosen = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise NativeRowError(
            f"backend='native' cannot read CC={os.environ['CC']!r} ({error}); fix CC {INSTEAD}"
        ) from None
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


def _compile(compiler: list[str], flags: list[str], header: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="fused_kd-") as build:
        table, output = Path(build) / "table.h", Path(build) / "kd_row.so"
        table.write_text(header)
        command = [*compiler, *flags, "-include", str(table), str(SOURCE), "-o", str(output), "-lm"]
        status, printed = _run(command, COMPILE_SECONDS)
        if status != 0 or not output.exists():
            raise NativeRowError(
                f"backend='native' failed to compile ({shlex.join(command)}): {printed.strip()} -- {INSTEAD}"
            )
        return output.read_bytes()


def _opened(code: bytes, folder: Path | None) -> ctypes.CDLL:
    """The library from a file of this process alone, which nobody can change or cut short under it."""
    try:
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as private:
            path = Path(private) / "kd_row.so"
            path.write_bytes(code)
            library = ctypes.CDLL(str(path))
    except OSError:
        if folder is None:
            raise
        return _opened(code, None)
    library.fkd_scratch.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int)
    library.fkd_scratch.restype = ctypes.c_int64
    library.fkd_row.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)
    library.fkd_row.restype = None
    library.fkd_largest_scratch.argtypes = (ctypes.c_int64,)
    library.fkd_largest_scratch.restype = ctypes.c_int64
    library.fkd_largest.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)
    library.fkd_largest.restype = None
    library.fkd_add.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)
    library.fkd_add.restype = None
    library.fkd_has_gemm.argtypes = ()
    library.fkd_has_gemm.restype = ctypes.c_int
    library.fkd_gemm.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)
    library.fkd_gemm.restype = None
    return library


def _version(compiler: list[str]) -> str:
    status, printed = _run([*compiler, "--version"], VERSION_SECONDS)
    if status != 0:
        raise NativeRowError(
            f"backend='native' cannot run {shlex.join(compiler)!r} (exit status {status}); fix CC {INSTEAD}"
        )
    return printed


def _run(command: list[str], seconds: float) -> tuple[int, str]:
    """Exit status and output. A compiler is ended with all that it has started when its time is over."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise NativeRowError(
            f"backend='native' cannot run {shlex.join(command)!r} ({error}); fix CC {INSTEAD}"
        ) from error
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise NativeRowError(
            f"backend='native': {shlex.join(command)} did not end in {seconds:g} seconds; fix CC {INSTEAD}"
        ) from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode, printed


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
