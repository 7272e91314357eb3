"""The numbers of a machine that bench/prediction.py predicts from.

``python -m bench machine`` prints those of this machine: two of any, and of a GPU its multiprocessors and clock.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping

import torch

from .measure import Calls, Flush, interleaved, product

GEMM, COPY = "gemm_flops_per_s", "copy_bytes_per_s"
# Of GPUs, where known.
MULTIPROCESSORS, CLOCK = "multiprocessors", "clock_hz"

SECONDS = 2.5
MIN_ROUNDS = 3
# (tokens, hidden, vocabulary) of a logits GEMM: near the device's peak, a fraction of a second on two cores.
CPU_GEMM = (1024, 1024, 16384)
# A result that is small beside the products, in whole waves of 128 x 256 tiles on 132 multiprocessors: what
# bench/prediction.py takes from the rate of other GEMMs should not be in this one.
CUDA_GEMM = (8192, 16384, 8448)
# Larger than any cache; on a GPU long enough that starting the copy does not count.
CPU_COPY_BYTES = 512 << 20
CUDA_COPY_BYTES = 2 << 30


def measure_machine(device: torch.device | str, dtype: torch.dtype, shrink: int = 1) -> dict[str, float]:
    """``gemm_flops_per_s`` and ``copy_bytes_per_s`` of a CPU or CUDA device, in about three seconds.

    Medians of a logits GEMM with an fp32 result (on a CPU with fp32 operands, which low-precision ones are upcast to)
    and of a copy, whose bytes are read and written. The two take turns, in the caller's threads. Of a CUDA device also
    ``multiprocessors`` and, where PyTorch knows it, ``clock_hz``, the highest that it may run at. ``shrink`` divides
    every size and the time, to try it out.
    """
    device = torch.device(device)
    on_host = device.type == "cpu"
    n, H, V = (size // shrink for size in (CPU_GEMM if on_host else CUDA_GEMM))
    # Random digits: power, and with it the clock, depends on them.
    operands = torch.float32 if on_host else dtype
    hidden, weight = (torch.randn(size, H, device=device).to(operands) for size in (n, V))
    logits = torch.zeros(n, V, device=device)
    source = torch.ones((CPU_COPY_BYTES if on_host else CUDA_COPY_BYTES) // (4 * shrink), device=device)
    target = torch.zeros_like(source)
    work = {GEMM: 2 * n * H * V, COPY: 2 * source.nbytes}
    calls: Calls = {GEMM: lambda: product(hidden, weight.t(), logits), COPY: lambda: target.copy_(source)}
    flush = Flush(device)
    interleaved(calls, 1, flush)
    began = time.monotonic()
    interleaved(calls, 1, flush)
    rounds = max(MIN_ROUNDS, int(SECONDS / shrink / (time.monotonic() - began)))
    seconds = interleaved(calls, rounds, flush)
    found: dict[str, float] = {name: work[name] / statistics.median(samples) for name, samples in seconds.items()}
    if on_host:
        return found
    about = torch.cuda.get_device_properties(device)
    kilohertz = getattr(about, "clock_rate", None)
    found[MULTIPROCESSORS] = about.multi_processor_count
    return found | ({CLOCK: 1e3 * kilohertz} if kilohertz else {})


def options(found: Mapping[str, float], dtype: str) -> str:
    """What ``python -m bench model`` takes them by."""
    parts = [f"--gemm-tflops {found[GEMM] / 1e12:.4g}", f"--bandwidth-gb {found[COPY] / 1e9:.4g}", f"--dtype {dtype}"]
    if MULTIPROCESSORS in found:
        parts.append(f"--multiprocessors {found[MULTIPROCESSORS]:.0f}")
    if CLOCK in found:
        parts.append(f"--clock-ghz {found[CLOCK] / 1e9:.4g}")
    return " ".join(parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench machine", description="The numbers of this machine.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default float32; bfloat16 on cuda")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench machine: --device cuda needs an NVIDIA GPU", file=sys.stderr)
        return 2
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    print(options(measure_machine(args.device, getattr(torch, dtype)), dtype))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
