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
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "TRITON_INTERPRET": "1",
    "PYTHONDONTWRITEBYTECODE": "",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "PYTEST_ADDOPTS": "",
}
TESTS_FAILED = 1  # pytest's exit code; others mean that tests were not found or could not start


class Copy:
    """The package and its tests, free to be broken, and the process that runs tests there (tests/fork_pytest.py).

    On the CPU, so that one list of faults does for all machines. What the first run has compiled spares the later ones
    all but the file with the fault.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.faults = folder, 0
        for name in ("fused_kd", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("training"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        self.server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "fork_pytest.py"), str(folder)],
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *tests: str) -> tuple[int, str]:
        """pytest's exit code and output."""
        assert self.server.stdin is not None and self.server.stdout is not None
        print(json.dumps([f"tests/{test}" for test in tests]), file=self.server.stdin, flush=True)
        code, output = json.loads(self.server.stdout.readline())
        return code, output

    def run_with(self, mutation: Mutation) -> tuple[int, str]:
        path = self.folder / mutation.file
        before, text = path.stat(), path.read_text()
        assert text.count(mutation.old) == 1, f"{mutation.old!r} must occur once in {mutation.file}: tests/mutations.py"
        try:
            path.write_text(text.replace(mutation.old, mutation.new))
            self.faults += 1
            os.utime(path, (self.faults, self.faults))  # or what is compiled of another fault might be taken for this
            return self.run(*mutation.tests)
        finally:
            path.write_text(text)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    made = Copy(tmp_path_factory.mktemp("copy"))
    with made.server:
        yield made


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_fault_is_caught(mutation: Mutation, copy: Copy) -> None:
    code, output = copy.run_with(mutation)
    assert code == TESTS_FAILED, f"survived ({code}):\n{output}"


def test_without_a_fault_the_same_tests_pass(copy: Copy) -> None:
    code, output = copy.run(*sorted({test for mutation in MUTATIONS for test in mutation.tests}))
    assert code == 0, output


def test_names_differ() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
