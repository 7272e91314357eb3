"""Row implementation in CUDA C++: one launch of ``csrc/kd_row.cu``, a cluster of blocks per row.

A cluster holds the student's and the teacher's row in its blocks' shared memory, so that a logit is read from the
GPU's memory once and a dlogit written once. From Hopper (sm_90) on a cluster has up to 8 blocks; before, it is one
block, and what does not fit its shared memory is read in every sweep.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...divergences import DIVERGENCES
from ...objectives import RowSpec
from ..contract import Logits, RowInputs, RowOutputs, Sparse
from . import build as cuda_build

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NO_TEACHER = -1
_DIVERGENCES = {name: i for i, name in enumerate(DIVERGENCES)}
# Of shared memory, which the system takes for every block.
RESERVED_BYTES = 1024


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
    """One call of a kernel on ``rows`` rows, which its clusters take in turn. ``types`` are the arguments' in C."""

    kernel: str
    macros: tuple[tuple[str, int], ...]
    cut: Cut
    rows: int
    arguments: tuple[Any, ...]
    types: tuple[Any, ...]


def row(inputs: RowInputs, outputs: RowOutputs) -> None:
    """Fill ``outputs`` for one chunk, as :mod:`fused_kd.rows.contract` says; the teacher may be a uniform tail.

    Student, teacher and dlogits are (C, V) in fp32, bf16 or fp16 independently of each other, with any row stride and
    alignment; logits with another stride than 1 along the vocabulary are copied. Rows aligned to 16 bytes are moved in
    16-byte pieces, others element by element. Compiles at the first use of a combination of objective, dtypes and
    alignment; launches one kernel on the current stream and never synchronises.

    Moves ``C * V * (student bytes + teacher bytes + dlogits bytes)``, each logit once, where a row fits the shared
    memory of a cluster (fp32 student and teacher: V up to 229,376 on Hopper and Blackwell data-centre GPUs); what does
    not fit is read two times, three in rows that evaluate their divergence (hard ones). A uniform tail moves none of
    the teacher's.

    Raises:
        ValueError: for ``loss``, ``difficulty``, ``is_hard`` or ``scalars`` that are not contiguous, and as
            :func:`fused_kd.rows.cuda.build.require`.
    """
    for name, vector in (
        ("loss", outputs.loss),
        ("difficulty", outputs.difficulty),
        ("is_hard", outputs.is_hard),
        ("scalars", inputs.scalars),
    ):
        if not vector.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {vector.stride()}")
    C, V = inputs.student.raw.shape
    if V > cuda_build.LARGEST_VOCAB:
        most = cuda_build.LARGEST_VOCAB
        raise ValueError(f"backend='cuda' takes vocabularies up to {most}, got {V}; use backend='triton'")
    if C == 0:
        return
    student = inputs.student._replace(raw=unit_stride(inputs.student.raw))
    teacher = inputs.teacher if inputs.spec.divergence is not None else None
    if isinstance(teacher, Logits):
        teacher = teacher._replace(raw=unit_stride(teacher.raw))
    dlogits = outputs.dlogits
    if dlogits is not None:
        dlogits = student.raw if dlogits is inputs.student.raw else unit_stride(dlogits)
    labels = inputs.labels.contiguous()
    weights = None if inputs.weights is None else inputs.weights.contiguous()
    given = None if inputs.hard is None else inputs.hard.contiguous()
    held = inputs._replace(student=student, teacher=teacher, labels=labels, weights=weights, hard=given)
    device = cuda_build.device(labels.device)
    cuda_build.launch(labels.device, plan(held, outputs._replace(dlogits=dlogits), device))
    if outputs.dlogits is not None and dlogits is not None and dlogits is not outputs.dlogits:
        outputs.dlogits.copy_(dlogits)


def plan(inputs: RowInputs, outputs: RowOutputs, device: Device) -> Launch:
    """The launch that fills ``outputs``; everything contiguous where the kernel needs it."""
    student, teacher, spec = inputs.student, inputs.teacher, inputs.spec
    C, V = student.raw.shape
    listed = isinstance(teacher, Sparse)
    entries = rest = None
    if isinstance(teacher, Sparse):
        assert teacher.tail == "uniform", "other tails have no dense row"
        entries, rest = teacher.indices.contiguous(), teacher.rest.contiguous()
        teacher = Logits(teacher.log_probs.float().contiguous(), 1.0, None, False)
    dlogits = outputs.dlogits
    sides = [student.raw] + ([] if teacher is None else [teacher.raw])
    streams = [*sides[: 1 if listed else None], *([] if dlogits is None else [dlogits])]
    width = 16 // max(x.element_size() for x in sides + streams)
    shaped = any(x.scale != 1.0 or x.softcap is not None for x in (student, teacher) if x is not None)
    cut = cut_rows(V, width, sum(x.element_size() for x in sides), device)
    macros = formula_macros(spec, inputs.cold_labels) | {
        "FKD_STUDENT": DTYPES[student.raw.dtype],
        "FKD_TEACHER": NO_TEACHER if teacher is None else DTYPES[teacher.raw.dtype],
        "FKD_DLOGITS": DTYPES[student.raw.dtype if dlogits is None else dlogits.dtype],
        "FKD_LISTED": int(listed),
        "FKD_EXCLUDES": int(teacher is not None and not (student.finite and teacher.finite)),
        "FKD_WIDTH": width,
        "FKD_VECTOR": int(all(aligned(x, width) for x in streams)),
        "FKD_SHAPED": int(shaped),
        "FKD_THREADS": cut.threads,
        "FKD_WHOLE": int(cut.whole),
    }
    arguments = (
        *side_arguments(student),
        *(side_arguments(teacher) if teacher is not None else (None, 0, 1.0, 0.0)),
        *(dlogits, 0 if dlogits is None else row_bytes(dlogits)),
        *(entries, rest, 0 if entries is None else entries.shape[1], C, V, cut.resident, cut.ahead),
        *(inputs.labels, inputs.weights, inputs.scalars, inputs.hard),
        *(outputs.loss, outputs.difficulty, outputs.is_hard),
    )
    return Launch("fkd_row", tuple(sorted(macros.items())), cut, C, arguments, ROW_TYPES)


@functools.cache
def formula_macros(spec: RowSpec, cold_labels: bool) -> dict[str, int]:
    """What makes one kernel an objective's: its formulas and which parts of the loss it has."""
    name = spec.divergence or "kl"
    divergence = DIVERGENCES[name]
    return {
        "FKD_DIVERGENCE": _DIVERGENCES[name],
        "FKD_FREE": int(divergence.free),
        "FKD_MIXTURE": int(divergence.mixture),
        "FKD_KL_AT_ONE": int(divergence.kl_at_one),
        "FKD_ADAPTIVE": int(divergence.adaptive),
        "FKD_EVERYWHERE": int(divergence.everywhere),
        "FKD_MIXED": int(spec.mixed),
        "FKD_HARD_LABEL": int(spec.hard_label and spec.divergence is not None),
        "FKD_GATED": int(spec.gated),
        "FKD_COLD": int(cold_labels and spec.hard_label and spec.divergence is not None),
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


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def row_bytes(x: Tensor) -> int:
    return x.stride(0) * x.element_size()


def aligned(x: Tensor, width: int) -> bool:
    piece = width * x.element_size()
    return x.data_ptr() % piece == 0 and (x.shape[0] == 1 or row_bytes(x) % piece == 0)


def side_arguments(x: Logits) -> tuple[Tensor, int, float, float]:
    return x.raw, row_bytes(x.raw), x.scale, x.softcap or 0.0


I32, I64, F32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_float
POINTER = int
_SIDE = (POINTER, I64, F32, F32)
ROW_TYPES = (*_SIDE, *_SIDE, POINTER, I64, POINTER, POINTER, I32, I64, I32, I32, I32, *[POINTER] * 7)
