"""TRL's GKD and distillation trainers with a fused loss: neither model's logits are ever held.

Import ``GKDTrainer`` or ``DistillationTrainer`` from here instead of from TRL (1.16 or later); arguments, data,
generation and logging stay TRL's.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

try:
    from transformers import Trainer
    from trl.experimental import gkd
    from trl.trainer import distillation_trainer
except ImportError as error:
    raise ImportError(
        "fused_kd.integrations.trl needs trl 1.16 or later: pip install 'fused_kd[trl]'", name=error.name
    ) from error

import fused_kd as fk
from fused_kd.integrations.arguments import as_objective, check_cache, check_tail_of_map, check_tokenizers
from fused_kd.integrations.distributed import check_fsdp, sum_over_ranks
from fused_kd.integrations.forms import Step, Teaching, targets_of
from fused_kd.integrations.heads import common_columns
from fused_kd.integrations.labels import LABEL_PAD, count_targets
from fused_kd.integrations.own import StudentView
from fused_kd.integrations.own_checkpoints import KeepsAverages
from fused_kd.integrations.pair import check_trainable, paired
from fused_kd.integrations.precision import warn_of_lost_updates
from fused_kd.integrations.routing import loss_of_heads
from fused_kd.integrations.taught import columns_of
from fused_kd.integrations.transformers import (
    check_head_module,
    check_lm_head,
    route_head_loss,
)
from fused_kd.integrations.trl_teachers import OtherTeachers
from fused_kd.integrations.vocabulary import TeacherMap
from fused_kd.objectives import Objective

# what a multimodal model takes beside tokens, as TRL's DistillationTrainer names it in its batches
_MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class FusedLoss(KeepsAverages, Trainer):
    """What both trainers share: a loss from hidden states in place of TRL's divergence of logits.

    For one process, DDP, FSDP2 and ZeRO-3 (where the teacher is sharded too). Labels are read on the host once a
    micro-batch, before the models run, so that prompts and padding cost no GEMM of the loss.

    Args:
        model, teacher_model, args, ...: as for TRL's trainer of the same name. With vocabularies padded to unequal
            sizes, models and not names. A PEFT model may be its own teacher (not under DeepSpeed): give it, its base,
            or with ``peft_config`` the model itself, and the teacher is the student with its adapters off. Other
            teachers of :class:`fused_kd.integrations.mixin.KDLossMixin` go with a ``model`` that is no name, without
            DeepSpeed and FSDP: a server, the student itself, ``[(weight, teacher), ...]``. A cache does not: what is
            trained on is written by the student.
        objective: one of ``fused_kd``'s objectives, or its name. None (default): ``GeneralizedJSD`` with ``args.beta``,
            TRL's own divergence (0: KL(p||q), 1: KL(q||p), p the teacher). The label of an objective with one is the
            token of the completion, on-policy the student's own sample.
        temperature: of the distributions in the loss; no factor T**2, as in TRL. None (default): what TRL takes, 1
            for GKD (whose ``args.temperature`` is for sampling alone) and ``args.temperature`` for distillation.
        vocab_size: cut both heads to this many columns and never sample beyond. None (default): heads of equal size
            stay whole; unequal ones are cut to the size of ``processing_class``, the tokenizer of both models.
        vocab_map, tail: of a teacher with another vocabulary, as of
            :class:`fused_kd.integrations.mixin.KDLossMixin`; tokens that the teacher lacks are never sampled. The
            student's embedding must be as large as its head.
        lists: compare only a :class:`fused_kd.Lists` of each token.
        memory_budget: bytes for the loss's buffers; None lets the library choose.
        backend: of :class:`fused_kd.KDLoss`; None picks.

    Raises:
        ValueError: unequal vocabularies without a tokenizer, a head that does more than weight, bias, scale and
            softcap, a teacher that shares what the student trains, ``compute_metrics`` (there are no logits to pass to
            it), an objective that ranks the tokens of a step that is made of several micro-batches, FSDP1, vLLM with a
            student whose padded columns are cut.
        TypeError: a wrong type of objective, a quantised head or one with an adapter.
    """

    # whether args.temperature is the loss's too
    loss_at_sampling_temperature = False

    # TRL's
    teacher_model: Any
    beta: float
    generation_config: Any
    generation_kwargs: dict[str, Any]

    def __init__(
        self,
        model: Any = None,
        teacher_model: Any = None,
        args: Any = None,
        *positional: Any,
        objective: Objective | str | None = None,
        temperature: float | None = None,
        vocab_size: int | None = None,
        vocab_map: Any = None,
        tail: str | None = None,
        lists: fk.Lists | None = None,
        memory_budget: int | None = None,
        backend: str | None = None,
        **trainer_args: Any,
    ) -> None:
        self.objective: Objective | None = None if objective is None else as_objective(objective)
        check_tail_of_map(vocab_map, tail)
        for name, each in (("model", model), ("teacher_model", teacher_model)):
            if each is None:
                raise ValueError(f"{name} must be a model or its name, got None")
            if isinstance(each, str) and each.startswith(("http://", "https://", "cache:")):
                raise TypeError(f"{name} must be a model or its name, got {each!r}: see fused_kd.training.load_teacher")
        others = None
        if not isinstance(teacher_model, (str, torch.nn.Module)):
            teacher_model = others = OtherTeachers(model, teacher_model, args)
        if trainer_args.get("compute_metrics") is not None:
            raise ValueError("compute_metrics must be None: evaluation computes no logits to pass to it")
        self.loss_options: dict[str, Any] = {"memory_budget": memory_budget, "backend": backend, "lists": lists}
        # checks the options before anything is loaded
        fk.KDLoss(
            self.objective or fk.GeneralizedJSD(),
            temperature=1.0 if temperature is None else temperature,
            vocab_size=vocab_size,
            **self.loss_options,
        )
        loaded = [each for each in (model, teacher_model) if not isinstance(each, (str, OtherTeachers))]
        for each in loaded:
            check_head_module(each, plain=True)
        if len(loaded) == 2 and not trainer_args.get("peft_config"):
            teacher_model = paired(model, teacher_model)
        with _one_vocab_size(model, teacher_model):
            super().__init__(model, teacher_model, args, *positional, **trainer_args)
        if temperature is None:
            settings: Any = self.args
            temperature = float(settings.temperature) if self.loss_at_sampling_temperature else 1.0
        self.loss_options["temperature"] = temperature
        student: Any = self.accelerator.unwrap_model(self.model)
        self.teaching = self._teaching(student, others)
        models = [self.accelerator.unwrap_model(form.model) for form in self.teaching.models]
        for each in models if vocab_map is None else ():
            check_tokenizers(student, each, self.processing_class)
        for form in self.teaching.given:
            check_cache(form.given, self.processing_class)
        check_trainable(student)
        warn_of_lost_updates(student, self.args, self.accelerator)
        self.vocab_size, self.vocabulary = vocab_size, None
        if vocab_map is None:
            heads = columns_of([student, *models], self.teaching)
            self.vocab_size = common_columns(heads, vocab_size, self.processing_class)
            self._sample_within(self.vocab_size, heads)
        elif len(models) == 1 and others is None:
            self.vocabulary = self._mapped(vocab_map, tail, student, models[0])
            self.teaching.models[0].vocabulary = self.vocabulary
        else:
            raise ValueError("vocab_map must be None but with one teacher that is a model of its own")
        for each in (student, *models):
            route_head_loss(each)
        if self.args.use_liger_kernel:
            # its other kernels stay; this one would put another forward in place of the routed one
            liger = {**(self.args.liger_kernel_config or {}), "fused_linear_cross_entropy": False}
            self.args.liger_kernel_config = liger
        self._check_settings()
        # a sharded model is whole only when it runs
        self._heads_checked = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if not self._heads_checked:
            self._check_heads(self.model)
        self.keep_averages(self.teaching.forms)
        self._difficulty: dict[str, torch.Tensor] = {}

    def current_objective(self) -> Objective:
        """The objective, or the divergence of TRL's current ``beta``."""
        return self.objective or fk.GeneralizedJSD(beta=self.beta)

    def fused_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], labels: torch.Tensor, num_items: Any, ranks: int
    ) -> tuple[torch.Tensor, fk.KDOutput]:
        """``ranks`` times the loss, for the backward, and the loss itself with each token's numbers.

        Args:
            model: the student, wrapped as it trains.
            inputs: what both models take, (batch, length) and more.
            labels: (batch, length), the tokens, or -100 where there is no loss; position i predicts label i + 1.
            num_items: what the sum of the tokens' losses is divided by; None: the valid tokens of ``labels``.
        """
        if not self._heads_checked:
            self._check_heads(model)
        labels = labels.cpu()  # on the host they let prompts drop out of every GEMM
        if self.vocabulary is not None and self.vocabulary.unmapped:
            self.vocabulary.check_ids({name: inputs[name].cpu() for name in ("input_ids", "attention_mask")})

        def loss(head: fk.LMHead, teacher: Any) -> fk.KDOutput:
            return fk.kd_loss(
                head,
                teacher,
                labels,
                self.current_objective(),
                shift=True,
                vocab_size=self.vocab_size,
                num_items=num_items,
                **self.loss_options,
            )

        with self.accelerator.autocast():
            within = functools.partial(self.teaching.within, Step(model, inputs, {}, targets_of(labels, shift=True)))
            made, out = loss_of_heads(model, inputs, loss, ranks=ranks, within=within)
        # ignored tokens have difficulty 0 and are not hard, so they count nowhere
        sums = torch.stack([out.difficulty.sum(), out.is_hard.sum()]).double()
        sums = torch.cat([sums, count_targets(labels)[None].to(sums)])
        prefix = "" if model.training else "eval_"
        self._difficulty[prefix] = sums + self._difficulty.get(prefix, 0.0)
        return made, out

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's; entries with a loss also get ``difficulty``, the mean KL(target||student) in nats since the last.

        With an objective that has a gate there is ``hard_fraction`` too, the share of tokens above its Γ.
        """
        prefix = "eval_" if "eval_loss" in logs else ""
        sums = self._difficulty.pop(prefix, None) if f"{prefix}loss" in logs else None
        if sums is not None:
            difficulty, hard, tokens = sum_over_ranks(self.accelerator, sums).tolist()
            logs[f"{prefix}difficulty"] = difficulty / max(tokens, 1.0)
            if self.objective is not None and self.objective.spec.gate:
                logs[f"{prefix}hard_fraction"] = hard / max(tokens, 1.0)
        super().log(logs, start_time)

    def _teaching(self, student: Any, others: OtherTeachers | None) -> Teaching:
        """TRL's teacher, or ``others`` that stand behind it."""
        if others is not None:
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                raise ValueError("teacher_model must be one model under DeepSpeed and FSDP, or use KDTrainer")
            return others.teaching(student, self.accelerator, self.current_objective(), self.loss_options)
        teacher: Any = paired(student, self.accelerator.unwrap_model(self.teacher_model))
        if isinstance(teacher, StudentView):
            if self.is_deepspeed_enabled:
                raise ValueError(
                    "teacher_model must be another model than the student under DeepSpeed, or use KDTrainer"
                )
            self.teacher_model = teacher
        return Teaching([self.teacher_model])

    def _check_heads(self, model: Any) -> None:
        with self.accelerator.autocast():
            for each in (model, *(form.model for form in self.teaching.models)):
                check_lm_head(each)
        self._heads_checked = True

    def _check_settings(self) -> None:
        check_fsdp(self.accelerator)
        if self.objective is None:
            return
        parts = self.accelerator.num_processes * self.args.gradient_accumulation_steps
        if self.objective.spec.ranked and parts > 1:
            raise ValueError(
                f"objective must not rank tokens over a step of {parts} micro-batches, got {self.objective!r}: use "
                "SelfEvolution, or fused_kd.training.trainer.KDTrainer, which ranks them together"
            )
        # TRL's distillation, which has no lmbda, is always on-policy
        shares = [getattr(part, "lam", 1.0) for _, part in self.objective.summands]
        reads_labels = any(isinstance(part, fk.SFT) for _, part in self.objective.summands)
        reads_labels |= any(isinstance(lam, torch.Tensor) or lam < 1.0 for lam in shares)
        if reads_labels and getattr(self, "lmbda", 1.0) > 0.0:
            warnings.warn(
                f"{self.objective!r} takes the completion's tokens as labels, and on-policy these are the student's "
                "own samples: lam=1 leaves the teacher alone as the target",
                stacklevel=4,
            )

    def _mapped(self, vocab_map: Any, tail: str | None, student: Any, teacher: Any) -> TeacherMap:
        options = {**self.loss_options, "vocab_size": self.vocab_size}
        made = TeacherMap(vocab_map, tail, self.current_objective(), options, student=student, teacher=teacher)
        if not made.own_ids:
            raise ValueError(
                "vocab_map must go with a student whose embedding is as large as its head: others cannot sample"
            )
        if made.unmapped:
            self._never_sample(made.unmapped)
        return made

    def _sample_within(self, vocab_size: int | None, columns: list[int]) -> None:
        """Never sample a padded column: neither another model nor the loss has it. ``columns`` of the student first."""
        if vocab_size is None:
            return
        self._never_sample(list(range(vocab_size, max(columns))), at_all=columns[0] > vocab_size)

    def _never_sample(self, tokens: list[int], *, at_all: bool = True) -> None:
        """``at_all``: whether some of them are the student's."""
        if at_all and getattr(self.args, "use_vllm", False):
            raise ValueError(
                f"use_vllm must be False where tokens from {tokens[0]} on are the student's alone: vLLM would sample "
                "them; resize the student's embeddings to the tokenizer"
            )
        self.generation_config.suppress_tokens = [*(self.generation_config.suppress_tokens or []), *tokens]
        self.generation_kwargs["suppress_tokens"] = self.generation_config.suppress_tokens


class GKDTrainer(FusedLoss, gkd.GKDTrainer):
    """``trl.experimental.gkd.GKDTrainer`` without logits: ``lmbda``, ``beta``, ``seq_kd`` and the rest as there.

    In one process the losses and gradients are TRL's. Over several, a step's loss is the mean over the tokens of all
    of them, as of one process (TRL's gradient is that over the number of processes). Like TRL it divides by the
    completion tokens of the *data*, also where the student's own completion took their place.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The fused loss of a micro-batch; with ``return_outputs`` also a dict: loss, difficulty, is_hard."""
        whole = num_items_in_batch is not None and self.args.average_tokens_across_devices
        ranks = self.accelerator.num_processes if whole else 1
        tokens = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        loss, out = self.fused_loss(model, tokens, inputs["labels"], num_items_in_batch, ranks)
        return (loss, {**out._asdict(), "loss": loss}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """The loss of one batch; never logits."""
        return super().prediction_step(model, inputs, True, ignore_keys)


class DistillationTrainer(FusedLoss, distillation_trainer.DistillationTrainer):
    """``trl.DistillationTrainer`` (always on-policy) with this library's loss; see :class:`FusedLoss`.

    Losses and gradients are TRL's. Its ``entropy`` of the student is not logged; ``difficulty`` is.
    """

    loss_at_sampling_temperature = True

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The fused loss of a micro-batch's completions, without those tokens that a tool wrote."""
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        prompts, completions = inputs["prompt_ids"], inputs["completion_ids"]
        labels = torch.cat([torch.full_like(prompts, LABEL_PAD), completions.masked_fill(mask == 0, LABEL_PAD)], 1)
        tokens = {
            "input_ids": torch.cat([prompts, completions], 1),
            "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            **{key: inputs[key] for key in _MULTIMODAL if key in inputs},
        }
        ranks = 1
        if model.training and inputs.get("num_items_in_batch") is not None:
            num_items_in_batch, ranks = inputs["num_items_in_batch"].clamp(min=1), self.accelerator.num_processes
        loss, _ = self.fused_loss(model, tokens, labels, num_items_in_batch, ranks)
        return (loss, None) if return_outputs else loss


@contextmanager
def _one_vocab_size(student: Any, teacher: Any) -> Iterator[None]:
    """Within, the teacher's config has the student's vocabulary size: TRL refuses padded vocabularies by it."""
    if isinstance(student, str) or isinstance(teacher, str):
        yield
        return
    config = teacher.config.get_text_config()
    size, config.vocab_size = config.vocab_size, student.config.get_text_config().vocab_size
    try:
        yield
    finally:
        config.vocab_size = size
