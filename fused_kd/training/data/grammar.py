"""Draws sentences of the built-in corpus: which words and structures, in English and German at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import TypeVar

from fused_kd.training.data import lexicon as lex
from fused_kd.training.data.inflection import (
    BARE,
    EIN,
    MIXED,
    PRONOUNS,
    STRONG,
    THE,
    WEAK,
    Clause,
    Determiner,
    Phrase,
    contract,
    inflect,
    join,
    name_phrase,
    noun_phrase,
    relative_pronoun,
)

_T = TypeVar("_T")
_W = TypeVar("_W", lex.Noun, lex.Verb, lex.Adjective, lex.Adverb, str)

_TENSES = ("present", "present", "past", "past", "modal", "modal", "future")
_PERSON = frozenset({"person"})
_BE = next(verb for verb in lex.VERBS if verb.de == "sein")
_BE_ADJECTIVE = ("person", "person", "animal", "thing", "clothes", "vehicle", "place", "drink", "food")
_BE_PLACE = frozenset({"person", "animal", "vehicle"})
_COMPARED = ("person", "animal", "thing", "vehicle", "clothes")
_SAYING = tuple(verb for verb in lex.VERBS if verb.frame == "that")
# adjectives live on copula clauses: draw them more often than one verb of sixty
_DOING = tuple(verb for verb in lex.VERBS if verb.frame != "that") + (_BE,) * 4
_RELATIVE = {frozenset({tag}): tuple(verb for verb in _DOING if tag in verb.subjects) for tag in ("person", "animal")}


class _DeadEnd(Exception):
    """No word is left that fits; the sentence is drawn anew."""


def sentences(seed: int) -> Iterator[tuple[str, str, frozenset[str]]]:
    """Endless English-German pairs, each with its content words (German base forms)."""
    draw = _Draw(seed)
    while True:
        en, de = draw.sentence()
        de = de.replace(",,", ",").replace(",.", ".").replace(",?", "?")
        yield en[0].upper() + en[1:], de[0].upper() + de[1:], frozenset(draw.used)


def _key(word: lex.Noun | lex.Verb | lex.Adjective | lex.Adverb | str) -> str:
    if isinstance(word, lex.Verb):
        return word.infinitive
    return word if isinstance(word, str) else word.de


@cache
def _nouns(tags: frozenset[str], mass: bool) -> tuple[lex.Noun, ...]:
    return tuple(noun for noun in lex.NOUNS if noun.tags & tags and (mass or noun.plural))


@cache
def _adjectives(tags: frozenset[str], comparative: bool) -> tuple[lex.Adjective, ...]:
    return tuple(a for a in lex.ADJECTIVES if a.tags & tags and (a.comparative or not comparative))


@cache
def _adverbs(tense: str, frequency: bool) -> tuple[lex.Adverb, ...]:
    # a modal is present in tense, but often and can fight over scope
    tenses = ("any", "present" if tense == "modal" else tense)
    frequency = frequency and tense != "modal"
    return tuple(a for a in lex.ADVERBS if a.tense in tenses and (frequency or a.kind == "time"))


class _Draw:
    """The random choices; `used` holds the content words of the current sentence, none of them twice.

    Whatever is in `used` must be in the sentence: the split is told by it.
    """

    def __init__(self, seed: int) -> None:
        # random() is the one method whose sequence Python promises to keep
        self.random: Callable[[], float] = random.Random(seed).random
        self.used: list[str] = []

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def pick(self, choices: Sequence[_T]) -> _T:
        return choices[int(self.random() * len(choices))]

    def word(self, choices: Sequence[_W]) -> _W:
        """A lexeme that the sentence does not have yet."""
        free = [choice for choice in choices if _key(choice) not in self.used]
        if not free:
            raise _DeadEnd
        choice = self.pick(free)
        self.used.append(_key(choice))
        return choice

    # sentences

    def sentence(self) -> tuple[str, str]:
        makers = (self.statement,) * 11 + (self.question,) * 2 + (self.subordinate,) * 3 + (self.that,) * 2
        maker = self.pick((*makers, self.but, self.comparison))
        while True:
            self.used.clear()
            try:
                return maker()
            except _DeadEnd:
                continue

    def statement(self) -> tuple[str, str]:
        clause = self.clause(relative=0.12)
        if not clause.en_time or self.chance(0.5):
            return clause.en() + ".", clause.de() + "."
        en = f"{clause.en_time} {clause.en(time=False)}."
        return en, f"{clause.de_time} {clause.de_inverted(time=False)}."

    def question(self) -> tuple[str, str]:
        clause = self.clause(negation=0.0, frequency=False)
        asked = [("", ""), ("", ""), ("why", "warum")]
        if not clause.en_time:
            asked.append(("when", "wann"))
        en, de = self.pick(asked)
        return join(en, clause.en_question()) + "?", join(de, clause.de_inverted()) + "?"

    def subordinate(self) -> tuple[str, str]:
        en, de = self.pick(lex.CONJUNCTIONS)
        tenses = ("present",) if en == "if" else ("present", "past", "modal")
        # "did not ... because" could deny the reason in English
        main = self.clause(tenses=tenses, negation=0.0, simple=True)
        side = self.clause(tenses=tenses, simple=True)
        if self.chance(0.5):
            return f"{en} {side.en()}, {main.en()}.", f"{de} {side.de_final()}, {main.de_inverted()}."
        return f"{main.en()} {en} {side.en()}.", f"{main.de()}, {de} {side.de_final()}."

    def that(self) -> tuple[str, str]:
        main = inflect(self.subject(_PERSON), self.word(_SAYING), "present")
        side = self.clause(simple=True)
        return f"{main.en()} that {side.en()}.", f"{main.de()}, dass {side.de_final()}."

    def but(self) -> tuple[str, str]:
        first, second = self.clause(simple=True), self.clause(simple=True)
        return f"{first.en()}, but {second.en()}.", f"{first.de()}, aber {second.de()}."

    def comparison(self) -> tuple[str, str]:
        tags = frozenset({self.pick(_COMPARED)})
        subject = self.subject(tags)
        adjective = self.word(_adjectives(tags, True))
        other = self.subject(tags, pronouns=False)
        clause = replace(
            inflect(subject, _BE, self.pick(("present", "past"))),
            en_rest=f"{adjective.comparative} than {other.en}",
            de_middle=f"{adjective.de_comparative} als {other.de['nom']}",
        )
        return clause.en() + ".", clause.de() + "."

    # clauses

    def clause(
        self,
        *,
        tenses: Sequence[str] = _TENSES,
        negation: float = 0.15,
        relative: float = 0.0,
        simple: bool = False,
        frequency: bool = True,
        subject: Phrase | None = None,
    ) -> Clause:
        """Any clause but those of saying. `simple` keeps it short, `subject` makes it relative."""
        verb = self.word(_DOING if subject is None else _RELATIVE[subject.tags])
        tense = "present" if verb.stative else self.pick(tenses)
        if (tense == "past" and verb.past == verb.en) or (tense == "modal" and verb.frame in ("lie", "be")):
            tense = "present"
        modal = self.pick(lex.MODALS) if tense == "modal" else None
        negated = self.chance(negation) and (modal is None or modal.negatable)

        adjective = None
        described = verb is _BE and (subject is not None or self.chance(0.7))
        if subject is None:
            tags = _BE_PLACE if verb is _BE else verb.subjects
            tags = frozenset({self.pick(_BE_ADJECTIVE)}) if described else tags
            subject = self.subject(tags, negated=negated, mass=described)
        if described:
            adjective = self.word(_adjectives(subject.tags, False))
        if relative and subject.gender and not subject.pronoun and subject.tags & {"person", "animal"}:
            subject = self.relative(subject) if self.chance(relative) else subject

        objects = self.objects(verb, subject, negated)
        nicht = "nicht" if negated and not any(phrase.kein for phrase, _ in objects) else ""
        if adjective is not None:
            en_rest, de_rest = adjective.en, adjective.de
        elif verb.frame in ("go", "to", "lie", "be"):
            en_rest, de_rest = self.direction(verb)
        else:
            en_rest, de_rest = self.adjuncts(verb, subject, 0.4 if simple else 1.0)
        clause = replace(
            inflect(subject, verb, tense, modal),
            en_rest=join(*(phrase.en_object for phrase, _ in objects), en_rest),
            de_pronouns=join(*(phrase.de[case] for phrase, case in objects if phrase.pronoun)),
            de_middle=join(*(phrase.de[case] for phrase, case in objects if not phrase.pronoun), nicht, de_rest),
            negated=negated,
        )
        if verb.stative or not self.chance(0.2 if simple else 0.4):
            return clause
        # behind a relative clause "always" could belong to either verb
        frequency = frequency and not (negated or subject.relative or subject.en.startswith("every "))
        # "not ... every day" has another scope in German
        adverb = self.word(_adverbs("any" if negated and tense in ("present", "modal") else tense, frequency))
        if adverb.kind == "time":
            return replace(clause, en_time=adverb.en, de_time=adverb.de)
        return replace(clause, en_frequency=adverb.en, de_middle=join(adverb.de, clause.de_middle))

    def objects(self, verb: lex.Verb, subject: Phrase, negated: bool) -> list[tuple[Phrase, str]]:
        """Objects with their cases, in the order of both languages."""
        if verb.frame == "dat":
            return [(self.object(verb, subject, negated=False, definite=negated), "dat")]
        if verb.frame == "acc":
            return [(self.object(verb, subject, negated=negated), "acc")]
        if verb.frame == "give":
            pronoun = self.chance(0.3)
            receiver = self.object_pronoun(subject) if pronoun else self.phrase(_PERSON, definite=True)
            return [(receiver, "dat"), (self.phrase(verb.objects, negated=negated), "acc")]
        return []

    def object(self, verb: lex.Verb, subject: Phrase, *, negated: bool, definite: bool = False) -> Phrase:
        if verb.pronoun and self.chance(0.25):
            return self.object_pronoun(subject)
        if "person" in verb.objects and self.chance(0.15):
            return name_phrase(self.word(lex.NAMES))
        return self.phrase(verb.objects, negated=negated, definite=definite)

    def object_pronoun(self, subject: Phrase) -> Phrase:
        """No reflexives, and no them: German has one word for it and for her."""
        first_person = subject.person in ("1sg", "1pl")
        return self.pick(PRONOUNS[2:4] if first_person else PRONOUNS[:4])

    def direction(self, verb: lex.Verb) -> tuple[str, str]:
        if verb.frame in ("lie", "be"):
            return self.place("furniture" if verb.frame == "lie" else "place")
        if verb.frame == "go" and self.chance(0.5):
            phrase = self.phrase(frozenset({"inside"}), definite=True, singular=True)
            return f"into {phrase.en}", contract("in", phrase.de["acc"])
        phrase = self.phrase(frozenset({"goal"}), definite=True, singular=True)
        return f"to {phrase.en}", contract("zu", phrase.de["dat"])

    def adjuncts(self, verb: lex.Verb, subject: Phrase, factor: float) -> tuple[str, str]:
        en, de = "", ""
        social = not verb.stative and verb.en not in lex.SOLITARY_VERBS
        if "person" in subject.tags and social and self.chance(0.12 * factor):
            benefit = verb.en in lex.BENEFIT_VERBS and self.chance(0.5)
            english, german, case = ("for", "für", "acc") if benefit else self.pick(lex.COMPANIONS)
            other = name_phrase(self.word(lex.NAMES)) if self.chance(0.4) else self.phrase(_PERSON, definite=True)
            en, de = f"{english} {other.en_object}", f"{german} {other.de[case]}"
        if verb.place and not verb.stative and self.chance(0.25 * factor):
            where = self.place("place")
            en, de = join(en, where[0]), join(de, where[1])
        return en, de

    def place(self, tag: str) -> tuple[str, str]:
        noun = self.word(_nouns(frozenset({tag}), True))
        english, german = noun.at
        beside = [(en, de) for en, de, fits in lex.POSITIONS if noun.tags & set(fits.split())]
        if beside and self.chance(0.3):
            english, german = self.pick(beside)
        phrase = self.noun_phrase(noun, definite=True, singular=True)
        return f"{english} {phrase.en}", contract(german, phrase.de["dat"])

    def relative(self, head: Phrase) -> Phrase:
        """The phrase with a relative clause, in which it is the subject."""
        clause = self.clause(
            tenses=("present", "past"),
            negation=0.0,
            simple=True,
            frequency=False,
            subject=relative_pronoun(head),
        )
        de = {case: f"{text}, {clause.de_final()}," for case, text in head.de.items()}
        return replace(head, en=f"{head.en} {clause.en()}", de=de, relative=True)

    # noun phrases

    def subject(
        self, tags: frozenset[str], *, pronouns: bool = True, negated: bool = False, mass: bool = False
    ) -> Phrase:
        if "person" in tags and pronouns and self.chance(0.3):
            return self.pick(PRONOUNS)
        if "person" in tags and self.chance(0.2):
            names = [self.word(lex.NAMES) for _ in range(2 if self.chance(0.3) else 1)]
            return name_phrase(*names)
        return self.phrase(tags, subject=True, definite=negated, mass=mass)

    def phrase(self, tags: frozenset[str], *, mass: bool = True, **options: bool) -> Phrase:
        return self.noun_phrase(self.word(_nouns(tags, mass)), **options)

    def noun_phrase(
        self,
        noun: lex.Noun,
        *,
        subject: bool = False,
        negated: bool = False,
        definite: bool = False,
        singular: bool = False,
    ) -> Phrase:
        """Negated phrases take kein for ein and for no article; `definite` leaves out a, many, two, every."""
        plural = bool(noun.plural) and not singular and self.chance(0.3)
        determiner = self.determiner(noun, plural, subject, negated, definite)
        options = _adjectives(noun.tags, False)
        adjective = self.word(options) if options and self.chance(0.25) else None
        return noun_phrase(noun, determiner, adjective, plural=plural)

    def determiner(self, noun: lex.Noun, plural: bool, subject: bool, negated: bool, definite: bool) -> Determiner:
        draw = self.random()
        countable = bool(noun.plural)
        if not definite and draw < 0.4:
            if negated:
                return Determiner("" if plural or not countable else "a", "kein", EIN, MIXED, kein=True)
            if countable and not plural:
                return Determiner("a", "ein", EIN, MIXED)
            if not subject:
                return Determiner("", "", BARE, STRONG)
        if not definite and not negated and plural and draw < 0.65:
            if self.chance(0.4):
                return Determiner(*self.pick((("many", "viel"), ("some", "einig"))), STRONG, STRONG)
            return Determiner(*self.pick(lex.NUMBERS), BARE, STRONG)
        if not definite and not negated and countable and not plural and draw > 0.96:
            return Determiner("every", "jed", STRONG, WEAK)
        # "my woman" would be a wife in German
        if 0.82 <= draw < 0.9 and "unowned" not in noun.tags:
            return Determiner(*self.pick(lex.POSSESSIVES), EIN, MIXED)
        # Annas Onkel is one or many: no name before nouns whose forms do not tell
        told = noun.de_plural not in (noun.de, noun.oblique)
        if 0.9 <= draw < 0.93 and told and "unowned" not in noun.tags:
            name = self.word(lex.NAMES)
            return Determiner(f"{name}'s", f"{name}s", BARE, STRONG)
        if draw >= 0.93:
            return Determiner("these" if plural else "this", "dies", STRONG, WEAK)
        return Determiner("the", "", THE, WEAK)
