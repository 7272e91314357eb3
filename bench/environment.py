"""Where and of what a measurement was made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch
from torch.torch_version import TorchVersion

from fused_kd.info import processor

from .checkout import LIBRARY, digest
from .process import ROOT

PACKAGES = (
    "torch", "triton", "transformers", "pytest-benchmark", "liger-kernel", "trl", "cut-cross-entropy",
    "fla-core",
)  # fmt: skip
# Everything that a number depends on; reports and command lines may change without voiding measurements.
MEASURED = (
    "accuracy", "architectures", "bandwidth", "counts", "counts_streaming", "eager", "end_to_end", "floor", "fused",
    "implementation", "implementations", "inputs", "largest", "machine", "measure", "peers", "suite", "tally", "trial",
    "worker",
)  # fmt: skip
SOURCES = (*LIBRARY, *(f"bench/{name}.py" for name in MEASURED))
# What the results of a run on a GPU depend on besides.
GPU_SOURCES = ("bench/stages.py", "bench/stage_tools.py", "tests/**/*.py")


def hardware(device: str) -> dict:
    """Names and sizes of the processor, and of the GPU for ``device="cuda"``."""
    found: dict = {
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
            "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "clocks_and_power": _first_line(
                "nvidia-smi", "--query-gpu=clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader"
            ),
        }
    return found


def smi() -> str | None:
    """Clocks, temperature, power and memory in use of the GPUs at this moment; None without nvidia-smi."""
    fields = "clocks.sm,clocks.mem,temperature.gpu,power.draw,memory.used,clocks_throttle_reasons.active"
    return _first_line("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")


def unsupported() -> str | None:
    """Why nothing of a GPU can be measured here, in one line, or None."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "no NVIDIA GPU is available to torch"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"needs an NVIDIA GPU of sm_80 or later, found {torch.cuda.get_device_name()}"
    if torch.__version__ < TorchVersion("2.8"):
        return f"needs torch >= 2.8, found {torch.__version__}"
    return None


def machine(found: dict) -> str:
    """A folder's name for this hardware."""
    name = found.get("gpu") or f"{found['cpu']} {found['usable_cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def results_folder(found: dict, quick: bool) -> Path:
    """Where a suite writes by default: results worth keeping under bench/, trials where git does not look."""
    return ROOT / "build" / "bench" if quick else ROOT / "bench" / "results" / machine(found)


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
    return {
        "commit": _first_line("git", "rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes.strip()),
        "digest": digest(ROOT, (*SOURCES, *more)),
    }


def _first_line(*command: str) -> str | None:
    lines = (_run(*command) or "").strip().splitlines()
    return lines[0].strip() if lines else None


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
