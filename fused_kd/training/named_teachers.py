"""Teachers as text: a model's name, ``cache:FOLDER``, ``http://HOST:PORT``, ``own:decay=0.999``, or several of them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fused_kd.integrations.own import OwnTeacher
from fused_kd.training.shards import INDEX

CACHE, OWN, SERVED = "cache:", "own:", ("http://", "https://")
_WEIGHTED = re.compile(r"([-+]?[\d.]+(?:[eE][-+]?\d+)?)\*(.+)")


@dataclass(frozen=True)
class NamedTeacher:
    """One teacher of a run.

    ``kind`` says what ``place`` is: a "model" by folder or hub name, a "cache" by folder, a "server" by address, or the
    student "own" settings, of :class:`fused_kd.integrations.own.OwnTeacher`. ``weight`` is that in a mixture.
    """

    text: str
    kind: Literal["model", "cache", "server", "own"]
    place: str
    weight: float | None = None

    @property
    def own(self) -> OwnTeacher:
        """The student's state that teaches, of the kind "own"."""
        return _own(self.place, self.text)


def parse_teachers(texts: Sequence[str]) -> list[NamedTeacher]:
    """One teacher, or several as ``WEIGHT*TEACHER``, such as ``0.7*FOLDER`` and ``0.3*cache:FOLDER``.

    A teacher is a folder or hub name of a model, ``cache:FOLDER``, ``http://HOST:PORT`` (or https), or the student
    itself: ``own:adapters=false``, ``own:decay=0.999``.

    Raises:
        ValueError: a cache or a server that is named as if it were a model, unknown settings behind ``own:``, several
            teachers of which one has no weight, a single one with a weight, a weight that is no positive number.
    """
    found = [_parse(str(text)) for text in texts]
    for teacher in found:
        if len(found) > 1 and teacher.weight is None:
            raise ValueError(f"teacher must be WEIGHT*TEACHER for each of several, got {teacher.text!r}")
        if len(found) == 1 and teacher.weight is not None:
            raise ValueError(f"teacher must have no weight where it is the only one, got {teacher.text!r}")
    return found


def _parse(text: str) -> NamedTeacher:
    weight, place = None, text
    if (match := _WEIGHTED.fullmatch(text)) is not None and not Path(text).exists():
        place = match[2]
        try:
            weight = float(match[1])
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise ValueError(f"teacher must have a weight above 0, got {text!r}")
    if _server_meant(place):
        raise ValueError(f"teacher must say what it is: http://{place} for a server, got {place!r}")
    if place.startswith(CACHE) or _is_cache(Path(place)):
        return NamedTeacher(text, "cache", place.removeprefix(CACHE), weight)
    if place.startswith(OWN):
        _own(place[len(OWN) :], text)
        return NamedTeacher(text, "own", place[len(OWN) :], weight)
    return NamedTeacher(text, "server" if place.startswith(SERVED) else "model", place, weight)


def _own(settings: str, text: str) -> OwnTeacher:
    wrong = f"teacher must be own:adapters=false or own:decay=NUMBER for the student itself, got {text!r}"
    name, _, value = settings.partition("=")
    if name == "adapters" and value.lower() == "false":
        return OwnTeacher(adapters=False)
    try:
        options: dict[str, Any] = {"decay": float(value)}
    except ValueError:
        options = {}
    if name != "decay" or not options:
        raise ValueError(wrong)
    return OwnTeacher(**options)


def _is_cache(folder: Path) -> bool:
    return (folder / INDEX).is_file() and not (folder / "config.json").is_file()


def _server_meant(teacher: str) -> bool:
    """Whether a server is named as if it were a model."""
    if teacher.startswith((CACHE, OWN, *SERVED)) or Path(teacher).exists():
        return False
    return re.fullmatch(r"[\w.-]+:\d+/?|\[[\da-fA-F:]+\]:\d+/?", teacher) is not None
