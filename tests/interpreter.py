"""Whether Triton's interpreter, which runs the kernels on a CPU, works here."""

from __future__ import annotations

import re
from importlib import metadata


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
