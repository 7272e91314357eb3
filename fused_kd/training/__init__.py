"""Training, evaluation and teacher caches for pairs of Hugging Face models."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "KDTrainer": "trainer", "BetaSchedule": "trainer",
    "Collator": "collate", "PackingCollator": "collate",
    "ModuleTrainer": "fit", "training_arguments": "fit",
    "TeacherCache": "cache", "write_cache": "cache", "convert_vllm": "cache",
    "Pair": "data", "load_pairs": "data", "load_directions": "data", "load_instructions": "data",
    "PROMPTS": "prompts", "PromptTemplate": "prompts", "Rows": "prompts", "tokenize_pairs": "prompts",
    "LoRA": "models", "load_model": "models", "load_tokenizer": "models",
    "Decoding": "generate", "generate_to": "generate",
    "similarity": "score", "translate": "score", "paired_bootstrap": "score",
    "ObjectiveSpec": "specs", "parse_objective": "specs",
    "Stages": "stage", "helpers": "stage", "parse": "script", "run_script": "script",
}  # fmt: skip
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
