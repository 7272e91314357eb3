"""A NaN or +inf among a row's logits makes its loss and difficulty NaN, whatever else the row has.

Excluded tokens beside it matter most: an infinite loss is a verdict on the pair of models, NaN says that a number is
broken.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

import fused_kd as fk

from .ways import every_way, variants

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


@every_way()
def test_nan_and_inf_make_loss_and_difficulty_nan(way, form, cls):
    """Slow ways take a few of the rows, and the scalars' edges are not theirs."""
    z, teacher, labels = rows(("student",) if not cls().spec.needs_teacher or form != "dense" else SIDES, way.slow)
    if form != "dense":
        teacher = fk.TopK(*teacher.log_softmax(1).topk(3), form)
    for objective in variants(cls, form, edges=not way.slow):
        out = way.run(z, teacher, labels, objective, 1.0)
        for field in ("loss", "difficulty"):
            found = getattr(out, field)
            assert found[0].isfinite(), objective
            hidden = (~found[1:].isnan()).nonzero().flatten() + 1
            assert not len(hidden), f"{field} {found[hidden[0]]} at row {hidden[0]} of {objective}: {z[hidden[0]]}"
