"""What the stages of ``python -m bench gpu`` measure; each runs in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fused_kd.tuning import Alternative, alternatives, tuned

from . import environment, gpu_tests
from .machine import measure_machine
from .measure import GAMMAS, Calls, Flush, RowProblem, interleaved
from .problems import GPU_SHAPES, ODD_SHAPE, REHEARSAL_SHAPES, Inputs, Shape, Variant, make_inputs
from .registry import GROUPS, IMPLEMENTATIONS, OURS, SELF_EVOLUTION, Step
from .session import BROKEN, NO_GPU, ROOT, Lines, device_works, read
from .worker import Case, guarded
from .worker import row as row_of

EASY, HARD, MIXED = Variant("easy"), Variant("hard"), Variant()
ROW_TOKENS = 2048
BACKENDS = ("triton", "cuda")
# What memcheck runs, and what a rehearsal has for tests.
SANITIZED, REHEARSED = ROOT / "tests" / "test_gpu.py", ROOT / "tests" / "test_tuning.py"


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
    about = [row for row in read(out / "gpu.jsonl") if row["stage"] == "environment"][-1]
    return STAGES[kind](Run(name, out, rehearse, about["code"]), *([rest] if rest else [])) or 0


def _environment(out: Path, rehearse: bool, cache: Path | None) -> int:
    if not rehearse and (reason := environment.unsupported()):
        print(f"no stage can run: {reason}", flush=True)
        return NO_GPU
    device = "cpu" if rehearse else "cuda"
    source = environment.source(*environment.GPU_SOURCES)
    fields: dict[str, Any] = {"hardware": environment.hardware(device), "versions": environment.versions()}
    fields |= {"source": source, "now": environment.now(), "peers": peers_in_order()}
    if cache is not None:
        from .kernels import adopt

        fields["cache"] = adopt(cache)
    code = f"{source['digest']}{'-rehearsal' if rehearse else ''}"
    Lines(out / "gpu.jsonl", code).put("environment", "environment", "ok", **fields)
    return 0


def peers_in_order() -> list[str]:
    """Plain PyTorch's ways of the gated objective, then group by group ours, the peers, plain PyTorch's."""
    plain = ("eager", "torch.compile")
    others = [
        name
        for group in GROUPS
        for name, known in sorted(IMPLEMENTATIONS.items(), key=lambda item: item[0].startswith(plain))
        if known.group == group and name not in plain and (group != SELF_EVOLUTION or "top-k" in name)
    ]
    return [*plain, *sorted(others, key=lambda name: "top-k" in name)]


def _machine(run: Run) -> None:
    size, m = (1 << 20, 128) if run.rehearse else (2 << 30, 8192)
    source = torch.ones(size // 4, device=run.device)
    target = torch.empty_like(source)
    run.measure("copy", {"copy": lambda: target.copy_(source)}, {"bytes": 2 * source.nbytes})
    a, b = (torch.randn(m, m, device=run.device).to(run.dtype) for _ in range(2))
    run.measure(f"gemm {m}", {"gemm": lambda: a @ b}, {"flops": 2 * m**3})
    numbers = partial(measure_machine, run.device, run.dtype, shrink=16 if run.rehearse else 1)
    run.put("numbers", lambda: {"machine": numbers(), "dtype": str(run.dtype)})


def _tests(run: Run) -> int:
    if importlib.util.find_spec("pytest") is None:
        run.add("tests", "missing", reason="pytest is not installed")
        return 0
    select = [str(REHEARSED), "-m", ""] if run.rehearse else [*gpu_tests.gpu_files(), "-m", "gpu"]
    found = gpu_tests.run_tests(
        run.out / "tests" / run.lines.code,  # what passed with other code must pass again
        gpu_tests.TEST_SECONDS,
        select=select,
        processes=2 if run.rehearse else gpu_tests.PROCESSES,
        tell=partial(print, flush=True),
    )
    bad = [f"{name}: {reason}" for name, reason in found["failing"].items()] + found["errors"]
    first = bad[0][:300] if bad else f"{found['not reached']} not reached" if found["not reached"] else ""
    run.add("tests", "failed" if first else "ok", reason=first, **found)
    print(first)
    return int(bool(first))


def _tool(run: Run, name: str, options: list[str], command: list[str], log: str) -> None:
    """A tool of the CUDA toolkit around a command of Python's, where it is on the PATH."""
    path = shutil.which(name)
    if path is None:
        run.add(name, "missing", reason=f"{name} is not on the PATH")
        return
    done = subprocess.run([path, *options, sys.executable, *command], capture_output=True, text=True)
    text = done.stdout + done.stderr
    (run.out / log).write_text(text)
    said = [line for line in text.splitlines() if line.startswith(("=====", "==ERROR"))]
    reason = "" if done.returncode == 0 else (said or text.strip().splitlines() or ["?"])[-1][:300]
    run.add(name, "failed" if reason else "ok", reason=reason, file=log)


def _sanitizer(run: Run) -> None:
    """memcheck on two small tests of the CUDA row."""
    (run.out / "sanitizer").mkdir(exist_ok=True)
    share = ["-p", "bench.gpu_tests", "--share", "0/10", "--lines", str(run.out / "sanitizer" / "lines.jsonl")]
    pytest = ["-m", "pytest", str(SANITIZED), "-m", "gpu", "-k", "cuda_row and small"]
    # cuda-bindings asks for functions that a driver may lack: refused calls are no fault of a kernel.
    options = ["--tool", "memcheck", "--error-exitcode", "3", "--report-api-errors", "no"]
    _tool(run, "compute-sanitizer", options, [*pytest, "-p", "no:cacheprovider", *share], "sanitizer.log")


def _ncu(run: Run, backend: str) -> None:
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats", "LaunchStats")
    # ncu would lock the clocks, which are not ours to set.
    options = ["--clock-control", "none", *(text for section in sections for text in ("--section", section))]
    options += ["--kernel-name", "regex:row", "--launch-count", "1"]
    command = ["-m", "bench", "gpu", "--out", str(run.out), "--stage", f"one-row:{backend}"]
    _tool(run, "ncu", options, command, f"ncu-{backend}.log")


def _one_row(run: Run, backend: str) -> None:
    """For a profiler to look at."""
    shape = run.shapes["A"]
    RowProblem(64 if run.rehearse else 1024, shape.V, run.device, run.dtype).call(backend, "hard")()


def _row_call(run: Run, key: str, problem: RowProblem, backend: str, tokens: str) -> Callable[[], None] | None:
    """A row that has run once; None where it does not, and a row of the results that says why."""
    if key in run.finished:  # it failed before
        return None
    calls: list[Callable[[], None]] = []

    def first() -> dict[str, Any]:
        call = problem.call(backend, tokens)
        call()
        calls.append(call)
        return {}

    if failure := guarded(first, "status"):
        run.add(key, failure["status"], reason=failure["reason"])
        return None
    return calls[0]


def _rows(run: Run) -> None:
    """Each row alone beside a copy of device memory, in turns."""
    for name in run.shapes:
        for tokens in GAMMAS:
            key = f"{name} {tokens}"
            if key in run.finished:
                continue
            problem = run.row_problem(name)
            calls: Calls = {"copy": problem.copy}
            for backend in run.backends:
                if call := _row_call(run, f"{key} {backend}", problem, backend, tokens):
                    calls[backend] = call
            about = {"copy_bytes": problem.copy_bytes, "least_bytes": problem.least_bytes}
            run.measure(key, calls, about)


def _case(run: Run, key: str, case: Case, variant: Variant, inputs: Inputs | None) -> Inputs | None:
    """A row of the registry's implementation; the inputs, for the next."""
    if key in run.finished:
        return inputs
    if reason := case.missing():
        run.add(key, "missing", reason=reason)
        return inputs
    found, inputs = row_of(case, variant, inputs)
    run.add(key, found.pop("status"), **found)
    return inputs


def _steps(run: Run, name: str) -> None:
    shape = run.shapes[name]
    inputs: Inputs | None = None
    for variant in (EASY, HARD, MIXED):
        for backend in run.backends:
            case = run.case(shape, f"fused_kd {backend}", error_tokens=min(shape.N, 256))
            inputs = _case(run, f"{case.implementation} {variant}", case, variant, inputs)


def _streaming(run: Run, name: str) -> None:
    inputs: Inputs | None = None
    for variant in (EASY, HARD):
        case = run.case(run.shapes[name], "fused_kd streaming", warmup=1, rounds=3, error_tokens=64)
        inputs = _case(run, str(variant), case, variant, inputs)


def _peers(run: Run, name: str) -> None:
    case = run.case(run.shapes["A"], name, error_tokens=64 if run.rehearse else 256, rounds=5)
    _case(run, name, case, MIXED, None)


def _choices(run: Run, affects: str) -> None:
    """Every other value of a field of fused_kd.tuning against its default, in turns."""
    found = alternatives(affects)
    for name in ("A", "B"):
        if affects == "row":
            backend, problem = run.backends[0], run.row_problem(name)
            for tokens in GAMMAS:
                what = f"{name} {backend} {tokens}"
                if call := _row_call(run, what, problem, backend, tokens):
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
        step = IMPLEMENTATIONS[OURS[SELF_EVOLUTION]].build(inputs, inputs.gamma("mixed"))
        _backward(step, inputs.labels)
        on_gpu = run.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as found:
            inputs.drop_gradients()
            _backward(step, inputs.labels)
            if on_gpu:
                torch.cuda.synchronize()
        events = found.key_averages()
        by = "device_time_total" if on_gpu else "cpu_time_total"
        (run.out / "profile-A.txt").write_text(events.table(sort_by=by, row_limit=30, max_name_column_width=80))
        first = sorted(events, key=lambda e: -getattr(e, f"self_{by}"))[:12]
        top = [[e.key[:80], e.count, getattr(e, f"self_{by}") / 1e3] for e in first]
        return {"file": "profile-A.txt", "top": top}

    run.put("A", profiled)


STAGES: dict[str, Callable[..., int | None]] = {
    "machine": _machine,
    "tests": _tests,
    "sanitizer": _sanitizer,
    "rows": _rows,
    "steps": _steps,
    "streaming": _streaming,
    "choices": _choices,
    "profile": _profile,
    "ncu": _ncu,
    "one-row": _one_row,
    "peers": _peers,
}
