"""The registry of implementations: each computes what its group says, and what cannot run here says why.

Peers that only a GPU has run in Triton's interpreter here, which knows their formulas, not their speed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_kd as fk

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import peers  # noqa: E402
from bench.accuracy import relative_errors  # noqa: E402
from bench.counts import gemm_flops  # noqa: E402
from bench.implementation import GROUPS, JSD, KL, SELF_EVOLUTION, SFT, Implementation, objective_of  # noqa: E402
from bench.implementations import IMPLEMENTATIONS, OURS, preferred_chunk  # noqa: E402
from bench.inputs import IGNORE, Inputs, make_inputs  # noqa: E402
from bench.peers import PEERS  # noqa: E402
from bench.shapes import Shape  # noqa: E402
from bench.tally import measured_flops  # noqa: E402

CPU = torch.device("cpu")
SHAPE = Shape("wide", 12, 8, 10, 150)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
OWN = [name for name in IMPLEMENTATIONS if name not in PEERS]
# fp32 throughout, teacher and student near: rounding is amplified by what cancels.
BOUND = 5e-6


def prepared(name: str, dtype: torch.dtype = torch.float32) -> tuple[Implementation, Inputs, float]:
    implementation = IMPLEMENTATIONS[name]
    inputs = implementation.prepare(make_inputs(SHAPE, CPU, dtype))
    return implementation, inputs, inputs.gamma("mixed")


def run(implementation: Implementation, inputs: Inputs, gamma: float, labels: Tensor) -> Tensor:
    """The loss; gradients are in the inputs. What torch.compile would run is run as written."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the interpreter: infinities beyond the row's end
        loss = implementation.build(inputs, gamma)(labels)
        loss.backward()
    return loss.detach()


def errors(implementation: Implementation, inputs: Inputs, gamma: float, labels: Tensor, loss: Tensor) -> dict:
    """Of a step on ``labels``, whose mean is over valid tokens; ignored ones must have no gradient."""
    valid = labels != IGNORE
    assert inputs.hidden_s.grad is not None and inputs.weight_s.grad is not None
    assert not inputs.hidden_s.grad[~valid].any()
    top_k = inputs.top_k and fk.TopK(inputs.top_k.log_probs[valid], inputs.top_k.indices[valid], inputs.top_k.tail)
    part = inputs._replace(
        hidden_s=inputs.hidden_s.detach()[valid], hidden_t=inputs.hidden_t[valid], labels=labels[valid], top_k=top_k
    )
    return relative_errors(
        part,
        lambda z, teacher, y: implementation.truth(z, teacher, y, gamma),
        loss,
        inputs.hidden_s.grad[valid],
        inputs.weight_s.grad,
    )


def check(name: str, dtype: torch.dtype = torch.float32, bound: float = BOUND) -> None:
    for share in (1.0, 0.5):
        implementation, inputs, gamma = prepared(name, dtype)
        keep = torch.arange(SHAPE.N) % 2 == 0 if share < 1.0 else torch.ones(SHAPE.N, dtype=torch.bool)
        labels = inputs.labels.masked_fill(~keep, IGNORE)
        found = errors(implementation, inputs, gamma, labels, run(implementation, inputs, gamma, labels))
        assert all(value < bound for value in found.values()), (share, found)


@pytest.mark.parametrize("name", OWN)
def test_ours_and_pytorchs_agree_with_their_groups_truth(name):
    if reason := IMPLEMENTATIONS[name].missing("cpu"):
        pytest.skip(reason)
    check(name)


@pytest.mark.parametrize("name", PEERS)
def test_peers_agree_with_their_groups_truth(name, monkeypatch):
    reason = PEERS[name].missing("cpu")
    if reason is not None and "GPU" in reason and INTERPRETED:
        reason = PEERS[name].missing("cuda")
    if reason is not None:
        pytest.skip(reason)
    if name != "cce":
        check(name)
        return
    import triton.language as tl

    # It takes no fp32, the interpreter's products no bf16, and there is no libdevice on a CPU.
    monkeypatch.setattr("cut_cross_entropy.tl_utils.tl_log1p", lambda x: tl.log(1.0 + x))
    check(name, torch.float16, bound=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_on_a_gpu(name):
    implementation = IMPLEMENTATIONS[name]
    if reason := implementation.missing("cuda"):
        pytest.skip(reason)
    inputs = make_inputs(Shape("small", 64, 32, 48, 1000), torch.device("cuda"), torch.bfloat16)
    inputs = implementation.prepare(inputs)
    gamma = inputs.gamma("mixed")
    loss = implementation.build(inputs, gamma)(inputs.labels)
    loss.backward()
    found = errors(implementation, inputs, gamma, inputs.labels, loss.detach())
    # Logits rounded to bf16 cost some of them a quarter of the gradient; a wrong factor costs half of it or more.
    assert found["loss"] < 0.1 and max(found["d_hidden"], found["d_weight"]) < 0.35, found


def textbook(group: str, z: Tensor, z_t: Tensor, y: Tensor, gamma: float) -> Tensor:
    """Per-token losses from PyTorch's own functions."""
    if group == SFT:
        return F.cross_entropy(z, y, reduction="none")
    log_q, p = z.log_softmax(1), z_t.softmax(1)

    def kl(a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, a, reduction="none").sum(1)

    if group == KL:
        return kl(p, log_q)
    if group == JSD:
        m = (p + log_q.exp()) / 2
        return (kl(p, m.log()) + kl(log_q.exp(), m.log())) / 2
    target = 0.5 * p + 0.5 * F.one_hot(y, z.shape[1])
    easy, hard = kl(target, log_q), kl(target, (0.5 * log_q.exp() + 0.5 * target).log())
    return torch.where(easy > gamma, hard, easy)


@pytest.mark.parametrize("group", GROUPS)
def test_truths_are_the_textbooks(group):
    g = torch.Generator().manual_seed(0)
    z, z_t = (torch.randn(6, 50, generator=g, dtype=torch.float64) * 3 for _ in range(2))
    y = torch.arange(6)
    gamma = float(textbook(KL, z, z_t, y, 0.0).median())
    expected = textbook(group, z, z_t, y, gamma)
    torch.testing.assert_close(IMPLEMENTATIONS[OURS[group]].truth(z, z_t, y, gamma), expected, rtol=1e-12, atol=1e-14)
    y[3] = IGNORE
    assert IMPLEMENTATIONS[OURS[group]].truth(z, z_t, y, gamma)[3] == 0


def test_groups():
    assert {known.group for known in IMPLEMENTATIONS.values()} == GROUPS.keys() == OURS.keys()
    for group, name in OURS.items():
        known = IMPLEMENTATIONS[name]
        assert known.group == group and known.note == "" and known.objective == GROUPS[group]
        # The library's defaults: no other entry of the group is fused_kd with nothing chosen.
        others = [n for n, i in IMPLEMENTATIONS.items() if i.group == group and n.startswith("fused_kd") and n != name]
        assert bool(others) == (group == SELF_EVOLUTION)
        rivals = {n.split()[0] for n, i in IMPLEMENTATIONS.items() if i.group == group} - {"fused_kd"}
        assert {"eager", "torch.compile"} <= rivals
    assert [name for name, known in IMPLEMENTATIONS.items() if known.note.startswith("nearest")] == []
    assert "top 64 entries, bucket" in IMPLEMENTATIONS["fused_kd top-k 64 bucket"].objective
    with pytest.raises(ValueError, match="group must be one of self-evolution, jsd, kl, sft, got 'ce'"):
        objective_of("ce", 0.0)


@pytest.mark.parametrize("name", ["eager jsd", "eager kl", "eager sft", *OURS.values(), "fused_kd torch"])
def test_counted_work_is_what_runs(name):
    implementation, inputs, gamma = prepared(name)
    step = implementation.build(inputs, gamma)
    counts = implementation.work(SHAPE, inputs, 0.5)
    assert implementation.teacher == (implementation.group != SFT) == ("teacher_logits" in counts["flops"])
    assert sum(counts["flops"].values()) == measured_flops(lambda: step(inputs.labels).backward())
    assert counts["flops"] == gemm_flops(SHAPE, top_k=not implementation.teacher)


def test_counted_rows_by_hand():
    NV = SHAPE.N * SHAPE.V
    specials, swept = {}, {}
    for group, name in OURS.items():
        counts = IMPLEMENTATIONS[name].work(SHAPE, make_inputs(SHAPE, CPU, torch.float32), 0.5)
        specials[group], swept[group] = counts["row_specials"] / NV, counts["row_bytes_swept"] / NV
    # Exponentials of both sides; of t / m and q / m a division and a logarithm each, of half the tokens t / m's alone.
    assert specials == {SELF_EVOLUTION: 3, JSD: 6, KL: 2, SFT: 1}
    # fp32 logits of both sides, sweep by sweep, and the gradient.
    assert swept == {SELF_EVOLUTION: 8 * 2.5 + 4, JSD: 8 * 3 + 4, KL: 8 * 2 + 4, SFT: 4 * 2 + 4}
    if IMPLEMENTATIONS["fused_kd streaming"].missing("cpu") is None:
        inputs = make_inputs(SHAPE, CPU, torch.float32)
        counts = IMPLEMENTATIONS["fused_kd streaming"].work(SHAPE, inputs, 0.0)
        assert counts["flops"] == gemm_flops(SHAPE) and counts["workspace_bytes"] > 0
        # Logits of both sides for the statistics, and again for the gradient.
        assert counts["streamed_flops"]["statistics"] == sum(list(counts["flops"].values())[:2])


def test_plan_counted_without_a_teacher_is_the_one_that_runs(monkeypatch):
    from fused_kd.engines import chunked

    seen = []
    implementation, inputs, gamma = prepared("fused_kd sft")
    plan = chunked.plan_chunks
    monkeypatch.setattr(chunked, "plan_chunks", lambda *a, **k: seen.append(plan(*a, **k)) or seen[-1])
    for chunk in (None, 5):
        with preferred_chunk(chunk):
            run(implementation, inputs, gamma, inputs.labels)
            counts = implementation.work(SHAPE, inputs, 0.0)
            assert seen[-1] == seen[-2] and counts["chunk"] == seen[-1].chunk
            assert (counts["workspace_bytes"], counts["group"]) == (seen[-1].workspace, seen[-1].group)
    assert [plan.chunk for plan in seen] == [12, 12, 4, 4]


def test_what_cannot_run_says_why(monkeypatch, tmp_path):
    def missing(name: str, device: str = "cpu") -> str | None:
        reason = IMPLEMENTATIONS[name].missing(device)
        assert reason is None or (reason and "\n" not in reason)
        return reason

    for name in ("fused_kd", "fused_kd sft", "fused_kd torch", "eager", "torch.compile kl"):
        assert missing(name) is None and missing(name, "cuda") is None
    assert "backend='cuda' needs tensors on an NVIDIA GPU, got tensors on cpu" in str(missing("fused_kd cuda"))
    assert "backend='native' needs tensors on the CPU, got tensors on cuda" in str(missing("fused_kd native", "cuda"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "backend='triton' needs " in str(missing("fused_kd triton"))
    assert str(missing("fused_kd streaming")).startswith("engine='streaming' runs in Triton alone: ")
    assert missing("liger fused jsd") == missing("liger ce") == "liger-kernel needs an NVIDIA GPU here"
    assert missing("fla kl") == "fla-core needs an NVIDIA GPU here"

    monkeypatch.setattr(peers.importlib.metadata, "version", lambda package: "0.1")
    assert missing("trl chunked kl") == "needs trl >= 1.16, found 0.1"
    assert missing("cce", "cuda") == "needs cut-cross-entropy >= 25.1, found 0.1"
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda package: "99.0")
    monkeypatch.setattr(peers, "_exists", lambda module: False)
    assert missing("liger chunked kl") == "liger-kernel 99.0 has no liger_kernel.chunked_loss"

    def not_found(package: str) -> str:
        raise peers.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(peers.importlib.metadata, "version", not_found)
    assert missing("fla kl", "cuda") == "fla-core is not installed: pip install 'fused_kd[peers]'"

    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    for name in ("torch linear_cross_entropy", "torch linear_cross_entropy chunked"):
        assert missing(name) == f"torch {torch.__version__} has no F.linear_cross_entropy with options, 2.13 has"


def test_a_module_is_looked_for_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "some_peer" / "inner").mkdir(parents=True)
    (tmp_path / "some_peer" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "some_peer" / "inner" / "leaf.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert peers._exists("some_peer") and peers._exists("some_peer.inner") and peers._exists("some_peer.inner.leaf")
    assert not peers._exists("some_peer.other") and not peers._exists("no_such_peer.inner")


def test_the_registry_imports_no_peer():
    code = (
        "import sys\n"
        "from bench.implementations import IMPLEMENTATIONS\n"
        "for known in IMPLEMENTATIONS.values(): known.missing('cpu')\n"
        "names = ('liger_kernel', 'trl', 'cut_cross_entropy', 'fla', 'transformers', 'triton')\n"
        "print([name for name in names if name in sys.modules])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_thresholds_reach_what_is_gated():
    """A threshold that leaves all tokens easy, and one that leaves none, must give the two losses."""
    inputs = make_inputs(SHAPE, CPU, torch.float32)
    for name in ("fused_kd", "eager"):
        implementation = IMPLEMENTATIONS[name]
        losses = []
        for gamma, objective in ((math.inf, fk.NoEvo(lam=0.5)), (0.0, fk.Skew(lam=0.5, beta=0.5))):
            loss = run(implementation, inputs, gamma, inputs.labels)
            z, z_t = inputs.hidden_s @ inputs.weight_s.t(), inputs.hidden_t @ inputs.weight_t.t()
            assert float(loss) == pytest.approx(fk.kd_loss(z, z_t, inputs.labels, objective).loss.item(), rel=1e-5)
            losses.append(float(loss))
        assert losses[0] > 1.5 * losses[1]
