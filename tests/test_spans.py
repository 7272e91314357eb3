"""Spans of equal text of two tokenizers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_kd.spans import Spans, aligned_spans

from .small_tokenizers import TEXTS, byte_fallback, byte_level, metaspace, word_piece

Pairs = list[tuple[int, int]]


def lists(spans: Spans) -> tuple[list[list[int]], list[list[int]]]:
    return spans.student.tolist(), spans.teacher.tolist()


def test_a_word_in_parts() -> None:
    # "walk there now": walk| there| now and wa|lk| the|re| now
    ours, theirs = [(0, 4), (4, 10), (10, 14)], [(0, 2), (2, 4), (4, 8), (8, 10), (10, 14)]
    spans = aligned_spans(ours, torch.tensor(theirs))
    assert lists(spans) == ([[0, 1], [1, 2], [2, 3]], [[0, 2], [2, 4], [4, 5]])
    assert spans.single.tolist() == [False, False, True] and spans.student.dtype == torch.int64
    assert spans.positions().tolist() == [[0, 1], [1, 3]] and spans.predicted.tolist() == [False, True, True]


def test_special_tokens_are_in_no_span() -> None:
    """With a BOS on each side the first token has a position before it; the end of text is in no span."""
    ours = [(0, 0), (0, 3), (0, 0), (3, 7), (0, 0), (0, 0)]
    theirs = [(0, 0), (0, 0), (0, 3), (3, 7)]
    spans = aligned_spans(ours, theirs)
    assert lists(spans) == ([[1, 2], [3, 4]], [[2, 3], [3, 4]])
    assert spans.positions().tolist() == [[0, 1], [2, 2]] and bool(spans.single.all())
    within = aligned_spans([(0, 2), (0, 0), (2, 4)], [(0, 4)])
    assert lists(within) == ([[0, 3]], [[0, 1]]) and not bool(within.single.any())


def test_tokens_that_share_characters() -> None:
    """Four bytes of an emoji, and a prefix beside the first letter."""
    assert lists(aligned_spans([(0, 1), (1, 2), (1, 2), (1, 2), (1, 2), (2, 3)], [(0, 1), (1, 2), (2, 3)])) == (
        [[0, 1], [1, 5], [5, 6]],
        [[0, 1], [1, 2], [2, 3]],
    )
    assert lists(aligned_spans([(0, 1), (0, 1), (1, 2)], [(0, 1), (1, 2)])) == ([[0, 2], [2, 3]], [[0, 1], [1, 2]])
    # one within another
    nested = [(0, 1), (1, 4), (2, 3), (4, 5)]
    assert lists(aligned_spans(nested, [(0, 1), (1, 3), (3, 4), (4, 5)])) == ([[0, 1], [1, 3], [3, 4]],) * 2
    # " é" as " " with its first byte, and its second
    assert lists(aligned_spans([(0, 1), (1, 3), (2, 3)], [(0, 1), (1, 2), (2, 3)])) == (
        [[0, 1], [1, 3]],
        [[0, 1], [1, 3]],
    )


def test_spaces_without_a_token() -> None:
    """They are the next token's, as in vocabularies whose tokens begin with a space."""
    assert lists(aligned_spans([(0, 3), (3, 7)], [(0, 3), (4, 7)])) == ([[0, 1], [1, 2]],) * 2
    # trimmed to nothing, at the end too
    trimmed = [(0, 3), (4, 4), (5, 7), (8, 8)]
    assert lists(aligned_spans([(0, 3), (3, 4), (4, 7)], trimmed)) == ([[0, 1], [1, 3]], [[0, 1], [1, 3]])
    # a line of its own token on one side
    assert lists(aligned_spans([(0, 1), (1, 3), (3, 4)], [(0, 1), (3, 4)])) == ([[0, 1], [1, 3]], [[0, 1], [1, 2]])


@pytest.mark.parametrize(
    "ours, theirs, expected",
    [
        ([(0, 3), (3, 7), (7, 9)], [(0, 3), (3, 6)], ([[0, 1]], [[0, 1]])),  # the end
        ([(3, 7), (7, 9)], [(0, 3), (3, 9)], ([[0, 2]], [[1, 2]])),  # the beginning
        ([(0, 3)], [(5, 9)], ([], [])),
        ([(0, 3), (3, 6)], [(1, 2), (2, 4), (4, 5)], ([], [])),
        ([], [(0, 4)], ([], [])),
        ([(0, 0)], [(0, 0)], ([], [])),
    ],
)
def test_what_only_one_side_has(ours: Pairs, theirs: Pairs, expected: tuple[Any, Any]) -> None:
    spans = aligned_spans(ours, theirs)
    assert lists(spans) == expected
    assert spans.student.shape == (len(expected[0]), 2) and spans.positions().shape[1] == 2


@st.composite
def cut_text(draw: st.DrawFn, length: int) -> Pairs:
    """Tokens that cover a text, some characters in several tokens, with empty ones between."""
    cuts = sorted({0, length, *draw(st.sets(st.integers(0, length)))})
    made: Pairs = []
    for start, end in pairwise(cuts):
        made += [(0, 0)] * draw(st.integers(0, 1))
        made += [(start, end)] * (draw(st.integers(1, 3)) if end == start + 1 else 1)
    return made + [(0, 0)] * draw(st.integers(0, 1))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), length=st.integers(1, 14))
def test_spans_are_the_finest_of_equal_text(data: st.DataObject, length: int) -> None:
    sides = [data.draw(cut_text(length)) for _ in range(2)]
    cuts = [c for c in range(length + 1) if not any(s < c < e for side in sides for s, e in side)]
    spans = aligned_spans(*sides)
    for side, found in zip(sides, spans, strict=True):
        expected = []
        for low, high in pairwise(cuts):
            inside = [i for i, (s, e) in enumerate(side) if s < e and low <= s and e <= high]
            expected.append([inside[0], inside[-1] + 1])
        assert found.tolist() == expected
    positions = iter(spans.positions().tolist())
    for first, second, has in zip(*lists(spans), spans.predicted.tolist(), strict=True):
        assert not has or next(positions) == [first[0] - 1, second[0] - 1]


HEXED = [f"<0x{byte:02X}>" for byte in range(256)]
CORES = {
    "byte level": byte_level(),
    "trimmed": byte_level(trim=True),
    "metaspace": metaspace(),
    "word piece": word_piece(),
    "bytes": byte_fallback(["<unk>", *HEXED, "▁", *"thersad"]),
}


@pytest.mark.parametrize("second", CORES)
@pytest.mark.parametrize("first", CORES)
def test_real_tokenizers(first: str, second: str) -> None:
    for text in (*TEXTS, " ".join(TEXTS)):
        sides = [CORES[name].encode(text, add_special_tokens=False).offsets for name in (first, second)]
        spans = aligned_spans(*sides)
        assert len(spans.student) >= 1
        told = []
        for side, found in zip(sides, spans, strict=True):
            tokens = [side[start:end] for start, end in found.tolist()]
            told.append([text[min(s for s, _ in part) : max(e for _, e in part)].strip() for part in tokens])
            # nothing is left out between the first and the last
            assert [a[1] for a in found.tolist()][:-1] == [a[0] for a in found.tolist()][1:]
        assert told[0] == told[1]
        # as words are cut at spaces by all of these, no span is longer than a word and its marks
        assert all(len(part.split()) <= 1 for part in told[0])
        assert "".join(told[0]) == "".join(text.split())
        if first == second:
            # one token each, but for those that share a character
            assert spans.single.float().mean() > (0.1 if first == "bytes" else 0.5)
            assert torch.equal(spans.student, spans.teacher)


@pytest.mark.parametrize(
    "error, message, ours",
    [
        (
            ValueError,
            r"student_offsets must be \[start, end\) characters, got \(3, 2\) at position 1",
            [(0, 3), (3, 2)],
        ),
        (ValueError, r"must be those of one text in its order, got \(0, 4\) at position 2", [(0, 3), (3, 5), (0, 4)]),
        (ValueError, r"student_offsets must have shape \(L, 2\), got \(1, 3\)", [(0, 3, 1)]),
        (TypeError, "student_offsets must be integers, got torch.float32", [(0.0, 3.0)]),
    ],
)
def test_errors(error: type[Exception], message: str, ours: Any) -> None:
    with pytest.raises(error, match=message):
        aligned_spans(ours, [(0, 3)])
