"""A transformers Trainer that distils from hidden states: neither model's logits are ever held."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

import fused_kd as fk
from fused_kd.integrations.transformers import check_head_module, check_lm_head, common_vocab_size, route_head_loss
from fused_kd.objectives import Objective
from fused_kd.training.averaging import Average, count_targets, denominator, sequence_weights
from fused_kd.training.beta_schedule import BetaSchedule
from fused_kd.training.data.prompts import LABEL_PAD
from fused_kd.training.distributed import (
    TEACHER_COLUMNS,
    CachedTeacher,
    check_engine,
    hard_threshold,
    is_cached,
    prepare_arguments,
    shard_teacher,
    shards_weights,
    sum_over_ranks,
    top_k_of,
)
from fused_kd.training.metrics import RunningMetrics
from fused_kd.training.sampling import LengthGroupedEpochs, MaskedTail, PaddedSampler, ShuffledEpochs, has_rows

DEFAULT_GAMMA = 0.4
HARD_LIMIT = 0.8


class KDTrainer(Trainer):
    """Trains ``model`` (the student) towards ``teacher`` with a fused loss; everything else is the Trainer's.

    Batches need ``input_ids`` and ``labels`` (batch, length), labels unshifted with -100 where there is no loss,
    and what else the models take: ``attention_mask``, or ``position_ids`` of packed rows. The loss is the mean
    over the valid target tokens of the whole optimizer step, exact under gradient accumulation and over all
    processes of DDP, FSDP2 and DeepSpeed. Each log entry has ``loss``, ``difficulty`` (mean, nats),
    ``hard_fraction`` (share of tokens with difficulty above the objective's Γ, or 0.4), ``tokens_per_second``
    (valid target tokens of all processes), ``peak_memory_mb`` (CUDA allocator, else resident set; of the process
    that logs), and ``beta`` under a schedule. ``eval_loss`` is the mean over the tokens of the evaluation set;
    ``SelfEvolutionTopK`` ranks those of a batch on all processes there.

    Args:
        model: any Hugging Face causal LM, or a PEFT model with adapters on its body.
        teacher: another causal LM on the same vocabulary; it is frozen, put into eval mode, and moved to the
            training's device or sharded as the student is (FSDP2, ZeRO-3). Or a cache: any object with ``tail`` and
            no ``forward``; then batches also hold ``teacher_log_probs`` (float) and ``teacher_indices`` (int64),
            (batch, length, K), where position i has the distribution of token i + 1. None for objectives without
            a teacher (SFT).
        objective: one of ``fused_kd``'s objectives, or its name. ``SelfEvolutionTopK`` ranks the tokens of the whole
            optimizer step; with accumulation or several processes a first pass without gradients finds the limit.
        temperature: default 1.
        vocab_size: cut both heads to this many columns. None (default) takes heads of equal size as they are;
            for unequal heads the size of ``processing_class`` (a tokenizer) is used, and without it an error
            is raised.
        memory_budget: bytes for the loss's buffers; None lets the library choose.
        backend: "torch", "triton", "native"; None picks.
        beta_schedule: anneal the objective's β.
        average: the loss is the mean over the target "tokens" of the step (default), or over its "sequences" of each
            one's mean.
        **trainer_args: those of ``transformers.Trainer`` (``args``, ``train_dataset``, ``data_collator``,
        ...).

    Raises:
        ValueError: no teacher where the objective needs one, the teacher is the student, unequal
            vocabularies, a model that transforms its logits in an unknown way, an option that this trainer
            cannot honour (``compute_metrics``, ``label_smoothing_factor``, FSDP1, tensor or context parallelism).
        TypeError: a wrong type of objective, a quantised head or one with an adapter.
    """

    # num_items_in_batch already spans the accumulation steps
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | CachedTeacher | None = None,
        objective: Objective | str = "self_evolution",
        *,
        temperature: float = 1.0,
        vocab_size: int | None = None,
        memory_budget: int | None = None,
        backend: str | None = None,
        beta_schedule: BetaSchedule | None = None,
        average: Average = "tokens",
        **trainer_args: Any,
    ) -> None:
        self.objective: Objective = _as_objective(objective)
        self.beta_schedule = beta_schedule
        if average not in ("tokens", "sequences"):
            raise ValueError(f"average must be 'tokens' or 'sequences', got {average!r}")
        self.average: Average = average
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
                "score generated text with fused_kd.training.evaluation.evaluate"
            )
        self.cache: Any = teacher if is_cached(teacher) else None
        self.teacher: Any = cast(Any, None if self.cache is not None else teacher)
        self.vocab_size = common_vocab_size(model, self.teacher, vocab_size, trainer_args.get("processing_class"))
        self.kd_options: dict[str, Any] = {
            "temperature": temperature,
            "memory_budget": memory_budget,
            "backend": backend,
        }
        models: list[Any] = [model] if self.teacher is None else [model, self.teacher]
        for each in models:
            check_head_module(each)
        prepare_arguments(trainer_args.get("args"))
        super().__init__(model=model, **trainer_args)
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor must be 0, got {self.args.label_smoothing_factor}: "
                "the objective sets the target"
            )
        check_engine(self.accelerator, self.args, model, self.train_dataset is None or has_rows(self.train_dataset))
        for each in models:
            route_head_loss(each)
        if self.teacher is not None:
            self.teacher.requires_grad_(False).eval()
        # sharded models are whole, or real at all on this rank, only when they run
        self._models_checked = not shards_weights(self.accelerator)
        if self._models_checked:
            if self.teacher is not None and not (
                getattr(self.teacher, "hf_device_map", None) or getattr(self.teacher, "is_quantized", False)
            ):
                self._move_model_to_device(self.teacher, self.args.device)
            for each in models:
                check_lm_head(each)
        self._step_batches: list[dict[str, Any]] = []
        self._step_gamma: float | None = None
        self._evaluated = torch.zeros(2)
        self._warned_hard = False
        self.add_callback(RunningMetrics())

    @property
    def metrics(self) -> RunningMetrics:
        """The running sums; found among the callbacks, since restoring callback states replaces them."""
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, RunningMetrics))

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
        """Fused loss of a micro-batch; with ``return_outputs`` also a dict: loss, difficulty, is_hard.

        With ``num_items_in_batch``, the tokens of the step on all processes, the loss is this micro-batch's share
        times the number of processes, over which the engines average gradients.
        """
        objective = self._unranked(model, inputs)
        ranks = 1 if num_items_in_batch is None else self.accelerator.num_processes
        loss, out = self._run(model, inputs, objective, num_items_in_batch, ranks)
        if model.training:
            gamma = getattr(self.objective, "gamma", DEFAULT_GAMMA)
            # ignored tokens have difficulty 0, so they count nowhere
            hard = (out.difficulty > gamma).sum()
            self.metrics.add(out.loss, out.difficulty.sum(), hard, count_targets(inputs["labels"]))
        return (loss, {**out._asdict(), "loss": loss}) if return_outputs else loss

    def _run(
        self, model: torch.nn.Module, inputs: dict[str, Any], objective: Objective, num_items: Any, ranks: int
    ) -> tuple[torch.Tensor, fk.KDOutput]:
        """``ranks`` times the loss, for the backward, and the loss itself with each token's numbers.

        The student's loss is made inside its head module's call, that inside the teacher's: there both heads are
        whole, whatever shards them. The teacher's hooks see no graph.
        """
        inputs = dict(inputs)
        weights = None
        if self.average == "sequences":
            weights = sequence_weights(inputs["labels"], inputs.get("position_ids"))
        labels = inputs.pop("labels")
        lists = {name: inputs.pop(name) for name in TEACHER_COLUMNS if name in inputs}
        out: list[fk.KDOutput] = []
        returned: list[dict[str, torch.Tensor]] = []
        gradients = torch.is_grad_enabled()

        def student(teacher: fk.LMHead | fk.TopK | None) -> dict[str, torch.Tensor]:
            def loss(head: fk.LMHead) -> dict[str, torch.Tensor]:
                out.append(
                    fk.kd_loss(
                        head,
                        teacher,
                        labels,
                        objective,
                        ignore_index=LABEL_PAD,
                        shift=True,
                        vocab_size=self.vocab_size,
                        token_weights=weights,
                        num_items=num_items,
                        **self.kd_options,
                    )
                )
                return {"loss": out[0].loss * ranks}

            with torch.set_grad_enabled(gradients):
                returned.append(model(**inputs, head_loss=loss))
            return {}

        if not self._models_checked:
            self._check_sharded(model)
        # a context of its own for each pass: the cache of a pass without gradients would cut those of the next
        with self.accelerator.autocast():
            if self.teacher is not None:
                with torch.no_grad():
                    self.teacher(**inputs, head_loss=student)
            elif self.cache is None or objective.spec.divergence is None:
                student(None)
            else:
                student(top_k_of(lists, self.cache))
        loss = returned[0]["loss"]
        if loss.dtype != torch.float32:
            # FSDP2 rounds what leaves the model: keep the value, and the gradient's path
            loss = loss.float() + (out[0].loss.detach() * ranks - loss.detach().float())
        return loss, out[0]

    def _check_sharded(self, model: torch.nn.Module) -> None:
        if self.teacher is not None:
            self.teacher = shard_teacher(self.teacher, self.accelerator)
            check_lm_head(self.teacher)
        check_lm_head(model)  # type: ignore[arg-type]
        self._models_checked = True

    def _unranked(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Objective:
        """The objective; one that ranks tokens of several calls becomes a threshold on their difficulties.

        Ranked together are the tokens of the step, in evaluation those of a batch, on all processes.
        """
        objective: Any = self.current_objective() if model.training else self.objective
        batches = self._step_batches if model.training and self._step_batches else [inputs]
        if not objective.spec.ranked or self.accelerator.num_processes * len(batches) == 1:
            return objective
        gamma = self._step_gamma if model.training else None
        if gamma is None:
            devices = [self.args.device] if self.args.device.type == "cuda" else []
            # the passes with gradients draw the same dropout again
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                found = [self._difficulties(model, batch, objective) for batch in batches]
            gamma = self._step_gamma = hard_threshold(self.accelerator, found, objective)
        return fk.SelfEvolution(lam=objective.lam, beta=objective.beta, gamma=gamma)

    def _difficulties(self, model: torch.nn.Module, batch: dict[str, Any], objective: Any) -> torch.Tensor:
        inputs = self._prepare_inputs(batch)
        difficulty = self._run(model, inputs, fk.NoEvo(lam=objective.lam), None, 1)[1].difficulty
        return difficulty[..., :-1][(inputs["labels"][..., 1:] != LABEL_PAD).to(difficulty.device)]

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The micro-batches of one optimizer step, and what its loss is averaged over on all processes, at least 1."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_batches, self._step_gamma = batches, None
        count = sum((denominator(batch, self.average) for batch in batches), torch.zeros((), dtype=torch.int64))
        return batches, sum_over_ranks(self.accelerator, count).clamp(min=1)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """The loss of one batch, its mean; never logits."""
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs)).detach()
        items = denominator(inputs, self.average).to(loss)
        self._evaluated = self._evaluated.to(loss) + torch.stack([loss * items, items])
        return loss, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the Trainer's, with the loss averaged over tokens (or sequences) and not over batches."""
        self._evaluated = torch.zeros(2)
        result = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        total, items = sum_over_ranks(self.accelerator, self._evaluated).tolist()
        metrics = {**(result.metrics or {}), f"{metric_key_prefix}_loss": total / max(items, 1.0)}
        return result._replace(metrics=metrics)

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
            logs.update(self.metrics.take(self.state.global_step - int(last), self.accelerator))
            if self.beta_schedule is not None:
                logs["beta"] = self.current_objective().beta  # type: ignore[attr-defined]
        super().log(logs, start_time)
        if "loss" in logs and not self._warned_hard:
            self._warn_if_starved()

    def _get_dataloader(self, dataset: Dataset, *args: Any, **kwargs: Any) -> DataLoader:
        if self.accelerator.num_processes > 1 and has_rows(dataset):
            dataset = MaskedTail(dataset)
        loader = super()._get_dataloader(dataset, *args, **kwargs)
        shard = getattr(loader, "batch_sampler", None)
        sampler = getattr(getattr(shard, "batch_sampler", None), "sampler", None)
        if hasattr(sampler, "set_epoch"):
            # accelerate does not look this deep in the loader of a resumed epoch, the Trainer looks here
            shard.set_epoch = sampler.set_epoch  # type: ignore[union-attr]
        if hasattr(loader, "device"):
            # accelerate's loader moves whole batches; without a device _prepare_inputs does it, and spares the labels
            loader.device = None  # type: ignore[attr-defined]
        return loader

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # on the host, labels tell which tokens to drop without a synchronisation
        kept = {"labels": inputs["labels"]}
        # DeepSpeed's way with inputs would round these
        kept |= {key: inputs[key].to(self.args.device) for key in TEACHER_COLUMNS if key in inputs}
        return {**super()._prepare_inputs({key: value for key, value in inputs.items() if key not in kept}), **kept}

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        self._signature_columns = list(dict.fromkeys([*columns, *TEACHER_COLUMNS]))  # type: ignore[assignment]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if not has_rows(dataset) or strategy == "batch_rebalance":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        rows = self._train_batch_size * self.accelerator.num_processes
        if strategy == "group_by_length":
            lengths = [len(dataset[index]["input_ids"]) for index in range(len(dataset))]
            sampler: Sampler = LengthGroupedEpochs(lengths, rows * self.args.gradient_accumulation_steps, seed)
        elif strategy == "sequential":
            sampler = SequentialSampler(dataset)
        else:
            sampler = ShuffledEpochs(len(dataset), seed)
        return sampler if self.args.dataloader_drop_last else self._padded(sampler, rows)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        if self.accelerator.num_processes == 1 or not has_rows(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        rows = self.args.eval_batch_size * self.accelerator.num_processes
        return self._padded(SequentialSampler(eval_dataset), rows)  # type: ignore[arg-type]

    def _padded(self, sampler: Sampler, rows: int) -> Sampler:
        return sampler if self.accelerator.num_processes == 1 else PaddedSampler(sampler, rows)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, and whole under FSDP2's sharded state too (there only checkpoints are in parts)."""
        if _internal_call or not self.accelerator.is_fsdp2:
            super().save_model(output_dir, _internal_call)
            return
        state = self.accelerator.get_state_dict(self.model)  # on all ranks
        self._save(output_dir or self.args.output_dir, state_dict=state)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.metrics.collect(self.accelerator)
        # trainer_state.json is written next and makes the checkpoint count: all ranks must have written their parts
        self.accelerator.wait_for_everyone()

    def _warn_if_starved(self) -> None:
        """Warn once when the hard fraction stayed high for 5 % of the training and at least 20 steps."""
        if getattr(self.current_objective(), "beta", 1.0) == 1.0 or self.objective.spec.divergence is None:
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
            "(beta_schedule=BetaSchedule(hold=0.5)), or use NoEvo first.",
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
