"""The transfer set: answers and their translations, the filter, the four combinations, and what each arm trains on."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fused_kd.training.data.instructions import Instruction
from fused_kd.training.data.pairs import language_name
from fused_kd.training.sdrrl.code_switch import check_share, code_switch
from fused_kd.training.sdrrl.dictionary import Dictionary
from fused_kd.training.sdrrl.rows import Task, TrainingRow

COMBINATIONS = ("ss", "st", "ts", "tt")
FIELDS = ("instruction", "input", "output")


@dataclass(frozen=True)
class Candidate:
    """A task in both languages, before the filter.

    Args:
        source: question and answer in the rich language; the answer may be the model's own.
        target: their translations, "" where the translator gave none.
        scores: of the fields of ``source`` that have a text; none where a translation is missing.
    """

    id: str
    source: Instruction
    target: Instruction
    scores: Mapping[str, float]

    @property
    def quality(self) -> float | None:
        """The least of the scores: question and answer must both be good. None for a pair without scores."""
        return min(self.scores.values()) if self.scores else None


@dataclass(frozen=True)
class Arm:
    """What a model is trained on; the defaults are the whole recipe, and each field takes a part away.

    Args:
        answers: the model's "own", those "given" with the instructions, or with "reference" the instructions' own text
            in the target language as well (nothing is translated then, and nothing filtered).
        combinations: of question and answer language, s(ource) or t(arget), such as "ts": asked in the target
            language, answered in the source language.
        quality_filter: keep good translations alone.
        code_switch: switch words of the questions.
        parallel: add translation instructions.

    Raises:
        ValueError: no combination, an unknown one, or one twice.
    """

    answers: Literal["own", "given", "reference"] = "own"
    combinations: tuple[str, ...] = COMBINATIONS
    quality_filter: bool = True
    code_switch: bool = True
    parallel: bool = True

    def __post_init__(self) -> None:
        known = set(COMBINATIONS)
        if not self.combinations or len({*self.combinations} & known) != len(self.combinations):
            raise ValueError(
                f"combinations={self.combinations!r}: expected some of {', '.join(COMBINATIONS)}, each once"
            )


@dataclass(frozen=True)
class Wording:
    """The instructions that name a language, each by ``"FROM-TO"``; English where there is none.

    Args:
        answer_in: put after a question in FROM whose answer is in TO.
        translate: above a sentence in FROM.
    """

    answer_in: dict[str, str] = field(default_factory=dict)
    translate: dict[str, str] = field(default_factory=dict)

    def answer(self, asked: str, answered: str) -> str:
        """The language instruction; "" where question and answer are in one language."""
        if asked == answered:
            return ""
        return self.answer_in.get(f"{asked}-{answered}", f"Answer in {language_name(answered)}.")

    def translation(self, source: str, target: str) -> str:
        """The instruction above a sentence to translate."""
        plain = f"Translate the following text from {language_name(source)} to {language_name(target)}."
        return self.translate.get(f"{source}-{target}", plain)


@dataclass(frozen=True)
class Switching:
    """Code-switching of questions.

    Args:
        dictionaries: of both directions, such as ``{"en-de": ..., "de-en": ...}``.
        p, seed: as of :func:`fused_kd.training.sdrrl.code_switch.code_switch`.
    """

    dictionaries: Mapping[str, Dictionary] = field(repr=False)
    p: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(self.p)


def answered(
    tasks: Sequence[Task], answers: Sequence[str | None], source: str
) -> tuple[dict[str, Instruction], Counter[str]]:
    """The tasks in the rich language with other answers, by id, and counts: ``asked``, ``unanswered``.

    An answer of None (no end) or of nothing but space is none.
    """
    found = {
        task.id: task.texts[source]._replace(output=answer.strip())
        for task, answer in zip(tasks, answers, strict=True)
        if answer is not None and answer.strip()
    }
    return found, Counter(asked=len(tasks), unanswered=len(tasks) - len(found))


def kept(candidates: Sequence[Candidate], tau: float | None) -> tuple[list[Candidate], Counter[str]]:
    """Candidates whose quality is at least ``tau`` (None: any), and counts.

    Counted are ``candidates``, ``untranslated`` (no translation of a text: never kept), ``below_tau`` and ``kept``.
    """
    counts: Counter[str] = Counter(candidates=len(candidates), untranslated=0, below_tau=0, kept=0)
    good = []
    for candidate in candidates:
        quality = candidate.quality
        if quality is None:
            counts["untranslated"] += 1
        elif tau is not None and quality < tau:
            counts["below_tau"] += 1
        else:
            counts["kept"] += 1
            good.append(candidate)
    return good, counts


def combine(
    candidates: Sequence[Candidate],
    combinations: Sequence[str],
    languages: tuple[str, str],
    wording: Wording,
    switching: Switching | None = None,
) -> list[TrainingRow]:
    """Every candidate in each combination of question and answer language, with switched questions.

    The language instruction comes after the question, is in the question's language, and is not switched; nor are
    answers. ``languages`` are source and target.
    """
    rows = []
    for candidate in candidates:
        sides = {"s": (languages[0], candidate.source), "t": (languages[1], candidate.target)}
        for combination in combinations:
            (asked, question), (answer_language, answer) = sides[combination[0]], sides[combination[1]]
            parts = {"instruction": question.instruction, "input": question.input}
            if switching is not None:
                other = languages[1] if asked == languages[0] else languages[0]
                dictionary = switching.dictionaries[f"{asked}-{other}"]
                parts = {
                    name: code_switch(
                        text, dictionary, p=switching.p, seed=switching.seed, key=f"{candidate.id} {combination} {name}"
                    )
                    for name, text in parts.items()
                }
            instruction = " ".join(filter(None, (parts["instruction"], wording.answer(asked, answer_language))))
            rows.append(TrainingRow(candidate.id, combination, Instruction(instruction, parts["input"], answer.output)))
    return rows


def translation_rows(
    pairs: Sequence[Mapping[str, str]], languages: tuple[str, str], wording: Wording
) -> list[TrainingRow]:
    """Each parallel sentence as a translation instruction, in both directions."""
    rows = []
    for number, pair in enumerate(pairs):
        for source, target in (languages, languages[::-1]):
            instruction = Instruction(wording.translation(source, target), pair[source], pair[target])
            rows.append(TrainingRow(f"parallel-{number}", f"{source}-{target}", instruction))
    return rows


def fill(rows: Sequence[Any], count: int, seed: int) -> list[Any]:
    """Exactly ``count`` rows in random order: all of them as often as they fit in, then a part of them.

    No row comes more than once more often than another. So arms with fewer rows of their own train as many steps.

    Raises:
        ValueError: no rows, or ``count`` below 1.
    """
    if not rows or count < 1:
        raise ValueError(f"{count} rows of {len(rows)}: expected at least one of each")
    rng = random.Random(seed)
    filled = list(rows) * (count // len(rows)) + rng.sample(list(rows), count % len(rows))
    rng.shuffle(filled)
    return filled
