"""Training objectives: frozen, validated dataclasses that pick divergences and carry their numbers."""

from .base import Objective, Sum
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
from .table import OBJECTIVES
from .text import parse

__all__ = [
    "OBJECTIVES",
    "SFT",
    "Acceptance",
    "AcceptanceMix",
    "AdaptiveKL",
    "AlphaBeta",
    "EntropyGated",
    "ForwardKD",
    "GeneralizedJSD",
    "NoEvo",
    "Objective",
    "Renyi",
    "ReverseKD",
    "SelfEvolution",
    "SelfEvolutionTopK",
    "Skew",
    "SkewForward",
    "SkewReverse",
    "SkewReverseDetached",
    "SkewTeacher",
    "Sum",
    "SymmetricKL",
    "ToDi",
    "TotalVariation",
    "ZLoss",
    "parse",
]
