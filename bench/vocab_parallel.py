"""``python -m bench.vocab_parallel``: a vocabulary-parallel step predicted from a machine's numbers; nothing is timed.

A rank of P makes the GEMMs of V / P columns (bench/prediction.py, every chunk adding to dW), its row moves
``row_bytes`` a logit, and it sends what ``fused_kd.parallel.predicted_traffic`` says. All of it travels beside the
GEMMs of another chunk but the first chunk's statistics, the last one's second message and its hidden gradient: these
show, or what the GEMMs cannot hide.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused_kd as fk
from fused_kd.parallel import predicted_traffic
from fused_kd.rows.contract import Logits, RowInputs, RowOutputs, Shards
from fused_kd.rows.torch.sharded import row
from fused_kd.tuning import tuned

from .machine import COPY, GEMM
from .prediction import predict
from .shapes import Shape

# An H200 in an NVLink domain of eight, and between such domains: per GPU and direction, as collectives reach it.
H200 = {GEMM: 790e12, COPY: 4.3e12, "link": 360e9, "network": 45e9, "latency": 25e-6}
# Reads of both sides in each of three sweeps and one write of bf16: what Triton's kernels move, one a sweep.
KERNEL_ROW_BYTES = 3 * 8 + 2
A = Shape("A", 8192, 4096, 5120, 128256)
B = Shape("B", 8192, 896, 3584, 151936)


class Step(NamedTuple):
    """Milliseconds of a rank: GEMMs and the traffic about them, row, communication that nothing hides; their sum.

    ``sent`` and ``weights`` are megabytes: sent by the rank, and of its slices of both heads with the student's fp32
    gradient.
    """

    gemms: float
    row: float
    exposed: float
    total: float
    sent: float
    weights: float


class _Bytes(TorchDispatchMode):
    """Adds up the bytes of large operands and results of every operation that is not a view."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.total = least, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view or "empty" in str(func):
            return result
        into = {id(kwargs["out"])} if "out" in kwargs else set()
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and id(x) not in into]
        written = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.total += sum(x.numel() * x.element_size() for x in (*read, *written) if x.numel() >= self.least)
        return result


def row_bytes(objective: fk.objectives.Objective, C: int = 16, V: int = 512) -> float:
    """Bytes that the PyTorch row of a slice reads and writes for each logit, counted operation by operation.

    As on an accelerator, where every token takes the branch of the hard ones.
    """
    g = torch.Generator().manual_seed(0)
    z, z_t = torch.randn(C, V, generator=g), 3 * torch.randn(C, V, generator=g)
    labels = torch.randint(0, V, (C,), generator=g)
    spec = objective.spec
    teacher = None if spec.divergence is None else Logits(z_t, 1.0, None, True)
    everyone = torch.ones(C, dtype=torch.bool) if spec.gated else None
    scalars = torch.tensor(objective.scalars())
    inputs = RowInputs(Logits(z, 1.0, None, True), teacher, labels, None, scalars, spec, False, everyone)
    outputs = RowOutputs(torch.empty(C), torch.empty(C), torch.empty(C, dtype=torch.bool), torch.empty(C, V))
    with _Bytes(C * V // 2) as counted:
        generator = row(inputs, outputs, Shards("", 0, (V,)))
        message = next(generator)
        while True:
            try:
                message = generator.send(message.unsqueeze(0))
            except StopIteration:
                return counted.total / (C * V)


def predict_rank(
    shape: Shape,
    ranks: int,
    *,
    machine: dict[str, float] = H200,
    bytes_per_logit: float = KERNEL_ROW_BYTES,
    swept: float = 1.0,
    link: str = "link",
    reduce: str = "all",
) -> Step:
    """One rank of ``ranks``, bf16, all gradients wanted; ``swept`` and ``reduce`` as of ``predicted_traffic``."""
    local = shape._replace(V=-(-shape.V // ranks))
    with tuned(device_chunk=0):  # as the sharded engine, whose chunks alternate
        alone = predict(local, torch.bfloat16, machine, on_host=False)
    gemms = sum(value for name, value in alone.parts.items() if name != "row")
    row_seconds = bytes_per_logit * shape.N * local.V / machine[COPY]
    sent = predicted_traffic(shape.N, shape.H_s, ranks, swept=swept, reduce=reduce)
    exposed = 0.0
    if ranks > 1:
        chunks = -(-shape.N // alone.chunk)
        seconds = sent.total / machine[link]
        exposed = max(seconds / chunks, seconds - gemms) + machine["latency"] * (1 + (swept > 0))
    weights = local.V * (2 * shape.H_s + 2 * shape.H_t + 4 * shape.H_s)
    total = gemms + row_seconds + exposed
    return Step(gemms * 1e3, row_seconds * 1e3, exposed * 1e3, total * 1e3, sent.total / 1e6, weights / 1e6)


def table(shapes: Sequence[Shape] = (A, B), machine: dict[str, float] = H200) -> str:
    """Markdown: shapes and groups by milliseconds, with Triton's row and with the one of PyTorch operations."""
    slow = row_bytes(fk.SelfEvolution())
    lines = [
        "| shape | GPUs | GEMMs | row | exposed | step | row in PyTorch | step with it | MB sent | MB of heads |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for shape in shapes:
        for ranks, link, title in (
            (1, "link", "1"),
            (8, "link", "8"),
            (8, "link", "64 = 8 x 8"),
            (64, "network", "64"),
        ):
            fast = predict_rank(shape, ranks, machine=machine, link=link)
            other = predict_rank(shape, ranks, machine=machine, bytes_per_logit=slow, link=link)
            numbers = (fast.gemms, fast.row, fast.exposed, fast.total, other.row, other.total)
            cells = " | ".join(f"{value:.1f}" for value in numbers)
            lines.append(f"| {shape.name} | {title} | {cells} | {fast.sent:.0f} | {fast.weights:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in H200.items():
        parser.add_argument(f"--{name}", type=float, default=value, help=f"default {value:g}")
    print(table(machine=vars(parser.parse_args())))


if __name__ == "__main__":
    main()
