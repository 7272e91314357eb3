"""The engine as opaque ``torch.library`` ops, so that ``torch.compile`` passes over it whole."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .engines.chunked import Result, Side, TopKSide, Wanted
from .engines.dispatch import run as run
from .engines.head_gradient import gradient_dtype
from .objectives import RowSpec
from .rows.contract import Shards
from .rows.select import installed
from .rows.top_k import out_of_range


class Options(NamedTuple):
    """What of a call is fixed when it is compiled.

    ``softcap_*`` 0 means none; ``memory_budget`` -1 means none; no ``group`` means that the whole vocabulary is here.
    """

    divergence: str | None
    mixed: bool
    hard_label: bool
    gated: bool
    ranked: bool
    cold_labels: bool
    logit_scale_s: float
    softcap_s: float
    logit_scale_t: float
    softcap_t: float
    tail: str
    vocab: int
    ignore_index: int
    backend: str
    dtype: torch.dtype | None
    memory_budget: int
    validate: bool
    engine: str = "chunked"
    grad_filter_eps: float = 0.0
    group: str = ""
    rank: int = 0
    shard_sizes: tuple[int, ...] = ()
    sum_hidden: bool = True


_SCHEMA = (
    "(Tensor student, Tensor? weight_s, Tensor? bias_s, Tensor? teacher, Tensor? weight_t, Tensor? bias_t, "
    "Tensor? indices_t, Tensor labels, Tensor? token_weights, Tensor scale, Tensor scalars, "
    "bool want_student, bool want_weight, bool want_bias, "
    "str? divergence, bool mixed, bool hard_label, bool gated, bool ranked, bool cold_labels, "
    "float logit_scale_s, float softcap_s, float logit_scale_t, float softcap_t, str tail, "
    "int vocab, int ignore_index, str backend, ScalarType? dtype, int memory_budget, bool validate, "
    "str engine, float grad_filter_eps, str group, int rank, int[] shard_sizes, bool sum_hidden) "
    "-> (Tensor loss, Tensor difficulty, Tensor is_hard, Tensor d_student, Tensor d_weight, Tensor d_bias)"
)

_library = torch.library.Library("fused_kd", "DEF")
_library.define("kd" + _SCHEMA)
_library.define("scale_gradient(Tensor gradient, Tensor factor, ScalarType dtype) -> Tensor")


def _kd(
    student: Tensor,
    weight_s: Tensor | None,
    bias_s: Tensor | None,
    teacher: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
    indices_t: Tensor | None,
    labels: Tensor,
    token_weights: Tensor | None,
    scale: Tensor,
    scalars: Tensor,
    want_student: bool,
    want_weight: bool,
    want_bias: bool,
    *static: Any,
) -> tuple[Tensor, ...]:
    o = Options(*static)
    if labels.device.type == "cpu" or o.validate:
        check_labels(labels, o.vocab, o.ignore_index)
    teacher_side: Side | TopKSide | None = None
    if teacher is not None and indices_t is not None:
        teacher_side = TopKSide(teacher, indices_t, o.tail)
        if teacher.device.type == "cpu" or o.validate:
            check_top_k(teacher_side, labels, o.vocab, o.ignore_index)
    elif teacher is not None:
        teacher_side = Side(teacher, weight_t, bias_t, o.logit_scale_t, o.softcap_t or None)
    # Under autocast the engine's own GEMMs would be cast once more.
    with torch.autocast(student.device.type, enabled=False), torch.no_grad():
        result = run(
            o.engine,
            o.backend,
            Shards(o.group, o.rank, tuple(o.shard_sizes)) if o.group else None,
            Side(student, weight_s, bias_s, o.logit_scale_s, o.softcap_s or None),
            teacher_side,
            labels,
            weights=token_weights,
            scale=scale,
            scalars=scalars,
            spec=RowSpec(o.divergence, o.mixed, o.hard_label, o.gated, o.ranked),
            cold_labels=o.cold_labels,
            vocab=o.vocab,
            ignore_index=o.ignore_index,
            dtype=o.dtype,
            memory_budget=None if o.memory_budget < 0 else o.memory_budget,
            wanted=Wanted(want_student, want_weight, want_bias),
            grad_filter_eps=o.grad_filter_eps,
            sum_hidden=o.sum_hidden,
        )
    if o.validate:
        _check_losses(result)
    return (*result[:3], *(student.new_empty(0) if g is None else g for g in result[3:]))


def _kd_fake(
    student: Tensor,
    weight_s: Tensor | None,
    bias_s: Tensor | None,
    *others: Any,
) -> tuple[Tensor, ...]:
    want_student, want_weight, want_bias = others[8:11]
    N = student.shape[0]

    def gradient(of: Tensor | None, wanted: bool) -> Tensor:
        if of is None or not wanted:
            return student.new_empty(0)
        return of.new_empty(of.shape, dtype=gradient_dtype(of.dtype))

    return (
        student.new_empty(N, dtype=torch.float32),
        student.new_empty(N, dtype=torch.float32),
        student.new_empty(N, dtype=torch.bool),
        gradient(student, want_student),
        gradient(weight_s, want_weight),
        gradient(bias_s, want_bias),
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


def check_labels(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Raise ValueError naming the first label outside [0, vocab) that is not ``ignore_index``; waits for the device."""
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if bool(bad.any()):
        token = int(bad.nonzero()[0])
        raise ValueError(
            f"labels must be in [0, {vocab}) or ignore_index={ignore_index}, got {int(labels[token])} "
            f"at token {token} (of the flattened labels)"
        )


def check_top_k(teacher: TopKSide, labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Raise ValueError naming the first malformed list of a valid token; waits for the device."""
    values, indices = teacher.log_probs, teacher.indices
    valid = (labels != ignore_index).to(values.device).unsqueeze(1)
    listed = (values != -math.inf) & valid
    wrong = listed & out_of_range(values, teacher.tail)
    if bool(wrong.any()):
        token, k = wrong.nonzero()[0].tolist()
        allowed = "finite or -inf" if teacher.tail == "renormalize" else "at most 0 and not NaN"
        raise ValueError(
            f"log_probs must be {allowed}, got {float(values[token, k])} at token {token} (of the flattened tokens)"
        )
    empty = valid.squeeze(1) & ~listed.any(1)
    if teacher.tail == "renormalize" and bool(empty.any()):
        raise ValueError(
            "log_probs must list an entry above -inf with tail='renormalize', got none at token "
            f"{int(empty.nonzero()[0])} (of the flattened tokens)"
        )
    outside = listed & ((indices < 0) | (indices >= vocab))
    if bool(outside.any()):
        token, k = outside.nonzero()[0].tolist()
        raise ValueError(
            f"indices must be in [0, {vocab}) where log_probs is not -inf, got {int(indices[token, k])} at token "
            f"{token} (of the flattened tokens)"
        )
    ordered = torch.where(listed, indices.long(), vocab).sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < vocab)
    if bool(twice.any()):
        token, k = twice.nonzero()[0].tolist()
        raise ValueError(
            f"indices of a token must differ, got {int(ordered[token, k])} twice at token {token} "
            "(of the flattened tokens)"
        )


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


class KDFunction(torch.autograd.Function):
    """``(loss, difficulty, is_hard)`` from tensors; the gradients come ready-made from the forward.

    The first backward hands them over, scaled in place, so that no second weight-sized tensor is ever held; a further
    one (``retain_graph=True``) runs the engine again. With ``per_token`` the upstream gradient is one number a token:
    that of the hidden states is then an exact product, while those of weight and bias mix tokens, so the backward
    runs the engine with the upstream gradient as token weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        weight_s: Tensor | None,
        bias_s: Tensor | None,
        teacher: Tensor | None,
        weight_t: Tensor | None,
        bias_t: Tensor | None,
        indices_t: Tensor | None,
        labels: Tensor,
        token_weights: Tensor | None,
        scale: Tensor,
        scalars: Tensor,
        wanted: tuple[bool, bool, bool],
        per_token: bool,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        args = (student, weight_s, bias_s, teacher, weight_t, bias_t, indices_t, labels)
        later = per_token and (wanted[1] or wanted[2])
        now = (False, False, False) if later else wanted
        loss, difficulty, is_hard, *gradients = torch.ops.fused_kd.kd(
            *args, token_weights, scale, scalars, *now, *options
        )
        if per_token:
            loss = loss if token_weights is None else _weighted(loss, token_weights)
        else:
            loss = (loss if token_weights is None else _weighted(loss, token_weights)).sum() * scale
        ctx.wanted, ctx.per_token, ctx.options = wanted, per_token, options
        ctx.dtypes = tuple(None if x is None else x.dtype for x in args[:3])
        ctx.traced = torch.compiler.is_compiling() and not later
        ctx.ready = None
        if ctx.traced:  # a traced backward cannot hand over, it only multiplies
            ctx.save_for_backward(*gradients, labels)
        elif any(wanted):
            ctx.ready = None if later else gradients
            # The scalars may be annealed in place before the backward runs.
            ctx.save_for_backward(*args, token_weights, scale, scalars.clone())
        ctx.mark_non_differentiable(difficulty, is_hard)
        ctx.set_materialize_grads(False)
        return loss, difficulty, is_hard

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        none = (None,) * 14
        if upstream is None:
            return none
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("fused_kd losses have no second derivative: create_graph=True is not supported")
        upstream = upstream.float()
        if ctx.per_token:  # what is done with an ignored token's 0 is not ours
            labels = ctx.saved_tensors[-1 if ctx.traced else 7].to(upstream.device, non_blocking=True)
            upstream = torch.where(labels == Options(*ctx.options).ignore_index, 0.0, upstream)
        factor: Tensor | None = upstream.unsqueeze(1) if ctx.per_token else upstream
        if ctx.traced:
            scale = torch.ops.fused_kd.scale_gradient
            saved = zip(ctx.saved_tensors[:3], ctx.wanted, ctx.dtypes, strict=True)
            return (*(scale(g, factor, dtype) if wanted else None for g, wanted, dtype in saved), *none[3:])
        gradients, ctx.ready = ctx.ready, None
        if gradients is None:
            *args, token_weights, scale, scalars = ctx.saved_tensors
            weights = token_weights
            if ctx.per_token:
                weights = upstream if token_weights is None else upstream * token_weights
                factor = None
            gradients = torch.ops.fused_kd.kd(*args, weights, scale, scalars, *ctx.wanted, *ctx.options)[3:]
        backend = Options(*ctx.options).backend
        scaled = (
            _scale_in_place(gradient, factor, dtype, backend) if wanted else None
            for gradient, dtype, wanted in zip(gradients, ctx.dtypes, ctx.wanted, strict=True)
        )
        return (*scaled, *none[3:])


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
