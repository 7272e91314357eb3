"""A small English-German lexicon of what photograph captions name: colours, counts, animals, places and people.

Each concept has its words in both languages, in lower case and in every inflection that counts; the answer is given in
the first word of the language. German nouns keep their capital in ``ANSWERS`` alone.
"""

from __future__ import annotations

import re

# concept -> (English words, German words); the first word of each is the answer
_COLOURS = {
    "red": ("red", "rot rote roten roter rotes rotem"),
    "blue": ("blue", "blau blaue blauen blauer blaues blauem"),
    "white": ("white", "weiß weiße weißen weißer weißes weißem"),
    "black": ("black", "schwarz schwarze schwarzen schwarzer schwarzes schwarzem"),
    "green": ("green", "grün grüne grünen grüner grünes grünem"),
    "yellow": ("yellow", "gelb gelbe gelben gelber gelbes gelbem"),
    "brown": ("brown", "braun braune braunen brauner braunes braunem"),
    "orange": ("orange", "orange orangen oranger oranges orangem orangefarben orangefarbene orangefarbenen "
               "orangefarbener orangefarbenes orangefarbenem"),
    "pink": ("pink", "rosa rosafarben rosafarbene rosafarbenen rosafarbener rosafarbenes rosafarbenem pink pinke "
             "pinken pinker pinkes pinkem pinkfarbene pinkfarbenen"),
    "gray": ("gray grey", "grau graue grauen grauer graues grauem"),
    "purple": ("purple", "lila violett violette violetten violettes violettem lilafarbene lilafarbenen"),
}  # fmt: skip
_NUMBERS = {
    "two": ("two", "zwei beide beiden"),
    "three": ("three", "drei"),
    "four": ("four", "vier"),
    "five": ("five", "fünf"),
    "six": ("six", "sechs"),
}
_ANIMALS = {
    "dog": ("dog dogs puppy puppies", "Hund hunde hunden hundes welpe welpen"),
    "horse": ("horse horses", "Pferd pferde pferden pferdes"),
    "cat": ("cat cats kitten", "Katze katzen kätzchen"),
    "bird": ("bird birds pigeon pigeons", "Vogel vögel vögeln taube tauben"),
    "cow": ("cow cows bull bulls", "Kuh kühe kühen stier bulle bullen"),
    "sheep": ("sheep", "Schaf schafe schafen"),
}
_PLACES = {
    "outdoors": (
        "outdoors outside outdoor street beach grass grassy park field snow snowy mountain mountains hill river lake "
        "ocean sidewalk road forest woods sand trees garden",
        "draußen freien straße strand gras park feld schnee verschneiten verschneite berg bergen hügel fluss see meer "
        "ozean gehweg bürgersteig wald sand bäumen garten wiese",
    ),
    "indoors": (
        "indoors inside indoor room kitchen restaurant couch sofa bed bar classroom office living gym",
        "drinnen innen raum zimmer küche restaurant couch sofa bett bar klassenzimmer büro wohnzimmer turnhalle "
        "fitnessstudio",
    ),
}
_PEOPLE = {
    "man": ("man guy men guys", "Mann männer männern mannes"),
    "woman": ("woman lady women ladies", "Frau dame frauen damen"),
    "boy": ("boy boys", "Junge jungen jungs bub"),
    "girl": ("girl girls", "Mädchen"),
    "child": ("child children kid kids toddler toddlers", "Kind kinder kindern kleinkind kleinkinder"),
    "baby": ("baby babies", "Baby babys säugling"),
}
_TABLES = {"colour": _COLOURS, "number": _NUMBERS, "animal": _ANIMALS, "place": _PLACES, "person": _PEOPLE}
_SIDES = {"en": 0, "de": 1}

LANGUAGES = tuple(_SIDES)
KINDS = tuple(_TABLES)
QUESTIONS = {
    "colour": {"en": "Which colour is mentioned?", "de": "Welche Farbe wird genannt?"},
    "number": {"en": "How many are there?", "de": "Wie viele sind es?"},
    "animal": {"en": "Which animal is it?", "de": "Welches Tier ist es?"},
    "place": {"en": "Is it indoors or outdoors?", "de": "Ist es drinnen oder draußen?"},
    "person": {"en": "Who is in the picture?", "de": "Wer ist auf dem Bild?"},
}
COMPLETION = {"en": "Complete the caption.", "de": "Vervollständige die Bildbeschreibung."}
ANSWERS = {
    (kind, concept, language): words[side].split()[0]
    for kind, table in _TABLES.items()
    for concept, words in table.items()
    for language, side in _SIDES.items()
}
_CONCEPTS = {
    language: {
        kind: {word.lower(): concept for concept, words in table.items() for word in words[side].split()}
        for kind, table in _TABLES.items()
    }
    for language, side in _SIDES.items()
}
_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")


def words_of(caption: str, language: str) -> list[str]:
    """The words that are looked up, in lower case; the German adjective "jungen" (young) is none of them."""
    found = _WORD.findall(caption)
    if language == "de":  # a boy has a capital, the adjective has none
        found = [word for word in found if word not in ("jungen", "junge")]
    return [word.lower() for word in found]


def concept_of(kind: str, caption: str, language: str) -> str | None:
    """What a caption says of ``kind``: the one concept of it that is named, None where none is or several are."""
    table = _CONCEPTS[language][kind]
    named = {table[word] for word in words_of(caption, language) if word in table}
    return named.pop() if len(named) == 1 else None
