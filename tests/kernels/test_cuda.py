"""The CUDA row's own: how rows are cut among clusters and memory; test_rows.py has the row. Emulated on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.rows.cuda import build as cuda_build
from fused_kd.rows.cuda import row as cuda_row
from fused_kd.rows.cuda.launch import Device, cut_rows

from .. import cuda_emulator
from ..cuda_emulator import SMALL, needs_cpp_compiler
from ..problems import label
from .contract import ALL, BF16, FP32, GPU, KINDS, call, check, make, oracle

pytestmark = [needs_cpp_compiler, pytest.mark.skipif(GPU, reason="tests/test_gpu.py has it there")]
KINDS_OF_ALL = [objective for objective in ALL if label(objective) in KINDS]

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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("objective", KINDS_OF_ALL, ids=label)
def test_any_part_of_a_row_may_be_resident(objective, device, emulated):
    emulated(device=DEVICES[device])
    data = make(5, 517)
    check(call("cuda", *data, objective), oracle(*data, objective))


@pytest.mark.parametrize("clusters", [1, 3, 9])
@pytest.mark.parametrize("objective", KINDS_OF_ALL, ids=label)
def test_loss_alone_in_place_and_any_number_of_clusters_agree_bit_by_bit(objective, clusters, emulated):
    data = make(7, 300)
    full = call("cuda", *data, objective)
    emulated(clusters=clusters)
    z = data[0].clone()
    in_place = call("cuda", z, *data[1:], objective, dlogits=z)
    for other in (call("cuda", *data, objective, gradient=False), in_place):
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
            plain = call("cuda", *data), call("cuda", *data, gradient=False)
        for a, b in zip(plain, (call("cuda", *data), call("cuda", *data, gradient=False)), strict=True):
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
        check(call("cuda", *data, objective), oracle(*data, objective))


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


@pytest.mark.parametrize("dtypes", [(FP32, FP32, BF16), (FP32, FP32, FP32), (BF16, BF16, BF16), (BF16, FP32, BF16)])
@pytest.mark.parametrize("V", [511, 575])
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
        check(call("cuda", z, z_t, labels, objective, dlogits=out), expected, 2e-6 if gradient == FP32 else 2**-8)
        for x in (z, z_t, out):
            assert x._base is not None and x._base[:, V:].isnan().all()
    in_place = padded(z, student)
    actual = call("cuda", in_place, z_t, labels, objective, dlogits=in_place)
    check(actual, expected, 2e-6 if student == FP32 else 2**-8)
    assert in_place._base is not None and in_place._base[:, V:].isnan().all()
    assert [dict(x.macros)["FKD_VECTOR"] for x in launches] == [1] * 4
