"""Makes a teacher cache, shard by shard: what a kill interrupts is one shard, the rest is kept and verified."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fused_kd.integrations.heads import check_head_module
from fused_kd.integrations.transformers import check_lm_head
from fused_kd.integrations.weights import rows_of
from fused_kd.training.cached_rows import AnyRows
from fused_kd.training.codes import DTYPES
from fused_kd.training.collate import padding_id
from fused_kd.training.fingerprints import fingerprint_teacher, fingerprints_of
from fused_kd.training.hidden_cache import hidden_writer, projection_like
from fused_kd.training.hidden_codes import CACHE_DTYPES
from fused_kd.training.list_cache import Source, list_writer, teacher_draws, teacher_lists
from fused_kd.training.prompts import PromptTemplate, get_prompt
from fused_kd.training.shards import KEPT, read_index, write_shards
from fused_kd.training.stage import check_counts, check_same, fingerprint_file
from fused_kd.training.teacher_cache import TeacherCache
from fused_kd.training.teacher_runs import Runs, read_row, teacher_runs
from fused_kd.training.vllm import read_prompt_logprobs, row_lists

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_cache(
    folder: str | Path,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: AnyRows,
    *,
    template: PromptTemplate | str | None = None,
    k: int | None = None,
    keep: str = "lists",
    dtype: str | None = None,
    project: int | None = None,
    like: str | Path | None = None,
    draws: int | None = None,
    seed: int | None = None,
    shard_rows: int | None = None,
    batch_size: int = 16,
    memory: int = 256 << 20,
    sample: int | None = None,
    progress: bool = True,
) -> TeacherCache:
    """Write what a teacher predicts at every token of ``rows`` that carries loss.

    For each token the cache keeps the teacher's k largest log-probabilities, a few entries that are drawn, or the last
    hidden state and, once, the teacher's head.

    Log-probabilities are ``log_softmax`` in fp32 over the tokenizer's vocabulary; a padded head is cut to it. Hidden
    states come with the whole head, as the teacher has it: what is cut is the loss's affair. The same call goes on
    where an interrupted one stopped and, as far as the device's kernels are deterministic, gives the same files. One
    process a folder: a second one waits.

    Args:
        folder: for ``index.json``, the shards and the head.
        teacher: a causal LM on the device where it shall run; in eval mode meanwhile.
        tokenizer: the one that made ``rows``.
        rows: items with ``input_ids`` and unshifted ``labels``, as of ``tokenize_pairs``. Of rows of ``with_context``
            the teacher reads ``teacher_input_ids`` and ``teacher_labels``.
        template: that of the rows' prompts; bound to the cache, not used otherwise. None (default): they have none.
        k: entries a token, at most the vocabulary's size; with ``keep="sampled"`` may be 0, as which None counts; None
            with ``keep="hidden"``.
        keep: "lists" (default), "hidden", or "sampled": lists of :func:`fused_kd.sample_of`, for losses whose gradient
            is linear in the teacher's probabilities.
        dtype: of lists, drawn ones too, "fp16" (default), "8bit" or "fp32", see :mod:`fused_kd.training.codes`; of
            hidden states "bf16" (default), "fp8", "int8", "fp16" or "fp32", see
            :mod:`fused_kd.training.hidden_codes`. The head stays in the teacher's dtype.
        project: keep r numbers of a hidden state: those from which an affine map gives the teacher's probabilities
            best, see :mod:`fused_kd.training.projection`. They are found from a first run over a part of the rows. None
            (default): all.
        like: the folder of another cache of this teacher's hidden states, whose projection, or of "int8" the scaling,
            is used, so that both are of one head: for the validation rows of a training. In place of ``project``.
        draws: with ``keep="sampled"``, how many entries of a token are drawn; default 12. They depend on ``seed``, on
            the row's number, and on the teacher.
        seed: with ``keep="sampled"``, any int; default 0.
        shard_rows: rows a shard, which are in memory together: what a kill loses at most, and rows of similar length
            are found among them. None (default): 1024, of hidden states 128.
        batch_size: rows the teacher runs at once.
        memory: bytes for logits; they are made for a chunk of tokens at a time. Default 256 MiB.
        sample: with ``keep="hidden"``, about how many tokens of evenly spread rows are looked at first, to find the
            directions of ``project``, or the scaling of "int8", and to measure the error; default 65,536.
        progress: show a bar.

    Returns:
        The finished cache.

    Raises:
        ValueError: a size out of range, an unknown ``keep`` or ``dtype``, an option that goes with another ``keep``, no
            rows, an id outside the vocabulary, a head
            smaller than the vocabulary, states that are not finite or too large for the dtype, a folder made with other
            arguments or from something else (the message says which).
    """
    settings, fingerprints = check_options(
        folder, tokenizer, rows, template=template, k=k, keep=keep, dtype=dtype, project=project, like=like,
        draws=draws, seed=seed, shard_rows=shard_rows, batch_size=batch_size, memory=memory, sample=sample,
    )  # fmt: skip
    vocab_size, size = len(tokenizer), rows_of(check_head_module(teacher).weight)
    if size < vocab_size:
        raise ValueError(f"the teacher's head has {size} rows, fewer than the {vocab_size} tokens of the tokenizer")
    data: Any = rows
    fingerprints |= fingerprint_teacher(teacher)
    if like is not None:
        projection_like(Path(like), fingerprints)
    check_lm_head(teacher)
    runs = _runs_of(teacher, data, padding_id(tokenizer), batch_size)
    if keep == "hidden":
        sample = 1 << 16 if sample is None else sample
        begin = hidden_writer(runs, data, sample=sample, memory=memory, like=None if like is None else Path(like))
    elif keep == "lists":
        begin = list_writer(teacher_lists(runs, settings["k"], vocab_size, memory), data)
    else:
        source = teacher_draws(runs, settings["k"], settings["draws"], settings["seed"], vocab_size, memory)
        begin = list_writer(source, data)
    about = {
        "teacher": str(getattr(teacher.config, "_name_or_path", "") or type(teacher).__name__),
        "revision": getattr(teacher.config, "_commit_hash", None),
        "template": _name_of(template),
    }
    write_shards(
        folder, len(data), settings, fingerprints, about, begin, shard_rows=settings["shard_rows"], progress=progress
    )
    return TeacherCache(folder, verify=False)


def check_options(
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: AnyRows,
    *,
    template: PromptTemplate | str | None = None,
    k: int | None = None,
    keep: str = "lists",
    dtype: str | None = None,
    project: int | None = None,
    like: str | Path | None = None,
    draws: int | None = None,
    seed: int | None = None,
    shard_rows: int | None = None,
    batch_size: int = 16,
    memory: int = 256 << 20,
    sample: int | None = None,
) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Check what :func:`write_cache` can check without a teacher, whose loading may take minutes.

    Arguments and errors are those of :func:`write_cache`.

    Returns:
        What the cache's index will have of the arguments, with the defaults filled in, as
        :func:`fused_kd.training.shards.bytes_of_token` takes it; the fingerprints of tokenizer, rows and template.
    """
    vocab_size = len(tokenizer)
    if keep not in KEPT:
        raise ValueError(f"keep must be one of {', '.join(map(repr, KEPT))}, got {keep!r}")
    dtypes = tuple(CACHE_DTYPES) if keep == "hidden" else DTYPES
    dtype = dtypes[0] if dtype is None else dtype
    shard_rows = (128 if keep == "hidden" else 1024) if shard_rows is None else shard_rows
    _check_none(keep, k=k, project=project, like=like, sample=sample, draws=draws, seed=seed)
    check_counts(batch_size=batch_size, memory=memory, sample=1 if sample is None else sample, shard_rows=shard_rows)
    _check_form(rows, dtype, dtypes)
    settings: dict[str, Any] = {"keep": keep, "vocab_size": vocab_size, "dtype": dtype}
    fingerprints = fingerprints_of(tokenizer, rows, template)
    if keep == "hidden":
        if project is not None and like is not None:
            raise ValueError(f"project must be None with like, got {project!r}")
        if project is not None:
            check_counts(project=project)
        settings |= {"project": project, "like": None}
        if like is not None:
            index = read_index(Path(like)) or {"fingerprints": {}}
            settings |= projection_like(Path(like), {**index["fingerprints"], **fingerprints})
    elif keep == "lists":
        settings |= {**_list_settings(k, vocab_size), "rest": True}
    else:
        seed = 0 if seed is None else seed
        settings |= _draw_settings(0 if k is None else k, 12 if draws is None else draws, seed, vocab_size)
    settings |= {"rows": len(rows), "shard_rows": shard_rows}  # type: ignore[arg-type]
    if (known := read_index(Path(folder))) is not None:
        given = {**settings, **fingerprints}
        theirs = {**known, **known["fingerprints"]}
        check_same(Path(folder), {name: theirs.get(name) for name in given}, given)
    return settings, fingerprints


def convert_vllm(
    folder: str | Path,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: AnyRows,
    *,
    k: int,
    template: PromptTemplate | str | None = None,
    teacher: str = "",
    dtype: str = "fp16",
    shard_rows: int = 1024,
    progress: bool = True,
) -> TeacherCache:
    """Make a cache from a file of :func:`fused_kd.training.vllm.read_prompt_logprobs`, which has ``rows`` in order.

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
                yield index, *row_lists(found, read_row(index, data[index]), k, vocab_size)
        if stop == len(data):
            if next(read, None) is not None:
                raise ValueError(f"{path} has more rows than the data's {len(data)}")
            if widest < k:
                raise ValueError(f"k={k}: {path} lists at most {widest} entries a token")

    return write_lists(
        folder, lists, tokenizer, rows, k=k, template=template, dtype=dtype, shard_rows=shard_rows,
        made_from={"teacher_config": None, "teacher_weights": None, "file": fingerprint_file(Path(path))},
        about={"teacher": teacher, "revision": None, "template": _name_of(template), "file": Path(path).name},
        progress=progress,
    )  # fmt: skip


def write_lists(
    folder: str | Path,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    rows: AnyRows,
    *,
    k: int,
    template: PromptTemplate | str | None = None,
    dtype: str,
    shard_rows: int,
    made_from: Mapping[str, str | None],
    about: Mapping[str, Any],
    with_rest: bool = False,
    progress: bool = True,
) -> TeacherCache:
    """Write a cache as :func:`write_cache` does, with lists from anywhere: ``source`` is asked for ascending ranges of
    rows, each once.

    ``made_from`` are the fingerprints of what the lists come from, beside those of tokenizer, data and template;
    ``about`` are names for people. ``with_rest``: the source gives what is not listed too, log-probabilities (n,).
    """
    vocab_size = len(tokenizer)
    data: Any = rows
    check_counts(shard_rows=shard_rows)
    lists = _list_settings(k, vocab_size)
    _check_form(rows, dtype, DTYPES)
    settings = {"keep": "lists", "vocab_size": vocab_size, "dtype": dtype, **lists, "rest": with_rest}
    fingerprints = {**fingerprints_of(tokenizer, rows, template), **made_from}
    write_shards(
        folder, len(data), settings, fingerprints, about, list_writer(source, data), shard_rows=shard_rows,
        progress=progress,
    )  # fmt: skip
    return TeacherCache(folder, verify=False)


def _name_of(template: PromptTemplate | str | None) -> str | None:
    return None if template is None else get_prompt(template).name


def _check_none(keep: str, **others: Any) -> None:
    """Raise ``ValueError`` for an option that ``keep`` has no use for."""
    used = {"lists": ("k",), "hidden": ("project", "like", "sample"), "sampled": ("k", "draws", "seed")}[keep]
    for name, value in others.items():
        if value is not None and name not in used:
            raise ValueError(f"{name} must be None with keep={keep!r}, got {value!r}")


def _list_settings(k: Any, vocab_size: int) -> dict[str, Any]:
    check_counts(k=k)
    if k > vocab_size:
        raise ValueError(f"k={k}: expected at most the {vocab_size} tokens of the tokenizer")
    return {"k": k}


def _draw_settings(k: Any, draws: Any, seed: Any, vocab_size: int) -> dict[str, Any]:
    check_counts(draws=draws)
    if type(seed) is not int:
        raise ValueError(f"seed must be an int, got {seed!r}")
    if type(k) is not int or k < 0:
        raise ValueError(f"k must be an int of at least 0 with keep='sampled', got {k!r}")
    if k:
        _list_settings(k, vocab_size)
    return {"k": k, "draws": draws, "seed": seed}


def _check_form(rows: Any, dtype: Any, dtypes: tuple[str, ...]) -> None:
    if dtype not in dtypes:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, dtypes))}, got {dtype!r}")
    if not len(rows):
        raise ValueError("rows is empty: expected at least one row")


def _runs_of(teacher: Any, data: Any, pad: int, batch_size: int) -> Runs:
    return lambda numbers: teacher_runs(teacher, data, numbers, pad, batch_size)
