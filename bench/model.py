"""What bench/prediction.py predicts, as tables and on the command line.

``python -m bench model`` prints what is expected of GPUs by their data sheets; ``python -m bench model N H_s H_t V
--gemm-tflops X --bandwidth-gb Y`` one problem on one machine, whose numbers ``python -m bench.machine`` measures.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fused_kd.engines.dispatch import ENGINES
from fused_kd.rows.select import BACKENDS

from .gpu_report import current
from .lines import read
from .machine import (
    CACHE,
    CACHE_BYTES_A_CLOCK,
    CACHE_SHARE,
    CLOCK,
    COPY,
    COPY_SHARE,
    GEMM,
    GEMM_SHARE,
    GPUS,
    MULTIPROCESSORS,
    assumed_machine,
)
from .prediction import DTYPES, Best, Prediction, best_chunk, best_for, compare, predict
from .shapes import GPU_SHAPES, Shape
from .tables import fixed, shape_of, size, table, variant_of

__all__ = [
    "Best", "Prediction", "best_chunk", "compare", "expected", "markdown", "markdown_expected", "predict",
]  # fmt: skip

RESULTS = Path(__file__).parent / "results"
# What a smaller chunk may cost, of the fastest one's time.
WITHIN = 0.03
KINDS = ("predicted", "measured")
TOKENS = {"easy": 0.0, "hard": 1.0}
WAYS: dict[str, dict[str, Any]] = {
    "Triton row": {"backend": "triton"},
    "CUDA row": {"backend": "cuda"},
    "streaming": {"engine": "streaming"},
}
# By whose machine code instructions were counted, and where the CUDA row is meant to run.
HOPPER = ("H100 SXM", "H200")


def expected() -> list[dict[str, Any]]:
    """fused_kd in bf16 at the shapes A and B on each of :data:`bench.machine.GPUS`, by their data sheets.

    A row for each of :data:`WAYS` and easy or hard tokens; the CUDA row on Hopper alone, streaming where the speed of
    the L2 cache, which bounds it, is known.
    """
    rows = []
    for gpu in GPUS:
        machine = assumed_machine(gpu)
        for shape in GPU_SHAPES:
            for way, options in WAYS.items():
                if (way == "CUDA row" and gpu not in HOPPER) or (way == "streaming" and CACHE not in machine):
                    continue
                for tokens, hard in TOKENS.items():
                    found = predict(shape, torch.bfloat16, machine, on_host=False, hard=hard, **options)
                    rows.append(
                        {
                            "gpu": gpu,
                            "shape": str(shape),
                            "way": way,
                            "tokens": tokens,
                            "floor_ms": 1e3 * found.floor_seconds,
                            "row_ms": 1e3 * found.parts.get("row", 0.0),
                            "total_ms": 1e3 * found.seconds,
                            "ratio": found.ratio,
                            "workspace_gb": found.workspace_bytes / 1e9,
                            "chunk": found.chunk,
                            "group": found.group,
                        }
                    )
    return rows


def markdown_expected() -> str:
    """The table of :func:`expected`, and what it rests on."""
    columns = [(way, tokens) for way in WAYS for tokens in TOKENS]
    head = [
        "GPU", "shape (N, H_s, H_t, V)", "bare GEMMs", *(f"{way}, {tokens}" for way, tokens in columns),
        "workspace, GB", "tokens a chunk", "a group",
    ]  # fmt: skip
    found: dict[tuple[str, str], dict[tuple[str, str], dict[str, Any]]] = {}
    for row in expected():
        found.setdefault((row["gpu"], row["shape"]), {})[row["way"], row["tokens"]] = row
    lines = []
    for place, by_way in found.items():
        times = [f"{by_way[column]['total_ms']:.1f}" if column in by_way else "" for column in columns]
        own = by_way["Triton row", "easy"]
        plan = [fixed(own["workspace_gb"]), str(own["chunk"]), str(own["group"])]
        lines.append([*place, f"{own['floor_ms']:.1f}", *times, *plan])
    sheets = []
    for gpu, p in GPUS.items():
        further = f", {p.multiprocessors} multiprocessors at {p.clock / 1e9:.2f} GHz" if p.clock else ""
        sheets.append(f"- {gpu}: {p.flops / 1e12:.0f} TFLOP/s, {p.bytes / 1e12:.2f} TB/s{further} ({p.source})")
    return f"""\
**Predicted, not measured**: milliseconds of a forward and backward in bf16, by `bench/prediction.py`. Every GPU is
assumed to reach {100 * GEMM_SHARE:.0f} % of its data sheet's dense bf16 rate and {100 * COPY_SHARE:.0f} % of its memory
bandwidth, as an H200 does (about 790 TFLOP/s and 4.3 TB/s), and in the streaming engine {100 * CACHE_SHARE:.0f} % of
{CACHE_BYTES_A_CLOCK} bytes a clock from its L2 cache. Waves of tiles, fp32 results and the row's instructions are in it
where multiprocessors and clock are known, so not for a B200. Of what an H200's own numbers predict its chunked
engine took 1.0 to 1.15 times, its streaming engine 1.5 to 1.9 times (results/nvidia-h200/report.md). Workspace and plan
are the chunked engine's.

{table(head, lines)}

""" + "\n".join(sheets)


def markdown(data: Mapping[str, Any]) -> str:
    """The model beside what a results file holds of fused_kd; empty without the machine's two numbers."""
    machine = data.get("machine")
    if not machine:
        return ""
    head = [
        "shape (N, H_s, H_t, V)", "variant", "implementation", "ms predicted", "ms measured", "error",
        "time / floor predicted", "measured", "error", "workspace predicted, GB", "measured", "error",
        "tokens a chunk (a group)", f"those of least memory within {100 * WITHIN:.0f} % of the fastest, by the model",
        "planner's over the fastest, by the model",
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
                _plan(found["chunk"], found["group"]),
                *(["", ""] if best is None else [_plan(best.chunk, best.prediction.group), _signed(best.slower)]),
            ]
        )
    if not lines:
        return ""
    rates = f"{machine[GEMM] / 1e9:.4g} GFLOP/s of a large GEMM and {machine[COPY] / 1e9:.4g} GB/s of a copy"
    return (
        f"From {rates}, measured here, and the counts above, as `bench/prediction.py` says; errors are predicted / "
        f"measured - 1. What the numbers leave out (on a CPU exponentials and how a BLAS packs its operands) makes "
        f"predictions too low.\n\n{table(head, lines)}"
    )


def _plan(chunk: int, group: int) -> str:
    return f"{chunk}" if group == chunk else f"{chunk} ({group})"


def markdown_errors(folder: Path = RESULTS) -> str:
    """How far off the model was, of each results file under ``folder`` that has something to compare."""
    lines = []
    for path in sorted([*folder.glob("*/*.json"), *folder.glob("*/*.jsonl")]):
        device, machine, rows = _measured(path)
        found = [errors for row in rows if machine and (errors := compare(row, machine)) is not None]
        if found:
            about = [str(path.relative_to(folder)), device, str(len(found))]
            lines.append(about + [_spread(found, name) for name in ("seconds", "ratio", "memory")])
    if not lines:
        return "Nothing was measured that could say how far off this is."
    head = ["results", "device", "rows", "time", "time / floor", "workspace"]
    what = "Errors where there is a measurement, predicted / measured - 1, median and range:"
    return f"{what}\n\n{table(head, lines)}"


def _measured(path: Path) -> tuple[str, dict[str, float] | None, list[dict[str, Any]]]:
    """Device, the machine's numbers and rows of a results file, of a CPU or (lines) of a GPU."""
    if path.suffix == ".json":
        data = json.loads(path.read_text())
        return data.get("settings", {}).get("device", ""), data.get("machine"), data.get("rows", [])
    rows = current(read(path))
    machine = next((row["machine"] for row in rows if "machine" in row), None)
    return "cuda", machine, [row for row in rows if "step" in row.get("seconds", {})]


def _spread(found: list[dict[str, Any]], name: str) -> str:
    errors = [each[f"{name}_error"] for each in found if each[f"{name}_error"] is not None]
    if not errors:
        return ""
    return f"{_signed(statistics.median(errors))} ({_signed(min(errors))} to {_signed(max(errors))})"


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
    parser.add_argument("--multiprocessors", type=size, help="of a GPU: counts waves of tiles")
    parser.add_argument("--clock-ghz", type=positive, help="of its multiprocessors: counts the row's instructions")
    parser.add_argument("--cache-gb", type=positive, help="1e9 bytes/s read from its L2 cache: bounds streaming")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the inputs (default bfloat16)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="whose plan and row (default cuda)")
    parser.add_argument("--engine", choices=ENGINES, default="chunked", help="(default chunked)")
    parser.add_argument("--backend", choices=BACKENDS, help="row implementation (default: the device's own)")
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


def _tokens(found: Prediction) -> str:
    return f"{found.chunk} tokens a chunk" + ("" if found.group == found.chunk else f", {found.group} a group")


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    if not args.sizes:
        if vars(args) != vars(parser.parse_args([])):
            parser.error("sizes must be the four integers N H_s H_t V where options are given, got none")
        print(markdown_expected(), markdown_errors(), sep="\n\n")
        return 0
    if len(args.sizes) != 4:
        parser.error(f"sizes must be the four integers N H_s H_t V, got {len(args.sizes)}")
    for name in ("gemm_tflops", "bandwidth_gb"):
        if getattr(args, name) is None:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} must be a number above 0, got none (python -m bench.machine measures it)")
    shape, dtype = Shape("", *args.sizes), DTYPES[args.dtype]
    machine = {GEMM: 1e12 * args.gemm_tflops, COPY: 1e9 * args.bandwidth_gb}
    further = {MULTIPROCESSORS: (args.multiprocessors, 1), CLOCK: (args.clock_ghz, 1e9), CACHE: (args.cache_gb, 1e9)}
    machine |= {name: unit * value for name, (value, unit) in further.items() if value is not None}
    options = {
        "on_host": args.device == "cpu", "top_k": args.top_k, "backend": args.backend,
        "hard": args.hard, "valid": args.valid,
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
    print(f"  workspace {found.workspace_bytes / 1e9:10.3f} GB   {_tokens(found)}")
    print(f"  gradients {found.gradient_bytes / 1e9:10.3f} GB")
    if best is not None:
        p = best.prediction
        print(
            f"  fastest   {1e3 * p.seconds:10.3f} ms   {_tokens(p)}, {p.workspace_bytes / 1e9:.3f} GB; "
            f"the planner's plan is {100 * best.slower:.1f} % slower"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
