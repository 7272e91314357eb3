"""A row implementation alone, against a copy of device memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

import fused_kd as fk
from fused_kd.rows.contract import Logits, RowInputs, RowOutputs
from fused_kd.rows.select import get_row

from .counts import row_bytes
from .inputs import BETA, LAM, LOGIT_STD, TEACHER_NOISE

GAMMAS = {"easy": math.inf, "hard": 0.0}


class RowProblem:
    """(C, V) fp32 logits of student and teacher, gradients in ``dtype``; all tokens easy or all hard."""

    def __init__(self, C: int, V: int, device: torch.device, dtype: torch.dtype) -> None:
        g = torch.Generator(device).manual_seed(0)
        self.C, self.V, self.dtype = C, V, dtype
        self.z = torch.randn(C, V, generator=g, device=device).mul_(LOGIT_STD)
        self.z_t = torch.randn(C, V, generator=g, device=device).mul_(TEACHER_NOISE * LOGIT_STD).add_(self.z)
        self.labels = torch.multinomial(self.z_t.softmax(1), 1, generator=g).squeeze(1)
        vectors = torch.empty(2, C, device=device)
        hard = torch.empty(C, dtype=torch.bool, device=device)
        self.outputs = RowOutputs(vectors[0], vectors[1], hard, torch.empty(C, V, dtype=dtype, device=device))
        self._copy = torch.empty_like(self.z)

    def copy(self) -> None:
        """What a row is compared with: (C, V) fp32 read and written."""
        self._copy.copy_(self.z)

    @property
    def copy_bytes(self) -> int:
        return 2 * self.z.nbytes

    @property
    def least_bytes(self) -> int:
        """Both logits read once and the gradient written once."""
        return int(row_bytes(self.C * self.V, self.dtype.itemsize))

    def call(self, backend: str, tokens: str) -> Callable[[], None]:
        objective = fk.SelfEvolution(lam=LAM, beta=BETA, gamma=GAMMAS[tokens])
        scalars = torch.tensor(objective.scalars(), device=self.z.device)
        student, teacher = Logits(self.z, 1.0, None, True), Logits(self.z_t, 1.0, None, True)
        inputs = RowInputs(student, teacher, self.labels, None, scalars, objective.spec, False)
        return functools.partial(get_row(backend), inputs, self.outputs)
