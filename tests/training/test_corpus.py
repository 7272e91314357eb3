"""The built-in corpus: grammar of both sides, determinism, disjoint splits."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import cache
from itertools import islice, pairwise

import pytest

from fused_kd.training.data import lexicon as lex
from fused_kd.training.data.corpus import SIZES, toy_corpus
from fused_kd.training.data.grammar import sentences
from fused_kd.training.data.inflection import (
    BARE,
    EIN,
    MIXED,
    PRONOUNS,
    STRONG,
    THE,
    WEAK,
    Determiner,
    Phrase,
    contract,
    inflect,
    name_phrase,
    noun_phrase,
    relative_pronoun,
    third_person,
)

A = Determiner("a", "ein", EIN, MIXED)
NO = Determiner("a", "kein", EIN, MIXED, kein=True)
MY = Determiner("my", "mein", EIN, MIXED)
OUR = Determiner("our", "unser", EIN, MIXED)
DEF = Determiner("the", "", THE, WEAK)
THIS = Determiner("this", "dies", STRONG, WEAK)
TWO = Determiner("two", "zwei", BARE, STRONG)
MANY = Determiner("many", "viel", STRONG, STRONG)
ZERO = Determiner("", "", BARE, STRONG)
ANNAS = Determiner("Anna's", "Annas", BARE, STRONG)


def noun(en: str) -> lex.Noun:
    return next(n for n in lex.NOUNS if n.en == en)


def verb(en: str) -> lex.Verb:
    return next(v for v in lex.VERBS if v.en == en)


@cache
def train() -> list[dict[str, str]]:
    return toy_corpus("train", 20_000)


def np(determiner: Determiner, english: str, adjective: str = "", *, plural: bool = False) -> Phrase:
    word = next(a for a in lex.ADJECTIVES if a.en == adjective) if adjective else None
    return noun_phrase(noun(english), determiner, word, plural=plural)


def pronoun(en: str) -> Phrase:
    return next(p for p in PRONOUNS if p.en == en)


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        (np(DEF, "man"), "the man|der Mann|den Mann|dem Mann"),
        (np(DEF, "woman", "old"), "the old woman|die alte Frau|die alte Frau|der alten Frau"),
        (np(DEF, "child", "old"), "the old child|das alte Kind|das alte Kind|dem alten Kind"),
        (np(A, "apple"), "an apple|ein Apfel|einen Apfel|einem Apfel"),
        (np(A, "dog", "old"), "an old dog|ein alter Hund|einen alten Hund|einem alten Hund"),
        (np(A, "house", "dark"), "a dark house|ein dunkles Haus|ein dunkles Haus|einem dunklen Haus"),
        (np(A, "cat", "tired"), "a tired cat|eine müde Katze|eine müde Katze|einer müden Katze"),
        (np(A, "boy"), "a boy|ein Junge|einen Jungen|einem Jungen"),
        (
            np(DEF, "student", "clever"),
            "the clever student|der kluge Student|den klugen Studenten|dem klugen Studenten",
        ),
        (
            np(OUR, "car", "expensive"),
            "our expensive car|unser teures Auto|unser teures Auto|unserem teuren Auto",
        ),
        (np(MY, "flower", plural=True), "my flowers|meine Blumen|meine Blumen|meinen Blumen"),
        (np(DEF, "child", plural=True), "the children|die Kinder|die Kinder|den Kindern"),
        (np(DEF, "car", plural=True), "the cars|die Autos|die Autos|den Autos"),
        (
            np(TWO, "mouse", "small", plural=True),
            "two small mice|zwei kleine Mäuse|zwei kleine Mäuse|zwei kleinen Mäusen",
        ),
        (
            np(MANY, "knife", "new", plural=True),
            "many new knives|viele neue Messer|viele neue Messer|vielen neuen Messern",
        ),
        (np(THIS, "hat", "red"), "this red hat|dieser rote Hut|diesen roten Hut|diesem roten Hut"),
        (np(ZERO, "milk", "cold"), "cold milk|kalte Milch|kalte Milch|kalter Milch"),
        (np(ZERO, "coffee", "warm"), "warm coffee|warmer Kaffee|warmen Kaffee|warmem Kaffee"),
        (np(ANNAS, "dog", "big"), "Anna's big dog|Annas großer Hund|Annas großen Hund|Annas großem Hund"),
    ],
    ids=lambda value: value.split("|")[1] if isinstance(value, str) else "",
)
def test_noun_phrases_agree_in_gender_case_and_number(phrase: Phrase, expected: str) -> None:
    assert "|".join([phrase.en, *phrase.de.values()]) == expected


def test_contractions_and_third_person() -> None:
    assert contract("in", "dem Garten") == "im Garten"
    assert contract("in", "das alte Haus") == "ins alte Haus"
    assert contract("in", "diesem Garten") == "in diesem Garten"
    assert contract("zu", "der Brücke") == "zur Brücke"
    assert contract("in", "der Stadt") == "in der Stadt"
    verbs = ["look for", "tidy up", "go out", "wash", "play", "have", "cry", "get up"]
    expected = ["looks for", "tidies up", "goes out", "washes", "plays", "has", "cries", "gets up"]
    assert [third_person(v) for v in verbs] == expected


def test_word_order_of_a_separable_verb() -> None:
    clause = replace(
        inflect(np(DEF, "man"), verb("call"), "present"),
        en_rest="the boy",
        de_middle="den Jungen",
        en_time="today",
        de_time="heute",
    )
    assert clause.en() == "the man calls the boy today"
    assert clause.de() == "der Mann ruft heute den Jungen an"
    assert clause.en_question() == "does the man call the boy today"
    assert clause.de_inverted(time=False) == "ruft der Mann den Jungen an"
    assert clause.de_final() == "der Mann heute den Jungen anruft"


@pytest.mark.parametrize(
    ("subject", "word", "tense", "modal", "english", "german", "final"),
    [
        (np(DEF, "man"), "see", "past", "", "the man saw", "der Mann hat gesehen", "der Mann gesehen hat"),
        (pronoun("I"), "get up", "past", "", "I got up", "ich bin aufgestanden", "ich aufgestanden bin"),
        (pronoun("they"), "go", "past", "", "they went", "sie sind gegangen", "sie gegangen sind"),
        (pronoun("we"), "be", "past", "", "we were", "wir waren", "wir waren"),
        (pronoun("I"), "be", "present", "", "I am", "ich bin", "ich bin"),
        (pronoun("she"), "have", "past", "", "she had", "sie hatte", "sie hatte"),
        (pronoun("he"), "wear", "present", "", "he wears", "er trägt", "er trägt"),
        (pronoun("I"), "feed", "present", "", "I feed", "ich füttere", "ich füttere"),
        (pronoun("he"), "sleep", "future", "", "he will sleep", "er wird schlafen", "er schlafen wird"),
        (pronoun("they"), "be", "future", "", "they will be", "sie werden sein", "sie sein werden"),
        (
            pronoun("she"),
            "call",
            "modal",
            "want to",
            "she wants to call",
            "sie will anrufen",
            "sie anrufen will",
        ),
        (pronoun("I"), "work", "modal", "can", "I can work", "ich kann arbeiten", "ich arbeiten kann"),
        (pronoun("we"), "sing", "modal", "must", "we must sing", "wir müssen singen", "wir singen müssen"),
        (
            name_phrase("Anna", "Paul"),
            "dance",
            "modal",
            "would like to",
            "Anna and Paul would like to dance",
            "Anna und Paul möchten tanzen",
            "Anna und Paul tanzen möchten",
        ),
    ],
)
def test_verb_groups(subject: Phrase, word: str, tense: str, modal: str, english: str, german: str, final: str) -> None:
    chosen = next((m for m in lex.MODALS if m.en == modal), None)
    clause = inflect(subject, verb(word), tense, chosen)
    assert (clause.en(), clause.de(), clause.de_final()) == (english, german, final)


def test_negation_and_questions() -> None:
    slept = replace(inflect(pronoun("he"), verb("sleep"), "past"), negated=True, de_middle="nicht")
    assert (slept.en(), slept.de()) == ("he did not sleep", "er hat nicht geschlafen")
    can = next(m for m in lex.MODALS if m.en == "can")
    able = replace(inflect(pronoun("we"), verb("come"), "modal", can), negated=True, de_middle="nicht")
    assert (able.en(), able.de()) == ("we cannot come", "wir können nicht kommen")
    old = replace(inflect(np(DEF, "house"), verb("be"), "present"), en_rest="old", de_middle="alt")
    assert (old.en_question(), old.de_inverted()) == ("is the house old", "ist das Haus alt")
    hungry = replace(old, negated=True, de_middle="nicht alt")
    assert hungry.en() == "the house is not old"
    assert np(NO, "book").de["acc"] == "kein Buch"


def test_relative_pronouns_agree_with_the_head() -> None:
    heads = [np(DEF, "man"), np(DEF, "woman"), np(DEF, "girl"), np(DEF, "dog"), np(DEF, "man", plural=True)]
    assert [relative_pronoun(head).de["nom"] for head in heads] == ["der", "die", "das", "der", "die"]
    assert [relative_pronoun(head).en for head in heads] == ["who", "who", "who", "that", "who"]


# checked by hand; each shows one structure, German below English
EXPECTED = """
The teacher believes that she would like to help the rabbit.
    Der Lehrer glaubt, dass sie dem Kaninchen helfen möchte.
He can visit Martin because she does not want to cry.
    Er kann Martin besuchen, weil sie nicht weinen will.
If a happy queen closes doors, a doctor arrives.
    Wenn eine glückliche Königin Türen zumacht, kommt ein Arzt an.
Although David tidied up five rooms, they forget the hats.
    Obwohl David fünf Zimmer aufgeräumt hat, vergessen sie die Hüte.
The king must laugh, but she will have two chairs.
    Der König muss lachen, aber sie wird zwei Stühle haben.
The funny neighbour does not need a ball.
    Der lustige Nachbar braucht keinen Ball.
I do not feed pigs.
    Ich füttere keine Schweine.
The woman says that the mother will not open a door.
    Die Frau sagt, dass die Mutter keine Tür aufmachen wird.
The farmer who worked did not close the door.
    Der Bauer, der gearbeitet hat, hat die Tür nicht zugemacht.
The aunt always puts on the white shoe.
    Die Tante zieht immer den weißen Schuh an.
Did two kings listen to a child?
    Haben zwei Könige einem Kind zugehört?
Would the sister like to help us?
    Möchte die Schwester uns helfen?
Why did the tired queen go out in the morning?
    Warum ist die müde Königin am Morgen ausgegangen?
A cup was more expensive than a big box.
    Eine Tasse war teurer als eine große Kiste.
Laura's expensive hat is older than the big shoes.
    Lauras teurer Hut ist älter als die großen Schuhe.
Two teachers who picked up a doctor closed a door.
    Zwei Lehrer, die einen Arzt abgeholt haben, haben eine Tür zugemacht.
A cat that fell asleep will sleep in the kitchen.
    Eine Katze, die eingeschlafen ist, wird in der Küche schlafen.
Yesterday we heard him in the church.
    Gestern haben wir ihn in der Kirche gehört.
Five men may give the boys rice.
    Fünf Männer dürfen den Jungen Reis geben.
He did not tell the aunt stories.
    Er hat der Tante keine Geschichten erzählt.
The teacher will not run to Anna's garden.
    Der Lehrer wird nicht zu Annas Garten laufen.
The uncles play with Martin in Laura's famous city.
    Die Onkel spielen mit Martin in Lauras berühmter Stadt.
Tomorrow a boy will tell the queen the story.
    Morgen wird ein Junge der Königin die Geschichte erzählen.
Nina and Simon go into the house because he played.
    Nina und Simon gehen ins Haus, weil er gespielt hat.
Today I can buy three black beds.
    Heute kann ich drei schwarze Betten kaufen.
I would like to run to the river.
    Ich möchte zum Fluss laufen.
Next week the funny queen will arrive in the garden.
    Nächste Woche wird die lustige Königin im Garten ankommen.
"""


def test_hand_checked_sentences_are_in_the_corpus() -> None:
    rows = {row["en"]: row["de"] for row in train()}
    lines = EXPECTED.strip().splitlines()
    for english, german in zip(lines[::2], lines[1::2], strict=True):
        assert rows.get(english) == german.strip()


def test_spelling_articles_and_contractions() -> None:
    for row in train():
        words = row["de"].rstrip(".?").replace(",", "").split()
        assert "  " not in row["de"] + row["en"]
        assert row["en"][0].isupper() and row["de"][0].isupper()
        assert row["en"][-1] == row["de"][-1] and row["en"][-1] in ".?"
        assert not {"in dem", "in das", "an dem", "zu dem", "zu der"} & {f"{a} {b}" for a, b in pairwise(words)}
        english = row["en"].rstrip(".?").replace(",", "").split()
        for article, word in pairwise(english):
            if article.lower() in ("a", "an"):
                assert (article.lower() == "an") == (word[0] in "aeiou"), row["en"]


def test_subordinate_clauses_end_with_their_verb() -> None:
    finite = {v.prefix + form for v in lex.VERBS for form in (v.ich, v.er, v.de)} | {m.de for m in lex.MODALS}
    finite |= {m.plural for m in lex.MODALS} | {
        "war",
        "waren",
        "hatte",
        "hatten",
        "sind",
        "habe",
        "hat",
        "haben",
    }
    finite |= {"werde", "wird", "werden", "bin", "ist"}
    seen = 0
    for row in train()[:5_000]:
        if ", dass " in row["de"] or ", weil " in row["de"] or ", obwohl " in row["de"]:
            seen += 1
            assert row["de"].rstrip(".").split()[-1] in finite, row["de"]
    assert seen > 300


def test_lexicon_is_large_and_every_word_appears() -> None:
    bases = [*(verb.infinitive for verb in lex.VERBS), *(modal.de for modal in lex.MODALS)]
    bases += [word.de for words in (lex.NOUNS, lex.ADJECTIVES, lex.ADVERBS) for word in words]
    assert len(set(bases)) == len(bases) >= 150
    used = set().union(*(content for _, _, content in islice(sentences(0), 20_000)))
    assert set(bases) - {modal.de for modal in lex.MODALS} | set(lex.NAMES) == used

    german = {word.strip(".,?").lower() for row in train() for word in row["de"].split()}
    english = {word.strip(".,?").lower() for row in train() for word in row["en"].split()}
    for noun in lex.NOUNS:
        assert {noun.de.lower(), noun.de_plural.lower()} - {""} <= german
        assert {noun.en, noun.plural} - {""} <= english
    for modal in lex.MODALS:
        assert {modal.de, modal.plural} <= german
    # stative verbs, verbs of saying and those like "put on" have no past here
    told = [verb for verb in lex.VERBS if not verb.stative and verb.frame != "that" and verb.past != verb.en]
    assert len(told) > 50
    assert {verb.participle for verb in told if verb.de not in ("sein", "haben")} <= german


def test_rows_are_deterministic_and_prefixes_of_larger_sizes() -> None:
    for split in SIZES:
        rows = toy_corpus(split, 300)
        assert rows == toy_corpus(split, 300) == toy_corpus(split, 500)[:300]
        assert len(rows) == 300
    assert toy_corpus("train", 100, seed=1) != toy_corpus("train", 100)
    # a change of the corpus changes every recorded result: make it on purpose
    text = json.dumps(train()[:1_000], sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "48ef7ec77d37cd69"


def test_splits_are_disjoint_on_both_sides_for_all_seeds() -> None:
    rows = {
        "train": [*train(), *toy_corpus("train", 5_000, seed=1)],
        "valid": [*toy_corpus("valid"), *toy_corpus("valid", 300, seed=2)],
        "test": [*toy_corpus("test"), *toy_corpus("test", 300, seed=3)],
    }
    for side in ("en", "de"):
        texts = {split: {row[side] for row in part} for split, part in rows.items()}
        assert not texts["train"] & texts["valid"]
        assert not texts["train"] & texts["test"]
        assert not texts["valid"] & texts["test"]
    # nor are test sentences with other articles or tenses
    content = {de: words for _, de, words in islice(sentences(0), 30_000)}
    known = {split: {content[row["de"]] for row in part if row["de"] in content} for split, part in rows.items()}
    assert known["test"] and not known["train"] & known["test"] and not known["train"] & known["valid"]


def test_one_reference_a_sentence_in_both_directions() -> None:
    to_german: dict[str, str] = {}
    to_english: dict[str, str] = {}
    for en, de, _ in islice(sentences(3), 30_000):
        assert to_german.setdefault(en, de) == de
        assert to_english.setdefault(de, en) == en


def test_default_sizes_and_variety() -> None:
    rows = train()
    assert rows == toy_corpus("train")
    assert len(rows) == SIZES["train"] == len({row["en"] for row in rows}) == len({row["de"] for row in rows})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"split": "dev"}, ValueError, "train, valid, test"),
        ({"split": "train", "size": 0}, ValueError, "size=0"),
        ({"split": "train", "size": 2_000_000}, ValueError, "1000000"),
        ({"split": "train", "size": 1.5}, TypeError, "size"),
        ({"split": "train", "size": 5, "seed": "x"}, TypeError, "seed"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        toy_corpus(**arguments)
