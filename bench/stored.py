"""What a cache keeps of a teacher, each form with its bytes a token, as the loss gets it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.draws import draws_of, thresholds
from fused_kd.training.codes import decode, encode, id_dtype, packed_bytes
from fused_kd.training.drawn_codes import decode_draws, encode_draws, ids_of
from fused_kd.training.hidden_codes import decode_states, encode_states
from fused_kd.training.projection import Moments, fit, scaling_of

KS = (16, 64, 256)
TAILS = ("bucket", "uniform", "renormalize", "listed")
CODES = ("fp16", "8bit")
# k listed, n drawn, and the code of the k
DRAWS = ((0, 12, ""), (0, 24, ""), (0, 50, ""), (8, 12, "fp16"), (16, 16, "fp16"), (16, 50, "8bit"))
WORDS = {"bf16": "bf16", "fp8": "8 bits"}
# fp32 of a token: what is not listed, the scale of a state
LOG_REST = SCALE = 4


class Form(NamedTuple):
    """``size(V, H)``: bytes a token of a teacher with V entries and hidden states of H. ``teacher()`` has been stored
    and read."""

    name: str
    size: Callable[[int, int], int]
    teacher: Callable[[], fk.LMHead | fk.TopK]


def forms(teacher: fk.LMHead, seed: int) -> Iterator[Form]:
    """Of a teacher (N, H), the dearest first."""
    for dtype, words in WORDS.items():
        yield Form(f"hidden states, {words}", partial(_state_bytes, dtype, 1), partial(states, teacher, dtype))
    yield Form("hidden states, 8 bits, scaled", partial(_state_bytes, "int8", 1), partial(scaled, teacher))
    for part, dtype in ((2, "bf16"), (2, "fp8"), (4, "bf16")):
        yield Form(f"projected to H/{part}, {WORDS[dtype]}", partial(_state_bytes, dtype, part),
                   partial(projected, teacher, part, dtype))  # fmt: skip
    for k in sorted((k for k in KS if k <= teacher.vocab), reverse=True):
        listed = fk.top_k_of(teacher, k)
        for code in CODES:
            for tail in TAILS:
                yield Form(f"{k} entries, {code}, {tail}", partial(_list_bytes, k, code),
                           partial(lists, listed, code, tail))  # fmt: skip
    for k, n, code in sorted(DRAWS, key=lambda each: -sum(each[:2])):
        name = f"{k} entries, {code}, and {n} draws" if k else f"{n} draws"
        yield Form(name, partial(_draw_bytes, k, n, code), partial(drawn, teacher, k, n, code, seed))


def _state_bytes(dtype: str, part: int, V: int, H: int) -> int:
    return 2 * (H // part) if dtype == "bf16" else H // part + SCALE


def _list_bytes(k: int, code: str, V: int, H: int) -> int:
    return _id_bytes(V, k) + _code_bytes(k, code) + LOG_REST


def _draw_bytes(k: int, n: int, code: str, V: int, H: int) -> int:
    return _id_bytes(V, k + n) + (_code_bytes(k, code) if k else 0)


def _id_bytes(V: int, k: int) -> int:
    return min(packed_bytes(k, V), k * id_dtype(V).itemsize)


def _code_bytes(k: int, code: str) -> int:
    return {"fp16": 2 * k, "8bit": k + 8}[code]


def states(teacher: fk.LMHead, dtype: str) -> fk.LMHead:
    return replace(teacher, hidden=_read_back(teacher.hidden, dtype).to(teacher.hidden.dtype))


def scaled(teacher: fk.LMHead) -> fk.LMHead:
    """With mean and scale of these very tokens."""
    moments = Moments(teacher.hidden.shape[1], teacher.hidden.device)
    moments.add(teacher.hidden)
    found = scaling_of(moments)
    return replace(
        found.head(teacher), hidden=_read_back(found.states(teacher.hidden), "int8").to(teacher.weight.dtype)
    )


def projected(teacher: fk.LMHead, part: int, dtype: str) -> fk.LMHead:
    """On the H/part directions that are best for these very tokens."""
    H = teacher.hidden.shape[1]
    moments = Moments(H, teacher.hidden.device)
    moments.add(teacher.hidden)
    found = fit(moments, teacher, H // part)
    head = found.head(teacher)
    return replace(head, hidden=_read_back(found.states(teacher.hidden), dtype).to(head.weight.dtype))


def _read_back(hidden: Tensor, dtype: str) -> Tensor:
    return decode_states(encode_states(hidden, dtype))


def lists(listed: fk.TopK, code: str, tail: str) -> fk.TopK:
    log_probs = torch.from_numpy(decode(encode(listed.log_probs.numpy(), code)))
    return fk.TopK(log_probs, listed.indices, tail, log_rest=listed.log_rest)


def drawn(teacher: fk.LMHead, k: int, n: int, code: str, seed: int) -> fk.TopK:
    generator, V = torch.Generator().manual_seed(seed), teacher.vocab
    made = draws_of(teacher, thresholds(len(teacher.hidden), n, generator, teacher.hidden.device), k=k)
    arrays = encode_draws(made.log_probs.numpy(), ids_of(made).numpy(), code, V)
    log_probs, indices = decode_draws(arrays, k, n, V)
    return fk.TopK(log_probs, indices, "renormalize")
