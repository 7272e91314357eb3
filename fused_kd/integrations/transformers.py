"""Hugging Face causal LMs: hidden states without logits, and the output head as a ``fused_kd.LMHead``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
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
    head = check_head_module(model)
    name = type(base).__name__
    if head.weight.is_meta:
        raise ValueError(f"the head of {name} is offloaded (its weight is on the meta device): keep it on a device")
    scale, softcap = logit_options(base.config)
    return LMHead(hidden, head.weight, bias=getattr(head, "bias", None), logit_scale=scale, softcap=softcap)


def check_head_module(model: PreTrainedModel) -> Any:
    """The model's output head module; raises as :func:`lm_head_of` does, from the module's structure alone.

    Weights are not looked at: they may still be on another rank or on the meta device.
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
    return head


def route_head_loss(model: PreTrainedModel) -> None:
    """Make ``model(**inputs, head_loss=f)`` return ``f(head)`` instead of logits; other calls stay as they are.

    ``head`` is the model's :class:`fused_kd.LMHead` on its last hidden states, ``f`` returns a dict of tensors.
    Everything runs inside the model's own call and ``f`` inside the call of its head module, so the hooks of
    DDP, FSDP2 and ZeRO-3 fire as for logits: they gather the head's weight (a tied one too) before ``f`` and see
    its gradient. Call this before a wrapper is put around the model; calling it again changes nothing. An adapter
    model is routed at its base. The signature of ``forward`` is kept.
    """
    base = _without_adapters(model)
    if getattr(base.forward, "_routes_head_loss", False):
        return
    # unbound, so that a deep copy of the model calls itself and not the original
    plain: Any = getattr(base.forward, "__func__", None)
    original = plain if plain is not None else (lambda self, *args, _forward=base.forward, **kw: _forward(*args, **kw))

    @functools.wraps(original)
    def forward(self: Any, *args: Any, head_loss: Callable[[LMHead], dict] | None = None, **kwargs: Any) -> Any:
        if head_loss is None:
            return original(self, *args, **kwargs)
        # adapter models name every argument, most of them None, and not every body knows them all
        given = {key: value for key, value in kwargs.items() if value is not None}
        hidden = hidden_states(self, *args, **given)
        head = self.get_output_embeddings()
        with _forward_of(head, lambda hidden: head_loss(lm_head_of(self, hidden))):
            return head(hidden)

    # a compiler takes the body alone: it cannot follow a module whose forward is exchanged
    routed = torch.compiler.disable(forward, recursive=False)
    routed._routes_head_loss = True
    base.forward = MethodType(routed, base)  # type: ignore[method-assign]


def common_vocab_size(
    student: PreTrainedModel, teacher: PreTrainedModel | None, vocab_size: int | None, tokenizer: Any
) -> int | None:
    """The columns to cut both heads to, or None where they have equal sizes and ``vocab_size`` is None.

    Unequal heads need ``vocab_size``, or the ``tokenizer`` that both share, whose length it is then. Raises
    ``ValueError`` without either, and for a ``vocab_size`` beyond a head.
    """
    heads = [rows_of(check_head_module(model).weight) for model in (student, teacher) if model is not None]
    if vocab_size is None:
        if len(set(heads)) == 1:
            return None
        if tokenizer is None or not hasattr(tokenizer, "__len__"):
            raise ValueError(
                f"student and teacher have vocabularies of {heads[0]} and {heads[1]}: give vocab_size, or "
                "the shared tokenizer as processing_class, to cut both heads to the common tokens"
            )
        vocab_size = len(tokenizer)
    if not 1 <= vocab_size <= min(heads):
        raise ValueError(f"vocab_size must be in [1, {min(heads)}] for heads of {heads}, got {vocab_size}")
    return vocab_size


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
    precision. A model that :func:`route_head_loss` has prepared may be sharded (then all ranks must call this).
    """
    base = _without_adapters(getattr(model, "module", model))
    embeddings = cast(torch.Tensor, base.get_input_embeddings().weight)
    ids = torch.arange(1, tokens + 1, device=embeddings.device).remainder(rows_of(embeddings)).unsqueeze(0)
    dtypes: list[torch.dtype] = []

    def written_out(head: LMHead) -> dict[str, torch.Tensor]:
        logits = head.hidden @ head.weight.T
        dtypes.append(logits.dtype)
        logits = logits.float()
        if head.bias is not None:
            logits = logits + head.bias.float()
        logits = logits * head.logit_scale
        return {"logits": logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)}

    was_training = model.training
    model.eval()
    try:
        expected = model(input_ids=ids, use_cache=False).logits.float()
        if getattr(base.forward, "_routes_head_loss", False):
            logits = model(input_ids=ids, head_loss=written_out)["logits"].float()
        else:
            logits = written_out(lm_head_of(base, hidden_states(base, input_ids=ids)))["logits"]
    finally:
        model.train(was_training)
    if logits.shape != expected.shape:
        raise ValueError(
            f"{type(base).__name__} gives logits of shape {tuple(expected.shape)}, its head {tuple(logits.shape)}"
        )
    error = float((logits - expected).norm() / expected.norm().clamp_min(1e-12))
    if not error <= (1e-3 if dtypes[0] in (torch.float32, torch.float64) else 5e-2):
        scale, softcap = logit_options(base.config)
        raise ValueError(
            f"{type(base).__name__} does more to its logits than weight, bias, scale {scale:g} "
            f"and softcap {softcap}: the head differs from model(...).logits by {error:.1%}. Pass "
            "fused_kd.LMHead yourself, with the scale that this model uses."
        )


def rows_of(weight: torch.Tensor) -> int:
    """Rows of a weight, also of one that ZeRO-3 has partitioned and left empty."""
    return getattr(weight, "ds_shape", weight.shape)[0]


@contextmanager
def _forward_of(module: torch.nn.Module, forward: Callable) -> Iterator[None]:
    """The module's call runs ``forward`` between its hooks."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


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
