"""Models, tokenizers and configs from folders and the hub, whose code never runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def load_pretrained(loader: Any, name: str, **options: Any) -> Any:
    """``loader.from_pretrained`` of an Auto class, without code of the folder or hub repository, and without asking.

    Raises:
        ValueError, OSError: its own; also for damaged files, where code would be needed, and for an attention kernel
            from the hub that the caller did not name as ``attn_implementation``.
    """
    try:
        if "Model" in loader.__name__ and "attn_implementation" not in options:
            _refuse_kernels(name)
        return loader.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and not isinstance(error, RecursionError):  # such as too little memory
            raise
        raise ValueError(f"its files are damaged or of an unknown form: {type(error).__name__}: {error}") from error


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
