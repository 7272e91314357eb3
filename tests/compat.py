"""Compile and test with the releases that pyproject.toml promises, beside the ones that constraints.txt pins.

``python -m tests.compat``         all of this:
``python -m tests.compat triton``  every Triton kernel, for every GPU, by each minor release of Triton from the oldest
                                   promised to the newest there is; ``--oldest --fast`` is what .ci/run has time for
``python -m tests.compat nvrtc``   every CUDA kernel by the oldest NVRTC, cuda-core and cuda-bindings
``python -m tests.compat torch``   torch.compile, the loss and the interpreter's tests with the oldest torch, the one of
                                   today's GPU images, and the newest

Needs no GPU. What is downloaded stays in build/, and is not downloaded again. Exit code 1: something fails; the last
lines say what.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
TRITON_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
CUDA_TARGETS = ("sm_80", "sm_90a", "sm_100a")
# NVRTC's version, and what pip is asked for: the oldest of each extra that go together. cuda-bindings have their CUDA's
# major version.
NVRTCS = {
    "12.8": ("nvidia-cuda-nvrtc-cu12==12.8.61", "cuda-bindings==12.9.0", "cuda-core==1.0.1", "cuda-pathfinder"),
    "13.0": ("nvidia-cuda-nvrtc==13.0.48", "cuda-bindings==13.0.3", "cuda-core==1.0.1", "cuda-pathfinder"),
}
# Without CUDA builds' pins torch would get the newest triton; see tests/interpreter.py for numpy.
TORCHES = {
    "2.8.0": ("torch==2.8.0", "triton==3.4.0", "numpy<2.4"),
    "2.11.0": ("torch==2.11.0", "triton==3.6.0", "numpy<2.4"),
    "newest": ("torch", "triton", "numpy"),
}
TORCH_TESTS = (
    "loss/test_compile",
    "loss/test_loss",
    "engines/test_streaming",
    "kernels/test_triton",
    "kernels/test_rows",
)


class CompatError(RuntimeError):
    """Something could not be had."""


def oldest(package: str) -> str:
    """What pyproject.toml promises, as a version to install."""
    found = re.search(rf'"{package}>=([\d.]+)', (ROOT / "pyproject.toml").read_text())
    assert found is not None
    return found[1] + ".0" * (2 - found[1].count("."))


def key(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def tritons(had: list[str]) -> list[str]:
    """The last of each minor release from the oldest promised; those of ``had`` where pip has no answer."""
    done = subprocess.run([*pip(), "index", "versions", "triton"], capture_output=True, text=True)
    found = re.search(r"Available versions: (.*)", done.stdout)
    if found is None:
        print(f"pip cannot list triton's releases; only those in {BUILD / 'triton'} are checked", flush=True)
    versions = had if found is None else [v for v in found[1].split(", ") if re.fullmatch(r"[\d.]+", v)]
    first = oldest("triton")
    last = {key(v)[:2]: v for v in sorted(versions, key=key) if key(v) > key(first)}
    return list(({key(first)[:2]: first} | {k: v for k, v in last.items() if k > key(first)[:2]}).values())


def pip() -> list[str]:
    return [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def fetch(folder: Path, size: str, *requirements: str) -> Path:
    """A folder that has these packages alone, for PYTHONPATH."""
    if not folder.exists():
        print(f"downloading {' '.join(requirements)}, about {size}, into {folder}", flush=True)
        made = folder.with_name(folder.name + ".part")
        shutil.rmtree(made, ignore_errors=True)
        run([*pip(), "install", "--quiet", "--no-deps", "--target", str(made), *requirements])
        made.rename(folder)
    return folder


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        raise CompatError(f"exit code {done.returncode}: {' '.join(command)}")


def compiled(module: str, *arguments: str, says: dict[str, str], environment: dict[str, str]) -> tuple[int, list[str]]:
    """How many kernels a process of its own has compiled, and what failed; ``says``: what each line must hold."""
    surroundings = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True)
    kernels = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    failed = [f"{kernel['case']}: {last_line(kernel['error'])}" for kernel in kernels if "error" in kernel]
    if done.returncode or not kernels:
        failed.append(f"exit code {done.returncode}: {last_line(done.stderr)}")
    strange = {str(kernel.get(k)) for kernel in kernels for k, v in says.items() if kernel.get(k) != v}
    if strange:
        failed.append(f"meant {says}, got {strange}")
    spilled = [k["case"] for k in kernels if k.get("stack") or k.get("spills")]
    if spilled:
        print(f"{module} {' '.join(arguments)} {says}: compiles, but spills: {', '.join(spilled)}", flush=True)
    return len(kernels), failed


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


def linker(folder: Path) -> dict[str, str]:
    """Triton 3.4 has no ROCm linker of its own; where there is none, objects are left as they are assembled."""
    places = (os.environ.get("TRITON_HIP_LLD_PATH"), "/opt/rocm/llvm/bin/ld.lld", "/usr/bin/ld.lld")
    if any(place is not None and Path(place).is_file() for place in places):
        return {}
    script = folder / "leave_unlinked.sh"
    script.write_text(
        '#!/bin/sh\n# -flavor gnu -shared IN -o OUT\ncase $1 in --version) echo none;; *) cp "$4" "$6";; esac\n'
    )
    script.chmod(0o755)
    return {"TRITON_HIP_LLD_PATH": str(script)}


def check_triton(options: argparse.Namespace) -> list[str]:
    folder = BUILD / "triton"
    folder.mkdir(parents=True, exist_ok=True)
    had = [path.name for path in folder.iterdir() if re.fullmatch(r"[\d.]+", path.name)]
    versions = options.versions or ([oldest("triton")] if options.oldest else tritons(had))
    for version in versions:
        fetch(folder / version, "160-200 MB (0.6-1 GB unpacked)", f"triton=={version}")
    environment = {"TRITON_CACHE_DIR": str(folder / "cache")} | linker(folder)
    fast = ["--fast"] if options.fast else []
    jobs = {
        f"triton {version}, {target}": partial(
            compiled, "tests.compile_kernels", target, *fast, says={"triton": version, "target": target},
            environment=environment | {"PYTHONPATH": str(folder / version)},
        )
        for version in versions
        for target in options.targets or TRITON_TARGETS
    }  # fmt: skip
    return report(jobs)


def check_nvrtc(options: argparse.Namespace) -> list[str]:
    folder = BUILD / "nvrtc"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = {}
    for version in options.versions or NVRTCS:
        site = fetch(folder / version, "70-100 MB", *NVRTCS[version])
        (library,) = site.glob(f"nvidia/*/lib/libnvrtc.so.{version.split('.')[0]}")  # or the environment's is found
        environment = {
            "PYTHONPATH": str(site),
            "LD_PRELOAD": str(library),
            "LD_LIBRARY_PATH": str(library.parent),  # its own parts
            "FUSED_KD_CACHE": str(folder / "cache"),
        }
        for target in options.targets or CUDA_TARGETS:
            jobs[f"NVRTC {version}, {target}"] = partial(
                compiled, "tests.compile_cuda", target, says={"nvrtc": version, "target": target},
                environment=environment,
            )  # fmt: skip
    return report(jobs)


def report(jobs: dict[str, Callable[[], tuple[int, list[str]]]]) -> list[str]:
    """Run them, as many at a time as there are processors; print a line each, and return the failures."""
    failures = []
    with ThreadPoolExecutor(int(os.environ.get("WORKERS", os.cpu_count() or 1))) as pool:
        for name, future in {name: pool.submit(job) for name, job in jobs.items()}.items():
            count, failed = future.result()
            print(f"{name}: {count} kernels, {f'{len(failed)} FAILED' if failed else 'all compile'}", flush=True)
            failures += [f"{name}, {failure}" for failure in failed]
    return failures


def check_torch(options: argparse.Namespace) -> list[str]:
    folder = BUILD / "torch"
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    for name in options.versions or TORCHES:
        python = torch_environment(folder / name, TORCHES[name])
        versions = "import torch, triton, numpy; print(torch.__version__, triton.__version__, numpy.__version__)"
        print(f"torch {name}: torch, triton, numpy are", flush=True)
        run([python, "-c", versions])
        workers = ("-n", os.environ.get("WORKERS", "2"))
        suites = {
            "tests": [*workers, "--show-capture=no", *(f"tests/{test}.py" for test in TORCH_TESTS)],
            "collecting tests/test_gpu.py": ["--collect-only", "-qq", "-m", "gpu", "tests/test_gpu.py"],
        }
        for what, arguments in suites.items():
            command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *arguments]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            if subprocess.run(command, cwd=ROOT, env=environment).returncode:
                failures.append(f"torch {name}: {what} failed, see above")
    return failures


def torch_environment(folder: Path, requirements: tuple[str, ...]) -> str:
    """A virtual environment with what the tests need; its interpreter's path."""
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        print(
            f"downloading {' '.join(requirements)} and what they need, about 3 GB (6 GB unpacked; 0.5 GB where "
            f"PIP_EXTRA_INDEX_URL names an index with CPU builds), into {folder}",
            flush=True,
        )
        run([sys.executable, "-m", "venv", str(folder)])
        tools = ("setuptools", "pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100")
        run([str(python), "-m", "pip", "install", "--quiet", *requirements, *tools])
        ready.touch()
    return str(python)


CHECKS = {"triton": check_triton, "nvrtc": check_nvrtc, "torch": check_torch}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=CHECKS, help="instead of all three")
    parser.add_argument("versions", nargs="*", help="instead of all of them")
    parser.add_argument("--targets", nargs="+", help="instead of all of them")
    parser.add_argument("--oldest", action="store_true", help="of Triton: the oldest release alone")
    parser.add_argument("--fast", action="store_true", help="of Triton: every kernel and branch once")
    options = parser.parse_args()
    failures = []
    for what in [options.what] if options.what else CHECKS:
        try:
            failures += CHECKS[what](options)
        except CompatError as error:
            failures.append(str(error))
    for failure in failures:
        print(f"FAILED: {failure}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
