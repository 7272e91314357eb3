"""Compiled kernels to bring along: made without a GPU, found again elsewhere, never run when damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import kernels
from bench.kernels import offline

from .helpers import ROOT


def entry(folder: Path, where: str = "/elsewhere") -> Path:
    """A kernel of Triton's cache, as it was written in another place."""
    kernel = folder / "triton" / "ABC"
    kernel.mkdir(parents=True)
    for name in ("k.cubin", "k.json"):
        (kernel / name).write_bytes(name.encode())
    paths = {name: f"{where}/triton/ABC/{name}" for name in ("k.cubin", "k.json")}
    (kernel / "__grp__k.json").write_text(json.dumps({"child_paths": paths}))
    return kernel


def test_entries_are_rewritten_for_where_they_are(tmp_path, capsys):
    kernel = entry(tmp_path)
    assert kernels.main(["seal", "--folder", str(tmp_path)]) == 0
    for _ in range(2):
        assert kernels.main(["adopt", "--folder", str(tmp_path)]) == 0
        assert capsys.readouterr().out.startswith("1 kernels of Triton are whole")
    paths = json.loads((kernel / "__grp__k.json").read_text())["child_paths"]
    assert paths == {name: str(kernel / name) for name in ("k.cubin", "k.json")}


@pytest.mark.parametrize(
    "damage",
    [
        lambda kernel: (kernel / "k.cubin").write_bytes(b"k.cubim"),
        lambda kernel: (kernel / "k.cubin").write_bytes(b"k.cub"),
        lambda kernel: (kernel / "k.json").unlink(),
        lambda kernel: (kernel / "k.cubin.sum").unlink(),
        lambda kernel: (kernel / "__grp__k.json").write_text('{"child_paths": {"k.cu'),
    ],
    ids=["flipped", "truncated", "removed", "unsealed", "torn group"],
)
def test_damaged_entries_are_taken_out(damage, tmp_path):
    kernel = entry(tmp_path)
    kernels.seal(tmp_path)
    damage(kernel)
    assert kernels.adopt(tmp_path) == 0
    assert not list(kernel.glob("__grp__*"))


def test_what_was_made_here_since_is_kept(tmp_path):
    entry(tmp_path, str(tmp_path.resolve()))
    assert kernels.adopt(tmp_path) == 1


def test_bad_arguments(monkeypatch):
    with pytest.raises(ValueError, match=r"arch must be one of .*sm_90.*, got 'sm_70'"), offline("sm_70"):
        pass
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"), offline("sm_90"):
        pass


ONE_STEP = """
import json, sys
import torch
from bench.kernels import CUDA, offline
import fused_kd as fk
with offline("sm_90") as counts:
    for backend in sys.argv[1:]:
        h, w = (torch.empty(n, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for n in (32, 992))
        labels = torch.zeros(32, dtype=torch.int64, device="cuda")
        criterion = fk.KDLoss(fk.SelfEvolution(), backend=backend).cuda()
        criterion(fk.LMHead(h, w), fk.LMHead(h.detach(), w.detach()), labels).backward()
        assert h.grad.device == CUDA and h.grad.shape == h.shape and w.grad.dtype == torch.bfloat16
print(json.dumps(counts))
"""


def one_step(folder: Path, *backends: str) -> dict[str, int]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    environment |= {"TRITON_CACHE_DIR": str(folder / "triton"), "FUSED_KD_CACHE": str(folder / "cuda")}
    command = [sys.executable, "-c", ONE_STEP, *backends]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_second_process_elsewhere_compiles_nothing(tmp_path):
    pytest.importorskip("triton")
    backends = ["triton"]
    try:
        from fused_kd.rows.cuda import build

        build._nvrtc_version()
        backends.append("cuda")
    except ValueError:
        pass
    first = one_step(tmp_path / "made", *backends)
    assert first["triton compiled"] >= 1 and ("cuda" not in backends or first["cuda compiled"] >= 1)
    kernels.seal(tmp_path / "made")
    shutil.move(tmp_path / "made", tmp_path / "carried")
    assert kernels.adopt(tmp_path / "carried") == first["triton compiled"]
    second = one_step(tmp_path / "carried", *backends)
    assert not second.get("triton compiled") and not second.get("cuda compiled")
    assert second["triton found"] == first["triton compiled"]
    assert second.get("cuda found", 0) == first.get("cuda compiled", 0)


def test_the_key_of_another_build_holds_its_library(tmp_path, monkeypatch):
    """As a wheel for another Python: the same sources, another libtriton."""
    triton = pytest.importorskip("triton")
    from triton.runtime import cache

    (tmp_path / "triton" / "_C").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"is not as in triton {triton.__version__}"):
        kernels.use_key_of(tmp_path)
    source = Path(triton.__file__).parent
    for part in kernels.PARTS:
        target = tmp_path / "triton" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source / part)
    (tmp_path / "triton" / "_C" / "libtriton.so").write_bytes(b"another build")
    own = cache.triton_key()
    monkeypatch.setattr(cache, "triton_key", lambda: own)
    kernels.use_key_of(tmp_path)
    assert cache.triton_key() != own and len(cache.triton_key()) == len(own)
