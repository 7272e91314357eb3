"""Time and memory of a forward and backward, predicted from a few numbers of a machine; nothing is run.

R is the FLOPs a second of a large GEMM, W the bytes a second (read + written) of a copy: bench/machine.py. FLOPs F and
bytes B are those of bench/counts.py, workspace, chunk and group those of fused_kd's planner. The chunked engine, in
seconds:

======== ====================================================================================
a GEMM   max(F / R, B / W): its operands read once a chunk or group, its result written once
traffic  B / W of what no GEMM hides: dW read and written again by every group but the first,
         passes over a finished dW, upcasts
row      B / W: logits read and gradients written once where a row stays on chip between its
         sweeps (CPU rows, CUDA's), else once a sweep
floor    the sum over the GEMMs with all valid tokens in one chunk
step     the sum of all parts; with W infinite it is the floor
memory   the plan's workspace + the gradients of hidden states and weight
======== ====================================================================================

The addition to dW counts as traffic that no arithmetic hides: 15 % at 1024 tokens a chunk at the shape A of
bench/problems.py and 9 % at B on an H200. A GPU that hides it takes less: chunks of 2048 cost an H200 up to 2.5 % more
than groups that add nothing, where this says 5 % at A.

Two further numbers of a GPU refine this where they are known. With its multiprocessors, F / R is multiplied by what
the last wave of tiles wastes (:func:`waste`), and a GEMM's fp32 result counts as not hidden either: a tile is written
when its products are done. R is then what a GEMM with little to write and full waves reaches. With the clock too, a
dense row takes the time of its instructions where that is longer (:func:`row_seconds`).

The streaming engine has its own parts, each by the same roofline, and traffic, but no row.

What is left out, and where predictions are therefore too low: on a CPU exponentials and logarithms (most of the row's
time) and how a BLAS repacks the weights of every chunk; GEMMs too small for R, the starting of kernels, and with two
numbers alone all that the further ones say. Labels are assumed on the host: only then does the chunked engine drop
ignored tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from fused_kd.engines.dispatch import ENGINES
from fused_kd.engines.plan import Plan
from fused_kd.engines.waves import GEMM_TILE
from fused_kd.forecast import chunked_plan
from fused_kd.rows.select import BACKENDS

from .counts import (
    Counts,
    Product,
    StreamingCounts,
    count_chunked,
    count_streaming,
    gemm_flops,
    gemm_products,
    in_slabs,
)
from .machine import CLOCK, COPY, GEMM, MULTIPROCESSORS
from .problems import TOP_K, Shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Rows whose logits stay on chip from sweep to sweep, beside all on a CPU.
ON_CHIP = ("cuda", "native")
# Instructions of threads that a multiprocessor issues and special functions that it does, a clock (CUDA C++ programming
# guide, arithmetic instructions of 9.0).
ISSUED = 4 * 32
SPECIAL = 16


class Prediction(NamedTuple):
    """``seconds`` of a forward and backward, of which ``parts`` are the sum; ``floor_seconds`` of its bare GEMMs.

    ``workspace_bytes`` beyond inputs and gradients, those of the plan with ``chunk`` tokens at a time, of which
    ``group`` share the gradients' GEMMs; ``gradient_bytes`` of hidden states and weight.
    """

    seconds: float
    floor_seconds: float
    workspace_bytes: int
    chunk: int
    group: int
    parts: dict[str, float]
    gradient_bytes: int

    @property
    def ratio(self) -> float:
        return self.seconds / self.floor_seconds


def predict(
    shape: Shape,
    dtype: torch.dtype,
    machine: Mapping[str, float],
    *,
    engine: str = "chunked",
    on_host: bool,
    top_k: bool = False,
    teacher: bool = True,
    valid: float = 1.0,
    hard: float = 0.0,
    backend: str | None = None,
    memory_budget: int | None = None,
) -> Prediction:
    """fused_kd, all gradients wanted, in one chunk after the other or streaming.

    Args:
        shape, dtype: of the inputs. machine: its numbers, two or more, see :mod:`bench.machine`.
        on_host: on a CPU, where low-precision operands are upcast; else on an NVIDIA GPU.
        top_k: the teacher is a list of 64 entries a token; ``teacher=False``: there is none, as for SFT.
        valid, hard: fractions of tokens that are not ignored, and of those that are hard.
        backend: row implementation; None is the device's own (on a GPU Triton's).
        memory_budget: bytes of workspace.

    Raises:
        ValueError: for a number out of range, an unknown name, or what an engine cannot do.
        BudgetTooSmall: (a ValueError) for a ``memory_budget`` below the smallest plan.
    """
    for name, value, allowed, fine in (
        *((x, getattr(shape, x), "at least 1", getattr(shape, x) >= 1) for x in ("N", "H_s", "H_t", "V")),
        *((f"machine[{x!r}]", machine.get(x), "above 0", machine.get(x, 0) > 0) for x in {GEMM, COPY, *machine}),
        ("valid", valid, f"in (0, 1] and leave one of {shape.N} tokens", 0 < valid <= 1 and round(valid * shape.N) > 0),
        ("hard", hard, "in [0, 1]", 0 <= hard <= 1),
        ("engine", engine, f"one of {', '.join(map(repr, ENGINES))}", engine in ENGINES),
        ("backend", backend, f"None or one of {', '.join(map(repr, BACKENDS))}", backend in (None, *BACKENDS)),
        ("memory_budget", memory_budget, "None or at least 1 byte", memory_budget is None or memory_budget >= 1),
    ):
        if not fine:
            raise ValueError(f"{name} must be {allowed}, got {value!r}")
    n = round(valid * shape.N)
    work = _Work(shape, dtype, machine, n, on_host, not teacher or top_k)
    if engine == "streaming":
        if on_host or top_k or backend not in (None, "triton"):
            raise ValueError(
                "engine='streaming' needs a GPU, a dense teacher and backend='triton' or None, got "
                f"on_host={on_host}, top_k={top_k}, backend={backend!r}"
            )
        found = count_streaming(shape, dtype, teacher=teacher, valid=valid, hard=hard, memory_budget=memory_budget)
        return work.prediction(work.streaming(found), Plan(found.plan.tokens, found.plan.workspace, found.plan.tokens))
    plan = chunked_plan(
        n, shape.H_s, shape.H_t if teacher else None, shape.V, dtype=dtype,
        device=torch.device("cpu" if on_host else "cuda"), upcast=on_host,
        top_k=min(TOP_K, shape.V) if top_k else None, memory_budget=memory_budget,
    )  # fmt: skip
    counts = count_chunked(shape, dtype, plan, top_k=work.alone, valid=n / shape.N, hard=hard, upcasts=on_host)
    return work.prediction(work.chunked(counts, backend), plan)


def beside_model(row: Mapping[str, Any], machine: Mapping[str, float]) -> dict[str, Any] | None:
    """What is predicted of a row of results (bench/worker.py) beside its medians; None where there is nothing.

    From the counts that the row holds. Errors are ``predicted / measured - 1``; what was not measured is None.
    ``memory`` is in bytes over inputs and gradients, as the workspace is.
    """
    seconds = row.get("seconds") or {}
    if not row.get("implementation", "").startswith("fused_kd") or row.get("status") != "ok" or "step" not in seconds:
        return None
    found = _from_row(row, machine)
    if found is None:
        return None
    medians = {key: statistics.median(samples) for key, samples in seconds.items()}
    floor = medians.get("floor")
    pairs = {
        "seconds": (found.seconds, medians["step"]),
        "ratio": (found.ratio, None if floor is None else medians["step"] / floor),
        "memory": (found.workspace_bytes, (row.get("memory") or {}).get("over_inputs_and_gradients")),
    }
    result: dict[str, Any] = {}
    for key, (predicted, measured) in pairs.items():
        result[f"predicted_{key}"] = predicted
        result[f"{key}_error"] = predicted / measured - 1 if measured else None
    return result


def _from_row(row: Mapping[str, Any], machine: Mapping[str, float]) -> Prediction | None:
    shape, dtype, on_host = Shape(**row["shape"]), DTYPES[row["dtype"]], row["device"] == "cpu"
    found, hard = row.get("counts", {}), float(row.get("hard_fraction", 0.0))
    flops = found.get("flops", {})
    if "streaming" in row["implementation"]:
        if on_host or not flops:  # on a host it is Triton's interpreter that ran
            return None
        return predict(
            shape, dtype, machine, engine="streaming", on_host=False, teacher="teacher_logits" in flops,
            valid=row.get("valid", 1.0), hard=hard,
        )  # fmt: skip
    if "gemm_bytes" not in found:  # counting failed
        return None
    # Files from before there were groups name none.
    counts = Counts(**{"group": found["chunk"]} | {field: found[field] for field in Counts._fields if field in found})
    n = flops["student_logits"] // (2 * shape.V * shape.H_s)
    work = _Work(shape, dtype, machine, n, on_host, "teacher_logits" not in flops)
    backend = row["implementation"].rsplit(" ", 1)[-1]
    parts = work.chunked(counts, backend if backend in BACKENDS else None)
    return work.prediction(parts, Plan(counts.chunk, counts.workspace_bytes, counts.group))


class _Work:
    """Seconds of ``n`` valid tokens on a machine; ``alone``: the student's logits are the only ones."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, machine: Mapping[str, float], n: int, on_host: bool, alone: bool
    ) -> None:
        self.shape, self.dtype, self.n, self.on_host, self.alone = shape, dtype, n, on_host, alone
        self.R, self.W = float(machine[GEMM]), float(machine[COPY])
        self.multiprocessors, self.clock = machine.get(MULTIPROCESSORS), machine.get(CLOCK)

    def products(self, plan: Plan, slabs: bool) -> dict[str, Product]:
        """Of the GEMMs alone, without upcasts."""
        # No teacher at all leaves the same GEMMs and sweeps as one of lists.
        dtype = torch.float32 if self.on_host else self.dtype
        valid = self.n / self.shape.N
        return gemm_products(self.shape, dtype, plan, top_k=self.alone, valid=valid, slabs=slabs)

    def gemm(self, flops: int, product: Product) -> float:
        if self.multiprocessors is None:
            return max(flops / self.R, (product.read + product.written) / self.W)
        arithmetic = flops / self.R * waste(product.results, int(self.multiprocessors))
        return max(arithmetic, product.read / self.W) + product.written / self.W

    def chunked(self, counts: Counts, backend: str | None) -> dict[str, float]:
        plan = Plan(counts.chunk, counts.workspace_bytes, counts.group)
        products = self.products(plan, in_slabs(self.dtype, plan, self.n, self.on_host))
        traffic = sum(counts.gemm_bytes.values()) - sum(x.read + x.written for x in products.values())
        parts = {name: self.gemm(counts.flops[name], product) for name, product in products.items()}
        return parts | {"traffic": traffic / self.W, "row": self.row(counts, backend)}

    def row(self, counts: Counts, backend: str | None) -> float:
        backend = backend or (None if self.on_host else "triton")
        once, swept = counts.row_bytes_once, counts.row_bytes_swept
        cost = None if self.on_host or self.alone else ROW_COSTS.get(backend or "")
        if cost is None or self.multiprocessors is None or self.clock is None:
            return (once if self.on_host or backend in ON_CHIP else swept) / self.W
        elements = self.n * self.shape.V
        # A hard token's is the third sweep.
        hard = (swept - once) / (8 * elements) - 1
        written = once // elements - 8
        return row_seconds(cost, elements, hard, written, self.W, self.multiprocessors, self.clock)

    def streaming(self, found: StreamingCounts) -> dict[str, float]:
        parts = {name: max(found.flops[name] / self.R, moved / self.W) for name, moved in found.gemm_bytes.items()}
        if self.multiprocessors is not None:
            for name, result in found.results.items():
                parts[name] = max(parts[name], found.flops[name] / self.R * waste([result], int(self.multiprocessors)))
        return parts | {"traffic": found.traffic / self.W}

    def prediction(self, parts: dict[str, float], plan: Plan) -> Prediction:
        flops = gemm_flops(self.shape, self.alone, self.n / self.shape.N)
        bare = self.products(Plan(self.n, 0, self.n), slabs=False)
        floor = sum(self.gemm(flops[name], product) for name, product in bare.items())
        gradients = self.dtype.itemsize * (self.shape.N + self.shape.V) * self.shape.H_s
        return Prediction(sum(parts.values()), floor, plan.workspace, plan.chunk, plan.group, parts, gradients)


def waste(results: Iterable[tuple[int, int]], multiprocessors: int) -> float:
    """Time over that of full waves without a margin, at least 1, of GEMMs with results of these (rows, columns).

    A result is made in tiles, one a multiprocessor at a time, and the last wave takes as long as a full one. Smaller
    tiles, or a long inner dimension split over several, would lose less where tiles are few.
    """
    made = useful = 0
    for rows, columns in results:
        tiles = min(-(-rows // a) * -(-columns // b) for a, b in (GEMM_TILE, GEMM_TILE[::-1]))
        made += -(-tiles // multiprocessors) * multiprocessors * GEMM_TILE[0] * GEMM_TILE[1]
        useful += rows * columns
    return made / useful


class Sweep(NamedTuple):
    """Of an element in one sweep."""

    instructions: float
    specials: float


class RowCost(NamedTuple):
    """A dense teacher's row under a gated mixture; the gradient of a ``hard`` token and of an ``easy`` one."""

    statistics: Sweep
    sums: Sweep
    hard: Sweep
    easy: Sweep
    on_chip: bool


# Counted from sm_90 machine code of SelfEvolution on fp32 logits with bf16 gradients: Triton's are the main loops of
# tests/kernel_budget.json; the CUDA row's what a thread executes, with what it asks for ahead.
ROW_COSTS = {
    "triton": RowCost(Sweep(17.4, 2.25), Sweep(45.8, 3), Sweep(29.6, 3), Sweep(19.1, 2), on_chip=False),
    "cuda": RowCost(Sweep(29.7, 2.5), Sweep(49.8, 3), Sweep(15.8, 0), Sweep(26.5, 2), on_chip=True),
}


def row_seconds(
    cost: RowCost, elements: float, hard: float, written: int, bandwidth: float, multiprocessors: float, clock: float
) -> float:
    """Of ``elements`` fp32 logits a side, a share ``hard`` of them in hard rows; ``written`` bytes a logit gradient.

    Each sweep takes the longest of its bytes, instructions and special functions. A row that stays on chip reads the
    next one's logits in its first and last sweep; what it asks for ahead, so that memory works in the sums between, is
    not counted. No kernel issues at every clock: these are least times.
    """

    def arithmetic(*sweeps: Sweep) -> float:
        instructions, specials = (sum(column) for column in zip(*sweeps, strict=True))
        return max(instructions / ISSUED, specials / SPECIAL) / (multiprocessors * clock)

    read = 8 / bandwidth
    gradient = Sweep(*(hard * a + (1 - hard) * b for a, b in zip(cost.hard, cost.easy, strict=True)))
    if cost.on_chip:
        moving = max(read + written / bandwidth, arithmetic(cost.statistics, gradient))
        return elements * (moving + hard * arithmetic(cost.sums))
    sums = max(read, arithmetic(cost.sums))
    return elements * (
        max(read, arithmetic(cost.statistics)) + hard * sums + max(read + written / bandwidth, arithmetic(gradient))
    )
