"""Sizes that fill a GPU: its multiprocessors take tiles in waves, and the last wave takes as long as a full one."""

from __future__ import annotations

from collections.abc import Callable

# An H100's, H200's near kin: by how many tiles at a time waves are counted. Other current GPUs have 108 to 304.
MULTIPROCESSORS = 132
# A tile of a GEMM's result, as BLAS libraries choose it on an H100, either way round.
GEMM_TILE = (128, 256)
# Tokens and columns of what :mod:`.tile_filter` looks at as one.
TILE = 128


def waves(programs: int) -> int:
    return -(-programs // MULTIPROCESSORS)


def gemm_waves(rows: int, H: int) -> int:
    """Of a GEMM with a result (rows, H)."""
    return waves(-(-rows // GEMM_TILE[0]) * -(-H // GEMM_TILE[1]))


def fitting(affordable: int, of: int, limit: int, work: Callable[[int], float]) -> int:
    """A multiple of ``of`` up to ``affordable``, at least one and at most ``limit``: that of the least work an entry.

    Whole waves of tiles win, then the larger. Twice a size never takes more than twice its work: halves need no look.
    """
    most = min(max(of, affordable // of * of), limit)
    sizes = [most, *range(most // of * of, most // 2, -of)]
    best: int = min(sizes, key=lambda size: work(size) / size)
    return best
