"""Every Triton kernel compiles for GPUs that are not here, and stays in registers."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from fused_kd.objectives import OBJECTIVES

triton = pytest.importorskip("triton", reason="the Triton row needs triton")

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("condense", "expand")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# one target in every run, the others in `make test-all`
CHOSEN = [pytest.param(t, marks=() if t == "sm_90" else pytest.mark.exhaustive) for t in TARGETS]
NVIDIA = [target for target in CHOSEN if str(target.values[0]).startswith("sm_")]
SWEEPS = ("statistics", "sums", "gradient")


@functools.cache
def compiled(target: str) -> list[dict[str, Any]]:
    """What each kernel uses; compiled in a process without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels", target],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def measured(target: str) -> list[dict[str, Any]]:
    """As :func:`compiled`, where the use of registers can be known."""
    kernels = compiled(target)
    errors = {kernel["case"]: kernel["error"] for kernel in kernels if "error" in kernel}
    if errors and all("ld.lld not found" in error for error in errors.values()):
        pytest.skip("this triton has no ROCm linker of its own (TRITON_HIP_LLD_PATH names another)")
    assert not errors
    missing = {kernel["missing"] for kernel in kernels if "missing" in kernel}
    if missing:
        pytest.skip(f"compiled, but the use of registers is unknown: {missing.pop()}")
    return kernels


@pytest.mark.parametrize("target", CHOSEN)
def test_compiles_without_spills(target: str) -> None:
    kernels = measured(target)
    cases = {kernel["case"] for kernel in kernels}
    assert {f"{name}/{kind}" for name in OBJECTIVES for kind in ("loss", "in_place")} <= cases
    assert {f"top_k/K={K}/bf16{cold}/{part}" for K in (64, 256) for cold in ("", "/cold") for part in PARTS} <= cases
    assert {f"streaming/self_evolution/{dtype}/{sweep}" for dtype in ("bf16", "fp32") for sweep in SWEEPS} <= cases
    assert all(kernel["registers"] > 0 for kernel in kernels)
    assert {k["case"]: (k["stack"], k["spills"]) for k in kernels if k["stack"] or k["spills"]} == {}
    # AMD's scalar registers may be parked in lanes of vector registers: moves, no memory, no matter beside products or
    # in a kernel without a loop.
    assert all(kernel["case"].startswith(("streaming/", "filter/")) for kernel in kernels if kernel["parked"])


@pytest.mark.parametrize("target", NVIDIA)
def test_streaming_tiles_are_tensor_core_products_fed_by_asynchronous_copies(target: str) -> None:
    tiles = [kernel for kernel in compiled(target) if kernel["case"].startswith("streaming/self_evolution/bf16/")]
    tiles = [kernel for kernel in tiles if kernel["case"].endswith(SWEEPS)]
    assert len(tiles) == len(SWEEPS)
    product = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05"}[target]
    assert all(kernel["products"] == product and kernel["async_copies"] for kernel in tiles)
    if target == "sm_90":  # half of a tile of 128 x 128, or of 64 x 128
        shapes = {kernel["case"].rpartition("/")[2]: kernel["wgmma"] for kernel in tiles}
        assert shapes == {"statistics": "m64n128k16", "sums": "m64n64k16", "gradient": "m64n128k16"}


@pytest.mark.parametrize("target", CHOSEN)
def test_registers_stay_within_the_table(target: str) -> None:
    """Fewer are welcome; more, like a kernel that is not in the table, are to be seen in its diff and meant."""
    table = json.loads((ROOT / "tests" / "kernel_budget.json").read_text())
    if triton.__version__ != table["triton"]:
        pytest.skip(f"kernel_budget.json is of triton {table['triton']}, this is {triton.__version__}")
    budget = {case: row[target]["registers"] for case, row in table["kernels"].items()}
    used = {kernel["case"]: kernel["registers"] for kernel in measured(target)}
    remedy = "if it is meant, run: python -m tests.compile_kernels --write"
    assert used.keys() == budget.keys(), remedy
    above = {case: f"{n}, was {budget[case]}" for case, n in used.items() if n > budget[case]}
    assert not above, remedy


def test_instructions_of_the_main_loops_stay_within_the_table() -> None:
    """By element, in each main loop of some rows. Another number of loops is to be seen in the table's diff too."""
    table = json.loads((ROOT / "tests" / "kernel_budget.json").read_text())
    if triton.__version__ != table["triton"]:
        pytest.skip(f"kernel_budget.json is of triton {table['triton']}, this is {triton.__version__}")
    budget = {
        case: row["sm_90"]["instructions"] for case, row in table["kernels"].items() if "instructions" in row["sm_90"]
    }
    used = {
        kernel["case"]: [loop["instructions"] for loop in kernel["loops"]]
        for kernel in measured("sm_90")
        if kernel.get("loops")
    }
    if not used:
        pytest.skip("compiled, but there is no nvdisasm to read the machine code with")
    remedy = "if it is meant, run: python -m tests.compile_kernels --write"
    assert {case: len(loops) for case, loops in used.items()} == {case: len(n) for case, n in budget.items()}, remedy
    above = {
        case: f"{loops}, was {budget[case]}"
        for case, loops in used.items()
        if any(n > allowed for n, allowed in zip(loops, budget[case], strict=True))
    }
    assert not above, remedy


def test_main_loops_wait_for_nothing_and_move_16_bytes_at_a_time() -> None:
    """Also where the vocabulary is odd, if only the rows' stride is not; where that is odd too, nothing is wide."""
    counted = {kernel["case"]: kernel["loops"] for kernel in measured("sm_90") if kernel.get("loops")}
    if not counted:
        pytest.skip("compiled, but there is no nvdisasm to read the machine code with")
    assert {"self_evolution/in_place", "self_evolution/padded", "self_evolution/odd"} <= counted.keys()
    for case, loops in counted.items():
        assert all(loop["barriers"] == loop["shuffles"] == loop["shared"] == 0 for loop in loops), case
        widths = {int(width) for loop in loops for width in (*loop["loads"], *loop["stores"])}
        assert widths == ({2, 4} if case == "self_evolution/odd" else {16}), case


def test_fast_cases_have_every_kernel_and_divergence() -> None:
    from .compile_kernels import FAST

    table = json.loads((ROOT / "tests" / "kernel_budget.json").read_text())
    fast = [case for case in table["kernels"] if FAST.fullmatch(case)]

    def kernels(cases: Iterable[str]) -> set[tuple[str, str]]:
        parts = [case.split("/") for case in cases]
        return {("row", "") if part[0] in OBJECTIVES else (part[0], part[-1]) for part in parts}

    def divergences(cases: Iterable[str]) -> set[str | None]:
        return {
            OBJECTIVES[name].kind.divergence for name in (case.split("/")[0] for case in cases) if name in OBJECTIVES
        }

    assert kernels(fast) == kernels(table["kernels"])
    assert divergences(fast) == divergences(table["kernels"])
    assert len(fast) < len(table["kernels"]) * 0.6


@pytest.mark.parametrize("target", NVIDIA)
def test_aligned_rows_are_read_in_16_byte_vectors(target: str) -> None:
    plain = [kernel for kernel in compiled(target) if kernel["case"].endswith(("/loss", "/in_place", "/bf16_logits"))]
    assert len(plain) == 3 * len(OBJECTIVES)
    narrow = {kernel["case"] for kernel in plain if not kernel["vector_loads"]}
    assert narrow <= {"generalized_jsd/bf16_logits"}  # half blocks: 8-byte loads
