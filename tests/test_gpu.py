"""What only a GPU can show: no synchronisation, CUDA graphs, labels on the device, memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable

import pytest
import torch

import fused_kd as fk
from fused_kd.inputs import TAILS
from fused_kd.reference import reference_rows
from fused_kd.rows import select
from fused_kd.rows.contract import Logits, RowInputs, RowOutputs
from fused_kd.rows.cuda import build as cuda_build
from fused_kd.rows.cuda import row as cuda_row
from fused_kd.rows.cuda.launch import cut_rows
from fused_kd.rows.mixing import add

from .kernels.test_lists import cached
from .kernels.test_sharded_row import allowed, in_turns, inputs_of, whole
from .problems import JUMPS, OBJECTIVES, gradients, label, problem, relative, summands

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


needs_cuda_core = pytest.mark.skipif(not select.installed("cuda.core"), reason="needs the extra cuda")
CUDA_ROW = pytest.param("cuda", marks=needs_cuda_core)


@contextlib.contextmanager
def no_sync():
    """Raises where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "options",
    [*({"backend": name} for name in ("triton", "torch")), {"engine": "streaming"},
     pytest.param({"backend": "cuda"}, marks=needs_cuda_core)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("labels_on", ["cuda", "cpu"])
def test_a_step_never_waits_for_the_device(labels_on, dtype, options):
    p = problem(dtype=dtype, device="cuda")
    criterion = fk.KDLoss(fk.SelfEvolution(gamma=1.0), **options).cuda()
    labels = p.labels.to(labels_on)
    criterion(p.student(), p.teacher(), labels).backward()  # compiles the kernel
    with no_sync():
        criterion(p.student(), p.teacher(), labels).backward()


@pytest.mark.parametrize("backend", ["triton", "torch", CUDA_ROW])
@pytest.mark.parametrize("objective", [fk.SelfEvolutionTopK(), fk.ForwardKD()], ids=lambda o: o.name)
@pytest.mark.parametrize("tail", TAILS)
def test_a_step_with_a_top_k_teacher_never_waits_for_the_device(tail, objective, backend):
    p = problem(device="cuda")
    teacher = cached(p, 8, tail)
    temperature = 1.0 if tail == "bucket" else 2.0
    criterion = fk.KDLoss(objective, backend=backend, temperature=temperature).cuda()
    criterion(p.student(), teacher, p.labels).backward()  # compiles the kernels
    with no_sync():
        criterion(p.student(), teacher, p.labels).backward()


@pytest.mark.parametrize("backend", ["triton", "torch", CUDA_ROW])
def test_labels_on_either_device_give_the_same_gradients(backend):
    p = problem(device="cuda")
    results = []
    for labels in (p.labels, p.labels.cpu()):
        out = fk.kd_loss(p.student(), p.teacher(), labels, fk.SelfEvolution(gamma=1.0), backend=backend)
        results.append((out, gradients(out.loss, p.leaves)))
    (a, grads_a), (b, grads_b) = results
    assert relative(a.loss, b.loss) < 1e-6
    assert relative(a.difficulty, b.difficulty) < 1e-6
    assert torch.equal(a.is_hard, b.is_hard)
    for x, y in zip(grads_a, grads_b, strict=True):
        assert relative(x, y) < 1e-5


@pytest.mark.parametrize("backend", ["triton", "torch", CUDA_ROW])
def test_a_label_out_of_range_on_the_device_is_nan_not_corruption(backend):
    p = problem(device="cuda", ignored=0.0)
    p.labels[3], p.labels[5] = 517, -1
    out = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo(), backend=backend, reduction="none")
    assert out.loss.isnan().nonzero().flatten().tolist() == [3, 5]
    with pytest.raises(ValueError, match="got 517 at token 3"):
        fk.kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo(), backend=backend, validate=True)


@pytest.mark.parametrize("backend", ["triton", CUDA_ROW])
def test_cuda_graph_replays_with_an_annealed_beta(backend):
    p = problem(device="cuda")
    criterion = fk.KDLoss(fk.SelfEvolution(gamma=1.0, beta=0.5), backend=backend).cuda()

    def step() -> torch.Tensor:
        for x in p.leaves:
            x.grad = None
        loss = criterion(p.student(), p.teacher(), p.labels)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for beta in (0.5, 0.9, 1.0):
        criterion.objective = fk.SelfEvolution(gamma=1.0, beta=beta)
        graph.replay()
        expected = fk.kd_loss(p.student(), p.teacher(), p.labels, criterion.objective)
        assert relative(loss, expected.loss) < 1e-6
        for x, r in zip(p.leaves, gradients(expected.loss, p.leaves), strict=True):
            assert relative(x.grad, r) < 1e-5


def test_memory_stays_within_the_budget():
    N, H, V = 2048, 256, 32000
    hidden = torch.randn(N, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, V, (N,), device="cuda")
    budget = 128 << 20
    criterion = fk.KDLoss(fk.SelfEvolution(), memory_budget=budget).cuda()
    teacher = fk.LMHead(hidden.detach(), weight.detach())

    def step() -> None:
        criterion(fk.LMHead(hidden, weight), teacher, labels).backward()

    step()  # compiles, and lets the BLAS take its own workspace
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    results = sum(x.grad.numel() * x.grad.element_size() for x in (hidden, weight))
    # The rounded weight gradient exists beside its fp32 accumulator for a moment: that is a result, not workspace.
    assert torch.cuda.max_memory_allocated() - before <= budget + results + (4 << 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_streaming_holds_no_logits(dtype):
    """64 MB beyond results, and the gradients of the chunked engine, at sizes where logits would be gigabytes."""
    N, H, V = 8192, 1024, 128256
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(N, H, device="cuda", generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, device="cuda", generator=g) * 2 / H**0.5).to(dtype).requires_grad_()
    teacher = fk.LMHead(hidden.detach().flip(0), weight.detach())
    labels = torch.randint(0, V, (N,), device="cuda", generator=g)
    results, peaks = {}, {}
    for engine in ("chunked", "streaming"):
        criterion = fk.KDLoss(fk.SelfEvolution(gamma=5.0), engine=engine, backend="triton").cuda()

        def step() -> tuple[torch.Tensor, ...]:
            loss = criterion(fk.LMHead(hidden, weight), teacher, labels)  # noqa: B023
            return loss.detach(), *torch.autograd.grad(loss, [hidden, weight])

        step()  # compiles, and lets the BLAS take its own workspace
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results[engine] = step()
        peaks[engine] = torch.cuda.max_memory_allocated() - before
    assert peaks["streaming"] - sum(x.nbytes for x in (hidden, weight)) < 64e6
    budget = 1e-5 if dtype == torch.float32 else 6e-3
    assert relative(results["streaming"][0], results["chunked"][0]) < 1e-5
    for actual, expected in zip(results["streaming"][1:], results["chunked"][1:], strict=True):
        assert relative(actual, expected) < budget


def check_cuda_row(C: int, V: int, objective, dtype: torch.dtype, out: torch.dtype, stride: int | None = None) -> None:
    """Loss, difficulty, gate and gradient against float64 on the GPU; half of the rows near their teacher."""
    g = torch.Generator("cuda").manual_seed(0)
    z = torch.randn(C, stride or V, device="cuda", generator=g).mul_(3)
    z_t = torch.randn(C, stride or V, device="cuda", generator=g)
    z_t = z_t.add_(z).to(dtype)[:, :V]
    z = z.to(dtype)[:, :V]
    labels = torch.randint(V, (C,), device="cuda", generator=g)
    labels[::2] = z_t[::2].argmax(1)
    labels[C // 2] = -1
    spec = objective.spec
    nan = torch.full((3, C), math.nan, device="cuda")
    dlogits = torch.full((C, V), math.nan, device="cuda", dtype=out)
    outputs = RowOutputs(nan[0], nan[1], torch.ones(C, dtype=torch.bool, device="cuda"), dlogits)
    teacher = Logits(z_t, 1.0, None, False) if spec.needs_teacher else None
    scalars = torch.tensor([objective.scalars()], device="cuda")
    inputs = RowInputs(Logits(z, 1.0, None, False), teacher, labels, None, scalars, spec, False)
    select.get_row("cuda")(inputs, outputs)
    valid = labels >= 0
    raw = z[valid].double().requires_grad_()
    loss, difficulty, is_hard = reference_rows(raw, z_t[valid].double(), labels[valid], objective, 1.0)
    (gradient,) = torch.autograd.grad(loss.sum(), raw)
    assert relative(outputs.loss[valid], loss) < 2e-6
    assert relative(outputs.difficulty[valid], difficulty) < 2e-6
    assert torch.equal(outputs.is_hard[valid], is_hard)
    budget = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[out]
    jumps = 0.0
    if summands(objective) & JUMPS:  # by 2 q where q = p; each moves the whole row's mean by as much
        log_q, log_p = raw.detach().log_softmax(1), z_t[valid].double().log_softmax(1)
        jumps = 4.0 * float(log_q.exp()[(log_q - log_p).abs() < 1e-5].sum())
    assert (dlogits[valid].double() - gradient).norm() < budget * gradient.norm() + jumps
    assert not dlogits[~valid].any() and not outputs.loss[~valid].any()


@needs_cuda_core
@pytest.mark.parametrize("V", [32000, 50257, 128256, 151936, 262144])
@pytest.mark.parametrize(
    "dtype, out", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]
)
@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if not o.spec.ranked], ids=label)
def test_cuda_row_at_real_vocabularies(objective, dtype, out, V):
    check_cuda_row(40, V, objective, dtype, out)


@needs_cuda_core
@pytest.mark.parametrize("V, stride", [(7, None), (517, None), (517, 520), (9001, None), (33000, None)])
@pytest.mark.parametrize("objective", [fk.SFT(), fk.SkewTeacher(), fk.SelfEvolution(gamma=1.0), fk.AdaptiveKL()])
def test_cuda_row_at_small_shapes(objective, V, stride):
    """Also for compute-sanitizer, see CONTRIBUTING.md: rows of one block and of a cluster, aligned and not."""
    check_cuda_row(5, V, objective, torch.float32, torch.bfloat16, stride)


def cuda_row_call(C: int, V: int) -> tuple[RowInputs, RowOutputs]:
    """Far and near rows, some left out; outputs start as NaN."""
    g = torch.Generator("cuda").manual_seed(0)
    z, z_t = (torch.randn(C, V, device="cuda", generator=g) for _ in range(2))
    labels = torch.randint(V, (C,), device="cuda", generator=g)
    labels[C // 2] = -1
    objective, nan = fk.SelfEvolution(gamma=9.0), torch.full((2, C), math.nan, device="cuda")
    scalars = torch.tensor([objective.scalars()], device="cuda")
    sides = Logits(z, 1.0, None, False), Logits(z_t, 1.0, None, False)
    gradient = torch.full((C, V), math.nan, device="cuda", dtype=torch.bfloat16)
    outputs = RowOutputs(nan[0], nan[1], torch.ones(C, dtype=torch.bool, device="cuda"), gradient)
    return RowInputs(*sides, labels, None, scalars, objective.spec, False), outputs


def same(first: Iterable[torch.Tensor | None], second: Iterable[torch.Tensor | None]) -> bool:
    """Bit by bit; what was not asked for is None."""
    return all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_cuda_core
@pytest.mark.parametrize("V", [128256, 151936])
def test_cuda_row_asking_ahead_changes_nothing(V, monkeypatch):
    """Bit by bit, of many rows a cluster: a copy that is not waited for would show."""
    with monkeypatch.context() as patch:
        patch.setattr(cuda_row, "cut_rows", lambda *about: cut_rows(*about)._replace(ahead=0))
        inputs, plain = cuda_row_call(200, V)
        select.get_row("cuda")(inputs, plain)
    for _ in range(5):
        inputs, outputs = cuda_row_call(200, V)
        select.get_row("cuda")(inputs, outputs)
        assert same(plain, outputs)


@needs_cuda_core
def test_cuda_row_may_load_its_kernel_while_a_graph_is_captured():
    row = select.get_row("cuda")
    inputs, outputs = cuda_row_call(5, 33000)
    row(inputs, outputs)
    expected = [None if x is None else x.clone() for x in outputs]
    cuda_build._prepared.cache_clear()
    cuda_build._loaded.cache_clear()
    inputs, outputs = cuda_row_call(5, 33000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        row(inputs, outputs)
    graph.replay()
    assert same(expected, outputs)


@needs_cuda_core
def test_cuda_row_on_another_stream_and_in_place():
    p = problem(device="cuda").logits()
    expected = fk.kd_loss(p.hidden, p.hidden_t, p.labels, fk.SelfEvolution(gamma=1.0), backend="torch").loss
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        loss = fk.kd_loss(p.hidden, p.hidden_t, p.labels, fk.SelfEvolution(gamma=1.0), backend="cuda").loss
    torch.cuda.synchronize()
    assert relative(loss, expected) < 1e-6


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=label)
def test_vocabulary_slices(objective, backend):
    """Ranks in turns on one GPU, against the row of the whole vocabulary on the CPU; nothing waits for the device."""
    if not allowed(objective, "dense", backend=backend):
        pytest.skip("the loss refuses it")
    inputs = inputs_of(objective, C=64, V=5000)
    expected = whole(inputs)
    device = torch.device("cuda")
    moved = inputs._replace(
        student=inputs.student._replace(raw=inputs.student.raw.to(device)),
        teacher=None if inputs.teacher is None else inputs.teacher._replace(raw=inputs.teacher.raw.to(device)),
        labels=inputs.labels.to(device),
        scalars=inputs.scalars.to(device),
        hard=None if inputs.hard is None else inputs.hard.to(device),
    )
    in_turns(moved, [1000, 4000], backend=backend)  # compiles the kernels
    with no_sync():
        found = in_turns(moved, [1000, 4000], backend=backend)
    assert relative(torch.cat([out.dlogits for out in found], 1), expected.dlogits) < 3e-6
    assert relative(found[0].loss, expected.loss) < 3e-6
    assert torch.equal(found[0].is_hard.cpu(), expected.is_hard)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_teachers_are_mixed_without_waiting_for_the_device(backend):
    raws = [torch.randn(64, 50257) * 3 for _ in range(2)]
    share, T = torch.full((64,), math.log(0.5)), torch.tensor([2.0])
    share[5] = -math.inf
    raws[1][5], raws[1][7, :9] = math.nan, -math.inf
    mixed = {}
    for device in ("cpu", "cuda"):
        logits = [Logits(raw.to(device).bfloat16(), 1.0, None, False) for raw in raws]
        arguments = share.to(device), T.to(device), backend if device == "cuda" else "torch"
        mixed[device] = torch.full((64, 50257), math.nan, device=device)
        add(mixed[device], logits[0], *arguments, first=True)  # compiles the kernels
        add(mixed[device], logits[1], *arguments, first=False)
        add(mixed[device], logits[0], *arguments, first=True)
        with no_sync() if device == "cuda" else contextlib.nullcontext():
            add(mixed[device], logits[1], *arguments, first=False)
    assert torch.equal(mixed["cuda"].cpu() == -math.inf, mixed["cpu"] == -math.inf)
    some = mixed["cpu"] > -math.inf
    assert relative(mixed["cuda"].cpu()[some], mixed["cpu"][some]) < 2e-7
