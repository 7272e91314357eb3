"""What a call would do, without doing it: the planners' answers for shapes instead of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .engines import chunked
from .engines.chunks import Chunks, LogitSource
from .engines.dispatch import AUTO, ENGINES, TEACHERS, TOP_K, choose_engine
from .engines.gemm import has_fp32_output, interpreted
from .engines.mixing import MixedSource
from .engines.plan import BudgetTooSmall
from .engines.plan import Plan as ChunkedPlan
from .engines.problem import Problem, Side, Wanted
from .engines.streaming.plan import ALIGNED, choose_tiles, plan_streaming, sizes_of
from .engines.streaming.plan import Plan as StreamingPlan
from .inputs import FLOAT_DTYPES
from .objectives import Objective, SelfEvolution
from .options import check_objective
from .rows.select import BACKENDS, native_works
from .terms import RowSpec


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
    teacher_dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    head_learns: bool = True,
    device: str = "cpu",
    objective: Objective | None = None,
    memory_budget: int | None = None,
    top_k: int | None = None,
    teachers: int = 1,
    engine: str | None = None,
    backend: str | None = None,
) -> Choice:
    """The plan of a call without ignored tokens; nothing is computed.

    Args:
        N: tokens.
        H_s, H_t: hidden sizes of student and teacher.
        V: vocabulary.
        dtype: of hidden states and weights: float32, bfloat16 or float16.
        teacher_dtype: of the teacher's, where they are of another.
        autocast: the dtype that autocast computes in, or None.
        head_learns: whether the student's weight has a gradient, as its hidden states have; default True.
        device: "cpu" or "cuda". Where there is no GPU, "cuda" stands for an NVIDIA one of sm_80 or later.
        objective: default :class:`fused_kd.SelfEvolution`.
        memory_budget: bytes of workspace, or None.
        top_k: the teacher is a list of so many entries a token; None: hidden states and a weight.
        teachers: how many are mixed, with hidden states of ``H_t`` and a weight each; 1 with ``top_k``.
        engine, backend: as for :class:`fused_kd.KDLoss`.

    Raises:
        ValueError: for a size below 1, a name that is not known, an engine or backend that cannot run, or a
            ``memory_budget`` that no plan fits; the message says what would.
    """
    objective = SelfEvolution() if objective is None else objective
    check_objective(objective)
    sizes = {"N": N, "H_s": H_s, "H_t": H_t, "V": V, "memory_budget": memory_budget, "top_k": top_k}
    sizes["teachers"] = teachers
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    teacher_dtype = teacher_dtype or dtype
    computed, of_teacher = autocast or dtype, autocast or teacher_dtype
    dtypes = {"dtype": dtype, "teacher_dtype": teacher_dtype, "autocast": computed}
    for name, given, known in (
        ("device", device, ("cpu", "cuda")),
        *((*each, FLOAT_DTYPES) for each in dtypes.items()),
    ):
        if given not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {given!r}")
    if engine is not None and engine not in ENGINES:
        raise ValueError(f"engine must be None or one of {', '.join(map(repr, ENGINES))}, got {engine!r}")
    if top_k is not None and top_k > V:
        raise ValueError(f"top_k must be at most V={V}, got {top_k}")
    if top_k is not None and teachers > 1:
        raise ValueError(f"teachers must be 1 with top_k, whose lists are mixed into one before, got {teachers}")
    spec, place = objective.spec, torch.device(device)
    if not spec.needs_teacher:
        top_k, teachers = None, 1
    asks = () if top_k is None else (TOP_K,)
    asks = (TEACHERS,) if teachers > 1 else asks
    chosen, row = choose_engine(engine, backend, spec, 0.0, place, asks=asks)
    if row not in BACKENDS:
        row = "native" if native_works() else "torch"
    here = device == "cpu" or torch.cuda.is_available()
    upcast, teacher_upcast = (
        each != torch.float32 and here and not has_fp32_output(place, each) for each in (computed, of_teacher)
    )
    notes = [] if here else ["no GPU here: planned for an NVIDIA GPU of sm_80 or later"]
    upcast = upcast or (row == "triton" and interpreted(place, computed))
    if upcast and device == "cpu":
        notes.append(
            f"operands are made fp32 first, as this CPU has no products of {str(computed).removeprefix('torch.')} with "
            "fp32 results: float32 is the faster choice where its weights fit"
        )
    problem = _problem(
        N, H_s, H_t, V, dtype, spec, top_k, memory_budget, teachers, teacher_dtype, autocast, head_learns
    )

    too_small, group = None, None
    if chosen != "streaming":
        try:
            plan = _chunked(problem, place, upcast, teacher_upcast)
            chosen, chunk, workspace, group = "chunked", plan.chunk, plan.workspace, plan.group
            chunks = sum(map(len, plan.groups(N)))
            if spec.ranked and chunk < N:
                notes.append(
                    "difficulties are ranked first, which computes the logits twice unless all tokens fit one chunk"
                )
        except BudgetTooSmall as error:
            if chosen != AUTO:
                raise
            chosen, too_small = "streaming", error
    if chosen == "streaming":
        try:
            streamed = _streamed(problem, upcast or interpreted(place, computed))
        except BudgetTooSmall as error:
            if too_small is None:
                raise
            raise ValueError(f"{too_small}; engine='streaming' would need {error.minimum}") from None
        chunk, chunks, workspace = streamed.tokens, -(-N // streamed.tokens), streamed.workspace
        notes.append("logits are computed again, two to four times in all: more FLOPs than those of the GEMMs above")
        if too_small is not None:
            notes.append(f"the chunked engine would need a budget of at least {too_small.minimum} bytes")
    hidden_sizes = [H_s] * (2 + head_learns)  # logits and gradients
    logits = 1
    if problem.teacher is not None and top_k is None:
        hidden_sizes += [H_t] * teachers
        logits += teachers
    return Choice(
        chosen, row, device, str(computed).removeprefix("torch."), repr(objective), chunk, chunks, group, workspace,
        gradients=dtype.itemsize * (N + V * head_learns) * H_s,
        flops=2 * N * V * sum(hidden_sizes),
        gemms=len(hidden_sizes),
        eager_logits=computed.itemsize * N * V * logits,
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
) -> ChunkedPlan:
    """The chunked engine's own plan of n valid tokens, all gradients wanted, from tensors without data.

    ``upcast``: operands of low precision are made fp32 first, as where GEMMs have no fp32 output. The teacher is a list
    of ``top_k`` entries a token, or has ``H_t`` hidden states, or is none.
    """
    return _chunked(_problem(n, H_s, H_t, V, dtype, SelfEvolution().spec, top_k, memory_budget), device, upcast)


def _chunked(problem: Problem, device: torch.device, upcast: bool, teacher_upcast: bool | None = None) -> ChunkedPlan:
    chunks = Chunks(problem, problem.vocab, None, problem.labels)
    teachers = chunks.teacher.teachers if isinstance(chunks.teacher, MixedSource) else [chunks.teacher]
    for source in (chunks.student, *teachers):
        if isinstance(source, LogitSource) and source.projection is not None:
            # It asks the tensors' device, which is not the one to be planned for.
            projection = source.projection
            wide = upcast if source is chunks.student or teacher_upcast is None else teacher_upcast
            projection.upcast = wide and projection.dtype != torch.float32
            projection.copied = not projection.upcast and projection.dtype != projection.weight_dtype
    return chunked.plan(chunks, device)


def _streamed(problem: Problem, upcast: bool) -> StreamingPlan:
    heads = [side for side in (problem.student, problem.teacher) if side is not None]
    dtypes = [problem.dtype or side.source.dtype for side in heads]
    plain = all(side.source.shape[1] % ALIGNED == 0 and problem.dtype in (None, side.source.dtype) for side in heads)
    target = "sm_90"  # an H100 where there is no GPU
    if torch.cuda.is_available():
        target = "gfx" if torch.version.hip else "sm_{}{}".format(*torch.cuda.get_device_capability())
    tiles = choose_tiles(*dtypes, plain=plain, target=target)
    return plan_streaming(sizes_of(problem, len(problem.labels), upcast=upcast), tiles, problem.memory_budget)


def _problem(
    n: int,
    H_s: int,
    H_t: int | None,
    V: int,
    dtype: torch.dtype,
    spec: RowSpec,
    top_k: int | None,
    memory_budget: int | None,
    teachers: int = 1,
    teacher_dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    head_learns: bool = True,
) -> Problem:
    """Of tensors without data; the teacher's are left out where the objective has none."""

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def head(width: int, dtype: torch.dtype) -> Side:
        return Side(empty(n, width, dtype=dtype), empty(V, width, dtype=dtype))

    teacher = None
    if top_k is not None:
        entries = empty(n, top_k, dtype=torch.float32)
        teacher = Side(entries, indices=entries, tail="renormalize")
    elif spec.needs_teacher and H_t is not None:
        teacher = head(H_t, teacher_dtype or dtype)
    others = () if teacher is None else (teacher,) * (teachers - 1)
    return Problem(
        student=head(H_s, dtype), teacher=teacher, labels=empty(n, dtype=torch.int64), weights=None,
        scale=empty(0, dtype=torch.float32), scalars=empty(0, dtype=torch.float32),
        wanted=Wanted(source=True, weight=head_learns, bias=False), spec_code=spec.code, cold_labels=False, vocab=V,
        dtype=autocast, memory_budget=memory_budget, engine="", backend="",
        others=others,
    )  # fmt: skip
