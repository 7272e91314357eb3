"""Options of suite.py."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--case", action="append", help="a case as JSON, may be repeated (default: this machine's plan)")
    group.addoption("--rows", type=Path, help="append each row to this file, as a line of JSON")
    group.addoption("--parent", type=int, help="end when this process ends")


def pytest_configure(config: pytest.Config) -> None:
    if (parent := config.getoption("--parent")) is not None:
        _die_with(parent)


def _die_with(parent: int) -> None:
    """Linux: a runner that is killed leaves no worker behind, holding memory and cores."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the runner is gone")


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
