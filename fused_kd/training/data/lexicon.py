"""The words of the built-in corpus: English and German lexemes with the forms that the grammar needs.

Lexemes translate one to one, so that a sentence has one translation. Nouns, verbs and adjectives carry tags
that say what goes with what (`eat` takes ``food``), which keeps the sentences sensible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Noun:
    """`plural` and `de_plural` are empty for mass nouns; `oblique` is for weak nouns, not nominative."""

    en: str
    plural: str
    de: str
    gender: str
    de_plural: str
    tags: frozenset[str]
    oblique: str = ""
    at: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Verb:
    """`ich` and `er` without the separable prefix; `frame` is the kind of complement."""

    en: str
    past: str
    de: str
    ich: str
    er: str
    participle: str
    frame: str
    objects: frozenset[str]
    prefix: str = ""
    aux: str = "haben"
    pronoun: bool = False
    place: bool = True
    stative: bool = False
    subjects: frozenset[str] = frozenset({"person"})

    @property
    def infinitive(self) -> str:
        return self.prefix + self.de


@dataclass(frozen=True)
class Adjective:
    """`stem` is what endings are put on; an empty `comparative` means that there is none."""

    en: str
    de: str
    stem: str
    comparative: str
    de_comparative: str
    tags: frozenset[str]


@dataclass(frozen=True)
class Adverb:
    """`kind`: ``time`` stands last or first in English, ``frequency`` before it; `tense` of the verb."""

    en: str
    de: str
    kind: str
    tense: str


@dataclass(frozen=True)
class Modal:
    """`support`: English takes do and an s (`wants to`); `negatable`: not and nicht have the same scope."""

    en: str
    de: str
    plural: str
    support: bool = False
    negatable: bool = False


def _n(en: str, plural: str, german: str, tags: str, oblique: str = "", at: str = "") -> Noun:
    de, gender, *rest = german.split()
    english, _, place = at.partition("/")
    return Noun(en, plural, de, gender, rest[0] if rest else "", frozenset(tags.split()), oblique, (english, place))


def _v(
    en: str,
    past: str,
    german: str,
    frame: str,
    objects: str = "",
    *,
    ich: str = "",
    subjects: str = "person",
    **rest: Any,
) -> Verb:
    de, er, participle = german.split()
    prefix, _, stem = de.rpartition("|")
    ich = ich or stem.removesuffix("n")
    return Verb(
        en, past, stem, ich, er, participle, frame, frozenset(objects.split()), prefix,
        subjects=frozenset(subjects.split()), **rest,
    )  # fmt: skip


def _a(en: str, german: str, tags: str, comparative: str = "") -> Adjective:
    de, stem, *rest = german.split()
    if comparative == "more":
        comparative = f"more {en}"
    return Adjective(en, de, stem, comparative, rest[0] if rest else "", frozenset(tags.split()))


NOUNS = (
    _n("man", "men", "Mann m Männer", "person unowned"),
    _n("woman", "women", "Frau f Frauen", "person unowned"),
    _n("child", "children", "Kind n Kinder", "person"),
    _n("boy", "boys", "Junge m Jungen", "person", "Jungen"),
    _n("girl", "girls", "Mädchen n Mädchen", "person"),
    _n("teacher", "teachers", "Lehrer m Lehrer", "person"),
    _n("doctor", "doctors", "Arzt m Ärzte", "person"),
    _n("friend", "friends", "Freund m Freunde", "person"),
    _n("neighbour", "neighbours", "Nachbar m Nachbarn", "person", "Nachbarn"),
    _n("student", "students", "Student m Studenten", "person", "Studenten"),
    _n("brother", "brothers", "Bruder m Brüder", "person"),
    _n("sister", "sisters", "Schwester f Schwestern", "person"),
    _n("mother", "mothers", "Mutter f Mütter", "person"),
    _n("father", "fathers", "Vater m Väter", "person"),
    _n("grandmother", "grandmothers", "Großmutter f Großmütter", "person"),
    _n("uncle", "uncles", "Onkel m Onkel", "person"),
    _n("aunt", "aunts", "Tante f Tanten", "person"),
    _n("king", "kings", "König m Könige", "person"),
    _n("queen", "queens", "Königin f Königinnen", "person"),
    _n("farmer", "farmers", "Bauer m Bauern", "person", "Bauern"),
    _n("singer", "singers", "Sänger m Sänger", "person"),
    _n("guest", "guests", "Gast m Gäste", "person"),
    _n("dog", "dogs", "Hund m Hunde", "animal"),
    _n("cat", "cats", "Katze f Katzen", "animal"),
    _n("horse", "horses", "Pferd n Pferde", "animal"),
    _n("bird", "birds", "Vogel m Vögel", "animal"),
    _n("cow", "cows", "Kuh f Kühe", "animal"),
    _n("mouse", "mice", "Maus f Mäuse", "animal"),
    _n("bear", "bears", "Bär m Bären", "animal", "Bären"),
    _n("rabbit", "rabbits", "Kaninchen n Kaninchen", "animal"),
    _n("duck", "ducks", "Ente f Enten", "animal"),
    _n("pig", "pigs", "Schwein n Schweine", "animal"),
    _n("apple", "apples", "Apfel m Äpfel", "food"),
    _n("cake", "cakes", "Kuchen m Kuchen", "food"),
    _n("egg", "eggs", "Ei n Eier", "food"),
    _n("potato", "potatoes", "Kartoffel f Kartoffeln", "food"),
    _n("pear", "pears", "Birne f Birnen", "food"),
    _n("banana", "bananas", "Banane f Bananen", "food"),
    _n("tomato", "tomatoes", "Tomate f Tomaten", "food"),
    _n("sausage", "sausages", "Wurst f Würste", "food"),
    _n("bread", "", "Brot n", "food"),
    _n("cheese", "", "Käse m", "food"),
    _n("rice", "", "Reis m", "food"),
    _n("soup", "", "Suppe f", "food"),
    _n("coffee", "", "Kaffee m", "drink"),
    _n("tea", "", "Tee m", "drink"),
    _n("milk", "", "Milch f", "drink"),
    _n("water", "", "Wasser n", "drink"),
    _n("juice", "", "Saft m", "drink"),
    _n("book", "books", "Buch n Bücher", "thing item text"),
    _n("letter", "letters", "Brief m Briefe", "thing item text long"),
    _n("newspaper", "newspapers", "Zeitung f Zeitungen", "thing item text"),
    _n("poem", "poems", "Gedicht n Gedichte", "text long"),
    _n("story", "stories", "Geschichte f Geschichten", "text tale long"),
    _n("lamp", "lamps", "Lampe f Lampen", "thing item"),
    _n("key", "keys", "Schlüssel m Schlüssel", "thing item"),
    _n("cup", "cups", "Tasse f Tassen", "thing item hollow"),
    _n("picture", "pictures", "Bild n Bilder", "thing item"),
    _n("ball", "balls", "Ball m Bälle", "thing item"),
    _n("bag", "bags", "Tasche f Taschen", "thing item hollow door"),
    _n("clock", "clocks", "Uhr f Uhren", "thing item"),
    _n("flower", "flowers", "Blume f Blumen", "thing item"),
    _n("knife", "knives", "Messer n Messer", "thing item"),
    _n("bottle", "bottles", "Flasche f Flaschen", "thing item hollow door"),
    _n("umbrella", "umbrellas", "Regenschirm m Regenschirme", "thing item"),
    _n("gift", "gifts", "Geschenk n Geschenke", "thing item"),
    _n("box", "boxes", "Kiste f Kisten", "thing item hollow door"),
    _n("window", "windows", "Fenster n Fenster", "door"),
    _n("door", "doors", "Tür f Türen", "door"),
    _n("table", "tables", "Tisch m Tische", "thing furniture", at="on/auf"),
    _n("chair", "chairs", "Stuhl m Stühle", "thing furniture", at="on/auf"),
    _n("bed", "beds", "Bett n Betten", "thing furniture", at="on/auf"),
    _n("coat", "coats", "Mantel m Mäntel", "clothes long"),
    _n("hat", "hats", "Hut m Hüte", "clothes"),
    _n("shirt", "shirts", "Hemd n Hemden", "clothes"),
    _n("dress", "dresses", "Kleid n Kleider", "clothes long"),
    _n("shoe", "shoes", "Schuh m Schuhe", "clothes"),
    _n("jacket", "jackets", "Jacke f Jacken", "clothes"),
    _n("car", "cars", "Auto n Autos", "vehicle"),
    _n("bicycle", "bicycles", "Fahrrad n Fahrräder", "vehicle"),
    _n("boat", "boats", "Boot n Boote", "vehicle"),
    _n("train", "trains", "Zug m Züge", "train long"),
    _n("house", "houses", "Haus n Häuser", "place goal inside building", at="in/in"),
    _n("garden", "gardens", "Garten m Gärten", "place goal inside", at="in/in"),
    _n("school", "schools", "Schule f Schulen", "place goal inside building", at="in/in"),
    _n("city", "cities", "Stadt f Städte", "place goal inside", at="in/in"),
    _n("forest", "forests", "Wald m Wälder", "place goal inside dark", at="in/in"),
    _n("kitchen", "kitchens", "Küche f Küchen", "place inside room", at="in/in"),
    _n("room", "rooms", "Zimmer n Zimmer", "place inside room dark", at="in/in"),
    _n("park", "parks", "Park m Parks", "place goal inside", at="in/in"),
    _n("church", "churches", "Kirche f Kirchen", "place goal inside building dark", at="in/in"),
    _n("castle", "castles", "Schloss n Schlösser", "place goal inside building dark", at="in/in"),
    _n("village", "villages", "Dorf n Dörfer", "place goal inside", at="in/in"),
    _n("library", "libraries", "Bibliothek f Bibliotheken", "place goal inside building", at="in/in"),
    _n("market", "markets", "Markt m Märkte", "place goal", at="at/auf"),
    _n("station", "stations", "Bahnhof m Bahnhöfe", "place goal building", at="at/an"),
    _n("street", "streets", "Straße f Straßen", "place goal long dark", at="on/auf"),
    _n("bridge", "bridges", "Brücke f Brücken", "place goal long", at="on/auf"),
    _n("lake", "lakes", "See m Seen", "place goal deep", at="at/an"),
    _n("river", "rivers", "Fluss m Flüsse", "place goal deep long", at="at/an"),
)

_ANY = "person animal thing text food drink clothes vehicle place furniture"
VERBS = (
    _v("see", "saw", "sehen sieht gesehen", "acc", "person animal thing vehicle place train", pronoun=True),
    _v("hear", "heard", "hören hört gehört", "acc", "person animal train", pronoun=True),
    _v("buy", "bought", "kaufen kauft gekauft", "acc", "thing clothes vehicle food drink"),
    _v("sell", "sold", "verkaufen verkauft verkauft", "acc", "thing clothes vehicle food"),
    _v("find", "found", "finden findet gefunden", "acc", "person animal thing clothes", pronoun=True),
    _v("look for", "looked for", "suchen sucht gesucht", "acc", "person animal item clothes", pronoun=True),
    _v("read", "read", "lesen liest gelesen", "acc", "text"),
    _v("write", "wrote", "schreiben schreibt geschrieben", "acc", "text"),
    _v("eat", "ate", "essen isst gegessen", "acc", "food", subjects="person animal"),
    _v("drink", "drank", "trinken trinkt getrunken", "acc", "drink"),
    _v("cook", "cooked", "kochen kocht gekocht", "acc", "food"),
    _v("draw", "drew", "zeichnen zeichnet gezeichnet", "acc", "person animal thing place", pronoun=True),
    _v("wear", "wore", "tragen trägt getragen", "acc", "clothes"),
    _v("wash", "washed", "waschen wäscht gewaschen", "acc", "clothes vehicle"),
    _v("repair", "repaired", "reparieren repariert repariert", "acc", "vehicle furniture"),
    _v("hide", "hid", "verstecken versteckt versteckt", "acc", "item food"),
    _v("lose", "lost", "verlieren verliert verloren", "acc", "item clothes"),
    _v("forget", "forgot", "vergessen vergisst vergessen", "acc", "item text clothes", place=False),
    _v("feed", "fed", "füttern füttert gefüttert", "acc", "animal", ich="füttere"),
    _v("visit", "visited", "besuchen besucht besucht", "acc", "person place", pronoun=True, place=False),
    _v("know", "knew", "kennen kennt gekannt", "acc", "person place text", pronoun=True, stative=True),
    _v("love", "loved", "lieben liebt geliebt", "acc", "person animal place", pronoun=True, stative=True),
    _v("need", "needed", "brauchen braucht gebraucht", "acc", "thing clothes vehicle food", stative=True),
    _v("call", "called", "an|rufen ruft angerufen", "acc", "person", pronoun=True),
    _v("invite", "invited", "ein|laden lädt eingeladen", "acc", "person", pronoun=True, place=False),
    _v("pick up", "picked up", "ab|holen holt abgeholt", "acc", "person"),
    _v("open", "opened", "auf|machen macht aufgemacht", "acc", "door"),
    _v("close", "closed", "zu|machen macht zugemacht", "acc", "door"),
    _v("put on", "put on", "an|ziehen zieht angezogen", "acc", "clothes"),
    _v("tidy up", "tidied up", "auf|räumen räumt aufgeräumt", "acc", "room", place=False),
    _v("help", "helped", "helfen hilft geholfen", "dat", "person animal", pronoun=True),
    _v("thank", "thanked", "danken dankt gedankt", "dat", "person", pronoun=True),
    _v("answer", "answered", "antworten antwortet geantwortet", "dat", "person", pronoun=True),
    _v("follow", "followed", "folgen folgt gefolgt", "dat", "person animal", aux="sein", pronoun=True,
       subjects="person animal"),
    _v("listen to", "listened to", "zu|hören hört zugehört", "dat", "person", pronoun=True),
    _v("give", "gave", "geben gibt gegeben", "give", "item text food drink"),
    _v("show", "showed", "zeigen zeigt gezeigt", "give", "item text clothes animal"),
    _v("send", "sent", "schicken schickt geschickt", "give", "item", place=False),
    _v("bring", "brought", "bringen bringt gebracht", "give", "item food drink", place=False),
    _v("tell", "told", "erzählen erzählt erzählt", "give", "tale"),
    _v("sleep", "slept", "schlafen schläft geschlafen", "none", subjects="person animal"),
    _v("work", "worked", "arbeiten arbeitet gearbeitet", "none"),
    _v("play", "played", "spielen spielt gespielt", "none", subjects="person animal"),
    _v("laugh", "laughed", "lachen lacht gelacht", "none"),
    _v("cry", "cried", "weinen weint geweint", "none"),
    _v("sing", "sang", "singen singt gesungen", "none"),
    _v("dance", "danced", "tanzen tanzt getanzt", "none"),
    _v("wait", "waited", "warten wartet gewartet", "none", subjects="person animal"),
    _v("smile", "smiled", "lächeln lächelt gelächelt", "none", ich="lächle"),
    _v("learn", "learned", "lernen lernt gelernt", "none"),
    _v("get up", "got up", "auf|stehen steht aufgestanden", "none", aux="sein", place=False),
    _v("fall asleep", "fell asleep", "ein|schlafen schläft eingeschlafen", "none", aux="sein",
       subjects="person animal"),
    _v("arrive", "arrived", "an|kommen kommt angekommen", "none", aux="sein", subjects="person train"),
    _v("go out", "went out", "aus|gehen geht ausgegangen", "none", aux="sein", place=False),
    _v("go", "went", "gehen geht gegangen", "go", aux="sein"),
    _v("run", "ran", "laufen läuft gelaufen", "go", aux="sein", subjects="person animal"),
    _v("come", "came", "kommen kommt gekommen", "go", aux="sein", subjects="person animal"),
    _v("drive", "drove", "fahren fährt gefahren", "to", aux="sein"),
    _v("lie", "lay", "liegen liegt gelegen", "lie", subjects="item clothes food"),
    _v("say", "said", "sagen sagt gesagt", "that"),
    _v("believe", "believed", "glauben glaubt geglaubt", "that", stative=True),
    _v("hope", "hoped", "hoffen hofft gehofft", "that"),
    _v("know", "knew", "wissen weiß gewusst", "that", ich="weiß", stative=True),
    _v("be", "was", "sein ist gewesen", "be", ich="bin", subjects=_ANY),
    _v("have", "had", "haben hat gehabt", "acc", "animal thing clothes vehicle", place=False),
)  # fmt: skip

ADJECTIVES = (
    _a("big", "groß groß größer", "animal thing clothes vehicle place food", "bigger"),
    _a("small", "klein klein kleiner", "animal thing clothes vehicle place food", "smaller"),
    _a("old", "alt alt älter", "person animal thing text clothes vehicle place", "older"),
    _a("young", "jung jung jünger", "person animal", "younger"),
    _a("new", "neu neu neuer", "thing text clothes vehicle", "newer"),
    _a("beautiful", "schön schön schöner", "thing text clothes place animal", "more"),
    _a("ugly", "hässlich hässlich hässlicher", "thing clothes vehicle place", "uglier"),
    _a("expensive", "teuer teur teurer", "thing clothes vehicle", "more"),
    _a("cheap", "billig billig billiger", "thing clothes vehicle", "cheaper"),
    _a("dirty", "schmutzig schmutzig schmutziger", "thing clothes vehicle door room", "dirtier"),
    _a("clean", "sauber sauber sauberer", "clothes door room", "cleaner"),
    _a("long", "lang lang länger", "long", "longer"),
    _a("short", "kurz kurz kürzer", "long", "shorter"),
    _a("tired", "müde müd", "person animal"),
    _a("happy", "glücklich glücklich glücklicher", "person", "happier"),
    _a("sad", "traurig traurig trauriger", "person text", "sadder"),
    _a("clever", "klug klug klüger", "person animal", "cleverer"),
    _a("friendly", "freundlich freundlich freundlicher", "person", "friendlier"),
    _a("strong", "stark stark stärker", "person animal", "stronger"),
    _a("rich", "reich reich reicher", "person", "richer"),
    _a("poor", "arm arm ärmer", "person", "poorer"),
    _a("hungry", "hungrig hungrig", "person animal"),
    _a("ill", "krank krank", "person animal"),
    _a("famous", "berühmt berühmt berühmter", "person place", "more"),
    _a("brave", "mutig mutig mutiger", "person animal", "braver"),
    _a("funny", "lustig lustig lustiger", "person text", "funnier"),
    _a("fast", "schnell schnell schneller", "vehicle train", "faster"),
    _a("slow", "langsam langsam langsamer", "vehicle train", "slower"),
    _a("warm", "warm warm wärmer", "drink", "warmer"),
    _a("cold", "kalt kalt kälter", "drink deep", "colder"),
    _a("fresh", "frisch frisch", "food"),
    _a("good", "gut gut besser", "food drink text", "better"),
    _a("empty", "leer leer", "hollow room"),
    _a("dark", "dunkel dunkl dunkler", "dark", "darker"),
    _a("deep", "tief tief tiefer", "deep", "deeper"),
    _a("red", "rot rot", "thing clothes vehicle door"),
    _a("green", "grün grün", "thing clothes vehicle door"),
    _a("blue", "blau blau", "thing clothes vehicle door"),
    _a("white", "weiß weiß", "animal thing clothes vehicle"),
    _a("black", "schwarz schwarz", "animal thing clothes vehicle"),
)

ADVERBS = (
    Adverb("often", "oft", "frequency", "present"),
    Adverb("always", "immer", "frequency", "present"),
    Adverb("sometimes", "manchmal", "frequency", "present"),
    Adverb("rarely", "selten", "frequency", "present"),
    Adverb("never", "nie", "frequency", "present"),
    Adverb("every day", "jeden Tag", "time", "present"),
    Adverb("in the morning", "am Morgen", "time", "any"),
    Adverb("in the evening", "am Abend", "time", "any"),
    Adverb("on Monday", "am Montag", "time", "any"),
    Adverb("on Friday", "am Freitag", "time", "any"),
    Adverb("on Sunday", "am Sonntag", "time", "any"),
    Adverb("today", "heute", "time", "any"),
    Adverb("yesterday", "gestern", "time", "past"),
    Adverb("last week", "letzte Woche", "time", "past"),
    Adverb("last year", "letztes Jahr", "time", "past"),
    Adverb("tomorrow", "morgen", "time", "future"),
    Adverb("next week", "nächste Woche", "time", "future"),
    Adverb("soon", "bald", "time", "future"),
)

MODALS = (
    Modal("can", "kann", "können", negatable=True),
    Modal("must", "muss", "müssen"),
    Modal("should", "soll", "sollen", negatable=True),
    Modal("may", "darf", "dürfen"),
    Modal("want to", "will", "wollen", support=True, negatable=True),
    Modal("would like to", "möchte", "möchten"),
)

NAMES = ("Anna", "Paul", "Maria", "Peter", "Julia", "Martin", "Laura", "Simon", "Nina", "David")
# position: English, German, what it goes with; all of them with the dative
POSITIONS = (
    ("behind", "hinter", "building furniture"),
    ("next to", "neben", "building furniture"),
    ("in front of", "vor", "building furniture"),
    ("under", "unter", "furniture"),
)
COMPANIONS = (("with", "mit", "dat"), ("without", "ohne", "acc"))
BENEFIT_VERBS = frozenset({"buy", "cook", "draw", "write", "repair", "wash", "look for", "sing", "work", "dance"})
SOLITARY_VERBS = frozenset({"sleep", "fall asleep"})
CONJUNCTIONS = (("because", "weil"), ("if", "wenn"), ("although", "obwohl"))
NUMBERS = (("two", "zwei"), ("three", "drei"), ("four", "vier"), ("five", "fünf"))
POSSESSIVES = (("my", "mein"), ("our", "unser"), ("his", "sein"), ("her", "ihr"))
