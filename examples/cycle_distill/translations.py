"""A model's own translations as training rows: where each ends, which are fit to train on, the lists of their tokens.

Rows are made of the generated ids; nothing is decoded and tokenised again. A translation that was cut at a marker ends
with EOS in its row, where the model had gone on: the list that it made there is the marker's and is left out. That EOS
is a hard label, its list has one entry of probability 1.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fused_kd.training.data import Pair, parse_direction
from fused_kd.training.generate import Generation
from fused_kd.training.prompts import LABEL_PAD
from fused_kd.training.stage import read_lines, write_lines

Row = dict[str, Any]
# in the order in which they are asked; a translation counts for the first that it breaks
RULES = ("empty", "unfinished", "copy", "length", "repetition", "language")
# letters' scripts with the languages written in them, and common words that only one of the languages has
LANGUAGES = json.loads((Path(__file__).parent / "languages.json").read_text(encoding="utf-8"))
SCRIPTS = {script: codes.split() for script, codes in LANGUAGES["scripts"].items()}
WORDS = {code: frozenset(words.split()) for code, words in LANGUAGES["words"].items()}


@dataclass
class Filters:
    """What the rules go by. Raises ``ValueError`` for bounds out of order or range, and an unknown identifier."""

    # a translation ends before the first of them: the end of the line, and what begins the next part of a prompt
    markers: list[str] = field(default_factory=lambda: ["\n", "###"])
    # smallest and largest length over the source's, in characters; languages that need far fewer want other bounds
    length_ratio: list[float] = field(default_factory=lambda: [0.5, 2.0])
    unique_words: float = 0.5  # at least this share of the words are different ones
    loops: int = 3  # so many times the same text of four or more characters, one right after the other, is a loop
    identifier: str = "stop_words"  # what tells the language: script and common words, or "none"

    def __post_init__(self) -> None:
        ratio = self.length_ratio
        if len(ratio) != 2 or not 0 <= ratio[0] < ratio[1] or not all(map(math.isfinite, ratio)):
            raise ValueError(f"length_ratio must be two numbers, 0 <= low < high, got {ratio!r}")
        if not 0 <= self.unique_words <= 1:
            raise ValueError(f"unique_words must be in [0, 1], got {self.unique_words!r}")
        if self.loops < 2:
            raise ValueError(f"loops must be at least 2, got {self.loops!r}")
        if not all(self.markers):
            raise ValueError(f"markers must not be empty texts, got {self.markers!r}")
        if self.identifier not in ("stop_words", "none"):
            raise ValueError(f"identifier must be 'stop_words' or 'none', got {self.identifier!r}")


def find_cut(text: str, markers: Sequence[str]) -> int | None:
    """Where the first marker after the first visible character begins; None where there is none."""
    start = len(text) - len(text.lstrip())
    if any(text.startswith(marker, start) for marker in markers):
        return start  # a marker and no translation
    found = [place for marker in markers if (place := text.find(marker, start)) >= 0]
    return min(found) if found else None


def truncated(text: str, markers: Sequence[str]) -> str:
    """The text up to its first marker, on one line."""
    return " ".join(text[: find_cut(text, markers)].split())


def broken_rule(source: str, text: str, whole: bool, languages: tuple[str, str], filters: Filters) -> str | None:
    """The first of ``RULES`` that a translation breaks, already cut, or None.

    ``whole`` says that it ended, by EOS or at a marker, and not because no more tokens were made.
    """
    words, source_words = (re.findall(r"\w+", each.casefold()) for each in (text, source))
    low, high = filters.length_ratio
    if not any(map(str.isalnum, text)):
        return "empty"
    if not whole:
        return "unfinished"
    if words == source_words:
        return "copy"
    if not low <= len(text) / len(source) <= high:
        return "length"
    if len(set(words)) < filters.unique_words * len(words) or loops(text, filters.loops):
        return "repetition"
    if filters.identifier != "none" and not may_be(text, languages[1].split("_")[0].lower()):
        return "language"
    return None


def loops(text: str, times: int) -> bool:
    """Whether a word, or four or more characters, come so many times in a row."""
    again, text = f"{{{times - 1},}}", " ".join(text.casefold().split()) + " "
    words, characters = rf"(?<!\S)(\S+ )\1{again}", rf"(.{{4,}}?)\1{again}"
    return any(re.search(pattern, text) for pattern in (words, characters))


def may_be(text: str, language: str) -> bool:
    """Whether a text may be in a language, by script, and among those of Latin script by common words.

    Coarse on purpose: it shall catch output in a wrong language, not tell dialects apart. False where most letters are
    of a script in which the language is not written, or another language has more common words than every other.
    """
    scripts = Counter(script_of(char) for char in text if char.isalpha())
    expected = {script for script, codes in SCRIPTS.items() if language in codes} or {"LATIN"}
    if sum(scripts[script] for script in expected) < 0.5 * scripts.total():
        return False
    if scripts["HIRAGANA"] + scripts["KATAKANA"] > 0:  # beside Chinese characters
        return language == "ja"
    found = re.findall(r"[^\W\d_]+", text.lower())
    hits = sorted(((sum(word in words for word in found), code) for code, words in WORDS.items()), reverse=True)
    return "LATIN" not in expected or hits[0][0] == hits[1][0] or hits[0][1] == language


@cache
def script_of(char: str) -> str:
    """A letter's script, as its Unicode name begins."""
    return re.split("[ -]", unicodedata.name(char, ""), maxsplit=1)[0]


class Response(NamedTuple):
    """What is kept of a continuation.

    ``ids`` end with EOS. The first ``listed`` are the model's own and have its lists; those after it are hard labels.
    """

    ids: list[int]
    listed: int
    text: str
    whole: bool
    cut: bool


def trim(generation: Generation, tokenizer: Any, markers: Sequence[str]) -> Response:
    """Cut a continuation before the first marker, token by token.

    Where the cut falls into a token (``".\\n"`` may be one), a token for the part before it stands in, as a hard
    label; without such a token that part is lost, and the translation not whole if it had letters.
    """
    ids, place = generation.ids, find_cut(generation.text, markers)
    if place is None:
        text = " ".join(generation.text.split())
        return Response(ids, len(ids), text, whole=generation.finished, cut=False)
    wanted = generation.text[:place]

    def prefix(count: int) -> str:
        return str(tokenizer.decode(ids[:count], skip_special_tokens=True))

    kept = bisect_right(range(len(ids) + 1), len(wanted), key=lambda count: len(prefix(count))) - 1
    response, lost = ids[:kept], wanted[len(prefix(kept)) :]
    if lost.strip() and (stand_in := part_of(ids[kept], response, wanted, tokenizer)) is not None:
        response, lost = [*response, stand_in], ""
    text = " ".join(wanted[: len(wanted) - len(lost)].split())
    whole = not any(map(str.isalnum, lost))
    return Response([*response, int(tokenizer.eos_token_id)], kept, text, whole=whole, cut=True)


def part_of(token: int, before: list[int], wanted: str, tokenizer: Any) -> int | None:
    """The token whose text is the beginning of ``token``'s and makes ``before`` read ``wanted``; None without one."""
    name, vocab = str(tokenizer.convert_ids_to_tokens(token)), tokenizer.get_vocab()
    for length in range(len(name) - 1, 0, -1):
        found = vocab.get(name[:length])
        if found is not None and str(tokenizer.decode([*before, found], skip_special_tokens=True)) == wanted:
            return int(found)
    return None


class Maker(NamedTuple):
    """What rows are made with; a row above ``max_length`` counts as unfinished."""

    tokenizer: Any
    direction: str
    filters: Filters
    max_length: int


def select(
    generations: Sequence[Generation],
    prompts: Sequence[Sequence[int]],
    sentences: Sequence[Pair],
    maker: Maker,
    score: Callable[[list[list[Row]]], list[list[float]]] | None = None,
) -> tuple[list[Row], list[Row]]:
    """Cut and filter the continuations of the sentences' prompts, and keep one a sentence.

    Args:
        generations: as many of each sentence, one sentence after another.
        score: given the rows of each sentence that pass the filters, a score of each; the highest is kept. None keeps
            the first that passes.

    Returns:
        The rows that passed: ``input_ids`` (prompt, response, EOS) and ``labels``, -100 on the prompt; ``listed``, how
        many response tokens have a list; ``cut``; ``index`` of the sentence and ``made`` of the generation; ``source``
        and ``text``. And of the other sentences ``rule``, that of their first translation, ``index``, ``source`` and
        ``text``.
    """
    size = len(generations) // len(sentences)
    groups, rejected = [], []
    for index, (prompt, pair) in enumerate(zip(prompts, sentences, strict=True)):
        places = range(index * size, (index + 1) * size)
        seen: dict[tuple[int, ...], Row] = {}  # candidates are often the same
        made = []
        for place in places:
            ids = tuple((generation := generations[place]).ids)
            if ids not in seen:
                seen[ids] = row_of(generation, prompt, pair, maker)
            made.append({**seen[ids], "index": index, "made": place})
        passed = [row for row in made if "rule" not in row]
        if passed:
            groups.append(passed)
        else:
            rejected.append(made[0])
    if score is None or not groups:
        return [group[0] for group in groups], rejected
    scored = zip(groups, score(groups), strict=True)
    return [group[max(range(len(group)), key=scores.__getitem__)] for group, scores in scored], rejected


def row_of(generation: Generation, prompt: Sequence[int], pair: Pair, maker: Maker) -> Row:
    """A training row; of a translation that breaks a rule ``rule``, ``source`` and ``text``."""
    response = trim(generation, maker.tokenizer, maker.filters.markers)
    whole = response.whole and len(prompt) + len(response.ids) <= maker.max_length
    rule = broken_rule(pair.source, response.text, whole, parse_direction(maker.direction), maker.filters)
    about = {"source": pair.source, "text": response.text}
    if rule is not None:
        return {"rule": rule, **about}
    row = {"input_ids": [*prompt, *response.ids], "labels": [LABEL_PAD] * len(prompt) + response.ids}
    return {**row, "listed": response.listed, "cut": response.cut, **about}


def count(kept: Sequence[dict[str, Any]], rejected: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``generated``, ``kept``, ``cut`` (of the kept) and ``rejected``, a number for each of ``RULES``."""
    by_rule = Counter(each["rule"] for each in rejected)
    return {
        "generated": len(kept) + len(rejected),
        "kept": len(kept),
        "cut": sum(each["cut"] for each in kept),
        "rejected": {rule: by_rule[rule] for rule in RULES},
    }


def lists_of(row: dict[str, Any], generations: Sequence[Generation], k: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, k) log-probabilities and ids of a row's n response tokens.

    The first ``listed`` are those of the model where it chose that token. The others, and all of a row of a real pair,
    are sure of their token, so that their KL is the cross-entropy.
    """
    response, listed = [label for label in row["labels"] if label != LABEL_PAD], row.get("listed", 0)
    log_probs, indices = np.full((len(response), k), -np.inf, dtype=np.float32), np.zeros((len(response), k), np.int64)
    log_probs[listed:, 0], indices[listed:, 0] = 0, response[listed:]
    if listed:
        made: Any = generations[row["made"]]
        log_probs[:listed], indices[:listed] = made.log_probs[:listed], made.indices[:listed]
    return log_probs, indices


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """What :func:`write_jsonl` wrote."""
    return [json.loads(line) for line in read_lines(path)]


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line, all of them or none."""
    write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))
