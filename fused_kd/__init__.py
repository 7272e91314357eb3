"""Knowledge-distillation losses over large vocabularies that never hold the logits."""

from ._version import __version__
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

__all__ = [
    "OBJECTIVES",
    "SFT",
    "ForwardKD",
    "KDLoss",
    "KDOutput",
    "LMHead",
    "NoEvo",
    "ReverseKD",
    "SelfEvolution",
    "Skew",
    "SkewTeacher",
    "__version__",
    "kd_loss",
]
