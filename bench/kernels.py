"""A cache of compiled kernels to carry to a machine with a GPU: ``python -m bench kernels build --folder FOLDER``.

Made on a machine without one, by what the benchmarks and the tests marked gpu would launch there: FOLDER/cuda for
FUSED_KD_CACHE, FOLDER/triton for TRITON_CACHE_DIR. A second ``build`` says how much of it is found again. An entry of
other sources is never found; a damaged one is compiled again. Triton's entries are for the very build of Triton that is
running, or for that of ``--triton-of``: an unpacked wheel of the same version for another Python, whose library differs
and with it every key. Triton writes absolute paths into its entries: ``adopt`` rewrites them where the folder is now,
as ``python -m bench gpu --cache FOLDER`` does by itself; ``seal``, as the end of ``build``, notes how files are.

Under :func:`offline` tensors lie on the CPU and say that they lie on a GPU, launches end after compilation, matrix
products are left out: what a call would compile there for shapes, strides and alignment is compiled here, into the same
caches. Also a plugin of pytest (``-p bench.kernels``), under which the tests marked gpu fill the caches; what they
assert then means nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from .gpu_tests import gpu_files
from .session import ROOT, python_path

GROUP = "__grp__"
# The parts of Triton whose sources its keys hold.
PARTS = ("compiler", "backends", "language", "runtime/cache.py")
COUNTED = ("triton compiled", "triton found", "cuda compiled", "cuda found")
CUDA = torch.device("cuda", 0)
PRODUCTS = {"mm", "addmm", "addmm_", "matmul", "__matmul__", "__rmatmul__", "linear", "bmm"}
ARCHITECTURES = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}
# What NVIDIA's programming guide says of these: bytes of shared memory of a block and of a multiprocessor.
SHARED = {8: (166_912, 167_936), 9: (232_448, 233_472), 10: (232_448, 233_472)}


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


class _OnGpu(TorchFunctionMode):
    """CPU tensors that say cuda:0, and factories that take it for the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "").split(".")[0]
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return CUDA
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if func in (torch.Tensor.cuda, torch.Tensor.cpu):
            return args[0]
        kwargs = kwargs or {}
        # In arguments of fused_kd's ops "cuda" is a backend, unless it is a device.
        ours = str(func).startswith("fused_kd.")
        args = tuple(x if ours and isinstance(x, str) else _on_cpu(x) for x in args)
        kwargs = {name: x if ours and isinstance(x, str) else _on_cpu(x) for name, x in kwargs.items()}
        return _product(name, args, kwargs) if name in PRODUCTS else func(*args, **kwargs)


def _on_cpu(x: Any) -> Any:
    where = x.type if isinstance(x, torch.device) else x.partition(":")[0] if isinstance(x, str) else ""
    return "cpu" if where == "cuda" else x


def _product(name: str, args: tuple, kwargs: dict) -> torch.Tensor:
    if kwargs.get("out") is not None:
        return kwargs["out"]
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    if name == "addmm_":
        return tensors[0]
    a, b = tensors[1:3] if name == "addmm" else tensors[:2]
    if name == "__rmatmul__":
        a, b = b, a
    dtype = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)), a.dtype)
    columns = b.shape[0] if name == "linear" else b.shape[-1]
    return torch.zeros(*a.shape[:-1], columns, dtype=dtype)


class _Driver:
    """Triton's, which names a target and can do nothing else."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@contextlib.contextmanager
def offline(arch: str) -> Iterator[Counter[str]]:
    """Within it, calls compile for ``arch``. Yields how often Triton and NVRTC ``compiled`` and how often an entry was
    ``found``, as "triton compiled" and so on.

    Raises:
        ValueError: for an unknown ``arch``, or under TRITON_INTERPRET=1.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise ValueError("TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    counts: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        patch = lambda *where: stack.enter_context(mock.patch.object(*where))  # noqa: E731
        _pretend_gpu(patch, ARCHITECTURES[arch])
        _divert_triton(patch, ARCHITECTURES[arch], counts)
        _divert_cuda(patch, ARCHITECTURES[arch], counts)
        from fused_kd import ops

        engine = ops.run

        def run(*args: Any, **kwargs: Any) -> Any:
            with _OnGpu():  # a mode around the op does not reach into it
                return engine(*args, **kwargs)

        patch(ops, "run", run)
        stack.enter_context(_OnGpu())
        yield counts


def _pretend_gpu(patch: Callable[..., Any], capability: tuple[int, int]) -> None:
    generator = torch.Generator
    quiet = mock.MagicMock()
    for name in ("synchronize", "set_sync_debug_mode", "empty_cache", "reset_peak_memory_stats", "Stream", "graph"):
        patch(torch.cuda, name, quiet)
    for name in ("stream", "current_stream", "default_stream", "CUDAGraph", "device"):
        patch(torch.cuda, name, quiet)
    for name in ("memory_allocated", "max_memory_allocated", "current_device"):
        patch(torch.cuda, name, lambda *_: 0)
    patch(torch.cuda, "is_available", lambda: True)
    patch(torch.cuda, "get_device_capability", lambda *_: capability)

    class Generator:  # a class: annotations name it
        def __new__(cls, device: Any = None) -> Any:
            return generator()

    patch(torch, "Generator", Generator)


def _divert_triton(patch: Callable[..., Any], capability: tuple[int, int], counts: Counter[str]) -> None:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        return launch(self, *args, warmup=True, **kwargs)

    def listen(*, cache_hit: bool, **_: Any) -> None:
        counts["triton found" if cache_hit else "triton compiled"] += 1

    triton.runtime.driver.set_active(_Driver(GPUTarget("cuda", 10 * capability[0] + capability[1], 32)))
    patch(JITFunction, "run", compile_only)
    knobs.compilation.listener = listen
    knobs.compilation.store_binary_only = True  # not the steps on the way, which are most of its bytes


def _divert_cuda(patch: Callable[..., Any], capability: tuple[int, int], counts: Counter[str]) -> None:
    from fused_kd.rows.cuda import build as cuda_build
    from fused_kd.rows.cuda.launch import Device, Launch

    major, minor = capability
    device = Device(cuda_build.PORTABLE_CLUSTER if major >= 9 else 1, *SHARED[major])
    compiler, made = cuda_build._compile, set()

    def compile_(*args: Any) -> bytes:
        counts["cuda compiled"] += 1
        return compiler(*args)

    def launch(where: torch.device, call: Launch) -> None:
        if (call.kernel, call.macros) not in made:
            made.add((call.kernel, call.macros))
            before = counts["cuda compiled"]
            cuda_build.cubin(call.kernel, call.macros, cuda_build.architecture(major, minor))
            counts["cuda found"] += before == counts["cuda compiled"]

    patch(cuda_build, "_compile", compile_)
    patch(cuda_build, "launch", launch)
    patch(cuda_build, "device", lambda which: device)


def pytest_configure(config: Any) -> None:
    """The whole session runs so; at its end the counts go to ``$FUSED_KD_COUNTS``."""
    if wheel := os.environ.get("FUSED_KD_TRITON_OF"):
        use_key_of(Path(wheel))
    running = offline(os.environ.get("FUSED_KD_ARCH", "sm_90"))
    counts = running.__enter__()

    def end() -> None:
        running.__exit__(None, None, None)
        Path(os.environ["FUSED_KD_COUNTS"]).write_text(json.dumps(counts))

    config.add_cleanup(end)


def warm() -> None:
    """What the benchmarks launch: rows alone at each launch, steps, and the streaming engine, at their real sizes."""
    from fused_kd.tuning import alternatives, tuned

    from .measure import GAMMAS, RowProblem
    from .problems import GPU_SHAPES, ODD_SHAPE, Inputs
    from .registry import IMPLEMENTATIONS
    from .stages import BACKENDS

    for shape in (*GPU_SHAPES, ODD_SHAPE):
        problem = RowProblem(2, shape.V, CUDA, torch.bfloat16)
        for backend in BACKENDS:
            problem.call(backend, "hard")()
        for other in alternatives("row"):
            with tuned(**{other.name: other.value}):
                problem.call("triton", "hard")()
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
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.kernels", "-p", "no:cacheprovider", *gpu_files()]
    environment = os.environ | {"FUSED_KD_COUNTS": str(counts_file), "FUSED_KD_ARCH": arch}
    # Set, so that the tests do not choose the interpreter.
    environment |= {"FUSED_KD_TRITON_OF": str(wheel or ""), "TRITON_INTERPRET": "0", "PYTHONPATH": python_path()}
    options = ["-m", "gpu", "--tb=no", "--continue-on-collection-errors"]
    subprocess.run([*command, *options], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    return Counter(json.loads(counts_file.read_text())) if counts_file.exists() else Counter()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("build", "adopt", "seal"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--arch", choices=list(ARCHITECTURES), default="sm_90", help="default sm_90: H100, H200")
    parser.add_argument("--triton-of", type=Path, metavar="WHEEL", help="an unpacked wheel of triton to make keys for")
    args = parser.parse_args(arguments)
    folder: Path = args.folder.resolve()
    if args.command == "seal":
        seal(folder)
        return 0
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
        print(f"bench kernels: {error}", file=sys.stderr)
        return 2
    total = counts + run_tests_offline(args.arch, folder / "counts.json", args.triton_of)
    seal(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{', '.join(f'{what} {total[what]}' for what in COUNTED)}; {size / 1e6:.1f} MB in {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
