"""Wrong references, for experiments on imperfect distillation sets."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fused_kd.training.data.pairs import Pair


def misalign(pairs: Sequence[Pair], share: float, seed: int = 0) -> list[Pair]:
    """Rotate the targets of a random ``share`` of the pairs among themselves, so that each gets a wrong one.

    The number of pairs is rounded; a single one is left alone, as there is nothing to swap it with. Order is
    kept.

    Raises:
        ValueError: ``share`` outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share!r}")
    chosen = random.Random(seed).sample(range(len(pairs)), round(share * len(pairs)))
    mixed = list(pairs)
    for here, there in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        mixed[here] = Pair(pairs[here].source, pairs[there].target)
    return mixed
