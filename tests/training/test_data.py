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


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def lines(rows: list) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("form", ["lines", "array", "pretty"])
def test_every_form_gives_the_same_pairs(tmp_path: Path, nested: bool, form: str) -> None:
    rows = [{"translation": row} for row in ROWS] if nested else ROWS
    text = lines(rows) if form == "lines" else json.dumps(rows, indent=2 if form == "pretty" else None)
    path = write(tmp_path / ("train.json.gz" if nested else "train.jsonl"), text)
    assert load_pairs(str(path), "train", "en-de") == PAIRS
    assert load_pairs(str(tmp_path), "train", "de-en") == [Pair(p.target, p.source) for p in PAIRS]


def test_white_space_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    row = {"de": " Über\u2028 alles\n", "en": "A\tb"}
    path = write(tmp_path / "train.jsonl", "\ufeff\n\n" + json.dumps(row, ensure_ascii=False) + "\n\n")
    assert load_pairs(str(path), "train", "de-en") == [Pair("Über alles", "A b")]
    write(tmp_path / "dev.json", "\n\n  [ ]\n")
    with pytest.raises(ValueError, match="no usable rows"):
        load_pairs(str(tmp_path), "valid", "de-en")


def test_limit_and_seed(tmp_path: Path) -> None:
    source = str(write(tmp_path / "train.jsonl", lines(ROWS)))
    assert load_pairs(source, "train", "en-de", limit=4) == PAIRS[:4]
    shuffled = load_pairs(source, "train", "en-de", seed=7)
    assert shuffled != PAIRS and sorted(shuffled) == sorted(PAIRS)
    assert load_pairs(source, "train", "en-de", seed=7, limit=5) == shuffled[:5]
    for options, error in (({"limit": 0}, ValueError), ({"limit": True}, TypeError), ({"seed": -1}, ValueError)):
        with pytest.raises(error, match=r"limit|seed"):
            load_pairs(source, "train", "en-de", **options)


BAD = [
    (b'{"en": "x"}', "no text for the language 'de'"),
    (b'{"en": "x", "de": "  "}', "the text for the language 'de' is empty"),
    (b'{"en": "x", "de": "y"', "not JSON"),
    (b'["x", "y"]', "expected an object"),
    (b'{"translation": {"en": "x"}}', r"no text for the language 'de' \(columns: en\)"),
    (b'{"en": ' + b"[" * 100_000, "nested too deeply"),
    (b'{"en": "\xff", "de": "b"}', "not UTF-8: byte 0xff"),
    (rb'{"en": "\ud83d", "de": "b"}', "a lone surrogate 0xd83d"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=lambda value: str(value)[:20])
def test_bad_rows_name_file_and_line_or_are_skipped(tmp_path: Path, bad: bytes, message: str) -> None:
    good, path = json.dumps(ROWS[0]).encode(), tmp_path / "train.jsonl"
    path.write_bytes(good + b"\n\n" + bad + b"\n" + good + b"\n")
    with pytest.raises(ValueError, match=rf"train\.jsonl, line 3: .*{message}"):
        load_pairs(str(path), "train", "en-de")
    with pytest.warns(UserWarning, match="skipped 1 bad rows of 3.*line 3"):
        assert load_pairs(str(path), "train", "en-de", skip_bad=True) == [PAIRS[0]] * 2
    path.write_bytes(b"[\n" + good + b",\n\n" + bad + b"]")
    if "JSON" in message or "nested" in message:  # the rows after the break cannot be found
        with pytest.raises(ValueError, match=r"line \d+: not a JSON array"):
            load_pairs(str(path), "train", "en-de", skip_bad=True)
        return
    with pytest.raises(ValueError, match=f"line 4: .*{message}"):
        load_pairs(str(path), "train", "en-de")
    with pytest.warns(UserWarning, match=r"skipped 1 bad rows of 2; the first: .*line 4"):
        assert load_pairs(str(path), "train", "en-de", skip_bad=True) == [PAIRS[0]]


def test_a_broken_array_and_one_with_more_after_it(tmp_path: Path) -> None:
    """Not one row of several, nor the first of several arrays."""
    row, path = '{"en": "a", "de": "b"}', tmp_path / "train.json"
    for text, line, message in (
        (f"[\n{row}\n{{}}]", 3, "not a JSON array"),
        (f"[{row},\n", 2, "not a JSON array"),
        ("[\n{'a'}]", 2, "not a JSON array"),
        (f"[{row}]\n[{row}]", 1, "expected nothing after the array"),
        (f"[]\n\n{row}", 1, "expected nothing after the array"),
    ):
        write(path, text)
        with pytest.raises(ValueError, match=f"line {line}: {message}"):
            load_pairs(str(path), "train", "en-de", skip_bad=True)
    write(path, f"\n [{row}\n,\t{row} ] \n\n")
    assert load_pairs(str(path), "train", "en-de") == [Pair("a", "b")] * 2


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl.gz", lines(ROWS))
    whole = path.read_bytes()
    for broken in (whole[:-12], b"not gzip", whole[:40] + bytes(20) + whole[60:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"train\.jsonl\.gz cannot be read"):
            load_pairs(str(path), "train", "en-de")


def test_several_directions(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", lines(ROWS))
    write(tmp_path / "cs" / "train.cs-en.jsonl", lines([{"en": "Hi", "cs": "Ahoj"}]))
    made = load_directions(str(tmp_path), "train", ["de-en", "en-de"], seed=3, limit=5)
    assert list(made) == ["de-en", "en-de"] and len(made["en-de"]) == 5
    assert made["de-en"] == [Pair(b, a) for a, b in made["en-de"]]
    sources = {"en-de": str(tmp_path), "cs-en": str(tmp_path / "cs")}
    assert load_directions(sources, "train", ["cs-en"]) == {"cs-en": [Pair("Ahoj", "Hi")]}
    with pytest.raises(ValueError, match=r"no entry for de-en \(there: en-de, cs-en\)"):
        load_directions(sources, "train", ["de-en"])
    for directions in ([], ["en-de", "en-de"]):
        with pytest.raises(ValueError, match="directions="):
            load_directions(str(tmp_path), "train", directions)
    with pytest.raises(TypeError, match="directions must be"):
        load_directions(str(tmp_path), "train", "en-de")


def found(directory: Path, split: str, direction: str = "en-de") -> str:
    return find_file(directory, split, parse_direction(direction)).name


def names(directory: Path, *files: str) -> None:
    for file in files:
        write(directory / file, lines(ROWS[:1]))


def test_directory_finds_the_obvious_file(tmp_path: Path) -> None:
    names(tmp_path, "train.jsonl.gz", "val.jsonl", "test_2018.jsonl", "test_2016.jsonl.gz", "notes.txt", "train_log.js")
    assert [found(tmp_path, split) for split in ("train", "valid", "val", "test", "test_2018")] == [
        "train.jsonl.gz", "val.jsonl", "val.jsonl", "test_2016.jsonl.gz", "test_2018.jsonl",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"split='tets'.*test_2018"):
        found(tmp_path, "tets")
    names(tmp_path, "dev.jsonl")
    with pytest.raises(ValueError, match=r"ambiguous.*dev\.jsonl, val\.jsonl"):
        found(tmp_path, "valid")


def test_directory_respects_the_direction_in_the_name(tmp_path: Path) -> None:
    names(tmp_path, "train.cs-en.jsonl", "train.de-en.jsonl", "test.de-en.jsonl")
    assert found(tmp_path, "train") == "train.de-en.jsonl" and found(tmp_path, "test", "de-en") == "test.de-en.jsonl"
    with pytest.raises(ValueError, match=r"split='test\.de-en' takes the file of the reverse direction"):
        found(tmp_path, "test")
    assert found(tmp_path, "test.de-en") == "test.de-en.jsonl"
    names(tmp_path, "test.en-de.jsonl", "train.en-de.jsonl")
    assert found(tmp_path, "test") == "test.en-de.jsonl" and found(tmp_path, "train") == "train.en-de.jsonl"
    with pytest.raises(ValueError, match="no file fits"):
        found(tmp_path, "train", "en-fr")


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
        assert load_pairs(str(source), "train", "de-en") == [Pair(p.target, p.source) for p in PAIRS]
    with pytest.raises(ValueError, match="holds the train split"):
        load_pairs(str(prefix), "valid", "en-de")


def test_text_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    (tmp_path / "train.en").write_bytes("\ufeffone\ntwo\r\nth\rree\u2028!".encode())
    (tmp_path / "train.de").write_bytes(b"eins\nzwei\ndrei\n")
    expected = [Pair("one", "eins"), Pair("two", "zwei"), Pair("th ree !", "drei")]
    assert load_pairs(str(tmp_path), "train", "en-de") == expected


def test_text_of_unequal_length_is_never_taken(tmp_path: Path) -> None:
    write(tmp_path / "train.en", "a\nb\nc\nd\n")
    write(tmp_path / "train.de", "eins\nzwei")
    for direction in ("en-de", "de-en"):
        with pytest.raises(ValueError, match=r"train\.en, line 3: .*train\.de has no such line.*got 4 and 2"):
            load_pairs(str(tmp_path), "train", direction, limit=1, skip_bad=True)


def test_bad_lines_of_text_name_file_and_line_or_are_skipped(tmp_path: Path) -> None:
    for english, german, file, message in (
        (b"x", b" \t", "de", "the text for the language 'de' is empty"),
        (b"", b"y", "en", "the text for the language 'en' is empty"),
        (b"x", "ü".encode("latin-1"), "de", "not UTF-8: byte 0xfc"),
    ):
        (tmp_path / "train.en").write_bytes(b"a\n" + english + b"\nb\n")
        (tmp_path / "train.de").write_bytes(b"eins\n" + german + b"\nzwei\n")
        with pytest.raises(ValueError, match=rf"train\.{file}, line 2: {message}"):
            load_pairs(str(tmp_path / "train"), "train", "en-de")
        with pytest.warns(UserWarning, match=rf"skipped 1 bad rows of 3.*train\.{file}, line 2"):
            pairs = load_pairs(str(tmp_path), "train", "en-de", skip_bad=True)
        assert pairs == [Pair("a", "eins"), Pair("b", "zwei")]
    (tmp_path / "train.de").unlink()
    with pytest.raises(ValueError, match=r"train': there is no train\.de or train\.de\.gz"):
        load_pairs(str(tmp_path / "train"), "train", "en-de")
    with pytest.raises(ValueError, match=r"no file fits .*without its other side: train\.en"):
        load_pairs(str(tmp_path), "train", "en-de")
    with pytest.raises(ValueError, match="of parallel text the path without the language"):
        load_pairs(str(tmp_path / "train.en"), "train", "en-de")


def test_directions_and_language_names() -> None:
    assert parse_direction("zh_cn-en") == ("zh_cn", "en")
    assert [language_name(code) for code in ("de", "zh_cn", "xx")] == ["German", "Chinese", "xx"]
    for direction in ("en", "en-en", "english-german", "en_de", "", "en-de-fr"):
        with pytest.raises(ValueError, match="direction="):
            load_pairs("builtin", "train", direction)
    with pytest.raises(TypeError, match="direction"):
        parse_direction(None)  # type: ignore[arg-type]


def test_missing_paths_are_not_taken_for_hub_names(tmp_path: Path) -> None:
    for source in (str(tmp_path / "none"), "./none", "none/train.jsonl", "~/none-at-all"):
        with pytest.raises(ValueError, match="no such file or directory"):
            load_pairs(source, "train", "en-de")
    other = write(tmp_path / "train.csv", "a,b")
    with pytest.raises(ValueError, match="file name that ends in one of"):
        load_pairs(str(other), "train", "en-de")


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
    assert load_pairs("owner/pairs", "valid", "de-en") == [Pair(b, a) for a, b in PAIRS[:2]]
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


def test_the_toy_corpus_is_what_it_was() -> None:
    """The rows that results and docs were made with."""
    digests = {}
    for split, count in (("train", 20_000), ("valid", 500), ("test", 500)):
        rows = toy_corpus(split)
        assert len(rows) == len({r["en"] for r in rows}) == len({r["de"] for r in rows}) == count
        digests[split] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
    assert digests == TOY
    assert toy_corpus("test", 3) == toy_corpus("test")[:3]
    for options in (("tests",), ("test", 0), ("test", 501)):
        with pytest.raises(ValueError, match=r"split=|size="):
            toy_corpus(*options)
    pairs = load_pairs("builtin", "valid", "en-de")
    assert load_pairs("builtin", "dev", "de-en", limit=3) == [Pair(b, a) for a, b in pairs[:3]]
    with pytest.raises(ValueError, match="'en-de' and 'de-en' only"):
        load_pairs("builtin", "train", "en-fr")


TOY = {"train": "bc15841d1aec", "valid": "9f22d2edc7c2", "test": "064e27292ffe"}


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


ALONE = Instruction("Name two\ncolours.", "", "Red,\nblue.")
WITH = Instruction("Translate {this}.", "A dog", "Ein Hund")
TASKS = [
    {"instruction": " Name two\ncolours. ", "input": "", "output": "Red,\nblue.\n"},
    {"instruction": "Translate {this}.", "input": "A dog", "output": "Ein Hund"},
]


@pytest.mark.parametrize("missing", [{"input": ""}, {"input": None}, {"input": " \n"}, {}])
def test_instructions_are_read(tmp_path: Path, missing: dict) -> None:
    rows = [{**{key: TASKS[0][key] for key in ("instruction", "output")}, **missing}, TASKS[1]]
    path = write(tmp_path / "train.json", json.dumps(rows, indent=1) if missing else lines(rows))
    assert load_instructions(str(path), "train") == [ALONE, WITH]
    assert load_instructions(str(tmp_path), "train", limit=1) == [ALONE]


def test_a_file_of_instructions_is_divided(tmp_path: Path) -> None:
    rows = [{"instruction": f"Count to {i}.", "input": "", "output": str(i)} for i in range(1_000)]
    # the same task with another answer must not be on both sides
    rows += [{**row, "output": "more"} for row in rows]
    path = str(write(tmp_path / "alpaca_data.json", json.dumps(rows)))
    parts = {split: load_instructions(path, split) for split in ("train", "valid", "test")}
    assert sum(map(len, parts.values())) == 2_000 and all(60 < len(parts[split]) < 160 for split in ("valid", "test"))
    tasks = [{row.instruction for row in part} for part in parts.values()]
    assert not tasks[0] & tasks[1] and not tasks[0] & tasks[2] and not tasks[1] & tasks[2]
    assert sorted(load_instructions(path, "all", seed=5)) == sorted(chain(*parts.values()))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"instruction": "x"}', r"no text for 'output' \(columns: instruction\)"),
        ('{"instruction": "x", "input": 3, "output": "y"}', "no text for 'input'"),
        ('{"instruction": " ", "output": "y"}', "the text for 'instruction' is empty"),
        ('["x"]', "expected an object with instruction, input and output"),
    ],
)
def test_bad_instructions_name_file_and_line_or_are_skipped(tmp_path: Path, bad: str, message: str) -> None:
    good, path = json.dumps(TASKS[1]), tmp_path / "tasks.jsonl"
    path.write_text(f"{good}\n\n{bad}\n{good}\n")
    with pytest.raises(ValueError, match=rf"tasks\.jsonl, line 3: {message}"):
        load_instructions(str(path), "train")
    with pytest.warns(UserWarning, match=r"skipped 1 bad rows of \d.*line 3"):
        assert load_instructions(str(path), "all", skip_bad=True) == [WITH] * 2
    with pytest.raises(ValueError, match="no instructions"):
        load_instructions("builtin", "train")


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
