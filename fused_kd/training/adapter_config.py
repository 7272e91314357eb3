"""What an adapter folder's ``adapter_config.json`` says, checked before peft goes by it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LARGEST = 1 << 20  # bytes of the file
_LONGEST = 1000  # characters of a pattern
_REPEATS = 6  # of a pattern: each multiplies the time that a name without a match takes
_REPEAT = re.compile(r"[*+{]")
_REPEATED_GROUP = re.compile(r"\)\s*[*+{]")
_OPTIONAL = re.compile(r"(?<![(*+}])\?")
_NAMES = ("base_model_name_or_path", "revision")


def read_adapter_config(name: str | Path) -> dict[str, Any] | None:
    """The adapter configuration of a folder or hub name; None where there is none.

    Raises:
        ValueError: a file of more than 1 MiB or that is no JSON object; one that names a module to import
            (``megatron_core``), or that is not of LoRA (other kinds of adapters load tokenizers and models that
            it names); a module pattern that may take without end: of more than 1,000 characters, with a repeated
            group, or with more than six repeats.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    path = find_adapter_config_file(str(name))
    if path is None:
        return None
    with open(path, "rb") as opened:
        content = opened.read(_LARGEST + 1)
    where = f"adapter_config.json of {str(name)!r}"
    if len(content) > _LARGEST:
        raise ValueError(f"{where} must have at most {_LARGEST} bytes")
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{where} must be a JSON object, got {str(config)[:80]}")
    # every file that peft writes has the default megatron_core
    if config.get("megatron_config") is not None or config.get("megatron_core") not in (None, "megatron.core"):
        raise ValueError(
            f"{where}: megatron_core={str(config.get('megatron_core'))[:80]!r} and megatron_config make peft import "
            "that module: neither may be set"
        )
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type must be 'LORA', got {str(config.get('peft_type'))[:80]!r}")
    for key, value in config.items():
        for text in _texts(value) if key not in _NAMES else ():
            if reason := _endless(text):
                raise ValueError(f"{where}: {key} has {text[:80]!r}, a pattern {reason}: list the modules' names")
    return config


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value:
            yield from _texts(item)
        if isinstance(value, dict):
            yield from _texts(list(value.values()))


def _endless(pattern: str) -> str | None:
    if len(pattern) > _LONGEST:
        return f"of more than {_LONGEST} characters"
    if _REPEATED_GROUP.search(pattern):
        return "with a repeated group"
    if len(_REPEAT.findall(pattern)) + len(_OPTIONAL.findall(pattern)) > _REPEATS:
        return f"with more than {_REPEATS} repeats"
    return None
