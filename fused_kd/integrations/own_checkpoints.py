"""Averages of the student that follow a Trainer's optimizer steps, and lie in its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from fused_kd.integrations.distributed import shards_weights
from fused_kd.integrations.own import MovingAverage

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # the class that the mixin is put before brings its own

AVERAGE = "own_teacher.safetensors"


class KeepsAverages(Trainer):
    """A part of :class:`fused_kd.integrations.mixin.KDLossMixin` and of TRL's trainers."""

    _averages: tuple[MovingAverage, ...] = ()

    def keep_averages(self, teachers: Iterable[Any]) -> None:
        """From now on each :class:`MovingAverage` among ``teachers`` follows the training; call it once.

        Raises:
            ValueError: FSDP2 or ZeRO-3, where a process has only its part of the weights.
        """
        self._averages = tuple(each for each in teachers if isinstance(each, MovingAverage))
        if not self._averages:
            return
        if shards_weights(self.accelerator):
            raise ValueError(
                f"decay of OwnTeacher must be None under FSDP2 and ZeRO-3, got {self._averages[0].decay}: each process "
                "has a part of the weights alone; train with DDP or ZeRO-2, or adapters with OwnTeacher(adapters=False)"
            )
        self.add_callback(_Follow(self._averages))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; a checkpoint gets the averages too."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self.args.should_save:
            for number, average in enumerate(self._averages):
                save_average(average, Path(output_dir) / _name(number))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            for number, average in enumerate(self._averages):
                load_average(average, Path(checkpoint) / _name(number))


class _Follow(TrainerCallback):
    """One step of each average after one of the optimizer."""

    def __init__(self, averages: Iterable[MovingAverage]) -> None:
        self.averages = averages

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for average in self.averages:
            average.follow()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for average in self.averages:
            average.update()


def save_average(average: MovingAverage, path: Path) -> None:
    """Write an average to a safetensors file, with the names of the student's parameters; at once or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: value.contiguous() for name, value in average.averages().items()}, partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_average(average: MovingAverage, path: Path) -> None:
    """Go on from a file of :func:`save_average`.

    Raises:
        ValueError: there is none that can be read, or it is of other parameters.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): without it the average cannot go on. Start anew from the student of "
            "that checkpoint, without resume_from_checkpoint, where it had another teacher"
        ) from error
    try:
        average.restore(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _name(number: int) -> str:
    """The file of one of several averages."""
    return AVERAGE if number == 0 else AVERAGE.replace(".", f"_{number + 1}.")
