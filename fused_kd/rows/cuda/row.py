"""Row implementation in CUDA C++: one launch of ``csrc/kd_row.cu``, a cluster of blocks per row.

A cluster holds the student's and the teacher's row in its blocks' shared memory, so that a logit is read from the
GPU's memory once and a dlogit written once. From Hopper (sm_90) on a cluster has up to 8 blocks; before, it is one
block, and what does not fit its shared memory is read in every sweep.
"""

from __future__ import annotations

import functools

from ...terms import RowSpec, Term
from ..contract import Logits, RowInputs, RowOutputs, Sparse, compiled, scalars_stride, traits
from . import build as cuda_build
from .launch import Device, Launch, cut_rows, gradient_arguments, side_arguments, side_macros

MOST_TERMS = 8
# In the order of ``enum Trait`` in ``csrc/cuda_divergence.h``.
_FLAGS = [
    "has_teacher",
    "free",
    "mixture",
    "powers",
    "kl_at_one",
    "adaptive",
    "everywhere",
    "covers",
    "mixed",
    "hard_label",
    "z_loss",
]


@compiled
def row(inputs: RowInputs, outputs: RowOutputs) -> None:
    """Fill ``outputs`` for one chunk, as :mod:`fused_kd.rows.contract` says; the teacher may be a uniform tail.

    Student, teacher and dlogits are (C, V) in fp32, bf16 or fp16 independently of each other, with any row stride and
    alignment. Rows aligned to 16 bytes are moved in 16-byte pieces, others element by element. Compiles at the first
    use of a combination of objective, dtypes and alignment; launches one kernel on the current stream and never
    synchronises.

    Moves ``C * V * (student bytes + teacher bytes + dlogits bytes)``, each logit once, where a row fits the shared
    memory of a cluster (fp32 student and teacher: V up to 229,376 on Hopper and Blackwell data-centre GPUs); what does
    not fit is read two times, three in rows that evaluate their divergence (hard ones). A uniform tail moves none of
    the teacher's.

    Raises:
        ValueError: as :func:`fused_kd.rows.cuda.build.require`.
    """
    V = inputs.student.raw.shape[1]
    if V > cuda_build.LARGEST_VOCAB:
        most = cuda_build.LARGEST_VOCAB
        raise ValueError(f"backend='cuda' takes vocabularies up to {most}, got {V}; use backend='triton'")
    where = inputs.labels.device
    cuda_build.launch(where, plan(inputs, outputs, cuda_build.device(where)))


def plan(inputs: RowInputs, outputs: RowOutputs, device: Device) -> Launch:
    """The launch that fills ``outputs``."""
    student, teacher = inputs.student, inputs.teacher
    C, V = student.raw.shape
    listed = isinstance(teacher, Sparse)
    entries = rest = None
    if isinstance(teacher, Sparse):
        entries, rest = teacher.indices, teacher.rest
        teacher = Logits(teacher.log_probs.float(), 1.0, None, False)
    column_bytes = student.raw.element_size() + (0 if teacher is None else teacher.raw.element_size())
    macros = formula_macros(inputs.spec, inputs.cold_labels)
    macros |= side_macros(student, teacher, outputs.dlogits, listed=listed)
    cut = cut_rows(V, macros["FKD_WIDTH"], column_bytes, device)
    macros |= {
        "FKD_EXCLUDES": int(teacher is not None and not (student.finite and teacher.finite)),
        "FKD_THREADS": cut.threads,
        "FKD_WHOLE": int(cut.whole),
    }
    arguments = {
        **side_arguments("student", student),
        **side_arguments("teacher", teacher),
        **gradient_arguments(outputs.dlogits),
        "entries": entries,
        "rest": rest,
        "K": 0 if entries is None else entries.shape[1],
        "C": C,
        "V": V,
        "resident": cut.resident,
        "ahead": cut.ahead,
        "labels": inputs.labels,
        "weights": inputs.weights,
        "scalars": inputs.scalars,
        "scalars_stride": scalars_stride(inputs.scalars),
        "given": inputs.hard,
        "loss": outputs.loss,
        "difficulty": outputs.difficulty,
        "is_hard": outputs.is_hard,
    }
    return Launch("fkd_row", tuple(sorted(macros.items())), cut, C, arguments)


@functools.cache
def formula_macros(spec: RowSpec, cold_labels: bool) -> dict[str, int]:
    """What makes one kernel an objective's: its terms.

    Raises:
        ValueError: for more of them than the kernel has names for.
    """
    if len(spec.terms) > MOST_TERMS:
        raise ValueError(f"backend='cuda' takes sums of up to {MOST_TERMS} terms, got {len(spec.terms)}; use 'triton'")
    bits = [_bits(term) for term in spec.terms] + [0] * (MOST_TERMS - len(spec.terms))
    made = {f"FKD_TERM_{i}": value for i, value in enumerate(bits)}
    return made | {"FKD_TERMS": len(spec.terms), "FKD_MAIN": spec.main, "FKD_COLD": int(cold_labels)}


def _bits(term: Term) -> int:
    """As ``csrc/cuda_divergence.h`` reads them."""
    own = traits(term)
    value = own["divergence"] | own["gate"] << 8 | own["outer"] << 12
    return value | sum(own[name] << 14 + i for i, name in enumerate(_FLAGS))
