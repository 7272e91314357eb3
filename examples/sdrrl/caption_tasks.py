"""Small bilingual tasks on photograph captions: questions whose answers follow from the words, and completions.

A task is ``{"id", "kind", LANGUAGE: {"instruction", "input", "output"}, ...}``; ``kind`` says how its answer is scored,
"" stands for any other instruction.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from transfer import Row

from fused_kd.training.data import load_pairs
from fused_kd.training.score import score

LANGUAGES = ("en", "de")
COMPLETE = "completion"
QUESTIONS = {
    "colour": {"en": "Which colour is mentioned?", "de": "Welche Farbe wird genannt?"},
    "number": {"en": "How many are there?", "de": "Wie viele sind es?"},
    "animal": {"en": "Which animal is it?", "de": "Welches Tier ist es?"},
    "place": {"en": "Is it indoors or outdoors?", "de": "Ist es drinnen oder draußen?"},
    "person": {"en": "Who is in the picture?", "de": "Wer ist auf dem Bild?"},
}
COMPLETION = {"en": "Complete the caption.", "de": "Vervollständige die Bildbeschreibung."}
_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")


def _read_lexicon() -> tuple[dict[tuple[str, str, str], str], dict[tuple[str, str], dict[str, str]]]:
    """The answer to (kind, concept, language), a concept's first word; and of (kind, language) each word's concept."""
    answers: dict[tuple[str, str, str], str] = {}
    concepts: dict[tuple[str, str], dict[str, str]] = {}
    _, *lines = Path(__file__).with_name("caption_words.tsv").read_text(encoding="utf-8").splitlines()
    for line in lines:
        kind, concept, *columns = line.split("\t")
        for language, column in zip(LANGUAGES, columns, strict=True):
            words = column.split()
            answers[kind, concept, language] = words[0]
            concepts.setdefault((kind, language), {}).update((word.lower(), concept) for word in words)
    return answers, concepts


ANSWERS, _CONCEPTS = _read_lexicon()


def concept_of(kind: str, caption: str, language: str) -> str | None:
    """What a caption says of ``kind``: the one concept of it that is named, None where none is or several are."""
    words = _WORD.findall(caption)
    if language == "de":  # a boy has a capital, the adjective "young" has none
        words = [word for word in words if word not in ("jungen", "junge")]
    table = _CONCEPTS[kind, language]
    named = {table[word.lower()] for word in words if word.lower() in table}
    return named.pop() if len(named) == 1 else None


@dataclass
class CaptionStudy:
    """How parallel captions become tasks, a base model's texts, a translator's pairs and parallel sentences.

    The training captions are shuffled once; the transfer set, the parallel sentences and the base model's target
    language have captions of their own, the base model's source language and the translator share the others.

    Raises:
        ValueError: a number out of range.
    """

    transfer_captions: int = 3000  # that instructions are asked about
    questions: int = 220  # of each kind asked about them; answers are drawn in turn, so that rare ones count
    completions: int = 300  # captions among them to complete
    held_out: float = 0.1  # of these instructions, the share kept for validation, in (0, 1)
    base_questions: int = 2000  # of each kind that the base model is trained on, in the source language
    base_completions: int = 2000
    base_source: int = 4000  # captions that it reads as plain text
    base_target: int = 2000
    base_parallel: int = 0  # captions of the others that it reads as one text in both languages, in either order
    translator_pairs: int | None = None  # captions that the translator is trained on; None takes all others
    term_repeats: int = 40  # times that the translator sees each question and each answer word in both languages
    test_questions: int = 100  # of each kind, about captions of other files than `train`
    test_completions: int = 200
    test_files: list[str] = field(default_factory=lambda: [f"test_{year}_flickr" for year in (2016, 2017, 2018)])

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be in (0, 1), got {self.held_out!r}")
        for name, value in asdict(self).items():
            least = 0 if name == "completions" or name.startswith("base_") else 1
            if isinstance(value, int) and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")


def caption_files(
    captions: str, study: CaptionStudy, parallel: int, languages: tuple[str, str]
) -> dict[str, Sequence[Row]]:
    """The rows of a small study.

    Returns:
        ``instructions`` and ``validation`` (tasks about the transfer captions), ``dev`` and ``test`` (tasks about
        held-out captions), ``base`` (texts: an instruction with its output, or a caption alone), ``translator`` and
        ``parallel`` (pairs).

    Args:
        captions: a folder with ``train``, ``val`` and ``test...`` files of ``{"en": ..., "de": ...}`` rows.
        parallel: sentence pairs for translation instructions.

    Raises:
        ValueError: languages that the lexicon lacks, a missing folder or file, a row without one of the languages,
            too few captions.
    """
    source, target = languages
    if set(languages) != set(LANGUAGES):
        raise ValueError(f"captions need the two languages {' and '.join(LANGUAGES)}, got {source}-{target}")
    if not Path(captions).expanduser().is_dir():
        raise ValueError(
            f"captions={captions!r}: no such folder; give Multi30k's JSON lines (train, val and test files of "
            'rows such as {"en": ..., "de": ...}) as --captions PATH'
        )

    def read(split: str) -> list[dict[str, str]]:
        pairs = load_pairs(captions, split, f"{source}-{target}")
        return [{source: pair.source, target: pair.target} for pair in pairs]

    everything = read("train")
    train = list(everything)
    random.Random(0).shuffle(train)
    sizes = {"transfer": study.transfer_captions, "parallel": parallel, "target": study.base_target}
    if sum(sizes.values()) >= len(train):
        raise ValueError(f"captions has {len(train)} training captions, too few for {sizes} and some more")
    parts: dict[str, list[dict[str, str]]] = {}
    for name, size in sizes.items():
        parts[name], train = train[:size], train[size:]
    # a caption that is in training in either language is no test
    seen = {text for row in everything for text in row.values()}
    dev, test = (
        [row for split in splits for row in read(split) if seen.isdisjoint(row.values())]
        for splits in (("valid",), study.test_files)
    )

    ask = partial(make_tasks, languages)
    tasks = ask("transfer", parts["transfer"], study.questions, study.completions)
    held = max(1, round(study.held_out * len(tasks)))
    plain = [row[source] for row in train[: study.base_source]] + [row[target] for row in parts["target"]]
    plain += [f"{row[a]}\n{row[b]}" for row in train[: study.base_parallel] for a, b in (languages, languages[::-1])]
    terms = [*QUESTIONS.values(), COMPLETION]
    concepts = dict.fromkeys((kind, concept) for kind, concept, _ in ANSWERS)
    terms += [{language: ANSWERS[(*concept, language)] for language in languages} for concept in concepts]
    return {
        "instructions": tasks[held:],
        "validation": tasks[:held],
        "dev": ask("dev", dev, study.test_questions, study.test_completions),
        "test": ask("test", test, study.test_questions, study.test_completions),
        "base": [task[source] for task in ask("base", train, study.base_questions, study.base_completions)]
        + [{"instruction": "", "input": "", "output": text} for text in plain],
        "translator": [*train[: study.translator_pairs], *(terms * study.term_repeats)],
        "parallel": parts["parallel"],
    }


def make_tasks(
    languages: tuple[str, str], name: str, captions: Sequence[Mapping[str, str]], questions: int, completions: int
) -> list[Row]:
    """Questions (so many of each kind) and completions about captions, in random order; ``name`` begins their ids.

    A question is asked where both languages' captions name one and the same concept of its kind; the answers of a kind
    are drawn in turn. A completion is the second half of a caption's words, the longer first half is given; captions
    below six words are not split.
    """
    rng = random.Random(f"0 {name}")
    tasks: list[Row] = []
    for kind, question in QUESTIONS.items():
        pools: dict[str, list[int]] = {}
        for number, caption in enumerate(captions):
            concepts = {concept_of(kind, caption[language], language) for language in languages}
            if len(concepts) == 1 and (concept := concepts.pop()) is not None:
                pools.setdefault(concept, []).append(number)
        for number, concept in _in_turn(pools, questions, rng):
            task: Row = {"id": f"{name}-{kind}-{number}", "kind": kind}
            for language in languages:
                texts = question[language], captions[number][language], ANSWERS[kind, concept, language]
                task[language] = dict(zip(("instruction", "input", "output"), texts, strict=True))
            tasks.append(task)
    long = [n for n, caption in enumerate(captions) if min(len(caption[c].split()) for c in languages) >= 6]
    for number in rng.sample(long, min(completions, len(long))):
        task = {"id": f"{name}-{COMPLETE}-{number}", "kind": COMPLETE}
        for language in languages:
            words = captions[number][language].split()
            half = (len(words) + 1) // 2
            given, rest = " ".join(words[:half]), " ".join(words[half:])
            task[language] = {"instruction": COMPLETION[language], "input": given, "output": rest}
        tasks.append(task)
    rng.shuffle(tasks)
    return tasks


def _in_turn(pools: Mapping[str, list[int]], most: int, rng: random.Random) -> Iterator[tuple[int, str]]:
    """Up to ``most`` of the pools' members, one of each pool after another; a pool that is empty drops out."""
    left = {concept: rng.sample(pool, len(pool)) for concept, pool in sorted(pools.items())}
    while most and left:
        for concept in list(left)[:most]:
            yield left[concept].pop(), concept
            most -= 1
            if not left[concept]:
                del left[concept]


def score_answers(tasks: Sequence[Mapping[str, Any]], answers: Sequence[str], language: str) -> dict[str, Any]:
    """Scores of the answers to ``tasks`` in one language, 0-100.

    ``accuracy`` is the mean over kinds of ``accuracy_by_kind``, the share of answers equal to the expected one;
    ``hits`` a digit a question of each kind, 1 where it is right; ``elsewhere`` the share, alike averaged, that is the
    right answer in another language of the task and not in this one; ``majority`` the accuracy of always giving each
    kind's commonest answer. ``chrf``, ``bleu`` and ``exact`` are of tasks without a kind and of completions. What there
    are no tasks for is None.
    """
    hits: dict[str, list[float]] = {}
    elsewhere: dict[str, list[float]] = {}
    expected: dict[str, Counter[str]] = {}
    free: list[tuple[str, str]] = []
    for task, answer in zip(tasks, answers, strict=True):
        kind, wanted, got = task["kind"], normalized(task[language]["output"]), normalized(answer)
        if kind in ("", COMPLETE):
            free.append((" ".join(answer.split()), " ".join(task[language]["output"].split())))
            continue
        others = {normalized(text["output"]) for key, text in task.items() if key not in ("id", "kind", language)}
        hits.setdefault(kind, []).append(100.0 * (got == wanted))
        elsewhere.setdefault(kind, []).append(100.0 * (got != wanted and got in others))
        expected.setdefault(kind, Counter())[wanted] += 1
    scores: dict[str, Any] = {
        "hits": {kind: "".join("01"[hit > 0] for hit in values) for kind, values in sorted(hits.items())},
        "accuracy": fmean(map(fmean, hits.values())) if hits else None,
        "accuracy_by_kind": {kind: fmean(values) for kind, values in sorted(hits.items())},
        "elsewhere": fmean(map(fmean, elsewhere.values())) if hits else None,
        "majority": fmean(100 * max(c.values()) / c.total() for c in expected.values()) if hits else None,
        "questions": sum(map(len, hits.values())),
        "completions": len(free),
        "chrf": None,
        "bleu": None,
    }
    if free:
        made, references = map(list, zip(*free, strict=True))
        exact = fmean(100.0 * (normalized(a) == normalized(b)) for a, b in free)
        scores |= asdict(score(made, references)) | {"exact": exact}
    return scores


def normalized(answer: str) -> str:
    """What is compared: single spaces, no closing punctuation, no case."""
    return " ".join(answer.split()).rstrip(".!?").casefold()
