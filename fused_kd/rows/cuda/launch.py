"""A launch of a CUDA kernel: how rows lie on a GPU, what the kernel is compiled for and what it is given."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contract import Logits

FOLDER = Path(__file__).resolve().parents[2] / "_csrc"
SOURCES = {"fkd_row": "kd_row.cu", "fkd_condense": "kd_top_k.cu", "fkd_expand": "kd_top_k.cu"}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NO_TEACHER = -1
# Of shared memory, which the system takes for every block.
RESERVED_BYTES = 1024
_C_TYPES = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


class Device(NamedTuple):
    """What of a GPU decides how a row is cut: bytes of shared memory of a block and of a multiprocessor."""

    largest_cluster: int
    block_bytes: int
    multiprocessor_bytes: int
    warp: int = 32
    # Threads of a block: for rows that a few slots hold, while blocks share a multiprocessor, and where one fills it.
    threads: tuple[int, int, int] = (128, 256, 512)


class Cut(NamedTuple):
    """How a row lies in a cluster: ``resident`` slots of each thread stay in ``shared_bytes`` of a block.

    With room for another ``ahead`` slots, in which the next row's first ones arrive meanwhile. ``whole``: none of a
    row's slots is left out.
    """

    cluster: int
    threads: int
    resident: int
    shared_bytes: int
    ahead: int = 0
    whole: bool = False


class Launch(NamedTuple):
    """One call of a kernel on ``rows`` rows, which its clusters take in turn; ``arguments`` by the names of its C
    parameters."""

    kernel: str
    macros: tuple[tuple[str, int], ...]
    cut: Cut
    rows: int
    arguments: dict[str, Any]

    def typed(self) -> list[Any]:
        """The arguments in their order, as a launch takes them; tensors become their addresses, None becomes 0."""
        kinds = parameters(self.kernel)
        if kinds.keys() != self.arguments.keys():
            raise TypeError(f"{self.kernel} takes {', '.join(kinds)}, got {', '.join(self.arguments)}")
        given = ((self.arguments[name], kind) for name, kind in kinds.items())
        return [(x.data_ptr() if isinstance(x, Tensor) else x or 0) if kind is int else kind(x) for x, kind in given]


@functools.cache
def parameters(kernel: str) -> dict[str, Any]:
    """A kernel's parameters as its signature in C has them: by name, the ctypes type of each, int for an address."""
    text = re.sub(r"//[^\n]*", "", (FOLDER / SOURCES[kernel]).read_text())
    signature = re.search(rf"FKD_KERNEL void {kernel}\(([^)]*)\)", text)
    assert signature is not None
    words = [declared.split() for declared in signature[1].split(",")]
    return {w[-1].lstrip("*"): int if w[-1].startswith("*") else _C_TYPES[w[0]] for w in words}


def side_arguments(name: str, side: Logits | None) -> dict[str, Any]:
    if side is None:
        side_values: tuple[Any, ...] = (None, 0, 1.0, 0.0)
    else:
        side_values = (side.raw, _row_bytes(side.raw), side.scale, side.softcap or 0.0)
    return dict(zip((name, f"{name}_stride", f"{name}_scale", f"{name}_cap"), side_values, strict=True))


def gradient_arguments(dlogits: Tensor | None) -> dict[str, Any]:
    return {"dlogits": dlogits, "dlogits_stride": 0 if dlogits is None else _row_bytes(dlogits)}


def side_macros(
    student: Logits, teacher: Logits | None, dlogits: Tensor | None, *, listed: bool = False
) -> dict[str, int]:
    """What a kernel is compiled for of the logits and the gradient; those of a ``listed`` teacher are not swept."""
    sides = [student, *([] if teacher is None else [teacher])]
    streams = [student.raw] if listed else [side.raw for side in sides]
    streams += [] if dlogits is None else [dlogits]
    width = 16 // max(x.element_size() for x in (*streams, *(side.raw for side in sides)))
    return {
        "FKD_STUDENT": DTYPES[student.raw.dtype],
        "FKD_TEACHER": NO_TEACHER if teacher is None else DTYPES[teacher.raw.dtype],
        "FKD_DLOGITS": DTYPES[student.raw.dtype if dlogits is None else dlogits.dtype],
        "FKD_LISTED": int(listed),
        "FKD_WIDTH": width,
        "FKD_VECTOR": int(all(_aligned(x, width) for x in streams)),
        "FKD_SHAPED": int(any(side.scale != 1.0 or side.softcap is not None for side in sides)),
    }


@functools.lru_cache(maxsize=256)
def cut_rows(V: int, width: int, column_bytes: int, device: Device) -> Cut:
    """The smallest cluster of which two blocks fit a multiprocessor, so that one computes while the other waits for
    memory; else the largest, with as much of the row as fits. What a block then has to itself and does not need holds
    the next row's first slots."""
    few, shared, alone = device.threads

    def cut(cluster: int, threads: int, *, prefetch: bool = False) -> Cut:
        area = records_bytes(threads, device)
        slot = threads * width * column_bytes
        slots, room = -(-V // (threads * width * cluster)), (device.block_bytes - area) // slot
        resident = min(slots, room)
        ahead = min(resident, room - resident) if prefetch else 0
        return Cut(cluster, threads, resident, area + (resident + ahead) * slot, ahead, resident == slots)

    if 8 * few * width >= V:
        return cut(1, few)
    cluster = 1
    while cluster <= device.largest_cluster:
        found = cut(cluster, shared)
        if found.whole and 2 * (found.shared_bytes + RESERVED_BYTES) <= device.multiprocessor_bytes:
            return found
        cluster *= 2
    return cut(device.largest_cluster, alone, prefetch=True)


def records_bytes(threads: int, device: Device) -> int:
    """``FKD_RECORDS_BYTES`` of ``csrc/cuda_sums.h``."""
    return 32 * (threads // device.warp + 2 * min(device.warp, 8))


def _row_bytes(x: Tensor) -> int:
    return x.stride(0) * x.element_size()


def _aligned(x: Tensor, width: int) -> bool:
    piece = width * x.element_size()
    return x.data_ptr() % piece == 0 and (x.shape[0] == 1 or _row_bytes(x) % piece == 0)
