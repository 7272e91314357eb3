"""Every Triton kernel compiles for GPUs that are not here, and stays in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fused_kd.objectives import OBJECTIVES

pytest.importorskip("triton", reason="the Triton row needs triton")

ROOT = Path(__file__).resolve().parents[1]
Kernels = dict[str, list[dict[str, Any]]]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SWEEPS = ("statistics", "sums", "gradient")


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """What each kernel uses, by target; compiled in a process without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "compile_kernels.py"), *TARGETS],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    by_target: Kernels = {target: [] for target in TARGETS}
    for line in done.stdout.splitlines():
        kernel = json.loads(line)
        by_target[kernel["target"]].append(kernel)
    return by_target


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(kernels: Kernels, target: str) -> None:
    compiled = kernels[target]
    cases = {kernel["case"] for kernel in compiled}
    assert {f"{name}/{kind}" for name in OBJECTIVES for kind in ("loss", "in_place")} <= cases
    assert {f"streaming/self_evolution/{dtype}/{sweep}" for dtype in ("bf16", "fp32") for sweep in SWEEPS} <= cases
    errors = {kernel["case"]: kernel["error"] for kernel in compiled if "error" in kernel}
    if errors and all("ld.lld not found" in error for error in errors.values()):
        pytest.skip("this triton has no ROCm linker of its own (TRITON_HIP_LLD_PATH names another)")
    assert not errors
    missing = {kernel["missing"] for kernel in compiled if "missing" in kernel}
    if missing:
        pytest.skip(f"compiled, but the use of registers is unknown: {missing.pop()}")
    assert all(kernel["registers"] > 0 for kernel in compiled)
    assert {k["case"]: (k["stack"], k["spills"]) for k in compiled if k["stack"] or k["spills"]} == {}
    # AMD's lane masks of a softcap's tanh may be parked in vector registers: no memory, no matter beside the products.
    assert {k["case"] for k in compiled if k["parked"]} <= {f"streaming/skew_teacher/cold/{sweep}" for sweep in SWEEPS}


@pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("sm_")])
def test_streaming_tiles_are_tensor_core_products_fed_by_asynchronous_copies(kernels: Kernels, target: str) -> None:
    tiles = [kernel for kernel in kernels[target] if kernel["case"].startswith("streaming/self_evolution/bf16/")]
    tiles = [kernel for kernel in tiles if kernel["case"].endswith(SWEEPS) and kernel["products"]]
    assert len(tiles) == len(SWEEPS)  # each beside its small combining kernel, which has no products
    product = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05"}[target]
    assert all(kernel["products"] == product and kernel["async_copies"] for kernel in tiles)


@pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("sm_")])
def test_aligned_rows_are_read_in_16_byte_vectors(kernels: Kernels, target: str) -> None:
    plain = [kernel for kernel in kernels[target] if kernel["case"].endswith(("/loss", "/in_place", "/bf16_logits"))]
    assert len(plain) == 3 * len(OBJECTIVES)
    assert all(kernel["vector_loads"] for kernel in plain)
