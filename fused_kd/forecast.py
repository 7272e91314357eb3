"""What a call would do, without doing it: the planners' answers for shapes instead of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .engines import chunked
from .engines.chunks import Chunks
from .engines.dispatch import AUTO, ENGINES, choose_engine
from .engines.gemm import has_fp32_output
from .engines.plan import BudgetTooSmall, Plan
from .engines.problem import Problem, Side, Wanted
from .engines.streaming.plan import ALIGNED, choose_tiles, plan_streaming, sizes_of
from .inputs import FLOAT_DTYPES
from .objectives import Objective, RowSpec, SelfEvolution
from .rows.select import BACKENDS, _native_works


class Choice(NamedTuple):
    """What a call would do. All memory in bytes.

    ``chunk`` tokens at a time, ``chunks`` of them, of which those of ``group`` tokens share the gradients' GEMMs (None:
    the streaming engine has no such groups); ``workspace`` beyond inputs and gradients; ``gradients`` of hidden
    states and weight; ``flops`` of the GEMMs that no implementation can do without (a multiply-add is two);
    ``eager_logits`` is what plain PyTorch holds in full logits alone, before any softmax, mixture or gradient of them.
    """

    engine: str
    backend: str
    device: str
    dtype: str
    objective: str
    chunk: int
    chunks: int
    group: int | None
    workspace: int
    gradients: int
    flops: int
    gemms: int
    eager_logits: int
    notes: tuple[str, ...]


def plan_for(
    N: int,
    H_s: int,
    H_t: int,
    V: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    objective: Objective | None = None,
    memory_budget: int | None = None,
    top_k: int | None = None,
    engine: str | None = None,
    backend: str | None = None,
) -> Choice:
    """The plan of a call with all gradients wanted and no ignored tokens; nothing is computed.

    Args:
        N: tokens.
        H_s, H_t: hidden sizes of student and teacher.
        V: vocabulary.
        dtype: of hidden states and weights: float32, bfloat16 or float16.
        device: "cpu" or "cuda". Where there is no GPU, "cuda" stands for an NVIDIA one of sm_80 or later.
        objective: default :class:`fused_kd.SelfEvolution`.
        memory_budget: bytes of workspace, or None.
        top_k: the teacher is a list of so many entries a token; None: hidden states and a weight.
        engine, backend: as for :class:`fused_kd.KDLoss`.

    Raises:
        ValueError: for a size below 1, a name that is not known, an engine or backend that cannot run, or a
            ``memory_budget`` that no plan fits; the message says what would.
    """
    objective = SelfEvolution() if objective is None else objective
    sizes = {"N": N, "H_s": H_s, "H_t": H_t, "V": V, "memory_budget": memory_budget, "top_k": top_k}
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, given, known in (("device", device, ("cpu", "cuda")), ("dtype", dtype, FLOAT_DTYPES)):
        if given not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {given!r}")
    if engine is not None and engine not in ENGINES:
        raise ValueError(f"engine must be None or one of {', '.join(map(repr, ENGINES))}, got {engine!r}")
    if top_k is not None and top_k > V:
        raise ValueError(f"top_k must be at most V={V}, got {top_k}")
    spec, place = objective.spec, torch.device(device)
    teacher = spec.divergence is not None
    lists = top_k if teacher else None
    chosen, row = choose_engine(engine, backend, spec.divergence, 0.0, place, top_k=lists is not None)
    here = device == "cpu" or torch.cuda.is_available()
    upcast = dtype != torch.float32 and not (has_fp32_output(place) if here else True)
    notes = [] if here else ["no GPU here: planned for an NVIDIA GPU of sm_80 or later"]

    too_small = planned = None
    if chosen != "streaming":
        try:
            planned = chunked_plan(
                N, H_s, H_t if teacher else None, V, dtype=dtype, device=place, upcast=upcast, top_k=lists,
                memory_budget=memory_budget,
            )  # fmt: skip
            chosen, chunk, workspace = "chunked", planned.chunk, planned.workspace
        except BudgetTooSmall as error:
            if chosen != AUTO or lists is not None:
                raise
            too_small, chosen = error, "streaming"
    if chosen == "streaming":
        try:
            problem = _problem(N, H_s, H_t if teacher else None, V, dtype, spec, lists, memory_budget)
            chunk, workspace = _streamed(problem, dtype, upcast)
        except BudgetTooSmall as error:
            if too_small is None:
                raise
            raise ValueError(f"{too_small}; engine='streaming' would need {error.minimum}") from None
        notes.append("logits are computed again, two to four times in all: more FLOPs than those of the GEMMs above")
        if too_small is not None:
            notes.append(f"the chunked engine would need a budget of at least {too_small.minimum} bytes")
    if chosen == "chunked" and spec.ranked and chunk < N:
        notes.append("difficulties are ranked first, which computes the logits twice unless all tokens fit one chunk")
    if row not in BACKENDS:
        row = "native" if _native_works() else "torch"
    chunks, group = -(-N // chunk), None
    if planned is not None:
        chunks, group = sum(map(len, planned.groups(N))), planned.group
    hidden_sizes = [H_s] * 3 + [H_t] * (teacher and lists is None)
    return Choice(
        chosen, row, device, str(dtype).removeprefix("torch."), repr(objective), chunk, chunks, group, workspace,
        gradients=dtype.itemsize * (N + V) * H_s,
        flops=2 * N * V * sum(hidden_sizes),
        gemms=len(hidden_sizes),
        eager_logits=dtype.itemsize * N * V * (2 if len(hidden_sizes) == 4 else 1),
        notes=tuple(notes),
    )  # fmt: skip


def chunked_plan(
    n: int,
    H_s: int,
    H_t: int | None,
    V: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    upcast: bool,
    top_k: int | None = None,
    memory_budget: int | None = None,
) -> Plan:
    """The chunked engine's own plan of n valid tokens, all gradients wanted, from tensors without data.

    ``upcast``: operands of low precision are made fp32 first, as where GEMMs have no fp32 output. The teacher is a list
    of ``top_k`` entries a token, or has ``H_t`` hidden states, or is none.
    """
    problem = _problem(n, H_s, H_t, V, dtype, SelfEvolution.kind, top_k, memory_budget)
    chunks = Chunks(problem, V, None, problem.labels)
    for source in (chunks.student, chunks.teacher):
        if source is not None and source.projection is not None:
            # It asks the tensors' device, which is not the one to be planned for.
            source.projection.upcast = upcast and dtype != torch.float32
    return chunked.plan(chunks, device)


def _streamed(problem: Problem, dtype: torch.dtype, upcast: bool) -> tuple[int, int]:
    """Tokens a chunk of dH, and bytes."""
    heads = [side for side in (problem.student, problem.teacher) if side is not None]
    plain = all(side.source.shape[1] % ALIGNED == 0 for side in heads)
    tiles = choose_tiles(*[dtype] * len(heads), plain=plain, target=_target())
    sizes = sizes_of(problem, len(problem.labels), upcast=upcast)
    plan = plan_streaming(sizes, tiles, problem.memory_budget)
    return plan.tokens, plan.workspace


def _problem(
    n: int,
    H_s: int,
    H_t: int | None,
    V: int,
    dtype: torch.dtype,
    spec: RowSpec,
    top_k: int | None,
    memory_budget: int | None,
) -> Problem:
    """Of tensors without data."""

    def side(H: int) -> Side:
        hidden, weight = (torch.empty(size, H, dtype=dtype, device="meta") for size in (n, V))
        return Side(hidden, weight)

    teacher = None
    if top_k is not None:
        entries = torch.empty(n, top_k, dtype=torch.float32, device="meta")
        teacher = Side(entries, indices=entries, tail="renormalize")
    elif H_t is not None:
        teacher = side(H_t)
    nothing, labels = torch.empty(0, device="meta"), torch.empty(n, dtype=torch.int64, device="meta")
    return Problem(
        student=side(H_s), teacher=teacher, labels=labels, weights=None, scale=nothing, scalars=nothing,
        wanted=Wanted(source=True, weight=True, bias=False), spec=spec, cold_labels=False, vocab=V, dtype=None,
        memory_budget=memory_budget, engine="", backend="",
    )  # fmt: skip


def _target() -> str:
    """What the streaming engine's tiles depend on; an H100 where there is no GPU."""
    if not torch.cuda.is_available():
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx"
    return "sm_{}{}".format(*torch.cuda.get_device_capability())
