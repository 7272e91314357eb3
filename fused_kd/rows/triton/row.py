"""Row implementation in Triton: one launch of :mod:`fused_kd.rows.triton.kernel`, a program per row."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from ...terms import RowSpec
from ...tuning import current
from ..contract import Logits, RowInputs, RowOutputs, Sparse, compiled, scalars_stride
from .kernel import row_kernel
from .terms import INTERPRET, formula_constants


@compiled
def row(inputs: RowInputs, outputs: RowOutputs) -> None:
    """Fill ``outputs`` for one chunk, as :mod:`fused_kd.rows.contract` says; the teacher may be a uniform tail.

    Launches one kernel on the current stream and never synchronises.
    """
    student, teacher, dlogits = inputs.student, inputs.teacher, outputs.dlogits
    C, V = student.raw.shape
    entries = rest = None
    if isinstance(teacher, Sparse):
        entries, rest = teacher.indices, teacher.rest
        teacher = Logits(teacher.log_probs, 1.0, None, False)
    teacher_raw = None if teacher is None else teacher.raw
    told = outputs.statistics
    capped = student.softcap is not None or (teacher is not None and teacher.softcap is not None)
    fp32 = all(x.dtype == torch.float32 for x in (student.raw, teacher_raw) if x is not None)
    with guard(inputs.labels.device):
        row_kernel[(C,)](
            student.raw,
            teacher_raw,
            dlogits,
            inputs.labels,
            inputs.weights,
            inputs.scalars,
            outputs.loss,
            outputs.difficulty,
            outputs.is_hard.view(torch.uint8),
            None if inputs.hard is None else inputs.hard.view(torch.uint8),
            told,
            entries,
            rest,
            0 if entries is None else entries.shape[1],
            V,
            student.raw.stride(0),
            0 if teacher_raw is None else teacher_raw.stride(0),
            0 if dlogits is None else dlogits.stride(0),
            scalars_stride(inputs.scalars),
            0 if told is None else told.stride(0),
            *shape_of(student),
            *shape_of(teacher),
            **formula_constants(inputs.spec, inputs.cold_labels),
            COLUMNS=0 if told is None else told.shape[1],
            EXCLUDES=teacher is not None and not (student.finite and teacher.finite),
            **launch_constants(
                is_heavy(inputs.spec, capped, fp32),
                student.raw,
                None if entries is not None else teacher_raw,
                dlogits,
                adaptive=any(term.of.adaptive for term in inputs.spec.terms),
            ),
        )


def shape_of(side: Logits | None) -> tuple[float | None, float | None]:
    """A side's scale and softcap as the kernels take them: None where there is nothing to compute."""
    return (None, None) if side is None else (None if side.scale == 1.0 else side.scale, side.softcap)


def is_heavy(spec: RowSpec, capped: bool, all_sweeps_of_fp32: bool = False) -> bool:
    """A tanh, two ratios and the sums of several terms need registers too: with whole blocks some targets would
    spill, as would skewed rows of fp32 logits in a kernel that holds all sweeps."""
    skewed = all_sweeps_of_fp32 and any(term.of.kl_at_one for term in spec.terms)
    return capped or skewed or len(spec.tabled) > 1 or any(term.of.reads >= {"r", "s"} for term in spec.terms)


def launch_constants(
    heavy: bool, student: Tensor, teacher: Tensor | None = None, dlogits: Tensor | None = None, adaptive: bool = False
) -> dict[str, int]:
    """A program's columns at once, its threads, and how many neighbouring columns of these logits one of them takes."""
    tuning = current()
    block = tuning.row_block // 2 if heavy else tuning.row_block
    pack = pack_of(block // tuning.row_threads, student, teacher, dlogits)
    made = {"BLOCK": block, "LANES": tuning.row_threads, "PACK": pack, "num_warps": tuning.row_threads // warp_size()}
    if _on_nvidia() and (adaptive or any(x.element_size() == 2 for x in (student, teacher) if x is not None)):
        # Left to itself, ptxas takes 80 for 16-bit logits, and spills at 48 what the adaptive divergence needs; at 64,
        # 1024 threads share a multiprocessor.
        made["maxnreg"] = 64
    return made


def pack_of(most: int, *logits: Tensor | None) -> int:
    """How many neighbouring columns a thread takes, as Triton decides, for all together: of unaligned rows each takes
    one among all threads'."""
    widths = [16 // x.element_size() for x in logits if x is not None and _aligned(x)]
    return min(max(widths, default=1), most)


def _aligned(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0


def guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors' own."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def warp_size() -> int:
    return 32 if INTERPRET else triton.runtime.driver.active.get_current_target().warp_size


def _on_nvidia() -> bool:
    return not INTERPRET and triton.runtime.driver.active.get_current_target().backend == "cuda"
