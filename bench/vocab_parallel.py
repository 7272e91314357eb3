"""``python -m bench vocab_parallel``: a vocabulary-parallel step predicted from a machine's numbers; nothing is timed.

A rank of P makes the GEMMs of V / P columns (bench/prediction.py, every chunk adding to dW), its row moves
26 bytes a logit, and it sends what ``fused_kd.parallel.predicted_traffic`` says. All of it travels beside the
GEMMs of another chunk but the first chunk's statistics, the last one's second message and its hidden gradient: these
show, or what the GEMMs cannot hide.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch

from fused_kd.parallel import predicted_traffic
from fused_kd.tuning import tuned

from .machine import COPY, GEMM
from .prediction import predict
from .problems import GPU_SHAPES, Shape
from .tables import fixed
from .tables import table as as_table

# An H200 in an NVLink domain of eight, and between such domains: per GPU and direction, as collectives reach it.
H200 = {GEMM: 790e12, COPY: 4.3e12, "link": 360e9, "network": 45e9, "latency": 25e-6}
# Reads of both sides in each of three sweeps and one write of bf16: what Triton's kernels move, one a sweep.
ROW_BYTES = 3 * 8 + 2


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


def predict_rank(shape: Shape, ranks: int, machine: dict[str, float] = H200, link: str = "link") -> Step:
    """One rank of ``ranks``, bf16, all gradients wanted, the loss reduced over all ranks."""
    local = shape._replace(V=-(-shape.V // ranks))
    with tuned(gradient_groups=False):  # as the sharded engine, whose chunks alternate
        alone = predict(local, torch.bfloat16, {x: machine[x] for x in (GEMM, COPY)}, on_host=False)
    gemms = sum(value for name, value in alone.parts.items() if name != "row")
    row_seconds = ROW_BYTES * shape.N * local.V / machine[COPY]
    sent = predicted_traffic(shape.N, shape.H_s, ranks, swept=1.0, reduce="all")
    exposed = 0.0
    if ranks > 1:
        chunks = -(-shape.N // alone.chunk)
        seconds = sent.total / machine[link]
        exposed = max(seconds / chunks, seconds - gemms) + 2 * machine["latency"]
    weights = local.V * (2 * shape.H_s + 2 * shape.H_t + 4 * shape.H_s)
    total = gemms + row_seconds + exposed
    return Step(gemms * 1e3, row_seconds * 1e3, exposed * 1e3, total * 1e3, sent.total / 1e6, weights / 1e6)


def table(machine: dict[str, float] = H200) -> str:
    """Markdown: shapes and groups by milliseconds and megabytes."""
    groups = ((1, "link", "1"), (8, "link", "8"), (8, "link", "64 = 8 x 8"), (64, "network", "64"))
    lines = []
    for shape in GPU_SHAPES:
        for ranks, link, title in groups:
            found = predict_rank(shape, ranks, machine, link)
            numbers = [fixed(x, 1) for x in (found.gemms, found.row, found.exposed, found.total)]
            lines.append([shape.name, title, *numbers, fixed(found.sent, 0), fixed(found.weights, 0)])
    return as_table(["shape", "GPUs", "GEMMs", "row", "exposed", "step", "MB sent", "MB of heads"], lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in H200.items():
        parser.add_argument(f"--{name}", type=float, default=value, help=f"default {value:g}")
    print(table(vars(parser.parse_args(arguments))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
