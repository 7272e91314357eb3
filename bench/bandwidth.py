"""A row implementation alone, against a copy of device memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

import fused_kd as fk
from fused_kd.rows import Logits, RowInputs, RowOutputs, get_row

from .counts import row_bytes
from .inputs import BETA, LAM, LOGIT_STD, TEACHER_NOISE
from .measure import Flush, interleaved

WARMUP = 3


def measure_row(
    backend: str, C: int, V: int, device: torch.device, dtype: torch.dtype, tokens: list[str], rounds: int
) -> Iterator[dict]:
    """Seconds of the row on (C, V) fp32 logits, gradients in ``dtype``, and of a copy of (C, V) fp32.

    Yields one dict per kind of tokens. ``row_bytes_once`` counts both logits read once and the gradient
    written once: the least any row can move. ``row_bytes_swept`` counts every sweep of the design: two for
    easy tokens, three for hard ones; the CUDA row, which holds these rows on chip, reads once."""
    g = torch.Generator(device).manual_seed(0)
    z = torch.randn(C, V, generator=g, device=device).mul_(LOGIT_STD)
    z_t = torch.randn(C, V, generator=g, device=device).mul_(TEACHER_NOISE * LOGIT_STD).add_(z)
    labels = torch.multinomial(z_t.softmax(1), 1, generator=g).squeeze(1)
    outputs = RowOutputs(
        torch.empty(C, device=device),
        torch.empty(C, device=device),
        torch.empty(C, dtype=torch.bool, device=device),
        torch.empty(C, V, dtype=dtype, device=device),
    )
    row, written = get_row(backend), dtype.itemsize

    def inputs(gamma: float) -> RowInputs:
        objective = fk.SelfEvolution(lam=LAM, beta=BETA, gamma=gamma)
        scalars = torch.tensor(objective.scalars(), device=device)
        student, teacher = Logits(z, 1.0, None, True), Logits(z_t, 1.0, None, True)
        return RowInputs(student, teacher, labels, None, scalars, objective.spec, False)

    row(inputs(math.inf), outputs)
    gammas = {"easy": math.inf, "hard": 0.0, "mixed": float(outputs.difficulty.median())}
    copy, flush = torch.empty_like(z), Flush(device)
    for kind in tokens:
        calls: dict[str, Callable[[], object]] = {
            "row": partial(row, inputs(gammas[kind]), outputs),
            "copy": partial(copy.copy_, z),
        }
        interleaved(calls, WARMUP, flush)
        seconds = interleaved(calls, rounds, flush)
        hard = float(outputs.is_hard.float().mean())
        yield {
            "tokens": kind,
            "hard_fraction": hard,
            "seconds": seconds,
            "copy_bytes": 8 * C * V,
            "row_bytes_once": row_bytes(C * V, written),
            "row_bytes_swept": row_bytes(C * V, written, sweeps=1 if backend == "cuda" else 2 + hard),
        }
