"""Whether Triton's interpreter, which runs the kernels on a CPU, works here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any
from unittest import mock


def obstacle() -> str | None:
    """Why it would fail, or None. Imports nothing: TRITON_INTERPRET is to be set before triton is imported."""
    try:
        triton, numpy = (metadata.version(package) for package in ("triton", "numpy"))
    except metadata.PackageNotFoundError:  # none, or one of another name
        return None
    if _minor(triton) < (3, 7) and _minor(numpy) >= (2, 4):
        # It makes scalars of arrays of one element, which numpy refuses since 2.4.
        return f"the interpreter of triton {triton} fails with numpy {numpy}; numpy < 2.4 or triton >= 3.7 would do"
    return None


def _minor(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    assert found is not None, version
    return int(found[1]), int(found[2])


NEEDED = obstacle() or "needs a GPU, or TRITON_INTERPRET=1 before the first import of triton"


@contextmanager
def fused_products() -> Iterator[None]:
    """Within it the interpreter adds and subtracts products in float32 as a GPU's fused instruction does: unrounded."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    multiply = Builder.create_fmul

    def product(self: Any, a: Any, b: Any) -> Any:
        found = multiply(self, a, b)
        if found.data.dtype == np.float32:
            found.unrounded = a.data.astype(np.float64) * b.data.astype(np.float64)
        return found

    def fused(plain: Any, sign: int) -> Any:
        def call(self: Any, a: Any, b: Any) -> Any:
            found = plain(self, a, b)
            if found.data.dtype == np.float32 and (hasattr(a, "unrounded") or hasattr(b, "unrounded")):
                first = getattr(a, "unrounded", None)
                second = b.data if first is not None else b.unrounded
                found.data = ((a.data if first is None else first) + sign * second.astype(np.float64)).astype(
                    np.float32
                )
            return found

        return call

    with (
        mock.patch.object(Builder, "create_fmul", product),
        mock.patch.object(Builder, "create_fadd", fused(Builder.create_fadd, 1)),
        mock.patch.object(Builder, "create_fsub", fused(Builder.create_fsub, -1)),
    ):
        yield
