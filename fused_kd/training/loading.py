"""Models, tokenizers and configs from folders and the hub, whose code never runs."""

from __future__ import annotations

import contextlib
import functools
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

# what a model's files may ask for by themselves: transformers' own, none of which fetches a kernel
_SAFE = {
    "attn_implementation": {"eager", "sdpa", "flex_attention", "paged|eager"},
    "experts_implementation": {"eager", "batched_mm", "grouped_mm"},
}

TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "source.spm", "tekken.json",
)  # fmt: skip
_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".json")


def load_pretrained(loader: Any, name: str, **options: Any) -> Any:
    """``loader.from_pretrained`` of an Auto class, without code of the folder or hub repository, and without asking.

    The ``adapter_config.json`` of adapters and the configuration of their base count as well. A GGUF file, or a folder
    with one and no ``config.json``, gives a plain model that can be saved, in float32 unless ``dtype`` names another;
    that needs the package ``gguf``. Not stopped here: where the package ``kernels`` is installed, transformers itself
    fetches kernels of the hub's kernels-community for some architectures (such as RWKV) and some quantised files
    (mxfp4, eetq, fp8, nvfp4).

    Raises:
        ValueError, OSError: its own; also for damaged files, for tensors that are missing or of another shape (which
            transformers fills at random), where code would be needed, for adapters that :func:`read_adapter_config`
            refuses, and for an implementation of attention or experts that is a kernel from the hub or a package that
            is not installed, unless the caller named it as ``attn_implementation`` or ``experts_implementation``.
    """
    folder, file = gguf_of(name)
    options = {**_where(folder), **options, **({} if file is None else {"gguf_file": file})}
    try:
        with contextlib.nullcontext() if file is None else gguf_read_once():
            if not loader.__name__.startswith("AutoModel"):
                return loader.from_pretrained(folder, trust_remote_code=False, **options)
            config = safe_config(folder, options)
            if file is None:
                return _whole_model(loader, folder, config=config, **options)
            return _plain(_whole_model(loader, folder, config=config, **_unpacked(), **options))
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and not isinstance(error, RecursionError):  # such as too little memory
            raise
        raise ValueError(f"its files are damaged or of an unknown form: {type(error).__name__}: {error}") from error


def is_missing(name: str | Path) -> bool:
    """Whether a model's name can only be that of a folder or file, and nothing is there."""
    path, text = Path(name), str(name)
    meant = path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or "\\" in text
    return (meant or path.suffix in _FILES) and not path.exists()


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder has a tokenizer's files, or a GGUF file."""
    return gguf_of(folder)[1] is not None or any((Path(folder) / name).is_file() for name in TOKENIZERS)


def _where(name: str | Path) -> dict[str, Any]:
    """Without a network, the option that keeps a hub name's loading from trying again and again."""
    return {} if Path(name).exists() or _has_hub() else {"local_files_only": True}


@functools.cache
def _has_hub() -> bool:
    from huggingface_hub import constants

    if getproxies():  # which may know the address
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


def gguf_of(name: str | Path) -> tuple[str, str | None]:
    """The folder and the name of the GGUF file that a model's name stands for; (name, None) where it is none.

    Raises:
        ValueError: a folder with several of them, and no ``config.json``.
    """
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), path.name
    if not path.is_dir() or any((path / other).is_file() for other in ("config.json", "adapter_config.json")):
        return str(name), None
    found = sorted(file.name for file in path.glob("*.gguf"))
    if len(found) > 1:
        raise ValueError(f"{str(name)!r} has {len(found)} GGUF files ({', '.join(found[:3])}): name the one to use")
    return str(name), found[0] if found else None


@contextlib.contextmanager
def gguf_read_once() -> Iterator[None]:
    """Within, transformers reads a GGUF file's metadata once, and makes its table of names once.

    By itself it reads them for the configuration and again for the weights, and makes the table for every module, which
    takes longer than the weights.
    """
    try:
        import gguf
    except ImportError:  # transformers says so
        yield
        return
    names = [name for name in ("GGUFReader", "get_tensor_name_map") if hasattr(gguf, name)]
    own = {name: getattr(gguf, name) for name in names}
    for name, value in own.items():
        setattr(gguf, name, functools.cache(value))
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(gguf, name, value)


def _unpacked() -> dict[str, Any]:
    """Options that keep transformers from leaving a GGUF file's weights in blocks, for which it fetches kernels."""
    try:
        from transformers import GgufConfig
    except ImportError:  # releases that cannot leave them so
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _plain(model: Any) -> Any:
    """A model without the marks of the file that its weights came from, which transformers would not save."""
    model.is_quantized, model.hf_quantizer = False, None
    for name in ("quantization_config", "_pre_quantization_dtype", "_name_or_path", "_model_name_or_path"):
        model.config.__dict__.pop(name, None)
    return model


def read_adapter_config(name: str | Path) -> dict[str, Any] | None:
    """The adapter configuration of a folder or hub name; None where there is none.

    Raises:
        ValueError: a file that is no JSON object, that names a module to import (``megatron_core``), or that is not
            of LoRA: other kinds of adapters load tokenizers and models that it names.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    path = None if is_missing(name) else find_adapter_config_file(str(name), **_where(name))
    if path is None:
        return None
    where = f"adapter_config.json of {str(name)!r}"
    try:
        config = json.loads(Path(path).read_bytes())
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
    return config


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
        raise ValueError(f"its files must hold every tensor of {type(model).__name__}: {', '.join(told)}")
    return model


def safe_config(name: str, options: dict[str, Any]) -> Any:
    """The configuration that the loader would make, with the caller's options; that of an adapter's base."""
    from transformers import AutoConfig
    from transformers.utils.import_utils import is_peft_available

    # as transformers does: beside a config.json the adapters go on the model there
    adapter = read_adapter_config(name) if is_peft_available() else None
    if adapter is not None and not (Path(name) / "config.json").exists():
        name = adapter.get("base_model_name_or_path")  # type: ignore[assignment]
        if not isinstance(name, str):
            raise ValueError(f"its adapter_config.json must name a model as base_model_name_or_path, got {name!r}")
    where = {key: options[key] for key in ("gguf_file",) if key in options}
    config = AutoConfig.from_pretrained(name, trust_remote_code=False, **_where(name), **where)
    chosen = {key: options[key] for key in _SAFE if key in options}
    for key, value in chosen.items():
        setattr(config, f"_{key}", value)
    named = {value for _, value in _implementations(chosen)}
    for key, value in _implementations(config):
        safe = _SAFE[key]
        if value is not None and value not in named | safe and not _is_installed(value):
            raise ValueError(
                f"its {key} is {str(value)[:80]!r}, which may be code from the hub: expected one of "
                f"{', '.join(sorted(safe))}; name the one to use as {key}"
            )
    return config


def _implementations(value: Any, key: str | None = None) -> Iterator[tuple[str, Any]]:
    """Every implementation that a configuration or its parts name, read as transformers does and as it is stored."""
    from transformers import PretrainedConfig

    if isinstance(value, PretrainedConfig):
        for name in _SAFE:
            yield name, getattr(value, f"_{name}", None)
        value = object.__getattribute__(value, "__dict__")  # the file may give names another meaning (attribute_map)
    if isinstance(value, dict):
        for name, item in value.items():
            own = str(name).removeprefix("_").removesuffix("_internal")
            yield from _implementations(item, own if own in _SAFE else key)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _implementations(item, key)
    elif key is not None:
        yield key, value


def _is_installed(implementation: Any) -> bool:
    from transformers import utils

    version = str(implementation).removeprefix("flash_attention_")
    available = getattr(utils, f"is_flash_attn_{version}_available", None)
    return str(implementation) == f"flash_attention_{version}" and available is not None and bool(available())
