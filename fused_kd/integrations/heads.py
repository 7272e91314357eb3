"""The output head of a Hugging Face language model as a ``fused_kd.LMHead``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fused_kd import LMHead
from fused_kd.integrations.bodies import without_adapters
from fused_kd.integrations.weights import called_module, check_head, linear_map, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Config fields that multiply the logits, and those that divide them.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
# These models multiply by the field that the others divide by.
_MULTIPLY_BY_LOGITS_SCALING = ("hyperclovax",)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# These scale the decoder's states by d_model**-0.5 where they tie the head to the embedding. Newer configurations say
# so in a field of its own.
_SCALED_WHERE_TIED = ("longt5", "pop2piano", "switch_transformers", "t5", "udop", "umt5")


def lm_head_of(model: PreTrainedModel, hidden: torch.Tensor) -> LMHead:
    """The model's output head on ``hidden`` (``(..., H)``): weight, bias, logit scale and softcap.

    The weight and bias are the model's own parameters, so gradients reach them (and a tied embedding). A buffer
    ``final_logits_bias`` (BART, mBART, Marian) is added to the bias; the scale of T5's tied head is the logits'.
    A head in PEFT's ``modules_to_save`` gives its active copy. One that LoRA adapts gives r more columns of hidden
    states and weight, one quantised by bitsandbytes or torchao a dense copy of its weight, in ``hidden``'s dtype and
    made at each call, one that torchao fake-quantises for training the rounded weight, through which gradients pass.

    Raises ``TypeError`` for a head that is no linear map or quantised by others, ``ValueError`` for a model without a
    head. Scale and softcap are known by the names of their config fields; :func:`check_lm_head` finds a model that
    does something else to its logits.
    """
    base = without_adapters(model)
    head = check_head_module(model)
    if head.weight.is_meta:
        raise ValueError(
            f"the head of {type(base).__name__} is offloaded (its weight is on the meta device): keep it on a device"
        )
    hidden, weight, bias = linear_map(head, hidden)
    scale, softcap = logit_options(base.config)
    return LMHead(hidden, weight, bias=with_final_bias(base, bias), logit_scale=scale, softcap=softcap)


def check_head_module(model: PreTrainedModel, *, plain: bool = False) -> Any:
    """The module that computes the logits; raises as :func:`lm_head_of` does, from its structure alone.

    Weights are not looked at: they may still be on another rank or on the meta device. ``plain`` refuses a head with
    an adapter or in ``modules_to_save`` as well.
    """
    base = without_adapters(model)
    head = base.get_output_embeddings()
    name = type(base).__name__
    if head is None:
        raise ValueError(f"model must have an output head with a weight, {name}.get_output_embeddings() gave None")
    if not plain:
        head = called_module(head)
    if not isinstance(getattr(head, "weight", None), torch.Tensor):
        raise TypeError(f"the head of {name} must be a linear map with a weight, got {head!r}")
    check_head(head, name, plain)
    return head


def check_whole_head(model: PreTrainedModel, sharded: bool) -> None:
    """Raise ``TypeError`` for a head that no loss can be made of, or not where each process has a part of it."""
    try:
        # an adapter's own modules are not called, so nothing would gather their weights
        check_head_module(model, plain=sharded)
    except TypeError as error:
        check_head_module(model)
        name = type(without_adapters(model)).__name__
        raise TypeError(
            f"an adapter on the head of {name} cannot be trained under FSDP2 and ZeRO-3, where each process has a part "
            "of it: train with DDP or ZeRO-2, or leave the head out of target_modules and modules_to_save"
        ) from error


def common_vocab_size(
    student: PreTrainedModel, teacher: PreTrainedModel | None, vocab_size: int | None, tokenizer: Any
) -> int | None:
    """:func:`common_columns` of the models' heads."""
    models = [model for model in (student, teacher) if model is not None]
    return common_columns([rows_of(check_head_module(model).weight) for model in models], vocab_size, tokenizer)


def common_columns(heads: list[int], vocab_size: int | None, tokenizer: Any) -> int | None:
    """The columns to cut all heads to, the student's first, or None where they have equal sizes and ``vocab_size`` is
    None.

    Unequal heads need ``vocab_size``, or the ``tokenizer`` that all share (or a processor that has it), whose length it
    is then. Raises ``ValueError`` without either, and for a ``vocab_size`` beyond a head.
    """
    if vocab_size is None:
        if len(set(heads)) == 1:
            return None
        sizes = " and ".join(map(str, heads))
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if tokenizer is None or not hasattr(tokenizer, "__len__"):
            raise ValueError(
                f"student and teacher have vocabularies of {sizes}: give vocab_size, or "
                "the shared tokenizer as processing_class, to cut the heads to the common tokens; or vocab_map, which "
                "says which of the teacher's columns the student's are"
            )
        vocab_size = len(tokenizer)
        if vocab_size > min(heads):
            raise ValueError(
                f"student and teacher have vocabularies of {sizes}, and the tokenizer {vocab_size} "
                f"tokens: those from {min(heads)} on (added to one model?) are unknown to the other. Give "
                f"vocab_size={min(heads)} to leave them out, if no label has one, or resize the other model"
            )
    if not 1 <= vocab_size <= min(heads):
        raise ValueError(f"vocab_size must be in [1, {min(heads)}] for heads of {heads}, got {vocab_size}")
    return vocab_size


def logit_options(config: PreTrainedConfig) -> tuple[float, float | None]:
    """``(logit_scale, softcap)`` that a model with this config applies: ``softcap * tanh(scale * logits /
    softcap)``.

    Reads the text part of a multimodal config, the decoder's of a composite encoder-decoder. Raises ``ValueError`` if
    a field's value is not a usable number.
    """
    text = config.get_text_config(decoder=hasattr(config, "decoder") or None)
    scale = 1.0
    for name in _MULTIPLIERS + _DIVISORS:
        value = getattr(text, name, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"config.{name} must be a positive number, got {value!r}")
        divides = name in _DIVISORS and text.model_type not in _MULTIPLY_BY_LOGITS_SCALING
        scale = scale / value if divides else scale * value
    tied = getattr(text, "tie_word_embeddings", False) and text.model_type in _SCALED_WHERE_TIED
    if getattr(text, "scale_decoder_outputs", tied):
        scale *= text.d_model**-0.5
    softcap = next((cap for name in _SOFTCAPS if (cap := getattr(text, name, None)) is not None), None)
    return float(scale), None if softcap is None else float(softcap)


def with_final_bias(model: Any, bias: torch.Tensor | None) -> torch.Tensor | None:
    """``bias`` and the model's buffer ``final_logits_bias``, (V,), where it has one."""
    final = getattr(model, "final_logits_bias", None)
    if not isinstance(final, torch.Tensor):
        return bias
    final = final.reshape(-1)
    return final if bias is None else bias + final.to(bias.dtype)
