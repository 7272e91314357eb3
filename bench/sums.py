"""``python -m bench sums``: what sums of objectives cost beside the dearest of their terms.

A row alone over the same logits, or with ``--steps`` a forward and backward from hidden states and weights: each sum in
turns with each of its terms by itself, so that all meet the same noise. The dearest is the term with the largest
median; the ratio is the median over the turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable

import torch

import fused_kd as fk
from fused_kd.objectives import Objective, parse
from fused_kd.rows.select import BACKENDS, choose_backend

from .measure import Calls, Flush, RowProblem, interleaved
from .problems import CPU_PEER_SHAPE, GPU_SHAPES, Inputs, Shape, make_inputs
from .tables import table

SUMS = (
    "0.5*sft+0.5*generalized_jsd",
    "forward_kd+reverse_kd",
    "self_evolution:gamma=0,floor=0.3",
    "self_evolution:gamma=0+1e-4*z_loss",
    "0.5*generalized_jsd+0.5*total_variation",
)
"""In the text form; Γ = 0 makes every token hard. A floor is compared with the objective without it."""
ROW_TOKENS = {"cpu": 256, "cuda": 2048}


def terms_of(text: str) -> list[str]:
    """The objectives that a sum is made of, each alone and without a floor."""
    total = parse(text)
    parts = [part for _, part in total.summands]
    return list(dict.fromkeys(str(_without_floor(part)) for part in parts))


def _without_floor(objective: Objective) -> Objective:
    if not getattr(objective, "floor", 0.0):
        return objective
    return dataclasses.replace(objective, floor=0.0)  # type: ignore[call-arg]


def step_of(inputs: Inputs, objective: Objective, backend: str | None) -> Callable[[], None]:
    """One forward and backward."""
    criterion = fk.KDLoss(objective, backend=backend).to(inputs.hidden_s.device)
    student = fk.LMHead(inputs.hidden_s, inputs.weight_s)
    teacher = fk.LMHead(inputs.hidden_t, inputs.weight_t) if objective.spec.needs_teacher else None
    return lambda: criterion(student, teacher, inputs.labels).backward()


def measure(
    texts: list[str], call_of: Callable[[Objective], Callable[[], None]], rounds: int, before: Callable[[], None]
) -> list[list[str]]:
    """Rows of the table: the sum, its milliseconds, the dearest term, its milliseconds, the ratio."""
    lines = []
    for text in texts:
        calls: Calls = {name: call_of(parse(name)) for name in dict.fromkeys([text, *terms_of(text)])}
        interleaved(calls, 2, before)
        seconds = interleaved(calls, rounds, before)
        median = {name: statistics.median(samples) for name, samples in seconds.items()}
        dearest = max(terms_of(text), key=median.__getitem__)
        ratio = statistics.median(a / b for a, b in zip(seconds[text], seconds[dearest], strict=True))
        lines.append([text, f"{1e3 * median[text]:.2f}", dearest, f"{1e3 * median[dearest]:.2f}", f"{ratio:.3f}"])
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench sums", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sums", nargs="*", metavar="SUM", help=f"in text form (default: {' '.join(SUMS)})")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default float32; bfloat16 on cuda")
    parser.add_argument("--backend", choices=BACKENDS, help="row implementation (default: the device's own)")
    parser.add_argument("--steps", action="store_true", help="whole steps of heads instead of rows alone")
    parser.add_argument(
        "--shape", nargs=4, type=int, metavar=("N", "H_S", "H_T", "V"), help="default: a peer's on a CPU, A on a GPU"
    )
    parser.add_argument("--rounds", type=int, default=11, help="turns (default 11)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench sums: --device cuda needs a GPU", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    shape = GPU_SHAPES[0] if args.device == "cuda" else CPU_PEER_SHAPE
    if args.shape is not None:
        shape = Shape("given", *args.shape)
    texts = args.sums or list(SUMS)
    try:
        for text in texts:
            parse(text)
        backend = choose_backend(args.backend, device)
    except ValueError as error:
        print(f"bench sums: {error}", file=sys.stderr)
        return 2
    flush = Flush(device)
    if args.steps:
        inputs = make_inputs(shape, device, dtype)

        def before() -> None:
            inputs.drop_gradients()
            flush()

        lines = measure(texts, lambda objective: step_of(inputs, objective, args.backend), args.rounds, before)
        what = f"steps of {shape}"
    else:
        problem = RowProblem(min(shape.N, ROW_TOKENS[args.device]), shape.V, device, dtype)
        lines = measure(texts, lambda objective: problem.call_of(objective, backend), args.rounds, flush)
        what = f"rows of {problem.C} x {problem.V}"
    print(f"{what}, {args.dtype or str(dtype).removeprefix('torch.')}, backend {backend}, {args.device}\n")
    print(table(["sum", "ms", "dearest term", "ms", "ratio"], lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
