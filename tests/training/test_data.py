"""Loading parallel text: files, directories, directions, bad rows, the hub path."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from fused_kd.training.data import reading
from fused_kd.training.data.pairs import (
    Pair,
    find_split,
    language_name,
    load_directions,
    load_pairs,
    parse_direction,
)

ROWS = [{"en": f"Line {i}.", "de": f"Zeile {i}."} for i in range(30)]
PAIRS = [Pair(row["en"], row["de"]) for row in ROWS]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".gz"):
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write(text)
    else:
        path.write_text(text, encoding="utf-8")
    return path


def lines(rows: list) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".json.gz"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("form", ["lines", "array", "pretty"])
def test_every_form_gives_the_same_pairs(tmp_path: Path, suffix: str, nested: bool, form: str) -> None:
    rows = [{"translation": row} for row in ROWS] if nested else ROWS
    text = lines(rows) if form == "lines" else json.dumps(rows, indent=2 if form == "pretty" else None)
    path = write(tmp_path / f"train{suffix}", text)
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
    assert load_pairs(source, "train", "en-de", seed=8) != shuffled


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"en": "x"}', "line 3: no text for the language 'de'"),
        ('{"en": "x", "de": null}', "line 3: no text for the language 'de'"),
        ('{"en": "x", "de": "  "}', "line 3: the text for the language 'de' is empty"),
        ('{"en": "x", "de": "y"', "line 3: not JSON"),
        ('["x", "y"]', "line 3: expected an object"),
        ('{"translation": {"en": "x"}}', r"line 3: no text for the language 'de' \(columns: en\)"),
    ],
)
def test_bad_rows_name_file_and_line_or_are_skipped(tmp_path: Path, bad: str, message: str) -> None:
    good = json.dumps(ROWS[0])
    path = write(tmp_path / "train.jsonl", f"{good}\n\n{bad}\n{good}\n")
    with pytest.raises(ValueError, match=message) as caught:
        load_pairs(str(path), "train", "en-de")
    assert str(path) in str(caught.value)
    with pytest.warns(UserWarning, match="skipped 1 bad rows of 3.*line 3"):
        assert load_pairs(str(path), "train", "en-de", skip_bad=True) == [PAIRS[0]] * 2


def test_bad_row_in_an_array_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "train.json", '[\n{"en": "a", "de": "b"},\n\n{"en": "a"},\n{"en": "c", "de": "d"}]')
    with pytest.raises(ValueError, match="line 4: no text"):
        load_pairs(str(path), "train", "en-de")
    with pytest.warns(UserWarning, match="skipped 1 bad rows of 3"):
        assert load_pairs(str(path), "train", "en-de", skip_bad=True) == [Pair("a", "b"), Pair("c", "d")]
    for text, line in (
        ('[\n{"en": "a", "de": "b"}\n{}]', 3),
        ('[{"en": "a", "de": "b"},\n', 2),
        ("[\n{'a'}]", 2),
    ):
        write(path, text)
        with pytest.raises(ValueError, match=f"line {line}: not a JSON array"):
            load_pairs(str(path), "train", "en-de", skip_bad=True)


def test_an_array_and_more_is_refused(tmp_path: Path) -> None:
    """Not one row of several, nor the first of several arrays."""
    row = '{"en": "a", "de": "b"}'
    for text, line in ((f"[{row}]\n[{row}]", 2), (f"[{row}] {row}", 1), (f"[]\n\n{row}", 3), (f"\n[{row}]\n]", 3)):
        path = write(tmp_path / "train.json", text)
        with pytest.raises(ValueError, match=f"line {line}: expected nothing after the array"):
            load_pairs(str(path), "train", "en-de", skip_bad=True)
    path = write(tmp_path / "train.json", f"\n [{row}\n,\t{row} ] \n\n")
    assert load_pairs(str(path), "train", "en-de") == [Pair("a", "b")] * 2


@pytest.mark.parametrize("indent", [None, 1])
def test_arrays_across_the_blocks_they_are_read_in(tmp_path: Path, indent: int | None) -> None:
    rows = [{"en": "a " * (7 * n % 501) + "x", "de": "ü\n" * (n % 90) + "y"} for n in range(700)]
    rows.append({"en": "long " * 40_000, "de": "y"})
    path = write(tmp_path / "train.json", json.dumps(rows, indent=indent, ensure_ascii=False))
    assert path.stat().st_size > 500_000
    expected = [Pair(" ".join(row["en"].split()), " ".join(row["de"].split())) for row in rows]
    assert load_pairs(str(path), "train", "en-de") == expected
    rows[650] = {}
    write(path, json.dumps(rows, indent=indent, ensure_ascii=False))
    line = 1 if indent is None else 2 + 4 * 650
    with pytest.raises(ValueError, match=f"line {line}: no text for the language 'en'"):
        load_pairs(str(path), "train", "en-de")


BAD_ROWS = {
    "deep": (b'{"en": ' + b"[" * 100_000, "nested too deeply"),
    "huge": (b'{"en": ' + b"1" * 5000 + b"}", "not JSON: Exceeds the limit"),
    "bytes": (b'{"en": "\xff", "de": "b"}', "not UTF-8: byte 0xff"),
    "surrogate": (rb'{"en": "\ud83d", "de": "b"}', "a lone surrogate 0xd83d"),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_bad_row_is_skipped_or_named(tmp_path: Path, bad: str) -> None:
    text, message = BAD_ROWS[bad]
    path = tmp_path / "train.jsonl"
    path.write_bytes(rb'{"en": "\ud83d\ude00", "de": "b"}' + b"\n" + text + b'\n{"en": "c", "de": "d"}\n')
    with pytest.raises(ValueError, match=f"line 2: .*{message}"):
        load_pairs(str(path), "train", "en-de")
    with pytest.warns(UserWarning, match=rf"skipped 1 bad rows of 3; the first: .*line 2: .*{message}"):
        assert load_pairs(str(path), "train", "en-de", skip_bad=True) == [Pair("\U0001f600", "b"), Pair("c", "d")]
    if bad in ("bytes", "surrogate"):  # where an array's item ends can be seen
        path.write_bytes(b'[{"en": "a", "de": "b"},\n' + text + b"]")
        with pytest.warns(UserWarning, match=rf"skipped 1 bad rows of 2; the first: .*line 2: .*{message}"):
            assert load_pairs(str(path), "train", "en-de", skip_bad=True) == [Pair("a", "b")]
    else:
        path.write_bytes(b"[\n" + text + b"]")
        with pytest.raises(ValueError, match="line 2: not a JSON array: "):
            load_pairs(str(path), "train", "en-de", skip_bad=True)


def test_memory_does_not_follow_a_small_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LONGEST", 1 << 17)
    for start in (b'{"en": "', b'[{"en": "'):
        path = tmp_path / "train.json.gz"
        path.write_bytes(gzip.compress(start + b"a" * (1 << 20) + b'", "de": "b"}', 1))
        with pytest.raises(ValueError, match=r"a line of at most 131072 characters|not a JSON array: Unterminated"):
            load_pairs(str(path), "train", "en-de", skip_bad=True)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl.gz", lines(ROWS))
    whole = path.read_bytes()
    for broken in (whole[:-12], b"not gzip", whole[:40] + bytes(20) + whole[60:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"train\.jsonl\.gz cannot be read"):
            load_pairs(str(path), "train", "en-de")
    latin = tmp_path / "test.jsonl"
    latin.write_bytes('{"en": "a", "de": "ü"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"test\.jsonl, line 1: not UTF-8: byte 0xfc"):
        load_pairs(str(latin), "test", "en-de")


def test_several_directions(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", lines(ROWS))
    write(tmp_path / "cs" / "train.cs-en.jsonl", lines([{"en": "Hi", "cs": "Ahoj"}]))
    made = load_directions(str(tmp_path), "train", ["de-en", "en-de"], seed=3, limit=5)
    assert list(made) == ["de-en", "en-de"] and len(made["en-de"]) == 5
    assert made["en-de"] == load_pairs(str(tmp_path), "train", "en-de", seed=3, limit=5)
    assert made["de-en"] == [Pair(b, a) for a, b in made["en-de"]]
    sources = {"en-de": str(tmp_path), "cs-en": str(tmp_path / "cs")}
    made = load_directions(sources, "train", ["cs-en", "en-de"])
    assert made == {"cs-en": [Pair("Ahoj", "Hi")], "en-de": PAIRS}
    with pytest.raises(ValueError, match=r"no entry for de-en \(there: en-de, cs-en\)"):
        load_directions(sources, "train", ["de-en"])
    for directions in ([], ["en-de", "en-de"]):
        with pytest.raises(ValueError, match="directions="):
            load_directions(str(tmp_path), "train", directions)
    with pytest.raises(TypeError, match="directions must be"):
        load_directions(str(tmp_path), "train", "en-de")
    with pytest.raises(ValueError, match="direction='ende'"):
        load_directions(str(tmp_path / "none"), "train", ["en-de", "ende"])


def names(directory: Path, *files: str) -> None:
    for file in files:
        write(directory / file, lines(ROWS[:1]))


def test_directory_finds_the_obvious_file(tmp_path: Path) -> None:
    names(
        tmp_path,
        "train.jsonl.gz",
        "val.jsonl",
        "test_2018.jsonl",
        "test_2016_flickr.jsonl.gz",
        "notes.txt",
        "trainer_log.json",
    )
    found = {split: find_split(tmp_path, split, "en-de").name for split in ("train", "valid", "val", "test")}
    assert found == {
        "train": "train.jsonl.gz",
        "valid": "val.jsonl",
        "val": "val.jsonl",
        "test": "test_2016_flickr.jsonl.gz",
    }
    assert find_split(tmp_path, "test_2018", "en-de").name == "test_2018.jsonl"
    with pytest.raises(ValueError, match=r"split='tets'.*test_2018"):
        find_split(tmp_path, "tets", "en-de")
    names(tmp_path, "dev.jsonl")
    assert find_split(tmp_path, "train", "en-de").name == "train.jsonl.gz"
    with pytest.raises(ValueError, match=r"ambiguous.*dev\.jsonl, val\.jsonl"):
        find_split(tmp_path, "valid", "en-de")


def test_directory_respects_the_direction_in_the_name(tmp_path: Path) -> None:
    names(tmp_path, "train.cs-en.jsonl", "train.de-en.jsonl", "valid.de-en.jsonl", "test.de-en.jsonl")
    assert find_split(tmp_path, "train", "en-de").name == "train.de-en.jsonl"
    assert find_split(tmp_path, "valid", "en-de").name == "valid.de-en.jsonl"
    assert find_split(tmp_path, "test", "de-en").name == "test.de-en.jsonl"
    with pytest.raises(ValueError, match=r"split='test\.de-en' takes the file of the reverse direction"):
        find_split(tmp_path, "test", "en-de")
    assert find_split(tmp_path, "test.de-en", "en-de").name == "test.de-en.jsonl"
    names(tmp_path, "test.en-de.jsonl", "train.en-de.jsonl")
    assert find_split(tmp_path, "test", "en-de").name == "test.en-de.jsonl"
    assert find_split(tmp_path, "train", "en-de").name == "train.en-de.jsonl"
    with pytest.raises(ValueError, match="no file fits"):
        find_split(tmp_path, "train", "en-fr")


def test_file_with_a_split_name_serves_that_split_only(tmp_path: Path) -> None:
    path = str(write(tmp_path / "train.jsonl", lines(ROWS)))
    with pytest.raises(ValueError, match="holds the train split"):
        load_pairs(path, "test", "en-de")
    assert load_pairs(path, "all", "en-de") == PAIRS


def test_file_without_a_split_name_is_split_by_hash(tmp_path: Path) -> None:
    rows = [{"en": f"Line {i}.", "de": f"Zeile {i}."} for i in range(2_000)]
    path = str(write(tmp_path / "corpus.jsonl", lines(rows + rows[:100])))
    parts = {split: load_pairs(path, split, "en-de") for split in ("train", "valid", "test")}
    assert sum(len(part) for part in parts.values()) == 2_100
    assert not set(parts["train"]) & set(parts["valid"]) and not set(parts["train"]) & set(parts["test"])
    assert all(60 < len(parts[split]) < 160 for split in ("valid", "test"))
    assert {Pair(b, a) for a, b in load_pairs(path, "test", "de-en")} == set(parts["test"])
    with pytest.raises(ValueError, match="train, valid, test or all"):
        load_pairs(path, "tset", "en-de")


def test_builtin() -> None:
    pairs = load_pairs("builtin", "valid", "en-de")
    assert len(pairs) == 500
    assert load_pairs("builtin", "dev", "de-en", limit=3) == [Pair(b, a) for a, b in pairs[:3]]
    assert len(load_pairs("builtin", "test", "en-de", limit=501)) == 501
    with pytest.raises(ValueError, match="'en-de' and 'de-en' only"):
        load_pairs("builtin", "train", "en-fr")
    with pytest.raises(ValueError, match="train, valid, test"):
        load_pairs("builtin", "tests", "en-de")


@pytest.mark.parametrize("direction", ["en", "en-en", "english-german", "en_de", "", "en-de-fr"])
def test_bad_direction(direction: str) -> None:
    with pytest.raises(ValueError, match="direction="):
        load_pairs("builtin", "train", direction)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"limit": 0}, ValueError),
        ({"limit": 2.0}, TypeError),
        ({"limit": True}, TypeError),
        ({"seed": -1}, ValueError),
    ],
)
def test_bad_options(options: dict, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"limit|seed"):
        load_pairs("builtin", "train", "en-de", **options)


def test_missing_paths_are_not_taken_for_hub_names(tmp_path: Path) -> None:
    for source in (str(tmp_path / "none"), "./none", "none/train.jsonl", "~/none-at-all"):
        with pytest.raises(ValueError, match="no such file or directory"):
            load_pairs(source, "train", "en-de")
    other = tmp_path / "train.csv"
    other.write_text("a,b")
    with pytest.raises(ValueError, match="file name that ends in one of"):
        load_pairs(str(other), "train", "en-de")


def test_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` itself on a local copy of a repository, under a name that is no path."""
    datasets = pytest.importorskip("datasets")
    write(tmp_path / "repo" / "train.jsonl", lines([{"translation": row} for row in ROWS]))
    write(tmp_path / "repo" / "validation.jsonl", lines([{"translation": row} for row in ROWS[:2]]))
    wanted = {"owner/pairs": None, "owner/pairs:de-en": "de-en"}
    seen = []
    real_names, real_load = datasets.get_dataset_split_names, datasets.load_dataset

    def split_names(name: str, config: str | None) -> list[str]:
        seen.append((name, config))
        return real_names(str(tmp_path / "repo"))

    monkeypatch.setattr(datasets, "get_dataset_split_names", split_names)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, config, split: real_load(str(tmp_path / "repo"), split=split, cache_dir=tmp_path / "cache"),
    )
    monkeypatch.chdir(tmp_path)
    for source, config in wanted.items():
        assert load_pairs(source, "train", "en-de") == PAIRS
        assert seen[-1] == ("owner/pairs", config)
    assert load_pairs("owner/pairs", "valid", "en-de", limit=1) == PAIRS[:1]
    with pytest.raises(ValueError, match="train, validation"):
        load_pairs("owner/pairs", "test", "en-de")


def test_hub_failure_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: object) -> list[str]:
        raise ConnectionError("cannot reach the hub")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    with pytest.raises(ValueError, match=r"neither 'builtin' nor a file .*cannot reach the hub"):
        load_pairs("nobody/nothing", "train", "en-de")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"fused_kd\[train\]"):
        load_pairs("nobody/nothing", "train", "en-de")


def test_directions_and_language_names() -> None:
    assert parse_direction("en-de") == ("en", "de")
    assert parse_direction("zh_cn-en") == ("zh_cn", "en")
    assert [language_name(code) for code in ("de", "zh_cn", "xx")] == ["German", "Chinese", "xx"]
    with pytest.raises(TypeError, match="direction"):
        parse_direction(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "split", "direction", "count", "first"),
    [
        ("multi30k", "train", "en-de", 29_000, "Two young, White males are outside near many bushes."),
        ("multi30k", "valid", "de-cs", 1_014, "Eine Gruppe von Männern lädt Baumwolle auf einen Lastwagen"),
        ("multi30k", "test", "en-de", 1_000, "A man in an orange hat starring at something."),
        ("multi30k", "test_2018_flickr", "en-de", 1_071, "A young man participates in a career"),
        ("alma", "train", "en-de", 14_211, "28-Year-Old Chef Found Dead at San Francisco Mall"),
        ("alma", "valid", "cs-en", 1_002, "Přes 30 zaměstnanců"),
        ("alma", "test", "en-de", 2_037, "You can come back any time"),
        ("alma", "test", "de-en", 1_984, "Die Ware hat unter 20 Euro gekostet."),
        ("alma", "train", "cs-en", 12_076, "Osmadvacetiletý šéfkuchař"),
    ],
)
def test_real_data(shared_data: Path, source: str, split: str, direction: str, count: int, first: str) -> None:
    pairs = load_pairs(str(shared_data / source), split, direction)
    assert len(pairs) == count
    assert pairs[0].source.startswith(first)


def test_real_test_sets_of_the_four_directions(shared_data: Path) -> None:
    counts = {"en-de": 2_037, "de-en": 1_984, "en-cs": 2_037, "cs-en": 1_448}
    for direction in counts:
        assert find_split(shared_data / "alma", "test", direction).name == f"test.{direction}.jsonl.gz"
    made = load_directions(str(shared_data / "alma"), "test", list(counts))
    assert {direction: len(pairs) for direction, pairs in made.items()} == counts
    first = {direction: pairs[0] for direction, pairs in made.items()}
    assert first["de-en"].source.startswith("Die Ware hat") and first["en-de"].source.startswith("You can come back")
    assert first["cs-en"].source.startswith("Blíží se velký") and first["en-cs"].target.startswith("Pokud vás")
