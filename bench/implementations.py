"""The registry of what is measured: fused_kd, plain PyTorch and the peers, all on the same inputs."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.engine import chunked
from fused_kd.reference import reference_kd_loss
from fused_kd.rows import choose_backend

from .counts import count_fused, gemm_flops
from .eager import self_evolution
from .inputs import BETA, LAM, Inputs, cut_top_k
from .shapes import Shape

TOP_K = 64

Step = Callable[[Tensor], Tensor]
"""Labels (N,) to the scalar loss; the caller runs its backward."""


Truth = Callable[[Tensor, Any, Tensor, float], Tensor]


class Implementation(NamedTuple):
    """``build(inputs, gamma)`` makes the step; ``truth(z, teacher, labels, gamma)`` its per-token losses in
    float64, from the teacher's logits or lists.

    ``objective`` names what is computed. ``missing(device type)`` says why it cannot run there, or None.
    ``drops_ignored`` says that ignored tokens cost it less, ``compiles`` that it runs graphs of torch.compile.
    ``prepare(inputs)`` is untimed set-up. ``work(shape, inputs, hard fraction)`` counts what a step
    does: all fields of :class:`bench.counts.Counts`, or for others than fused_kd the FLOPs that none can spare.
    """

    objective: str
    build: Callable[[Inputs, float], Step]
    truth: Truth
    missing: Callable[[str], str | None]
    drops_ignored: bool = False
    compiles: bool = False
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs
    work: Callable[[Shape, Inputs, float], dict[str, Any]] = lambda shape, *_: {"flops": gemm_flops(shape)}


def _self_evolution_truth(z: Tensor, teacher: Tensor | fk.TopK, labels: Tensor, gamma: float) -> Tensor:
    objective = fk.SelfEvolution(lam=LAM, beta=BETA, gamma=gamma)
    return reference_kd_loss(z, teacher, labels, objective, reduction="none").loss


def _jsd_truth(ce_share: float, beta: float) -> Truth:
    """``ce_share * CE + (1 - ce_share) * (beta * KL(p||m) + (1 - beta) * KL(q||m))``; beta 0 is KL(p||q)."""

    def truth(z: Tensor, z_t: Tensor, labels: Tensor, gamma: float) -> Tensor:
        log_q, log_p = z.log_softmax(-1), z_t.log_softmax(-1)
        q, p = log_q.exp(), log_p.exp()
        if beta == 0.0:
            divergence = (p * (log_p - log_q)).sum(-1)
        else:
            log_m = (beta * p + (1.0 - beta) * q).log()
            divergence = (beta * p * (log_p - log_m) + (1.0 - beta) * q * (log_q - log_m)).sum(-1)
        ce = -log_q.gather(-1, labels[:, None]).squeeze(-1)
        return ce_share * ce + (1.0 - ce_share) * divergence

    return truth


def _fused(backend: str | None) -> Callable[[Inputs, float], Step]:
    def build(inputs: Inputs, gamma: float) -> Step:
        objective = fk.SelfEvolution(lam=LAM, beta=BETA, gamma=gamma)
        criterion = fk.KDLoss(objective, backend=backend).to(inputs.hidden_s.device)
        student = fk.LMHead(inputs.hidden_s, inputs.weight_s)
        teacher = inputs.top_k or fk.LMHead(inputs.hidden_t, inputs.weight_t)
        return lambda labels: criterion(student, teacher, labels)

    return build


def _fused_work(backend: str | None) -> Callable[[Shape, Inputs, float], dict[str, Any]]:
    def count(shape: Shape, inputs: Inputs, hard: float) -> dict[str, Any]:
        return count_fused(shape, inputs, hard, choose_backend(backend, inputs.labels.device))._asdict()

    return count


def _top_k(tail: str) -> Implementation:
    return Implementation(
        f"{_SELF_EVOLUTION}, teacher's top {TOP_K} entries, {tail}", _fused(None), _self_evolution_truth,
        _always,
        drops_ignored=True, prepare=lambda inputs: cut_top_k(inputs, TOP_K, tail), work=_fused_work(None),
    )  # fmt: skip


def _eager(compiled: bool) -> Callable[[Inputs, float], Step]:
    def build(inputs: Inputs, gamma: float) -> Step:
        loss = torch.compile(self_evolution, dynamic=False) if compiled else self_evolution
        threshold = torch.tensor(gamma, device=inputs.hidden_s.device)
        return lambda labels: loss(*inputs[:4], labels, threshold, LAM, BETA)

    return build


def _liger_fused_jsd(inputs: Inputs, gamma: float) -> Step:
    from liger_kernel.transformers import LigerFusedLinearJSD

    criterion = LigerFusedLinearJSD(jsd_beta=0.5)
    return lambda labels: criterion(*inputs[:4], labels)


def _liger_chunked_jsd(inputs: Inputs, gamma: float) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    criterion = LigerFusedLinearJSDLoss(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5)
    return lambda labels: criterion(*inputs[:4], labels)


def _trl(beta: float) -> Callable[[Inputs, float], Step]:
    def build(inputs: Inputs, gamma: float) -> Step:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        hidden_s, weight_s, hidden_t, weight_t = inputs[:4]

        def step(labels: Tensor) -> Tensor:
            divergence, _ = ChunkedDivergenceFunction.apply(
                hidden_s, weight_s, None, hidden_t, weight_t, None, beta, 1.0
            )
            return divergence.mean()

        return step

    return build


def _always(device: str) -> str | None:
    return None


def _needs(module: str, package: str, cuda: bool = False) -> Callable[[str], str | None]:
    def missing(device: str) -> str | None:
        if cuda and device != "cuda":
            return f"{package} needs an NVIDIA GPU here"
        return None if _exists(module) else f"{module} not found: {package} is not installed or too old"

    return missing


def _exists(module: str) -> bool:
    """Whether the file is there; nothing is imported."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    roots = [] if spec is None else spec.submodule_search_locations or []
    return any(Path(root, *rest).is_dir() or Path(root, *rest).with_suffix(".py").is_file() for root in roots)


_SELF_EVOLUTION = f"Self-Evolution (lam {LAM}, beta {BETA})"
_LIGER, _TRL = "liger-kernel", "trl >= 1.16"
_TRL_MODULE = "trl.kernels.chunked_divergence"

IMPLEMENTATIONS: dict[str, Implementation] = {
    "fused_kd": Implementation(
        _SELF_EVOLUTION, _fused(None), _self_evolution_truth, _always, drops_ignored=True, work=_fused_work(None),
    ),
    "fused_kd torch": Implementation(
        _SELF_EVOLUTION, _fused("torch"), _self_evolution_truth, _always, work=_fused_work("torch"),
    ),
    f"fused_kd top-k {TOP_K}": _top_k("renormalize"),
    f"fused_kd top-k {TOP_K} bucket": _top_k("bucket"),
    "eager": Implementation(_SELF_EVOLUTION, _eager(False), _self_evolution_truth, _always),
    "torch.compile": Implementation(_SELF_EVOLUTION, _eager(True), _self_evolution_truth, _always, compiles=True),
    "liger fused jsd": Implementation(
        "nearest: generalized JSD(0.5)", _liger_fused_jsd, _jsd_truth(0.0, 0.5),
        _needs("liger_kernel.transformers", _LIGER, cuda=True),
    ),
    "liger chunked jsd": Implementation(
        "nearest: 0.5 CE + 0.5 generalized JSD(0.5)", _liger_chunked_jsd, _jsd_truth(0.5, 0.5),
        _needs("liger_kernel.chunked_loss", _LIGER), compiles=True,
    ),
    "trl chunked jsd": Implementation(
        "nearest: generalized JSD(0.5)", _trl(0.5), _jsd_truth(0.0, 0.5), _needs(_TRL_MODULE, _TRL),
    ),
    "trl chunked kl": Implementation(
        "nearest: forward KL", _trl(0.0), _jsd_truth(0.0, 0.0), _needs(_TRL_MODULE, _TRL),
    ),
}  # fmt: skip


@contextlib.contextmanager
def preferred_chunk(chunk: int | None) -> Iterator[None]:
    """fused_kd with another preferred chunk of tokens than the planner's; None leaves it alone."""
    if chunk is None:
        yield
        return
    with mock.patch.object(chunked, "preferred_chunk", lambda *_: chunk):
        yield
