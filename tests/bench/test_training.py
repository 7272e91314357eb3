"""``python -m bench training`` rehearsed on a CPU: the same step in every way, the largest batch, lines and tables."""

from __future__ import annotations

import copy
import math
import statistics

import pytest
import torch

pytest.importorskip("transformers")

from bench import training
from bench.registry import KL, SELF_EVOLUTION, SFT, objective_of
from bench.session import read
from bench.training import GAMMA, SETTINGS, Models, largest
from bench.training_plan import TINY, Part
from bench.training_report import latest, rows_table
from fused_kd.reference import reference_kd_loss

FP32 = TINY._replace(weights="fp32")


@pytest.mark.parametrize("way", ["fused_kd", "eager", "torch.compile"])
@pytest.mark.parametrize("group", [KL, SFT, SELF_EVOLUTION])
def test_all_ways_take_the_same_step(way, group, monkeypatch):
    """Against the float64 oracle on the models' own logits, without autocast."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    training.compiled_loss.cache_clear()
    models = Models(TINY, "cpu")
    models.student, models.teacher = models.student.float(), models.teacher.float()
    models.parameters = list(models.student.parameters())
    student, teacher = (copy.deepcopy(model).double() for model in (models.student, models.teacher))
    ids = models.tokens(2)
    loss = models.step(models.loss_of(way, group), ids)

    z, z_t = student(ids).logits[:, :-1].flatten(0, 1), teacher(ids).logits[:, :-1].flatten(0, 1)
    truth = reference_kd_loss(z, None if group == SFT else z_t, ids[:, 1:].flatten(), objective_of(group, GAMMA)).loss
    truth.backward()
    assert float(loss) == pytest.approx(float(truth.detach()), rel=1e-5)
    norms = [p.grad.norm() for p in student.parameters()]
    assert models.gradient_norm() == pytest.approx(float(torch.stack(norms).norm()), rel=1e-4)
    for own, true in zip(models.parameters, student.parameters(), strict=True):
        assert (own.grad - true.grad).norm() <= 1e-4 * true.grad.norm()


@pytest.mark.parametrize("setting", [TINY, FP32, TINY._replace(checkpointing=True)])
def test_weights_and_steps_of_a_setting(setting):
    models = Models(setting, "cpu")
    before = copy.deepcopy(models.student.state_dict())
    ids = models.tokens(2)
    values = [float(models.step(models.loss_of(way, KL), ids)) for way in ("fused_kd", "eager", "fused_kd")]
    assert values[0] == values[2] == pytest.approx(values[1], rel=2e-3)
    dtype = torch.bfloat16 if setting.weights == "bf16" else torch.float32
    assert {p.dtype for p in models.parameters} == {dtype} and next(models.teacher.parameters()).dtype == torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in models.student.state_dict().items())
    assert len(models.optimizer.state) == len(models.parameters), "the optimizer works"
    assert any(getattr(module, "gradient_checkpointing", False) for module in models.student.modules()) == (
        setting.checkpointing
    )


@pytest.mark.parametrize("truth", [0, 1, 2, 7, 8, 100, 3000, 4096])
@pytest.mark.parametrize("guess", [1, 6, 90, 3500])
def test_the_largest_batch_is_found_from_any_guess(truth, guess):
    tried = []
    low, high = largest(lambda batch: tried.append(batch) or batch <= truth, guess, 4096)
    assert low <= truth and (low in tried or low == 0)
    if high is None:
        assert low == truth == 4096
    else:
        assert truth < high in tried and high - low <= max(1, high / 16)


def test_a_rehearsal_leaves_lines_and_tables(tmp_path, monkeypatch, capsys):
    ways = ("fused_kd", "eager", "Liger fused")
    plan = [Part("Qwen2.5", KL, kind, ways) for kind in ("step", "largest")]
    monkeypatch.setattr(training, "PLAN", (*plan, Part("SmolLM2", SFT, "step", ways)))
    argv = ["--rehearse", "--out", str(tmp_path)]
    assert training.main(argv) == 0
    rows = read(tmp_path / "training.jsonl")
    assert [row["status"] for row in rows].count("ok") == 1 + 2 + 6
    step = next(row for row in rows if row.get("way") == "fused_kd")
    assert len(step["seconds"]) == training.ROUNDS and step["peak"] > 0 and step["loss"] == pytest.approx(1, rel=0.2)
    full = next(row for row in rows if row["kind"] == "largest" and row["way"] == "fused_kd")
    tokens = full["largest"] * full["length"]
    assert full["tokens_per_s"] == pytest.approx(tokens / statistics.median(full["seconds"]))
    text = (tmp_path / "training.md").read_text()
    assert text.count("| fused_kd |") == 2 and "missing Liger's kernels need a GPU" in text
    assert "largest batch in 1000 GB" in text and "at least 8" in text and "differs" not in text
    before = (tmp_path / "training.md").read_text()
    assert training.main(["--report", str(tmp_path / "training.jsonl")]) == 0
    assert (tmp_path / "training.md").read_text() == before
    # another run in the same folder, which is cut at once, takes nothing away
    assert training.main([*argv, "--seconds", "0", "--first", "3"]) == 0
    assert (tmp_path / "training.md").read_text() == before and len(read(tmp_path / "training.jsonl")) > len(rows)
    capsys.readouterr()
    assert training.main(["--rehearse", "--out", str(tmp_path / "cut"), "--seconds", "0"]) == 0
    assert "Not reached: Qwen2.5, kl, step; " in (tmp_path / "cut" / "training.md").read_text()
    for wrong in ([*argv, "--first", "4"], []):
        with pytest.raises(SystemExit, match="2"):
            training.main(wrong)


def test_a_way_that_computes_something_else_is_told():
    row = {"kind": "step", "status": "ok", "seconds": [1.0], "tokens_per_s": 8.0, "peak": 2e9, "gradient_norm": 1.0}
    eager, ours = row | {"way": "eager", "loss": 1.0}, row | {"way": "fused_kd", "loss": 1.001}
    assert "differs" not in rows_table([eager, ours]) and "loss 1e-03" in rows_table([eager, ours])
    for wrong in ({"loss": 1.003}, {"gradient_norm": 1.03}, {"loss": math.nan}):
        assert "**differs**" in rows_table([eager, ours | wrong])


def test_rows_beside_other_processes_have_no_speed():
    row = {"kind": "step", "setting": "a", "group": KL, "status": "ok", "seconds": [0.5], "tokens_per_s": 816.0}
    row |= {"peak": 2e9, "gradient_norm": 1.0, "loss": 1.0}
    alone, beside = ({"kind": "environment", "status": "ok", "beside": flag} for flag in (False, True))
    ours, eager = row | {"way": "fused_kd"}, row | {"way": "eager"}
    table = rows_table([each for each in latest([beside, ours, eager, alone, ours]) if "way" in each])
    assert "| fused_kd | 500.0 | 816 |  | 2.0 | 1.00 |" in table and "| eager |  |  |  | 2.0 | 1.00 |" in table
    table = rows_table([each for each in latest([alone, ours, eager]) if "way" in each])
    assert table.count("| 500.0 | 816 | 1.00 |") == 2


def test_what_fails_is_a_row(tmp_path, monkeypatch):
    def broken(self, way, group):
        raise RuntimeError("no kernel\nand more")

    monkeypatch.setattr(training, "PLAN", (Part("Qwen2.5", KL, "step", ("eager",)),))
    monkeypatch.setattr(Models, "loss_of", broken)
    assert training.main(["--rehearse", "--out", str(tmp_path)]) == 1
    text = (tmp_path / "training.md").read_text()
    assert "failed RuntimeError: no kernel" in text


def test_settings_fit_together():
    for setting in SETTINGS.values():
        assert setting.student.vocab == setting.teacher.vocab
        for model in (setting.student, setting.teacher):
            assert model.hidden % model.heads == 0 and model.heads % model.kv_heads == 0
    for part in training.PLAN:
        for way in part.ways:
            assert part.setting in SETTINGS and (not way.startswith("Liger") or (way, part.group) in training.LIGER)


def test_without_a_gpu(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert training.main(["--out", str(tmp_path)]) == 2
    assert "--rehearse" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_liger_computes_the_groups_objective():
    """Its beta of 0 is the forward KL of the registry, on a CPU by its chunked loss, which needs no kernel."""
    pytest.importorskip("liger_kernel")
    models = Models(TINY, "cpu")
    models.student, models.teacher = models.student.float(), models.teacher.float()
    ids = models.tokens(2)
    wanted = float(models.loss_of("fused_kd", KL)(ids).detach())
    student, teacher = models.heads(ids, KL)
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100).flatten()
    flat = [x.flatten(0, 1) if x.dim() == 3 else x for head in (student, teacher) for x in (head.hidden, head.weight)]
    with torch._dynamo.config.patch(disable=True):
        found = training.liger_loss("Liger chunked", KL)(*flat, labels)
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-4)
