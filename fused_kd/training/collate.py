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

from fused_kd.integrations.forms import TEACHER_ID, is_per_target
from fused_kd.integrations.labels import LABEL_PAD, without_first_targets
from fused_kd.training.contexts import teacher_batch

_LISTS = ("_log_probs", "_indices")


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
        ``input_ids``, ``attention_mask``, ``labels``: int64 tensors (rows, length). Of rows with what a cached teacher
        has for each label that carries loss and has a token before it (:meth:`TeacherCache.rows`), the same over
        (rows, length): position i has the distribution of the token at i + 1, as the loss takes it with ``shift=True``.

        - lists, ``teacher_log_probs`` and ``teacher_indices`` (n, K), float32 and int64; a position without loss has
          the ids 0 to K - 1, all alike. ``teacher_log_rest`` (n,) float32; there 0.
        - hidden states, ``teacher_hidden`` (n, R), in their dtype; there 0.

        Another cache's begin with its name in place of "teacher". Rows with ``teacher_id``, an int that says which
        teacher is theirs, give ``teacher_id`` (rows,) int64; such rows may lack what other teachers have. Rows with
        ``teacher_input_ids`` and ``teacher_labels`` (:func:`fused_kd.training.contexts.with_context`), for a teacher
        with another prompt, give these and ``teacher_attention_mask``.

    Raises:
        TypeError: a row that is no dict.
        ValueError: an unknown side, a negative pad id, an empty batch, a row without ``input_ids`` and as many
            ``labels``; a teacher's column in some rows only, of several widths, with more or fewer entries than labels.
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
        targets = batch["labels"][:, 1:] != LABEL_PAD
        for name in _teacher_columns(rows):
            batch[name] = _spread(name, [row.get(name) for row in rows], targets)
        if any(TEACHER_ID in row for row in rows):
            _check_everywhere(TEACHER_ID, rows)
            batch[TEACHER_ID] = torch.tensor([int(row[TEACHER_ID]) for row in rows], dtype=torch.int64)
        return batch | teacher_batch(rows, self)

    def _padded(self, rows: Sequence[Any], fill: int) -> Tensor:
        """(rows, length) int64."""
        sequences = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
        batch = pad_sequence(sequences, batch_first=True, padding_value=fill, padding_side=self.side)
        more = -batch.shape[1] % (self.pad_to_multiple_of or 1)
        return pad(batch, (0, more) if self.side == "right" else (more, 0), value=fill)


def _teacher_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of what cached teachers have in these rows; in all of them, unless each says who its teacher is."""
    found = dict.fromkeys(name for row in rows for name in row if is_per_target(name))
    for name in list(found):
        if name.endswith(_LISTS):
            prefix = name.removesuffix(_LISTS[0]).removesuffix(_LISTS[1])
            found |= dict.fromkeys(prefix + kind for kind in _LISTS)
    for name in found if not any(TEACHER_ID in row for row in rows) else ():
        _check_everywhere(name, rows)
    return list(found)


def _check_everywhere(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    lacking = [number for number, row in enumerate(rows) if name not in row]
    if lacking:
        raise ValueError(f"{name} must be in every row of a batch or in none, rows[{lacking[0]}] lacks it")


def _spread(name: str, parts: Sequence[Tensor | None], targets: Tensor) -> Tensor:
    """(rows, length, ...): what the rows have, one entry a target (rows, length - 1); nothing of a row with None."""
    for number, (part, count) in enumerate(zip(parts, targets.sum(1).tolist(), strict=True)):
        if part is not None and len(part) != count:
            raise ValueError(f"{name} of rows[{number}] has {len(part)} entries for {count} labels with loss")
    own = [torch.as_tensor(part) for part in parts if part is not None]
    widths = {part.shape[1:] for part in own}
    if len(widths) > 1:
        raise ValueError(f"{name} must have one width in a batch, got {sorted(map(tuple, widths))}")
    targets = targets & torch.tensor([part is not None for part in parts])[:, None]
    found, (rows, before) = torch.cat(own), targets.shape
    if name.endswith(_LISTS[0]):
        found = found.float()
        whole = torch.full((rows, before + 1, *found.shape[1:]), -math.log(found.shape[1]), dtype=found.dtype)
    elif name.endswith(_LISTS[1]):
        found = found.long()
        whole = torch.arange(found.shape[1]).repeat(rows, before + 1, 1)
    else:
        whole = found.new_zeros((rows, before + 1, *found.shape[1:]))
    whole[:, :-1][targets] = found
    return whole


class PackingCollator(DataCollatorWithFlattening):
    """transformers' ``DataCollatorWithFlattening``, with what cached teachers have.

    Returns ``input_ids``, ``labels`` and ``position_ids`` (1, tokens of all rows), and the columns of :class:`Collator`
    for cached teachers (1, tokens, ...); ``teacher_id`` (1, tokens) repeats each row's. Positions start anew in each
    row; from them and from the missing attention mask transformers' attention (SDPA, eager, FlashAttention) keeps the
    rows apart; a trainer of this library tries both models with the first batch and refuses one that does not (Falcon,
    Bloom, Mamba, ...). The first label of a row is -100, as nothing predicts it. ``return_flash_attn_kwargs=True`` adds
    FlashAttention's row limits. Rows with ``teacher_input_ids`` and ``teacher_labels`` are laid end to end too, with
    ``teacher_position_ids``.
    """

    def __call__(self, features: Any, return_tensors: Any = None, separator_id: Any = None) -> dict[str, Any]:
        check_rows(features, ("input_ids",))
        columns = _teacher_columns(features)
        ids = TEACHER_ID in {name for row in features for name in row}
        if ids:
            _check_everywhere(TEACHER_ID, features)
        own = {*columns, TEACHER_ID}
        plain = [{name: value for name, value in row.items() if name not in own} for row in features]
        batch: dict[str, Any] = super().__call__(plain, return_tensors, separator_id)  # type: ignore[no-untyped-call]
        if columns:
            kept = ("input_ids", "labels", *own)
            padded = Collator(0)([{name: row[name] for name in kept if name in row} for row in features])
            for name in columns:
                rows = zip(padded[name], features, strict=True)
                batch[name] = torch.cat([part[: len(row["input_ids"])] for part, row in rows])[None]
        if ids:
            each = torch.tensor([int(row[TEACHER_ID]) for row in features], dtype=torch.int64)
            lengths = torch.tensor([len(row["input_ids"]) for row in features])
            batch[TEACHER_ID] = each.repeat_interleave(lengths)[None]
        return batch | teacher_batch(features, self)
