"""A language model's head from its files, without the rest of the model."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from fused_kd import LMHead
from fused_kd.integrations.heads import check_head_module, logit_options
from fused_kd.training.loading import safe_config
from fused_kd.training.stored_head import bare_head

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# GPT-NeoX; models of text and images
_RENAMED = {"lm_head.": "embed_out.", "model.language_model.": "language_model.model."}


def head_of_files(name: str) -> LMHead:
    """The head in a folder or hub repository of safetensors files, on no hidden states; on the CPU.

    Its weight is a tensor of its own, or the embedding that it is tied to.

    Scale and cap are those that the config names, as of
    :func:`fused_kd.integrations.transformers.logit_options`.

    Raises:
        ValueError: no such model or files, no tensor of the head in them, a head that is no plain linear map.
    """
    from transformers import AutoModelForCausalLM

    try:
        config = safe_config(name, {})
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        module = check_head_module(model, plain=True)
        weight = _tensor(name, model, module.weight)
        bias = None if getattr(module, "bias", None) is None else _tensor(name, model, module.bias)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"head={name!r} must be a causal LM in safetensors files: {error}") from error
    scale, softcap = logit_options(config)
    return bare_head(weight, bias, logit_scale=scale, softcap=softcap)


def _tensor(name: str, model: Any, wanted: Tensor) -> Tensor:
    """What the files have for a parameter, which may be tied to others."""
    from safetensors import safe_open

    keys = [key for key, value in model.state_dict(keep_vars=True).items() if value is wanted]
    for key in [*keys, *(old for key in keys if (old := _older(key)) != key)]:
        path = _file_with(name, key)
        if path is None:
            continue
        with safe_open(path, framework="pt") as file:
            if key not in file.keys():  # noqa: SIM118
                continue
            found: Tensor = file.get_tensor(key)
        if found.shape != wanted.shape:
            raise ValueError(f"{key} must have shape {tuple(wanted.shape)}, got {tuple(found.shape)}")
        return found
    raise ValueError(f"no tensor {' or '.join(keys)} in them")


def _older(key: str) -> str:
    """A parameter's name in files that were written before transformers renamed it."""
    for now, before in _RENAMED.items():
        if key.startswith(now):
            return before + key.removeprefix(now)
    return key


def _file_with(name: str, key: str) -> str | None:
    """The file that has a tensor, or may have it."""
    from transformers.utils.hub import cached_file

    index = cached_file(name, _INDEX, _raise_exceptions_for_missing_entries=False)
    if index is None:
        return cached_file(name, _ONE)
    with open(index, encoding="utf-8") as file:
        part = json.load(file)["weight_map"].get(key)
    return None if part is None else cached_file(name, part)
