"""Every CUDA kernel compiles for GPUs that are not here, stays in registers, and has the special functions it says."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest

from fused_kd.rows.cuda import build as cuda_build

pytest.importorskip("cuda.core", reason="needs the extra cuda")

from . import compile_cuda
from .compile_cuda import TARGETS

try:
    cuda_build._nvrtc_version()
except cuda_build.CudaRowError as error:
    pytest.skip(str(error), allow_module_level=True)
if compile_cuda.tool("cuobjdump") is None:
    pytest.skip("the use of registers is unknown: cuobjdump is neither in triton's wheel nor on the PATH")


@functools.cache
def measured(target: str) -> list[dict[str, Any]]:
    return list(compile_cuda.measure([target]))


# One worker compiles a target once, for all that is asked of it; the others than Hopper in `make test-all`.
@pytest.mark.parametrize(
    "target", [pytest.param(t, marks=() if t == "sm_90a" else pytest.mark.exhaustive) for t in TARGETS]
)
def test_no_spills_and_no_more_registers_than_in_the_table(target: str) -> None:
    """Fewer are welcome; more, like a kernel that is not in the table, are to be seen in its diff and meant."""
    kernels = measured(target)
    assert {k["case"]: (k["stack"], k["spills"]) for k in kernels if k["stack"] or k["spills"]} == {}
    assert all(0 < k["registers"] * k["threads"] <= 65536 for k in kernels)
    table = json.loads(compile_cuda.BUDGET.read_text())
    if compile_cuda.nvrtc_version() != table["nvrtc"]:
        pytest.skip(f"cuda_budget.json is of NVRTC {table['nvrtc']}, this is {compile_cuda.nvrtc_version()}")
    used = {k["case"]: k["registers"] for k in kernels}
    remedy = "if it is meant, run: python -m tests.compile_cuda --write"
    assert used.keys() == table["registers"].keys(), remedy
    above = {case: n for case, n in used.items() if n > table["registers"][case][target]}
    assert not above, remedy


def specials(case: str, target: str = "sm_90a") -> list[tuple[float, float]]:
    """(ex2, rcp) an element of each loop over slots in shared memory, in the order of their addresses."""
    case_ = compile_cuda.cases()[case]
    (launch,) = compile_cuda.launches(case_, TARGETS[target])
    width = dict(launch.macros)["FKD_WIDTH"]
    sweeps = [
        loop for loop in compile_cuda.loops(cuda_build.cubin("fkd_row", launch.macros, target)) if loop.has("LDS.128")
    ]
    return [(sweep.has("MUFU.EX2") / width, sweep.has("MUFU.RCP") / width) for sweep in sweeps]


def test_special_functions_are_those_that_the_source_counts() -> None:
    """Statistics, sums, the gradient of a hard row and of an easy one.

    A mixture's loop holds two forms, for shares below and above a half, behind a branch that is the row's: 2 ex2 and
    1 rcp are executed, the code has twice that but for an ex2 or half of one that both share.
    """
    assert specials("no_evo/bf16_out") == [(2.5, 0), (2, 0)]
    assert specials("self_evolution/bf16_out") == [(2.5, 0), (3.5, 2), (0, 0), (2, 0)]
    assert specials("generalized_jsd/bf16_out") == [(2.5, 0), (3.5, 2), (0, 0)]
    assert specials("self_evolution/bf16_logits") == [(2.25, 0), (3.75, 2), (3.75, 2), (2, 0)]
    assert specials("sft/in_place") == [(1.25, 0), (1, 0)]
