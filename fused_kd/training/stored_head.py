"""A head apart from hidden states: an ``LMHead`` on none of them, its file, and its copies on devices."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_kd import LMHead
from fused_kd.training.hidden_codes import narrowed


def bare_head(weight: Tensor, bias: Tensor | None = None, *, logit_scale: float, softcap: float | None) -> LMHead:
    """The head ``weight`` (V, H), ``bias`` (V,) or None on no hidden states, (0, H)."""
    return LMHead(weight.new_empty(0, weight.shape[1]), weight, bias, logit_scale=logit_scale, softcap=softcap)


def to_bytes(head: LMHead) -> bytes:
    """``weight`` and, where there is one, ``bias`` as a safetensors file."""
    from safetensors.torch import save

    parts = {"weight": head.weight} if head.bias is None else {"weight": head.weight, "bias": head.bias}
    return save({name: part.detach().cpu().contiguous() for name, part in parts.items()})


def moved(head: LMHead, to: torch.device | torch.dtype) -> LMHead:
    """The head, all of it in another dtype or on another device."""
    bias = None if head.bias is None else head.bias.to(to)
    return replace(head, hidden=head.hidden.to(to), weight=head.weight.to(to), bias=bias)


class HeadOnDevices:
    """A head that is made once for each device; pickled without what was made.

    Args:
        make: the bare head for a device.
    """

    def __init__(self, make: Callable[[torch.device], LMHead]) -> None:
        self._make = make
        self._made: dict[torch.device, LMHead] = {}
        self._lock = threading.Lock()

    def on(self, hidden: Tensor) -> LMHead:
        """The head on ``hidden`` (..., H), which is brought to the head's dtype."""
        with self._lock:
            if hidden.device not in self._made:
                self._made[hidden.device] = self._make(hidden.device)
            head = self._made[hidden.device]
        return replace(head, hidden=narrowed(hidden, head.weight.dtype))

    def __getstate__(self) -> Mapping[str, Any]:
        return {"make": self._make}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        HeadOnDevices.__init__(self, state["make"])
