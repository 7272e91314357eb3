"""What is measured on a CPU, in order of importance: what a deadline cuts off is the end of the list."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .implementations import IMPLEMENTATIONS
from .shapes import (
    CPU_CURVES,
    CPU_PEER_SHAPE,
    CPU_SHAPES,
    EVERY,
    FAR,
    QUICK_CURVES,
    QUICK_SHAPES,
    VALID,
    Shape,
    Variant,
)
from .worker import Case

MIXED = (Variant(),)
CPU_CHUNKS = tuple(Variant(chunk=chunk) for chunk in (128, 1024))
# Beyond these a step of plain PyTorch takes two cores a quarter of a minute.
CPU_EAGER_LOGITS = 34_000_000
# How many of fused_kd's own ways the curves show beside what people use now.
CURVES_OF = ("fused_kd", "torch.compile", "eager")


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


def quick_plan(rounds: int = 3) -> list[Case]:
    """Everything at tiny shapes, to see whether it works."""

    def case(shape: Shape, name: str, variants: tuple[Variant, ...], **changes) -> Case:
        return Case(shape, name, variants, "cpu", "float32", rounds, 1, 96, **changes)

    names = [name for name in IMPLEMENTATIONS if name != "fused_kd streaming"]
    table = [case(QUICK_SHAPES[0], name, EVERY if name == "fused_kd" else MIXED) for name in names]
    table += [case(QUICK_SHAPES[0], "fused_kd", (FAR, Variant(chunk=32)))]
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
