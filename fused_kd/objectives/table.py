"""All objectives by name."""

from __future__ import annotations

from .base import Objective
from .divergences import (
    Acceptance,
    AcceptanceMix,
    AdaptiveKL,
    AlphaBeta,
    EntropyGated,
    GeneralizedJSD,
    Renyi,
    SkewForward,
    SkewReverse,
    SkewReverseDetached,
    SymmetricKL,
    ToDi,
    TotalVariation,
)
from .self_evolution import (
    SFT,
    ForwardKD,
    NoEvo,
    ReverseKD,
    SelfEvolution,
    SelfEvolutionTopK,
    Skew,
    SkewTeacher,
    ZLoss,
)

OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls
    for cls in (
        SFT,
        ForwardKD,
        ReverseKD,
        NoEvo,
        Skew,
        SkewTeacher,
        SelfEvolution,
        SelfEvolutionTopK,
        GeneralizedJSD,
        SkewForward,
        SkewReverse,
        TotalVariation,
        AdaptiveKL,
        SkewReverseDetached,
        SymmetricKL,
        EntropyGated,
        ToDi,
        AlphaBeta,
        Renyi,
        Acceptance,
        AcceptanceMix,
        ZLoss,
    )
}
