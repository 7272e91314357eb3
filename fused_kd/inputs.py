"""What the loss is given, a head that has not been applied yet or a teacher's cached top entries, and what it gives;
and whether all that fits together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import LARGEST, TEMPERATURE, check_dense, check_number

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TAILS = ("renormalize", "uniform", "bucket", "listed")


@dataclass(frozen=True, eq=False)
class LMHead:
    """Hidden states and the lm_head that would turn them into logits; the logits are never held.

    ``logits = softcap * tanh((hidden @ weight.T + bias) * logit_scale / softcap)``, without the cap where ``softcap``
    is None.

    Args:
        hidden: (..., H) last hidden states, float32, bfloat16 or float16.
        weight: (V, H) lm_head weight in ``hidden``'s dtype (any of the three under autocast).
        bias: (V,) or None.
        logit_scale: factor on the logits in [-1e12, 1e12] (Cohere's ``logit_scale``; the inverse of Granite's
            divisor).
        softcap: cap of the logits (Gemma's ``final_logit_softcapping``), in [1e-12, 1e12], or None.
        columns: of a teacher with another vocabulary than the student: (V of the student,) int64 or int32, which of
            the V columns of ``weight`` each of the student's is, none twice, or -1 for none; or a
            :class:`fused_kd.VocabMap`. Its values are looked at when a loss first takes it. ``vocab_size`` of the loss
            cuts the student and the map, not the teacher.
        tail: with ``columns``, what becomes of tokens that one side alone has. The teacher's probabilities
            ``p = softmax(logits)`` are of all of its V columns; M are the student's columns that are mapped, U the
            others, and m is what p holds on columns of the teacher that no student column is:

            - "renormalize": ``p / sum_M p`` on M, 0 on U;
            - "uniform": p on M and ``m / |U|`` on each of U, up to a common factor where U is empty;
            - "bucket": p on M, and U and m together as one category of each side, exact at any temperature. A label
              in U is taken out of it with the share ``m / |U|``, where the objective reads it. Where U is empty the
              student's category is 0, so that bounded objectives (``TotalVariation``, ``Acceptance``, JSD, ...) see
              what it can never reach, and those with KL(p||q) are refused;
            - "listed": ``p / sum_M p`` on M alone, and the student renormalised over M too.

    Raises:
        TypeError: for a tensor that is not one, or not of a supported dtype.
        ValueError: for shapes, devices or numbers that do not fit; the message names the argument.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    columns: Any = None
    tail: str = "renormalize"

    def __post_init__(self) -> None:
        check_float_tensor("hidden", self.hidden)
        check_float_tensor("weight", self.weight)
        if self.weight.dim() != 2:
            raise ValueError(f"weight must have shape (V, H), got {tuple(self.weight.shape)}")
        if self.hidden.dim() < 1 or self.hidden.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"hidden must have shape (..., H) with weight's H={self.weight.shape[1]}, "
                f"got {tuple(self.hidden.shape)}"
            )
        if min(self.weight.shape) < 1:
            raise ValueError(f"weight must have at least one row and column, got {tuple(self.weight.shape)}")
        if self.weight.device != self.hidden.device:
            raise ValueError(f"weight is on {self.weight.device}, hidden on {self.hidden.device}; they must share one")
        if self.bias is not None:
            check_float_tensor("bias", self.bias)
            if self.bias.shape != self.weight.shape[:1]:
                raise ValueError(f"bias must have shape (V,) = ({self.weight.shape[0]},), got {tuple(self.bias.shape)}")
            if self.bias.device != self.hidden.device:
                raise ValueError(f"bias is on {self.bias.device}, hidden on {self.hidden.device}; they must share one")
        check_number("logit_scale", self.logit_scale)
        if self.softcap is not None:
            check_number("softcap", self.softcap, low=1 / LARGEST)
        check_tail_name(self.tail)
        if self.columns is not None:
            if not isinstance(self.columns, Tensor) and hasattr(self.columns, "teacher_size"):
                V, size = len(self.weight), self.columns.teacher_size
                if size > V:
                    raise ValueError(f"columns must be of a teacher of at most weight's V={V} columns, got {size}")
                object.__setattr__(self, "columns", self.columns.columns)
            check_ids("columns", self.columns)
            if self.columns.dim() != 1 or not len(self.columns):
                raise ValueError(f"columns must have shape (V of the student,), got {tuple(self.columns.shape)}")
            if self.columns.device != self.hidden.device:
                raise ValueError(
                    f"columns are on {self.columns.device}, hidden on {self.hidden.device}; they must share one"
                )
        elif self.tail != "renormalize":
            raise ValueError(f"tail must be 'renormalize' without columns, got {self.tail!r}")

    @property
    def vocab(self) -> int:
        """V, the number of logits of a token."""
        return self.weight.shape[0]

    def __repr__(self) -> str:
        extras = "".join(
            f", {name}={value}"
            for name, value, default in (
                ("logit_scale", self.logit_scale, 1.0),
                ("softcap", self.softcap, None),
            )
            if value != default
        )
        if self.columns is not None:
            extras += f", columns=({len(self.columns)},), tail={self.tail!r}"
        bias = ", bias" if self.bias is not None else ""
        return (
            f"LMHead(hidden={tuple(self.hidden.shape)}, weight={tuple(self.weight.shape)}{bias}, "
            f"{str(self.hidden.dtype).removeprefix('torch.')}{extras})"
        )


@dataclass(frozen=True, eq=False)
class TopK:
    """A cached or served teacher: its k log-probabilities of each token, instead of V logits.

    With the listed entries L, their probabilities ``p_v = exp(log_probs)`` and the missing mass ``m``, which is
    ``exp(log_rest)`` or else ``max(0, 1 - sum_L p_v)``, the teacher is (up to a common factor, where they do not add up
    to 1)

    - ``tail="renormalize"``: ``p_v / sum_L p_v`` on L and 0 elsewhere, against the student's ``q`` over all V entries.
      ``log_probs`` may be logits. Objectives with ``KL(q||p)`` are infinite then and refused.
    - ``tail="uniform"``: ``p_v`` on L and ``m / (V - |L|)`` on each other entry.
    - ``tail="bucket"``: ``p_v`` on L and ``m`` on all other entries together, as one category. Divergences are taken
      between distributions over |L| + 1 categories, the student's last being ``1 - sum_L q_v``: how the student
      spreads it is its own affair. Where the objective reads the label (``ForwardKD``, ``ReverseKD``, ``NoEvo``,
      ``Skew``, ``SkewTeacher``, ``SelfEvolution``, ``SelfEvolutionTopK``), one outside L is taken out of the bucket,
      with the share ``p_y = m / (V - |L|)``, so that ``yt = (1 - lam) * onehot(y) + lam * p`` still asks for it.
    - ``tail="listed"``: ``p_v / sum_L p_v`` against ``q_v / sum_L q_v``, both on L alone: entries outside it get no
      gradient from the divergence. ``log_probs`` may be logits. Where a target holds the label (``NoEvo``, ``Skew``,
      ``SelfEvolution``, ``SelfEvolutionTopK``; in a sum with one, for all terms), the label joins L, with ``p_y = 0``
      where it was not listed; terms with ``KL(q||p)`` are then infinite and refused. A label's cross-entropy beside a
      divergence (``SFT``, ``ForwardKD``, ``ReverseKD``, ``SkewTeacher``) stays over all V entries, and the label out of
      the divergence; the difficulty is then ``KL(p||q)`` on L, whatever the label.

    A loss at temperature T takes p and q at T. "renormalize" and "listed" flatten the list from ``temperature`` to T
    like logits, and "uniform" all of the vocabulary, whose every entry it gives a probability. How much a "bucket"
    holds is known at ``temperature`` alone: T must be the same number.

    Args:
        log_probs: (..., K) natural logarithms, float32, bfloat16 or float16; -inf leaves an entry out, whatever its
            index (padding of shorter lists).
        indices: (..., K) vocabulary ids, int64 or int32, in any order, none twice in a list.
        tail: what is known of the entries that are not listed, see above. Default "bucket", whose gradient is the
            nearest to that of the whole teacher (``docs/guides/lists.md``). Logits, and a loss at another temperature
            than the list's, need another one.
        temperature: at which ``log_probs`` and ``log_rest`` were taken; default 1.
        log_rest: (...,) natural logarithm of the mass of all that is not listed, float32, bfloat16 or float16; -inf: no
            mass. Default None: ``log(max(0, 1 - sum_L p_v))``, which is -inf by rounding where a teacher is almost
            certain, and ``KL(q||p)`` infinite with it. "renormalize" and "listed" do not read it.

    Raises:
        TypeError, ValueError: for tensors, numbers or names that do not fit. Ids out of range or listed twice and
            log-probs (also ``log_rest``) that are NaN or above 0 by more than rounding explains, 1e-4 ("renormalize"
            and "listed": +inf), raise when the loss is called with tensors on the CPU or ``validate=True``; elsewhere
            the loss of such a token is NaN.
    """

    log_probs: Tensor
    indices: Tensor
    tail: str = "bucket"
    temperature: float = 1.0
    log_rest: Tensor | None = None

    def __post_init__(self) -> None:
        check_float_tensor("log_probs", self.log_probs)
        check_ids("indices", self.indices)
        if self.log_probs.dim() < 1 or self.log_probs.shape[-1] < 1:
            raise ValueError(f"log_probs must have shape (..., K) with K >= 1, got {tuple(self.log_probs.shape)}")
        if self.indices.shape != self.log_probs.shape:
            raise ValueError(
                f"indices must have log_probs' shape {tuple(self.log_probs.shape)}, got {tuple(self.indices.shape)}"
            )
        if self.indices.device != self.log_probs.device:
            raise ValueError(
                f"indices are on {self.indices.device}, log_probs on {self.log_probs.device}; they must share one"
            )
        check_tail_name(self.tail)
        check_number("temperature", self.temperature, low=TEMPERATURE.low)
        if self.log_rest is None:
            return
        check_float_tensor("log_rest", self.log_rest)
        if self.log_rest.shape != self.log_probs.shape[:-1]:
            raise ValueError(
                f"log_rest must have log_probs' shape without K, {tuple(self.log_probs.shape[:-1])}, got "
                f"{tuple(self.log_rest.shape)}"
            )
        if self.log_rest.device != self.log_probs.device:
            raise ValueError(
                f"log_rest is on {self.log_rest.device}, log_probs on {self.log_probs.device}; they must share one"
            )

    def __repr__(self) -> str:
        dtype = str(self.log_probs.dtype).removeprefix("torch.")
        extras = "" if self.temperature == 1.0 else f", temperature={self.temperature}"
        extras += "" if self.log_rest is None else ", log_rest"
        return f"TopK({tuple(self.log_probs.shape)}, {dtype}, tail={self.tail!r}{extras})"


@dataclass(frozen=True)
class Lists:
    """Which entries of each token a loss compares, chosen while it runs from logits that it has anyway.

    Both sides are then those of a :class:`TopK` of the teacher with an exact ``log_rest``, taken at the temperature of
    the loss: no sweep over the vocabulary but those of the list and of the gradient.

    Args:
        k: entries of a list, at least 1; all of them where the vocabulary is smaller.
        chosen_by: "teacher" lists the teacher's k largest, "student" the student's (a constant choice, at which the
            teacher is read).
        tail: as of :class:`TopK`.
        top_p: keep only the first of the k largest that hold this share of the chooser's probability, in (0, 1]; None:
            all k.

    Raises:
        TypeError, ValueError: for arguments out of range.
    """

    k: int
    chosen_by: str = "teacher"
    tail: str = "bucket"
    top_p: float | None = None

    def __post_init__(self) -> None:
        check_k(self.k)
        if self.chosen_by not in ("teacher", "student"):
            raise ValueError(f"chosen_by must be 'teacher' or 'student', got {self.chosen_by!r}")
        check_tail_name(self.tail)
        check_top_p(self.top_p)


def check_k(k: object, name: str = "k") -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{name} must be a positive integer, got {k!r}")
    if k < 1:
        raise ValueError(f"{name} must be a positive integer, got {k!r}")


def check_top_p(top_p: object) -> None:
    if top_p is None:
        return
    if isinstance(top_p, bool) or not isinstance(top_p, (int, float)):
        raise TypeError(f"top_p must be a number in (0, 1] or None, got {top_p!r}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be a number in (0, 1] or None, got {top_p!r}")


def check_float_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {value.dtype}")
    check_dense(name, value)


def check_ids(name: str, value: object) -> None:
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be an int64 or int32 tensor, got {kind}")
    check_dense(name, value)


def check_tail_name(tail: object) -> None:
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(map(repr, TAILS))}, got {tail!r}")


class KDOutput(NamedTuple):
    """``loss`` scalar (or per token for ``reduction="none"``); per token, in the shape of the labels and without
    gradient, ``difficulty`` = KL(yt||q) in nats (fp32), ``is_hard`` (bool: took the hard branch of a gated
    objective) and the ``statistics`` (fp32) that were asked for, by name. Ignored tokens hold 0 and False."""

    loss: Tensor
    difficulty: Tensor
    is_hard: Tensor
    statistics: Mapping[str, Tensor] = {}


def check_logits(name: str, side: object) -> None:
    """Of a side that is neither a head nor a list: those have checked themselves."""
    if not isinstance(side, Tensor):
        allowed = "an LMHead, a TopK or a tensor of logits" if name == "teacher" else "an LMHead or a tensor of logits"
        raise TypeError(f"{name} must be {allowed}, got {type(side).__name__}")
    check_float_tensor(name, side)
    if side.dim() < 2 or side.shape[-1] < 1:
        raise ValueError(f"{name} logits must have shape (..., V), got {tuple(side.shape)}")


def refuse_dtensors(*tensors: object) -> None:
    if any(type(x).__name__ == "DTensor" for x in tensors):
        raise ValueError("student and teacher may hold DTensors only with tp_group, the mesh they lie on")


def common_vocab(student: int, teacher: int | None, vocab_size: int | None) -> int:
    """What both sides, with vocabularies of these sizes (None: it does not know), are cut to."""
    sizes = [student] if teacher is None else [student, teacher]
    if vocab_size is not None:
        if vocab_size > min(sizes):
            raise ValueError(f"vocab_size must be at most {min(sizes)}, the smaller vocabulary, got {vocab_size}")
        return vocab_size
    if len(set(sizes)) > 1:
        raise ValueError(
            f"student and teacher have unequal vocabularies, {sizes[0]} and {sizes[1]}; if one is padded, pass "
            "vocab_size (the tokenizer's size) to cut both; else say which columns they share, LMHead(columns=...), as "
            "fused_kd.vocab_map finds them"
        )
    return sizes[0]


def check_labels(shape: torch.Size, device: torch.device, labels: Tensor, token_weights: Tensor | None) -> None:
    """That labels and weights are of the student's tokens, of this shape."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
    check_dense("labels", labels)
    if labels.shape != shape:
        raise ValueError(f"labels must have the tokens' shape {tuple(shape)}, got {tuple(labels.shape)}")
    if labels.device != device and labels.device.type != "cpu":
        raise ValueError(f"labels must be on the student's device {device} or on the CPU, got {labels.device}")
    if token_weights is None:
        return
    if not isinstance(token_weights, Tensor) or not token_weights.is_floating_point():
        raise TypeError("token_weights must be a floating-point tensor")
    check_dense("token_weights", token_weights)
    if token_weights.shape != shape:
        raise ValueError(f"token_weights must have the tokens' shape {tuple(shape)}, got {tuple(token_weights.shape)}")
    if token_weights.requires_grad:
        raise ValueError("token_weights must be constants, got a tensor that requires grad; detach it")


def shifted(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels of the next tokens."""
    if labels.dim() == 0:
        raise ValueError("shift=True needs labels with a sequence dimension")
    return torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], ignore_index)], -1)
