"""The numbers of a machine that bench/prediction.py predicts from: measured here, or from public data sheets.

``python -m bench machine`` prints those of this machine: two of any, and of a GPU its multiprocessors and clock.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

import torch

from .measure import Calls, Flush, interleaved, product

GEMM, COPY = "gemm_flops_per_s", "copy_bytes_per_s"
# Of GPUs, where known.
MULTIPROCESSORS, CLOCK, CACHE = "multiprocessors", "clock_hz", "l2_bytes_per_s"

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


class Peak(NamedTuple):
    """Of one GPU: dense bf16 FLOPs and bytes of HBM a second by its data sheet, and which that is.

    Then, where a whitepaper gives them, multiprocessors and the clock that FLOPs are stated at: FLOPs / multiprocessors
    / 4096 a clock (2048 on an A100). Other work may be clocked higher, 1.98 GHz by an H100's fp32 peak, or lower.
    """

    flops: float
    bytes: float
    source: str
    multiprocessors: int | None = None
    clock: float | None = None


GPUS = {
    "A100-80G SXM": Peak(
        312e12, 2.039e12, "NVIDIA A100 Tensor Core GPU data sheet; A100 architecture whitepaper: 108 multiprocessors",
        108, 1.41e9,
    ),
    "H100 SXM": Peak(
        989.4e12, 3.35e12, "NVIDIA H100 Tensor Core GPU data sheet, half of the rate with sparsity; H100 (Hopper) "
        "architecture whitepaper, SXM5: 132 multiprocessors", 132, 1.83e9,
    ),
    "H200": Peak(
        989.4e12, 4.8e12, "NVIDIA H200 Tensor Core GPU data sheet, half of the rate with sparsity; the H100's "
        "multiprocessors and clock, as its rate is the same", 132, 1.83e9,
    ),
    "B200": Peak(2250e12, 8.0e12, "NVIDIA Blackwell architecture brief, HGX B200, half of the rate with sparsity"),
}  # fmt: skip
# What an H200 reaches of its data sheet, about 790 bf16 TFLOP/s and 4.3 TB/s. Taken for all: an assumption.
GEMM_SHARE = 790e12 / GPUS["H200"].flops
COPY_SHARE = 4.3e12 / GPUS["H200"].bytes
# Bytes of L2 reads a clock: an A100's by its whitepaper; Hopper's gives none. That Hopper has as many, and that kernels
# reach this share of them, are assumptions: 5.6 TB/s on an H100.
CACHE_BYTES_A_CLOCK = 5120
CACHE_SHARE = 0.6


def assumed_machine(gpu: str) -> dict[str, float]:
    """The numbers of a GPU in :data:`GPUS`: its data sheet times what an H200 reaches of its own."""
    peak = GPUS[gpu]
    found: dict[str, float] = {GEMM: peak.flops * GEMM_SHARE, COPY: peak.bytes * COPY_SHARE}
    if peak.multiprocessors is not None and peak.clock is not None:
        cache = CACHE_BYTES_A_CLOCK * CACHE_SHARE * peak.clock
        found |= {MULTIPROCESSORS: peak.multiprocessors, CLOCK: peak.clock, CACHE: cache}
    return found


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
