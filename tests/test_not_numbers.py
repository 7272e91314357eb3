"""A NaN or +inf among a row's logits makes its loss and difficulty NaN, whatever else the row has.

Excluded tokens beside it matter most: an infinite loss is a verdict on the pair of models, NaN says that a number is
broken.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.divergences import DIVERGENCES

from .cuda_emulator import emulated, needs_cpp_compiler
from .problems import CPU_BACKENDS
from .test_exact import CLASSES, SOME, TAILS, TAUGHT, Run, in_slices, needs_interpreter, through_the_loss, variants

__all__ = ["emulated"]
BAD, SPARED = 2, 5  # the broken token, and one that a side excludes
SIDES = ("student", "teacher")


def rows(broken: tuple[str, ...], few: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Student's and teacher's logits and labels; the first row has neither a broken nor an excluded token."""
    g = torch.Generator().manual_seed(0)
    values, spares = ((math.inf,), (SPARED,)) if few else ((math.nan, math.inf), (SPARED, BAD))
    excluders = (("student",), ("teacher",), *(() if few else ((), SIDES)))
    kinds = list(itertools.product(broken, values, excluders, spares, (0, SPARED) if few else (0, BAD, SPARED)))
    z, z_t = (torch.randn(1 + len(kinds), 9, generator=g) for _ in range(2))
    labels = torch.tensor([0] + [label for *_, label in kinds])
    for row, (side, value, excluding, spared, _) in enumerate(kinds, 1):
        for excluder in excluding:
            (z if excluder == "student" else z_t)[row, spared] = -math.inf
        (z if side == "student" else z_t)[row, BAD] = value
    return z, z_t, labels


def check(run: Run, cls: type[fk.Objective], tail: str = "dense", *, few: bool = False) -> None:
    """``few``: of the rows, and without the scalars' edges."""
    z, teacher, labels = rows(("student",) if cls.kind.divergence is None or tail != "dense" else SIDES, few)
    if tail != "dense":
        values, indices = teacher.log_softmax(1).topk(3)
        teacher = fk.TopK(values, indices, tail)
    for objective in variants(cls, edges=not few):
        if tail == "renormalize" and DIVERGENCES[objective.spec.divergence or "kl"].everywhere:
            continue
        out = run(z, teacher, labels, objective, 1.0)
        for field in ("loss", "difficulty"):
            found = getattr(out, field)
            assert found[0].isfinite(), objective
            hidden = (~found[1:].isnan()).nonzero().flatten() + 1
            assert not len(hidden), f"{field} {found[hidden[0]]} at row {hidden[0]} of {objective}: {z[hidden[0]]}"


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.name)
def test_dense(cls, backend):
    check(through_the_loss(backend=backend), cls, few=backend == "triton")


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("cls", TAUGHT, ids=lambda cls: cls.name)
def test_lists(cls, backend, tail):
    if backend != "triton" or cls in SOME:
        check(through_the_loss(backend=backend), cls, tail, few=backend == "triton")


@needs_cpp_compiler
@pytest.mark.parametrize("tail", ["dense", "bucket"])
@pytest.mark.parametrize("cls", TAUGHT, ids=lambda cls: cls.name)
def test_cuda_emulated(cls, tail, emulated):
    check(through_the_loss(backend="cuda"), cls, tail, few=True)


@needs_interpreter
@pytest.mark.parametrize("cls", [cls for cls in SOME if cls is not fk.AdaptiveKL], ids=lambda cls: cls.name)
def test_streaming(cls):
    check(through_the_loss(backend="triton", engine="streaming"), cls, few=True)


@pytest.mark.parametrize("tail", ["dense", *TAILS])
@pytest.mark.parametrize("cls", TAUGHT, ids=lambda cls: cls.name)
def test_slices(cls, tail):
    check(in_slices("torch"), cls, tail)


@needs_interpreter
@pytest.mark.parametrize("cls", SOME, ids=lambda cls: cls.name)
def test_slices_in_triton(cls):
    check(in_slices("triton"), cls, few=True)
