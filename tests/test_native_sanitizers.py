"""The C row under AddressSanitizer and UBSan: odd sizes, dtypes, lists and values, each buffer of its exact size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fused_kd.rows.native import build as native_build

from .problems import needs_compiler

pytestmark = [needs_compiler, pytest.mark.exhaustive]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]

FUZZ = """
import math, random, sys
import torch
import fused_kd as fk
from fused_kd.rows.contract import Logits
from fused_kd.rows.mixing import add
from fused_kd.rows.native import build as native_build
from fused_kd.rows.native.gemm import compiled_product, product

native_build.FLAGS += sys.argv[2:]
torch.set_num_threads(2)
draw = random.Random(0)
objectives = [cls() for cls in fk.OBJECTIVES.values()]
for step in range(int(sys.argv[1])):
    torch.manual_seed(step)
    N = draw.choice([1, 2, 5, 33])
    V = draw.choice([1, 2, 3, 7, 8, 15, 16, 17, 63, 127, 1023, 1024, 1025, 2049])
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
    objective = draw.choice(objectives)
    z, z_t = torch.randn(N, V) * draw.choice([0.0, 1.0, 30.0]), torch.randn(N, V) * draw.choice([1.0, 30.0])
    for x in (z, z_t):
        if draw.random() < 0.5:
            x[torch.rand(N, V) < 0.3] = draw.choice([-math.inf, -1e30, 6e4, -6e4, math.nan, math.inf])
    lists, k = z_t.to(dtype), draw.choice([1, min(V, 70), V])
    fk.top_k_of(lists, k, backend="native", temperature=draw.choice([1.0, 1e-8, 1e12]))
    head = fk.LMHead(lists[:, :1].nan_to_num(), torch.randn(V, 1).to(dtype))
    fk.log_probs_at(head, torch.full((N, 1), V - 1), backend="native")
    T, mixed = torch.tensor([draw.choice([1.0, 1e-8, 1e12])]), torch.empty(N, V)
    for i, raw in enumerate((lists, z.to(dtype))):
        share = torch.rand(draw.choice([1, N])).round(decimals=1).log()
        softcap = draw.choice([None, 30.0])
        add(mixed, Logits(raw, draw.choice([1.0, -0.5]), softcap, False), share, T, "native", first=i == 0)
    sizes = [draw.choice([1, 2, 3, 7, 15, 16, 33, 257]) for _ in range(3)]
    for flip in (0, 1, 2, 3) if compiled_product() else ():
        a, b = torch.randn(*sizes[:2]).bfloat16(), torch.randn(*sizes[1:]).bfloat16()
        a, b = (x.t().clone().t() if flip >> i & 1 else x for i, x in enumerate((a, b)))
        product("native", a, b, torch.empty(sizes[0], sizes[2]), add=False)
    z, z_t = z.to(dtype).requires_grad_(), z_t.to(draw.choice([dtype, torch.float32]))
    y = torch.randint(V, (N,))
    y[torch.rand(N) < 0.3] = -100
    teacher, options = z_t, {"temperature": draw.choice([1.0, 1e-8, 0.1, 3.0, 1e12])}
    if draw.random() < 0.4:
        K = draw.choice([1, min(V, 3), V])
        values, indices = torch.randn(N, V).log_softmax(-1).topk(K)
        values[torch.rand(N, K) < 0.2] = -math.inf
        values[:, 0] = values[:, 0].clamp(min=-5.0)
        teacher = fk.TopK(values, indices, draw.choice(["renormalize", "uniform", "bucket", "listed"]))
        if teacher.tail == "bucket":
            options = {}
    try:
        out = fk.kd_loss(z, teacher, y, objective, reduction="none", backend="native", **options)
        out.loss.sum().backward()
    except ValueError as error:
        assert "tail must be" in str(error), error
print("done")
"""


LONGER_ROWS = """
from fused_kd.rows.native import row as native_row
class Longer(native_row._Call):
    def __init__(self, **given):
        super().__init__(**(given | {"V": given["V"] + 64}))
native_row._Call = Longer
"""


def runtime() -> str:
    """The sanitizer's own library, which must be there before Python's."""
    command = [*native_build.find_compiler(), "-print-file-name=libasan.so"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not Path(found).is_file():
        pytest.skip("the compiler has no AddressSanitizer")
    return found


def run(code: str, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "LD_PRELOAD": runtime(),
        "ASAN_OPTIONS": "detect_leaks=0:protect_shadow_gap=0",
        "FUSED_KD_CACHE": str(cache),
        "TRITON_INTERPRET": "0",
    }
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def test_nothing_is_found(tmp_path):
    done = run(FUZZ, tmp_path, "1500", *SANITIZERS)
    assert done.stdout == "done\n", done.stderr[-5000:]


def test_a_read_behind_the_logits_is_found(tmp_path):
    """That the sanitizer sees PyTorch's buffers at all."""
    seeded = FUZZ.replace("draw = random", LONGER_ROWS + "draw = random")
    done = run(seeded, tmp_path, "20", *SANITIZERS)
    assert "heap-buffer-overflow" in done.stderr and done.stdout != "done\n"
