"""examples/qad.py from text to table on a tiny budget, and what it says of quantised weights."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

pytest.importorskip("torchao", reason="needs torchao, the extra quantize")

import torchao.quantization as ao
import torchao.quantization.qat as qat

from fused_kd.integrations.transformers import hidden_states, lm_head_of
from fused_kd.training.collate import Collator
from fused_kd.training.script import run_script

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import qad

from ..training.tiny import VOCAB, rows, tiny

SMALL = [
    *("--train_limit", "60", "--held_out", "6", "--vocab", "400", "--model_epochs", "1"),
    *("--epochs", "0.5", "--batch", "12", "--max_length", "64"),
]
WEIGHTS = ["unquantised", "rounded", "sft", "forward_kd:lam=1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qad")
    with contextlib.redirect_stdout(io.StringIO()):
        qad.main([*SMALL, "--output", str(folder)])
    return folder


def linears(model: Any) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def on_grid(weight: torch.Tensor, group: int) -> bool:
    """Whether each group of a row takes no more than 16 values, evenly apart."""
    groups = weight.detach().double().reshape(-1, group)
    return all(len(values.unique()) <= 16 for values in groups)


def test_everything_is_written(finished: Path) -> None:
    runs = json.loads((finished / "metrics.json").read_text())["runs"]
    assert [run["weights"] for run in runs] == WEIGHTS
    exact, rounded, *_ = runs
    assert exact["kl"] < 1e-5 and exact["agree"] == 100 and rounded["kl"] > 1e-6
    assert len((finished / "results.md").read_text().splitlines()) == 2 + len(WEIGHTS)
    assert (finished / "qad.png").read_bytes().startswith(b"\x89PNG")
    for title in ("rounded", "sft.0", "forward_kd-lam=1.0"):
        (folder,) = finished.glob(f"{title}-*/quantised")
        model = AutoModelForCausalLM.from_pretrained(folder)
        for name, layer in linears(model).items():
            assert on_grid(layer.weight, 32) == (name != "lm_head"), name


def test_finished_work_is_kept(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qad, "fit", lambda *_, **__: pytest.fail("a model is trained"))
    before = (finished / "results.md").read_text()
    qad.main([*SMALL, "--output", str(finished)])
    assert (finished / "results.md").read_text() == before


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_the_grid_is_what_is_computed_with(kind: str) -> None:
    """In training, on the grid, and as torchao quantises the trained weights."""
    model = tiny(32, 0).eval()
    ids = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    plain, exact = copy.deepcopy(model), model(ids).logits.detach()
    fake = qad.fake_quantised(model, kind, 8)
    found = fake(ids).logits
    assert not torch.allclose(found, exact, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    head = fake.get_output_embeddings()
    assert all(layer.weight.grad is not None for name, layer in linears(fake).items())
    grid = qad.on_the_grid(copy.deepcopy(fake))
    assert type(grid.get_output_embeddings()) is nn.Linear and type(head) is nn.Linear
    torch.testing.assert_close(grid(ids).logits, found, rtol=1e-6, atol=1e-6)
    config = ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(8)) if kind == "int4" else ao.Float8WeightOnlyConfig()
    head = plain.get_output_embeddings()
    ao.quantize_(plain, config, filter_fn=lambda layer, _: isinstance(layer, nn.Linear) and layer is not head)
    for (name, a), b in zip(linears(grid).items(), linears(plain).values(), strict=True):
        if name != "lm_head":
            torch.testing.assert_close(a.weight, b.weight.dequantize(), rtol=1e-6, atol=0)


@torch.no_grad()
def test_the_measures_are_those_of_the_logits() -> None:
    student, teacher, data = tiny(16, 0), tiny(24, 1), rows(11)
    found = qad.measured(student, teacher, data, Collator(0), batch=4)
    sums = torch.zeros(3, dtype=torch.float64)
    for row in data:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        q, p = (model(ids).logits[0, :-1][labels != -100].log_softmax(-1) for model in (student, teacher))
        ce, kl = -q.gather(1, labels[labels != -100, None]).sum(), (p.exp() * (p - q)).sum()
        sums += torch.stack([ce, kl, (q.argmax(-1) == p.argmax(-1)).sum().double()])
    tokens = sum(sum(label != -100 for label in row["labels"][1:]) for row in data)
    ce, kl, same = (sums / tokens).tolist()
    assert 0 < same < 1, "the models differ"
    expected = {"perplexity": math.exp(ce), "kl": kl, "agree": 100 * same, "tokens": tokens}
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_loss_sees_a_head_as_the_model_computes_it() -> None:
    """A head that is fake-quantised too, its weight and its input."""
    model, ids = tiny(32, 0).eval(), torch.arange(12).reshape(2, 6)
    weight = ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(8))
    ao.quantize_(model, qat.QATConfig(weight, step="prepare"))
    fake = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    model.lm_head.activation_fake_quantizer = qat.IntxFakeQuantizer(fake)
    expected = model(ids).logits
    head = lm_head_of(model, hidden_states(model, input_ids=ids))
    found = head.hidden @ head.weight.T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    g = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (exact,) = torch.autograd.grad((expected * g).sum(), model.lm_head.weight)
    (actual,) = torch.autograd.grad((found * g).sum(), model.lm_head.weight)
    torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-5)


def test_float8_s_gradients_pass_straight_through() -> None:
    """Those of a mean loss, as of a model whose weights are the rounded ones."""
    model = tiny(32, 0)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.05)
        model.model.layers[0].mlp.up_proj.weight[1] = 0
    fake = qad.fake_quantised(model, "fp8", 8)
    rounded = qad.on_the_grid(copy.deepcopy(fake))
    ids = torch.randint(VOCAB, (8, 40), generator=torch.Generator().manual_seed(0))
    for each in (fake, rounded):
        each(ids, labels=ids).loss.backward()
    for (name, ours), exact in zip(linears(fake).items(), linears(rounded).values(), strict=True):
        found, expected = ours.weight.grad, exact.weight.grad
        assert (found == 0).sum() == (expected == 0).sum(), name
        assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999, name


def test_a_float8_head_s_gradients_pass_straight_through() -> None:
    """A float8 weight and input of the head, whose gradients are below the smallest number of float8."""
    model, ids = tiny(32, 0).eval(), torch.arange(3, 15).reshape(2, 6)
    model.lm_head = qat.FakeQuantizedLinear.from_linear(model.lm_head)
    rounds = qat.FakeQuantizer.from_config(qat.Float8FakeQuantizeConfig(granularity=ao.PerRow()))
    model.lm_head.weight_fake_quantizer = model.lm_head.activation_fake_quantizer = rounds
    hidden = hidden_states(model, input_ids=ids).detach().requires_grad_()
    head = lm_head_of(model, hidden)
    found = head.hidden @ head.weight.T
    torch.testing.assert_close(found, model.lm_head(hidden), rtol=0, atol=0)
    g = 1e-5 * torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    d_hidden, d_weight = torch.autograd.grad((found * g).sum(), (hidden, model.lm_head.weight))
    torch.testing.assert_close(d_hidden, g @ head.weight)
    torch.testing.assert_close(d_weight, g.flatten(0, 1).T @ head.hidden.flatten(0, 1))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--group_size", "7", "--train_limit", "20"], "group_size must divide the 128 weights of a row"),
        (["--learning_rate", "0"], "learning_rate must be above 0"),
        (["--objective"], "objective must name at least one"),
        (["--text", "absent.txt"], "text='absent.txt' must be a text file"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["qad.py", *SMALL, *arguments, "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        run_script(qad.main)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_text_file(tmp_path: Path) -> None:
    lines = [f"the number {i} is followed by the number {i + 1} .\n" for i in range(80)]
    (tmp_path / "text.txt").write_text("".join(lines))
    arguments = [*SMALL, "--text", str(tmp_path / "text.txt"), "--objective", "forward_kd:lam=1", "--kind", "fp8"]
    found = qad.main([*arguments, "--output", str(tmp_path / "out")])
    assert [run["tokens"] > 0 for run in found["runs"]] == [True] * 3
