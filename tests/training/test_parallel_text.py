"""Parallel text in two files, by directory and by prefix: names, lines, counts, bad rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from fused_kd.training.data.pairs import Pair, find_split, load_pairs

from .test_data import PAIRS, ROWS, lines, write


def write_text(directory: Path, english: str, german: str) -> None:
    """Both sides of `ROWS`, under these names."""
    write(directory / english, "".join(row["en"] + "\n" for row in ROWS))
    write(directory / german, "".join(row["de"] + "\n" for row in ROWS))


@pytest.mark.parametrize(
    ("english", "german"),
    [
        ("train.en", "train.de"),
        ("train.en.gz", "train.de"),
        ("train.de-en.en.gz", "train.de-en.de.gz"),
        ("train.en-de.en", "train.en-de.de"),
    ],
)
def test_text_by_directory_and_by_prefix(tmp_path: Path, english: str, german: str) -> None:
    write_text(tmp_path, english, german)
    prefix = tmp_path / english.removesuffix(".gz").removesuffix(".en")
    for source in (tmp_path, prefix):
        assert load_pairs(str(source), "train", "en-de") == PAIRS
        assert load_pairs(str(source), "train", "de-en") == [Pair(p.target, p.source) for p in PAIRS]
    assert load_pairs(str(prefix), "all", "en-de", limit=2) == PAIRS[:2]
    assert find_split(tmp_path, "train", "de-en") == prefix
    with pytest.raises(ValueError, match="holds the train split"):
        load_pairs(str(prefix), "valid", "en-de")
    with pytest.raises(ValueError, match="no file fits"):
        find_split(tmp_path, "train", "en-cs")


def test_text_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    (tmp_path / "train.en").write_bytes("\ufeffone\ntwo\r\nth\rree\u2028!".encode())
    (tmp_path / "train.de").write_bytes(b"eins\nzwei\ndrei\n")
    expected = [Pair("one", "eins"), Pair("two", "zwei"), Pair("th ree !", "drei")]
    assert load_pairs(str(tmp_path), "train", "en-de") == expected


def test_text_obeys_the_rules_for_directions_and_ties(tmp_path: Path) -> None:
    write_text(tmp_path, "test.de-en.en", "test.de-en.de")
    assert find_split(tmp_path, "test", "de-en").name == "test.de-en"
    with pytest.raises(ValueError, match=r"split='test\.de-en' takes the file of the reverse direction"):
        find_split(tmp_path, "test", "en-de")
    assert load_pairs(str(tmp_path), "test.de-en", "en-de") == PAIRS
    write_text(tmp_path, "dev.en", "dev.de")
    write(tmp_path / "dev.jsonl", lines(ROWS))
    with pytest.raises(ValueError, match=r"ambiguous.*dev, dev\.jsonl"):
        find_split(tmp_path, "valid", "en-de")


def test_text_without_a_split_name_is_split_as_json_is(tmp_path: Path) -> None:
    rows = [{"en": f"Line {i}.", "de": f"Zeile {i}."} for i in range(400)]
    json_file = str(write(tmp_path / "json" / "corpus.jsonl", lines(rows)))
    for language in ("en", "de"):
        write(tmp_path / f"corpus.{language}", "".join(row[language] + "\n" for row in rows))
    for split in ("train", "valid", "test"):
        pairs = load_pairs(str(tmp_path / "corpus"), split, "en-de")
        assert pairs and pairs == load_pairs(json_file, split, "en-de")


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("limit", [None, 1])
def test_text_of_unequal_length_is_never_taken(tmp_path: Path, skip_bad: bool, limit: int | None) -> None:
    write(tmp_path / "train.en", "a\nb\nc\nd\n")
    write(tmp_path / "train.de", "eins\nzwei")
    for direction in ("en-de", "de-en"):
        with pytest.raises(ValueError, match=r"train\.en, line 3: .*train\.de has no such line.*got 4 and 2"):
            load_pairs(str(tmp_path), "train", direction, limit=limit, skip_bad=skip_bad)


@pytest.mark.parametrize(("english", "german", "file"), [("x", " \t", "de"), ("", "y", "en"), ("", "", "en")])
def test_empty_lines_name_file_and_line_or_are_skipped(tmp_path: Path, english: str, german: str, file: str) -> None:
    write(tmp_path / "train.en", f"a\n{english}\nb\n")
    write(tmp_path / "train.de", f"eins\n{german}\nzwei\n")
    with pytest.raises(ValueError, match=rf"train\.{file}, line 2: the text for the language '{file}' is empty"):
        load_pairs(str(tmp_path / "train"), "train", "en-de")
    with pytest.warns(UserWarning, match=rf"skipped 1 bad rows of 3.*train\.{file}, line 2"):
        pairs = load_pairs(str(tmp_path), "train", "en-de", skip_bad=True)
    assert pairs == [Pair("a", "eins"), Pair("b", "zwei")]


def test_text_without_its_other_side(tmp_path: Path) -> None:
    write(tmp_path / "train.en", "a\n")
    with pytest.raises(ValueError, match=r"train': there is no train\.de or train\.de\.gz"):
        load_pairs(str(tmp_path / "train"), "train", "en-de")
    with pytest.raises(ValueError, match=r"no file fits .*without its other side: train\.en"):
        load_pairs(str(tmp_path), "train", "en-de")
    with pytest.raises(ValueError, match="of parallel text the path without the language"):
        load_pairs(str(tmp_path / "train.en"), "train", "en-de")
    (tmp_path / "train.de").write_bytes("ü".encode("latin-1"))
    with pytest.raises(ValueError, match=r"train\.de, line 1: not UTF-8: byte 0xfc"):
        load_pairs(str(tmp_path), "train", "en-de")
    (tmp_path / "train.en").write_text("a\nb\n")
    (tmp_path / "train.de").write_bytes("ü\n".encode("latin-1") + b"c\n")
    with pytest.warns(UserWarning, match=r"skipped 1 bad rows of 2; the first: .*train\.de, line 1: not UTF-8"):
        assert load_pairs(str(tmp_path), "train", "en-de", skip_bad=True) == [Pair("b", "c")]
