"""How a cache stores drawn lists: of a token the ids of its k largest entries and of each of its n draws, equal ones
again, and the log-probabilities of the k alone.

A draw has an n-th of what the k largest leave of 1, so nothing is stored of it but its id. One that repeats an entry
listed before it stands for none: what has nothing left has no draws.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fused_kd.draws import merged
from fused_kd.engines.drawing import Drawn
from fused_kd.training.codes import decode, decode_ids, encode, encode_ids, mass


def ids_of(made: Drawn) -> Tensor:
    """Return the ids (N, k + n) int64 to be stored; those of a token without any entry are -1, which no cache takes."""
    ids = torch.cat([made.indices, made.draws], 1)
    return ids.where(ids >= 0, ids[:, :1])


def encode_draws(log_probs: np.ndarray, ids: np.ndarray, dtype: str, vocab_size: int) -> dict[str, np.ndarray]:
    """The arrays that stand for drawn lists: those of :func:`fused_kd.training.codes.encode_ids` for ids (N, k + n) of
    :func:`ids_of`, and of :func:`fused_kd.training.codes.encode` for log-probabilities (N, k), if there are any.

    Raises:
        ValueError: as these.
    """
    arrays = encode_ids(ids, vocab_size)
    return {**arrays, **encode(log_probs, dtype)} if log_probs.shape[1] else arrays


def decode_draws(arrays: Mapping[str, np.ndarray], k: int, n: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """(N, k + n) float32 log-probabilities and int64 ids, as of :func:`fused_kd.sample_of`."""
    ids = decode_ids(arrays, k + n, vocab_size)
    log_probs = decode(arrays) if k else np.zeros((len(ids), 0), dtype=np.float32)
    largest, draws = ids[:, :k], ids[:, k:]
    none = (draws[:, :, None] == largest[:, None, :]).any((1, 2))
    with np.errstate(divide="ignore"):
        rest = np.log(np.maximum(1 - mass(log_probs), 0))
    parts = (log_probs, largest, np.where(none, -np.inf, rest).astype(np.float32), draws)
    found, found_ids = merged(Drawn(*map(torch.from_numpy, parts)))
    return found, found_ids.masked_fill(found == -torch.inf, -1)
