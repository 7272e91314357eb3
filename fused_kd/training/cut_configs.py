"""Configurations of smaller models: what they say of each layer goes with the layers that stay."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

# lists of layers' indices; every other list of the model's depth whose name has "layer" in it has an entry a layer
_INDICES = ("mlp_only_layers", "moe_layers", "cross_attention_layers", "hybrid_layer_ids", "global_attn_layers")
# the first so many layers are of another kind
_FIRST = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")
# what ties a layer to others, or to its place among them
_REFUSED: dict[str, Callable[[Any], bool]] = {
    "num_kv_shared_layers": lambda value: bool(value),
    "scale_attn_by_inverse_layer_idx": lambda value: value is True,
    "is_encoder_decoder": lambda value: value is True,
}
_WHY = {
    "num_kv_shared_layers": "its last layers read keys and values of other layers",
    "scale_attn_by_inverse_layer_idx": "its attention is scaled by the layer's number",
    "is_encoder_decoder": "encoder-decoders are not taken",
}


def text_config(config: Any) -> Any:
    """The part of a model's configuration that its decoder's layers are made from."""
    return config.get_text_config(decoder=True)


def cut_layers(config: Any, kept: Sequence[int]) -> Any:
    """A copy of a configuration for a model of these layers alone, in this order.

    Raises:
        ValueError: layers that cannot stand without the others; the message says which field says so.
    """
    for name, wrong in _REFUSED.items():
        for part in (config, text_config(config)):
            if wrong(getattr(part, name, None)):
                raise ValueError(
                    f"layers: {type(config).__name__} cannot be cut, {_WHY[name]} ({name}={getattr(part, name)!r})"
                )
    cut = copy.deepcopy(config)
    text = text_config(cut)
    count = text.num_hidden_layers
    _cut_steps(text, kept)
    for name, value in list(vars(text).items()):
        if name in _INDICES and isinstance(value, (list, tuple)):
            setattr(text, name, [new for new, old in enumerate(kept) if old in value])
        elif name in _FIRST and isinstance(value, int):
            setattr(text, name, sum(old < value for old in kept))
        elif "layer" in name and isinstance(value, (list, tuple)) and len(value) == count:
            setattr(text, name, [value[old] for old in kept])
    text.num_hidden_layers = len(kept)
    return cut


def _cut_steps(config: Any, kept: Sequence[int]) -> None:
    """Experts in every n-th layer (Qwen's MoE models): as a list of the layers without them."""
    step, dense = getattr(config, "decoder_sparse_step", None), getattr(config, "mlp_only_layers", None)
    if step is None or dense is None:
        return
    without = [old for old in range(config.num_hidden_layers) if old in dense or (old + 1) % step]
    config.mlp_only_layers, config.decoder_sparse_step = without, 1


def cut_width(config: Any, width: int | None, intermediate: int | None) -> Any:
    """A copy of a configuration with another hidden size and feed-forward size; heads keep their number and size.

    Raises:
        ValueError: a family whose embeddings are scaled by the hidden size, or two cuts that cannot be told apart.
    """
    cut = copy.deepcopy(config)
    text = text_config(cut)
    if width is not None and intermediate is not None and text.hidden_size == text.intermediate_size:
        raise ValueError(f"width and intermediate cannot both be cut where both are {text.hidden_size}")
    if intermediate is not None:
        text.intermediate_size = intermediate
    if width is not None:
        if "gemma" in text.model_type:
            raise ValueError(f"width: {text.model_type} scales its embeddings by the root of the hidden size")
        try:
            text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        except AttributeError as error:
            raise ValueError(f"width: {text.model_type} has no head_dim of its own") from error
        text.hidden_size = width
    return cut


def check_size(name: str, value: Any, limit: int | None) -> None:
    if limit is None:
        raise ValueError(f"{name}: this model's configuration has no such size")
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        raise ValueError(f"{name} must be an int in [1, {limit}], the teacher's, got {value!r}")
