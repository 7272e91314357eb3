"""Errors against float64, in slabs, so that no float64 copy of a weight is held."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fused_kd as fk

from .inputs import Inputs, rows_of

TOKENS = 64
SLAB_BYTES = 256 << 20


def relative_errors(
    inputs: Inputs,
    truth: Callable[[Tensor, Tensor | fk.TopK, Tensor], Tensor],
    loss: Tensor,
    d_hidden: Tensor,
    d_weight: Tensor,
) -> dict[str, float]:
    """``|x - truth| / |truth|`` of the mean loss, dH and dW (Frobenius norms).

    ``truth`` maps float64 logits (C, V) of student and teacher (or the teacher's lists, where inputs have them)
    and labels (C,) to per-token losses (C,); the logit gradient is its autograd, dH and dW follow from it by two
    float64 products."""
    h_s, w_s, h_t, w_t = (x.detach() for x in inputs[:4])
    N, V = h_s.shape[0], w_s.shape[0]
    dz = torch.empty(N, V, dtype=torch.float64, device=h_s.device)
    total = 0.0
    for start in range(0, N, TOKENS):
        tokens = slice(start, min(start + TOKENS, N))
        z = _logits(h_s[tokens], w_s).requires_grad_()
        teacher = _logits(h_t[tokens], w_t) if inputs.top_k is None else rows_of(inputs.top_k, tokens)
        value = truth(z, teacher, inputs.labels[tokens]).sum() / N
        (dz[tokens],) = torch.autograd.grad(value, z)
        total += float(value.detach())

    true_hidden = torch.zeros(h_s.shape, dtype=torch.float64, device=h_s.device)
    off = norm = 0.0
    for rows in _slabs(w_s):
        true_hidden += dz[:, rows] @ w_s[rows].double()
        true_weight = dz[:, rows].t() @ h_s.double()
        norm += float(true_weight.square().sum())
        off += float((d_weight[rows].double() - true_weight).square().sum())
    return {
        "loss": abs(float(loss.detach()) - total) / max(abs(total), 1e-300),
        "d_hidden": float((d_hidden.double() - true_hidden).norm() / true_hidden.norm()),
        "d_weight": (off / norm) ** 0.5,
    }


def _slabs(weight: Tensor) -> list[slice]:
    V, H = weight.shape
    step = max(1, SLAB_BYTES // (8 * H))
    return [slice(start, min(start + step, V)) for start in range(0, V, step)]


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    z = torch.empty(hidden.shape[0], weight.shape[0], dtype=torch.float64, device=hidden.device)
    for rows in _slabs(weight):
        torch.mm(hidden.double(), weight[rows].double().t(), out=z[:, rows])
    return z
