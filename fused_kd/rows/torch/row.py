"""Row implementation in plain PyTorch, for any device: blocks of rows that stay in cache, operations in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...divergences import LEFT_OUT, TINY
from ...terms import ENTROPY, Number, RowSpec, Scalars
from ..contract import Logits, RowInputs, RowOutputs, Sparse
from ..shares import Shares, Tabled, Token, after_sums, loss_shares
from .math import (
    Factors,
    Lazy,
    Over,
    Scratch,
    Softmax,
    above,
    add_label,
    add_scaled,
    cool,
    excluded,
    final_logits,
    head_share,
    infinite,
    is_nothing,
    known_all,
    maybe_any,
    on_host,
    picked,
    raised_,
    rows_of_block,
    scalars_of,
    scale,
    settled,
    spread,
    table_arguments,
    target,
    to_raw_,
    uniform_logits,
    write_softmaxes,
)
from .statistics import entropy, statistics


def row(inputs: RowInputs, outputs: RowOutputs) -> None:
    """Fill ``outputs`` for one chunk, as :mod:`fused_kd.rows.contract` says; the teacher may be a uniform tail."""
    C, V = inputs.student.raw.shape
    block = rows_of_block(V, inputs.labels.device)
    scratch = Scratch(min(block, C), V, inputs.labels.device)
    for start in range(0, C, block):
        _block(inputs, outputs, slice(start, min(start + block, C)), scratch)


def _block(inputs: RowInputs, outputs: RowOutputs, rows: slice, scratch: Scratch) -> None:
    """Fill some rows of ``outputs``."""
    labels, spec, scalars = inputs.labels[rows], inputs.spec, scalars_of(inputs, rows)
    ignored = labels < 0
    y = labels.clamp(min=0).unsqueeze(1)
    dlogits = None if outputs.dlogits is None else outputs.dlogits[rows]
    # Rounded to the output's dtype once, at the end.
    work = scratch("dlogits", len(y)) if dlogits is not None and dlogits.dtype != torch.float32 else dlogits

    z, slope = final_logits(inputs.student, rows, scratch, "z_s")
    out = excluded(z, inputs.student.finite)
    given = None if inputs.hard is None else inputs.hard[rows]
    sides: _Sides | None = None
    cold: Softmax | None
    if not spec.needs_teacher:
        q = cold = _softmax(z, y, scratch("q", len(y)))
        ce = _cross_entropy(q, out, y)
        token = Token(ce, ce, q.log_prob_y, ce, ce, q.log_sum_exp)
    else:
        T = scalars[0].temperature
        cold = _softmax(z, y, scratch("cold", len(y))) if inputs.cold_labels else None
        z = cool(z, T, scratch("z_s", len(y)))
        z_t, out_t = _teacher(inputs.teacher, rows, T, scratch)
        sides = _compared(z, z_t, y, (out, out_t), scratch, keep_difference=_reads_difference(spec))
        q = sides.q
        token = _token(spec, sides, cold, y, scratch)
    shares = loss_shares(spec, scalars, token, given)
    if outputs.statistics is not None:
        p = None if sides is None else sides.p
        found = statistics(outputs.statistics.shape[1], q, p, token, scalars[spec.main], scratch)
        outputs.statistics[rows] = found.masked_fill_(ignored.unsqueeze(1), 0.0)

    chosen = total = None
    use = shares.use
    if sides is not None and use is not None:
        chosen = _Chosen(use)
        total = _add_sums(spec, shares, sides, chosen, token, y, work is not None, scalars, scratch)
    if work is not None and dlogits is not None:
        inverse = 1.0 if sides is None else 1.0 / scalars[0].temperature
        factors = shares.factors(token, inverse, cold=cold is not None and cold is not q)
        _write_gradient(work, factors, q, sides, cold, y, inverse, (chosen, total))
        to_raw_(work, inputs.student, slope)
        if inputs.weights is not None:
            work.mul_(inputs.weights[rows].unsqueeze(1))
        if maybe_any(ignored):
            work.masked_fill_(ignored.unsqueeze(1), 0.0)
        if work is not dlogits:
            dlogits.copy_(work)
    for result, value in ((outputs.loss, shares.loss), (outputs.difficulty, shares.difficulty)):
        result[rows] = settled(value, ignored)
    outputs.is_hard[rows] = shares.hard & ~ignored


def _teacher(
    teacher: Logits | Sparse | None, rows: slice, temperature: float | Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor | None]:
    """(B, V) logits at temperature T, and which of them are excluded."""
    assert teacher is not None
    B = rows.stop - rows.start
    if isinstance(teacher, Sparse):
        z = uniform_logits(teacher, rows, 0, scratch("z_t", B))
        out = excluded(z, False)
    else:
        z, _ = final_logits(teacher, rows, scratch, "z_t")
        out = excluded(z, teacher.finite)
    return cool(z, temperature, scratch("z_t", B)), out


class _Sides(NamedTuple):
    """Student and teacher at temperature T."""

    q: Softmax
    p: Softmax
    difference: Tensor  # (B, V) teacher's less student's logits, 0 where either side excludes the token; if it is kept
    outs: tuple[Tensor | None, Tensor | None]  # (B, V) which tokens student and teacher exclude
    over: Over
    kl: Tensor  # (B, 1) KL(p||q)


def _compared(
    z: Tensor,
    z_t: Tensor,
    y: Tensor,
    outs: tuple[Tensor | None, Tensor | None],
    scratch: Scratch,
    *,
    keep_difference: bool,
) -> _Sides:
    B = len(y)
    z, z_t, top, top_t = _aligned(z, z_t, scratch)
    p = _softmax(z_t, y, scratch("p", B))._replace(offset=top_t)
    # The difference form cancels far less than two separate expectations.
    difference = torch.sub(z_t, z, out=scratch("difference", B))
    for out in outs:
        if out is not None:
            difference.masked_fill_(out, 0.0)
    kl = (Lazy(p.prob, scratch) * difference).value.sum(1, keepdim=True) - p.lse
    q = _softmax(z, y, scratch("q" if keep_difference else "difference", B))._replace(offset=top)
    over = Over(above(q.prob, outs[1]), above(p.prob, outs[0]))
    return _Sides(q, p, difference, outs, over, raised_((kl + q.lse).clamp_(min=0.0), over.teacher))


def _token(spec: RowSpec, sides: _Sides, cold: Softmax | None, y: Tensor, scratch: Scratch) -> Token:
    out = sides.outs[0]
    warm = ce = _cross_entropy(sides.q, out, y)
    if cold is not None:
        ce = _cross_entropy(cold, out, y)
    entropy_t = entropy(sides.p, scratch) if spec.gate == ENTROPY else None
    lse = (cold or sides.q).log_sum_exp
    return Token(sides.kl, sides.p.log_prob_y, sides.q.log_prob_y, warm, ce, lse, entropy_t)


class _Chosen:
    """The rows that take the table's sums: on the host those alone, elsewhere all, as looking would wait."""

    def __init__(self, use: Tensor) -> None:
        self.everything = known_all(use) or not on_host(use)
        self._index = None if self.everything else use.nonzero().squeeze(1)

    def pick(self, x: Tensor) -> Tensor:
        return x if self._index is None else x.index_select(0, self._index)

    def of(self, x: Number) -> Any:
        """Of a number, or of each token's, (B, 1)."""
        return picked(x, self._index)

    def spread(self, values: Number, count: int) -> Number:
        """Of the picked rows, (B', 1), to all ``count``, with 0 elsewhere."""
        return spread(values, self._index, count)

    def add_(self, into: Tensor, values: Tensor, by: float | Tensor) -> None:
        """``into += by * values``, of the picked rows."""
        if self._index is not None:
            scale(values, self.of(by))
            into.index_add_(0, self._index, values)
        else:
            add_scaled(into, values, by, into)


def _add_sums(
    spec: RowSpec,
    shares: Shares,
    sides: _Sides,
    chosen: _Chosen,
    token: Token,
    y: Tensor,
    wants_gradient: bool,
    scalars: list[Scalars],
    scratch: Scratch,
) -> Tensor | None:
    """Add the table's sums to the loss; (B', V) ``sum_i share_i * (g_i - q * sum g_i)`` of the chosen rows."""
    pick = chosen.pick
    q, p, y, B = pick(sides.q.prob), pick(sides.p.prob), pick(y), len(y)
    d = logs = None
    divergences = [tabled.term.of for tabled in shares.tabled]
    if _reads_difference(spec):
        gap = pick(sides.difference).sub_(pick(sides.p.lse - sides.q.lse))
        d = gap if sides.outs[1] is None else gap.masked_fill_(pick(sides.outs[1]), LEFT_OUT)
    if any(divergence.powers for divergence in divergences):
        log_p, log_q = (Lazy(pick(side.z), scratch) - pick(side.lse) for side in (sides.p, sides.q))
        logs = log_p, log_q
    gradient: Lazy | None = None
    total: Tensor | None = None
    for tabled in shares.tabled:
        s = Scalars(*map(chosen.of, scalars[tabled.index]))
        arguments = _arguments(tabled, q, p, d, logs, y, s, scratch)
        beta, divergence = arguments[7], tabled.term.of
        value = divergence.h(*arguments).value.sum(1, keepdim=True)
        unused = None if known_all(tabled.use) else pick(~tabled.use).unsqueeze(1)
        if unused is not None:
            value.masked_fill_(unused, 0.0)
        beyond = infinite(divergence, Over(*map(pick, sides.over)), s.fraction, beta)
        if beyond is not None:
            raised_(value, beyond)
        factor = after_sums(shares, tabled, value, token, chosen.of, lambda x: chosen.spread(x, B))
        if not wants_gradient:
            continue
        g = divergence.g(*arguments)
        own = g if is_nothing(factor, 1.0) else g * factor
        if unused is not None:
            own.value.masked_fill_(unused, 0.0)
        own_total = own.value.sum(1, keepdim=True)
        gradient = own if gradient is None else gradient + own
        total = own_total if total is None else total + own_total
    if gradient is None or total is None:
        return None
    return torch.addcmul(gradient.value, q, total, value=-1.0, out=scratch("gradient", B)[: len(q)])


def _arguments(
    tabled: Tabled,
    q: Tensor,
    p: Tensor,
    d: Tensor | None,
    logs: tuple[Lazy, Lazy] | None,
    y: Tensor,
    s: Scalars,
    scratch: Scratch,
) -> tuple[Any, ...]:
    """What ``h`` and ``g`` of a term take, of the chosen rows."""
    divergence, mixed = tabled.term.of, tabled.term.mixed
    t = target(divergence, p, y, s, mixed, scratch)
    beta, alpha = head_share(t.value, q, s.fraction) if divergence.adaptive else (s.beta, s.alpha)
    of_label = Lazy(d, scratch) if d is not None and "d" in divergence.reads else None
    return table_arguments(divergence, t, Lazy(q, scratch), of_label, beta, alpha, logs if divergence.powers else None)


def _write_gradient(
    out: Tensor,
    factors: Factors,
    q: Softmax,
    sides: _Sides | None,
    cold: Softmax | None,
    y: Tensor,
    inverse: float | Tensor,
    sums: tuple[_Chosen | None, Tensor | None],
) -> None:
    """The gradient in the final logits, as :mod:`fused_kd.rows.shares` says; ``sums`` of :func:`_add_sums`."""
    chosen, total = sums
    p = None if sides is None else sides.p.prob
    warm = None if cold is None or cold is q else cold.prob
    whole = chosen is not None and chosen.everything
    if total is not None and whole and is_nothing(factors.q) and is_nothing(factors.p):
        out.copy_(total) if is_nothing(inverse, 1.0) else torch.mul(total, inverse, out=out)
    else:
        write_softmaxes(out, q.prob, p, factors)
        if chosen is not None and total is not None:
            chosen.add_(out, total, inverse)
    add_label(out, warm, y, factors)


def _reads_difference(spec: RowSpec) -> bool:
    return any("d" in spec.terms[i].of.reads for i in spec.tabled)


def _cross_entropy(q: Softmax, out: Tensor | None, y: Tensor) -> Tensor:
    """(B, 1): infinite where the student excludes the label."""
    ce = -q.log_prob_y
    return ce if out is None else raised_(ce, out.gather(1, y))


def _aligned(z: Tensor, z_t: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor | float, Tensor | float]:
    """Both rows, and what was taken from them: their maxima where these are far from 0 or from each other, as a large
    offset would swallow the rows' differences."""
    top, top_t = z.amax(1, keepdim=True), z_t.amax(1, keepdim=True)
    if on_host(z) and bool((((top_t - top).abs() < 64.0) & (top.abs() < 64.0)).all()):
        return z, z_t, 0.0, 0.0
    z, z_t = torch.sub(z, top, out=scratch("z_s", len(z))), torch.sub(z_t, top_t, out=scratch("z_t", len(z)))
    return z, z_t, top, top_t


def _softmax(z: Tensor, y: Tensor, out: Tensor) -> Softmax:
    torch.softmax(z, 1, out=out)
    # On CPUs it adds up a long row naively: its norm is off by 1e-5 at V = 128256, sum()'s by 1e-7.
    out.mul_(out.sum(1, keepdim=True).reciprocal_())
    # A probability that has not underflowed gives lse without another sweep of exponentials: the label's where that
    # can be seen for free, else the largest.
    z_y, q_y = z.gather(1, y), out.gather(1, y)
    if on_host(z) and bool((q_y > TINY).all()):
        log_q_y = q_y.log_()
        return Softmax(z, out, z_y - log_q_y, log_q_y)
    top, log_top = z.amax(1, keepdim=True), out.amax(1, keepdim=True).log()
    return Softmax(z, out, top - log_top, (z_y - top) + log_top)
