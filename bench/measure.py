"""Time and peak memory of one call, on a CPU or a CUDA device."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import fused_kd

MIN_FLUSH_BYTES = 256 << 20


class Memory(NamedTuple):
    """Bytes. ``peak`` during one forward and backward; ``baseline`` with inputs and gradient buffers in
    place, just before those gradients were dropped and the call began; ``gradients`` the size of those
    buffers."""

    peak: int
    baseline: int
    gradients: int

    @property
    def over_inputs_and_gradients(self) -> int:
        return self.peak - self.baseline

    @property
    def over_inputs(self) -> int:
        return self.peak - self.baseline + self.gradients


clock = time.perf_counter
"""Seconds of the host; pytest-benchmark's timer, on CPUs."""

# About 10 ms of a GPU's clock: longer than a host takes to ask for a step's kernels.
HEAD_START_CYCLES = 20_000_000


class Flush:
    """Overwrites a GPU's L2 cache, outside of what is timed; nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.buffer = None
        if device.type == "cuda":
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
            self.buffer = torch.empty(max(MIN_FLUSH_BYTES, 2 * cache), dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        if self.buffer is not None:
            self.buffer.zero_()


Calls = dict[str, Callable[[], object]]
Sampler = Callable[[Calls, int, Callable[[], None]], dict[str, list[float]]]
"""(calls, rounds, before) to seconds, as :func:`interleaved`."""


def interleaved(calls: Calls, rounds: int, before: Callable[[], None] = lambda: None) -> dict[str, list[float]]:
    """Seconds of each call, ``rounds`` times in turn (a, b, a, b, ...), so that all meet the same noise.

    ``before`` runs untimed ahead of every call. Nothing is warmed up here.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            before()
            samples[name].append(seconds_of(call))
    return samples


def seconds_of(call: Callable[[], object]) -> float:
    """Of one call; on a GPU, where one is in use, those of its stream alone.

    The GPU sleeps between two events while the host asks for the call's kernels, so that launches cost nothing that
    the GPU does not wait for. A call that itself waits for the GPU is timed with its waiting.
    """
    if not torch.cuda.is_initialized():
        start = clock()
        call()
        return clock() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START_CYCLES)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def peak_memory(
    call: Callable[[], object], drop_gradients: Callable[[], None], gradients: int, device: torch.device
) -> Memory | None:
    """:class:`Memory` of ``call``, a forward and backward that has run before and left its gradients in
    place.

    On CUDA the allocator's count. On a CPU resident memory: free heap pages and the buffers that fused_kd
    keeps are handed back to the system first, then the kernel's high-water mark is reset and read. None
    where the system does not offer that."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        baseline = torch.cuda.memory_allocated(device)
        drop_gradients()
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return Memory(torch.cuda.max_memory_allocated(device), baseline, gradients)
    _trim()
    resident = _status("VmRSS")
    drop_gradients()
    _trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    call()
    peak = _status("VmHWM")
    return None if resident is None or peak is None else Memory(peak, resident, gradients)


def _trim() -> None:
    gc.collect()
    fused_kd.empty_cache()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # where the C library is another than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
