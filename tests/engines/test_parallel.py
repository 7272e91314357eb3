"""Vocabulary-parallel losses over 2 and 4 processes, against one; tests.engines.parallel_worker computes the errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import vocab_parallel
from fused_kd.engines.sharded import engine as sharded
from fused_kd.parallel import predicted_traffic

from ..problems import worst
from .parallel_worker import OTHERS, TIGHT, matrix

if not torch.distributed.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)

EXACT = ("nothing_valid", "refusals", "resharded", "traffic")


def errors(processes: int, folder: Path) -> dict[str, dict[str, float]]:
    out = folder / "errors.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.engines.parallel_worker", str(out), str(processes)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_processes_agree_with_one(processes: int, tmp_path: Path) -> None:
    """Loss, difficulty, gate and every gradient for objectives, teacher forms, cuts and options; and the other cases.

    One test for all, which start the processes once.
    """
    found = errors(processes, tmp_path)
    assert found.keys() == matrix().keys() | OTHERS.keys()
    wrong = {name: values for name, values in found.items() if values and not _right(name, dict(values))}
    assert not wrong and all(found.values()), json.dumps(wrong, indent=1)


def _right(name: str, values: dict[str, float]) -> bool:
    if name == "low_precision":  # one rounding to bf16, as tests.budget has it
        return values.pop("loss") < 1e-5 and worst(values.values()) < 4e-3
    if name in OTHERS:
        return worst(values.values()) <= (0.0 if name in EXACT else TIGHT)
    # Total variation's gradient is a small difference of products.
    tight = TIGHT * (4 if name.startswith("total_variation") else 1)
    same = values.pop("is_hard") == 0 and values.pop("unequal") == 0  # all ranks have the same bits
    return same and values.pop("messages") >= 1 and values.pop("difficulty") < 1e-5 and worst(values.values()) < tight


def test_traffic_per_token() -> None:
    """A few floats a token beside the hidden gradient."""
    made = predicted_traffic(8192, 4096, 8, swept=1.0)
    assert made.statistics == 8192 * 7 * 11 * 4
    assert made.hidden == 2 * 8192 * 4096 * 4 * 7 / 8
    assert predicted_traffic(8192, 4096, 8, reduce="scatter").hidden == made.hidden / 2


@pytest.mark.parametrize("messages", [1, 2])
def test_messages_travel_beside_another_chunks_work(messages: int) -> None:
    """Between sending and waiting there is work of the other chunk, but for what the ends cannot have."""
    events: list[str] = []

    class Sent:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait(self) -> str:
            events.append(f"wait {self.name}")
            return self.name

    class Exchange:
        def gather(self, name: str) -> Sent:
            events.append(f"send {name}")
            return Sent(name)

    def row(chunk: int) -> Iterator[str]:
        for number in range(messages):
            events.append(f"sweep {chunk}")
            assert (yield f"{chunk}.{number}") == f"{chunk}.{number}"
        events.append(f"gradient {chunk}")

    def begin(span: slice) -> sharded.UnderWay:
        events.append(f"logits {span.start}")
        asked = row(span.start)
        return sharded.UnderWay(span, None, asked, exchange.gather(next(asked)))  # type: ignore[arg-type]

    exchange: Any = Exchange()
    for done in sharded.two_at_a_time([slice(n, n + 1) for n in range(4)], begin, exchange):
        events.append(f"GEMMs {done.chunk.start}")
    assert events[-1] == "GEMMs 3" and len(events) == 4 * (3 + 3 * messages)
    for chunk in range(4):
        for number in range(messages):
            name = f"{chunk}.{number}"
            between = events[events.index(f"send {name}") + 1 : events.index(f"wait {name}")]
            if name not in ("0.0", "3.1"):
                assert between == ([f"GEMMs {chunk - 1}"] if messages == 1 else BESIDE[number](chunk))


BESIDE = (
    lambda chunk: [f"wait {chunk - 1}.1", f"gradient {chunk - 1}", f"GEMMs {chunk - 1}"],
    lambda chunk: [f"logits {chunk + 1}", f"sweep {chunk + 1}", f"send {chunk + 1}.0"],
)


def test_the_scaling_page_has_the_models_numbers() -> None:
    assert vocab_parallel.table() in (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
