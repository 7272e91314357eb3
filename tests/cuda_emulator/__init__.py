"""The CUDA kernels on a CPU: the same sources, compiled by a C++ compiler against primitives.h.

:func:`emulated` makes ``backend="cuda"`` take CPU tensors and run there.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fused_kd.rows.cuda import build as cuda_build
from fused_kd.rows.cuda.launch import Device, Launch
from fused_kd.rows.expressions import c_header

HERE = Path(__file__).resolve().parent
WARP = 4
# Two blocks of two warps share a row of which a third does not fit.
SMALL = Device(2, 4096, 8192, WARP, (8, 8, 8))
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-march=native"]

compiler = shutil.which("g++") or shutil.which("clang++")
needs_cpp_compiler = pytest.mark.skipif(compiler is None, reason="needs g++ or clang++")


class _Macros(ctypes.Structure):
    NAMES = (
        "threads", "width", "vector", "shaped", "student", "teacher", "dlogits", "listed", "cold", "whole", "excludes",
        "terms", "main", *(f"term_{i}" for i in range(8)),
    )  # fmt: skip
    _fields_ = tuple((name, ctypes.c_int32) for name in NAMES)


class _Grid(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("clusters", "cluster_size", "threads", "shared_bytes", "ranges")),
        *((name, ctypes.c_void_p) for name in ("begins", "ends", "writable")),
    )


def build(csrc: Path = cuda_build.FOLDER, folder: Path | None = None, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The emulated kernels of csrc/ or a copy of it, kept in ``folder`` for other processes."""
    assert compiler is not None
    sources = [*sorted(csrc.glob("*.h")), *sorted(csrc.glob("*.cu")), *sorted(HERE.iterdir())]
    key = [c_header(), *FLAGS, *flags, *(path.read_text() for path in sources if path.is_file())]
    folder = folder or Path(tempfile.gettempdir(), f"fused_kd-emulator-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"emulator-{hashlib.sha256(chr(0).join(key).encode()).hexdigest()[:24]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            table, output = Path(scratch, "table.h"), Path(scratch, "out.so")
            table.write_text(c_header())
            command = [compiler, *FLAGS, *flags, "-include", str(table), '-DFKD_PRIMITIVES="primitives.h"']
            command += [f"-I{csrc}", f"-I{HERE}", str(HERE / "emulator.cpp"), "-o", str(output)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
            output.replace(library)
    return ctypes.CDLL(str(library))


_library = functools.cache(build)


class Fault(AssertionError):
    """What the emulator found: a race, an access out of bounds or misaligned, a barrier not reached by all."""


def run(call: Launch, clusters: int = 2, library: ctypes.CDLL | None = None) -> None:
    """Launch on the CPU. Raises :class:`Fault`."""
    function = getattr(library or _library(), "emulate_" + call.kernel.removeprefix("fkd_"))
    function.restype = ctypes.c_char_p
    given = {name.removeprefix("FKD_").lower(): value for name, value in call.macros}
    macros = _Macros(**{name: given.get(name, 0) for name in _Macros.NAMES})
    ranges = sorted(r for x in call.arguments.values() if isinstance(x, Tensor) for r in _ranges(x))
    begins = (ctypes.c_uint64 * len(ranges))(*(r[0] for r in ranges))
    ends = (ctypes.c_uint64 * len(ranges))(*(r[1] for r in ranges))
    writable = (ctypes.c_uint8 * len(ranges))(*[1] * len(ranges))
    cut = call.cut
    grid = _Grid(
        min(clusters, call.rows), cut.cluster, cut.threads, cut.shared_bytes, len(ranges),
        *(ctypes.cast(x, ctypes.c_void_p) for x in (begins, ends, writable)),
    )  # fmt: skip
    values = [ctypes.c_void_p(x) if isinstance(x, int) else x for x in call.typed()]
    arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(x) for x in values))
    fault = function(ctypes.byref(grid), ctypes.byref(macros), arguments)
    if fault:
        raise Fault(fault.decode())


def _ranges(x: Tensor) -> set[tuple[int, int]]:
    """The bytes of each row."""
    size = x.element_size()
    if x.numel() == 0:
        return set()
    rows = [x] if x.dim() < 2 else list(x)
    return {(row.data_ptr(), row.data_ptr() + size * row.numel()) for row in rows}


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """``backend="cuda"`` on CPU tensors. Yields a function that changes the emulated device."""
    limits = {"device": SMALL, "clusters": 2}
    monkeypatch.setattr(cuda_build, "require", lambda: None)
    monkeypatch.setattr(cuda_build, "device", lambda which: limits["device"])
    monkeypatch.setattr(cuda_build, "launch", lambda where, call: run(call, limits["clusters"]))
    monkeypatch.setattr("fused_kd.rows.select.on_nvidia", lambda device: True)
    monkeypatch.setattr("fused_kd.rows.select.installed", lambda package: True)
    yield limits.update


__all__ = ["SMALL", "Device", "Fault", "build", "emulated", "needs_cpp_compiler", "run"]
