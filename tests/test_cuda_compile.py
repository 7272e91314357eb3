"""Every CUDA kernel compiles for GPUs that are not here, stays in registers, and has the special functions it says."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest

from fused_kd.rows import cuda_build

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


# One worker compiles a target once, for all that is asked of it.
@pytest.mark.parametrize("target", TARGETS)
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
