"""The public loss: :class:`KDLoss` for modules, :func:`kd_loss` for everything that a token's loss can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .amounts import weights_and_scale
from .divergences import DIVERGENCES
from .engines.dispatch import choose_engine
from .inputs import LMHead, TopK
from .objectives import OBJECTIVES, Objective
from .ops import KDFunction, Options
from .options import LossOptions, checked_option
from .sides import autocast_dtype, check_alike, common_vocab, flatten, refuse_dtensors, shifted


class KDOutput(NamedTuple):
    """``loss`` scalar (or per token for ``reduction="none"``); per token, in the shape of the labels and without
    gradient, ``difficulty`` = KL(yt||q) in nats (fp32) and ``is_hard`` (bool: took the hard branch of a gated
    objective). Ignored tokens hold 0 and False."""

    loss: Tensor
    difficulty: Tensor
    is_hard: Tensor


class KDLoss(nn.Module):
    """Distillation loss from hidden states and lm_head weights, without logits in memory.

    >>> criterion = KDLoss(SelfEvolution(gamma=0.4, beta=0.5, lam=0.5))
    >>> loss = criterion(LMHead(h_s, W_s), LMHead(h_t, W_t), labels)
    >>> loss.backward()

    Args:
        objective: what to minimise, e.g. :class:`fused_kd.SelfEvolution`. Assign a new one of the same class at any
            time (annealing): nothing is compiled again. The options may be assigned too, and are checked then as here.
        ignore_index: label of tokens that take no part.
        reduction: "mean" over valid tokens (with ``token_weights``: weighted mean), "sum", or "none".
        temperature: T in [1e-8, 1e12]. Every distribution is softmax(logits / T), except the student's in a separate
            hard-label term (``SFT``, ``ForwardKD``, ``ReverseKD``, ``SkewTeacher``), which stays at temperature 1. The
            loss is not multiplied by T**2.
        vocab_size: cut both sides to their first ``vocab_size`` logits (padded vocabularies).
        shift: the labels are the input tokens: position i predicts label i + 1. Nothing but the labels is copied.
        memory_budget: bytes the workspace may take beyond inputs, results and their gradients; None lets the planner
            choose.
        backend: "torch", "triton", "cuda" (CUDA C++, compiled at first use; NVIDIA GPUs), "native" (C, likewise; CPUs),
            or None for the best one on the tensors' device.
        validate: check labels on any device and look for non-finite logits, naming the first bad token. Waits for the
            device; labels on the CPU are always checked.
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
            hidden states may be DTensors, see :func:`fused_kd.parallel.local_side`. All ranks get the same loss; each
            gets its own rows' gradient, and the hidden states' summed over the ranks. ``backend`` is "triton" (dense
            teachers, all objectives but ``AdaptiveKL``) or "torch".

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
        temperature: float = 1.0,
        vocab_size: int | None = None,
        shift: bool = False,
        memory_budget: int | None = None,
        backend: str | None = None,
        validate: bool = False,
        engine: str | None = None,
        grad_filter_eps: float = 0.0,
        tp_group: Any = None,
    ) -> None:
        super().__init__()
        if not isinstance(objective, Objective):
            raise TypeError(f"objective must be one of {', '.join(sorted(_CLASSES))}, got {objective!r}")
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.temperature = temperature
        self.vocab_size = vocab_size
        self.shift = shift
        self.memory_budget = memory_budget
        self.backend = backend
        self.validate = validate
        self.engine = engine
        self.grad_filter_eps = grad_filter_eps
        self.tp_group = tp_group
        self._objective = objective
        self._spec = objective.spec
        # On the device and read by kernels there: annealing neither recompiles nor synchronises.
        self.register_buffer("scalars", self._scalars(), persistent=False)

    def _scalars(self, device: torch.device | None = None) -> Tensor:
        with torch.inference_mode(False):  # a loss made there may be annealed elsewhere
            return torch.tensor(self._objective.scalars(self.temperature), dtype=torch.float32, device=device)

    def __copy__(self) -> KDLoss:
        """With scalars of its own."""
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        made._buffers = self._buffers | {"scalars": self.scalars.clone()}
        return made

    def _write_scalars(self) -> None:
        for i, value in enumerate(self._objective.scalars(self.temperature)):
            self.scalars[i].fill_(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KDLoss:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # model.half() moves the loss along, to_empty() from the meta device too, but its scalars stay exact.
        self.scalars = self._scalars(self.scalars.device)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name in LossOptions.__annotations__:
            value = checked_option(name, value)
        if name == "tp_group":
            self._group = None if value is None else _group_of(value)
        super().__setattr__(name, value)
        if name == "temperature" and "scalars" in self._buffers:
            self._write_scalars()

    @property
    def objective(self) -> Objective:
        return self._objective

    @objective.setter
    def objective(self, objective: Objective) -> None:
        if type(objective) is not type(self._objective):
            raise TypeError(f"objective must stay a {type(self._objective).__name__}, got {objective!r}")
        self._objective = objective
        self._spec = objective.spec
        self._write_scalars()

    def extra_repr(self) -> str:
        shown = {k: getattr(self, k) for k in LossOptions.__annotations__}
        defaults = dict(KDLoss.__init__.__kwdefaults__ or {})
        return ", ".join([repr(self._objective)] + [f"{k}={v!r}" for k, v in shown.items() if v != defaults[k]])

    def forward(
        self,
        student: LMHead | Tensor,
        teacher: LMHead | TopK | Tensor | None,
        labels: Tensor,
        *,
        token_weights: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        """Scalar loss, or per token in the shape of ``labels`` for ``reduction="none"``.

        Args:
            student, teacher: :class:`LMHead`, or logits (..., V) in float32, bfloat16 or float16; the teacher may be
                a :class:`TopK` instead. The teacher is a constant; ``SFT`` takes None. A logit of -inf excludes its
                token, see ``docs/excluded_tokens.md``.
            labels: (...) int64 or int32 in [0, V) or ``ignore_index``, on the student's device or on the CPU. Labels
                on the CPU let ignored tokens be dropped before any GEMM without waiting for an accelerator.
            token_weights: (...) finite factors of at least 0 of the tokens' losses, constants; those of ignored tokens
                are not read.
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
        teacher: LMHead | TopK | Tensor | None,
        labels: Tensor,
        *,
        token_weights: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> KDOutput:
        """As :meth:`forward`, with each token's difficulty and hardness."""
        spec = self._spec
        sum_hidden, shards = True, None
        if self._group is None:
            refuse_dtensors(student, teacher)
        else:
            from .parallel import divide, local_side

            student, sum_hidden = local_side("student", student, self._group)
            teacher, _ = local_side("teacher", teacher, self._group)
        side_s = flatten("student", student)
        if spec.divergence is None:
            side_t = None
        elif teacher is None:
            raise ValueError(
                f"teacher must be an LMHead, logits or a TopK for {type(self._objective).__name__}, got None"
            )
        else:
            side_t = flatten("teacher", teacher)
            if isinstance(teacher, TopK):
                self._check_top_k(teacher)
        if self._group is None:
            vocab = common_vocab(side_s, side_t, self.vocab_size)
        else:
            assert side_s.vocab is not None
            local_t = None if side_t is None else side_t.vocab
            shards = divide(self._group, side_s.vocab, local_t, self.vocab_size)
            vocab = shards.vocab
        shape = side_s.shape
        check_alike(side_s, side_t, labels, token_weights)
        device = side_s.source.device
        engine, backend = choose_engine(
            self.engine,
            self.backend,
            spec.divergence,
            self.grad_filter_eps,
            device,
            top_k=isinstance(teacher, TopK),
            sharded=shards is not None,
        )

        labels = labels.long()
        labels = shifted(labels, self.ignore_index) if self.shift else labels
        flat_labels = labels.reshape(-1)
        if token_weights is not None:
            token_weights = token_weights.reshape(-1)
        weights, scale = weights_and_scale(
            flat_labels,
            token_weights,
            num_items,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            validate=self.validate,
            device=device,
        )
        if self.scalars.is_meta and device.type != "meta":  # built there, and never emptied onto a device
            self.scalars = self._scalars(device)
        scalars = self.scalars if self.scalars.device == device else self.scalars.to(device, non_blocking=True)
        options = Options(
            *spec,
            cold_labels=self.temperature != 1.0 and spec.hard_label and spec.divergence is not None,
            logit_scale_s=side_s.logit_scale,
            softcap_s=side_s.softcap,
            logit_scale_t=side_t.logit_scale if side_t else 1.0,
            softcap_t=side_t.softcap if side_t else 0.0,
            tail=teacher.tail if isinstance(teacher, TopK) else "",
            vocab=vocab,
            ignore_index=self.ignore_index,
            backend=backend,
            dtype=autocast_dtype(device, side_s, side_t),
            memory_budget=-1 if self.memory_budget is None else min(self.memory_budget, 2**63 - 1),
            validate=self.validate,
            engine=engine,
            grad_filter_eps=self.grad_filter_eps,
            group="" if shards is None else shards.group,
            rank=0 if shards is None else shards.rank,
            shard_sizes=() if shards is None else shards.sizes,
            sum_hidden=sum_hidden,
        )
        enabled = torch.is_grad_enabled()
        # Fields by name: Dynamo of torch 2.8 cannot slice a NamedTuple.
        student_tensors = (side_s.source, side_s.weight, side_s.bias)
        wanted = tuple(enabled and x is not None and x.requires_grad for x in student_tensors)
        teacher_tensors = (
            (None,) * 4
            if side_t is None
            else tuple(map(_detached, (side_t.source, side_t.weight, side_t.bias, side_t.indices)))
        )
        loss, difficulty, is_hard = KDFunction.apply(  # type: ignore[no-untyped-call]
            *student_tensors, *teacher_tensors, flat_labels, weights, scale, scalars,
            wanted, self.reduction == "none", tuple(options),
        )  # fmt: skip
        if self.reduction == "none":
            loss = loss.reshape(shape)
        return KDOutput(loss, difficulty.reshape(shape), is_hard.reshape(shape))

    def _check_top_k(self, teacher: TopK) -> None:
        if teacher.tail == "renormalize":
            if DIVERGENCES[self._spec.divergence or "kl"].everywhere:
                raise ValueError(
                    f"tail must be 'uniform' or 'bucket' for {type(self._objective).__name__}, which is infinite "
                    "where the teacher is 0, got 'renormalize'"
                )
        elif self.temperature != 1.0:
            raise ValueError(
                f"temperature must be 1 with tail={teacher.tail!r}, whose entries it cannot flatten, got "
                f"{self.temperature}; use tail='renormalize'"
            )


def kd_loss(
    student: LMHead | Tensor,
    teacher: LMHead | TopK | Tensor | None,
    labels: Tensor,
    objective: Objective,
    *,
    token_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    **options: Any,
) -> KDOutput:
    """:class:`KDLoss` as a function.

    Args:
        student, teacher, labels, token_weights, num_items: as of :meth:`KDLoss.forward`.
        objective: what to minimise.
        **options: those of :class:`KDLoss`.

    Returns:
        :class:`KDOutput`. Raises as :class:`KDLoss`.
    """
    criterion = KDLoss(objective, **options)
    return criterion.evaluate(student, teacher, labels, token_weights=token_weights, num_items=num_items)


_CLASSES = [cls.__name__ for cls in OBJECTIVES.values()]


def _group_of(tp_group: Any) -> Any:
    from .parallel import group_of

    return group_of(tp_group)


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
