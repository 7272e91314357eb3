"""Compile the Triton kernels for GPUs that need not be present; print what each uses, one JSON object a line.

Run by test_triton_compile.py in a process of its own, because TRITON_INTERPRET=1 leaves nothing to compile.
The kernels come from real calls of the rows and of the streaming engine's sweeps, whose launches are diverted into
compilation.

``python -m tests.compile_kernels --write`` writes kernel_budget.json, which the test holds kernels to. Its diff shows
what a change costs.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fused_kd.divergences import DIVERGENCES
from fused_kd.engine.chunked import Side
from fused_kd.engine.streaming_sweeps import Sweeps
from fused_kd.objectives import OBJECTIVES
from fused_kd.rows.base import Logits, RowInputs, RowOutputs, Shards, Sparse
from fused_kd.rows.sharded_triton import TritonRow
from fused_kd.rows.top_k_triton import row as top_k_row
from fused_kd.rows.triton_row import row

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BUDGET = Path(__file__).with_name("kernel_budget.json")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# The student's and the teacher's dtype, and that of dlogits or None for the loss alone.
DTYPES = {
    "loss": (FP32, FP32, None),
    "in_place": (FP32, FP32, FP32),
    "bf16_logits": (BF16, BF16, BF16),
}


class Offline:
    """A driver that names a target and can do nothing else."""

    def __init__(self, index: int, target: GPUTarget) -> None:
        self.index, self.target = index, target

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def cases() -> dict[str, Callable[[], None]]:
    """Calls that launch one kernel or, for top-k teachers, two."""
    dense = {name: functools.partial(row, *arguments) for name, arguments in _rows().items()}
    return dense | {
        f"top_k/K={K}/{'fp32' if dtype == FP32 else 'bf16'}{'/cold' if cold else ''}": functools.partial(
            _top_k, K, dtype, cold
        )
        for K in (64, 256)
        for dtype in (FP32, BF16)
        for cold in (False, True)
    }


def _top_k(K: int, dtype: torch.dtype, cold: bool) -> None:
    """The row's own two kernels; what is left of it is a dense row."""
    inputs, outputs = _case("forward_kd", dtype, dtype, dtype, cold=cold)
    teacher = Sparse(torch.zeros(1, K + 1, dtype=torch.int64), torch.zeros(1, K + 1), torch.zeros(1), "bucket")
    top_k_row(lambda inputs, outputs: None, inputs._replace(teacher=teacher), outputs)


def _rows() -> dict[str, tuple[RowInputs, RowOutputs]]:
    made = {f"{name}/{kind}": _case(name, *dtypes) for name in OBJECTIVES for kind, dtypes in DTYPES.items()}
    for name in ("sft", "self_evolution"):
        made[f"{name}/softcap+weights"] = _case(name, FP32, FP32, BF16, softcap=30.0, weights=True)
    for name in ("forward_kd", "skew_teacher"):
        made[f"{name}/cold"] = _case(name, FP32, FP32, BF16, cold=True)
    made["reverse_kd/cold+softcap+weights"] = _case(
        "reverse_kd", BF16, BF16, BF16, cold=True, softcap=30.0, weights=True
    )
    made["self_evolution/bf16_out"] = _case("self_evolution", FP32, FP32, BF16)
    made["self_evolution/mixed_dtypes"] = _case("self_evolution", FP16, FP32, FP32)
    made["self_evolution/odd"] = _case("self_evolution", FP32, BF16, FP32, V=50257)
    made["self_evolution/V=1"] = _case("self_evolution", FP32, FP32, FP32, V=1)
    return made


def _case(
    name: str,
    student: torch.dtype,
    teacher: torch.dtype,
    gradient: torch.dtype | None,
    *,
    V: int = 128256,
    softcap: float | None = None,
    weights: bool = False,
    cold: bool = False,
) -> tuple[RowInputs, RowOutputs]:
    spec = OBJECTIVES[name].kind
    z = torch.empty(1, V, dtype=student)
    inputs = RowInputs(
        Logits(z, 1.0, softcap, True),
        None if spec.divergence is None else Logits(torch.empty(1, V, dtype=teacher), 1.0, softcap, True),
        torch.zeros(1, dtype=torch.int64),
        torch.ones(1) if weights else None,
        torch.zeros(5),
        spec,
        cold,
    )
    dlogits = None if gradient is None else z if gradient == student else torch.empty(1, V, dtype=gradient)
    outputs = RowOutputs(torch.empty(1), torch.empty(1), torch.empty(1, dtype=torch.bool), dlogits)
    return inputs, outputs


SWEEPS = ("statistics", "sums", "gradient")


def streaming_cases() -> dict[str, Callable[[], None]]:
    """Representative calls: aligned heads, the widest arithmetic, logits on both sides."""
    chosen = {
        "self_evolution/bf16": (_sweeps("self_evolution", BF16), (*SWEEPS, "filtered", "dH", "dW")),
        "self_evolution/fp32": (_sweeps("self_evolution", FP32), SWEEPS),
        "generalized_jsd/bf16": (_sweeps("generalized_jsd", BF16), ("sums", "gradient")),
        "sft/bf16": (_sweeps("sft", BF16), ("statistics",)),
        "reverse_kd/bf16": (_sweeps("reverse_kd", BF16), ("gradient",)),
        "forward_kd/cold": (_sweeps("forward_kd", BF16, cold=True), ("gradient",)),
        "skew_teacher/cold": (_sweeps("skew_teacher", BF16, cold=True, softcap=30.0, bias=True), SWEEPS),
        "self_evolution/logits": (_sweeps("self_evolution", BF16, heads=False), SWEEPS),
        "self_evolution/odd_logits": (_sweeps("self_evolution", BF16, heads=False, V=251), SWEEPS),
    }
    return {
        f"streaming/{name}/{kernel}": _streaming_launches(sweeps)[kernel]
        for name, (sweeps, kernels) in chosen.items()
        for kernel in kernels
    }


def sharded_cases() -> dict[str, Callable[[], None]]:
    """A call for each kernel of a vocabulary slice, by objective."""
    made: dict[str, Callable[[], None]] = {}
    for title, name, dtype, options in (
        ("sft", "sft", FP32, {}),
        ("self_evolution", "self_evolution", FP32, {}),
        ("self_evolution/bf16", "self_evolution", BF16, {"softcap": 30.0, "weights": True}),
        ("skew_teacher/cold", "skew_teacher", FP32, {"cold": True}),
        ("generalized_jsd", "generalized_jsd", FP32, {}),
    ):
        inputs, outputs = _case(name, FP32, FP32, dtype, **options)
        kernels = SWEEPS if inputs.spec.divergence not in (None, "kl") else (SWEEPS[0], SWEEPS[2])
        made |= {
            f"sharded/{title}/{kernel}": functools.partial(_sharded, inputs, outputs, kernel) for kernel in kernels
        }
    return made


def _sharded(inputs: RowInputs, outputs: RowOutputs, kernel: str) -> None:
    row = TritonRow(inputs, outputs, Shards("", 0, (inputs.student.raw.shape[1],)))
    of = row._join(torch.ones(1, 1, 10))
    use, divergence = torch.ones(1, dtype=torch.bool), DIVERGENCES[inputs.spec.divergence or "kl"]
    if kernel == "statistics":
        row.statistics()
    elif kernel == "sums":
        row.sums(of, divergence, use, None, 0.5)
    else:
        row.gradient(of, divergence, use, torch.zeros(1, 1), 0.5)


def _sweeps(
    name: str,
    dtype: torch.dtype,
    *,
    heads: bool = True,
    cold: bool = False,
    softcap: float | None = None,
    bias: bool = False,
    n: int = 64,
    H: int = 64,
    V: int = 256,
) -> Sweeps:
    """Sizes reach the kernels at run time; only that they are multiples of 16 matters here, as real ones are."""
    spec = OBJECTIVES[name].kind
    source = torch.empty(n, H if heads else V, dtype=dtype)
    weight = torch.empty(V, H, dtype=dtype) if heads else None
    side = Side(source, weight, torch.empty(V, dtype=dtype) if bias else None, 1.0, softcap)
    teacher = None if spec.divergence is None else side
    return Sweeps(side, teacher, None, torch.zeros(n, dtype=torch.int64), torch.zeros(5), spec, cold, V, None)


def _streaming_launches(sweeps: Sweeps) -> dict[str, Callable[[], None]]:
    """By name, a call for each kernel of the streaming engine that a case uses."""
    n, V, H = sweeps.n, sweeps._vocab, 64
    positions, columns = slice(0, n), slice(0, V)
    dtype = sweeps._student[0].dtype
    weight = sweeps._student[3]
    out, vector = torch.empty(n, V, dtype=dtype), torch.empty(n)
    mask, flags = torch.ones(n, dtype=torch.bool), torch.empty(n, V, dtype=torch.uint8)
    sweeps._chosen = mask if sweeps.needs_sums else None
    made: dict[str, Callable[[], None]] = {"statistics": lambda: sweeps._statistics(2, vector, vector, mask)}
    if sweeps.needs_sums:
        made["sums"] = lambda: sweeps._sums(2, mask, vector)
    made["gradient"] = lambda: sweeps.gradient(out, positions, columns, by_token=weight is None, weights=None)
    if weight is not None:
        flags = sweeps.flags(positions, columns)
        made["filtered"] = lambda: sweeps.gradient(
            out, positions, columns, by_token=False, weights=vector, flags=flags, threshold=1e-4
        )
        made["dH"] = lambda: sweeps.flagged_product(torch.empty(n, H), out, weight, flags, dtype=dtype, add=True)
        made["dW"] = lambda: sweeps.flagged_product(
            torch.empty(V, H), out, sweeps._student[0], flags, dtype=dtype, add=True,
            tokens=sweeps.tokens, transposed=True,
        )  # fmt: skip
    return made


def divert_launches() -> list[Any]:
    """Make every launch compile instead; the compiled kernels arrive in the returned list."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, warmup=True, **kwargs))
        return compiled[-1]

    JITFunction.run = compile_only  # type: ignore[method-assign]
    return compiled


def find_cuobjdump() -> str | None:
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


def nvidia_usage(kernel: Any, cuobjdump: str | None) -> dict[str, Any]:
    ptx = kernel.asm["ptx"]
    found: dict[str, Any] = {
        "vector_loads": "ld.global.v4" in ptx,
        "wgmma": next(iter(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m\w+)\.", ptx)), None),
        "products": next((name for name in ("tcgen05", "wgmma", "mma.sync") if name in ptx), None),
        "async_copies": "cp.async.cg.shared.global" in ptx,  # of 16 bytes; narrower ones are cp.async.ca
    }
    if cuobjdump is None:
        return found | {"missing": "cuobjdump is neither in triton's wheel nor on the PATH"}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        text = subprocess.run([cuobjdump, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return found | {"registers": usage["REG"], "stack": usage["STACK"], "spills": usage["LOCAL"], "parked": 0}


def amd_usage(kernel: Any) -> dict[str, Any]:
    usage = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", kernel.asm["amdgcn"], re.MULTILINE)}
    return {
        "registers": usage["vgpr_count"],
        "stack": usage["private_segment_fixed_size"],
        "spills": usage["vgpr_spill_count"],
        # Scalar registers kept in lanes of vector registers: moves, not memory.
        "parked": usage["sgpr_spill_count"],
    }


def measure(targets: list[str]) -> Iterator[dict[str, Any]]:
    """What each kernel uses: ``registers``, ``stack``, ``spills``, or ``error`` or ``missing`` (why it is unknown)."""
    compiled = divert_launches()
    cuobjdump = find_cuobjdump()
    for index, target in enumerate(targets):
        triton.runtime.driver.set_active(Offline(index, TARGETS[target]))
        nvidia = TARGETS[target].backend == "cuda"
        for name, launch in (cases() | streaming_cases() | sharded_cases()).items():  # tiles depend on the target
            compiled.clear()
            try:
                launch()
            except Exception as error:  # reported by the test that reads this
                yield {"target": target, "case": name, "error": f"{type(error).__name__}: {error}"}
                continue
            for kernel in compiled:
                usage = nvidia_usage(kernel, cuobjdump) if nvidia else amd_usage(kernel)
                part = kernel.name.removesuffix("_kernel")
                case = name if len(compiled) == 1 or name.endswith(f"/{part}") else f"{name}/{part}"
                yield {"target": target, "case": case} | usage


def write_budget() -> None:
    """All cases of all targets, a line each."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for kernel in measure(list(TARGETS)):
        entry = {key: kernel[key] for key in ("registers", "stack", "spills")}
        table.setdefault(kernel["case"], {})[kernel["target"]] = entry
    lines = ",\n".join(f"    {json.dumps(case)}: {json.dumps(entry)}" for case, entry in table.items())
    version = json.dumps(triton.__version__)
    BUDGET.write_text(f'{{\n  "triton": {version},\n  "kernels": {{\n{lines}\n  }}\n}}\n')


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write_budget()
    else:
        for kernel in measure(sys.argv[1:] or list(TARGETS)):
            print(json.dumps(kernel), flush=True)
