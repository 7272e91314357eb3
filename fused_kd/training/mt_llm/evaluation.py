"""Sentences embedded, classified and found again in another language."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fused_kd.training.mt_llm.fitting import Pad


def embed(
    function: Callable[[Tensor, Tensor], Tensor],
    texts: Sequence[Sequence[int]],
    pad_id: int,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """``function(text_ids, text_mask)`` of every text, in their order, on the CPU: (N, ...) float32.

    Texts are batched by length. What belongs to eval mode is the caller's business.
    """
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    pad, parts = Pad({"text": pad_id}), []
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            batch = pad([{"text_ids": texts[index]} for index in order[start : start + batch_size]])
            parts.append(function(batch["text_ids"].to(device), batch["text_mask"].to(device)).float().cpu())
    return torch.cat(parts)[torch.tensor(order).argsort()]


def retrieval_at_1(queries: Tensor, candidates: Tensor) -> float:
    """Share of the (N, H) queries whose nearest candidate by cosine is the one in their own row.

    Raises:
        ValueError: unequal shapes.
    """
    if queries.shape != candidates.shape:
        raise ValueError(f"queries {tuple(queries.shape)} and candidates {tuple(candidates.shape)} must be pairs")
    unit = [torch.nn.functional.normalize(states.double(), dim=1) for states in (queries, candidates)]
    nearest = (unit[0] @ unit[1].T).argmax(1)
    return float((nearest == torch.arange(len(queries))).double().mean())


def accuracies(predicted: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
    """``accuracy``, and ``balanced``, the mean over the labels' classes of the share that is right."""
    p, y = np.asarray(predicted), np.asarray(labels)
    if p.shape != y.shape or not len(y):
        raise ValueError(f"predicted {p.shape} and labels {y.shape} must be as many, and some")
    return {
        "accuracy": float((p == y).mean()),
        "balanced": float(np.mean([(p[y == label] == label).mean() for label in np.unique(y)])),
    }
