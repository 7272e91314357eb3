"""What ``--help`` says of a dataclass's fields: the comments that stand behind them."""

from __future__ import annotations

import inspect
import re
from typing import Any

# a field may go over several lines: those that follow are indented further, or close a bracket
_FIELD = re.compile(r"^ {4}(\w+): (?:[^\n#]|\n {8}|\n {4}[)\]}])*?  # (.+)$", re.MULTILINE)


def field_comments(cls: type) -> dict[str, str]:
    """The comment behind each field, of a class and those that it inherits from; none where there is no source."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__[:-1]):
        found |= _comments(each)
    return found


def _comments(cls: Any) -> dict[str, str]:
    try:
        source = inspect.cleandoc("\n" + inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    return {name: text.strip() for name, text in _FIELD.findall(source)}
