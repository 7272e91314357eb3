"""What the models of the plane of regimes read: documents for language models, and tokenised rows on disk."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fused_kd.integrations.labels import LABEL_PAD
from fused_kd.training.data import Pair, misalign, parse_direction
from fused_kd.training.prompts import PromptTemplate, Rows, completion_rows, encode_prompts

Pairs = dict[str, list[Pair]]
DOCUMENT = PromptTemplate("document", "{source_language}: {source}\n{target_language}:")


@dataclass(frozen=True)
class Documents:
    """What language models are pre-trained on, from the pairs that students may see."""

    sentences: int = 4  # of one language in a document; a row of the corpus serves one language alone
    parallel: int = 4000  # documents of each direction with a sentence and a translation
    wrong: float = 0.5  # the share of them whose translation is another sentence's
    seed: int = 0


def documents(corpora: Sequence[Pairs], directions: Sequence[str], sentences: int) -> Iterator[list[str]]:
    """For each language, texts of so many sentences; no row of a corpus gives more than one language a sentence."""
    languages = sorted({language for direction in directions for language in parse_direction(direction)})
    for number, language in enumerate(languages):
        found: dict[str, None] = {}
        for corpus in corpora:
            for direction, pairs in corpus.items():
                if language in parse_direction(direction):
                    side = parse_direction(direction).index(language)
                    found |= dict.fromkeys(pair[side] for pair in pairs[number :: len(languages)])
        texts = list(found)
        random.Random(number).shuffle(texts)
        yield ["\n".join(texts[i : i + sentences]) for i in range(0, len(texts), sentences)]


def pretraining_rows(tokenizer: Any, corpora: Sequence[Pairs], how: Documents, max_length: int) -> Rows:
    """Documents of one language, and of a sentence with its translation or another one's: loss on all tokens."""
    directions = list(dict.fromkeys(direction for corpus in corpora for direction in corpus))
    made = []
    for texts in documents(corpora, directions, how.sentences):
        made += [[*ids, tokenizer.eos_token_id] for ids in encode_prompts(tokenizer, texts)]
    for number, corpus in enumerate(corpora):
        for direction, pairs in corpus.items():
            some = random.Random(f"{how.seed}-{number}-{direction}").sample(pairs, min(how.parallel, len(pairs)))
            mixed = misalign(some, how.wrong, how.seed)
            prompts = [DOCUMENT.render(pair.source, direction) for pair in mixed]
            found = completion_rows(tokenizer, prompts, [pair.target for pair in mixed], max_length)
            made += [row["input_ids"] for row in found if row is not None]
    return Rows([{"input_ids": ids[:max_length], "labels": ids[:max_length]} for ids in made])


def write_rows(path: Path, rows: Rows) -> None:
    """The rows, each of which has its loss on all tokens after the first so many."""
    columns = {
        "ids": np.array([token for row in rows.rows for token in row["input_ids"]], np.int32),
        "lengths": np.array([len(row["input_ids"]) for row in rows.rows]),
        "prompts": np.array([sum(label == LABEL_PAD for label in row["labels"]) for row in rows.rows]),
    }
    np.savez(path, **columns)


def read_rows(path: Path) -> Rows:
    """What :func:`write_rows` wrote."""
    with np.load(path) as found:
        ids, ends, prompts = found["ids"].tolist(), found["lengths"].cumsum().tolist(), found["prompts"].tolist()
    rows = []
    for begin, end, prompt in zip([0, *ends[:-1]], ends, prompts, strict=True):
        own = ids[begin:end]
        rows.append({"input_ids": own, "labels": [LABEL_PAD] * prompt + own[prompt:]})
    return Rows(rows)
