"""Each rule that drops a translation, the identifier, and prompts with examples."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from fused_kd.training.config import load_config
from fused_kd.training.cycle_distill.few_shot import CYCLE_PROMPTS, get_template, with_examples
from fused_kd.training.cycle_distill.filters import RULES, Filters, broken_rule, find_cut, truncated
from fused_kd.training.cycle_distill.language import by_script_and_words, get_identifier, wrong_script
from fused_kd.training.data.pairs import Pair

SOURCE = "A man and a dog are sitting on the grass."
GOOD = "Ein Mann und ein Hund sitzen auf dem Gras."


def rule(text: str, source: str = SOURCE, *, whole: bool = True, direction: tuple = ("en", "de"), **options) -> object:
    filters = Filters(**options)
    return broken_rule(
        source, text, whole=whole, languages=direction, filters=filters, identify=filters.identify
    )  # fmt: skip


def test_a_good_translation_passes_every_rule():
    assert rule(GOOD) is None


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("", "empty"),
        (" ...", "empty"),
        (SOURCE, "copy"),
        ("a MAN, and a dog are sitting on the grass", "copy"),
        ("Ein Mann und ein", "length"),
        (GOOD + " Der Hund ist braun und der Mann liest ein Buch über Katzen.", "length"),
        ("Ein Mann Mann Mann sitzt mit Hund auf Gras.", "repetition"),
        ("Ein Hund und ein Hund und ein Hund und ein", "repetition"),
        ("auf Gras, auf Gras, auf Gras, mit dem Hund", "repetition"),
        ("Einen Mann, der lachtlachtlachtlacht, mit Gras", "repetition"),
        ("The man is with his dog and sits at it.", "language"),
        ("Un homme et un chien sont assis dans le pré.", "language"),
        ("Мужчина и собака сидят на зелёной траве.", "language"),
    ],
)
def test_rules(text: str, broken: str):
    assert rule(text) == broken


def test_a_translation_without_an_end_is_dropped():
    assert rule(GOOD, whole=False) == "unfinished"
    assert rule("", whole=False) == "empty"  # the first rule counts


def test_bounds_are_options():
    short = "Mann, Hund, Gras."  # 17 of 41 characters
    assert rule(short) == "length" and rule(short, length_ratio=(0.4, 2.0)) is None
    doubled = "Ein Mann ein Mann ein Mann sitzt da am Gras"  # 6 different words of 10
    assert rule(doubled, loops=4) is None and rule(doubled, loops=4, unique_words=0.7) == "repetition"
    assert rule(doubled) == "repetition"  # "ein mann " three times
    assert rule("Un homme et un chien sont assis dans le pré.", identifier="none") is None


def test_rules_are_the_ones_counted():
    assert RULES == ("empty", "unfinished", "copy", "length", "repetition", "language")


def test_cut_before_the_first_marker():
    markers = ("\n", "###")
    assert truncated("\n Ein Hund.\nen: A cat.\n", markers) == "Ein Hund."
    assert truncated("Ein Hund. ### Input: a\n", markers) == "Ein Hund."
    assert truncated("  ### Response", markers) == "" and find_cut("Ein Hund.", markers) is None
    assert truncated(" Ein  Hund.\u2028Er bellt.", markers) == "Ein Hund. Er bellt."


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The man is with his dog.", "en"),
        ("Der Mann ist mit einem Hund auf der Straße.", "de"),
        ("Muž se psem je na ulici, který si hraje.", "cs"),
        ("Un homme est avec un chien dans la rue et les enfants.", "fr"),
        ("Собака бежит.", None),  # Russian, Ukrainian, ...
        ("Ο σκύλος τρέχει.", "el"),
        ("犬が走る。", "ja"),
        ("Hund Katze Maus", None),
        ("12 !", None),
    ],
)
def test_identifier(text: str, language: str | None):
    assert by_script_and_words(text) == language


def test_scripts():
    assert not wrong_script("एक आदमी और कुत्ता", "hi") and wrong_script("ek aadmi aur kutta", "hi")
    assert wrong_script("Собака", "de") and not wrong_script("Собака", "ru") and not wrong_script("12", "de")
    assert not wrong_script("犬が走る。", "ja")


def test_identifier_by_name():
    assert get_identifier("none") is None
    own = get_identifier(f"{__name__}:always_czech")
    assert own is always_czech and rule(GOOD, identifier=f"{__name__}:always_czech") == "language"


def test_a_module_is_imported_when_texts_are_filtered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "identifier_of_mine.py").write_text("ran = open(__file__ + '.ran', 'w')\nfind = str\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tmp_path / "filters.yaml"
    config.write_text("identifier: identifier_of_mine:find\n")
    filters = load_config(Filters, [config])
    assert not list(tmp_path.glob("*.ran"))
    assert filters.identify is str and list(tmp_path.glob("*.ran"))
    with pytest.raises(ValueError, match="identifier_of_mine has no function 'lost'"):
        _ = Filters(identifier="identifier_of_mine:lost").identify


@pytest.mark.parametrize("name", ["nonsense", "os:", ":system", "os.:system", "os:path.join", "a-b:c", "no_such_one:f"])
def test_names_of_no_identifier(name: str) -> None:
    with pytest.raises(ValueError, match=f"identifier='{name}': (expected|there is no module 'no_such_one')"):
        Filters(identifier=name)


def always_czech(text: str) -> str:
    return "cs"


@pytest.mark.parametrize(
    "options",
    [
        {"length_ratio": (2.0, 0.5)},
        {"length_ratio": (0.5,)},
        {"unique_words": 1.5},
        {"loops": 1},
        {"markers": ("",)},
        {"identifier": "nonsense"},
    ],
)
def test_bad_filters(options: dict):
    with pytest.raises(ValueError, match=next(iter(options)).rstrip("s")):
        Filters(**options)


def test_examples_come_before_the_prompt():
    examples = [Pair("A {dog}.", "Ein {Hund}."), Pair("A cat.", "Eine Katze.")]
    template = with_examples(get_template("tiny"), examples, "en-de")
    assert template.render("A {bird}.", "en-de") == (
        "en: A {dog}.\nde:\nEin {Hund}.\nen: A cat.\nde:\nEine Katze.\nen: A {bird}.\nde:\n"
    )
    assert with_examples(get_template("tiny"), [], "en-de") is get_template("tiny")
    with pytest.raises(ValueError, match="at most 4, got 5"):
        with_examples(get_template("tiny"), examples[:1] * 5, "en-de")


def test_the_public_prompt_has_its_parts():
    text = CYCLE_PROMPTS["cycle_distill"].render("A dog.", "en-hi")
    assert text.startswith("### Instruction: ") and "\n### Input: English Text: A dog.\n" in text
    assert text.endswith("### Response:\n") and "Hindi" in text
    with pytest.raises(ValueError, match="nonsense"):
        get_template("nonsense")
