"""Options of suite.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .process import die_with


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--case", action="append", help="a case as JSON, may be repeated (default: the CPU's plan)")
    group.addoption("--rows", type=Path, help="append each row to this file, as a line of JSON")
    group.addoption("--parent", type=int, help="end when this process ends")


def pytest_configure(config: pytest.Config) -> None:
    if (parent := config.getoption("--parent")) is not None:
        die_with(parent)


@pytest.fixture(scope="session")
def sink(pytestconfig: pytest.Config):
    """Takes a row where --rows asks for them."""
    from .store import json_safe

    path: Path | None = pytestconfig.getoption("--rows")

    def write(row: dict) -> None:
        if path is not None:
            with path.open("a") as file:
                file.write(json.dumps(json_safe(row), allow_nan=False) + "\n")

    return write
