"""Translations, their BLEU and chrF by sacrebleu, how close they are to a teacher's, and which differences count."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

from fused_kd.training.data import Pair, parse_direction
from fused_kd.training.generate import generate
from fused_kd.training.prompts import PromptTemplate, get_prompt
from fused_kd.training.stage import check_counts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALPHA = 0.05


@dataclass(frozen=True)
class Scores:
    """Corpus scores by sacrebleu, 0-100, higher is better, with the signatures that make them comparable."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str

    def as_dict(self) -> dict[str, float | str]:
        return asdict(self)


@dataclass(frozen=True)
class Similarity(Scores):
    """`Scores` of a student's output against the teacher's, and the share of equal sentences, 0-1."""

    equal: float


def score(hypotheses: Sequence[str], references: Sequence[str], *, tokenize: str = "13a") -> Scores:
    """BLEU and chrF (chrF2) of a corpus against one reference each.

    Args:
        hypotheses: translations, in the order of `references`; an empty string is a translation that scores
            nothing.
        references: the expected translations.
        tokenize: sacrebleu's tokenizer for BLEU; default ``"13a"`` (``"zh"``, ``"ja-mecab"``, ... where the
            target language has no spaces).

    Raises:
        ValueError: empty lists, lists of different length. TypeError: something other than lists of strings.
    """
    check_texts({"hypotheses": hypotheses, "references": references})

    from sacrebleu.metrics import BLEU, CHRF

    bleu, chrf = BLEU(tokenize=tokenize), CHRF()
    bleu_score = bleu.corpus_score(list(hypotheses), [list(references)]).score
    chrf_score = chrf.corpus_score(list(hypotheses), [list(references)]).score
    return Scores(bleu_score, chrf_score, str(bleu.get_signature()), str(chrf.get_signature()))


def similarity(hypotheses: Sequence[str], teacher_hypotheses: Sequence[str], *, tokenize: str = "13a") -> Similarity:
    """How close a student's translations are to those that the teacher itself makes of the same sources.

    BLEU and chrF with the teacher's hypotheses as references: high where distillation has taught the student to say
    what the teacher says, right or wrong. Arguments and errors as of `score`.
    """
    check_texts({"hypotheses": hypotheses, "teacher_hypotheses": teacher_hypotheses})
    scores = score(hypotheses, teacher_hypotheses, tokenize=tokenize)
    equal = sum(made == wanted for made, wanted in zip(hypotheses, teacher_hypotheses, strict=True))
    return Similarity(**asdict(scores), equal=equal / len(hypotheses))


def check_texts(named: Mapping[str, Sequence[str]]) -> None:
    """Raise unless these are lists of strings, not empty and of one length."""
    for name, texts in named.items():
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{name} must be a list of strings, one a sentence")
    counts = {name: len(texts) for name, texts in named.items()}
    if len(set(counts.values())) > 1:
        listed = " for ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"{listed}: expected as many of {'both' if len(counts) == 2 else 'each'}")
    if not all(counts.values()):
        raise ValueError(f"{' and '.join(counts)} are empty: expected at least one of each")


def translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    direction: str,
    template: PromptTemplate | str,
    **decoding: Any,
) -> tuple[list[str], Scores]:
    """Hypotheses for the sources of `pairs`, and their scores against the targets.

    ``direction`` and ``template`` as in training; ``decoding`` and errors are those of `generate` and `score`.
    """
    parse_direction(direction)
    template = get_prompt(template)
    prompts = [template.render(pair.source, direction) for pair in pairs]
    hypotheses = generate(model, tokenizer, prompts, **decoding)
    return hypotheses, score(hypotheses, [pair.target for pair in pairs])


@dataclass(frozen=True)
class Comparison:
    """A system against a baseline on one test set.

    Attributes:
        system, baseline, metric: names; the metric is "bleu" or "chrf".
        score, baseline_score: of the whole test set, 0-100.
        delta: ``score - baseline_score``.
        p_value: two-sided, at least 1 / (samples + 1); exactly 1 where both scores are the same.
        mean, ci: of the system's score over the resampled test sets, the mean and half the width of the
            interval that holds 95 % of them.
        signature: sacrebleu's, with the number of samples and the seed.
    """

    system: str
    baseline: str
    metric: str
    score: float
    baseline_score: float
    delta: float
    p_value: float
    mean: float
    ci: float
    signature: str


def paired_bootstrap(
    systems: Mapping[str, Sequence[str]],
    references: Sequence[str],
    baseline: str,
    *,
    samples: int = 1000,
    seed: int = 12345,
    tokenize: str = "13a",
) -> list[Comparison]:
    """Every other system against the baseline, by paired bootstrap resampling (Koehn 2004) of the sentences.

    All systems are scored on the same resampled test sets. The p-values cover the choice of test sentences, not that of
    a training seed; those of several seeds are not independent, as the seeds share the sentences.

    Args:
        systems: name -> hypotheses, in the order of `references`; at least the baseline and one more.
        references: one a sentence.
        baseline: a name in `systems`.
        samples: resampled test sets; default 1000.
        seed: of the resampling, at least 1 (sacrebleu takes 0 for no seed); default sacrebleu's own.
        tokenize: sacrebleu's tokenizer for BLEU; default ``"13a"``.

    Returns:
        One `Comparison` a system and metric, systems in their order.

    Raises:
        ValueError: unknown baseline, fewer than two systems, empty or unequal lists, samples or seed no int of at
            least 1. TypeError: something other than lists of strings.
    """
    check_counts(samples=samples, seed=seed)
    if baseline not in systems or len(systems) < 2:
        raise ValueError(
            f"baseline={baseline!r}: expected one of at least two systems, got {', '.join(systems) or 'none'}"
        )
    for name, hypotheses in systems.items():
        check_texts({f"systems[{name!r}]": hypotheses, "references": references})

    from sacrebleu.metrics import BLEU, CHRF
    from sacrebleu.significance import PairedTest

    ordered: list[tuple[str, Sequence[str]]] = [(baseline, list(systems[baseline]))]
    ordered += [(name, list(made)) for name, made in systems.items() if name != baseline]
    # force: no warning for toy text whose full stops stand apart
    metrics: dict[str, Any] = {"bleu": BLEU(tokenize=tokenize, force=True), "chrf": CHRF()}
    with mock.patch.dict(os.environ, SACREBLEU_SEED=str(seed)):  # sacrebleu takes it from there alone
        signatures, results = PairedTest(ordered, metrics, [list(references)], "bs", n_samples=samples)()
    # sacrebleu renames the metrics (chrF2) and keeps their order
    named = zip(metrics, signatures, strict=True)
    columns: list[Any] = [(metric, results[key], str(signatures[key])) for metric, key in named]
    found = []
    for position, (name, _) in enumerate(ordered[1:], start=1):
        for metric, column, signature in columns:
            own, base = column[position], float(column[0].score)
            delta = float(own.score) - base
            # sacrebleu counts resampled differences beyond the real one, of which equal systems have none: p 0.001
            p_value = float(own.p_value) if delta else 1.0
            spread = float(own.mean), float(own.ci)
            found.append(Comparison(name, baseline, metric, base + delta, base, delta, p_value, *spread, signature))
    return found


def bootstrap_by_class(
    differences: Mapping[str, Any], seeds: Sequence[Any], *, samples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """The mean over classes of differences between two systems, in points, and its interval over items.

    Args:
        differences: class -> array (seeds, items) of what one system has more than the other, of the same items.
        seeds: names of the first axis.
        samples: resampled test sets; default 10,000. seed: of the resampling.

    Returns:
        ``difference``; ``low`` and ``high``, 95 % of it over items drawn again within their classes, the same ones for
        every seed; ``by_seed``.
    """
    import numpy as np

    rng, drawn, by_seed = np.random.default_rng(seed), np.zeros(samples), np.zeros(len(seeds))
    for name in sorted(differences):
        values = differences[name]
        count = values.shape[1]
        weights = rng.multinomial(count, np.full(count, 1 / count), size=samples)
        drawn += 100 * (weights @ values.mean(0)) / count / len(differences)
        by_seed += 100 * values.mean(1) / len(differences)
    low, high = np.percentile(drawn, [2.5, 97.5])
    named = dict(zip(map(str, seeds), map(float, by_seed), strict=True))
    return {"difference": float(by_seed.mean()), "low": float(low), "high": float(high), "by_seed": named}
