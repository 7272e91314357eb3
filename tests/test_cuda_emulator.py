"""The emulator of the CUDA kernels, and the oracle behind it, find faults planted in a copy of the sources."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

import fused_kd as fk
from fused_kd.rows.contract import RowOutputs
from fused_kd.rows.cuda import build as cuda_build

from . import cuda_emulator
from .cuda_emulator import Fault, emulated, needs_cpp_compiler
from .kernels.contract import call, check, make, oracle
from .kernels.test_cuda import DEVICES

pytestmark = needs_cpp_compiler

__all__ = ["emulated"]


@pytest.fixture
def plant(emulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Replaces the emulated kernels by ones with a fault."""

    def build(file: str, old: str, new: str) -> None:
        copy = tmp_path / "csrc"
        shutil.copytree(cuda_build.FOLDER, copy)
        text = (copy / file).read_text()
        assert text.count(old) == 1, f"{old!r} must occur once in {file}"
        (copy / file).write_text(text.replace(old, new))
        library: ctypes.CDLL = cuda_emulator.build(copy, tmp_path, ("-O0",))
        monkeypatch.setattr(cuda_emulator, "_library", lambda: library)

    return build


def on_aligned_rows() -> RowOutputs:
    """Two blocks of a cluster, rows whose beginnings are aligned and whose ends are not."""
    z, z_t, labels = make(5, 518)
    z, z_t, dlogits = (torch.nn.functional.pad(x, (0, 2))[:, :518] for x in (z, z_t, z))
    return call("cuda", z, z_t, labels, fk.SelfEvolution(gamma=1.0), dlogits=dlogits)


# File, what stands there, what is planted, and what the emulator says of it.
FAULTS = {
    "a missing barrier of a block": ("cuda_sums.h", "    block_barrier();\n", "", "races"),
    "a barrier of the block for one of the cluster": (
        "cuda_sums.h", "    cluster_barrier();\n", "    block_barrier();\n", "races",
    ),
    "records where the last reduction's are read": ("cuda_sums.h", "    *phase ^= 1;\n", "", "races"),
    "a barrier that one thread skips": (
        "cuda_sums.h", "    block_barrier();\n", "    if (thread_index() > 0) block_barrier();\n", "not all threads",
    ),
    "a write beyond the row": ("cuda_slots.h", "column + FKD_WIDTH <= rows->V", "column < rows->V", "outside of"),
    "a read beyond the row": (
        "cuda_slots.h", "if (!FKD_VECTOR || column + FKD_WIDTH <= V) {", "if (column < V) {", "outside of",
    ),
    "a slot beyond shared memory": (
        "cuda_slots.h", "rows->teacher_at + place_of(", "rows->teacher_at + FKD_WARP * place_of(", "shared memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_whatever_the_schedule(name, plant):
    *where, message = FAULTS[name]
    plant(*where)
    with pytest.raises(Fault, match=message):
        on_aligned_rows()


def test_a_missing_wait_leaves_nan(plant):
    plant("kd_row.cu", "if (group < FKD_GROUPS) group_wait(rows, group);", "")
    assert on_aligned_rows().loss.isnan().all()


# The next row's first slots, asked for beside the row: what is planted where.
AHEAD = {
    "no wait for them": ("cuda_slots.h", "copies_wait<2 * FKD_GROUPS - 1>();", ";"),
    "a wait for one group less of them": ("cuda_slots.h", "<2 * FKD_GROUPS - 1>", "<2 * FKD_GROUPS>"),
    "a wait for one group less of the others": ("cuda_slots.h", "<FKD_GROUPS - 1>", "<FKD_GROUPS>"),
    "in the place of the row under way": (
        "kd_row.cu", "if (slot < ahead) request_slot(rows, &begin, slot, next_turn(rows))",
        "if (slot < ahead) request_slot(rows, &begin, slot, rows->turn)",
    ),
    "never the other place's turn": ("kd_row.cu", "rows->turn = next_turn(rows);", ""),
    "a row beyond the last": ("kd_row.cu", "next < call->C ? rows->ahead : 0", "rows->ahead"),
    "of another row": (
        "kd_row.cu", "begin_of(rows, next);\n    const int ahead", "begin_of(rows, 0);\n    const int ahead",
    ),
    "one slot of the others left out": (
        "kd_row.cu", "? rows->ahead : rows->resident;", "? rows->ahead + 1 : rows->resident;",
    ),
    "copied over what is still to be read": (
        "kd_row.cu",
        "gradient_slot(call, norms, gradient, form, slot, true);\n            if (slot >= first) request_slot("
        "rows, &begin, slot, next_turn(rows));",
        "if (slot >= first) request_slot(rows, &begin, slot, next_turn(rows));\n            gradient_slot("
        "call, norms, gradient, form, slot, true);",
    ),
    "a group that is not committed": (
        "kd_row.cu", "if (group < FKD_GROUPS) copies_commit();", "if (group > 0) copies_commit();",
    ),
}  # fmt: skip


def rows_in_turn() -> None:
    """Five rows for two clusters of a GPU with room for the next row's first slots."""
    data = make(5, 517)
    for objective in (fk.SelfEvolution(gamma=1.0), fk.SkewTeacher(lam=0.3)):
        check(call("cuda", *data, objective), oracle(*data, objective))


@pytest.mark.parametrize("name", AHEAD)
def test_a_fault_in_asking_ahead_is_found(name, plant, emulated):
    emulated(device=DEVICES["room ahead"])
    plant(*AHEAD[name])
    with pytest.raises(AssertionError):
        rows_in_turn()


def battery() -> None:
    """Calls of which every wrong formula below spoils one."""
    data = make(6, 517)
    weights, given = torch.tensor([0.5, 2.0, 1.0, -1.0, 3.0, 1.5]), torch.arange(6) % 2 == 0
    lam, terms = torch.linspace(0.1, 0.9, 6), fk.objectives
    sums = (
        0.3 * fk.SelfEvolution(gamma=2.0, floor=0.2, lam=lam)
        + fk.ForwardKD(lam=0.7)
        + 0.5 * fk.GeneralizedJSD(beta=0.3),
        terms.EntropyGated(tau=2.5) + 0.1 * fk.SFT(),
        terms.Acceptance() + lam * terms.Renyi(),
    )
    for objective in (fk.SFT(), fk.SkewTeacher(lam=0.3), fk.SelfEvolution(gamma=1.0), *sums):
        expected = oracle(*data, objective)
        expected.dlogits.mul_(weights[:, None])
        check(call("cuda", *data, objective, weights=weights), expected)
    assert torch.equal(call("cuda", *data, fk.SelfEvolution(), hard=given).is_hard, given)


WRONG = {
    "ranking ignored": ("cuda_shares.h", "if (call->given) return", "if (false) return"),
    "token weights missing": ("cuda_call.h", "call->weights ? as_float", "false ? as_float"),
    "the same row again": (
        "kd_row.cu", "begin_of(rows, next);\n    const int first", "begin_of(rows, norms->row);\n    const int first",
    ),
    "the label's share twice": ("cuda_divergence.h", "q - norms->labels :", "q - 2.0f * norms->labels :"),
    "the first term's numbers for all": ("cuda_call.h", "+ term * SCALARS +", "+"),
    "all rows' numbers the first's": ("cuda_call.h", "row * call->scalars_stride + ", ""),
    "a floor's gradient missing": ("cuda_divergence.h", "*g = fmaf(-term->floor, t, *g);", "*g += 0.0f;"),
    "terms beside the sums missing": ("cuda_divergence.h", "if (!any_free()) return;", "return;"),
    "an entropy of powers of 2": ("cuda_divergence.h", "fmaf(-a_t, LN_2, log_total)", "fmaf(-a_t, 1.0f, log_total)"),
    "a logarithm's slope missing": ("kd_row.cu", "-share * reciprocal(least)", "-share"),
    "row's end not masked": ("cuda_slots.h", "z_s[i] = OUTSIDE;", "z_s[i] = 0.0f;"),
    "one block of the cluster": ("cuda_sums.h", "block < cluster_size()", "block < 1"),
    "sums of other maxima": ("cuda_sums.h", "x[S_SUM] *= exp2_fast(s * k);", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_formula_fails_the_oracle(name, plant):
    plant(*WRONG[name])
    with pytest.raises(AssertionError):
        battery()


def test_without_a_fault_the_same_calls_pass(emulated):
    assert on_aligned_rows().loss.isfinite().all()
    battery()
    emulated(device=DEVICES["room ahead"])
    rows_in_turn()
