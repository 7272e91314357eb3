"""Scores of answers in one language: accuracy of questions, chrF and BLEU of free text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from fused_kd.training.evaluation.evaluate import score
from fused_kd.training.sdrrl.rows import Task
from fused_kd.training.sdrrl.tasks import COMPLETE


def normalized(answer: str) -> str:
    """What is compared: single spaces, no closing punctuation, no case."""
    return " ".join(answer.split()).rstrip(".!?").casefold()


def score_answers(tasks: Sequence[Task], answers: Sequence[str], language: str) -> dict[str, Any]:
    """Scores of the answers to ``tasks`` in one language, 0-100.

    ``accuracy`` is the mean over kinds of ``accuracy_by_kind``, the share of answers equal to the expected one;
    ``elsewhere`` the share, alike averaged, that is the right answer in another language of the task and not in this
    one; ``majority`` the accuracy of always giving each kind's commonest answer. ``chrf`` and ``bleu`` are of tasks
    without a kind and of completions. What there are no tasks for is None.
    """
    asked = [task for task in tasks if task.kind not in ("", COMPLETE)]
    made = dict(zip((task.id for task in tasks), answers, strict=True))
    by_kind: dict[str, list[float]] = {}
    elsewhere: dict[str, list[float]] = {}
    expected: dict[str, Counter[str]] = {}
    for task in asked:
        wanted, got = normalized(task.texts[language].output), normalized(made[task.id])
        others = {normalized(text.output) for other, text in task.texts.items() if other != language}
        by_kind.setdefault(task.kind, []).append(100.0 * (got == wanted))
        elsewhere.setdefault(task.kind, []).append(100.0 * (got != wanted and got in others))
        expected.setdefault(task.kind, Counter())[wanted] += 1
    free = [task for task in tasks if task.kind in ("", COMPLETE)]
    scores: dict[str, Any] = {
        "accuracy": fmean(map(fmean, by_kind.values())) if asked else None,
        "accuracy_by_kind": {kind: fmean(values) for kind, values in sorted(by_kind.items())},
        "elsewhere": fmean(map(fmean, elsewhere.values())) if asked else None,
        "majority": fmean(100 * max(c.values()) / c.total() for c in expected.values()) if asked else None,
        "questions": len(asked),
        "completions": len(free),
        "chrf": None,
        "bleu": None,
    }
    if free:
        texts = [" ".join(made[task.id].split()) for task in free], [task.texts[language].output for task in free]
        found = score([*texts[0]], [" ".join(text.split()) for text in texts[1]])
        exact = fmean(100.0 * (normalized(a) == normalized(b)) for a, b in zip(*texts, strict=True))
        scores |= found.as_dict() | {"exact": exact}
    return scores
