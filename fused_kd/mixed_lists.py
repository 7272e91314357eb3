"""Mixtures of which a list is all that is known: what several teachers have on the entries that their lists share.

A list with the tail "renormalize" or "uniform" is a distribution over the vocabulary, and so is a mixture of them: on
all of their entries together, with the others' uniform shares added up. A "bucket" says of its rest only how much it
is. Its mixture with others is over the entries that all buckets share, where everybody else is read too, and one rest.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import is_looked_at
from .engines.problem import IGNORED
from .inputs import LMHead, TopK
from .lists import log_probs_at
from .mixtures import Mixture
from .rows.top_k import sparse_teacher
from .sides import flat_side
from .terms import Number
from .tokens import check_top_k


class Known(NamedTuple):
    """A teacher's distribution, fp64 logarithms: ``log_p`` (N, K) at the ascending ``ids`` (N, K), V where there is
    none; what ``each`` (N,) of the other entries has, -inf where that is nothing or not known; and their ``rest``."""

    ids: Tensor
    log_p: Tensor
    each: Tensor
    rest: Tensor


def as_one_list(
    mixture: Mixture, temperature: Number, vocab: int, valid: Tensor, backend: str | None, tp_group: object = None
) -> Mixture | TopK:
    """A mixture with a bucket, or of lists alone, as one :class:`TopK` at ``temperature``; any other as it is.

    Args:
        vocab: V. valid: the tokens that carry loss, in the labels' shape. backend, tp_group: as of :class:`KDLoss`.

    Raises:
        ValueError: lists that cannot be mixed so; on the CPU, malformed ones.
    """
    lists = {name: teacher for name, teacher in mixture.named if isinstance(teacher, TopK)}
    tails = {teacher.tail for teacher in lists.values()}
    if not lists or ("bucket" not in tails and len(lists) < len(mixture.teachers)):
        return mixture
    if isinstance(temperature, Tensor):
        raise ValueError("temperature must be a number with a mixture that is a list, got a tensor")
    if "bucket" in tails and mixture.which is not None and (len(tails) > 1 or len(lists) < len(mixture.teachers)):
        raise ValueError("which must choose among lists that all have the tail 'bucket', or none of them")
    for name, teacher in mixture.named:
        shape = _tokens_shape(teacher)
        if shape != valid.shape:
            raise ValueError(f"{name} must hold the student's tokens, shape {tuple(valid.shape)}, got {tuple(shape)}")
    device = next(iter(lists.values())).log_probs.device
    carries = valid.reshape(-1).to(device, non_blocking=True)
    shares = mixture.log_shares(valid.shape, valid.reshape(-1), device).double()
    absent = dict(zip([name for name, _ in mixture.named], (shares == -math.inf).unbind(1), strict=True))
    known = {
        name: _known(teacher, temperature, vocab, torch.where(carries & ~absent[name], 0, IGNORED))
        for name, teacher in lists.items()
    }
    lost = torch.zeros_like(carries)
    if "bucket" not in tails:
        made = _union(list(known.values()), shares, vocab)
    else:
        buckets = [name for name, teacher in lists.items() if teacher.tail == "bucket"]
        without = torch.stack([absent[name] for name in buckets], 1)
        lost = without.all(1) & carries
        if is_looked_at(lost) and bool(lost.any()):
            raise ValueError(
                "weights must give a list with the tail 'bucket' a part of every token that carries loss, as it says "
                f"what is compared, got 0 at token {int(lost.nonzero()[0])} (of the flattened tokens); leave it out, "
                "or give it the tail 'uniform'"
            )
        ids = _shared([known[name].ids for name in buckets], without, vocab)
        parts = []
        for name, teacher in mixture.named:
            if isinstance(teacher, TopK):
                parts.append(_at(known[name], ids, vocab))
            else:
                parts.append(_read(teacher, name, ids, float(temperature), vocab, backend, tp_group))
        made = _mixed(ids, parts, shares)
    tail = next(tail for tail in ("bucket", "uniform", "renormalize") if tail in tails)
    ids, log_p, rest = made
    listed = ids < vocab
    log_p = log_p.masked_fill(~listed, -math.inf).masked_fill(lost.unsqueeze(1), math.nan).float()
    return TopK(
        log_p.reshape(*valid.shape, -1), ids.where(listed, 0).reshape(*valid.shape, -1), tail,
        temperature=float(temperature), log_rest=rest.float().reshape(valid.shape),
    )  # fmt: skip


def _tokens_shape(teacher: LMHead | TopK | Tensor) -> torch.Size:
    if isinstance(teacher, TopK):
        return teacher.log_probs.shape[:-1]
    return (teacher.hidden if isinstance(teacher, LMHead) else teacher).shape[:-1]


Made = tuple[Tensor, Tensor, Tensor]


def _known(teacher: TopK, temperature: float, V: int, labels: Tensor) -> Known:
    side = flat_side("teacher", teacher, None, teaches=True)[0]
    if is_looked_at(side.source):
        check_top_k(side, labels, V)
    assert side.indices is not None
    listed, bad = sparse_teacher(
        side.source, side.indices, labels.to(side.source.device, non_blocking=True), V, side.tail, reads_label=False,
        temperature=side.temperature, log_rest=side.log_rest,
    )  # fmt: skip
    log_p, rest = listed.log_probs.double() / temperature, listed.rest.double() / temperature
    log_p = log_p.masked_fill(bad.unsqueeze(1), math.nan)
    each = rest if side.tail == "uniform" else torch.full_like(rest, -math.inf)
    if side.tail == "uniform":
        rest = rest + (V - (listed.indices < V).sum(1)).double().log()
    whole = torch.logaddexp(log_p.logsumexp(1), rest)
    return Known(listed.indices, log_p - whole.unsqueeze(1), each - whole, rest - whole)


def _places(ids: Tensor, wanted: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """Where ``wanted`` (N, L) are among ascending ``ids`` (N, K), and whether they are; V is nowhere."""
    place = torch.searchsorted(ids, wanted.contiguous()).clamp(max=ids.shape[1] - 1)
    return place, (ids.gather(1, place) == wanted) & (wanted < V)


def _once(ids: Tensor, V: int) -> Tensor:
    """Sorted ids, V in place of one that was there already."""
    again = torch.nn.functional.pad(ids[:, 1:] == ids[:, :-1], (1, 0))
    return ids.masked_fill(again, V)


def _of_share(log_p: Tensor, log_share: Tensor) -> Tensor:
    """Where that is nothing, nothing of what is there counts, NaN included."""
    return (log_p + log_share).masked_fill(log_share == -math.inf, -math.inf)


def _union(known: list[Known], shares: Tensor, V: int) -> Made:
    """On the entries of all."""
    ids = _once(torch.cat([each.ids for each in known], 1).sort(1).values, V)
    log_p, log_each = [], []
    for own in known:
        place, there = _places(own.ids, ids, V)
        log_p.append(own.log_p.gather(1, place).where(there, own.each.unsqueeze(1)))
        log_each.append(own.each)
    each = _of_share(torch.stack(log_each, 1), shares).logsumexp(1)
    others = (V - (ids < V).sum(1)).double().log()
    return ids, _of_share(torch.stack(log_p, 2), shares.unsqueeze(1)).logsumexp(2), each + others


def _shared(lists: list[Tensor], absent: Tensor, V: int) -> Tensor:
    """The entries (N, K) that all lists with a part in the token have, V in place of others. ``absent`` (1 or N, lists)
    says which have none."""
    widest = max(ids.shape[1] for ids in lists)
    wide = torch.stack([torch.nn.functional.pad(ids, (0, widest - ids.shape[1]), value=V) for ids in lists], 1)
    first = (~absent).to(torch.int8).argmax(1).reshape(-1, 1, 1).expand(len(wide), 1, widest)
    ids = _once(wide.gather(1, first).squeeze(1), V)
    for i, other in enumerate(lists):
        ids = ids.where(_places(other, ids, V)[1] | absent[:, i : i + 1], V)
    return ids


def _at(known: Known, ids: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """A list's log-probabilities at ``ids`` (N, K) in any order, and the rest's."""
    place, there = _places(known.ids, ids, V)
    log_p = known.log_p.gather(1, place).where(there, known.each.unsqueeze(1)).masked_fill(ids == V, -math.inf)
    kept = _places(ids.sort(1).values, known.ids, V)[1]
    beyond = known.log_p.masked_fill(kept, -math.inf).logsumexp(1)
    outside = V - (known.ids < V).sum(1) - ((ids < V) & ~there).sum(1)
    spread = known.each + outside.double().log()
    bucket = known.rest.where(known.each == -math.inf, spread)
    return log_p, torch.logaddexp(beyond, bucket)


def _read(
    teacher: LMHead | Tensor, name: str, ids: Tensor, temperature: float, V: int, backend: str | None, tp_group: object
) -> tuple[Tensor, Tensor]:
    """As :func:`_at`, of a teacher with logits."""
    if isinstance(teacher, LMHead) and teacher.columns is not None:
        raise ValueError(f"{name} must have no columns in a mixture with a list whose tail is 'bucket'")
    wanted = ids.where(ids < V, -1).reshape(*_tokens_shape(teacher), -1)
    found = log_probs_at(teacher, wanted, temperature=temperature, vocab_size=V, backend=backend, tp_group=tp_group)
    assert found.log_rest is not None
    return found.log_probs.reshape(ids.shape).double(), found.log_rest.reshape(-1).double()


def _mixed(ids: Tensor, parts: list[tuple[Tensor, Tensor]], shares: Tensor) -> Made:
    log_p = _of_share(torch.stack([part for part, _ in parts], 2), shares.unsqueeze(1))
    rest = _of_share(torch.stack([part for _, part in parts], 1), shares)
    return ids, log_p.logsumexp(2), rest.logsumexp(1)
