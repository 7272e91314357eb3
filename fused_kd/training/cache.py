"""Makes a teacher cache, shard by shard: what a kill interrupts is one shard, the rest is kept and verified."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fused_kd import top_k_of
from fused_kd.integrations.bodies import eval_mode
from fused_kd.integrations.labels import LABEL_PAD
from fused_kd.integrations.transformers import check_lm_head, hidden_states, lm_head_of
from fused_kd.training.codes import DTYPES, encode, id_dtype, mass
from fused_kd.training.collate import Collator, padding_id
from fused_kd.training.prompts import PromptTemplate, get_prompt
from fused_kd.training.stage import (
    check_counts,
    check_same,
    check_writable,
    fingerprint_file,
    lock,
    write_bytes,
    write_json,
)
from fused_kd.training.teacher_cache import (
    FORMAT,
    INDEX,
    AnyRows,
    TeacherCache,
    fingerprint_teacher,
    fingerprints_of,
    read_index,
    repetition,
    shard_fault,
    shard_name,
    target_positions,
)
from fused_kd.training.teacher_cache import CachedRows as CachedRows
from fused_kd.training.vllm import read_prompt_logprobs, row_lists

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The lists of rows [start, stop), in any order: (row, log-probabilities (n, k) float32, ids (n, k)).
Source = Callable[[int, int], Iterator[tuple[int, np.ndarray, np.ndarray]]]


def write_cache(
    folder: str | Path,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: AnyRows,
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
        dtype: "fp16" (default), "8bit" or "fp32", see :mod:`fused_kd.training.codes`.
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
    check_counts(batch_size=batch_size, memory=memory)
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


def convert_vllm(
    folder: str | Path,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: AnyRows,
    *,
    k: int,
    template: PromptTemplate | str,
    teacher: str = "",
    dtype: str = "fp16",
    shard_rows: int = 1024,
    progress: bool = True,
) -> TeacherCache:
    """A cache from a file of :func:`fused_kd.training.vllm.read_prompt_logprobs`, whose rows are ``rows`` in order.

    The k largest entries of a token are kept; of a token with fewer, those. Ids beyond the tokenizer's vocabulary (a
    padded head) are left out. The file stands for the teacher: going on needs the same one. Other arguments and errors
    are those of :func:`write_cache`; ``teacher`` is its name, for people.

    Raises:
        ValueError: too few or too many rows, a row of other tokens, a token without entries, fewer than k of them
            everywhere; with file and line.
    """
    vocab_size = len(tokenizer)
    data: Any = rows
    read = enumerate(read_prompt_logprobs(path))
    count, widest = 0, 0

    def lists(start: int, stop: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        nonlocal count, widest
        while count < stop:
            index, found = next(read, (count, None))
            if found is None:
                raise ValueError(f"{path} has {count} rows, the data {len(data)}")
            count += 1
            widest = max([widest, *(len(entry) for entry in found.entries if entry)])
            if index >= start:  # what is before belongs to finished shards
                yield index, *row_lists(found, data[index], k, vocab_size)
        if stop == len(data):
            if next(read, None) is not None:
                raise ValueError(f"{path} has more rows than the data's {len(data)}")
            if widest < k:
                raise ValueError(f"k={k}: {path} lists at most {widest} entries a token")

    return write_lists(
        folder, lists, tokenizer, rows, k=k, template=template, dtype=dtype, shard_rows=shard_rows,
        made_from={"teacher_config": None, "teacher_weights": None, "file": fingerprint_file(Path(path))},
        about={"teacher": teacher, "revision": None, "template": get_prompt(template).name, "file": Path(path).name},
        progress=progress,
    )  # fmt: skip


def write_lists(
    folder: str | Path,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    rows: AnyRows,
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
    data: Any = rows
    check_counts(k=k, shard_rows=shard_rows)
    if k > vocab_size:
        raise ValueError(f"k={k}: expected at most the {vocab_size} tokens of the tokenizer")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, DTYPES))}, got {dtype!r}")
    if not len(data):
        raise ValueError("rows is empty: expected at least one row")
    fingerprints = {**fingerprints_of(tokenizer, rows, template), **made_from}
    settings = {"k": k, "vocab_size": vocab_size, "dtype": dtype, "rows": len(data), "shard_rows": shard_rows}
    folder = Path(folder)
    check_writable(folder)

    from tqdm import tqdm

    with lock(folder / "shards" / ".lock"):
        for partial in [*folder.glob(f"{INDEX}.*.partial"), *folder.glob("shards/*.partial")]:
            partial.unlink()
        index = read_index(folder) or {
            "format": FORMAT, **settings, "fingerprints": fingerprints, "about": dict(about), "shards": [],
        }  # fmt: skip
        theirs = {**{name: index[name] for name in settings}, **index["fingerprints"]}
        check_same(folder, theirs, {**settings, **fingerprints})
        finished = {s["file"]: s for s in index["shards"] if shard_fault(folder, index, s, checksum=True) is None}
        with tqdm(total=len(data), desc="teacher cache", unit="row", disable=not progress) as bar:
            for start in range(0, len(data), shard_rows):
                stop, name = min(start + shard_rows, len(data)), shard_name(start // shard_rows)
                if name in finished:
                    bar.update(stop - start)
                    continue
                finished[name] = _write_shard(folder / name, source, data, start, stop, k, vocab_size, dtype, bar)
                write_json(folder / INDEX, {**index, "shards": [finished[file] for file in sorted(finished)]})
    return TeacherCache(folder, verify=False)


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

    def lists(start: int, stop: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        order = sorted(range(start, stop), key=lambda index: -len(rows[index]["input_ids"]))
        with eval_mode(teacher):
            for first in range(0, len(order), batch_size):
                batch = order[first : first + batch_size]
                inputs = collate([{name: rows[index][name] for name in ("input_ids", "labels")} for index in batch])
                inputs = {name: value.to(teacher.device) for name, value in inputs.items()}
                valid = inputs.pop("labels")[:, 1:] != LABEL_PAD
                with torch.no_grad():
                    hidden = hidden_states(teacher, **inputs)
                    head = lm_head_of(teacher, hidden[:, :-1][valid.to(hidden.device)])
                found = top_k_of(head, k, vocab_size=vocab_size, memory_budget=memory)
                lengths = valid.sum(1).tolist()
                lists_of_rows = (part.cpu().split(lengths) for part in (found.log_probs, found.indices))
                for index, values, ids in zip(batch, *lists_of_rows, strict=True):
                    yield index, values.numpy(), ids.numpy()

    return lists
