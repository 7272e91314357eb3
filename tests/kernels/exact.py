"""Losses in 50 digits: each objective's definition in mpmath, and its gradient as a difference quotient of it.

Nothing is shared with the library, and no gradient is derived: what is wrong here is a wrong definition.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from mpmath import mp, mpf

import fused_kd as fk
from fused_kd import objectives as o

mp.dps = 80  # of which a difference quotient of near rows at a temperature near 0 keeps 50
LEAST = mpf(2) ** -126  # smaller probabilities are 0 beside an excluded token
STEP = mpf(10) ** -25

Row = list[mpf]
Groups = list[list[int]]


class Exact(NamedTuple):
    """``loss`` and ``difficulty`` may be infinite; ``gradient`` is then that of what is finite of them."""

    loss: mpf
    difficulty: mpf
    gradient: Row


class _Side:
    """Probabilities of logits; an excluded token's is 0, and its log-probability counts from an infinite constant."""

    def __init__(self, z: Row, excluded: list[bool], T: mpf) -> None:
        self.excluded = excluded
        kept = [x for x, out in zip(z, excluded, strict=True) if not out]
        log_total = mp.log(mp.fsum(mp.exp((x - max(kept)) / T) for x in kept)) + max(kept) / T
        self.log_p = [x / T - log_total for x in z]
        self.p = [mpf(0) if out else mp.exp(x) for x, out in zip(self.log_p, excluded, strict=True)]


def _kl(a: _Side, b: _Side) -> tuple[mpf, bool]:
    """KL(a||b) but for its infinite part, and whether it has one."""
    terms = [p * (la - lb) for p, la, lb in zip(a.p, a.log_p, b.log_p, strict=True) if p > 0]
    return mp.fsum(terms), any(p >= LEAST and out for p, out in zip(a.p, b.excluded, strict=True))


def _kl_reverse(q: _Side, p: _Side) -> tuple[mpf, bool]:
    """KL(q||p) without the tokens that ``p`` excludes, and whether one of them makes it infinite."""
    rows = list(zip(q.p, q.log_p, p.log_p, p.excluded, strict=True))
    return mp.fsum(a * (la - lb) for a, la, lb, out in rows if a > 0 and not out), any(
        a >= LEAST and out for a, _, _, out in rows
    )


def _to_mixture(a: Row, b: Row, share: mpf) -> mpf:
    """KL(a||share * b + (1 - share) * a)."""
    return mp.fsum(x * mp.log(x / (share * y + (1 - share) * x)) for x, y in zip(a, b, strict=True) if x > 0)


def _mixed(p: _Side, y: int, lam: mpf) -> _Side:
    """``yt``, whose excluded tokens are of no consequence: it is a target only."""
    t = _Side.__new__(_Side)
    t.p = [lam * x + (1 - lam if v == y else 0) for v, x in enumerate(p.p)]
    t.log_p = [mp.log(x) if x > 0 else mpf(0) for x in t.p]
    return t


def _powers(p: _Side, q: _Side, a: mpf, b: mpf) -> Row:
    """``p**a * q**b``, of what neither excludes."""
    rows = zip(p.log_p, q.log_p, p.excluded, q.excluded, strict=True)
    return [mpf(0) if out or other else mp.exp(a * x + b * y) for x, y, out, other in rows]


def _todi(p: _Side, q: _Side, weights: Row) -> tuple[mpf, bool]:
    """Both directions, the first by ``weights``, constants; infinite parts as those of each."""
    rows = list(zip(weights, p.p, q.p, p.log_p, q.log_p, p.excluded, strict=True))
    value = mp.fsum((a * x - (1 - a) * y) * (lx - ly) for a, x, y, lx, ly, out in rows if not out)
    return value, _kl(p, q)[1] or _kl_reverse(q, p)[1]


def _head_share(p: Row, q: Row, mass: mpf) -> mpf:
    error = [abs(a - b) for a, b in zip(p, q, strict=True)]
    total = mp.fsum(error)
    if total == 0:
        return mpf(1) / 2
    held = {x: mp.fsum(a for a in p if a >= x) for x in set(p)}
    head = [mass >= 1 or x == max(p) or held[x] <= mass for x in p]
    return mp.fsum(e for e, inside in zip(error, head, strict=True) if inside) / total


def _merged(z: Row, excluded: list[bool], groups: Groups | None) -> tuple[Row, list[bool]]:
    """Categories of tokens, each with the sum of their probabilities."""
    if groups is None:
        return z, excluded
    logits, out = [], []
    for group in groups:
        kept = [z[v] for v in group if not excluded[v]]
        logits.append(mp.log(mp.fsum(mp.exp(x) for x in kept)) if kept else z[group[0]])
        out.append(not kept)
    return logits, out


def _split(z: list[float]) -> tuple[Row, list[bool]]:
    """Logits with 0 for -inf, and which these are; none in a row of nothing else."""
    out = [x == -math.inf for x in z]
    return [mpf(0 if o else x) for x, o in zip(z, out, strict=True)], [False] * len(z) if all(out) else out


def exact(
    z: list[float],
    z_t: list[float] | Row,
    y: int,
    objective: fk.objectives.Objective,
    T: float = 1.0,
    groups: Groups | None = None,
    y_own: int | None = None,
) -> Exact:
    """Of one token, for any objective but those that rank tokens: student logits (V,) and teacher's, -inf where
    excluded. With ``groups`` of tokens, ``z_t`` and ``y`` are those of the categories. ``y_own`` is the label among all
    tokens, of groups that are not all of them: the label's cross-entropy is over all."""
    student, temperature = _split(z), mpf(T)
    p = _Side(*_split(z_t), temperature)
    lam = mpf(getattr(objective, "lam", 1.0))
    t = _mixed(p, y, lam if y_own is None or objective.spec.mixes_label else mpf(1))
    fixed: dict[str, Any] = {}

    def difficulty(q: _Side) -> tuple[mpf, bool]:
        return _kl(t, q)

    def loss(z: Row) -> tuple[mpf, bool]:
        merged = _merged(z, student[1], groups)
        q = _Side(*merged, temperature)

        def ce() -> tuple[mpf, bool]:
            if y_own is not None:
                whole = _Side(z, student[1], mpf(1))
                return -whole.log_p[y_own], whole.excluded[y_own]
            cold = q if T == 1.0 else _Side(*merged, mpf(1))
            return -cold.log_p[y], cold.excluded[y]

        def share(weight: mpf, value: tuple[mpf, bool]) -> tuple[mpf, bool]:
            return weight * value[0], weight > 0 and value[1]

        def add(*parts: tuple[mpf, bool]) -> tuple[mpf, bool]:
            return mp.fsum(x for x, _ in parts), any(out for _, out in parts)

        def floored(q: _Side, beta: float, floor: float) -> tuple[mpf, bool]:
            if beta == 1:
                return difficulty(q)
            skew = _to_mixture(t.p, q.p, mpf(beta)), False
            return add(share(1 - mpf(floor), skew), share(mpf(floor), difficulty(q)))

        match objective:
            case fk.SFT():
                return ce()
            case fk.ForwardKD():
                return add(share(1 - lam, ce()), share(lam, _kl(p, q)))
            case fk.ReverseKD():
                return add(share(1 - lam, ce()), share(lam, _kl_reverse(q, p)))
            case fk.NoEvo():
                return difficulty(q)
            case fk.Skew(beta=beta, floor=floor):
                return floored(q, beta, floor)
            case fk.SkewTeacher(beta=beta):
                value = _kl(p, q) if beta == 1 else (_to_mixture(p.p, q.p, mpf(beta)), False)
                return add(share(1 - lam, ce()), share(lam, value))
            case fk.SelfEvolution(beta=beta, gamma=gamma, floor=floor, gate=gate):
                if "hard" not in fixed:
                    d, infinite = difficulty(q) if gate != "kl" else _kl(p, q)
                    if gate == "excess" and not infinite:
                        own, beyond = _kl(t, p)
                        d = -mp.inf if beyond else d - own
                    fixed["hard"] = gamma < math.inf and (infinite or d > gamma)
                return floored(q, beta, floor) if fixed["hard"] else difficulty(q)
            case fk.GeneralizedJSD(beta=0.0):
                return _kl(p, q)
            case fk.GeneralizedJSD(beta=1.0):
                return _kl_reverse(q, p)
            case fk.GeneralizedJSD(beta=beta):
                forward, reverse = _to_mixture(p.p, q.p, 1 - mpf(beta)), _to_mixture(q.p, p.p, mpf(beta))
                return beta * forward + (1 - mpf(beta)) * reverse, False
            case fk.SkewForward(alpha=alpha):
                return _kl(p, q) if alpha == 0 else (_to_mixture(p.p, q.p, 1 - mpf(alpha)), False)
            case fk.TotalVariation():
                return mp.fsum(abs(a - b) for a, b in zip(p.p, q.p, strict=True)) / 2, False
            case o.SkewReverseDetached(alpha=alpha):
                if alpha == 0:
                    return _kl_reverse(q, p)
                m = fixed.setdefault(
                    "m", [mpf(alpha) * x + (1 - mpf(alpha)) * y for x, y in zip(q.p, p.p, strict=True)]
                )
                return mp.fsum(x * mp.log(x / y) for x, y in zip(q.p, m, strict=True) if x > 0), False
            case fk.SkewReverse(alpha=alpha):
                return _kl_reverse(q, p) if alpha == 0 else (_to_mixture(q.p, p.p, 1 - mpf(alpha)), False)
            case o.SymmetricKL(beta=beta):
                return add(share(mpf(beta), _kl(p, q)), share(1 - mpf(beta), _kl_reverse(q, p)))
            case o.EntropyGated(tau=tau):
                unsure = -mp.fsum(x * lx for x, lx in zip(p.p, p.log_p, strict=True) if x > 0) > tau
                return add(share(mpf(unsure), _kl(p, q)), _kl_reverse(q, p))
            case o.ToDi():
                a = [x / (x + y) if x + y > 0 else mpf(0) for x, y in zip(p.p, q.p, strict=True)]
                return _todi(p, q, fixed.setdefault("a", a))
            case o.AlphaBeta(alpha=alpha, beta=beta):
                a, b = mpf(alpha), mpf(beta)
                own = [mp.fsum(x ** (a + b) for x in side.p if x > 0) for side in (p, q)]
                both = mp.fsum(_powers(p, q, a, b))
                return (a / (a + b) * own[0] + b / (a + b) * own[1] - both) / (a * b), False
            case o.Renyi(alpha=alpha):
                total = mp.fsum(_powers(p, q, mpf(alpha), 1 - mpf(alpha)))
                return (-mp.log(total) / (1 - mpf(alpha)), False) if total > 0 else (mp.inf, True)
            case o.Acceptance():
                total = mp.fsum(min(x, y) for x, y in zip(p.p, q.p, strict=True))
                return (-mp.log(total), False) if total > 0 else (mp.inf, True)
            case o.AcceptanceMix():
                total = mp.fsum(min(x, y) for x, y in zip(p.p, q.p, strict=True))
                w = fixed.setdefault("w", mp.exp(-3 * total))
                return add(share(w, _kl(p, q)), ((1 - w) * (1 - total), False))
            case o.ZLoss():
                kept = [x for x, out in zip(*merged, strict=True) if not out]
                return mp.log(mp.fsum(mp.exp(x) for x in kept)) ** 2, False
            case fk.AdaptiveKL(fraction=fraction):
                w = fixed.setdefault("w", _head_share(p.p, q.p, mpf(fraction)))
                return add(share(w, _kl(p, q)), share(1 - w, _kl_reverse(q, p)))
        raise TypeError(f"no definition of {objective!r}")

    value, infinite = loss(student[0])
    first = _Side(*_merged(*student, groups), temperature)
    if objective.spec.needs_teacher:
        d = difficulty(first)
    else:  # nothing else would read the temperature
        cold = _Side(*_merged(*student, groups), mpf(1))
        d = -cold.log_p[y], cold.excluded[y]
    gradient = []
    for v, x in enumerate(student[0]):
        sides = ([*student[0][:v], x + step, *student[0][v + 1 :]] for step in (STEP, -STEP))
        above, below = (loss(moved)[0] for moved in sides)
        gradient.append((above - below) / (2 * STEP) if mp.isfinite(above) else mpf(0))
    return Exact(mp.inf if infinite else value, mp.inf if d[1] else d[0], gradient)
