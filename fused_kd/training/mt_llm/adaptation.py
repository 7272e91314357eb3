"""Stage 1: the stacked model learns the plain LLM's sentences, from English text alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_kd.training.mt_llm.fitting import Pad, Rows
from fused_kd.training.mt_llm.stacked import StackedModel, mean_pool


class Adaptation(nn.Module):
    """Mean squared error between pooled states: of the LLM on its own tokens, adapters off, and of the stacked model.

    Args:
        stacked: its projection and adapters are trained.
        variance: of the LLM's pooled states, as of :func:`variance_of`; the logged ``fvu`` is MSE / variance.
    """

    def __init__(self, stacked: StackedModel, variance: float) -> None:
        super().__init__()
        if not variance > 0:
            raise ValueError(f"variance must be above 0, got {variance!r}: are all sentences the same?")
        self.stacked = stacked
        self.variance = variance

    def forward(self, text_ids: Tensor, text_mask: Tensor, llm_ids: Tensor, llm_mask: Tensor) -> dict[str, Tensor]:
        target = self.stacked.plain(llm_ids, llm_mask)
        mse = F.mse_loss(self.stacked(text_ids, text_mask), target)
        return {"loss": mse, "mse": mse.detach(), "fvu": mse.detach() / self.variance}


@dataclass(frozen=True)
class TextPairs:
    """Collates rows of ``text``: each sentence as ``NAME_ids`` and ``NAME_mask`` of several tokenizers.

    Args:
        encode: of each ``NAME``, from texts to token ids.
        pad: its padding tokens.
    """

    encode: Mapping[str, Callable[[list[str]], list[list[int]]]]
    pad: Pad

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        texts = [row["text"] for row in rows]
        columns = {f"{name}_ids": function(texts) for name, function in self.encode.items()}
        return self.pad([{name: ids[index] for name, ids in columns.items()} for index in range(len(texts))])


def variance_of(states: Tensor) -> float:
    """(N, H) states: the mean over dimensions of their variance over sentences."""
    return float(states.double().var(0, correction=0).mean())


def unexplained(predicted: Tensor, target: Tensor) -> dict[str, float]:
    """Of (N, H) states: ``mse``, and ``fvu``, the fraction of the target's variance that it makes up."""
    mse = float((predicted.double() - target.double()).square().mean())
    return {"mse": mse, "fvu": mse / variance_of(target)}


def fit_projection(
    stacked: StackedModel, rows: Rows, collate: Callable[..., dict[str, Tensor]], *, batch_size: int = 64
) -> dict[str, float]:
    """Set the projection by least squares, from sentences collated to ``text_ids`` and ``llm_ids``.

    It then maps a sentence's mean encoder state as near as a linear map can to the mean of the LLM's input embeddings;
    states and embeddings of one sentence do not align token by token, their means do.

    Returns:
        ``mse_before`` and ``mse_after``, of those means.
    """
    device = stacked.projection.weight.device
    table = stacked.llm.get_input_embeddings()
    sources, targets = [], []
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = {name: value.to(device) for name, value in collate(rows.rows[start : start + batch_size]).items()}
            states = stacked.encode(batch["text_ids"], batch["text_mask"])
            sources.append(mean_pool(states, batch["text_mask"]).cpu())
            targets.append(mean_pool(table(batch["llm_ids"]), batch["llm_mask"]).cpu())
    x, y = (torch.cat(parts).double().numpy() for parts in (sources, targets))
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    projection: Any = stacked.projection
    before = np.concatenate([projection.weight.detach().cpu().double().T, projection.bias.detach().cpu()[None]])
    # features of a layer norm are dependent but for float32's rounding, which must not be fitted
    solution = np.linalg.lstsq(x, y, rcond=1e-6)[0]
    with torch.no_grad():
        projection.weight.copy_(torch.from_numpy(solution[:-1].T))
        projection.bias.copy_(torch.from_numpy(solution[-1]))
    return {"mse_before": _mse(x, before, y), "mse_after": _mse(x, solution, y)}


def _mse(x: np.ndarray, solution: np.ndarray, y: np.ndarray) -> float:
    return float(np.square(x @ solution - y).mean())
