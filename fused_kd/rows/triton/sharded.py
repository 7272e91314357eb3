"""The sharded row with a Triton kernel for each sweep: dense teachers, every objective but ``AdaptiveKL``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...divergences import Divergence
from ..contract import RowInputs, RowOutputs, Shards, Sparse, copy_back, prepared
from ..sharded import Joined, Messages, Statistics, SweptRow, label_d
from .math import TEMPERATURE
from .row import formula_constants, guard, is_heavy, launch_constants, shape_of
from .sharded_kernels import STATISTICS, Known, gradient_kernel, statistics_kernel, sums_kernel


def row(inputs: RowInputs, outputs: RowOutputs, shards: Shards) -> Messages:
    """Fill ``outputs`` for one chunk; shapes and meaning as of :mod:`fused_kd.rows.contract`, columns of this rank."""
    own_inputs, own_outputs = prepared(inputs, outputs)
    yield from TritonRow(own_inputs, own_outputs, shards).run()
    copy_back(own_outputs, outputs)


class TritonRow(SweptRow):
    def __init__(self, inputs: RowInputs, outputs: RowOutputs, shards: Shards) -> None:
        super().__init__(inputs, outputs, shards)
        student, teacher = inputs.student, inputs.teacher
        assert not isinstance(teacher, Sparse), "lists are the torch row's"
        self.student, self.teacher = student.raw, None if teacher is None else teacher.raw
        self.options = (*shape_of(student), *shape_of(teacher))
        capped = student.softcap is not None or (teacher is not None and teacher.softcap is not None)
        excludes = teacher is not None and not (student.finite and teacher.finite)
        self.made = formula_constants(inputs.spec, inputs.cold_labels) | {"EXCLUDES": excludes}
        self.labels, self.scalars = inputs.labels, inputs.scalars
        launch = launch_constants(is_heavy(inputs.spec, capped), self.student, self.teacher)
        self.lanes = {name: launch.pop(name) for name in ("LANES", "PACK")}
        self.launch = launch

    @property
    def _strides(self) -> tuple[int, int]:
        return self.student.stride(0), 0 if self.teacher is None else self.teacher.stride(0)

    def statistics(self) -> Tensor:
        message = torch.empty(self.C, STATISTICS.value, dtype=torch.float32, device=self.labels.device)
        with guard(self.labels.device):
            statistics_kernel[(self.C,)](
                self.student, self.teacher, self.labels, self.scalars, message, self.shards.start, self.shards.size,
                *self._strides, *self.options, COLD=self.made["COLD"], EXCLUDES=self.made["EXCLUDES"],
                **self.lanes, **self.launch,
            )  # fmt: skip
        return self.said(message)

    def join(self, ranks: Statistics) -> Joined:
        T = torch.ones_like(ranks.top[0, 0, 0])
        if self.teacher is not None:
            T = self.scalars[TEMPERATURE.value].to(torch.float64)
            logits = ("top", "label", "top_t", "label_t", "beside", "beside_t")
            ranks = ranks._replace(**{name: getattr(ranks, name) / T for name in logits})
            ranks = ranks._replace(excess=ranks.excess * math.log(2.0))
        of = super().join(ranks)
        known = Known(
            s_max=of.top * T,
            s_inv=(-of.log_sum).exp(),
            t_max=of.top_t * T,
            t_inv=(-of.log_sum_t).exp(),
            log_ratio=of.log_sum_t - of.log_sum,
            label_d=torch.zeros_like(of.top) if self.teacher is None else label_d(of, self.s),
            cold_max=of.cold_top,
            cold_inv=(-of.cold_log_sum).exp(),
        )
        self.known = torch.cat(known, 1).float()
        return of

    def sums(self, of: Joined, divergence: Divergence, use: Tensor, index: Tensor | None, shares: Any) -> Tensor:
        assert index is None
        message = torch.empty(self.C, 2, dtype=torch.float32, device=self.labels.device)
        with guard(self.labels.device):
            sums_kernel[(self.C,)](
                self.student, self.teacher, self.labels, self.scalars, self.known, use.view(torch.uint8), message,
                self.shards.start, self.shards.size, *self._strides, *self.options, self.made["h"], self.made["g"],
                self.made["MIXTURE"], self.made["MIXED"], self.made["EXCLUDES"], **self.launch,
            )  # fmt: skip
        return message

    def gradient(
        self, of: Joined, divergence: Divergence | None, use: Tensor | None, total: Tensor | None, shares: Any
    ) -> None:
        out = self.outputs.dlogits
        if out is None or not out.shape[1]:
            return
        with guard(self.labels.device):
            gradient_kernel[(self.C,)](
                self.student, self.teacher, out, self.labels, self.inputs.weights, self.scalars, self.known,
                None if use is None else use.view(torch.uint8),
                None if total is None else total.contiguous(), self.shards.start, self.shards.size, *self._strides,
                out.stride(0), *self.options, self.made["g"], self.made["free_g"], self.made["MIXTURE"],
                self.made["MIXED"], self.made["HARD_LABEL"], self.made["COLD"], self.made["EXCLUDES"], **self.launch,
            )  # fmt: skip
