"""Lists made from a head: the k largest entries of each token, :func:`top_k_of`, or those at given ids,
:func:`log_probs_at`, with what all others hold together; streamed, so that nothing is as wide as the vocabulary."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .engines.listing import Listed, Request, at, largest
from .engines.problem import Side
from .inputs import LMHead, TopK, check_ids, check_k, check_tail_name, check_top_p, common_vocab
from .options import checked_option
from .rows.contract import LONGEST_IN_TRITON, Shards
from .rows.select import CUDA_OR_TRITON, choose_backend
from .sides import autocast_dtype, flat_side


@overload
def top_k_of(
    head: LMHead | Tensor, k: int, *, top_p: float | None = ..., temperature: float = ..., vocab_size: int | None = ...,
    tail: str = ..., backend: str | None = ..., memory_budget: int | None = ..., tp_group: Any = ...,
    return_log_sum_exp: Literal[False] = ...,
) -> TopK: ...  # fmt: skip


@overload
def top_k_of(
    head: LMHead | Tensor, k: int, *, top_p: float | None = ..., temperature: float = ..., vocab_size: int | None = ...,
    tail: str = ..., backend: str | None = ..., memory_budget: int | None = ..., tp_group: Any = ...,
    return_log_sum_exp: Literal[True],
) -> tuple[TopK, Tensor]: ...  # fmt: skip


def top_k_of(
    head: LMHead | Tensor,
    k: int,
    *,
    top_p: float | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tail: str = "bucket",
    backend: str | None = None,
    memory_budget: int | None = None,
    tp_group: Any = None,
    return_log_sum_exp: bool = False,
) -> TopK | tuple[TopK, Tensor]:
    """The k largest probabilities of each token, and exactly what all others hold: a teacher's lists on the fly.

    >>> teacher = top_k_of(LMHead(hidden_t, weight_t), 64)
    >>> loss = criterion(LMHead(hidden_s, weight_s), teacher, labels)

    No gradient flows into the head.

    Args:
        head: :class:`LMHead`, or logits (..., V) in float32, bfloat16 or float16. A logit of -inf excludes its token:
            it is not listed.
        k: entries of a list, in [1, V]; at most 2048 with Triton, whose place PyTorch's operations take for longer ones
            unless ``backend`` names it.
        top_p: in (0, 1]: list only the smallest number of entries, at least one, whose probabilities add up to it, if
            that is less than k. None: all k.
        temperature: T in [1e-8, 1e12]: probabilities are softmax(logits / T).
        vocab_size: cut to the first ``vocab_size`` logits.
        tail: of the result, see :class:`TopK`.
        backend: as of :class:`KDLoss`; "cuda" has no kernel of its own for this and uses Triton's.
        memory_budget: bytes the workspace may take beyond the head and the result; None: 8 MB of logits on a CPU, 32 MB
            on a GPU, and casts of as many rows.
        tp_group: as of :class:`KDLoss`: each rank gives its rows of the head (or its logits), and gets the lists of the
            whole vocabulary.
        return_log_sum_exp: return also log sum exp(logits / T), (...,) fp32.

    Returns:
        :class:`TopK` with ``log_probs`` (..., k) fp32 in descending order, of equal logits the lower id first;
        ``indices`` (..., k) int64; ``log_rest`` (...,) fp32, exact also where the list holds almost all; and the
        temperature. Where a list has fewer than k entries, ``log_probs`` is -inf and ``indices`` -1. A token with a NaN
        among its logits has NaN in all but its indices.

    Raises:
        TypeError, ValueError: for arguments that do not fit, or a ``memory_budget`` that is too small.
    """
    request, shape = request_of(head, vocab_size, tp_group, temperature, tail, backend, memory_budget)
    whole = request.whole
    check_k(k)
    if k > whole:
        raise ValueError(f"k must be in [1, {whole}], the vocabulary, got {k}")
    check_top_p(top_p)
    if k > LONGEST_IN_TRITON and request.backend in ("triton", "cuda", CUDA_OR_TRITON):
        if backend is not None:
            raise ValueError(f"k must be at most {LONGEST_IN_TRITON} with backend={backend!r}, got {k}")
        request = replace(request, backend="torch")
    return _made(request, shape, tail, return_log_sum_exp, k=k, top_p=1.0 if top_p is None else float(top_p))


@overload
def log_probs_at(
    head: LMHead | Tensor, indices: Tensor, *, temperature: float = ..., vocab_size: int | None = ..., tail: str = ...,
    backend: str | None = ..., memory_budget: int | None = ..., tp_group: Any = ...,
    return_log_sum_exp: Literal[False] = ...,
) -> TopK: ...  # fmt: skip


@overload
def log_probs_at(
    head: LMHead | Tensor, indices: Tensor, *, temperature: float = ..., vocab_size: int | None = ..., tail: str = ...,
    backend: str | None = ..., memory_budget: int | None = ..., tp_group: Any = ..., return_log_sum_exp: Literal[True],
) -> tuple[TopK, Tensor]: ...  # fmt: skip


def log_probs_at(
    head: LMHead | Tensor,
    indices: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tail: str = "bucket",
    backend: str | None = None,
    memory_budget: int | None = None,
    tp_group: Any = None,
    return_log_sum_exp: bool = False,
) -> TopK | tuple[TopK, Tensor]:
    """A head's log-probabilities at given ids, and exactly what all others hold: a teacher read at the student's ids.

    >>> student = LMHead(hidden_s, weight_s)
    >>> teacher = log_probs_at(LMHead(hidden_t, weight_t), top_k_of(student, 64).indices)

    No gradient flows into the head.

    Args:
        indices: (..., K) int64 or int32, K >= 1, in [0, V), none twice for a token; negative ones are left out, so that
            lists may be of different lengths.
        head, temperature, vocab_size, tail, backend, memory_budget, tp_group, return_log_sum_exp: as of
            :func:`top_k_of`.

    Returns:
        As :func:`top_k_of`, entries in the order of ``indices``. An id that the head excludes has -1e30 over T, which
        stands for log 0: -inf would leave it out of the list.

    Raises:
        TypeError, ValueError: as :func:`top_k_of`; ids out of range or given twice with tensors on the CPU. Elsewhere
            all that is said of such a token is NaN.
    """
    check_ids("indices", indices)
    request, shape = request_of(head, vocab_size, tp_group, temperature, tail, backend, memory_budget)
    if indices.dim() < 1 or indices.shape[:-1] != shape or indices.shape[-1] < 1:
        raise ValueError(
            f"indices must have the shape of the head's tokens {tuple(shape)} and K >= 1 behind, got "
            f"{tuple(indices.shape)}"
        )
    device = request.side.source.device
    if indices.device != device:
        raise ValueError(f"indices are on {indices.device}, the head on {device}; they must share one device")
    flat = indices.reshape(-1, indices.shape[-1]).long()
    return _made(request, shape, tail, return_log_sum_exp, indices=flat)


def request_of(
    head: LMHead | Tensor,
    vocab_size: int | None,
    tp_group: Any,
    temperature: float,
    tail: str,
    backend: str | None,
    memory_budget: int | None,
) -> tuple[Request, torch.Size]:
    """What is asked of the engine, and the tokens' shape."""
    check_tail_name(tail)
    if isinstance(temperature, Tensor):
        raise TypeError("temperature must be a number, one for all tokens, got a tensor")
    vocab_size, budget = checked_option("vocab_size", vocab_size), checked_option("memory_budget", memory_budget)
    temperature, backend = checked_option("temperature", temperature), checked_option("backend", backend)
    group = None
    if tp_group is not None:
        from .parallel import divide, group_of

        group = group_of(tp_group)
    side, shape, _ = flat_side("head", head, group)
    vocab, shards = side.vocab, None
    assert vocab is not None
    if group is None:
        vocab = common_vocab(vocab, None, vocab_size)
    else:
        shards = divide(group, vocab, None, vocab_size, known=False)
        vocab = shards.size
    device = side.source.device
    request = Request(
        side=side, vocab=vocab, temperature=temperature, dtype=autocast_dtype(device, head=side),
        backend=choose_backend(backend, device), memory_budget=budget, shards=shards,
    )  # fmt: skip
    return request, shape


def _made(
    request: Request,
    shape: torch.Size,
    tail: str,
    return_log_sum_exp: bool,
    *,
    indices: Tensor | None = None,
    k: int = 0,
    top_p: float = 1.0,
) -> TopK | tuple[TopK, Tensor]:
    if not isinstance(return_log_sum_exp, bool):
        raise TypeError(f"return_log_sum_exp must be True or False, got {return_log_sum_exp!r}")
    side, budget = request.side, request.memory_budget
    shards = request.shards or Shards("", 0, ())
    log_probs, ids, log_rest, log_sum_exp = torch.ops.fused_kd.listed(
        *(None if x is None else x.detach() for x in (side.source, side.weight, side.bias)),
        side.logit_scale, side.softcap, indices, k, top_p, request.vocab, request.temperature, request.dtype,
        request.backend, None if budget is None else min(budget, 2**63 - 1), shards.group, shards.rank, shards.sizes,
    )  # fmt: skip
    log_probs, ids = (x.reshape(*shape, x.shape[-1]) for x in (log_probs, ids))
    made = TopK(log_probs, ids, tail, temperature=request.temperature, log_rest=log_rest.reshape(shape))
    return (made, log_sum_exp.reshape(shape)) if return_log_sum_exp else made


def _run(
    source: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    indices: Tensor | None,
    k: int,
    top_p: float,
    vocab: int,
    temperature: float,
    dtype: torch.dtype | None,
    backend: str,
    memory_budget: int | None,
    group: str,
    rank: int,
    sizes: list[int],
) -> Listed:
    shards = Shards(group, rank, tuple(sizes)) if group else None
    request = Request(
        side=Side(source, weight, bias, logit_scale, softcap), vocab=vocab, temperature=temperature, dtype=dtype,
        backend=backend, memory_budget=memory_budget, shards=shards,
    )  # fmt: skip
    # Under autocast the engine's own GEMMs would be cast once more.
    with torch.autocast(source.device.type, enabled=False), torch.no_grad():
        if indices is None:
            return largest(request, k, top_p)
        if indices.device.type == "cpu":
            _check_indices(indices, request.whole)
        found = at(request, indices)
        bad = _twice(indices).any(1) | (indices >= request.whole).any(1)
        return found._replace(**{
            name: x.masked_fill(bad if x.dim() == 1 else bad.unsqueeze(1), math.nan)
            for name, x in found._asdict().items()
            if name != "indices"
        })  # fmt: skip


def _twice(indices: Tensor) -> Tensor:
    """(N, K - 1) which of the sorted ids repeat the one before."""
    ordered = indices.sort(1).values
    return (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)


def _check_indices(indices: Tensor, vocab: int) -> None:
    beyond = indices >= vocab
    if bool(beyond.any()):
        token, entry = beyond.nonzero()[0].tolist()
        raise ValueError(
            f"indices must be below the vocabulary {vocab}, got {int(indices[token, entry])} at token {token} (of the "
            "flattened tokens)"
        )
    twice = _twice(indices)
    if bool(twice.any()):
        token, entry = twice.nonzero()[0].tolist()
        value = int(indices[token].sort().values[entry])
        raise ValueError(
            f"indices of a token must differ, got {value} twice at token {token} (of the flattened tokens)"
        )


def _fake(source: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    indices, k = others[4], others[5]
    N, K = source.shape[0], k if indices is None else indices.shape[1]
    return (
        source.new_empty((N, K), dtype=torch.float32),
        source.new_empty((N, K), dtype=torch.int64),
        source.new_empty(N, dtype=torch.float32),
        source.new_empty(N, dtype=torch.float32),
    )


_library = torch.library.Library("fused_kd", "FRAGMENT")
_library.define(
    "listed(Tensor source, Tensor? weight, Tensor? bias, float logit_scale, float? softcap, Tensor? indices, int k, "
    "float top_p, int vocab, float temperature, ScalarType? dtype, str backend, int? memory_budget, str group, "
    "int rank, int[] sizes) -> (Tensor log_probs, Tensor indices_, Tensor log_rest, Tensor log_sum_exp)"
)
_library.impl("listed", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fused_kd::listed", _fake, lib=_library)
