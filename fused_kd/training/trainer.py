"""A transformers Trainer that distils from hidden states: neither model's logits are ever held."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel
from transformers.utils import logging

import fused_kd as fk
from fused_kd.integrations.arguments import as_objective
from fused_kd.integrations.bodies import labels_need_shift
from fused_kd.integrations.labels import Average, count_targets, denominator, sequence_weights
from fused_kd.integrations.mixin import KDLossMixin
from fused_kd.integrations.parts import annealed_part, with_beta
from fused_kd.integrations.sampling import (
    LengthGroupedEpochs,
    MaskedTail,
    PaddedSampler,
    ShuffledEpochs,
    has_rows,
    lengths_of,
)
from fused_kd.objectives import Objective
from fused_kd.options import statistics_names
from fused_kd.terms import RANK
from fused_kd.training import advice
from fused_kd.training.baseline import DEFAULT_GAMMA, HARD_T, Baseline
from fused_kd.training.checkpoints import WholeCheckpoints
from fused_kd.training.default_collator import DefaultCollator, check_rows_of
from fused_kd.training.metrics import RunningMetrics
from fused_kd.training.named import load_student, opened, tokenizer_of

logger = logging.get_logger(__name__)
ROUTER = "router_loss"


@dataclass(frozen=True)
class BetaSchedule:
    """β stays at ``start`` for a while, moves linearly to ``end``, then stays there.

    Just below 1 β already bounds what a hard token can pull, so a student that knows nothing needs the ``hold``.

    Args:
        start: β at the first step, in [0, 1]; default 1, which is NoEvo and teaches an untrained student.
        end: β at last, in [0, 1]; None (default) takes the objective's β.
        fraction: share of the optimizer steps that the move takes, in (0, 1]; default 0.5.
        hold: share of the steps before the move, in [0, 1 - fraction]; default 0.
    """

    start: float = 1.0
    end: float | None = None
    fraction: float = 0.5
    hold: float = 0.0

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value!r}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction!r}")
        if not (self.hold >= 0 and self.hold + self.fraction <= 1 + 1e-9):
            raise ValueError(f"hold must be in [0, 1 - fraction] = [0, {1 - self.fraction:g}], got {self.hold!r}")

    def beta(self, progress: float, end: float) -> float:
        """β at ``progress`` in [0, 1]; ``end`` stands in for a ``self.end`` of None."""
        end = end if self.end is None else self.end
        share = min(max((progress - self.hold) / self.fraction, 0.0), 1.0)
        return self.start + (end - self.start) * share


class KDTrainer(KDLossMixin, WholeCheckpoints):
    """Trains ``model`` (the student) towards ``teacher`` with a fused loss; everything else is the Trainer's.

    Rows have ``input_ids`` and ``labels`` of one length, labels unshifted with -100 where there is no loss; without a
    ``data_collator`` they are padded. Batches of one of your own may have more that the models take:
    ``attention_mask``, or ``position_ids`` of packed rows. The loss is the mean over the valid target tokens of the
    whole optimizer step, exact under gradient accumulation and over all processes of DDP, FSDP2 and DeepSpeed.

    Each log entry has ``loss``, ``difficulty`` (mean, nats), ``hard_fraction`` (share of hard tokens; without a gate or
    by rank, difficulties above 0.4), ``hard_fraction_t`` where the label is part of the difficulty (the share that
    would be hard if the student were the teacher: ``KL(yt||p)`` above the same limit; of lists, labels that they do not
    hold count as hard), ``tokens_per_second`` (valid target tokens of all processes), ``peak_memory_mb`` (CUDA
    allocator, else resident set; of the process that logs), ``beta`` under a schedule, and with experts
    ``router_loss``, the mean of the micro-batches', not yet multiplied by its coefficient; ``loss`` has it, multiplied.

    :meth:`evaluate` gives means over the tokens of the evaluation set, of all processes: ``eval_loss``, the objective's
    (``SelfEvolutionTopK`` ranks the tokens of a batch on all processes there), ``eval_ce`` and ``eval_perplexity``, and
    of a teacher ``eval_kl``, ``KL(p||q)``, and ``eval_top_1``, the share of tokens where the largest logits of both
    sides are of one token; all but ``eval_loss`` at temperature 1. No logits are held for them beyond a chunk's. Lists
    do not know all of p: with them there is no ``eval_kl``, and ``eval_top_1`` of one cache that lists the largest;
    with ``vocab_map`` there is neither.

    Args:
        model: any Hugging Face causal LM, or a PEFT model (FSDP2 and ZeRO-3: with adapters on its body alone); or its
            folder, hub name or GGUF file, see :func:`fused_kd.training.load_student`. Then ``processing_class`` is the
            tokenizer beside it, unless one is given.
        teacher: another causal LM on the same vocabulary, a cache, a server, the student itself, or several of these:
            see :class:`fused_kd.integrations.mixin.KDLossMixin`. Position i of a cache's columns has the distribution
            of token i + 1. Or a name: a folder, hub name or GGUF file, "cache:FOLDER", "http://HOST:PORT"
            (:func:`fused_kd.training.load_teacher`). An objective without a teacher (SFT) needs none; one that it is
            given is for evaluation.
        objective: one of ``fused_kd``'s objectives, a sum of them, or its text. ``SelfEvolutionTopK`` ranks the tokens
            of the whole optimizer step; with accumulation or several processes a first pass without gradients finds the
            limit. Default "self_evolution", the paper's loss. Most students are better served with a floor under it,
            "self_evolution:floor=0.3", and those that hardly work yet with "forward_kd", the default of
            ``examples/train.py``: see :func:`fused_kd.training.advice.advised_objective`.
        temperature: default 1.
        vocab_size: cut both heads to this many columns. None (default) takes heads of equal size as they are;
            for unequal heads the size of ``processing_class`` (a tokenizer) is used, and without it an error
            is raised.
        memory_budget: bytes for the loss's buffers; None lets the library choose.
        backend: "torch", "triton", "cuda", "native"; None picks.
        lists: compare only a :class:`fused_kd.Lists` of each token, the teacher's or the student's largest entries.
        vocab_map, tail: of a teacher with another vocabulary, as of
            :class:`fused_kd.integrations.mixin.KDLossMixin`.
        beta_schedule: anneal the objective's β; of a sum, that of the one with a gate, or of the only one with a β.
        average: the loss is the mean over the target "tokens" of the step (default), or over its "sequences" of each
            one's mean.
        statistics: what else to log of the training's tokens, means over the valid ones, by the names of
            :meth:`fused_kd.KDLoss.evaluate`: "entropy_t", "kl", .... "top_1" and "overlap" cost a sweep of the logits.
        eval_metrics: tell more of an evaluation than ``eval_loss``, as above, for a sweep of the logits, or for a
            second pass where the loss's own cannot tell it (another temperature, lists, ``memory_budget``, a named
            "cuda" row, an objective without the teacher); default True.
        **trainer_args: those of ``transformers.Trainer`` (``args``, ``train_dataset``, ``data_collator``,
        ...).

    Raises:
        ValueError: no teacher where the objective needs one, a teacher that shares what the student trains, unequal
            vocabularies, a model that transforms its logits in an unknown way, an option that this trainer cannot
            honour (``compute_metrics``, ``label_smoothing_factor``, FSDP1, tensor or context parallelism).
        TypeError: a wrong type of objective, a head with an adapter, or one quantised by others than bitsandbytes and
            torchao.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        teacher: Any = None,
        objective: Objective | str = "self_evolution",
        *,
        temperature: float = 1.0,
        vocab_size: int | None = None,
        vocab_map: Any = None,
        tail: str | None = None,
        lists: fk.Lists | None = None,
        memory_budget: int | None = None,
        backend: str | None = None,
        beta_schedule: BetaSchedule | None = None,
        average: Average = "tokens",
        statistics: Iterable[str] = (),
        eval_metrics: bool = True,
        **trainer_args: Any,
    ) -> None:
        self.beta_schedule = beta_schedule
        if average not in ("tokens", "sequences"):
            raise ValueError(f"average must be 'tokens' or 'sequences', got {average!r}")
        self.average: Average = average
        objective = as_objective(objective)
        if beta_schedule is not None:
            annealed_part(objective)
        if objective.spec.needs_teacher or eval_metrics:
            teacher = opened(teacher)
        model = self._loaded(model, trainer_args)
        if model is not None and not labels_need_shift(model):
            raise ValueError(
                f"model must be a causal LM, {type(model).__name__} is an encoder-decoder: put KDLossMixin before "
                "transformers.Seq2SeqTrainer"
            )
        criterion = fk.KDLoss(
            objective, temperature=temperature, memory_budget=memory_budget, backend=backend, lists=lists
        )
        told = statistics_names(statistics)
        check_rows_of(trainer_args)
        if trainer_args.get("data_collator") is None:
            trainer_args["data_collator"] = DefaultCollator.of(model, trainer_args.get("processing_class"))
        super().__init__(
            model, teacher=teacher, criterion=criterion, vocab_size=vocab_size, vocab_map=vocab_map, tail=tail,
            statistics=told, eval_metrics=eval_metrics, **trainer_args,
        )  # fmt: skip
        self._warned_hard = self._told_lists = False
        self._baseline = Baseline.of(self.objective, self.kd_options, self.teaching, self.vocabulary)
        self.add_callback(RunningMetrics(*self._told))

    @property
    def _told(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What is logged beside the usual, of tokens and of steps."""
        of_tokens = (*self.kd_statistics, *((HARD_T,) if self._baseline else ()))
        return of_tokens, (ROUTER,) if self.router_coefficient is not None else ()

    def _loaded(self, model: Any, trainer_args: dict[str, Any]) -> Any:
        """The model, from its name too; then its tokenizer is the trainer's, where that has none."""
        if not isinstance(model, (str, Path)):
            return model
        if trainer_args.get("processing_class") is None:
            trainer_args["processing_class"] = tokenizer_of(model)
        return load_student(model)

    @property
    def metrics(self) -> RunningMetrics:
        """The running sums; found among the callbacks, since restoring callback states replaces them."""
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, RunningMetrics))

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        self.metrics.statistics, self.metrics.per_step = self._told  # not those of the checkpoint

    def current_objective(self) -> Objective:
        """The objective of the current step, with β from the schedule: a function of the step alone."""
        if self.beta_schedule is None:
            return self.objective
        progress = self.state.global_step / max(self.state.max_steps, 1)
        return with_beta(self.objective, self.beta_schedule.beta(progress, end=annealed_part(self.objective).beta))

    def _trained_on(self, inputs: dict[str, Any], out: fk.KDOutput) -> None:
        # ignored tokens hold 0, so they count nowhere
        gated = self.objective.spec.gate not in ("", RANK)
        hard = (out.is_hard if gated else out.difficulty > DEFAULT_GAMMA).sum()
        told = [out.statistics[name].sum() for name in self.kd_statistics]
        if self._baseline:
            told.append(self._baseline.hard(self._baseline.log_p_y(inputs, out.statistics)).sum())
        loss = out.loss
        if self.router_coefficient is not None:
            # each micro-batch and process has an equal part of the step's
            parts = self.accelerator.num_processes * max(len(self._step_batches), 1)
            told.append(out.statistics["router_loss"] / parts)
            loss = loss + self.router_coefficient * told[-1]
        self.metrics.add(loss, out.difficulty.sum(), hard, count_targets(inputs["labels"]), *told)

    def _statistics_of(self, teacher: Any) -> tuple[str, ...]:
        told = super()._statistics_of(teacher)
        asked = self._baseline is not None and self._baseline.columns is None
        return tuple(dict.fromkeys((*told, "log_p_y"))) if asked else told

    def _token_weights(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        if self.average == "tokens":
            return None
        return sequence_weights(inputs["labels"], inputs.get("position_ids"))

    def _denominator(self, batch: dict[str, Any]) -> torch.Tensor:
        return denominator(batch, self.average)

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
            if logs["difficulty"] == math.inf:  # a draft lacks what its teacher wants: says nothing
                del logs["difficulty"], logs["hard_fraction"]
                logs.pop(HARD_T, None)
            if self.beta_schedule is not None:
                logs["beta"] = annealed_part(self.current_objective()).beta
        super().log(logs, start_time)
        if not self._told_lists and self._has_lists:
            self._told_lists = True
            logger.warning(
                "loss is over lists of the teacher's tokens, another number than with the whole teacher (with a bucket "
                "for all other tokens a lower one, of drawn tokens a higher one); compare it with runs on such lists"
            )
        if "loss" in logs and not self._warned_hard:
            self._warn_if_starved()

    @property
    def _has_lists(self) -> bool:
        lists = [self.kd_options["lists"] if self.teaching else None, *self._given_teachers]
        return any(getattr(each, "tail", None) is not None for each in lists)

    def _get_dataloader(self, dataset: Dataset[Any], *args: Any, **kwargs: Any) -> DataLoader[Any]:
        if self.accelerator.num_processes > 1 and has_rows(dataset):
            dataset = MaskedTail(dataset)
        loader = super()._get_dataloader(dataset, *args, **kwargs)
        shard = getattr(loader, "batch_sampler", None)
        sampler = getattr(getattr(shard, "batch_sampler", None), "sampler", None)
        if hasattr(sampler, "set_epoch"):
            # accelerate does not look this deep in the loader of a resumed epoch, the Trainer looks here
            shard.set_epoch = sampler.set_epoch  # type: ignore[union-attr]
        return loader

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[Any] | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if not has_rows(dataset) or strategy == "batch_rebalance":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        rows = self._train_batch_size * self.accelerator.num_processes
        if strategy == "group_by_length":
            lengths = lengths_of(dataset)
            sampler: Sampler[Any] = LengthGroupedEpochs(lengths, rows * self.args.gradient_accumulation_steps, seed)
        elif strategy == "sequential":
            sampler = SequentialSampler(dataset)
        else:
            sampler = ShuffledEpochs(len(dataset), seed)
        return sampler if self.args.dataloader_drop_last else self._padded(sampler, rows)

    def _get_eval_sampler(self, eval_dataset: Dataset[Any]) -> Sampler[Any] | None:
        if self.accelerator.num_processes == 1 or not has_rows(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        rows = self.args.eval_batch_size * self.accelerator.num_processes
        return self._padded(SequentialSampler(eval_dataset), rows)  # type: ignore[arg-type]

    def _padded(self, sampler: Sampler[Any], rows: int) -> Sampler[Any]:
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
        self.metrics.collect(self.accelerator)  # trainer_state.json, with these in it, is written next

    def _warn_if_starved(self) -> None:
        """Warn once when the student has long been too weak for its objective."""
        state = self.state
        told = advice.warning(self.current_objective(), state.log_history, state.global_step, state.max_steps)
        if told is not None:
            self._warned_hard = True
            warnings.warn(told, stacklevel=2)
