"""A cache's index and shards that no writer wrote: an error at opening, whatever they say."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from safetensors.numpy import load_file, save_file

from fused_kd.training.teacher_cache import TeacherCache

from .caching import write


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write(folder)
    return folder


HUGE = {"file": "shards/00000.safetensors", "rows": 4, "tokens": 13, "bytes": 1, "sha256": "", "mass_sum": 10**400}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_rows": 0}, "shard_rows must be an int of at least 1, got 0"),
        ({"rows": 10**12}, r"00002\.safetensors must have rows=4, got 2"),
        ({"rows": 10**12, "shards": []}, r"is not finished \(0 of 250000000000 shards\)"),
        ({"rows": 10**30}, "rows must be an int of at least 1, got 1000"),
        ({"rows": 9}, r"00002\.safetensors must have rows=1, got 2"),
        ({"rows": True}, "rows must be an int of at least 1, got True"),
        ({"k": 4}, r"00000\.safetensors has the arrays .*\[13, 5\].*, expected .*\[13, 4\]"),
        ({"k": 60}, "k=60 must be at most vocab_size=53"),
        ({"vocab_size": 10**6}, "has the arrays .*'U16'.*, expected .*'I32'"),
        ({"dtype": "8bit"}, "has the arrays .*log_probs.*, expected .*codes"),
        ({"dtype": ["fp16"]}, "dtype must be one of 'fp16', '8bit', 'fp32', got"),
        ({"shards": {}}, "shards must be a list"),
        ({"shards": [3]}, "shards must be objects, got 3"),
        ({"shards": [{"file": "../../../etc/passwd"}]}, r"shards must be named shards/00000\.safetensors and so on"),
        ({"fingerprints": None}, "fingerprints must be a dict, got None"),
        ({"fingerprints": {"data": 3}}, "fingerprints must be texts or null, got 3 for 'data'"),
        ({"shards": [HUGE, 1, 2]}, r"mass_sum must be a number in \[0, 13\.13\], got 1000"),
        ({"shards": [HUGE | {"mass_sum": 13.2}]}, r"mass_sum must be a number in \[0, 13\.13\], got 13\.2"),
        (
            {"shards": [HUGE | {"mass_sum": 1, "mass_min": 1.02}]},
            r"mass_min must be a number in \[0, 1\.01\], got 1\.02",
        ),
        *(({name: None}, f"{name} must be") for name in ("rows", "shard_rows", "k", "vocab_size", "dtype", "about")),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_index_that_cannot_be(finished: Path, tmp_path: Path, change: dict, message: str) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "cache"))
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | change))
    for verify in (True, False):
        with pytest.raises(ValueError, match=message):
            TeacherCache(folder, verify=verify)


@pytest.mark.parametrize("entry", ['"fingerprints": {', '"rows": 10'])
def test_an_entry_twice(finished: Path, tmp_path: Path, entry: str) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "cache"))
    text = (folder / "index.json").read_text()
    more = '"fingerprints": {}, ' if entry.endswith("{") else '"rows": 8, '
    (folder / "index.json").write_text(text.replace(entry, more + entry, 1))
    with pytest.raises(ValueError, match=rf"index\.json is damaged: it has '{entry.split(chr(34))[1]}' twice"):
        TeacherCache(folder)


def test_a_header_of_many_arrays_is_not_shown_whole(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "cache"))
    header = json.dumps({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(1000)}).encode()
    header += b" " * (-len(header) % 8)
    content = len(header).to_bytes(8, "little") + header
    (folder / "shards" / "00002.safetensors").write_bytes(content)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][2] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="has the arrays") as caught:
        TeacherCache(folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["rows", "tokens", "bytes", "sha256", "mass_sum", "mass_min"])
def test_an_index_without_a_shard_s_entry(finished: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "cache"))
    index = json.loads((folder / "index.json").read_text())
    del index["shards"][1][name]
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"index\.json is damaged: shards/00001\.safetensors.*{name}"):
        TeacherCache(folder)


def replace(folder: Path, number: int, name: str, change) -> None:
    """Another array in a shard, with a size and a checksum that fit it."""
    file, index = folder / "shards" / f"{number:05d}.safetensors", json.loads((folder / "index.json").read_text())
    arrays = load_file(file)
    arrays[name] = change(arrays.get(name, arrays["offsets"]))
    save_file(arrays, file)
    index["shards"][number] |= {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("offsets", lambda a: a[::-1].copy(), "offsets that do not rise from 0"),
        ("offsets", lambda a: a + 1, "offsets that do not rise from 0"),
        ("offsets", lambda a: a.astype("int32"), "has the arrays .*'I32'"),
        ("indices", lambda a: a[:-1].copy(), "has the arrays"),
        ("indices", lambda a: a + 50, "row 9 of the teacher cache in .*: expected ids below 53"),
        ("log_probs", lambda a: a * float("nan"), "row 9 .*log-probabilities of at most 0, got .* nan"),
        ("log_probs", lambda a: a + 9, "row 9 .*log-probabilities of at most 0"),
        ("more", lambda a: a, "has the arrays .*more"),
        ("log_probs", lambda a: a * 0 - 0.1, r"row 9 .*, row 1 of shards/00002\.safetensors: .*at most 1, got 4\.5"),
        ("log_probs", lambda a: a - np.float16(np.inf), r"row 9 .*add up to more than 0 and at most 1, got 0\.0"),
        ("indices", lambda a: a * 0 + 7, "row 9 .*: expected the ids of a token once each, got 7 twice"),
    ],
)
def test_a_shard_that_cannot_be(finished: Path, tmp_path: Path, name: str, change, message: str) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "cache"))
    replace(folder, 2, name, change)
    with pytest.raises(ValueError, match=message):
        TeacherCache(folder)[9]


def test_offsets_whose_differences_wrap(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "cache"))
    replace(folder, 0, "offsets", lambda a: np.array([0, 2**62, -(2**63), -1, a[-1]]))
    with pytest.raises(ValueError, match=r"shards/00000\.safetensors has offsets that do not rise from 0"):
        TeacherCache(folder)


NASTY = [None, True, -1, 0, 1.5, 10**30, float("inf"), "", "\ud800", "../x", [], [None], {}, {"k": 1}]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def test_any_entry_gives_an_error_or_the_right_lists(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "cache"))
    text, whole = (folder / "index.json").read_text(), TeacherCache(finished)
    refused = 0
    for path, value in product(places(json.loads(text)), NASTY):
        index = entry = json.loads(text)
        for key in path[:-1]:
            entry = entry[key]
        entry[path[-1]] = value
        (folder / "index.json").write_text(json.dumps(index))
        try:
            cache = TeacherCache(folder, verify=False)
        except ValueError as error:
            refused += 1
            assert str(folder) in str(error) and len(str(error)) < 1000
            continue
        assert (cache.k, cache.vocab_size, len(cache), cache.tokens) == (5, 53, 10, whole.tokens), (path, value)
        assert all(torch.equal(cache[row][1], whole[row][1]) for row in range(10))
    assert refused > 300
