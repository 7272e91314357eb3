"""Other libraries' entries in the registry, imported when a step is built.

Each stands in the group whose objective it computes exactly with the settings here: temperature 1, no weight on the
hard label beside a divergence, and a mean over valid tokens; ``beta`` means the same to all that take it, the teacher's
share of the mixture. Everything else is the library's default.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

from .implementation import JSD, JSD_BETA, KL, SFT, Implementation, Step
from .inputs import IGNORE, Inputs

# The oldest that the adapters are known to fit: those of the extra "peers".
VERSIONS = {"liger-kernel": "0.8.5", "trl": "1.16", "cut-cross-entropy": "25.1", "fla-core": "0.6"}


def _liger_fused(beta: float) -> Callable[[Inputs, float], Step]:
    def build(inputs: Inputs, gamma: float) -> Step:
        from liger_kernel.transformers import LigerFusedLinearJSD

        criterion = LigerFusedLinearJSD(jsd_beta=beta, ignore_index=IGNORE)
        return lambda labels: criterion(*inputs[:4], labels)

    return build


def _liger_chunked(beta: float) -> Callable[[Inputs, float], Step]:
    def build(inputs: Inputs, gamma: float) -> Step:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        criterion = LigerFusedLinearJSDLoss(0.0, 1.0, beta=beta, ignore_index=IGNORE)
        return lambda labels: criterion(*inputs[:4], labels)

    return build


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


def _trl(beta: float) -> Callable[[Inputs, float], Step]:
    def build(inputs: Inputs, gamma: float) -> Step:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        def step(labels: Tensor) -> Tensor:
            hidden_s, hidden_t = _valid_rows(labels, inputs.hidden_s, inputs.hidden_t)
            divergence, _ = ChunkedDivergenceFunction.apply(
                hidden_s, inputs.weight_s, None, hidden_t, inputs.weight_t, None, beta, 1.0
            )
            return divergence.mean()

        return step

    return build


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


def _cut_cross_entropy(impl: str) -> Callable[[Inputs, float], Step]:
    def build(inputs: Inputs, gamma: float) -> Step:
        from cut_cross_entropy import linear_cross_entropy

        hidden, weight = inputs[:2]
        return lambda labels: linear_cross_entropy(
            hidden, weight, labels.to(hidden.device), ignore_index=IGNORE, impl=impl
        )

    return build


def _torch(chunked: bool) -> Callable[[Inputs, float], Step]:
    def build(inputs: Inputs, gamma: float) -> Step:
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        return lambda labels: F.linear_cross_entropy(*inputs[:2], labels, ignore_index=IGNORE, options=options)

    return build


def _torch_missing(device: str) -> str | None:
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no F.linear_cross_entropy with options, 2.13 has"


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
_CCE = "cut_cross_entropy"

PEERS: dict[str, Implementation] = {
    "liger fused jsd": Implementation(JSD, _liger_fused(JSD_BETA), _LIGER_GPU),
    "liger chunked jsd": Implementation(JSD, _liger_chunked(JSD_BETA), _LIGER, compiles=True),
    "trl chunked jsd": Implementation(JSD, _trl(JSD_BETA), _TRL, drops_ignored=True),
    "liger fused kl": Implementation(KL, _liger_fused(0.0), _LIGER_GPU),
    "liger chunked kl": Implementation(KL, _liger_chunked(0.0), _LIGER, compiles=True),
    "liger kl div": Implementation(
        KL, _liger_kl_div, _LIGER_GPU, "takes the teacher's probabilities, which are made first, N x V in fp32",
    ),
    "trl chunked kl": Implementation(KL, _trl(0.0), _TRL, drops_ignored=True),
    "fla kl": Implementation(
        KL, _fla_kl, _needs("fla-core", "fla.modules.fused_kl_div", cuda=True), drops_ignored=True,
    ),
    "torch linear_cross_entropy": Implementation(SFT, _torch(False), _torch_missing, "full logits"),
    "torch linear_cross_entropy chunked": Implementation(SFT, _torch(True), _torch_missing),
    "liger ce": Implementation(SFT, _liger_ce, _LIGER_GPU),
    "cce": Implementation(
        SFT, _cut_cross_entropy("cce"), _needs("cut-cross-entropy", _CCE, cuda=True),
        "skips gradients far below rounding (its default); no fp32",
        drops_ignored=True, compiles=True,
    ),
    "cce torch_compile": Implementation(
        SFT, _cut_cross_entropy("torch_compile"), _needs("cut-cross-entropy", _CCE), "full logits, compiled",
        drops_ignored=True, compiles=True,
    ),
}  # fmt: skip
