"""Pieces of a row in plain PyTorch: scratch, and formulas over the columns of a block that is at hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Union

import torch
from torch import Tensor

from ..divergences import Divergence
from ..objectives import RowSpec, Scalars
from ..workspace import empty
from .base import EXCLUDED, LOG_ZERO, Logits, RowInputs

# Keeps ratios of two underflowed probabilities defined; far below any probability that matters.
TINY = 1e-30

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


def scalars_of(inputs: RowInputs) -> Scalars:
    """Host numbers where they cost nothing; reading them back from an accelerator would synchronise."""
    return Scalars(*(inputs.scalars.tolist() if on_host(inputs.labels) else inputs.scalars.unbind()))


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


def top_and_sum(z: Tensor, work: Tensor) -> Tensor:
    """(B, 2): maxima, and sums of exponentials over them."""
    top = z.amax(1, keepdim=True)
    return torch.cat([top, torch.sub(z, top, out=work).exp_().sum(1, keepdim=True)], 1)


def label_target(log_p_y: Tensor, lam: float | Tensor) -> Tensor:
    """What ``yt`` gives the label."""
    return lam * log_p_y.exp() + (1.0 - lam)


def difficulty_of(kl: Tensor, log_p_y: Tensor, log_q_y: Tensor, lam: float | Tensor) -> Tensor:
    """``KL(yt||q)`` from ``KL(p||q)`` and the label's two log-probabilities, all of one shape."""
    p_y, t_y = log_p_y.exp(), label_target(log_p_y, lam)
    rest = lam * (kl - p_y * (log_p_y - log_q_y)) + xlogx(lam) * (1.0 - p_y)
    return (rest + (torch.xlogy(t_y, t_y) - t_y * log_q_y)).clamp_(min=0.0)


def loss_of(divergence: Tensor, ce: Tensor, lam: float | Tensor, spec: RowSpec) -> Tensor:
    """The loss from the divergence of the objective's target, ``yt`` or ``p``, and the label's cross-entropy."""
    if spec.mixed:
        return divergence
    return lam * divergence + (1.0 - lam) * ce if spec.hard_label else lam * divergence


def uses_divergence(divergence: Divergence, spec: RowSpec, hard: Tensor, beta: float | Tensor) -> Tensor | None:
    """Which rows take the divergence's own sweeps, (B,); None where KL serves all of them."""
    if divergence.free:
        return None
    use = hard if spec.gated else torch.ones_like(hard)
    if divergence.kl_at_one:
        use = use & (torch.as_tensor(beta, device=use.device) < 1.0)
    return use


def settled(value: Tensor, ignored: Tensor) -> Tensor:
    """(B,) fp32 from (B, 1): infinite beyond :data:`EXCLUDED`, 0 for ignored rows."""
    value = value.squeeze(1).float()
    return value.masked_fill(value > EXCLUDED, math.inf).masked_fill(ignored, 0.0)


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


def table_arguments(divergence: Divergence, t: Lazy, q: Lazy, d: Lazy | None, beta: float | Tensor) -> tuple[Any, ...]:
    """What the table's ``h`` and ``g`` take, as far as this divergence reads it."""
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
    return t, q, d, r, log_r, s, log_s, beta


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
