"""Rows to batches: padded to one length, or laid end to end without padding, each blind to the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithFlattening

from fused_kd.integrations.distributed import TEACHER_COLUMNS
from fused_kd.integrations.labels import LABEL_PAD, without_first_targets
from fused_kd.training.contexts import teacher_batch


def padding_id(tokenizer: Any) -> int:
    """The token that fills batches: the padding token, else EOS, else 0. It is masked and has no loss: any will do."""
    ids = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return int(next((token for token in ids if token is not None), 0))


def check_rows(rows: Sequence[Any], needed: Sequence[str] = ("input_ids", "labels")) -> None:
    """Raise unless each row is a dict of what is ``needed``, with as many ``labels`` as ``input_ids``."""
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"rows[{number}] must be a dict of input_ids and labels, got {type(row).__name__}")
        if any(name not in row for name in needed):
            raise ValueError(f"rows[{number}] must have {' and '.join(needed)}, got {', '.join(row) or 'nothing'}")
        if "labels" in row and len(row["labels"]) != len(row["input_ids"]):
            raise ValueError(
                f"rows[{number}] must have as many labels as input_ids, got {len(row['labels'])} and "
                f"{len(row['input_ids'])}: a label for each token, -100 where there is no loss"
            )


@dataclass(frozen=True)
class Collator:
    """Pads rows to one length.

    Args:
        pad_token_id: fills ``input_ids``.
        pad_to_multiple_of: round the length up to a multiple; None (default) pads to the longest row.
        side: where the padding goes, ``"right"`` (default) or ``"left"``; there a row's first label becomes
            -100, as the padding before it predicts nothing.

    Returns on call:
        ``input_ids``, ``attention_mask``, ``labels``: int64 tensors (rows, length). Of rows with a cached teacher's
        lists (``teacher_log_probs`` and ``teacher_indices`` (n, K), one list a label that has a token before it and
        carries loss) also ``teacher_log_probs`` float32 and ``teacher_indices`` int64 (rows, length, K): position i has
        the distribution of the token at i + 1, as the loss takes it with ``shift=True``; a position without loss the
        ids 0 to K - 1, all alike. Of rows with ``teacher_input_ids`` and ``teacher_labels`` (:func:`with_context`), for
        a teacher with another prompt, also ``teacher_input_ids``, ``teacher_attention_mask`` and ``teacher_labels``.

    Raises:
        TypeError: a row that is no dict.
        ValueError: an unknown side, a negative pad id, an empty batch, a row without ``input_ids`` and as many
            ``labels``, lists in some rows only or of several K, more or fewer of them than labels.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    side: Literal["right", "left"] = "right"

    def __post_init__(self) -> None:
        if self.side not in ("right", "left"):
            raise ValueError(f"side={self.side!r}: expected 'right' or 'left'")
        if self.pad_token_id is None or self.pad_token_id < 0:
            raise ValueError(f"pad_token_id={self.pad_token_id}: expected at least 0")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of={self.pad_to_multiple_of}: expected at least 1, or None")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        if not rows:
            raise ValueError("the batch is empty: expected at least one row")
        check_rows(rows)
        batch = {
            "input_ids": self._padded([row["input_ids"] for row in rows], self.pad_token_id),
            "attention_mask": self._padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": self._padded([row["labels"] for row in rows], LABEL_PAD),
        }
        if self.side == "left" and batch["labels"].shape[1]:
            batch = without_first_targets(batch)
        if any("teacher_log_probs" in row for row in rows):
            batch |= self._teacher_lists(rows, batch["labels"][:, 1:] != LABEL_PAD)
        return batch | teacher_batch(rows, self)

    def _padded(self, rows: Sequence[Any], fill: int) -> Tensor:
        """(rows, length) int64."""
        sequences = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
        batch = pad_sequence(sequences, batch_first=True, padding_value=fill, padding_side=self.side)
        more = -batch.shape[1] % (self.pad_to_multiple_of or 1)
        return pad(batch, (0, more) if self.side == "right" else (more, 0), value=fill)

    def _teacher_lists(self, rows: Sequence[dict[str, Any]], targets: Tensor) -> dict[str, Tensor]:
        """Of the rows' lists, one a target (rows, length - 1)."""
        if not all(name in row for row in rows for name in TEACHER_COLUMNS):
            raise ValueError("teacher_log_probs and teacher_indices must be in every row of a batch or in none")
        widths = {row[name].shape[-1] for row in rows for name in TEACHER_COLUMNS}
        if len(widths) > 1:
            raise ValueError(f"teacher_log_probs must have one K in a batch, got {sorted(widths)}")
        for row, count in zip(rows, targets.sum(1).tolist(), strict=True):
            lists, ids = (len(row[name]) for name in TEACHER_COLUMNS)
            if not lists == ids == count:
                raise ValueError(
                    f"teacher_log_probs has {lists} lists and teacher_indices {ids} for {count} labels with loss"
                )
        K, (count, before) = widths.pop(), targets.shape
        log_probs = torch.full((count, before + 1, K), -math.log(K), dtype=torch.float32)
        indices = torch.arange(K).repeat(count, before + 1, 1)
        log_probs[:, :-1][targets] = torch.cat([row["teacher_log_probs"] for row in rows]).float()
        indices[:, :-1][targets] = torch.cat([row["teacher_indices"] for row in rows]).long()
        return {"teacher_log_probs": log_probs, "teacher_indices": indices}


class PackingCollator(DataCollatorWithFlattening):
    """transformers' ``DataCollatorWithFlattening``, with the lists of a cached teacher.

    Returns ``input_ids``, ``labels`` and ``position_ids`` (1, tokens of all rows), and ``teacher_log_probs`` and
    ``teacher_indices`` (1, tokens, K) for rows that have them. Positions start anew in each row; from them and from
    the missing attention mask transformers' attention (SDPA, eager, FlashAttention) keeps the rows apart; a trainer of
    this library tries both models with the first batch and refuses one that does not (Falcon, Bloom, Mamba, ...). The
    first label of a row is -100, as nothing predicts it. ``return_flash_attn_kwargs=True`` adds FlashAttention's row
    limits. Rows with ``teacher_input_ids`` and ``teacher_labels`` are laid end to end too, with
    ``teacher_position_ids``.
    """

    def __call__(self, features: Any, return_tensors: Any = None, separator_id: Any = None) -> dict[str, Any]:
        check_rows(features, ("input_ids",))
        batch: dict[str, Any] = super().__call__(features, return_tensors, separator_id)  # type: ignore[no-untyped-call]
        if "teacher_log_probs" in features[0]:
            apart = [Collator(0)([row]) for row in features]
            for name in TEACHER_COLUMNS:
                batch[name] = torch.cat([row[name] for row in apart], dim=1)
        return batch | teacher_batch(features, self)
