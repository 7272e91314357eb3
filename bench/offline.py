"""Calls of the library as on an NVIDIA GPU, on a machine without one: kernels are compiled, nothing is computed.

Tensors lie on the CPU and say that they lie on a GPU, launches end after compilation, matrix products are left out.
What a call would compile there for shapes, strides and alignment is compiled here, into the same caches. Also a plugin
of pytest (``-p bench.offline``), under which the tests marked gpu fill the caches; what they assert then means nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)
PRODUCTS = {"mm", "addmm", "addmm_", "matmul", "__matmul__", "__rmatmul__", "linear", "bmm"}
ARCHITECTURES = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}
# What NVIDIA's programming guide says of these: bytes of shared memory of a block and of a multiprocessor.
SHARED = {8: (166_912, 167_936), 9: (232_448, 233_472), 10: (232_448, 233_472)}


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
        if not str(func).startswith("fused_kd."):  # in whose arguments "cuda" is a backend
            args, kwargs = tuple(map(_on_cpu, args)), {k: _on_cpu(v) for k, v in kwargs.items()}
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
        _divert_cuda(patch, arch, counts)
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


def _divert_cuda(patch: Callable[..., Any], arch: str, counts: Counter[str]) -> None:
    from fused_kd.rows.cuda import build as cuda_build
    from fused_kd.rows.cuda.launch import Device, Launch

    major, minor = ARCHITECTURES[arch]
    block, multiprocessor = SHARED[major]
    device = Device(cuda_build.PORTABLE_CLUSTER if major >= 9 else 1, block, multiprocessor)
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
    import json
    from pathlib import Path

    if wheel := os.environ.get("FUSED_KD_TRITON_OF"):
        from .kernels import use_key_of

        use_key_of(Path(wheel))
    running = offline(os.environ.get("FUSED_KD_ARCH", "sm_90"))
    counts = running.__enter__()

    def end() -> None:
        running.__exit__(None, None, None)
        Path(os.environ["FUSED_KD_COUNTS"]).write_text(json.dumps(counts))

    config.add_cleanup(end)
