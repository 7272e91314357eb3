"""Optional packages are optional: proved in fresh processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Hide())
"""
OPTIONAL = [
    "triton",
    "cuda",
    "transformers",
    "datasets",
    "sacrebleu",
    "accelerate",
    "matplotlib",
    "rich",
    "tokenizers",
    "tqdm",
]


def run(code: str, hidden: list[str]) -> str:
    result = subprocess.run(
        [sys.executable, "-c", HIDE.format(hidden=hidden) + code], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("hidden", [OPTIONAL, ["numpy"]], ids=["no extras", "no numpy"])
def test_core_runs_without_optional_packages(hidden):
    out = run(
        "import torch, fused_kd as fk\n"
        "h, W = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)\n"
        "loss = fk.kd_loss(fk.LMHead(h, W), torch.randn(3, 7), torch.tensor([0, 1, 2]), fk.SelfEvolution()).loss\n"
        "loss.backward(); print(float(h.grad.norm()) > 0)\n",
        hidden,
    )
    assert out.strip() == "True"


def test_import_loads_nothing_optional():
    out = run(
        "import torch; before = set(sys.modules)\n"
        "import fused_kd\n"
        f"print(sorted(m for m in {OPTIONAL!r} if m in set(sys.modules) - before))\n",
        [],
    )
    assert out.strip() == "[]"


def test_missing_triton_is_named():
    run(
        "import torch, fused_kd as fk\n"
        "try: fk.kd_loss(torch.randn(1, 2), torch.randn(1, 2), torch.tensor([0]), fk.NoEvo(), backend='triton')\n"
        "except ValueError as e: assert 'not installed' in str(e), e\n"
        "else: raise SystemExit('no error')\n",
        ["triton"],
    )


def test_missing_cuda_core_is_named():
    run(
        "import torch\n"
        "from fused_kd.rows import choose_backend, cuda_build\n"
        "for call in (lambda: choose_backend('cuda', torch.device('cuda')), cuda_build.require):\n"
        "    try: call()\n"
        "    except ValueError as e: assert \"pip install 'fused_kd[cuda]'\" in str(e), e\n"
        "    else: raise SystemExit('no error')\n",
        ["cuda"],
    )


def test_public_names():
    import fused_kd as fk

    assert set(fk.__all__) <= set(dir(fk))
    assert {"KDLoss", "kd_loss", "KDOutput", "LMHead", "OBJECTIVES", "__version__"} <= set(fk.__all__)
