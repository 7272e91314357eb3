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

from fused_kd.integrations.labels import LABEL_PAD, without_first_targets
from fused_kd.integrations.teacher_columns import LISTS, TEACHER_ID, is_per_target
from fused_kd.training.contexts import teacher_batch
from fused_kd.training.packs import unpacked

_LOG_PROBS, _INDICES = (f"_{kind}" for kind in LISTS)


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

        Those of a cache with a name begin with it, as ``teacher_math_hidden``; a column that does not begin with
        "teacher" is no teacher's and is left out, as other columns are. Rows with ``teacher_id``, an int that says
        which teacher is theirs, give ``teacher_id`` (rows,) int64; such rows may lack what other teachers have. Rows
        with ``teacher_input_ids`` and ``teacher_labels`` (:func:`fused_kd.training.contexts.with_context`), for a
        teacher with another prompt, give these and ``teacher_attention_mask``.

    Raises:
        TypeError: a row that is no dict.
        ValueError: an unknown side, a negative pad id, an empty batch, a row without ``input_ids`` and as many
            ``labels``; a teacher's column of several widths, with more or fewer entries than labels, or in some rows
            only, with ``teacher_id`` in some rows of one teacher only.
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
        ids, columns = _teacher_ids(rows), _teacher_columns(rows)
        targets = batch["labels"][:, 1:] != LABEL_PAD
        for name in columns:
            values = _entries(name, rows, targets.sum(1))
            has = torch.tensor([name in row for row in rows])
            batch[name] = _spread(name, values, targets & has[:, None])
        if ids is not None:
            batch[TEACHER_ID] = ids
        return batch | teacher_batch(rows, self)

    def _padded(self, rows: Sequence[Any], fill: int) -> Tensor:
        """(rows, length) int64."""
        sequences = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
        batch = pad_sequence(sequences, batch_first=True, padding_value=fill, padding_side=self.side)
        more = -batch.shape[1] % (self.pad_to_multiple_of or 1)
        return pad(batch, (0, more) if self.side == "right" else (more, 0), value=fill)


def _teacher_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of what cached teachers have in these rows: in all of them, or where each row says who its teacher is,
    in all rows of a teacher."""
    found = dict.fromkeys(kin for row in rows for name in row if is_per_target(name) for kin in _together(name))
    for name in found:
        _check_everywhere(name, rows)
    return list(found)


def _together(name: str) -> tuple[str, ...]:
    """The columns of which a row has all or none."""
    prefix = name.removesuffix(_LOG_PROBS).removesuffix(_INDICES)
    return (name,) if prefix == name else (prefix + _LOG_PROBS, prefix + _INDICES)


def _teacher_ids(rows: Sequence[Mapping[str, Any]]) -> Tensor | None:
    """(rows,) int64, or None where no row says who its teacher is."""
    if not any(TEACHER_ID in row for row in rows):
        return None
    _check_everywhere(TEACHER_ID, rows, by_teacher=False)
    for number, row in enumerate(rows):
        if isinstance(row[TEACHER_ID], bool) or not hasattr(row[TEACHER_ID], "__index__"):
            raise TypeError(f"{TEACHER_ID} of rows[{number}] must be an integer, got {row[TEACHER_ID]!r}")
    return torch.tensor([int(row[TEACHER_ID]) for row in rows], dtype=torch.int64)


def _check_everywhere(name: str, rows: Sequence[Mapping[str, Any]], by_teacher: bool = True) -> None:
    """Raise ``ValueError`` for a column in some rows only; ``by_teacher``: of those with the same ``teacher_id``."""
    by_teacher = by_teacher and any(TEACHER_ID in row for row in rows)
    whose = [int(row.get(TEACHER_ID, -1)) if by_teacher else 0 for row in rows]
    having = {each for each, row in zip(whose, rows, strict=True) if not row.keys().isdisjoint(_together(name))}
    for number, (each, row) in enumerate(zip(whose, rows, strict=True)):
        if each in having and name not in row:
            of = f" with {TEACHER_ID} {each}" if by_teacher else ""
            raise ValueError(f"{name} must be in every row{of} of a batch or in none, rows[{number}] lacks it")


def _entries(name: str, rows: Sequence[Mapping[str, Any]], counts: Tensor) -> Tensor:
    """(n, ...): what the rows have under a name, one after the other; each must have ``counts`` (rows,) entries."""
    parts = []
    for number, (row, count) in enumerate(zip(rows, counts.tolist(), strict=True)):
        if name not in row:
            continue
        if len(row[name]) != count:
            raise ValueError(f"{name} of rows[{number}] has {len(row[name])} entries for {count} labels with loss")
        parts.append(torch.as_tensor(row[name]))
    widths = {part.shape[1:] for part in parts}
    if len(widths) > 1:
        raise ValueError(f"{name} must have one width in a batch, got {sorted(map(tuple, widths))}")
    return torch.cat(parts)


def _spread(name: str, values: Tensor, targets: Tensor) -> Tensor:
    """(rows, length, ...): the values, in order, where ``targets`` (rows, length - 1) are; elsewhere no teacher's."""
    rows, before = targets.shape
    if name.endswith(_LOG_PROBS):
        values = values.float()
        whole = torch.full((rows, before + 1, *values.shape[1:]), -math.log(values.shape[1]), dtype=values.dtype)
    elif name.endswith(_INDICES):
        values = values.long()
        whole = torch.arange(values.shape[1]).repeat(rows, before + 1, 1)
    else:
        whole = values.new_zeros((rows, before + 1, *values.shape[1:]))
    whole[:, :-1][targets] = values
    return whole


class PackingCollator(DataCollatorWithFlattening):
    """transformers' ``DataCollatorWithFlattening``, with what cached teachers have.

    Returns ``input_ids``, ``labels`` and ``position_ids`` (1, tokens of all rows), and the columns of :class:`Collator`
    for cached teachers (1, tokens, ...); ``teacher_id`` (1, tokens) repeats each row's. Positions start anew in each
    row; from them and from the missing attention mask transformers' attention (SDPA, eager, FlashAttention) keeps the
    rows apart; a trainer of this library tries both models with the first batch and refuses one that does not (Falcon,
    Bloom, Mamba, ...). The first label of a row is -100, as nothing predicts it. ``return_flash_attn_kwargs=True`` adds
    FlashAttention's row limits. Rows with ``teacher_input_ids`` and ``teacher_labels`` are laid end to end too, with
    ``teacher_position_ids``. A pack (:func:`fused_kd.training.packs.pack_rows`) stands for its rows.
    """

    def __call__(self, features: Any, return_tensors: Any = None, separator_id: Any = None) -> dict[str, Any]:
        features = unpacked(features)
        check_rows(features, ("input_ids",))
        ids, columns = _teacher_ids(features), _teacher_columns(features)
        if columns:
            check_rows(features)
        own = {*columns, TEACHER_ID}
        plain = [{name: value for name, value in row.items() if name not in own} for row in features]
        batch: dict[str, Any] = super().__call__(plain, return_tensors, separator_id)  # type: ignore[no-untyped-call]
        lengths = torch.tensor([len(row["input_ids"]) for row in features])
        if columns:
            row = torch.arange(len(features)).repeat_interleave(lengths)
            carries = torch.as_tensor(batch["labels"])[0, 1:] != LABEL_PAD
            carries &= row[1:] == row[:-1]  # nothing predicts a row's first token, whatever label separates rows
            counts = torch.bincount(row[1:][carries], minlength=len(features))
            for name in columns:
                has = torch.tensor([name in each for each in features])[row[1:]]
                batch[name] = _spread(name, _entries(name, features, counts), (carries & has)[None])
        if ids is not None:
            batch[TEACHER_ID] = ids.repeat_interleave(lengths)[None]
        return batch | teacher_batch(features, self)
