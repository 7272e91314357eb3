"""What bench/prediction.py predicts, as tables and on the command line.

``python -m bench model`` prints what is expected of GPUs by their data sheets, and how far off the committed results
were; ``python -m bench model N H_s H_t V --gemm-tflops X --bandwidth-gb Y`` one problem on one machine, whose numbers
``python -m bench machine`` measures.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_kd.engines.dispatch import ENGINES
from fused_kd.rows.select import BACKENDS

from .machine import CLOCK, COPY, GEMM, MULTIPROCESSORS
from .prediction import DTYPES, Prediction, beside_model, predict
from .problems import GPU_SHAPES, Shape
from .session import current, machine_of, read
from .tables import signed, table

RESULTS = Path(__file__).parent / "results"
WAYS: dict[str, dict[str, Any]] = {
    "Triton row": {"backend": "triton"},
    "CUDA row": {"backend": "cuda"},
    "streaming": {"engine": "streaming"},
}


class Gpu(NamedTuple):
    """Dense bf16 ``flops`` and ``bytes`` of HBM a second by the data sheet ``source``; ``multiprocessors``, and the
    ``clock`` that the FLOPs are stated at, 4096 a clock and multiprocessor. Other work may be clocked higher or lower.
    """

    flops: float
    bytes: float
    multiprocessors: int
    clock: float
    source: str


# Those by whose machine code the row's instructions were counted.
GPUS = {
    "H100 SXM": Gpu(
        989.4e12, 3.35e12, 132, 1.83e9, "NVIDIA H100 Tensor Core GPU data sheet, half of the rate with sparsity; H100 "
        "(Hopper) architecture whitepaper, SXM5: 132 multiprocessors",
    ),
    "H200": Gpu(
        989.4e12, 4.8e12, 132, 1.83e9, "NVIDIA H200 Tensor Core GPU data sheet, half of the rate with sparsity; the "
        "H100's multiprocessors and clock, as its rate is the same",
    ),
}  # fmt: skip
# What an H200 reaches of its data sheet, about 790 bf16 TFLOP/s and 4.3 TB/s. Taken for both: an assumption.
GEMM_SHARE = 790e12 / GPUS["H200"].flops
COPY_SHARE = 4.3e12 / GPUS["H200"].bytes


def assumed_machine(gpu: str) -> dict[str, float]:
    """The numbers of a GPU in :data:`GPUS`: its data sheet times what an H200 reaches of its own."""
    flops, bandwidth, multiprocessors, clock, _ = GPUS[gpu]
    return {GEMM: flops * GEMM_SHARE, COPY: bandwidth * COPY_SHARE, MULTIPROCESSORS: multiprocessors, CLOCK: clock}


def expected(gpu: str, shape: Shape) -> dict[tuple[str, str], Prediction]:
    """fused_kd in bf16 on one of :data:`GPUS`: a prediction for each of :data:`WAYS` and easy or hard tokens."""
    machine = assumed_machine(gpu)
    return {
        (way, tokens): predict(shape, torch.bfloat16, machine, on_host=False, hard=hard, **options)
        for way, options in WAYS.items()
        for tokens, hard in (("easy", 0.0), ("hard", 1.0))
    }


def markdown_expected() -> str:
    """The table of :func:`expected` at the shapes A and B, and what it rests on."""
    columns = [(way, tokens) for way in WAYS for tokens in ("easy", "hard")]
    head = ["GPU", "shape (N, H_s, H_t, V)", "bare GEMMs", *map(", ".join, columns)]
    lines = []
    for gpu in GPUS:
        for shape in GPU_SHAPES:
            found = expected(gpu, shape)
            own = found["Triton row", "easy"]
            times = [f"{1e3 * found[column].seconds:.1f}" for column in columns]
            plan = [f"{own.workspace_bytes / 1e9:.2f}", str(own.chunk), str(own.group)]
            lines.append([gpu, str(shape), f"{1e3 * own.floor_seconds:.1f}", *times, *plan])
    sheets = "\n".join(f"- {gpu}: {known.source}" for gpu, known in GPUS.items())
    return f"""\
**Predicted, not measured**: milliseconds of a forward and backward in bf16, by `bench/prediction.py`. Every GPU is
assumed to reach {GEMM_SHARE:.0%} of its data sheet's dense bf16 rate and {COPY_SHARE:.0%} of its memory bandwidth, as
an H200 does (about 790 TFLOP/s and 4.3 TB/s). Of what an H200's own numbers predict its chunked engine took 1.0 to 1.15
times, its streaming engine 1.5 to 1.9 times (results/nvidia-h200/report.md). Workspace and plan are the chunked
engine's.

{table([*head, "workspace, GB", "tokens a chunk", "a group"], lines)}

{sheets}"""


def markdown_errors(folder: Path = RESULTS) -> str:
    """How far off the model was, of each results file under ``folder`` that has something to compare."""
    lines = []
    for path in sorted([*folder.glob("*/*.json"), *folder.glob("*/*.jsonl")]):
        if path.suffix == ".json":
            data = json.loads(path.read_text())
            machine, rows = data.get("machine"), data.get("rows", [])
        else:
            rows = current(read(path))
            machine = machine_of(rows)
        found = [errors for row in rows if machine and (errors := beside_model(row, machine)) is not None]
        if found:
            spreads = [_spread([x[f"{name}_error"] for x in found]) for name in ("seconds", "ratio", "memory")]
            lines.append([str(path.relative_to(folder)), str(len(found)), *spreads])
    if not lines:
        return "Nothing was measured that could say how far off this is."
    what = "Errors where there is a measurement, predicted / measured - 1, median and range:"
    return f"{what}\n\n{table(['results', 'rows', 'time', 'time / floor', 'workspace'], lines)}"


def _spread(errors: list[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{signed(statistics.median(known))} ({signed(min(known))} to {signed(max(known))})" if known else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench model",
        description="Predict time and memory. Without sizes: the table of GPUs, from data sheets.",
    )
    parser.add_argument("sizes", nargs="*", type=int, metavar="N H_s H_t V", help="tokens, hidden sizes, vocabulary")
    parser.add_argument("--gemm-tflops", type=float, help="of the machine, 1e12 FLOP/s (python -m bench machine)")
    parser.add_argument("--bandwidth-gb", type=float, help="of the machine, 1e9 bytes/s read and written by a copy")
    parser.add_argument("--multiprocessors", type=int, help="of a GPU: counts waves of tiles")
    parser.add_argument("--clock-ghz", type=float, help="of its multiprocessors: counts the row's instructions")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the inputs (default bfloat16)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="whose plan and row (default cuda)")
    parser.add_argument("--engine", choices=ENGINES, default="chunked", help="(default chunked)")
    parser.add_argument("--backend", choices=BACKENDS, help="row implementation (default: the device's own)")
    parser.add_argument("--top-k", action="store_true", help="the teacher is a list of entries")
    parser.add_argument("--hard", type=float, default=0.0, help="fraction of hard tokens")
    parser.add_argument("--valid", type=float, default=1.0, help="fraction not ignored")
    parser.add_argument("--memory-budget-gb", type=float, help="of workspace, 1e9 bytes")
    return parser


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
    if args.gemm_tflops is None or args.bandwidth_gb is None:
        parser.error("--gemm-tflops and --bandwidth-gb must be given (python -m bench machine measures them)")
    numbers = {
        GEMM: (args.gemm_tflops, 1e12), COPY: (args.bandwidth_gb, 1e9), MULTIPROCESSORS: (args.multiprocessors, 1),
        CLOCK: (args.clock_ghz, 1e9),
    }  # fmt: skip
    machine = {name: unit * value for name, (value, unit) in numbers.items() if value is not None}
    budget = None if args.memory_budget_gb is None else int(1e9 * args.memory_budget_gb)
    try:
        found = predict(
            Shape("", *args.sizes), DTYPES[args.dtype], machine, engine=args.engine, on_host=args.device == "cpu",
            top_k=args.top_k, backend=args.backend, hard=args.hard, valid=args.valid, memory_budget=budget,
        )  # fmt: skip
    except ValueError as error:
        parser.error(str(error))
    print("predicted, not measured")
    floor = 1e3 * found.floor_seconds
    print(f"  time      {1e3 * found.seconds:10.3f} ms   {found.ratio:.3f} of the floor, {floor:.3f} ms")
    for name, seconds in found.parts.items():
        print(f"    {name:<16}{1e3 * seconds:10.3f} ms")
    plan = f"{found.chunk} tokens a chunk" + ("" if found.group == found.chunk else f", {found.group} a group")
    print(f"  workspace {found.workspace_bytes / 1e9:10.3f} GB   {plan}")
    print(f"  gradients {found.gradient_bytes / 1e9:10.3f} GB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
