"""What a training shows while it runs: a bar or lines, and its evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

# of an evaluation, what is told and kept
HELD_OUT = ("loss", "ce", "perplexity", "kl", "top_1")


class _Bar(ProgressCallback):
    """The Trainer's progress bar with the latest loss in it, instead of a line of numbers for each log entry."""

    def __init__(self, title: str, shown: Mapping[str, str]) -> None:
        super().__init__()
        self.title, self.shown = title, shown

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {name: f"{logs[name]:{form}}" for name, form in self.shown.items() if name in logs}
            self.training_bar.set_postfix(shown, refresh=False)


class _Lines(TrainerCallback):
    """A line for each evaluation, and without a bar one for each entry of the log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            self._tell(f"step {state.global_step}, held out", evaluation_of(logs))
        elif "loss" in logs and args.disable_tqdm:
            self._tell(f"step {state.global_step}", logs)

    def _tell(self, title: str, numbers: Mapping[str, Any]) -> None:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if isinstance(value, (int, float)))
        tqdm.write(f"{title}: {shown}")  # goes above a bar


def evaluation_of(logged: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of an evaluation's log entry, without those of the clock."""
    return {name: logged[f"eval_{name}"] for name in HELD_OUT if f"eval_{name}" in logged}


def show_bar(trainer: Trainer, title: str) -> None:
    """Replace what the Trainer would print: a bar with the title, the latest loss and the time left, or, where
    ``disable_tqdm`` is set, a line for each log entry; a line for each evaluation."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        objective = getattr(trainer, "objective", None)
        gated = objective is not None and objective.spec.gate
        trainer.add_callback(_Bar(title, {"loss": ".4f", **({"hard_fraction": ".2f"} if gated else {})}))
    trainer.add_callback(_Lines())
