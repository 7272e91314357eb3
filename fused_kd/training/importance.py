"""What a model's layers and channels do on text: which of them a smaller model should keep."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_kd.integrations.bodies import eval_mode, hidden_states
from fused_kd.training.files import TEXT_SUFFIXES, text_lines
from fused_kd.training.rows import load_rows

Batch = dict[str, Tensor]
ROW_TOKENS = 512
BATCH_TOKENS = 4096
# norms of queries, keys and latent states, whose width may be the hidden size by chance
_OF_HEADS = re.compile(r"(^|\.)(q|k|v|kv|query|key)(_a|_b)?_?(layer)?norm$")


def batches_of(text: Any, tokenizer: Any, tokens: int, *, vocab: int) -> list[Batch]:
    """Batches of the first ``tokens`` tokens of a file, of texts, or of rows or batches with ``input_ids``.

    A file whose name ends in ``.txt`` (or ``.txt.gz``) is one text; what else a name may stand for,
    ``fused_kd.training.load_rows`` reads: training rows, prompts included.

    Raises:
        ValueError: a file that cannot be read, no tokenizer for text, no tokens, ids outside the vocabulary.
    """
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"tokens must be an int of at least 1, got {tokens!r}")
    if isinstance(text, (str, Path)):
        text = _read(text, tokenizer)
    rows = _first(_rows(text, tokenizer), tokens)
    if not rows:
        raise ValueError("text must have tokens, it has none")
    highest = max(max(row) for row in rows)
    if highest >= vocab:
        raise ValueError(f"text has the token {highest}, the teacher's vocabulary ends at {vocab - 1}")
    # rows of one length need no padding, which some families take otherwise than others
    batches: dict[int, list[list[int]]] = {}
    for row in rows:
        batches.setdefault(len(row), []).append(row)
    return [
        {"input_ids": torch.tensor(same[start : start + max(BATCH_TOKENS // length, 1)])}
        for length, same in batches.items()
        for start in range(0, len(same), max(BATCH_TOKENS // length, 1))
    ]


def _read(name: str | Path, tokenizer: Any) -> Iterable[Any]:
    if not str(name).endswith(TEXT_SUFFIXES):
        if tokenizer is None:
            raise ValueError("tokenizer must be given to measure on a data set")
        rows: Any = load_rows(tokenizer, name, max_length=ROW_TOKENS, skip_bad=True, streaming=True)
        return cast("Iterable[Any]", rows)
    try:
        text = "".join(text_lines(Path(name)))
        text.encode()
    except ValueError as error:
        raise ValueError(f"text={str(name)!r} must be a text file in UTF-8: {error}") from error
    return [text]


def _rows(text: Iterable[Any], tokenizer: Any) -> Iterator[list[int]]:
    for item in text:
        if isinstance(item, str):
            if tokenizer is None:
                raise ValueError("tokenizer must be given to measure on text (or rows with input_ids)")
            # a long file is cut first, so that a model of any size reads a little of it
            for start in range(0, len(item), 1 << 16):
                yield from _pieces(tokenizer(item[start : start + (1 << 16)])["input_ids"])
        elif isinstance(item, Mapping) and "input_ids" in item:
            ids = item["input_ids"]
            if isinstance(ids, Tensor) and ids.dim() == 2:
                mask = item.get("attention_mask")
                mask = torch.ones_like(ids) if mask is None else mask
                for row, kept in zip(ids, mask.bool(), strict=True):
                    yield from _pieces(row[kept].tolist())
            else:
                yield from _pieces(list(map(int, ids)))
        else:
            raise ValueError(f"text must be a file, texts, or rows with input_ids, got {str(item)[:80]!r}")


def _pieces(ids: list[int]) -> Iterator[list[int]]:
    yield from (ids[start : start + ROW_TOKENS] for start in range(0, len(ids), ROW_TOKENS))


def _first(rows: Iterable[list[int]], tokens: int) -> list[list[int]]:
    found: list[list[int]] = []
    for row in rows:
        if row:
            found.append(row[:tokens])
            tokens -= len(found[-1])
        if tokens == 0:
            break
    return found


def block_influence(model: Any, layers: Sequence[nn.Module], batches: Iterable[Batch]) -> list[float]:
    """1 - mean of cos(h_in, h_out) over the tokens, for each layer (ShortGPT, Men et al., 2024)."""
    sums = [torch.zeros((), dtype=torch.float64) for _ in layers]
    total = 0

    def observe(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            sums[index] = sums[index].to(before.device)
            sums[index] += F.cosine_similarity(before.float(), after.float(), dim=-1).sum(dtype=torch.float64)

        return hook

    with _hooked((layer, observe(index)) for index, layer in enumerate(layers)):
        total = _run(model, batches)
    return [1.0 - float(value) / total for value in sums]


def channel_activity(model: Any, batches: Iterable[Batch], size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """What each hidden channel does in the norms over the hidden size H of a model's decoder.

    Returns:
        The sum over norms and tokens of the absolute values of their outputs, (H,) float64, which is what the matrices
        are multiplied with (Minitron, Muralidharan et al., 2024); and of each norm, by its name in the model, every
        channel's share of the norm's sum of squares, (H,) float64.

    Raises:
        ValueError: there are no such norms.
    """
    total = torch.zeros(size, dtype=torch.float64)
    shares: dict[str, Tensor] = {}

    def observe(name: str, centred: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            states = (args[0] if args else kwargs["hidden_states"]).double().reshape(-1, size)
            states = states - states.mean(1, keepdim=True) if centred else states
            squares = states.square()
            # each token counts alike: some have states a thousand times as large as others
            share = (squares / squares.sum(1, keepdim=True).clamp_min(1e-300)).sum(0).cpu()
            shares[name] = shares[name] + share if name in shares else share
            total.add_(_activity(output))

        return hook

    decoder = model.get_decoder()
    within = {id(module) for module in decoder.modules()}
    norms = [
        (module, observe(name, "layernorm" in type(module).__name__.lower()))
        for name, module in model.named_modules()
        if id(module) in within and _is_norm(name, module) and _width_of(module, size) == size
    ]
    if not norms:
        raise ValueError(f"width: {type(model).__name__} has no norm over its hidden size that could be measured")
    with _hooked(norms):
        _run(model, batches)
    return total, {name: share / share.sum() for name, share in shares.items()}


def _is_norm(name: str, module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and _OF_HEADS.search(name) is None


def _width_of(module: nn.Module, otherwise: int) -> int:
    """Over how many channels a norm goes; ``otherwise`` for one without weights."""
    weight = getattr(module, "weight", None)
    return otherwise if weight is None else int(weight.shape[-1])


def norm_scales(shares: Mapping[str, Tensor], channels: Sequence[int]) -> dict[str, float]:
    """By how much each norm's outputs would shrink on these channels alone, as their mean square is another one."""
    kept = torch.tensor(channels)
    return {name: math.sqrt(float(share[kept].sum()) * len(share) / len(kept)) for name, share in shares.items()}


def inner_activity(model: Any, layers: Sequence[nn.Module], batches: Iterable[Batch], size: int) -> list[Tensor]:
    """Sum of the absolute values of each channel that a layer's ``down_proj`` is given, (I,) float64 for each layer.

    Raises:
        ValueError: a layer without one ``down_proj`` of I inputs.
    """
    found: list[Tensor] = []
    pairs = []

    def observe(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            found[index] += _activity(args[0])

        return hook

    for index, layer in enumerate(layers):
        down = [m for name, m in layer.named_modules() if name.endswith("down_proj") and isinstance(m, nn.Linear)]
        if [m.in_features for m in down] != [size]:
            raise ValueError(
                f"intermediate: layer {index} must have one down_proj, of {size} inputs, it has {len(down)} of "
                f"{[m.in_features for m in down]}: this family is not taken"
            )
        found.append(torch.zeros(size, dtype=torch.float64))
        pairs.append((down[0], observe(index)))
    with _hooked(pairs):
        _run(model, batches)
    return found


def _activity(values: Tensor) -> Tensor:
    return values.abs().reshape(-1, values.shape[-1]).sum(0, dtype=torch.float64).cpu()


@contextmanager
def _hooked(pairs: Iterable[tuple[nn.Module, Any]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _run(model: Any, batches: Iterable[Batch]) -> int:
    """Run the model's body over the batches, without its head; the number of tokens."""
    count = 0
    with eval_mode(model):
        for batch in batches:
            hidden_states(model, **{key: value.to(model.device) for key, value in batch.items()})
            count += batch["input_ids"].numel()
    return count
