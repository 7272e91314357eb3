"""Which module of a source tree imports which, read from its text: nothing is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

Graph = dict[str, set[str]]


def import_graph(root: Path, packages: Sequence[str]) -> Graph:
    """Edges between the modules of some packages of ``root``, imports inside functions and for types included."""
    files = {_name(path, root): path for package in packages for path in sorted((root / package).rglob("*.py"))}
    return {name: {found for found in _imports(name, path, files) if found != name} for name, path in files.items()}


def _name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(name: str, path: Path, files: dict[str, Path]) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            asked = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, node.module] if node.module else base)
            # Of a package, each name may be a module of its own.
            asked = [f"{source}.{alias.name}" if f"{source}.{alias.name}" in files else source for alias in node.names]
        else:
            continue
        yield from (found for found in asked if found in files)


def layer_of(module: str, layers: Sequence[Sequence[str]]) -> int:
    """The place of the longest name in ``layers`` that is the module or a package that it lies in.

    Raises:
        KeyError: for a module that belongs to none.
    """
    found = {name: place for place, names in enumerate(layers) for name in names}
    parts = module.split(".")
    for size in range(len(parts), 0, -1):
        if ".".join(parts[:size]) in found:
            return found[".".join(parts[:size])]
    raise KeyError(f"{module} is in no layer")


def upward(graph: Graph, layers: Sequence[Sequence[str]]) -> set[tuple[str, str]]:
    """Imports from a layer into one that comes later in ``layers``."""
    return {
        (module, other)
        for module, others in graph.items()
        for other in others
        if layer_of(other, layers) > layer_of(module, layers)
    }


def circles(graph: Graph) -> list[set[str]]:
    """Sets of modules that all import each other, directly or through others."""
    reached = {module: _reached(module, graph) for module in graph}
    found: list[set[str]] = []
    for module in graph:
        circle = {other for other in reached[module] if module in reached[other]}
        if circle and circle not in found:
            found.append(circle)
    return found


def _reached(start: str, graph: Graph) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for other in graph.get(waiting.pop(), set()) - seen:
            seen.add(other)
            waiting.append(other)
    return seen
