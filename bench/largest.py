"""The largest batch that fits, found by few trials."""

from __future__ import annotations

import math

# A batch at most so many times the largest that fitted: a guess far off would cost a long step, or the machine.
GROWTH = 8


class Search:
    """Which batch to try next; whoever tries it :meth:`tell`s what came of it.

    Memory is nearly linear in the batch, so the next guess is where the line through the two nearest results meets the
    limit; two guesses in a row that do not halve the bracket are followed by its middle.

    Args:
        limit: bytes that fit, as far as known; None: doubling and bisection alone.
        first: batch to begin with. most: the largest that is tried.
        resolution: done when the smallest batch known not to fit is at most this share (and at most one, if that
            is more) above the largest that does; 0: the exact boundary.

    ``fits`` is the largest batch that fitted (0: none yet), ``refused`` the smallest that did not (None: none).
    """

    def __init__(self, limit: float | None, first: int, most: int, resolution: float = 0.0) -> None:
        if not 1 <= first <= most:
            raise ValueError(f"first must be from 1 to most = {most}, got {first}")
        self.limit, self.first, self.most, self.resolution = limit, first, most, resolution
        self.fits = 0
        self.refused: int | None = None
        self._sizes: dict[int, float] = {}
        self._slow = 0

    def tell(self, batch: int, size: float | None, fits: bool) -> None:
        """``batch`` took ``size`` bytes (None: unknown, it broke off)."""
        before = self._width()
        if size is not None:
            self._sizes[batch] = size
        if fits:
            self.fits = max(self.fits, batch)
        else:
            self.refused = batch if self.refused is None else min(self.refused, batch)
        if math.isfinite(before):
            self._slow = self._slow + 1 if self._width() > before / 2 else 0

    def next(self) -> int | None:
        """The batch to try, or None when the answer is known."""
        granule = max(1, int(self.fits * self.resolution))
        if self.fits >= self.most or self._width() <= granule:
            return None
        guess = self._guess()
        if self.refused is None:
            if self.fits == 0:
                return self.first
            highest = min(self.most, GROWTH * self.fits)
            return _clamp(2 * self.fits if guess is None else guess, min(self.fits + granule, highest), highest)
        low, high = self.fits + granule, self.refused - granule
        if guess is None or low > high or self._slow >= 2:
            self._slow = 0
            return (self.fits + self.refused) // 2
        return _clamp(guess, low, high)

    def _width(self) -> float:
        return math.inf if self.refused is None else self.refused - self.fits

    def _guess(self) -> int | None:
        """Where the line through the two results nearest to the boundary (of one: and zero) meets the limit."""
        if self.limit is None or not self._sizes:
            return None
        below = sorted(batch for batch in self._sizes if batch <= self.fits)
        above = sorted(batch for batch in self._sizes if batch > self.fits)
        near = below[-1:] + above[:1] if below and above else below[-2:] or above[:2]
        a, b = near if len(near) == 2 else (0, near[0])
        size_a, size_b = self._sizes.get(a, 0.0), self._sizes[b]
        if size_b <= size_a:
            return None
        return math.floor(a + (self.limit - size_a) * (b - a) / (size_b - size_a))


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))
