"""Vocabulary parallelism: heads whose rows are divided over a group of ranks.

Each rank calls :class:`fused_kd.KDLoss` with ``tp_group`` and its own rows of both heads, the same tokens, and labels
of the whole vocabulary. It gets the loss of the whole vocabulary, the gradient of its own rows, and that of the hidden
states summed over the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .engines.sharded.exchange import Traffic, count_traffic
from .inputs import common_vocab
from .rows.contract import Shards

__all__ = ["Shards", "Traffic", "count_traffic", "predicted_traffic", "shard_rows"]

_layouts: dict[tuple[str, int, int | None], list[tuple[int, int | None]]] = {}


def group_of(tp_group: Any) -> dist.ProcessGroup:
    """The process group of what ``KDLoss`` takes as ``tp_group``: a group, or a device mesh of one dimension.

    Raises:
        TypeError: something else. ValueError: a mesh of several dimensions.
    """
    if isinstance(tp_group, dist.ProcessGroup):
        return tp_group
    if isinstance(tp_group, DeviceMesh):
        if tp_group.ndim != 1:
            raise ValueError(
                f"tp_group must be a mesh of one dimension, got one of {tp_group.ndim}: {tp_group.mesh_dim_names}; "
                "give its vocabulary dimension, such as mesh['tp']"
            )
        return tp_group.get_group()
    raise TypeError(f"tp_group must be a process group or a device mesh, got {type(tp_group).__name__}")


def divide(
    group: dist.ProcessGroup, local_s: int, local_t: int | None, vocab_size: int | None, *, known: bool = True
) -> Shards:
    """The slices over a group, cut to ``vocab_size``. With ``known`` those of an earlier call with slices of this size:
    then all ranks must have made the same calls with the same sizes.

    Args:
        local_s, local_t: this rank's rows of the student's and the teacher's head; ``local_t`` None without a teacher
            of logits.

    Raises:
        ValueError: on all ranks alike: unequal vocabularies without ``vocab_size``, one beyond them, slices of student
            and teacher that begin or end at different tokens.
    """
    key = (group.group_name, local_s, local_t)
    if not known or key not in _layouts:
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, (local_s, local_t), group=group)
        _layouts[key] = everyone
    sides = [[local for local, _ in _layouts[key]]]
    if local_t is not None:
        sides.append([local for _, local in _layouts[key] if local is not None])
    vocab = common_vocab(sum(sides[0]), None if local_t is None else sum(sides[1]), vocab_size)
    cut = [_cut(sizes, vocab) for sizes in sides]
    if cut[0] != cut[-1]:
        raise ValueError(
            f"student and teacher must be divided at the same tokens, got slices of {cut[0]} and {cut[1]} of "
            f"{vocab} tokens; fused_kd.parallel.shard_rows divides a frozen teacher like the student"
        )
    return Shards(group.group_name, dist.get_rank(group), cut[0])


def _cut(sizes: list[int], vocab: int) -> tuple[int, ...]:
    start, kept = 0, []
    for size in sizes:
        kept.append(max(0, min(size, vocab - start)))
        start += size
    return tuple(kept)


def local_tensors(name: str, tensors: list[Any], group: dist.ProcessGroup) -> tuple[list[Any], bool]:
    """This rank's tensors for DTensors of a head, ``[hidden, weight, bias]``, or of logits, ``[logits, None, None]``;
    and whether the hidden gradient is to be summed here.

    A weight that is ``Shard(0)`` or ``Replicate`` over the group gives this rank's rows. Hidden states that are
    ``Replicate`` are taken as they are; those divided over tokens are gathered, and their gradient is then summed by
    the reduce-scatter of their own backward. Other tensors are this rank's already.

    Raises:
        ValueError: a DTensor over another mesh than the group, or placed otherwise.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    def placement(which: str, x: DTensor) -> Any:
        mesh = x.device_mesh
        if mesh.ndim != 1 or dist.get_process_group_ranks(mesh.get_group()) != dist.get_process_group_ranks(group):
            raise ValueError(
                f"{name} {which} is a DTensor over {mesh}, not over tp_group; under FSDP call the loss inside the "
                "module's forward, where its parameters are gathered over the other dimension"
            )
        return x.placements[0]

    def rows(which: str, x: Tensor | None, dim: int = 0) -> Tensor | None:
        if not isinstance(x, DTensor):
            return x
        dim %= x.dim()
        found = placement(which, x)
        if isinstance(found, Replicate):
            x = x.redistribute(placements=[Shard(dim)])
        elif found != Shard(dim):
            raise ValueError(f"{name} {which} must be Shard({dim}) or Replicate over tp_group, got {found}")
        return x.to_local(grad_placements=[Shard(dim)])

    source, weight, bias = tensors
    if weight is None:
        return [rows("logits", source, -1), None, None], True
    sum_hidden = True
    if isinstance(source, DTensor):
        found = placement("hidden", source)
        if isinstance(found, Replicate):
            source = source.to_local(grad_placements=[Replicate()])
        elif isinstance(found, Shard) and found.dim < source.dim() - 1:
            source = source.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
            sum_hidden = False
        else:
            raise ValueError(f"{name} hidden must be Replicate or divided over tokens, got {found}")
    return [source, rows("weight", weight), rows("bias", bias)], sum_hidden


@torch.no_grad()
def shard_rows(weight: Tensor, sizes: tuple[int, ...] | list[int], tp_group: Any) -> Tensor:
    """This rank's rows of a weight (or bias) that is divided over the group in another way, once and for good.

    Args:
        weight: this rank's rows as they are; those of all ranks follow each other. A constant.
        sizes: rows that each rank shall have; the last rows may be left out.
        tp_group: as of ``KDLoss``.

    Returns:
        (sizes[rank], ...) in ``weight``'s dtype.

    Raises:
        ValueError: as many sizes as there are ranks are needed, of at most the rows that there are.
    """
    group = group_of(tp_group)
    P, rank = dist.get_world_size(group), dist.get_rank(group)
    everyone: list[Any] = [None] * P
    dist.all_gather_object(everyone, weight.shape[0], group=group)
    if len(sizes) != P or min(sizes) < 0 or sum(sizes) > sum(everyone):
        raise ValueError(f"sizes must be {P} numbers of rows, of {sum(everyone)} in all, got {tuple(sizes)!r}")
    bounds = [(sum(sizes[:r]), sum(sizes[: r + 1])) for r in range(P)]
    held = [(sum(everyone[:r]), sum(everyone[: r + 1])) for r in range(P)]

    def common(a: tuple[int, int], b: tuple[int, int]) -> slice:
        low = max(a[0], b[0])
        return slice(low, max(low, min(a[1], b[1])))

    start = held[rank][0]
    out = weight.new_empty((sizes[rank], *weight.shape[1:]))
    pieces = [common(held[rank], bounds[other]) for other in range(P)]
    wanted = [common(held[other], bounds[rank]) for other in range(P)]
    mine = bounds[rank][0]
    requests = []
    for other in range(P):
        here, there = pieces[other], wanted[other]
        if other == rank:
            out[there.start - mine : there.stop - mine] = weight[here.start - start : here.stop - start]
            continue
        peer = dist.get_global_rank(group, other)
        if here.stop > here.start:
            piece = weight[here.start - start : here.stop - start].contiguous()
            requests.append(dist.P2POp(dist.isend, piece, peer, group))
        if there.stop > there.start:
            requests.append(dist.P2POp(dist.irecv, out[there.start - mine : there.stop - mine], peer, group))
    for work in dist.batch_isend_irecv(requests) if requests else ():
        work.wait()
    return out


def predicted_traffic(
    N: int, H: int, ranks: int, *, swept: float = 1.0, teacher: bool = True, reduce: str | None = "all"
) -> Traffic:
    """What one rank sends in a forward and backward, by the rules of :class:`Traffic`; a chunk's messages count as one.

    Args:
        N: valid tokens. H: the student's hidden size.
        ranks: P.
        swept: share of the tokens whose divergence takes a sweep of its own: 0 for KL (``SFT``, ``ForwardKD``,
            ``NoEvo``), the hard share for Self-Evolution on the CPU, else 1.
        teacher: 9 floats a token with a dense teacher, 3 without.
        reduce: of the hidden gradient in fp32: "all", "scatter" (hidden states divided over tokens), or None.
    """
    statistics = 4.0 * N * (ranks - 1) * ((9 if teacher else 3) + 2 * swept)
    hidden = 4.0 * N * H * (ranks - 1) / ranks * {"all": 2, "scatter": 1, None: 0}[reduce]
    return Traffic(statistics, hidden, 0)
