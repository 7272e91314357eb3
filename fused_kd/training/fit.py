"""One training from its beginning or its last whole checkpoint to a saved model, done once."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from fused_kd.integrations.sampling import LengthGroupedEpochs
from fused_kd.training.checkpoints import MANIFEST, WholeCheckpoints, check_room, fault_of, seal
from fused_kd.training.metrics import RunningMetrics
from fused_kd.training.progress import evaluation_of, show_bar
from fused_kd.training.script import stoppable
from fused_kd.training.stage import lock, read_json, remove_folder, replace_folder, write_bytes, write_json

if TYPE_CHECKING:
    from fused_kd.training.trainer import KDTrainer

TRAINED = "trained.safetensors"
# options of transformers.TrainingArguments; steps below 1 are shares of the training
DEFAULTS: Mapping[str, Any] = {
    "train_sampling_strategy": "group_by_length",
    "warmup_steps": 0.05,
    "weight_decay": 0.01,
    "logging_steps": 0.02,
    "logging_nan_inf_filter": False,
    "save_strategy": "steps",
    "save_steps": 0.05,
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": False,  # transformers' own default hangs on its logger's level, which scripts raise
}


def training_arguments(folder: str | Path, **options: Any) -> TrainingArguments:
    """``transformers.TrainingArguments`` with this project's ``DEFAULTS``, each of which may be given otherwise.

    Checkpoints go to ``folder / "checkpoints"``. Without an accelerator ``use_cpu`` is on, which lets several processes
    find each other there.
    """
    given = {"output_dir": str(Path(folder) / "checkpoints"), **DEFAULTS, **options}
    given.setdefault("use_cpu", not torch.accelerator.is_available())
    arguments = TrainingArguments(**given)
    if "dataloader_pin_memory" not in options:
        arguments.dataloader_pin_memory = arguments.device.type == "cuda"
    return arguments


def best_checkpoint(epochs: float) -> dict[str, Any]:
    """Options of ``TrainingArguments`` that keep the checkpoint with the least validation loss, of two an epoch."""
    every = min(0.5 / max(epochs, 1.0), 0.5)  # a share of the training; the best one must be among the saved
    return {
        "eval_strategy": IntervalStrategy.STEPS,
        "eval_steps": every,
        "save_strategy": SaveStrategy.STEPS,
        "save_steps": every,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
    }


def fit(trainer: KDTrainer | ModuleTrainer, folder: str | Path, title: str | None = None) -> dict[str, Any]:
    """Train, or go on from the last whole checkpoint in the trainer's ``output_dir``, and save ``folder / "model"``.

    The model is saved whole or not at all, with the tokenizer where the trainer has one; then ``training.json`` is
    written and the checkpoints are removed. What is done and undamaged is not done again. The first Ctrl-C writes a
    checkpoint. Every process of a distributed run calls this.

    Args:
        trainer: a ``KDTrainer`` or a :class:`ModuleTrainer`.
        folder: of this training alone.
        title: of the progress bar; default: the folder's name.

    Returns:
        The record in ``training.json``: ``steps``, ``seconds``, ``parameters``, ``rows`` (None of a stream),
        ``log_history`` (entries with a training loss) and ``validation`` (of each evaluation
        ``step``, ``loss``, and what else :class:`fused_kd.training.KDTrainer` tells of it).

    Raises:
        ValueError: no trainable parameter, too little room for two checkpoints on the disk.
    """
    folder, checkpoints = Path(folder), Path(str(trainer.args.output_dir))
    model = cast(nn.Module, trainer.model)
    with lock(folder / ".lock"):
        if (record := finished(folder)) is not None:
            return record
        # ZeRO-3 holds none of a parameter's numbers here
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
        if not any(trained for _, trained in sizes):
            raise ValueError(f"{title or folder.name}: no parameter is trainable")
        if trainer.args.world_size == 1:
            check_room(checkpoints, model)
        show_bar(trainer, title or folder.name)
        checkpoint = trainer.last_checkpoint()
        if checkpoint is not None and trainer.is_world_process_zero():
            print(f"{title or folder.name}: resuming from {Path(checkpoint).name}", flush=True)
        with stoppable(trainer):
            trainer.train(resume_from_checkpoint=checkpoint)
        _save_whole(trainer, folder / "model")
        history, rows = trainer.state.log_history, trainer.train_dataset
        record = {
            "steps": trainer.state.global_step,
            "seconds": round(trainer.metrics.total_seconds, 1),
            "parameters": sum(size for size, _ in sizes),
            "rows": len(rows) if isinstance(rows, Sized) else None,
            "log_history": [entry for entry in history if "loss" in entry],
            "validation": [{"step": e["step"], **evaluation_of(e)} for e in history if "eval_loss" in e],
        }
        if trainer.is_world_process_zero():
            write_json(folder / "training.json", record)
            shutil.rmtree(checkpoints, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        return record


def finished(folder: str | Path) -> dict[str, Any] | None:
    """The record of a training that :func:`fit` has finished there, or None, with a warning where it is damaged."""
    folder = Path(folder)
    record = read_json(folder / "training.json")
    fault = fault_of(folder / "model") if (folder / "model" / MANIFEST).is_file() else None
    if fault is not None:
        warnings.warn(f"{folder / 'model'} {fault}: trained again", stacklevel=2)
    return record if fault is None else None


def _save_whole(trainer: WholeCheckpoints, folder: Path) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    if trainer.is_world_process_zero():
        remove_folder(partial)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(partial))  # every process holds a part of a sharded model
    if trainer.is_world_process_zero():
        if (tokenizer := cast(Any, trainer.processing_class)) is not None:
            tokenizer.save_pretrained(partial)
        (partial / "training_args.bin").unlink(missing_ok=True)
        seal(partial)
        replace_folder(partial, folder)


class ModuleTrainer(WholeCheckpoints):
    """Trains a module whose ``forward(**batch)`` gives ``loss``, the batch's mean, and scalars to log.

    A checkpoint, and the saved model, have the trained tensors, not the frozen ones, in ``trained.safetensors``. The
    order of the rows is a function of seed and epoch; ``lengths``, where the data set has them, puts rows of similar
    length together.

    Raises:
        ValueError: FSDP or DeepSpeed, whose shards of weights it does not gather.
    """

    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("this training runs in one process or under DDP, not under FSDP or DeepSpeed")
        self.args.remove_unused_columns = False
        self._sums: dict[str, Tensor] = {}
        self._added = 0
        self.add_callback(RunningMetrics())

    @property
    def metrics(self) -> RunningMetrics:
        """Where the training's seconds are counted; a restored state replaces it."""
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, RunningMetrics))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        out = model(**inputs)
        for name, value in out.items():
            if name != "loss":
                self._sums[name] = self._sums.get(name, 0.0) + value.detach()
        self._added += 1
        return out["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with the module's scalars: means over the batches since the last entry."""
        if "loss" in logs:
            logs.update({name: float(value) / max(self._added, 1) for name, value in self._sums.items()})
            self._sums, self._added = {}, 0
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        step = self._train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        grouped = self.args.train_sampling_strategy == "group_by_length" and hasattr(rows, "lengths")
        return LengthGroupedEpochs(rows.lengths if grouped else [1] * len(rows), step, self.args.seed)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_trained(self.accelerator.unwrap_model(self.model), folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint) / TRAINED)


def trained_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_trained(model: nn.Module, file: Path) -> None:
    """:func:`trained_tensors` as safetensors, written atomically."""
    from safetensors.torch import save

    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in trained_tensors(model).items()}
    write_bytes(file, save(tensors))


def load_trained(model: nn.Module, file: Path) -> None:
    """Into a model of the same form.

    Raises:
        ValueError: the file has other tensors than the model trains; the message names some.
    """
    from safetensors.torch import load_file

    saved, own = load_file(file), trained_tensors(model)
    shapes = [{(name, value.shape) for name, value in tensors.items()} for tensors in (saved, own)]
    if differing := sorted({name for name, _ in shapes[0] ^ shapes[1]}):
        raise ValueError(f"{file} is of another model: {len(differing)} tensors differ ({', '.join(differing[:3])})")
    with torch.no_grad():
        for name, value in saved.items():
            own[name].copy_(value)
