"""What `make compat` asks for is what pyproject.toml promises, and a failure in it does not go unseen."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from . import compat

GOOD = {"case": "sft/loss", "target": "sm_90", "triton": "3.4.0", "registers": 40}


def answers(monkeypatch: pytest.MonkeyPatch, stdout: str, returncode: int = 0) -> None:
    done = subprocess.CompletedProcess([], returncode, stdout, "Traceback\nImportError: no triton\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)


def test_oldest_are_those_of_pyproject() -> None:
    assert next(iter(compat.TORCHES)) == compat.oldest("torch")
    assert f"triton=={compat.oldest('triton')}" in compat.TORCHES[compat.oldest("torch")]
    assert all(f"cuda-core=={compat.oldest('cuda-core')}" in wanted for wanted in compat.NVRTCS.values())


def test_last_of_each_minor_release_from_the_oldest(monkeypatch) -> None:
    answers(monkeypatch, "triton (3.10.0)\nAvailable versions: 3.10.0, 3.9.1, 3.9.0, 3.5.1, 3.4.1, 3.4.0, 3.3.1\n")
    assert compat.tritons([]) == ["3.4.0", "3.5.1", "3.9.1", "3.10.0"]
    answers(monkeypatch, "", returncode=1)
    assert compat.tritons(["3.6.0"]) == ["3.4.0", "3.6.0"]


@pytest.mark.parametrize(
    "lines, returncode, message",
    [
        ([GOOD, GOOD | {"case": "x", "error": "at 1:2:\nTypeError: no"}], 0, "x: TypeError: no"),
        ([GOOD], 1, "exit code 1: ImportError: no triton"),
        ([], 0, "exit code 0"),
        ([GOOD | {"triton": "3.7.1"}], 0, "got {'3.7.1'}"),
        ([GOOD], 0, None),
    ],
)
def test_failures_are_told(monkeypatch, capsys, tmp_path, lines, returncode, message) -> None:
    answers(monkeypatch, "\n".join(map(json.dumps, lines)), returncode)
    monkeypatch.setattr(compat, "BUILD", tmp_path)
    monkeypatch.setattr(compat, "fetch", lambda folder, *_: folder)
    monkeypatch.setattr(sys, "argv", ["compat", "triton", "3.4.0", "--targets", "sm_90"])
    assert compat.main() == (0 if message is None else 1)
    printed = capsys.readouterr().out
    assert ("all compile" in printed) if message is None else (message in printed)
