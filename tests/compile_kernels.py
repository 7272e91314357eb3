"""Compile the Triton kernels for GPUs that need not be present; print what each uses, one JSON object a line.

Run by test_triton_compile.py in a process of its own, because TRITON_INTERPRET=1 leaves nothing to compile.
The kernels come from real calls of the rows and of the streaming engine's sweeps, whose launches are diverted into
compilation.

``--fast`` leaves out cases whose branches others have, ``--few`` all but some of each class of kernels;
``python -m tests.compat triton`` asks other releases of Triton.
``python -m tests.compile_kernels --write`` writes kernel_budget.json, which the test holds kernels to. Its diff shows
what a change costs. ``--counts CASE ...`` prints what the machine code of those cases does in each main loop on sm_90;
``CASE=BYTES`` says how many bytes an element has on all sides together, where COUNTED does not.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fused_kd.engines.gemm import Projection
from fused_kd.engines.hand_over import scale_in_place
from fused_kd.engines.problem import Problem, Side, Wanted
from fused_kd.engines.streaming.sweeps import Sweeps
from fused_kd.engines.tile_filter_triton import DeviceTiles
from fused_kd.objectives import OBJECTIVES, parse
from fused_kd.rows.contract import Leading, Logits, RowInputs, RowOutputs, Shards, Sparse
from fused_kd.rows.sharded import Statistics, Sums
from fused_kd.rows.shares import Tabled
from fused_kd.rows.torch.math import Factors
from fused_kd.rows.triton import top_k as triton_top_k
from fused_kd.rows.triton.largest import take
from fused_kd.rows.triton.mixing import add
from fused_kd.rows.triton.row import row
from fused_kd.rows.triton.sharded import TritonRow
from fused_kd.terms import STATISTICS, WITHOUT_SWEEP, Scalars

from . import sass

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BUDGET = Path(__file__).with_name("kernel_budget.json")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# Cases whose main loops are counted, on one target, and the bytes of an element on all sides together; a loop that
# reads one side of two shows twice its instructions.
COUNTED_ON = "sm_90"
COUNTED = {
    "sft/in_place": 4,
    "forward_kd/in_place": 8,
    "reverse_kd/in_place": 8,
    "self_evolution/in_place": 8,
    "self_evolution/bf16_logits": 4,
    "self_evolution/odd": 6,
    "self_evolution/padded": 8,
    "generalized_jsd/in_place": 8,
    "self_evolution/excluding": 8,
    "reverse_kd/excluding": 8,
    "sharded/self_evolution/statistics": 8,
    "sft+generalized_jsd/in_place": 8,
    "forward_kd+reverse_kd/in_place": 8,
    "self_evolution+generalized_jsd/in_place": 8,
    "mixing/first/fp32": 4,
    "mixing/more/fp32": 8,
}

# Sums of objectives, for which a kernel has the sums of several terms, or factors beside them.
SUMS = {
    "sft+generalized_jsd": "0.5*sft+0.5*generalized_jsd",
    "forward_kd+reverse_kd": "forward_kd+reverse_kd",
    "self_evolution+generalized_jsd": "self_evolution+generalized_jsd",
    "sft+z_loss": "sft+0.0001*z_loss",
}

# The student's and the teacher's dtype, and that of dlogits or None for the loss alone.
DTYPES = {
    "loss": (FP32, FP32, None),
    "in_place": (FP32, FP32, FP32),
    "bf16_logits": (BF16, BF16, BF16),
}

CHOICES = {
    # Every kernel, divergence and branch at least once, at a third of the cost.
    "--fast": re.compile(
        r"(sft|no_evo|reverse_kd|generalized_jsd|skew_(forward|reverse|reverse_detached)|total_variation|adaptive_kl)/in_place"
        r"|(symmetric_kl|todi|alpha_beta|renyi|acceptance(_mix)?|z_loss|(sft|self_evolution)\+generalized_jsd)/in_place"
        r"|self_evolution/(loss|V=1)|(self_evolution|reverse_kd)/excluding|sft/softcap\+weights|(skew_teacher|reverse_kd)/cold.*"
        r"|top_k/K=64/bf16.*|largest/k=(0|64)/.*|mixing/.*"
        r"|hand_over/.*|filter/bf16/.*"
        r"|streaming/(self_evolution/(bf16|logits)|sft/bf16|skew_teacher/cold)/.*|streaming/generalized_jsd/bf16/sums"
        r"|sharded/(sft|forward_kd|self_evolution|skew_teacher/cold|generalized_jsd)/.*"
    ),
    # The kernels whose machine code the tests look at, and one of each other class.
    "--few": re.compile(
        r"(sft|self_evolution|generalized_jsd)/in_place|self_evolution/(odd|padded|bf16_logits)|reverse_kd/excluding"
        r"|top_k/K=64/bf16(/(condense|expand))?|largest/k=64/fp32|mixing/more/fp32|hand_over/bf16|filter/bf16/flags|sharded/self_evolution/statistics"
        r"|streaming/self_evolution/bf16/(statistics|sums|gradient)(/(combine|sums_combine))?"
    ),
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
    with mock.patch.object(triton_top_k, "dense", lambda inputs, outputs: None):
        triton_top_k.row(inputs._replace(teacher=teacher), outputs)


def largest_cases() -> dict[str, Callable[[], None]]:
    """Lists of all lengths, a slab each; k = 0 sums exponentials alone."""
    made = {
        f"largest/k={k}/{name}": functools.partial(_largest, k, dtype)
        for k in (0, 1, 64, 256, 1024, 2048)
        for name, dtype in (("fp32", FP32), ("bf16", BF16))
    }
    made["largest/k=64/softcap"] = functools.partial(_largest, 64, FP32, softcap=30.0, W=4095)
    return made


def _largest(k: int, dtype: torch.dtype, softcap: float | None = None, W: int = 4096) -> None:
    raw, so_far = torch.empty(1, W, dtype=dtype), Leading.none(1, k, torch.device("cpu"))
    take(Logits(raw, 1.0, softcap, False), 0, so_far, torch.ones(1))


def mixing_cases() -> dict[str, Callable[[], None]]:
    """The first teacher, in place where it is of fp32, and another."""
    made = {
        f"mixing/{place}/{name}": functools.partial(_mixing, dtype, first=place == "first")
        for place in ("first", "more")
        for name, dtype in (("fp32", FP32), ("bf16", BF16))
    }
    made["mixing/more/softcap"] = functools.partial(_mixing, FP32, first=False, softcap=30.0, V=50257)
    return made


def _mixing(dtype: torch.dtype, *, first: bool, softcap: float | None = None, V: int = 128256) -> None:
    mixed = torch.empty(1, V)
    raw = mixed if first and dtype == FP32 else torch.empty(1, V, dtype=dtype)
    add(mixed, Logits(raw, 1.0, softcap, False), torch.zeros(1), torch.ones(1), first=first)


def _rows() -> dict[str, tuple[RowInputs, RowOutputs]]:
    made = {f"{name}/{kind}": _case(name, *dtypes) for name in OBJECTIVES for kind, dtypes in DTYPES.items()}
    for name in ("sft", "self_evolution"):
        made[f"{name}/softcap+weights"] = _case(name, FP32, FP32, BF16, softcap=30.0, weights=True)
    for name in ("forward_kd", "skew_teacher"):
        made[f"{name}/cold"] = _case(name, FP32, FP32, BF16, cold=True)
    made["reverse_kd/cold+softcap+weights"] = _case(
        "reverse_kd", BF16, BF16, BF16, cold=True, softcap=30.0, weights=True
    )
    for name in ("self_evolution", "reverse_kd", "adaptive_kl"):
        made[f"{name}/excluding"] = _case(name, FP32, FP32, FP32, finite=False)
    made["self_evolution/bf16_out"] = _case("self_evolution", FP32, FP32, BF16)
    made["self_evolution/mixed_dtypes"] = _case("self_evolution", FP16, FP32, FP32)
    made["self_evolution/odd"] = _case("self_evolution", FP32, BF16, FP32, V=50257)
    made["self_evolution/padded"] = _case("self_evolution", FP32, FP32, BF16, V=50257, stride=50304)
    for name, objective in SUMS.items():
        made[f"{name}/in_place"] = _case(objective, FP32, FP32, FP32)
    made["entropy_gated/excluding"] = _case("entropy_gated", FP32, FP32, FP32, finite=False)
    made["self_evolution/per_token"] = _case("self_evolution", FP32, FP32, FP32, per_token=True)
    made["self_evolution/statistics"] = _case("self_evolution", FP32, FP32, FP32, told=len(STATISTICS))
    made["sft/statistics"] = _case("sft", FP32, FP32, FP32, told=WITHOUT_SWEEP)
    made["self_evolution/V=1"] = _case("self_evolution", FP32, FP32, FP32, V=1)
    return made


def _case(
    name: str,
    student: torch.dtype,
    teacher: torch.dtype,
    gradient: torch.dtype | None,
    *,
    V: int = 128256,
    stride: int | None = None,
    softcap: float | None = None,
    weights: bool = False,
    cold: bool = False,
    finite: bool = True,
    per_token: bool = False,
    told: int = 0,
) -> tuple[RowInputs, RowOutputs]:
    def matrix(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(1, stride or V, dtype=dtype)[:, :V]

    spec = parse(name).spec
    z = matrix(student)
    inputs = RowInputs(
        Logits(z, 1.0, softcap, finite),
        Logits(matrix(teacher), 1.0, softcap, finite) if spec.needs_teacher else None,
        torch.zeros(1, dtype=torch.int64),
        torch.ones(1) if weights else None,
        torch.ones(2 if per_token else 1, len(spec.terms), len(Scalars._fields)),
        spec,
        cold,
    )
    dlogits = None if gradient is None else z if gradient == student else matrix(gradient)
    statistics = torch.empty(1, told) if told else None
    outputs = RowOutputs(torch.empty(1), torch.empty(1), torch.empty(1, dtype=torch.bool), dlogits, statistics)
    return inputs, outputs


def hand_over_cases() -> dict[str, Callable[[], None]]:
    return {
        f"hand_over/{name}": functools.partial(scale_in_place, torch.empty(1 << 16, dtype=dtype), torch.ones(()))
        for name, dtype in (("fp32", FP32), ("bf16", BF16))
    }


def filter_cases() -> dict[str, Callable[[], None]]:
    """Of the chunked engine's gradient GEMMs."""
    made: dict[str, Callable[[], None]] = {}
    for name, dtype in (("fp32", FP32), ("bf16", BF16)):
        dlogits, weight, hidden = (torch.empty(*size, dtype=dtype) for size in ((64, 256), (256, 64), (64, 64)))
        projection = Projection(weight, None, FP32)  # its GEMMs are not what is compiled
        projection.weight = weight
        made[f"filter/{name}/flags"] = functools.partial(DeviceTiles, projection, dlogits, torch.ones(64), 1e-4)
        made[f"filter/{name}/dH"] = functools.partial(_filtered, projection, dlogits, hidden, "dH")
        made[f"filter/{name}/dW"] = functools.partial(_filtered, projection, dlogits, hidden, "dW")
    return made


def _filtered(projection: Projection, dlogits: torch.Tensor, hidden: torch.Tensor, product: str) -> None:
    tiles = DeviceTiles.__new__(DeviceTiles)
    tiles._projection, tiles._dlogits, tiles._tile = projection, dlogits, 64 if dlogits.dtype == FP32 else 128
    tiles._flags = torch.ones(-(-64 // tiles._tile), 256 // tiles._tile, dtype=torch.uint8)
    if product == "dH":
        tiles.hidden()
    else:
        tiles.weight(torch.empty(256, 64), slice(0, 256), hidden, first=True)


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
        "self_evolution/per_token": (_sweeps("self_evolution", BF16, per_token=True), SWEEPS),
        "self_evolution+generalized_jsd/bf16": (_sweeps(SUMS["self_evolution+generalized_jsd"], BF16), SWEEPS[1:]),
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
        ("forward_kd", "forward_kd", FP32, {}),
        ("self_evolution", "self_evolution", FP32, {}),
        ("self_evolution/bf16", "self_evolution", BF16, {"softcap": 30.0, "weights": True}),
        ("skew_teacher/cold", "skew_teacher", FP32, {"cold": True}),
        ("generalized_jsd", "generalized_jsd", FP32, {}),
        ("self_evolution+generalized_jsd", SUMS["self_evolution+generalized_jsd"], FP32, {}),
    ):
        inputs, outputs = _case(name, FP32, FP32, dtype, **options)
        kernels = SWEEPS if inputs.spec.tabled else (SWEEPS[0], SWEEPS[2])
        made |= {
            f"sharded/{title}/{kernel}": functools.partial(_sharded, inputs, outputs, kernel) for kernel in kernels
        }
    return made


def _sharded(inputs: RowInputs, outputs: RowOutputs, kernel: str) -> None:
    row = TritonRow(inputs, outputs, Shards("", 0, (inputs.student.raw.shape[1],)))
    of = row.join(Statistics.of(torch.ones(1, 1, 12)))
    always = torch.ones(1, dtype=torch.bool)
    terms = [Tabled(i, inputs.spec.terms[i], always, 1.0) for i in inputs.spec.tabled]
    sums = Sums(None, terms, [(0.5, 0.5)] * len(terms), (1.0,) * len(terms), total=torch.zeros(1, 1))
    if kernel == "statistics":
        row.statistics()
    elif kernel == "sums":
        row.sums(of, sums)
    else:
        row.gradient(of, Factors(1.0, 1.0, 1.0, 1.0), sums if terms else None)


def _sweeps(
    name: str,
    dtype: torch.dtype,
    *,
    heads: bool = True,
    cold: bool = False,
    softcap: float | None = None,
    bias: bool = False,
    per_token: bool = False,
    n: int = 64,
    H: int = 64,
    V: int = 256,
) -> Sweeps:
    """Sizes reach the kernels at run time; only that they are multiples of 16 matters here, as real ones are."""
    spec = parse(name).spec
    source = torch.empty(n, H if heads else V, dtype=dtype)
    weight = torch.empty(V, H, dtype=dtype) if heads else None
    side = Side(source, weight, torch.empty(V, dtype=dtype) if bias else None, 1.0, softcap)
    teacher = side if spec.needs_teacher else None
    labels = torch.zeros(n, dtype=torch.int64)
    scalars = torch.ones(n if per_token else 1, len(spec.terms), len(Scalars._fields))
    problem = Problem(
        student=side, teacher=teacher, labels=labels, weights=None, scale=torch.ones(()), scalars=scalars,
        wanted=Wanted(True, True, True), spec_code=spec.code, cold_labels=cold, vocab=V, dtype=None, memory_budget=None,
        engine="streaming", backend="triton",
    )  # fmt: skip
    return Sweeps(problem, None, labels)


def _streaming_launches(sweeps: Sweeps) -> dict[str, Callable[[], None]]:
    """By name, a call for each kernel of the streaming engine that a case uses."""
    n, V, H = sweeps.n, sweeps._vocab, 64
    positions, columns = slice(0, n), slice(0, V)
    dtype = sweeps._student[0].dtype
    weight = sweeps._student[3]
    out, vector = torch.empty(n, V, dtype=dtype), torch.empty(n)
    mask, flags = torch.ones(n, dtype=torch.bool), torch.empty(n, V, dtype=torch.uint8)
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
    return found | {"parked": 0} | sass.usage(kernel.asm["cubin"], cuobjdump)


def amd_usage(kernel: Any) -> dict[str, Any]:
    usage = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", kernel.asm["amdgcn"], re.MULTILINE)}
    return {
        "registers": usage["vgpr_count"],
        "stack": usage["private_segment_fixed_size"],
        "spills": usage["vgpr_spill_count"],
        # Scalar registers kept in lanes of vector registers: moves, not memory.
        "parked": usage["sgpr_spill_count"],
    }


def loop_counts(kernel: Any, bytes_read: int) -> list[dict[str, Any]]:
    """What each main loop of a compiled kernel does, by :func:`tests.sass.per_element`."""
    nvdisasm = sass.find_tool("nvdisasm")
    if nvdisasm is None:
        return []
    return [sass.per_element(loop, bytes_read) for loop in sass.main_loops(kernel.asm["cubin"], nvdisasm)]


def all_cases() -> dict[str, Callable[[], None]]:
    rest = hand_over_cases() | filter_cases() | streaming_cases() | sharded_cases()
    return cases() | rest | largest_cases() | mixing_cases()


def measure(targets: list[str], chosen: re.Pattern[str] = re.compile(".*")) -> Iterator[dict[str, Any]]:
    """What each kernel uses: ``registers``, ``stack``, ``spills``, or ``error`` or ``missing`` (why it is unknown).

    ``loops`` holds the counts of the cases in COUNTED.
    """
    compiled = divert_launches()
    cuobjdump = sass.find_tool("cuobjdump")
    for index, target in enumerate(targets):
        triton.runtime.driver.set_active(Offline(index, TARGETS[target]))
        nvidia = TARGETS[target].backend == "cuda"
        for name, launch in all_cases().items():  # tiles depend on the target
            if not chosen.fullmatch(name):
                continue
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
                if target == COUNTED_ON and case in COUNTED:
                    usage["loops"] = loop_counts(kernel, COUNTED[case])
                yield {"target": target, "case": case} | usage


def write_budget() -> None:
    """All cases of all targets, a line each."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for kernel in measure(list(TARGETS)):
        assert "error" not in kernel, kernel
        entry = {key: kernel[key] for key in ("registers", "stack", "spills")}
        if "loops" in kernel:
            entry["instructions"] = [loop["instructions"] for loop in kernel["loops"]]
        table.setdefault(kernel["case"], {})[kernel["target"]] = entry
    lines = ",\n".join(f"    {json.dumps(case)}: {json.dumps(entry)}" for case, entry in table.items())
    version = json.dumps(triton.__version__)
    BUDGET.write_text(f'{{\n  "triton": {version},\n  "kernels": {{\n{lines}\n  }}\n}}\n')


def print_counts(chosen: list[str]) -> None:
    """A JSON object a main loop of each case, ``NAME`` or ``NAME=BYTES``."""
    compiled = divert_launches()
    triton.runtime.driver.set_active(Offline(0, TARGETS[COUNTED_ON]))
    launches = all_cases()
    for case in chosen:
        name, _, size = (case, "", "") if case in launches else case.rpartition("=")
        compiled.clear()
        launches[name]()
        for kernel in compiled:
            registers = nvidia_usage(kernel, sass.find_tool("cuobjdump")).get("registers")
            for loop in loop_counts(kernel, int(size or COUNTED.get(name, 8))):
                print(json.dumps({"case": name, "kernel": kernel.name, "registers": registers} | loop), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write_budget()
    elif sys.argv[1:2] == ["--counts"]:
        print_counts(sys.argv[2:] or list(COUNTED))
    else:
        named = [argument for argument in sys.argv[1:] if argument not in CHOICES]
        chosen = [CHOICES[argument] for argument in sys.argv[1:] if argument in CHOICES]
        for kernel in measure(named or list(TARGETS), *chosen):
            print(json.dumps(kernel | {"triton": triton.__version__}), flush=True)
