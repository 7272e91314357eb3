"""``python -m bench low_precision``: steps in bf16 on a CPU beside steps in fp32, and both beside their bare GEMMs.

bf16 operands are made fp32 first ("upcast"), or go straight into fp32 results by each product that this CPU has. All
are measured in turns, so that all meet the same noise; times are medians over the turns, ratios the medians of a
turn's.
GEMMs are ``torch.mm`` of four matrices of a step; in bf16 their results are bf16, which is less to write.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch

import fused_kd as fk
from fused_kd.engines import gemm
from fused_kd.rows.native.gemm import compiled_product, features, mkl_entry
from fused_kd.rows.select import native_works

from .problems import Shape
from .tables import table

SHAPES = (
    Shape("smollm2", 1024, 576, 576, 49152),
    Shape("wide", 512, 1024, 2048, 32000),
    Shape("large vocabulary", 256, 896, 1536, 128256),
)
FLOORS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def products() -> list[str]:
    """The fp32 products of bf16 that this CPU has, whichever is chosen."""
    found = ["mkl"] if mkl_entry() is not None else []
    return [*found, "native"] if "avx512_bf16" in features() and native_works() and compiled_product() else found


def ways(shape: Shape) -> dict[str, Callable[[], object]]:
    """What is measured, by its name."""
    g = torch.Generator().manual_seed(0)
    N, V = shape.N, shape.V
    h_s, h_t = torch.randn(N, shape.H_s, generator=g), torch.randn(N, shape.H_t, generator=g)
    W_s = torch.randn(V, shape.H_s, generator=g) * 2 / shape.H_s**0.5
    W_t = torch.randn(V, shape.H_t, generator=g) * 2 / shape.H_t**0.5
    labels = torch.randint(V, (N,), generator=g)

    def step(dtype: torch.dtype, kind: str | None) -> Callable[[], object]:
        hidden, weight = (x.to(dtype, copy=True).requires_grad_() for x in (h_s, W_s))
        teacher = fk.LMHead(h_t.to(dtype), W_t.to(dtype))

        def run() -> None:
            hidden.grad = weight.grad = None
            with mock.patch.object(gemm, "cpu_product", lambda: kind):
                fk.kd_loss(fk.LMHead(hidden, weight), teacher, labels, fk.SelfEvolution()).loss.backward()

        return run

    def floor(dtype: torch.dtype) -> Callable[[], object]:
        a, b, c, d = (x.to(dtype) for x in (h_s, W_s, h_t, W_t))
        z, d_weight = torch.zeros(N, V, dtype=dtype), torch.empty(V, shape.H_s, dtype=dtype)

        def run() -> None:
            torch.mm(a, b.t(), out=z)
            torch.mm(c, d.t(), out=z)
            torch.mm(z, b)
            torch.mm(z.t(), a, out=d_weight)

        return run

    found = {f"{name} GEMMs": floor(dtype) for name, dtype in FLOORS.items()}
    found |= {"fp32 step": step(torch.float32, None), "bf16 step, upcast": step(torch.bfloat16, None)}
    return found | {f"bf16 step, {kind}": step(torch.bfloat16, kind) for kind in products()}


def measured(shape: Shape, turns: int) -> list[list[str]]:
    """A line a way: seconds, and ratios to the fp32 step and to the GEMMs in the same dtype."""
    runs = ways(shape)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - begun)

    def ratio(name: str, other: str) -> str:
        return f"{statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True)):.2f}"

    return [
        [name, f"{statistics.median(taken):.3f}", ratio(name, "fp32 step"), ratio(name, f"{name[:4]} GEMMs")]
        for name, taken in seconds.items()
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench low_precision", description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args(arguments).turns
    print(
        f"chosen here: {gemm.cpu_product() or 'upcast'}; torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    for shape in SHAPES:
        print(f"\n(N, H_s, H_t, V) = {tuple(shape[1:])}\n")
        print(table(["what", "s", "of the fp32 step", "of its GEMMs"], measured(shape, turns)), flush=True)
    return 0
