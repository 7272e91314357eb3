"""Lists that are drawn, :func:`sample_of`: few entries, right on average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .engines.drawing import Drawn, drawn
from .engines.listing import Request
from .engines.problem import Side
from .inputs import LMHead, TopK, check_k
from .lists import request_of
from .rows.contract import LONGEST_IN_TRITON
from .rows.select import CUDA_OR_TRITON


def sample_of(
    head: LMHead | Tensor,
    n: int,
    *,
    k: int = 0,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
    memory_budget: int | None = None,
) -> TopK:
    """The k largest probabilities of each token, and n draws from all others: a teacher in few entries, unbiased.

    >>> teacher = sample_of(LMHead(hidden_t, weight_t), 12)
    >>> loss = KDLoss(ForwardKD())(LMHead(hidden_s, weight_s), teacher, labels)

    With m the probability of all but the k largest, each draw stands for ``m / n`` of it, and draws of the same entry
    are one entry. The average over draws of what a list says of an entry is the teacher's probability p of it. Where a
    loss's gradient is linear in p, as those of :class:`ForwardKD`, :class:`NoEvo` and sums of them with :class:`SFT`
    are (``q - yt`` over T), it is therefore right on average, unlike with the k largest alone. That needs the list's
    temperature in the loss. The *value* of such a loss is larger than the online one, since a list has less entropy
    than p. Other objectives get another gradient on average.

    No gradient flows into the head. Its logits are made twice, to list and to draw.

    Args:
        head: as of :func:`top_k_of`. A token with a logit of -inf is never drawn.
        n: draws of a token, at least 1, with replacement: one in each n-th of m in the order of ids, which varies less
            than draws that do not know of each other.
        k: entries that are listed with their own probabilities, in [0, V]; default 0. At most 2047 with Triton, as of
            :func:`top_k_of`.
        temperature: T in [1e-8, 1e12]: probabilities are softmax(logits / T).
        generator: of random numbers, on any device; default PyTorch's own, of the head's device. They are drawn for all
            tokens before logits are read: the same state gives the same lists, whatever the ``memory_budget`` (up to
            rounding, which can move a draw at the border of two entries).
        vocab_size, backend, memory_budget: as of :func:`top_k_of`.

    Returns:
        :class:`TopK` with ``tail="renormalize"``: ``log_probs`` (..., k + n) fp32, first the k largest in descending
        order, then what was drawn by ascending id, together 1; ``indices`` (..., k + n) int64. Where a list has fewer
        entries, ``log_probs`` is -inf and ``indices`` -1. A token with a NaN among its logits has NaN.

    Raises:
        TypeError, ValueError: for arguments that do not fit, or a ``memory_budget`` that is too small.
    """
    check_k(n, "n")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {generator!r}")
    request, shape = request_of(head, vocab_size, None, temperature, "renormalize", backend, memory_budget)
    at = thresholds(shape.numel(), n, generator, request.side.source.device)
    made = _draws(request, at, k, backend)
    log_probs, indices = (x.reshape(*shape, x.shape[-1]) for x in merged(made))
    return TopK(log_probs, indices, "renormalize", temperature=request.temperature)


def draws_of(
    head: LMHead | Tensor, at: Tensor, *, k: int, vocab_size: int | None = None, memory_budget: int | None = None
) -> Drawn:
    """As :func:`sample_of`, each draw by itself: where the sums of a head (N, H) or logits (N, V) pass ``at`` (N, n),
    of :func:`thresholds`."""
    return _draws(request_of(head, vocab_size, None, 1.0, "renormalize", None, memory_budget)[0], at, k, None)


def _draws(request: Request, at: Tensor, k: int, backend: str | None) -> Drawn:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an integer, got {k!r}")
    if not 0 <= k <= request.vocab:
        raise ValueError(f"k must be in [0, {request.vocab}], up to the vocabulary, got {k}")
    chosen = request.backend
    if k + 1 > LONGEST_IN_TRITON and chosen in ("triton", "cuda", CUDA_OR_TRITON):
        if backend is not None:
            raise ValueError(f"k must be at most {LONGEST_IN_TRITON - 1} with backend={backend!r}, got {k}")
        chosen = "torch"
    side, budget = request.side, request.memory_budget
    made = torch.ops.fused_kd.drawn(
        *(None if x is None else x.detach() for x in (side.source, side.weight, side.bias)),
        side.logit_scale, side.softcap, at, k, request.vocab, request.temperature, request.dtype, chosen,
        None if budget is None else min(budget, 2**63 - 1),
    )  # fmt: skip
    return Drawn(*made)


def merged(made: Drawn) -> tuple[Tensor, Tensor]:
    """(N, k + n) log-probabilities and ids of the lists: equal draws are one entry."""
    n = made.draws.shape[1]
    ordered = made.draws.sort(1).values
    another = torch.nn.functional.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    place = another.cumsum(1) - 1
    times = torch.zeros_like(ordered).scatter_add_(1, place, torch.ones_like(ordered))
    log_probs = made.log_rest.double().unsqueeze(1) + (times.double() / n).log()
    ids = torch.full_like(ordered, -1).scatter_(1, place, ordered)
    log_probs = log_probs.masked_fill(times == 0, -torch.inf).float()
    return torch.cat([made.log_probs, log_probs], 1), torch.cat([made.indices, ids], 1)


def thresholds(N: int, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """(N, n) float64 in [0, 1) on the device, one in each n-th of it."""
    source = device if generator is None else generator.device
    made = torch.rand(N, n, dtype=torch.float64, generator=generator, device=source).to(device)
    return (made + torch.arange(n, device=device)) / n


def _run(
    source: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    uniforms: Tensor,
    k: int,
    vocab: int,
    temperature: float,
    dtype: torch.dtype | None,
    backend: str,
    memory_budget: int | None,
) -> Drawn:
    request = Request(
        side=Side(source, weight, bias, logit_scale, softcap), vocab=vocab, temperature=temperature, dtype=dtype,
        backend=backend, memory_budget=memory_budget,
    )  # fmt: skip
    # Under autocast the engine's own GEMMs would be cast once more.
    with torch.autocast(source.device.type, enabled=False), torch.no_grad():
        return drawn(request, k, uniforms)


def _fake(source: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    uniforms, k = others[4], others[5]
    N, n = uniforms.shape
    return (
        source.new_empty((N, k), dtype=torch.float32),
        source.new_empty((N, k), dtype=torch.int64),
        source.new_empty(N, dtype=torch.float32),
        source.new_empty((N, n), dtype=torch.int64),
    )


_library = torch.library.Library("fused_kd", "FRAGMENT")
_library.define(
    "drawn(Tensor source, Tensor? weight, Tensor? bias, float logit_scale, float? softcap, Tensor uniforms, int k, "
    "int vocab, float temperature, ScalarType? dtype, str backend, int? memory_budget) -> (Tensor log_probs, "
    "Tensor indices, Tensor log_rest, Tensor draws)"
)
_library.impl("drawn", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fused_kd::drawn", _fake, lib=_library)
