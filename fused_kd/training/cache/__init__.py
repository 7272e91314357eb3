"""A teacher's top-k lists on disk, and training from them."""

import importlib

_WHERE = {
    "teacher_cache": (
        "TeacherCache",
        "CachedRows",
        "fingerprint_rows",
        "fingerprint_teacher",
        "fingerprint_template",
        "fingerprint_tokenizer",
        "target_positions",
    ),
    "writer": ("write_cache", "write_lists", "top_k_log_probs"),
    "vllm_logprobs": ("convert_vllm",),
    "codes": ("DTYPES",),
}


def __getattr__(name):
    for module, names in _WHERE.items():
        if name in names:
            return getattr(importlib.import_module(f"fused_kd.training.cache.{module}"), name)
    raise AttributeError(name)
