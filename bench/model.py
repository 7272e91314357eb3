"""What bench/prediction.py predicts, as tables and on the command line.

``python -m bench.model`` prints what is expected of GPUs by their data sheets; ``python -m bench.model N H_s H_t V
--gemm-tflops X --bandwidth-gb Y`` one problem on one machine, whose two numbers ``python -m bench.machine`` measures.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from fused_kd.engine.dispatch import ENGINES

from .machine import COPY, COPY_SHARE, GEMM, GEMM_SHARE, GPUS, assumed_machine
from .prediction import DTYPES, Best, Prediction, best_chunk, best_for, compare, predict
from .shapes import GPU_SHAPES, Shape
from .tables import fixed, shape_of, size, table, variant_of

__all__ = ["Best", "Prediction", "best_chunk", "compare", "expected", "markdown", "markdown_expected", "predict"]

# What a smaller chunk may cost, of the fastest one's time.
WITHIN = 0.03
KINDS = ("predicted", "measured")


def expected() -> list[dict[str, Any]]:
    """fused_kd in bf16 at the shapes A and B on each of :data:`bench.machine.GPUS`, by their data sheets."""
    rows = []
    for gpu in GPUS:
        for shape in GPU_SHAPES:
            for tokens, hard in (("easy", 0.0), ("hard", 1.0)):
                found = predict(shape, torch.bfloat16, assumed_machine(gpu), on_host=False, hard=hard)
                rows.append(
                    {
                        "gpu": gpu,
                        "shape": str(shape),
                        "tokens": tokens,
                        "floor_ms": 1e3 * found.floor_seconds,
                        "row_ms": 1e3 * found.parts["row"],
                        "total_ms": 1e3 * found.seconds,
                        "ratio": found.ratio,
                        "workspace_gb": found.workspace_bytes / 1e9,
                        "chunk": found.chunk,
                    }
                )
    return rows


def markdown_expected() -> str:
    """The table of :func:`expected`, and what it rests on."""
    head = [
        "GPU", "shape (N, H_s, H_t, V)", "tokens", "floor, ms", "row, ms", "forward + backward, ms", "time / floor",
        "workspace, GB", "tokens a chunk",
    ]  # fmt: skip
    lines = []
    for row in expected():
        times = [f"{row[name]:.1f}" for name in ("floor_ms", "row_ms", "total_ms")]
        about, plan = [row["gpu"], row["shape"], row["tokens"]], [fixed(row["workspace_gb"]), str(row["chunk"])]
        lines.append([*about, *times, fixed(row["ratio"]), *plan])
    sheets = [
        f"- {gpu}: {p.flops / 1e12:.0f} TFLOP/s, {p.bytes / 1e12:.2f} TB/s ({p.source})" for gpu, p in GPUS.items()
    ]
    return f"""\
**Predicted, not measured**: bf16, chunked engine, Triton row, by `bench/prediction.py`. Every GPU is assumed to reach
{100 * GEMM_SHARE:.0f} % of its data sheet's dense bf16 rate and {100 * COPY_SHARE:.0f} % of its memory bandwidth, as an
H200 does (about 790 TFLOP/s and 4.3 TB/s). The row's exponentials are not in it.

{table(head, lines)}

""" + "\n".join(sheets)


def markdown(data: Mapping[str, Any]) -> str:
    """The model beside what a results file holds of fused_kd; empty without the machine's two numbers."""
    machine = data.get("machine")
    if not machine:
        return ""
    head = [
        "shape (N, H_s, H_t, V)", "variant", "implementation", "ms predicted", "ms measured", "error",
        "time / floor predicted", "measured", "error", "workspace predicted, GB", "measured", "error", "tokens a chunk",
        f"least chunk within {100 * WITHIN:.0f} % of the fastest, by the model",
        "planner's chunk over the fastest, by the model",
    ]  # fmt: skip
    lines = []
    for row in data["rows"]:
        found = compare(row, machine)
        if found is None:
            continue
        best = best_for(row, machine, WITHIN)
        times = [f"{1e3 * found[f'{kind}_seconds']:.4g}" for kind in KINDS]
        ratios = [fixed(found[f"{kind}_ratio"]) for kind in KINDS]
        memory = [size(found[f"{kind}_memory"]) for kind in KINDS]
        lines.append(
            [
                *(shape_of(row), str(variant_of(row)), row["implementation"]),
                *(*times, _signed(found["seconds_error"]), *ratios, _signed(found["ratio_error"])),
                *(*memory, _signed(found["memory_error"])),
                str(found["chunk"]),
                *(["", ""] if best is None else [str(best.chunk), _signed(best.slower)]),
            ]
        )
    if not lines:
        return ""
    rates = f"{machine[GEMM] / 1e9:.4g} GFLOP/s of a large GEMM and {machine[COPY] / 1e9:.4g} GB/s of a copy"
    return (
        f"From {rates}, measured here, and the counts above, as `bench/prediction.py` says; errors are predicted / "
        f"measured - 1. What two numbers leave out (exponentials, how a BLAS packs its operands) makes predictions too "
        f"low.\n\n{table(head, lines)}"
    )


def _signed(share: float | None) -> str:
    return "" if share is None else f"{100 * share:+.1f} %"


def _number(text: str, kind: type, low: float, high: float, allowed: str) -> Any:
    try:
        value = kind(text)
        if low <= value <= high:  # false for NaN
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}")


def _parser() -> argparse.ArgumentParser:
    tiny = math.ulp(0.0)
    size = partial(_number, kind=int, low=1, high=math.inf, allowed="an integer of at least 1")
    positive = partial(_number, kind=float, low=tiny, high=math.inf, allowed="a number above 0")
    parser = argparse.ArgumentParser(
        prog="python -m bench.model",
        description="Predict time and memory. Without sizes: the table of GPUs, from data sheets.",
    )
    parser.add_argument("sizes", nargs="*", type=size, metavar="N H_s H_t V", help="tokens, hidden sizes, vocabulary")
    parser.add_argument("--gemm-tflops", type=positive, help="of the machine, 1e12 FLOP/s (python -m bench.machine)")
    parser.add_argument("--bandwidth-gb", type=positive, help="of the machine, 1e9 bytes/s read and written by a copy")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the inputs (default bfloat16)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="whose plan and row (default cuda)")
    parser.add_argument("--engine", choices=ENGINES, default="chunked", help="(default chunked)")
    parser.add_argument("--top-k", action="store_true", help="the teacher is a list of entries")
    fraction = partial(_number, kind=float, high=1.0)
    parser.add_argument(
        "--hard", type=partial(fraction, low=0.0, allowed="in [0, 1]"), default=0.0, help="fraction of hard tokens"
    )
    parser.add_argument(
        "--valid", type=partial(fraction, low=tiny, allowed="in (0, 1]"), default=1.0, help="fraction not ignored"
    )
    parser.add_argument("--chunk", type=size, help="tokens a chunk (default: the planner's)")
    parser.add_argument("--memory-budget-gb", type=positive, help="of workspace, 1e9 bytes")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    if not args.sizes:
        if vars(args) != vars(parser.parse_args([])):
            parser.error("sizes must be the four integers N H_s H_t V where options are given, got none")
        print(markdown_expected())
        return 0
    if len(args.sizes) != 4:
        parser.error(f"sizes must be the four integers N H_s H_t V, got {len(args.sizes)}")
    for name in ("gemm_tflops", "bandwidth_gb"):
        if getattr(args, name) is None:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} must be a number above 0, got none (python -m bench.machine measures it)")
    shape, dtype = Shape("", *args.sizes), DTYPES[args.dtype]
    machine = {GEMM: 1e12 * args.gemm_tflops, COPY: 1e9 * args.bandwidth_gb}
    options = {
        "on_host": args.device == "cpu", "top_k": args.top_k, "hard": args.hard, "valid": args.valid,
        "memory_budget": None if args.memory_budget_gb is None else int(1e9 * args.memory_budget_gb),
    }  # fmt: skip
    try:
        found = predict(shape, dtype, machine, engine=args.engine, chunk=args.chunk, **options)
        best = best_chunk(shape, dtype, machine, **options) if args.engine == "chunked" else None
    except ValueError as error:
        parser.error(str(error))
    floor = 1e3 * found.floor_seconds
    print("predicted, not measured")
    print(f"  time      {1e3 * found.seconds:10.3f} ms   {found.ratio:.3f} of the floor, {floor:.3f} ms")
    for name, seconds in found.parts.items():
        print(f"    {name:<16}{1e3 * seconds:10.3f} ms")
    print(f"  workspace {found.workspace_bytes / 1e9:10.3f} GB   {found.chunk} tokens a chunk")
    print(f"  gradients {found.gradient_bytes / 1e9:10.3f} GB")
    if best is not None:
        p = best.prediction
        print(
            f"  fastest   {1e3 * p.seconds:10.3f} ms   {p.chunk} tokens a chunk, {p.workspace_bytes / 1e9:.3f} GB; "
            f"the planner's {best.planned.chunk} are {100 * best.slower:.1f} % slower"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
