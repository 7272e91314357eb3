"""The linear map of an output head as dense tensors: PEFT's saved copies and LoRA columns, dequantised weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def called_module(head: Any) -> Any:
    """The module that a call of ``head`` runs: for a head in PEFT's ``modules_to_save`` its active copy."""
    copies = getattr(head, "modules_to_save", None)
    if not isinstance(copies, torch.nn.ModuleDict) or not hasattr(head, "original_module"):
        return head
    active = list(head.active_adapters)
    if head.disable_adapters or not active or active[0] not in copies:
        return head.original_module
    return copies[active[0]]


def check_head(head: Any, name: str, plain: bool) -> None:
    """Raise ``TypeError`` unless :func:`linear_map` can write ``head`` down; looks at no weight's values.

    Args:
        head: of :func:`called_module`.
        name: of the model, for the message.
        plain: adapters are refused too.
    """
    adapters = [] if plain else _active_lora(head)
    linear = head.base_layer if _is_lora(head) and not plain else head
    weight = linear.weight
    if not is_quantised(weight) and (weight.dtype not in _FLOATS or _is_foreign(weight)):
        raise TypeError(
            f"the head of {name} must have a float weight (fp32, bf16 or fp16) or one of bitsandbytes or torchao, "
            f"got {type(weight).__name__} of {weight.dtype}; load it unquantised (leave the head out of the "
            "quantisation) or dequantise it"
        )
    extra = sorted(key for key, _ in linear.named_parameters() if key not in ("weight", "bias"))
    if extra:
        raise TypeError(
            f"the head of {name} must be a plain linear map, it also has {', '.join(extra[:4])}; "
            "merge its adapter or leave the head out of the adapter's target modules"
        )
    for adapter in adapters:
        variant = getattr(head, "lora_variant", {}).get(adapter) or getattr(head, "use_dora", {}).get(adapter)
        if variant or getattr(head, "lora_bias", {}).get(adapter):
            raise TypeError(
                f"the adapter {adapter!r} on the head of {name} must be plain LoRA without a bias of its own; "
                "merge it or leave the head out of the adapter's target modules"
            )


def linear_map(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(hidden, weight, bias)`` with ``head(hidden) = hidden @ weight.T + bias``, differentiable in all of the head.

    A plain head gives its own parameters. LoRA of rank r gives r more columns, ``[hidden, scaling * A hidden]`` and
    ``[weight, B]``: nothing is lost to rounding as in merged weights, dropout stays what it is, and the weight is
    copied. A quantised weight is dequantised to ``hidden``'s dtype, a copy that lives as long as it is used. One that
    torchao fake-quantises for training is what a call of the head computes with, gradients passing straight through.
    """
    if not _is_lora(head):
        if (rounded := getattr(head, "activation_fake_quantizer", None)) is not None:
            hidden = straight_through(rounded, hidden)
        return hidden, _dense(head, hidden.dtype), getattr(head, "bias", None)
    if head.merged and head.disable_adapters:
        raise ValueError("the adapter of the head is merged and disabled: unmerge it")
    linear = head.base_layer
    weight = _dense(linear, hidden.dtype)
    columns, rows = [hidden], [weight]
    for adapter in _active_lora(head):
        down, up = head.lora_A[adapter].weight, head.lora_B[adapter].weight
        if rows_of(down) != down.shape[0]:
            raise ValueError("the adapter of the head is partitioned (ZeRO-3): leave the head out of the adapter")
        low = head.lora_dropout[adapter](hidden.to(down.dtype)) @ down.T * head.scaling[adapter]
        columns.append(low.to(hidden.dtype))
        rows.append(up.to(weight.dtype))
    if len(rows) > 1:
        hidden, weight = torch.cat(columns, -1), torch.cat(rows, -1)
    return hidden, weight, getattr(linear, "bias", None)


class _Straight(torch.autograd.Function):
    """A module's result in the forward, the identity in the backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Any) -> Tensor:
        result: Tensor = rounded(values)
        return result.view_as(result) if result is values else result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(quantiser: Any, values: Tensor) -> Tensor:
    """``values`` as one of torchao's fake quantisers rounds them, with a gradient that passes through.

    Those for integers have such a gradient of their own, zero for values that they clip; it stays. With those that go
    by way of float8, autograd casts the gradient to float8 too, where most of it is too small to be anything but 0.
    """
    if "float8" not in repr(getattr(quantiser, "config", quantiser)):
        rounded: Tensor = quantiser(values)
        return rounded
    straight: Tensor = _Straight.apply(values, quantiser)  # type: ignore[no-untyped-call]
    return straight


def is_quantised(weight: Any) -> bool:
    """Whether :func:`linear_map` dequantises this weight (bitsandbytes' 4 and 8 bits, torchao's tensors)."""
    package = type(weight).__module__.partition(".")[0]
    if package == "bitsandbytes":
        return not weight.is_floating_point()
    return package == "torchao"


def rows_of(weight: Any) -> int:
    """Rows of a weight, also of one that ZeRO-3 has partitioned and left empty or bitsandbytes has packed."""
    packed = getattr(weight, "quant_state", None)
    shape = getattr(weight, "ds_shape", weight.shape if packed is None else packed.shape)
    return int(shape[0])


def _is_lora(head: Any) -> bool:
    if not type(head).__module__.startswith("peft."):
        return False
    from peft.tuners.lora import LoraLayer

    return isinstance(head, LoraLayer)


def _active_lora(head: Any) -> list[str]:
    """Names of the adapters that a call of ``head`` adds."""
    if not _is_lora(head) or head.disable_adapters or head.merged:
        return []
    return [name for name in head.active_adapters if name in head.lora_A]


def _is_foreign(weight: Any) -> bool:
    """A tensor made of others, whose dtype says nothing of what it holds; DTensors are what they say."""
    from torch.distributed.tensor import DTensor

    return is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor)


def _dense(linear: Any, dtype: torch.dtype) -> Tensor:
    weight: Any = linear.weight
    dense: Tensor = weight
    if not is_quantised(weight):
        fake = getattr(linear, "weight_fake_quantizer", None)
        return dense if fake is None else straight_through(fake, weight)
    if type(weight).__module__.startswith("torchao"):
        dense = weight.dequantize()
    else:
        try:
            from bitsandbytes import functional
        except ImportError as error:
            raise ImportError("a head quantised by bitsandbytes needs bitsandbytes to be dequantised") from error
        if getattr(weight, "quant_state", None) is not None:
            dense = functional.dequantize_4bit(weight.data, weight.quant_state)
        else:
            # its first call moves the scales from the weight to the module
            scales = weight.SCB if getattr(weight, "SCB", None) is not None else linear.state.SCB
            dense = functional.int8_vectorwise_dequant(weight.data, scales)
    return dense.to(dtype)
