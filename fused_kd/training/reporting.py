"""Where a training's numbers go beside the terminal: TensorBoard, trackio, Weights & Biases and others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    get_available_reporting_integrations,
)

# packages by the names of ``report_to``, where they differ
_PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml", "flyte": "flytekit", "kubeflow": "kubeflow-sdk"}
# transformers does not tell whether these are installed
_UNTOLD = ("flyte",)


def check_reporters(names: list[str]) -> None:
    """Raise where ``TrainingArguments.report_to`` names what is unknown or not installed.

    Raises:
        ValueError: an unknown name. ImportError: a package that is missing; the message says which.
    """
    here = get_available_reporting_integrations()
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted({"none", "all", *INTEGRATION_TO_CALLBACK}))
            raise ValueError(f"report_to must be some of {known}, got {name!r}")
        if name not in here and name not in _UNTOLD:
            extra = " (or pip install 'fused_kd[report]')" if name == "tensorboard" else ""
            raise ImportError(f"report_to={name} needs a package: pip install {_PACKAGES.get(name, name)}{extra}")


def report_options(trainer: Trainer, options: Mapping[str, Any], folder: str | Path) -> None:
    """Log a run's options with its numbers, and put TensorBoard's files into ``folder``.

    ``TENSORBOARD_LOGGING_DIR`` goes before ``folder``. To be called before the training.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder)
    trainer.add_callback(_Options(trainer, options))


class _Options(TrainerCallback):
    """After the reporters have opened their runs, for which each has another name."""

    def __init__(self, trainer: Trainer, options: Mapping[str, Any]) -> None:
        self.reporters = trainer.callback_handler.callbacks
        self.options = dict(options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        for reporter in self.reporters:
            writer = getattr(reporter, "tb_writer", None)
            if writer is not None:
                writer.add_text("options", f"```yaml\n{yaml.safe_dump(self.options, sort_keys=False)}```")
            for name in ("_wandb", "_trackio"):
                config = getattr(getattr(reporter, name, None), "config", None)
                if config is not None:
                    config.update(self.options, allow_val_change=True)
