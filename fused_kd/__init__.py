"""Knowledge-distillation losses over large vocabularies that never hold the logits."""

from ._version import __version__
from .inputs import KDOutput, LMHead, TopK
from .loss import KDLoss, kd_loss
from .objectives import (
    OBJECTIVES,
    SFT,
    AdaptiveKL,
    ForwardKD,
    GeneralizedJSD,
    NoEvo,
    ReverseKD,
    SelfEvolution,
    SelfEvolutionTopK,
    Skew,
    SkewForward,
    SkewReverse,
    SkewTeacher,
    TotalVariation,
)
from .workspace import empty_cache

__all__ = [
    "OBJECTIVES",
    "SFT",
    "AdaptiveKL",
    "ForwardKD",
    "GeneralizedJSD",
    "KDLoss",
    "KDOutput",
    "LMHead",
    "NoEvo",
    "ReverseKD",
    "SelfEvolution",
    "SelfEvolutionTopK",
    "Skew",
    "SkewForward",
    "SkewReverse",
    "SkewTeacher",
    "TopK",
    "TotalVariation",
    "__version__",
    "empty_cache",
    "kd_loss",
]
