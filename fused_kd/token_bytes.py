"""Which bytes of a text each token of a tokenizer stands for, read from how the tokenizer decodes.

Nothing of transformers or tokenizers is imported: a tokenizer is what has ``get_vocab()``.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

# in the order in which tokens are matched by them
ROLES = ("eos", "bos", "unk", "pad", "sep", "cls", "mask")
METASPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CJK = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]")


class Token(NamedTuple):
    """``text`` is its entry in the vocabulary; ``value`` what it adds to a text; ``kind`` "text", "added" (of literal
    text) or "special" (no text); ``fallback`` whether it is one byte of what has no token of its own."""

    id: int
    text: str
    value: bytes
    kind: str
    fallback: bool


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens by id; the ids of ``ROLES`` that it has; the size of a head that is not padded."""

    tokens: Mapping[int, Token]
    roles: Mapping[str, int]
    size: int


@dataclass(frozen=True)
class Convention:
    """How entries of a vocabulary spell text.

    Args:
        byte_level: each character is a byte, by GPT-2's table.
        word_prefix: entries without it begin a word, as of WordPiece; None: no such rule.
        word_suffix: what ends a word.
        spaces: what stands for a space in an entry.
        byte_fallback: ``<0x0A>`` is the byte 10.
    """

    byte_level: bool = False
    word_prefix: str | None = None
    word_suffix: str | None = None
    spaces: tuple[str, ...] = ()
    byte_fallback: bool = False

    def is_byte(self, text: str) -> bool:
        return self.byte_fallback and _BYTE.fullmatch(text) is not None

    def bytes_of(self, text: str) -> bytes:
        """What an entry, of no added token, adds to a text."""
        if self.byte_fallback and (found := _BYTE.fullmatch(text)):
            return bytes([int(found[1], 16)])
        end = b""
        if self.word_suffix and text.endswith(self.word_suffix):
            text, end = text[: -len(self.word_suffix)], b" "
        if self.byte_level:
            return text.translate(_BYTES).encode("latin-1") + end
        if self.word_prefix is not None:
            text = text[len(self.word_prefix) :] if text.startswith(self.word_prefix) else _as_word(text)
        for mark in self.spaces:
            text = text.replace(mark, " ")
        return text.encode("utf-8", "surrogatepass") + end


class _Bytes(dict[int, int | str]):
    """Characters to those of Latin-1 that have the number of the byte, for ``str.translate``."""

    def __init__(self) -> None:
        # bytes that are printable in Latin-1 are themselves, the others follow from character 256 on
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        super().__init__({byte: byte for byte in printable} | {256 + place: byte for place, byte in enumerate(others)})

    def __missing__(self, letter: int) -> str:
        """One that stands for no byte is text."""
        return chr(letter).encode("utf-8", "surrogatepass").decode("latin-1")


_BYTES = _Bytes()


def _as_word(text: str) -> str:
    """The start of a word has a space before it; what BERT's splitter cuts off wherever it stands has none."""
    first = text[:1]
    cut = not first.isalnum() if first.isascii() else unicodedata.category(first)[0] == "P"
    return text if cut or _CJK.match(first) else f" {text}"


def read_vocabulary(name: str, tokenizer: Any) -> Vocabulary:
    """The vocabulary of a tokenizer, or of a processor's ``tokenizer``.

    Raises:
        TypeError: it has no ``get_vocab()``.
    """
    if not hasattr(tokenizer, "get_vocab"):
        tokenizer, given = getattr(tokenizer, "tokenizer", None), tokenizer
        if not hasattr(tokenizer, "get_vocab"):
            raise TypeError(f"{name} must have get_vocab() as transformers' tokenizers do, got {type(given).__name__}")
    spec = _spec_of(tokenizer)
    convention, added = _convention_of(tokenizer, spec), _added_tokens(tokenizer, spec)
    named = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ROLES}
    roles = {role: index for role, index in named.items() if isinstance(index, int)}
    special = {index for index, (_, is_special) in added.items() if is_special} | set(roles.values())
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    texts |= {index: text for index, (text, _) in added.items()}
    tokens = {}
    for index, text in texts.items():
        if isinstance(text, bytes):  # some tiktoken wrappers' entries
            tokens[index] = Token(index, repr(text), text, "text", False)
        elif convention.is_byte(text):
            tokens[index] = Token(index, text, convention.bytes_of(text), "text", True)
        else:
            kind = "special" if index in special else "added" if index in added else "text"
            value = convention.bytes_of(text) if kind == "text" else text.encode("utf-8", "surrogatepass")
            tokens[index] = Token(index, text, value, kind, False)
    return Vocabulary(tokens, roles, max([len(tokens), *(index + 1 for index in tokens)]))


def _spec_of(tokenizer: Any) -> dict[str, Any] | None:
    """What a fast tokenizer writes into tokenizer.json; None for others."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        return None
    spec: dict[str, Any] = json.loads(backend.to_str())
    return spec


def _added_tokens(tokenizer: Any, spec: dict[str, Any] | None) -> dict[int, tuple[str, bool]]:
    """(text, whether it is special) of each added token."""
    known = getattr(tokenizer, "added_tokens_decoder", None)
    if isinstance(known, Mapping):
        return {index: (str(token), bool(getattr(token, "special", True))) for index, token in known.items()}
    entries = spec.get("added_tokens") or [] if spec else []
    return {entry["id"]: (entry["content"], entry["special"]) for entry in entries}


def _convention_of(tokenizer: Any, spec: dict[str, Any] | None) -> Convention:
    """From the decoder; where that says nothing, from what splits and normalises; else entries are text as it is."""
    if spec is None:
        if hasattr(tokenizer, "byte_decoder"):
            return Convention(byte_level=True)
        if hasattr(tokenizer, "sp_model"):
            return Convention(spaces=(METASPACE,), byte_fallback=True)
        return Convention()
    model = spec["model"]
    decoder = list(_steps(spec.get("decoder")))
    before = [*_steps(spec.get("pre_tokenizer")), *_steps(spec.get("normalizer"))]
    decodes, splits = ({step["type"] for step in steps} for steps in (decoder, before))
    suffix = model.get("end_of_word_suffix") or next((x["suffix"] for x in decoder if x["type"] == "BPEDecoder"), None)
    if "ByteLevel" in decodes or (not decoder and "ByteLevel" in splits):
        return Convention(byte_level=True, word_suffix=suffix)
    fallback = bool(model.get("byte_fallback")) or "ByteFallback" in decodes
    prefix = next((x["prefix"] for x in decoder if x["type"] == "WordPiece"), None)
    if prefix is None and model["type"] == "WordPiece":
        prefix = model["continuing_subword_prefix"]
    spaces = [*_decoded_spaces(decoder)] or [*_encoded_spaces(before)]
    return Convention(False, prefix, suffix, tuple(spaces), fallback)


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The parts of a sequence, of sequences too."""
    if part is None:
        return
    inner = [value for key, value in part.items() if key in ("decoders", "pretokenizers", "normalizers")]
    if part["type"] != "Sequence" or not inner:
        yield part
        return
    for each in inner[0]:
        yield from _steps(each)


def _decoded_spaces(decoder: list[dict[str, Any]]) -> Iterator[str]:
    for step in decoder:
        if step["type"] == "Metaspace":
            yield step["replacement"]
        elif step["type"] == "Replace" and step["content"] == " " and "String" in step["pattern"]:
            yield step["pattern"]["String"]


def _encoded_spaces(before: list[dict[str, Any]]) -> Iterator[str]:
    for step in before:
        if step["type"] == "Metaspace":
            yield step["replacement"]
        elif step["type"] == "Replace" and step["pattern"].get("String") == " " and step["content"].strip():
            yield step["content"]
