"""The registry: each implementation computes what its group says, and what cannot run here says why.

Peers that only a GPU has run in Triton's interpreter here, which knows their formulas, not their speed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_kd as fk
from bench import registry
from bench.measure import relative_errors
from bench.problems import IGNORE, Inputs, Shape, cut_top_k, make_inputs
from bench.registry import GROUPS, IMPLEMENTATIONS, JSD, KL, OURS, PEERS, SFT, Implementation, objective_of

from .helpers import CPU, FP32, ROOT, WIDE

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


def prepared(name: str, dtype: torch.dtype = FP32) -> tuple[Implementation, Inputs, float]:
    implementation = IMPLEMENTATIONS[name]
    inputs = implementation.prepare(make_inputs(WIDE, CPU, dtype))
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
    truth = lambda z, teacher, y: implementation.truth(z, teacher, y, gamma)  # noqa: E731
    return relative_errors(part, truth, loss, inputs.hidden_s.grad[valid], inputs.weight_s.grad)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_implementations_agree_with_their_groups_truth(name, monkeypatch):
    reason = IMPLEMENTATIONS[name].missing("cpu")
    if reason is not None and name in PEERS and "GPU" in reason and INTERPRETED:
        reason = IMPLEMENTATIONS[name].missing("cuda")
    if reason is not None:
        pytest.skip(reason)
    # fp32 throughout, teacher and student near: rounding is amplified by what cancels.
    dtype, bound = FP32, 5e-6
    if name == "cce":
        import triton.language as tl

        # It takes no fp32, the interpreter's products no bf16, and there is no libdevice on a CPU.
        monkeypatch.setattr("cut_cross_entropy.tl_utils.tl_log1p", lambda x: tl.log(1.0 + x))
        dtype, bound = torch.float16, 2e-3
    # In the interpreter "cce" takes seconds.
    for every in (2,) if name == "cce" else (1, 2):
        implementation, inputs, gamma = prepared(name, dtype)
        labels = inputs.labels.masked_fill(torch.arange(WIDE.N) % every != 0, IGNORE)
        found = errors(implementation, inputs, gamma, labels, run(implementation, inputs, gamma, labels))
        assert all(value < bound for value in found.values()), (every, found)


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
    truth = IMPLEMENTATIONS[OURS[group]].truth
    torch.testing.assert_close(truth(z, z_t, y, gamma), textbook(group, z, z_t, y, gamma), rtol=1e-12, atol=1e-14)
    y[3] = IGNORE
    assert truth(z, z_t, y, gamma)[3] == 0


def test_groups():
    assert {known.group for known in IMPLEMENTATIONS.values()} == GROUPS.keys() == OURS.keys()
    assert all(IMPLEMENTATIONS[name].objective == GROUPS[group] for group, name in OURS.items())
    assert "top 64 entries, bucket" in IMPLEMENTATIONS["fused_kd top-k 64 bucket"].objective
    with pytest.raises(ValueError, match="group must be one of self-evolution, jsd, kl, sft, got 'ce'"):
        objective_of("ce", 0.0)


def test_thresholds_reach_what_is_gated():
    """A threshold that leaves all tokens easy, and one that leaves none, must give the two losses."""
    inputs = make_inputs(WIDE, CPU, FP32)
    z, z_t = inputs.hidden_s @ inputs.weight_s.t(), inputs.hidden_t @ inputs.weight_t.t()
    for name in ("fused_kd", "eager"):
        losses = []
        for gamma, objective in ((math.inf, fk.NoEvo(lam=0.5)), (0.0, fk.Skew(lam=0.5, beta=0.5))):
            losses.append(float(run(IMPLEMENTATIONS[name], inputs, gamma, inputs.labels)))
            assert losses[-1] == pytest.approx(fk.kd_loss(z, z_t, inputs.labels, objective).loss.item(), rel=1e-5)
        assert losses[0] > 1.5 * losses[1]


def test_what_cannot_run_says_why(monkeypatch):
    def missing(name: str, device: str = "cpu") -> str | None:
        reason = IMPLEMENTATIONS[name].missing(device)
        assert reason is None or (reason and "\n" not in reason)
        return reason

    for name in ("fused_kd", "fused_kd torch", "eager", "torch.compile kl"):
        assert missing(name) is None and missing(name, "cuda") is None
    assert "backend='cuda' needs tensors on an NVIDIA GPU, got tensors on cpu" in str(missing("fused_kd cuda"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert str(missing("fused_kd streaming")).startswith("engine='streaming' runs in Triton alone: ")
    assert missing("liger fused jsd") == missing("liger ce") == "liger-kernel needs an NVIDIA GPU here"

    monkeypatch.setattr(registry.importlib.metadata, "version", lambda package: "0.1")
    assert missing("trl chunked kl") == "needs trl >= 1.16, found 0.1"
    monkeypatch.setattr(registry.importlib.metadata, "version", lambda package: "99.0")
    monkeypatch.setattr(registry, "_exists", lambda module: False)
    assert missing("liger chunked kl") == "liger-kernel 99.0 has no liger_kernel.chunked_loss"

    def not_found(package: str) -> str:
        raise registry.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(registry.importlib.metadata, "version", not_found)
    assert missing("fla kl", "cuda") == "fla-core is not installed: pip install 'fused_kd[peers]'"
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    reason = f"torch {torch.__version__} has no F.linear_cross_entropy with options, 2.13 has"
    assert missing("torch linear_cross_entropy") == reason


def test_a_module_is_looked_for_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "some_peer" / "inner").mkdir(parents=True)
    (tmp_path / "some_peer" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "some_peer" / "inner" / "leaf.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry._exists("some_peer.inner") and registry._exists("some_peer.inner.leaf")
    assert not registry._exists("some_peer.other") and not registry._exists("no_such_peer.inner")


def test_the_registry_imports_no_peer_and_a_run_no_pytest():
    code = (
        "import sys\nsys.modules['pytest'] = None\n"
        "import bench.__main__, bench.cpu, bench.gpu, bench.stages, bench.model\n"
        "from bench.registry import IMPLEMENTATIONS\n"
        "for known in IMPLEMENTATIONS.values(): known.missing('cpu')\n"
        "names = ('liger_kernel', 'trl', 'cut_cross_entropy', 'fla', 'transformers', 'triton')\n"
        "print([name for name in names if name in sys.modules])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_inputs_are_those_of_their_seed_and_teacher():
    a, b, c = (make_inputs(WIDE, CPU, FP32, seed) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a[:6], b[:6], strict=True))
    assert not torch.equal(a.weight_s, c.weight_s)
    assert a.hard_fraction(a.gamma("easy")) == 0 and a.hard_fraction(a.gamma("hard")) == 1
    assert 0.4 < a.hard_fraction(a.gamma("mixed")) < 0.6
    assert [int((a.ignoring(share) == IGNORE).sum()) for share in (0.5, 0.25)] == [6, 9]
    with pytest.raises(ValueError, match="tokens must be"):
        a.gamma("some")
    with pytest.raises(ValueError, match="teacher must be one of near, far"):
        make_inputs(WIDE, CPU, FP32, teacher="absent")
    agreement = {}
    for teacher in ("near", "far"):
        inputs = make_inputs(Shape("", 64, 32, 48, 200), CPU, FP32, teacher=teacher)
        top, top_t = (inputs.hidden_s @ inputs.weight_s.T).argmax(1), (inputs.hidden_t @ inputs.weight_t.T).argmax(1)
        agreement[teacher] = float((top == top_t).float().mean())
    assert agreement["near"] > 0.4 > 0.1 > agreement["far"]


@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_top_k_inputs_are_the_teachers_head_and_their_own_difficulty(tail):
    dense = make_inputs(WIDE, CPU, FP32)
    inputs = cut_top_k(dense, 16, tail)
    assert inputs.top_k is not None and inputs.top_k.tail == tail
    log_p, kept = (dense.hidden_t @ dense.weight_t.t()).double().log_softmax(1).topk(16)
    assert torch.equal(inputs.top_k.indices, kept)
    torch.testing.assert_close(inputs.top_k.log_probs.double(), log_p, rtol=1e-5, atol=1e-5)
    student = fk.LMHead(dense.hidden_s, dense.weight_s)
    out = fk.kd_loss(student, inputs.top_k, dense.labels, fk.SelfEvolution(gamma=inputs.gamma("mixed")))
    torch.testing.assert_close(out.difficulty, inputs.difficulty, rtol=1e-5, atol=1e-5)
    first = inputs.first(5)
    assert first.top_k is not None and torch.equal(first.top_k.indices, inputs.top_k.indices[:5])
