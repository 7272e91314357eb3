"""The registry of what is measured: fused_kd, plain PyTorch and other libraries, all on the same inputs.

Implementations stand in groups of one objective, each with its float64 truth. A peer stands in the group whose
objective it computes exactly with the settings here: temperature 1, no weight on the hard label beside a divergence, a
mean over valid tokens; ``beta`` means the same to all that take it, the teacher's share of the mixture. Everything else
is the library's default. Peers are imported when a step is built.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

import fused_kd as fk
from fused_kd.engines.dispatch import choose_engine
from fused_kd.objectives import Objective
from fused_kd.reference import reference_kd_loss
from fused_kd.rows.select import choose_backend, get_row

from .counts import count_fused, count_streaming, gemm_flops
from .problems import BETA, IGNORE, LAM, TOP_K, Inputs, Shape, cut_top_k

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
Build = Callable[[Inputs, float], Step]


def objective_of(group: str, gamma: float) -> Objective:
    """fused_kd's name for what a group computes; ``gamma`` is the threshold where it has one."""
    if group not in GROUPS:
        raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {group!r}")
    if group == SELF_EVOLUTION:
        return fk.SelfEvolution(lam=LAM, beta=BETA, gamma=gamma)
    return fk.SFT() if group == SFT else fk.GeneralizedJSD(beta=JSD_BETA if group == JSD else 0.0)


class Implementation(NamedTuple):
    """One way to compute a group's objective and its gradients in the student's hidden states and weight.

    ``build(inputs, gamma)`` makes the step. ``missing(device type)`` says in a line why it cannot run there, or None.
    ``note`` says what a reader must know beside the group's formula: what the teacher is, or what is left out.
    ``drops_ignored`` says that ignored tokens cost it less, and that labels may be on the host.
    ``prepare(inputs)`` is untimed set-up. ``counted`` is :meth:`work` where more is known than the FLOPs that none can
    spare.
    """

    group: str
    build: Build
    missing: Callable[[str], str | None] = lambda device: None
    note: str = ""
    drops_ignored: bool = False
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


# fused_kd: each objective, row and engine


def _ours(group: str, backend: str | None = None, engine: str | None = None, **changes: Any) -> Implementation:
    def build(inputs: Inputs, gamma: float) -> Step:
        criterion = fk.KDLoss(objective_of(group, gamma), backend=backend, engine=engine).to(inputs.hidden_s.device)
        student = fk.LMHead(inputs.hidden_s, inputs.weight_s)
        teacher = None if group == SFT else inputs.top_k or fk.LMHead(inputs.hidden_t, inputs.weight_t)
        return lambda labels: criterion(student, teacher, labels)

    def missing(device: str) -> str | None:
        try:
            choose_engine(engine, backend, objective_of(group, 0.0).spec, 0.0, torch.device(device))
            if backend in ("native", "cuda"):  # compiled at first use
                get_row(backend)
        except ValueError as error:
            return str(error).splitlines()[0]
        return None

    def count(shape: Shape, inputs: Inputs, hard: float) -> dict[str, Any]:
        if engine == "streaming":
            found = count_streaming(shape, inputs.hidden_s.dtype, hard=hard)
            return {"flops": gemm_flops(shape), "streamed_flops": found.flops, "workspace_bytes": found.plan.workspace}
        row = choose_backend(backend, inputs.labels.device)
        # All tokens of a JSD take the sums of a hard one; the others have no gate.
        share = {SELF_EVOLUTION: hard, JSD: 1.0}.get(group, 0.0)
        counts = count_fused(shape, inputs, share, row, teacher=group != SFT)
        if group == JSD:
            # Beside a hard token's logarithm and division, of t / m, those of q / m: again in the gradient's sweep,
            # where t / m is not read, if nothing is kept.
            more = 3 if row == "triton" else 2
            counts = counts._replace(row_specials=counts.row_specials + more * shape.N * shape.V)
        return counts._asdict()

    return Implementation(group, build, missing, drops_ignored=True, counted=count, **changes)


def _top_k(tail: str) -> Implementation:
    def prepare(inputs: Inputs) -> Inputs:
        return cut_top_k(inputs, TOP_K, tail)

    return _ours(SELF_EVOLUTION, note=f"teacher's top {TOP_K} entries, {tail}", prepare=prepare)


OURS = {SELF_EVOLUTION: "fused_kd", JSD: "fused_kd jsd", KL: "fused_kd kl", SFT: "fused_kd sft"}
"""The entry of each group that a user gets who chooses nothing."""

FUSED: dict[str, Implementation] = {
    **{name: _ours(group) for group, name in OURS.items()},
    **{f"fused_kd {row}": _ours(SELF_EVOLUTION, backend=row) for row in ("torch", "triton", "cuda", "native")},
    "fused_kd streaming": _ours(SELF_EVOLUTION, engine="streaming"),
    f"fused_kd top-k {TOP_K}": _top_k("renormalize"),
    f"fused_kd top-k {TOP_K} bucket": _top_k("bucket"),
}


# Plain PyTorch: each objective the way it is usually written, full logits, fp32 softmax and autograd. Hidden states
# (N, H), weights (V, H), labels (N,); the mean loss over valid tokens.


def self_evolution(
    hidden_s: Tensor,
    weight_s: Tensor,
    hidden_t: Tensor,
    weight_t: Tensor,
    labels: Tensor,
    gamma: Tensor,
    lam: float,
    beta: float,
) -> Tensor:
    """Self-Evolution KD with a threshold ``gamma`` (0-d)."""
    y = labels.clamp(min=0).unsqueeze(1)
    log_q = F.log_softmax(F.linear(hidden_s, weight_s).float(), dim=-1)
    with torch.no_grad():
        p = F.softmax(F.linear(hidden_t, weight_t).float(), dim=-1)
        target = (lam * p).scatter_add(1, y, torch.full_like(p[:, :1], 1.0 - lam))
    easy = F.kl_div(log_q, target, reduction="none").sum(-1)
    mixture = beta * log_q.exp() + (1.0 - beta) * target
    hard = F.kl_div(mixture.log(), target, reduction="none").sum(-1)
    return _mean(torch.where(easy.detach() > gamma, hard, easy), labels)


def generalized_jsd(
    hidden_s: Tensor, weight_s: Tensor, hidden_t: Tensor, weight_t: Tensor, labels: Tensor, beta: float
) -> Tensor:
    """``beta * KL(p||m) + (1 - beta) * KL(q||m)`` with ``m = beta * p + (1 - beta) * q``, 0 < beta < 1."""
    log_q = F.log_softmax(F.linear(hidden_s, weight_s).float(), dim=-1)
    with torch.no_grad():
        log_p = F.log_softmax(F.linear(hidden_t, weight_t).float(), dim=-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1.0 - beta))
    of_p = F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
    of_q = F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1)
    return _mean(beta * of_p + (1.0 - beta) * of_q, labels)


def forward_kl(hidden_s: Tensor, weight_s: Tensor, hidden_t: Tensor, weight_t: Tensor, labels: Tensor) -> Tensor:
    """``KL(p||q)``."""
    log_q = F.log_softmax(F.linear(hidden_s, weight_s).float(), dim=-1)
    with torch.no_grad():
        p = F.softmax(F.linear(hidden_t, weight_t).float(), dim=-1)
    return _mean(F.kl_div(log_q, p, reduction="none").sum(-1), labels)


def sft(hidden_s: Tensor, weight_s: Tensor, labels: Tensor) -> Tensor:
    """``-log q_y``."""
    return F.cross_entropy(F.linear(hidden_s, weight_s).float(), labels, ignore_index=IGNORE)


def _mean(loss: Tensor, labels: Tensor) -> Tensor:
    valid = labels != IGNORE
    return loss.masked_fill(~valid, 0.0).sum() / valid.sum()


def _plain(group: str, loss: Callable[..., Tensor], compiled: bool) -> Implementation:
    def build(inputs: Inputs, gamma: float) -> Step:
        call = torch.compile(loss, dynamic=False) if compiled else loss
        tensors: tuple[Tensor, ...] = inputs[:2] if group == SFT else inputs[:4]
        further: tuple[Any, ...] = (JSD_BETA,) if group == JSD else ()
        if group == SELF_EVOLUTION:
            further = (torch.tensor(gamma, device=inputs.hidden_s.device), LAM, BETA)
        return lambda labels: call(*tensors, labels, *further)

    return Implementation(group, build)


PLAIN: dict[str, Implementation] = {
    f"{'torch.compile' if compiled else 'eager'}{suffix}": _plain(group, loss, compiled)
    for group, suffix, loss in (
        (SELF_EVOLUTION, "", self_evolution),
        (JSD, " jsd", generalized_jsd),
        (KL, " kl", forward_kl),
        (SFT, " sft", sft),
    )
    for compiled in (False, True)
}


# Other libraries


def _liger_fused(beta: float, inputs: Inputs, gamma: float) -> Step:
    from liger_kernel.transformers import LigerFusedLinearJSD

    criterion = LigerFusedLinearJSD(jsd_beta=beta, ignore_index=IGNORE)
    return lambda labels: criterion(*inputs[:4], labels)


def _liger_chunked(beta: float, inputs: Inputs, gamma: float) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    criterion = LigerFusedLinearJSDLoss(0.0, 1.0, beta=beta, ignore_index=IGNORE)
    return lambda labels: criterion(*inputs[:4], labels)


def _liger_kl_div(inputs: Inputs, gamma: float) -> Step:
    from liger_kernel.transformers import LigerFusedLinearKLDivLoss

    criterion = LigerFusedLinearKLDivLoss(reduction="batchmean", ignore_index=IGNORE)
    hidden_s, weight_s, hidden_t, weight_t = inputs[:4]

    def step(labels: Tensor) -> Tensor:
        target = F.softmax(F.linear(hidden_t, weight_t), dim=-1, dtype=torch.float32)
        return criterion(hidden_s, weight_s, target, labels)

    return step


def _liger_ce(inputs: Inputs, gamma: float) -> Step:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    criterion = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE)
    return lambda labels: criterion(inputs.weight_s, inputs.hidden_s, labels)


def _trl(beta: float, inputs: Inputs, gamma: float) -> Step:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def step(labels: Tensor) -> Tensor:
        hidden_s, hidden_t = _valid_rows(labels, inputs.hidden_s, inputs.hidden_t)
        divergence, _ = ChunkedDivergenceFunction.apply(
            hidden_s, inputs.weight_s, None, hidden_t, inputs.weight_t, None, beta, 1.0
        )
        return divergence.mean()

    return step


def _fla_kl(inputs: Inputs, gamma: float) -> Step:
    from fla.modules.fused_kl_div import FusedKLDivLoss

    criterion = FusedKLDivLoss()

    def step(labels: Tensor) -> Tensor:
        hidden_s, hidden_t = _valid_rows(labels, inputs.hidden_s, inputs.hidden_t)
        return criterion(hidden_s, hidden_t, inputs.weight_s, inputs.weight_t)

    return step


def _valid_rows(labels: Tensor, *hidden: Tensor) -> tuple[Tensor, ...]:
    """For what takes no labels: the hidden states of valid tokens, and those given if all are valid."""
    index = (labels != IGNORE).nonzero().squeeze(1)
    if len(index) == len(labels):
        return hidden
    return tuple(x.index_select(0, index.to(x.device)) for x in hidden)


def _cut_cross_entropy(impl: str, inputs: Inputs, gamma: float) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    hidden, weight = inputs[:2]
    return lambda labels: linear_cross_entropy(hidden, weight, labels.to(hidden.device), ignore_index=IGNORE, impl=impl)


def _torch(chunked: bool, inputs: Inputs, gamma: float) -> Step:
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return lambda labels: F.linear_cross_entropy(*inputs[:2], labels, ignore_index=IGNORE, options=options)


def _torch_missing(device: str) -> str | None:
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no F.linear_cross_entropy with options, 2.13 has"


# The oldest that the adapters are known to fit: those of the extra "peers".
VERSIONS = {"liger-kernel": "0.8.5", "trl": "1.16", "cut-cross-entropy": "25.1", "fla-core": "0.6"}


def _needs(package: str, module: str, cuda: bool = False) -> Callable[[str], str | None]:
    """``missing`` of an entry that imports ``module`` of a package of :data:`VERSIONS`; nothing is imported."""

    def missing(device: str) -> str | None:
        if cuda and device != "cuda":
            return f"{package} needs an NVIDIA GPU here"
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed: pip install 'fused_kd[peers]'"
        if TorchVersion(version) < VERSIONS[package]:
            return f"needs {package} >= {VERSIONS[package]}, found {version}"
        return None if _exists(module) else f"{package} {version} has no {module}"

    return missing


def _exists(module: str) -> bool:
    """Whether the file is there."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    roots = [] if spec is None else spec.submodule_search_locations or []
    return any(Path(root, *rest).is_dir() or Path(root, *rest).with_suffix(".py").is_file() for root in roots)


_LIGER = _needs("liger-kernel", "liger_kernel.chunked_loss")
_LIGER_GPU = _needs("liger-kernel", "liger_kernel.transformers.fused_linear_kl_div", cuda=True)
_TRL = _needs("trl", "trl.kernels.chunked_divergence")
_FLA = _needs("fla-core", "fla.modules.fused_kl_div", cuda=True)
_CCE = _needs("cut-cross-entropy", "cut_cross_entropy")
_CCE_GPU = _needs("cut-cross-entropy", "cut_cross_entropy", cuda=True)

PEERS: dict[str, Implementation] = {
    "liger fused jsd": Implementation(JSD, partial(_liger_fused, JSD_BETA), _LIGER_GPU),
    "liger chunked jsd": Implementation(JSD, partial(_liger_chunked, JSD_BETA), _LIGER),
    "trl chunked jsd": Implementation(JSD, partial(_trl, JSD_BETA), _TRL, drops_ignored=True),
    "liger fused kl": Implementation(KL, partial(_liger_fused, 0.0), _LIGER_GPU),
    "liger chunked kl": Implementation(KL, partial(_liger_chunked, 0.0), _LIGER),
    "liger kl div": Implementation(
        KL, _liger_kl_div, _LIGER_GPU, "takes the teacher's probabilities, which are made first, N x V in fp32"
    ),
    "trl chunked kl": Implementation(KL, partial(_trl, 0.0), _TRL, drops_ignored=True),
    "fla kl": Implementation(KL, _fla_kl, _FLA, drops_ignored=True),
    "torch linear_cross_entropy": Implementation(SFT, partial(_torch, False), _torch_missing, "full logits"),
    "torch linear_cross_entropy chunked": Implementation(SFT, partial(_torch, True), _torch_missing),
    "liger ce": Implementation(SFT, _liger_ce, _LIGER_GPU),
    "cce": Implementation(
        SFT,
        partial(_cut_cross_entropy, "cce"),
        _CCE_GPU,
        "skips gradients far below rounding (its default); no fp32",
        drops_ignored=True,
    ),
    "cce torch_compile": Implementation(
        SFT,
        partial(_cut_cross_entropy, "torch_compile"),
        _CCE,
        "full logits, compiled",
        drops_ignored=True,
    ),
}

IMPLEMENTATIONS: dict[str, Implementation] = {**FUSED, **PLAIN, **PEERS}
