"""Every Triton kernel compiles for GPUs that are not here, and stays in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fused_kd.objectives import OBJECTIVES, parse

triton = pytest.importorskip("triton", reason="the Triton row needs triton")

ROOT = Path(__file__).resolve().parents[1]
REMEDY = "if it is meant, run: python -m tests.compile_kernels --write"
SWEEPS = ("statistics", "sums", "gradient")
# What some main loops load and store, in bytes. Padded rows have fp32 logits and a bf16 gradient, 4 columns a thread.
NARROW = {"self_evolution/odd": ({2, 4}, {4}), "self_evolution/padded": ({16}, {8})}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


class Compiled(NamedTuple):
    target: str
    few: bool
    kernels: list[dict[str, Any]]

    def with_registers(self) -> list[dict[str, Any]]:
        errors = {kernel["case"]: kernel["error"] for kernel in self.kernels if "error" in kernel}
        if errors and all("ld.lld not found" in error for error in errors.values()):
            pytest.skip("this triton has no ROCm linker of its own (TRITON_HIP_LLD_PATH names another)")
        assert not errors
        if missing := {kernel["missing"] for kernel in self.kernels if "missing" in kernel}:
            pytest.skip(f"compiled, but the use of registers is unknown: {missing.pop()}")
        return self.kernels

    def loops(self) -> dict[str, list[dict[str, Any]]]:
        """The main loops of some rows, whose machine code is read on sm_90."""
        if self.target != "sm_90":
            pytest.skip("counted on sm_90")
        counted = {kernel["case"]: kernel["loops"] for kernel in self.with_registers() if kernel.get("loops")}
        if not counted:
            pytest.skip("compiled, but there is no nvdisasm to read the machine code with")
        return counted


# A kernel of each class in every run; all of them, for all targets, in make test-all.
EVERY = [pytest.param((target, False), id=target, marks=pytest.mark.exhaustive) for target in TARGETS]


@pytest.fixture(scope="module", params=[pytest.param(("sm_90", True), id="few"), *EVERY])
def compiled(request: pytest.FixtureRequest) -> Compiled:
    """What each kernel uses; compiled in a process without the interpreter."""
    target, few = request.param
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compile_kernels", target, *["--few"] * few]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Compiled(target, few, [json.loads(line) for line in done.stdout.splitlines()])


def table(column: str, compiled: Compiled) -> dict[str, Any]:
    """``column`` of kernel_budget.json for this target, of the cases that have it and are compiled."""
    whole = json.loads((ROOT / "tests" / "kernel_budget.json").read_text())
    if triton.__version__ != whole["triton"]:
        pytest.skip(f"kernel_budget.json is of triton {whole['triton']}, this is {triton.__version__}")
    rows = {case: row[compiled.target] for case, row in whole["kernels"].items()}
    cases = {kernel["case"] for kernel in compiled.kernels} if compiled.few else rows.keys()
    return {case: row[column] for case, row in rows.items() if case in cases and column in row}


def test_compiles_without_spills(compiled: Compiled) -> None:
    kernels = compiled.with_registers()
    if not compiled.few:
        cases = {kernel["case"] for kernel in kernels}
        assert {f"{name}/{kind}" for name in OBJECTIVES for kind in ("loss", "in_place")} <= cases
    assert all(kernel["registers"] > 0 for kernel in kernels)
    assert {k["case"]: (k["stack"], k["spills"]) for k in kernels if k["stack"] or k["spills"]} == {}
    # AMD's scalar registers may be parked in lanes of vector registers: moves, no memory, no matter beside products or
    # in a kernel without a loop.
    assert all(kernel["case"].startswith(("streaming/", "filter/")) for kernel in kernels if kernel["parked"])


def test_streaming_tiles_are_tensor_core_products_fed_by_asynchronous_copies(compiled: Compiled) -> None:
    if compiled.target == "gfx942":
        pytest.skip("of NVIDIA's")
    tiles = [kernel for kernel in compiled.kernels if kernel["case"].startswith("streaming/self_evolution/bf16/")]
    tiles = [kernel for kernel in tiles if kernel["case"].endswith(SWEEPS)]
    assert len(tiles) == len(SWEEPS)
    product = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05"}[compiled.target]
    assert all(kernel["products"] == product and kernel["async_copies"] for kernel in tiles)
    if compiled.target == "sm_90":  # half of a tile of 128 x 128, or of 64 x 128
        shapes = {kernel["case"].rpartition("/")[2]: kernel["wgmma"] for kernel in tiles}
        assert shapes == {"statistics": "m64n128k16", "sums": "m64n64k16", "gradient": "m64n128k16"}


def test_registers_stay_within_the_table(compiled: Compiled) -> None:
    """Fewer are welcome; more, like a kernel that is not in the table, are to be seen in its diff and meant."""
    budget = table("registers", compiled)
    used = {kernel["case"]: kernel["registers"] for kernel in compiled.with_registers()}
    assert used.keys() == budget.keys(), REMEDY
    above = {case: f"{n}, was {budget[case]}" for case, n in used.items() if n > budget[case]}
    assert not above, REMEDY


def test_instructions_of_the_main_loops_stay_within_the_table(compiled: Compiled) -> None:
    """By element, in each main loop of some rows. Another number of loops is to be seen in the table's diff too."""
    used = {case: [loop["instructions"] for loop in loops] for case, loops in compiled.loops().items()}
    budget = table("instructions", compiled)
    assert {case: len(loops) for case, loops in used.items()} == {case: len(n) for case, n in budget.items()}, REMEDY
    above = {
        case: f"{loops}, was {budget[case]}"
        for case, loops in used.items()
        if any(n > allowed for n, allowed in zip(loops, budget[case], strict=True))
    }
    assert not above, REMEDY


@pytest.mark.parametrize(
    "total, dearest, most",
    [
        ("sft+generalized_jsd", "generalized_jsd", 1.15),
        ("forward_kd+reverse_kd", "reverse_kd", 1.15),
        ("self_evolution+generalized_jsd", "generalized_jsd", 1.4),  # two mixtures, each with logarithms of its own
    ],
)
def test_sums_cost_little_more_than_their_dearest_term(total: str, dearest: str, most: float) -> None:
    kernels = json.loads((ROOT / "tests" / "kernel_budget.json").read_text())["kernels"]
    of_sum, of_term = (sum(kernels[f"{name}/in_place"]["sm_90"]["instructions"]) for name in (total, dearest))
    assert of_sum <= most * of_term


def test_main_loops_wait_for_nothing_and_move_16_bytes_at_a_time(compiled: Compiled) -> None:
    """Also where the vocabulary is odd, if only the rows' stride is not; where that is odd too, nothing is wide."""
    counted = compiled.loops()
    assert {"self_evolution/in_place", "self_evolution/padded", "self_evolution/odd"} <= counted.keys()
    for case, loops in counted.items():
        assert all(loop["barriers"] == loop["shuffles"] == loop["shared"] == 0 for loop in loops), case
        loads, stores = ({int(width) for loop in loops for width in loop[kind]} for kind in ("loads", "stores"))
        wide, also_wide = NARROW.get(case, ({16}, {16}))
        assert loads == wide and stores == (set() if case.endswith("statistics") else also_wide), case


def test_aligned_rows_are_read_in_16_byte_vectors(compiled: Compiled) -> None:
    if compiled.target == "gfx942":
        pytest.skip("of NVIDIA's")
    plain = [k for k in compiled.kernels if k["case"].endswith(("/loss", "/in_place", "/bf16_logits"))]
    assert len(plain) == (4 if compiled.few else 3 * len(OBJECTIVES))
    narrow = {kernel["case"] for kernel in plain if not kernel["vector_loads"]}
    assert narrow <= {"generalized_jsd/bf16_logits"}  # half blocks: 8-byte loads


@pytest.mark.parametrize("chosen", ["--fast", "--few"])
def test_a_choice_of_cases_has_every_class_of_kernels(chosen: str) -> None:
    """And ``--fast``, of which the oldest Triton alone is asked, every kernel and set of divergences."""
    from .compile_kernels import CHOICES, SUMS

    cases = json.loads((ROOT / "tests" / "kernel_budget.json").read_text())["kernels"].keys()
    few = {case for case in cases if CHOICES[chosen].fullmatch(case)}

    def kind(case: str) -> tuple[str, ...]:
        name, *_, kernel = case.split("/")
        if name not in OBJECTIVES and name not in SUMS:
            return (name,) if chosen == "--few" else (name, kernel)
        return ("row",) if chosen == "--few" else ("row", *divergences(SUMS.get(name, name)))

    def divergences(objective: str) -> list[str]:
        return sorted({str(term.divergence) for term in parse(objective).spec.terms})

    assert {kind(case) for case in few} == {kind(case) for case in cases}
    assert len(few) < len(cases) * (0.6 if chosen == "--fast" else 0.2)
