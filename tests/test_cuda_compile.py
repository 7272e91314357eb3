"""Every CUDA kernel compiles for GPUs that are not here, stays in registers, and has the special functions it says."""

from __future__ import annotations

import json

import pytest

from fused_kd.rows.cuda import build as cuda_build

pytest.importorskip("cuda.core", reason="needs the extra cuda")

from . import compile_cuda, sass
from .compile_cuda import TARGETS

try:
    cuda_build._nvrtc_version()
except cuda_build.CudaRowError as error:
    pytest.skip(str(error), allow_module_level=True)
NVDISASM = sass.find_tool("nvdisasm")
if NVDISASM is None or sass.find_tool("cuobjdump") is None:
    pytest.skip("cuobjdump and nvdisasm are neither in triton's wheel nor on the PATH", allow_module_level=True)

# By case, (ex2, rcp) an element of each loop over slots in shared memory: statistics, sums, the gradient of a hard row
# and of an easy one.
SPECIALS = {
    "no_evo/bf16_out": [(2.5, 0), (2, 0)],
    "self_evolution/bf16_out": [(2.5, 0), (2, 1), (0, 0), (2, 0)],
    "generalized_jsd/bf16_out": [(2.5, 0), (2, 1), (0, 0)],
    "self_evolution/bf16_logits": [(2.25, 0), (2, 1), (2, 1), (2, 0)],
    "sft/in_place": [(1.25, 0), (1, 0)],
}
FEW = {*SPECIALS, "top_k/bf16_out"}
# Some of each class in every run; all of them, for all targets, in make test-all.
EVERY = [pytest.param(target, None, id=target, marks=pytest.mark.exhaustive) for target in TARGETS]


@pytest.mark.parametrize("target, chosen", [pytest.param("sm_90a", FEW, id="few"), *EVERY])
def test_no_spills_and_no_more_registers_than_in_the_table(target: str, chosen: set[str] | None) -> None:
    """Fewer are welcome; more, like a kernel that is not in the table, are to be seen in its diff and meant."""
    kernels = list(compile_cuda.measure([target], chosen))
    assert {k["case"]: (k["stack"], k["spills"]) for k in kernels if k["stack"] or k["spills"]} == {}
    assert all(0 < k["registers"] * k["threads"] <= 65536 for k in kernels)
    table = json.loads(compile_cuda.BUDGET.read_text())
    if compile_cuda.nvrtc_version() != table["nvrtc"]:
        pytest.skip(f"cuda_budget.json is of NVRTC {table['nvrtc']}, this is {compile_cuda.nvrtc_version()}")
    used, budget = {k["case"]: k["registers"] for k in kernels}, table["registers"]
    remedy = "if it is meant, run: python -m tests.compile_cuda --write"
    assert used.keys() <= budget.keys() and (chosen or used.keys() == budget.keys()), remedy
    above = {case: n for case, n in used.items() if n > budget[case][target]}
    assert not above, remedy


@pytest.mark.parametrize("case", SPECIALS)
def test_special_functions_are_those_that_the_source_counts(case: str) -> None:
    (launch,) = compile_cuda.launches(compile_cuda.cases()[case], TARGETS["sm_90a"])
    width = dict(launch.macros)["FKD_WIDTH"]
    found = []
    for loop in sass.inner_loops(cuda_build.cubin("fkd_row", launch.macros, "sm_90a"), NVDISASM):
        if any(name.startswith("LDS.128") for name in loop):
            found.append(tuple(sum(name.startswith(x) for name in loop) / width for x in ("MUFU.EX2", "MUFU.RCP")))
    assert found == SPECIALS[case]
