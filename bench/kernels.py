"""A cache of compiled kernels to carry to a machine with a GPU: ``python -m bench.kernels build --folder FOLDER``.

Made on a machine without one, by what the benchmarks and the tests marked gpu would launch there (bench/offline.py):
FOLDER/cuda for FUSED_KD_CACHE, FOLDER/triton for TRITON_CACHE_DIR. A second ``build`` says how much of it is found
again. An entry of other sources is never found; a damaged one is compiled again. Triton's entries are for the very
build of Triton that is running, or for that of ``--triton-of``: an unpacked wheel of the same version for another
Python, whose library differs and with it every key. Triton writes absolute paths into its entries: ``adopt`` rewrites
them where the folder is now, as ``python -m bench gpu --cache FOLDER`` does by itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from .environment import ROOT
from .gpu_tests import gpu_files
from .offline import ARCHITECTURES, CUDA, offline

GROUP = "__grp__"
# The parts of Triton whose sources its keys hold.
PARTS = ("compiler", "backends", "language", "runtime/cache.py")


def adopt(folder: Path) -> int:
    """Rewrite Triton's entries for where ``folder`` is now; how many kernels have all of their files.

    Kernels that lack a file, have one that is not as :func:`seal` saw it, or whose group cannot be read, are taken out,
    to be compiled again; those that were made here since are kept.
    """
    sound = 0
    for kernel in sorted((folder / "triton").glob("*")):
        for group in kernel.glob(f"{GROUP}*.json"):
            try:
                before = json.loads(group.read_text())["child_paths"]
                here = {name: str((kernel / name).resolve()) for name in before}
                whole = bool(here) and all(_intact(Path(path), path == before[name]) for name, path in here.items())
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                whole = False
            if not whole:
                group.unlink()
            elif here != before:
                _write(group, json.dumps({"child_paths": here}).encode())
            sound += whole
    return sound


def seal(folder: Path) -> None:
    """Write the size and SHA-256 of each of Triton's files beside it, for :func:`adopt` to compare."""
    for path in (folder / "triton").glob("*/*"):
        if path.is_file() and not path.name.startswith(GROUP) and path.suffix != ".sum":
            _write(_sum(path), _digest(path).encode())


def _sum(path: Path) -> Path:
    return path.with_name(path.name + ".sum")


def _digest(path: Path) -> str:
    data = path.read_bytes()
    return f"{len(data)} {hashlib.sha256(data).hexdigest()}"


def _intact(path: Path, made_here: bool) -> bool:
    return _sum(path).read_text() == _digest(path) if _sum(path).exists() else made_here and path.is_file()


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def use_key_of(wheel: Path) -> None:
    """Key Triton's entries as the build in ``wheel`` would, an unpacked wheel of the running version.

    Raises:
        ValueError: where more than compiled libraries differ.
    """
    import triton
    from triton.runtime import cache

    mine, theirs = Path(triton.__file__).parent, wheel / "triton"
    for part in PARTS:
        files = [mine / part] if part.endswith(".py") else sorted((mine / part).rglob("*.py"))
        for file in files:
            other = theirs / file.relative_to(mine)
            if not other.is_file() or other.read_bytes() != file.read_bytes():
                raise ValueError(f"{other} is not as in triton {triton.__version__}, which is running")
    key = cache.triton_key()
    own, other_hash = (hashlib.sha256((x / "_C" / "libtriton.so").read_bytes()).hexdigest() for x in (mine, theirs))
    if own not in key:
        raise ValueError(f"triton {triton.__version__} makes its keys in another way; build with the very wheel")
    cache.triton_key = lambda: key.replace(own, other_hash)


def warm() -> None:
    """What the benchmarks launch: rows alone at each launch, steps, and the streaming engine, at their real sizes."""
    import torch

    from fused_kd.tuning import alternatives, tuned

    from .bandwidth import GAMMAS, RowProblem
    from .implementations import IMPLEMENTATIONS
    from .inputs import Inputs
    from .shapes import GPU_SHAPES, ODD_SHAPE
    from .stages import BACKENDS

    for shape in (*GPU_SHAPES, ODD_SHAPE):
        problem = RowProblem(2, shape.V, CUDA, torch.bfloat16)
        for backend in BACKENDS:
            problem.call(backend, "hard")()
        for other in alternatives("row"):
            with tuned(**{other.name: other.value}):
                problem.call("triton", "hard")()
    for shape in (*GPU_SHAPES, ODD_SHAPE):
        # Sizes decide what is compiled, numbers do not: memory that is never touched costs nothing.
        make = torch.empty
        hidden, weight = (make(n, shape.H_s, dtype=torch.bfloat16, device="cuda") for n in (shape.N, shape.V))
        hidden_t, weight_t = (make(n, shape.H_t, dtype=torch.bfloat16, device="cuda") for n in (shape.N, shape.V))
        labels = torch.zeros(shape.N, dtype=torch.int64, device="cuda")
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        inputs = Inputs(*leaves, hidden_t, weight_t, labels, make(shape.N))
        for name in (*(f"fused_kd {backend}" for backend in BACKENDS), "fused_kd streaming"):
            for gamma in GAMMAS.values():
                step = IMPLEMENTATIONS[name].build(inputs, gamma)
                step(labels).backward()
                inputs.drop_gradients()


def run_tests_offline(arch: str, counts_file: Path, wheel: Path | None) -> Counter[str]:
    """The tests marked gpu, offline; their outcomes mean nothing."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.offline", "-p", "no:cacheprovider", *gpu_files()]
    environment = os.environ | {"FUSED_KD_COUNTS": str(counts_file), "FUSED_KD_ARCH": arch}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    # Set, so that the tests do not choose the interpreter.
    environment |= {"FUSED_KD_TRITON_OF": str(wheel or ""), "TRITON_INTERPRET": "0"}
    subprocess.run(
        [*command, "-m", "gpu", "--tb=no", "--continue-on-collection-errors"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    return Counter(json.loads(counts_file.read_text())) if counts_file.exists() else Counter()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("build", "adopt"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--arch", choices=list(ARCHITECTURES), default="sm_90", help="default sm_90: H100, H200")
    parser.add_argument("--triton-of", type=Path, metavar="WHEEL", help="an unpacked wheel of triton to make keys for")
    parser.add_argument("--skip-tests", action="store_true", help="without the kernels of the tests marked gpu")
    args = parser.parse_args(arguments)
    folder: Path = args.folder.resolve()
    if args.command == "adopt":
        print(f"{adopt(folder)} kernels of Triton are whole in {folder}")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"], os.environ["FUSED_KD_CACHE"] = str(folder / "triton"), str(folder / "cuda")
    adopt(folder)
    try:
        if args.triton_of is not None:
            use_key_of(args.triton_of)
        with offline(args.arch) as counts:
            warm()
    except (OSError, ValueError) as error:
        print(f"bench.kernels: {error}", file=sys.stderr)
        return 2
    total: Counter[str] = Counter(counts)
    if not args.skip_tests:
        total += run_tests_offline(args.arch, folder / "counts.json", args.triton_of)
    seal(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    said = ", ".join(f"{what} {total[what]}" for what in _COUNTS)
    print(f"{said}; {size / 1e6:.1f} MB in {folder}")
    return 0


_COUNTS = ("triton compiled", "triton found", "cuda compiled", "cuda found")


if __name__ == "__main__":
    raise SystemExit(main())
