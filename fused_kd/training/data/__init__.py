"""Text for translation."""

import importlib

_WHERE = {
    "pairs": ("Pair", "LANGUAGES", "load_pairs", "load_directions", "parse_direction", "language_name"),
    "instructions": ("Instruction", "load_instructions"),
    "noise": ("misalign",),
    "corpus": ("toy_corpus",),
}


def __getattr__(name):
    for module, names in _WHERE.items():
        if name in names:
            return getattr(importlib.import_module(f"fused_kd.training.data.{module}"), name)
    raise AttributeError(name)
