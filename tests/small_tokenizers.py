"""Tokenizers of three families, trained or given their entries inside a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

TEXTS = (
    "The old man walks the dog; it is there, and there it stays.",
    "Übung macht den Meister, naïve Größe im Café.",
    "A line\n\nand another, 2026 times: (x + y) * 3.",
    "你好，世界。 Good 😀 news there",
)


def byte_level(entries: Sequence[str] | None = None, *, size: int = 400, trim: bool = False) -> Any:
    core = tokenizers.Tokenizer(models.BPE() if entries is None else models.BPE(numbered(entries), []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if trim:
        core.post_processor = processors.ByteLevel(trim_offsets=True)
    if entries is None:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = ["<|pad|>", "<|end|>"]
        options = {"vocab_size": size, "initial_alphabet": alphabet, "special_tokens": special}
        core.train_from_iterator([*TEXTS] * 4, trainers.BpeTrainer(show_progress=False, **options))
    return core


def metaspace(entries: Sequence[str] | None = None, *, size: int = 160) -> Any:
    """Unigram, as T5's."""
    core = tokenizers.Tokenizer(
        models.Unigram() if entries is None else models.Unigram([(x, -1.0) for x in entries], 0)
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    if entries is None:
        options = {"vocab_size": size, "unk_token": "<unk>", "special_tokens": ["<unk>", "<s>", "</s>"]}
        core.train_from_iterator([*TEXTS] * 4, trainers.UnigramTrainer(show_progress=False, **options))
    return core


def byte_fallback(entries: Sequence[str]) -> Any:
    """BPE with bytes for what it has no token of, as Llama 2's."""
    core = tokenizers.Tokenizer(models.BPE(numbered(entries), [], byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip],
    )
    return core


def word_piece(entries: Sequence[str] | None = None, *, size: int = 160) -> Any:
    model = models.WordPiece(unk_token="[UNK]") if entries is None else models.WordPiece(numbered(entries))
    core = tokenizers.Tokenizer(model)
    core.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    if entries is None:
        options = {"vocab_size": size, "special_tokens": ["[UNK]", "[CLS]", "[SEP]"]}
        core.train_from_iterator([*TEXTS] * 4, trainers.WordPieceTrainer(show_progress=False, **options))
    return core


def numbered(entries: Sequence[str]) -> dict[str, int]:
    return {entry: index for index, entry in enumerate(entries)}


def fast(core: Any, **special: str) -> Any:
    """transformers' tokenizer around it."""
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)
