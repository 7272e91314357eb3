"""Tokens of texts of which some spans carry loss.

The ids are those of the whole text, as ``apply_chat_template`` gives them, without a second BOS. Where a token would
lie across an end of a span (an answer that begins with a line break, behind a prompt that ends in one), the text is
tokenised in pieces, each span apart from what is before and behind it: that is what generation has, a prompt that is
tokenised alone and then the answer's own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fused_kd.integrations.labels import LABEL_PAD
from fused_kd.training.chat_templates import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_chats(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat]) -> list[dict[str, list[int]] | ValueError]:
    """A row of ``input_ids`` and ``labels`` for each text, or a ``ValueError`` that says what is wrong. Nothing is cut.

    Raises:
        ValueError: a tokenizer without offsets, which says of no token where in the text it lies.
    """
    if not chats:
        return []
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} is a slow one, without offsets: chat rows need a fast tokenizer "
            "(tokenizer.json)"
        )
    encoded = _tokens(tokenizer, [chat.text for chat in chats])
    return [_row(tokenizer, chat, encoding) for chat, encoding in zip(chats, encoded, strict=True)]


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Sequence[Any]:
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return encoded.encodings or []


def _row(tokenizer: PreTrainedTokenizerBase, chat: Chat, encoding: Any) -> dict[str, list[int]] | ValueError:
    bounds = [bound for span in chat.spans for bound in span]
    edges = [_edge(encoding, chat.text, bound, closing=bool(n % 2)) for n, bound in enumerate(bounds)]
    ids: list[int] = encoding.ids
    if None in edges:
        pieces = _pieces(tokenizer, chat, bounds)
        if pieces is None:
            return ValueError(
                f"a token lies across the beginning or the end of an assistant turn in {chat.text[:60]!r}..., and the "
                "tokenizer does not give the same text in pieces"
            )
        ids, edges = pieces
    labels = [LABEL_PAD] * len(ids)
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        labels[begin:end] = ids[begin:end]
    return {"input_ids": ids, "labels": labels}


def _edge(encoding: Any, text: str, bound: int, closing: bool) -> int | None:
    """The number of the first token behind a bound; None where a token lies across it, or none ends there.

    A special token may take in the white space that follows it; behind an answer (`closing`) that is no harm.
    """
    if bound == len(text):
        return len(encoding.ids)
    before, behind = (None if at < 0 else encoding.char_to_token(at) for at in (bound - 1, bound))
    if behind is None or (bound and before is None):
        return None
    begin, end = encoding.token_to_chars(behind)
    if closing and behind == before and begin < bound and not text[bound:end].strip():
        return int(behind) + 1
    return int(behind) if begin == bound else None


def _pieces(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, bounds: Sequence[int]
) -> tuple[list[int], list[int | None]] | None:
    """The ids of the text cut at the bounds, and the number of the first id behind each; None where they do not give
    the text, as with tokenizers that put a space before any text."""
    cuts = [0, *bounds, len(chat.text)]
    parts = [chat.text[begin:end] for begin, end in pairwise(cuts)]
    ids: list[int] = []
    edges: list[int] = []
    for part, encoding in zip(parts, _tokens(tokenizer, parts), strict=True):
        ids += encoding.ids if part else []
        edges.append(len(ids))
    apart = "".join(_decoded(tokenizer, ids[i:k]) for i, k in pairwise([0, *edges]))
    return (ids, list(edges[:-1])) if _decoded(tokenizer, ids) == apart else None


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
