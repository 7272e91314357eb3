"""The registry of what is measured: fused_kd, plain PyTorch and the peers, all on the same inputs."""

from __future__ import annotations

from .eager import EAGER
from .fused import FUSED, OURS, TOP_K, preferred_chunk
from .implementation import GROUPS, Implementation
from .peers import PEERS

IMPLEMENTATIONS: dict[str, Implementation] = {**FUSED, **EAGER, **PEERS}

__all__ = ["GROUPS", "IMPLEMENTATIONS", "OURS", "TOP_K", "Implementation", "preferred_chunk"]
