"""The emulator of the CUDA kernels finds what it is there to find: faults planted in a copy of the sources."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import fused_kd as fk
from fused_kd.rows import cuda_build
from fused_kd.rows.base import RowOutputs

from . import cuda_emulator
from .cuda_emulator import emulated, needs_cpp_compiler
from .test_cuda_row import call
from .test_native_row import make

pytestmark = needs_cpp_compiler

__all__ = ["emulated"]


def planted(tmp_path: Path, file: str, old: str, new: str):
    """The emulated kernels with a fault."""
    copy = tmp_path / "csrc"
    shutil.copytree(cuda_build.FOLDER, copy)
    text = (copy / file).read_text()
    assert text.count(old) == 1, f"{old!r} must occur once in {file}"
    (copy / file).write_text(text.replace(old, new))
    return cuda_emulator.build(copy, tmp_path)


FAULTS = {
    "a missing barrier of a block": ("cuda_sums.h", "    block_barrier();\n", "", "races"),
    "a barrier of the block for one of the cluster": (
        "cuda_sums.h", "    cluster_barrier();\n", "    block_barrier();\n", "races",
    ),
    "a write beyond the row": ("cuda_slots.h", "column + FKD_WIDTH <= rows->V", "column < rows->V", "outside of"),
    "a read beyond the row": (
        "cuda_slots.h", "if (left >= FKD_WIDTH)", "if (left > 0)", "outside of",
    ),
    "a slot beyond shared memory": (
        "cuda_slots.h", "return rows->teacher_at + slot *", "return rows->teacher_at + (slot + 1) *", "shared memory",
    ),
    "records where the last reduction's are read": ("cuda_sums.h", "    *phase ^= 1;\n", "", "races"),
    "a barrier that one thread skips": (
        "cuda_sums.h", "    block_barrier();\n", "    if (thread_index() > 0) block_barrier();\n", "not all threads",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name, emulated, tmp_path, monkeypatch):
    file, old, new, message = FAULTS[name]
    library = planted(tmp_path, file, old, new)
    monkeypatch.setattr(cuda_emulator, "_library", lambda: library)
    with pytest.raises(cuda_emulator.Fault, match=message):
        on_aligned_rows()


def test_a_missing_wait_leaves_nan(emulated, tmp_path, monkeypatch):
    old = "if (group < FKD_GROUPS) copies_wait(FKD_GROUPS - 1 - group);"
    library = planted(tmp_path, "kd_row.cu", old, "")
    monkeypatch.setattr(cuda_emulator, "_library", lambda: library)
    assert on_aligned_rows().loss.isnan().all()


def test_without_a_fault_the_same_call_passes(emulated):
    assert on_aligned_rows().loss.isfinite().all()


def on_aligned_rows() -> RowOutputs:
    """Two blocks of a cluster, rows whose beginnings are aligned and whose ends are not."""
    z, z_t, labels = make(5, 518)
    z, z_t, dlogits = (torch.nn.functional.pad(x, (0, 2))[:, :518] for x in (z, z_t, z))
    return call(z, z_t, labels, fk.SelfEvolution(gamma=1.0), dlogits=dlogits)
