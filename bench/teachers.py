"""``python -m bench teachers``: a step by what the teacher is, beside the step with one teacher's heads, in turns.

Two teachers mixed, each token's own of two, lists that teacher or student choose, a sum of objectives; and what makes
no gradients: each token's statistics, drawn lists.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch

import fused_kd as fk

from .measure import Calls, Flush, interleaved
from .problems import CPU_PEER_SHAPE, GPU_SHAPES, Inputs, Shape, make_inputs
from .tables import table

ONE = "one teacher"


def steps_of(inputs: Inputs) -> dict[str, Callable[[], torch.Tensor]]:
    """The loss of each form of teacher."""
    x, k = inputs, min(64, len(inputs.weight_s))
    student, first = fk.LMHead(x.hidden_s, x.weight_s), fk.LMHead(x.hidden_t, x.weight_t)
    second = fk.LMHead(x.hidden_t.flip(0).contiguous(), x.weight_t)
    which = torch.randint(2, x.labels.shape, device=x.labels.device)
    plain = fk.KDLoss(fk.ForwardKD())
    both = fk.KDLoss(0.5 * fk.SFT() + 0.5 * fk.GeneralizedJSD())
    lists = {who: fk.KDLoss(fk.ForwardKD(), lists=fk.Lists(k, chosen_by=who)) for who in ("teacher", "student")}
    return {
        ONE: lambda: plain(student, first, x.labels),
        "two, mixed": lambda: plain(student, [(0.3, first), (0.7, second)], x.labels),
        "each token's own of two": lambda: plain(student, fk.Mixture([first, second], which=which), x.labels),
        f"lists of {k}, the teacher's": lambda: lists["teacher"](student, first, x.labels),
        f"lists of {k}, the student's": lambda: lists["student"](student, first, x.labels),
        "a sum, 0.5*sft+0.5*generalized_jsd": lambda: both(student, first, x.labels),
    }


def without_gradients(inputs: Inputs) -> dict[str, Callable[[], object]]:
    x = inputs
    student, teacher = fk.LMHead(x.hidden_s, x.weight_s), fk.LMHead(x.hidden_t, x.weight_t)
    loss, told = fk.KDLoss(fk.ForwardKD()), ("kl", "entropy_t", "top_1")
    return {
        "evaluate: kl, entropy_t, top_1": lambda: loss.evaluate(student, teacher, x.labels, statistics=told),
        "sample_of: 12 draws": lambda: fk.sample_of(teacher, min(12, len(x.weight_t))),
    }


def measure(inputs: Inputs, rounds: int, flush: Callable[[], None]) -> list[list[str]]:
    """Rows of the table: the form, its milliseconds, these over those of one teacher."""

    def backward(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            inputs.drop_gradients()
            loss().backward()

        return call

    calls: Calls = {name: backward(loss) for name, loss in steps_of(inputs).items()}
    interleaved(calls, 2, flush)
    seconds = interleaved(calls, rounds, flush)
    with torch.no_grad():
        others: Calls = dict(without_gradients(inputs))
        interleaved(others, 1, flush)
        seconds |= interleaved(others, rounds, flush)
    median = {name: statistics.median(samples) for name, samples in seconds.items()}
    return [[name, f"{1e3 * value:.2f}", f"{value / median[ONE]:.3f}"] for name, value in median.items()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench teachers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--shape",
        nargs=4,
        type=int,
        metavar=("N", "H_S", "H_T", "V"),
        help="default: a peer's, or A and B",
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns (default 5)")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench teachers: --device cuda needs a GPU", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    shapes = GPU_SHAPES if args.device == "cuda" else (CPU_PEER_SHAPE,)
    for shape in shapes if args.shape is None else (Shape("given", *args.shape),):
        lines = measure(make_inputs(shape, device, dtype), args.rounds, Flush(device))
        print(f"{shape}, {str(dtype).removeprefix('torch.')}, {args.device}\n")
        print(table(["teacher", "ms", "of one teacher's step"], lines), end="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
