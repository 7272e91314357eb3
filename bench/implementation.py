"""What an implementation is, and what it computes: groups of one objective, each with its float64 truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

import fused_kd as fk
from fused_kd.objectives import Objective
from fused_kd.reference import reference_kd_loss

from .counts import gemm_flops
from .inputs import BETA, LAM, Inputs
from .shapes import Shape

JSD_BETA = 0.5

SELF_EVOLUTION, JSD, KL, SFT = "self-evolution", "jsd", "kl", "sft"
GROUPS = {
    SELF_EVOLUTION: f"Self-Evolution (lam {LAM}, beta {BETA})",
    JSD: f"generalized JSD({JSD_BETA})",
    KL: "forward KL(p||q)",
    SFT: "cross-entropy with the label",
}
"""What is computed, teacher ``p`` and student ``q``: implementations are compared within a group."""

Step = Callable[[Tensor], Tensor]
"""Labels (N,) to the scalar loss, a mean over valid tokens; the caller runs its backward."""


def objective_of(group: str, gamma: float) -> Objective:
    """fused_kd's name for what a group computes; ``gamma`` is the threshold where it has one."""
    if group not in GROUPS:
        raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {group!r}")
    if group == SELF_EVOLUTION:
        return fk.SelfEvolution(lam=LAM, beta=BETA, gamma=gamma)
    return fk.SFT() if group == SFT else fk.GeneralizedJSD(beta=JSD_BETA if group == JSD else 0.0)


def always(device: str) -> str | None:
    """``missing`` of what runs anywhere."""
    return None


class Implementation(NamedTuple):
    """One way to compute a group's objective and its gradients in the student's hidden states and weight.

    ``build(inputs, gamma)`` makes the step. ``missing(device type)`` says in a line why it cannot run there, or None.
    ``note`` says what a reader must know beside the group's formula: what the teacher is, what is left out, or, where
    the group's objective is only the nearest to its own, "nearest: " and the difference.
    ``drops_ignored`` says that ignored tokens cost it less, and that labels may be on the host; ``compiles`` that it
    runs graphs of torch.compile. ``prepare(inputs)`` is untimed set-up. ``counted`` is :meth:`work` where more is
    known than the FLOPs that none can spare.
    """

    group: str
    build: Callable[[Inputs, float], Step]
    missing: Callable[[str], str | None] = always
    note: str = ""
    drops_ignored: bool = False
    compiles: bool = False
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs
    counted: Callable[[Shape, Inputs, float], dict[str, Any]] | None = None

    @property
    def objective(self) -> str:
        """The group's formula and the note."""
        return GROUPS[self.group] + (f", {self.note}" if self.note else "")

    @property
    def teacher(self) -> bool:
        """Whether there is one: without, a step's GEMMs are the student's three."""
        return self.group != SFT

    def truth(self, z: Tensor, teacher: Tensor | fk.TopK, labels: Tensor, gamma: float) -> Tensor:
        """Losses (N,) float64 of logits (N, V) and the teacher's, or its lists; 0 where ignored."""
        given = teacher if self.teacher else None
        return reference_kd_loss(z, given, labels, objective_of(self.group, gamma), reduction="none").loss

    def work(self, shape: Shape, inputs: Inputs, hard: float) -> dict[str, Any]:
        """What a step does, with a fraction ``hard`` of the tokens hard: all fields of :class:`bench.counts.Counts`, or
        the FLOPs that none can spare."""
        if self.counted is not None:
            return self.counted(shape, inputs, hard)
        return {"flops": gemm_flops(shape, top_k=not self.teacher)}
