"""Training of any module that returns its loss: a Trainer that keeps what is trained, and nothing frozen."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import TrainingArguments

from fused_kd.training.checkpoints import WholeCheckpoints
from fused_kd.training.command import stoppable
from fused_kd.training.mt_llm.stacked import load_trained, save_trained
from fused_kd.training.progress import show_bar
from fused_kd.training.runs import read_json, write_json
from fused_kd.training.sampling import LengthGroupedEpochs

TRAINED = "trained.safetensors"
_IDS = "_ids"


@dataclass(frozen=True)
class Fit:
    """How a module is trained: AdamW, by ``steps`` or by ``epochs``, decay after a warm-up.

    Args:
        learning_rate: at its highest.
        steps, epochs: one of them.
        batch: rows an optimizer step, over all processes; ``micro_batch`` of them at once (default: all).
        warmup: share of the steps.
        scheduler: as of ``transformers.TrainingArguments``.

    Raises:
        ValueError: both or neither of steps and epochs, a batch that is no multiple of the micro-batch.
    """

    learning_rate: float
    steps: int | None = None
    epochs: float | None = None
    batch: int = 64
    micro_batch: int | None = None
    warmup: float = 0.0
    weight_decay: float = 0.01
    scheduler: str = "linear"

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give steps or epochs, got steps={self.steps!r}, epochs={self.epochs!r}")
        for name in ("steps", "epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value!r}")
        if self.batch < 1 or self.batch % (self.micro_batch or self.batch):
            raise ValueError(f"batch must be a multiple of micro_batch={self.micro_batch!r}, got {self.batch!r}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup!r}")


class Rows(Dataset[Mapping[str, Any]]):
    """Dicts in a list: ``NAME_ids`` are token ids, ``text`` is for the collator to encode, the rest is for tensors."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.rows[index]

    @property
    def lengths(self) -> list[int]:
        """Of each row's longest text: in tokens, or in characters."""
        return [max(len(value) for name, value in row.items() if name.endswith((_IDS, "text"))) for row in self.rows]


@dataclass(frozen=True)
class Pad:
    """Collates `Rows`: texts padded on the right, with ``NAME_mask`` beside ``NAME_ids``; the rest is stacked.

    Args:
        ids: the padding token of each ``NAME``.
    """

    ids: Mapping[str, int]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if not name.endswith(_IDS):
                batch[name] = torch.stack([torch.as_tensor(value) for value in values])
                continue
            stem, longest = name.removesuffix(_IDS), max(map(len, values))
            batch[name] = torch.tensor([[*ids, *[self.ids[stem]] * (longest - len(ids))] for ids in values])
            batch[f"{stem}_mask"] = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in values])
        return batch


class ModuleTrainer(WholeCheckpoints):
    """Trains a module whose ``forward(**batch)`` gives ``loss``, the batch's mean, and scalars to log.

    A checkpoint has the trained tensors, not the frozen ones. The order of the rows is a function of seed and epoch.

    Raises:
        ValueError: FSDP or DeepSpeed, whose shards of weights it does not gather.
    """

    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("this training runs in one process or under DDP, not under FSDP or DeepSpeed")
        self._sums: dict[str, Tensor] = {}
        self._added = 0

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
        return LengthGroupedEpochs(rows.lengths, step, self.args.seed)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_trained(self.accelerator.unwrap_model(self.model), folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint) / TRAINED)


def fit(
    module: nn.Module,
    rows: Rows,
    collate: Callable[..., dict[str, Tensor]],
    settings: Fit,
    folder: Path,
    *,
    title: str = "fit",
    seed: int = 0,
    bf16: bool = False,
) -> dict[str, Any]:
    """Train ``module`` in place and keep its tensors in ``folder / "trained.safetensors"``.

    A finished training is loaded and not done again; an interrupted one goes on from its last whole checkpoint (20 a
    training), to the same bits.

    Returns:
        Its record, also in ``folder / "training.json"``: settings, steps, trained parameters, log history.

    Raises:
        ValueError: a batch that does not divide by the processes; no trainable parameter.
    """
    record = read_json(folder / "training.json")
    if record is not None:
        load_trained(module, folder / TRAINED)
        return cast(dict[str, Any], record)
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    if not trainable:
        raise ValueError(f"{title}: no parameter is trainable")
    on_cpu = not torch.accelerator.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs or 1,
        per_device_train_batch_size=settings.micro_batch or settings.batch,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        seed=seed,
        bf16=bf16,
        remove_unused_columns=False,
        logging_strategy="steps",
        logging_steps=0.02,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=0.05,
        save_total_limit=2,
        report_to=[],
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
    )
    per_step = arguments.per_device_train_batch_size * arguments.world_size
    if settings.batch % per_step and settings.micro_batch is not None:
        raise ValueError(
            f"batch={settings.batch} must be a multiple of micro_batch={settings.micro_batch} times "
            f"{arguments.world_size} processes"
        )
    arguments.gradient_accumulation_steps = max(settings.batch // per_step, 1)
    trainer = ModuleTrainer(model=module, args=arguments, train_dataset=rows, data_collator=collate)
    show_bar(trainer, title)
    with stoppable(trainer):
        trainer.train(resume_from_checkpoint=trainer.last_checkpoint())
    record = {
        "settings": asdict(settings),
        "seed": seed,
        "rows": len(rows),
        "steps": trainer.state.global_step,
        "trainable": trainable,
        "log_history": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    if trainer.is_world_process_zero():
        save_trained(module, folder / TRAINED)
        write_json(folder / "training.json", record)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return record
