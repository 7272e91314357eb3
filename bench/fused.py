"""fused_kd's entries in the registry: each objective, row and engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

import fused_kd as fk
from fused_kd.engines import chunked
from fused_kd.engines.dispatch import choose_engine
from fused_kd.rows.select import choose_backend, get_row

from .counts import count_fused, gemm_flops
from .counts_streaming import count_streaming
from .implementation import JSD, KL, SELF_EVOLUTION, SFT, Implementation, Step, objective_of
from .inputs import Inputs, cut_top_k
from .shapes import Shape

TOP_K = 64


def _build(group: str, backend: str | None, engine: str | None) -> Callable[[Inputs, float], Step]:
    def build(inputs: Inputs, gamma: float) -> Step:
        objective = objective_of(group, gamma)
        criterion = fk.KDLoss(objective, backend=backend, engine=engine).to(inputs.hidden_s.device)
        student = fk.LMHead(inputs.hidden_s, inputs.weight_s)
        teacher = None if group == SFT else inputs.top_k or fk.LMHead(inputs.hidden_t, inputs.weight_t)
        return lambda labels: criterion(student, teacher, labels)

    return build


def _missing(backend: str | None, engine: str | None) -> Callable[[str], str | None]:
    def missing(device: str) -> str | None:
        try:
            choose_engine(engine, backend, None, 0.0, torch.device(device))
            if backend in ("native", "cuda"):  # compiled at first use
                get_row(backend)
        except ValueError as error:
            return str(error).splitlines()[0]
        return None

    return missing


def _count(group: str, backend: str | None) -> Callable[[Shape, Inputs, float], dict[str, Any]]:
    def count(shape: Shape, inputs: Inputs, hard: float) -> dict[str, Any]:
        row = choose_backend(backend, inputs.labels.device)
        # All tokens of a JSD take the sums of a hard one; the others have no gate.
        share = {SELF_EVOLUTION: hard, JSD: 1.0}.get(group, 0.0)
        counts = count_fused(shape, inputs, share, row, teacher=group != SFT)
        if group == JSD:
            # Beside a hard token's logarithm and division, of t / m, those of q / m: again in the gradient's sweep,
            # where t / m is not read, if nothing is kept.
            more = 3 if row == "triton" else 2
            counts = counts._replace(row_specials=counts.row_specials + more * shape.N * shape.V)
        return counts._asdict()

    return count


def _count_streaming(shape: Shape, inputs: Inputs, hard: float) -> dict[str, Any]:
    """FLOPs as recomputed tiles make them."""
    found = count_streaming(shape, inputs.hidden_s.dtype, hard=hard)
    return {"flops": gemm_flops(shape), "streamed_flops": found.flops, "workspace_bytes": found.plan.workspace}


def _entry(group: str, backend: str | None = None, engine: str | None = None, **changes) -> Implementation:
    return Implementation(
        group,
        _build(group, backend, engine),
        _missing(backend, engine),
        drops_ignored=True,
        counted=_count_streaming if engine == "streaming" else _count(group, backend),
        **changes,
    )


def _top_k(tail: str) -> Implementation:
    return _entry(
        SELF_EVOLUTION,
        note=f"teacher's top {TOP_K} entries, {tail}",
        prepare=lambda inputs: cut_top_k(inputs, TOP_K, tail),
    )


OURS = {SELF_EVOLUTION: "fused_kd", JSD: "fused_kd jsd", KL: "fused_kd kl", SFT: "fused_kd sft"}
"""The entry of each group that a user gets who chooses nothing."""

FUSED: dict[str, Implementation] = {
    **{name: _entry(group) for group, name in OURS.items()},
    **{f"fused_kd {row}": _entry(SELF_EVOLUTION, backend=row) for row in ("torch", "triton", "cuda", "native")},
    "fused_kd streaming": _entry(SELF_EVOLUTION, engine="streaming"),
    f"fused_kd top-k {TOP_K}": _top_k("renormalize"),
    f"fused_kd top-k {TOP_K} bucket": _top_k("bucket"),
}


@contextlib.contextmanager
def preferred_chunk(chunk: int | None) -> Iterator[None]:
    """fused_kd with another preferred chunk of tokens than the planner's; None leaves it alone."""
    if chunk is None:
        yield
        return
    with mock.patch.object(chunked, "preferred_chunk", lambda *_: chunk):
        yield
