"""One stage of an experiment: train a student, keep it, translate the test set with it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from transformers import ProgressCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from fused_kd.training.data import Pair
from fused_kd.training.evaluate import translate
from fused_kd.training.presets import load_model
from fused_kd.training.prompts import Collator, PairDataset, PromptTemplate
from fused_kd.training.runs import Run, last_checkpoint, read_json, write_json
from fused_kd.training.specs import ObjectiveSpec
from fused_kd.training.trainer import KDTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Settings:
    """How a stage trains: AdamW, linear decay after a warm-up, batches of similar length.

    ``batch_size`` is in sentences; ``accumulation`` steps of it make one optimizer step.
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


class StageBar(ProgressCallback):
    """The Trainer's bar with the latest loss in it, instead of a line of numbers for each log entry."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.3f}", "hard": f"{logs['hard_fraction']:.2f}"}
            self.training_bar.set_postfix(shown, refresh=False)


def train_stage(
    run: Run,
    name: str,
    student: Callable[[], PreTrainedModel],
    teacher: Callable[[], PreTrainedModel],
    spec: ObjectiveSpec,
    rows: PairDataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
) -> dict[str, Any]:
    """Train and save a student under ``run.stage(name) / "model"``; what is done already is not done again.

    ``student`` and ``teacher`` make the models, and are not called where they are not needed. An interrupted
    training goes on from its last whole checkpoint (20 a training). Returns the stage's record: sizes,
    seconds, log history.
    """
    folder = run.stage(name)
    with run.lock(name):
        record = read_json(folder / "training.json")
        if record is not None:
            return record
        model = student()
        arguments = TrainingArguments(
            output_dir=str(folder / "checkpoints"),
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulation,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=settings.warmup,
            weight_decay=settings.weight_decay,
            seed=settings.seed,
            bf16=settings.bf16,
            train_sampling_strategy="group_by_length",
            logging_strategy="steps",
            logging_steps=0.02,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=0.05,
            save_total_limit=2,
            report_to=[],
            dataloader_pin_memory=model.device.type == "cuda",
        )
        trainer = KDTrainer(
            model,
            teacher() if spec.objective.spec.divergence is not None else None,
            spec.objective,
            temperature=settings.temperature,
            memory_budget=settings.memory_budget,
            backend=settings.backend,
            beta_schedule=spec.beta_schedule,
            args=arguments,
            train_dataset=rows,
            data_collator=Collator(tokenizer.pad_token_id),
            processing_class=tokenizer,
        )
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(StageBar(name))
        checkpoint = last_checkpoint(folder / "checkpoints")
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        _save_whole(model, tokenizer, folder / "model")
        record = {
            "objective": repr(spec.objective),
            "beta_schedule": None if spec.beta_schedule is None else asdict(spec.beta_schedule),
            "settings": asdict(settings),
            "parameters": model.num_parameters(),
            "sentences": len(rows),
            "steps": trainer.state.global_step,
            "seconds": round(trainer.metrics.total_seconds, 1),
            "log_history": [entry for entry in trainer.state.log_history if "loss" in entry],
        }
        write_json(folder / "training.json", record)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return record


def translate_stage(
    run: Run,
    name: str,
    pairs: Sequence[Pair],
    direction: str,
    template: PromptTemplate,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 64,
    max_new_tokens: int = 128,
) -> dict[str, Any]:
    """Greedy translations by a stage's model in ``hypotheses.txt``, and their scores; done once."""
    folder = run.stage(name)
    with run.lock(name):
        scores = read_json(folder / "scores.json")
        if scores is None:
            hypotheses, result = translate(
                load_model(folder / "model", tokenizer, 0),
                tokenizer,
                pairs,
                direction,
                template,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
            )
            (folder / "hypotheses.txt").write_text("".join(f"{line}\n" for line in hypotheses), encoding="utf-8")
            scores = result.as_dict()
            write_json(folder / "scores.json", scores)
        return scores


def _save_whole(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Any) -> None:
    partial = folder.with_name("model.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
