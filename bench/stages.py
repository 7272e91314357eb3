"""What the stages of ``python -m bench gpu`` measure; each runs in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fused_kd.tuning import Alternative, alternatives, tuned

from . import environment, stage_tools
from .bandwidth import GAMMAS, RowProblem
from .floor import _gemm
from .implementation import Step
from .implementations import GROUPS, IMPLEMENTATIONS, OURS
from .inputs import Inputs, make_inputs
from .lines import Lines
from .machine import measure_machine
from .measure import Calls, Flush, interleaved
from .process import BROKEN, NO_GPU, device_works
from .shapes import GPU_SHAPES, ODD_SHAPE, REHEARSAL_SHAPES, Shape, Variant
from .worker import Case, guarded
from .worker import row as row_of

EASY, HARD, MIXED = Variant("easy"), Variant("hard"), Variant()
GEMM_TOKENS = (1024, 2048, 4096, 8192)
ROW_TOKENS = 2048
BACKENDS = ("triton", "cuda")


class Run:
    """Where a stage runs and what it has measured before."""

    def __init__(self, stage: str, out: Path, rehearse: bool, code: str) -> None:
        self.stage, self.out, self.rehearse = stage, out, rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.dtype = torch.float32 if rehearse else torch.bfloat16
        self.shapes = {shape.name: shape for shape in (REHEARSAL_SHAPES if rehearse else (*GPU_SHAPES, ODD_SHAPE))}
        self.backends = ("torch", "native") if rehearse else BACKENDS
        self.rounds = 2 if rehearse else 10
        self.lines = Lines(out / "gpu.jsonl", code)
        self.finished = self.lines.finished(stage)
        self.flush = Flush(self.device)

    def put(self, key: str, call: Callable[[], dict[str, Any]]) -> None:
        """A row of what ``call`` finds, or of why it cannot."""
        if key not in self.finished:
            found = guarded(call, "status")
            self.add(key, found.pop("status", "ok"), **found)

    def add(self, key: str, status: str, **fields: Any) -> None:
        """Add a row. Where a failure cost the GPU's context, the stage goes on in another process."""
        self.lines.put(self.stage, key, status, **fields)
        if status == "failed" and not device_works():
            os._exit(BROKEN)

    def measure(
        self,
        key: str,
        calls: Calls,
        about: dict[str, Any],
        rounds: int | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        """A row with samples of each call, in turns, after each has run twice."""

        def timed() -> dict[str, Any]:
            interleaved(calls, 2, before or self.flush)
            return {"seconds": interleaved(calls, rounds or self.rounds, before or self.flush)} | about

        self.put(key, timed)

    def row_problem(self, name: str) -> RowProblem:
        C = 16 if self.rehearse else ROW_TOKENS
        return RowProblem(C, self.shapes[name].V, self.device, self.dtype)

    def case(self, shape: Shape, name: str, **changes: Any) -> Case:
        settings: dict[str, Any] = {"rounds": self.rounds, "warmup": 2, "error_tokens": 0, "seconds": 1.5, **changes}
        return Case(shape, name, (), self.device.type, str(self.dtype).removeprefix("torch."), **settings)


def run_stage(name: str, out: Path, *, rehearse: bool, cache: Path | None = None) -> int:
    """The exit code of a stage's process."""
    sys.stdin.readline()  # by now everything is imported
    torch.manual_seed(0)
    kind, _, rest = name.partition(":")
    if kind == "environment":
        return _environment(out, rehearse, cache)
    about = [row for row in Lines(out / "gpu.jsonl").all() if row["stage"] == "environment"][-1]
    return STAGES[kind](Run(name, out, rehearse, about["code"]), *([rest] if rest else [])) or 0


def _environment(out: Path, rehearse: bool, cache: Path | None) -> int:
    if not rehearse and (reason := environment.unsupported()):
        print(f"no stage can run: {reason}", flush=True)
        return NO_GPU
    device = "cpu" if rehearse else "cuda"
    source = environment.source(*environment.GPU_SOURCES)
    fields: dict[str, Any] = {"hardware": environment.hardware(device), "versions": environment.versions()}
    fields |= {"source": source, "now": environment.smi(), "peers": peers_in_order()}
    if cache is not None:
        from .kernels import adopt

        fields["cache"] = adopt(cache)
    Lines(out / "gpu.jsonl", f"{source['digest']}{'-rehearsal' if rehearse else ''}").put(
        "environment", "environment", "ok", **fields
    )
    return 0


def peers_in_order() -> list[str]:
    """Plain PyTorch's ways of the gated objective, then group by group ours, the peers, plain PyTorch's."""
    plain = ("eager", "torch.compile")
    others = [
        name
        for group in GROUPS
        for name, known in sorted(IMPLEMENTATIONS.items(), key=lambda item: item[0].startswith(plain))
        if known.group == group and name not in plain and (group != "self-evolution" or "top-k" in name)
    ]
    return [*plain, *(name for name in others if "top-k" not in name), *(name for name in others if "top-k" in name)]


def _machine(run: Run) -> None:
    size, m = (1 << 20, 128) if run.rehearse else (2 << 30, 8192)
    source = torch.ones(size // 4, device=run.device)
    target = torch.empty_like(source)
    run.measure("copy", {"copy": lambda: target.copy_(source)}, {"bytes": 2 * source.nbytes})
    a, b = (torch.randn(m, m, device=run.device).to(run.dtype) for _ in range(2))
    run.measure(f"gemm {m}", {"gemm": lambda: a @ b}, {"flops": 2 * m**3})
    numbers = partial(measure_machine, run.device, run.dtype, shrink=16 if run.rehearse else 1)
    run.put("numbers", lambda: {"machine": numbers(), "dtype": str(run.dtype)})


def _one_row(run: Run, backend: str) -> None:
    """For a profiler to look at."""
    shape = run.shapes["A"]
    RowProblem(64 if run.rehearse else 1024, shape.V, run.device, run.dtype).call(backend, "hard")()


def _gemms(run: Run, name: str) -> None:
    """Four kinds, fp32 and low-precision results, several numbers of tokens, dW overwritten and added to."""
    shape = run.shapes[name]
    g = torch.Generator(run.device).manual_seed(0)
    make = partial(torch.randn, generator=g, device=run.device)
    h_s, h_t = make(shape.N, shape.H_s).to(run.dtype), make(shape.N, shape.H_t).to(run.dtype)
    w_s, w_t = make(shape.V, shape.H_s).to(run.dtype), make(shape.V, shape.H_t).to(run.dtype)
    for C in (shape.N // 2, shape.N) if run.rehearse else GEMM_TOKENS:
        dz = make(C, shape.V).to(run.dtype)
        kinds = {
            "logits": (h_s[:C], w_s.t()),
            "teacher": (h_t[:C], w_t.t()),
            "dH": (dz, w_s),
            "dW": (dz.t(), h_s[:C]),
        }
        for kind, (a, b) in kinds.items():
            for result in (torch.float32, torch.bfloat16):
                for beta in (0, 1) if kind == "dW" else (0,):
                    key = f"{kind} {'fp32' if result == torch.float32 else 'bf16'} beta {beta} {C}"
                    _one_gemm(run, key, a, b, result, beta)


def _one_gemm(run: Run, key: str, a: torch.Tensor, b: torch.Tensor, result: torch.dtype, beta: int) -> None:
    if result != torch.float32 and run.rehearse:
        a, b = a.bfloat16(), b.bfloat16()
    out = torch.zeros(a.shape[0], b.shape[1], dtype=result, device=a.device)

    def call() -> None:
        if result == a.dtype:
            torch.addmm(out, a, b, out=out) if beta else torch.mm(a, b, out=out)
        elif beta:
            torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
        else:
            _gemm(a, b, out)

    run.measure(key, {"gemm": call}, {"flops": 2 * a.shape[0] * a.shape[1] * b.shape[1]}, 5)


def _row_call(run: Run, key: str, problem: RowProblem, backend: str, tokens: str) -> Callable[[], None] | None:
    """A row that has run once; None where it does not, and a row of the results that says why."""

    def first() -> dict[str, Any]:
        call = problem.call(backend, tokens)
        call()
        return {"call": call}

    found = guarded(first, "status")
    if "call" not in found:
        run.add(key, found["status"], reason=found["reason"])
        return None
    call: Callable[[], None] = found["call"]
    return call


def _rows(run: Run) -> None:
    for name in run.shapes:
        for tokens in GAMMAS:
            key = f"{name} {tokens}"
            if key in run.finished:
                continue
            problem = run.row_problem(name)
            calls: Calls = {"copy": problem.copy}
            for backend in run.backends:
                call = None
                if f"{key} {backend}" not in run.finished:  # where it failed before
                    call = _row_call(run, f"{key} {backend}", problem, backend, tokens)
                if call is not None:
                    calls[backend] = call
            about = {"copy_bytes": problem.copy_bytes, "least_bytes": problem.least_bytes}
            run.measure(key, calls, about)


def _steps(run: Run, name: str) -> None:
    shape = run.shapes[name]
    ways = [f"fused_kd {backend}" for backend in run.backends]
    errors = min(shape.N, 256)
    inputs: Inputs | None = None
    for variant in (EASY, HARD, MIXED):
        for way in ways:
            inputs = _case(run, f"{way} {variant}", run.case(shape, way, error_tokens=errors), variant, inputs)


def _case(run: Run, key: str, case: Case, variant: Variant, inputs: Inputs | None) -> Inputs | None:
    """A row of the registry's implementation; the inputs, for the next."""
    if key in run.finished:
        return inputs
    if reason := case.missing():
        run.add(key, "missing", reason=reason)
        return inputs
    found, inputs = row_of(case, variant, interleaved, inputs)
    run.add(key, found.pop("status"), **found)
    return inputs


def _streaming(run: Run, name: str) -> None:
    inputs: Inputs | None = None
    for variant in (EASY, HARD):
        case = run.case(run.shapes[name], "fused_kd streaming", warmup=1, rounds=3, error_tokens=64)
        inputs = _case(run, str(variant), case, variant, inputs)


def _against(run: Run, which: str) -> None:
    """The steps that a comparison of two checkouts is made of."""
    for name in ("A", "B"):
        inputs: Inputs | None = None
        for backend in run.backends:
            for variant in (EASY, HARD):
                case = run.case(run.shapes[name], f"fused_kd {backend}", rounds=6, purpose="against")
                inputs = _case(run, f"{name} {backend} {variant}", case, variant, inputs)


def _choices(run: Run, affects: str) -> None:
    """Every other value of a field of fused_kd.tuning against its default, in turns."""
    found = alternatives(affects)
    for name in ("A", "B"):
        if affects == "row":
            backend, problem = run.backends[0], run.row_problem(name)
            for tokens in GAMMAS:
                what = f"{name} {backend} {tokens}"
                call = None if what in run.finished else _row_call(run, what, problem, backend, tokens)
                if call is not None:
                    _compare(run, what, call, found, run.flush)
            continue
        inputs = make_inputs(run.shapes[name], run.device, run.dtype)

        def before(inputs: Inputs = inputs) -> None:
            inputs.drop_gradients()
            run.flush()

        for tokens in GAMMAS:
            step = IMPLEMENTATIONS["fused_kd"].build(inputs, inputs.gamma(tokens))
            _compare(run, f"{name} {tokens}", partial(_backward, step, inputs.labels), found, before)


def _backward(step: Step, labels: torch.Tensor) -> None:
    step(labels).backward()


def _compare(
    run: Run, what: str, call: Callable[[], object], others: list[Alternative], before: Callable[[], None]
) -> None:
    for other in others:

        def changed(other: Alternative = other) -> None:
            with tuned(**{other.name: other.value}):
                call()

        fields = {"what": what, "field": other.name, "default": str(other.default), "value": str(other.value)}
        calls: Calls = {"default": call, "other": changed}
        run.measure(f"{what} {other.name}={other.value}", calls, fields, 6, before)


def _profile(run: Run) -> None:
    """A step's kernels by time: a file, and the first of them in the row."""

    def profiled() -> dict[str, Any]:
        from torch.profiler import ProfilerActivity, profile

        inputs = make_inputs(run.shapes["A"], run.device, run.dtype)
        step = IMPLEMENTATIONS[OURS["self-evolution"]].build(inputs, inputs.gamma("mixed"))
        step(inputs.labels).backward()
        on_gpu = run.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as found:
            inputs.drop_gradients()
            step(inputs.labels).backward()
            if on_gpu:
                torch.cuda.synchronize()
        events = found.key_averages()
        by = "device_time_total" if on_gpu else "cpu_time_total"
        (run.out / "profile-A.txt").write_text(events.table(sort_by=by, row_limit=30, max_name_column_width=80))
        first = sorted(events, key=lambda e: -getattr(e, f"self_{by}"))[:12]
        top = [[e.key[:80], e.count, getattr(e, f"self_{by}") / 1e3] for e in first]
        return {"file": "profile-A.txt", "top": top}

    run.put("A", profiled)


def _peers(run: Run, name: str) -> None:
    shape = run.shapes["A"]
    tokens = 64 if run.rehearse else 256
    case = run.case(shape, name, error_tokens=tokens, rounds=5)
    _case(run, name, case, MIXED, None)


STAGES: dict[str, Callable[..., int | None]] = {
    "machine": _machine,
    "tests": stage_tools.tests,
    "sanitizer": stage_tools.sanitizer,
    "gemms": _gemms,
    "rows": _rows,
    "steps": _steps,
    "against": _against,
    "streaming": _streaming,
    "choices": _choices,
    "profile": _profile,
    "ncu": stage_tools.ncu,
    "one-row": _one_row,
    "peers": _peers,
}
