"""How hard the tokens of a data set are for a student."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

import fused_kd as fk
from fused_kd.integrations.labels import LABEL_PAD
from fused_kd.integrations.parts import thresholded_part, with_part
from fused_kd.integrations.transformers import hidden_states, lm_head_of
from fused_kd.objectives import Objective
from fused_kd.training.collate import Collator, padding_id
from fused_kd.training.prompts import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def with_quantile_gamma(
    objective: Objective,
    quantile: float,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
) -> Any:
    """The objective with Γ at a quantile of the rows' :func:`difficulties`, rounded to four digits.

    Raises:
        ValueError: where it, or a term of a sum, is no ``SelfEvolution`` that compares the difficulty with a Γ.
    """
    part = thresholded_part(objective)
    gamma = float(difficulties(student, teacher, rows, tokenizer, objective).quantile(quantile))
    return with_part(objective, part, dataclasses.replace(part, gamma=round(gamma, 4)))


@torch.no_grad()
def difficulties(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    *,
    batch_size: int = 64,
) -> torch.Tensor:
    """d of every token with loss, fp32 on the CPU in the rows' order; both models are left in eval mode.

    d is ``KL(target || q)`` in nats for the target that ``objective`` makes (eq. 8 of Song et al., 2025).
    """
    for model in (student, teacher):
        model.eval()
    collate: Any = Collator(padding_id(tokenizer))
    found = []
    for batch in DataLoader(rows, batch_size, collate_fn=collate):
        labels = batch.pop("labels")
        student_head, teacher_head = (
            lm_head_of(model, hidden_states(model, **{key: value.to(model.device) for key, value in batch.items()}))
            for model in (student, teacher)
        )
        out = fk.kd_loss(
            student_head, teacher_head, labels, objective, ignore_index=LABEL_PAD, shift=True, vocab_size=len(tokenizer)
        )
        valid = labels[:, 1:] != LABEL_PAD
        found.append(out.difficulty[:, : valid.shape[1]][valid].float().cpu())
    return torch.cat(found)
