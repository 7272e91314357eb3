"""What server and client send each other: tensors as safetensors, everything else as JSON. Nothing is unpickled.

- ``GET /about``: JSON, see ``ABOUT``.
- ``GET /head``: ``weight`` (V, H) and, where the head has one, ``bias`` (V,).
- ``POST /states?dtype=NAME``: a :class:`Request`; the answer has ``hidden`` (wanted, H) in one of
  ``HIDDEN_DTYPES``, in the order of the wanted tokens, and for "fp8" also ``scale`` (wanted,) float32.

An answer of the teacher names its content in the header :data:`IDENTITY`. An error is JSON, ``{"error": TEXT}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fused_kd.training.hidden_codes import HIDDEN_DTYPES, check_states, decode_states

PROTOCOL = "fused_kd served teacher 1"
IDENTITY = "X-Teacher"
# what GET /about says; identity: of all that a client has to find again, see fingerprints
ABOUT = {
    "protocol": str,
    "identity": str,
    "model": str,
    "hidden_size": int,
    "vocab_size": int,  # rows of the head
    "input_size": int,  # rows of the embedding
    "dtype": str,  # of the head, and of the states unless a client asks for another
    "logit_scale": float,
    "longest": int,  # tokens of a row; 0: no limit is known
    "most_tokens": int,  # of one request
    "fingerprints": dict,
}
_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class Request:
    """Token ids of rows, end to end, and the tokens whose hidden states are wanted.

    ``input_ids`` (tokens,) int32, ``lengths`` (rows,) int32, ``wanted`` (tokens,) bool; all on the CPU.
    """

    input_ids: Tensor
    lengths: Tensor
    wanted: Tensor

    @property
    def tokens(self) -> int:
        return len(self.input_ids)

    @property
    def count(self) -> int:
        """The number of wanted tokens."""
        return int(self.wanted.sum())

    def apart(self) -> list[tuple[Tensor, Tensor]]:
        """``(input_ids, wanted)`` of each row."""
        lengths = self.lengths.tolist()
        return list(zip(self.input_ids.split(lengths), self.wanted.split(lengths), strict=True))

    def split(self, most: int) -> list[Request]:
        """The request in parts of whole rows with at most ``most`` tokens, or of one longer row."""
        parts: list[list[int]] = []
        tokens = most + 1
        for row, length in enumerate(self.lengths.tolist()):
            if tokens + length > most:
                parts.append([])
                tokens = 0
            parts[-1].append(row)
            tokens += length
        ends = self.lengths.cumsum(0).tolist()
        found = []
        for part in parts:
            span = slice(ends[part[0]] - int(self.lengths[part[0]]), ends[part[-1]])
            found.append(Request(self.input_ids[span], self.lengths[part[0] : part[-1] + 1], self.wanted[span]))
        return found


def write_request(request: Request) -> bytes:
    return save({field.name: getattr(request, field.name).contiguous() for field in fields(request)})


def read_request(body: bytes, *, input_size: int, longest: int, most_tokens: int) -> Request:
    """The request in a body.

    Raises:
        ValueError: what is wrong with them, by name and value.
    """
    found = read_tensors(body)
    names = [field.name for field in fields(Request)]
    if sorted(found) != sorted(names):
        raise ValueError(f"a request must have the tensors {', '.join(names)}, got {', '.join(sorted(found))[:200]}")
    for name in names:
        allowed = (torch.bool,) if name == "wanted" else _INTEGERS
        if found[name].dim() != 1 or found[name].dtype not in allowed:
            raise ValueError(
                f"{name} must be of {' or '.join(map(str, allowed))} with one dimension, got {found[name].dtype} "
                f"{tuple(found[name].shape)}"
            )
    ids, lengths, wanted = (found[name] for name in names)
    if not len(lengths) or not bool((lengths > 0).all()):
        raise ValueError(f"lengths must be at least 1 and of at least one row, got {lengths[:20].tolist()}")
    if len(ids) > most_tokens:
        raise ValueError(f"input_ids must have at most {most_tokens} tokens in one request, got {len(ids)}")
    if int(lengths.max()) > len(ids) or int(lengths.long().sum()) != len(ids):
        raise ValueError(f"lengths must add up to the {len(ids)} input_ids, got {lengths[:20].tolist()}")
    if longest and int(lengths.max()) > longest:
        raise ValueError(
            f"a row must have at most {longest} tokens, got {int(lengths.max())} in row {int(lengths.argmax())}"
        )
    if wanted.shape != ids.shape or not bool(wanted.any()):
        raise ValueError(
            f"wanted must have one entry a token and at least one True, got {len(wanted)} entries for {len(ids)} "
            f"tokens, {int(wanted.sum())} True"
        )
    outside = (ids < 0) | (ids >= input_size)
    if bool(outside.any()):
        first = int(outside.nonzero()[0])
        raise ValueError(f"input_ids must be in [0, {input_size - 1}], got {int(ids[first])} at token {first}")
    return Request(ids, lengths, wanted)


def read_states(body: bytes, count: int, width: int, dtype: str) -> Tensor:
    """The hidden states (count, width) of an answer: as sent, of "fp8" in bfloat16.

    Raises:
        ValueError: other tensors, or states that are not finite.
    """
    found = read_tensors(body)
    wanted: dict[str, Any] = {"hidden": (HIDDEN_DTYPES[dtype], (count, width))}
    if dtype == "fp8":
        wanted["scale"] = (torch.float32, (count,))
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in found.items()}
    if layout != wanted:
        raise ValueError(f"the answer must have the tensors {wanted}, got {str(layout)[:300]}")
    states = decode_states(found)
    check_states(states)
    return states


def read_tensors(body: bytes) -> dict[str, Tensor]:
    """The tensors in a safetensors file; raises ``ValueError`` for bytes that are none."""
    try:
        return load(body)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"expected a safetensors file, got {len(body)} bytes that are none: {error}") from error


def check_about(about: Any) -> dict[str, Any]:
    """Return what ``GET /about`` said; raises ``ValueError`` for anything else."""
    if not isinstance(about, Mapping) or about.get("protocol") != PROTOCOL:
        said = about.get("protocol") if isinstance(about, Mapping) else about
        raise ValueError(f"expected a server of the protocol {PROTOCOL!r}, got {str(said)[:80]!r}")
    for name, kind in ABOUT.items():
        value = about.get(name)
        if not isinstance(value, kind) and not (kind is float and isinstance(value, int)):
            raise ValueError(f"about: {name} must be of type {kind.__name__}, got {str(value)[:80]!r}")
    cap = about.get("softcap")
    if cap is not None and not isinstance(cap, (int, float)):
        raise ValueError(f"about: softcap must be a number or null, got {str(cap)[:80]!r}")
    if about["dtype"] not in HIDDEN_DTYPES or min(about[n] for n in ("hidden_size", "vocab_size", "most_tokens")) < 1:
        raise ValueError(f"about: no teacher can be {str(dict(about))[:300]}")
    return dict(about)
