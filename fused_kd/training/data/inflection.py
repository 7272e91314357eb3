"""Forms and word order of the built-in corpus: noun phrases, verb groups and clauses, nothing random."""

from __future__ import annotations

from dataclasses import dataclass

from fused_kd.training.data import lexicon as lex

CASES = ("nom", "acc", "dat")

Endings = dict[str, tuple[str, str, str]]
# endings by gender, in the order of CASES
STRONG: Endings = {
    "m": ("er", "en", "em"),
    "f": ("e", "e", "er"),
    "n": ("es", "es", "em"),
    "pl": ("e", "e", "en"),
}
WEAK: Endings = {
    "m": ("e", "en", "en"),
    "f": ("e", "e", "en"),
    "n": ("e", "e", "en"),
    "pl": ("en", "en", "en"),
}
MIXED: Endings = {
    "m": ("er", "en", "en"),
    "f": ("e", "e", "en"),
    "n": ("es", "es", "en"),
    "pl": ("en", "en", "en"),
}
EIN: Endings = {"m": ("", "en", "em"), "f": ("e", "e", "er"), "n": ("", "", "em"), "pl": ("e", "e", "en")}
BARE: Endings = dict.fromkeys(STRONG, ("", "", ""))
THE: Endings = {
    "m": ("der", "den", "dem"), "f": ("die", "die", "der"),
    "n": ("das", "das", "dem"), "pl": ("die", "die", "den"),
}  # fmt: skip
_CONTRACTED = {"in dem": "im", "in das": "ins", "an dem": "am", "zu dem": "zum", "zu der": "zur"}
_PRETERITE = {"sein": ("war", "war", "waren"), "haben": ("hatte", "hatte", "hatten")}
_HELPERS = {
    "haben": ("habe", "hat", "haben"),
    "sein": ("bin", "ist", "sind"),
    "werden": ("werde", "wird", "werden"),
}


@dataclass(frozen=True)
class Determiner:
    """English word, German stem and its endings, and the endings of an adjective behind it."""

    en: str
    stem: str
    articles: Endings
    endings: Endings
    kein: bool = False


@dataclass(frozen=True)
class Phrase:
    """A noun phrase: English as subject and object, German by case.

    `person` is 1sg, 3sg, 1pl or 3pl; `gender` m, f, n, pl or empty for names; `kein`: it carries the
    negation.
    """

    en: str
    en_object: str
    de: dict[str, str]
    person: str
    gender: str
    tags: frozenset[str]
    pronoun: bool = False
    kein: bool = False
    relative: bool = False


def _pronoun(en: str, en_object: str, forms: str, person: str, gender: str) -> Phrase:
    de = dict(zip(CASES, forms.split(), strict=True))
    return Phrase(en, en_object, de, person, gender, frozenset({"person"}), pronoun=True)


PRONOUNS = (
    _pronoun("I", "me", "ich mich mir", "1sg", "m"),
    _pronoun("we", "us", "wir uns uns", "1pl", "pl"),
    _pronoun("he", "him", "er ihn ihm", "3sg", "m"),
    _pronoun("she", "her", "sie sie ihr", "3sg", "f"),
    _pronoun("they", "them", "sie sie ihnen", "3pl", "pl"),
)


@dataclass(frozen=True)
class Clause:
    """A clause before its order is fixed.

    English: auxiliary (may be empty), do-support, finite form without auxiliary, base form behind one, and
    the rest. German: finite form, separable prefix, pronoun objects, what stands between the verb's parts,
    and its last part (participle or infinitive). A time adverbial is kept apart, as it may open the sentence.
    """

    subject: Phrase
    en_aux: str
    en_do: str
    en_finite: str
    en_base: str
    de_finite: str
    de_prefix: str
    de_end: str
    en_rest: str = ""
    de_pronouns: str = ""
    de_middle: str = ""
    en_frequency: str = ""
    en_time: str = ""
    de_time: str = ""
    negated: bool = False

    def en(self, *, time: bool = True) -> str:
        """Statement; without the time adverbial where that opens the sentence."""
        if self.negated:
            helper = self.en_aux or self.en_do
            verb = join("cannot" if helper == "can" else f"{helper} not", self.en_base)
        elif self.en_aux:
            verb = join(self.en_aux, self.en_frequency, self.en_base)
        else:
            verb = join(self.en_frequency, self.en_finite)
        return join(self.subject.en, verb, self.en_rest, self.en_time if time else "")

    def en_question(self) -> str:
        return join(self.en_aux or self.en_do, self.subject.en, self.en_base, self.en_rest, self.en_time)

    def _middle(self, time: bool = True) -> str:
        return join(self.de_pronouns, self.de_time if time else "", self.de_middle)

    def de(self) -> str:
        """Verb second, behind the subject."""
        return join(self.subject.de["nom"], self.de_finite, self._middle(), self.de_end, self.de_prefix)

    def de_inverted(self, *, time: bool = True) -> str:
        """Verb before the subject: behind an adverbial, a subordinate clause or a question word."""
        return join(self.de_finite, self.subject.de["nom"], self._middle(time), self.de_end, self.de_prefix)

    def de_final(self) -> str:
        """Verb last: subordinate and relative clauses."""
        return join(self.subject.de["nom"], self._middle(), self.de_end, self.de_prefix + self.de_finite)


def join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def third_person(verb: str) -> str:
    """Third person singular of the first word: looks for, tidies up, goes."""
    head, space, tail = verb.partition(" ")
    if head == "have":
        head = "has"
    elif head.endswith(("s", "sh", "ch", "x", "o")):
        head += "es"
    elif head.endswith("y") and head[-2] not in "aeiou":
        head = head[:-1] + "ies"
    else:
        head += "s"
    return head + space + tail


def contract(preposition: str, phrase: str) -> str:
    """A preposition and its phrase, with im, ins, am, zum, zur."""
    text = f"{preposition} {phrase}"
    head = " ".join(text.split(" ", 2)[:2])
    return _CONTRACTED[head] + text[len(head) :] if head in _CONTRACTED else text


def noun_phrase(noun: lex.Noun, determiner: Determiner, adjective: lex.Adjective | None, *, plural: bool) -> Phrase:
    """Determiner, adjective and noun in every case."""
    gender = "pl" if plural else noun.gender
    english = join(adjective.en if adjective else "", noun.plural if plural else noun.en)
    article = "an" if determiner.en == "a" and english[0] in "aeiou" else determiner.en
    de = {}
    for index, case in enumerate(CASES):
        if plural:
            word = noun.de_plural
            if case == "dat" and not word.endswith(("n", "s")):
                word += "n"
        else:
            word = noun.oblique or noun.de if case != "nom" else noun.de
        attribute = adjective.stem + determiner.endings[gender][index] if adjective else ""
        de[case] = join(determiner.stem + determiner.articles[gender][index], attribute, word)
    text = join(article, english)
    return Phrase(text, text, de, "3pl" if plural else "3sg", gender, noun.tags, kein=determiner.kein)


def name_phrase(*names: str) -> Phrase:
    """One name, or several joined by and (a subject only)."""
    if len(names) == 1:
        return Phrase(names[0], names[0], dict.fromkeys(CASES, names[0]), "3sg", "", frozenset({"person"}))
    return Phrase(" and ".join(names), "", {"nom": " und ".join(names)}, "3pl", "", frozenset({"person"}))


def relative_pronoun(head: Phrase) -> Phrase:
    person = "person" in head.tags
    return Phrase(
        "who" if person else "that", "", {"nom": THE[head.gender][0]}, head.person, head.gender,
        frozenset({"person" if person else "animal"}), pronoun=True,
    )  # fmt: skip


def inflect(subject: Phrase, verb: lex.Verb, tense: str, modal: lex.Modal | None = None) -> Clause:
    """Subject and verb group. The English simple past is the German perfect, but war and hatte."""
    form = 0 if subject.person == "1sg" else 1 if subject.person == "3sg" else 2
    be = verb.de == "sein"
    aux = finite = prefix = end = ""
    base = verb.en
    if modal is not None:
        head, _, to = modal.en.partition(" ")
        base = join(modal.en if modal.support else to, verb.en)
        aux = "" if modal.support else head
        finite = third_person(base) if form == 1 else base
        de_finite, end = modal.plural if form == 2 else modal.de, verb.infinitive
    elif tense == "future":
        aux = "will"
        de_finite, end = _HELPERS["werden"][form], verb.infinitive
    elif tense == "past":
        finite = verb.past
        if be:
            aux, base = ("were" if form == 2 else "was"), ""
        if verb.de in _PRETERITE:
            de_finite = _PRETERITE[verb.de][form]
        else:
            de_finite, end = _HELPERS[verb.aux][form], verb.participle
    else:
        finite = third_person(verb.en) if form == 1 else verb.en
        if be:
            aux, base = ("am", "is", "are")[form], ""
        de_finite = (verb.ich, verb.er, "sind" if be else verb.de)[form]
        prefix = verb.prefix
    do = "did" if tense == "past" else "does" if form == 1 else "do"
    return Clause(subject, aux, do, finite, base, de_finite, prefix, end)
