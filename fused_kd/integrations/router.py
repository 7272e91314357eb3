"""The auxiliary loss of a mixture of experts' router, as transformers adds it to a model's own loss."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor

from fused_kd.integrations.bodies import labels_need_shift, without_adapters

_TAKES = ("gate_logits", "num_experts", "top_k", "attention_mask")
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def asks_for_router_loss(model: Any) -> bool:
    """Whether the configuration says that the router's loss belongs to the model's (``output_router_logits``)."""
    config = without_adapters(model).config
    return bool(getattr(config.get_text_config(), "output_router_logits", False))


def check_router_loss(model: Any) -> None:
    """Raise ``ValueError`` where :func:`router_loss` cannot tell the loss that the configuration asks for."""
    base = without_adapters(model)
    name = type(base).__name__
    why = None
    if not labels_need_shift(base):
        why = "is an encoder-decoder"
    elif (function := _function(base)) is None or tuple(inspect.signature(function).parameters) != _TAKES:
        why = (
            "has another form of it than transformers' load_balancing_loss_func(gate_logits, num_experts, top_k, mask)"
        )
    elif any(
        _number(_places(base), names) is None for names in (("num_experts",), ("num_experts_per_tok",), _COEFFICIENTS)
    ):
        why = "does not tell num_experts, num_experts_per_tok and router_aux_loss_coef"
    if why is not None:
        raise ValueError(
            f"config.output_router_logits must be False: the router's auxiliary loss of {name} cannot be added, as it "
            f"{why} (TRL's SFTConfig: router_aux_loss_coef=0.0)"
        )


def coefficient(model: Any) -> float:
    """What a model multiplies its router's loss by."""
    base = without_adapters(model)
    # TRL sets the configuration's, of a model that has read it before
    places = (base.config.get_text_config(), base)
    return float(_number(places, _COEFFICIENTS) or 0.0)


def router_loss(model: Any, outputs: Any, attention_mask: Tensor | None) -> Tensor:
    """The model's own load balancing loss (unweighted) of a forward of its body, differentiable in the routers.

    Args:
        outputs: of the body, called with ``output_router_logits=True``.
        attention_mask: of the inputs, (rows, length), or None: padding does not count.

    Raises:
        ValueError: the body gave no router logits.
    """
    base = without_adapters(model)
    logits = getattr(outputs, "router_logits", None)
    if not logits:
        raise ValueError(f"config.output_router_logits must be False: {type(base).__name__} gave no router logits")
    made: Tensor = _function(base)(
        logits,
        int(_number(_places(base), ("num_experts",))),
        int(_number(_places(base), ("num_experts_per_tok",))),
        attention_mask,
    )
    return made.to(torch.float32)


def _function(base: Any) -> Any:
    """Of the class that the model is of, or is made from."""
    modules: list[Any] = [sys.modules.get(each.__module__) for each in type(base).__mro__]
    return next((each.load_balancing_loss_func for each in modules if hasattr(each, "load_balancing_loss_func")), None)


def _places(base: Any) -> tuple[Any, Any]:
    """What the model takes itself, else its configuration's."""
    return base, base.config.get_text_config()


def _number(places: tuple[Any, Any], names: tuple[str, ...]) -> Any:
    return next(
        (value for place in places for name in names if (value := getattr(place, name, None)) is not None), None
    )
