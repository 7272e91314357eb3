"""``python -m fused_kd.info``: its plans are those of real calls, its reasons those of this machine."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fused_kd as fk
from fused_kd import info
from fused_kd.engines import chunked, gemm
from fused_kd.forecast import plan_for
from fused_kd.rows.native import build as native_build
from fused_kd.rows.select import BACKENDS

N, H_S, H_T, V = 37, 24, 40, 301
BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


def call(
    objective: fk.SelfEvolution,
    dtype: torch.dtype,
    top_k: int | None,
    teachers: int = 1,
    teacher_dtype: torch.dtype | None = None,
    head_learns: bool = True,
    **options,
) -> list[torch.Tensor]:
    """The call that ``plan_for(N, H_S, H_T, V, ...)`` forecasts; the student's tensors, with their gradients."""
    h_s, W_s = (torch.randn(rows, H_S, dtype=dtype) for rows in (N, V))
    student = fk.LMHead(h_s.requires_grad_(), W_s.requires_grad_(head_learns))
    teacher: fk.LMHead | fk.TopK | fk.Mixture | None = None
    if objective.spec.needs_teacher:
        of = teacher_dtype or dtype
        heads = [fk.LMHead(torch.randn(N, H_T, dtype=of), torch.randn(V, H_T, dtype=of)) for _ in range(teachers)]
        teacher = heads[0] if teachers == 1 else fk.Mixture(heads)
        if top_k is not None:
            values, indices = torch.randn(N, V).log_softmax(-1).topk(top_k)
            teacher = fk.TopK(values, indices)
    fk.kd_loss(student, teacher, torch.randint(V, (N,)), objective, **options).loss.backward()
    return [h_s, W_s]


@pytest.mark.parametrize("dtype", BYTES, ids=str)
@pytest.mark.parametrize(
    "objective, top_k, memory_budget, teachers",
    [
        (fk.SelfEvolution(), None, None, 1),
        (fk.SelfEvolution(), None, 33_600_000 + 20_000, 1),
        (fk.SFT(), None, None, 1),
        (fk.NoEvo(), 5, None, 1),
        (fk.SelfEvolution(), None, None, 2),
        (fk.NoEvo(), None, 33_600_000 + 20_000, 3),
        (fk.SFT(), None, None, 2),
    ],
    ids=["gated", "budget", "sft", "top-k", "two", "three in a budget", "sft-two"],
)
def test_chunked_plan_is_that_of_the_call(monkeypatch, dtype, objective, top_k, memory_budget, teachers):
    plans = []
    plan_chunks = chunked.plan_chunks
    monkeypatch.setattr(chunked, "plan_chunks", lambda *a, **k: plans.append(plan_chunks(*a, **k)) or plans[-1])
    call(objective, dtype, top_k, teachers, memory_budget=memory_budget)
    asked = {"dtype": dtype, "objective": objective, "top_k": top_k, "memory_budget": memory_budget}
    asked["teachers"] = teachers
    found = plan_for(N, H_S, H_T, V, **asked)
    assert [plan[:3] for plan in plans] == [(found.chunk, found.workspace, found.group)] * 2
    assert (found.engine, found.chunks) == ("chunked", -(-N // found.chunk))
    if memory_budget is not None and dtype != torch.float32:
        assert found.chunks > 1 and found.workspace <= memory_budget


@pytest.mark.parametrize("product", ["as here", None])
@pytest.mark.parametrize("head_learns", [True, False])
@pytest.mark.parametrize("teacher_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, None], ids=["autocast", "as they are"])
def test_a_plan_of_two_dtypes_is_that_of_the_call(monkeypatch, autocast, teacher_dtype, head_learns, product):
    """A student that is trained in float32: under autocast GEMMs take bf16 copies of it, its gradients are float32."""
    if product is None:
        monkeypatch.setattr(gemm, "cpu_product", lambda: None)
    elif gemm.cpu_product() is None:
        pytest.skip("this CPU has no products of bf16 with fp32 results")
    plans = []
    plan_chunks = chunked.plan_chunks
    monkeypatch.setattr(chunked, "plan_chunks", lambda *a, **k: plans.append(plan_chunks(*a, **k)) or plans[-1])
    kept = {"teacher_dtype": teacher_dtype, "head_learns": head_learns}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        leaves = call(fk.SelfEvolution(), torch.float32, None, **kept)
    found = plan_for(N, H_S, H_T, V, autocast=autocast, **kept)
    assert [plan[:3] for plan in plans] == [(found.chunk, found.workspace, found.group)] * 2
    assert found.gradients == sum(x.grad.nbytes for x in leaves if x.grad is not None)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
@pytest.mark.parametrize(
    "dtype, autocast", [(torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("objective", [fk.SelfEvolution(), fk.NoEvo(), fk.SFT()], ids=lambda x: x.name)
def test_streaming_plan_is_that_of_the_call(monkeypatch, dtype, autocast, objective):
    pytest.importorskip("triton")
    from fused_kd.engines.streaming import engine as streaming

    class Planned(Exception):
        """The plan is all that is wanted: interpreted kernels take seconds."""

    def planned(*arguments):
        raise Planned(plan_streaming(*arguments))

    plan_streaming = streaming.plan_streaming
    monkeypatch.setattr(streaming, "plan_streaming", planned)
    with pytest.raises(Planned) as caught, torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        call(objective, dtype, None, engine="streaming", backend="triton")
    (plan,) = caught.value.args
    found = plan_for(N, H_S, H_T, V, dtype=dtype, autocast=autocast, objective=objective, engine="streaming")
    assert (found.engine, found.backend) == ("streaming", "triton")
    assert (found.chunk, found.group, found.workspace) == (plan.tokens, None, plan.workspace)


def test_least_budget_is_the_least():
    with pytest.raises(ValueError, match=r"memory_budget must be at least (\d+) bytes") as caught:
        plan_for(N, H_S, H_T, V, memory_budget=1, engine="chunked")
    least = int(str(caught.value).split("at least ")[1].split()[0])
    assert plan_for(N, H_S, H_T, V, memory_budget=least, engine="chunked").chunk == 1
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        plan_for(N, H_S, H_T, V, memory_budget=least - 1, engine="chunked")


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans for the GPU that is there")
def test_what_is_said_of_a_gpu_that_is_not_there():
    """The plans' numbers are in docs/guides/memory_or_speed.md, whose code is run."""
    pytest.importorskip("triton")
    asked = {"dtype": torch.bfloat16, "device": "cuda"}
    free = plan_for(8192, 4096, 5120, 128256, **asked)
    assert (free.engine, free.backend, free.chunks) == ("chunked", "triton", 8)
    assert free.flops == 2 * 8192 * 128256 * (3 * 4096 + 5120) and free.gemms == 4
    tight = plan_for(8192, 4096, 5120, 128256, **asked, memory_budget=1 << 30)
    # A token, and the fp32 dW.
    least = 10 * 128256 + 8 * (4096 + 5120) + 2 * 4096 + 16 + 4 * 4096 * 128256 + (32 << 20)
    assert str(least) in " ".join(tight.notes)
    many = plan_for(16384, 4096, 5120, 128256, **asked)
    assert many.group == 5462 and many.chunks == 3 * 6
    with pytest.raises(ValueError, match="engine='streaming' would need"):
        plan_for(8192, 4096, 5120, 128256, **asked, memory_budget=1000)


@pytest.mark.parametrize("teacher", [True, False])
def test_flops_and_logits_are_those_of_plain_pytorch(teacher):
    h_s, W_s = torch.randn(N, H_S, requires_grad=True), torch.randn(V, H_S, requires_grad=True)
    h_t, W_t = torch.randn(N, H_T), torch.randn(V, H_T)
    with FlopCounterMode(display=False) as counter:
        logits = [h_s @ W_s.T] + ([h_t @ W_t.T] if teacher else [])
        logits[0].sum().backward()
    found = plan_for(N, H_S, H_T, V, objective=fk.NoEvo() if teacher else fk.SFT())
    assert found.flops == counter.get_total_flops()
    assert found.gemms == 3 + teacher
    assert found.eager_logits == sum(x.numel() * x.element_size() for x in logits)
    if teacher:  # two of them: one GEMM, and one side's logits, more
        two = plan_for(N, H_S, H_T, V, objective=fk.NoEvo(), teachers=2)
        assert two.flops == found.flops + 2 * N * V * H_T and two.gemms == 5
        assert two.eager_logits == found.eager_logits + logits[1].nbytes
    # A list of entries leaves the student's GEMMs.
    assert plan_for(N, H_S, H_T, V, top_k=7).flops == 2 * N * V * 3 * H_S


@pytest.mark.parametrize(
    "options, message",
    [
        ({"N": 0}, "N must be at least 1, got 0"),
        ({"top_k": V + 1}, f"top_k must be at most V={V}, got {V + 1}"),
        ({"device": "tpu"}, "device must be one of cpu, cuda, got 'tpu'"),
        ({"dtype": torch.float64}, "dtype must be one of"),
        ({"engine": "fast"}, "engine must be None or one of 'chunked', 'streaming', got 'fast'"),
        ({"backend": "fast"}, "backend must be None or one of"),
        ({"backend": "native", "device": "cuda"}, "backend='native' needs tensors on the CPU"),
        ({"engine": "streaming", "top_k": 3}, "got a TopK"),
        ({"teachers": 0}, "teachers must be at least 1, got 0"),
        ({"teachers": 2, "top_k": 3}, "teachers must be 1 with top_k"),
        ({"teachers": 2, "engine": "streaming"}, "engine='streaming' mixes no teachers"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_errors(options, message):
    with pytest.raises(ValueError) as caught:
        plan_for(**{"N": N, "H_s": H_S, "H_t": H_T, "V": V} | options)
    assert message in str(caught.value)


def test_command_prints_the_plan(capsys):
    arguments = ["--shape", "37", "24", "40", "301", "--dtype", "bf16", "--device", "cpu", "--memory-budget", "40MiB"]
    assert info.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = plan_for(N, H_S, H_T, V, dtype=torch.bfloat16, memory_budget=40 << 20)
    assert found["plan"] == json.loads(json.dumps(expected._asdict()))
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["fused_kd"] == fk.__version__
    assert {f"backend {name}" for name in BACKENDS} | {"engine chunked", "engine streaming", "bf16 on CPUs"} == set(
        found["available"]
    )
    assert info.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= info.WIDTH
    assert f"  chunk      {expected.chunk} tokens, {expected.chunks} of them" in lines
    assert expected.group == expected.chunk
    assert any(line.startswith(f"  workspace  {expected.workspace} bytes (") for line in lines)
    assert any(line.startswith("  backend torch ") and "yes" in line for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans for the GPU that is there")
def test_command_prints_the_group(capsys):
    arguments = ["--shape", "8192", "896", "3584", "151936", "--dtype", "bf16", "--device", "cuda"]
    for budget, line in (
        ([], "  chunk      1024 tokens, 8 of them; those of 4096 share the gradients' GEMMs"),
        (["--memory-budget", "1GiB"], "  chunk      316 tokens, 26 of them"),
    ):
        assert info.main([*arguments, *budget]) == 0
        assert line in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("value, size", [("2GiB", 2 << 30), ("1.5 mb", 1_500_000), ("4096", 4096)])
def test_sizes(value, size):
    assert info._size(value) == size


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shape", "1", "2", "3", "0"], "V must be at least 1, got 0"),
        (["--shape", "1", "2", "3", "4", "--memory-budget", "2 buckets"], "must be bytes, or a number with"),
        (["--shape", "1", "2", "3", "4", "--memory-budget", "1", "--device", "cpu"], "must be at least"),
        (["--top-k", "3"], "--shape must be the four integers"),
    ],
)
def test_command_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        info.main(arguments)
    assert message in capsys.readouterr().err


def test_reason_of_a_missing_compiler(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    available, reason = info.backends()["backend native"]
    assert not available and "CC='no-such-compiler' is not found; unset CC" in reason


@pytest.mark.skipif(native_build.sys.platform != "linux", reason="the native row is for Linux")
def test_compiled_row_is_where_it_says():
    available, details = info.backends()["backend native"]
    if not available:
        pytest.skip(details)
    kept = details.split(" into ")[1]
    assert kept == "memory" or os.path.isdir(kept)
