"""The sharded row with a Triton kernel for each sweep: dense teachers, every objective but ``AdaptiveKL``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...terms import Number
from ..contract import RowInputs, RowOutputs, Shards, Sparse, copy_back, prepared, scalars_stride
from ..sharded import Factors, Joined, Messages, Statistics, Sums, SweptRow, label_d
from .row import guard, is_heavy, launch_constants, shape_of
from .sharded_kernels import STATISTICS, Known, gradient_kernel, statistics_kernel, sums_kernel
from .terms import ALL_P, ALL_Y, formula_constants


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
        self.labels, self.numbers = inputs.labels, inputs.scalars
        launch = launch_constants(is_heavy(inputs.spec, capped), self.student, self.teacher)
        self.lanes = {name: launch.pop(name) for name in ("LANES", "PACK")}
        self.launch = launch

    @property
    def _strides(self) -> tuple[int, int]:
        """Of student and teacher."""
        return self.student.stride(0), 0 if self.teacher is None else self.teacher.stride(0)

    @property
    def _scalars_stride(self) -> int:
        return scalars_stride(self.numbers)

    def statistics(self) -> Tensor:
        message = torch.empty(self.C, STATISTICS.value, dtype=torch.float32, device=self.labels.device)
        with guard(self.labels.device):
            statistics_kernel[(self.C,)](
                self.student, self.teacher, self.labels, self.numbers, message, self.shards.start, self.shards.size,
                *self._strides, self._scalars_stride, *self.options, ROW=self.made["ROW"],
                EXCLUDES=self.made["EXCLUDES"], **self.lanes, **self.launch,
            )  # fmt: skip
        return self.said(message)

    def join(self, ranks: Statistics) -> Joined:
        T: Number = 1.0
        if self.teacher is not None:
            T = self.temperature.to(torch.float64) if isinstance(self.temperature, Tensor) else self.temperature
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
        )
        at_label = [label_d(of, self.scalars[i]) for i in self.spec.tabled]
        self.known = torch.cat([*known, *at_label], 1).float()
        return of

    def sums(self, of: Joined, sums: Sums) -> Tensor:
        assert sums.index is None
        use = self._use(sums)
        message = torch.empty(self.C, 2 * len(sums.terms), dtype=torch.float32, device=self.labels.device)
        with guard(self.labels.device):
            sums_kernel[(self.C,)](
                self.student, self.teacher, self.labels, self.numbers, self.known, use, message,
                self.shards.start, self.shards.size, *self._strides, self._scalars_stride, *self.options,
                TABLED=self.made["TABLED"], EXCLUDES=self.made["EXCLUDES"], **self.launch,
            )  # fmt: skip
        return message

    def _use(self, sums: Sums) -> Tensor:
        """(C,) which rows take some term's sums."""
        return torch.stack([term.use for term in sums.terms]).any(0).view(torch.uint8)

    def gradient(self, of: Joined, factors: Factors, sums: Sums | None) -> None:
        out = self.outputs.dlogits
        if out is None or not out.shape[1]:
            return
        use = own = None
        if sums is not None:
            assert sums.total is not None
            parts = [factor / self.temperature for factor in (*sums.factors, sums.total)]
            use, own = self._use(sums), self._columns(*parts)
        linear = self._linear(of, factors)
        with guard(self.labels.device):
            gradient_kernel[(self.C,)](
                self.student, self.teacher, out, self.labels, self.inputs.weights, self.numbers, self.known, linear,
                use, own, self.shards.start, self.shards.size, *self._strides, out.stride(0), self._scalars_stride,
                *self.options, TABLED=self.made["TABLED"], ROW=self.made["ROW"], EXCLUDES=self.made["EXCLUDES"],
                **self.launch,
            )  # fmt: skip

    def _columns(self, *numbers: Number) -> Tensor:
        """(C, n) fp32"""
        like = self.known[:, :1].double()
        return torch.cat([like.new_zeros(()).expand_as(like) + number for number in numbers], 1).float()

    def _linear(self, of: Joined, factors: Factors) -> Tensor:
        """The factors of :func:`fused_kd.rows.triton.shares.linear`: those of p and the label over that of q."""
        if self.teacher is None:
            return self._columns(factors.q, 0.0, factors.y, 0.0, 0.0, 0.0)
        q, p, y = self._columns(factors.q, factors.p, factors.y).double().split(1, 1)
        cold = self.inputs.cold_labels
        more: Number = 0.0
        scale = q
        if not cold and any(term.z_loss for term in self.spec.terms):
            # That of a log-sum-exp may be negative, and q's with it; without a p or label beside it, it is all of q's.
            beside = self.made["ROW"][ALL_P.value] or self.made["ROW"][ALL_Y.value]
            scale = torch.where(q > 0.0, q, 1.0) if beside else torch.zeros_like(q)
            more = q - scale
        some = torch.where(scale > 0.0, scale, 1.0)
        of_cold = factors.cold * (-of.cold_log_sum).exp() if cold else 0.0
        return self._columns(scale, p / some, 0.0 if cold else y / some, more, of_cold, y if cold else 0.0)
