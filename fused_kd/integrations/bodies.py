"""Last hidden states of Hugging Face language models, decoder-only or encoder-decoder, without logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")


def hidden_states(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    """Last hidden states, ``(batch, length, H)``, that the model's output head takes, after the final norm; no logits
    are computed.

    ``inputs`` are those of the model's forward: ``input_ids`` or ``inputs_embeds``, ``attention_mask``,
    ``position_ids``, pixel values of a multimodal model. An encoder-decoder gives the states of its decoder and needs
    ``decoder_input_ids`` or ``decoder_inputs_embeds``; without both they are made from ``labels`` as the model's own
    forward makes them, shifted right by the start token. Gradients flow as usual.

    Raises ``ValueError`` if a decoder-only model is given ``labels`` or an encoder-decoder nothing for its decoder,
    ``TypeError`` if the model has no body that can be called without its head.
    """
    states: torch.Tensor = body_outputs(model, **inputs).last_hidden_state
    return states


def body_outputs(model: PreTrainedModel, **inputs: Any) -> Any:
    """All that the body returns; ``last_hidden_state`` is what :func:`hidden_states` gives."""
    base = without_adapters(model)
    inputs.setdefault("use_cache", False)
    if labels_need_shift(base):
        if "labels" in inputs:
            raise ValueError(
                "labels must not be passed to hidden_states: the loss needs them, the body of a causal LM does not"
            )
    else:
        _set_decoder_inputs(base, inputs)
    body = _body(base)
    if body is None:
        return SimpleNamespace(last_hidden_state=_both_stacks(base.get_encoder(), base.get_decoder(), inputs))
    return body(**inputs, return_dict=True)


def labels_need_shift(model: PreTrainedModel) -> bool:
    """The ``shift`` of :class:`fused_kd.KDLoss` for labels as Hugging Face's collators make them.

    True for a decoder-only model, whose labels are its input tokens: position i predicts label i + 1. False for an
    encoder-decoder: its decoder's inputs are shifted, so position i predicts label i.
    """
    return not getattr(without_adapters(model).config, "is_encoder_decoder", False)


def without_adapters(model: Any) -> Any:
    """A PEFT model's own model, with its adapters in place; any other model unchanged."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Within, the model is in eval mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _body(model: Any) -> Any:
    """The module that gives the last hidden states; None for an encoder-decoder that holds its two stacks itself."""
    # base_model first: in a multimodal model it runs every modality, get_decoder() is the text part alone
    if model.base_model is not model:
        return model.base_model
    decoder = model.get_decoder()
    if decoder is not None and decoder is not model and decoder.get_output_embeddings() is None:
        return decoder if labels_need_shift(model) else None
    # Llama 4's text model goes by another name than its prefix
    body = getattr(model, "model", None)
    if isinstance(body, torch.nn.Module):
        return body
    raise TypeError(f"{type(model).__name__} has no body apart from its head (base_model, get_decoder)")


def _set_decoder_inputs(model: Any, inputs: dict[str, Any]) -> None:
    """Replace ``labels`` by ``decoder_input_ids``, unless the decoder has inputs."""
    labels = inputs.pop("labels", None)
    if any(inputs.get(name) is not None for name in _DECODER_INPUTS):
        return
    if labels is None:
        raise ValueError(
            f"{' or '.join(_DECODER_INPUTS)} must be given for {type(model).__name__}, or labels to make them from"
        )
    device = next((x.device for x in inputs.values() if isinstance(x, torch.Tensor)), labels.device)
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    make = own if own is not None else lambda labels: _shifted_right(model, labels)
    inputs["decoder_input_ids"] = make(labels=labels.to(device))


def _shifted_right(model: Any, labels: torch.Tensor) -> torch.Tensor:
    """What M2M100's and NLLB's forward does, whose classes offer no method for it."""
    config = model.config
    for name in ("decoder_start_token_id", "pad_token_id"):
        if not isinstance(getattr(config, name, None), int):
            raise ValueError(
                f"config.{name} of {type(model).__name__} must be a token id, to make decoder_input_ids from labels, "
                f"got {getattr(config, name, None)!r}"
            )
    start = torch.full_like(labels[:, :1], config.decoder_start_token_id)
    shifted = torch.cat([start, labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, config.pad_token_id)


def _both_stacks(encoder: Any, decoder: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The decoder's states of a model without a body that holds both stacks (T5 and its family)."""
    rest = dict(inputs)
    given = {name: rest.pop(name, None) for name in ("input_ids", "inputs_embeds", "attention_mask")}
    own = {name: rest.pop(f"decoder_{name}", None) for name in given}
    encoded = rest.pop("encoder_outputs", None)
    use_cache = rest.pop("use_cache")
    if encoded is None:
        encoded = encoder(**given, **rest, return_dict=True)
    states: torch.Tensor = decoder(
        **own,
        **rest,
        encoder_hidden_states=encoded[0],
        encoder_attention_mask=given["attention_mask"],
        use_cache=use_cache,
        return_dict=True,
    ).last_hidden_state
    return states
