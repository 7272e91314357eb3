"""Hugging Face causal LMs: hidden states without logits, and the output head as a ``fused_kd.LMHead``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from fused_kd import LMHead

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Config fields that multiply the logits, and those that divide them.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
# These models multiply by the field that the others divide by.
_MULTIPLY_BY_LOGITS_SCALING = ("hyperclovax",)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def hidden_states(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    """Last hidden states, ``(batch, length, H)``, of a causal LM, after its final norm; no logits are
    computed.

    ``inputs`` are those of the model's forward (``input_ids`` or ``inputs_embeds``, ``attention_mask``,
    ``position_ids``, and pixel values of a multimodal model), without ``labels``. Gradients flow as usual.

    Raises ``ValueError`` if ``labels`` are given or the model is an encoder-decoder, ``TypeError`` if it has
    no body that can be called without its head.
    """
    if "labels" in inputs:
        raise ValueError("labels must not be passed to hidden_states: the loss needs them, the model's body does not")
    inputs.setdefault("use_cache", False)
    return _body(_without_adapters(model))(**inputs, return_dict=True).last_hidden_state


def lm_head_of(model: PreTrainedModel, hidden: torch.Tensor) -> LMHead:
    """The model's output head on ``hidden`` (``(..., H)``): weight, bias, logit scale and softcap.

    The weight and bias are the model's own parameters, so gradients reach them (and a tied embedding).

    Raises ``TypeError`` for a quantised head or one that is not a plain linear map, ``ValueError`` for a
    model without a head. Scale and softcap are known by the names of their config fields;
    :func:`check_lm_head` finds a model that does something else to its logits.
    """
    base = _without_adapters(model)
    head = base.get_output_embeddings()
    name = type(base).__name__
    if head is None or not isinstance(getattr(head, "weight", None), torch.Tensor):
        raise ValueError(f"model must have an output head with a weight, {name}.get_output_embeddings() gave {head!r}")
    extra = sorted(key for key, _ in head.named_parameters() if key not in ("weight", "bias"))
    if extra:
        raise TypeError(
            f"the head of {name} must be a plain linear map, it also has {', '.join(extra[:4])}; "
            "merge its adapter or leave the head out of the adapter's target modules"
        )
    if head.weight.dtype not in _FLOATS:
        raise TypeError(
            f"the head of {name} must have a float weight (fp32, bf16 or fp16), got {head.weight.dtype}; "
            "load it unquantised (leave the head out of the quantisation) or dequantise it"
        )
    if head.weight.is_meta:
        raise ValueError(f"the head of {name} is offloaded (its weight is on the meta device): keep it on a device")
    scale, softcap = logit_options(base.config)
    return LMHead(hidden, head.weight, bias=getattr(head, "bias", None), logit_scale=scale, softcap=softcap)


def logit_options(config: PreTrainedConfig) -> tuple[float, float | None]:
    """``(logit_scale, softcap)`` that a model with this config applies: ``softcap * tanh(scale * logits /
    softcap)``.

    Reads the text part of a multimodal config. Raises ``ValueError`` if a field's value is not a usable
    number.
    """
    text = config.get_text_config()
    scale = 1.0
    for name in _MULTIPLIERS + _DIVISORS:
        value = getattr(text, name, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"config.{name} must be a positive number, got {value!r}")
        divides = name in _DIVISORS and text.model_type not in _MULTIPLY_BY_LOGITS_SCALING
        scale = scale / value if divides else scale * value
    softcap = getattr(text, "final_logit_softcapping", None)
    return float(scale), None if softcap is None else float(softcap)


@torch.no_grad()
def check_lm_head(model: PreTrainedModel, tokens: int = 8) -> None:
    """Run ``tokens`` tokens (default 8) both ways and raise ``ValueError`` if the head differs from the
    model's logits.

    This finds what no list of config fields can: a model that scales, caps or transforms its logits under
    another name. The comparison is relative to the logits' norm: 1e-3 for fp32 and fp64 models, 5e-2 for half
    precision.
    """
    base = _without_adapters(model)
    embeddings = cast(torch.Tensor, base.get_input_embeddings().weight)
    ids = torch.arange(1, tokens + 1, device=embeddings.device).remainder(embeddings.shape[0]).unsqueeze(0)
    was_training = base.training
    base.eval()
    try:
        expected = base(input_ids=ids, use_cache=False).logits.float()
        head = lm_head_of(model, hidden_states(model, input_ids=ids))
    finally:
        base.train(was_training)
    logits = (head.hidden @ head.weight.T).float()
    if head.bias is not None:
        logits = logits + head.bias.float()
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    if logits.shape != expected.shape:
        raise ValueError(
            f"{type(base).__name__} gives logits of shape {tuple(expected.shape)}, its head {tuple(logits.shape)}"
        )
    error = float((logits - expected).norm() / expected.norm().clamp_min(1e-12))
    if not error <= (1e-3 if head.weight.dtype in (torch.float32, torch.float64) else 5e-2):
        raise ValueError(
            f"{type(base).__name__} does more to its logits than weight, bias, scale {head.logit_scale:g} "
            f"and softcap {head.softcap}: the head differs from model(...).logits by {error:.1%}. Pass "
            "fused_kd.LMHead yourself, with the scale that this model uses."
        )


def _without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """A PEFT model's own model, with its adapters in place; any other model unchanged."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def _body(model: PreTrainedModel) -> torch.nn.Module:
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model must be a causal LM, {type(model).__name__} is an encoder-decoder")
    # base_model first: in a multimodal model it runs every modality, get_decoder() is the text part alone
    for body in (model.base_model, model.get_decoder()):
        if body is not None and body is not model:
            return body
    raise TypeError(f"{type(model).__name__} has no body apart from its head (base_model, get_decoder)")
