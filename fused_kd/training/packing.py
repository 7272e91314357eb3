"""Rows laid end to end without padding, each blind to the others."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DataCollatorWithFlattening

from fused_kd.training.data.prompts import Collator, check_rows
from fused_kd.training.distributed import TEACHER_COLUMNS


class PackingCollator(DataCollatorWithFlattening):
    """transformers' ``DataCollatorWithFlattening``, with the lists of a cached teacher.

    Returns ``input_ids``, ``labels`` and ``position_ids`` (1, tokens of all rows), and ``teacher_log_probs`` and
    ``teacher_indices`` (1, tokens, K) for rows that have them. Positions start anew in each row; from them and from
    the missing attention mask transformers' attention (SDPA, eager, FlashAttention) keeps the rows apart; a trainer of
    this library tries both models with the first batch and refuses one that does not (Falcon, Bloom, Mamba, ...). The
    first label of a row is -100, as nothing predicts it. ``return_flash_attn_kwargs=True`` adds FlashAttention's row
    limits.
    """

    def __call__(self, features: Any, return_tensors: Any = None, separator_id: Any = None) -> dict[str, Any]:
        check_rows(features, ("input_ids",))
        batch: dict[str, Any] = super().__call__(features, return_tensors, separator_id)  # type: ignore[no-untyped-call]
        if "teacher_log_probs" in features[0]:
            apart = [Collator(0)([row]) for row in features]
            for name in TEACHER_COLUMNS:
                batch[name] = torch.cat([row[name] for row in apart], dim=1)
        return batch
