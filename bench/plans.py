"""What is measured on which machine, in order of importance: what a deadline cuts off is the end of the list."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable, Iterator

import torch
from torch.torch_version import TorchVersion

from .implementations import IMPLEMENTATIONS
from .shapes import (
    CPU_CURVES,
    CPU_PEER_SHAPE,
    CPU_SHAPES,
    EVERY,
    FAR,
    GPU_CURVES,
    GPU_SHAPES,
    MORE_GPU_SHAPES,
    QUICK_CURVES,
    QUICK_SHAPES,
    ROW_SHAPES,
    VALID,
    Shape,
    Variant,
)
from .worker import ROW_PREFIX, Case

MIXED = (Variant(),)
CHUNKS = tuple(Variant(chunk=chunk) for chunk in (1024, 2048, 4096))
CPU_CHUNKS = tuple(Variant(chunk=chunk) for chunk in (128, 1024))
ROW_TOKENS = 2048
# Beyond these a step of plain PyTorch takes two cores a quarter of a minute.
CPU_EAGER_LOGITS = 34_000_000
# How many of fused_kd's own ways the curves show beside what people use now.
CURVES_OF = ("fused_kd", "torch.compile", "eager")
GPU_CURVES_OF = ("fused_kd", "fused_kd streaming", "torch.compile", "eager")


def default_plan() -> list[Case]:
    """That of the GPU where there is one."""
    return gpu_plan() if unsupported() is None else cpu_plan()


def cpu_plan(rounds: int = 5) -> list[Case]:
    """fp32. Every implementation that a CPU has, the gated objective at two shapes, the peers' at smaller ones."""

    def case(shape: Shape, name: str, variants: tuple[Variant, ...], **changes) -> Case:
        settings = {"warmup": 1, "error_tokens": 64, "seconds": 8.0, **changes}
        return Case(shape, name, variants, "cpu", "float32", rounds, **settings)

    names = {"fused_kd": (EVERY, 12.0), "torch.compile": (MIXED, 8.0)}
    table = [
        case(shape, name, variants, seconds=seconds)
        for name, (variants, seconds) in names.items()
        for shape in CPU_SHAPES
    ]
    beside = ("eager", "fused_kd top-k 64", "fused_kd top-k 64 bucket", "fused_kd torch")
    table += [case(CPU_SHAPES[0], name, MIXED) for name in beside]
    # Plain PyTorch costs much the same in every group.
    peers = [name for name in _group("jsd", "kl", "sft") if not name.startswith("eager")]
    table += [case(CPU_PEER_SHAPE, name, MIXED, seconds=3.5) for name in peers]
    table += [case(CPU_PEER_SHAPE, name, (FAR,), seconds=3.5) for name in ("fused_kd", "torch.compile")]
    curves = _curves(CPU_CURVES, CURVES_OF, CPU_SHAPES[0], CPU_CHUNKS)
    for axis, shape, name, variants in curves:
        if name != "eager" or (axis != "valid" and shape.N * shape.V <= CPU_EAGER_LOGITS):
            table.append(case(shape, name, variants, purpose=axis, error_tokens=0, seconds=2.0))
    return table


def gpu_plan(rounds: int = 10) -> list[Case]:
    """bf16."""

    def case(shape: Shape, name: str, variants: tuple[Variant, ...], **changes) -> Case:
        settings = {"warmup": 3, "error_tokens": 256, **changes}
        return Case(shape, name, variants, "cuda", "bfloat16", rounds, **settings)

    rows = tuple(Variant(tokens, chunk=ROW_TOKENS) for tokens, *_ in EVERY)
    order: list[tuple[str, tuple[Variant, ...], tuple[Shape, ...]]] = [
        ("fused_kd", EVERY, GPU_SHAPES),
        *((f"{ROW_PREFIX}{backend}", rows, (*ROW_SHAPES, *GPU_SHAPES)) for backend in ("triton", "cuda")),
        ("fused_kd cuda", EVERY, GPU_SHAPES),
        ("eager", MIXED, GPU_SHAPES),
        ("torch.compile", MIXED, GPU_SHAPES),
        *((name, MIXED, GPU_SHAPES) for name in _group("jsd", "kl", "sft")),
        ("fused_kd streaming", EVERY, GPU_SHAPES),
        ("fused_kd top-k 64", MIXED, GPU_SHAPES),
        ("fused_kd top-k 64 bucket", MIXED, GPU_SHAPES),
        ("fused_kd torch", MIXED, GPU_SHAPES),
        *((name, (FAR,), GPU_SHAPES[:1]) for name in CURVES_OF),
        *((name, MIXED, MORE_GPU_SHAPES) for name in CURVES_OF),
    ]
    table = [case(shape, name, variants) for name, variants, shapes in order for shape in shapes]
    curves = _curves(GPU_CURVES, GPU_CURVES_OF, GPU_SHAPES[0], CHUNKS)
    return table + [
        case(shape, name, variants, purpose=axis, error_tokens=0, seconds=5.0) for axis, shape, name, variants in curves
    ]


def quick_plan(device: str, rounds: int = 3) -> list[Case]:
    """Everything at tiny shapes, to see whether it works."""

    def case(shape: Shape, name: str, variants: tuple[Variant, ...], **changes) -> Case:
        return Case(
            shape, name, variants, device, "float32" if device == "cpu" else "bfloat16", rounds, 1, 96, **changes
        )

    names = [name for name in IMPLEMENTATIONS if not (device == "cpu" and name == "fused_kd streaming")]
    table = [case(QUICK_SHAPES[0], name, EVERY if name == "fused_kd" else MIXED) for name in names]
    table += [case(QUICK_SHAPES[0], "fused_kd", (FAR, Variant(chunk=32)))]
    row = "torch" if device == "cpu" else "triton"
    table += [case(QUICK_SHAPES[0], f"{ROW_PREFIX}{row}", (Variant("easy", chunk=16), Variant("hard", chunk=16)))]
    curves = _curves(QUICK_CURVES, ("fused_kd", "eager"), QUICK_SHAPES[0], (Variant(chunk=16),))
    return table + [case(shape, name, variants, purpose=axis) for axis, shape, name, variants in curves]


def _group(*groups: str) -> list[str]:
    """The implementations of some groups, ours first."""
    return [name for group in groups for name, known in IMPLEMENTATIONS.items() if known.group == group]


def _curves(
    curves: dict[str, tuple[Shape, ...]], names: Iterable[str], chunked: Shape, chunks: tuple[Variant, ...]
) -> Iterator[tuple[str, Shape, str, tuple[Variant, ...]]]:
    """(axis, shape, implementation, variants) of every point; chunks are fused_kd's alone."""
    for name in names:
        for axis, shapes in curves.items():
            yield from ((axis, shape, name, MIXED) for shape in shapes)
        yield "valid", curves["N"][1]._replace(name="valid"), name, tuple(Variant(valid=valid) for valid in VALID)
    yield "chunk", chunked._replace(name="chunk"), "fused_kd", (*MIXED, *chunks)


def unsupported() -> str | None:
    """Why the GPU's plan cannot run here, in one line, or None."""
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
