"""Which of a teacher's vocabulary columns each column of a student is: two tokenizers, draft models, padded heads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .checks import check_columns
from .inputs import LMHead, TopK, check_float_tensor
from .token_bytes import read_vocabulary
from .token_matching import Matched, within

# rows and columns of logits that are held at a time
_TILE = 4096


@dataclass(frozen=True, eq=False, repr=False)
class VocabMap:
    """Student column j is teacher column ``columns[j]``: what ``LMHead(..., columns=m.columns)`` of a teacher takes.

    Made by :func:`vocab_map`, :meth:`of_columns`, :meth:`from_offsets` or :meth:`most_frequent`; its repr counts.

    Args:
        columns: (V_s,) int64, a teacher column below ``teacher_size``, none twice, or -1: the student's column is
            none of the teacher's.
        teacher_size: V_t, columns of the teacher's head.
        by_role: how many columns were matched by what they are for (end of text, ...), not by equal text.
        ambiguous: how many student columns stand for the same bytes as another one, or as several of the teacher's,
            and were not told apart by equal entries of the vocabularies.

    Raises:
        TypeError, ValueError: for columns or sizes that do not fit; the message names position and value. Columns on an
            accelerator are not looked at.
    """

    columns: Tensor
    teacher_size: int
    by_role: int = 0
    ambiguous: int = 0

    def __post_init__(self) -> None:
        _check_size("teacher_size", self.teacher_size)
        if not isinstance(self.columns, Tensor) or self.columns.dtype != torch.int64:
            kind = self.columns.dtype if isinstance(self.columns, Tensor) else type(self.columns).__name__
            raise TypeError(f"columns must be an int64 tensor, got {kind}")
        if self.columns.dim() != 1 or self.columns.numel() < 1:
            raise ValueError(f"columns must have shape (V_s,) with V_s >= 1, got {tuple(self.columns.shape)}")
        object.__setattr__(self, "columns", self.columns.detach().clone())  # what is known of it must stay true
        if self.columns.device.type == "cpu":
            check_columns("columns", self.columns, self.teacher_size)

    @classmethod
    def of_columns(cls, columns: Tensor | Sequence[int], teacher_size: int) -> VocabMap:
        """A map from its columns, a tensor or a sequence of integers."""
        made = torch.as_tensor(columns)
        if made.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"columns must be integers, int64 or int32, got {made.dtype}")
        return cls(made.to(torch.int64), teacher_size)

    @classmethod
    def from_offsets(cls, offsets: Tensor | Sequence[int], teacher_size: int) -> VocabMap:
        """A map from EAGLE-3's ``d2t``, (V_s,) integers: student column j is teacher column ``j + d2t[j]``.

        The other way, ``d2t = m.columns - torch.arange(len(m.columns))``, and its ``t2d`` is ``m.mapped``.
        """
        made = torch.as_tensor(offsets)
        if made.dim() != 1:
            raise ValueError(f"offsets must have shape (V_s,), got {tuple(made.shape)}")
        return cls.of_columns(made + torch.arange(len(made), device=made.device), teacher_size)

    @classmethod
    def most_frequent(
        cls,
        ids: Tensor | Iterable[Tensor | Sequence[int]],
        size: int,
        teacher_size: int,
        always: Iterable[int] = (),
    ) -> VocabMap:
        """The reduced vocabulary of a draft model: the teacher's most frequent tokens, in the order of their ids.

        Args:
            ids: teacher ids of a text that is like what will be generated: one tensor of any shape, or many tensors or
                lists; negative ids (labels that are ignored) do not count.
            size: V_s, tokens to keep. Of equally frequent ones, also of those that never occur, the lower ids.
            teacher_size: V_t.
            always: ids that are kept however rare, as ``tokenizer.all_special_ids``.
        """
        _check_size("teacher_size", teacher_size)
        _check_size("size", size, teacher_size)
        counts = torch.zeros(teacher_size, dtype=torch.int64)
        for part in [ids] if isinstance(ids, Tensor) else ids:
            flat = _known_ids("ids", torch.as_tensor(part, device="cpu").reshape(-1), teacher_size)
            counts += torch.bincount(flat[flat >= 0], minlength=teacher_size)
        kept = torch.tensor(sorted({int(index) for index in always}), dtype=torch.int64)
        if len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < teacher_size:
            wrong = int(kept[0 if kept[0] < 0 else -1])
            raise ValueError(f"always must be ids in [0, {teacher_size - 1}], got {wrong}")
        if len(kept) > size:
            raise ValueError(f"size must be at least {len(kept)}, the ids of always, got {size}")
        counts[kept] = torch.iinfo(torch.int64).max
        return cls(counts.argsort(descending=True, stable=True)[:size].sort().values, teacher_size)

    @cached_property
    def student_columns(self) -> Tensor:
        """(V_t,) int64: which student column each teacher column is, -1: none."""
        spare = torch.full((self.teacher_size + 1,), -1, dtype=torch.int64, device=self.columns.device)
        places = torch.arange(len(self.columns), device=self.columns.device)
        spare[self.columns] = places  # what has none, -1, goes into the one more
        return spare[:-1]

    @property
    def mapped(self) -> Tensor:
        """(V_t,) bool: whether a teacher column is one of the student's."""
        return self.student_columns >= 0

    def to(self, device: torch.device | str) -> VocabMap:
        """The map on another device, where :meth:`labels` then needs no transfer."""
        return VocabMap(self.columns.to(device), self.teacher_size, self.by_role, self.ambiguous)

    def labels(self, ids: Tensor, missing: int = -100) -> Tensor:
        """Teacher ids as labels of the student.

        Args:
            ids: (...) int64 or int32 teacher ids; negative ones (ignored already) count as missing.
            missing: what stands for ids without a student column; the default is what losses ignore.

        Returns:
            (...) int64 student columns, on the device of ``ids``.

        Raises:
            ValueError: an id beyond the teacher's columns; on accelerators it is missing.
        """
        return _looked_up("ids", ids, self.student_columns, missing)

    def lists(self, top_k: TopK) -> TopK:
        """A teacher's lists as lists of the student's columns, for a draft from a cache or a server.

        Entries without a column are left out: with "bucket" and "uniform" their mass is the rest's.
        """
        indices = self.labels(top_k.indices, missing=-1)
        lost = (indices < 0) & (top_k.log_probs > -math.inf)
        log_probs = top_k.log_probs.masked_fill(indices < 0, -math.inf)
        rest = top_k.log_rest
        if rest is not None:
            gone = top_k.log_probs.float().masked_fill(~lost, -math.inf)
            rest = torch.cat([rest.float().unsqueeze(-1), gone], -1).logsumexp(-1)
        return replace(top_k, log_probs=log_probs, indices=indices.clamp(min=0), log_rest=rest)

    def teacher_ids(self, ids: Tensor, missing: int | None = None) -> Tensor:
        """Student ids as those of the teacher, token by token: not what the teacher's tokenizer makes of the text.

        Args:
            ids: (...) int64 or int32 student ids; negative ones count as missing.
            missing: what stands for ids without a teacher column; None (default): there may be none, which is
                looked at on the host.

        Returns:
            (...) int64 teacher ids, on the device of ``ids``.

        Raises:
            ValueError: an id beyond the student's columns (on accelerators: missing), or without a teacher column.
        """
        found = _looked_up("ids", ids, self.columns, -1 if missing is None else missing)
        if missing is None and bool((found < 0).any()):
            raise ValueError(f"ids must have a teacher column, student id {ids[found < 0][0].item()} has none")
        return found

    def coverage(self, ids: Tensor | Sequence[int]) -> float:
        """Share of a text's tokens, teacher ids (...), that are mapped; negative ids do not count.

        Raises:
            ValueError: an id beyond the teacher's columns, or no id at all.
        """
        flat = _known_ids("ids", torch.as_tensor(ids, device="cpu").reshape(-1), self.teacher_size)
        flat = flat[flat >= 0]
        if not len(flat):
            raise ValueError("ids must hold at least one id that is not negative, got none")
        return float(self.mapped.cpu()[flat].double().mean())

    @torch.no_grad()
    def mass(self, head: LMHead | Tensor) -> Tensor:
        """The share of a teacher's probability that is on the mapped columns, exact.

        Args:
            head: the teacher's head over all its V_t columns, or its logits (..., V_t).

        Returns:
            (...) float32 in [0, 1]; 1 minus it is what ``tail`` of the head says what to do with. Logits are made
            4096 columns of 4096 tokens at a time.

        Raises:
            TypeError, ValueError: neither of the two, or of another number of columns.
        """
        vocab = head.vocab if isinstance(head, LMHead) else _width(head)
        if vocab != self.teacher_size:
            raise ValueError(f"head must have the teacher's {self.teacher_size} columns, got {vocab}")
        rows = head.hidden if isinstance(head, LMHead) else head
        mapped = self.mapped.to(rows.device)
        with torch.autocast(rows.device.type, enabled=False):
            shares = [_share(head, part, mapped) for part in rows.reshape(-1, rows.shape[-1]).split(_TILE)]
        return torch.cat(shares).reshape(rows.shape[:-1])

    def __repr__(self) -> str:
        count = int((self.columns >= 0).sum())
        told = f"{count:,} of {len(self.columns):,} student columns, {count:,} of {self.teacher_size:,} teacher columns"
        told += f", {self.by_role:,} by role" if self.by_role else ""
        return f"VocabMap({told}{f', {self.ambiguous:,} ambiguous' if self.ambiguous else ''})"


def vocab_map(
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    student_size: int | None = None,
    teacher_size: int | None = None,
) -> VocabMap:
    """Which teacher column each student column is, by the bytes of text that their tokens stand for.

    Byte-level BPE, SentencePiece ("▁", ``<0x0A>``) and WordPiece ("##") are told apart by how the tokenizer decodes, so
    that "Ġthe", "▁the" and WordPiece's "the" are one token; of others the entries themselves are compared. WordPiece
    tokens that begin a word have a space before them, but for punctuation and Chinese characters. Special tokens are
    matched by equal entries, and what is left by role: the end of text of one is that of the other, and so on for
    ``bos``, ``unk``, ``pad``, ``sep``, ``cls`` and ``mask``. Where several tokens stand for the same bytes, equal
    entries go together; without any, one pair is made: tokens of text before byte-fallback tokens, then the lower ids.
    Tokenizers of one family, with padded heads or added tokens, give the identity and -1 for what only the student has.

    Equal bytes are not equal meaning: a teacher that has " the" and " there" puts less on " the" than one that has
    only " the". Lower-cased and normalised vocabularies match where their texts are equal. ``VocabMap.mass`` and
    ``VocabMap.coverage`` say how much of the teacher is left.

    Args:
        student_tokenizer, teacher_tokenizer: of transformers (or a processor that holds one), of tokenizers, or any
            object with ``get_vocab()``.
        student_size, teacher_size: columns of the heads, which may be padded, or smaller than the tokenizer: tokens
            beyond are left out. None (default): all ids of the tokenizer.

    Raises:
        TypeError: no ``get_vocab()``, a size that is no integer.
        ValueError: a size below 1.
    """
    ours = read_vocabulary("student_tokenizer", student_tokenizer)
    theirs = read_vocabulary("teacher_tokenizer", teacher_tokenizer)
    sizes = []
    for name, given, known in (("student", student_size, ours), ("teacher", teacher_size, theirs)):
        sizes.append(known.size if given is None else given)
        _check_size(f"{name}_size", sizes[-1])
    ours, theirs = (within(known, size) for known, size in zip((ours, theirs), sizes, strict=True))
    matched = Matched(ours, theirs)
    columns = torch.full((sizes[0],), -1, dtype=torch.int64)
    if matched.pairs:
        columns[list(matched.pairs)] = torch.tensor(list(matched.pairs.values()))
    return VocabMap(columns, sizes[1], matched.by_role, matched.ambiguous)


def _check_size(name: str, value: Any, most: int | None = None) -> None:
    allowed = "at least 1" if most is None else f"in [1, {most}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer {allowed}, got {value!r}")
    if value < 1 or (most is not None and value > most):
        raise ValueError(f"{name} must be {allowed}, got {value}")


def _known_ids(name: str, ids: Tensor, size: int) -> Tensor:
    if ids.numel() == 0:
        return ids.to(torch.int64)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {ids.dtype}")
    if int(ids.max()) >= size:
        raise ValueError(f"{name} must be below {size}, got {int(ids.max())}")
    return ids.to(torch.int64)


def _looked_up(name: str, ids: Tensor, table: Tensor, missing: int) -> Tensor:
    """``table[ids]``, and ``missing`` where ids or what is found are negative."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be an int64 or int32 tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {ids.dtype}")
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        _known_ids(name, ids, len(table))
    found = table.to(ids.device)[ids.to(torch.int64).clamp(0, len(table) - 1)]
    return torch.where((ids < 0) | (ids >= len(table)) | (found < 0), missing, found)


def _width(logits: object) -> int:
    check_float_tensor("head", logits)
    assert isinstance(logits, Tensor)
    if logits.dim() < 1:
        raise ValueError("head must be an LMHead or logits of shape (..., V_t), got a tensor without dimensions")
    return logits.shape[-1]


def _share(head: LMHead | Tensor, rows: Tensor, mapped: Tensor) -> Tensor:
    """(N,) of some tokens' hidden states or logits."""
    # with the largest logit so far, in place of a logarithm, whose rounding a share would show
    top = torch.full((len(rows), 1), torch.finfo(torch.float32).min, device=rows.device)
    total = listed = torch.zeros_like(top)
    for start in range(0, len(mapped), _TILE):
        stop = start + _TILE
        z = _logits(head, rows, start, stop)
        higher = torch.maximum(top, z.amax(-1, keepdim=True))
        shrink, e = (top - higher).exp(), (z - higher).exp()
        total = total * shrink + e.sum(-1, keepdim=True)
        listed = listed * shrink + (e * mapped[start:stop]).sum(-1, keepdim=True)
        top = higher
    return (listed / total).squeeze(-1).clamp(max=1.0)


def _logits(head: LMHead | Tensor, rows: Tensor, start: int, stop: int) -> Tensor:
    """Columns of the logits in float32."""
    if isinstance(head, Tensor):
        return rows[:, start:stop].float()
    z = rows.float() @ head.weight[start:stop].float().T
    if head.bias is not None:
        z = z + head.bias[start:stop].float()
    z = z * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
