"""Configurations: dataclasses filled from YAML files and ``key=value`` texts, later ones overriding earlier ones."""

from __future__ import annotations

import dataclasses
import math
import reprlib
import types
import typing
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_LARGEST = 1 << 16  # characters of a file
_MOST = 10_000  # values of a file
_BITS = 64  # of a whole number


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python does not write more than 4300 digits
        return f"a number of {x.bit_length()} bits" if x.bit_length() > _BITS else super().repr_int(x, level)


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 80


def load_config(cls: type[T], files: Sequence[str | Path], overrides: Sequence[str] = ()) -> T:
    """A dataclass from YAML files, merged in order (mappings key by key), then ``key=value`` or ``a.b=value`` texts.

    Values in overrides are YAML: ``seed=1``, ``directions=[de-en,en-de]``, ``lora=null``.

    Raises:
        ValueError: a file that cannot be read or is no mapping, of more than 64 Ki characters or, with what
            aliases repeat, 10,000 values, or with a key that is there twice or no text (``no`` and ``1`` need quotes);
            an unknown or missing key, a value of the wrong type, a whole number of more than 64 bits; the message
            names the key, the value and where it came from. Also whatever the dataclass itself checks.
    """
    merged: dict[str, Any] = {}
    origin = ", ".join(map(str, files)) or "no files"
    for file in files:
        try:
            with open(file, encoding="utf-8") as opened:
                text = opened.read(_LARGEST + 1)
            if len(text) > _LARGEST:
                raise ValueError(f"more than {_LARGEST} characters")
            value = _read_yaml(text)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read as YAML: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{file}: expected a mapping of keys to values, got {_SHORT.repr(value)}")
        _merge(merged, value)
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not all(path.split(".")):
            raise ValueError(f"override {text!r}: expected key=value")
        try:
            nested: Any = _read_yaml(value)
        except ValueError as error:
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


def _read_yaml(text: str) -> Any:
    """The value of a YAML text, without objects that occur twice.

    Raises:
        ValueError: not YAML, a key twice or no text, aliases that make a small text a large value, or an endless one.
    """
    import yaml

    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node)
        return _unshared(loader.construct_document(node))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(str(error)) from error
    finally:
        if loader is not None:
            loader.dispose()


def _check_nodes(root: Any) -> None:
    """Raise for what no reader of the file could see: a key that overrides another, a value that explodes."""
    import yaml

    texts = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _MOST + 1  # while it is counted: a value within itself
            children = []
            if isinstance(node, yaml.MappingNode):
                for key, _ in node.value:
                    if key.tag not in texts:
                        shown = _SHORT.repr(key.value) if isinstance(key, yaml.ScalarNode) else "of several values"
                        kind = key.tag.rpartition(":")[2]
                        raise ValueError(f"the key {shown} is read as {kind}, not as text: quote it{key.start_mark}")
                keys = Counter(key.value for key, _ in node.value)
                if twice := [key for key, count in keys.items() if count > 1]:
                    raise ValueError(f"the key {_SHORT.repr(twice[0])} is there twice{node.start_mark}")
                children = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                children = node.value
            sizes[id(node)] = min(1 + sum(map(size, children)), _MOST + 1)
        return sizes[id(node)]

    if size(root) > _MOST:
        raise ValueError(f"more than {_MOST} values, with those that aliases repeat")


def _unshared(value: Any) -> Any:
    """A copy in which no two places share an object, so that a change in one is none in another."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


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
    if type(value) is int and value.bit_length() > _BITS:
        raise ValueError(f"{name} must have at most {_BITS} bits, got {_SHORT.repr(value)}{where}")
    for arm in arms:
        converted = _as(value, arm, name, where)
        if converted is not None:
            return converted
    shown = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise ValueError(f"{name} must be {shown}, got {_SHORT.repr(value)}{where}")


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
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # YAML reads 2e-5 as text
            number = float(value)
        except (ValueError, OverflowError):
            return None
        return number if math.isfinite(number) else None
    if kind in (int, str, bool) and type(value) is kind:
        return value
    return None
