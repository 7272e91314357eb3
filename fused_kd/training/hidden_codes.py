"""How a cache stores a teacher's hidden states: in bf16, fp16 or fp32 as they are, or in 8 bits with a scale a token.

"int8" is a whole number from -127 to 127 and a scale a token, a 127th of its largest value: a value is off by at most
half a scale. That is much where a few of a state's numbers are far larger than the others, as language models have
them, so a cache takes a mean off first and scales each number (:class:`fused_kd.training.projection.Scaling`). On the
text of a model with 135M parameters the error of the student's gradient is then 0.037, with "fp8" 0.146.

"fp8" is float8_e4m3fn (4 bits of exponent, 3 of mantissa), for which nothing has to be known of other tokens. A
token's scale is the power of two that brings its largest value just below 448, the largest that the form has: a
multiplication with it is exact, so bf16 holds what is read back without another rounding. A value is off by at most
1/16 of itself, or by ``scale / 1024`` where it is less than a 14,000th of the token's largest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

HIDDEN_DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
LONG_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# those in which a cache keeps them
CACHE_DTYPES = {**HIDDEN_DTYPES, "int8": torch.int8}
# as safetensors writes them
STORED_AS = {"bf16": "BF16", "fp8": "F8_E4M3", "int8": "I8", "fp16": "F16", "fp32": "F32"}
WITH_SCALE = ("fp8", "int8")
_SMALLEST = -126  # exponent of fp32's and bf16's smallest normal number


def long_name(name: str) -> str:
    """The name that PyTorch has for a dtype: "bfloat16" for "bf16", and so on; any other as it is."""
    return LONG_NAMES.get(name, name)


def name_of(dtype: torch.dtype) -> str:
    """The short name of a dtype: "bf16" for ``torch.bfloat16``, and so on."""
    return next(name for name, each in HIDDEN_DTYPES.items() if each == dtype)


def encode_states(hidden: Tensor, dtype: str) -> dict[str, Tensor]:
    """The tensors that stand for ``hidden`` (N, R), floating point; :func:`decode_states` reads them.

    Returns:
        ``hidden`` (N, R) in ``dtype``, one of :data:`CACHE_DTYPES`; with "fp8" and "int8" also ``scale`` (N,) float32.

    Raises:
        ValueError: a state that is not finite, or larger than ``dtype`` can hold.
    """
    largest = check_states(hidden, dtype)
    if dtype not in WITH_SCALE:
        return {"hidden": hidden.to(HIDDEN_DTYPES[dtype])}
    form = CACHE_DTYPES[dtype]
    if dtype == "int8":
        scale = (largest / torch.iinfo(form).max).clamp(min=2.0**_SMALLEST)
        return {"hidden": (hidden.float() / scale[:, None]).round().to(form), "scale": scale}
    exponent = torch.frexp(largest / torch.finfo(form).max).exponent.clamp(min=_SMALLEST)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return {"hidden": (hidden.float() / scale[:, None]).to(form), "scale": scale}


def check_states(hidden: Tensor, dtype: str | None = None) -> Tensor:
    """The largest value of each token of ``hidden`` (N, R) without its sign, (N,) float32.

    Raises:
        ValueError: a state that is not finite, or larger than ``dtype``, one of :data:`CACHE_DTYPES`, can hold.
    """
    if not hidden.numel():
        return hidden.new_zeros(len(hidden), dtype=torch.float32)
    # the two extremes are found ten times faster than what is not finite, and NaN is both
    largest = torch.maximum(hidden.amax(1), -hidden.amin(1)).float()
    limit = torch.inf if dtype is None or dtype in WITH_SCALE else torch.finfo(HIDDEN_DTYPES[dtype]).max
    bad = ~(largest <= limit) | (largest == torch.inf)
    if bool(bad.any()):
        token = int(bad.int().argmax())
        raise ValueError(
            f"hidden states of token {token} must be finite numbers{'' if dtype is None else f' that {dtype} holds'}, "
            f"the largest is {float(largest[token])} ({int(bad.sum())} of {len(bad)} tokens are not)"
        )
    return largest


def decode_states(stored: Mapping[str, Tensor]) -> Tensor:
    """(N, R) from the tensors of :func:`encode_states`: those of 8 bits in bf16, others in their own dtype."""
    hidden = stored["hidden"]
    if "scale" not in stored:
        return hidden
    if hidden.dtype == torch.int8:
        return (hidden.float() * stored["scale"][:, None]).to(torch.bfloat16)
    return hidden.to(torch.bfloat16) * stored["scale"].to(torch.bfloat16)[:, None]


def narrowed(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring finite states to ``dtype``, a head's; what would be rounded beyond fp16's range is its largest number."""
    if dtype != torch.float16 or hidden.dtype == dtype:
        return hidden.to(dtype)
    largest = torch.finfo(dtype).max
    return hidden.to(dtype).clamp(-largest, largest)
