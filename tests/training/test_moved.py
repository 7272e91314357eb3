"""Modules that guides named before they moved: the old paths work and say where to go."""

import subprocess
import sys

import pytest

MOVED = [
    ("packing", "PackingCollator", "collate"),
    ("data.prompts", "Collator", "collate"),
    ("data.prompts", "PromptTemplate", "prompts"),
    ("cache.teacher_cache", "TeacherCache", "teacher_cache"),
    ("cache.writer", "write_cache", "cache"),
]


def test_old_paths_lead_to_the_new_with_a_warning():
    pytest.importorskip("transformers")
    code = "import importlib, warnings\n"
    for old, name, new in MOVED:
        code += (
            "with warnings.catch_warnings(record=True) as seen:\n"
            "    warnings.simplefilter('always')\n"
            f"    from fused_kd.training.{old} import {name}\n"
            f"assert {name} is importlib.import_module('fused_kd.training.{new}').{name}\n"
            f"assert any('from fused_kd.training.{new}' in str(w.message) for w in seen), {name!r}\n"
        )
    code += (
        "try: from fused_kd.training.packing import nothing\n"
        "except ImportError: pass\n"
        "else: raise SystemExit('no error')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
