"""A classification task from parallel image captions: who is in it, and whether they move. Labels by rule.

A caption has a label where its English words name people of one sex and hold or move of one kind; the label is the
pair. Neither a word of people nor one of posture decides it alone, and classes are made equal in number for training,
so that the best single word gets no further than about half.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fused_kd.training.data.sources import file_rows, find_file
from fused_kd.training.runs import write_json, write_lines

_WHO = {
    "male": "man men boy boys guy guys male males gentleman gentlemen father son dad",
    "female": "woman women girl girls lady ladies female females mother daughter mom",
}
_WHAT = {
    "still": "sit sits sitting seated stand stands standing lying lies laying lean leans leaning sleep sleeps sleeping "
    "pose poses posing wait waits waiting kneels kneeling",
    "moving": "walk walks walking run runs running jump jumps jumping ride rides riding climb climbs climbing dance "
    "dances dancing skateboarding swim swims swimming skiing surfing throw throws throwing kick kicks kicking swing "
    "swings swinging",
}
CLASSES = tuple(f"{who}/{what}" for who in _WHO for what in _WHAT)
_WORDS = [{name: frozenset(words.split()) for name, words in table.items()} for table in (_WHO, _WHAT)]


def label_of(caption: str) -> str | None:
    """One of ``CLASSES``; None for an English caption that names neither, or both, of the people or of the postures."""
    words = set(re.findall(r"[a-z]+", caption.lower()))
    found = [[name for name, known in table.items() if words & known] for table in _WORDS]
    return "/".join(names[0] for names in found) if all(len(names) == 1 for names in found) else None


def best_single_word(texts: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """The word that decides most of the labels alone: a class for captions with it, another for those without."""
    total = Counter(labels)
    having: dict[str, Counter[str]] = {}
    for text, label in zip(texts, labels, strict=True):
        for word in set(re.findall(r"[a-z]+", text.lower())):
            having.setdefault(word, Counter())[label] += 1
    right = {
        word: max(with_it.values()) + max((total - with_it).values(), default=0) for word, with_it in having.items()
    }
    word = max(sorted(right), key=lambda word: right[word])
    return {"word": word, "accuracy": right[word] / len(labels)}


def write_task(
    folder: Path,
    data: str | Path,
    languages: Sequence[str],
    *,
    valid: str = "valid",
    tests: Sequence[str] = ("test_2016_flickr",),
    limit: int | None = None,
    retrieval: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """A task's folder from a folder of captions, JSON rows with a text a language.

    Args:
        folder: gets ``train.jsonl``, ``valid.jsonl`` (English), ``test.LANGUAGE.jsonl`` (the same captions in each
            language, English too): rows ``{"text", "label"}``; ``text.jsonl`` (``{"text"}``: every English caption for
            training), ``retrieval.jsonl`` (parallel rows) and ``task.json`` (the counts, and the best single word).
        data: folder with ``train`` and the files named by ``valid`` and ``tests``, whose items are taken together.
        languages: those to transfer to.
        limit: captions of ``train``.
        retrieval: rows for retrieval, from the first of the tests.
        seed: which captions of a class are kept, where it has more than the smallest.

    Raises:
        ValueError: a file or a language that is missing, a class without captions.
    """
    everyone = ["en", *languages]
    train = [row["en"] for row in _captions(data, "train", ["en"])][:limit]
    labelled = [(text, label) for text in train if (label := label_of(text)) is not None]
    by_class = {name: [text for text, label in labelled if label == name] for name in CLASSES}
    smallest = min(map(len, by_class.values()))
    if not smallest:
        raise ValueError(f"data={str(data)!r}: no caption of {', '.join(n for n, t in by_class.items() if not t)}")
    rng = random.Random(seed)
    chosen = [(text, name) for name, texts in by_class.items() for text in rng.sample(texts, smallest)]
    rng.shuffle(chosen)
    test = [row for name in tests for row in _captions(data, name, everyone)]
    held = [row for row in test if label_of(row["en"]) is not None]
    if not held:
        raise ValueError(f"data={str(data)!r}: no caption of {', '.join(tests)} has a label")
    dev = [row["en"] for row in _captions(data, valid, ["en"])]
    _write(folder / "text.jsonl", ({"text": text} for text in train))
    _write(folder / "train.jsonl", ({"text": text, "label": label} for text, label in chosen))
    _write(folder / "valid.jsonl", ({"text": text, "label": label} for text in dev if (label := label_of(text))))
    for language in everyone:
        items = ({"text": row[language], "label": label_of(row["en"])} for row in held)
        _write(folder / f"test.{language}.jsonl", items)
    pairs = _captions(data, tests[0], everyone)[:retrieval]
    _write(folder / "retrieval.jsonl", ({language: row[language] for language in everyone} for row in pairs))
    about = {
        "classes": list(CLASSES),
        "train": dict.fromkeys(CLASSES, smallest),
        "train_unbalanced": {name: len(texts) for name, texts in by_class.items()},
        "test": dict(Counter(label_of(row["en"]) for row in held)),
        "best_single_word": best_single_word(*zip(*chosen, strict=True)),
    }
    write_json(folder / "task.json", about)
    return about


def _captions(data: str | Path, split: str, languages: Sequence[str]) -> list[dict[str, str]]:
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise ValueError(f"data={str(data)!r}: no such folder; give one with parallel captions as data=PATH")
    rows = []
    for place, value in file_rows(find_file(folder, split), None):
        missing = [name for name in languages if not isinstance(value, dict) or not value.get(name)]
        if missing:
            raise ValueError(f"{place}: expected a text in each of {', '.join(languages)}, none in {missing[0]}")
        rows.append({name: str(value[name]) for name in languages})
    return rows


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))
