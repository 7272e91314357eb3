"""A teacher's largest log-probabilities of every token that carries loss, on disk, instead of the teacher.

A cache is a folder: ``index.json`` (what it was made from and with, and each shard's rows, tokens, size and SHA-256)
and ``shards/*.safetensors``, a fixed number of rows each, with the arrays

- ``offsets`` (rows + 1,) int64: row r has the tokens ``offsets[r]:offsets[r + 1]``, one for each position whose *next*
  label is valid, in order;
- ``indices`` (tokens, k) uint16 for vocabularies of at most 65536, else int32;
- ``log_probs`` (tokens, k) fp16 or fp32, or ``codes``, ``top`` and ``span``: see :mod:`fused_kd.training.codes`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fused_kd.inputs import TAILS
from fused_kd.integrations.labels import LABEL_PAD
from fused_kd.training.codes import DTYPES, EXCESS, decode, id_dtype, mass
from fused_kd.training.prompts import PromptTemplate, get_prompt
from fused_kd.training.stage import check_counts, fingerprint, fingerprint_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = "fused_kd teacher cache 1"
INDEX = "index.json"
_ARRAYS = {
    "fp16": {"log_probs": "F16"},
    "fp32": {"log_probs": "F32"},
    "8bit": {"codes": "U8", "top": "F32", "span": "F32"},
}
_IDS = {"uint16": "U16", "int32": "I32"}
# what says where a config came from, and nothing about the function that the model computes
_CONFIG_NOISE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
PARTS = {
    "tokenizer": "the tokens and their ids",
    "data": "the token ids and labels of the rows",
    "template": "the text of the prompt template",
    "teacher_config": "the teacher's config",
    "teacher_weights": "the teacher's weights",
}

AnyRows = Sequence[Mapping[str, Any]] | Dataset[Any]


class TeacherCache:
    """Reads a cache made by :func:`write_cache`; shards are memory-mapped.

    Args:
        folder: where it lies.
        tail: what the loss shall take for the tokens that are not listed, see ``fused_kd.TopK``; default
            "renormalize".
        verify: compare every shard with its checksum (default), not only its size. Leave it out where the folder has
            been verified shortly before.

    Attributes:
        k: entries a token. vocab_size: tokens of the vocabulary that the probabilities are over.
        dtype: "fp16", "8bit" or "fp32". tokens: those with entries. bytes_per_token: of the shards.
        mass_mean, mass_min: the probability that the entries of a token have together.
        fingerprints: SHA-256 of each part in ``PARTS``; None where it is not known. about: names for people.

    Raises:
        ValueError: no cache there, an unfinished one, an index that says what cannot be, a shard that is missing,
            truncated, corrupted or of another form (by name), an unknown tail.
    """

    def __init__(self, folder: str | Path, tail: str = "renormalize", *, verify: bool = True) -> None:
        if tail not in TAILS:
            raise ValueError(f"tail must be one of {', '.join(map(repr, TAILS))}, got {tail!r}")
        self.folder = Path(folder)
        self.tail = tail
        index = read_index(self.folder)
        if index is None:
            raise ValueError(f"folder={str(folder)!r} holds no teacher cache: there is no {INDEX}")
        self._shards: list[dict[str, Any]] = index["shards"]
        self.k, self.vocab_size, self.dtype = index["k"], index["vocab_size"], index["dtype"]
        self.fingerprints: dict[str, str | None] = index["fingerprints"]
        self.about: dict[str, Any] = index["about"]
        self._rows, self._shard_rows = int(index["rows"]), int(index["shard_rows"])
        files = [shard["file"] for shard in self._shards]
        count = -(-self._rows // self._shard_rows)
        if len(files) != count or files != [shard_name(number) for number in range(count)]:
            raise ValueError(
                f"the teacher cache in {self.folder} is not finished ({len(files)} of {count} shards): "
                "run the command that makes it again"
            )
        for shard in self._shards:
            fault = shard_fault(self.folder, index, shard, checksum=verify)
            if fault is not None:
                raise ValueError(
                    f"the teacher cache in {self.folder} is damaged: {shard['file']} {fault}; run the command that "
                    "made it again, which makes that shard anew"
                )
        self.tokens = sum(shard["tokens"] for shard in self._shards)
        self.bytes_per_token = sum(shard["bytes"] for shard in self._shards) / max(self.tokens, 1)
        self.mass_mean = sum(shard["mass_sum"] for shard in self._shards) / max(self.tokens, 1)
        self.mass_min = min((shard["mass_min"] for shard in self._shards), default=1.0)
        self._open: dict[int, tuple[Any, np.ndarray]] = {}

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The lists of one row: log-probabilities (n, k) float32 and ids (n, k) int64, in the order they were written.

        n is the number of positions with a valid next label. Entries left out are -inf. Of a teacher, and of vLLM, the
        largest come first. Raises ``ValueError`` for what no writer writes: an id outside the vocabulary or twice in a
        list, a log-probability above 0 or NaN, a list without entries or of a probability above 1.
        """
        if not 0 <= index < self._rows:
            raise IndexError(f"row {index} of a teacher cache of {self._rows} rows")
        shard, row = divmod(index, self._shard_rows)
        if shard not in self._open:
            from safetensors import safe_open

            handle = safe_open(self.folder / self._shards[shard]["file"], framework="numpy")
            self._open[shard] = handle, handle.get_tensor("offsets")
        handle, offsets = self._open[shard]
        tokens = slice(int(offsets[row]), int(offsets[row + 1]))
        if tokens.start == tokens.stop:
            return torch.empty(0, self.k), torch.empty(0, self.k, dtype=torch.int64)
        arrays = {name: handle.get_slice(name)[tokens] for name in handle.keys() if name != "offsets"}  # noqa: SIM118
        log_probs, ids = decode(arrays), arrays["indices"].astype(np.int64)
        if fault := _fault_of(log_probs, ids, self.vocab_size):
            place = f"{self.folder}, row {row} of {self._shards[shard]['file']}"
            raise ValueError(f"row {index} of the teacher cache in {place}: {fault}")
        return torch.from_numpy(log_probs), torch.from_numpy(ids)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a worker process maps the files itself

    def __repr__(self) -> str:
        return (
            f"TeacherCache({str(self.folder)!r}, {self._rows} rows, {self.tokens} tokens, k={self.k}, {self.dtype}, "
            f"vocab_size={self.vocab_size}, tail={self.tail!r})"
        )

    def check(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        rows: AnyRows,
        template: PromptTemplate | str,
        teacher: PreTrainedModel | None = None,
    ) -> None:
        """Raise unless the cache was made with these; ``teacher`` None (default) is not compared.

        Raises:
            ValueError: names every part in ``PARTS`` that differs.
        """
        given = fingerprints_of(tokenizer, rows, template)
        self._compare(given if teacher is None else {**given, **fingerprint_teacher(teacher)})

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise unless the cache was made with this tokenizer; tokens that were added to it since do not count.

        Raises:
            ValueError: another one.
        """
        tokens = sorted(tokenizer.get_vocab().items())
        first = fingerprint([(token, index) for token, index in tokens if index < self.vocab_size])
        if self.fingerprints.get("tokenizer") != first:
            self._compare({"tokenizer": fingerprint(tokens)})

    def rows(self, dataset: AnyRows) -> CachedRows:
        """The rows of ``dataset``, which must be those that the cache was made for, each with its lists.

        Raises:
            ValueError: other rows, or another order.
        """
        self._compare({"data": fingerprint_rows(dataset)})
        return CachedRows(self, dataset)

    def _compare(self, given: Mapping[str, str | None]) -> None:
        faults = []
        for part, value in given.items():
            known = self.fingerprints.get(part)
            if known is None:
                faults.append(f"{part} (not known: {PARTS[part]})")
            elif known != value:
                faults.append(f"{part} ({PARTS[part]}: {known[:12]} in the cache, {str(value)[:12]} here)")
        if faults:
            raise ValueError(f"the teacher cache in {self.folder} was made from something else: {', '.join(faults)}")


class CachedRows(Dataset[dict[str, Any]]):
    """Rows with ``teacher_log_probs`` (n, k) float32 and ``teacher_indices`` (n, k) int64, for ``Collator`` to pad."""

    def __init__(self, cache: TeacherCache, dataset: AnyRows) -> None:
        self.cache = cache
        self.dataset: Any = dataset

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> dict[str, Any]:
        log_probs, indices = self.cache[index]
        return {**self.dataset[index], "teacher_log_probs": log_probs, "teacher_indices": indices}

    def __repr__(self) -> str:
        return f"CachedRows({self.dataset!r}, {self.cache!r})"


def _fault_of(log_probs: np.ndarray, ids: np.ndarray, vocab_size: int) -> str | None:
    """Why these can be no lists of a teacher, or None."""
    if not ((ids >= 0) & (ids < vocab_size)).all() or not (log_probs <= 0).all():
        return (
            f"expected ids below {vocab_size} and log-probabilities of at most 0, got {ids.min()} to {ids.max()} and "
            f"{log_probs.max()}"
        )
    total = mass(log_probs)
    if not ((total > 0) & (total <= 1 + EXCESS)).all():
        return f"expected probabilities that add up to more than 0 and at most 1, got {total.min()} to {total.max()}"
    return repetition(log_probs > -np.inf, ids)


def repetition(listed: np.ndarray, ids: np.ndarray) -> str | None:
    """Which of the ids (n, k) that are ``listed`` is one token's twice, for a message; or None."""
    given = np.sort(np.where(listed, ids, -1 - np.arange(ids.shape[1])), axis=1)  # left out: each another one
    twice = given[:, 1:][given[:, 1:] == given[:, :-1]]
    return f"expected the ids of a token once each, got {twice[0]} twice" if len(twice) else None


def target_positions(labels: Sequence[int] | Tensor) -> np.ndarray:
    """The positions whose next label is valid, where a model predicts something that carries loss."""
    return np.flatnonzero(np.asarray(labels)[1:] != LABEL_PAD)


def fingerprints_of(
    tokenizer: PreTrainedTokenizerBase, rows: AnyRows, template: PromptTemplate | str
) -> dict[str, str | None]:
    """SHA-256 of which token has which id, of the rows, and of the template's text, whose name does not matter."""
    return {
        "tokenizer": fingerprint(sorted(tokenizer.get_vocab().items())),
        "data": fingerprint_rows(rows),
        "template": fingerprint(get_prompt(template).template),
    }


def fingerprint_rows(rows: AnyRows) -> str:
    """SHA-256 of all token ids and labels, in order."""
    data: Any = rows
    digest = hashlib.sha256()
    for index in range(len(data)):
        row = data[index]
        for values in (row["input_ids"], row["labels"]):
            array = np.asarray(values, dtype="<i8")
            digest.update(len(array).to_bytes(8, "little") + array.tobytes())
    return digest.hexdigest()


def fingerprint_teacher(teacher: PreTrainedModel) -> dict[str, str | None]:
    """``teacher_config`` and ``teacher_weights``: SHA-256 of what differs from the architecture's default config, and
    of all parameters and buffers that are saved, in the dtype in which they are loaded: some seconds per 10 GB."""
    config = {key: value for key, value in teacher.config.to_diff_dict().items() if key not in _CONFIG_NOISE}
    digest = hashlib.sha256()
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if (tensor.data_ptr(), tensor.shape) in seen:  # a tied weight
            continue
        seen.add((tensor.data_ptr(), tensor.shape))
        for part in tensor.detach().reshape(-1).split(1 << 26):
            digest.update(memoryview(part.cpu().contiguous().view(torch.uint8).numpy()))
    return {"teacher_config": fingerprint(config), "teacher_weights": digest.hexdigest()}


def read_index(folder: Path) -> dict[str, Any] | None:
    """What ``index.json`` says, finished or not; None where there is none.

    Raises:
        ValueError: it is no index, or says what cannot be; the message names the entry.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if index.get("format") != FORMAT:
            raise ValueError(f"expected the format {FORMAT!r}, got {str(index.get('format'))[:80]!r}")
        _check_index(index)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {str(error)[:300]}); without it the cache is made anew"
        ) from error
    return index


def _check_index(index: dict[str, Any]) -> None:
    check_counts(**{name: index[name] for name in ("k", "vocab_size", "rows", "shard_rows")})
    if index["k"] > index["vocab_size"] or index["dtype"] not in DTYPES:
        raise ValueError(f"no cache has k={index['k']} of {index['vocab_size']} tokens in {str(index['dtype'])[:80]}")
    if not isinstance(index["about"], dict) or not isinstance(index["fingerprints"], dict):
        raise ValueError("about and fingerprints must be objects")
    for shard in index["shards"]:
        number = int(Path(shard["file"]).stem)
        rows = min(index["rows"] - number * index["shard_rows"], index["shard_rows"])
        sound = 0 <= shard["mass_min"] <= 1 + EXCESS and 0 <= shard["mass_sum"] <= shard["tokens"] * (1 + EXCESS)
        sound = sound and shard["bytes"] > 0 and isinstance(shard["sha256"], str)
        if shard["file"] != shard_name(number) or shard["rows"] != rows or not sound:
            raise ValueError(f"no shard can be {str(shard)[:200]}")


def shard_name(number: int) -> str:
    return f"shards/{number:05d}.safetensors"


def shard_fault(folder: Path, index: Mapping[str, Any], shard: Mapping[str, Any], *, checksum: bool) -> str | None:
    """What is wrong with a shard's file, or None."""
    path = folder / shard["file"]
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != shard["bytes"]:
        return f"has {size} bytes instead of {shard['bytes']}"
    if checksum and fingerprint_file(path) != shard["sha256"]:
        return "differs from its checksum"
    return _layout_fault(path, index, shard)


def _layout_fault(path: Path, index: Mapping[str, Any], shard: Mapping[str, Any]) -> str | None:
    """What of a shard's arrays is not as the index says; their values are not read."""
    from safetensors import SafetensorError, safe_open

    rows, tokens, k = shard["rows"], shard["tokens"], index["k"]
    wanted = {"offsets": ("I64", [rows + 1]), "indices": (_IDS[id_dtype(index["vocab_size"]).name], [tokens, k])}
    for name, dtype in _ARRAYS[index["dtype"]].items():
        wanted[name] = (dtype, [tokens] if name in ("top", "span") else [tokens, k])
    try:
        with safe_open(path, framework="numpy") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            layout = {name: (part.get_dtype(), part.get_shape()) for name, part in found.items()}
            if layout != wanted:
                return f"has the arrays {repr(layout)[:300]}, expected {wanted}"
            offsets = file.get_tensor("offsets")
    except SafetensorError as error:
        return f"is no safetensors file: {error}"
    if offsets[0] != 0 or offsets[-1] != tokens or (offsets[1:] < offsets[:-1]).any():
        return f"has offsets that do not rise from 0 to its {tokens} tokens"
    return None
