"""Matplotlib without a display, and figures that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def pyplot() -> Any:
    """``matplotlib.pyplot`` that draws into files.

    Raises:
        ImportError: no matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("figures need matplotlib: install fused_kd[train]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as module

    return module


def save_figure(figure: Any, path: Path) -> Path:
    """Write a PNG and close the figure. Returns ``path``."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    figure.savefig(partial, format="png", dpi=130)
    pyplot().close(figure)
    os.replace(partial, path)
    return path
