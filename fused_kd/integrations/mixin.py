"""``KDLossMixin``: the compute_loss of any transformers Trainer, from hidden states."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import DataCollatorWithFlattening, DataCollatorWithPadding, default_data_collator

import fused_kd as fk
from fused_kd.integrations.arguments import (
    as_criterion,
    as_teachers,
    check_arguments,
    check_cache,
    check_tail_of_map,
    check_tokenizers,
)
from fused_kd.integrations.bodies import labels_need_shift
from fused_kd.integrations.distributed import (
    check_engine,
    prepare_arguments,
    shard_teacher,
    shards_weights,
    sum_over_ranks,
)
from fused_kd.integrations.evaluation import EvaluatedByTokens
from fused_kd.integrations.forms import HOST, Prefetching, Step, Teaching, on_device, targets_of
from fused_kd.integrations.heads import check_head_module, check_whole_head
from fused_kd.integrations.held_out import HeldOut, names_of
from fused_kd.integrations.labels import LABEL_PAD, count_targets, without_first_targets
from fused_kd.integrations.own_checkpoints import KeepsAverages
from fused_kd.integrations.packed import check_mask, check_packed, is_packed
from fused_kd.integrations.pair import check_trainable
from fused_kd.integrations.precision import warn_of_lost_updates
from fused_kd.integrations.prompted import checked_prompts
from fused_kd.integrations.ranked import RanksTokens
from fused_kd.integrations.router import asks_for_router_loss, check_router_loss, coefficient
from fused_kd.integrations.routing import check_lm_head, loss_of_heads, route_head_loss
from fused_kd.integrations.sampling import has_rows
from fused_kd.integrations.taught import (
    Taught,
    check_datasets,
    check_drawn,
    check_lists,
    check_rows,
    teaching_of,
    vocab_of,
)
from fused_kd.integrations.vocabulary import TeacherMap
from fused_kd.objectives import Objective
from fused_kd.options import LossOptions, statistics_columns, statistics_names

if TYPE_CHECKING:
    from torch.utils.data import DataLoader, Dataset
    from transformers import Trainer, TrainingArguments
else:
    Trainer = object  # the class that the mixin is put before brings its own


class KDLossMixin(RanksTokens, Taught, KeepsAverages, EvaluatedByTokens):
    """Trains a Trainer's model towards ``teacher`` with a fused loss; to be put before the Trainer's class.

    >>> class MyTrainer(KDLossMixin, Seq2SeqTrainer): ...
    >>> MyTrainer(model, args, teacher=teacher, objective=fk.SelfEvolution(), train_dataset=...).train()

    Batches need ``labels`` (batch, length) with -100 where there is no loss, as transformers' collators make them:
    unshifted for decoder-only models, aligned for encoder-decoders (whose ``decoder_input_ids`` are made from them
    where the batch has none, for each model in its own way), and what else the models take; both get the same inputs.
    The loss is the mean over the target tokens of the whole optimizer step, exact under gradient accumulation and over
    the processes of DDP, FSDP2 and DeepSpeed. ``eval_loss`` is the mean over the tokens of the evaluation set (with
    several processes, of the rows that the Trainer's sampler repeats to fill the last batch too); no logits are
    computed. ``SelfEvolutionTopK`` ranks the tokens of the whole optimizer step, for which a first pass without
    gradients is made where that has several batches, and in evaluation those of a batch on all processes.

    A student with experts whose configuration has ``output_router_logits`` gets its router's loss too, as its own
    forward adds it, times ``router_aux_loss_coef``: of each micro-batch, and then the mean over those of the step and
    over processes. ``eval_loss`` is without it.

    With TRL's ``SFTTrainer`` this loss replaces its own; what that logs beside the loss (``entropy``,
    ``mean_token_accuracy``, ``num_tokens``) is not there.

    Args:
        model: the student, any Hugging Face causal LM or encoder-decoder with adapters or without; FSDP2 and ZeRO-3
            need a head without one.
        args: the Trainer's arguments. ``label_smoothing_factor`` must be 0.
        *trainer_args: further positional arguments of the Trainer.
        teacher: one of these, or several; None for objectives without a teacher (SFT).

            - another model of the same kind on the same vocabulary; it is frozen, kept in eval mode, and moved to the
              training's device or sharded as the student is (FSDP2, ZeRO-3);
            - a PEFT model, its base, or with ``peft_config`` the model itself: the student with its adapters off,
              without a second copy; or another :class:`fused_kd.integrations.own.OwnTeacher`;
            - a teacher that is no model here, :class:`fused_kd.integrations.forms.GivenTeacher`: a cache
              (:class:`fused_kd.training.teacher_cache.TeacherCache`, whose columns the batches hold), a server
              (:class:`fused_kd.serving.client.ServedTeacher`), or any object with ``tail`` and no ``forward``, whose
              ``teacher_log_probs`` (float) and ``teacher_indices`` (int64), (batch, length, K), are in the batches,
              aligned with the hidden states;
            - ``[(weight, teacher), ...]``: the mixture of their probabilities, see :class:`fused_kd.Mixture`;
            - ``[teacher, ...]``: each row's own, by the number in ``teacher_id`` (batch,) of the batches.

            Models and servers read ``teacher_input_ids`` in place of the batch's ``input_ids`` where it has them, for a
            prompt of the teacher's own, with ``teacher_attention_mask`` or ``teacher_position_ids`` and
            ``teacher_labels``, which mark the same tokens as ``labels``.
        objective: one of ``fused_kd``'s objectives, their sums, or its text (:func:`fused_kd.objectives.parse`).
        criterion: in place of ``objective``: a :class:`fused_kd.KDLoss`, whose options are used too. ``shift`` is
            the model's; ``reduction`` and ``ignore_index`` must be the defaults.
        vocab_size: cut both heads to this many columns. None (default) takes heads of equal size as they are; for
            unequal heads the size of ``processing_class`` (a tokenizer) is used, and without it an error is raised.
        vocab_map: of a causal teacher with another vocabulary: :func:`fused_kd.vocab_map`'s, or a tensor of
            ``columns`` as of :class:`fused_kd.LMHead`. Ids of the batches are the student's where its embedding is as
            large as its head, and translated for the teacher; else (a draft on a reduced vocabulary) the teacher's.
        tail: with ``vocab_map``, as of :class:`fused_kd.LMHead`; None: "renormalize".
        statistics: names of :meth:`fused_kd.KDLoss.evaluate`, of each token of the training's micro-batches: for
            ``_trained_on`` and ``compute_loss(return_outputs=True)``; :class:`fused_kd.training.trainer.KDTrainer` logs
            their means.
        eval_metrics: tell more of an evaluation than its loss, see :class:`fused_kd.training.trainer.KDTrainer`, where
            it is on; default False. A teacher that the objective does not need is then there for evaluation alone.
        **kwargs: those of the Trainer. ``compute_metrics`` needs ``predict_with_generate``.

    Raises:
        ValueError: no teacher where the objective needs one, a teacher that shares what the student trains or of
            another kind, unequal vocabularies, a model that transforms its logits in an unknown way, an option that
            cannot be honoured.
        TypeError: a wrong type of objective, a head that :func:`fused_kd.integrations.transformers.lm_head_of`
            refuses.
    """

    # num_items_in_batch already spans the accumulation steps
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *trainer_args: Any,
        teacher: Any = None,
        objective: Objective | str | None = None,
        criterion: fk.KDLoss | None = None,
        vocab_size: int | None = None,
        vocab_map: Any = None,
        tail: str | None = None,
        statistics: Iterable[str] = (),
        eval_metrics: bool = False,
        **kwargs: Any,
    ) -> None:
        if not isinstance(eval_metrics, bool):
            raise TypeError(f"eval_metrics must be True or False, got {eval_metrics!r}")
        self.eval_metrics = eval_metrics
        criterion = as_criterion(objective, criterion)
        check_tail_of_map(vocab_map, tail)
        self._vocab_map, self._tail = vocab_map, tail
        self.vocabulary: TeacherMap | None = None
        self.kd_statistics = statistics_names(statistics)
        self.objective: Objective = criterion.objective
        self.kd_options: dict[str, Any] = {name: getattr(criterion, name) for name in LossOptions.__annotations__}
        if vocab_size is None:
            vocab_size = criterion.vocab_size
        # one that the objective does not need is for evaluation
        wanted = self.objective.spec.needs_teacher or eval_metrics
        self._teachers, self._weights = as_teachers(teacher if wanted else None)
        if self.objective.spec.needs_teacher and not self._teachers:
            raise ValueError(f"teacher must be given for {self.objective!r}")
        check_drawn(self._teachers, self.objective, self.kd_options["temperature"])
        check_lists(self._teachers, self._weights, self.objective, self.kd_options, self.kd_statistics)
        statistics_columns(self.kd_statistics, None, self.objective.spec, criterion.lists)
        check_arguments(args, kwargs)
        if model is None:
            raise ValueError("model must be given, got None")
        if isinstance(model, torch.nn.Module) and kwargs.get("peft_config") is None:
            self._take_models(model, vocab_size, kwargs.get("processing_class"))
        prepare_arguments(args)
        super().__init__(model, args, *trainer_args, **kwargs)
        if self.model is not model:  # loaded, or wrapped into adapters, by the Trainer
            self._take_models(self.model, vocab_size, self.processing_class)
        prepare_arguments(self.args)  # those that the Trainer made, where it was given none
        student: Any = self.model
        # some Trainers set what it is read from
        self.router_coefficient: float | None = None
        if asks_for_router_loss(student):
            check_router_loss(student)
            self.router_coefficient = coefficient(student)
        if self.train_dataset is not None:
            check_trainable(student)
            warn_of_lost_updates(student, self.args, self.accelerator)
        models = self._own_models(student)
        for each in models[1:] if self.vocabulary is None else ():
            check_tokenizers(student, each, self.processing_class)
        for given in self._given_teachers:
            check_cache(given, self.processing_class)
        evaluated = getattr(self, "eval_dataset", None)
        check_datasets(self._given_teachers, self._teacher_columns, self.train_dataset, evaluated)
        sized = self.train_dataset is None or has_rows(self.train_dataset)
        # of a stream without end every process gets as many batches
        sized = sized or getattr(self.train_dataset, "endless", False)
        check_engine(self.accelerator, self.args, student, sized)
        sharded = shards_weights(self.accelerator)
        for each in models:
            check_whole_head(each, sharded)
            route_head_loss(each)
        for each in models[1:]:
            each.requires_grad_(False).eval()
        # sharded models are whole, or real at all on this rank, only when they run
        self._models_checked = not sharded
        if self.teaching is not None:
            self.teaching.sharded = sharded
        if self._models_checked:
            for each in models[1:]:
                if not (getattr(each, "hf_device_map", None) or getattr(each, "is_quantized", False)):
                    self._move_model_to_device(each, self.args.device)
            for each in models:
                check_lm_head(each)
        self.keep_averages(self.teaching.forms if self.teaching else ())
        self._packing_checked = False
        self._step_batches: list[dict[str, Any]] = []

    def _take_models(self, student: Any, vocab_size: int | None, tokenizer: Any) -> None:
        """Check student and teachers by their structure; set ``teaching``, ``vocab_size`` and ``shift``."""
        self.shift = labels_need_shift(student)
        self.teaching = teaching_of(self._teachers, self._weights, student)
        models = self._own_models(student)
        for each in models:
            check_head_module(each)
        if self._vocab_map is None:
            self.vocab_size = vocab_of(models, self.teaching, vocab_size, tokenizer)
        else:
            self.vocab_size = vocab_size
            self.vocabulary = self._mapped(student)
        for each in models[1:]:
            if labels_need_shift(each) != self.shift:
                kinds = ("a decoder-only", "an encoder-decoder")
                raise ValueError(
                    f"teacher must be {kinds[not self.shift]} model as the student is, got {kinds[self.shift]}"
                )

    @property
    def _teaches(self) -> Teaching | None:
        """The teachers, where the training has some."""
        return self.teaching if self.objective.spec.needs_teacher else None

    def _mapped(self, student: Any) -> TeacherMap:
        teaching = self.teaching
        if teaching is None or len(teaching.forms) > 1 or teaching.given:
            why = f"for {self.objective!r}, which has no teacher"
            if teaching is not None:
                why = "with a cache or a server" if len(teaching.forms) == 1 else "with several teachers"
            raise ValueError(f"vocab_map must be None {why}")
        if not self.shift:
            raise ValueError(f"vocab_map must be None for {type(student).__name__}: it is for causal LMs")
        options = {**self.kd_options, "vocab_size": self.vocab_size}
        made = TeacherMap(
            self._vocab_map, self._tail, self.objective, options, self.kd_statistics,
            student=student, teacher=self.teacher,
        )  # fmt: skip
        teaching.models[0].vocabulary = made
        return made

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
        _check_labels(inputs)
        objective = self._unranked(model, inputs)
        ranks = 1 if num_items_in_batch is None else self.accelerator.num_processes
        held_out = None if model.training else self.held_out
        loss, out = self._run(model, inputs, objective, num_items_in_batch, ranks, held_out)
        if model.training:
            self._trained_on(inputs, out)
        return (loss, {**out._asdict(), "loss": loss}) if return_outputs else loss

    def _held_out(self) -> HeldOut | None:
        if not self.eval_metrics or self.kd_options["tp_group"] is not None:
            return None
        options = {**self.kd_options, "shift": self.shift, "vocab_size": self.vocab_size}
        names = names_of(self.objective, self.teaching, self.vocabulary)
        return HeldOut(self.objective, options, names) if names else None

    def _trained_on(self, inputs: dict[str, Any], out: fk.KDOutput) -> None:
        """Called with each micro-batch of the training and its loss, which spans all processes and no factor."""

    def _statistics_of(self, teacher: Any) -> tuple[str, ...]:
        """What to tell of each token of a micro-batch of the training."""
        return self.kd_statistics

    def _token_weights(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """(batch, length) factors of the tokens' losses; None: 1."""
        return None

    def _run(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        objective: Objective,
        num_items: Any,
        ranks: int,
        held_out: HeldOut | None = None,
    ) -> tuple[torch.Tensor, fk.KDOutput]:
        """``ranks`` times the loss, for the backward, and the loss itself with each token's numbers."""
        inputs = dict(inputs)
        weights = self._token_weights(inputs)
        # an encoder-decoder makes its decoder's inputs from them
        labels = inputs.pop("labels") if self.shift else inputs["labels"]
        columns = {name: inputs.pop(name) for name in self._teacher_columns if name in inputs}
        host = inputs.pop(HOST, None)
        options = {**self.kd_options, "shift": self.shift, "vocab_size": self.vocab_size}

        def loss(head: fk.LMHead, teacher: Any) -> fk.KDOutput:
            arguments: dict[str, Any] = {"token_weights": weights, "num_items": num_items}
            if held_out is not None:
                out, sums = held_out.measured(head, teacher, labels, objective, **arguments)
                held_out.add(sums, count_targets(labels) if self.shift else (labels != LABEL_PAD).sum())
                return out
            # evaluation and the ranking of a step's tokens log none
            told = self._statistics_of(teacher) if model.training and torch.is_grad_enabled() else ()
            return fk.kd_loss(head, teacher, labels, objective, statistics=told, **arguments, **options)

        if not self._models_checked:
            self._check_sharded(model)
        if not self._packing_checked and self.shift:
            self._check_packing(model, inputs)
        within = None
        if self.teaching is not None and (objective.spec.needs_teacher or held_out is not None):
            step = Step(model, inputs, columns, targets_of(labels, self.shift), host)
            within = functools.partial(self.teaching.within, step)
        router_share = None
        if self.router_coefficient is not None and model.training and torch.is_grad_enabled():
            router_share = self.router_coefficient / max(len(self._step_batches), 1)
        # a context of its own for each pass: the cache of a pass without gradients would cut those of the next
        with self.accelerator.autocast():
            return loss_of_heads(model, inputs, loss, ranks=ranks, within=within, router_share=router_share)

    def _check_sharded(self, model: torch.nn.Module) -> None:
        for form in self.teaching.models if self.teaching else ():
            form.model = shard_teacher(form.model, self.accelerator)
        for each in self._own_models(model):
            check_lm_head(each)
        self._models_checked = True

    def _check_packing(self, model: torch.nn.Module, inputs: dict[str, Any]) -> None:
        """Before the first packed batch: both models must keep its rows apart."""
        if not is_packed(inputs) and not isinstance(self.data_collator, DataCollatorWithFlattening):
            return
        with self.accelerator.autocast():
            for each in self._own_models(model):
                check_packed(each, inputs)
        self._packing_checked = True

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The micro-batches of one optimizer step, and what its loss is averaged over on all processes, at least 1."""
        try:
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        except ValueError as error:
            if self.data_collator is not default_data_collator and not isinstance(
                self.data_collator, DataCollatorWithPadding
            ):
                raise
            raise ValueError(f"data_collator must be given for these rows: {_COLLATOR} ({error})") from error
        for batch in batches:
            _check_labels(batch)
        if self.shift:
            batches = [without_first_targets(batch) for batch in batches]
        if self._teaches:  # those that a worker collated are asked for here
            for batch in batches:
                self._teaches.prefetch(batch, self.shift)
        self._step_batches, self._step_gamma = batches, None
        count = sum((self._denominator(batch) for batch in batches), torch.zeros((), dtype=torch.int64))
        return batches, sum_over_ranks(self.accelerator, count).clamp(min=1)

    def _get_dataloader(self, dataset: Dataset[Any], *args: Any, **kwargs: Any) -> DataLoader[Any]:
        check_rows(self._given_teachers, dataset)
        collate = self.data_collator
        if self.vocabulary is not None:
            self.data_collator = self.vocabulary.collated(collate)
        if self._teaches and self._teaches.prefetches and not self.args.dataloader_num_workers:
            self.data_collator = Prefetching(self.data_collator, self._teaches, self.shift)
        try:
            loader = super()._get_dataloader(dataset, *args, **kwargs)
        finally:
            self.data_collator = collate
        if hasattr(loader, "device"):
            # accelerate's loader moves whole batches; without a device _prepare_inputs does it, and spares the labels
            loader.device = None
        return loader

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        check_mask(inputs)
        inputs = checked_prompts(inputs, shift=self.shift, same_ids=self.vocabulary is None)
        # on the host, labels tell which tokens to drop without a synchronisation
        kept = {"labels": inputs["labels"]} if "labels" in inputs else {}
        # DeepSpeed's way with inputs would round these
        columns = {name: inputs[name] for name in self._teacher_columns if name in inputs}
        if self.teaching is not None and self.teaching.reads_host and "labels" in inputs:
            kept[HOST] = self.teaching.on_host(inputs, self.shift)
        kept |= on_device(columns, self.args.device)
        return {**super()._prepare_inputs({key: value for key, value in inputs.items() if key not in kept}), **kept}

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        self._signature_columns = list(dict.fromkeys([*columns, *self._teacher_columns]))  # type: ignore[assignment]


_COLLATOR = "fused_kd.training.Collator pads input_ids and labels"


def _check_labels(batch: dict[str, Any]) -> None:
    if "labels" not in batch:
        raise ValueError(f"batch must have labels, got {', '.join(sorted(batch))}: {_COLLATOR}")
