"""Several teachers' probabilities as one target: their weighted sum as logits, a teacher after the other.

All in logarithms: what one teacher finds improbable keeps its digits beside others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Logits, check_per_row, unit_stride
from .select import without_cuda


def add(mixed: Tensor, logits: Logits, log_share: Tensor, temperature: Tensor, backend: str, *, first: bool) -> None:
    """Add a teacher to ``mixed``, in place: ``T log(exp(mixed / T) + w p)`` with ``p = softmax(z / T)``.

    After all teachers ``mixed`` are the logits of ``sum_i w_i p_i`` at the temperature, -inf where that is 0. Logits
    of -inf (excluded tokens, see ``docs/excluded_tokens.md``) have probability 0. A row with a NaN or +inf, or one that
    excludes all tokens, becomes NaN.

    Args:
        mixed: (C, V) fp32 with unit stride along V: the teachers so far.
        logits: (C, V) of any dtype. ``raw`` may be ``mixed`` itself where ``first``.
        log_share: (1,) or (C,) fp32 on the logits' device, ``log w``. Where it is -inf, the teacher has no part in the
            row and its logits do not count, NaN included: the row stays as it is, or is all -inf where ``first``.
        temperature: (1,) or (C,) fp32 on the logits' device, T.
        backend: from :func:`fused_kd.rows.select.choose_backend`. "cuda" has no kernel of its own for this and uses
            Triton's.
        first: whether there are no teachers so far; ``mixed`` is not read then.

    Raises:
        ValueError: for ``mixed``, ``log_share`` or ``temperature`` that do not fit, and "native" where it cannot be
            compiled.
    """
    C, V = logits.raw.shape
    if mixed.shape != (C, V) or mixed.dtype != torch.float32 or (mixed.stride(1) != 1 and V > 1):
        raise ValueError(
            f"mixed must be float32, of shape {(C, V)} and with unit stride along its rows, got {mixed.dtype}, "
            f"{tuple(mixed.shape)} with strides {mixed.stride()}"
        )
    check_per_row("log_share", log_share, C)
    check_per_row("temperature", temperature, C)
    if C == 0 or V == 0:
        return
    chosen = without_cuda(backend)
    if chosen == "triton":
        from .triton.mixing import add as implementation
    elif chosen == "native":
        from .native.mixing import add as implementation
    else:
        from .torch.mixing import add as implementation
    implementation(mixed, logits._replace(raw=unit_stride(logits.raw)), log_share, temperature, first=first)
