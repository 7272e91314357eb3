"""Formulas, numbers and scalar slots of the other rows as C text, for rows written in C or CUDA."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from ..divergences import (
    COLDEST,
    DIVERGENCES,
    EXCLUDED,
    LEAST_SUM,
    LEFT_OUT,
    LOG_LEAST,
    LOG_ZERO,
    OUTSIDE,
    OVERLAP_DECAY,
    TINY,
)
from ..terms import GATES, STATISTICS, Scalars, Term
from .contract import OUTERS, traits

_NUMBERS = {
    "LOG_ZERO": LOG_ZERO,
    "EXCLUDED": EXCLUDED,
    "OUTSIDE": OUTSIDE,
    "TINY": TINY,
    "LEAST_SUM": LEAST_SUM,
    "LEFT_OUT": LEFT_OUT,
    "COLDEST": COLDEST,
    "OVERLAP_DECAY": OVERLAP_DECAY,
}
_OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def c_expression(function: Callable[..., Any]) -> str:
    """The value of a one-``return`` function as an fp32 C expression over its parameters' names.

    Raises:
        ValueError: for anything but ``+ - * / >``, integers and parameters; the message quotes it.
    """
    definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    body = definition.body if isinstance(definition, ast.FunctionDef) else []
    if len(body) != 1 or not isinstance(body[0], ast.Return) or body[0].value is None:
        raise ValueError(f"{function.__name__} must be a function of a single return statement to become C")
    return _translate(body[0].value, function.__name__, set(inspect.signature(function).parameters))


def _translate(node: ast.expr, function: str, names: set[str]) -> str:
    def sub(child: ast.expr) -> str:
        return _translate(child, function, names)

    match node:
        case ast.BinOp(op=op) if type(op) in _OPERATORS:
            return f"({sub(node.left)} {_OPERATORS[type(op)]} {sub(node.right)})"
        case ast.UnaryOp(op=ast.USub()):
            return f"(-{sub(node.operand)})"
        case ast.Compare(ops=[ast.Gt()]):
            return f"({sub(node.left)} > {sub(node.comparators[0])} ? 1.0f : 0.0f)"
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return f"{value}.0f"
        case ast.Name(id=name) if name in names:
            return name
    raise ValueError(f"{function}: only + - * / >, integers and parameters become C, got {ast.unparse(node)!r}")


def c_header() -> str:
    """What every C source is compiled behind: ``FKD_DIVERGENCES(X)``, ``X(name, h, g)`` for every divergence in the
    table's order; ``FKD_SCALARS(X)``, ``FKD_TRAITS(X)`` and ``FKD_STATISTICS(X)``, ``X(name)`` for every scalar and
    trait of a term and every statistic of a token in theirs; ``GATE_name`` and ``OUTER_name``, as traits number them;
    and the numbers that stand for something, in fp32 but for the double ``LOG_LEAST``."""
    divergences = (
        f"X({name}, {c_expression(entry.h)}, {c_expression(entry.g)})" for name, entry in DIVERGENCES.items()
    )
    lines = ["#define FKD_DIVERGENCES(X) \\\n    " + " \\\n    ".join(divergences)]
    lists = {"SCALARS": Scalars._fields, "TRAITS": traits(Term(None)), "STATISTICS": STATISTICS}
    lines += [f"#define FKD_{name}(X) " + " ".join(f"X({item})" for item in items) for name, items in lists.items()]
    lines += [f"#define GATE_{gate.upper()} {i}" for i, gate in enumerate(("none", *GATES))]
    lines += [f"#define OUTER_{(outer or 'none').upper()} {i}" for i, outer in enumerate(OUTERS)]
    lines += [f"#define {name} ({value!r}f)" for name, value in _NUMBERS.items()]
    lines.append(f"#define LOG_LEAST ({LOG_LEAST!r})")
    return "\n".join(lines) + "\n"
