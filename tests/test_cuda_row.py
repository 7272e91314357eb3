"""The CUDA row and its top-k sweeps, executed on the CPU by tests/cuda_emulator: what no GPU here can run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.objectives import Objective, RowSpec
from fused_kd.rows.contract import Logits, RowInputs, RowOutputs
from fused_kd.rows.cuda import build as cuda_build
from fused_kd.rows.cuda import row as cuda_row
from fused_kd.rows.cuda.launch import Device, cut_rows

from . import cuda_emulator, test_extremes, test_stress
from .budget import check_budget
from .cuda_emulator import SMALL, emulated, needs_cpp_compiler
from .problems import OBJECTIVES, gradients, problem, relative
from .test_error_budget import LOSS_SCALE, run
from .test_native_row import check, make, oracle
from .test_top_k import TAILS, TIGHT, allowed, cached, compare

pytestmark = needs_cpp_compiler

__all__ = ["emulated"]
ALL = [objective for objective in OBJECTIVES if not objective.kind.ranked]
NAMES = [objective.name for objective in OBJECTIVES]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# A cluster of two blocks that hold all of a row of 517, of four, one block with a part of it, and one with nothing; two
# blocks with room for some or all of the next row.
DEVICES = {
    "whole": SMALL,
    "cluster of 4": Device(4, 1400, 2800 + 2048, 4, (8, 8, 8)),
    "part": Device(2, 1400, 2048, 4, (8, 8, 8)),
    "no cluster": Device(1, 1400, 2048, 4, (8, 16, 16)),
    "nothing": Device(1, 400, 2048, 4, (8, 8, 8)),
    "room ahead": Device(2, 4096, 5120, 4, (8, 8, 8)),
    "room for all": Device(2, 5120, 6144, 4, (8, 8, 8)),
}


def call(
    z: Tensor,
    z_t: Tensor | None,
    labels: Tensor,
    objective: Objective,
    *,
    T: float = 1.0,
    weights: Tensor | None = None,
    dlogits: Tensor | None = None,
    gradient: bool = True,
    scale: float = 1.0,
    cap: float | None = None,
    spec: RowSpec | None = None,
    hard: Tensor | None = None,
) -> RowOutputs:
    """Outputs start as NaN (is_hard as True)."""
    spec = spec or objective.spec
    C, V = z.shape
    if gradient and dlogits is None:
        dlogits = torch.full((C, V), math.nan)
    outputs = RowOutputs(
        torch.full((C,), math.nan), torch.full((C,), math.nan), torch.ones(C, dtype=torch.bool), dlogits
    )
    teacher = None if z_t is None or spec.divergence is None else Logits(z_t, 1.0, None, False)
    scalars = torch.tensor(objective.scalars(T))
    cold = T != 1.0 and spec.hard_label and spec.divergence is not None
    cuda_row.row(RowInputs(Logits(z, scale, cap, False), teacher, labels, weights, scalars, spec, cold, hard), outputs)
    return outputs


# ---- the oracle's matrix


@pytest.mark.parametrize("near", [False, True], ids=["far", "near"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_hidden_fp32(objective, near, emulated):
    p = problem(std=4.0 if near else 1.0, near=near)
    check_budget(p, objective, *run(p, objective, "cuda"))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_hidden_low_precision(objective, dtype, emulated):
    p = problem(std=3.0, dtype=dtype)
    check_budget(p, objective, *run(p, objective, "cuda"))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_logits(objective, dtype, emulated):
    p = problem(std=3.0, near=dtype == FP16, V=520)  # aligned: eight elements a slot
    z = (p.hidden @ p.weight.T).detach().to(dtype).requires_grad_()
    z_t = (p.hidden_t @ p.weight_t.T).to(dtype)
    out = fk.kd_loss(z, z_t, p.labels, objective, backend="cuda")
    (actual,) = gradients(out.loss * LOSS_SCALE, [z])
    z64 = z.detach().double().requires_grad_()
    expected = fk.reference.reference_kd_loss(z64, z_t.double(), p.labels, objective)
    (ref,) = gradients(expected.loss * LOSS_SCALE, [z64])
    assert relative(out.loss, expected.loss) < 4e-6
    assert relative(actual, ref) < {FP32: 4e-6, BF16: 2**-8, FP16: 2**-11}[dtype]
    assert actual[p.labels == -100].abs().sum() == 0


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("near", [False, True], ids=["far", "near"])
@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o.spec.divergence], ids=lambda o: o.name)
def test_top_k(objective, near, tail, emulated):
    p = problem(N=13, std=3.0, near=near, bias=True)
    if allowed(objective, tail):
        loose = near or objective.name == "total_variation"  # it jumps where p = q
        compare(p, cached(p, 8, tail), objective, backend="cuda", tight=2e-5 if loose else TIGHT)


# ---- how rows are cut


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.name)
def test_any_part_of_a_row_may_be_resident(objective, device, emulated):
    emulated(device=DEVICES[device])
    data = make(5, 517)
    check(call(*data, objective), oracle(*data, objective))


@pytest.mark.parametrize("V", [1, 2, 3, 31, 32, 33, 64, 65, 255, 1030])
@pytest.mark.parametrize("device", ["whole", "part", "room ahead"])
def test_any_vocabulary(V, device, emulated):
    emulated(device=DEVICES[device])
    data = make(4, V)
    data[2][-1] = V - 1
    for objective in ALL:
        actual, expected = call(*data, objective), oracle(*data, objective)
        if V == 1:
            assert all(x.abs().max() <= 1e-7 for x in (actual.loss, actual.difficulty, actual.dlogits))
        else:
            check(actual, expected)


@pytest.mark.parametrize("clusters", [1, 3, 9])
@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.name)
def test_loss_alone_in_place_and_any_number_of_clusters_agree_bit_by_bit(objective, clusters, emulated):
    data = make(7, 300)
    full = call(*data, objective)
    emulated(clusters=clusters)
    z = data[0].clone()
    in_place = call(z, *data[1:], objective, dlogits=z)
    for other in (call(*data, objective, gradient=False), in_place):
        for a, b in zip(full, other, strict=True):
            assert b is None or torch.equal(a, b)
    assert in_place.dlogits is z


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("device, ahead", [("whole", 0), ("part", 0), ("room ahead", 5), ("room for all", 9)])
def test_asking_ahead_changes_nothing(device, ahead, dtype, emulated, monkeypatch):
    """Bit by bit, with rows left out in between, a gradient and without one, and more or fewer rows than clusters."""
    emulated(device=DEVICES[device])
    assert cut_rows(517, 4, 8, DEVICES[device]).ahead == ahead
    z, z_t, labels = make(7, 517)
    z, labels[3] = z.to(dtype), -100
    for C in (1, 2, 7):
        data = z[:C], z_t[:C], labels[:C], fk.SelfEvolution(gamma=1.0)
        with monkeypatch.context() as patch:
            patch.setattr(cuda_row, "cut_rows", lambda *about: cut_rows(*about)._replace(ahead=0))
            plain = call(*data), call(*data, gradient=False)
        for a, b in zip(plain, (call(*data), call(*data, gradient=False)), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True) if x is not None)


def test_room_ahead_on_gpus():
    """What is idle beside a row holds the next one's first slots; blocks that share a multiprocessor keep to theirs."""
    hopper = Device(8, 232_448, 233_472)
    cuts = [cut_rows(V, 4, 8, hopper) for V in (32_000, 128_256, 151_936, 227_000, 262_144)]
    assert [(cut.resident, cut.ahead, cut.whole) for cut in cuts] == [
        (8, 0, True), (8, 6, True), (10, 4, True), (14, 0, True), (14, 0, False),
    ]  # fmt: skip
    for cut in cuts:
        alone = 2 * (cut.shared_bytes - cut.ahead * 16384 + 1024) > hopper.multiprocessor_bytes
        assert alone or cut.ahead == 0, "more memory of a block would be one block less of a multiprocessor"


def test_warps_of_32_and_a_cluster_of_8(emulated, monkeypatch):
    """The GPU's own numbers, which the other tests scale down to save threads."""
    library = cuda_emulator.build(flags=("-DFKD_WARP=32",))
    monkeypatch.setattr(cuda_emulator, "_library", lambda: library)
    emulated(device=Device(8, 4096, 8192, 32, (64, 64, 64)), clusters=1)
    data = make(2, 4100)
    for objective in (fk.SFT(), fk.SelfEvolution(gamma=1.0)):
        check(call(*data, objective), oracle(*data, objective))


def test_rows_that_a_gpu_holds_whole():
    """fp32 logits of real vocabularies; and that more than fits is never asked for."""
    gpus = {
        "H100, H200, B200": Device(8, 232_448, 233_472),
        "A100": Device(1, 166_912, 167_936),
        "L40, RTX 4090": Device(1, 101_376, 102_400),
    }
    for gpu, device in gpus.items():
        for V in (1, 517, 32_000, 50_257, 128_256, 151_936, 201_088, 227_000, 262_144):
            for width, column_bytes in ((4, 8), (8, 4), (4, 6), (4, 4)):
                cut = cut_rows(V, width, column_bytes, device)
                assert cut.shared_bytes <= device.block_bytes and cut.cluster <= device.largest_cluster
                whole = cut.resident * cut.cluster * cut.threads * width >= V
                assert whole or gpu != "H100, H200, B200" or V == 262_144
                assert cut.resident > 0
    assert cut_rows(128_256, 4, 8, gpus["H100, H200, B200"]).cluster == 8


# ---- what a row promises


@pytest.mark.parametrize("T, scale, cap", [(0.7, 1.0, None), (2.0, 0.3, None), (1.0, 1.0, 3.0), (1.5, 0.5, 5.0)])
def test_temperature_scale_and_softcap(T, scale, cap, emulated):
    data = make(4, 300, std=4.0)
    for objective in ALL:
        options = {"T": T, "scale": scale, "cap": cap}
        check(call(*data, objective, **options), oracle(*data, objective, **options), 4e-6)  # peaked rows cancel


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.name)
def test_ignored_rows_and_weights(objective, emulated):
    z, z_t, labels = make(6, 210)
    weights = torch.tensor([1.0, 0.0, 2.5, -1.0, 0.3, 7.0])
    loss, difficulty, hard, gradient = oracle(z, z_t, labels, objective)
    gradient = gradient * weights[:, None]
    z[4] = math.nan  # left out, hence never seen
    for left_out, label in ((0, -1), (1, -100), (4, -(2**40))):
        labels[left_out] = label
        loss[left_out] = difficulty[left_out] = gradient[left_out] = 0.0
        hard[left_out] = False
    for dlogits in (None, z.clone(), torch.full(z.shape, math.nan, dtype=BF16)):
        actual = call(z, z_t, labels, objective, weights=weights, dlogits=dlogits)
        check(actual, (loss, difficulty, hard, gradient), 2**-8 if dlogits is not None else 2e-6)
        assert not actual.dlogits[labels < 0].any()


@pytest.mark.parametrize("V", [517, 520])
@pytest.mark.parametrize("student", [FP32, BF16, FP16])
@pytest.mark.parametrize("teacher", [FP32, BF16, FP16])
def test_dtypes_are_independent_and_rounded_once(student, teacher, V, emulated):
    objective, (z, z_t, labels) = fk.SelfEvolution(gamma=1.0), make(6, V)
    z, z_t = z.to(student), z_t.to(teacher)
    exact = call(z, z_t, labels, objective)
    check(exact, oracle(z, z_t, labels, objective))
    for dtype in (BF16, FP16):
        narrow = call(z, z_t, labels, objective, dlogits=torch.full(z.shape, math.nan, dtype=dtype))
        assert relative(narrow.dlogits, exact.dlogits) < {BF16: 2**-8, FP16: 2**-11}[dtype]
    z = z.clone()
    in_place = call(z, z_t, labels, objective, dlogits=z)
    assert relative(in_place.dlogits, exact.dlogits) < {FP32: 1e-6, BF16: 2**-8, FP16: 2**-11}[student]


@pytest.mark.parametrize("dtypes", [(FP32, FP32, BF16), (FP32, FP32, FP32), (BF16, BF16, BF16), (BF16, FP32, BF16)])
@pytest.mark.parametrize("V", [511, 513, 515, 575])
def test_padded_rows_of_odd_vocabularies_move_16_bytes_at_a_time(V, dtypes, emulated, monkeypatch):
    """Rows that begin at multiples of 64 elements; what lies between them is NaN, never read, and stays as it is."""
    launches, launch = [], cuda_build.launch
    monkeypatch.setattr(cuda_build, "launch", lambda where, call: launches.append(call) or launch(where, call))
    objective, (z, z_t, labels) = fk.SelfEvolution(gamma=1.0), make(5, V)

    def padded(x: Tensor, dtype: torch.dtype) -> Tensor:
        buffer = torch.full((len(x), -(-V // 64) * 64), math.nan, dtype=dtype)
        buffer[:, :V] = x
        return buffer[:, :V]

    student, teacher, gradient = dtypes
    z, z_t = padded(z, student), padded(z_t, teacher)
    expected = oracle(z.float(), z_t.float(), labels, objective)
    for device in ("whole", "part", "room ahead"):
        emulated(device=DEVICES[device])
        out = padded(torch.full(z.shape, math.nan), gradient)
        check(call(z, z_t, labels, objective, dlogits=out), expected, 2e-6 if gradient == FP32 else 2**-8)
        for x in (z, z_t, out):
            assert x._base is not None and x._base[:, V:].isnan().all()
    in_place = padded(z, student)
    check(call(in_place, z_t, labels, objective, dlogits=in_place), expected, 2e-6 if student == FP32 else 2**-8)
    assert in_place._base is not None and in_place._base[:, V:].isnan().all()
    assert [dict(x.macros)["FKD_VECTOR"] for x in launches] == [1] * 4


def test_strided_inputs_and_outputs(emulated):
    objective, (z, z_t, labels) = fk.SelfEvolution(gamma=1.0), make(5, 130)
    expected = oracle(z, z_t, labels, objective)

    def wide(x: Tensor, by: int = 13) -> Tensor:
        return torch.cat([x, torch.full((len(x), by), math.nan)], 1)[:, : x.shape[1]]

    def wider(x: Tensor) -> Tensor:  # rows stay aligned, their ends not
        return wide(x, 6)

    def transposed(x: Tensor) -> Tensor:
        return x.t().contiguous().t()

    def shifted(x: Tensor) -> Tensor:
        return torch.cat([torch.full((len(x), 1), math.nan), wide(x, 5)], 1)[:, 1:]

    for view in (wide, wider, transposed, shifted):
        out = view(torch.full(z.shape, math.nan))
        check(call(view(z), view(z_t), labels, objective, dlogits=out), expected)
        in_place = view(z)
        check(call(in_place, z_t, labels, objective, dlogits=in_place), expected)
        if view is wide:
            assert out._base is not None and out._base[:, z.shape[1] :].isnan().all(), "written beyond the row"
    expanded = call(z[:1].expand(5, -1), z_t[:1].expand(5, -1), labels[:1].expand(5), objective)
    assert (expanded.dlogits == expanded.dlogits[0]).all()
    with pytest.raises(ValueError, match=r"loss must be contiguous, got strides \(2,\)"):
        vectors = torch.zeros(2), torch.zeros(2, dtype=torch.bool)
        inputs = RowInputs(Logits(z[:2], 1.0, None, False), None, labels[:2], None, torch.zeros(8), fk.SFT.kind, False)
        cuda_row.row(inputs, RowOutputs(torch.zeros(4)[::2], *vectors, None))


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.name)
def test_excluded_tokens_and_large_offsets(objective, emulated):
    """-inf on both sides, also over whole blocks, changes nothing; nor does a constant on all logits of a side."""
    V, kept = 200, slice(69, 140)
    z, z_t, labels = make(3, kept.stop - kept.start)
    z, z_t = (z * 256).round() / 256, (z_t * 256).round() / 256  # so that the sums below are exact
    expected = oracle(z, z_t, labels, objective)
    wide, wide_t = (torch.full((3, V), -math.inf) for _ in range(2))
    wide[:, kept], wide_t[:, kept] = z + 8000.0, z_t - 8000.0
    actual = call(wide, wide_t, labels + kept.start, objective)
    check(actual._replace(dlogits=actual.dlogits[:, kept]), expected)
    assert not actual.dlogits[:, : kept.start].any() and not actual.dlogits[:, kept.stop :].any()
    assert not call(wide, wide_t, labels + kept.start, objective, T=1e-9).loss.isnan().any()


@pytest.mark.parametrize("objective", [fk.SFT(), fk.NoEvo(), fk.Skew()], ids=lambda o: o.name)
def test_rows_of_excluded_tokens_alone_are_uniform(objective, emulated):
    """As the other rows have it: -inf everywhere is the same as any other number everywhere."""
    z, z_t, labels = make(3, 67)
    z[1], z_t[2] = -math.inf, -math.inf
    actual = call(z, z_t, labels, objective)
    z[1], z_t[2] = 0.0, 0.0
    expected = call(z, z_t, labels, objective)
    for found, wanted in zip(actual, expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("case", test_extremes.CASES)
def test_extreme_logits(case, emulated):
    for objective in OBJECTIVES:
        torch.manual_seed(0)
        test_extremes.test_logits(case, objective, "cuda")


@pytest.mark.parametrize("lam", [0.0, 1.0])
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("gamma", [0.0, math.inf])
def test_scalars_at_their_limits(lam, beta, gamma, emulated):
    test_extremes.test_scalars_at_their_limits(lam, beta, gamma, "cuda")


def test_infinite_losses_and_underflow(emulated):
    test_extremes.test_a_target_on_a_token_the_student_excludes_costs_infinity_unless_skewed("cuda")
    for objective in OBJECTIVES:
        test_extremes.test_no_nan_from_low_precision_underflow(objective, "cuda")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_not_hidden(value, emulated):
    for objective in ALL:
        for side in (0, 1) if objective.name != "sft" else (0,):
            data = make(2, 100)
            data[side][0, 97] = value
            loss, difficulty, _, gradient = call(*data, objective)
            assert loss[0].isnan() and difficulty[0].isnan()
            assert gradient[0].isnan().any() or (side == 1 and objective.name == "total_variation")  # compares only
            assert loss[1].isfinite() and difficulty[1].isfinite() and gradient[1].isfinite().all()


def test_a_label_beyond_the_row_reads_nothing(emulated):
    z, z_t, labels = make(2, 61)
    for label in (61, 63, 64, 2**40):
        labels[0] = label
        loss, _, _, gradient = call(z, z_t, labels, fk.NoEvo())
        assert loss[0] == math.inf and loss[1].isfinite() and gradient.isfinite().all()


def test_hardness_can_be_given(emulated):
    data = make(4, 120)
    given = torch.tensor([True, False, True, False])
    actual = call(*data, fk.SelfEvolution(gamma=math.inf), hard=given)
    assert torch.equal(actual.is_hard, given)
    hard, easy = call(*data, fk.Skew()), call(*data, fk.NoEvo())
    assert torch.equal(actual.dlogits, torch.where(given[:, None], hard.dlogits, easy.dlogits))


def test_mixed_target_in_a_divergence_of_differences(emulated):
    """No objective pairs them yet, but the specification allows ``KL(q||yt)``."""
    z, z_t, labels = make(4, 250)
    raw = z.double().requires_grad_()
    log_q, p = raw.log_softmax(1), z_t.double().softmax(1)
    target = 0.3 * p + 0.7 * torch.nn.functional.one_hot(labels, z.shape[1])
    loss = (log_q.exp() * (log_q - target.log())).sum(1)
    (gradient,) = torch.autograd.grad(loss.sum(), raw)
    actual = call(z, z_t, labels, fk.NoEvo(lam=0.3), spec=RowSpec("reverse_kl", mixed=True))
    assert relative(actual.loss, loss) <= 1e-6 and relative(actual.dlogits, gradient) <= 2e-6


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.6, 0.9, 0.999, 1.0])
def test_ties_share_their_side_of_the_head(fraction, emulated):
    p = torch.tensor([0.25, 0.125, 0.125, 0.125, 0.125] + [0.25 / 16] * 16).repeat(2, 1)
    z = torch.randn(2, 21)
    objective, labels = fk.AdaptiveKL(fraction=fraction), torch.tensor([0, 3])
    check(call(z, p.log(), labels, objective), oracle(z, p.log(), labels, objective))


@pytest.mark.parametrize("teacher", ["dense", "bucket"])
def test_rows_beyond_2_31_elements(teacher, emulated):
    test_stress.test_rows_beyond_2_31_elements(teacher, "cuda")


def test_no_rows(emulated):
    z = torch.empty(0, 5)
    out = call(z, z, torch.empty(0, dtype=torch.int64), fk.NoEvo())
    assert out.loss.shape == (0,) and out.dlogits.shape == (0, 5)


# ---- top-k teachers


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("K, V", [(1, 5), (3, 3), (4, 5), (5, 5), (64, 300), (96, 1030)])
def test_list_sizes(K, V, tail, emulated):
    p = problem(N=7, V=V, std=2.0)
    emulated(device=DEVICES["part" if V > 1000 else "whole"])
    compare(p, cached(p, K, tail, padded=False), fk.SelfEvolution(gamma=1.0), backend="cuda")


@pytest.mark.parametrize("objective", [fk.ForwardKD(), fk.SkewTeacher(), fk.SelfEvolution()], ids=lambda o: o.name)
@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_lists_at_a_temperature(objective, temperature, emulated):
    p = problem(N=9, std=2.0)
    compare(p, cached(p, 8), objective, temperature=temperature, backend="cuda", tight=1e-5)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_lists_for_logits_of_any_dtype(dtype, tail, emulated):
    p = problem(N=9, V=520).logits()
    z = p.hidden.detach().to(dtype).requires_grad_()
    before, teacher = z.detach().clone(), cached(problem(N=9, V=520), 8, tail)
    out = fk.kd_loss(z, teacher, p.labels, fk.SelfEvolution(), backend="cuda")
    (dz,) = gradients(out.loss, [z])
    z64 = z.detach().double().requires_grad_()
    expected = fk.reference.reference_kd_loss(z64, teacher, p.labels, fk.SelfEvolution()).loss
    assert relative(dz, gradients(expected, [z64])[0]) < {FP32: TIGHT, BF16: 2**-8, FP16: 2**-11}[dtype]
    assert torch.equal(z.detach(), before)


@pytest.mark.parametrize("head", [{"logit_scale": 0.4}, {"logit_scale": 2.0, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("tail", TAILS)
def test_lists_with_scale_and_softcap(tail, head, emulated):
    p = problem(N=9)
    compare(p, cached(p, 8, tail), fk.SelfEvolution(gamma=1.0), backend="cuda", head=head)
