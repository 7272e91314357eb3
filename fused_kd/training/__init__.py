"""Training, evaluation and teacher caches for pairs of Hugging Face models."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

_WHERE = {
    "KDTrainer": "trainer", "BetaSchedule": "trainer",
    "Collator": "collate", "PackingCollator": "collate", "with_context": "contexts",
    "ModuleTrainer": "fit", "training_arguments": "fit",
    "load_student": "named", "load_teacher": "named",
    "TeacherCache": "teacher_cache", "write_cache": "cache", "convert_vllm": "cache",
    "Pair": "data", "load_pairs": "data", "load_directions": "data", "load_instructions": "data",
    "load_rows": "rows", "StreamedRows": "rows", "render_sample": "prompts",
    "pack_rows": "packs", "PackedRows": "packs",
    "PROMPTS": "prompts", "PromptTemplate": "prompts", "Rows": "prompts", "tokenize_pairs": "prompts",
    "LoRA": "models", "load_model": "models", "load_tokenizer": "models",
    "Decoding": "generate", "generate_to": "generate",
    "similarity": "score", "translate": "score", "paired_bootstrap": "score",
    "ObjectiveSpec": "specs", "parse_objective": "specs", "advised_objective": "advice",
    "Stages": "stage", "helpers": "stage", "parse": "script", "run_script": "script",
    "shrink": "shrinking", "export": "exporting",
}  # fmt: skip
__all__ = sorted(_WHERE)
# What the guides imported before the modules moved; until 0.2.
_MOVED = {
    "packing": ("collate",),
    "data.prompts": ("prompts", "collate"),
    "cache.teacher_cache": ("teacher_cache",),
    "cache.writer": ("cache",),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


class _Moved(ModuleType):
    """An old module's name; its contents come from where they are now, with a warning."""

    def __getattr__(self, name: str) -> Any:
        old = self.__name__.removeprefix(f"{__name__}.")
        for new in () if name.startswith("__") else _MOVED[old]:
            module = importlib.import_module(f"{__name__}.{new}")
            if hasattr(module, name):
                text = f"{self.__name__} has moved: import {name} from {module.__name__}"
                warnings.warn(text, DeprecationWarning, stacklevel=2)
                return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


for _old in _MOVED:
    sys.modules.setdefault(f"{__name__}.{_old}", _Moved(f"{__name__}.{_old}"))
