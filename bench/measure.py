"""How one call is measured: time, peak memory, the floor of bare GEMMs, errors against float64, a row alone."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.engines.gemm import wide_product
from fused_kd.objectives import Objective
from fused_kd.rows.contract import Logits, RowInputs, RowOutputs
from fused_kd.rows.select import get_row

from .counts import row_bytes
from .problems import BETA, LAM, LOGIT_STD, TEACHER_NOISE, Inputs, rows_of

MIN_FLUSH_BYTES = 256 << 20
# About 10 ms of a GPU's clock: longer than a host takes to ask for a step's kernels.
HEAD_START_CYCLES = 20_000_000

Calls = dict[str, Callable[[], object]]
clock = time.perf_counter


class Flush:
    """Overwrites a GPU's L2 cache, outside of what is timed; nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.buffer = None
        if device.type == "cuda":
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
            self.buffer = torch.empty(max(MIN_FLUSH_BYTES, 2 * cache), dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        if self.buffer is not None:
            self.buffer.zero_()


def interleaved(calls: Calls, rounds: int, before: Callable[[], None] = lambda: None) -> dict[str, list[float]]:
    """Seconds of each call, ``rounds`` times in turn (a, b, a, b, ...), so that all meet the same noise.

    ``before`` runs untimed ahead of every call. Nothing is warmed up here; Python collects no garbage meanwhile.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                before()
                samples[name].append(seconds_of(call))
    finally:
        gc.enable()
    return samples


def seconds_of(call: Callable[[], object]) -> float:
    """Of one call; on a GPU, where one is in use, those of its stream alone.

    The GPU sleeps between two events while the host asks for the call's kernels, so that launches cost nothing that
    the GPU does not wait for. A call that itself waits for the GPU is timed with its waiting.
    """
    if not torch.cuda.is_initialized():
        start = clock()
        call()
        return clock() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START_CYCLES)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


class Memory(NamedTuple):
    """Bytes. ``peak`` during one forward and backward; ``baseline`` with inputs and gradient buffers in
    place, just before those gradients were dropped and the call began; ``gradients`` the size of those
    buffers."""

    peak: int
    baseline: int
    gradients: int

    @property
    def over_inputs_and_gradients(self) -> int:
        return self.peak - self.baseline

    @property
    def over_inputs(self) -> int:
        return self.peak - self.baseline + self.gradients


def peak_memory(
    call: Callable[[], object], drop_gradients: Callable[[], None], gradients: int, device: torch.device
) -> Memory | None:
    """:class:`Memory` of ``call``, a forward and backward that has run before and left its gradients in
    place.

    On CUDA the allocator's count. On a CPU resident memory: free heap pages and the buffers that fused_kd
    keeps are handed back to the system first, then the kernel's high-water mark is reset and read. None
    where the system does not offer that."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        baseline = torch.cuda.memory_allocated(device)
        drop_gradients()
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return Memory(torch.cuda.max_memory_allocated(device), baseline, gradients)
    _trim()
    resident = _status("VmRSS")
    drop_gradients()
    _trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    call()
    peak = _status("VmHWM")
    return None if resident is None or peak is None else Memory(peak, resident, gradients)


def _trim() -> None:
    gc.collect()
    fk.empty_cache()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # where the C library is another than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """``out (+)= a @ b``; into an fp32 result of low-precision operands (CUDA only) as the engines make it."""
    if out.dtype != a.dtype:
        wide_product(a, b, out, add=add)
    elif add:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


class Floor:
    """Nothing but the GEMMs of a step: student logits, teacher logits, dH, dW, into outputs allocated once.

    ``teacher``: whether one has logits; never where the inputs have its lists. ``tokens``: how many are valid (None:
    all). One buffer serves both logits; in fp32 it also stands for their gradient."""

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
        product(self.dlogits, self.w_s, self.d_hidden)
        product(self.dlogits.t(), self.h_s, self.d_weight)

    def forward(self) -> None:
        """The logits alone."""
        product(self.h_s, self.w_s.t(), self.logits)
        if self.teacher:
            product(self.h_t, self.w_t.t(), self.logits)


TOKENS_AT_ONCE = 64
SLAB_BYTES = 256 << 20


def relative_errors(
    inputs: Inputs,
    truth: Callable[[Tensor, Tensor | fk.TopK, Tensor], Tensor],
    loss: Tensor,
    d_hidden: Tensor,
    d_weight: Tensor,
) -> dict[str, float]:
    """``|x - truth| / |truth|`` of the mean loss, dH and dW (Frobenius norms), in slabs: no float64 copy of a weight.

    ``truth`` maps float64 logits (C, V) of student and teacher (or the teacher's lists, where inputs have them)
    and labels (C,) to per-token losses (C,); the logit gradient is its autograd, dH and dW follow from it by two
    float64 products."""
    h_s, w_s, h_t, w_t = (x.detach() for x in inputs[:4])
    N, V = h_s.shape[0], w_s.shape[0]
    dz = torch.empty(N, V, dtype=torch.float64, device=h_s.device)
    total = 0.0
    for start in range(0, N, TOKENS_AT_ONCE):
        tokens = slice(start, min(start + TOKENS_AT_ONCE, N))
        z = _float64_logits(h_s[tokens], w_s).requires_grad_()
        teacher = _float64_logits(h_t[tokens], w_t) if inputs.top_k is None else rows_of(inputs.top_k, tokens)
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


def _float64_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    z = torch.empty(hidden.shape[0], weight.shape[0], dtype=torch.float64, device=hidden.device)
    for rows in _slabs(weight):
        torch.mm(hidden.double(), weight[rows].double().t(), out=z[:, rows])
    return z


GAMMAS = {"easy": math.inf, "hard": 0.0}


class RowProblem:
    """A row implementation alone, beside a copy of memory: (C, V) fp32 logits of student and teacher, gradients in
    ``dtype``; all tokens easy or all hard."""

    def __init__(self, C: int, V: int, device: torch.device, dtype: torch.dtype) -> None:
        g = torch.Generator(device).manual_seed(0)
        self.C, self.V, self.dtype = C, V, dtype
        self.z = torch.randn(C, V, generator=g, device=device).mul_(LOGIT_STD)
        self.z_t = torch.randn(C, V, generator=g, device=device).mul_(TEACHER_NOISE * LOGIT_STD).add_(self.z)
        self.labels = torch.multinomial(self.z_t.softmax(1), 1, generator=g).squeeze(1)
        vectors = torch.empty(2, C, device=device)
        hard = torch.empty(C, dtype=torch.bool, device=device)
        self.outputs = RowOutputs(vectors[0], vectors[1], hard, torch.empty(C, V, dtype=dtype, device=device))
        self._copy = torch.empty_like(self.z)

    def copy(self) -> None:
        """What a row is compared with: (C, V) fp32 read and written."""
        self._copy.copy_(self.z)

    @property
    def copy_bytes(self) -> int:
        return 2 * self.z.nbytes

    @property
    def least_bytes(self) -> int:
        """Both logits read once and the gradient written once."""
        return int(row_bytes(self.C * self.V, self.dtype.itemsize))

    def call(self, backend: str, tokens: str) -> Callable[[], None]:
        return self.call_of(fk.SelfEvolution(lam=LAM, beta=BETA, gamma=GAMMAS[tokens]), backend)

    def call_of(self, objective: Objective, backend: str) -> Callable[[], None]:
        scalars = torch.tensor([objective.scalars()], dtype=torch.float32, device=self.z.device)
        student, teacher = Logits(self.z, 1.0, None, True), Logits(self.z_t, 1.0, None, True)
        inputs = RowInputs(student, teacher, self.labels, None, scalars, objective.spec, False)
        return functools.partial(get_row(backend), inputs, self.outputs)
