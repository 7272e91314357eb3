"""Small bilingual tasks on photograph captions: questions whose answers follow from the words, and completions."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fused_kd.training.data.instructions import Instruction
from fused_kd.training.data.sources import read_rows
from fused_kd.training.sdrrl.caption_words import ANSWERS, COMPLETION, KINDS, LANGUAGES, QUESTIONS, concept_of
from fused_kd.training.sdrrl.rows import Task, dump, write_rows

COMPLETE = "completion"


@dataclass(frozen=True)
class Captions:
    """How parallel captions become tasks, a base model's texts, a translator's pairs and parallel sentences.

    The training captions are shuffled once; the transfer set, the parallel sentences and the base model's target
    language have captions of their own, the base model's source language and the translator share the others.

    Args:
        data: a folder with ``train``, ``val`` and ``test...`` files of ``{"en": ..., "de": ...}`` rows.
        transfer: captions that instructions are asked about.
        per_kind: questions of each kind asked about them; the answers are drawn in turn, so that rare ones count.
        completions: captions among them to complete.
        valid: of these instructions, the share kept for validation, in (0, 1).
        parallel: sentence pairs for translation instructions.
        base_per_kind, base_completions: tasks in the source language that the base model is trained on.
        base_source, base_target: captions that it reads as plain text, in the two languages.
        translator: caption pairs that the translator is trained on; None takes all others.
        term_repeats: times that the translator sees each question and each answer word in both languages.
        test_per_kind, test_completions: tasks of a test, about captions of other files than ``train``; those that are
            in ``train`` as well, in either language, are left out.
        tests: files of the test, by their stems.
        seed: of every draw.
    """

    data: str
    transfer: int = 3000
    per_kind: int = 220
    completions: int = 300
    valid: float = 0.1
    parallel: int = 1000
    base_per_kind: int = 2000
    base_completions: int = 2000
    base_source: int = 4000
    base_target: int = 2000
    translator: int | None = None
    term_repeats: int = 40
    test_per_kind: int = 100
    test_completions: int = 200
    tests: tuple[str, ...] = ("test_2016_flickr", "test_2017_flickr", "test_2018_flickr")
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.valid < 1:
            raise ValueError(f"captions.valid must be in (0, 1), got {self.valid!r}")
        least = {"seed": 0, "completions": 0, "base_completions": 0, "base_source": 0, "base_target": 0}
        for name, value in asdict(self).items():
            if isinstance(value, int) and value < least.get(name, 1):
                raise ValueError(f"captions.{name} must be at least {least.get(name, 1)}, got {value!r}")


def write_captions(folder: Path, captions: Captions, source: str, target: str) -> dict[str, int]:
    """The files of a small study, JSON lines in ``folder``; returns the rows of each.

    ``instructions`` and ``validation`` (tasks about the transfer captions), ``dev`` and ``test`` (tasks about held-out
    captions), ``base`` (texts: an instruction with its output, or a caption alone), ``translator`` and ``parallel``
    (pairs).

    Raises:
        ValueError: languages that the lexicon lacks, a missing file, too few captions.
    """
    for language in (source, target):
        if language not in LANGUAGES or source == target:
            raise ValueError(f"captions need two languages of {', '.join(LANGUAGES)}, got {source}-{target}")
    everything = read_captions(captions.data, "train", (source, target))
    train = list(everything)
    random.Random(captions.seed).shuffle(train)
    sizes = {"transfer": captions.transfer, "parallel": captions.parallel, "target": captions.base_target}
    if sum(sizes.values()) >= len(train):
        raise ValueError(f"captions.data has {len(train)} training captions, too few for {sizes} and some more")
    parts: dict[str, list[dict[str, str]]] = {}
    for name, size in sizes.items():
        parts[name], train = train[:size], train[size:]
    draw = (captions.per_kind, captions.completions, captions.seed)
    tasks = make_tasks(parts["transfer"], *draw, (source, target), "transfer")
    held = max(1, round(captions.valid * len(tasks)))
    seen = {text for row in everything for text in row.values()}
    dev, tests = (
        [row for name in names for row in read_captions(captions.data, name, (source, target))]
        for names in (("valid",), captions.tests)
    )
    dev, tests = ([row for row in rows if seen.isdisjoint(row.values())] for rows in (dev, tests))
    tests_draw = (captions.test_per_kind, captions.test_completions, captions.seed)
    base = make_tasks(train, captions.base_per_kind, captions.base_completions, captions.seed, (source, target), "base")
    texts: list[dict[str, Any]] = [dump(task)[source] for task in base]
    texts += [{"instruction": "", "input": "", "output": row[source]} for row in train[: captions.base_source]]
    texts += [{"instruction": "", "input": "", "output": row[target]} for row in parts["target"]]
    terms = [
        {language: words[language] for language in (source, target)} for words in (*QUESTIONS.values(), COMPLETION)
    ]
    terms += [
        {language: ANSWERS[kind, concept, language] for language in (source, target)}
        for kind, concept, language in ANSWERS
        if language == source
    ]
    files: dict[str, Sequence[Any]] = {
        "instructions": [dump(task) for task in tasks[held:]],
        "validation": [dump(task) for task in tasks[:held]],
        "dev": [dump(task) for task in make_tasks(dev, *tests_draw, (source, target), "dev")],
        "test": [dump(task) for task in make_tasks(tests, *tests_draw, (source, target), "test")],
        "base": texts,
        "translator": [*train[: captions.translator], *(terms * captions.term_repeats)],
        "parallel": parts["parallel"],
    }
    write_rows(folder, files)
    return {name: len(rows) for name, rows in files.items()}


def read_captions(data: str | Path, split: str, languages: tuple[str, str]) -> list[dict[str, str]]:
    """The captions of a file in these languages, white space made single.

    Raises:
        ValueError: no such folder or file (with how to give it), a row without one of the languages.
    """
    if not Path(data).expanduser().is_dir():
        raise ValueError(
            f"captions.data={str(data)!r}: no such folder; give Multi30k's JSON lines (train, val and test files of "
            'rows such as {"en": ..., "de": ...}) as captions.data=PATH'
        )
    found = []
    for place, value in read_rows(data, split, lambda value: None):
        texts = {language: value.get(language) for language in languages} if isinstance(value, dict) else {}
        lines = {language: " ".join(text.split()) for language, text in texts.items() if isinstance(text, str)}
        if len(lines) < len(languages) or not all(lines.values()):
            raise ValueError(f"{place}: expected texts for {' and '.join(languages)}, got {str(value)[:80]}")
        found.append(lines)
    return found


def make_tasks(
    captions: Sequence[Mapping[str, str]],
    per_kind: int,
    completions: int,
    seed: int,
    languages: tuple[str, str],
    name: str,
) -> list[Task]:
    """Questions and completions about captions, in random order.

    A question is asked where both languages' captions name one and the same concept of its kind; the answers of a kind
    are drawn in turn. A completion is the second half of a caption's words, the longer first half is given; captions
    below six words are not split.
    """
    rng = random.Random(f"{seed} {name}")
    tasks: list[Task] = []
    for kind in KINDS:
        pools: dict[str, list[int]] = {}
        for number, caption in enumerate(captions):
            concepts = {concept_of(kind, caption[language], language) for language in languages}
            if len(concepts) == 1 and (concept := concepts.pop()) is not None:
                pools.setdefault(concept, []).append(number)
        for number, concept in _in_turn(pools, per_kind, rng):
            texts = {
                language: Instruction(
                    QUESTIONS[kind][language], captions[number][language], ANSWERS[kind, concept, language]
                )
                for language in languages
            }
            tasks.append(Task(f"{name}-{kind}-{number}", kind, texts))
    long = [n for n, caption in enumerate(captions) if min(len(caption[c].split()) for c in languages) >= 6]
    for number in rng.sample(long, min(completions, len(long))):
        halves = {language: captions[number][language].split() for language in languages}
        texts = {
            language: Instruction(
                COMPLETION[language],
                " ".join(words[: (len(words) + 1) // 2]),
                " ".join(words[(len(words) + 1) // 2 :]),
            )
            for language, words in halves.items()
        }
        tasks.append(Task(f"{name}-{COMPLETE}-{number}", COMPLETE, texts))
    rng.shuffle(tasks)
    return tasks


def _in_turn(pools: Mapping[str, list[int]], most: int, rng: random.Random) -> Iterator[tuple[int, str]]:
    """Up to ``most`` of the pools' members, one of each pool after another; a pool that is empty drops out."""
    left = {concept: rng.sample(pool, len(pool)) for concept, pool in sorted(pools.items())}
    while most and left:
        for concept in list(left):
            if not most:
                return
            yield left[concept].pop(), concept
            most -= 1
            if not left[concept]:
                del left[concept]
