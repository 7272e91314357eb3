"""What a row's loss and gradient are made of, in tensors: factors of CE, KL and the table's sums, of each token.

With the factors of a token, of softmaxes q (at temperature 1: c) and p, and of the label's indicator y, the gradient of
its loss in the final logits is

    (q_of * q - p_of * p - y_of * y + sum_i share_i * (g_i - q * sum g_i)) / T + (ce + 2 * z * log_sum_exp) * c - ce * y

so that any number of terms costs the sums of those with a table entry of their own, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import LEAST_SUM, OVERLAP_DECAY
from ..terms import ENTROPY, EXCESS, KL, Number, RowSpec, Scalars, Term
from .torch.math import Factors, known_all, maybe_any, raised_


class Token(NamedTuple):
    """What statistics say of each token, (B, 1): ``KL(p||q)``, the label's log-probabilities at temperature T, its
    cross-entropy there and in the loss, the student's log-sum-exp at the latter's temperature, and ``H(p)``."""

    kl: Tensor
    log_p_y: Tensor
    log_q_y: Tensor
    warm_ce: Tensor
    ce: Tensor
    log_sum_exp: Tensor | None = None
    entropy_t: Tensor | None = None


@dataclass(frozen=True)
class Tabled:
    """A term with sums of its own: its place in the spec, which rows (B,) take them, and its factor (0 elsewhere)."""

    index: int
    term: Term
    use: Tensor
    share: Number


@dataclass
class Shares:
    """Factors as above; ``loss`` (B, 1) without the table's sums."""

    loss: Tensor
    difficulty: Tensor
    hard: Tensor  # (B,) bool
    tabled: list[Tabled]
    q: Number = 0.0
    p: Number = 0.0
    y: Number = 0.0
    ce: Number = 0.0
    z: Number = 0.0

    @property
    def use(self) -> Tensor | None:
        """(B,) bool: which rows take some term's sums; None for none."""
        if not self.tabled:
            return None
        use = torch.stack([term.use for term in self.tabled]).any(0)
        return use if maybe_any(use) else None

    def factors(self, token: Token, inverse: Number, *, cold: bool) -> Factors:
        """``inverse`` is 1 / T; ``cold``: q at temperature 1 is another softmax than q."""
        of_c = self.ce
        if not (isinstance(self.z, float) and self.z == 0.0):
            assert token.log_sum_exp is not None
            of_c = of_c + 2.0 * self.z * token.log_sum_exp
        of_q, of_y = self.q * inverse, self.y * inverse + self.ce
        return Factors(of_q if cold else of_q + of_c, self.p * inverse, of_y, of_c if cold else 0.0)

    def add_free(self, share: Number, value: Tensor, lam: Number, rest: Number) -> None:
        """``share * KL(t||q)``, with ``lam`` of the target the teacher's and ``rest`` the label's."""
        self.loss = self.loss + weighed(share, value)
        self.q = self.q + share
        self.p = self.p + share * lam
        self.y = self.y + share * rest


def loss_shares(
    spec: RowSpec, scalars: list[Scalars], token: Token, given: Tensor | None, *, without_target: bool = False
) -> Shares:
    """``given`` (B,) bool or None says which rows are hard; ``without_target``: the difficulty is ``KL(p||q)``."""
    difficulty = token.ce
    if spec.needs_teacher:
        difficulty = token.kl if without_target else _mixed_kl(token, scalars[spec.main])
    hard = torch.zeros(len(token.kl), dtype=torch.bool, device=token.kl.device)
    if spec.gate:
        gated = next(i for i, term in enumerate(spec.terms) if term.gate)
        hard = _hard(spec.terms[gated], scalars[gated], token, difficulty).squeeze(1) if given is None else given
    made = Shares(torch.zeros_like(token.kl), difficulty, hard, [])
    for i, (term, s) in enumerate(zip(spec.terms, scalars, strict=True)):
        if term.hard_label:
            made.ce = made.ce + s.weight * s.rest
        if term.z_loss:
            made.z = made.z + s.weight
        if term.divergence is None:
            continue
        share = s.weight if term.mixed else s.weight * s.lam
        if term.gate == ENTROPY:
            share = _where(hard.unsqueeze(1), share, 0.0)
        if not term.free:
            use = _uses_sums(term, s, hard)
            kept, floor = (share, 0.0) if not term.of.kl_at_one else (share * s.kept, share * s.floor)
            if not known_all(use):
                kept, floor = (_where(use.unsqueeze(1), x, y) for x, y in ((kept, 0.0), (floor, share)))
            made.tabled.append(Tabled(i, term, use, kept))
            share = floor
            if isinstance(share, float) and share == 0.0:
                continue
        value = token.kl
        if term.mixed:
            value = difficulty if i == spec.main else _mixed_kl(token, s)
        made.add_free(share, value, *((s.lam, s.rest) if term.mixed else (1.0, 0.0)))
    if not (isinstance(made.ce, float) and made.ce == 0.0):
        made.loss = made.loss + weighed(made.ce, token.ce)
    if token.log_sum_exp is not None and any(term.z_loss for term in spec.terms):
        made.loss = made.loss + made.z * token.log_sum_exp.square()
    return made


def _where(choice: Tensor, a: Number, b: Number) -> Tensor:
    """fp32, whatever the default dtype; a number is filled in on the device, as a copy of it would wait there."""
    a, b = (
        x.to(choice.device, torch.float32)
        if isinstance(x, Tensor)
        else torch.full((), x, dtype=torch.float32, device=choice.device)
        for x in (a, b)
    )
    return torch.where(choice, a, b)


def weighed(weight: Number, value: Tensor) -> Tensor:
    """Their product, where nothing of an infinite value is nothing."""
    return (weight * value).masked_fill_((value == math.inf) & (weight == 0.0), 0.0)


def label_target(log_p_y: Tensor, s: Scalars) -> Tensor:
    """What ``yt`` gives the label."""
    return s.lam * log_p_y.exp() + s.rest


def _mixed_kl(token: Token, s: Scalars) -> Tensor:
    """``KL(yt||q)`` from ``KL(p||q)``."""
    p_y, t_y = token.log_p_y.exp(), label_target(token.log_p_y, s)
    others = weighed(s.lam, token.kl - p_y * (token.log_p_y - token.log_q_y)) + s.lam * s.log_lam * (1.0 - p_y)
    found = (others + (torch.xlogy(t_y, t_y) - t_y * token.log_q_y)).clamp_(min=0.0)
    return raised_(found, (token.warm_ce == math.inf) & (s.rest > 0.0))


def _hard(term: Term, s: Scalars, token: Token, difficulty: Tensor) -> Tensor:
    """(B, 1) bool: whether what the gate looks at exceeds gamma."""
    if term.gate == ENTROPY:
        assert token.entropy_t is not None
        return token.entropy_t > s.gamma
    if term.gate == KL:
        return token.kl > s.gamma
    if term.gate == EXCESS:
        return difficulty - teachers_own(token.log_p_y, s) > s.gamma
    return difficulty > s.gamma


def teachers_own(log_p_y: Tensor, s: Scalars) -> Tensor:
    """``KL(yt||p)``, how hard the token is for its teacher: ``lam log lam (1 - p_y) + yt_y log(yt_y / p_y)``."""
    t_y = label_target(log_p_y, s)
    return s.lam * s.log_lam * (1.0 - log_p_y.exp()) + (torch.xlogy(t_y, t_y) - t_y * log_p_y)


def target_entropy(entropy_t: Tensor, log_p_y: Tensor, s: Scalars) -> Tensor:
    """``H(yt)`` from ``H(p)``."""
    p_y, t_y = log_p_y.exp(), label_target(log_p_y, s)
    others = s.lam * (entropy_t + torch.xlogy(p_y, p_y)) - s.lam * s.log_lam * (1.0 - p_y)
    return (others - torch.xlogy(t_y, t_y)).clamp_(min=0.0)


def _uses_sums(term: Term, s: Scalars, hard: Tensor) -> Tensor:
    """(B,) bool: the rows whose divergence is not KL."""
    use = hard if term.chooses else torch.ones_like(hard)
    if term.of.kl_at_one:
        positive = s.alpha > 0.0
        use = use & (positive.reshape(-1) if isinstance(positive, Tensor) else positive)
    return use


def after_sums(
    shares: Shares,
    tabled: Tabled,
    total: Tensor,
    token: Token,
    of: Callable[[Number], Number],
    spread: Callable[[Number], Number],
) -> Number:
    """Add a term to the loss by its ``sum h``, (B', 1) of the rows that take sums; the factor of its ``g``.

    ``of`` picks these rows from a number of all tokens, ``spread`` brings theirs back.
    """
    share, outer = of(tabled.share), tabled.term.of.outer
    if not outer:
        shares.loss = shares.loss + spread(weighed(share, total))
        return share
    if outer == "minus_log":
        shares.loss = shares.loss + spread(weighed(share, -total.log()))
        return -share / total.clamp(min=LEAST_SUM)
    w = (-OVERLAP_DECAY * total).exp()
    shares.loss = shares.loss + spread(share * (1.0 - w) * (1.0 - total))
    shares.add_free(spread(share * w), token.kl, 1.0, 0.0)
    return -share * (1.0 - w)
