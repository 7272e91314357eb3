"""Loading parallel text and instructions: files, directories, directions, bad rows, the hub path, the toy corpus."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from itertools import chain
from pathlib import Path

import pytest

from fused_kd.training.data import (
    Instruction,
    Pair,
    language_name,
    load_directions,
    load_instructions,
    load_pairs,
    misalign,
    parse_direction,
    toy_corpus,
)
from fused_kd.training.reading import find_file

ROWS = [{"en": f"Line {i}.", "de": f"Zeile {i}."} for i in range(30)]
PAIRS = [Pair(row["en"], row["de"]) for row in ROWS]
TURNED = [Pair(b, a) for a, b in PAIRS]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def lines(rows: list) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("form", ["lines", "array", "pretty", "arrays"])
def test_every_form_gives_the_same_pairs(tmp_path: Path, nested: bool, form: str) -> None:
    rows = [{"translation": row} for row in ROWS] if nested else ROWS
    text = {
        "lines": lines(rows),
        "array": json.dumps(rows),
        "pretty": "\n" + json.dumps(rows, indent=2),
        "arrays": lines([rows[:9], rows[9:]]),
    }[form]
    path = write(tmp_path / ("train.json.gz" if nested else "train.jsonl"), text)
    assert load_pairs(str(path), "train", "en-de") == PAIRS
    assert load_pairs(str(tmp_path), "train", "de-en", limit=4) == TURNED[:4]


def test_white_space_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    row = {"de": " Über\u2028 alles\n", "en": "A\tb"}
    path = write(tmp_path / "train.jsonl", "\ufeff\n\n" + json.dumps(row, ensure_ascii=False) + "\n\n")
    assert load_pairs(str(path), "train", "de-en") == [Pair("Über alles", "A b")]
    write(tmp_path / "dev.json", "\n\n  [ ]\n")
    with pytest.raises(ValueError, match="no usable rows"):
        load_pairs(str(tmp_path), "valid", "de-en")
    with pytest.raises(ValueError, match="limit must be an int of at least 1, got 0"):
        load_pairs(str(path), "train", "de-en", limit=0)


GOOD_TASK = {"instruction": "Translate {this}.", "input": "A dog", "output": "Ein Hund"}
BAD = {
    "pairs": [
        (b'{"en": "x"}', "no text for the language 'de', got the columns en"),
        (b'{"en": "x", "de": "  "}', "the text for the language 'de' is empty"),
        (b'{"en": "x", "de": "y"', "not JSON"),
        (b'["x"]', "expected an object"),
        (b'{"translation": {"en": "x"}}', "no text for the language 'de', got the columns en"),
        (b'{"en": ' + b"[" * 100_000, "not JSON: nested too deeply"),
        (b'{"en": "\xff", "de": "b"}', """not UTF-8: byte 0xff after '{"en": "'"""),
        (rb'{"en": "\ud83d", "de": "b"}', "the text for the language 'en' is a lone surrogate 0xd83d"),
    ],
    "tasks": [
        (b'{"instruction": "x"}', "no text for 'output', got the columns instruction"),
        (b'{"instruction": "x", "input": 3, "output": "y"}', "no text for 'input'"),
        (b'{"instruction": " ", "output": "y"}', "the text for 'instruction' is empty"),
        (b'["x"]', "expected an object with instruction, input and output"),
    ],
}


@pytest.mark.parametrize(
    ("kind", "bad", "message"), [(kind, *row) for kind in BAD for row in BAD[kind]], ids=lambda value: str(value)[:20]
)
def test_bad_rows_name_file_and_line_or_are_skipped(tmp_path: Path, kind: str, bad: bytes, message: str) -> None:
    path = tmp_path / "train.jsonl"

    def load(**options: bool) -> list:
        if kind == "pairs":
            return load_pairs(str(path), "train", "en-de", **options)
        return load_instructions(str(path), "train", **options)

    good = json.dumps(ROWS[0] if kind == "pairs" else GOOD_TASK).encode()
    path.write_bytes(good + b"\n\n")
    expected = load()
    path.write_bytes(good + b"\n\n" + bad + b"\n" + good + b"\n")
    with pytest.raises(ValueError, match=rf"train\.jsonl, line 3(, row 1)?: {message}"):
        load()
    with pytest.warns(UserWarning, match="skipped 1 bad rows of 3.*line 3"):
        assert load(skip_bad=True) == expected * 2
    path.write_bytes(b"\n[\n" + good + b",\n\n" + bad + b"]")
    if "not JSON" in message:  # the rows after the break cannot be found
        with pytest.raises(ValueError, match=r"train\.jsonl, array from line 2: not JSON"):
            load(skip_bad=True)
        return
    with pytest.raises(ValueError, match=r"line 2, row 2: "):
        load()
    with pytest.warns(UserWarning, match=r"skipped 1 bad rows of 2; the first: .*line 2, row 2: "):
        assert load(skip_bad=True) == expected


def test_a_broken_array_and_one_with_more_after_it(tmp_path: Path) -> None:
    """Nothing of a file is taken for the whole."""
    row, path = '{"en": "a", "de": "b"}', tmp_path / "train.json"
    for text, line in ((f"[\n{row}\n{{}}]", 3), (f"[{row},\n", 2), ("[\n{'a'}]", 2), (f"[\n{row}]\n[{row}]", 3)):
        write(path, text)
        with pytest.raises(ValueError, match=f"train.json, array from line 1: not JSON: .* line {line} "):
            load_pairs(str(path), "train", "en-de", skip_bad=True)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl.gz", lines(ROWS))
    whole = path.read_bytes()
    for broken in (whole[:-12], b"not gzip", whole[:40] + bytes(20) + whole[60:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"train\.jsonl\.gz cannot be read"):
            load_pairs(str(path), "train", "en-de")


def test_directions_and_language_names(tmp_path: Path) -> None:
    assert parse_direction("zh_cn-en") == ("zh_cn", "en")
    assert [language_name(code) for code in ("de", "zh_cn", "xx")] == ["German", "Chinese", "xx"]
    for direction in ("en", "en-en", "english-german", "en_de", "", "en-de-fr"):
        with pytest.raises(ValueError, match="direction="):
            load_pairs("builtin", "train", direction)
    write(tmp_path / "train.jsonl", lines(ROWS))
    made = load_directions(str(tmp_path), "train", ["de-en", "en-de"], limit=5)
    assert list(made.items()) == [("de-en", TURNED[:5]), ("en-de", PAIRS[:5])]
    for directions in ([], ["en-de", "en-de"]):
        with pytest.raises(ValueError, match="directions="):
            load_directions(str(tmp_path), "train", directions)


DIRECTORIES: dict[str, list[tuple[str, str, str]]] = {
    "train.jsonl.gz val.jsonl test_2018.jsonl test_2016.jsonl.gz notes.txt train_log.js": [
        ("train", "en-de", "train.jsonl.gz"),
        ("valid", "en-de", "val.jsonl"),
        ("val", "en-de", "val.jsonl"),
        ("test", "en-de", "test_2016.jsonl.gz"),
        ("test_2018", "en-de", "test_2018.jsonl"),
        ("tets", "en-de", r"split='tets', direction='en-de': no file fits .*test_2018.jsonl"),
    ],
    "dev.jsonl val.jsonl": [("valid", "en-de", r"ambiguous in .*\(dev\.jsonl, val\.jsonl\)")],
    "train.cs-en.jsonl train.de-en.jsonl test.de-en.jsonl": [
        ("train", "en-de", "train.de-en.jsonl"),
        ("test", "de-en", "test.de-en.jsonl"),
        ("test", "en-de", r"no file fits .*test\.de-en\.jsonl.*split may be a file's stem"),
        ("test.de-en", "en-de", "test.de-en.jsonl"),
        ("train", "en-fr", "no file fits"),
    ],
    "train.de-en.jsonl train.en-de.jsonl test.de-en.jsonl test.en-de.jsonl": [
        ("train", "en-de", "train.en-de.jsonl"),
        ("test", "en-de", "test.en-de.jsonl"),
    ],
    "train.en train.de.gz test.de .en .de": [
        ("train", "de-en", "train"),
        ("test", "de-en", r"no file fits .*test\.de.* a file of each language"),
    ],
}


@pytest.mark.parametrize(("names", "wanted"), DIRECTORIES.items(), ids=lambda value: str(value)[:20])
def test_directory_finds_the_obvious_file(tmp_path: Path, names: str, wanted: list[tuple[str, str, str]]) -> None:
    for name in names.split():
        write(tmp_path / name, "")
    for split, direction, expected in wanted:
        if " " not in expected:
            assert find_file(tmp_path, split, parse_direction(direction)).name == expected
        else:
            with pytest.raises(ValueError, match=expected):
                find_file(tmp_path, split, parse_direction(direction))


def test_files_with_and_without_a_split_name(tmp_path: Path) -> None:
    path = str(write(tmp_path / "train.jsonl", lines(ROWS)))
    with pytest.raises(ValueError, match="holds the train split"):
        load_pairs(path, "test", "en-de")
    assert load_pairs(path, "all", "en-de") == PAIRS
    rows = [{"en": f"Line {i}.", "de": f"Zeile {i}."} for i in range(2_000)]
    path = str(write(tmp_path / "corpus.jsonl", lines(rows + rows[:100])))
    for language in ("en", "de"):
        write(tmp_path / f"text.{language}", "".join(row[language] + "\n" for row in rows))
    parts = {split: load_pairs(path, split, "en-de") for split in ("train", "valid", "test")}
    assert sum(len(part) for part in parts.values()) == 2_100
    assert not set(parts["train"]) & set(parts["valid"]) and not set(parts["train"]) & set(parts["test"])
    assert all(60 < len(parts[split]) < 160 for split in ("valid", "test"))
    assert {Pair(b, a) for a, b in load_pairs(path, "test", "de-en")} == set(parts["test"])
    assert set(load_pairs(str(tmp_path / "text"), "test", "en-de")) == set(parts["test"]), "text is split as JSON is"
    with pytest.raises(ValueError, match="train, valid, test or all"):
        load_pairs(path, "tset", "en-de")


@pytest.mark.parametrize(
    ("english", "german"), [("train.en.gz", "train.de"), ("train.de-en.en.gz", "train.de-en.de.gz")]
)
def test_text_by_directory_and_by_prefix(tmp_path: Path, english: str, german: str) -> None:
    write(tmp_path / english, "".join(row["en"] + "\n" for row in ROWS))
    write(tmp_path / german, "".join(row["de"] + "\n" for row in ROWS))
    prefix = tmp_path / english.removesuffix(".gz").removesuffix(".en")
    for source in (tmp_path, prefix):
        assert load_pairs(str(source), "train", "en-de") == PAIRS
        assert load_pairs(str(source), "train", "de-en") == TURNED
    with pytest.raises(ValueError, match="holds the train split"):
        load_pairs(str(prefix), "valid", "en-de")


def test_text_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    (tmp_path / "train.en").write_bytes("\ufeffone\ntwo\r\nth\rree\u2028!".encode())
    (tmp_path / "train.de").write_bytes(b"eins\nzwei\ndrei\n")
    expected = [Pair("one", "eins"), Pair("two", "zwei"), Pair("th ree !", "drei")]
    assert load_pairs(str(tmp_path), "train", "en-de") == expected


def test_bad_lines_of_text_name_file_and_line_or_are_skipped(tmp_path: Path) -> None:
    for english, german, message in (
        (b"x", b" \t", "'de' is empty"),
        (b"", b"y", "'en' is empty"),
        (b"x", "ü".encode("latin-1"), "'de' is not UTF-8: byte 0xfc"),
    ):
        (tmp_path / "train.en").write_bytes(b"a\n" + english + b"\nb\n")
        (tmp_path / "train.de").write_bytes(b"eins\n" + german + b"\nzwei\n")
        with pytest.raises(ValueError, match=rf"train, line 2: the text for the language {message}"):
            load_pairs(str(tmp_path / "train"), "train", "en-de")
        with pytest.warns(UserWarning, match=r"skipped 1 bad rows of 3.*train, line 2"):
            pairs = load_pairs(str(tmp_path), "train", "en-de", skip_bad=True)
        assert pairs == [Pair("a", "eins"), Pair("b", "zwei")]
    write(tmp_path / "train.en", "a\nb\nc\nd\n")
    for direction in ("en-de", "de-en"):  # a missing line may be anywhere
        with pytest.raises(ValueError, match=r"train\.en, line 4: .*train\.de has no such line.*got 4 and 3"):
            load_pairs(str(tmp_path), "train", direction, limit=1, skip_bad=True)
    (tmp_path / "train.de").unlink()
    with pytest.raises(ValueError, match=r"train': there is no train\.de or train\.de\.gz"):
        load_pairs(str(tmp_path / "train"), "train", "en-de")
    with pytest.raises(ValueError, match="of parallel text the path without the language"):
        load_pairs(str(tmp_path / "train.en"), "train", "en-de")


def test_missing_paths_are_not_taken_for_hub_names(tmp_path: Path) -> None:
    for source in (str(tmp_path / "none"), "./none", "none/train.jsonl", "~/none-at-all"):
        with pytest.raises(ValueError, match="no such file or directory"):
            load_pairs(source, "train", "en-de")


def test_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` itself on a local copy of a repository, under a name that is no path."""
    datasets = pytest.importorskip("datasets")
    write(tmp_path / "repo" / "train.jsonl", lines([{"translation": row} for row in ROWS]))
    write(tmp_path / "repo" / "validation.jsonl", lines([{"translation": row} for row in ROWS[:2]]))
    names_of, load = datasets.get_dataset_split_names, datasets.load_dataset

    def here(function):
        return lambda name, config, **options: function(str(tmp_path / "repo"), **options)

    monkeypatch.setattr(datasets, "get_dataset_split_names", here(names_of))
    monkeypatch.setattr(datasets, "load_dataset", here(load))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert load_pairs("owner/pairs:de-en", "train", "en-de") == PAIRS
    assert load_pairs("owner/pairs", "valid", "de-en") == TURNED[:2]
    with pytest.raises(ValueError, match=r"split='test': owner/pairs has train, validation"):
        load_pairs("owner/pairs", "test", "en-de")

    def unreachable(*_: object) -> list[str]:
        raise ConnectionError("cannot reach the hub")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    with pytest.raises(ValueError, match=r"neither 'builtin' nor a file .*cannot reach the hub"):
        load_pairs("nobody/nothing", "train", "en-de")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"fused_kd\[train\]"):
        load_pairs("nobody/nothing", "train", "en-de")


TOY = {"train": "bc15841d1aec", "valid": "9f22d2edc7c2", "test": "064e27292ffe"}


def test_the_toy_corpus_is_what_it_was() -> None:
    """The rows that results and docs were made with."""
    digests = {}
    for split, count in (("train", 20_000), ("valid", 500), ("test", 500)):
        rows = toy_corpus(split)
        assert len(rows) == len({r["en"] for r in rows}) == len({r["de"] for r in rows}) == count
        digests[split] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
    assert digests == TOY
    pairs = load_pairs("builtin", "valid", "en-de")
    assert load_pairs("builtin", "dev", "de-en", limit=3) == [Pair(b, a) for a, b in pairs[:3]]
    for split, direction, message in (
        ("train", "en-fr", "'en-de' and 'de-en' only"),
        ("tests", "en-de", "split='tests'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_pairs("builtin", split, direction)


def test_misalign() -> None:
    pairs = [Pair(f"s{i}", f"t{i}") for i in range(100)]
    mixed = misalign(pairs, 0.3, seed=4)
    assert [pair.source for pair in mixed] == [pair.source for pair in pairs]
    assert sorted(pair.target for pair in mixed) == sorted(pair.target for pair in pairs)
    assert sum(new != old for new, old in zip(mixed, pairs, strict=True)) == 30
    assert misalign(pairs, 0.3, seed=4) == mixed != misalign(pairs, 0.3, seed=5)
    assert misalign(pairs, 0.0) == pairs == misalign(pairs, 0.01)
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], got 1.2"):
        misalign(pairs, 1.2)


@pytest.mark.parametrize("missing", [{"input": ""}, {"input": None}, {"input": " \n"}, {}])
def test_instructions_are_read(tmp_path: Path, missing: dict) -> None:
    rows = [{"instruction": " Name two\ncolours. ", "output": "Red,\nblue.\n", **missing}, GOOD_TASK]
    path = write(tmp_path / "train.json", json.dumps(rows, indent=1) if missing else lines(rows))
    first = Instruction("Name two\ncolours.", "", "Red,\nblue.")
    assert load_instructions(str(path), "train") == [first, Instruction(**GOOD_TASK)]
    assert load_instructions(str(tmp_path), "train", limit=1) == [first]
    with pytest.raises(ValueError, match="no instructions"):
        load_instructions("builtin", "train")


def test_a_file_of_instructions_is_divided(tmp_path: Path) -> None:
    rows = [{"instruction": f"Count to {i}.", "input": "", "output": str(i)} for i in range(1_000)]
    # the same task with another answer must not be on both sides
    rows += [{**row, "output": "more"} for row in rows]
    path = str(write(tmp_path / "alpaca_data.json", json.dumps(rows)))
    parts = {split: load_instructions(path, split) for split in ("train", "valid", "test")}
    assert sum(map(len, parts.values())) == 2_000 and all(60 < len(parts[split]) < 160 for split in ("valid", "test"))
    tasks = [{row.instruction for row in part} for part in parts.values()]
    assert not tasks[0] & tasks[1] and not tasks[0] & tasks[2] and not tasks[1] & tasks[2]
    assert sorted(load_instructions(path, "all")) == sorted(chain(*parts.values()))


@pytest.mark.parametrize(
    ("source", "split", "direction", "count", "first"),
    [
        ("multi30k", "train", "en-de", 29_000, "Two young, White males are outside near many bushes."),
        ("multi30k", "test", "en-de", 1_000, "A man in an orange hat starring at something."),
        ("alma", "train", "en-de", 14_211, "28-Year-Old Chef Found Dead at San Francisco Mall"),
        ("alma", "test", "de-en", 1_984, "Die Ware hat unter 20 Euro gekostet."),
        ("alma", "test", "cs-en", 1_448, "Blíží se velký"),
    ],
)
def test_real_data(shared_data: Path, source: str, split: str, direction: str, count: int, first: str) -> None:
    pairs = load_pairs(str(shared_data / source), split, direction)
    assert len(pairs) == count and pairs[0].source.startswith(first)
