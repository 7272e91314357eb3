"""The floor: nothing but the GEMMs of a distillation step, four of them or, where no teacher has logits, three."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import Inputs


class Floor:
    """Student logits, teacher logits, dH, dW into outputs allocated once.

    ``teacher``: whether one has logits; never where the inputs have its lists. ``tokens``: how many are valid (None:
    all). Low-precision operands (CUDA only) go into fp32 outputs, by the calls that the engine makes. One buffer
    serves both logits; in fp32 it also stands for their gradient."""

    def __init__(self, inputs: Inputs, teacher: bool = True, tokens: int | None = None) -> None:
        self.h_s, self.h_t = inputs.hidden_s.detach()[:tokens], inputs.hidden_t[:tokens]
        self.w_s, self.w_t = inputs.weight_s.detach(), inputs.weight_t
        self.teacher = teacher and inputs.top_k is None
        device, dtype = self.h_s.device, self.h_s.dtype
        N, V = self.h_s.shape[0], self.w_s.shape[0]
        self.logits = torch.zeros(N, V, device=device)
        # Random digits: power, and with it the clock, depends on them.
        self.dlogits = self.logits if dtype == torch.float32 else torch.empty_like(self.logits, dtype=dtype).normal_()
        self.d_hidden = torch.zeros(self.h_s.shape, device=device)
        self.d_weight = torch.zeros(self.w_s.shape, device=device)

    def __call__(self) -> None:
        self.forward()
        _gemm(self.dlogits, self.w_s, self.d_hidden)
        _gemm(self.dlogits.t(), self.h_s, self.d_weight)

    def forward(self) -> None:
        """The logits alone."""
        _gemm(self.h_s, self.w_s.t(), self.logits)
        if self.teacher:
            _gemm(self.h_t, self.w_t.t(), self.logits)


def _gemm(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
