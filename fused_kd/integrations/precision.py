"""Weights trained in low precision without float32 masters: most of a late training's updates round to nothing."""

from __future__ import annotations

import warnings
from typing import Any

import torch

_LOW = (torch.bfloat16, torch.float16)
# of a parameter, evenly spaced
_SAMPLE = 4096


def low_precision_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The trained parameters in bf16 or fp16, without those that ZeRO-3 holds, which has masters of them."""
    parameters = (value for value in model.parameters() if value.requires_grad and not hasattr(value, "ds_id"))
    return [value for value in parameters if value.dtype in _LOW]


def trained_in_float32(model: Any) -> Any:
    """``model``, in float32 where its trained weights are in half precision, as most updates would round to nothing.

    Quantised models stay as they are.
    """
    whole = low_precision_parameters(model) and not getattr(model, "is_quantized", False)
    return model.float() if whole else model


@torch.no_grad()
def warn_of_lost_updates(model: torch.nn.Module, args: Any, accelerator: Any) -> None:
    """Warn once of trained bf16 or fp16 weights, with the share of them that a step of ``args.learning_rate`` leaves
    as they are; about that is what AdamW adds to a weight.

    Silent where the engine keeps float32 masters: DeepSpeed, and FSDP2 in mixed precision.
    """
    low = low_precision_parameters(model)
    masters = accelerator.is_fsdp2 and accelerator.mixed_precision != "no"
    if not low or masters or getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        return
    lost = count = 0.0
    for value in low:
        some = value.detach().flatten()[:: max(value.numel() // _SAMPLE, 1)]
        lost += float(((some.float() + args.learning_rate).to(some.dtype) == some).float().mean()) * value.numel()
        count += value.numel()
    dtype = str(low[0].dtype).removeprefix("torch.")
    warnings.warn(
        f"{count:.4g} trained weights are {dtype} without float32 masters: a step of the learning rate "
        f"{args.learning_rate:g} leaves {lost / count:.1%} of them as they are. Load the student with "
        "dtype=torch.float32, and set bf16=True to compute in bf16",
        stacklevel=4,
    )
