"""``python -m bench lists``: what lists made from a head cost beside the GEMM that makes its logits.

``fused_kd.top_k_of`` and ``fused_kd.log_probs_at``, in turns with that GEMM alone, a chunk of tokens at a time into a
buffer as wide as the vocabulary that is used again, and with plain PyTorch (logits, log_softmax, topk). Milliseconds
are the least of the turns, and ratios those of these: what another process takes of the machine is not the library's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.engines.gemm import Projection
from fused_kd.rows.select import BACKENDS, choose_backend

from .measure import Calls, Flush, interleaved
from .tables import table

# SmolLM2-135M's head, and one as wide as Llama 3's.
CPU_SHAPES = ((512, 576, 49152), (512, 1024, 128256))
GPU_SHAPES = ((8192, 4096, 128256), (8192, 896, 151936))
KS = (1, 64, 256)
CHUNK = {"cpu": 512, "cuda": 2048}


def gemm_of(head: fk.LMHead) -> Callable[[], None]:
    """The logits of all tokens, of which a chunk's are held."""
    hidden, device = head.hidden, head.hidden.device
    projection, chunk = Projection(head.weight, None, hidden.dtype), min(len(hidden), CHUNK[device.type])
    out = torch.empty(chunk, len(head.weight), device=device)

    def call() -> None:
        for part in hidden.split(chunk):
            projection.logits(projection.operand(part), out[: len(part)])

    return call


def eager_of(head: fk.LMHead, k: int) -> Callable[[], None]:
    """A chunk at a time too."""
    chunk = CHUNK[head.hidden.device.type]

    def call() -> None:
        for part in head.hidden.split(chunk):
            (part @ head.weight.T).float().log_softmax(-1).topk(k)

    return call


def least_cpu_seconds(calls: Calls, rounds: int) -> dict[str, float]:
    """Of this thread alone, in turns."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            samples[name].append(time.thread_time() - start)
    return {name: min(found) for name, found in samples.items()}


def measure(
    head: fk.LMHead, ks: list[int], backend: str | None, rounds: int, before: Callable[[], None], alone: bool = False
) -> list[list[str]]:
    """Rows of the table: what is made, its milliseconds, the GEMM's, the ratio."""

    def largest(k: int) -> Callable[[], object]:
        return lambda: fk.top_k_of(head, k, backend=backend)

    def given(ids: Tensor) -> Callable[[], object]:
        return lambda: fk.log_probs_at(head, ids, backend=backend)

    calls: Calls = {"GEMM": gemm_of(head)}
    calls |= {f"top_k_of, k {k}": largest(k) for k in ks}
    calls[f"log_probs_at, k {ks[-1]}"] = given(fk.top_k_of(head, ks[-1], backend=backend).indices)
    calls[f"PyTorch, k {ks[-1]}"] = eager_of(head, ks[-1])
    interleaved(calls, 1, before)
    if alone:
        least = least_cpu_seconds(calls, rounds)
    else:
        least = {name: min(samples) for name, samples in interleaved(calls, rounds, before).items()}
    floor = least.pop("GEMM")
    return [[name, f"{1e3 * s:.1f}", f"{1e3 * floor:.1f}", f"{s / floor:.3f}"] for name, s in least.items()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench lists", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ks", nargs="*", type=int, metavar="K", help=f"entries of a list (default: {KS})")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default float32; bfloat16 on cuda")
    parser.add_argument("--backend", choices=BACKENDS, help="row implementation (default: the device's own)")
    parser.add_argument(
        "--shape", nargs=3, type=int, action="append", metavar=("N", "H", "V"), help="one or more (default: two)"
    )
    parser.add_argument(
        "--one-thread", action="store_true", help="the CPU time of one thread, on a CPU that others use too"
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns (default 9)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench lists: --device cuda needs a GPU", file=sys.stderr)
        return 2
    if args.one_thread:
        if args.device != "cpu":
            print("bench lists: --one-thread is of a CPU", file=sys.stderr)
            return 2
        torch.set_num_threads(1)
    device = torch.device(args.device)
    name = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    shapes = args.shape or (GPU_SHAPES if args.device == "cuda" else CPU_SHAPES)
    try:
        backend = choose_backend(args.backend, device)
        for N, H, V in shapes:
            torch.manual_seed(0)
            hidden, weight = torch.randn(N, H, device=device), torch.randn(V, H, device=device)
            head = fk.LMHead((hidden * (3 / H**0.5)).to(getattr(torch, name)), weight.to(getattr(torch, name)))
            lines = measure(head, args.ks or list(KS), args.backend, args.rounds, Flush(device), args.one_thread)
            print(f"(N, H, V) = ({N}, {H}, {V}), {name}, backend {backend}, {args.device}\n")
            print(table(["", "ms", "GEMM", "ratio"], lines) + "\n")
    except ValueError as error:
        print(f"bench lists: {error}", file=sys.stderr)
        return 2
    return 0
