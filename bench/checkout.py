"""Which code a measurement is of: a digest of its files; another checkout to compare with, by its identity."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .process import ROOT

LIBRARY = ("fused_kd/*.py", "fused_kd/engines/**/*.py", "fused_kd/rows/**/*.py", "csrc/*")
IMPORT_SECONDS = 60.0
# An editable installation would lend the modules that a checkout lacks.
_TRY = """
import sys
import bench  # this one, and then the other fused_kd
sys.path.insert(0, sys.argv[1])
import bench.stages
for name, module in sorted(sys.modules.items()):
    if name.split(".")[0] == "fused_kd" and not (module.__file__ or "").startswith(sys.argv[1]):
        raise ImportError(f"no module named {name!r} in it")
"""


class Checkout(NamedTuple):
    """``name``: a commit's first digits, or the digest of a folder's library."""

    name: str
    folder: Path


def digest(root: Path, patterns: Iterable[str]) -> str:
    """Of the files that the patterns find, and of their names."""
    found = hashlib.sha256()
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            if path.is_file():
                found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def checkout(what: str, out: Path) -> Checkout:
    """A folder as it is; a commit of this repository unpacked into ``out/against/<commit>``.

    Raises:
        ValueError: where it is neither, or this bench cannot import what it needs from it; in one line.
    """
    if Path(what).is_dir():
        folder = Path(what).resolve()
        found = Checkout(digest(folder, LIBRARY), folder)
    else:
        commit = _git("rev-parse", "--verify", "--quiet", f"{what}^{{commit}}").decode().strip()[:12]
        if not commit:
            raise ValueError("no folder, and no commit of this repository")
        found = Checkout(commit, out / "against" / commit)
        found.folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["tar", "-x", "-C", str(found.folder)], input=_git("archive", commit), check=True)
    if not (found.folder / "fused_kd" / "__init__.py").is_file():
        raise ValueError("it has no fused_kd")
    command = [sys.executable, "-c", _TRY, str(found.folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=IMPORT_SECONDS)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["?"])[-1]
        raise ValueError(f"it lacks what this bench imports: {last}")
    return found


def _git(*command: str) -> bytes:
    return subprocess.run(["git", *command], cwd=ROOT, capture_output=True).stdout
