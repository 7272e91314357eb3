"""Pieces of a row in plain PyTorch: scratch, and formulas over the columns of a block that is at hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor

from ...divergences import EXCLUDED, LOG_ZERO, TINY, Divergence
from ...terms import Number, Scalars
from ...workspace import empty
from ..contract import Logits, RowInputs, RowOutputs, Sparse

# A block's buffers should stay in the last-level cache, yet each operation must outweigh its thread barrier.
CPU_BLOCK_BYTES = 2 << 20
CPU_BLOCK_ROWS = 8
DEVICE_BLOCK_BYTES = 256 << 20


def rows_of_block(V: int, device: torch.device) -> int:
    """How many rows of V columns to work on at a time."""
    V = max(V, 1)
    if device.type == "cpu":
        return max(CPU_BLOCK_ROWS, CPU_BLOCK_BYTES // (4 * V))
    return max(1, DEVICE_BLOCK_BYTES // (4 * V))


def blocks(inputs: RowInputs, outputs: RowOutputs, B: int) -> Iterator[tuple[RowInputs, RowOutputs]]:
    """A chunk without statistics, B rows at a time."""
    for start in range(0, len(inputs.labels), B):
        rows = slice(start, start + B)
        teacher, beyond = inputs.teacher, inputs.beyond
        if isinstance(teacher, Logits):
            teacher = teacher._replace(raw=teacher.raw[rows])
        elif isinstance(teacher, Sparse):
            indices, log_probs, rest, tail = teacher
            teacher = Sparse(indices[rows], log_probs[rows], rest[rows], tail)
        own = inputs._replace(
            student=inputs.student._replace(raw=inputs.student.raw[rows]),
            teacher=teacher,
            labels=inputs.labels[rows],
            weights=None if inputs.weights is None else inputs.weights[rows],
            hard=None if inputs.hard is None else inputs.hard[rows],
            scalars=inputs.scalars if len(inputs.scalars) == 1 else inputs.scalars[rows],
            beyond=None if beyond is None else beyond._replace(rest=beyond.rest[rows]),
        )
        dlogits = None if outputs.dlogits is None else outputs.dlogits[rows]
        yield own, RowOutputs(outputs.loss[rows], outputs.difficulty[rows], outputs.is_hard[rows], dlogits)


def scalars_of(inputs: RowInputs, rows: slice | Tensor = slice(None)) -> list[Scalars]:
    """Of each term: host numbers where they cost nothing (reading them back from an accelerator would synchronise), 0-d
    tensors, or (B, 1) where each token has its own."""
    if len(inputs.scalars) > 1:
        return [Scalars(*own.split(1, 1)) for own in inputs.scalars[rows].unbind(1)]
    on_cpu = on_host(inputs.labels)
    return [Scalars(*(own.tolist() if on_cpu else own.unbind())) for own in inputs.scalars[0]]


class Scratch:
    """(B, V) fp32 buffers shared by all blocks: fresh memory of this size costs more in page faults than a pass."""

    def __init__(self, B: int, V: int, device: torch.device) -> None:
        self._shape, self._device = (B, V), device
        self._named: dict[str, Tensor] = {}
        self.free: list[Tensor] = []

    def _new(self) -> Tensor:
        return empty(self._shape, torch.float32, self._device)

    def __call__(self, name: str, rows: int) -> Tensor:
        if name not in self._named:
            self._named[name] = self._new()
        return self._named[name][:rows]

    def take(self) -> Tensor:
        return self.free.pop() if self.free else self._new()


Operand = Union["Lazy", Tensor, float]


class Lazy:
    """A (B, V) tensor whose operators write into reused buffers, so that table formulas allocate nothing."""

    def __init__(self, value: Tensor, scratch: Scratch, owned: Tensor | None = None) -> None:
        self.value, self._scratch, self._owned = value, scratch, owned

    def __del__(self) -> None:
        if self._owned is not None:
            self._scratch.free.append(self._owned)

    def apply(self, operation: Callable[..., Tensor], *others: Operand) -> Lazy:
        buffer = self._scratch.take()
        operands = (x.value if isinstance(x, Lazy) else x for x in others)
        return Lazy(
            operation(self.value, *operands, out=buffer[: len(self.value), : self.value.shape[1]]),
            self._scratch,
            buffer,
        )

    def __mul__(self, other: Operand) -> Lazy:
        return self.apply(torch.mul, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Operand) -> Lazy:
        return self.apply(torch.div, other)

    def __add__(self, other: Operand) -> Lazy:
        return self.apply(torch.add, other)

    __radd__ = __add__

    def __sub__(self, other: Operand) -> Lazy:
        return self.apply(torch.sub, other)

    def __rsub__(self, other: Operand) -> Lazy:
        return -self + other

    def __neg__(self) -> Lazy:
        return self.apply(torch.neg)

    def __gt__(self, other: Operand) -> Lazy:
        return self.apply(torch.gt, other)


class Softmax(NamedTuple):
    z: Tensor  # (B, V) logits at its temperature
    prob: Tensor  # (B, V)
    lse: Tensor  # (B, 1)
    log_prob_y: Tensor  # (B, 1)
    offset: Tensor | float = 0.0  # (B, 1) what the logits, and with them lse, lack

    @property
    def log_sum_exp(self) -> Tensor:
        return self.lse + self.offset


class Over(NamedTuple):
    """(B, 1) bool: whether the student is above 0 where the teacher excludes a token, and the other way round."""

    student: Tensor
    teacher: Tensor


def excluded(z: Tensor, finite: bool) -> Tensor | None:
    """(B, V) bool: which final logits before the temperature are -inf; None where none are, if that can be seen."""
    if finite or not maybe_any(z.amin(1) < EXCLUDED):
        return None
    return (z < EXCLUDED) & (z.amax(1, keepdim=True) >= EXCLUDED)  # a row of nothing else is uniform


def above(p: Tensor, out: Tensor | None) -> Tensor:
    """(B, 1) bool: whether ``p`` is above 0 in one of the entries that ``out`` marks."""
    if out is None:
        return torch.zeros(len(p), 1, dtype=torch.bool, device=p.device)
    return (out & (p >= torch.finfo(torch.float32).tiny)).any(1, keepdim=True)


def raised_(value: Tensor, where: Tensor) -> Tensor:
    """In place: infinite there, and NaN where it was NaN."""
    return value.masked_fill_(where & (value == value), math.inf)


def top_and_sum(z: Tensor, work: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1) each: maxima, and sums of exponentials over them."""
    top = z.amax(1, keepdim=True)
    return top, torch.sub(z, top, out=work).exp_().sum(1, keepdim=True)


def settled(value: Tensor, ignored: Tensor) -> Tensor:
    """(B,) fp32 from (B, 1): 0 for ignored rows."""
    return value.squeeze(1).float().masked_fill(ignored, 0.0)


def target(
    divergence: Divergence,
    p: Tensor,
    y: Tensor,
    s: Scalars,
    mixed: bool,
    scratch: Scratch,
    own: float | Tensor = 1.0,
) -> Lazy:
    """``yt`` or ``p``, with :data:`fused_kd.divergences.TINY` added for ratios.

    ``own`` (B, 1) is 0 where the label is none of these columns.
    """
    t = Lazy(p, scratch)
    if mixed or divergence.mixture:
        t = t.apply(_shifted, s.lam if mixed else 1.0, TINY if divergence.mixture else 0.0)
    if mixed:
        add_at(t.value, y, s.rest * own)
    return t


def _shifted(p: Tensor, lam: float | Tensor, by: float, out: Tensor) -> Tensor:
    if isinstance(lam, Tensor):
        return torch.mul(p, lam, out=out).add_(by)
    return torch.add(torch.tensor(by, dtype=torch.float32), p, alpha=lam, out=out)


def _between(t: Tensor, q: Tensor, beta: float | Tensor, alpha: float | Tensor, out: Tensor) -> Tensor:
    """``beta * q + alpha * t``, from the side with the larger share: the other's keeps its digits, and between equals
    lies their own value."""
    if isinstance(beta, Tensor):
        return torch.where(beta < 0.5, t.lerp(q, beta), q.lerp(t, alpha), out=out)
    return torch.lerp(t, q, beta, out=out) if beta < 0.5 else torch.lerp(q, t, alpha, out=out)


def table_arguments(
    divergence: Divergence,
    t: Lazy,
    q: Lazy,
    d: Lazy | None,
    beta: float | Tensor,
    alpha: float | Tensor,
    logs: tuple[Lazy, Lazy] | None = None,
) -> tuple[Any, ...]:
    """What the table's ``h`` and ``g`` take, as far as this divergence reads it; ``logs`` are log t and log q."""
    r = log_r = s = log_s = w = u = v = None
    if divergence.mixture:
        raised = q + TINY
        m = t.apply(_between, raised, beta, alpha)
        if "r" in divergence.reads:
            r = t / m
            log_r = r.apply(torch.log)
        if "s" in divergence.reads:
            s = raised / m
            log_s = s.apply(torch.log)
    if logs is not None:
        log_t, log_q = logs
        w = (log_t * alpha + log_q * beta).apply(torch.exp)
        if divergence.reads >= {"u", "v"}:
            u, v = ((x * (alpha + beta)).apply(torch.exp) for x in logs)
    return t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v


class Factors(NamedTuple):
    """Of the gradient's linear part: of q, p, the label and the student's softmax at temperature 1."""

    q: float | Tensor
    p: float | Tensor
    y: float | Tensor
    cold: float | Tensor


def write_softmaxes(out: Tensor, q: Tensor, p: Tensor | None, of: Factors) -> None:
    """``of.q * q - of.p * p``"""
    if p is None or is_nothing(of.p):
        torch.mul(q, of.q, out=out)
    elif isinstance(of.q, float) and isinstance(of.p, float) and of.q > 0.0:
        # nearly equal, they cancel: rounded once
        add_scaled(q, p, -of.p / of.q, out)
        scale(out, of.q)
    else:
        torch.mul(q, of.q, out=out)
        add_scaled(out, p, -of.p, out)


def add_label(out: Tensor, cold: Tensor | None, y: Tensor, of: Factors, own: float | Tensor = 1.0) -> None:
    """``of.cold * cold - of.y * y``, where ``own`` (B, 1) is 0 if the label is none of these columns."""
    if cold is not None and not is_nothing(of.cold):
        add_scaled(out, cold, of.cold, out)
    if not is_nothing(of.y):
        add_at(out, y, -of.y * own)


def head_share(t: Tensor, q: Tensor, mass: float | Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1): the shares of ``sum |t - q|`` in the head of ``t``, see :class:`fused_kd.divergences.Divergence`, and in
    the rest."""
    sorted_t = t.sort(1, descending=True).values
    inside = (sorted_t.cumsum(1, dtype=torch.float64) <= mass).sum(1, keepdim=True)
    # Entries as probable as the first that is left out stay out with it.
    left_out = sorted_t.gather(1, inside.clamp(max=t.shape[1] - 1))
    head = (t > left_out) | (t == sorted_t[:, :1]) | (mass >= 1.0)
    error = (t - q).abs_()
    parts = torch.cat([(error * of).sum(1, keepdim=True) for of in (head, ~head)], 1)
    return shares_of(parts)


def shares_of(parts: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1) each: those of the two columns in their sum; a half where that is 0."""
    total = parts.sum(1, keepdim=True)
    head, tail = (parts / total).masked_fill(total == 0.0, 0.5).split(1, 1)
    return head, tail


def infinite(divergence: Divergence, over: Over, fraction: float | Tensor, head: float | Tensor) -> Tensor | None:
    """Whether a divergence's sum, over what both sides have, lacks an infinite part; (B, 1), None where never."""
    if divergence.adaptive:
        return (over.teacher & (head > 0.0)) | (over.student & (fraction < 1.0))
    if divergence.everywhere:
        return over.student | over.teacher if divergence.covers else over.student
    return None


def final_logits(logits: Logits, rows: slice | Tensor, scratch: Scratch, name: str) -> tuple[Tensor, Tensor | None]:
    """Scaled and capped fp32 logits, and d final / d raw where that is more than the scale."""
    raw = logits.raw[rows]
    if logits.softcap is None and logits.scale == 1.0 and logits.finite and raw.dtype == torch.float32:
        return raw, None
    z = scratch(name, len(raw)).copy_(raw)
    return z, finish_logits_(z, logits, scratch, name + "_slope")


def finish_logits_(z: Tensor, logits: Logits, scratch: Scratch | None = None, slope_name: str = "") -> Tensor | None:
    """From raw fp32 logits to final ones, in place; d final / d raw where that is more than the scale, and there is
    scratch for it."""
    if logits.softcap is None:
        scale(z, logits.scale)
        if not logits.finite:
            z.clamp_(min=LOG_ZERO)
        return None
    tanh = z.mul_(logits.scale / logits.softcap).tanh_()
    slope = None
    if scratch is not None:
        slope = torch.mul(tanh, tanh, out=scratch(slope_name, len(z))).neg_().add_(1.0).mul_(logits.scale)
    tanh.mul_(logits.softcap)
    return slope


def to_raw_(gradient: Tensor, logits: Logits, slope: Tensor | None) -> None:
    """From the gradient in final logits to that in the raw ones, in place; ``slope`` of :func:`final_logits`."""
    if slope is not None:
        gradient.mul_(slope)
    else:
        scale(gradient, logits.scale)


def uniform_logits(teacher: Sparse, rows: slice | Tensor, start: int, out: Tensor) -> Tensor:
    """(B, V) final logits of lists with a uniform tail, in ``out``, from vocabulary id ``start`` on."""
    indices, values = teacher.indices[rows] - start, teacher.log_probs[rows]
    each = teacher.rest[rows].unsqueeze(1)
    present = (indices >= 0) & (indices < out.shape[1])
    # Where there is no entry, the first that is there is written again; if none is, what all tokens have.
    first = present.to(torch.int8).argmax(1, keepdim=True)
    some = present.gather(1, first)
    index = torch.where(present, indices, torch.where(some, indices.gather(1, first), 0))
    values = torch.where(present, values, torch.where(some, values.gather(1, first), each))
    return out.copy_(each.clamp(min=LOG_ZERO).expand_as(out)).scatter_(1, index, values.clamp(min=LOG_ZERO))


def cool(z: Tensor, temperature: float | Tensor, out: Tensor) -> Tensor:
    return z if isinstance(temperature, float) and temperature == 1.0 else torch.div(z, temperature, out=out)


def scale(x: Tensor, factor: float | Tensor) -> Tensor:
    return x if isinstance(factor, float) and factor == 1.0 else x.mul_(factor)


def add_scaled(a: Tensor, b: Tensor, factor: float | Tensor, out: Tensor) -> None:
    """``out = a + factor * b``"""
    if isinstance(factor, Tensor):
        torch.addcmul(a, b, factor, out=out)
    else:
        torch.add(a, b, alpha=factor, out=out)


def picked(x: Any, index: slice | Tensor | None) -> Any:
    """The rows at ``index`` of a number of each token, (C, 1)."""
    return x[index] if index is not None and isinstance(x, Tensor) and x.dim() == 2 else x


def spread(x: Number, index: Tensor | None, count: int) -> Number:
    """Back to where they are from, 0 elsewhere."""
    if index is None or not isinstance(x, Tensor) or x.dim() != 2:
        return x
    return x.new_zeros(count, 1).index_copy_(0, index, x)


def add_at(x: Tensor, y: Tensor, value: float | Tensor) -> Tensor:
    """Add ``value`` to each row's label column."""
    if not isinstance(value, Tensor):  # a copy to the device would wait for it
        value = torch.full((), value, dtype=x.dtype, device=x.device)
    source = value.to(x.dtype).expand_as(y)
    return x.scatter_add_(1, y, source)


def is_nothing(x: float | Tensor, nothing: float = 0.0) -> bool:
    """Whether a factor is a host number that changes nothing."""
    return isinstance(x, float) and x == nothing


def on_host(x: Tensor) -> bool:
    """Whether looking at values is free; elsewhere it would wait for the device."""
    return x.device.type == "cpu"


def maybe_any(mask: Tensor) -> bool:
    """Exact on the host, else True."""
    return not on_host(mask) or bool(mask.any())


def known_all(mask: Tensor) -> bool:
    return on_host(mask) and bool(mask.all())
