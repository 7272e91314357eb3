"""What a trainer with a fused loss takes, and what is wrong with other arguments."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import fused_kd as fk
from fused_kd.inputs import check_tail_name
from fused_kd.integrations.bodies import without_adapters
from fused_kd.integrations.forms import is_given
from fused_kd.integrations.labels import LABEL_PAD
from fused_kd.integrations.own import OwnTeacher
from fused_kd.mixtures import checked_weights
from fused_kd.objectives import Objective, parse

if TYPE_CHECKING:
    from transformers import TrainingArguments

# what must not be given, and why
_REFUSED = {
    "model_init": "give model, the one that is prepared",
    "compute_loss_func": "the objective is the loss",
    "preprocess_logits_for_metrics": "evaluation computes no logits",
}


# what to do instead
TWO_TOKENIZERS = (
    "for two tokenizers, fused_kd.vocab_map says which tokens they share, and the trainers take it (vocab_map=), as "
    "LMHead(..., columns=...) does"
)


TEACHERS = (
    "a model, a cache, a server, OwnTeacher, a list of (weight, teacher), or a list of teachers where each row's "
    "teacher_id says whose it is"
)


def as_criterion(objective: Objective | str | None, criterion: fk.KDLoss | None) -> fk.KDLoss:
    if (objective is None) == (criterion is None):
        raise ValueError("one of objective and criterion must be given")
    if criterion is None:
        return fk.KDLoss(as_objective(objective))
    if not isinstance(criterion, fk.KDLoss):
        raise TypeError(f"criterion must be a fused_kd.KDLoss, got {criterion!r}")
    for name, allowed in (("reduction", "mean"), ("ignore_index", LABEL_PAD)):
        if getattr(criterion, name) != allowed:
            raise ValueError(f"criterion must have {name}={allowed!r}, got {getattr(criterion, name)!r}")
    return criterion


def as_objective(objective: Any) -> Objective:
    """An objective from itself or its text (:func:`fused_kd.objectives.parse`); ``ValueError`` for a text that is none,
    ``TypeError`` for anything else."""
    if isinstance(objective, str):
        return parse(objective)
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be a fused_kd objective or its text, got {objective!r}")
    return objective


def check_arguments(args: TrainingArguments | None, kwargs: dict[str, Any]) -> None:
    for name, reason in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} must be None: {reason}")
    if kwargs.get("compute_metrics") is not None and not getattr(args, "predict_with_generate", False):
        raise ValueError(
            "compute_metrics must be None: evaluation computes no logits to pass to it; score generated text, "
            "with Seq2SeqTrainer's predict_with_generate or fused_kd.training.score"
        )
    if args is None:
        return
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor must be 0, got {args.label_smoothing_factor}: the objective sets the target"
        )
    loss_type = getattr(args, "loss_type", None)  # of TRL's configurations
    if loss_type not in (None, "nll"):
        raise ValueError(f"loss_type must be 'nll', got {loss_type!r}: the objective is the loss")
    liger = args.liger_kernel_config or {}
    if args.use_liger_kernel and liger.get("fused_linear_cross_entropy", True):
        raise ValueError(
            "use_liger_kernel must be False or liger_kernel_config have fused_linear_cross_entropy=False: that kernel "
            "replaces the model's forward when the training starts"
        )


def as_teachers(teacher: Any) -> tuple[list[Any], list[float] | None]:
    """The teachers that a trainer is given as one, and the weights of their mixture; None where there are none.

    Raises:
        TypeError: something that is no teacher, saying what to do with what it is; ValueError: weights that do not fit.
    """
    if teacher is None:
        return [], None
    if not isinstance(teacher, (list, tuple)):
        check_teacher(teacher)
        return [teacher], None
    each_one = list(teacher)
    if not any(isinstance(each, (list, tuple)) for each in teacher) and not any(map(_is_number, teacher)):
        if not teacher:
            raise TypeError(f"teacher must be {TEACHERS}, got a list of none")
        for each in each_one:
            check_teacher(each)
        return each_one, None
    for pair in [teacher] if any(map(_is_number, teacher)) else teacher:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or pair is teacher:
            got = f"{type(pair).__name__}" + (f" of {len(pair)}" if isinstance(pair, (list, tuple)) else "")
            raise TypeError(f"teacher must be {TEACHERS}, got a list with a {got} in place of a pair")
        if _is_number(pair[1]) and not _is_number(pair[0]):
            raise TypeError(f"teacher must be {TEACHERS}, got (teacher, weight): the weight comes first")
        check_teacher(pair[1])
    each_one = [pair[1] for pair in teacher]
    weights = checked_weights([pair[0] for pair in teacher], len(teacher))
    if any(isinstance(weight, torch.Tensor) for weight in weights):
        raise TypeError("weights of a trainer's teachers must be numbers, got a tensor")
    return each_one, weights


def _is_number(value: Any) -> bool:
    return isinstance(value, Real)


def check_teacher(teacher: Any) -> None:
    """Raise ``TypeError`` for what is no teacher, saying what to do with what it is."""
    if isinstance(teacher, (torch.nn.Module, OwnTeacher)) and not isinstance(teacher, torch.nn.ModuleList):
        return
    if not isinstance(teacher, (type, torch.nn.Module)) and is_given(teacher):
        return
    got = type(teacher).__name__
    hint = "an object with head(batch, targets, device), or with tail, and no forward is taken as a cache or a server"
    if isinstance(teacher, (str, Path)):
        got, hint = (
            repr(str(teacher)),
            "fused_kd.training.load_teacher opens folders, names, caches and servers (KDTrainer does so itself)",
        )
    elif isinstance(teacher, fk.Mixture):
        hint = "that is for a loss; give a trainer the pairs, [(weight, teacher), ...]"
    elif isinstance(teacher, type):
        got, hint = f"the class {teacher.__name__}", f"give an object of it, {teacher.__name__}(...)"
    elif isinstance(teacher, (Mapping, list, tuple, torch.nn.ModuleList, zip)):
        hint = "several are [(weight, teacher), ...], or [teacher, ...] where each row's teacher_id says whose it is"
    elif hasattr(teacher, "output_dir"):
        hint = "the teacher comes before it, or give the arguments by name: args=..."
    raise TypeError(f"teacher must be a model, a cache of one or a server, got {got}: {hint}")


def check_tokenizers(student: Any, teacher: Any, processing_class: Any) -> None:
    """Raise ``ValueError`` where the teacher's files have another tokenizer than the student's, warn where a few tokens
    differ: distillation goes by id.

    The student's is ``processing_class``, else that of its files; tokens that only one of them has do not count, and
    models without files at hand are not looked at.
    """
    ours = _tokenizer_of(processing_class) or _saved_tokenizer(student)
    theirs = None if ours is None else _saved_tokenizer(teacher)
    if ours is None or theirs is None:
        return
    first, second = ({index: token for token, index in each.get_vocab().items()} for each in (ours, theirs))
    common = first.keys() & second.keys()
    differing = sorted(index for index in common if first[index] != second[index])
    if not differing:
        return
    shown = ", ".join(f"{index}: {first[index]!r} and {second[index]!r}" for index in differing[:3])
    told = (
        f"the tokenizers of student and teacher must be one, {len(differing)} of {len(common)} ids are other tokens "
        f"({shown})"
    )
    if len(differing) > 0.01 * len(common):
        raise ValueError(f"{told}: {TWO_TOKENIZERS}")
    warnings.warn(told, stacklevel=4)


def check_cache(cache: Any, processing_class: Any) -> None:
    """Raise ``ValueError`` where a cache that knows its tokenizer was made with another one than the student's."""
    tokenizer = _tokenizer_of(processing_class)
    if tokenizer is not None and hasattr(cache, "check_tokenizer"):
        cache.check_tokenizer(tokenizer)


def _tokenizer_of(processing_class: Any) -> Any:
    """A tokenizer, or that of a processor; None where there is none."""
    found = getattr(processing_class, "tokenizer", processing_class)
    return found if hasattr(found, "get_vocab") else None


def _saved_tokenizer(model: Any) -> Any:
    """The tokenizer beside a model's files, or None."""
    from transformers import AutoTokenizer

    name = getattr(without_adapters(model).config, "_name_or_path", "")
    if not name or (Path(name).is_dir() and not any(Path(name).glob("tokenizer*"))):
        return None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError):
        return None


def check_tail_of_map(vocab_map: Any, tail: str | None) -> None:
    """Raise ``ValueError`` for a name that is none, and for a tail of nothing."""
    if tail is None:
        return
    check_tail_name(tail)
    if vocab_map is None:
        raise ValueError(
            f"tail must be None without vocab_map, got {tail!r}; lists have their own: TeacherCache(..., tail=), "
            "fused_kd.Lists(..., tail=)"
        )
