"""How good translations are without a reference: pluggable scorers, and the filter by their threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

ROUND_TRIP, COMET_KIWI = "round_trip", "comet_kiwi"


class Scorer(Protocol):
    """Scores translations; higher is better.

    Attributes:
        needs_back: whether translations back into the source language are asked for.
    """

    needs_back: bool

    def __call__(self, sources: Sequence[str], translations: Sequence[str], back: Sequence[str]) -> list[float]:
        """One score a text; ``back`` is empty where it is not needed."""
        ...


class RoundTrip:
    """chrF of the translation's translation back against the source, 0-1: the default that needs no other model.

    It sees what the translator itself loses. It does not see an error that the way back undoes (a word left as it was,
    a wrong sense with the same way back), and its values are no CometKiwi's: the threshold is another.
    """

    needs_back = True

    def __call__(self, sources: Sequence[str], translations: Sequence[str], back: Sequence[str]) -> list[float]:
        from sacrebleu.metrics import CHRF

        metric = CHRF()
        triples = zip(sources, translations, back, strict=True)
        return [
            metric.sentence_score(returned, [source]).score / 100 if translation.strip() and returned.strip() else 0.0
            for source, translation, returned in triples
        ]


@dataclass(frozen=True)
class CometKiwi:
    """CometKiwi, a learned score of source and translation (extra ``comet``).

    Args:
        model, batch_size, python: as of :func:`fused_kd.training.evaluation.comet.comet_scores`.
    """

    model: str = "Unbabel/wmt22-cometkiwi-da"
    batch_size: int = 16
    python: str | None = None
    needs_back = False

    def __call__(self, sources: Sequence[str], translations: Sequence[str], back: Sequence[str]) -> list[float]:
        from fused_kd.training.evaluation.comet import comet_scores

        # a model without references does not look at them
        found = comet_scores(
            sources, translations, sources, model=self.model, batch_size=self.batch_size, python=self.python
        )
        return list(found.segments)


@dataclass(frozen=True)
class Quality:
    """The filter of translated pairs.

    Args:
        tau: a pair is kept where each of its texts scores at least this. The paper's 0.8 is CometKiwi's.
        scorer: "round_trip" (default) or "comet_kiwi".
        model, batch_size, python: of CometKiwi. ``python`` names a program that is started, and the model's ``.ckpt``
            file, which the package loads there, may be a pickle: take a configuration with them only from where you
            would take a program.

    Raises:
        ValueError: ``tau`` outside [0, 1].
    """

    tau: float
    scorer: Literal["round_trip", "comet_kiwi"] = ROUND_TRIP  # type: ignore[assignment]
    model: str = "Unbabel/wmt22-cometkiwi-da"
    batch_size: int = 16
    python: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise ValueError(f"quality.tau must be in [0, 1], got {self.tau!r}")

    def make(self) -> Scorer:
        """The scorer."""
        if self.scorer == ROUND_TRIP:
            return RoundTrip()
        return CometKiwi(self.model, self.batch_size, self.python)

    def about(self) -> dict[str, str]:
        """What scores depend on; the threshold is not of it."""
        return {"scorer": self.scorer} | ({"model": self.model} if self.scorer == COMET_KIWI else {})
