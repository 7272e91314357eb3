"""Code-switching: whole words by a dictionary, in their case, at the asked rate, a row alone by seed and key."""

from __future__ import annotations

import gzip
import re
from collections import Counter

import pytest

from fused_kd.training.sdrrl.code_switch import code_switch
from fused_kd.training.sdrrl.dictionary import Dictionary, load_dictionary

TSV = "dog\thund\ndog\tköter\nred\trot\ncat\tkatze\nshirt\themd\nball\tball\nt-shirt\tt-shirt\n\nice\teis\n"


@pytest.fixture
def both(tmp_path):
    (tmp_path / "en-de.tsv").write_text(TSV, encoding="utf-8")
    return load_dictionary(tmp_path / "en-de.tsv")


def switch_all(text: str, dictionary: Dictionary) -> str:
    return code_switch(text, dictionary, p=1.0, seed=0, key="row")


def test_dictionary_is_read_in_both_directions(both, tmp_path):
    forward, backward = both
    assert dict(forward.senses) == {
        "dog": ("hund", "köter"), "red": ("rot",), "cat": ("katze",), "shirt": ("hemd",), "ice": ("eis",),
    }  # fmt: skip
    assert backward.get("Hund") == ("dog",) and backward.get("KÖTER") == ("dog",)
    assert forward.get("ball") == backward.get("ball") == ()  # a switch would change nothing
    with gzip.open(tmp_path / "same.tsv.gz", "wt", encoding="utf-8") as file:
        file.write(TSV)
    assert load_dictionary(tmp_path / "same.tsv.gz")[0] == forward


@pytest.mark.parametrize(
    ("text", "error"),
    [("dog\thund\nred rot\n", "line 2"), ("dog\t\n", "line 1"), ("a\tb\tc\n", "line 1"), ("ball\tball\n", "no pairs")],
)
def test_bad_dictionaries(tmp_path, text, error):
    (tmp_path / "bad.tsv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=error):
        load_dictionary(tmp_path / "bad.tsv")
    with pytest.raises(ValueError, match="cannot be read"):
        load_dictionary(tmp_path / "none.tsv")


def test_whole_words_with_their_case_and_all_between_them(both):
    forward, backward = both
    assert switch_all("red cat,  (Red) CAT!\n«cat»", forward) == "rot katze,  (Rot) KATZE!\n«katze»"
    # parts of words, and words that are not there, stay
    text = "reddish cats catalogue hot-dog dog's T-Shirt i_cat 3cat cat3 x"
    assert switch_all(text, forward) == text
    assert switch_all("rEd", forward) == "rot"  # no case that another word could have
    assert switch_all("rotes Eis, rot", backward) == "rotes Ice, red"
    assert switch_all("", forward) == ""


def test_rate_senses_and_independence_of_words(both):
    forward, _ = both
    words = ["dog", "other", "dog"]
    counts: Counter = Counter()
    second: Counter = Counter()
    for row in range(4000):
        made = code_switch(" ".join(words), forward, p=0.15, seed=3, key=f"row{row}").split()
        counts[made[0]] += 1
        second[made[0] != "dog", made[2] != "dog"] += 1
        assert made[1] == "other"
    # 4,000 draws: a deviation of 0.0056; the two senses share what is switched
    assert counts["hund"] + counts["köter"] == pytest.approx(600, abs=70)
    assert counts["hund"] == pytest.approx(counts["köter"], abs=75)
    assert second[True, True] / 4000 == pytest.approx(0.15**2, abs=0.008)
    assert code_switch("dog dog", forward, p=0.0, seed=3, key="row") == "dog dog"


def test_a_row_depends_on_seed_and_key_alone(both):
    forward, _ = both
    text = "dog red cat shirt ice " * 8
    rows = {f"row{n}": code_switch(text, forward, p=0.5, seed=1, key=f"row{n}") for n in range(6)}
    again = {name: code_switch(text, forward, p=0.5, seed=1, key=name) for name in reversed(rows)}
    assert rows == again and len(set(rows.values())) == 6
    assert code_switch(text, forward, p=0.5, seed=2, key="row0") != rows["row0"]
    # a word that the dictionary learns changes no other word
    fewer = Dictionary({word: senses for word, senses in forward.senses.items() if word != "cat"})
    without = code_switch(text, fewer, p=0.5, seed=1, key="row0")
    assert without == re.sub("katze", "cat", rows["row0"]) != rows["row0"]
    # a fixed value, so that a change of the draws is seen: stages on disk would not know of it
    assert code_switch("dog red cat shirt ice", forward, p=0.5, seed=0, key="a") == "dog rot katze hemd ice"


@pytest.mark.parametrize("p", [-0.1, 1.5, True, "0.5"])
def test_bad_share(both, p):
    with pytest.raises(ValueError, match="p must be in"):
        code_switch("dog", both[0], p=p, seed=0, key="")
