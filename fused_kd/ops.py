"""The engines as one opaque ``torch.library`` op, so that ``torch.compile`` passes over it whole; and its autograd.

An op takes tensors and plain values alone: those of a :class:`.engines.problem.Problem` and its parts, each by a name
of its own. Schema, packing and unpacking follow from the fields of these classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast, get_type_hints

import torch
from torch import Tensor

from .engines.dispatch import run as run
from .engines.mapping import check_map
from .engines.problem import IGNORED, Listing, Problem, Result, Side, Wanted, gradient_dtype
from .rows.contract import Shards
from .rows.select import installed
from .tokens import check_top_k

_PARTS: dict[str, Any] = {
    "student": Side, "teacher": Side, "wanted": Wanted, "shards": Shards, "listing": Listing, "others": Side
}  # fmt: skip
# Parts of which there are several: each of their fields is a list.
_SEVERAL = ("others",)
# What stands for a part that is None.
_MISSING: dict[str, Any] = {"teacher": Side(cast(Tensor, None)), "shards": Shards("", 0, ())}
_KINDS: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    int | None: "int?",
    float: "float",
    float | None: "float?",
    str: "str",
    str | None: "str?",
    tuple[int, ...]: "int[]",
    torch.dtype | None: "ScalarType?",
}


def _fields() -> Iterator[tuple[str, str | None, str]]:
    """Of a problem: the field, that of the part it is, and its kind in a schema."""
    for name, kind in get_type_hints(Problem).items():
        if name not in _PARTS:
            yield name, None, _KINDS[kind]
            continue
        for inner, kind in get_type_hints(_PARTS[name]).items():
            missing = name == "teacher" and kind is Tensor
            yield name, inner, ("Tensor?" if missing else _KINDS[kind]) + ("[]" if name in _SEVERAL else "")


_FIELDS = tuple(_fields())
NAMES = tuple(name if inner is None else f"{name}_{inner}" for name, inner, _ in _FIELDS)
_TENSORS = tuple(name for name, (*_, kind) in zip(NAMES, _FIELDS, strict=True) if kind in ("Tensor", "Tensor?"))
_TENSOR_LISTS = tuple(
    name for name, (*_, kind) in zip(NAMES, _FIELDS, strict=True) if kind in ("Tensor[]", "Tensor?[]")
)
# The op's first arguments are what it can have gradients for.
_WANTED = tuple(f"wanted_{name}" for name in Wanted._fields)
_NOTHING = dict.fromkeys(_WANTED, False)
assert NAMES[:3] == ("student_source", "student_weight", "student_bias")


def pack(problem: Problem) -> tuple[Any, ...]:
    """The op's arguments, in the order of :data:`NAMES`."""
    values = []
    for name, inner, _ in _FIELDS:
        value = getattr(problem, name)
        if name in _SEVERAL:
            value = [getattr(each, cast(str, inner)) for each in value]
        elif inner is not None:
            value = getattr(_MISSING[name] if value is None else value, inner)
        values.append(value)
    return tuple(values)


def unpack(values: tuple[Any, ...]) -> Problem:
    found: dict[str, Any] = {name: {} for name in _PARTS}
    for (name, inner, _), value in zip(_FIELDS, values, strict=True):
        if inner is None:
            found[name] = value
        else:
            found[name][inner] = value
    parts = {name: cls(**found[name]) for name, cls in _PARTS.items() if name not in _SEVERAL}
    for name in _SEVERAL:
        columns = zip(*found[name].values(), strict=True)
        parts[name] = tuple(_PARTS[name](**dict(zip(found[name], each, strict=True))) for each in columns)
    if parts["teacher"].source is None:
        parts["teacher"] = None
    if not parts["shards"].group:
        parts["shards"] = None
    return Problem(**(found | parts))


_library = torch.library.Library("fused_kd", "FRAGMENT")
_ARGUMENTS = ", ".join(f"{kind} {name}" for name, (*_, kind) in zip(NAMES, _FIELDS, strict=True))
_RESULTS = "Tensor loss, Tensor difficulty, Tensor is_hard, Tensor statistics"
_RESULTS += ", Tensor d_student, Tensor d_weight, Tensor d_bias"
_library.define(f"kd({_ARGUMENTS}) -> ({_RESULTS})")
_library.define("scale_gradient(Tensor gradient, Tensor factor, ScalarType dtype) -> Tensor")


def _kd(*values: Any) -> tuple[Tensor, ...]:
    problem = unpack(values)
    student = problem.student
    for i, teacher in enumerate(problem.teachers):
        if teacher.indices is not None and (problem.validate or teacher.source.is_cpu):
            check_top_k(teacher, problem.labels_for(i), problem.vocab)
        if teacher.columns is not None and not problem.others:  # others may have what it lacks
            check_map(teacher, problem.vocab, problem.spec)
    # Under autocast the engine's own GEMMs would be cast once more.
    with torch.autocast(student.source.device.type, enabled=False), torch.no_grad():
        result = run(problem)
    if problem.validate:
        _check_losses(result)
    return (*result[:4], *(student.source.new_empty(0) if g is None else g for g in result[4:]))


def _kd_fake(*values: Any) -> tuple[Tensor, ...]:
    problem = unpack(values)
    student, N = problem.student, problem.student.source.shape[0]

    def gradient(of: Tensor | None, wanted: bool) -> Tensor:
        if of is None or not wanted:
            return student.source.new_empty(0)
        return of.new_empty(of.shape, dtype=gradient_dtype(of.dtype))

    return (
        student.source.new_empty(N, dtype=torch.float32),
        student.source.new_empty(N, dtype=torch.float32),
        student.source.new_empty(N, dtype=torch.bool),
        student.source.new_empty(N, problem.statistics, dtype=torch.float32),
        gradient(student.source, problem.wanted.source),
        gradient(student.weight, problem.wanted.weight),
        gradient(student.bias, problem.wanted.bias),
    )


_library.impl("kd", _kd, "CompositeExplicitAutograd")
torch.library.register_fake("fused_kd::kd", _kd_fake, lib=_library)


def _scale_gradient(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return (gradient * factor).to(dtype)


_library.impl("scale_gradient", _scale_gradient, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fused_kd::scale_gradient", lambda gradient, factor, dtype: gradient.new_empty(gradient.shape, dtype=dtype),
    lib=_library,
)  # fmt: skip


def _check_losses(result: Result) -> None:
    bad = result.loss.isnan()
    if bool(bad.any()):
        token = int(bad.nonzero()[0])
        raise ValueError(
            f"student and teacher logits must be finite or -inf; the first token with others is token {token} "
            "(of the flattened tokens)"
        )


def _weighted(loss: Tensor, weights: Tensor) -> Tensor:
    """Products, in which weight 0 leaves nothing of an infinite loss, but NaN of NaN, as in the gradient."""
    return (loss * weights).masked_fill((weights == 0) & (loss == math.inf), 0.0)


def _restored(saved: tuple[Tensor, ...], several: int) -> dict[str, Any]:
    """The op's tensors by name, and its lists of ``several``, from what was saved one after the other."""
    single = len(_TENSORS)
    found: dict[str, Any] = dict(zip(_TENSORS, saved[:single], strict=True))
    for i, name in enumerate(_TENSOR_LISTS):
        found[name] = list(saved[single + i * several : single + (i + 1) * several])
    return found


class KDFunction(torch.autograd.Function):
    """``(loss, difficulty, is_hard, statistics)`` from ``per_token`` and the op's arguments.

    The gradients come ready-made from the forward. The first backward hands them over, scaled in place, so that no
    second weight-sized tensor is ever held; a further one (``retain_graph=True``) runs the engine again. With
    ``per_token`` the upstream gradient is one number a token: that of the hidden states is then an exact product, while
    those of weight and bias mix tokens, so the backward runs the engine with the upstream gradient as token weights.
    """

    @staticmethod
    def forward(ctx: Any, per_token: bool, *values: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        given: dict[str, Any] = dict(zip(NAMES, values, strict=True))
        wanted = tuple(given[name] for name in _WANTED)
        later = per_token and (wanted[1] or wanted[2])
        now = given | _NOTHING if later else given
        loss, difficulty, is_hard, statistics, *gradients = torch.ops.fused_kd.kd(*now.values())
        if given["weights"] is not None:
            loss = _weighted(loss, given["weights"])
        if not per_token:
            loss = loss.sum() * given["scale"]
        ctx.wanted, ctx.per_token, ctx.backend = wanted, per_token, given["backend"]
        ctx.dtypes = tuple(None if x is None else x.dtype for x in values[:3])
        ctx.traced = torch.compiler.is_compiling() and not later
        ctx.ready = None
        if ctx.traced:  # a traced backward cannot hand over, it only multiplies
            ctx.save_for_backward(*gradients, given["labels"])
        elif any(wanted):
            ctx.ready = None if later else gradients
            # The scalars may be annealed in place before the backward runs.
            tensors = given | {"scalars": given["scalars"].clone()}
            several = (each for name in _TENSOR_LISTS for each in tensors[name])
            ctx.save_for_backward(*(tensors[name] for name in _TENSORS), *several)
            ctx.several = len(given[_TENSOR_LISTS[0]])
            ctx.options = {name: given[name] for name in NAMES if name not in _TENSORS + _TENSOR_LISTS}
        ctx.mark_non_differentiable(difficulty, is_hard, statistics)
        ctx.set_materialize_grads(False)
        return loss, difficulty, is_hard, statistics

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        none = (None,) * (len(NAMES) - 3)
        if upstream is None:
            return (None,) * 4 + none
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("fused_kd losses have no second derivative: create_graph=True is not supported")
        upstream = upstream.float()
        if ctx.per_token:  # what is done with an ignored token's 0 is not ours
            labels = ctx.saved_tensors[-1 if ctx.traced else _TENSORS.index("labels")]
            upstream = torch.where(labels.to(upstream.device, non_blocking=True) == IGNORED, 0.0, upstream)
        factor: Tensor | None = upstream.unsqueeze(1) if ctx.per_token else upstream
        if ctx.traced:
            scale = torch.ops.fused_kd.scale_gradient
            saved = zip(ctx.saved_tensors[:3], ctx.wanted, ctx.dtypes, strict=True)
            return (None, *(scale(g, factor, dtype) if wanted else None for g, wanted, dtype in saved), *none)
        gradients, ctx.ready = ctx.ready, None
        if gradients is None:
            given: Mapping[str, Any] = ctx.options | _restored(ctx.saved_tensors, ctx.several)
            if ctx.per_token:
                weights = upstream if given["weights"] is None else upstream * given["weights"]
                given, factor = {**given, "weights": weights}, None
            gradients = torch.ops.fused_kd.kd(*(given[name] for name in NAMES))[4:]
        scaled = (
            _scale_in_place(gradient, factor, dtype, ctx.backend) if wanted else None
            for gradient, dtype, wanted in zip(gradients, ctx.dtypes, ctx.wanted, strict=True)
        )
        return (None, *scaled, *none)


def _scale_in_place(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor:
    """A pass over a weight-sized gradient is worth a look at the factor; on a GPU only a kernel may look."""
    if factor is None or (factor.numel() == 1 and factor.device.type == "cpu" and factor.item() == 1.0):
        return gradient.to(dtype)
    if factor.numel() == 1 and gradient.is_contiguous() and _by_kernel(factor.device, backend):
        from .engines.hand_over import scale_in_place

        scale_in_place(gradient, factor)
    else:
        gradient.mul_(factor)
    return gradient.to(dtype)


def _by_kernel(device: torch.device, backend: str) -> bool:
    """Triton is there and may be used: ``backend="torch"`` says no."""
    if device.type != "cuda" or backend == "torch" or not installed("triton"):
        return False
    from .engines.hand_over import works

    return works(device)
