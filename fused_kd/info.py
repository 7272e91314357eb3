"""What fused_kd can do on this machine, and what its planner chooses: ``python -m fused_kd.info``.

``--shape N H_S H_T V`` adds the plan of a call with hidden states (N, H_S) of the student, (N, H_T) of the teacher and
a vocabulary of V; ``--json`` prints the same as JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .engines.dispatch import ENGINES, choose_engine
from .engines.gemm import cpu_product
from .forecast import Choice, plan_for
from .inputs import FLOAT_DTYPES
from .objectives import OBJECTIVES, SelfEvolution, parse
from .rows.build_cache import cache_folder
from .rows.cuda import build as cuda_build
from .rows.native import build as native_build
from .rows.select import BACKENDS, choose_backend

PACKAGES = ("triton", "transformers", "cuda-core", "accelerate", "trl", "peft", "deepspeed")
DTYPES = dict(zip(("fp32", "bf16", "fp16"), FLOAT_DTYPES, strict=True))
DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
WIDTH = 110


def versions() -> dict[str, str | None]:
    """Versions of fused_kd, Python, the system, the packages it can use, and CUDA; None where absent."""
    return {
        "fused_kd": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "torch": torch.__version__,
        **{package: _version(package) for package in PACKAGES},
        "CUDA of torch": torch.version.cuda,
        "ROCm of torch": torch.version.hip,
        "NVRTC": _nvrtc(),
        "NVIDIA driver": _driver(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvrtc() -> str | None:
    try:
        return ".".join(map(str, cuda_build._nvrtc_version()))
    except ValueError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0] if found else None


def devices() -> dict[str, str]:
    """Devices by their PyTorch names, in words."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"cpu": f"{processor()}, {cores} usable cores, {torch.get_num_threads()} threads of PyTorch"}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        architecture = f"sm_{gpu.major}{gpu.minor}" if torch.version.hip is None else "ROCm"
        found[f"cuda:{index}"] = f"{gpu.name}, {architecture}, {_bytes(gpu.total_memory)}"
    return found


def processor() -> str:
    """The CPU's name, as far as the system tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def backends() -> dict[str, tuple[bool, str]]:
    """Of each backend and engine: whether it runs here, and what it runs on, or why not and what to install.

    Compiles the native row where no process has done so before.
    """
    return {name: _tried(check) for name, check in _CHECKS.items()}


def _native() -> str:
    compiler = native_build.find_compiler()
    native_build.thread_pool()
    native_build.load()
    return f"on CPUs; compiled by {shlex.join(compiler)} into {cache_folder() or 'memory'}"


def _triton() -> str:
    choose_backend("triton", _best_device())
    return "on GPUs" if torch.cuda.is_available() else "on the CPU in Triton's interpreter, for tests"


def _cuda() -> str:
    cuda_build.require()
    choose_backend("cuda", _best_device())
    cuda_build.device(_best_device())
    return f"on NVIDIA GPUs; compiled by NVRTC {_nvrtc()} into {cache_folder() or 'memory'}"


def _streaming() -> str:
    choose_engine("streaming", None, SelfEvolution().spec, 0.0, _best_device())
    return _triton()


def _cpu_bf16() -> str:
    found = cpu_product()
    if found is None:
        raise ValueError(
            "bf16 operands are made fp32 a slab at a time, so fp32 is the faster choice; products of bf16 with fp32 "
            "results need a processor with AMX, or with AVX512-BF16 and a C compiler"
        )
    return f"products with fp32 results: {'MKL, AMX' if found == 'mkl' else 'the native library, AVX512-BF16'}"


_CHECKS: dict[str, Callable[[], str]] = {
    "backend torch": lambda: "any device",
    "backend triton": _triton,
    "backend cuda": _cuda,
    "backend native": _native,
    "engine chunked": lambda: "wherever a backend runs",
    "engine streaming": _streaming,
    "bf16 on CPUs": _cpu_bf16,
}


def _tried(check: Callable[[], str]) -> tuple[bool, str]:
    try:
        return True, check()
    except ValueError as error:
        text = str(error)
    if "package triton" in text:
        text += "; pip install 'fused_kd[triton]' to have it"
    if check not in (_native, _cpu_bf16) and not torch.cuda.is_available():
        kinds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
        built = next((f"{kind} {version}" for kind, version in kinds.items() if version), "CPUs alone")
        text += f"; this PyTorch ({torch.__version__}, built for {built}) finds no GPU"
    return False, text


def _best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _bytes(size: int) -> str:
    unit, scale = next((u for u in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if size >= u[1]), ("bytes", 1))
    return f"{size / scale:.3g} {unit}"


def collect(plan: Choice | None = None) -> dict[str, Any]:
    """Everything that is printed, in types of JSON."""
    found: dict[str, Any] = {
        "versions": versions(),
        "available": {name: {"available": yes, "details": text} for name, (yes, text) in backends().items()},
        "cache": None if (folder := cache_folder()) is None else str(folder),
        "devices": devices(),
    }
    return found if plan is None else found | {"plan": plan._asdict()}


def text(found: Mapping[str, Any]) -> str:
    """What :func:`collect` returns as aligned lines."""
    kept = found["cache"] or "nowhere: no folder can be written to, so each process compiles again"
    sections = {
        "versions": {name: version or "-" for name, version in found["versions"].items()},
        "what runs here": {
            name: f"{'yes' if x['available'] else 'no '}  {x['details']}" for name, x in found["available"].items()
        },
        "compiled rows": {"kept in": f"{kept} (set FUSED_KD_CACHE to choose)"},
        "devices": found["devices"],
    }
    if "plan" in found:
        sections["plan"] = _plan_lines(found["plan"])
    return "\n\n".join(f"{title}\n{_aligned(lines)}" for title, lines in sections.items())


def _plan_lines(plan: Mapping[str, Any]) -> dict[str, str]:
    group = plan["group"]
    together = "" if group in (None, plan["chunk"]) else f"; those of {group} share the gradients' GEMMs"
    size = {key: f"{plan[key]} bytes ({_bytes(plan[key])})" for key in ("workspace", "gradients", "eager_logits")}
    return {
        "call": f"{plan['objective']}, {plan['dtype']} on {plan['device']}",
        "engine": f"{plan['engine']}, backend {plan['backend']}",
        "chunk": f"{plan['chunk']} tokens, {plan['chunks']} of them{together}",
        "workspace": f"{size['workspace']} beyond inputs and gradients",
        "gradients": f"{size['gradients']} of hidden states and weight",
        "FLOPs": f"{plan['flops']:.4g} in {plan['gemms']} GEMMs, forward and backward",
        "eager": f"{size['eager_logits']} of N x V logits in plain PyTorch, "
        "before any softmax, mixture or gradient of them",
        **{f"note {i}": note for i, note in enumerate(plan["notes"], 1)},
    }


def _aligned(lines: Mapping[str, str]) -> str:
    margin = 2 + max(map(len, lines)) + 2
    wrap = textwrap.TextWrapper(WIDTH, break_long_words=False, break_on_hyphens=False, subsequent_indent=" " * margin)
    return "\n".join(wrap.fill(f"  {name}".ljust(margin) + value) for name, value in lines.items())


def _size(value: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip())
    units = {unit.lower(): factor for unit, factor in UNITS.items()} | {"": 1}
    if found is None or found[2].lower() not in units or not float(found[1]):
        raise argparse.ArgumentTypeError(f"must be bytes, or a number with {', '.join(UNITS)}, got {value!r}")
    return int(float(found[1]) * units[found[2].lower()])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m fused_kd.info", allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument(
        "--shape", nargs=4, type=int, metavar=("N", "H_S", "H_T", "V"), help="tokens, hidden sizes, vocabulary"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of hidden states and weights (default fp32)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    known = f"name:key=value,... or a sum of multiples, of {', '.join(OBJECTIVES)} (default self_evolution)"
    parser.add_argument("--objective", default="self_evolution", metavar="TEXT", help=known)
    parser.add_argument("--memory-budget", type=_size, help="of workspace, as 2GiB, 500MB or bytes")
    parser.add_argument("--top-k", type=int, metavar="K", help="the teacher is a list of K entries a token")
    parser.add_argument("--engine", choices=ENGINES, help="(default: the planner's choice)")
    parser.add_argument("--backend", choices=BACKENDS, help="(default: the best one)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 2 with one line on stderr for a call that cannot be planned."""
    parser = _parser()
    asked = vars(parser.parse_args(arguments))
    shape, as_json = asked.pop("shape"), asked.pop("json")
    plan = None
    if shape is not None:
        asked["dtype"] = DTYPES[asked["dtype"]]
        asked["device"] = asked["device"] or _best_device().type
        try:
            asked["objective"] = parse(asked["objective"])
            plan = plan_for(*shape, **asked)
        except ValueError as error:
            parser.error(str(error))
    elif any(value != parser.get_default(name) for name, value in asked.items()):
        parser.error("--shape must be the four integers N H_S H_T V where a plan's options are given, got none")
    found = collect(plan)
    print(json.dumps(found, indent=2) if as_json else text(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
