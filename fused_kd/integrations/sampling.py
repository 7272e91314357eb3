"""Orders of rows that depend on the seed and the epoch alone, and rows without loss that fill the last batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, cast

import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from fused_kd.integrations.labels import LABEL_PAD, count_targets
from fused_kd.integrations.teacher_columns import OTHER_LABELS, is_per_target


class _Epochs(Sampler[int]):
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Use the order of this epoch from the next ``iter`` on."""
        self.epoch = epoch

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)


class ShuffledEpochs(_Epochs):
    """``count`` indices in random order, a function of ``(seed, epoch)``: the same on every rank."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__(seed)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.count, generator=self.generator()).tolist()


class LengthGroupedEpochs(_Epochs):
    """Indices such that each run of ``batch_size`` has similar lengths; the runs come in random order.

    transformers' own sampler draws from the global generator, so a training resumed in its second epoch sees
    other batches than an uninterrupted one. This one is a function of ``(seed, epoch)``; the Trainer sets the
    epoch. ``batch_size`` counts the rows of an optimizer step, those of all processes.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        super().__init__(seed)
        self.lengths = list(lengths)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = self.generator()
        order = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        runs = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        # an incomplete run stays last, or it would break every batch after it
        last = [runs.pop()] if len(runs[-1]) < self.batch_size else []
        for run in torch.randperm(len(runs), generator=generator).tolist():
            yield from runs[run]
        for run in last:
            yield from run


class PaddedSampler(Sampler[int]):
    """The indices of ``sampler``, then as many past the end as make a multiple of ``multiple``.

    With them every process gets as many batches, and batches as large, as any other. An index ``count + i``, for
    ``count`` rows, means row ``i`` without loss: see :class:`MaskedTail`.
    """

    def __init__(self, sampler: Sampler[int], multiple: int) -> None:
        self.sampler = sampler
        self.multiple = multiple
        self.count = len(sampler)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the inner sampler, where it has epochs."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-self.count // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        last = 0
        for last in self.sampler:
            yield last
        # the last row again, so that the padding is as long as its batch
        yield from [self.count + last] * (len(self) - self.count)


class MaskedTail(Dataset[Mapping[str, Any]]):
    """A data set whose index ``count + i`` gives row ``i`` with every label -100: no loss, no token counted.

    What a cached teacher says of each label with loss, and the labels of a prompt of its own, go with them.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.count = len(rows)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if index < self.count:
            return cast(Mapping[str, Any], self.rows[index])
        row = dict(self.rows[index - self.count])
        labels = torch.as_tensor(row["labels"])
        for name in filter(is_per_target, row):
            if len(row[name]) == count_targets(labels) < len(labels):
                row[name] = row[name][:0]
        for name in {"labels", OTHER_LABELS} & row.keys():
            masked = torch.full_like(torch.as_tensor(row[name]), LABEL_PAD)
            row[name] = masked if isinstance(row[name], torch.Tensor) else masked.tolist()
        return row


def lengths_of(dataset: Any) -> list[int]:
    """Return how many tokens each row has: what the data set says, else they are counted. No cache is read for that."""
    inner = dataset.rows if isinstance(dataset, MaskedTail) else dataset
    if hasattr(inner, "lengths"):
        return [int(length) for length in inner.lengths]
    return [len(inner[index]["input_ids"]) for index in range(len(inner))]


def has_rows(dataset: Any) -> bool:
    """Whether the data set has a length and rows by index."""
    return isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")
