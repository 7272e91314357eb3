"""A suite that passes with a fault in the library proves nothing: seeded faults, each of which must be caught."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
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
    """The package and its tests, free to be broken; their __pycache__ spares compiling what is not."""
    leave_out = shutil.ignore_patterns("training")
    for folder in ("fused_kd", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=leave_out)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    """tests/fork_pytest.py, on the CPU, so that one list of faults does for all machines."""
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_INTERPRET": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
    }
    command = [sys.executable, str(ROOT / "tests" / "fork_pytest.py")]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield server


def run(server: subprocess.Popen[str], root: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """pytest's exit code and output on the copy."""
    assert server.stdin is not None and server.stdout is not None
    print(json.dumps([str(root), *(f"tests/{test}" for test in tests)]), file=server.stdin, flush=True)
    code, output = json.loads(server.stdout.readline())
    return code, output


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_fault_is_caught(mutation: Mutation, copy: Path, server: subprocess.Popen[str]) -> None:
    path = copy / mutation.file
    text = path.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.old!r} must occur once in {mutation.file}; see tests/mutations.py"
    path.write_text(text.replace(mutation.old, mutation.new))
    code, output = run(server, copy, mutation.tests)
    assert code == TESTS_FAILED, f"survived ({code}):\n{output}"


def test_without_a_fault_the_same_tests_pass(copy: Path, server: subprocess.Popen[str]) -> None:
    tests = tuple(sorted({test for mutation in MUTATIONS for test in mutation.tests}))
    code, output = run(server, copy, tests)
    assert code == 0, output


def test_names_differ() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
