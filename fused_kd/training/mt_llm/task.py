"""Stages 2 and 3: a sentence classifier, and the stacked model that learns its sentences and its decisions."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_kd as fk
from fused_kd.training.mt_llm.stacked import StackedModel


class Classifier(nn.Module):
    """A sentence embedder with a head without bias, trained by cross-entropy.

    Args:
        embedder: ``(text_ids, text_mask)`` to (N, H); has ``width`` H. What of it is trainable is trained.
        classes: rows of the head.
        seed: of the head.
    """

    def __init__(self, embedder: Any, classes: int, seed: int = 0) -> None:
        super().__init__()
        self.embedder = embedder
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head = nn.Linear(embedder.width, classes, bias=False)
        self.criterion = fk.KDLoss(fk.SFT())

    def logits(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """(N, classes)."""
        return cast(Tensor, self.head(self.embedder(text_ids, text_mask)))

    def forward(self, text_ids: Tensor, text_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        states = self.embedder(text_ids, text_mask)
        return {"loss": self.criterion(fk.LMHead(states, self.head.weight), None, labels)}


class TaskDistillation(nn.Module):
    """The stacked model learns a task model's sentences: MSE to its pooled states, and KD through its head.

    The head is the teacher's, copied and frozen: where the states agree, so do the decisions.

    Args:
        embedder: the stacked model; its projection and adapters are trained.
        head: the teacher's (classes, H) weight.
        mse_weight: of the mean squared error of pooled states; the paper has this alone. Default 1.
        objective: any of ``fused_kd``'s, on the distributions over the classes; None (default) for none.
        kd_weight: of that. Default 1.

    Raises:
        ValueError: a head of another width, weights that are negative or leave nothing to learn.
    """

    def __init__(
        self,
        embedder: StackedModel,
        head: Tensor,
        *,
        mse_weight: float = 1.0,
        objective: Any = None,
        kd_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if head.dim() != 2 or head.shape[1] != embedder.width:
            raise ValueError(f"head must have shape (classes, {embedder.width}), got {tuple(head.shape)}")
        if min(mse_weight, kd_weight) < 0 or (mse_weight == 0 and (objective is None or kd_weight == 0)):
            raise ValueError(
                f"mse_weight={mse_weight!r}, kd_weight={kd_weight!r}, objective={objective!r}: expected weights of at "
                "least 0 and something to learn"
            )
        self.embedder = embedder
        self.head = nn.Linear(head.shape[1], head.shape[0], bias=False).requires_grad_(False)
        with torch.no_grad():
            self.head.weight.copy_(head)
        self.mse_weight, self.kd_weight = mse_weight, kd_weight
        self.criterion = None if objective is None else fk.KDLoss(objective)

    def logits(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """(N, classes)."""
        return cast(Tensor, self.head(self.embedder(text_ids, text_mask)))

    def forward(self, text_ids: Tensor, text_mask: Tensor, labels: Tensor, states: Tensor) -> dict[str, Tensor]:
        """``states`` (N, H) are the teacher's pooled ones of the same sentences."""
        student = self.embedder(text_ids, text_mask)
        mse = F.mse_loss(student, states)
        out = {"loss": self.mse_weight * mse, "mse": mse.detach()}
        if self.criterion is not None:
            weight = self.head.weight
            kd = self.criterion(fk.LMHead(student, weight), fk.LMHead(states, weight), labels)
            out |= {"loss": out["loss"] + self.kd_weight * kd, "kd": kd.detach()}
        return out
