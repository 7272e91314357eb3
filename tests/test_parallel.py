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


@pytest.fixture(scope="module", params=[2, 4])
def errors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    out = tmp_path_factory.mktemp("parallel") / "errors.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.parallel_worker", str(out), str(request.param)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", matrix())
def test_matrix(errors: dict[str, dict[str, float]], name: str) -> None:
    """Loss, difficulty, gate and every gradient, for objectives, teacher forms, cuts and options."""
    found = dict(errors[name])
    assert found.pop("is_hard") == 0 and found.pop("unequal") == 0, "all ranks have the same bits"
    assert found.pop("messages") >= 1
    assert found.pop("difficulty") < 1e-5
    assert max(found.values()) < TIGHT, found


@pytest.mark.parametrize("name", OTHERS)
def test_others(errors: dict[str, dict[str, float]], name: str) -> None:
    found = errors[name]
    assert found
    if name == "low_precision":  # one rounding to bf16, as tests.budget has it
        assert found.pop("loss") < 1e-5 and max(found.values()) < 4e-3, found
    else:
        exact = ("nothing_valid", "refusals", "resharded", "traffic")
        assert max(found.values()) <= (0.0 if name in exact else TIGHT), found


def test_traffic_per_token() -> None:
    """A few floats a token beside the hidden gradient."""
    made = predicted_traffic(8192, 4096, 8, swept=1.0)
    assert made.statistics == 8192 * 7 * 9 * 4
    assert made.hidden == 2 * 8192 * 4096 * 4 * 7 / 8
    assert predicted_traffic(8192, 4096, 8, reduce="scatter").hidden == made.hidden / 2
