"""A small stand-in for the paper's data and MT model: a task of image captions, and a tiny MT model of them.

The task is who is in a caption, and whether they move. Labels are by rule: a caption has one where its English words
name people of one sex and hold or move of one kind; the label is the pair. Neither a word of people nor one of posture
decides it alone, and classes are made equal in number for training, so that the best single word gets no further than
about half.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_kd as fk
from fused_kd.training.files import sound
from fused_kd.training.models import train_tokenizer
from fused_kd.training.reading import file_rows, find_file
from fused_kd.training.stage import write_json, write_lines

TABLES = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))
WORDS = [{name: set(words.split()) for name, words in TABLES[table].items()} for table in ("who", "what")]
CLASSES = [f"{who}/{what}" for who in TABLES["who"] for what in TABLES["what"]]


def words_of(caption: str) -> set[str]:
    return set(re.findall(r"[a-z]+", caption.lower()))


def label_of(caption: str) -> str | None:
    """One of ``CLASSES``; None for an English caption that names neither, or both, of the people or of the postures."""
    words = words_of(caption)
    found = [[name for name, known in table.items() if words & known] for table in WORDS]
    return "/".join(names[0] for names in found) if all(len(names) == 1 for names in found) else None


def best_single_word(texts: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """The word that decides most of the labels alone: a class for captions with it, another for those without."""
    total = Counter(labels)
    having: dict[str, Counter[str]] = {}
    for text, label in zip(texts, labels, strict=True):
        for word in words_of(text):
            having.setdefault(word, Counter())[label] += 1
    right = {
        word: max(with_it.values()) + max((total - with_it).values(), default=0) for word, with_it in having.items()
    }
    word = max(sorted(right), key=lambda word: right[word])
    return {"word": word, "accuracy": right[word] / len(labels)}


def write_task(
    folder: Path, data: str | Path, languages: Sequence[str], tests: Sequence[str], limit: int | None = None
) -> dict[str, Any]:
    """A task's folder from a folder of captions, JSON rows with a text a language.

    Args:
        folder: gets ``train.jsonl`` (English, as many of each class) and ``test.LANGUAGE.jsonl`` (the same captions in
            each language, English too), rows ``{"text", "label"}``; ``text.jsonl`` (``{"text"}``: every English caption
            for training), ``retrieval.jsonl`` (1,000 parallel rows of the first test) and ``task.json`` (the counts,
            and the best single word), which is returned.
        data: folder with ``train`` and the ``tests``, whose items are taken together.
        languages: those to transfer to.
        limit: captions of ``train``.

    Raises:
        ValueError: a file or a language that is missing, a class without captions.
    """
    everyone = ["en", *languages]
    train = [row["en"] for row in read_captions(data, "train", ["en"], limit)]
    by_class = {name: [text for text in train if label_of(text) == name] for name in CLASSES}
    if lacking := [name for name, texts in by_class.items() if not texts]:
        raise ValueError(f"data={str(data)!r}: no caption of {', '.join(lacking)}")
    smallest, rng = min(map(len, by_class.values())), random.Random(0)
    chosen = [(text, name) for name, texts in by_class.items() for text in rng.sample(texts, smallest)]
    rng.shuffle(chosen)
    test = [row for name in tests for row in read_captions(data, name, everyone)]
    held = [(row, label) for row in test if (label := label_of(row["en"]))]
    if not held:
        raise ValueError(f"data={str(data)!r}: no caption of {', '.join(tests)} has a label")
    _write(folder / "text.jsonl", ({"text": text} for text in train))
    _write(folder / "train.jsonl", ({"text": text, "label": label} for text, label in chosen))
    for language in everyone:
        _write(folder / f"test.{language}.jsonl", ({"text": row[language], "label": label} for row, label in held))
    _write(folder / "retrieval.jsonl", read_captions(data, tests[0], everyone, 1000))
    about = {
        "classes": CLASSES,
        "train": dict.fromkeys(CLASSES, smallest),
        "train_unbalanced": {name: len(texts) for name, texts in by_class.items()},
        "test": dict(Counter(label for _, label in held)),
        "best_single_word": best_single_word(*zip(*chosen, strict=True)),
    }
    write_json(folder / "task.json", about)
    return about


def read_captions(
    data: str | Path, split: str, languages: Sequence[str], limit: int | None = None
) -> list[dict[str, str]]:
    """The first ``limit`` rows of a split, with a text in each of the languages.

    Raises:
        ValueError: no such folder or split, a row without one of the texts.
    """
    return read_parallel(find_file(Path(data).expanduser(), split), languages, limit)


def read_parallel(path: Path, languages: Sequence[str], limit: int | None = None) -> list[dict[str, str]]:
    """The first ``limit`` rows of a file, with a text in each of the languages. Raises as :func:`read_captions`."""
    rows: list[dict[str, str]] = []
    for place, value in sound(file_rows(path, None)):
        missing = [name for name in languages if not isinstance(value, dict) or not value.get(name)]
        if missing:
            raise ValueError(f"{place}: expected a text in each of {', '.join(languages)}, none in {missing[0]}")
        rows.append({name: str(value[name]) for name in languages})
    return rows[:limit]


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))


def tiny_mt(texts: Iterable[str], seed: int, vocab: int, **sizes: Any) -> tuple[Any, Any]:
    """A tokenizer of the texts, and an M2M100 with random weights; sizes are those of ``M2M100Config``."""
    from transformers import GenerationConfig, M2M100Config, M2M100ForConditionalGeneration

    tokenizer = train_tokenizer(texts, vocab)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    special["decoder_start_token_id"] = tokenizer.bos_token_id
    config = M2M100Config(vocab_size=len(tokenizer), **sizes, **special)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = M2M100ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**special)
    return tokenizer, model


def mt_rows(
    tokenizer: Any, captions: Sequence[Mapping[str, str]], noise: float, seed: int, max_length: int | None = None
) -> list[dict[str, Any]]:
    """``source_ids`` and ``target_ids`` from every language that a parallel row has into English.

    English itself is a source too, each token dropped with probability ``noise``: stage 1 feeds the encoder English.
    Pairs with a side of more than ``max_length`` tokens are left out.
    """
    if not captions:
        return []
    ids = {name: tokenizer([row[name] for row in captions])["input_ids"] for name in captions[0]}
    targets = [[*row, tokenizer.eos_token_id] for row in ids["en"]]
    rng = random.Random(seed)
    ids["en"] = [[token for place, token in enumerate(row) if place == 0 or rng.random() >= noise] for row in ids["en"]]
    return [
        {"source_ids": source, "target_ids": target}
        for sources in ids.values()
        for source, target in zip(sources, targets, strict=True)
        if max_length is None or max(len(source), len(target)) <= max_length
    ]


class Translator(nn.Module):
    """Cross-entropy of an encoder-decoder without its logits: ``target_ids`` begin with BOS and end with EOS."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.criterion = fk.KDLoss(fk.SFT(), ignore_index=-100)

    def forward(
        self, source_ids: Tensor, source_mask: Tensor, target_ids: Tensor, target_mask: Tensor
    ) -> dict[str, Tensor]:
        hidden = self.model.model(
            input_ids=source_ids, attention_mask=source_mask, decoder_input_ids=target_ids[:, :-1], use_cache=False
        ).last_hidden_state
        labels = target_ids[:, 1:].masked_fill(target_mask[:, 1:] == 0, -100)
        return {"loss": self.criterion(fk.LMHead(hidden, self.model.lm_head.weight), None, labels)}
