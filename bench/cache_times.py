"""``python -m bench caches --times``: what a training step pays for each form of its teacher, beside its own model.

The loss and its gradients (of the student's hidden states and head), and what a teacher in the process adds before: its
forward. Least of some rounds, in turn; ratios to the loss without a teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.integrations.transformers import hidden_states

from .measure import Calls, interleaved
from .tables import table

TAILS = ("bucket", "uniform", "renormalize", "listed")
K, ROUNDS = 64, 4


def times(student: fk.LMHead, teacher: fk.LMHead, labels: Tensor, model: Any, ids: Tensor) -> list[dict[str, Any]]:
    """Seconds of each form, on the tokens of ``ids`` (rows, length + 1), which both heads are of."""
    listed = fk.top_k_of(teacher, K)
    given: dict[str, Any] = {"no teacher (SFT)": None, "hidden states": teacher}
    given |= {f"{K} entries, {tail}": replace(listed, tail=tail) for tail in TAILS}
    given |= {f"drawn, {K} of a token": fk.sample_of(teacher, K, generator=torch.Generator().manual_seed(0))}
    given |= {"two teachers' hidden states": [(0.5, teacher), (0.5, teacher)]}

    @torch.no_grad()
    def forward() -> None:
        hidden_states(model, input_ids=ids[:, :-1])

    calls: Calls = {"its forward": forward}
    for name, each in given.items():
        calls[name] = _step(student, each, labels)
    interleaved(calls, 1)
    least = {name: min(seconds) for name, seconds in interleaved(calls, ROUNDS).items()}
    online = least.pop("its forward")
    rows = [{"form": name, "loss": seconds, "teacher": 0.0} for name, seconds in least.items()]
    return [*rows, {"form": "online", "loss": least["hidden states"], "teacher": online}]


def _step(student: fk.LMHead, teacher: Any, labels: Tensor) -> Callable[[], None]:
    criterion = fk.KDLoss(fk.SFT() if teacher is None else fk.ForwardKD())

    def call() -> None:
        hidden, weight = (x.detach().requires_grad_() for x in (student.hidden, student.weight))
        criterion(fk.LMHead(hidden, weight), teacher, labels).backward()

    return call


def tables_of(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    least = next(row["loss"] for row in rows if row["form"].startswith("no teacher"))
    lines = [
        [row["form"], f"{row['loss']:.2f}", f"{row['teacher']:.2f}" if row["teacher"] else "",
         f"{(row['loss'] + row['teacher']) / least:.2f}"]
        for row in rows
    ]  # fmt: skip
    return table(["form", "loss and gradients, s", "teacher's forward, s", "ratio"], lines)
