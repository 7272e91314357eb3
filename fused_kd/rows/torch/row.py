"""Row implementation in plain PyTorch, for any device: blocks of rows that stay in cache, operations in place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...divergences import DIVERGENCES, LEFT_OUT, TINY, Divergence
from ...objectives import RowSpec, Scalars
from ..contract import Logits, RowInputs, RowOutputs, Sparse
from .math import (
    Lazy,
    Over,
    Scratch,
    above,
    add_at,
    close_gradient,
    cool,
    difficulty_of,
    excluded,
    final_logits,
    free_gradient,
    head_share,
    infinite,
    known_all,
    loss_of,
    maybe_any,
    on_host,
    raised_,
    rows_of_block,
    scalars_of,
    settled,
    table_arguments,
    target,
    to_raw_,
    uniform_logits,
    uses_divergence,
)


def row(inputs: RowInputs, outputs: RowOutputs) -> None:
    """Fill ``outputs`` for one chunk, as :mod:`fused_kd.rows.contract` says; the teacher may be a uniform tail."""
    C, V = inputs.student.raw.shape
    block = rows_of_block(V, inputs.labels.device)
    scratch = Scratch(min(block, C), V, inputs.labels.device)
    scalars = scalars_of(inputs)
    for start in range(0, C, block):
        rows = slice(start, min(start + block, C))
        _block(inputs, outputs, rows, scalars, scratch)


class _Softmax(NamedTuple):
    prob: Tensor  # (B, V)
    lse: Tensor  # (B, 1)
    log_prob_y: Tensor  # (B, 1)


def _block(inputs: RowInputs, outputs: RowOutputs, rows: slice, s: Scalars, scratch: Scratch) -> None:
    """Fill some rows of ``outputs``."""
    labels = inputs.labels[rows]
    ignored = labels < 0
    y = labels.clamp(min=0).unsqueeze(1)
    dlogits = None if outputs.dlogits is None else outputs.dlogits[rows]
    # Rounded to the output's dtype once, at the end.
    work = scratch("dlogits", len(y)) if dlogits is not None and dlogits.dtype != torch.float32 else dlogits

    z, slope = final_logits(inputs.student, rows, scratch, "z_s")
    out = excluded(z, inputs.student.finite)
    if inputs.spec.divergence is None:
        q = _softmax(z, y, scratch("q", len(y)))
        loss = difficulty = _cross_entropy(q, out, y)
        is_hard = torch.zeros_like(ignored)
        if work is not None:
            add_at(work.copy_(q.prob), y, -1.0)
    else:
        cold = _softmax(z, y, scratch("cold", len(y))) if inputs.cold_labels else None
        z = cool(z, s.temperature, scratch("z_s", len(y)))
        z_t, out_t = _teacher(inputs.teacher, rows, s, scratch)
        sides = _compared(z, z_t, y, (out, out_t), scratch, keep_difference=_reads_difference(inputs.spec))
        given = None if inputs.hard is None else inputs.hard[rows]
        loss, difficulty, is_hard = _against_teacher(inputs.spec, sides, y, cold, given, work, s, scratch)

    if work is not None and dlogits is not None:
        to_raw_(work, inputs.student, slope)
        if inputs.weights is not None:
            work.mul_(inputs.weights[rows].unsqueeze(1))
        if maybe_any(ignored):
            work.masked_fill_(ignored.unsqueeze(1), 0.0)
        if work is not dlogits:
            dlogits.copy_(work)
    for result, value in ((outputs.loss, loss), (outputs.difficulty, difficulty)):
        result[rows] = settled(value, ignored)
    outputs.is_hard[rows] = is_hard & ~ignored


def _teacher(
    teacher: Logits | Sparse | None, rows: slice, s: Scalars, scratch: Scratch
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
    return cool(z, s.temperature, scratch("z_t", B)), out


class _Sides(NamedTuple):
    """Student and teacher at temperature T."""

    q: _Softmax
    p: _Softmax
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
    z, z_t = _aligned(z, z_t, scratch)
    p = _softmax(z_t, y, scratch("p", B))
    # The difference form cancels far less than two separate expectations.
    difference = torch.sub(z_t, z, out=scratch("difference", B))
    for out in outs:
        if out is not None:
            difference.masked_fill_(out, 0.0)
    kl = (Lazy(p.prob, scratch) * difference).value.sum(1, keepdim=True) - p.lse
    q = _softmax(z, y, scratch("q" if keep_difference else "difference", B))
    over = Over(above(q.prob, outs[1]), above(p.prob, outs[0]))
    return _Sides(q, p, difference, outs, over, raised_((kl + q.lse).clamp_(min=0.0), over.teacher))


class _Chosen:
    """The rows that take the divergence's own sweeps: on the host those alone, elsewhere all, as looking would wait."""

    def __init__(self, use: Tensor) -> None:
        self._use, self.everything = use, known_all(use)
        self._index = use.nonzero().squeeze(1) if on_host(use) and not self.everything else None

    def pick(self, x: Tensor) -> Tensor:
        return x if self._index is None else x.index_select(0, self._index)

    def put_(self, into: Tensor, values: Tensor) -> None:
        """Of the picked rows, to where they are from."""
        if self._index is not None:
            into.index_copy_(0, self._index, values)
        elif values is not into:
            torch.where(self._use.unsqueeze(1), values, into, out=into)


def _against_teacher(
    spec: RowSpec,
    sides: _Sides,
    y: Tensor,
    cold: _Softmax | None,
    hard: Tensor | None,
    dlogits: Tensor | None,
    s: Scalars,
    scratch: Scratch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and difficulty (B, 1), hardness (B,), and in ``dlogits`` the gradient in the final logits."""
    divergence = DIVERGENCES[spec.divergence or "kl"]
    q, p = sides.q, sides.p
    ce = _cross_entropy(q, sides.outs[0], y)
    difficulty = difficulty_of(sides.kl, p.log_prob_y, q.log_prob_y, ce, s)
    if not spec.gated:
        hard = torch.zeros_like(y, dtype=torch.bool).squeeze(1)
    else:
        hard = (difficulty > s.gamma).squeeze(1) if hard is None else hard

    if cold is not None:
        ce = _cross_entropy(cold, sides.outs[0], y)
    use = uses_divergence(divergence, spec, hard, s.alpha)
    loss = loss_of(difficulty if spec.mixed else sides.kl, ce, s, spec)
    if dlogits is not None and (use is None or not known_all(use)):
        free_gradient(p.prob, q.prob, y, None if cold is None else cold.prob, s, spec, dlogits)
    if use is not None and maybe_any(use):
        chosen = _Chosen(use)
        loss = loss.clone()  # the difficulty's own memory
        chosen.put_(loss, _evaluated(spec, divergence, sides, chosen, y, ce, cold, dlogits, s, scratch))
    return loss, difficulty, hard


def _evaluated(
    spec: RowSpec,
    divergence: Divergence,
    sides: _Sides,
    chosen: _Chosen,
    y: Tensor,
    ce: Tensor,
    cold: _Softmax | None,
    dlogits: Tensor | None,
    s: Scalars,
    scratch: Scratch,
) -> Tensor:
    """(B', 1) the loss of the chosen rows by ``h`` and ``g`` of the table, and in ``dlogits`` the gradient."""
    pick, out_t = chosen.pick, sides.outs[1]
    q, p, y = pick(sides.q.prob), pick(sides.p.prob), pick(y)
    t = target(divergence, p, y, s, spec.mixed, scratch)
    d = None
    if _reads_difference(spec):
        gap = pick(sides.difference).sub_(pick(sides.p.lse - sides.q.lse))
        d = Lazy(gap if out_t is None else gap.masked_fill_(pick(out_t), LEFT_OUT), scratch)
    beta, alpha = head_share(t.value, q, s.fraction) if divergence.adaptive else (s.beta, s.alpha)
    arguments = table_arguments(divergence, t, Lazy(q, scratch), d, beta, alpha)
    total = divergence.h(*arguments).value.sum(1, keepdim=True)
    beyond = infinite(divergence, sides.over, s.fraction, beta)
    if beyond is not None:
        raised_(total, pick(beyond))
    if dlogits is not None:
        g = divergence.g(*arguments)
        out = dlogits if chosen.everything else None
        gradient = torch.addcmul(g.value, q, g.value.sum(1, keepdim=True), value=-1.0, out=out)
        close_gradient(gradient, q if cold is None else pick(cold.prob), y, s, spec)
        chosen.put_(dlogits, gradient)
    return loss_of(total, pick(ce), s, spec)


def _reads_difference(spec: RowSpec) -> bool:
    divergence = DIVERGENCES[spec.divergence or "kl"]
    return "d" in divergence.reads and not divergence.free


def _cross_entropy(q: _Softmax, out: Tensor | None, y: Tensor) -> Tensor:
    """(B, 1): infinite where the student excludes the label."""
    ce = -q.log_prob_y
    return ce if out is None else raised_(ce, out.gather(1, y))


def _aligned(z: Tensor, z_t: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Both rows with maximum 0 where they are far apart: a large common offset would swallow their difference."""
    top, top_t = z.amax(1, keepdim=True), z_t.amax(1, keepdim=True)
    if on_host(z) and bool(((top_t - top).abs() < 64.0).all()):
        return z, z_t
    return torch.sub(z, top, out=scratch("z_s", len(z))), torch.sub(z_t, top_t, out=scratch("z_t", len(z)))


def _softmax(z: Tensor, y: Tensor, out: Tensor) -> _Softmax:
    torch.softmax(z, 1, out=out)
    # On CPUs it adds up a long row naively: its norm is off by 1e-5 at V = 128256, sum()'s by 1e-7.
    out.mul_(out.sum(1, keepdim=True).reciprocal_())
    # A probability that has not underflowed gives lse without another sweep of exponentials: the label's where that
    # can be seen for free, else the largest.
    z_y, q_y = z.gather(1, y), out.gather(1, y)
    if on_host(z) and bool((q_y > TINY).all()):
        log_q_y = q_y.log_()
        return _Softmax(out, z_y - log_q_y, log_q_y)
    top, log_top = z.amax(1, keepdim=True), out.amax(1, keepdim=True).log()
    return _Softmax(out, top - log_top, (z_y - top) + log_top)
