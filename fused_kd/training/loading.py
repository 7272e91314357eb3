"""Models, tokenizers and configs from folders and the hub, whose code never runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class IncompleteModelError(ValueError):
    """The files of a model lack tensors, or have some of another shape."""


def load_pretrained(loader: Any, name: str, **options: Any) -> Any:
    """``loader.from_pretrained`` of an Auto class, without code of the folder or hub repository, and without asking.

    Raises:
        IncompleteModelError: names a model's missing and mismatched tensors, which transformers fills at random.
        ValueError, OSError: its own; also for damaged files, where code would be needed, and for an attention kernel
            from the hub that the caller did not name as ``attn_implementation``.
    """
    try:
        if not loader.__name__.startswith("AutoModel"):
            return loader.from_pretrained(name, trust_remote_code=False, **options)
        if "attn_implementation" not in options:
            _refuse_kernels(name)
        return _whole_model(loader, name, **options)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and not isinstance(error, RecursionError):  # such as too little memory
            raise
        raise ValueError(f"its files are damaged or of an unknown form: {type(error).__name__}: {error}") from error


def _whole_model(loader: Any, name: str, **options: Any) -> Any:
    model, found = loader.from_pretrained(
        name, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **options
    )
    missing = sorted(found["missing_keys"])
    wrong = [f"{key}: {tuple(saved)}, not {tuple(own)}" for key, saved, own in sorted(found["mismatched_keys"])]
    if missing or wrong or found["error_msgs"]:
        told = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("of another shape", wrong), ("unreadable", found["error_msgs"]))
            if names
        ]
        raise IncompleteModelError(
            f"the files of {name!r} must hold every tensor of {type(model).__name__}: {', '.join(told)}"
        )
    return model


def _refuse_kernels(name: str) -> None:
    from transformers import PretrainedConfig

    try:
        about, _ = PretrainedConfig.get_config_dict(name)
    except OSError:  # an adapter alone, or nothing
        return
    for key, value in _implementations(about):
        if "/" in str(value):
            raise ValueError(f"its {key} is {value!r}, code from the hub: give another as attn_implementation")


def _implementations(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key.endswith("_implementation"):
            yield key, value
        elif isinstance(value, dict):
            yield from _implementations(value)
