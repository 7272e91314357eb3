"""Optional packages are optional, proved in fresh processes; and imports point one way, read from the sources."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .import_graph import Graph, circles, import_graph, upward

ROOT = Path(__file__).resolve().parents[1]

HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Hide())
"""
OPTIONAL = ["triton", "cuda", "transformers", "datasets", "sacrebleu"]
OPTIONAL += ["accelerate", "matplotlib", "rich", "tokenizers", "tqdm"]
WITHOUT = """
import os; os.environ.pop("TRITON_INTERPRET", None)
import torch, fused_kd as fk
from fused_kd.info import main
from fused_kd.rows.cuda import build as cuda_build
from fused_kd.rows.select import choose_backend

h, W, labels = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4), torch.tensor([0, 1, 2])
fk.kd_loss(fk.LMHead(h, W), torch.randn(3, 7), labels, fk.SelfEvolution()).loss.backward()
assert float(h.grad.norm()) > 0
for call, message in (
    (lambda: fk.kd_loss(torch.randn(3, 7), torch.randn(3, 7), labels, fk.NoEvo(), backend="triton"), "not installed"),
    (lambda: choose_backend("cuda", torch.device("cuda")), "pip install 'fused_kd[cuda]'"),
    (cuda_build.require, "pip install 'fused_kd[cuda]'"),
):
    try: call()
    except ValueError as error: assert message in str(error), error
    else: raise SystemExit("no error")
if not torch.cuda.is_available():
    main(["--shape", "64", "8", "8", "100", "--device", "cuda", "--dtype", "bf16", "--json"])
"""


def run(code: str, hidden: list[str]) -> str:
    result = subprocess.run(
        [sys.executable, "-c", HIDE.format(hidden=hidden) + code], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_optional_packages():
    """The loss runs without any of them, and what is missing is named."""
    printed = run(WITHOUT, [*OPTIONAL, "numpy"])
    if not printed:
        return  # with a GPU there is another plan
    found = json.loads(printed)
    assert found["plan"]["engine"] == "chunked" and found["plan"]["backend"] == "torch"
    reasons = {name: x["details"] for name, x in found["available"].items() if not x["available"]}
    assert "pip install 'fused_kd[triton]'" in reasons["backend triton"]
    assert "pip install 'fused_kd[triton]'" in reasons["engine streaming"]
    assert "pip install 'fused_kd[cuda]'" in reasons["backend cuda"]
    assert all("finds no GPU" in reasons[f"backend {name}"] for name in ("triton", "cuda"))


def test_import_loads_nothing_optional():
    out = run(
        "import torch; before = set(sys.modules)\n"
        "import fused_kd\n"
        f"print(sorted(m for m in {OPTIONAL!r} if m in set(sys.modules) - before))\n",
        [],
    )
    assert out.strip() == "[]"


def test_public_names():
    import fused_kd as fk

    assert set(fk.__all__) <= set(dir(fk))
    assert {"KDLoss", "kd_loss", "KDOutput", "LMHead", "OBJECTIVES", "__version__"} <= set(fk.__all__)


# From the bottom up; a module imports what is in its own layer or below. A name stands for all modules within it.
LAYERS = (
    (
        "fused_kd._version",
        "fused_kd.checks",
        "fused_kd.divergences",
        "fused_kd.objectives",
        "fused_kd.spans",
        "fused_kd.terms",
        "fused_kd.token_bytes",
        "fused_kd.token_matching",
        "fused_kd.tuning",
        "fused_kd.workspace",
    ),
    ("fused_kd.rows",),
    ("fused_kd.inputs", "fused_kd.mixtures"),
    (
        "fused_kd.reference",
        "fused_kd.reference_lists",
        "fused_kd.reference_mixtures",
        "fused_kd.engines",
        "fused_kd.vocab",
    ),
    ("fused_kd.tokens",),
    ("fused_kd.ops",),
    ("fused_kd.parallel", "fused_kd.options", "fused_kd.sides"),
    ("fused_kd.lists", "fused_kd.mixed_lists"),
    ("fused_kd.teachers",),
    ("fused_kd.loss",),
    ("fused_kd.draws",),
    ("fused_kd",),
    ("fused_kd.forecast", "fused_kd.info"),
    ("fused_kd.integrations",),
    ("fused_kd.training", "fused_kd.serving"),
    ("fused_kd.serve",),
    ("fused_kd.shrink", "fused_kd.export"),
    ("examples",),
    ("bench", "tests"),
)
TREES = ("fused_kd", "examples", "bench", "tests")
ROWS = ("torch", "triton", "native", "cuda")


def row_of(module: str) -> str | None:
    """The backend of a row's module."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["fused_kd", "rows"] and len(parts) > 2 and parts[2] in ROWS else None


def between_rows(graph: Graph) -> set[tuple[str, str]]:
    return {
        (module, other)
        for module, others in graph.items()
        for other in others
        if row_of(module) and row_of(other) and row_of(module) != row_of(other)
    }


@pytest.fixture(scope="module")
def graph() -> Graph:
    if not (ROOT / "fused_kd").is_dir():
        pytest.skip("needs the sources beside the tests, not a wheel")
    return import_graph(ROOT, TREES)


def test_nothing_imports_upward(graph):
    assert upward(graph, LAYERS) == set()


def test_there_are_no_circles(graph):
    assert circles({module: others for module, others in graph.items() if module.startswith("fused_kd")}) == []


def test_rows_do_not_import_each_other(graph):
    assert between_rows(graph) == set()


def test_the_reference_shares_nothing_with_kernels(graph):
    own = {f"fused_kd.reference{part}" for part in ("", "_lists", "_mixtures")}
    allowed = own | {"fused_kd.inputs", "fused_kd.mixtures", "fused_kd.objectives"}
    assert set.union(*(graph[module] for module in own)) <= allowed


@pytest.mark.parametrize(
    "module, text",
    [
        ("fused_kd/rows/torch/row.py", "from ...engines import chunked\n"),
        ("fused_kd/engines/chunked.py", "def f():\n    from fused_kd.loss import kd_loss\n"),
        ("fused_kd/rows/torch/row.py", "from ..triton.row import row\n"),
        ("fused_kd/engines/gemm.py", "import fused_kd.engines.chunked\n"),
        ("fused_kd/loss.py", "if TYPE_CHECKING:\n    from .training.fit import fit\n"),
    ],
    ids=["upward", "lazily", "another row", "a circle", "for types"],
)
def test_a_wrong_import_is_seen(module, text, tmp_path):
    files = {
        "fused_kd/loss.py": "from .engines import chunked\n",
        "fused_kd/engines/chunked.py": "from .gemm import Projection\nfrom ..rows.torch.row import row\n",
        "fused_kd/training/fit.py": "from fused_kd.loss import kd_loss\n",
    }
    for name in ("__init__", "engines/__init__", "engines/gemm", "rows/__init__", "rows/torch/row", "rows/triton/row"):
        files[f"fused_kd/{name}.py"] = "import torch\n"

    def wrong() -> list[object]:
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        found = import_graph(tmp_path, ["fused_kd"])
        return [*upward(found, LAYERS), *circles(found), *between_rows(found)]

    assert wrong() == []
    files[module] += text
    assert len(wrong()) > 0
