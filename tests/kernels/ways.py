"""Every way from logits to a loss and its gradient, each of which has to be right on the rows of some test.

Ways that are interpreted or emulated take some classes of objectives, with a dense teacher and with one kind of lists;
``make test-all`` takes all.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.objectives import OBJECTIVES, Objective
from fused_kd.rows.contract import Logits, RowInputs, RowOutputs, Shards, Sparse
from fused_kd.rows.top_k import sparse_teacher
from fused_kd.terms import ENTROPY, RowSpec

from ..cuda_emulator import needs_cpp_compiler
from ..problems import CPU_BACKENDS, gradients, needs_compiler
from .contract import KINDS, scalars_of

INTERPRETED = "triton" in CPU_BACKENDS
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
FORMS = ("dense", "renormalize", "uniform", "bucket", "listed")
# Of slow ways.
FEW = {
    "dense": KINDS,
    "bucket": ("no_evo", "reverse_kd", "self_evolution", "generalized_jsd"),
    "listed": ("no_evo", "reverse_kd", "alpha_beta"),
}
SCALARS = {"lam": 0.3, "beta": 0.4, "alpha": 0.1, "fraction": 0.6, "gamma": 0.5, "floor": 0.2, "tau": 1.0}
EDGES = (0.0, 1e-6, 1 - 1e-6, 1.0)
# Of classes with other ranges: an exponent near 0 or 1 leaves a difference of near numbers, divided by it.
EDGES_OF = {"alpha_beta": (0.01, 1.0), "renyi": (0.001, 0.999)}


class Found(NamedTuple):
    loss: Tensor  # (N,)
    difficulty: Tensor
    gradient: Tensor  # (N, V)


Run = Callable[[Tensor, "Tensor | fk.TopK", Tensor, Objective, float], Found]


def through_the_loss(**options: str) -> Run:
    def run(z: Tensor, teacher: Tensor | fk.TopK, y: Tensor, objective: Objective, T: float) -> Found:
        leaf = z.clone().requires_grad_()
        out = fk.kd_loss(leaf, teacher, y, objective, temperature=T, reduction="none", **options)
        return Found(out.loss.detach(), out.difficulty, gradients(out.loss.sum(), [leaf])[0])

    return run


def outputs(C: int, V: int, dtype: torch.dtype, fill: float, device: torch.device) -> RowOutputs:
    with device:
        vectors = torch.full((C,), fill), torch.full((C,), fill), torch.zeros(C, dtype=torch.bool)
        return RowOutputs(*vectors, torch.full((C, V), fill, dtype=dtype))


def in_turns(
    inputs: RowInputs, sizes: Sequence[int], dtype: torch.dtype = torch.float32, backend: str = "torch"
) -> list[RowOutputs]:
    """Each rank's outputs of a vocabulary in slices; what a rank says is stacked for all of them as the engine does."""
    row = importlib.import_module(f"fused_kd.rows.{backend}.sharded").row
    bounds = [sum(sizes[:rank]) for rank in range(len(sizes) + 1)]
    ranks = []
    for rank, width in enumerate(sizes):
        columns = slice(bounds[rank], bounds[rank + 1])
        teacher = inputs.teacher
        if isinstance(teacher, Logits):
            teacher = teacher._replace(raw=teacher.raw[:, columns].clone())
        own = inputs._replace(
            student=inputs.student._replace(raw=inputs.student.raw[:, columns].clone()), teacher=teacher
        )
        out = outputs(len(inputs.labels), width, dtype, math.nan, inputs.labels.device)
        ranks.append((row(own, out, Shards("none", rank, tuple(sizes))), out))
    messages = [next(generator) for generator, _ in ranks]
    while messages:
        gathered = torch.stack(messages)
        messages = []
        for generator, _ in ranks:
            try:
                messages.append(generator.send(gathered))
            except StopIteration:
                continue
    return [out for _, out in ranks]


def in_slices(backend: str) -> Run:
    def run(z: Tensor, teacher: Tensor | fk.TopK, y: Tensor, objective: Objective, T: float) -> Found:
        V, spec = z.shape[1], objective.spec
        side: Logits | Sparse | None = None
        if isinstance(teacher, fk.TopK):
            lists = teacher.log_probs, teacher.indices
            side, _ = sparse_teacher(*lists, y, V, teacher.tail, reads_label=spec.reads_label)
        elif spec.needs_teacher:
            side = Logits(teacher, 1.0, None, False)
        cold = spec.has_cold(T == 1.0, side.tail if isinstance(side, Sparse) else "")
        student, scalars = Logits(z, 1.0, None, False), scalars_of(objective, T)
        inputs = RowInputs(student, side, y, None, scalars, spec, cold)
        out = in_turns(inputs, (V // 2, V - V // 2), backend=backend)
        return Found(out[0].loss, out[0].difficulty, torch.cat([x.dlogits for x in out], 1))

    return run


class Way(NamedTuple):
    run: Run
    slow: bool


WAYS = {
    "torch": (Way(through_the_loss(backend="torch"), False), ()),
    "native": (Way(through_the_loss(backend="native"), False), needs_compiler),
    "triton": (Way(through_the_loss(backend="triton"), True), needs_interpreter),
    "cuda": (Way(through_the_loss(backend="cuda"), True), needs_cpp_compiler),
    "streaming": (Way(through_the_loss(backend="triton", engine="streaming"), True), needs_interpreter),
    "slices": (Way(in_slices("torch"), False), ()),
    "triton slices": (Way(in_slices("triton"), True), needs_interpreter),
}
SHARDED = ("slices", "triton slices")
DENSE_ALONE = ("streaming", "triton slices")  # which have no adaptive_kl either


def refused(spec: RowSpec, form: str) -> bool:
    if form == "dense":
        return False
    if not spec.needs_teacher or (form != "uniform" and any(term.z_loss for term in spec.terms)):
        return True
    if form == "listed" and spec.mixes_label:
        return any(term.of.everywhere for term in spec.terms)
    return form == "renormalize" and any(term.of.everywhere or not term.of.lumps for term in spec.terms)


def every_way(ways: tuple[str, ...] = tuple(WAYS)) -> pytest.MarkDecorator:
    """Parametrises ``way``, ``form`` of the teacher and ``cls`` of the objective: what the library does not refuse."""
    made: list[Any] = []
    for name in ways:
        way, marks = WAYS[name]
        for form in FORMS if name not in DENSE_ALONE else FORMS[:1]:
            for cls in OBJECTIVES.values():
                spec = cls().spec
                if name in SHARDED and spec.gate == ENTROPY:  # of the whole teacher
                    continue
                if spec.ranked or refused(spec, form) or (name in DENSE_ALONE and cls is fk.AdaptiveKL):
                    continue
                rare = way.slow and cls.name not in FEW.get(form, ())
                own = [*([marks] if marks else ()), *([pytest.mark.exhaustive] if rare else ())]
                made.append(pytest.param(name, form, cls, id=f"{name}-{form}-{cls.name}", marks=own))
    return pytest.mark.parametrize("way, form, cls", made, indirect=["way"])


def variants(cls: type[Objective], form: str, *, edges: bool) -> list[Objective]:
    """With each scalar at its edges while the others are not, and each gate; what the teacher's form allows of them."""
    own = [name for name in vars(cls()) if name in SCALARS]
    middle = {name: SCALARS[name] for name in own}
    made = [cls(**middle)]
    for name in own if edges else ():
        if name not in ("gamma", "tau"):
            made += [cls(**middle | {name: value}) for value in EDGES_OF.get(cls.name, EDGES)]
    if edges and "gate" in vars(cls()):
        made += [cls(**middle, gate=gate) for gate in ("excess", "kl")]  # type: ignore[arg-type]
    return [objective for objective in made if not refused(objective.spec, form)]
