"""Scores, and the paired bootstrap against an independent one in plain Python."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from fused_kd.training.score import paired_bootstrap, score, similarity

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


def statistics(made: str, wanted: str) -> list[int]:
    """Of a sentence: words made and wanted, then n-grams that match and n-grams for n of 1 to 4."""
    counts = [len(made.split()), len(wanted.split())]
    for n in range(1, 5):
        a, b = (Counter(zip(*(text.split()[i:] for i in range(n)), strict=False)) for text in (made, wanted))
        counts += [(a & b).total(), a.total()]
    return counts


def bleu(counts: np.ndarray) -> float:
    made, wanted, *ngrams = counts.sum(0)
    return float(100 * min(1, np.exp(1 - wanted / made)) * np.prod(np.divide(ngrams[::2], ngrams[1::2])) ** 0.25)


def bootstrap(system: str, other: str, samples: int = 1000) -> tuple[float, float]:
    """The difference in BLEU, and how often a resampled one strays from the mean by more than it."""
    counts = [np.array(list(map(statistics, SYSTEMS[name], REFERENCES))) for name in (system, other)]
    real, rng = bleu(counts[0]) - bleu(counts[1]), np.random.default_rng(9)
    drawn = np.empty(samples)
    for i, chosen in enumerate(rng.integers(len(REFERENCES), size=(samples, len(REFERENCES)))):
        drawn[i] = abs(bleu(counts[0][chosen]) - bleu(counts[1][chosen]))
    return real, ((drawn - drawn.mean() > abs(real)).sum() + 1) / (samples + 1)


def test_paired_bootstrap_is_what_it_says() -> None:
    found = {(test.system, test.metric): test for test in paired_bootstrap(SYSTEMS, REFERENCES, "base", samples=400)}
    assert list(found) == [(name, metric) for name in ("better", "alike", "same") for metric in ("bleu", "chrf")]
    for name in ("better", "alike"):
        delta, p = bootstrap(name, "base")
        test = found[name, "bleu"]
        assert test.delta == pytest.approx(delta) and test.score == pytest.approx(score(SYSTEMS[name], REFERENCES).bleu)
        assert test.p_value == pytest.approx(p, abs=0.06)
        assert abs(test.mean - test.score) < 2 and 0 < test.ci < 15 and "bs:400|seed:12345" in test.signature
    assert found["better", "chrf"].p_value < 0.05 < found["alike", "chrf"].p_value
    assert found["same", "bleu"].p_value == found["same", "chrf"].p_value == 1.0
    again = paired_bootstrap({n: SYSTEMS[n] for n in ("base", "alike")}, REFERENCES, "base", samples=400, seed=7)
    assert again[0].p_value != found["alike", "bleu"].p_value and "seed:7" in again[0].signature


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "none"}, "baseline='none': expected one of at least two systems"),
        ({"systems": {"base": SYSTEMS["base"]}}, "at least two systems"),
        ({"systems": {**SYSTEMS, "short": ["a"]}}, "1 systems"),
        ({"samples": 0}, "samples must be an int of at least 1, got 0"),
        ({"samples": 1.0}, "samples must be an int"),
        ({"seed": 0}, "seed must be an int of at least 1, got 0"),
    ],
)
def test_bad_comparisons(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(**{"systems": SYSTEMS, "references": REFERENCES, "baseline": "base", **options})
