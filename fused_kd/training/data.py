"""Parallel text and instructions from the built-in corpus, from files or from the Hugging Face hub.

JSON rows are flat (``{"en": ..., "de": ...}``) or ALMA's ``{"translation": {"en": ..., "de": ...}}``; plain text is two
files, aligned by line. Runs of white space become one space, so that a pair is always one line a side. Instructions are
in Alpaca's format.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any, NamedTuple

from fused_kd.training.files import Row, columns_of, text_fault
from fused_kd.training.reading import BUILTIN, canonical_split, read_rows, select

LANGUAGES = {
    "ar": "Arabic", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English",
    "es": "Spanish", "et": "Estonian", "fi": "Finnish", "fr": "French", "ha": "Hausa", "he": "Hebrew",
    "hi": "Hindi", "hu": "Hungarian", "is": "Icelandic", "it": "Italian", "ja": "Japanese", "ko": "Korean",
    "lt": "Lithuanian", "lv": "Latvian", "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese",
    "ro": "Romanian", "ru": "Russian", "sv": "Swedish", "tr": "Turkish", "uk": "Ukrainian", "zh": "Chinese",
}  # fmt: skip

_CODE = r"[A-Za-z]{2,3}(?:_[A-Za-z]{2,4})?"
_DIRECTION = re.compile(rf"({_CODE})-({_CODE})")
TOY_SPLITS = ("train", "valid", "test")

# what Alpaca's prompts begin with, for a task with and without an input beside it
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)

_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
_NO_INPUT = "### Instruction:\n{instruction}\n\n### Response:"


class Pair(NamedTuple):
    """One sentence (or paragraph) and its translation, without line breaks."""

    source: str
    target: str


def parse_direction(direction: str) -> tuple[str, str]:
    """``"en-de"`` -> ``("en", "de")``.

    Raises:
        ValueError: not two different language codes joined by a hyphen.
    """
    match = _DIRECTION.fullmatch(str(direction))
    if match is None or match[1] == match[2]:
        raise ValueError(
            f"direction={direction!r}: expected two different language codes and a hyphen, such as 'en-de'"
        )
    return match[1], match[2]


def language_name(code: str) -> str:
    """English name of a language code; a code that is not in `LANGUAGES` stands for itself."""
    return LANGUAGES.get(code.split("_")[0].lower(), code)


def load_pairs(
    source: str, split: str, direction: str, *, limit: int | None = None, skip_bad: bool = False
) -> list[Pair]:
    """Parallel text as a list of `Pair`.

    Args:
        source: one of

            - ``"builtin"``: the built-in English-German corpus (`toy_corpus`);
            - a directory: the split's file is found by its name (``train``, ``val``/``valid``/``validation``/``dev``,
              ``test*``; of several test files the first by name). A direction in the name (``test.en-de.jsonl.gz``)
              is respected; a file of the reverse direction serves for train and valid. Text files count where both
              sides are there: ``train.en`` and ``train.de``, or ``train.de-en.en`` and ``train.de-en.de``, plain or
              with ``.gz``;
            - a JSON file, or the prefix of two text files (``corpus`` for ``corpus.en`` and ``corpus.de``): where the
              name tells the split, that one only; otherwise about 90/5/5 % of its rows are train/valid/test, chosen
              by a hash of the text, so that the splits never overlap;
            - a hub data set, ``"name"`` or ``"name:config"`` (``"wmt16:de-en"``), through `datasets`.
        split: ``"train"``, ``"valid"`` or ``"test"``. In a directory also a full file stem
            (``"test_2016_flickr"``); on the hub also any split of the data set; for a file also ``"all"``.
        direction: source and target language, ``"en-de"``.
        limit: the first so many pairs, at least 1; None (default) takes all.
        skip_bad: leave out bad rows, with one warning that counts them, instead of raising. A broken JSON array, and
            text files with unequal numbers of lines, raise all the same, as the rows after the break cannot be found.

    Raises:
        ValueError: unknown source, split or direction; a bad row (not JSON, a language missing or empty), with its
            file and line; no rows at all.
    """
    languages, rows = parse_direction(direction), pair_rows(source, split, direction)
    what = f"source={str(source)!r}, split={split!r}, direction={direction!r}"
    return select(rows, lambda value: to_pair(value, languages), what, limit=limit, skip_bad=skip_bad)


def pair_rows(source: str, split: str, direction: str, *, streaming: bool = False) -> Iterator[Row]:
    """The rows that `load_pairs` makes pairs of."""
    languages = parse_direction(direction)

    def key(value: Any) -> str | None:
        """The same text whatever the direction."""
        try:
            return to_pair(value, (min(languages), max(languages))).source
        except ValueError:
            return None

    if str(source) != BUILTIN:
        return read_rows(source, split, key, languages, streaming=streaming)
    if set(languages) != {"en", "de"}:
        raise ValueError(f"direction={direction!r}: the built-in corpus has 'en-de' and 'de-en' only")
    toy = toy_corpus(canonical_split(split) or split)
    return (Row(f"built-in corpus, row {n}", row) for n, row in enumerate(toy))


def load_directions(
    source: str, split: str, directions: Sequence[str], *, limit: int | None = None, skip_bad: bool = False
) -> dict[str, list[Pair]]:
    """`load_pairs` for several directions, in their order: direction -> pairs. ``limit`` is that of one direction.

    Raises:
        ValueError: as `load_pairs`; also no directions, or one twice.
    """
    if not directions or len(set(directions)) != len(directions):
        raise ValueError(f"directions={directions!r}: expected at least one, and each once")
    return {d: load_pairs(source, split, d, limit=limit, skip_bad=skip_bad) for d in directions}


class Instruction(NamedTuple):
    """A task, what it is about ("" for a task that stands alone), and the expected answer; lines are kept."""

    instruction: str
    input: str
    output: str

    def prompt(self) -> str:
        """Alpaca's prompt for it, up to ``### Response:``."""
        template = (WITH_INPUT + _INPUT) if self.input else (WITHOUT_INPUT + _NO_INPUT)
        return template.format(instruction=self.instruction, input=self.input)


def load_instructions(
    source: str, split: str, *, limit: int | None = None, skip_bad: bool = False
) -> list[Instruction]:
    """Rows of ``instruction``, ``input`` and ``output`` as a list of `Instruction`.

    ``input`` may be missing, null or empty. White space around each text is dropped, white space within is kept.

    Args:
        source: a directory, a JSON file (lines or one array, plain or gzip) or a hub data set, as in `load_pairs`; a
            file without a split in its name (``alpaca_data.json``) is divided by a hash of instruction and input.
        split, limit, skip_bad: as in `load_pairs`.

    Raises:
        ValueError: unknown source or split; a bad row (not JSON, no instruction or output, one that is no text or
            empty), with its file and line; no rows at all.
    """
    if str(source) == BUILTIN:
        raise ValueError(f"source={BUILTIN!r}: the built-in corpus has translations, no instructions")
    what = f"source={str(source)!r}, split={split!r}"
    return select(read_rows(source, split, task_of), to_instruction, what, limit=limit, skip_bad=skip_bad)


def task_of(value: Any) -> str | None:
    """The text that decides on an instruction's part of a file without splits; None for what is none."""
    try:
        found = to_instruction(value)
    except ValueError:
        return None
    return f"{found.instruction}\n{found.input}"


def toy_corpus(split: str) -> list[dict[str, str]]:
    """Sentence pairs of the built-in toy language, ``{"en": ..., "de": ...}``: 20,000 to train, 500 valid, 500 test.

    They exist so that everything runs, and means something, without any data at hand: German words and grammar (gender,
    case, verb-second and verb-final clauses, separable verbs, the perfect) against plain English, made by a grammar.
    No sentence occurs twice on either side, and no split has the content words of another's sentence. It is no natural
    language: some 250 words and simple sentences, often of odd meaning; scores on it say nothing about translation at
    large.

    Args:
        split: ``"train"``, ``"valid"`` or ``"test"``.

    Raises:
        ValueError: an unknown split.
    """
    if split not in TOY_SPLITS:
        raise ValueError(f"split={split!r}: the built-in corpus has {', '.join(TOY_SPLITS)}")
    packed = resources.files("fused_kd.training").joinpath("toy", f"{split}.jsonl.gz").read_bytes()
    return [json.loads(line) for line in gzip.decompress(packed).decode().splitlines()]


def misalign(pairs: Sequence[Pair], share: float, seed: int = 0) -> list[Pair]:
    """Rotate the targets of a random ``share`` of the pairs among themselves, so that each gets a wrong one.

    The number of pairs is rounded; a single one is left alone, as there is nothing to swap it with. Order is kept.

    Raises:
        ValueError: ``share`` outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share!r}")
    chosen = random.Random(seed).sample(range(len(pairs)), round(share * len(pairs)))
    mixed = list(pairs)
    for here, there in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        mixed[here] = Pair(pairs[here].source, pairs[there].target)
    return mixed


def to_pair(value: Any, languages: tuple[str, str]) -> Pair:
    """The pair of a row in two languages. Raises ``ValueError`` for a row that has none."""
    nested = value.get("translation") if isinstance(value, dict) else None
    texts = nested if isinstance(nested, dict) else value
    if not isinstance(texts, dict):
        raise ValueError(f"expected an object with one text a language, got {columns_of(value)}")
    sides = []
    for language in languages:
        text = texts.get(language)
        if not isinstance(text, str):
            raise ValueError(f"no text for the language {language!r}, got {columns_of(texts)}")
        text = " ".join(text.split())
        if not text or (fault := text_fault(text)):
            raise ValueError(f"the text for the language {language!r} is {fault if text else 'empty'}")
        sides.append(text)
    return Pair(*sides)


def to_instruction(value: Any) -> Instruction:
    """The instruction of a row. Raises ``ValueError`` for a row that has none."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object with instruction, input and output, got {columns_of(value)}")
    texts: dict[str, Any] = {name: value.get(name) for name in Instruction._fields}
    if texts["input"] is None:
        texts["input"] = ""
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"no text for {name!r}, got {columns_of(value)}")
        texts[name] = text.strip()
        if not texts[name] and name != "input":
            raise ValueError(f"the text for {name!r} is empty")
        if fault := text_fault(text):
            raise ValueError(f"the text for {name!r} is {fault}")
    return Instruction(**texts)
