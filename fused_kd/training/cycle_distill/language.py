"""Which language a sentence is in, offline: by script, and among those of Latin script by their most common words.

Coarse on purpose: it shall catch output in a wrong language, not tell dialects apart. A better one goes by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable

# The language of a text, or None where it cannot be told; a text of None is left alone by the filter.
Identifier = Callable[[str], str | None]

SCRIPTS = {
    "ARABIC": ("ar", "fa", "ur"), "ARMENIAN": ("hy",), "BENGALI": ("bn", "as", "mni"), "CYRILLIC": ("ru", "uk", "bg"),
    "DEVANAGARI": ("hi", "mr", "ne", "sa"), "GEORGIAN": ("ka",), "GREEK": ("el",), "GUJARATI": ("gu",),
    "GURMUKHI": ("pa",), "HANGUL": ("ko",), "HEBREW": ("he",), "HIRAGANA": ("ja",), "KANNADA": ("kn",),
    "KATAKANA": ("ja",), "MALAYALAM": ("ml",), "ORIYA": ("or",), "SINHALA": ("si",), "TAMIL": ("ta",),
    "TELUGU": ("te",), "THAI": ("th",), "CJK": ("zh", "ja"),
}  # fmt: skip
# words of one language only, among these
WORDS = {
    "cs": "a se na je že do ve si pro před muž žena ze který která jsou při dva sedí stojí jak své nebo ale by jeho",
    "de": "der die das und ein eine einen einem einer mit auf ist im den dem zu von sich nicht zwei über sind vor ihr",
    "en": "the of and a is to with are on at his her an by that from its this their two while for was it up",
    "es": "el los las y una con un por para que del está se su dos sobre hombre mujer mientras lo como al pero sin",
    "fr": "le les et une des dans est avec sur un du aux qui deux en au ses pour homme femme près sont elle pas",
    "it": "il gli di e una con per che della nel sono un su due uomo donna mentre alla delle non ha dei suo più",
    "nl": "het een en van met op zijn voor dat niet twee man vrouw in ze bij naar aan ook maar haar hij uit over",
    "pt": "o os as e uma com um em do da no na que dois duas homem mulher seu sua são ao não por mais está",
}
_WORD = re.compile(r"[^\W\d_]+")
_SETS = {code: frozenset(words.split()) for code, words in WORDS.items()}


def by_script_and_words(text: str) -> str | None:
    """The default identifier.

    Most letters decide on the script. Where several languages share it, and for Latin letters where no list of common
    words has more hits than every other, it is None.
    """
    scripts = _scripts(text)
    if not scripts:
        return None
    if scripts["HIRAGANA"] + scripts["KATAKANA"] > 0:  # beside Chinese characters
        return "ja"
    script = scripts.most_common(1)[0][0]
    if script != "LATIN":
        candidates = SCRIPTS.get(script, ())
        return candidates[0] if len(candidates) == 1 else None
    found = _WORD.findall(text.lower())
    hits = sorted(((sum(word in words for word in found), code) for code, words in _SETS.items()), reverse=True)
    return hits[0][1] if hits[0][0] > hits[1][0] else None


def _scripts(text: str) -> Counter[str]:
    """Letters by script, as their Unicode names begin."""
    return Counter(re.split("[ -]", unicodedata.name(char, ""), maxsplit=1)[0] for char in text if char.isalpha())


def wrong_script(text: str, language: str) -> bool:
    """Whether most letters of a text are of a script in which that language is not written."""
    scripts = _scripts(text)
    if not scripts:
        return False
    expected = {script for script, codes in SCRIPTS.items() if language in codes} or {"LATIN"}
    if language == "ja":
        expected.add("CJK")
    return sum(count for script, count in scripts.items() if script in expected) < 0.5 * scripts.total()


def check_identifier(name: str) -> None:
    """Raise ``ValueError`` for what :func:`get_identifier` cannot take, and run nothing of the module."""
    if name in ("none", "stop_words"):
        return
    module, _, function = name.partition(":")
    parts = module.split(".")
    if not all(map(str.isidentifier, [*parts, function])):
        raise ValueError(f"identifier={name!r}: expected 'stop_words', 'none' or module:function")
    # only of the first part: to look for another one imports those before it
    if parts[0] not in sys.modules and importlib.util.find_spec(parts[0]) is None:
        raise ValueError(f"identifier={name!r}: there is no module {parts[0]!r}")


def get_identifier(name: str) -> Identifier | None:
    """An identifier by name: "stop_words" (the one here), "none", or ``module:function`` of a better one.

    The module is imported and the function called on every translation: such a name is code that runs.

    Raises:
        ValueError: no such function. ImportError: no such module.
    """
    check_identifier(name)
    if name == "none":
        return None
    if name == "stop_words":
        return by_script_and_words
    module, _, function = name.partition(":")
    found = getattr(importlib.import_module(module), function, None)
    if not callable(found):
        raise ValueError(f"identifier={name!r}: {module} has no function {function!r}")
    return found  # type: ignore[no-any-return]
