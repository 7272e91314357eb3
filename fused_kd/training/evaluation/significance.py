"""Is one system better than another: sacrebleu's paired bootstrap, and how several seeds are combined."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from fused_kd.training.evaluation.evaluate import check_texts

ALPHA = 0.05
METRICS = ("bleu", "chrf")


@dataclass(frozen=True)
class Comparison:
    """A system against a baseline on one test set.

    Attributes:
        system, baseline, metric: names; the metric is one of `METRICS`.
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

    def as_dict(self) -> dict[str, float | str]:
        return asdict(self)


def paired_bootstrap(
    systems: Mapping[str, Sequence[str]],
    references: Sequence[str],
    baseline: str,
    *,
    samples: int = 1000,
    seed: int = 12345,
    metrics: Sequence[str] = METRICS,
    tokenize: str = "13a",
    jobs: int = 1,
) -> list[Comparison]:
    """Every other system against the baseline, by paired bootstrap resampling (Koehn 2004) of the sentences.

    All systems are scored on the same resampled test sets. The p-values cover the choice of test sentences;
    for the choice of training seed see `significant_over_seeds`.

    Args:
        systems: name -> hypotheses, in the order of `references`; at least the baseline and one more.
        references: one a sentence.
        baseline: a name in `systems`.
        samples: resampled test sets; default 1000.
        seed: of the resampling, at least 1 (sacrebleu takes 0 for no seed); default sacrebleu's own.
        metrics: some of ``"bleu"`` and ``"chrf"`` (default both).
        tokenize: sacrebleu's tokenizer for BLEU; default ``"13a"``.
        jobs: processes, one a system at most; default 1, which starts none. The numbers are the same.

    Returns:
        One `Comparison` a system and metric, systems in their order.

    Raises:
        ValueError: unknown baseline or metric, fewer than two systems, empty or unequal lists, samples, seed
            or jobs below 1. TypeError: something other than lists of strings, a count that is no int.
    """
    for name, value in (("samples", samples), ("seed", seed), ("jobs", jobs)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    if baseline not in systems or len(systems) < 2:
        raise ValueError(
            f"baseline={baseline!r}: expected one of at least two systems, got {', '.join(systems) or 'none'}"
        )
    if isinstance(metrics, str) or not metrics or not set(metrics) <= set(METRICS):
        raise ValueError(f"metrics={metrics!r}: expected some of {', '.join(METRICS)}")
    for name, hypotheses in systems.items():
        check_texts({f"systems[{name!r}]": hypotheses, "references": references})

    from sacrebleu.metrics import BLEU, CHRF
    from sacrebleu.significance import PairedTest

    metrics = list(dict.fromkeys(metrics))
    # force: no warning for toy text whose full stops stand apart
    made: dict[str, Any] = {"bleu": BLEU(tokenize=tokenize, force=True), "chrf": CHRF()}
    others = [name for name in systems if name != baseline]
    ordered: list[tuple[str, Sequence[str]]] = [(name, list(systems[name])) for name in (baseline, *others)]
    with _sacrebleu_seed(seed):
        test = PairedTest(
            ordered, {name: made[name] for name in metrics}, [list(references)], "bs", n_samples=samples, n_jobs=jobs
        )
        signatures, results = test()
    # sacrebleu renames the metrics (chrF2) and keeps their order
    named = zip(metrics, signatures, strict=True)
    columns = {metric: (results[key], str(signatures[key])) for metric, key in named}
    return [
        _comparison(name, baseline, metric, column[position], column[0], signature)
        for position, name in enumerate(others, start=1)
        for metric, (column, signature) in columns.items()
    ]


def significant_over_seeds(p_values: Sequence[float], deltas: Sequence[float], *, alpha: float = ALPHA) -> bool:
    """Whether a table's dagger is earned: p < `alpha` with every seed, and every delta of the same sign.

    One entry a training seed, each a comparison of two systems of that seed on the same test set. The p-values
    are not merged into one: the seeds share the test sentences, so they are not independent, as the usual
    ways of merging ask. Asking for all of them is never more generous than one seed's test.

    Raises:
        ValueError: no entry, lists of different length, a p-value or `alpha` outside [0, 1].
    """
    if len(p_values) != len(deltas) or not p_values:
        raise ValueError(f"{len(p_values)} p_values for {len(deltas)} deltas: expected as many of both, at least one")
    for name, value in (("alpha", alpha), *(("p_values", value) for value in p_values)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    one_sign = all(delta > 0 for delta in deltas) or all(delta < 0 for delta in deltas)
    return one_sign and all(value < alpha for value in p_values)


def _comparison(
    system: str, baseline: str, metric: str, result: Any, baseline_result: Any, signature: str
) -> Comparison:
    score, baseline_score = float(result.score), float(baseline_result.score)
    # sacrebleu counts resampled differences beyond the real one, of which equal systems have none: p 0.001
    p_value = 1.0 if score == baseline_score else float(result.p_value)
    return Comparison(
        system=system,
        baseline=baseline,
        metric=metric,
        score=score,
        baseline_score=baseline_score,
        delta=score - baseline_score,
        p_value=p_value,
        mean=float(result.mean),
        ci=float(result.ci),
        signature=signature,
    )


@contextmanager
def _sacrebleu_seed(seed: int) -> Iterator[None]:
    """sacrebleu takes its seed from the environment alone."""
    old = os.environ.get("SACREBLEU_SEED")
    os.environ["SACREBLEU_SEED"] = str(seed)
    try:
        yield
    finally:
        if old is None:
            del os.environ["SACREBLEU_SEED"]
        else:
            os.environ["SACREBLEU_SEED"] = old
