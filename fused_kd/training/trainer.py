"""A transformers Trainer that distils from hidden states: neither model's logits are ever held."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import has_length
from transformers.training_args import ParallelMode

import fused_kd as fk
from fused_kd.integrations.transformers import check_lm_head, hidden_states, lm_head_of
from fused_kd.objectives import Objective
from fused_kd.training.metrics import RunningMetrics
from fused_kd.training.prompts import LABEL_PAD
from fused_kd.training.sampling import LengthGroupedEpochs

DEFAULT_GAMMA = 0.4
HARD_LIMIT = 0.8


@dataclass(frozen=True)
class BetaSchedule:
    """β moves linearly from ``start`` to ``end`` over the first ``fraction`` of the training, then stays.

    Args:
        start: β at the first step, in [0, 1]; default 1, which is NoEvo and teaches an untrained student.
        end: β from then on, in [0, 1]; None (default) takes the objective's β.
        fraction: share of the optimizer steps that the move takes, in (0, 1]; default 0.5.
    """

    start: float = 1.0
    end: float | None = None
    fraction: float = 0.5

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value!r}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction!r}")

    def beta(self, progress: float, end: float) -> float:
        """β at ``progress`` in [0, 1]; ``end`` stands in for a ``self.end`` of None."""
        end = end if self.end is None else self.end
        share = min(progress / self.fraction, 1.0)
        return self.start + (end - self.start) * share


class KDTrainer(Trainer):
    """Trains ``model`` (the student) towards ``teacher`` with a fused loss; everything else is the Trainer's.

    Batches need ``input_ids``, ``attention_mask`` and ``labels`` (batch, length), labels unshifted with -100
    where there is no loss. The loss is the mean over the valid target tokens of the whole optimizer step,
    exact under gradient accumulation. Each log entry has ``loss``, ``difficulty`` (mean, nats),
    ``hard_fraction`` (share of tokens with difficulty above the objective's Γ, or 0.4), ``tokens_per_second``
    (valid target tokens), ``peak_memory_mb`` (CUDA allocator, else resident set), and ``beta`` under a
    schedule.

    Args:
        model: any Hugging Face causal LM.
        teacher: another one on the same vocabulary; it is frozen, put into eval mode and moved to the
            training's device. None for objectives without a teacher (SFT).
        objective: one of ``fused_kd``'s objectives, or its name.
        temperature: default 1.
        vocab_size: cut both heads to this many columns. None (default) takes heads of equal size as they are;
            for unequal heads the size of ``processing_class`` (a tokenizer) is used, and without it an error
            is raised.
        memory_budget: bytes for the loss's buffers; None lets the library choose.
        backend: "torch", "triton", "native"; None picks.
        beta_schedule: anneal the objective's β.
        **trainer_args: those of ``transformers.Trainer`` (``args``, ``train_dataset``, ``data_collator``,
        ...).

    Raises:
        ValueError: no teacher where the objective needs one, the teacher is the student, unequal
            vocabularies, a model that transforms its logits in an unknown way, an option that this trainer
            cannot honour (``compute_metrics``, ``label_smoothing_factor``, more than one process).
        TypeError: a wrong type of objective, a quantised head.
    """

    # num_items_in_batch already spans the accumulation steps
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
        objective: Objective | str = "self_evolution",
        *,
        temperature: float = 1.0,
        vocab_size: int | None = None,
        memory_budget: int | None = None,
        backend: str | None = None,
        beta_schedule: BetaSchedule | None = None,
        **trainer_args: Any,
    ) -> None:
        self.objective: Objective = _as_objective(objective)
        self.beta_schedule = beta_schedule
        if beta_schedule is not None and not hasattr(self.objective, "beta"):
            raise ValueError(f"beta_schedule needs an objective with a beta, got {self.objective!r}")
        if self.objective.spec.divergence is None:
            teacher = None
        elif teacher is None:
            raise ValueError(f"teacher must be given for {self.objective!r}")
        elif teacher is model:
            raise ValueError("teacher must be another model than the student: it is frozen")
        if trainer_args.get("compute_metrics") is not None:
            raise ValueError(
                "compute_metrics must be None: evaluation computes no logits to pass to it; "
                "score generated text with fused_kd.training.evaluate"
            )
        self.vocab_size = _common_vocab_size(model, teacher, vocab_size, trainer_args.get("processing_class"))
        self.kd_options: dict[str, Any] = {
            "temperature": temperature,
            "memory_budget": memory_budget,
            "backend": backend,
        }
        super().__init__(model=model, **trainer_args)
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor must be 0, got {self.args.label_smoothing_factor}: "
                "the objective sets the target"
            )
        if self.args.parallel_mode == ParallelMode.DISTRIBUTED or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "KDTrainer runs in one process: the loss is computed outside the wrapped model's forward, "
                "where DDP, FSDP and ZeRO would miss its gradients"
            )
        self.teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False).eval()
            if getattr(teacher, "hf_device_map", None) is None and not getattr(teacher, "is_quantized", False):
                self._move_model_to_device(teacher, self.args.device)
            check_lm_head(teacher)
        check_lm_head(model)
        self._warned_hard = False
        self.add_callback(RunningMetrics())

    @property
    def metrics(self) -> RunningMetrics:
        """The running sums; found among the callbacks, since restoring callback states replaces them."""
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, RunningMetrics))

    def lm_head(self, model: torch.nn.Module, inputs: dict[str, Any]) -> fk.LMHead:
        """Hidden states and head of either model on a batch: the one place where a model runs."""
        unwrapped = self.accelerator.unwrap_model(model)
        return lm_head_of(unwrapped, hidden_states(unwrapped, **inputs))

    def current_objective(self) -> Objective:
        """The objective of the current step, with β from the schedule: a function of the step alone."""
        if self.beta_schedule is None:
            return self.objective
        progress = self.state.global_step / max(self.state.max_steps, 1)
        beta = self.beta_schedule.beta(progress, end=self.objective.beta)  # type: ignore[attr-defined]
        return dataclasses.replace(self.objective, beta=beta)  # type: ignore[call-arg]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Fused loss of a micro-batch; with ``return_outputs`` also a dict: loss, difficulty, is_hard."""
        labels = inputs["labels"]
        model_inputs = {key: value for key, value in inputs.items() if key != "labels"}
        teacher = None
        # accelerate puts autocast around model.forward, which is not what runs here
        with self.accelerator.autocast():
            student = self.lm_head(model, model_inputs)
            if self.teacher is not None:
                with torch.no_grad():
                    teacher = self.lm_head(self.teacher, model_inputs)
            out = fk.kd_loss(
                student,
                teacher,
                labels,
                self.current_objective() if model.training else self.objective,
                ignore_index=LABEL_PAD,
                shift=True,
                vocab_size=self.vocab_size,
                num_items=num_items_in_batch,
                **self.kd_options,
            )
        if model.training:
            gamma = getattr(self.objective, "gamma", DEFAULT_GAMMA)
            # ignored tokens have difficulty 0, so they count nowhere
            hard = (out.difficulty > gamma).sum()
            self.metrics.add(out.loss, out.difficulty.sum(), hard, _count_targets(labels))
        return (out.loss, out._asdict()) if return_outputs else out.loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The micro-batches of one optimizer step, and their number of valid targets, at least 1."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [_count_targets(batch["labels"]) for batch in batches]
        return batches, torch.stack(counts).sum().clamp(min=1) if counts else torch.ones((), dtype=torch.int64)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """The loss of one batch, mean over its valid tokens; never logits."""
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, without counting its time as training time."""
        self.metrics.pause()
        result = super().evaluate(*args, **kwargs)
        if self.is_in_train:
            self.metrics.resume()
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; entries with a training loss also get the metrics in the class docstring."""
        if "loss" in logs:
            logged = [entry["step"] for entry in self.state.log_history if "loss" in entry]
            last = logged[-1] if logged else 0
            logs.update(self.metrics.take(self.state.global_step - int(last)))
            if self.beta_schedule is not None:
                logs["beta"] = self.current_objective().beta  # type: ignore[attr-defined]
        super().log(logs, start_time)
        if "loss" in logs and not self._warned_hard:
            self._warn_if_starved()

    def get_train_dataloader(self) -> DataLoader:
        return _labels_stay_on_host(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        return _labels_stay_on_host(super().get_eval_dataloader(eval_dataset))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # on the host, labels tell which tokens to drop without a synchronisation
        moved = super()._prepare_inputs({key: value for key, value in inputs.items() if key != "labels"})
        return {**moved, "labels": inputs["labels"]}

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not has_length(dataset):
            return super()._get_train_sampler(train_dataset)
        return LengthGroupedEpochs(
            [len(dataset[index]["input_ids"]) for index in range(len(dataset))],  # type: ignore[index]
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )

    def _warn_if_starved(self) -> None:
        """Warn once when the hard fraction stayed high for 5 % of the training and at least 20 steps."""
        if getattr(self.current_objective(), "beta", 1.0) == 1.0 or self.teacher is None:
            return
        entries = [entry for entry in self.state.log_history if "hard_fraction" in entry]
        below = [entry["step"] for entry in entries if entry["hard_fraction"] <= HARD_LIMIT]
        steps = self.state.global_step - (below[-1] if below else 0)
        if steps < max(20, 0.05 * self.state.max_steps):
            return
        self._warned_hard = True
        warnings.warn(
            f"hard_fraction stayed above {HARD_LIMIT} for {steps} steps: hard tokens of a skewed loss get "
            "almost no gradient, so this student learns little. Start from a trained student, warm β up "
            "(beta_schedule=BetaSchedule()), or use NoEvo first.",
            stacklevel=2,
        )


def _as_objective(objective: Objective | str) -> Objective:
    if isinstance(objective, str):
        if objective not in fk.OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(fk.OBJECTIVES)}, got {objective!r}")
        return fk.OBJECTIVES[objective]()
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be a fused_kd objective or its name, got {objective!r}")
    return objective


def _common_vocab_size(
    student: PreTrainedModel, teacher: PreTrainedModel | None, vocab_size: int | None, tokenizer: Any
) -> int | None:
    heads = [model.get_output_embeddings().weight.shape[0] for model in (student, teacher) if model is not None]
    if vocab_size is None:
        if len(set(heads)) == 1:
            return None
        if tokenizer is None or not hasattr(tokenizer, "__len__"):
            raise ValueError(
                f"student and teacher have vocabularies of {heads[0]} and {heads[1]}: give vocab_size, or "
                "the shared tokenizer as processing_class, to cut both heads to the common tokens"
            )
        vocab_size = len(tokenizer)
    if not 1 <= vocab_size <= min(heads):
        raise ValueError(f"vocab_size must be in [1, {min(heads)}] for heads of {heads}, got {vocab_size}")
    return vocab_size


def _count_targets(labels: torch.Tensor) -> torch.Tensor:
    return (labels[..., 1:] != LABEL_PAD).sum()


def _labels_stay_on_host(loader: DataLoader) -> DataLoader:
    # accelerate's loader moves whole batches; without a device _prepare_inputs does it, and spares the labels
    if hasattr(loader, "device"):
        loader.device = None  # type: ignore[attr-defined]
    return loader
