"""Objectives that rank the tokens of a step, in a trainer that sees them in several micro-batches and processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from fused_kd import KDOutput, NoEvo
from fused_kd.integrations.distributed import hard_threshold
from fused_kd.integrations.labels import LABEL_PAD
from fused_kd.integrations.parts import ranked_part, with_threshold
from fused_kd.objectives import Objective

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # the class that the mixin is put before brings its own


class RanksTokens(Trainer):
    """A part of :class:`fused_kd.integrations.mixin.KDLossMixin`.

    Attributes:
        objective: what is minimised. shift: whether position i predicts token i + 1.
    """

    objective: Objective
    shift: bool
    _step_batches: list[dict[str, Any]]
    _step_gamma: float | None = None

    def current_objective(self) -> Objective:
        """The objective of the current step; to be overridden for one that changes."""
        return self.objective

    def _run(
        self, model: torch.nn.Module, inputs: dict[str, Any], objective: Objective, num_items: Any, ranks: int
    ) -> tuple[torch.Tensor, KDOutput]:
        raise NotImplementedError

    def _unranked(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Objective:
        """The objective; one that ranks tokens of several calls becomes a threshold on their difficulties.

        Ranked together are the tokens of the step, in evaluation those of a batch, on all processes.
        """
        now = self.current_objective() if model.training else self.objective
        batches = self._step_batches if model.training and self._step_batches else [inputs]
        if not now.spec.ranked or self.accelerator.num_processes * len(batches) == 1:
            return now
        part = ranked_part(now)
        gamma = self._step_gamma if model.training else None
        if gamma is None:
            devices = [self.args.device] if self.args.device.type == "cuda" else []
            # the passes with gradients draw the same dropout again
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                found = [self._difficulties(model, batch, part.lam) for batch in batches]
            gamma = self._step_gamma = hard_threshold(self.accelerator, found, cast(float, part.fraction))
        return with_threshold(now, gamma)

    def _difficulties(self, model: torch.nn.Module, batch: dict[str, Any], lam: Any) -> torch.Tensor:
        inputs = self._prepare_inputs(batch)
        difficulty = self._run(model, inputs, NoEvo(lam=lam), None, 1)[1].difficulty
        labels = inputs["labels"]
        if self.shift:
            difficulty, labels = difficulty[..., :-1], labels[..., 1:]
        return difficulty[(labels != LABEL_PAD).to(difficulty.device)]
