"""What a row knows of its loss: summands, fixed when it is compiled, and the numbers of each, read when it runs.

A loss is a sum over terms, each a multiple of the label's cross-entropy, of a divergence, or of both. With
``sum g = -1`` for KL, the gradient of everything but the table's sums is linear in q, p and the label, so that terms
beyond them cost nothing: see :mod:`fused_kd.rows.contract`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import Tensor

from .divergences import DIVERGENCES, Divergence

Number = float | Tensor
"""One for a call, or one for each token."""

DIFFICULTY, EXCESS, KL, RANK, ENTROPY = "difficulty", "excess", "kl", "rank", "entropy"
GATES = (DIFFICULTY, EXCESS, KL, RANK, ENTROPY)
"""What of a token is compared with ``gamma``: ``d = KL(yt||q)``, ``d - KL(yt||p)``, ``KL(p||q)``, and, of all tokens
together, whether d is among the ``fraction`` largest. Above, a token is hard and takes the divergence; else it takes
``KL(yt||q)``. With the last, ``H(p)``, the term is there for tokens above and absent for the others."""

STATISTICS = (
    "log_sum_exp_s",
    "log_sum_exp_t",
    "entropy_s",
    "entropy_t",
    "kl",
    "cross_entropy",
    "log_q_y",
    "log_p_y",
    "target_entropy",
    "top_1",
    "overlap",
)
"""What a row can tell of a token, in the order of its columns, at temperature T: log-sum-exps of both sides, entropies
``H(q)`` and ``H(p)``, ``KL(p||q)``, ``-log q_y`` at the temperature at which the loss takes it, the label's
log-probabilities, and ``H(yt)``; with a sweep of their own whether the largest logits are of one token, and
``sum min(p, q)``."""

WITHOUT_SWEEP = STATISTICS.index("top_1")
"""How many of them come with the first sweep."""


class Term(NamedTuple):
    """One summand of a row's loss: ``weight`` times

    - ``divergence``: a key of :data:`fused_kd.divergences.DIVERGENCES`, of the target ``yt`` where ``mixed``, else,
      times ``lam``, of ``p``; None: none;
    - ``hard_label``: beside it ``(1 - lam) * CE``;
    - ``z_loss``: the square of the student's log-sum-exp, at temperature 1, instead of all that;
    - ``gate``: one of :data:`GATES`, or "".
    """

    divergence: str | None
    mixed: bool = False
    hard_label: bool = False
    gate: str = ""
    z_loss: bool = False

    @property
    def of(self) -> Divergence:
        """Of a term that has one."""
        return DIVERGENCES[self.divergence or "kl"]

    @property
    def chooses(self) -> bool:
        """Whether hard tokens take the divergence and others KL."""
        return self.gate not in ("", ENTROPY)

    @property
    def free(self) -> bool:
        """No sweep for sums of its own."""
        return self.divergence is None or self.of.free

    @property
    def code(self) -> str:
        flags = [name for name in ("mixed", "hard_label", "z_loss") if getattr(self, name)]
        return ":".join([self.divergence or "", self.gate, *flags])

    @classmethod
    def decode(cls, code: str) -> Term:
        divergence, gate, *flags = code.split(":")
        return cls(divergence or None, gate=gate, **dict.fromkeys(flags, True))


class RowSpec(NamedTuple):
    """What a row must know before it is compiled; everything else is a run-time scalar. ``code`` is it in a string."""

    code: str
    terms: tuple[Term, ...]

    @classmethod
    def of(cls, *terms: Term) -> RowSpec:
        return cls("+".join(term.code for term in terms), terms)

    @staticmethod
    @functools.cache
    def decode(code: str) -> RowSpec:
        return RowSpec(code, tuple(Term.decode(part) for part in code.split("+")))

    @property
    def needs_teacher(self) -> bool:
        return any(term.divergence is not None for term in self.terms)

    @property
    def reads_label(self) -> bool:
        return any(term.mixed or term.hard_label for term in self.terms)

    @property
    def mixes_label(self) -> bool:
        """Whether a divergence's target holds the label."""
        return any(term.mixed for term in self.terms)

    @property
    def main(self) -> int:
        """The term whose ``KL(yt||q)`` is the difficulty: the gated one, else the first with a mixed target, else the
        first with a teacher."""
        found = [self.terms.index(term) for has in _MAIN for term in self.terms if has(term)]
        return found[0] if found else 0

    @property
    def gate(self) -> str:
        """That of the term with one; there is one at most."""
        return next((term.gate for term in self.terms if term.gate), "")

    @property
    def ranked(self) -> bool:
        return self.gate == RANK

    @property
    def tabled(self) -> tuple[int, ...]:
        """The terms that have sums of their own."""
        return tuple(i for i, term in enumerate(self.terms) if not term.free)

    def has_cold(self, temperature_is_one: bool, tail: str = "") -> bool:
        """Whether the label's own cross-entropy, or the student's log-sum-exp, is taken at temperature 1 and over the
        vocabulary while the rest is taken at another temperature or, of lists with ``tail="listed"``, over the list."""
        own = any(term.hard_label or term.z_loss for term in self.terms)
        return own and self.needs_teacher and (tail == "listed" or not temperature_is_one)


_MAIN = (lambda term: term.gate, lambda term: term.mixed, lambda term: term.divergence is not None)


class Scalars(NamedTuple):
    """Run-time scalars of a term, in the order in which kernels read them: numbers, or tensors that say them a token.

    ``rest`` is ``1 - lam`` and ``alpha`` is ``1 - beta``: formed from fp32 numbers near 1 they would lose their digits.
    ``log_lam`` is ``log lam``, and :data:`fused_kd.divergences.LOG_ZERO` where ``lam`` is 0. Of a hard token's loss,
    ``floor`` is the share of ``KL(yt||q)``; ``kept`` is ``1 - floor``. ``temperature`` is the same of all terms.
    """

    lam: Number
    beta: Number
    gamma: Number
    temperature: Number
    fraction: Number
    rest: Number
    alpha: Number
    log_lam: Number
    weight: Number = 1.0
    floor: Number = 0.0
    kept: Number = 1.0
