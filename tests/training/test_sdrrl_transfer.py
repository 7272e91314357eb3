"""The transfer set: combinations and language instructions, the filter, equal counts, scores, caption tasks."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from fused_kd.training.data.instructions import Instruction
from fused_kd.training.sdrrl.caption_words import concept_of
from fused_kd.training.sdrrl.dictionary import Dictionary
from fused_kd.training.sdrrl.quality import Quality, RoundTrip
from fused_kd.training.sdrrl.rows import Task, TrainingRow, render
from fused_kd.training.sdrrl.scoring import score_answers
from fused_kd.training.sdrrl.tasks import Captions, make_tasks, write_captions
from fused_kd.training.sdrrl.transfer_set import (
    Arm,
    Candidate,
    Switching,
    Wording,
    answered,
    combine,
    fill,
    kept,
    translation_rows,
)

WORDING = Wording({"en-de": "Answer in German.", "de-en": "Antworte auf Englisch."}, {"en-de": "Into German:"})
PAIR = Candidate(
    "one",
    Instruction("Which colour?", "A red dog.", "red"),
    Instruction("Welche Farbe?", "Ein roter Hund.", "rot"),
    {"instruction": 1.0, "input": 0.8, "output": 0.5},
)


def candidate(name: str, **scores: float) -> Candidate:
    return Candidate(name, PAIR.source, PAIR.target, scores)


def test_combinations_and_their_language_instructions():
    rows = combine([PAIR], ("ss", "st", "ts", "tt"), ("en", "de"), WORDING)
    assert rows == [
        TrainingRow("one", "ss", Instruction("Which colour?", "A red dog.", "red")),
        TrainingRow("one", "st", Instruction("Which colour? Answer in German.", "A red dog.", "rot")),
        TrainingRow("one", "ts", Instruction("Welche Farbe? Antworte auf Englisch.", "Ein roter Hund.", "red")),
        TrainingRow("one", "tt", Instruction("Welche Farbe?", "Ein roter Hund.", "rot")),
    ]
    assert combine([PAIR], ("ts",), ("en", "de"), WORDING) == [rows[2]]
    # a language without wording of its own is named in English
    assert Wording().answer("en", "cs") == "Answer in Czech." and Wording().answer("cs", "cs") == ""


def test_switching_reaches_questions_alone():
    dictionaries = {
        "en-de": Dictionary({"red": ("rot",), "colour": ("farbe",), "dog": ("hund",), "german": ("deutsch",)}),
        "de-en": Dictionary({"rot": ("red",), "hund": ("dog",), "farbe": ("colour",), "englisch": ("english",)}),
    }
    ss, st, ts, tt = combine([PAIR], ("ss", "st", "ts", "tt"), ("en", "de"), WORDING, Switching(dictionaries, p=1.0))
    assert ss.instruction == Instruction("Which farbe?", "A rot hund.", "red")
    assert st.instruction == Instruction("Which farbe? Answer in German.", "A rot hund.", "rot")
    assert ts.instruction == Instruction("Welche Colour? Antworte auf Englisch.", "Ein roter Dog.", "red")
    assert tt.instruction == Instruction("Welche Colour?", "Ein roter Dog.", "rot")
    # a row's words do not depend on the rows around it
    half = Switching(dictionaries, p=0.5, seed=4)
    others = [PAIR, Candidate("two", PAIR.source, PAIR.target, {})]
    both = combine(others, ("ss", "tt"), ("en", "de"), WORDING, half)
    assert combine(others[::-1], ("tt", "ss"), ("en", "de"), WORDING, half)[::-1] == both
    assert combine([others[1]], ("tt",), ("en", "de"), WORDING, half) == [both[3]]


def test_translation_rows():
    rows = translation_rows([{"en": "A dog.", "de": "Ein Hund."}], ("en", "de"), WORDING)
    assert rows == [
        TrainingRow("parallel-0", "en-de", Instruction("Into German:", "A dog.", "Ein Hund.")),
        TrainingRow(
            "parallel-0", "de-en",
            Instruction("Translate the following text from German to English.", "Ein Hund.", "A dog."),
        ),
    ]  # fmt: skip


def test_round_trip_by_hand():
    """chrF2: means over character n-grams up to 6 that both sides have, recall four times precision's weight."""
    score = RoundTrip()
    texts = ["ab c", "ab", "red", "red", "red"]
    # "abc" and "abd": 2 of 3, 1 of 2, 0 of 1. "ab" and "abcd": precision (2/4 + 1/3) / 2 = 5/12, recall 1
    expected = [(2 / 3 + 1 / 2 + 0) / 3, 5 * (5 / 12) / (4 * 5 / 12 + 1), 1.0, 0.0, 0.0]
    assert score(texts, ["x", "x", "rot", "rot", " "], ["abd", "abcd", "red", "", "red"]) == pytest.approx(expected)


def test_filter_takes_the_worst_field_and_its_threshold():
    found = [
        PAIR,
        candidate("at", instruction=0.6, output=0.6),
        candidate("below", instruction=1.0, input=0.59999, output=1.0),
        candidate("untranslated"),
    ]
    assert PAIR.quality == 0.5 and found[3].quality is None
    good, counts = kept(found, 0.6)
    assert [c.id for c in good] == ["at"]
    assert counts == {"candidates": 4, "untranslated": 1, "below_tau": 2, "kept": 1}
    assert [c.id for c in kept(found, 0.5)[0]] == ["one", "at", "below"]
    assert kept(found, None)[1] == {"candidates": 4, "untranslated": 1, "below_tau": 0, "kept": 3}
    with pytest.raises(ValueError, match=r"quality\.tau must be in"):
        Quality(80.0)
    assert Quality(0.8, "comet_kiwi").about() != Quality(0.4).about() == Quality(0.8).about()


def test_comet_kiwi_is_asked_without_references(monkeypatch):
    from fused_kd.training.evaluation import comet

    seen = {}

    def scores(sources, hypotheses, references, **options):
        seen.update(options, texts=(sources, hypotheses))
        return comet.CometScores(0.5, (0.9, 0.1), options["model"])

    monkeypatch.setattr(comet, "comet_scores", scores)
    scorer = Quality(0.8, "comet_kiwi", python="other/python").make()
    assert scorer.needs_back is False and scorer(["a", "b"], ["c", "d"], []) == [0.9, 0.1]
    assert seen["texts"] == (["a", "b"], ["c", "d"]) and seen["python"] == "other/python"
    assert seen["model"] == "Unbabel/wmt22-cometkiwi-da"


def test_own_answers():
    tasks = [Task(str(n), "", {"en": Instruction("Q", str(n), "given")}) for n in range(4)]
    found, counts = answered(tasks, [" mine ", None, " ", "too"], "en")
    assert {name: i.output for name, i in found.items()} == {"0": "mine", "3": "too"}
    assert found["3"].input == "3" and counts == {"asked": 4, "unanswered": 2}


def test_fill_makes_counts_equal():
    for size in (3, 7, 10, 24):
        filled = fill(list(range(size)), 10, seed=1)
        times = Counter(filled)
        assert len(filled) == 10 and max(times.values()) - min([*times.values(), *([0] * (size > len(times)))]) <= 1
    assert fill(list(range(7)), 10, seed=1) == fill(list(range(7)), 10, seed=1) != fill(list(range(7)), 10, seed=2)
    with pytest.raises(ValueError, match="0 rows of 3"):
        fill([1, 2, 3], 0, seed=0)
    with pytest.raises(ValueError, match="5 rows of 0"):
        fill([], 5, seed=0)


@pytest.mark.parametrize("combinations", [(), ("ss", "ss"), ("ss", "xx")])
def test_bad_arms(combinations):
    with pytest.raises(ValueError, match="combinations="):
        Arm(combinations=combinations)


def test_prompts():
    assert render(Instruction("Which colour?", "A red dog.", "red"), "tiny") == "A red dog.\nWhich colour?\n"
    assert render(Instruction("Count.", "", "1"), "tiny") == "Count.\n"
    assert render(Instruction("Count.", "", "1"), "alpaca").endswith("### Instruction:\nCount.\n\n### Response:")


def test_scores_of_answers():
    def task(name: str, kind: str, de: str, en: str) -> Task:
        return Task(name, kind, {"de": Instruction("", name, de), "en": Instruction("", name, en)})

    tasks = [
        task("1", "colour", "rot", "red"),
        task("2", "colour", "blau", "blue"),
        task("3", "animal", "Hund", "dog"),
        task("4", "completion", "auf dem Gras.", "on the grass."),
        task("5", "colour", "rot", "red"),
        task("6", "colour", "rot", "red"),
    ]
    made = ["Rot.", "blue", " hund", "auf dem Gras.", "grün", "rot"]
    scores = score_answers(tasks, made, "de")
    # two of four colours, one of one animal: the mean over kinds
    assert scores["accuracy_by_kind"] == {"animal": 100.0, "colour": 50.0} and scores["accuracy"] == 75.0
    assert scores["elsewhere"] == 12.5 and scores["majority"] == pytest.approx((75 + 100) / 2)
    assert scores["chrf"] == pytest.approx(100) and scores["exact"] == 100 and scores["completions"] == 1
    plain = score_answers([tasks[3]._replace(kind="")], ["etwas anderes"], "de")
    assert plain["accuracy"] is None and plain["chrf"] < 30 and plain["questions"] == 0


@pytest.mark.parametrize(
    ("kind", "en", "de", "concept"),
    [
        ("colour", "A man in a red shirt.", "Ein Mann in einem roten Hemd.", "red"),
        ("colour", "A red and blue kite.", "Ein rot-blauer Drachen in Rot und Blau.", None),
        ("colour", "Red hats, red coats.", "Rote Hüte, rote Mäntel.", "red"),
        ("number", "Two boys run.", "Zwei Jungen rennen.", "two"),
        ("animal", "Dogs play.", "Hunde spielen.", "dog"),
        ("place", "People in the street.", "Leute auf der Straße.", "outdoors"),
        ("person", "A young woman.", "Eine junge Frau.", "woman"),  # "junge" is no boy
        ("person", "A boy.", "Ein Junge.", "boy"),
        ("person", "A man and a woman.", "Ein Mann und eine Frau.", None),
    ],
)
def test_what_captions_say(kind, en, de, concept):
    assert concept_of(kind, en, "en") == concept_of(kind, de, "de") == concept


def captions(count: int) -> list[dict[str, str]]:
    colours = [("red", "roten"), ("blue", "blauen"), ("green", "grünen")]
    animals = [("dog", "Hund"), ("dog", "Hund"), ("horse", "Pferd")]
    return [
        {
            "en": f"The {colours[n % 3][0]} {animals[n // 3 % 3][0]} number {n} is over there.",
            "de": f"Beim {colours[n % 3][1]} {animals[n // 3 % 3][1]} Nummer {n} sind wir jetzt.",
        }
        for n in range(count)
    ]


def test_tasks_are_asked_where_both_captions_agree():
    rows = [*captions(30), {"en": "A red dog and some more words here.", "de": "Ein blauer Hund und noch mehr Worte."}]
    tasks = make_tasks(rows, 9, 5, 0, ("en", "de"), "x")
    kinds = Counter(task.kind for task in tasks)
    assert kinds == {"colour": 9, "animal": 9, "completion": 5} and len({task.id for task in tasks}) == 23
    answers = Counter(t.texts["de"].output for t in tasks if t.kind == "animal")
    assert answers == {"Hund": 5, "Pferd": 4}  # drawn in turn, though dogs are twice as many
    assert set(Counter(t.texts["en"].output for t in tasks if t.kind == "colour").values()) == {3}
    for task in tasks:
        number = int(task.id.rsplit("-", 1)[1])
        for language in ("en", "de"):
            text = task.texts[language]
            if task.kind == "completion":
                assert f"{text.input} {text.output}" == rows[number][language] and len(text.input.split()) == 4
            else:
                assert text.input == rows[number][language]
        assert not (task.kind == "colour" and number == 30)
    assert make_tasks(rows, 9, 5, 0, ("en", "de"), "x") == tasks != make_tasks(rows, 9, 5, 1, ("en", "de"), "x")


def test_parts_of_a_study_share_no_captions(tmp_path):
    rows = captions(160)
    for name, part in (("train", rows[:100]), ("val", rows[100:130]), ("test_a", [*rows[130:], rows[0]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    settings = Captions(
        str(tmp_path), transfer=30, per_kind=10, completions=8, parallel=20, base_per_kind=50, base_completions=9,
        base_source=11, base_target=15, term_repeats=2, test_per_kind=40, test_completions=40, tests=("test_a",),
    )  # fmt: skip
    out = tmp_path / "out"
    counts = write_captions(out, settings, "en", "de")
    files = {name: [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()] for name in counts}
    assert counts["instructions"] + counts["validation"] == 28 and counts["validation"] == 3
    assert counts["parallel"] == 20 and counts["translator"] == 35 + 2 * (6 + 30)

    def numbers(name: str) -> set[int]:
        shown = [json.dumps(row) for row in files[name]]
        return {
            int(word) for row in shown for word in row.replace(".", " ").replace('"', " ").split() if word.isdigit()
        }

    transfer = numbers("instructions") | numbers("validation")
    groups = [transfer, numbers("parallel"), numbers("translator"), numbers("dev"), numbers("test")]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert 0 not in numbers("test") and len(numbers("test")) == 30  # row 0 is in train too
    plain = [row["output"] for row in files["base"] if not row["instruction"]]
    german = [text for text in plain if text.startswith("Beim")]
    assert len(plain) == 26 and len(german) == 15
    assert not {text.split()[4] for text in german} & {text.split()[4] for text in plain if text.startswith("The")}
    assert not any(row["output"] in ("Hund", "rot") for row in files["base"])  # no tasks in the target language
    with pytest.raises(ValueError, match="too few"):
        write_captions(out, Captions(str(tmp_path), transfer=90), "en", "de")
    with pytest.raises(ValueError, match=r"captions\.data=PATH"):
        write_captions(out, Captions("no/such/folder"), "en", "de")
    with pytest.raises(ValueError, match="two languages"):
        write_captions(out, settings, "en", "fr")
