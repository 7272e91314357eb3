"""What a trainer does with rows that it is given no collator for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fused_kd.integrations.bodies import without_adapters
from fused_kd.integrations.sampling import has_rows
from fused_kd.training.collate import Collator, padding_id

_READ = {"input_ids", "labels", "attention_mask"}
_TOKENIZED = (
    "fused_kd.training.load_rows and tokenize_pairs make such rows of texts and of chats; for rows that are tokenized "
    "otherwise give a data_collator that adds what is missing (DataCollatorForLanguageModeling(tokenizer, mlm=False) "
    "makes labels of input_ids)"
)


@dataclass(frozen=True)
class DefaultCollator:
    """:class:`Collator`, for rows of which it drops nothing that the model reads.

    Args:
        pad_token_id: as there.
        arguments: names that the model's forward takes.
    """

    pad_token_id: int
    arguments: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: Any, processing_class: Any) -> DefaultCollator:
        """For a model, or None, and the tokenizer or processor of a trainer."""
        forward = getattr(without_adapters(model), "forward", None)
        names = () if forward is None else inspect.signature(forward).parameters
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        return cls(padding_id(tokenizer), frozenset(names) - _READ)

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        for row in rows:
            dropped = sorted(self.arguments.intersection(row)) if isinstance(row, Mapping) else ()
            if dropped:
                raise ValueError(
                    f"data_collator must be given for rows with {', '.join(dropped)}: the default one pads input_ids "
                    "and labels alone"
                )
        return Collator(self.pad_token_id)(rows)


def check_rows_of(trainer_args: Mapping[str, Any]) -> None:
    """Raise ``TypeError`` or ``ValueError`` where the default collator would get rows that are not tokenized.

    Args:
        trainer_args: those of a trainer; where there is a collator among them the rows are its own.
    """
    if trainer_args.get("data_collator") is not None:
        return
    for name, dataset in _datasets(trainer_args):
        if not has_rows(dataset) or not len(dataset):
            continue
        row = dataset[0]
        if not isinstance(row, Mapping):
            raise TypeError(f"{name} must have dicts of input_ids and labels as rows, got {type(row).__name__}")
        if any(key not in row for key in ("input_ids", "labels")):
            raise ValueError(
                f"{name} must have input_ids and labels in its rows, got {', '.join(map(str, row))}: {_TOKENIZED}"
            )


def _datasets(trainer_args: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "train_dataset", trainer_args.get("train_dataset")
    evaluated = trainer_args.get("eval_dataset")
    if isinstance(evaluated, dict):
        yield from ((f"eval_dataset[{name!r}]", each) for name, each in evaluated.items())
    else:
        yield "eval_dataset", evaluated
