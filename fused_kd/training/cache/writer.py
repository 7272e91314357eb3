"""Makes a teacher cache, shard by shard: what a kill interrupts is one shard, the rest is kept and verified."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fused_kd import LMHead
from fused_kd.engines.gemm import Projection
from fused_kd.integrations.transformers import check_lm_head, hidden_states, lm_head_of
from fused_kd.training.cache.codes import DTYPES, encode, id_dtype, mass
from fused_kd.training.cache.index import FORMAT, INDEX, is_count, read_index, shard_fault, shard_name
from fused_kd.training.cache.teacher_cache import (
    Rows,
    TeacherCache,
    fingerprint_rows,
    fingerprint_teacher,
    fingerprint_template,
    fingerprint_tokenizer,
    repetition,
    target_positions,
)
from fused_kd.training.data.prompts import LABEL_PAD, Collator, PromptTemplate, get_prompt, padding_id
from fused_kd.training.runs import Run, write_bytes, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The lists of rows [start, stop), in any order: (row, log-probabilities (n, k) float32, ids (n, k)).
Source = Callable[[int, int], Iterator[tuple[int, np.ndarray, np.ndarray]]]


def write_cache(
    folder: str | Path,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    k: int,
    template: PromptTemplate | str,
    dtype: str = "fp16",
    shard_rows: int = 1024,
    batch_size: int = 16,
    memory: int = 256 << 20,
    progress: bool = True,
) -> TeacherCache:
    """The teacher's k largest log-probabilities of every token of ``rows`` that carries loss.

    They are ``log_softmax`` in fp32 over the tokenizer's vocabulary; a padded head is cut to it. The same call goes on
    where an interrupted one stopped and, as far as the device's kernels are deterministic, gives the same files. One
    process a folder: a second one waits.

    Args:
        folder: for ``index.json`` and the shards.
        teacher: a causal LM on the device where it shall run; in eval mode meanwhile.
        tokenizer: the one that made ``rows``.
        rows: items with ``input_ids`` and unshifted ``labels``, as of ``tokenize_pairs``.
        k: entries a token, at most the vocabulary's size.
        template: that of the rows' prompts; bound to the cache, not used otherwise.
        dtype: "fp16" (default), "8bit" or "fp32", see :mod:`fused_kd.training.cache.codes`.
        shard_rows: rows a shard, default 1024: what a kill loses at most, and rows of similar length are found among
            them.
        batch_size: rows the teacher runs at once.
        memory: bytes for logits; they are made for a chunk of tokens at a time. Default 256 MiB.
        progress: show a bar.

    Returns:
        The finished cache.

    Raises:
        ValueError: a size out of range, no rows, an id outside the vocabulary, a head smaller than the vocabulary, a
            folder made with other arguments or from something else (the message says which).
    """
    vocab_size = len(tokenizer)
    for name, value in (("batch_size", batch_size), ("memory", memory)):
        _check_count(name, value)
    _check(rows, k, vocab_size, dtype, shard_rows)
    width = teacher.get_output_embeddings().weight.shape[0]
    if width < vocab_size:
        raise ValueError(f"the teacher's head has {width} rows, fewer than the {vocab_size} tokens of the tokenizer")
    check_lm_head(teacher)
    source = _teacher_lists(teacher, rows, k, vocab_size, padding_id(tokenizer), batch_size, memory)
    about = {
        "teacher": str(getattr(teacher.config, "_name_or_path", "") or type(teacher).__name__),
        "revision": getattr(teacher.config, "_commit_hash", None),
        "template": get_prompt(template).name,
    }
    return write_lists(
        folder, source, tokenizer, rows, k=k, template=template, dtype=dtype, shard_rows=shard_rows,
        made_from=fingerprint_teacher(teacher), about=about, progress=progress,
    )  # fmt: skip


def write_lists(
    folder: str | Path,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    k: int,
    template: PromptTemplate | str,
    dtype: str,
    shard_rows: int,
    made_from: Mapping[str, str | None],
    about: Mapping[str, Any],
    progress: bool = True,
) -> TeacherCache:
    """As :func:`write_cache`, with lists from anywhere: ``source`` is asked for ascending ranges of rows, each once.

    ``made_from`` are the fingerprints of what the lists come from, beside those of tokenizer, data and template;
    ``about`` are names for people.
    """
    vocab_size = len(tokenizer)
    _check(rows, k, vocab_size, dtype, shard_rows)
    data: Any = rows
    fingerprints = {
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "data": fingerprint_rows(rows),
        "template": fingerprint_template(template),
        **made_from,
    }
    settings = {"k": k, "vocab_size": vocab_size, "dtype": dtype, "rows": len(data), "shard_rows": shard_rows}
    run = Run(folder, {**settings, **fingerprints})

    from tqdm import tqdm

    with run.lock("shards"):
        for partial in [*run.folder.glob(f"{INDEX}.*.partial"), *run.stage("shards").glob("*.partial")]:
            partial.unlink()
        index = read_index(run.folder) or {
            "format": FORMAT, **settings, "fingerprints": fingerprints, "about": dict(about), "shards": [],
        }  # fmt: skip
        if other := [name for name, value in settings.items() if index[name] != value]:
            raise ValueError(f"{run.folder / INDEX} is damaged: its {', '.join(other)} differ from arguments.json's")
        theirs = index["fingerprints"]
        if other := sorted(n for n in fingerprints.keys() | theirs.keys() if fingerprints.get(n) != theirs.get(n)):
            raise ValueError(
                f"{run.folder} holds a cache made from something else, as its {INDEX} says of {', '.join(other)}: give "
                "another folder"
            )
        finished = {s["file"]: s for s in index["shards"] if shard_fault(run.folder, index, s, checksum=True) is None}
        with tqdm(total=len(data), desc="teacher cache", unit="row", disable=not progress) as bar:
            for start in range(0, len(data), shard_rows):
                stop, name = min(start + shard_rows, len(data)), shard_name(start // shard_rows)
                if name in finished:
                    bar.update(stop - start)
                    continue
                finished[name] = _write_shard(run.folder / name, source, data, start, stop, k, vocab_size, dtype, bar)
                write_json(run.folder / INDEX, {**index, "shards": [finished[file] for file in sorted(finished)]})
    return TeacherCache(folder, verify=False)


def _check(rows: Rows, k: int, vocab_size: int, dtype: str, shard_rows: int) -> None:
    for name, value in (("k", k), ("shard_rows", shard_rows)):
        _check_count(name, value)
    if k > vocab_size:
        raise ValueError(f"k={k}: expected at most the {vocab_size} tokens of the tokenizer")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, DTYPES))}, got {dtype!r}")
    if not len(rows):  # type: ignore[arg-type]
        raise ValueError("rows is empty: expected at least one row")


def _check_count(name: str, value: Any) -> None:
    if not is_count(value):
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")


def _write_shard(
    path: Path, source: Source, rows: Any, start: int, stop: int, k: int, vocab_size: int, dtype: str, bar: Any
) -> dict[str, Any]:
    """Write the shard of rows [start, stop) atomically; its entry for the index."""
    from safetensors.numpy import save

    counts = [len(target_positions(rows[index]["labels"])) for index in range(start, stop)]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    log_probs = np.full((offsets[-1], k), np.nan, dtype=np.float32)  # a row that does not come is an error
    indices = np.zeros((offsets[-1], k), dtype=id_dtype(vocab_size))
    for index, values, ids in source(start, stop):
        tokens = slice(offsets[index - start], offsets[index - start + 1])
        listed = values > -np.inf
        if (listed & ((ids < 0) | (ids >= vocab_size))).any():
            raise ValueError(f"row {index}: ids must be in [0, {vocab_size - 1}], got {ids.min()} to {ids.max()}")
        if fault := repetition(listed, ids):
            raise ValueError(f"row {index}: {fault}")
        log_probs[tokens], indices[tokens] = values, np.where(listed, ids, 0)
        bar.update()
    total = np.minimum(mass(log_probs), 1)  # by rounding it can be a little more
    try:
        arrays = encode(log_probs, dtype)
    except ValueError as error:
        raise ValueError(f"rows {start} to {stop - 1}: {error}") from error
    content = save({"offsets": offsets, "indices": indices, **arrays})
    write_bytes(path, content)
    return {
        "file": f"{path.parent.name}/{path.name}",
        "rows": stop - start,
        "tokens": int(offsets[-1]),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "mass_sum": float(total.sum()),
        "mass_min": float(total.min(initial=1.0)),
    }


def _teacher_lists(
    teacher: PreTrainedModel, rows: Any, k: int, vocab_size: int, pad: int, batch_size: int, memory: int
) -> Source:
    collate = Collator(pad)

    @torch.no_grad()
    def batch_lists(batch: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
        inputs = collate([{name: rows[index][name] for name in ("input_ids", "labels")} for index in batch])
        valid = inputs.pop("labels")[:, 1:] != LABEL_PAD
        hidden = hidden_states(teacher, **{name: value.to(teacher.device) for name, value in inputs.items()})
        head = lm_head_of(teacher, hidden[:, :-1][valid.to(hidden.device)])
        return *top_k_log_probs(head, k, vocab_size, memory), valid.sum(1).tolist()

    def lists(start: int, stop: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        order = sorted(range(start, stop), key=lambda index: -len(rows[index]["input_ids"]))
        was_training = teacher.training
        teacher.eval()
        try:
            for first in range(0, len(order), batch_size):
                batch = order[first : first + batch_size]
                log_probs, indices, counts = batch_lists(batch)
                for index, values, ids in zip(batch, log_probs.split(counts), indices.split(counts), strict=True):
                    yield index, values.numpy(), ids.numpy()
        finally:
            teacher.train(was_training)

    return lists


@torch.no_grad()
def top_k_log_probs(head: LMHead, k: int, vocab_size: int, memory: int = 256 << 20) -> tuple[Tensor, Tensor]:
    """The k largest of ``log_softmax(logits[:vocab_size])`` in fp32, largest first, and their ids, on the CPU.

    ``head`` has N tokens, ``hidden`` (N, H); both results are (N, k), float32 and int64. ``memory`` bounds the logits'
    bytes: a chunk of tokens is done at a time.
    """
    N = head.hidden.shape[0]
    C = max(1, min(N, memory // (2 * 4 * vocab_size)))  # logits and their log_softmax
    bias = None if head.bias is None else head.bias[:vocab_size]
    projection = Projection(head.weight[:vocab_size], bias, head.hidden.dtype)
    buffer = torch.empty(C, vocab_size, device=head.hidden.device)
    log_probs, indices = torch.empty(N, k), torch.empty(N, k, dtype=torch.int64)
    for start in range(0, N, C):
        tokens = slice(start, min(start + C, N))
        logits = buffer[: tokens.stop - start]
        projection.logits(projection.operand(head.hidden[tokens]), logits)
        if head.softcap is not None:
            logits.mul_(head.logit_scale / head.softcap).tanh_().mul_(head.softcap)
        elif head.logit_scale != 1.0:
            logits.mul_(head.logit_scale)
        values, ids = logits.log_softmax(-1).topk(k)
        log_probs[tokens], indices[tokens] = values.cpu(), ids.cpu()
    return log_probs, indices
