"""The first script that a reader runs: the same gradients as plain PyTorch, for far less memory."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_quickstart_saves_memory_and_agrees():
    pytest.importorskip("resource")
    # from a small process: the peak of the one that starts it counts for its child
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, str(ROOT / "examples" / "quickstart.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (ours, fused), (theirs, plain) = re.findall(r"loss ([\d.]+), peak (\d+) MB", result.stdout)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-4)
    assert 4 * int(fused) < int(plain)
    (difference,) = re.findall(r"dH differs by (\S+) of", result.stdout)
    assert float(difference) < 1e-4
