"""A suite that passes with a fault in the library proves nothing: seeded faults, each of which must be caught."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from . import interpreter
from .mutations import MUTATIONS, Mutation

pytest.importorskip("triton", reason="some faults are in the Triton row")
pytestmark = pytest.mark.skipif(interpreter.obstacle() is not None, reason=interpreter.NEEDED)

ROOT = Path(__file__).resolve().parents[1]
TESTS_FAILED = 1  # pytest's exit code; others mean that tests were not found or could not start


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and its tests, free to be broken."""
    leave_out = shutil.ignore_patterns("__pycache__", "training")
    for folder in ("fused_kd", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=leave_out)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def run(root: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """pytest on the copy, on the CPU, so that one list of faults does for all machines."""
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    return subprocess.run(
        [*command, *(f"tests/{test}" for test in tests)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_fault_is_caught(mutation: Mutation, copy: Path) -> None:
    path = copy / mutation.file
    text = path.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.old!r} must occur once in {mutation.file}; see tests/mutations.py"
    path.write_text(text.replace(mutation.old, mutation.new))
    done = run(copy, mutation.tests)
    assert done.returncode == TESTS_FAILED, f"survived ({done.returncode}):\n{done.stdout}\n{done.stderr}"


def test_without_a_fault_the_same_tests_pass(copy: Path) -> None:
    tests = tuple(sorted({test for mutation in MUTATIONS for test in mutation.tests}))
    done = run(copy, tests)
    assert done.returncode == 0, done.stdout + done.stderr


def test_names_differ() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
