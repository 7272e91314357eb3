"""Scores, and the paired bootstrap against an independent one in plain Python."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence

import pytest

from fused_kd.training.score import paired_bootstrap, score, significant_over_seeds, similarity

sacrebleu = pytest.importorskip("sacrebleu")

TEXTS = ["A dog sees the cat.", "Ein Hund sieht die Katze.", "The old man sleeps in the garden today."]
WORDS = ("the", "old", "dog", "sees", "a", "small", "cat", "in", "our", "green", "garden", "while", "they", "sleep")


def test_scores_of_known_text() -> None:
    same = score(TEXTS, TEXTS)
    assert same.bleu == pytest.approx(100) and same.chrf == pytest.approx(100)
    assert score(["", ""], TEXTS[:2]).bleu == 0
    # by hand: 5 of 6 words, 3 of 5, 2 of 4, 1 of 3 n-grams match, no brevity penalty
    one = score(["the cat sat on a mat"], ["the cat sat on the mat"])
    assert one.bleu == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    # 13a splits the full stop off
    assert score(["Der Hund schläft im Garten ."], ["Der Hund schläft im Garten."]).bleu == pytest.approx(100)
    version = sacrebleu.__version__
    assert one.bleu_signature == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{version}"
    assert one.chrf_signature == f"nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{version}"
    assert one.chrf == pytest.approx(
        sacrebleu.corpus_chrf(["the cat sat on a mat"], [["the cat sat on the mat"]]).score
    )
    assert "tok:char" in score(["你好"], ["你好"], tokenize="char").bleu_signature


def test_similarity_to_the_teachers_output() -> None:
    teacher = ["the cat sat on the mat", "a dog", "no", ""]
    same = similarity(teacher, teacher)
    assert (same.bleu, same.chrf, same.equal) == (pytest.approx(100), pytest.approx(100), 1)
    student = ["the cat sat on a mat", "a dog", "No", ""]
    made = similarity(student, teacher)
    assert made.equal == 0.5 and dataclasses.asdict(made) == {
        **dataclasses.asdict(score(student, teacher)),
        "equal": 0.5,
    }
    # the teacher is the reference: the other way round is another number
    assert similarity(["the cat sat on the"], teacher[:1]).bleu == pytest.approx(100 * math.e ** (1 - 6 / 5))


def test_bad_texts() -> None:
    for made, references, error, message in (
        (["a", "b"], ["a"], ValueError, "2 hypotheses for 1 references"),
        ([], [], ValueError, "empty"),
        ("abc", ["a", "b", "c"], TypeError, "hypotheses"),
        (["a"], [None], TypeError, "references"),
    ):
        with pytest.raises(error, match=message):
            score(made, references)
    with pytest.raises(ValueError, match="2 hypotheses for 1 teacher_hypotheses"):
        similarity(["a", "b"], ["a"])


def spoil(texts: Sequence[str], share: float, seed: int) -> list[str]:
    """Another word in place of that share of the words."""
    rng = random.Random(seed)
    return [" ".join("wrong" if rng.random() < share else word for word in text.split()) for text in texts]


RNG = random.Random(1)
REFERENCES = [" ".join(RNG.choices(WORDS, k=RNG.randint(8, 14))) for _ in range(60)]
SYSTEMS = {
    "base": spoil(REFERENCES, 0.20, 2),
    "better": spoil(REFERENCES, 0.05, 3),
    "alike": spoil(REFERENCES, 0.20, 8),
    "same": spoil(REFERENCES, 0.20, 2),
}


def bootstrap(made: list[str], other: list[str], metric: Callable, samples: int = 400) -> tuple[float, float]:
    """The difference, and how often a resampled one strays from the mean by more than it."""
    rng, real = random.Random(9), metric(made, REFERENCES) - metric(other, REFERENCES)
    drawn = []
    for _ in range(samples):
        chosen = rng.choices(range(len(made)), k=len(made))
        a, b, references = ([texts[i] for i in chosen] for texts in (made, other, REFERENCES))
        drawn.append(abs(metric(a, references) - metric(b, references)))
    mean = sum(drawn) / samples
    return real, (sum(value - mean > abs(real) for value in drawn) + 1) / (samples + 1)


def test_paired_bootstrap_is_what_it_says() -> None:
    found = {(test.system, test.metric): test for test in paired_bootstrap(SYSTEMS, REFERENCES, "base", samples=400)}
    assert list(found) == [(name, metric) for name in ("better", "alike", "same") for metric in ("bleu", "chrf")]
    for name in ("better", "alike"):
        delta, p = bootstrap(SYSTEMS[name], SYSTEMS["base"], lambda a, b: score(a, b).bleu)
        test = found[name, "bleu"]
        assert test.delta == pytest.approx(delta) and test.score == pytest.approx(score(SYSTEMS[name], REFERENCES).bleu)
        assert test.p_value == pytest.approx(p, abs=0.08)
        assert abs(test.mean - test.score) < 2 and 0 < test.ci < 15 and "bs:400|seed:12345" in test.signature
    assert found["better", "chrf"].p_value < 0.05 < found["alike", "chrf"].p_value
    assert found["same", "bleu"].p_value == found["same", "chrf"].p_value == 1.0
    again = paired_bootstrap({n: SYSTEMS[n] for n in ("base", "alike")}, REFERENCES, "base", samples=400, seed=7)
    assert again[0].p_value != found["alike", "bleu"].p_value and "seed:7" in again[0].signature


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"baseline": "none"}, ValueError, "baseline='none': expected one of at least two systems"),
        ({"systems": {"base": SYSTEMS["base"]}}, ValueError, "at least two systems"),
        ({"systems": {**SYSTEMS, "short": ["a"]}}, ValueError, "1 systems"),
        ({"metrics": "bleu"}, ValueError, "metrics="),
        ({"metrics": ["ter"]}, ValueError, "metrics="),
        ({"samples": 0}, ValueError, "samples=0"),
        ({"seed": 0}, ValueError, "seed=0"),
        ({"samples": 1.0}, TypeError, "samples must be an int"),
    ],
)
def test_bad_comparisons(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        paired_bootstrap(**{"systems": SYSTEMS, "references": REFERENCES, "baseline": "base", **options})


def test_the_rule_over_seeds() -> None:
    assert significant_over_seeds([0.01, 0.04], [1.0, 0.2])
    assert not significant_over_seeds([0.01, 0.06], [1.0, 0.2])
    assert not significant_over_seeds([0.01, 0.01], [1.0, -0.2])
    for values, deltas in (([], []), ([0.1], [1.0, 2.0]), ([1.5], [1.0])):
        with pytest.raises(ValueError):
            significant_over_seeds(values, deltas)
