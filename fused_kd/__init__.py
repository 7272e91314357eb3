"""Knowledge-distillation losses over large vocabularies that never hold the logits."""

from .inputs import LMHead
from .loss import KDLoss, KDOutput, kd_loss
from .objectives import (
    OBJECTIVES,
    SFT,
    ForwardKD,
    NoEvo,
    ReverseKD,
    SelfEvolution,
    Skew,
    SkewTeacher,
)

__version__ = "0.1.0"

__all__ = [
    "KDLoss",
    "KDOutput",
    "LMHead",
    "OBJECTIVES",
    "SFT",
    "ForwardKD",
    "NoEvo",
    "ReverseKD",
    "SelfEvolution",
    "Skew",
    "SkewTeacher",
    "__version__",
    "kd_loss",
]
