"""Knowledge-distillation losses over large vocabularies that never hold the logits."""

from ._version import __version__
from .draws import sample_of
from .inputs import KDOutput, Lists, LMHead, TopK
from .lists import log_probs_at, top_k_of
from .loss import KDLoss, kd_loss
from .mixtures import Mixture
from .objectives import (
    OBJECTIVES,
    SFT,
    Acceptance,
    AcceptanceMix,
    AdaptiveKL,
    AlphaBeta,
    EntropyGated,
    ForwardKD,
    GeneralizedJSD,
    NoEvo,
    Renyi,
    ReverseKD,
    SelfEvolution,
    SelfEvolutionTopK,
    Skew,
    SkewForward,
    SkewReverse,
    SkewReverseDetached,
    SkewTeacher,
    SymmetricKL,
    ToDi,
    TotalVariation,
    ZLoss,
)
from .vocab import VocabMap, vocab_map
from .workspace import empty_cache

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
    "KDLoss",
    "KDOutput",
    "LMHead",
    "Lists",
    "Mixture",
    "NoEvo",
    "Renyi",
    "ReverseKD",
    "SelfEvolution",
    "SelfEvolutionTopK",
    "Skew",
    "SkewForward",
    "SkewReverse",
    "SkewReverseDetached",
    "SkewTeacher",
    "SymmetricKL",
    "ToDi",
    "TopK",
    "TotalVariation",
    "VocabMap",
    "ZLoss",
    "__version__",
    "empty_cache",
    "kd_loss",
    "log_probs_at",
    "sample_of",
    "top_k_of",
    "vocab_map",
]
