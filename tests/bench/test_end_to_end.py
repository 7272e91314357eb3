"""The whole training step at tiny sizes: the same step in every way, the largest batch, rows from records."""

from __future__ import annotations

import copy
import io
import math
import sys

import pytest
import torch

pytest.importorskip("transformers")

import fused_kd as fk
from bench import end_to_end
from bench.end_to_end import AGREEMENT, GAMMA, PAIRS, WAYS, Model, Training, largest_batch, markdown, measure
from bench.problems import BETA, LAM
from bench.session import Lines
from fused_kd.reference import reference_kd_loss

TINY = PAIRS["tiny"]
LLAMA = TINY._replace(
    name="llama", student=Model("llama", 1000, 32, 2, 64, 2, 1), teacher=Model("llama", 1000, 48, 2, 64, 2, 1)
)


@pytest.mark.parametrize(
    "way, pair, gamma",
    [
        ("fused_kd", TINY, math.inf),
        ("fused_kd", LLAMA, GAMMA),
        ("eager", TINY, GAMMA),
        ("torch.compile", LLAMA, math.inf),
    ],
)
def test_a_step_is_that_of_the_models_logits(way, pair, gamma, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # takes long; a real one: bench run --quick
    training = Training(pair, way)
    training.gate(gamma)
    ids = pair.tokens(3)
    student, teacher = (copy.deepcopy(m).double() for m in (training.student, training.teacher))
    before = copy.deepcopy(student.state_dict())
    loss = training(ids)

    z, z_t = student(ids).logits[:, :-1], teacher(ids).logits[:, :-1, : pair.student.vocab]
    objective = fk.SelfEvolution(lam=LAM, beta=BETA, gamma=gamma)
    truth = reference_kd_loss(z.flatten(0, 1), z_t.flatten(0, 1), ids[:, 1:].flatten(), objective)
    truth.loss.backward()
    assert truth.is_hard.all() == (gamma == GAMMA)
    assert not loss.requires_grad and abs(float(loss) / float(truth.loss.detach()) - 1) < 2e-6
    if gamma == math.inf:  # what the rows compare would show labels one token off
        wrong = reference_kd_loss(z.flatten(0, 1), z_t.flatten(0, 1), ids[:, :-1].flatten(), objective)
        assert abs(float(wrong.loss.detach()) / float(truth.loss.detach()) - 1) > 100 * AGREEMENT
    for (name, own), true in zip(training.student.named_parameters(), student.parameters(), strict=True):
        assert (own.grad - true.grad).norm() <= 2e-5 * true.grad.norm() > 0, name
        torch.testing.assert_close(own.double(), before[name] - 1e-3 * true.grad, rtol=1e-6, atol=1e-7)
    assert not any(p.requires_grad for p in training.teacher.parameters()) and not training.teacher.training


@pytest.mark.parametrize("first", [1, 8, 400])
def test_the_largest_batch_is_found_to_an_eighth(first):
    for limit in (0, 1, 5, 63, 64, 100, 999, 1000, 5000):
        tried: list[int] = []

        def fits(batch: int, limit: int = limit, tried: list[int] = tried) -> bool:
            assert 1 <= batch <= 1000 and batch not in tried and len(tried) < 20
            tried.append(batch)
            return batch <= limit

        low, high = largest_batch(fits, first, 1000)
        assert low <= limit and (high is None) == (limit >= 1000) and (low == 1000 or limit < high)
        assert high is None or high - low <= max(1, low // 8)


def test_measuring_and_looking_for_the_largest_batch():
    found = measure(TINY._replace(most=TINY.batch), "fused_kd", 2, 1, True)
    assert found["status"] == "ok" and len(found["seconds"]) == end_to_end.ROUNDS and min(found["seconds"]) > 0
    if found["peak"] is not None:
        assert found["search_status"] == "ok" and found["largest_batch"] == TINY.batch
        assert found["probes"][0]["batch"] == TINY.batch and found["probes"][0]["peak"] > 4 * 1000 * 32
    broken = measure(TINY, "eager", 10**12, 1, False)  # of ids: the system refuses at once
    assert broken["status"] == "out of memory" and broken["reason"].startswith("RuntimeError")


def trial(seconds: float, loss: float = 0.25, **fields) -> dict:
    return {"status": "ok", "seconds": [seconds] * 2, "loss": loss, "peak": 10_000_000, **fields}


def rows_from(tmp_path, monkeypatch, records: dict[tuple[str, int], dict]) -> dict[str, dict]:
    """Rows of what each way's process of each turn put into the lines; one that put nothing was cut."""

    def run(stages, lines, end, logs):
        (stage,) = stages
        _, _, way, _, turn = stage.name.split(":")
        if found := dict(records.get((way, int(turn)), {})):
            lines.put(stage.name, "trial", found.pop("status"), **found)
        lines.put(stage.name, "stage", "ok" if found else "cut", reason="stopped after 3 s")

    monkeypatch.setattr(end_to_end, "run_stages", run)
    return {row["way"]: row for row in end_to_end.measure_pair(TINY, WAYS, Lines(tmp_path / "lines.jsonl"))}


def test_rows_and_their_table(tmp_path, monkeypatch):
    searched = {"search_status": "ok", "probes": [], "largest_batch": 40, "refused_batch": 45}
    failed = {"status": "failed", "reason": "InductorError: no compiler"}
    records = {
        ("fused_kd", 1): trial(0.5), ("fused_kd", 2): trial(0.5, **searched),
        ("eager", 1): trial(1.0, peak=20_000_000), ("torch.compile", 1): failed, ("torch.compile", 2): failed,
    }  # fmt: skip
    rows = rows_from(tmp_path, monkeypatch, records)
    assert tuple(rows) == WAYS and len(rows["fused_kd"]["seconds"]) == 4
    assert rows["eager"]["status"] == "ok" and len(rows["eager"]["seconds"]) == 2  # its second turn was cut
    text = markdown(list(rows.values()))
    assert "| tiny: 4 x 16 tokens | fused_kd | 128 | 2.00 | 0.010 | 0.50 | 0.25000 | 40 |  |" in text
    assert "| tiny: 4 x 16 tokens | torch.compile | failed: InductorError: no compiler |  |" in text
    assert "| tiny: 4 x 16 tokens | eager | 64 | 1.00 | 0.020 | 1.00 | 0.25000 |  |  |" in text
    assert "python -m bench.end_to_end --architecture tiny --way fused_kd --batch 4" in text
    assert markdown([rows["fused_kd"] | {"refused_batch": None}]).count("| at least 40 |") == 1


def test_a_way_that_computes_another_loss_fails(tmp_path, monkeypatch):
    records = {(way, turn): trial(1.0, loss=0.2501 if way == "fused_kd" else 0.25) for way in WAYS for turn in (1, 2)}
    rows = rows_from(tmp_path, monkeypatch, records)
    assert rows["eager"]["status"] == rows["torch.compile"]["status"] == "ok"
    assert rows["fused_kd"]["status"] == "failed"
    assert "loss 0.2501 is further than 2.5e-06 from eager's 0.25" in rows["fused_kd"]["reason"]


def test_the_command_and_its_trials(capsys, monkeypatch):
    """The trials in this process: each of its own imports for ten seconds."""

    def run(stages, lines, end, logs):
        (stage,) = stages
        assert stage.command[:4] == [sys.executable, "-m", "bench.end_to_end", "--trial"]
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
        assert end_to_end.main(stage.command[3:]) == 0

    monkeypatch.setattr(end_to_end, "run_stages", run)
    assert end_to_end.main(["--architecture", "tiny", "--way", "eager", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "| tiny: 2 x 16 tokens | eager |" in out and "--architecture tiny --way eager --batch 2" in out
    with pytest.raises(SystemExit, match="2"):
        end_to_end.main(["--batch", "0"])
    assert "--batch must be at least 1, got 0" in capsys.readouterr().err
