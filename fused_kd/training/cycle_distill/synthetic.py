"""A model's translations as training rows, and the lists of exactly the tokens in them.

The rows are made of the generated ids themselves; nothing is decoded and tokenised again. A translation that was cut
at a marker ends with EOS in its row, where the model had gone on: the list that it made there is the marker's and is
left out. That EOS is a hard label, its list has one entry of probability 1.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fused_kd.training.cache.teacher_cache import TeacherCache
from fused_kd.training.cache.writer import write_lists
from fused_kd.training.cycle_distill.filters import RULES, Filters, broken_rule, find_cut
from fused_kd.training.data.pairs import Pair, parse_direction
from fused_kd.training.data.prompts import LABEL_PAD, PairDataset, PromptTemplate
from fused_kd.training.generation import Generation
from fused_kd.training.runs import read_json, read_lines, write_json, write_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Response(NamedTuple):
    """What is kept of a continuation.

    ``ids`` end with EOS. The first ``listed`` are the model's own and have its lists; those after it are hard labels.
    """

    ids: list[int]
    listed: int
    text: str
    whole: bool
    cut: bool


@dataclass
class Selection:
    """The rows that passed, and how many did not.

    Attributes:
        rows: ``input_ids`` (prompt, response, EOS) and ``labels``, -100 on the prompt.
        origins: of each row, the index of its sentence. listed: of each row, how many response tokens have a list.
        texts: of each row, the translation. rejected: index, rule and text of each that was dropped.
        cut: rows that were cut at a marker.
    """

    rows: list[dict[str, list[int]]] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    listed: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    rejected: list[tuple[int, str, str]] = field(default_factory=list)
    cut: int = 0

    def counts(self) -> dict[str, Any]:
        """``generated``, ``kept``, ``cut`` (of the kept) and ``rejected``, a number for each of ``RULES``."""
        by_rule = Counter(rule for _, rule, _ in self.rejected)
        return {
            "generated": len(self.rows) + len(self.rejected),
            "kept": len(self.rows),
            "cut": self.cut,
            "rejected": {rule: by_rule[rule] for rule in RULES},
        }


def trim(generation: Generation, tokenizer: PreTrainedTokenizerBase, markers: Sequence[str]) -> Response:
    """Cut a continuation before the first marker, token by token.

    Where the cut falls into a token (``".\\n"`` may be one), a token for the part before it stands in, as a hard
    label; without such a token that part is lost, and the translation not whole if it had letters.
    """
    ids, eos = generation.ids, tokenizer.eos_token_id
    place = find_cut(generation.text, markers)
    if place is None:
        text = " ".join(generation.text.split())
        return Response(ids, len(ids), text, whole=generation.finished, cut=False)
    wanted = generation.text[:place]

    def prefix(count: int) -> str:
        return str(tokenizer.decode(ids[:count], skip_special_tokens=True))

    kept = bisect_right(range(len(ids) + 1), len(wanted), key=lambda count: len(prefix(count))) - 1
    response, lost = ids[:kept], wanted[len(prefix(kept)) :]
    if lost.strip():
        stand_in = _part_of(ids[kept], response, wanted, tokenizer)
        response = response if stand_in is None else [*response, stand_in]
        lost = lost if stand_in is None else ""
    text = " ".join(wanted[: len(wanted) - len(lost)].split())
    return Response([*response, int(eos)], kept, text, whole=not any(map(str.isalnum, lost)), cut=True)


def _part_of(token: int, before: list[int], wanted: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token whose text is the beginning of ``token``'s and makes ``before`` read ``wanted``; None without one."""
    name, vocab = str(tokenizer.convert_ids_to_tokens(token)), tokenizer.get_vocab()
    for length in range(len(name) - 1, 0, -1):
        found = vocab.get(name[:length])
        if found is not None and str(tokenizer.decode([*before, found], skip_special_tokens=True)) == wanted:
            return int(found)
    return None


def select(
    generations: Sequence[Generation],
    prompts: Sequence[Sequence[int]],
    sentences: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    direction: str,
    filters: Filters,
    max_length: int,
) -> Selection:
    """Cut and filter the continuations of the sentences' prompts. A row above ``max_length`` counts as unfinished."""
    made, identify, languages = Selection(), filters.identify, parse_direction(direction)
    for index, (generation, prompt, pair) in enumerate(zip(generations, prompts, sentences, strict=True)):
        response = trim(generation, tokenizer, filters.markers)
        whole = response.whole and len(prompt) + len(response.ids) <= max_length
        rule = broken_rule(
            pair.source, response.text, whole=whole, languages=languages, filters=filters, identify=identify
        )
        if rule is not None:
            made.rejected.append((index, rule, response.text))
            continue
        labels = [LABEL_PAD] * len(prompt) + response.ids
        made.rows.append({"input_ids": [*prompt, *response.ids], "labels": labels})
        made.origins.append(index)
        made.listed.append(response.listed)
        made.texts.append(response.text)
        made.cut += response.cut
    return made


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """``rows.jsonl``: each row's ids, how many of them are the prompt's, and whatever else a row has."""
    lines = []
    for row in rows:
        others = {key: value for key, value in row.items() if key not in ("input_ids", "labels")}
        prompt = sum(label == LABEL_PAD for label in row["labels"])
        lines.append(json.dumps({**others, "prompt": prompt, "ids": row["input_ids"]}, ensure_ascii=False))
    write_lines(folder / "rows.jsonl", lines)


def read_rows(folder: Path) -> PairDataset:
    """What :func:`write_rows` wrote, ids and labels."""
    rows = []
    for line in read_lines(folder / "rows.jsonl"):
        row = json.loads(line)
        ids, prompt = row["ids"], row["prompt"]
        rows.append({"input_ids": ids, "labels": [LABEL_PAD] * prompt + ids[prompt:]})
    return PairDataset(rows)


def write_selection(
    folder: Path, made: Selection, sentences: Sequence[Pair], extra: Sequence[dict[str, list[int]]] = ()
) -> None:
    """The kept rows, then ``extra`` ones; ``counts.json``; and ``rejected.jsonl`` with the rule that each broke."""
    about = [
        {**row, "index": index, "source": sentences[index].source, "text": text}
        for row, index, text in zip(made.rows, made.origins, made.texts, strict=True)
    ]
    write_rows(folder, [*about, *extra])
    rejected = (
        {"index": index, "rule": rule, "source": sentences[index].source, "text": text}
        for index, rule, text in made.rejected
    )
    write_lines(folder / "rejected.jsonl", (json.dumps(row, ensure_ascii=False) for row in rejected))
    write_json(folder / "counts.json", {**made.counts(), "parallel": len(extra)})


def read_counts(folder: Path) -> dict[str, Any]:
    """``counts.json`` of a folder that has one, else {}."""
    return read_json(folder / "counts.json") or {}


def hard_list(token: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(k,) log-probabilities and ids of a list that is sure of one token: its KL is the cross-entropy."""
    log_probs, indices = np.full(k, -np.inf, dtype=np.float32), np.zeros(k, dtype=np.int64)
    log_probs[0], indices[0] = 0, token
    return log_probs, indices


def lists_of_row(
    response: Sequence[int], listed: int, log_probs: np.ndarray, indices: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(n, k) lists of a response's n tokens: the first ``listed`` of the model's, hard ones after them."""
    k = log_probs.shape[1]
    hard = [hard_list(token, k) for token in response[listed:]]
    values = np.concatenate([log_probs[:listed], *(h[0][None] for h in hard)])
    return values, np.concatenate([indices[:listed], *(h[1][None] for h in hard)])


def write_teacher(
    folder: Path,
    made: Selection,
    generations: Sequence[Generation],
    rows: PairDataset,
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    *,
    k: int,
    dtype: str,
    made_from: Mapping[str, str | None],
    shard_rows: int = 1024,
) -> TeacherCache:
    """The lists of ``rows`` (those of ``made``, then any with labels alone) as a cached teacher.

    The list of response token t was made where the model had read the tokens before it; the cache gives it to
    position ``response_start - 1 + t``, whose next token it is.
    """

    def source(start: int, stop: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for number in range(start, stop):
            response = [label for label in rows[number]["labels"] if label != LABEL_PAD]
            if number < len(made.rows):
                generation: Any = generations[made.origins[number]]
                own = made.listed[number], generation.log_probs, generation.indices
            else:
                own = 0, np.empty((0, k), dtype=np.float32), np.empty((0, k), dtype=np.int64)
            yield number, *lists_of_row(response, *own)

    return write_lists(
        folder, source, tokenizer, rows, k=k, template=template, dtype=dtype, shard_rows=shard_rows,
        made_from=made_from, about={"teacher": "its own translations"}, progress=False,
    )  # fmt: skip
