"""Compiles ``csrc/*.cu`` by NVRTC for the GPU present, keeps the binaries for later processes, and launches them.

NVRTC and the launch come from the package cuda-core (``pip install 'fused_kd[cuda]'``): no nvcc, no C++ compiler, no
headers but csrc's own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from ..build_cache import cache_folder, keep, kept
from ..expressions import c_header
from .launch import FOLDER, SOURCES, Cut, Device, Launch

INSTEAD = "or use backend='triton'"
PORTABLE_CLUSTER = 8
# Rows in the int32 arithmetic of columns, a tile beyond their end included.
LARGEST_VOCAB = 2**30
OPTIONS: dict[str, Any] = {
    "std": "c++17",
    "device_as_default_execution_space": True,  # of the functions that csrc shares with the row for CPUs
    "disable_warnings": True,  # of branches that a macro makes unreachable
}


class CudaRowError(ValueError):
    """The CUDA row cannot run here; the message says why and what to do."""


def require() -> None:
    """Raise where no launch could work.

    Raises:
        CudaRowError: (a ``ValueError``) without an NVIDIA GPU of sm_80 or later, without the packages of the extra
            ``cuda`` or where they find no NVRTC; the message names what to install or choose.
    """
    if torch.version.hip is not None:
        raise CudaRowError("backend='cuda' needs an NVIDIA GPU, this PyTorch is for AMD ones; use backend='triton'")
    _nvrtc_version()
    if not torch.cuda.is_available():
        raise CudaRowError(
            "backend='cuda' needs an NVIDIA GPU, its driver and a PyTorch for CUDA, and torch.cuda.is_available() is "
            "false; use backend='torch'"
        )


@functools.cache
def device(which: torch.device) -> Device:
    """What of a GPU decides how rows are cut.

    Raises:
        CudaRowError: for a GPU below sm_80.
    """
    found: Any = torch.cuda.get_device_properties(which)  # PyTorch's stubs lack one of these
    if (found.major, found.minor) < (8, 0):
        raise CudaRowError(
            f"backend='cuda' needs an NVIDIA GPU of sm_80 or later, {found.name} is sm_{found.major}{found.minor}; "
            "use backend='torch'"
        )
    largest = PORTABLE_CLUSTER if found.major >= 9 else 1
    return Device(largest, found.shared_memory_per_block_optin, found.shared_memory_per_multiprocessor)


def launch(where: torch.device, call: Launch) -> None:
    """Run ``call`` on the current stream of a GPU; does not wait for it.

    Raises:
        CudaRowError: where it cannot be compiled or loaded.
    """
    core = _core()
    with torch.cuda.device(where):
        kernel, clusters = _prepared(call.kernel, call.macros, call.cut, where)
        config = _config(core, call.cut, min(clusters, call.rows))
        core.launch(_current_stream(core, where), config, kernel, *call.typed())


class _Stream:
    """PyTorch's stream in cuda-core's protocol."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


def _current_stream(core: ModuleType, where: torch.device) -> Any:
    handle = torch.cuda.current_stream(where).cuda_stream
    return _Stream(handle) if handle else core.LEGACY_DEFAULT_STREAM


def _config(core: ModuleType, cut: Cut, clusters: int) -> Any:
    cluster = {"cluster": cut.cluster} if cut.cluster > 1 else {}
    return core.LaunchConfig(grid=clusters, block=cut.threads, shmem_size=cut.shared_bytes, **cluster)


@functools.lru_cache(maxsize=1024)
def _prepared(kernel: str, macros: tuple[tuple[str, int], ...], cut: Cut, where: torch.device) -> tuple[Any, int]:
    """The loaded kernel, and how many of its clusters the GPU holds at a time."""
    core, driver = _core(), importlib.import_module("cuda.bindings.driver")
    major, minor = torch.cuda.get_device_capability(where)
    arch = architecture(major, minor)
    code = cubin(kernel, macros, arch)
    try:
        with _apart_from_captures(driver):
            loaded = _kernel(kernel, macros, arch, code)
            _, current = driver.cuDeviceGet(torch.cuda.current_device())
            most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            # All that a block may have: other cuts launch the same kernel.
            allowed = device(where).block_bytes
            (status,) = driver.cuKernelSetAttribute(most, allowed, loaded.handle, current)
            if int(status) != 0:
                raise RuntimeError(f"{status.name}: {allowed} bytes of shared memory")
            if cut.cluster > 1:
                config = _config(core, cut, 1)
                clusters = loaded.occupancy.max_active_clusters(config, stream=core.LEGACY_DEFAULT_STREAM)
            else:
                blocks = loaded.occupancy.max_active_blocks_per_multiprocessor(cut.threads, cut.shared_bytes)
                clusters = blocks * torch.cuda.get_device_properties(where).multi_processor_count
        if clusters < 1:  # a slice of a GPU
            raise RuntimeError(f"no room for a cluster of {cut.cluster} blocks")
    except Exception as error:  # cuda-core's own, and an old driver's
        raise CudaRowError(
            f"backend='cuda' cannot load its kernel ({type(error).__name__}: {error}); a driver older than NVRTC "
            f"{'.'.join(map(str, _nvrtc_version()))} is to be updated, {INSTEAD}"
        ) from error
    return loaded, clusters


@functools.lru_cache(maxsize=1024)
def _loaded(kernel: str, code: bytes) -> Any:
    return _core().ObjectCode.from_cubin(code, name=kernel)


def _kernel(kernel: str, macros: tuple[tuple[str, int], ...], arch: str, code: bytes) -> Any:
    """The loaded kernel; compiled here where the driver refuses ``code``, which another machine may have made."""
    try:
        return _loaded(kernel, code).get_kernel(kernel)
    except Exception:  # cuda-core's own
        return _loaded(kernel, cubin(kernel, macros, arch, fresh=True)).get_kernel(kernel)


@contextlib.contextmanager
def _apart_from_captures(driver: ModuleType) -> Iterator[None]:
    """Lets this thread load a kernel and ask about it while a CUDA graph is captured: neither is work of a stream."""
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    _, before = driver.cuThreadExchangeStreamCaptureMode(relaxed)
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(before)


def architecture(major: int, minor: int) -> str:
    """NVRTC's name of a GPU; from Hopper on that very one."""
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def cubin(kernel: str, macros: tuple[tuple[str, int], ...], arch: str, *, fresh: bool = False) -> bytes:
    """The binary of a kernel of :data:`SOURCES`, from the cache where a process has compiled it before.

    An entry is known by the sources, ``macros`` and ``arch``, not by the NVRTC that made it: it may come from another
    machine. One that is damaged is compiled again.

    Args:
        kernel: its name.
        macros: what it is compiled for, see ``csrc/cuda_slots.h`` and the sources.
        arch: such as "sm_90a"; the GPU need not be present.
        fresh: compile whatever the cache holds.

    Raises:
        CudaRowError: where NVRTC is missing or fails.
    """
    source = c_header() + f'#include "{SOURCES[kernel]}"\n'
    files = [FOLDER / SOURCES[kernel], *sorted(FOLDER.glob("*.h"))]
    key = "\0".join([source, *(path.read_text() for path in files), repr(macros), arch, repr(OPTIONS)])
    folder = cache_folder()
    path = None if folder is None else folder / f"{kernel}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.cubin"
    code = None if path is None or fresh else kept(path, key)
    if code is None:
        code = _compile(source, macros, arch)
        if path is not None:
            keep(path, key, code, {"arch": arch, "nvrtc": ".".join(map(str, _nvrtc_version()))})
    return code


def _compile(source: str, macros: tuple[tuple[str, int], ...], arch: str) -> bytes:
    core = _core()
    options = core.ProgramOptions(
        arch=arch, include_path=str(FOLDER), define_macro=[(name, str(value)) for name, value in macros], **OPTIONS
    )
    try:
        return bytes(core.Program(source, code_type="c++", options=options).compile("cubin").code)
    except Exception as error:  # cuda-core's own
        raise CudaRowError(
            f"backend='cuda' failed to compile for {arch} by NVRTC {'.'.join(map(str, _nvrtc_version()))} ({error}); "
            f"install a newer nvidia-cuda-nvrtc {INSTEAD}"
        ) from error


@functools.cache
def _core() -> ModuleType:
    try:
        return importlib.import_module("cuda.core")
    except ImportError as error:
        raise CudaRowError(
            f"backend='cuda' needs the package cuda-core ({error}); pip install 'fused_kd[cuda]' {INSTEAD}"
        ) from None


@functools.cache
def _nvrtc_version() -> tuple[int, int]:
    _core()
    try:
        _, major, minor = importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()
    except Exception as error:  # cuda-pathfinder's own where the library is missing
        raise CudaRowError(
            f"backend='cuda' needs NVRTC, which is not found ({type(error).__name__}: {error}); "
            f"pip install 'fused_kd[cuda]' {INSTEAD}"
        ) from None
    return major, minor
