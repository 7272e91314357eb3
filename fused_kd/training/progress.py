"""The Trainer's progress bar with the latest loss in it, instead of a line of numbers for each log entry."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback, Trainer
from transformers.trainer_callback import PrinterCallback

_SHOWN = {"loss": ("loss", ".4f"), "hard_fraction": ("hard", ".2f")}


class TrainingBar(ProgressCallback):
    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {name: f"{logs[key]:{form}}" for key, (name, form) in _SHOWN.items() if key in logs}
            self.training_bar.set_postfix(shown, refresh=False)


def show_bar(trainer: Trainer, title: str) -> None:
    """Replace what the Trainer would print by a :class:`TrainingBar`."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(TrainingBar(title))
