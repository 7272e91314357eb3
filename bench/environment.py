"""Where and of what a measurement was made: hardware, versions, digests of code."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.torch_version import TorchVersion

from fused_kd.info import processor

from .session import ROOT

PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "trl", "cut-cross-entropy", "fla-core")
# Everything that a number depends on; reports and command lines may change without voiding measurements.
MEASURED = ("counts", "end_to_end", "machine", "measure", "problems", "registry", "worker")
SOURCES = (
    *("fused_kd/*.py", "fused_kd/engines/**/*.py", "fused_kd/rows/**/*.py", "csrc/*"),
    *(f"bench/{name}.py" for name in MEASURED),
)
# What the results of a run on a GPU depend on besides.
GPU_SOURCES = ("bench/stages.py", "bench/gpu_tests.py", "tests/**/*.py")


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


def _smi(fields: str) -> str | None:
    lines = (_run("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader") or "").strip().splitlines()
    return lines[0].strip() if lines else None


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
