"""Which engine runs a call: the one named, else the chunked one unless ``memory_budget`` is too small for it."""

from __future__ import annotations

import torch

from ..rows.select import CUDA_OR_TRITON, choose_backend, get_row
from ..terms import ENTROPY, RowSpec
from . import chunked
from .plan import BudgetTooSmall
from .problem import Problem, Result

ENGINES = ("chunked", "streaming")
AUTO = "auto"
TOLD, TOP_K, COLUMNS, LISTS, TEACHERS = "statistics", "top_k", "columns", "lists", "teachers"
"""What a call may ask for: statistics, a top-k teacher, one of another vocabulary, lists to be chosen, several teachers
mixed."""

_NOT_STREAMED = {
    TOLD: "tells no statistics",
    TOP_K: "takes the teacher as an LMHead or logits, got a TopK",
    COLUMNS: "takes no columns of a teacher with another vocabulary",
    LISTS: "makes no lists",
    TEACHERS: "mixes no teachers",
}


def choose_engine(
    engine: str | None,
    backend: str | None,
    spec: RowSpec,
    grad_filter_eps: float,
    device: torch.device,
    *,
    asks: tuple[str, ...] = (),
    sharded: bool = False,
) -> tuple[str, str]:
    """Names of the engine and the backend; the engine may be :data:`AUTO`, chunked if its plan fits the budget.

    A named one is used or refused, never replaced. ``asks`` for some of :data:`TOLD`, :data:`TOP_K`,
    :data:`COLUMNS`, :data:`LISTS` and :data:`TEACHERS`; ``sharded`` says that the vocabulary is divided over ranks.
    """
    statistics = TOLD in asks
    if sharded:
        if LISTS in asks:
            raise ValueError("lists must be None with tp_group: fused_kd.top_k_of(..., tp_group=...) makes them before")
        if TEACHERS in asks:
            raise ValueError("teacher must not be a mixture without lists with tp_group")
        if statistics:
            raise ValueError("statistics must be empty with tp_group, whose ranks see a slice of the vocabulary each")
        return "chunked", _sharded_backend(engine, backend, spec, grad_filter_eps, device, TOP_K in asks)
    if engine == "streaming":
        obstacle = _streaming_obstacle(backend, spec, asks, device)
        if obstacle is not None:
            raise ValueError(obstacle)
        return "streaming", "triton"
    chosen = choose_backend(backend, device)
    if statistics and chosen == "cuda":
        raise ValueError("statistics need backend None, 'torch', 'triton' or 'native', got backend='cuda'")
    if statistics and chosen == CUDA_OR_TRITON:
        chosen = "triton"
    if grad_filter_eps > 0 and device.type != "cpu":
        try:  # its kernels are Triton's, whatever the row's
            choose_backend("triton", device)
        except ValueError as error:
            raise ValueError(f"grad_filter_eps={grad_filter_eps!r} must be 0 here: {error}") from None
    if engine is None and _streaming_obstacle(backend, spec, asks, device) is None:
        return AUTO, chosen
    return "chunked", chosen


def _sharded_backend(
    engine: str | None,
    backend: str | None,
    spec: RowSpec,
    grad_filter_eps: float,
    device: torch.device,
    top_k: bool,
) -> str:
    """Of the sharded engine: Triton's kernels have dense teachers and all divergences but the one that sorts."""
    if engine not in (None, "chunked"):
        raise ValueError(f"engine must be None or 'chunked' with tp_group, got {engine!r}")
    if grad_filter_eps > 0:
        raise ValueError(f"grad_filter_eps must be 0 with tp_group, got {grad_filter_eps!r}")
    if backend not in (None, "torch", "triton"):
        raise ValueError(f"backend must be None, 'torch' or 'triton' with tp_group, got {backend!r}")
    if spec.gate == ENTROPY:
        raise ValueError("objective must not be EntropyGated with tp_group: no rank sees the teacher's entropy")
    fits = not top_k and not _adaptive(spec)
    if backend == "triton" and not fits:
        raise ValueError("backend='triton' takes neither a TopK nor AdaptiveKL with tp_group; use backend='torch'")
    return "triton" if choose_backend(backend, device) in ("triton", CUDA_OR_TRITON) and fits else "torch"


def _adaptive(spec: RowSpec) -> bool:
    return any(term.of.adaptive for term in spec.terms)


def _streaming_obstacle(backend: str | None, spec: RowSpec, asks: tuple[str, ...], device: torch.device) -> str | None:
    """Why the streaming engine can not run, or None."""
    if backend not in (None, "triton"):
        return f"engine='streaming' needs backend='triton' or None, got backend={backend!r}"
    if _adaptive(spec):
        return "engine='streaming' can not run AdaptiveKL, which needs whole rows of the teacher; use engine='chunked'"
    if asks:
        return f"engine='streaming' {_NOT_STREAMED[asks[0]]}; use engine='chunked'"
    try:
        choose_backend("triton", device)
    except ValueError as error:
        return f"engine='streaming' runs in Triton alone: {error}"
    return None


def run(problem: Problem) -> Result:
    """The engine that :func:`choose_engine` has chosen; the sharded one where the vocabulary is divided."""
    if problem.shards is not None:
        from .sharded import engine as sharded

        return sharded.run(problem)
    if problem.engine == "streaming":
        from .streaming import engine as streaming

        return streaming.run(problem)
    try:
        return chunked.run(problem, get_row(problem.backend))
    except BudgetTooSmall as error:
        if problem.engine != AUTO:
            raise
        too_small = error
    from .streaming import engine as streaming

    try:
        return streaming.run(problem)
    except BudgetTooSmall as error:
        raise ValueError(f"{too_small}; engine='streaming' would need {error.minimum}") from None
