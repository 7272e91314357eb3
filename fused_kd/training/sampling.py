"""Batches of similar length, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class LengthGroupedEpochs(Sampler[int]):
    """Indices such that each run of ``batch_size`` has similar lengths; the runs come in random order.

    transformers' own sampler draws from the global generator, so a training resumed in its second epoch sees
    other batches than an uninterrupted one. This one is a function of ``(seed, epoch)``; the Trainer sets the
    epoch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Use the order of this epoch from the next ``iter`` on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        runs = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        # an incomplete run stays last, or it would break every batch after it
        last = [runs.pop()] if len(runs[-1]) < self.batch_size else []
        for run in torch.randperm(len(runs), generator=generator).tolist():
            yield from runs[run]
        for run in last:
            yield from run
