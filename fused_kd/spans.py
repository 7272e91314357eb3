"""Spans of equal text of two tokenizers' tokens: what of two models over different vocabularies can be compared.

Both models read the same text in different tokens. Wherever both have a boundary, they have read the same characters,
and what each says next is about the same text. :func:`aligned_spans` finds these places.

What they are good for:

- The distributions at :meth:`Spans.positions` are conditional on the same text. Over the shared part of two
  vocabularies (:func:`fused_kd.vocab_map`) they can be compared as those of one vocabulary. They are still
  distributions of the first *token*, not of the first characters: of two models with the same belief about the text,
  the one whose vocabulary has " there" puts less on " the" than the one that has to write " the" and "re". The
  difference is part of the loss and of its gradient; it is small where both write most words as one token.
- A span that is one token on both sides (:attr:`Spans.single`) has one label on both sides.
- The sum of a span's log-probabilities is the probability of the span's text as these tokens, on each side: what
  losses of whole spans compare. The models may know other ways to write that text, which such a sum leaves out.

What they cannot do: say anything of a position in the middle of a span, of text that only one side has, or of texts
that are alike but not equal. Both token lists must come from one string: render a chat template once and tokenize that
text with both tokenizers, or align each message by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Offsets = Tensor | Sequence[Sequence[int]]


class Spans(NamedTuple):
    """``student`` and ``teacher``, (n, 2) int64 each: [start, end) positions of tokens that cover equal text.

    Spans are in the order of the text, and the finest: none can be cut into two.
    """

    student: Tensor
    teacher: Tensor

    @property
    def single(self) -> Tensor:
        """(n,) bool: whether a span is one token on both sides."""
        return (self.student.diff().squeeze(-1) == 1) & (self.teacher.diff().squeeze(-1) == 1)

    def positions(self) -> Tensor:
        """(m, 2) int64: student and teacher positions whose next-token distributions are conditional on the same text.

        They are the positions before the starts of spans; row i belongs to the i-th span that has one on both sides (a
        text's first token has none without a BOS). ``hidden_states[positions[:, 0]]`` predicts the first token of the
        student's span, ``positions[:, 1]`` that of the teacher's.
        """
        before = torch.stack([self.student[:, 0], self.teacher[:, 0]], 1) - 1
        return before[self.predicted]

    @property
    def predicted(self) -> Tensor:
        """(n,) bool: whether a span has a position before it on both sides, a row of :meth:`positions`."""
        return (self.student[:, 0] > 0) & (self.teacher[:, 0] > 0)


def aligned_spans(student_offsets: Offsets, teacher_offsets: Offsets) -> Spans:
    """The finest groups of tokens of two tokenizers that cover exactly equal text.

    Characters that a side has no token for, as the spaces that WordPiece drops, belong to the token after them; so does
    a token of spaces that RoBERTa's offsets trim to nothing, (5, 5). Tokens that share characters (bytes of one emoji,
    a prefix "▁" beside the first letter) stay in one group. Special tokens (BOS, EOS, padding: (0, 0)) are in no span,
    unless they stand in the middle of one. What only one side has, as where the other is truncated, is in no span;
    texts without a common boundary give none. A side whose beginning was cut off has seen less text: its positions are
    conditional on that.

    Args:
        student_offsets, teacher_offsets: (L, 2) each, [start, end) characters of each token in the one string that both
            were made from: ``offset_mapping`` of fast tokenizers. Tensors on the CPU or sequences of pairs of integers.

    Returns:
        :class:`Spans`, on the CPU.

    Raises:
        TypeError: offsets that are not integers.
        ValueError: another shape, a token that ends before it starts, or that starts before an earlier one: two
            texts in one list.
    """
    ours = _boundaries("student_offsets", student_offsets)
    theirs = _boundaries("teacher_offsets", teacher_offsets)
    common = [character for character in ours if character in theirs]
    made = [
        torch.tensor(
            [(side[first][1], side[last][0]) for first, last in pairwise(common)],
            dtype=torch.int64,
        ).reshape(-1, 2)
        for side in (ours, theirs)
    ]
    return Spans(*made)


def _boundaries(name: str, offsets: Offsets) -> dict[int, tuple[int, int]]:
    """Characters at which no token is cut, in order: the end of the tokens before and the start of those after."""
    found: dict[int, tuple[int, int]] = {}
    reached, latest, previous = -1, -1, 0  # characters; the end of the tokens so far
    spaces = -1  # a token of trimmed spaces, which go with the token after them
    for position, (start, end) in enumerate(_pairs(name, offsets)):
        if not 0 <= start <= end:
            raise ValueError(f"{name} must be [start, end) characters, got {(start, end)} at position {position}")
        if start == end:
            spaces = -1 if start == 0 or not found else position if spaces < 0 else spaces
            continue
        if start < latest:
            raise ValueError(
                f"{name} must be those of one text in its order, got {(start, end)} at position {position} after a "
                f"token from {latest} on"
            )
        if not found or start >= reached:
            # characters between two tokens are the second one's
            found[reached if found else start] = (previous, position if spaces < 0 else spaces)
        reached, latest, previous, spaces = max(reached, end), start, position + 1, -1
    if found:
        found[reached] = (previous, previous)
    return found


def _pairs(name: str, offsets: Offsets) -> list[list[int]]:
    if len(offsets) == 0:
        return []
    made = torch.as_tensor(offsets)
    if made.is_floating_point() or made.is_complex() or made.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {made.dtype}")
    if made.dim() != 2 or made.shape[1] != 2:
        raise ValueError(f"{name} must have shape (L, 2), got {tuple(made.shape)}")
    pairs: list[list[int]] = made.tolist()
    return pairs
