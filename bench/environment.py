"""Where and of what a measurement was made: hardware, versions, digests of code, another checkout to compare with."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.torch_version import TorchVersion

from fused_kd.info import processor

from .session import ROOT

PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "trl", "cut-cross-entropy", "fla-core")
LIBRARY = ("fused_kd/*.py", "fused_kd/engines/**/*.py", "fused_kd/rows/**/*.py", "csrc/*")
# Everything that a number depends on; reports and command lines may change without voiding measurements.
MEASURED = ("counts", "end_to_end", "machine", "measure", "problems", "registry", "worker")
SOURCES = (*LIBRARY, *(f"bench/{name}.py" for name in MEASURED))
# What the results of a run on a GPU depend on besides.
GPU_SOURCES = ("bench/stages.py", "bench/gpu_tests.py", "tests/**/*.py")
IMPORT_SECONDS = 60.0
# An editable installation would lend the modules that a checkout lacks.
_TRY = """
import sys
import bench  # this one, and then the other fused_kd
sys.path.insert(0, sys.argv[1])
import bench.stages
for name, module in sorted(sys.modules.items()):
    if name.split(".")[0] == "fused_kd" and not (module.__file__ or "").startswith(sys.argv[1]):
        raise ImportError(f"no module named {name!r} in it")
"""


def hardware(device: str) -> dict[str, Any]:
    """Names and sizes of the processor, and of the GPU for ``device="cuda"``."""
    found: dict[str, Any] = {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": gpu.name,
            "gpu_memory": gpu.total_memory,
            "multiprocessors": gpu.multi_processor_count,
            "capability": f"{gpu.major}.{gpu.minor}",
            "driver": _smi("driver_version"),
            "clocks_and_power": _smi("clocks.max.sm,clocks.max.mem,power.limit"),
        }
    return found


def now() -> str | None:
    """Clocks, temperature, power and memory in use of the GPUs at this moment; None without nvidia-smi."""
    return _smi("clocks.sm,clocks.mem,temperature.gpu,power.draw,memory.used,clocks_throttle_reasons.active")


def unsupported() -> str | None:
    """Why nothing of a GPU can be measured here, in one line, or None."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "no NVIDIA GPU is available to torch"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"needs an NVIDIA GPU of sm_80 or later, found {torch.cuda.get_device_name()}"
    if torch.__version__ < TorchVersion("2.8"):
        return f"needs torch >= 2.8, found {torch.__version__}"
    return None


def machine_name(found: dict[str, Any]) -> str:
    """A folder's name for this hardware."""
    name = found.get("gpu") or f"{found['cpu']} {found['usable_cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def use_threads(threads: int | None) -> None:
    """Threads of PyTorch here and in processes started from here; None leaves PyTorch's own choice."""
    if threads is not None:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


def versions() -> dict[str, str | None]:
    """Versions of Python, CUDA and the packages; None where absent."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def source(*more: str) -> dict[str, str | bool | None]:
    """``commit``, whether tracked or new files differ from it (``dirty``), and a ``digest`` of the measured
    code and of the files that the patterns ``more`` find."""
    changes = _run("git", "status", "--porcelain")
    commit = (_run("git", "rev-parse", "HEAD") or "").strip()
    return {
        "commit": commit or None,
        "dirty": None if changes is None else bool(changes.strip()),
        "digest": digest(ROOT, (*SOURCES, *more)),
    }


def digest(root: Path, patterns: Iterable[str]) -> str:
    """Of the files that the patterns find, and of their names."""
    found = hashlib.sha256()
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            if path.is_file():
                found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


class Checkout(NamedTuple):
    """``name``: a commit's first digits, or the digest of a folder's library."""

    name: str
    folder: Path


def checkout(what: str, out: Path) -> Checkout:
    """A folder as it is; a commit of this repository unpacked into ``out/against/<commit>``.

    Raises:
        ValueError: where it is neither, or this bench cannot import what it needs from it; in one line.
    """
    if Path(what).is_dir():
        folder = Path(what).resolve()
        found = Checkout(digest(folder, LIBRARY), folder)
    else:
        commit = (_run("git", "rev-parse", "--verify", "--quiet", f"{what}^{{commit}}") or "").strip()[:12]
        if not commit:
            raise ValueError("no folder, and no commit of this repository")
        found = Checkout(commit, out / "against" / commit)
        found.folder.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", str(found.folder)], input=archive, check=True)
    if not (found.folder / "fused_kd" / "__init__.py").is_file():
        raise ValueError("it has no fused_kd")
    command = [sys.executable, "-c", _TRY, str(found.folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=IMPORT_SECONDS)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["?"])[-1]
        raise ValueError(f"it lacks what this bench imports: {last}")
    return found


def _smi(fields: str) -> str | None:
    lines = (_run("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader") or "").strip().splitlines()
    return lines[0].strip() if lines else None


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
