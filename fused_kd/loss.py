"""The public loss: :class:`KDLoss` for modules, :func:`kd_loss` for everything that a token's loss can tell."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from .divergences import DIVERGENCES
from .engine.dispatch import ENGINES, choose_engine
from .engine.ops import KDFunction, Options
from .inputs import LMHead, TopK, check_float_tensor, check_number
from .objectives import OBJECTIVES, Objective

REDUCTIONS = ("mean", "sum", "none")


class KDOutput(NamedTuple):
    """``loss`` scalar (or per token for ``reduction="none"``); per token, in the shape of the labels and without
    gradient, ``difficulty`` = KL(yt||q) in nats (fp32) and ``is_hard`` (bool: took the hard branch of a gated
    objective). Ignored tokens hold 0 and False."""

    loss: Tensor
    difficulty: Tensor
    is_hard: Tensor


class LossOptions(TypedDict, total=False):
    """Keyword options of :class:`KDLoss`, accepted by :func:`kd_loss` too."""

    ignore_index: int
    reduction: str
    temperature: float
    vocab_size: int | None
    shift: bool
    memory_budget: int | None
    backend: str | None
    validate: bool
    engine: str | None
    grad_filter_eps: float
    tp_group: Any


class KDLoss(nn.Module):
    """Distillation loss from hidden states and lm_head weights, without logits in memory.

    >>> criterion = KDLoss(SelfEvolution(gamma=0.4, beta=0.5, lam=0.5))
    >>> loss = criterion(LMHead(h_s, W_s), LMHead(h_t, W_t), labels)
    >>> loss.backward()

    Args:
        objective: what to minimise, e.g. :class:`fused_kd.SelfEvolution`. Assign a new one of the same class at any
            time (annealing): nothing is compiled again.
        ignore_index: label of tokens that take no part.
        reduction: "mean" over valid tokens (with ``token_weights``: weighted mean), "sum", or "none".
        temperature: T > 0. Every distribution is softmax(logits / T), except the student's in a separate hard-label
            term (``SFT``, ``ForwardKD``, ``ReverseKD``, ``SkewTeacher``), which stays at temperature 1. The loss is
            not multiplied by T**2.
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
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
        check_number("temperature", temperature, positive=True)
        for name, value in (("vocab_size", vocab_size), ("memory_budget", memory_budget)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name} must be a positive integer or None, got {value!r}")
            if value is not None and value < 1:
                raise ValueError(f"{name} must be a positive integer or None, got {value!r}")
        if engine is not None and engine not in ENGINES:
            raise ValueError(f"engine must be None or one of {', '.join(map(repr, ENGINES))}, got {engine!r}")
        check_number("grad_filter_eps", grad_filter_eps)
        if grad_filter_eps < 0:
            raise ValueError(f"grad_filter_eps must be at least 0, got {grad_filter_eps!r}")
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.temperature = float(temperature)
        self.vocab_size = vocab_size
        self.shift = shift
        self.memory_budget = memory_budget
        self.backend = backend
        self.validate = validate
        self.engine = engine
        self.grad_filter_eps = float(grad_filter_eps)
        self.tp_group, self._group = tp_group, None
        if tp_group is not None:
            from .parallel import group_of

            self._group = group_of(tp_group)
        self._objective = objective
        self._spec = objective.spec
        # On the device and read by kernels there: annealing neither recompiles nor synchronises.
        values = torch.tensor(objective.scalars(self.temperature), dtype=torch.float32)
        self.register_buffer("scalars", values, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KDLoss:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # model.half() moves the loss along, but its scalars stay exact.
        if self.scalars.dtype != torch.float32:
            values = self._objective.scalars(self.temperature)
            self.scalars = torch.tensor(values, dtype=torch.float32, device=self.scalars.device)
        return self

    @property
    def objective(self) -> Objective:
        return self._objective

    @objective.setter
    def objective(self, objective: Objective) -> None:
        if type(objective) is not type(self._objective):
            raise TypeError(f"objective must stay a {type(self._objective).__name__}, got {objective!r}")
        self._objective = objective
        self._spec = objective.spec
        for i, value in enumerate(objective.scalars(self.temperature)):
            self.scalars[i].fill_(value)

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
                a :class:`TopK` instead. The teacher is a constant; ``SFT`` takes None.
            labels: (...) int64 or int32 in [0, V) or ``ignore_index``, on the student's device or on the CPU. Labels
                on the CPU let ignored tokens be dropped before any GEMM without waiting for an accelerator.
            token_weights: (...) non-negative factors of the tokens' losses, constants.
            num_items: denominator in place of the valid tokens of this call (all micro-batches, all ranks), for
                ``reduction="mean"``.

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
            _refuse_dtensors(student, teacher)
        else:
            from .parallel import divide, local_side

            student, sum_hidden = local_side("student", student, self._group)
            teacher, _ = local_side("teacher", teacher, self._group)
        side_s = _flatten("student", student)
        if spec.divergence is None:
            side_t = None
        elif teacher is None:
            raise ValueError(
                f"teacher must be an LMHead, logits or a TopK for {type(self._objective).__name__}, got None"
            )
        else:
            side_t = _flatten("teacher", teacher)
            if isinstance(teacher, TopK):
                self._check_top_k(teacher)
        if self._group is None:
            vocab = _vocab(side_s, side_t, self.vocab_size)
        else:
            assert side_s.vocab is not None
            local_t = None if side_t is None else side_t.vocab
            shards = divide(self._group, side_s.vocab, local_t, self.vocab_size)
            vocab = shards.vocab
        shape = side_s.shape
        _check_alike(side_s, side_t, labels, token_weights)
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

        labels = _shifted(labels, self.ignore_index) if self.shift else labels
        flat_labels = labels.reshape(-1)
        weights = None
        if token_weights is not None:
            weights = token_weights.to(device, torch.float32).reshape(-1)
        scale = self._scale(flat_labels, weights, num_items, device)
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
            dtype=_autocast_dtype(device, side_s, side_t),
            memory_budget=-1 if self.memory_budget is None else self.memory_budget,
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

    def _scale(
        self, labels: Tensor, weights: Tensor | None, num_items: float | Tensor | None, device: torch.device
    ) -> Tensor:
        """1 / denominator as a 0-d tensor on the device; 0 for an empty mean."""
        if self.reduction != "mean":
            if num_items is not None:
                raise ValueError(f"num_items needs reduction='mean', got reduction={self.reduction!r}")
            return torch.ones((), device=device)
        if num_items is None:
            valid = labels != self.ignore_index
            count = valid.sum() if weights is None else (weights * valid.to(device, non_blocking=True)).sum()
        elif isinstance(num_items, Tensor):
            if num_items.numel() != 1:
                raise ValueError(f"num_items must be one number, got a tensor of shape {tuple(num_items.shape)}")
            count = num_items.detach().reshape(())
        else:
            if isinstance(num_items, bool) or not isinstance(num_items, Real):
                raise TypeError(f"num_items must be a positive number or a tensor, got {num_items!r}")
            if not num_items > 0:
                raise ValueError(f"num_items must be positive, got {num_items!r}")
            return torch.full((), 1.0 / num_items, device=device)
        count = count.to(device, torch.float32, non_blocking=True)
        return torch.where(count > 0, 1.0 / count, 0.0)


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


class _FlatSide(NamedTuple):
    source: Tensor  # (N, H) or (N, V)
    weight: Tensor | None
    bias: Tensor | None
    logit_scale: float
    softcap: float
    vocab: int | None  # None where the side does not know
    shape: torch.Size
    indices: Tensor | None = None


def _flatten(name: str, side: LMHead | TopK | Tensor) -> _FlatSide:
    if isinstance(side, TopK) and name == "teacher":
        source, indices = (x.reshape(-1, x.shape[-1]) for x in (side.log_probs, side.indices))
        return _FlatSide(source, None, None, 1.0, 0.0, None, side.log_probs.shape[:-1], indices)
    if isinstance(side, LMHead):
        source = side.hidden.reshape(-1, side.hidden.shape[-1])
        extras = (float(side.logit_scale), float(side.softcap or 0.0), side.vocab, side.leading_shape)
        return _FlatSide(source, side.weight, side.bias, *extras)
    if not isinstance(side, Tensor):
        allowed = "an LMHead, a TopK or a tensor of logits" if name == "teacher" else "an LMHead or a tensor of logits"
        raise TypeError(f"{name} must be {allowed}, got {type(side).__name__}")
    check_float_tensor(name, side)
    if side.dim() < 2 or side.shape[-1] < 1:
        raise ValueError(f"{name} logits must have shape (..., V), got {tuple(side.shape)}")
    return _FlatSide(side.reshape(-1, side.shape[-1]), None, None, 1.0, 0.0, side.shape[-1], side.shape[:-1])


def _refuse_dtensors(*sides: LMHead | TopK | Tensor | None) -> None:
    for side in sides:
        for x in (side.hidden, side.weight) if isinstance(side, LMHead) else (side,):
            if type(x).__name__ == "DTensor":
                raise ValueError("student and teacher may hold DTensors only with tp_group, the mesh they lie on")


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _vocab(student: _FlatSide, teacher: _FlatSide | None, vocab_size: int | None) -> int:
    sizes = [side.vocab for side in (student, teacher) if side is not None and side.vocab is not None]
    if vocab_size is not None:
        if vocab_size > min(sizes):
            raise ValueError(f"vocab_size must be at most {min(sizes)}, the smaller vocabulary, got {vocab_size}")
        return vocab_size
    if len(set(sizes)) > 1:
        raise ValueError(
            f"student and teacher have unequal vocabularies, {sizes[0]} and {sizes[1]}; if one is padded, pass "
            "vocab_size (the tokenizer's size) to cut both"
        )
    return sizes[0]


def _check_alike(student: _FlatSide, teacher: _FlatSide | None, labels: Tensor, token_weights: Tensor | None) -> None:
    device = student.source.device
    if teacher is not None:
        if teacher.shape != student.shape:
            raise ValueError(
                f"teacher must hold the student's tokens, shape {tuple(student.shape)}, got {tuple(teacher.shape)}"
            )
        if teacher.source.device != device:
            raise ValueError(f"teacher is on {teacher.source.device}, student on {device}; they must share one device")
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
    if labels.shape != student.shape:
        raise ValueError(f"labels must have the tokens' shape {tuple(student.shape)}, got {tuple(labels.shape)}")
    if labels.device != device and labels.device.type != "cpu":
        raise ValueError(f"labels must be on the student's device {device} or on the CPU, got {labels.device}")
    if token_weights is None:
        return
    if not isinstance(token_weights, Tensor) or not token_weights.is_floating_point():
        raise TypeError("token_weights must be a floating-point tensor")
    if token_weights.shape != student.shape:
        raise ValueError(
            f"token_weights must have the tokens' shape {tuple(student.shape)}, got {tuple(token_weights.shape)}"
        )
    if token_weights.requires_grad:
        raise ValueError("token_weights must be constants, got a tensor that requires grad; detach it")


def _shifted(labels: Tensor, ignore_index: int) -> Tensor:
    if labels.dim() == 0:
        raise ValueError("shift=True needs labels with a sequence dimension")
    return torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], ignore_index)], -1)


def _autocast_dtype(device: torch.device, student: _FlatSide, teacher: _FlatSide | None) -> torch.dtype | None:
    """The dtype of GEMM operands under autocast, else None; without autocast a head's tensors must agree."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    for name, side in (("student", student), ("teacher", teacher)):
        if side is not None and side.weight is not None and side.weight.dtype != side.source.dtype:
            raise TypeError(
                f"{name} hidden is {side.source.dtype} and weight {side.weight.dtype}; outside autocast they must "
                "have one dtype"
            )
    return None
