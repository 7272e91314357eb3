"""A cache on disk takes the teacher's place: it has, for every token that carries loss, the teacher's largest
log-probabilities, or its last hidden state and, once, its head. :mod:`fused_kd.training.shards` describes the folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fused_kd import LMHead, TopK
from fused_kd.inputs import TAILS
from fused_kd.integrations.teacher_columns import columns_of
from fused_kd.training.cached_rows import AnyRows, CachedRows
from fused_kd.training.fingerprints import (
    PARTS,
    check_parts,
    check_tokenizer,
    fingerprint_rows,
    fingerprint_teacher,
    fingerprints_of,
)
from fused_kd.training.hidden_codes import CACHE_DTYPES, WITH_SCALE, check_states, decode_states
from fused_kd.training.list_cache import no_lists, read_lists
from fused_kd.training.prompts import PromptTemplate
from fused_kd.training.shards import HEAD, INDEX, head_fault, read_index, shard_fault, shard_name
from fused_kd.training.stored_head import HeadOnDevices, bare_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TeacherCache:
    """Reads a cache made by :func:`write_cache`, and teaches with it; shards are memory-mapped.

    A trainer takes it as ``teacher``, with the rows of :meth:`rows`, and a collator of this package puts what it needs
    into the batches. A cache of hidden states is the teacher itself, for every objective and temperature; lists know
    what they list.

    Args:
        folder: where it lies.
        tail: of lists, what the loss shall take for the tokens that are not listed, see ``fused_kd.TopK``; None
            (default): "bucket". Drawn lists have "renormalize", hidden states none.
        name: is in the names of the batches' columns, behind "teacher": "math" makes ``teacher_math_log_probs``,
            ``teacher_math_indices`` and ``teacher_math_log_rest``, or ``teacher_math_hidden``. None (default):
            ``teacher_log_probs`` and so on. Of caches that teach together each needs another name.
        verify: compare every shard with its checksum (default), not only its size. Leave it out where the folder has
            been verified shortly before.

    Attributes:
        keep: "lists", "sampled" or "hidden". dtype: "fp16", "8bit" or "fp32"; of hidden states "bf16", "fp8", "int8",
            "fp16" or "fp32".
        k: entries a token with their own log-probabilities, of drawn lists 0 or more; None without lists. draws: of a
            token, beside these; None where there are none. width: numbers a hidden state; None without.
        vocab_size: tokens of the vocabulary that the probabilities are over; of hidden states the rows of the head.
        tokens: those with entries. bytes_per_token: of the shards.
        mass_mean, mass_min: of lists, the probability that the entries of a token have together; else None.
        error: of hidden states, what storing them changes in some tokens: ``logits``, ``kl``, ``top_1``, ``tokens`` of
            :func:`fused_kd.training.projection.error_of`; else None.
        columns: the names in a batch that :meth:`head` reads.
        fingerprints: SHA-256 of each part in ``PARTS``; None where it is not known. about: names for people.

    Raises:
        ValueError: no cache there, an unfinished one, an index that says what cannot be, a shard or head that is
            missing, truncated, corrupted or of another form (by name), an unknown tail, or one that does not fit.
    """

    def __init__(
        self, folder: str | Path, tail: str | None = None, *, name: str | None = None, verify: bool = True
    ) -> None:
        if tail is not None and tail not in TAILS:
            raise ValueError(f"tail must be one of {', '.join(map(repr, TAILS))}, got {tail!r}")
        if name is not None and not (isinstance(name, str) and re.fullmatch(r"\w+", name)):
            raise ValueError(f"name must be letters, digits and _, or None, got {name!r}")
        self.folder, self.name = Path(folder), name
        index = read_index(self.folder)
        if index is None:
            raise ValueError(f"folder={str(folder)!r} holds no teacher cache: there is no {INDEX}")
        self.keep: str = index["keep"]
        if self.keep == "hidden" and tail is not None:
            raise ValueError(f"tail must be None for the cache in {folder}, which is of hidden states, got {tail!r}")
        if self.keep == "sampled" and tail not in (None, "renormalize"):
            raise ValueError(
                f"tail must be 'renormalize' for the cache in {folder}, whose lists are drawn, got {tail!r}"
            )
        self.tail: str | None = tail or {"lists": "bucket", "hidden": None, "sampled": "renormalize"}[self.keep]
        self._index, self._shards = index, index["shards"]
        self.dtype: str = index["dtype"]
        self.fingerprints: dict[str, str | None] = index["fingerprints"]
        self.about: dict[str, Any] = index["about"]
        self._rows, self._shard_rows = int(index["rows"]), int(index["shard_rows"])
        self._check_files(verify)
        self.tokens = sum(shard["tokens"] for shard in self._shards)
        self.bytes_per_token = sum(shard["bytes"] for shard in self._shards) / max(self.tokens, 1)
        self.k: int | None = index.get("k")
        self.width: int | None = index.get("width")
        self.error: dict[str, float] | None = index.get("error")
        self.draws: int | None = index.get("draws")
        self.mass_mean: float | None = None
        self.mass_min: float | None = None
        self.vocab_size: int = index["head"]["rows"] if self.keep == "hidden" else index["vocab_size"]
        if self.keep == "lists":
            self.mass_mean = sum(shard["mass_sum"] for shard in self._shards) / max(self.tokens, 1)
            self.mass_min = min((shard["mass_min"] for shard in self._shards), default=1.0)
        kinds = ("hidden",) if self.keep == "hidden" else tuple(no_lists(index))
        self.columns = columns_of(kinds, name)
        self._open: dict[int, tuple[Any, np.ndarray]] = {}
        self._head = HeadOnDevices(self._stored_head)

    def _check_files(self, verify: bool) -> None:
        files = [shard["file"] for shard in self._shards]
        count = -(-self._rows // self._shard_rows)
        if len(files) != count or any(file != shard_name(number) for number, file in enumerate(files)):
            raise ValueError(
                f"the teacher cache in {self.folder} is not finished ({len(files)} of {count} shards): "
                "run the command that makes it again"
            )
        if self.keep == "hidden" and (fault := head_fault(self.folder, self._index, checksum=verify)):
            raise ValueError(
                f"the teacher cache in {self.folder} is damaged: {HEAD} {fault}; run the command that made it again, "
                "which makes that file anew"
            )
        for shard in self._shards:
            if fault := shard_fault(self.folder, self._index, shard, checksum=verify):
                raise ValueError(
                    f"the teacher cache in {self.folder} is damaged: {shard['file']} {fault}; run the command that "
                    "made it again, which makes that shard anew"
                )

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> Any:
        """What one row has, for its n positions with a valid next label.

        Of lists a pair: log-probabilities (n, k) float32 and ids (n, k) int64, in the order they were written; entries
        left out are -inf; of a teacher, and of vLLM, the largest come first. Of drawn lists the same with k + draws
        entries, as of :func:`fused_kd.sample_of`. Of hidden states (n, width) bfloat16, float16 or float32. Raises
        ``ValueError`` for what no writer writes: an id outside the vocabulary or twice in a list, a log-probability
        above 0 or NaN, a list without entries or of a probability above 1, a state that is not finite.
        """
        found = self.row(index)
        return found["hidden"] if self.keep == "hidden" else (found["log_probs"], found["indices"])

    def row(self, index: int) -> dict[str, Tensor]:
        """Give what ``cache[index]`` gives by name: ``log_probs``, ``indices`` and, where it is known, ``log_rest``
        (n,) float32; or ``hidden``."""
        if not 0 <= index < self._rows:
            raise IndexError(f"row {index} of a teacher cache of {self._rows} rows")
        shard, row = divmod(index, self._shard_rows)
        if shard not in self._open:
            from safetensors import safe_open

            framework = "pt" if self.keep == "hidden" else "numpy"
            handle = safe_open(self.folder / self._shards[shard]["file"], framework=framework)
            self._open[shard] = handle, np.asarray(handle.get_tensor("offsets"))
        handle, offsets = self._open[shard]
        tokens = slice(int(offsets[row]), int(offsets[row + 1]))
        if tokens.start == tokens.stop:
            return self._nothing()
        names = [name for name in handle.keys() if name != "offsets"]  # noqa: SIM118
        arrays = {name: handle.get_slice(name)[tokens] for name in names}
        found, fault = self._states(arrays) if self.keep == "hidden" else read_lists(arrays, self._index)
        if fault:
            place = f"{self.folder}, row {row} of {self._shards[shard]['file']}"
            raise ValueError(f"row {index} of the teacher cache in {place}: {fault}")
        return found

    def _nothing(self) -> dict[str, Tensor]:
        """What a row without targets has."""
        if self.width is None:
            return no_lists(self._index)
        dtype = torch.bfloat16 if self.dtype in WITH_SCALE else CACHE_DTYPES[self.dtype]
        return {"hidden": torch.empty(0, self.width, dtype=dtype)}

    def _states(self, arrays: dict[str, Tensor]) -> tuple[dict[str, Tensor], str | None]:
        hidden = decode_states(arrays)
        try:
            check_states(hidden)
        except ValueError as error:
            return {}, str(error)
        return {"hidden": hidden}, None

    def head(self, batch: Mapping[str, Tensor], targets: Tensor, device: torch.device) -> LMHead | TopK:
        """The teacher of a batch whose rows are those of :meth:`rows`.

        Args:
            batch: has the ``columns``, each (rows, length, ...), aligned with the student's hidden states.
            targets: not read; what stands where they are False is no teacher's.
            device: of the result.

        Returns:
            Of lists a :class:`fused_kd.TopK` (rows, length, k); of hidden states a :class:`fused_kd.LMHead` on
            (rows, length, width), in the dtype of the stored head, which is read once for each device.

        Raises:
            ValueError: a batch without the columns.
        """
        needed = self.columns[:2]  # with lists of others there may be no log_rest
        if missing := [name for name in needed if name not in batch]:
            raise ValueError(
                f"batch must have {' and '.join(missing)} for the cached teacher {self!r}: the collators of "
                "fused_kd.training (Collator, PackingCollator) put those of cache.rows(...) there"
            )
        given = [batch[name].to(device) for name in self.columns if name in batch]
        if self.tail is not None:
            log_probs, indices, *rest = given
            return TopK(log_probs, indices, tail=self.tail, log_rest=rest[0] if rest else None)
        return self._head.on(given[0])

    def _stored_head(self, device: torch.device) -> LMHead:
        from safetensors.torch import load_file

        about, stored = self._index["head"], load_file(self.folder / HEAD, device=str(device))
        weight, bias = stored["weight"], stored.get("bias")
        return bare_head(weight, bias, logit_scale=about["logit_scale"], softcap=about["softcap"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a worker process maps the files itself

    def __repr__(self) -> str:
        entries = f"k={self.k}" if self.draws is None else f"k={self.k} and {self.draws} draws"
        what = f"{entries}, {self.dtype}, vocab_size={self.vocab_size}, tail={self.tail!r}"
        if self.keep == "hidden":
            projected = self._index["project"] is not None
            width = f"{self.width} of {self._index['from_width']}" if projected else f"{self.width}"
            what = f"hidden states of {width} numbers, {self.dtype}, vocab_size={self.vocab_size}"
            if self.error is not None and self.error["tokens"]:
                what += f", KL to the teacher {self.error['kl']:.2g}"
                what += f", logits off by {self.error['logits']:.2%}" if projected else ""
        name = "" if self.name is None else f", name={self.name!r}"
        return f"TeacherCache({str(self.folder)!r}, {self._rows} rows, {self.tokens} tokens, {what}{name})"

    def check(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        rows: AnyRows,
        template: PromptTemplate | str | None = None,
        teacher: PreTrainedModel | None = None,
        data: str | None = None,
    ) -> CachedRows:
        """Raise unless the cache was made with these.

        Args:
            tokenizer, rows, template: as of :func:`fused_kd.training.cache.write_cache`; a template of None (default)
                is not compared.
            teacher: None (default): any.
            data: what :func:`fused_kd.training.fingerprints.fingerprint_rows` gives for ``rows``, where it is known
                already; None (default): all rows are read for it.

        Returns:
            What :meth:`rows` gives for ``rows``, which are not compared a second time.

        Raises:
            ValueError: names every part in ``PARTS`` that differs; rows of a cache of the same name.
        """
        given = fingerprints_of(tokenizer, rows, template, data)
        self._compare(given if teacher is None else {**given, **fingerprint_teacher(teacher)})
        return self._joined(rows)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise unless the cache was made with this tokenizer; tokens that were added to it since do not count.

        Raises:
            ValueError: another one.
        """
        check_tokenizer(self.fingerprints, tokenizer, self._index["vocab_size"], self._made_otherwise)

    def check_head(self, other: TeacherCache) -> None:
        """Raise unless what ``other`` has for its rows can be read as this cache's, as that of validation rows is.

        Both must be of one teacher and tokenizer and keep the same: hidden states for one head, or as many entries of
        one vocabulary. Their dtypes, rows and seeds may differ.

        Raises:
            ValueError: names what differs.
        """
        parts = [part for part in PARTS if part not in ("data", "template")]
        faults = [
            f"{part} ({PARTS[part]}: {str(own)[:12]} and {str(theirs)[:12]})"
            for part in parts
            if (own := self.fingerprints.get(part)) != (theirs := other.fingerprints.get(part))
        ]
        if faults:
            raise ValueError(f"{self!r} and {other!r} were made from something else: {', '.join(faults)}")
        for name in ("keep", "k", "draws", "vocab_size"):
            own, theirs = getattr(self, name), getattr(other, name)
            if own != theirs:
                what = "keep" if name == "keep" else f"have {name}"
                raise ValueError(f"{other!r} must {what} {own!r}, as {self!r} does, got {theirs!r}")
        if self.keep == "hidden" and self._index["head"]["sha256"] != other._index["head"]["sha256"]:
            raise ValueError(
                f"{other!r} must have the head of {self!r}: write it with like={str(self.folder)!r}, which takes its "
                "projection"
            )

    def rows(self, dataset: AnyRows) -> CachedRows:
        """The rows of ``dataset``, which must be those that the cache was made for, each with its lists or states.

        ``dataset`` may be the rows of another cache, of another name.

        Raises:
            ValueError: other rows, or another order; rows of a cache of the same name.
        """
        self._compare({"data": fingerprint_rows(dataset)})
        return self._joined(dataset)

    def _joined(self, dataset: AnyRows) -> CachedRows:
        names, data = {self.name}, dataset
        while isinstance(data, CachedRows):
            if data.cache.name in names:
                raise ValueError(f"name must be another for each cache, got {data.cache.name!r} twice")
            names.add(data.cache.name)
            data = data.dataset
        return CachedRows(self, dataset)

    def _compare(self, given: Mapping[str, str | None]) -> None:
        check_parts(self.fingerprints, given, self._made_otherwise)

    @property
    def _made_otherwise(self) -> str:
        return f"the teacher cache in {self.folder} was made from something else"
