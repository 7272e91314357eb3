"""Modules that guides named before they moved: the old paths work and say where to go."""

import importlib

import pytest

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("old", "name", "new"),
    [
        ("packing", "PackingCollator", "collate"),
        ("data.prompts", "Collator", "collate"),
        ("data.prompts", "PromptTemplate", "prompts"),
        ("cache.teacher_cache", "TeacherCache", "teacher_cache"),
        ("cache.writer", "write_cache", "cache"),
    ],
)
def test_old_paths_lead_to_the_new_with_a_warning(old: str, name: str, new: str) -> None:
    module = importlib.import_module(f"fused_kd.training.{old}")
    with pytest.warns(DeprecationWarning, match=f"import {name} from fused_kd.training.{new}"):
        found = getattr(module, name)
    assert found is getattr(importlib.import_module(f"fused_kd.training.{new}"), name)
    with pytest.raises(AttributeError, match="nothing"):
        module.nothing  # noqa: B018
