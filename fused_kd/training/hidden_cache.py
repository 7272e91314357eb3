"""Makes the files of a cache of hidden states: the head, once; the projection, once; the states, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_kd import LMHead
from fused_kd.training.hidden_codes import decode_states, encode_states, name_of, narrowed
from fused_kd.training.projection import Moments, Projection, Scaling, error_of, fit, scaling_of
from fused_kd.training.shards import (
    HEAD,
    INDEX,
    PROJECTION,
    MakeShard,
    file_fault,
    head_fault,
    layout_fault,
    offsets_of,
    read_index,
    target_positions,
    write_part,
)
from fused_kd.training.stage import write_json
from fused_kd.training.stored_head import to_bytes
from fused_kd.training.teacher_runs import Runs

_HELD_OUT = 4096  # tokens on which the error is measured
_EACH = 8  # of how many sampled rows one is held out


def hidden_writer(
    runs: Runs, data: Any, *, sample: int, memory: int, like: Path | None = None
) -> Callable[[Path, dict[str, Any]], MakeShard]:
    """Return what makes the shards of a cache, for :func:`fused_kd.training.shards.write_shards`.

    The head and, where the index asks for one, the projection, or of "int8" the scaling, are made before the first
    shard, and anew where their files are damaged. They must come out as they were then: with others the finished shards
    would be worth nothing. ``like`` is another cache's folder, whose projection or scaling is taken.
    """

    def fitted(index: dict[str, Any]) -> Projection | Scaling | None:
        if like is not None:
            return None if index["like"] is None else _read_projection(like / PROJECTION)
        if index["project"] is None and index["dtype"] != "int8":
            return None
        moments, head = None, None
        for run in runs(_sampled(data, sample)[0]):
            head = run.head
            moments = moments or Moments(head.hidden.shape[1], head.hidden.device)
            moments.add(head.hidden)
        assert moments is not None and head is not None
        if index["project"] is None:
            return scaling_of(moments)
        return fit(moments, head, index["project"], memory)

    def exact() -> LMHead:
        return _states_of(runs, _sampled(data, sample)[1])

    def begin(folder: Path, index: dict[str, Any]) -> MakeShard:
        if "head" not in index:
            _prepare(folder, index, exact(), fitted, memory)
        projection = _mended(folder, index, exact, fitted)
        return lambda start, stop, bar: _shard(runs, data, projection, index["dtype"], start, stop, bar)

    return begin


def projection_like(folder: Path, fingerprints: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the settings ``project`` and ``like`` of a cache that takes the projection of the one in ``folder``.

    Raises:
        ValueError: no cache of hidden states there, of another teacher, or with a damaged projection.
    """
    index = read_index(folder)
    if index is None or index["keep"] != "hidden":
        raise ValueError(f"like={str(folder)!r} must be the folder of a cache of hidden states")
    for part in ("teacher_weights", "teacher_config", "tokenizer"):
        if index["fingerprints"].get(part) != fingerprints[part]:
            raise ValueError(f"like={str(folder)!r} was made from something else: {part}")
    if index["projection"] is not None and (fault := _projection_fault(folder, index)):
        raise ValueError(f"like={str(folder)!r} is damaged: {PROJECTION} {fault}")
    return {"project": index["project"], "like": index["projection"] and index["projection"]["sha256"]}


Fitted = Callable[[dict[str, Any]], Projection | Scaling | None]


def _prepare(folder: Path, index: dict[str, Any], exact: LMHead, fitted: Fitted, memory: int) -> None:
    """Write head, projection and an index without shards, which knows both."""
    index["from_width"] = exact.hidden.shape[1]
    index["projection"] = None
    if index["project"] is not None and index["project"] > index["from_width"]:
        raise ValueError(
            f"project must be at most the {index['from_width']} numbers of the teacher's hidden states, got "
            f"{index['project']}"
        )
    projection = fitted(index)
    if projection is not None:
        index["projection"] = write_part(folder / PROJECTION, _projection_bytes(projection))
    stored = _stored_head(exact, projection)
    index["width"] = stored.weight.shape[1]
    index["head"] = {
        **write_part(folder / HEAD, to_bytes(stored)),
        "rows": len(stored.weight),
        "dtype": name_of(stored.weight.dtype),
        "bias": stored.bias is not None,
        "logit_scale": stored.logit_scale,
        "softcap": stored.softcap,
    }
    states = exact.hidden if projection is None else projection.states(exact.hidden)
    read = narrowed(decode_states(encode_states(states, index["dtype"])), stored.weight.dtype)
    index["error"] = error_of(exact, replace(stored, hidden=read), memory)
    write_json(folder / INDEX, index)


def _mended(
    folder: Path, index: dict[str, Any], exact: Callable[[], LMHead], fitted: Fitted
) -> Projection | Scaling | None:
    """Return the projection; its file and the head's are made anew where they are damaged."""
    projection: Projection | Scaling | None = None
    if (part := index["projection"]) is not None:
        if _projection_fault(folder, index):
            made = fitted(index)
            assert made is not None
            _rewrite(folder / PROJECTION, _projection_bytes(made), part)
        projection = _read_projection(folder / PROJECTION)
    if head_fault(folder, index, checksum=True):
        _rewrite(folder / HEAD, to_bytes(_stored_head(exact(), projection)), index["head"])
    return projection


def _rewrite(path: Path, content: bytes, known: dict[str, Any]) -> None:
    found = write_part(path, content)
    if any(found[name] != known[name] for name in found):
        path.unlink()
        raise ValueError(
            f"{path} was damaged and cannot be made again as it was (another device or library computes other digits): "
            "put the old file back, or give another folder"
        )


def _sampled(data: Any, sample: int) -> tuple[list[int], list[int]]:
    """Choose rows to find directions from, with about ``sample`` tokens, and others to measure errors on; both are
    evenly spread."""
    counts = [len(target_positions(data[index]["labels"])) for index in range(len(data))]
    used = [index for index, count in enumerate(counts) if count] or [0]
    chosen = used[:: max(1, sum(counts) // sample)]
    held_out = chosen[_EACH // 2 :: _EACH] or chosen[-1:]
    kept, tokens = [], 0
    for row in held_out[:: max(1, sum(counts[row] for row in held_out) // _HELD_OUT)]:
        kept.append(row)
        tokens += counts[row]
        if tokens >= _HELD_OUT:
            break
    return [row for row in chosen if row not in set(held_out)] or chosen, kept


def _states_of(runs: Runs, rows: Sequence[int]) -> LMHead:
    """The head on all targets of these rows."""
    found = [run.head for run in runs(rows)]
    return replace(found[0], hidden=torch.cat([head.hidden for head in found]))


def _stored_head(exact: LMHead, projection: Projection | Scaling | None) -> LMHead:
    if projection is not None:
        return projection.head(exact)
    bias = None if exact.bias is None else exact.bias.detach().float()
    return replace(exact, weight=exact.weight.detach(), bias=bias)


def _projection_bytes(projection: Projection | Scaling) -> bytes:
    from safetensors.torch import save

    return save({name: part.cpu().contiguous() for name, part in vars(projection).items()})


def _read_projection(path: Path) -> Projection | Scaling:
    from safetensors.torch import load_file

    parts = load_file(path)
    return Scaling(**parts) if "scale" in parts else Projection(**parts)


def _projection_fault(folder: Path, index: dict[str, Any]) -> str | None:
    shape = [index["from_width"], index["width"]]
    wanted = {"mean": ("F64", shape[:1]), "down": ("F64", shape), "up": ("F64", shape)}
    if index["project"] is None:
        wanted = {"mean": ("F64", shape[:1]), "scale": ("F64", shape[:1])}
    fault = file_fault(folder / PROJECTION, index["projection"], checksum=True)
    return fault or layout_fault(folder / PROJECTION, wanted)


def _shard(
    runs: Runs, data: Any, projection: Projection | Scaling | None, dtype: str, start: int, stop: int, bar: Any
) -> tuple[bytes, dict[str, Any]]:
    from safetensors.torch import save

    offsets = offsets_of(data, start, stop)
    pieces: dict[int, dict[str, Tensor]] = {}
    for run in runs(range(start, stop)):
        states = run.head.hidden if projection is None else projection.states(run.head.hidden)
        try:
            stored = encode_states(states, dtype)
        except ValueError as error:
            raise ValueError(f"rows {start} to {stop - 1}: {error}") from error
        parts = {name: value.cpu().split(run.targets) for name, value in stored.items()}
        for number, row in enumerate(run.rows):
            pieces[row] = {name: values[number] for name, values in parts.items()}
            bar.update()
    ordered = [pieces[row] for row in range(start, stop)]
    arrays = {name: torch.cat([piece[name] for piece in ordered]) for name in ordered[0]}
    assert [len(piece["hidden"]) for piece in ordered] == [b - a for a, b in pairwise(offsets.tolist())]
    return save({"offsets": torch.from_numpy(offsets), **arrays}), {"tokens": int(offsets[-1])}
