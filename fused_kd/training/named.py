"""Students and teachers by name: folders, hub names, GGUF files, caches and servers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fused_kd.integrations.precision import trained_in_float32
from fused_kd.serving.client import ServedTeacher
from fused_kd.training.loading import load_pretrained, read_adapter_config
from fused_kd.training.shards import INDEX
from fused_kd.training.teacher_cache import TeacherCache

CACHE = "cache:"
SERVERS = ("http://", "https://")
_GGUF = ".gguf"


def load_teacher(name: str | Path) -> Any:
    """A trainer's ``teacher`` from its name.

    >>> KDLossMixin(..., teacher=load_teacher("cache:runs/cache"))

    Args:
        name: a folder, a hub name or a GGUF file of a causal LM, in the dtype of its files; "cache:FOLDER" or the
            folder of a cache (:class:`fused_kd.training.TeacherCache`); the "http://HOST:PORT" of a server
            (:class:`fused_kd.serving.ServedTeacher`).

    Raises:
        ValueError: nothing of the kind there, or files that are damaged, lack tensors or need code of their own.
        ConnectionError: no server there.
    """
    text = str(name)
    if text.startswith(SERVERS):
        return ServedTeacher(text)
    if text.startswith(CACHE) or _is_cache(Path(text)):
        return TeacherCache(text.removeprefix(CACHE))
    return _causal_lm("teacher", text)


def load_student(name: str | Path) -> Any:
    """A trainer's ``model`` from a folder, a hub name or a GGUF file of a causal LM.

    Weights in bf16 or fp16 become float32, as most of a training's updates would round to nothing
    (``TrainingArguments(bf16=True)`` computes in bf16 all the same).

    Raises:
        ValueError: as :func:`load_teacher`; for adapters without their model.
    """
    text = str(name)
    if text.startswith((CACHE, *SERVERS)):
        raise ValueError(f"model must be a causal LM, got {text!r}, which cannot be trained: is it the teacher?")
    if Path(text).is_dir() and not (Path(text) / "config.json").exists() and read_adapter_config(text) is not None:
        raise ValueError(
            f"model must be a model, got {text!r}, which holds adapters: load their base and give "
            "fused_kd.training.models.load_adapters(base, folder), or merge them (python -m fused_kd.export)"
        )
    model = trained_in_float32(_causal_lm("model", text))
    return _plain(model) if text.endswith(_GGUF) else model


def tokenizer_of(name: str | Path) -> Any:
    """The tokenizer beside a model's files; None where there is none."""
    from transformers import AutoTokenizer

    folder, options = _place(str(name))
    try:
        return load_pretrained(AutoTokenizer, folder, **options)
    except (OSError, ValueError, ImportError):
        return None


def opened(teacher: Any, load: Callable[[Any], Any] = load_teacher) -> Any:
    """What a trainer takes as teachers, with all names in it loaded; each name once."""
    known: dict[str, Any] = {}

    def one(value: Any) -> Any:
        if not isinstance(value, (str, Path)):
            return value
        if str(value) not in known:
            known[str(value)] = load(value)
        return known[str(value)]

    if not isinstance(teacher, (list, tuple)):
        return one(teacher)
    # of a pair the weight comes first
    parts = ((*part[:1], *map(one, part[1:])) if isinstance(part, (list, tuple)) else one(part) for part in teacher)
    return type(teacher)(parts)


def _causal_lm(argument: str, name: str) -> Any:
    from transformers import AutoModelForCausalLM

    folder, options = _place(name)
    path = Path(folder)
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or options):
        raise ValueError(f"{argument} must be a model, or its folder or name, got {name!r}: there is no such folder")
    try:
        return load_pretrained(AutoModelForCausalLM, folder, dtype="auto", **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{argument} must be a model, or its folder or name, got {name!r}, which gives no causal LM: {error}"
        ) from error


def _plain(model: Any) -> Any:
    """A model of a GGUF file, whose weights are dense, as one that can be saved as any other."""
    model.is_quantized, model.hf_quantizer = False, None
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    return model


def _is_cache(folder: Path) -> bool:
    return (folder / INDEX).is_file() and not (folder / "config.json").exists()


def _place(name: str) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` takes for it: a folder or hub name, and the file in it."""
    path = Path(name)
    return (str(path.parent), {"gguf_file": path.name}) if name.endswith(_GGUF) else (name, {})
