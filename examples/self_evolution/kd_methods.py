"""The methods that this folder's recipes compare, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fused_kd.training.specs import parse_objective
from fused_kd.training.trainer import BetaSchedule


@dataclass(frozen=True)
class Method:
    """How a student is distilled."""

    label: str  # the name shown
    objective: str  # as of parse_objective
    schedule: BetaSchedule | None = None  # moves β during the training
    best: bool = False  # keep the checkpoint with the least validation loss, not the last one
    gamma_quantile: float | None = None  # Γ: this quantile of the tokens' difficulties before the first step
    cache_k: int | None = None  # the teacher is a cache of its k largest log-probabilities

    @property
    def loss(self) -> Any:
        return parse_objective(self.objective).objective

    @property
    def needs_teacher(self) -> bool:
        return self.loss.spec.needs_teacher


OURS = "self_evolution:lam=0.5,beta=0.5,gamma=0.4"
METHODS = {
    "sft": Method("SFT", "sft", best=True),
    "forward_kd": Method("ForwardKD", "forward_kd:lam=0.5"),
    "reverse_kd": Method("ReverseKD", "reverse_kd:lam=0.5"),
    "no_evo": Method("NoEvo", "no_evo:lam=0.5"),
    "skew": Method("Skew", "skew:lam=0.5,beta=0.5"),
    "skew_teacher": Method("SkewTeacher", "skew_teacher:lam=0.5,beta=0.9"),
    "self_evolution": Method("SelfEvolution", OURS),
    "self_evolution_top_k": Method("SelfEvolutionTopK", "self_evolution_top_k:lam=0.5,beta=0.5,fraction=0.5"),
    # the target's share 1 - β goes from 0.5 to 0
    "progressive_beta": Method("Progressive β", OURS, BetaSchedule(0.5, 1.0, fraction=1.0)),
    "self_evolution_quantile": Method("SelfEvolution, Γ by quantile", OURS, gamma_quantile=0.75),
    "forward_kd_cached": Method("ForwardKD, cached k=64", "forward_kd:lam=0.5", cache_k=64),
    "self_evolution_cached": Method("SelfEvolution, cached k=64", OURS, cache_k=64),
    # for students that are not trained yet: a share of KL under hard tokens, or NoEvo first
    "self_evolution_floor": Method("SelfEvolution, floor 0.3", f"{OURS},floor=0.3"),
    "self_evolution_linear_warm_up": Method("SelfEvolution, linear β warm-up", OURS, BetaSchedule(1.0, 0.5)),
    "self_evolution_warm_up": Method("SelfEvolution, β warm-up", OURS, BetaSchedule(1.0, 0.5, 0.25, hold=0.5)),
}
# of the plane of regimes: every student takes its last step, SFT's too
REGIME_METHODS = {
    "sft": Method("SFT", "sft"),
    **{name: METHODS[name] for name in ("forward_kd", "reverse_kd", "skew", "skew_teacher", "self_evolution")},
    "floor_0.1": Method("SelfEvolution, floor 0.1", f"{OURS},floor=0.1"),
    "floor_0.3": METHODS["self_evolution_floor"],
    "floor_0.5": Method("SelfEvolution, floor 0.5", f"{OURS},floor=0.5"),
    "jsd": Method("JSD", "generalized_jsd:beta=0.5"),
}
