"""The names under which rows and batches carry what is for teachers; all of them begin with "teacher"."""

from __future__ import annotations

import re
from collections.abc import Iterable

TEACHER_ID = "teacher_id"
LISTS = ("log_probs", "indices")
LOG_REST, HIDDEN = "log_rest", "hidden"
_PER_TARGET = re.compile(rf"teacher(_\w+)?_({'|'.join((*LISTS, LOG_REST, HIDDEN))})")

PROMPT = "teacher_"
OTHER_IDS, OTHER_LABELS = f"{PROMPT}input_ids", f"{PROMPT}labels"
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# of a teacher's own prompt: to the names under which a model reads them
OTHER_PROMPT = {f"{PROMPT}{name}": name for name in ("input_ids", "attention_mask", "position_ids", *_PACKED)}


def columns_of(kinds: Iterable[str], name: str | None = None) -> tuple[str, ...]:
    """The columns of a teacher without a name, ``teacher_hidden``, or with one, ``teacher_math_hidden``."""
    prefix = "teacher" if name is None else f"teacher_{name}"
    return tuple(f"{prefix}_{kind}" for kind in kinds)


def is_per_target(name: str) -> bool:
    """Whether this is a teacher's column of rows, with an entry for each label that carries loss."""
    return _PER_TARGET.fullmatch(name) is not None


# What rows and batches may carry for teachers, beside the columns of those with a name.
BATCH_COLUMNS = (*columns_of((*LISTS, LOG_REST, HIDDEN)), TEACHER_ID, *OTHER_PROMPT, OTHER_LABELS)
