"""How a cache stores a teacher's hidden states: in bf16, fp16 or fp32 as they are, or in 8 bits.

The 8-bit form is int8 with a scale, in bf16, for every 32 numbers of a token: the largest of them over 127. A number is
off by at most half the scale, and by the rounding to bf16 in which it is read. A few dimensions of many models are a
hundred times the others; what these cost in precision, only their neighbours pay.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

HIDDEN_DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "8bit": torch.int8,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
LONG_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# as safetensors writes them
STORED_AS = {"bf16": "BF16", "8bit": "I8", "fp16": "F16", "fp32": "F32"}
GROUP = 32  # numbers of the 8-bit form that share a scale
_LEVELS = 127
_LARGEST = {"8bit": 1e38}  # a scale rounded up must not bring it beyond bf16's range


def long_name(name: str) -> str:
    """The name that PyTorch has for a dtype: "bfloat16" for "bf16", and so on; any other as it is."""
    return LONG_NAMES.get(name, name)


def name_of(dtype: torch.dtype) -> str:
    """The short name of a dtype: "bf16" for ``torch.bfloat16``, and so on."""
    return next(name for name, each in HIDDEN_DTYPES.items() if each == dtype)


def encode_states(hidden: Tensor, dtype: str) -> dict[str, Tensor]:
    """The tensors that stand for ``hidden`` (N, R), floating point; :func:`decode_states` reads them.

    Returns:
        ``hidden`` (N, R) in ``dtype``, one of :data:`HIDDEN_DTYPES`; with "8bit" also ``scale`` (N, R / 32
        rounded up) bfloat16.

    Raises:
        ValueError: a state that is not finite, or larger than ``dtype`` can hold.
    """
    check_states(hidden, dtype)
    if dtype != "8bit":
        return {"hidden": hidden.to(HIDDEN_DTYPES[dtype])}
    groups = pad(hidden.float(), (0, -hidden.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(2) / _LEVELS).to(torch.bfloat16)
    divisor = scale.float().clamp(min=torch.finfo(torch.bfloat16).tiny)
    codes = (groups / divisor[..., None]).round().clamp(-_LEVELS, _LEVELS).to(torch.int8)
    return {"hidden": codes.flatten(1)[:, : hidden.shape[1]].contiguous(), "scale": scale}


def check_states(hidden: Tensor, dtype: str | None = None) -> Tensor:
    """The largest value of each token of ``hidden`` (N, R) without its sign, (N,) float32.

    Raises:
        ValueError: a state that is not finite, or larger than ``dtype``, one of :data:`HIDDEN_DTYPES`, can hold.
    """
    if not hidden.numel():
        return hidden.new_zeros(len(hidden), dtype=torch.float32)
    # the two extremes are found ten times faster than what is not finite, and NaN is both
    largest = torch.maximum(hidden.amax(1), -hidden.amin(1)).float()
    limit = torch.inf if dtype is None else _LARGEST.get(dtype) or torch.finfo(HIDDEN_DTYPES[dtype]).max
    bad = ~(largest <= limit) | (largest == torch.inf)
    if bool(bad.any()):
        token = int(bad.int().argmax())
        raise ValueError(
            f"hidden states of token {token} must be finite numbers{'' if dtype is None else f' that {dtype} holds'}, "
            f"the largest is {float(largest[token])} ({int(bad.sum())} of {len(bad)} tokens are not)"
        )
    return largest


def decode_states(stored: Mapping[str, Tensor]) -> Tensor:
    """(N, R) from the tensors of :func:`encode_states`: those of "8bit" in bf16, others in their own dtype."""
    hidden = stored["hidden"]
    if "scale" not in stored:
        return hidden
    each = stored["scale"].repeat_interleave(GROUP, dim=1)[:, : hidden.shape[1]]
    return hidden.to(torch.bfloat16) * each


def groups_of(width: int) -> int:
    """How many scales the 8-bit form of a state has."""
    return -(-width // GROUP)


def read_dtype(name: str) -> torch.dtype:
    """The dtype that :func:`decode_states` gives: bfloat16 of "8bit"."""
    return torch.bfloat16 if name == "8bit" else HIDDEN_DTYPES[name]


def narrowed(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring finite states to ``dtype``, a head's; what would be rounded beyond fp16's range is its largest number."""
    if dtype != torch.float16 or hidden.dtype == dtype:
        return hidden.to(dtype)
    largest = torch.finfo(dtype).max
    return hidden.to(dtype).clamp(-largest, largest)
