"""How hard the tokens of a training are for the teacher itself: the baseline of its share of hard tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_kd.integrations.labels import LABEL_PAD
from fused_kd.integrations.teacher_columns import LISTS
from fused_kd.objectives import Objective
from fused_kd.rows.shares import teachers_own
from fused_kd.terms import DIFFICULTY, RANK, Scalars

HARD_T = "hard_fraction_t"
DEFAULT_GAMMA = 0.4


@dataclass(frozen=True)
class Baseline:
    """``KL(yt||p)``, the difficulty that a student would have which is as good as its teacher, compared with Γ.

    The difficulty contains the label: a token that the teacher finds unlikely is hard for any student near to it.

    Args:
        scalars: of the term that the difficulty is of, at temperature T.
        gamma: Γ.
        columns: of a batch, with lists; None: the loss tells the probabilities. tail: of the lists.
    """

    scalars: Scalars
    gamma: float
    columns: tuple[str, str] | None = None
    tail: str = ""

    @classmethod
    def of(cls, objective: Objective, options: dict[str, Any], teaching: Any, vocabulary: Any) -> Baseline | None:
        """For a trainer's objective, options of its loss and teachers.

        None where it is 0 by definition (no label in the difficulty, or what a gate compares), and where neither the
        loss's own pass nor the batch tells the teacher's probability of the label: lists among several teachers or
        made on the fly, two vocabularies, a ``memory_budget``, which may need the streaming engine, the CUDA row.
        """
        spec = objective.spec
        if not spec.needs_teacher or teaching is None or spec.gate not in ("", RANK, DIFFICULTY):
            return None
        if objective.per_token or isinstance(options["temperature"], Tensor):
            return None
        lists = [form for form in teaching.given if form.lists]
        if lists:
            columns = cls._columns_of(lists[0].given)
            if len(teaching.forms) > 1 or columns is None or options["temperature"] != 1.0:
                return None
        elif (
            vocabulary is not None
            or any(options[name] is not None for name in ("lists", "memory_budget", "tp_group"))
            or options["engine"] == "streaming"
            or options["backend"] == "cuda"
        ):
            return None
        else:
            columns = None
        scalars = Scalars(*objective.scalars(options["temperature"])[spec.main])
        gamma = DEFAULT_GAMMA if spec.gate != DIFFICULTY else float(scalars.gamma)
        tail = str(lists[0].given.tail) if lists else ""
        return cls(scalars, gamma, columns, tail) if scalars.rest > 0.0 else None

    @staticmethod
    def _columns_of(given: Any) -> tuple[str, str] | None:
        """Where a batch has the log-probabilities and the ids of a cache's lists."""
        found = [next((name for name in given.columns if name.endswith(f"_{kind}")), None) for kind in LISTS]
        return (found[0], found[1]) if found[0] is not None and found[1] is not None else None

    def log_p_y(self, inputs: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> Tensor:
        """The teacher's log-probability of each token's label, 0 of ignored ones.

        Labels that a list does not hold have -inf: they are less likely than all that it holds.
        """
        if self.columns is None:
            return statistics["log_p_y"]
        log_probs, indices = (inputs[name] for name in self.columns)
        labels: Tensor = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=LABEL_PAD)
        labels = labels.to(indices.device, non_blocking=True)
        found: Tensor = log_probs.where(indices == labels.unsqueeze(-1), -math.inf).amax(-1)
        if self.tail in ("renormalize", "listed"):
            found = found - log_probs.logsumexp(-1)
        return found.masked_fill(labels == LABEL_PAD, 0.0)

    def hard(self, log_p_y: Tensor) -> Tensor:
        """Bool: which tokens are hard for the teacher; of ignored ones, which have 0, none."""
        return teachers_own(log_p_y, self.scalars) > self.gamma
