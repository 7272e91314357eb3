"""The memory that a training will take, by part, before any model is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from fused_kd.forecast import Choice, plan_for
from fused_kd.training.hidden_codes import HIDDEN_DTYPES
from fused_kd.training.passes import Passes, Sizes, faked, model_without_data, passes_of, sizes_of
from fused_kd.training.shards import read_index
from fused_kd.training.train_options import Train

# bytes of an optimizer's state a trained number, by ``TrainingArguments.optim``
_STATE = {
    "adamw_torch": 8, "adamw_torch_fused": 8, "adamw_apex_fused": 8, "adamw_anyprecision": 8, "paged_adamw_32bit": 8,
    "adamw_torch_8bit": 2, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2, "adamw_torch_4bit": 1,
    "ademamix": 12, "paged_ademamix_32bit": 12, "ademamix_8bit": 3, "paged_ademamix_8bit": 3,
    "lion_32bit": 4, "paged_lion_32bit": 4, "lion_8bit": 1, "paged_lion_8bit": 1,
    "rmsprop": 4, "rmsprop_bnb": 4, "rmsprop_bnb_32bit": 4, "rmsprop_bnb_8bit": 1, "adagrad": 4,
    "sgd": 0, "adafactor": 0, "lomo": 0, "adalomo": 0,
}  # fmt: skip
_ADAMW = 8
# it makes new tensors of all gradients at once
_FOREACH = ("adamw_torch",)


@dataclass(frozen=True)
class MicroBatch:
    """The largest micro-batch: its rows (1 where packed), their length, its targets."""

    rows: int
    length: int
    targets: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. ``parts`` are not all there at once; ``peak`` is the most, in the phase ``when``.

    ``engines``: the plan of each engine of the loss, or why it has none; ``plan`` is the one that is counted. ``sizes``
    of the student; ``notes`` on what is not counted.
    """

    parts: dict[str, int]
    peak: int
    when: str
    engines: dict[str, Choice | str]
    plan: Choice
    sizes: Sizes
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Teaching:
    """Bytes of all teachers' weights, the most that one takes for its forward, what their hidden states take until the
    loss, and the form of what they give."""

    weights: int
    forward: int
    states: int
    hidden: int
    dtype: torch.dtype
    top_k: int | None


def memory_of(
    train: Train, args: TrainingArguments, tokenizer: Any, batch: MicroBatch, served: Sequence[Any]
) -> Memory:
    """Count what a training would take on each device, with the largest micro-batch.

    The models' passes are counted on tensors without data, the loss is planned as it would be; the optimizer's state
    goes by its name. A GPU's context (some 0.5 GB), fragments, and the buffers of other processes' shards are not in
    it.

    Args:
        tokenizer: of both models.
        served: the :class:`fused_kd.serving.ServedTeacher` of the run, whose hidden sizes count.

    Raises:
        ValueError: a student that is none; a ``memory_budget`` that no plan fits.
    """
    autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    options: dict[str, Any] = {"dtype": train.dtype, "attn_implementation": train.attn_implementation}
    model = model_without_data(train.student, tokenizer, adapters=train.adapters, student=True, **options)
    sizes, notes = sizes_of(model), _notes(train)
    several = args.gradient_accumulation_steps > 1
    counted = partial(_counted, notes, rows=batch.rows, length=batch.length, autocast=autocast)
    own = counted(model, train.student, train=False) if train.of_kind("own") else None
    passes = counted(model, train.student, checkpointing=bool(args.gradient_checkpointing), accumulated=several)
    teaching = _teaching(train, options, tokenizer, batch, counted, sizes, own, served)
    engines = _engines(train, args, batch, autocast, sizes, teaching)
    return _together(args, sizes, passes, teaching, engines, notes)


def _counted(notes: list[str], model: Any, name: str, **options: Any) -> Passes:
    """The passes of a model without data; none, and a note, where what it computes depends on the data."""
    try:
        with faked(model):
            return passes_of(model, **options)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        notes.append(f"activations of {name} cannot be counted without data and are not in the peak: {reason}")
        return Passes(0, 0, 0)


def _notes(train: Train) -> list[str]:
    quantised = [name for name in train.models if _is_quantised(name)]
    return [f"{name} is quantised: its weights take less than is counted here" for name in quantised]


def _is_quantised(name: str) -> bool:
    file = Path(name) / "config.json"
    return file.is_file() and '"quantization_config"' in file.read_text(encoding="utf-8", errors="replace")


def _teaching(
    train: Train, options: dict[str, Any], tokenizer: Any, batch: MicroBatch, counted: Callable[..., Passes],
    student: Sizes, own: Passes | None, served: Sequence[Any],
) -> _Teaching:  # fmt: skip
    weights, forward, hidden, lists, dtypes = 0, 0, [], [], []
    for teacher in train.teachers:
        if teacher.kind == "model":
            model = model_without_data(teacher.place, tokenizer, **options)
            sizes = sizes_of(model)
            weights += sizes.weights
            forward = max(forward, counted(model, teacher.place, train=False).forward)
            hidden.append(sizes.hidden)
            dtypes.append(sizes.dtype)
        elif teacher.kind == "own" and own is not None:
            weights += 4 * student.trained if teacher.own.decay is not None else 0
            forward = max(forward, own.forward)
            hidden.append(student.hidden)
            dtypes.append(student.dtype)
        elif teacher.kind == "cache":
            index = read_index(Path(teacher.place)) or {}
            if index.get("keep") == "hidden":
                hidden.append(index["width"])
                dtypes.append(HIDDEN_DTYPES[index["head"]["dtype"]])
            else:
                lists.append(max((index.get("k") or 0) + (index.get("draws") or 0), 1))
    hidden += [each.hidden_size for each in served]
    dtypes += [each.dtype for each in served]
    top_k = max(lists) if lists and not hidden else None
    states = 4 * sum(hidden) * batch.rows * batch.length
    dtype = max(dtypes, key=lambda each: each.itemsize, default=student.dtype)
    return _Teaching(weights, forward, states, max(hidden, default=student.hidden), dtype, top_k)


def _engines(
    train: Train,
    args: TrainingArguments,
    batch: MicroBatch,
    autocast: torch.dtype | None,
    sizes: Sizes,
    teaching: _Teaching,
) -> dict[str, Choice | str]:
    found: dict[str, Choice | str] = {}
    for engine in ("chunked", "streaming"):
        try:
            found[engine] = plan_for(
                max(batch.targets, 1), sizes.hidden, teaching.hidden, sizes.vocab,
                dtype=sizes.dtype, teacher_dtype=teaching.dtype, autocast=autocast, head_learns=sizes.head_learns,
                device="cuda" if args.device.type == "cuda" else "cpu", objective=train.spec.objective,
                memory_budget=train.memory_budget, engine=engine,
                top_k=teaching.top_k, teachers=1 if teaching.top_k else max(len(train.teachers), 1),
            )  # fmt: skip
        except ValueError as error:
            found[engine] = str(error)
    return found


def _together(
    args: TrainingArguments,
    sizes: Sizes,
    passes: Passes,
    teaching: _Teaching,
    engines: dict[str, Choice | str],
    notes: list[str],
) -> Memory:
    plan = next((each for each in engines.values() if isinstance(each, Choice)), None)
    if plan is None:
        raise ValueError(f"memory_budget: {'; '.join(map(str, engines.values()))}")
    optim = str(getattr(args.optim, "value", args.optim))
    if optim not in _STATE:
        notes = [*notes, f"the state of optim={optim} is not known here and taken as AdamW's"]
    shards = _shards(args)
    gradients = sizes.trained_bytes // shards["gradients"]
    held = gradients if args.gradient_accumulation_steps > 1 else 0
    parts = {
        "student's weights": sizes.weights // shards["weights"],
        "gradients": gradients,
        f"optimizer ({optim})": sizes.trained * _STATE.get(optim, _ADAMW) // shards["optimizer"],
    }
    if shards["masters"]:
        parts["float32 masters"] = 4 * sizes.trained // shards["optimizer"]
    parts["activations for the backward"] = passes.kept
    parts |= {"teacher's weights": teaching.weights // shards["weights"], "teacher's forward": teaching.forward}
    parts |= {f"loss ({plan.engine})": plan.workspace, "gradients of the loss": plan.gradients}
    stays = ("student's weights", f"optimizer ({optim})", "float32 masters", "teacher's weights")
    always = sum(parts.get(name, 0) for name in stays)
    # the teacher's forward comes first, and its states stay until the loss
    phases = {
        "the teacher's forward": held + teaching.forward,
        "the student's forward": passes.forward + teaching.states,
        "the loss": held + passes.kept + teaching.states + plan.workspace + plan.gradients,
        "the backward": passes.backward + plan.gradients,
        "the optimizer's step": gradients * (2 if optim in _FOREACH else 1),
    }
    when = max(phases, key=lambda name: phases[name])
    return Memory(
        {name: size for name, size in parts.items() if size}, always + phases[when], when, engines, plan, sizes, notes
    )


def _shards(args: TrainingArguments) -> dict[str, int]:
    """Into how many parts each is divided, and whether the weights in half precision have masters."""
    stage, masters = 0, 0
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        stage = 3
    elif os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        stage, masters = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") or 2), int(args.bf16 or args.fp16)
    world = max(args.world_size, 1)
    return {
        "weights": world if stage >= 3 else 1,
        "gradients": world if stage >= 2 else 1,
        "optimizer": world if stage >= 1 else 1,
        "masters": masters,
    }
