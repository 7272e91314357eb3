"""How a cache stores a token's list: ids in as many bits as the vocabulary needs, log-probabilities in fp32, in fp16 or
in 8 bits, never adding up to more than 1.

The 8-bit code of a token has two fp32 numbers, ``top`` and ``span``, and a byte an entry: code c < 255 stands for the
log-probability ``top - span * (c / 254)**2``, 255 for an entry that is left out. Squares put the fine steps where the
probabilities are large. ``span`` is the distance of the largest to the smallest entry, so rounding moves code c by at
most ``span * (c + 1/4) / 254**2``; ``top`` is then set so that the entries keep their total probability, which moves
all of them together, by no more than the worst of these. In all, an entry is off by ``span / 127`` nats at most.

fp16 rounds to nearest, by at most ``2**-11`` of a log-probability (``2**-25`` near 0), or down, by at most twice that,
where the rounded entries would add up to more than 1.

Ids below V need ``b = ceil(log2 V)`` bits, 17 for a vocabulary of 128,256. Packed, a token's are one after the other,
the lowest bit first, in ``ceil(k * b / 8)`` bytes: a whole number, so that a token can be read alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fused_kd.rows.top_k import ROUNDING

DTYPES = ("fp16", "8bit", "fp32")
LEFT_OUT = 255
_LEVELS = 254
_FLOATS: dict[str, np.dtype[Any]] = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
# by how much a token's entries may add up to more than 1; more than rounding can explain
EXCESS = 1e-2
# ids packed at a time: a byte for each of their bits is held meanwhile
_PACKED_AT_ONCE = 1 << 20


def id_dtype(vocab_size: int) -> np.dtype:
    """The smallest integers that hold the ids below ``vocab_size``: 16 bits up to 65536, else 32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def id_bits(vocab_size: int) -> int:
    """How many bits hold each id below ``vocab_size``."""
    return max(1, (vocab_size - 1).bit_length())


def packed_bytes(k: int, vocab_size: int) -> int:
    """How many bytes a token's k ids take when they are packed."""
    return -(-k * id_bits(vocab_size) // 8)


def ids_are_packed(k: int, vocab_size: int) -> bool:
    """Whether packing k ids is smaller than :func:`id_dtype`."""
    return packed_bytes(k, vocab_size) < k * id_dtype(vocab_size).itemsize


def encode_ids(ids: np.ndarray, vocab_size: int) -> dict[str, np.ndarray]:
    """The array that stands for ``ids`` (N, k), integers below ``vocab_size``; :func:`decode_ids` reads it.

    Returns:
        ``packed_ids`` (N, :func:`packed_bytes`) uint8, or where :func:`ids_are_packed` says no ``indices`` (N, k) of
        :func:`id_dtype`.

    Raises:
        ValueError: an id that is not in [0, vocab_size - 1].
    """
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise ValueError(f"ids must be in [0, {vocab_size - 1}], got {ids.min()} to {ids.max()}")
    count, k = ids.shape
    if not ids_are_packed(k, vocab_size):
        return {"indices": ids.astype(id_dtype(vocab_size))}
    stored = np.empty((count, packed_bytes(k, vocab_size)), dtype=np.uint8)
    step = max(1, _PACKED_AT_ONCE // max(k, 1))
    for start in range(0, count, step):
        own = np.ascontiguousarray(ids[start : start + step], dtype="<u4").view(np.uint8).reshape(-1, k, 4)
        bits = np.unpackbits(own, axis=2, count=id_bits(vocab_size), bitorder="little")
        stored[start : start + step] = np.packbits(bits.reshape(len(own), -1), axis=1, bitorder="little")
    return {"packed_ids": stored}


def decode_ids(arrays: Mapping[str, np.ndarray], k: int, vocab_size: int) -> np.ndarray:
    """(N, k) int64 from the array of :func:`encode_ids`, which others may lie beside."""
    if "indices" in arrays:
        return arrays["indices"].astype(np.int64)
    bits = id_bits(vocab_size)
    byte, shift = np.divmod(np.arange(k) * bits, 8)
    reach = -(-(bits + 7) // 8)  # an id lies in so many bytes at most
    padded = np.pad(arrays["packed_ids"], ((0, 0), (0, reach)))
    ids = np.zeros((len(padded), k), dtype=np.int64)
    for i in range(reach):
        ids |= padded[:, byte + i].astype(np.int64) << (8 * i)
    found: np.ndarray = (ids >> shift) & ((1 << bits) - 1)
    return found


def mass(log_probs: np.ndarray) -> np.ndarray:
    """(N, K) -> (N,) float64: the probability of the entries together."""
    found: np.ndarray = np.exp(log_probs.astype(np.float64)).sum(1)
    return found


def encode(log_probs: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """The arrays that stand for ``log_probs`` (N, K) float32, -inf for entries left out; :func:`decode` reads them.

    Raises:
        ValueError: an unknown dtype, a NaN, a log-probability above 0 or entries that add up to more than 1, beyond
            what rounding explains, a token without entries.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, DTYPES))}, got {dtype!r}")
    log_probs = np.where(log_probs <= ROUNDING, np.minimum(log_probs, 0), log_probs)
    total = mass(log_probs)
    wrong = ~(total <= 1 + EXCESS) | (log_probs > 0).any(1) | (total == 0)
    if wrong.any():
        token = int(wrong.argmax())
        raise ValueError(
            f"log_probs of token {token} must be at most 0, some of them finite, and their probabilities add up to at "
            f"most 1; the largest is {log_probs[token].max()}, the sum {total[token]:.6g}"
        )
    return _eight_bit(log_probs, total) if dtype == "8bit" else {"log_probs": _rounded(log_probs, _FLOATS[dtype])}


def decode(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """(N, K) float32 log-probabilities from the arrays of :func:`encode`."""
    if "log_probs" in arrays:
        return arrays["log_probs"].astype(np.float32)
    codes, top, span = arrays["codes"], arrays["top"], arrays["span"]
    share = codes.astype(np.float32) / np.float32(_LEVELS)
    return np.where(codes == LEFT_OUT, np.float32(-np.inf), top[:, None] - span[:, None] * (share * share))


def _rounded(log_probs: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # below fp16's range: left out
        stored = log_probs.astype(dtype)
        over = mass(stored) > 1
        # with a hair to spare, since the sum itself is rounded
        exact = log_probs[over].astype(np.float64)
        exact -= np.log(np.maximum(mass(exact), 1))[:, None] + 1e-12
        lower = exact.astype(dtype)
        stored[over] = np.where(lower > exact, np.nextafter(lower, dtype.type(-np.inf)), lower)
    return stored


def _eight_bit(log_probs: np.ndarray, total: np.ndarray) -> dict[str, np.ndarray]:
    listed = log_probs > -np.inf
    exact = log_probs.astype(np.float64)
    top = exact.max(1, initial=-np.inf)
    span = top - np.where(listed, exact, np.inf).min(1, initial=np.inf)
    share = np.where(listed, top[:, None] - exact, 0) / np.where(span > 0, span, 1)[:, None]
    codes = np.where(listed, np.rint(_LEVELS * np.sqrt(share)), LEFT_OUT).astype(np.uint8)
    arrays = {"codes": codes, "top": top.astype(np.float32), "span": span.astype(np.float32)}
    arrays["top"] = (top + np.log(np.minimum(total, 1)) - np.log(mass(decode(arrays)))).astype(np.float32)
    while (over := (now := mass(decode(arrays))) > 1).any():  # by a rounding of fp32
        held = arrays["top"][over]
        lower = (held - 2 * np.log(now[over])).astype(np.float32)
        arrays["top"][over] = np.minimum(lower, np.nextafter(held, np.float32(-np.inf)))
    return arrays
