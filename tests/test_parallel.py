"""Vocabulary-parallel losses over 2 and 4 processes, against one process; tests.parallel_worker computes the errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_kd.parallel import predicted_traffic

from .parallel_worker import OTHERS, matrix

if not torch.distributed.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)

# fp32 rounding of sums in another order
TIGHT = 3e-6
EXACT = ("nothing_valid", "refusals", "resharded", "traffic")


def errors(processes: int, folder: Path) -> dict[str, dict[str, float]]:
    out = folder / "errors.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.parallel_worker", str(out), str(processes)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_agree_with_one(processes: int, tmp_path: Path) -> None:
    """Loss, difficulty, gate and every gradient for objectives, teacher forms, cuts and options; and the other cases.

    One test for all, which start the processes once.
    """
    found = errors(processes, tmp_path)
    assert found.keys() == matrix().keys() | OTHERS.keys()
    wrong = {name: values for name, values in found.items() if values and not _right(name, dict(values))}
    assert not wrong and all(found.values()), json.dumps(wrong, indent=1)


def _right(name: str, values: dict[str, float]) -> bool:
    if name in OTHERS:
        if name == "low_precision":  # one rounding to bf16, as tests.budget has it
            return values.pop("loss") < 1e-5 and max(values.values()) < 4e-3
        return max(values.values()) <= (0.0 if name in EXACT else TIGHT)
    same = values.pop("is_hard") == 0 and values.pop("unequal") == 0  # all ranks have the same bits
    return same and values.pop("messages") >= 1 and values.pop("difficulty") < 1e-5 and max(values.values()) < TIGHT


def test_traffic_per_token() -> None:
    """A few floats a token beside the hidden gradient."""
    made = predicted_traffic(8192, 4096, 8, swept=1.0)
    assert made.statistics == 8192 * 7 * 9 * 4
    assert made.hidden == 2 * 8192 * 4096 * 4 * 7 / 8
    assert predicted_traffic(8192, 4096, 8, reduce="scatter").hidden == made.hidden / 2
