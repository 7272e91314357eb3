"""One harness for every row: which of them run here, how one is called, and what is right.

Without a GPU, rows of Triton and CUDA run in an interpreter and an emulator. A case costs a tenth of a second there, so
that these two take the objectives that steer their code differently, each pair of values once; ``make test-all`` takes
every case.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_kd.objectives import Objective
from fused_kd.options import token_scalars
from fused_kd.reference import reference_rows
from fused_kd.rows.contract import Logits, RowInputs, RowOutputs
from fused_kd.rows.select import get_row, installed
from fused_kd.terms import RowSpec

from ..cuda_emulator import needs_cpp_compiler
from ..problems import JUMPS, NAMES, OBJECTIVES, label, needs_compiler, relative, summands

GPU = torch.cuda.is_available()
INTERPRETED = not GPU and os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    not (INTERPRETED or (GPU and installed("triton"))), reason="needs Triton, and a GPU or its interpreter"
)
needs_cuda = (
    pytest.mark.skipif(not installed("cuda.core"), reason="needs the extra cuda") if GPU else needs_cpp_compiler
)
on_gpu = [pytest.mark.gpu] if GPU else []

TORCH = pytest.param("torch", id="torch")
NATIVE = pytest.param("native", id="native", marks=needs_compiler)
TRITON = pytest.param("triton", id="triton", marks=[needs_triton, *on_gpu])
CUDA = pytest.param("cuda", id="cuda", marks=[needs_cuda, *on_gpu])
ROWS = [TORCH, NATIVE, TRITON, CUDA]
# Of CPU tensors on every machine.
HOSTED = [TORCH, NATIVE, *([TRITON] if INTERPRETED else [])]

ALL = [objective for objective in OBJECTIVES if not objective.spec.ranked]
# No teacher; the free gradient; differences and a label of its own; a gate and a mixture; both sums; two of a row;
# powers; a term that comes and goes; a sum with a gate, a floor and a z-loss; values that are no sums.
KINDS = (
    *("sft", "no_evo", "reverse_kd", "self_evolution", "generalized_jsd", "adaptive_kl"),
    *("alpha_beta", "entropy_gated", "sum_gated", "sum_outer"),
)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NEAR = [pytest.param(False, id="far"), pytest.param(True, id="near")]
DTYPES = [pytest.param(x, id=name) for x, name in ((FP32, "fp32"), (BF16, "bf16"), (FP16, "fp16"))]
ROUNDED = {FP32: 0.0, BF16: 2**-8, FP16: 2**-11}
BUDGET = 2e-6


PARAM = type(TORCH)


def device_of(backend: str) -> str:
    return "cuda" if GPU and backend in ("triton", "cuda") else "cpu"


def slow(backend: str) -> bool:
    return device_of(backend) == "cpu" and backend in ("triton", "cuda")


def cases(
    *axes: Sequence[Any],
    backends: Sequence[Any] = ROWS,
    kinds: Sequence[str] = KINDS,
    pairs: bool = False,
    few: Callable[..., bool] | None = None,
) -> list[Any]:
    """The product of the axes and the backends, in this order; of slow backends as few as have each pair of values.

    Of two axes each value once is enough in the interpreter, unless all ``pairs`` are asked for. Objectives, or their
    classes, that are not among ``kinds`` wait for ``make test-all`` there. ``few`` says of a cell whether slow backends
    take it, where what steers their code is no pair of values.
    """
    made, cells = [], list(itertools.product(*axes))
    for backend in backends:
        chosen = set(range(len(cells)))
        if slow(backend.values[0]) and few is not None:
            chosen = {i for i, cell in enumerate(cells) if few(*map(_value, cell))}
        elif slow(backend.values[0]):
            chosen = _few(cells, backend.values[0], kinds, pairs)
        for i, cell in enumerate(cells):
            marks = [*backend.marks, *(mark for x in cell if isinstance(x, PARAM) for mark in x.marks)]
            if i not in chosen:
                marks.append(pytest.mark.exhaustive)
            label = "-".join([*map(_label, cell), str(backend.id)])
            made.append(pytest.param(*map(_value, cell), backend.values[0], id=label, marks=marks))
    return made


def backend_first(made: Sequence[Any]) -> list[Any]:
    """The same cases for ``"backend, ..."``."""
    return [
        pytest.param(case.values[-1], *case.values[:-1], id="-".join(case.id.rsplit("-", 1)[::-1]), marks=case.marks)
        for case in made
    ]


def _few(cells: list[Any], backend: str, kinds: Sequence[str], pairs: bool) -> set[int]:
    """Which cells to take: again and again the one with most of what is missing, of the values used least so far."""
    names = [{_label(x) for x in cell} & {*NAMES} for cell in cells]
    together = 1 if backend == "triton" and len(cells[0]) == 2 and not pairs else min(2, len(cells[0]))
    sets = [set(itertools.combinations(enumerate(map(_label, cell)), together)) for cell in cells]
    left = {i: sets[i] for i, found in enumerate(names) if found <= {*kinds}}
    values = [list(enumerate(map(_label, cell))) for cell in cells]
    chosen: set[int] = set()
    used: Counter[Any] = Counter()
    while any(left.values()):
        best = max(left, key=lambda i: (len(left[i]), -sum(used[value] for value in values[i])))
        chosen.add(best)
        used.update(values[best])
        left = {i: having - sets[best] for i, having in left.items()}
    return chosen


def _value(value: Any) -> Any:
    return value.values[0] if isinstance(value, PARAM) else value


def _label(value: Any) -> str:
    if isinstance(value, PARAM):
        return str(value.id)
    if isinstance(value, Objective) or (isinstance(value, type) and issubclass(value, Objective)):
        return label(value)
    return str(value).removeprefix("torch.")


def make(C: int, V: int, *, std: float = 2.0, near: bool = True, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student's and teacher's logits (C, V) and labels (C,), half of them likely."""
    g = torch.Generator().manual_seed(seed)
    z, z_t = torch.randn(C, V, generator=g) * std, torch.randn(C, V, generator=g) * (1.0 if near else std)
    z_t = z_t + z if near else z_t
    labels = torch.randint(V, (C,), generator=g)
    labels[::2] = z_t[::2].argmax(1)
    return z, z_t, labels


def call(
    backend: str,
    z: Tensor,
    z_t: Tensor | None,
    labels: Tensor,
    objective: Objective,
    *,
    T: float | Tensor = 1.0,
    weights: Tensor | None = None,
    dlogits: Tensor | None = None,
    gradient: bool = True,
    scale: tuple[float, float] = (1.0, 1.0),
    cap: tuple[float | None, float | None] = (None, None),
    spec: RowSpec | None = None,
    hard: Tensor | None = None,
    finite: bool = False,
    statistics: int = 0,
) -> RowOutputs:
    """One row's results. They start as NaN (is_hard as True); ``dlogits`` may be ``z`` itself.

    Numbers of the objective, and T, may be those of each row, (C,).
    """
    device, spec = device_of(backend), spec or objective.spec
    C, V = z.shape
    student = z.to(device)
    if dlogits is z:
        dlogits = student
    elif gradient and dlogits is None:
        dlogits = torch.full((C, V), math.nan, device=device)
    nan = torch.full((2, C), math.nan, device=device)
    told = torch.full((C, statistics), math.nan, device=device) if statistics else None
    outputs = RowOutputs(nan[0], nan[1], torch.ones(C, dtype=torch.bool, device=device), dlogits, told)
    teacher = None
    if z_t is not None and spec.needs_teacher:
        teacher = Logits(z_t.to(device), scale[1], cap[1], finite)
    scalars = scalars_of(objective, T, C).to(device)
    cold = spec.has_cold(not isinstance(T, Tensor) and T == 1.0)
    given = None if hard is None else hard.to(device)
    factors = None if weights is None else weights.to(device)
    before = student.clone()
    inputs = RowInputs(
        Logits(student, scale[0], cap[0], finite), teacher, labels.to(device), factors, scalars, spec, cold, given
    )
    get_row(backend)(inputs, outputs)
    if dlogits is not student and backend != "torch":
        assert torch.equal(student.nan_to_num(), before.nan_to_num()), "the student's logits were changed"
    return outputs


def scalars_of(objective: Objective, T: float | Tensor = 1.0, C: int = 1) -> Tensor:
    """As rows take them: one for all, or of each of ``C`` rows."""
    if objective.per_token or isinstance(T, Tensor):
        return token_scalars(objective, T, torch.Size([C]), torch.device("cpu"))
    return torch.tensor([objective.scalars(T)])


def loose(objective: Objective) -> bool:
    """Whether its gradient jumps, or cancels on peaked rows."""
    return bool(summands(objective) & {*JUMPS, "generalized_jsd", "adaptive_kl"})


def oracle(
    z: Tensor,
    z_t: Tensor | None,
    labels: Tensor,
    objective: Objective,
    *,
    T: float | Tensor = 1.0,
    scale: tuple[float, float] = (1.0, 1.0),
    cap: tuple[float | None, float | None] = (None, None),
) -> RowOutputs:
    """The same in float64, from the reference."""
    raw = z.detach().cpu().double().requires_grad_()

    def final(x: Tensor, side: int) -> Tensor:
        x, limit = x.clamp(min=-1e30) * scale[side], cap[side]
        return x if limit is None else limit * torch.tanh(x / limit)

    teacher = None if z_t is None else final(z_t.cpu().double(), 1)
    loss, difficulty, hard = reference_rows(final(raw, 0), teacher, labels.cpu(), objective, T)
    gradient = torch.autograd.grad(loss.sum(), raw)[0] if loss.requires_grad else torch.zeros_like(raw)
    return RowOutputs(loss.detach(), difficulty.detach(), hard, gradient)


def check(
    actual: RowOutputs, expected: RowOutputs, budget: float = BUDGET, loss: float = 1e-6, least: float = 2e-7
) -> None:
    """Relative errors of the gradient, and of the losses, of which near rows leave little to be relative to."""
    for name in ("loss", "difficulty"):
        value, truth = getattr(actual, name).cpu().double(), getattr(expected, name).double()
        assert (value - truth).norm() <= loss * truth.norm() + least * len(truth) ** 0.5, name
    assert torch.equal(actual.is_hard.cpu(), expected.is_hard)
    if expected.dlogits is not None:
        assert actual.dlogits is not None and expected.dlogits is not None
        if expected.dlogits.norm() < 1e-12:  # nothing to be relative to
            assert actual.dlogits.abs().max() <= 1e-6
        else:
            assert relative(actual.dlogits, expected.dlogits) <= budget


def rounded(truth: Tensor, dtype: torch.dtype) -> float:
    """The error of a gradient that is rounded to ``dtype`` once. A few large values can make it all of one rounding."""
    if INTERPRETED and dtype == BF16:
        return 2**-7  # the interpreter truncates
    return BUDGET + 1.01 * relative(truth.to(dtype), truth)
