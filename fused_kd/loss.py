"""The public loss: :class:`KDLoss` for modules, :func:`kd_loss` for everything that a token's loss can tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .engines.dispatch import LISTS, TOLD, choose_engine
from .engines.problem import IGNORED, Problem, Side, Wanted
from .inputs import (
    KDOutput,
    Lists,
    LMHead,
    check_labels,
    common_vocab,
    shifted,
)
from .mixtures import Mixture, as_teacher
from .objectives import Objective
from .objectives.base import parts_of, shown_value
from .ops import KDFunction, pack
from .options import (
    LossOptions,
    check_objective,
    check_tail,
    checked_option,
    statistics_columns,
    statistics_names,
    token_scalars,
)
from .rows.contract import Shards
from .sides import autocast_dtype, flat_side
from .teachers import NO_TEACHERS, AnyTeacher, Teachers, flat_teachers, resolved
from .terms import STATISTICS, Number, Scalars
from .tokens import labels_weights_scale


class KDLoss(nn.Module):
    """Distillation loss from hidden states and lm_head weights, without logits in memory.

    >>> criterion = KDLoss(SelfEvolution(gamma=0.4, beta=0.5, lam=0.5))
    >>> loss = criterion(LMHead(h_s, W_s), LMHead(h_t, W_t), labels)
    >>> loss.backward()

    Args:
        objective: what to minimise, e.g. :class:`fused_kd.SelfEvolution`, or a sum, ``0.5 * fk.SFT() +
            fk.ReverseKD(lam=1)``. Assign a new one of the same class (of a sum, of the same classes) at any time
            (annealing): nothing is compiled again. The options may be assigned too, and are checked then as here.
        ignore_index: label of tokens that take no part.
        reduction: "mean" over valid tokens (with ``token_weights``: weighted mean), "sum", or "none".
        temperature: T in [1e-8, 1e12], or a tensor with one for each token, in the shape of the labels. Every
            distribution is softmax(logits / T), except the student's in a separate hard-label term (``SFT``,
            ``ForwardKD``, ``ReverseKD``, ``SkewTeacher``) and in ``ZLoss``, which stays at temperature 1, as all of an
            objective without a teacher does. The loss is not multiplied by T**2.
        vocab_size: cut both sides to their first ``vocab_size`` logits (padded vocabularies); with ``columns`` of the
            teacher, the student and the map.
        shift: the labels are the input tokens: position i predicts label i + 1. Nothing but the labels is copied.
            ``token_weights``, the objective's tensors and results of each token are those of the predicting position.
        memory_budget: bytes the workspace may take beyond inputs, results and their gradients; None lets the planner
            choose.
        backend: "torch", "triton", "cuda" (CUDA C++, compiled at first use; NVIDIA GPUs), "native" (C, likewise; CPUs),
            or None for the best one on the tensors' device.
        validate: check labels on any device and look for non-finite logits, naming the first bad token. Waits for the
            device; labels on the CPU are always checked.
        signed: ``token_weights`` may be negative, as advantages are. A mean is then over the valid tokens (or
            ``num_items``), not over the weights, whose sum says nothing.
        engine: "chunked" holds the logits of a chunk of tokens; "streaming" (Triton) holds none and computes them
            again instead, two to four times in all. None: chunked, unless ``memory_budget`` is too small for it.
        grad_filter_eps: tiles of logit gradients whose every entry is below it in size, before token weights and the
            reduction, count as zero and cost no gradient GEMM. Each entry is then off by less than it, a token's
            hidden gradient by less than ``grad_filter_eps * sum_v |W_v|`` times the token's factor, a vocabulary
            entry's weight gradient by less than ``grad_filter_eps * sum_i |h_i|``, each term times its token's factor.
            Pays where the teacher is near. 0 is exact. On a GPU it needs Triton; given logits have no GEMM to spare,
            which only the streaming engine filters all the same.
        tp_group: process group, or device mesh of one dimension, over which the vocabulary of both heads is divided:
            each rank gives its own rows (or logits), the same tokens and the whole vocabulary's labels. Weights and
            hidden states may be DTensors, see :func:`fused_kd.parallel.local_tensors`. All ranks get the same loss;
            each gets its own rows' gradient, and the hidden states' summed over the ranks. ``backend`` is "triton"
            (dense teachers, all objectives but ``AdaptiveKL``) or "torch".
        lists: compare only some entries of each token, and the rest by a tail: see :class:`fused_kd.Lists`. The teacher
            is an LMHead without ``columns``, or logits. Needs the chunked engine, without ``tp_group``.

    Raises:
        TypeError, ValueError: for arguments out of range; the message names the argument, its value and the range.
    """

    scalars: Tensor

    def __init__(
        self,
        objective: Objective,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        temperature: Number = 1.0,
        vocab_size: int | None = None,
        shift: bool = False,
        memory_budget: int | None = None,
        backend: str | None = None,
        validate: bool = False,
        signed: bool = False,
        engine: str | None = None,
        grad_filter_eps: float = 0.0,
        tp_group: Any = None,
        lists: Lists | None = None,
    ) -> None:
        super().__init__()
        check_objective(objective)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.temperature = temperature
        self.vocab_size = vocab_size
        self.shift = shift
        self.memory_budget = memory_budget
        self.backend = backend
        self.validate = validate
        self.signed = signed
        self.engine = engine
        self.grad_filter_eps = grad_filter_eps
        self.tp_group = tp_group
        self._objective = objective
        self.lists = lists
        self._spec = objective.spec
        # Not asked of the objective in a call: torch.compile would guard on each number of it.
        self._own_numbers = objective.per_token
        # On the device and read by kernels there: annealing neither recompiles nor synchronises.
        self.register_buffer("scalars", self._scalars(), persistent=False)

    def _scalars(self, device: torch.device | None = None) -> Tensor:
        """(1, terms, n); a placeholder where some are tensors, which are read in each call."""
        with torch.inference_mode(False):  # a loss made there may be annealed elsewhere
            if self._per_token:
                return torch.full((1, len(self._spec.terms), len(Scalars._fields)), math.nan, device=device)
            return torch.tensor([self._objective.scalars(self.temperature)], dtype=torch.float32, device=device)

    @property
    def _per_token(self) -> bool:
        return self._own_numbers or isinstance(self.temperature, Tensor)

    def _scalars_of(self, shape: torch.Size, device: torch.device) -> Tensor:
        """As :class:`.engines.problem.Problem` takes them."""
        if self._per_token:
            return token_scalars(self._objective, self.temperature, shape, device)
        if self.scalars.is_meta and device.type != "meta":  # built there, and never emptied onto a device
            self.scalars = self._scalars(device)
        return self.scalars if self.scalars.device == device else self.scalars.to(device, non_blocking=True)

    def __copy__(self) -> KDLoss:
        """With scalars of its own."""
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        made._buffers = self._buffers | {"scalars": self.scalars.clone()}
        return made

    def _write_scalars(self) -> None:
        if self._per_token:
            return
        if self.scalars.shape[1] != len(self._spec.terms):
            self.scalars = self._scalars(self.scalars.device)
        for own, values in zip(self.scalars[0], self._objective.scalars(self.temperature), strict=True):
            for i, value in enumerate(values):
                own[i].fill_(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KDLoss:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # model.half() moves the loss along, to_empty() from the meta device too, but its scalars stay exact.
        self.scalars = self._scalars(self.scalars.device)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name in LossOptions.__annotations__:
            value = checked_option(name, value)
        if name == "tp_group":
            self._group = None
            if value is not None:
                from .parallel import group_of

                self._group = group_of(value)
        if name == "lists":
            _check_lists(value, self._objective)
        super().__setattr__(name, value)
        if name == "temperature" and "scalars" in self._buffers:
            self._write_scalars()

    @property
    def objective(self) -> Objective:
        return self._objective

    @objective.setter
    def objective(self, objective: Objective) -> None:
        if not isinstance(objective, Objective) or _classes(objective) != _classes(self._objective):
            stay = [type(part).__name__ for _, part in parts_of(self._objective)]
            order = ", in this order" if len(stay) > 1 else ""
            raise TypeError(f"objective must stay a {' + '.join(stay)}{order}, got {objective!r}")
        _check_lists(self.lists, objective)
        self._objective = objective
        self._spec = objective.spec
        self._own_numbers = objective.per_token
        self._write_scalars()

    def extra_repr(self) -> str:
        shown = {k: getattr(self, k) for k in LossOptions.__annotations__}
        defaults = dict(KDLoss.__init__.__kwdefaults__ or {})
        changed = {k: v for k, v in shown.items() if isinstance(v, Tensor) or v != defaults[k]}
        options = (f"{k}={shown_value(v) if isinstance(v, Tensor) else repr(v)}" for k, v in changed.items())
        return ", ".join([repr(self._objective), *options])

    def forward(
        self,
        student: LMHead | Tensor,
        teacher: AnyTeacher,
        labels: Tensor,
        *,
        token_weights: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        """Scalar loss, or per token in the shape of ``labels`` for ``reduction="none"``.

        Args:
            student, teacher: :class:`LMHead`, or logits (..., V) in float32, bfloat16 or float16; the teacher may be
                a :class:`TopK` instead, or several: a :class:`Mixture` or ``[(weight, teacher), ...]``. The teacher is
                a constant; ``SFT`` takes None. A logit of -inf excludes its token, see ``docs/excluded_tokens.md``.
            labels: (...) int64 or int32 in [0, V) or ``ignore_index``, on the student's device or on the CPU. Labels
                on the CPU let ignored tokens be dropped before any GEMM without waiting for an accelerator.
            token_weights: (...) finite factors of the tokens' losses, of at least 0 unless ``signed``, constants; those
                of ignored tokens are not read.
            num_items: denominator in place of the valid tokens of this call (all micro-batches, all ranks), for
                ``reduction="mean"``; positive. Like ``token_weights``, what is out of range raises with tensors on the
                CPU or ``validate=True``; elsewhere the loss is NaN.

        Raises:
            ValueError, TypeError: for tensors that do not fit, or a ``memory_budget`` that no plan fits.
        """
        return self.evaluate(student, teacher, labels, token_weights=token_weights, num_items=num_items).loss

    def evaluate(
        self,
        student: LMHead | Tensor,
        teacher: AnyTeacher,
        labels: Tensor,
        *,
        token_weights: Tensor | None = None,
        num_items: float | Tensor | None = None,
        statistics: Iterable[str] = (),
    ) -> KDOutput:
        """As :meth:`forward`, with each token's difficulty and hardness.

        Args:
            statistics: names of what else to tell of each token, without gradient and at temperature T (1 without a
                teacher):
                "log_sum_exp_s", "log_sum_exp_t", "entropy_s", "entropy_t" (of student and teacher), "kl" (KL(p||q)),
                "cross_entropy" (-log q_y, at the temperature at which the loss takes it), "log_q_y", "log_p_y",
                "target_entropy" (of yt), which come with the sweep that every loss takes; and "top_1" (1 where both
                sides' largest logits are of one token) and "overlap" (sum min(p, q)), which take one more. They need
                the chunked engine, without ``tp_group`` and ``lists``, another row than "cuda", and a teacher without
                ``columns`` that is no list, or none for "log_sum_exp_s", "entropy_s", "cross_entropy" and "log_q_y".
        """
        spec, wanted = self._spec, statistics_names(statistics)
        side, shape, sum_hidden = flat_side("student", student, self._group)
        device = side.source.device
        check_labels(shape, device, labels, token_weights)
        teachers = self._teachers(teacher, side, labels) if spec.needs_teacher else NO_TEACHERS
        columns = statistics_columns(wanted, teachers.given, spec, self.lists)
        teachers.check(shape, device)
        listing = teachers.listing(self.lists)
        vocab, shards = self._vocab(side, teachers)
        asks = [*([TOLD] if columns else []), *teachers.asks, *([LISTS] if listing.k else [])]
        engine, backend = choose_engine(
            self.engine, self.backend, spec, self.grad_filter_eps, device, asks=tuple(asks), sharded=shards is not None
        )
        labels = labels.long()
        labels, weights, scale = labels_weights_scale(
            (shifted(labels, self.ignore_index) if self.shift else labels).reshape(-1),
            None if token_weights is None else token_weights.reshape(-1),
            num_items,
            vocab=vocab,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            validate=self.validate,
            signed=self.signed,
            device=device,
        )
        grad = torch.is_grad_enabled()
        problem = Problem(
            student=side,
            teacher=teachers.sides[0] if teachers.sides else None,
            labels=labels,
            weights=weights,
            scale=scale,
            scalars=self._scalars_of(shape, device),
            wanted=Wanted(*(grad and x is not None and x.requires_grad for x in (side.source, side.weight, side.bias))),
            spec_code=spec.code,
            cold_labels=spec.has_cold(
                not isinstance(self.temperature, Tensor) and self.temperature == 1.0,
                listing.tail if listing.k else teachers.tail,
            ),
            vocab=vocab,
            dtype=autocast_dtype(device, student=side, **dict(zip(teachers.names, teachers.sides, strict=True))),
            memory_budget=None if self.memory_budget is None else min(self.memory_budget, 2**63 - 1),
            engine=engine,
            backend=backend,
            grad_filter_eps=self.grad_filter_eps,
            validate=self.validate,
            shards=shards,
            sum_hidden=sum_hidden,
            statistics=columns,
            listing=listing,
            **teachers.mixing(shape, labels != IGNORED, device),
        )
        loss, difficulty, is_hard, told = KDFunction.apply(self.reduction == "none", *pack(problem))  # type: ignore[no-untyped-call]
        if self.reduction == "none":
            loss = loss.reshape(shape)
        named = {name: told[:, STATISTICS.index(name)].reshape(shape) for name in wanted}
        return KDOutput(loss, difficulty.reshape(shape), is_hard.reshape(shape), named)

    def _vocab(self, student: Side, teachers: Teachers) -> tuple[int, Shards | None]:
        """The columns that take part, and this rank's among them."""
        columns = student.vocab
        assert columns is not None
        for side in teachers.sides if self._group is None else ():
            if side.columns is not None and side.vocab != columns:
                raise ValueError(f"columns must have the student's {columns} entries, got {side.vocab}")
        known: Sequence[int | None] = teachers.vocabs or [None]
        if self._group is None:
            return max(common_vocab(columns, each, self.vocab_size) for each in known), None
        from .parallel import divide

        shards = divide(self._group, columns, known[0], self.vocab_size)
        return shards.vocab, shards

    def _teachers(self, teacher: AnyTeacher, student: Side, labels: Tensor) -> Teachers:
        given = as_teacher(teacher)
        if isinstance(given, Mixture):
            valid = (shifted(labels, self.ignore_index) if self.shift else labels) != self.ignore_index
            vocab, _ = self._vocab(student, NO_TEACHERS)
            given = resolved(
                given, self._objective, self.temperature, vocab, valid,
                lists=self.lists, backend=self.backend, tp_group=self.tp_group,
            )  # fmt: skip
        return flat_teachers(given, self._objective, self.temperature, self._group)


def kd_loss(
    student: LMHead | Tensor,
    teacher: AnyTeacher,
    labels: Tensor,
    objective: Objective,
    *,
    token_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    statistics: Iterable[str] = (),
    **options: Any,
) -> KDOutput:
    """:class:`KDLoss` as a function.

    Args:
        student, teacher, labels, token_weights, num_items: as of :meth:`KDLoss.forward`.
        objective: what to minimise.
        statistics: as of :meth:`KDLoss.evaluate`.
        **options: those of :class:`KDLoss`.

    Returns:
        :class:`KDOutput`. Raises as :class:`KDLoss`.
    """
    criterion = KDLoss(objective, **options)
    return criterion.evaluate(
        student, teacher, labels, token_weights=token_weights, num_items=num_items, statistics=statistics
    )


def _check_lists(lists: Lists | None, objective: Objective) -> None:
    if lists is not None and objective.spec.needs_teacher:
        check_tail(objective, lists.tail, 1.0)  # the mass of a bucket is known at any temperature


def _classes(objective: Objective) -> list[type[Objective]]:
    return [type(each) for _, each in objective.summands]
