"""Row implementation in plain PyTorch, for any device: blocks of rows that stay in cache, operations in place."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import DIVERGENCES, Divergence
from ..objectives import RowSpec, Scalars
from ..workspace import empty
from .base import EXCLUDED, LOG_ZERO, Logits, RowInputs, RowOutputs

# A block's buffers should stay in the last-level cache, yet each operation must outweigh its thread barrier.
CPU_BLOCK_BYTES = 2 << 20
CPU_BLOCK_ROWS = 8
DEVICE_BLOCK_BYTES = 256 << 20
# Keeps ratios of two underflowed probabilities defined; far below any probability that matters.
TINY = 1e-30


def row(inputs: RowInputs, outputs: RowOutputs) -> None:
    """Fill ``outputs`` for one chunk. Shapes and meaning: :mod:`fused_kd.rows.base`."""
    C, V = inputs.student.raw.shape
    on_host = _on_host(inputs.labels)
    block = max(CPU_BLOCK_ROWS, CPU_BLOCK_BYTES // (4 * V)) if on_host else max(1, DEVICE_BLOCK_BYTES // (4 * V))
    scratch = _Scratch(min(block, C), V, inputs.labels.device)
    # Host numbers where they cost nothing; reading them back from an accelerator would synchronise.
    scalars = Scalars(*(inputs.scalars.tolist() if on_host else inputs.scalars.unbind()))
    for start in range(0, C, block):
        rows = slice(start, min(start + block, C))
        _block(inputs, outputs, rows, scalars, scratch)


class _Scratch:
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


class _Lazy:
    """A (B, V) tensor whose operators write into reused buffers, so that table formulas allocate nothing."""

    def __init__(self, value: Tensor, scratch: _Scratch, owned: Tensor | None = None) -> None:
        self.value, self._scratch, self._owned = value, scratch, owned

    def __del__(self) -> None:
        if self._owned is not None:
            self._scratch.free.append(self._owned)

    def apply(self, operation, *others) -> _Lazy:
        buffer = self._scratch.take()
        operands = (x.value if isinstance(x, _Lazy) else x for x in others)
        return _Lazy(operation(self.value, *operands, out=buffer[: len(self.value)]), self._scratch, buffer)

    def __mul__(self, other) -> _Lazy:
        return self.apply(torch.mul, other)

    __rmul__ = __mul__

    def __truediv__(self, other) -> _Lazy:
        return self.apply(torch.div, other)

    def __add__(self, other) -> _Lazy:
        return self.apply(torch.add, other)

    __radd__ = __add__

    def __sub__(self, other) -> _Lazy:
        return self.apply(torch.sub, other)

    def __neg__(self) -> _Lazy:
        return self.apply(torch.neg)

    def __gt__(self, other) -> _Lazy:
        return self.apply(torch.gt, other)


class _Softmax(NamedTuple):
    prob: Tensor  # (B, V)
    lse: Tensor  # (B, 1)
    log_prob_y: Tensor  # (B, 1)


def _block(inputs: RowInputs, outputs: RowOutputs, rows: slice, s: Scalars, scratch: _Scratch) -> None:
    spec = inputs.spec
    labels = inputs.labels[rows]
    ignored = labels < 0
    y = labels.clamp(min=0).unsqueeze(1)
    dlogits = None if outputs.dlogits is None else outputs.dlogits[rows]
    # Rounded to the output's dtype once, at the end.
    work = scratch("dlogits", len(y)) if dlogits is not None and dlogits.dtype != torch.float32 else dlogits

    z, slope = _final_logits(inputs.student, rows, scratch, "z_s")
    cold = None
    if spec.divergence is None:
        q = _softmax(z, y, scratch("q", len(y)))
        loss = difficulty = -q.log_prob_y
        is_hard = torch.zeros_like(ignored)
        if work is not None:
            _add_at(work.copy_(q.prob), y, -1.0)
    else:
        if inputs.cold_labels:
            cold = _softmax(z, y, scratch("cold", len(y)))
        z = _cool(z, s.temperature, scratch("z_s", len(y)))
        assert isinstance(inputs.teacher, Logits)
        z_t, _ = _final_logits(inputs.teacher, rows, scratch, "z_t")
        z_t = _cool(z_t, s.temperature, scratch("z_t", len(y)))
        given = None if inputs.hard is None else inputs.hard[rows]
        loss, difficulty, is_hard = _against_teacher(inputs, z, z_t, y, cold, given, work, s, scratch)

    if work is not None and dlogits is not None:
        if slope is not None:
            work.mul_(slope)
        else:
            _scale(work, inputs.student.scale)
        if inputs.weights is not None:
            work.mul_(inputs.weights[rows].unsqueeze(1))
        if _maybe_any(ignored):
            work.masked_fill_(ignored.unsqueeze(1), 0.0)
        if work is not dlogits:
            dlogits.copy_(work)
    for target, value in ((outputs.loss, loss), (outputs.difficulty, difficulty)):
        value = value.squeeze(1)
        target[rows] = value.masked_fill(value > EXCLUDED, math.inf).masked_fill(ignored, 0.0)
    outputs.is_hard[rows] = is_hard & ~ignored


def _against_teacher(
    inputs: RowInputs,
    z: Tensor,
    z_t: Tensor,
    y: Tensor,
    cold: _Softmax | None,
    hard: Tensor | None,
    dlogits: Tensor | None,
    s: Scalars,
    scratch: _Scratch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and difficulty (B, 1), hardness (B,), and the gradient in the final logits, from logits at temperature T."""
    spec = inputs.spec
    divergence = DIVERGENCES[spec.divergence or "kl"]
    B = len(y)
    z, z_t = _aligned(z, z_t, y, scratch)
    p = _softmax(z_t, y, scratch("p", B))
    # The difference form cancels far less than two separate expectations.
    difference = torch.sub(z_t, z, out=scratch("difference", B))
    kl = (_Lazy(p.prob, scratch) * difference).value.sum(1, keepdim=True) - p.lse
    needs_difference = "d" in divergence.reads and not divergence.free
    q = _softmax(z, y, scratch("q" if needs_difference else "difference", B))
    kl = (kl + q.lse).clamp_(min=0.0)
    p_y = p.log_prob_y.exp()
    t_y = s.lam * p_y + (1.0 - s.lam)
    lam_log_lam = _xlogx(s.lam)
    difficulty = (
        s.lam * (kl - p_y * (p.log_prob_y - q.log_prob_y))
        + lam_log_lam * (1.0 - p_y)
        + (torch.xlogy(t_y, t_y) - t_y * q.log_prob_y)
    ).clamp_(min=0.0)
    if not spec.gated:
        hard = torch.zeros_like(y, dtype=torch.bool).squeeze(1)
    else:
        hard = (difficulty > s.gamma).squeeze(1) if hard is None else hard

    ce = -(cold or q).log_prob_y
    ce_weight = 1.0 - s.lam if spec.hard_label else 0.0
    share = 1.0 if spec.mixed else s.lam
    free_loss = difficulty if spec.mixed else share * kl + ce_weight * ce
    if divergence.free:
        use = None
    else:
        use = hard if spec.gated else torch.ones_like(hard)
        if divergence.kl_at_one:
            use = use & (torch.as_tensor(s.beta, device=use.device) < 1.0)
    loss = free_loss
    if dlogits is not None and (use is None or not _known_all(use)):
        _free_gradient(p.prob, q.prob, y, cold, s, spec, dlogits)
    if use is not None and _maybe_any(use):
        everything = _known_all(use) or not _on_host(y)
        index = None if everything else use.nonzero().squeeze(1)

        def pick(x: Tensor) -> Tensor:
            return x if index is None else x.index_select(0, index)

        q_i, p_i, y_i = pick(q.prob), pick(p.prob), pick(y)
        t = _Lazy(p_i, scratch).apply(_shifted, s.lam if spec.mixed else 1.0)
        if spec.mixed:
            _add_at(t.value, y_i, 1.0 - s.lam)
        d = None
        if needs_difference:
            d = _Lazy(pick(difference).sub_(pick(p.lse - q.lse)), scratch)
        in_place = dlogits if _known_all(use) else None
        beta = _head_share(t.value, q_i, s.fraction) if divergence.adaptive else s.beta
        value, gradient = _divergence(divergence, t, _Lazy(q_i, scratch), d, beta, dlogits is not None, in_place)
        value = share * value + ce_weight * pick(ce)
        if gradient is not None:
            _scale(gradient, share / s.temperature)
            if spec.hard_label:
                _add_scaled(gradient, pick(cold.prob) if cold else q_i, ce_weight, gradient)
                _add_at(gradient, y_i, -ce_weight)
        if index is not None:
            loss = loss.index_copy(0, index, value)
            if gradient is not None and dlogits is not None:
                dlogits.index_copy_(0, index, gradient)
        else:
            column = use.unsqueeze(1)
            loss = value if _known_all(use) else torch.where(column, value, loss)
            if gradient is not None and dlogits is not None and in_place is None:
                dlogits.copy_(torch.where(column, gradient, dlogits))
    return loss, difficulty, hard


def _divergence(
    divergence: Divergence,
    t: _Lazy,
    q: _Lazy,
    d: _Lazy | None,
    beta: float | Tensor,
    with_gradient: bool,
    out: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """``sum h`` (B, 1) and ``g - q * sum g`` (B, V), the latter in ``out`` where given."""
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
    if not with_gradient:
        return value, None
    g = divergence.g(t, q, d, r, log_r, s, log_s, beta)
    total = g.value.sum(1, keepdim=True)
    return value, torch.addcmul(g.value, q.value, total, value=-1.0, out=out)


def _head_share(t: Tensor, q: Tensor, mass: float | Tensor) -> Tensor:
    """(B, 1): the share of ``sum |t - q|`` in the head of ``t``, see :class:`fused_kd.divergences.Divergence`."""
    sorted_t = t.sort(1, descending=True).values
    inside = (sorted_t.cumsum(1, dtype=torch.float64) <= mass).sum(1, keepdim=True)
    # Entries as probable as the first that is left out stay out with it.
    left_out = sorted_t.gather(1, inside.clamp(max=t.shape[1] - 1))
    head = (t > left_out) | (t == sorted_t[:, :1]) | torch.as_tensor(mass >= 1.0, device=t.device)
    error = (t - q).abs_()
    total = error.sum(1, keepdim=True)
    return torch.where(total > 0, (error * head).sum(1, keepdim=True) / total.clamp(min=TINY), 0.5)


def _shifted(p: Tensor, lam: float | Tensor, out: Tensor) -> Tensor:
    """``TINY + lam * p``"""
    if isinstance(lam, Tensor):
        return torch.mul(p, lam, out=out).add_(TINY)
    return torch.add(torch.tensor(TINY), p, alpha=lam, out=out)


def _free_gradient(
    p: Tensor, q: Tensor, y: Tensor, cold: _Softmax | None, s: Scalars, spec: RowSpec, out: Tensor
) -> None:
    """``q - t`` (/T), the gradient of KL; with a hard-label term at the same temperature it is that of ``yt``."""
    if spec.mixed or (spec.hard_label and cold is None):
        _add_scaled(q, p, -s.lam, out)
        _add_at(out, y, s.lam - 1.0)
        _scale(out, 1.0 / s.temperature)
    else:
        torch.sub(q, p, out=out)
        _scale(out, s.lam / s.temperature)
        if cold is not None:
            _add_scaled(out, cold.prob, 1.0 - s.lam, out)
            _add_at(out, y, s.lam - 1.0)


def _final_logits(logits: Logits, rows: slice, scratch: _Scratch, name: str) -> tuple[Tensor, Tensor | None]:
    """Scaled and capped fp32 logits, and d final / d raw where that is more than the scale."""
    raw = logits.raw[rows]
    if logits.softcap is None and logits.scale == 1.0 and logits.finite and raw.dtype == torch.float32:
        return raw, None
    z = scratch(name, len(raw)).copy_(raw)
    if not logits.finite:
        z.clamp_(min=LOG_ZERO)
    if logits.softcap is None:
        return _scale(z, logits.scale), None
    tanh = z.mul_(logits.scale / logits.softcap).tanh_()
    slope = torch.mul(tanh, tanh, out=scratch(name + "_slope", len(raw))).neg_().add_(1.0).mul_(logits.scale)
    return tanh.mul_(logits.softcap), slope


def _cool(z: Tensor, temperature: float | Tensor, out: Tensor) -> Tensor:
    return z if isinstance(temperature, float) and temperature == 1.0 else torch.div(z, temperature, out=out)


def _aligned(z: Tensor, z_t: Tensor, y: Tensor, scratch: _Scratch) -> tuple[Tensor, Tensor]:
    """Both rows with maximum 0 where they are far apart: a large common offset would swallow their difference."""
    if _on_host(z) and bool(((z_t.gather(1, y) - z.gather(1, y)).abs() < 64.0).all()):
        return z, z_t
    shifted = torch.sub(z, z.amax(1, keepdim=True), out=scratch("z_s", len(z)))
    return shifted, torch.sub(z_t, z_t.amax(1, keepdim=True), out=scratch("z_t", len(z)))


def _softmax(z: Tensor, y: Tensor, out: Tensor) -> _Softmax:
    torch.softmax(z, 1, out=out)
    # On CPUs it adds up a long row naively: its norm is off by 1e-5 at V = 128256, sum()'s by 1e-7.
    out.mul_(out.sum(1, keepdim=True).reciprocal_())
    # A probability that has not underflowed gives lse without another sweep of exponentials: the label's where that
    # can be seen for free, else the largest.
    z_y, q_y = z.gather(1, y), out.gather(1, y)
    if _on_host(z) and bool((q_y > TINY).all()):
        log_q_y = q_y.log_()
        return _Softmax(out, z_y - log_q_y, log_q_y)
    top, log_top = z.amax(1, keepdim=True), out.amax(1, keepdim=True).log()
    return _Softmax(out, top - log_top, (z_y - top) + log_top)


def _xlogx(x: float | Tensor) -> float | Tensor:
    return torch.xlogy(x, x) if isinstance(x, Tensor) else (x * math.log(x) if x > 0.0 else 0.0)


def _scale(x: Tensor, factor: float | Tensor) -> Tensor:
    return x if isinstance(factor, float) and factor == 1.0 else x.mul_(factor)


def _add_scaled(a: Tensor, b: Tensor, factor: float | Tensor, out: Tensor) -> None:
    """``out = a + factor * b``"""
    if isinstance(factor, Tensor):
        torch.addcmul(a, b, factor, out=out)
    else:
        torch.add(a, b, alpha=factor, out=out)


def _add_at(x: Tensor, y: Tensor, value: float | Tensor) -> Tensor:
    """Add ``value`` to each row's label column."""
    if not isinstance(value, Tensor):  # a copy to the device would wait for it
        value = torch.full((), value, dtype=x.dtype, device=x.device)
    source = value.to(x.dtype).expand_as(y)
    return x.scatter_add_(1, y, source)


def _on_host(x: Tensor) -> bool:
    """Whether looking at values is free; elsewhere it would wait for the device."""
    return x.device.type == "cpu"


def _maybe_any(mask: Tensor) -> bool:
    """Exact on the host, else True."""
    return not _on_host(mask) or bool(mask.any())


def _known_all(mask: Tensor) -> bool:
    return _on_host(mask) and bool(mask.all())
