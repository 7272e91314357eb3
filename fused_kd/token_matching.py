"""Which tokens of two vocabularies are the same: by what they say, or by what they are for."""

from __future__ import annotations

from collections import defaultdict

from .token_bytes import Token, Vocabulary


class Matched:
    """``pairs`` of student and teacher ids, no id twice."""

    def __init__(self, ours: Vocabulary, theirs: Vocabulary) -> None:
        self.pairs: dict[int, int] = {}
        self._taken: set[int] = set()
        self.by_role = self.ambiguous = 0
        self._same(ours, theirs)
        self._equal_entries(ours, theirs)
        self._equal_bytes(ours, theirs)
        self._roles(ours, theirs)

    def _add(self, student: int, teacher: int) -> bool:
        if student in self.pairs or teacher in self._taken:
            return False
        self.pairs[student] = teacher
        self._taken.add(teacher)
        return True

    def _same(self, ours: Vocabulary, theirs: Vocabulary) -> None:
        """Id and entry: also where only one of the two calls it special."""
        for index, token in ours.tokens.items():
            other = theirs.tokens.get(index)
            if other is None or other.text != token.text:
                continue
            if other.value == token.value or "special" in (token.kind, other.kind):
                self._add(index, index)

    def _equal_entries(self, ours: Vocabulary, theirs: Vocabulary) -> None:
        """Added tokens, special or not."""
        known = {token.text: token.id for token in theirs.tokens.values() if token.kind != "text"}
        for token in ours.tokens.values():
            if token.kind != "text" and token.text in known:
                self._add(token.id, known[token.text])

    def _equal_bytes(self, ours: Vocabulary, theirs: Vocabulary) -> None:
        known = _by_bytes(theirs)
        for value, students in _by_bytes(ours).items():
            teachers = known.get(value, [])
            if not teachers:
                continue
            texts = {token.text: token.id for token in teachers}
            for token in students:
                if token.text in texts:
                    self._add(token.id, texts[token.text])
            left = [token for token in students if token.id not in self.pairs]
            if len(students) > 1 or len(teachers) > 1:
                self.ambiguous += len(left)
            if len(left) == len(students):
                free = [token for token in teachers if token.id not in self._taken]
                if free:
                    self._add(left[0].id, free[0].id)

    def _roles(self, ours: Vocabulary, theirs: Vocabulary) -> None:
        for role, index in ours.roles.items():
            if role in theirs.roles and index in ours.tokens and theirs.roles[role] in theirs.tokens:
                self.by_role += self._add(index, theirs.roles[role])


def _by_bytes(vocabulary: Vocabulary) -> dict[bytes, list[Token]]:
    """Tokens of text by what they stand for, the first choice first."""
    found: dict[bytes, list[Token]] = defaultdict(list)
    for token in sorted(vocabulary.tokens.values(), key=lambda token: (token.fallback, token.id)):
        if token.kind != "special" and token.value:
            found[token.value].append(token)
    return found


def within(vocabulary: Vocabulary, size: int) -> Vocabulary:
    """Its tokens that a head of so many columns has."""
    tokens = {index: token for index, token in vocabulary.tokens.items() if index < size}
    return Vocabulary(tokens, vocabulary.roles, size)
