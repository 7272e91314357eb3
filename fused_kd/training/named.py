"""Students and teachers by name: folders, hub names, GGUF files, caches and servers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fused_kd.integrations.precision import trained_in_float32
from fused_kd.serving.client import ServedTeacher
from fused_kd.training.loading import is_missing, load_pretrained, read_adapter_config
from fused_kd.training.named_teachers import CACHE, SERVED, parse_teachers
from fused_kd.training.teacher_cache import TeacherCache


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
    (found,) = parse_teachers([str(name)])
    if found.kind == "server":
        return ServedTeacher(found.place)
    if found.kind == "cache":
        return TeacherCache(found.place)
    return found.own if found.kind == "own" else _causal_lm("teacher", found.place)


def load_student(name: str | Path) -> Any:
    """A trainer's ``model`` from a folder, a hub name or a GGUF file of a causal LM.

    Weights in bf16 or fp16 become float32, as most of a training's updates would round to nothing
    (``TrainingArguments(bf16=True)`` computes in bf16 all the same).

    Raises:
        ValueError: as :func:`load_teacher`; for adapters without their model.
    """
    text = str(name)
    if text.startswith((CACHE, *SERVED)):
        raise ValueError(f"model must be a causal LM, got {text!r}, which cannot be trained: is it the teacher?")
    if Path(text).is_dir() and not (Path(text) / "config.json").exists() and read_adapter_config(text) is not None:
        raise ValueError(
            f"model must be a model, got {text!r}, which holds adapters: load their base and give "
            "fused_kd.training.models.load_adapters(base, folder), or merge them (python -m fused_kd.export)"
        )
    return trained_in_float32(_causal_lm("model", text))


def tokenizer_of(name: str | Path) -> Any:
    """The tokenizer beside a model's files; None where there is none."""
    from transformers import AutoTokenizer

    try:
        return load_pretrained(AutoTokenizer, str(name))
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

    if is_missing(name):
        raise ValueError(f"{argument} must be a model, or its folder or name, got {name!r}: there is no such folder")
    try:
        return load_pretrained(AutoModelForCausalLM, name, dtype="auto")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{argument} must be a model, or its folder or name, got {name!r}, which gives no causal LM: {error}"
        ) from error
