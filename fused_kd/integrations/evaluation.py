"""Evaluation of any transformers Trainer by its own loss, averaged over tokens, without logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fused_kd.integrations.distributed import sum_over_ranks
from fused_kd.integrations.held_out import HeldOut
from fused_kd.integrations.labels import LABEL_PAD, count_targets, without_first_targets

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import Trainer
    from transformers.trainer_utils import EvalLoopOutput
else:
    Trainer = object  # the class that the mixin is put before brings its own


class EvaluatedByTokens(Trainer):
    """A part of :class:`fused_kd.integrations.mixin.KDLossMixin`.

    Attributes:
        shift: whether position i predicts token i + 1.
    """

    shift: bool
    # what an evaluation tells beside the loss, while it runs
    held_out: HeldOut | None = None
    # sums of losses, and of what they are averaged over
    _evaluated = torch.zeros(2, dtype=torch.float32)

    def _held_out(self) -> HeldOut | None:
        """For a new evaluation; None for the loss alone."""
        return None

    def _denominator(self, batch: dict[str, Any]) -> torch.Tensor:
        """How much of what the loss is averaged over a batch holds: its target tokens."""
        labels = batch["labels"]
        return count_targets(labels) if self.shift else (labels != LABEL_PAD).sum()

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **generation: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """The mean loss of one batch, never logits; of a Seq2SeqTrainer that generates, the tokens and labels too."""
        generates = getattr(self.args, "predict_with_generate", False) and not prediction_loss_only
        if self.shift:
            inputs = without_first_targets(inputs)
        labels, loss = inputs.get("labels"), None
        if labels is not None or not generates:
            with torch.no_grad():
                made: Any = self.compute_loss(model, self._prepare_inputs(inputs))
            loss = made.detach()
            items = self._denominator(inputs).to(loss)
            self._evaluated = self._evaluated.to(loss) + torch.stack([loss * items, items])
        if not generates:
            return loss, None, None
        # decoder inputs made from labels would be continued
        made = labels is not None and getattr(inputs.get("decoder_input_ids"), "shape", None) == labels.shape
        dropped = ("labels", "decoder_input_ids", "decoder_attention_mask") if made else ("labels",)
        free = {name: value for name, value in inputs.items() if name not in dropped}
        tokens = super().prediction_step(model, free, prediction_loss_only, ignore_keys, **generation)[1]
        return loss, tokens, None if labels is None else labels.to(self.args.device)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the Trainer's, with the loss averaged over tokens and not over batches."""
        self._evaluated = torch.zeros(2, dtype=torch.float32)
        self.held_out = held_out = self._held_out()
        try:
            result = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
            )
        finally:
            self.held_out = None
        total, items = sum_over_ranks(self.accelerator, self._evaluated).tolist()
        found = {"loss": total / max(items, 1.0)}
        if held_out is not None:
            found |= held_out.means(sum_over_ranks(self.accelerator, held_out.sums).tolist())
        metrics = {**(result.metrics or {}), **{f"{metric_key_prefix}_{name}": each for name, each in found.items()}}
        return result._replace(metrics=metrics)
