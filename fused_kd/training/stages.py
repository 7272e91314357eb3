"""One stage of an experiment: train a student, keep it, translate the test set with it."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from transformers import TrainingArguments

from fused_kd.integrations.precision import low_precision_parameters
from fused_kd.training.averaging import Average
from fused_kd.training.checkpoints import MANIFEST, check_room, fault_of, seal
from fused_kd.training.command import stoppable
from fused_kd.training.data.pairs import Pair
from fused_kd.training.data.prompts import Collator, PairDataset, PromptTemplate, padding_id
from fused_kd.training.evaluation.evaluate import translate
from fused_kd.training.packing import PackingCollator
from fused_kd.training.presets import load_model
from fused_kd.training.progress import show_bar
from fused_kd.training.runs import Run, flush, read_json, remove_folder, write_json, write_lines
from fused_kd.training.specs import ObjectiveSpec
from fused_kd.training.trainer import KDTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# transformers 6 drops the older name, 5.0 has no other
_CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)


@dataclass(frozen=True)
class Settings:
    """How a stage trains: AdamW, decay after a warm-up, batches of similar length.

    ``batch_size`` is in sentences of one process; ``accumulation`` steps of it in every process make one optimizer
    step. With ``packing`` they are laid end to end, without padding. ``select`` says which checkpoint is kept: "last",
    or the "best" by the loss on validation rows, seen twice an epoch.
    """

    epochs: float
    learning_rate: float
    batch_size: int = 64
    accumulation: int = 1
    warmup: float = 0.05
    weight_decay: float = 0.01
    seed: int = 0
    bf16: bool = False
    temperature: float = 1.0
    memory_budget: int | None = None
    backend: str | None = None
    scheduler: str = "linear"
    gradient_checkpointing: bool = False
    packing: bool = False
    average: Average = "tokens"
    select: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        if self.select not in ("last", "best"):
            raise ValueError(f"select must be 'last' or 'best', got {self.select!r}")


def train_stage(
    run: Run,
    name: str,
    student: Callable[[], PreTrainedModel],
    teacher: Callable[[], PreTrainedModel] | None,
    spec: ObjectiveSpec,
    rows: PairDataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    valid: PairDataset | None = None,
) -> dict[str, Any]:
    """Train and save a student under ``run.stage(name) / "model"``; what is done already is not done again.

    ``student`` and ``teacher`` make the models, and are not called where they are not needed. A student whose trained
    weights are in half precision is trained in float32 (``settings.bf16`` computes in bf16). A teacher may be a
    ``TeacherCache`` whose lists ``rows`` carry, and None where the objective has no use for it. ``valid`` is for
    ``settings.select`` "best". An interrupted training goes on from its last whole checkpoint (20 a training). Every
    process of a distributed run calls this. Returns the stage's record: sizes, seconds, log history.

    Raises:
        ValueError: "best" without validation rows, no teacher for an objective that needs one, or too little room on
            the disk.
    """
    folder = run.stage(name)
    needed = spec.objective.spec.divergence is not None
    if needed and teacher is None:
        raise ValueError(f"{name}: {spec.objective} needs a teacher, got None")
    best = settings.select == "best"
    if best and valid is None:
        raise ValueError(f"{name}: select='best' needs validation rows")
    with run.lock(name):
        record = read_json(folder / "training.json")
        if record is not None and not _damaged(folder / "model"):
            return cast(dict[str, Any], record)
        checkpointing: dict[str, Any] = {_CHECKPOINTING: settings.gradient_checkpointing}
        # shares of the training; the best checkpoint must be among the saved
        twice_an_epoch = min(0.5 / max(settings.epochs, 1.0), 0.5)
        every = twice_an_epoch if best else 0.05
        # before the models: it tells transformers how to load what will be sharded
        arguments = TrainingArguments(
            output_dir=str(folder / "checkpoints"),
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulation,
            learning_rate=settings.learning_rate,
            per_device_eval_batch_size=settings.batch_size,
            lr_scheduler_type=settings.scheduler,
            warmup_steps=settings.warmup,
            weight_decay=settings.weight_decay,
            seed=settings.seed,
            bf16=settings.bf16,
            **checkpointing,
            train_sampling_strategy="group_by_length",
            logging_strategy="steps",
            logging_steps=0.02,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=2,
            eval_strategy="steps" if best else "no",
            eval_steps=every if best else None,
            load_best_model_at_end=best,
            metric_for_best_model="eval_loss" if best else None,
            report_to=[],
            use_cpu=not torch.accelerator.is_available(),  # else processes on CPUs would not find each other
        )
        arguments.dataloader_pin_memory = arguments.device.type == "cuda"
        model = student()
        if low_precision_parameters(model) and not getattr(model, "is_quantized", False):
            model = model.float()  # else most updates would round to nothing
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())  # ZeRO-3 holds none of them
        if arguments.world_size == 1:
            check_room(folder / "checkpoints", model)
        padded = Collator(padding_id(tokenizer))
        collator = PackingCollator() if settings.packing else padded  # type: ignore[no-untyped-call]
        trainer = KDTrainer(
            model,
            teacher() if teacher is not None and needed else None,
            spec.objective,
            temperature=settings.temperature,
            memory_budget=settings.memory_budget,
            backend=settings.backend,
            beta_schedule=spec.beta_schedule,
            average=settings.average,
            args=arguments,
            train_dataset=rows,
            eval_dataset=valid if best else None,
            data_collator=collator,
            processing_class=tokenizer,
        )
        show_bar(trainer, name)
        with stoppable(trainer):
            trainer.train(resume_from_checkpoint=trainer.last_checkpoint())
        _save_whole(trainer, tokenizer, folder / "model")
        record = {
            "objective": repr(spec.objective),
            "beta_schedule": None if spec.beta_schedule is None else asdict(spec.beta_schedule),
            "settings": asdict(settings),
            "parameters": parameters,
            "sentences": len(rows),
            "steps": trainer.state.global_step,
            "seconds": round(trainer.metrics.total_seconds, 1),
            "log_history": [entry for entry in trainer.state.log_history if "loss" in entry],
            "validation": [
                {"step": entry["step"], "loss": entry["eval_loss"]}
                for entry in trainer.state.log_history
                if "eval_loss" in entry
            ],
        }
        if trainer.is_world_process_zero():
            write_json(folder / "training.json", record)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        return record


def translate_stage(
    run: Run,
    name: str,
    tests: Mapping[str, Sequence[Pair]],
    template: PromptTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 64,
    max_new_tokens: int = 128,
    num_beams: int = 1,
) -> dict[str, dict[str, Any]]:
    """Translations of each direction's test set by a stage's model in ``hypotheses.DIRECTION.txt``, and their scores.

    A direction is done once. Returns ``{direction: scores}``.
    """
    folder = run.stage(name)
    with run.lock(name):
        scores: dict[str, dict[str, Any]] = read_json(folder / "scores.json") or {}
        missing = [direction for direction in tests if direction not in scores]
        if not missing:
            return scores
        model = load_model(folder / "model", tokenizer, 0)
        for direction in missing:
            hypotheses, result = translate(
                model,
                tokenizer,
                tests[direction],
                direction,
                template,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
            )
            write_lines(folder / f"hypotheses.{direction}.txt", hypotheses)
            scores[direction] = result.as_dict()
            write_json(folder / "scores.json", scores)
        return scores


def _damaged(model: Path) -> bool:
    """Whether a finished model, if it is there, is no longer as it was saved."""
    fault = fault_of(model) if (model / MANIFEST).is_file() else None
    if fault is not None:
        warnings.warn(f"{model} {fault}: trained again", stacklevel=2)
    return fault is not None


def _save_whole(trainer: KDTrainer, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    partial = folder.with_name("model.partial")
    if trainer.is_world_process_zero():
        remove_folder(partial)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(partial))  # every process holds a part of a sharded model
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(partial)
        (partial / "training_args.bin").unlink(missing_ok=True)
        seal(partial)
        remove_folder(folder)
        os.replace(partial, folder)
        flush(folder.parent)
