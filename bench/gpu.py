"""The GPU suite: tests marked gpu, then fused_kd against the bare GEMMs, PyTorch and the peers, in bf16.

    python -m bench.gpu

Needs an NVIDIA GPU (sm_80 or later), torch >= 2.8 and triton >= 3.4; downloads nothing. Ends within
--minutes; what did not fit says so, and the same command measures it. Writes gpu.json, and from it gpu.md and
gpu.png, to bench/results/<gpu>/."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import torch
from torch.torch_version import TorchVersion

from . import environment
from .progress import progress
from .report import write_report
from .runner import Deadline, run_cases, run_tests
from .shapes import GPU_SHAPES, QUICK_SHAPES, ROW_SHAPES, TOKENS, Shape
from .store import Store
from .worker import ROW_PREFIX, Case

PEERS = ("liger fused jsd", "liger chunked jsd", "trl chunked jsd", "trl chunked kl")
CHUNKS = (1024, 2048, 4096)
ROW_TOKENS = 2048
TEST_SECONDS = 150.0
CASE_SECONDS = 120.0
# Kept back for the report.
SPARE_SECONDS = 10.0


def unsupported() -> str | None:
    """Why the suite cannot run here, in one line, or None."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "no NVIDIA GPU is available to torch"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"needs an NVIDIA GPU of sm_80 or later, found {torch.cuda.get_device_name()}"
    if torch.__version__ < TorchVersion("2.8"):
        return f"needs torch >= 2.8, found {torch.__version__}"
    if importlib.util.find_spec("triton") is None:
        return "needs triton >= 3.4, which is not installed"
    triton = importlib.metadata.version("triton")
    return None if TorchVersion(triton) >= "3.4" else f"needs triton >= 3.4, found {triton}"


def plan(shapes: tuple[Shape, ...], device: str, dtype: str, rounds: int, quick: bool) -> list[Case]:
    """Cases in order of importance: what the deadline cuts off is the end of this list."""
    every = tuple((tokens, None) for tokens in TOKENS)
    backends = ("triton", "cuda") if device == "cuda" else ("torch",)
    chunks = tuple(("mixed", chunk // 64 if quick else chunk) for chunk in CHUNKS)
    rows = tuple((tokens, 16 if quick else ROW_TOKENS) for tokens in TOKENS)
    order = [
        ("fused_kd", every + chunks),
        *((f"{ROW_PREFIX}{backend}", rows) for backend in backends),
        ("eager", every),
        ("torch.compile", every),
        *((peer, (("mixed", None),)) for peer in PEERS),
        ("fused_kd torch", (("mixed", None),)),
    ]
    return [
        Case(shape, name, variants, device, dtype, rounds, warmup=2 if quick else 3, error_tokens=256)
        for name, variants in order
        for shape in (ROW_SHAPES + shapes if name.startswith(ROW_PREFIX) and not quick else shapes)
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the suite out, in fp32")
    parser.add_argument("--quick", action="store_true", help="tiny shape and few rounds (implied by --device cpu)")
    parser.add_argument("--fresh", action="store_true", help="measure finished cases again")
    parser.add_argument("--minutes", type=float, default=7.5, help="the whole run's limit (default 7.5)")
    parser.add_argument("--rounds", type=int, help="timed rounds after warm-up (default 10; 3 with --quick)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="implementations to measure (default: all)")
    parser.add_argument("--skip-tests", action="store_true", help="do not run the tests marked gpu")
    parser.add_argument("--output", type=Path, help="folder of the results (default bench/results/<gpu>)")
    args = parser.parse_args(arguments)
    deadline = Deadline(60.0 * args.minutes - SPARE_SECONDS)
    if args.device == "cuda" and (reason := unsupported()):
        print(f"bench.gpu: {reason}", file=sys.stderr)
        return 2

    quick = args.quick or args.device == "cpu"
    rounds = args.rounds or (3 if quick else 10)
    if rounds < 1:
        parser.error(f"--rounds must be at least 1, got {rounds}")
    dtype = "bfloat16" if args.device == "cuda" else "float32"
    if args.device == "cpu":
        environment.use_threads(1)
    hardware = environment.hardware(args.device)
    folder = args.output or environment.results_folder(hardware, quick)
    header = {
        "suite": "gpu",
        "hardware": hardware,
        "versions": environment.versions(),
        "source": environment.source(),
        "settings": {"quick": quick, "rounds": rounds, "dtype": dtype, "device": args.device},
    }
    cases = plan(QUICK_SHAPES if quick else GPU_SHAPES, args.device, dtype, rounds, quick)
    known = {case.implementation for case in cases}
    if unknown := set(args.only or ()) - known:
        parser.error(f"--only must name some of {', '.join(sorted(known))}; got {', '.join(sorted(unknown))}")
    cases = [case for case in cases if args.only is None or case.implementation in args.only]
    store = Store(folder / ("gpu-quick.json" if quick else "gpu.json"), header, args.fresh)
    with progress(f"GPU suite on {hardware.get('gpu', 'cpu')}", len(cases) + 1) as tick:
        tick("tests marked gpu")
        if args.skip_tests:
            store.write()
        else:
            store.write(tests=run_tests(min(TEST_SECONDS, deadline.left())))
        run_cases(cases, store, deadline, CASE_SECONDS, tick)
    print(write_report(store.path))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
