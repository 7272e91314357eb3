"""Paired bootstrap against an independent one in plain Python, and the rule over seeds."""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from fused_kd.training.score import score
from fused_kd.training.score import Comparison, paired_bootstrap, significant_over_seeds

pytest.importorskip("sacrebleu")

WORDS = ("the", "old", "dog", "sees", "a", "small", "cat", "in", "our", "green", "garden", "while", "they", "sleep")


def corpus(count: int = 60) -> list[str]:
    rng = random.Random(1)
    return [" ".join(rng.choices(WORDS, k=rng.randint(8, 14))) for _ in range(count)]


def spoil(texts: Sequence[str], share: float, seed: int) -> list[str]:
    """Another word in place of that share of the words."""
    rng = random.Random(seed)
    return [" ".join("wrong" if rng.random() < share else word for word in text.split()) for text in texts]


REFERENCES = corpus()
SYSTEMS = {
    "base": spoil(REFERENCES, 0.20, 2),
    "better": spoil(REFERENCES, 0.05, 3),
    "alike": spoil(REFERENCES, 0.20, 8),
    "close": spoil(REFERENCES, 0.16, 56),
    "same": spoil(REFERENCES, 0.20, 2),
}


def grams(tokens: Sequence[str], order: int) -> Counter:
    return Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))


def counts(hypothesis: Sequence[str], reference: Sequence[str], orders: int) -> list[tuple[int, int, int]]:
    """n-grams of the hypothesis, of the reference, and common ones, for each order."""
    made = []
    for order in range(1, orders + 1):
        a, b = grams(hypothesis, order), grams(reference, order)
        made.append((a.total(), b.total(), (a & b).total()))
    return made


def bleu(rows: Sequence[list[tuple[int, int, int]]]) -> float:
    logs = [math.log(sum(r[n][2] for r in rows) / sum(r[n][0] for r in rows)) for n in range(4)]
    length, wanted = sum(r[0][0] for r in rows), sum(r[0][1] for r in rows)
    return 100 * min(1.0, math.exp(1 - wanted / length)) * math.exp(sum(logs) / 4)


def chrf(rows: Sequence[list[tuple[int, int, int]]]) -> float:
    hits = [sum(r[n][2] for r in rows) for n in range(6)]
    precision = sum(hit / sum(r[n][0] for r in rows) for n, hit in enumerate(hits)) / 6
    recall = sum(hit / sum(r[n][1] for r in rows) for n, hit in enumerate(hits)) / 6
    return 100 * 5 * precision * recall / (4 * precision + recall)


def bootstrap(
    a: Sequence, b: Sequence, metric: Callable[[Sequence], float], samples: int, rng: random.Random
) -> tuple[float, float]:
    """The difference a - b, and how often a resampled one strays from the mean by more than it."""
    real = metric(a) - metric(b)
    drawn = []
    for _ in range(samples):
        chosen = rng.choices(range(len(a)), k=len(a))
        drawn.append(abs(metric([a[i] for i in chosen]) - metric([b[i] for i in chosen])))
    mean = sum(drawn) / samples
    return real, (sum(value - mean > abs(real) for value in drawn) + 1) / (samples + 1)


SAMPLES = 400


@pytest.fixture(scope="module")
def comparisons() -> dict[tuple[str, str], Comparison]:
    made = paired_bootstrap(SYSTEMS, REFERENCES, "base", samples=SAMPLES)
    return {(entry.system, entry.metric): entry for entry in made}


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
@pytest.mark.parametrize("name", ["better", "alike", "close"])
def test_agrees_with_an_independent_bootstrap(comparisons, name: str, metric: str) -> None:
    split, orders, own = (str.split, 4, bleu) if metric == "bleu" else (lambda t: t.replace(" ", ""), 6, chrf)
    rows = {
        system: [counts(split(h), split(r), orders) for h, r in zip(SYSTEMS[system], REFERENCES, strict=True)]
        for system in (name, "base")
    }
    delta, p_value = bootstrap(rows[name], rows["base"], own, SAMPLES, random.Random(6))
    entry = comparisons[name, metric]
    assert entry.score == pytest.approx(own(rows[name])) and entry.baseline_score == pytest.approx(own(rows["base"]))
    assert entry.delta == pytest.approx(delta)
    # four standard errors of a difference of two estimated shares
    share = (p_value + entry.p_value) / 2
    assert abs(entry.p_value - p_value) < 4 * math.sqrt(2 * share * (1 - share) / SAMPLES) + 1 / SAMPLES
    assert (entry.p_value < 0.05) is (p_value < 0.05)


def test_conclusions(comparisons) -> None:
    assert list(comparisons) == [(name, metric) for name in list(SYSTEMS)[1:] for metric in ("bleu", "chrf")]
    for metric in ("bleu", "chrf"):
        assert comparisons["better", metric].p_value < 0.01 and comparisons["better", metric].delta > 10
        assert comparisons["alike", metric].p_value > 0.05
        same = comparisons["same", metric]
        assert (same.p_value, same.delta) == (1, 0)
    better = comparisons["better", "bleu"]
    # the interval of a score that is a mean over sentences, within what 400 samples tell
    assert better.mean == pytest.approx(better.score, abs=1) and 1 < better.ci < 10
    assert better.score == score(SYSTEMS["better"], REFERENCES).bleu
    assert better.as_dict()["p_value"] == better.p_value
    assert f"|bs:{SAMPLES}|seed:12345|" in better.signature and "tok:13a" in better.signature
    # a worse system is as significant as a better one
    (worse,) = paired_bootstrap(
        {"base": SYSTEMS["better"], "worse": SYSTEMS["base"]}, REFERENCES, "base", samples=SAMPLES, metrics=["bleu"]
    )
    assert worse.delta == -better.delta and worse.p_value == better.p_value


def test_the_seed_decides_whatever_the_environment(monkeypatch: pytest.MonkeyPatch, capfd, caplog) -> None:
    two = {name: SYSTEMS[name] for name in ("close", "base")}

    def run(seed: int, **options) -> list[Comparison]:
        return paired_bootstrap(two, REFERENCES, "base", samples=200, seed=seed, **options)

    first = run(7)
    for outside in ("none", "99", None):
        if outside is None:
            monkeypatch.delenv("SACREBLEU_SEED", raising=False)
        else:
            monkeypatch.setenv("SACREBLEU_SEED", outside)
        assert run(7) == first
        assert os.environ.get("SACREBLEU_SEED") == outside
    assert run(7, jobs=2) == first
    other = run(8)
    assert other[0].p_value != first[0].p_value and other[0].delta == first[0].delta
    assert "seed:8" in other[0].signature
    spaced = {name: [f"{text} ." for text in texts * 3] for name, texts in two.items()}
    paired_bootstrap(spaced, REFERENCES * 3, "base", samples=5)
    assert capfd.readouterr() == ("", "") and caplog.records == []


def test_tokenizer_and_metrics() -> None:
    (entry,) = paired_bootstrap(
        {"a": ["你好吗"], "b": ["你好"]}, ["你好"], "b", samples=5, metrics=["bleu"], tokenize="char"
    )
    assert entry.metric == "bleu" and "tok:char" in entry.signature
    made = paired_bootstrap(SYSTEMS, REFERENCES, "same", samples=5, metrics=["chrf", "bleu", "chrf"])
    assert [entry.metric for entry in made] == ["chrf", "bleu"] * 4
    assert [entry.system for entry in made[::2]] == ["base", "better", "alike", "close"]
    assert made[1].baseline_score == score(SYSTEMS["same"], REFERENCES).bleu


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"baseline": "bas"}, ValueError, "baseline='bas': expected one of at least two systems, got base, better"),
        ({"systems": {"base": REFERENCES}}, ValueError, "at least two systems"),
        ({"metrics": ["ter"]}, ValueError, "metrics="),
        ({"metrics": "bleu"}, ValueError, "metrics="),
        ({"metrics": []}, ValueError, "metrics="),
        ({"samples": 0}, ValueError, "samples=0"),
        ({"seed": 0}, ValueError, "seed=0"),
        ({"jobs": 0}, ValueError, "jobs=0"),
        ({"samples": 1e3}, TypeError, "samples must be an int"),
        ({"references": REFERENCES[1:]}, ValueError, r"60 systems\['base'\] for 59 references"),
        ({"references": "abc"}, TypeError, "references must be a list"),
        ({"systems": {"base": [], "better": []}, "references": []}, ValueError, "are empty"),
        ({"systems": {"base": ["a"], "better": [None]}, "references": ["a"]}, TypeError, r"systems\['better'\]"),
    ],
)
def test_bad_arguments(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {"systems": SYSTEMS, "references": REFERENCES, "baseline": "base", **changes}
    with pytest.raises(error, match=message):
        paired_bootstrap(**arguments)


@pytest.mark.parametrize(
    ("p_values", "deltas", "expected"),
    [
        ([0.01, 0.04, 0.001], [0.5, 0.2, 1.0], True),
        ([0.01, 0.04, 0.001], [-0.5, -0.2, -1.0], True),
        ([0.01, 0.05, 0.001], [0.5, 0.2, 1.0], False),
        ([0.01, 0.04, 0.001], [0.5, -0.2, 1.0], False),
        ([0.01, 0.0], [0.5, 0.0], False),
        ([0.049], [0.1], True),
    ],
)
def test_rule_over_seeds(p_values: list[float], deltas: list[float], expected: bool) -> None:
    assert significant_over_seeds(p_values, deltas) is expected
    assert significant_over_seeds(p_values, deltas, alpha=0.0) is False


def test_rule_over_seeds_rejects_nonsense() -> None:
    for p_values, deltas in (([], []), ([0.1], [1.0, 2.0])):
        with pytest.raises(ValueError, match="expected as many of both"):
            significant_over_seeds(p_values, deltas)
    with pytest.raises(ValueError, match=r"p_values must be in \[0, 1\], got 1.5"):
        significant_over_seeds([0.1, 1.5], [1, 1])
    with pytest.raises(ValueError, match=r"p_values .* got nan"):
        significant_over_seeds([math.nan], [1])
    with pytest.raises(ValueError, match="alpha"):
        significant_over_seeds([0.1], [1], alpha=5)
