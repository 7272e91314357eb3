"""Compile the CUDA kernels for GPUs that need not be present, and say what each uses.

The kernels come from real calls of the rows, whose launches are diverted into compilation.
``python -m tests.compile_cuda --write`` writes cuda_budget.json, which test_cuda_compile.py holds kernels to. Its diff
shows what a change costs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from fused_kd.objectives import OBJECTIVES, parse
from fused_kd.rows.contract import Logits, RowInputs, RowOutputs, Sparse
from fused_kd.rows.cuda import build as cuda_build
from fused_kd.rows.cuda import row as cuda_row
from fused_kd.rows.cuda import top_k as top_k_cuda
from fused_kd.rows.cuda.launch import Device, Launch
from fused_kd.terms import RowSpec, Scalars, Term

from . import sass

HOPPER, AMPERE = Device(8, 232_448, 233_472), Device(1, 166_912, 167_936)
TARGETS = {"sm_80": AMPERE, "sm_90a": HOPPER, "sm_100a": HOPPER}
BUDGET = Path(__file__).with_name("cuda_budget.json")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
V = 128256

# The student's and the teacher's dtype, and that of dlogits.
DTYPES = {"in_place": (FP32, FP32, FP32), "bf16_out": (FP32, FP32, BF16), "bf16_logits": (BF16, BF16, BF16)}
# Every formula is compiled for the engine's fp32 logits and bf16 gradients, these for the other dtypes too: in place
# only the store differs, and 16-bit logits are a caller's own.
ALSO_OTHERWISE = ("sft", "no_evo", "reverse_kd", "self_evolution", "generalized_jsd", "adaptive_kl")
SPECS = {name: cls().spec for name, cls in OBJECTIVES.items() if not cls().spec.ranked} | {
    "kl": RowSpec.of(Term("kl")),
    "reverse_kl": RowSpec.of(Term("reverse_kl")),
}
SUMS = ("sft+generalized_jsd", "forward_kd+reverse_kd", "self_evolution+generalized_jsd+z_loss", "acceptance+sft")
SPECS |= {text: parse(text).spec for text in SUMS}


class Case(NamedTuple):
    spec: RowSpec
    student: torch.dtype = FP32
    teacher: torch.dtype = FP32
    gradient: torch.dtype = BF16
    V: int = V
    softcap: float | None = None
    cold: bool = False
    K: int | None = None
    tail: str = "uniform"
    finite: bool = True


def cases() -> dict[str, Case]:
    made = {
        f"{name}/{kind}": Case(spec, *dtypes)
        for name, spec in SPECS.items()
        for kind, dtypes in DTYPES.items()
        if kind == "bf16_out" or name in ALSO_OTHERWISE
    }
    gated, hard_label = SPECS["self_evolution"], SPECS["skew_teacher"]
    made |= {
        "self_evolution/fp16_logits": Case(gated, FP16, FP16, FP16),
        "self_evolution/mixed_dtypes": Case(gated, BF16, FP32, BF16),
        "self_evolution/odd": Case(gated, V=50257),
        "self_evolution/odd_bf16": Case(gated, BF16, BF16, BF16, V=50257),
        "self_evolution/V=1000": Case(gated, V=1000),
        "self_evolution/V=32000": Case(gated, V=32000),
        "self_evolution/excluding": Case(gated, finite=False),
        "reverse_kd/excluding": Case(SPECS["reverse_kd"], finite=False),
        "self_evolution/softcap": Case(gated, softcap=30.0),
        "self_evolution/uniform": Case(gated, K=65),
        "generalized_jsd/softcap": Case(SPECS["generalized_jsd"], softcap=30.0),
        "sft/softcap": Case(SPECS["sft"], softcap=30.0),
        "forward_kd/cold": Case(SPECS["forward_kd"], cold=True),
        "skew_teacher/cold": Case(hard_label, cold=True),
        "skew_teacher/cold+softcap+bf16": Case(hard_label, BF16, BF16, BF16, softcap=30.0, cold=True),
    }
    for kind, dtypes in DTYPES.items():
        made[f"top_k/{kind}"] = Case(SPECS["forward_kd"], *dtypes, K=65, tail="bucket")
    made["top_k/cold"] = Case(SPECS["forward_kd"], K=65, tail="renormalize", cold=True)
    made["top_k/softcap+odd"] = Case(SPECS["forward_kd"], V=50257, K=65, tail="renormalize", softcap=30.0)
    return made


def launches(case: Case, device: Device) -> list[Launch]:
    """What a call launches: one kernel or, around a dense row that is left out, two."""
    z = torch.empty(2, case.V, dtype=case.student)
    labels = torch.zeros(2, dtype=torch.int64)
    teacher: Logits | Sparse | None = None
    if case.K is not None:
        teacher = Sparse(torch.zeros(2, case.K, dtype=torch.int64), torch.zeros(2, case.K), torch.zeros(2), case.tail)
    elif case.spec.needs_teacher:
        teacher = Logits(torch.empty(2, case.V, dtype=case.teacher), 1.0, case.softcap, case.finite)
    student = Logits(z, 1.0, case.softcap, case.finite)
    scalars = torch.ones(1, len(case.spec.terms), len(Scalars._fields))
    inputs = RowInputs(student, teacher, labels, None, scalars, case.spec, case.cold)
    gradient = z if case.gradient == case.student else torch.empty(2, case.V, dtype=case.gradient)
    outputs = RowOutputs(torch.empty(2), torch.empty(2), torch.empty(2, dtype=torch.bool), gradient)
    diverted: list[Launch] = []
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(cuda_build, "device", lambda which: device))
        patches.enter_context(mock.patch.object(cuda_build, "launch", lambda where, call: diverted.append(call)))
        if case.K is None or case.tail == "uniform":
            cuda_row.row(inputs, outputs)
        else:
            patches.enter_context(mock.patch.object(top_k_cuda, "dense", lambda inputs, outputs: None))
            top_k_cuda.row(inputs, outputs)
    return diverted


def measure(targets: list[str], chosen: Container[str] | None = None) -> Iterator[dict[str, Any]]:
    """Each kernel's ``registers``, ``stack``, ``spills`` and a block's ``threads``; or those of ``chosen`` cases."""
    cuobjdump = sass.find_tool("cuobjdump")
    assert cuobjdump is not None
    for target in targets:
        for name, case in cases().items():
            if chosen is not None and name not in chosen:
                continue
            for launch in launches(case, TARGETS[target]):
                part = "" if launch.kernel == "fkd_row" else f"/{launch.kernel.removeprefix('fkd_')}"
                code = cuda_build.cubin(launch.kernel, launch.macros, target)
                yield {"target": target, "case": name + part, "threads": launch.cut.threads} | sass.usage(
                    code, cuobjdump
                )


@functools.cache
def nvrtc_version() -> str:
    return ".".join(map(str, cuda_build._nvrtc_version()))


def write_budget() -> None:
    """All cases of all targets, a line each."""
    table: dict[str, dict[str, int]] = {}
    for kernel in measure(list(TARGETS)):
        table.setdefault(kernel["case"], {})[kernel["target"]] = kernel["registers"]
        if kernel["stack"] or kernel["spills"]:
            print(f"spills: {kernel}", file=sys.stderr)
    lines = ",\n".join(f"    {json.dumps(case)}: {json.dumps(entry)}" for case, entry in table.items())
    BUDGET.write_text(f'{{\n  "nvrtc": {json.dumps(nvrtc_version())},\n  "registers": {{\n{lines}\n  }}\n}}\n')


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write_budget()
    else:
        for kernel in measure(sys.argv[1:] or list(TARGETS)):
            print(json.dumps(kernel | {"nvrtc": nvrtc_version()}), flush=True)
