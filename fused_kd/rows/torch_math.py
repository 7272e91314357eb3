"""Pieces of a row in plain PyTorch: scratch, and formulas over the columns of a block that is at hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Union

import torch
from torch import Tensor

from ..divergences import Divergence
from ..objectives import RowSpec, Scalars
from ..workspace import empty
from .base import LOG_ZERO, Logits

# Keeps ratios of two underflowed probabilities defined; far below any probability that matters.
TINY = 1e-30


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

    def __neg__(self) -> Lazy:
        return self.apply(torch.neg)

    def __gt__(self, other: Operand) -> Lazy:
        return self.apply(torch.gt, other)


def difficulty_of(kl: Tensor, log_p_y: Tensor, log_q_y: Tensor, lam: float | Tensor) -> Tensor:
    """``KL(yt||q)`` from ``KL(p||q)`` and the label's two log-probabilities, all of one shape."""
    p_y = log_p_y.exp()
    t_y = lam * p_y + (1.0 - lam)
    rest = lam * (kl - p_y * (log_p_y - log_q_y)) + xlogx(lam) * (1.0 - p_y)
    return (rest + (torch.xlogy(t_y, t_y) - t_y * log_q_y)).clamp_(min=0.0)


def free_loss(difficulty: Tensor, kl: Tensor, ce: Tensor, lam: float | Tensor, spec: RowSpec) -> Tensor:
    """The loss of a row whose divergence is KL, from one sweep's statistics."""
    if spec.mixed:
        return difficulty
    return lam * kl + (1.0 - lam) * ce if spec.hard_label else lam * kl


def target(p: Tensor, y: Tensor, lam: float | Tensor, mixed: bool, scratch: Scratch, own: float | Tensor = 1.0) -> Lazy:
    """``yt`` or ``p``, with :data:`TINY` added. ``own`` (B, 1) is 0 where the label is none of these columns."""
    t = Lazy(p, scratch).apply(_shifted, lam if mixed else 1.0)
    if mixed:
        add_at(t.value, y, (1.0 - lam) * own)
    return t


def _shifted(p: Tensor, lam: float | Tensor, out: Tensor) -> Tensor:
    if isinstance(lam, Tensor):
        return torch.mul(p, lam, out=out).add_(TINY)
    return torch.add(torch.tensor(TINY), p, alpha=lam, out=out)


def divergence_terms(
    divergence: Divergence, t: Lazy, q: Lazy, d: Lazy | None, beta: float | Tensor, with_gradient: bool
) -> tuple[Tensor, Lazy | None]:
    """``sum h`` (B, 1) over these columns, and ``g`` (B, V)."""
    r = log_r = s = log_s = None
    if divergence.mixture:
        raised = q + TINY if "s" in divergence.reads else q
        m = t.apply(torch.lerp, raised, beta)
        if "r" in divergence.reads:
            r = t / m
            log_r = r.apply(torch.log)
        if "s" in divergence.reads:
            s = raised / m
            log_s = s.apply(torch.log)
    value = divergence.h(t, q, d, r, log_r, s, log_s, beta).value.sum(1, keepdim=True)
    return value, divergence.g(t, q, d, r, log_r, s, log_s, beta) if with_gradient else None


def close_gradient(
    gradient: Tensor, ce_prob: Tensor, y: Tensor, s: Scalars, spec: RowSpec, own: float | Tensor = 1.0
) -> None:
    """From ``g - q * sum g`` to the loss's gradient in the final logits: its share, 1 / T and the hard label's term."""
    scale(gradient, (1.0 if spec.mixed else s.lam) / s.temperature)
    if spec.hard_label:
        add_scaled(gradient, ce_prob, 1.0 - s.lam, gradient)
        add_at(gradient, y, (s.lam - 1.0) * own)


def head_share(t: Tensor, q: Tensor, mass: float | Tensor) -> Tensor:
    """(B, 1): the share of ``sum |t - q|`` in the head of ``t``, see :class:`fused_kd.divergences.Divergence`."""
    sorted_t = t.sort(1, descending=True).values
    inside = (sorted_t.cumsum(1, dtype=torch.float64) <= mass).sum(1, keepdim=True)
    # Entries as probable as the first that is left out stay out with it.
    left_out = sorted_t.gather(1, inside.clamp(max=t.shape[1] - 1))
    head = (t > left_out) | (t == sorted_t[:, :1]) | torch.as_tensor(mass >= 1.0, device=t.device)
    error = (t - q).abs_()
    total = error.sum(1, keepdim=True)
    return torch.where(total > 0, (error * head).sum(1, keepdim=True) / total.clamp(min=TINY), 0.5)


def free_gradient(
    p: Tensor,
    q: Tensor,
    y: Tensor,
    cold: Tensor | None,
    s: Scalars,
    spec: RowSpec,
    out: Tensor,
    own: float | Tensor = 1.0,
) -> None:
    """``q - t`` (/T), the gradient of KL; with a hard-label term at the same temperature it is that of ``yt``.

    ``cold`` (B, V) are the student's probabilities at temperature 1 where the label's term is taken there.
    """
    if spec.mixed or (spec.hard_label and cold is None):
        add_scaled(q, p, -s.lam, out)
        add_at(out, y, (s.lam - 1.0) * own)
        scale(out, 1.0 / s.temperature)
    else:
        torch.sub(q, p, out=out)
        scale(out, s.lam / s.temperature)
        if cold is not None:
            add_scaled(out, cold, 1.0 - s.lam, out)
            add_at(out, y, (s.lam - 1.0) * own)


def final_logits(logits: Logits, rows: slice | Tensor, scratch: Scratch, name: str) -> tuple[Tensor, Tensor | None]:
    """Scaled and capped fp32 logits, and d final / d raw where that is more than the scale."""
    raw = logits.raw[rows]
    if logits.softcap is None and logits.scale == 1.0 and logits.finite and raw.dtype == torch.float32:
        return raw, None
    z = scratch(name, len(raw)).copy_(raw)
    if not logits.finite:
        z.clamp_(min=LOG_ZERO)
    if logits.softcap is None:
        return scale(z, logits.scale), None
    tanh = z.mul_(logits.scale / logits.softcap).tanh_()
    slope = torch.mul(tanh, tanh, out=scratch(name + "_slope", len(raw))).neg_().add_(1.0).mul_(logits.scale)
    return tanh.mul_(logits.softcap), slope


def cool(z: Tensor, temperature: float | Tensor, out: Tensor) -> Tensor:
    return z if isinstance(temperature, float) and temperature == 1.0 else torch.div(z, temperature, out=out)


def xlogx(x: float | Tensor) -> float | Tensor:
    return torch.xlogy(x, x) if isinstance(x, Tensor) else (x * math.log(x) if x > 0.0 else 0.0)


def scale(x: Tensor, factor: float | Tensor) -> Tensor:
    return x if isinstance(factor, float) and factor == 1.0 else x.mul_(factor)


def add_scaled(a: Tensor, b: Tensor, factor: float | Tensor, out: Tensor) -> None:
    """``out = a + factor * b``"""
    if isinstance(factor, Tensor):
        torch.addcmul(a, b, factor, out=out)
    else:
        torch.add(a, b, alpha=factor, out=out)


def add_at(x: Tensor, y: Tensor, value: float | Tensor) -> Tensor:
    """Add ``value`` to each row's label column."""
    if not isinstance(value, Tensor):  # a copy to the device would wait for it
        value = torch.full((), value, dtype=x.dtype, device=x.device)
    source = value.to(x.dtype).expand_as(y)
    return x.scatter_add_(1, y, source)


def on_host(x: Tensor) -> bool:
    """Whether looking at values is free; elsewhere it would wait for the device."""
    return x.device.type == "cpu"


def maybe_any(mask: Tensor) -> bool:
    """Exact on the host, else True."""
    return not on_host(mask) or bool(mask.any())


def known_all(mask: Tensor) -> bool:
    return on_host(mask) and bool(mask.all())
