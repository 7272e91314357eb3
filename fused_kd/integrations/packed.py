"""Rows laid end to end in a batch, and the proof that a model keeps them apart."""

from __future__ import annotations

from typing import Any

import torch

from fused_kd.integrations.bodies import eval_mode, without_adapters
from fused_kd.integrations.routing import relative_difference, routed_states
from fused_kd.integrations.weights import rows_of

# what packed batches say of their rows
_LIMITS = ("cu_seq_lens_q", "seq_idx")
_LENGTHS = (5, 4, 6)


def is_packed(inputs: dict[str, Any]) -> bool:
    """Whether a batch of a decoder-only model is in the form of ``DataCollatorWithFlattening``.

    That is ``position_ids`` without an ``attention_mask``, or row limits of FlashAttention or of a state-space model.
    """
    has_positions = inputs.get("position_ids") is not None and inputs.get("attention_mask") is None
    return has_positions or any(inputs.get(name) is not None for name in _LIMITS)


def check_mask(inputs: dict[str, Any]) -> None:
    """Raise ``ValueError`` for positions that begin anew within what a mask joins: no attention keeps such rows apart.

    Looks at tensors on the host alone.
    """
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    tensors = [each for each in (mask, positions) if isinstance(each, torch.Tensor) and each.device.type == "cpu"]
    if len(tensors) < 2 or tensors[0].dim() != 2 or tensors[1].shape != tensors[0].shape:
        return
    kept = tensors[0].bool()
    anew = (tensors[1][:, 1:] == 0) & (tensors[1][:, :-1] > 0) & kept[:, 1:] & kept[:, :-1]
    if anew.any():
        row, position = anew.nonzero()[0].tolist()
        raise ValueError(
            f"batch has an attention_mask and position_ids that begin anew at token {position + 1} of row {row}: with "
            "a mask the packed rows see each other; leave it out, as transformers' DataCollatorWithFlattening does"
        )


@torch.no_grad()
def check_packed(model: Any, inputs: dict[str, Any]) -> None:
    """Run short rows packed as ``inputs`` are, after another first row, and apart; raise ``ValueError`` if a row's
    hidden states differ.

    They do where attention, a convolution or a recurrent state goes on from one row to the next, or where positions
    count on. Compared relative to their norm. After another row of the same length a kernel does the same with them:
    1e-5 for fp32 models, 1e-3 in half precision; apart it may add up in another order: 1e-3 and 5e-2. ``model`` must be
    one that :func:`fused_kd.integrations.transformers.route_head_loss` has prepared; all ranks of a sharded one call
    this.
    """
    from transformers import DataCollatorWithFlattening

    base = without_adapters(getattr(model, "module", model))
    embeddings = base.get_input_embeddings().weight
    ids = torch.arange(1, sum(_LENGTHS) + _LENGTHS[0] + 1).remainder(rows_of(embeddings))
    *rows, another = [{"input_ids": part.tolist()} for part in ids.split([*_LENGTHS, _LENGTHS[0]])]
    flatten: Any = DataCollatorWithFlattening(
        return_position_ids="position_ids" in inputs,
        return_flash_attn_kwargs="cu_seq_lens_q" in inputs,
        return_seq_idx="seq_idx" in inputs,
    )

    def states(rows: list[dict[str, list[int]]]) -> torch.Tensor:
        moved = {
            name: value.to(embeddings.device) if isinstance(value, torch.Tensor) else value
            for name, value in flatten(rows).items()
            if name != "labels"
        }
        return routed_states(model, moved)[0]

    try:
        with eval_mode(model):
            packed = states(rows)
            after = states([another, *rows[1:]])
            apart = torch.cat([states([row]) for row in rows])
    except TypeError as error:
        raise ValueError(f"{type(base).__name__} does not take packed rows ({', '.join(inputs)}): {error}") from error
    exact = packed.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(packed.device.type)
    apart_from = relative_difference(packed, apart)
    after_another = relative_difference(packed[_LENGTHS[0] :], after[_LENGTHS[0] :])
    if not (apart_from <= (1e-3 if exact else 5e-2) and after_another <= (1e-5 if exact else 1e-3)):
        attention = getattr(base.config, "_attn_implementation", None)
        raise ValueError(
            f"{type(base).__name__} must keep packed rows apart, but a row's hidden states change by "
            f"{max(apart_from, after_another):.1%} with the rows before it in the batch: its attention "
            f"({attention!r}) or state does not begin anew with position_ids. Pad its rows instead (packing=False; "
            "fused_kd.training.Collator)"
        )
