"""Configurations: dataclasses filled from YAML files and ``key=value`` texts, later ones overriding earlier ones."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def load_config(cls: type[T], files: Sequence[str | Path], overrides: Sequence[str] = ()) -> T:
    """A dataclass from YAML files, merged in order (mappings key by key), then ``key=value`` or ``a.b=value`` texts.

    Values in overrides are YAML: ``seed=1``, ``directions=[de-en,en-de]``, ``lora=null``.

    Raises:
        ValueError: a file that cannot be read or is no mapping, an unknown or missing key, a value of the wrong type;
            the message names the key, the value and where it came from. Also whatever the dataclass itself checks.
    """
    import yaml

    merged: dict[str, Any] = {}
    origin = ", ".join(map(str, files)) or "no files"
    for file in files:
        try:
            value = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{file} cannot be read as YAML: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{file}: expected a mapping of keys to values, got {value!r}")
        _merge(merged, value)
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not all(path.split(".")):
            raise ValueError(f"override {text!r}: expected key=value")
        try:
            nested: Any = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"override {text!r}: the value is not YAML: {error}") from error
        for key in reversed(path.split(".")):
            nested = {key: nested}
        _merge(merged, nested)
        origin += f", {text}"
    return build(cls, merged, origin)


def build(cls: type[T], values: dict[str, Any], origin: str = "") -> T:
    """The dataclass ``cls`` of ``values``; mappings become nested dataclasses where the field is one.

    Raises:
        ValueError: as :func:`load_config`.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    where = f" ({origin})" if origin else ""
    if unknown := sorted(map(str, values.keys() - fields.keys())):
        raise ValueError(f"unknown keys {', '.join(unknown)}{where}: expected {', '.join(fields)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"missing keys {', '.join(missing)}{where}")
    converted = {name: _convert(value, hints[name], name, where) for name, value in values.items()}
    return cls(**converted)


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _convert(value: Any, hint: Any, name: str, where: str) -> Any:
    arms = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in arms:
        return None
    for arm in arms:
        converted = _as(value, arm, name, where)
        if converted is not None:
            return converted
    shown = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise ValueError(f"{name} must be {shown}, got {value!r}{where}")


def _as(value: Any, kind: Any, name: str, where: str) -> Any:
    """``value`` as ``kind``, or None where it is of another kind."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return build(kind, value, f"{name}{where}") if isinstance(value, dict) else None
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(item, arguments[0], f"{name}[{index}]", where) for index, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {str(key): _convert(item, arguments[1], f"{name}.{key}", where) for key, item in value.items()}
    if origin is typing.Literal:
        return value if value in arguments else None
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML reads 2e-5 as text
        try:
            return float(value)
        except ValueError:
            return None
    if kind in (int, str, bool) and type(value) is kind:
        return value
    return None
