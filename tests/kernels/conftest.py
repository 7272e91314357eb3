"""Fixtures of the rows' tests."""

from __future__ import annotations

import pytest

from ..cuda_emulator import emulated
from .contract import device_of
from .ways import WAYS, Way

__all__ = ["backend", "emulated", "way"]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """A row's name; the CUDA row is emulated where there is no GPU. For ``indirect`` parameters."""
    if request.param == "cuda" and device_of("cuda") == "cpu":
        request.getfixturevalue("emulated")
    return str(request.param)


@pytest.fixture
def way(request: pytest.FixtureRequest) -> Way:
    """One of :data:`tests.kernels.ways.WAYS`; CUDA's is emulated on all machines. For ``indirect`` parameters."""
    if request.param == "cuda":
        request.getfixturevalue("emulated")
    return WAYS[request.param][0]
