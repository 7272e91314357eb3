"""A trained model as an ordinary folder that other programs read: adapters added, nothing of the training in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from fused_kd.training.loading import gguf_of, has_tokenizer, read_adapter_config
from fused_kd.training.models import load_any, load_tokenizer, merged, save_whole
from fused_kd.training.stage import check_writable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"


def export(
    source: str | Path, folder: str | Path, *, base: str | Path | None = None, dtype: torch.dtype | str = "auto"
) -> PreTrainedModel:
    """Write a trained model as a folder that transformers, vLLM and llama.cpp's converter read; returns the model.

    The folder has the configuration with its architecture, ``generation_config.json``, the weights in safetensors
    under the names that the model's family has on the hub, tied ones once, the tokenizer and its chat template. It is
    written whole or not at all, and replaces what is there.

    Args:
        source: a training's folder (with the model in ``model``), a folder or hub name of a model or of LoRA adapters,
            or a GGUF file. Adapters are added to their base in float32.
        folder: where to write.
        base: what the adapters belong to, a folder or hub name; None (default) takes the one that they name.
        dtype: of the weights; default "auto", that of the files, or of the base of adapters.

    Raises:
        ValueError: no model there, a ``base`` for a model that has no adapters, quantised weights, fewer embeddings
            than the tokenizer has tokens, a ``folder`` that holds the source or something else than a model.
        ImportError: adapters without peft.
    """
    source = model_of(source)
    adapters = _adapters(source)
    if base is not None and not adapters:
        raise ValueError(f"base={str(base)!r} is for adapters, and {str(source)!r} is a whole model")
    whole = source
    if adapters:
        whole = base or (read_adapter_config(source) or {}).get("base_model_name_or_path") or ""
        if not str(whole):
            raise ValueError(f"base must be given: the adapters of {str(source)!r} do not name what they belong to")
    check_output(Path(folder), source, whole)
    tokenizer: Any = load_tokenizer(source if adapters and has_tokenizer(source) else whole)
    model: Any = load_any(whole, dtype=dtype)
    check_exportable(model, tokenizer, str(whole))
    if adapters:
        model = merged(model, source)
    # what a training switches off
    model.config.use_cache = model.generation_config.use_cache = True
    save_whole(model, tokenizer, Path(folder))
    return cast("PreTrainedModel", model)


def model_of(source: str | Path) -> str | Path:
    """The folder or name of the model itself: of a training's folder the ``model`` in it.

    Raises:
        ValueError: a folder that has neither a model nor adapters.
    """
    folder = Path(source)
    if not folder.is_dir() or gguf_of(source)[1] is not None:
        return source
    for found in (folder, folder / "model"):
        if any((found / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
            return found
    steps = [path.name for path in folder.rglob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    unfinished = f"; its training is unfinished, it has {', '.join(sorted(steps)[:3])}" if steps else ""
    raise ValueError(f"{str(source)!r} has no {CONFIG} and no {ADAPTER_CONFIG}, nor has its model folder{unfinished}")


def _adapters(source: str | Path) -> bool:
    folder = Path(source)
    if folder.is_dir():
        both = [(folder / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)]
        if all(both):
            raise ValueError(f"{str(source)!r} has both {CONFIG} and {ADAPTER_CONFIG}: give a folder with one of them")
        return both[1]
    return not folder.exists() and read_adapter_config(source) is not None


def check_output(folder: Path, *sources: str | Path) -> None:
    """Raise ``ValueError`` where a folder cannot be written to, has anything but a model in it, or holds a source."""
    for source in (Path(source) for source in sources if Path(source).exists()):
        if folder.resolve() in (source.resolve(), *source.resolve().parents):
            raise ValueError(f"output={str(folder)!r} holds the model that is read: give another folder")
    if folder.exists() and not (folder.is_dir() and ((folder / CONFIG).is_file() or not any(folder.iterdir()))):
        raise ValueError(f"output={str(folder)!r} exists and is no model folder: give another one")
    check_writable(folder.parent)


def check_exportable(model: Any, tokenizer: Any, name: str) -> None:
    """Raise ``ValueError`` for quantised weights, and for a tokenizer with more tokens than the model."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"{name} is quantised: its weights cannot be written as ordinary ones")
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise ValueError(f"{name} has {rows} embeddings, fewer than the {len(tokenizer)} tokens of its tokenizer")
