"""Shared set-up: Triton's interpreter where there is no GPU, one thread, and the shared data."""

from __future__ import annotations

import gc
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub: a hub name is never there

from .interpreter import obstacle

# Before anything imports triton.
if obstacle() is not None:
    os.environ["TRITON_INTERPRET"] = "0"
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        _round_once()
        _spare_time()


def _round_once() -> None:
    """Triton's interpreter rounds between the product and the sum of ``tl.fma``; GPUs do not."""
    from triton.runtime import interpreter

    def create_fma(self: object, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma


def _spare_time() -> None:
    """Triton's interpreter patches its language at each call of a function in a kernel: more than half of its time."""
    from triton.runtime import interpreter

    patch, run, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set[int]()

    def patch_unless_patched(fn: Any) -> Any:
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            return patch(fn)

    def run_kernel(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        run(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_unless_patched, run_kernel


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _freeze() -> None:
    """Each training collects garbage: of what was imported before, a second of work for nothing."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the data folder ../shared/data beside the project")
    return SHARED_DATA
