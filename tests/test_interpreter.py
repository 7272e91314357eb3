"""Where the interpreter fails, its tests say so instead."""

from __future__ import annotations

from importlib import metadata

import pytest

from . import interpreter


@pytest.mark.parametrize(
    "triton, numpy, works",
    [("3.6.0", "2.4.0", False), ("3.4.0", "2.5.5", False), ("3.6.0", "2.3.5", True), ("3.7.1", "2.4.6", True)],
)
def test_obstacle(monkeypatch, triton, numpy, works):
    monkeypatch.setattr(metadata, "version", {"triton": triton, "numpy": numpy}.__getitem__)
    found = interpreter.obstacle()
    assert found is None if works else found is not None and triton in found and numpy in found


def test_no_obstacle_without_triton(monkeypatch):
    def missing(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", missing)
    assert interpreter.obstacle() is None
