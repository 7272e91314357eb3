"""Hugging Face language models: hidden states without logits, the output head as a ``fused_kd.LMHead``, and the loss
for any ``transformers.Trainer``."""

from __future__ import annotations

from fused_kd.integrations.bodies import hidden_states, labels_need_shift
from fused_kd.integrations.heads import check_head_module, common_vocab_size, lm_head_of, logit_options
from fused_kd.integrations.mixin import KDLossMixin
from fused_kd.integrations.own import OwnTeacher
from fused_kd.integrations.routing import check_lm_head, route_head_loss
from fused_kd.integrations.weights import rows_of

__all__ = [
    "KDLossMixin",
    "OwnTeacher",
    "check_head_module",
    "check_lm_head",
    "common_vocab_size",
    "hidden_states",
    "labels_need_shift",
    "lm_head_of",
    "logit_options",
    "route_head_loss",
    "rows_of",
]
