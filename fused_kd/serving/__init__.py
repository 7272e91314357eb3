"""A teacher in another process or on another machine: its server, and clients that a trainer takes as teacher."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "ServedTeacher": "client",
    "SGLangTeacher": "engines",
    "VLLMTeacher": "engines",
    "TeacherServer": "server",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
