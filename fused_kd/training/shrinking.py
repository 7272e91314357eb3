"""A student from its teacher: some of its layers, and narrower ones where that is wanted."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from fused_kd.training.cut_configs import check_size, cut_layers, cut_width, read_back, text_config
from fused_kd.training.importance import (
    Batch,
    batches_of,
    block_influence,
    channel_activity,
    inner_activity,
    norm_scales,
)
from fused_kd.training.models import load_any, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Keep = Literal["first_last", "even", "importance"]
# a module's own number, and where it keeps its configuration
_OWN = ("layer_idx", "layer_id", "layer_number", "layer_index", "block_idx", "config", "training")


@dataclass(frozen=True)
class Plan:
    """What of a teacher its student keeps: indices of layers, hidden channels and feed-forward channels."""

    layers: tuple[int, ...]
    channels: tuple[int, ...] | None = None  # None: all
    inner: tuple[tuple[int, ...], ...] | None = None  # of each layer of the teacher; None: all
    influence: tuple[float, ...] | None = None  # of each layer, where it was measured
    scales: Mapping[str, float] = field(default_factory=dict)  # of the norms, by their names in the teacher


def shrink(
    teacher: PreTrainedModel | str | Path,
    layers: int | Sequence[int] | None = None,
    *,
    width: int | None = None,
    intermediate: int | None = None,
    keep: Keep = "first_last",
    text: str | Path | Iterable[Any] | None = None,
    tokenizer: Any = None,
    tokens: int = 16_384,
    dtype: torch.dtype | str = "auto",
) -> PreTrainedModel:
    """A smaller model made of a causal LM's own weights: a student to distil into.

    With ``layers`` alone it computes what the teacher computes with its other layers left out. It shares no memory
    with the teacher, its weights are all trainable and of the teacher's dtype, tied embeddings stay tied, and its
    configuration is that of an ordinary model of its family.

    Args:
        teacher: a causal LM, or the folder or hub name of one. It is not changed.
        layers: how many to keep, or the indices to keep, ascending; None (default) keeps all.
        width: hidden size to keep, for families whose heads have a size of their own (``head_dim``: Llama, Mistral,
            Qwen, Phi-3 and others; not GPT-2 or NeoX). The channels with the largest mean absolute value in the
            outputs of the norms stay, the same ones in every matrix; heads stay as they are, and the norms' weights
            are scaled so that their outputs keep their size. None (default): all.
        intermediate: size of the feed-forward parts to keep, for families with ``gate_proj``, ``up_proj`` and
            ``down_proj``; those channels of each layer stay whose activation has the largest mean absolute value.
        keep: which layers, where ``layers`` is a number n of the teacher's L. "first_last" (default): half from either
            end, the first ones one more; "even": from the first to the last at equal distances; "importance": those
            with the largest block influence on ``text``, 1 - mean of cos(h_in, h_out) over its tokens, h_in and h_out
            being the hidden states before and after a layer (ShortGPT, Men et al., 2024).
        text: what "importance", ``width`` and ``intermediate`` are measured on: a ``.txt`` file, a data set as
            ``load_rows`` reads it (chats and others), texts, or rows or batches with ``input_ids``.
        tokenizer: of texts; None (default) takes the one in the teacher's folder.
        tokens: at most so many are measured; default 16,384.
        dtype: a teacher given by name is loaded in it; default "auto", that of its files.

    Raises:
        ValueError: a number or index that the teacher does not have, no ``text`` where something is measured,
            adapters, quantised or offloaded weights, a family whose layers cannot be cut so (the message says why).
        TypeError: a teacher that is no model and no name.
    """
    if isinstance(teacher, (str, Path)):
        check_options(layers, width, intermediate, keep, text)
        tokenizer = load_tokenizer(teacher) if tokenizer is None and text is not None else tokenizer
        teacher = load_any(teacher, dtype=dtype)
    plan = plan_cut(
        teacher, layers, width=width, intermediate=intermediate, keep=keep, text=text, tokenizer=tokenizer,
        tokens=tokens,
    )  # fmt: skip
    return cut(teacher, plan)


def check_options(layers: Any, width: Any, intermediate: Any, keep: Any, text: Any) -> None:
    """Raise ``ValueError`` for what is wrong whatever the teacher is."""
    if keep not in get_args(Keep):
        raise ValueError(f"keep must be one of {', '.join(map(repr, get_args(Keep)))}, got {keep!r}")
    if layers is None and width is None and intermediate is None:
        raise ValueError("one of layers, width and intermediate must be given")
    measures = {"keep='importance'": keep == "importance" and isinstance(layers, int), "width": width is not None,
                "intermediate": intermediate is not None}  # fmt: skip
    if text is None and any(measures.values()):
        raise ValueError(f"text must be given: {next(name for name, on in measures.items() if on)} is measured on it")


def plan_cut(
    teacher: PreTrainedModel,
    layers: int | Sequence[int] | None = None,
    *,
    width: int | None = None,
    intermediate: int | None = None,
    keep: Keep = "first_last",
    text: Any = None,
    tokenizer: Any = None,
    tokens: int = 16_384,
) -> Plan:
    """What :func:`shrink` keeps; its arguments, and its errors."""
    check_options(layers, width, intermediate, keep, text)
    check_teacher(teacher)
    config = text_config(teacher.config)
    count = config.num_hidden_layers
    if isinstance(layers, int):
        check_size("layers", layers, count)
    elif layers is not None:
        layers = _indices(layers, count)
    for name, size, limit in (
        ("width", width, config.hidden_size),
        ("intermediate", intermediate, getattr(config, "intermediate_size", None)),
    ):
        if size is not None:
            check_size(name, size, limit)
    # whether it may be cut at all, before minutes of measuring
    some = range(count) if layers is None else range(layers) if isinstance(layers, int) else layers
    read_back(cut_width(cut_layers(teacher.config, some), width, intermediate))
    stack = list(stack_of(teacher)[1])
    by_influence = isinstance(layers, int) and keep == "importance"
    batches: list[Batch] = []
    if by_influence or width is not None or intermediate is not None:
        batches = batches_of(text, tokenizer, tokens, vocab=config.vocab_size)
    influence = block_influence(teacher, stack, batches) if by_influence else None
    channels = inner = None
    scales: Mapping[str, float] = {}
    if width is not None:
        activity, shares = channel_activity(teacher, batches, config.hidden_size)
        channels = _largest(activity, width)
        scales = norm_scales(shares, channels)
    if intermediate is not None:
        of_layers = inner_activity(teacher, stack, batches, config.intermediate_size)
        inner = tuple(_largest(layer, intermediate) for layer in of_layers)
    chosen = _choose(layers, count, keep, influence)
    return Plan(tuple(chosen), channels, inner, None if influence is None else tuple(influence), scales)


def _choose(layers: int | Sequence[int] | None, count: int, keep: Keep, influence: Sequence[float] | None) -> list[int]:
    if not isinstance(layers, int):
        return list(range(count) if layers is None else layers)
    if influence is not None:
        return sorted(sorted(range(count), key=lambda i: (-influence[i], i))[:layers])
    if keep == "even":
        return spread(count, layers)
    return [*range((layers + 1) // 2), *range(count - layers // 2, count)]


def spread(count: int, kept: int) -> list[int]:
    """``kept`` of ``count`` indices at equal distances, first and last among them."""
    return [round(i * (count - 1) / (kept - 1)) for i in range(kept)] if kept > 1 else [0]


def _indices(layers: Sequence[int], count: int) -> list[int]:
    try:
        found = [int(index) for index in layers]
    except (TypeError, ValueError) as error:
        raise ValueError(f"layers must be a number or a list of indices, got {layers!r}") from error
    if not found or found != sorted(set(found)) or not 0 <= found[0] <= found[-1] < count:
        raise ValueError(f"layers must be ascending indices in [0, {count - 1}], got {found}")
    return found


def _largest(activity: Tensor, size: int) -> tuple[int, ...]:
    """Indices of the largest entries, ascending; of equal ones the first."""
    order = torch.sort(activity, descending=True, stable=True).indices
    return tuple(sorted(order[:size].tolist()))


def check_teacher(model: Any) -> None:
    """Raise unless a model is a plain causal LM, all of whose weights are at hand."""
    from transformers import PreTrainedModel

    if hasattr(model, "peft_config"):
        raise ValueError("teacher has adapters: merge them first (merge_and_unload, or python -m fused_kd.export)")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"teacher must be a Hugging Face model, or its folder or name, got {type(model).__name__}")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "quantization_method", None) is not None:
        raise ValueError("teacher is quantised: load it in bf16 or fp32, so that its layers can be copied")
    away = [name for name, value in model.named_parameters() if value.device.type == "meta"]
    if away:
        raise ValueError(f"teacher must be loaded whole, {away[0]} is offloaded: load it on the CPU or on one device")
    if model.get_output_embeddings() is None:
        raise ValueError(f"teacher must be a causal LM, {type(model).__name__} has no head")


def stack_of(model: Any) -> tuple[str, nn.ModuleList]:
    """The name and the list of a decoder's layers.

    Raises:
        ValueError: there is none of the configuration's length, or more than one.
    """
    decoder = model.get_decoder()
    count = text_config(model.config).num_hidden_layers
    found = [
        (name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    least = min((name.count(".") for name, _ in found), default=0)
    found = [(name, module) for name, module in found if name.count(".") == least]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} lists of {count} layers, one is needed: this family is not taken"
        )
    stack = found[0][1]
    return next(name for name, module in model.named_modules() if module is stack), stack


def cut(teacher: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """The student that a plan describes. Raises ``ValueError`` for a family that cannot be cut so."""
    config = cut_layers(teacher.config, plan.layers)
    inner = None if plan.inner is None else len(plan.inner[0])
    config = cut_width(config, None if plan.channels is None else len(plan.channels), inner)
    student = _empty(teacher, config)
    path, layers = stack_of(teacher)
    fewer = student.get_submodule(path)
    if len(fewer) != len(plan.layers):
        raise ValueError(
            f"layers: {type(config).__name__} cannot be cut, its depth is not that of num_hidden_layers alone: "
            f"{len(plan.layers)} of {len(layers)} layers would be {len(fewer)}"
        )
    for new, old in enumerate(plan.layers):
        _same_layer(layers[old], fewer[new], old, new, set(_cuts(teacher.config, plan)))
    _check_cache(teacher.config, config)
    _fill(student, teacher, path, plan)
    _scale_norms(student, path, plan)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    student.requires_grad_(True)
    return cast("PreTrainedModel", student.eval())


def _check_cache(teacher: Any, student: Any) -> None:
    """Raise where a configuration has no layer left that generation could ask for the length of its cache."""
    if not _cache_has_length(teacher) or _cache_has_length(student):
        return
    count = text_config(teacher).num_hidden_layers
    attention = [index for index in range(count) if _cache_has_length(cut_layers(teacher, [index]))]
    told = f", one of {attention}" if attention else ""  # empty where a layer's kind goes by its number
    raise ValueError(
        f"layers must have an attention layer of this {type(teacher).__name__}{told}: without any, "
        "generation with a cache fails"
    )


def _cache_has_length(config: Any) -> bool:
    from transformers import DynamicCache

    try:
        DynamicCache(config=config).get_seq_length()
    except Exception:  # each release its own
        return False
    return True


def _empty(teacher: Any, config: Any) -> Any:
    """A model of the teacher's class, dtype and device, whose weights are still to be filled in."""
    kind = type(teacher)
    config = read_back(config)
    config._attn_implementation = teacher.config._attn_implementation
    try:
        with torch.random.fork_rng(devices=[]), _no_init(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = kind._from_config(config, dtype=teacher.dtype)
            model.tie_weights()
    except Exception as error:
        raise ValueError(f"{kind.__name__} cannot be cut so: {' '.join(str(error).split())}") from error
    return model.to(teacher.device)


def _no_init() -> AbstractContextManager[Any]:
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # another place in other releases: only slower without
        return nullcontext()
    return cast("AbstractContextManager[Any]", no_init_weights())


def _same_layer(old: nn.Module, new: nn.Module, index: int, place: int, sizes: set[tuple[int, int]]) -> None:
    """Raise ``ValueError`` where the layer that the smaller configuration makes works otherwise than the teacher's.

    ``sizes``: what may be another number, as (the teacher's, the student's).
    """
    theirs, ours = dict(old.named_modules()), dict(new.named_modules())
    where = f"layer {index} cannot stand at place {place} of this student"
    if differing := sorted(theirs.keys() ^ ours.keys()):
        raise ValueError(f"{where}: only one of them would have a part {differing[0]}")
    for name, module in theirs.items():
        other, prefix = ours[name], f"{name}." if name else ""
        if type(module) is not type(other):
            raise ValueError(f"{where}: {name} would be a {type(other).__name__}, not a {type(module).__name__}")
        for key, value in vars(module).items():
            found = getattr(other, key, None)
            if key not in _OWN and key[0] != "_" and _plain(value) and not _agree(value, found, sizes):
                raise ValueError(f"{where}: its {prefix}{key} would be {found!r}, not {value!r}")
        for key in module._non_persistent_buffers_set:
            if not _equal(module._buffers[key], other._buffers.get(key)):
                raise ValueError(f"{where}: its buffer {prefix}{key} would be another")


def _equal(one: Tensor | None, two: Tensor | None) -> bool:
    return one is two if one is None or two is None else torch.equal(one, two.to(one.device))


def _agree(value: Any, found: Any, sizes: set[tuple[int, int]]) -> bool:
    if isinstance(value, (list, tuple)) and isinstance(found, (list, tuple)):
        return len(value) == len(found) and all(_agree(*pair, sizes) for pair in zip(value, found, strict=True))
    return bool(value == found) or (type(value) is type(found) is int and (value, found) in sizes)


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


@torch.no_grad()
def _fill(student: Any, teacher: Any, path: str, plan: Plan) -> None:
    source = teacher.state_dict(keep_vars=True)
    for name, value in _stored(student):
        old, layer = _old_name(name, path, plan.layers)
        if old not in source:
            raise ValueError(f"{type(student).__name__} cannot be cut so: the teacher has no {old}")
        chosen = _chosen(source[old].detach(), value.shape, old, _cuts(teacher.config, plan, layer))
        value.data = chosen.clone().to(value.device)


@torch.no_grad()
def _scale_norms(student: Any, path: str, plan: Plan) -> None:
    """Give the outputs of the norms the size that they have in the teacher."""
    for name, module in student.named_modules():
        scale, weight = plan.scales.get(_old_name(name, path, plan.layers)[0]), getattr(module, "weight", None)
        if scale is not None and weight is not None:
            # some families' norms multiply by 1 + weight
            offset = _offset(module)
            weight.copy_((weight.float() + offset) * scale - offset)


def _offset(norm: Any) -> float:
    """What a norm adds to its weight before it multiplies with it, 0 or 1."""
    plain = copy.deepcopy(norm)
    for parameter in plain.parameters():
        parameter.zero_()
    # any two numbers would do
    return float(bool(plain(torch.arange(norm.weight.shape[-1]).to(norm.weight)).any()))


def _stored(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of what a model's files hold; tied ones once."""
    yield from model.named_parameters()
    names = model.state_dict().keys()
    yield from ((name, value) for name, value in model.named_buffers() if name in names)


def _old_name(name: str, path: str, layers: Sequence[int]) -> tuple[str, int | None]:
    """The teacher's name of a student's tensor, and which of its layers it is in."""
    if not name.startswith(f"{path}."):
        return name, None
    number, _, rest = name.removeprefix(f"{path}.").partition(".")
    return f"{path}.{layers[int(number)]}.{rest}", layers[int(number)]


def _cuts(config: Any, plan: Plan, layer: int | None = 0) -> dict[tuple[int, int], Sequence[int]]:
    """What stays of a dimension, by its size in the teacher and in the student."""
    text = text_config(config)
    cuts: dict[tuple[int, int], Sequence[int]] = {}
    if plan.channels is not None:
        cuts[text.hidden_size, len(plan.channels)] = plan.channels
    if plan.inner is not None and layer is not None:
        cuts[text.intermediate_size, len(plan.inner[layer])] = plan.inner[layer]
    return cuts


def _chosen(value: Tensor, shape: torch.Size, name: str, cuts: Mapping[tuple[int, int], Sequence[int]]) -> Tensor:
    """The part of a teacher's tensor that a student's tensor of this shape holds."""
    before = tuple(value.shape)
    for dim, sizes in enumerate(zip(before, shape, strict=False)):
        if sizes[0] != sizes[1] and sizes in cuts:
            value = value.index_select(dim, torch.tensor(cuts[sizes], device=value.device))
    if value.shape != shape:
        raise ValueError(f"{name} would go from {before} to {tuple(shape)}: this family cannot be cut so")
    return value
