"""Where compiled rows are kept for later processes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

CACHE_VARIABLE = "FUSED_KD_CACHE"


def cache_folder() -> Path | None:
    """A writable folder that outlives the process, or None: ``$FUSED_KD_CACHE``, else ``~/.cache/fused_kd``."""
    chosen = os.environ.get(CACHE_VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(chosen) if chosen else Path(base) / "fused_kd"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None
