"""The end-to-end benchmark at tiny sizes: the same step in every way, the search for the largest batch, rows."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

pytest.importorskip("transformers")

import fused_kd as fk  # noqa: E402
from bench import end_to_end, trial  # noqa: E402
from bench.architectures import ARCHITECTURES, Architecture, Model, suite  # noqa: E402
from bench.end_to_end import AGREEMENT, ROUNDS, TURNS, markdown, measure_end_to_end, pieces  # noqa: E402
from bench.inputs import BETA, LAM  # noqa: E402
from bench.largest import Search  # noqa: E402
from bench.runner import Deadline  # noqa: E402
from bench.trial import GAMMA, WAYS, Training, Trial, run_trial  # noqa: E402
from fused_kd.reference import reference_kd_loss  # noqa: E402

CPU = torch.device("cpu")
TINY = ARCHITECTURES["tiny"]
LLAMA = TINY._replace(
    name="llama", student=Model("llama", 1000, 32, 2, 64, 2, 1), teacher=Model("llama", 1000, 48, 2, 64, 2, 1)
)


@pytest.mark.parametrize("gamma", [math.inf, GAMMA], ids=["easy", "hard"])
@pytest.mark.parametrize("architecture", [TINY, LLAMA], ids=lambda a: a.name)
@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_that_of_the_models_logits(way: str, architecture: Architecture, gamma: float, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # takes long; a real one: --quick
    training = Training(architecture, way, CPU)
    training.gate(gamma)
    ids = architecture.tokens(3, CPU)
    student, teacher = (copy.deepcopy(m).double() for m in (training.student, training.teacher))
    before = copy.deepcopy(student.state_dict())
    loss = training(ids)

    z, z_t = student(ids).logits[:, :-1], teacher(ids).logits[:, :-1, : architecture.student.vocab]
    objective = fk.SelfEvolution(lam=LAM, beta=BETA, gamma=gamma)
    truth = reference_kd_loss(z.flatten(0, 1), z_t.flatten(0, 1), ids[:, 1:].flatten(), objective)
    truth.loss.backward()
    assert truth.is_hard.all() == (gamma == GAMMA)
    assert not loss.requires_grad and abs(float(loss) / float(truth.loss.detach()) - 1) < 2e-6
    if gamma == math.inf:  # what the rows compare would show labels one token off
        wrong = reference_kd_loss(z.flatten(0, 1), z_t.flatten(0, 1), ids[:, :-1].flatten(), objective)
        assert abs(float(wrong.loss.detach()) / float(truth.loss.detach()) - 1) > 100 * AGREEMENT["cpu"]

    names = {name for name, _ in training.student.named_parameters()}
    assert ("lm_head.weight" in names) == (not architecture.student.tied)
    for (name, own), true in zip(training.student.named_parameters(), student.parameters(), strict=True):
        assert (own.grad - true.grad).norm() <= 2e-5 * true.grad.norm() > 0, name
        torch.testing.assert_close(own.double(), before[name] - 1e-3 * true.grad, rtol=1e-6, atol=1e-7)
    assert not any(p.requires_grad for p in training.teacher.parameters()) and not training.teacher.training
    assert training.student.training
    assert training.gradient_bytes == 4 * sum(p.numel() for p in student.parameters())


def test_ways_start_from_the_same_weights():
    first, second = (Training(TINY, way, CPU) for way in ("fused_kd", "eager"))
    for a, b in ((first.student, second.student), (first.teacher, second.teacher)):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"way must be one of fused_kd, torch\.compile, eager, got 'none'"):
        Training(TINY, "none", CPU)


def test_architectures_are_the_real_ones():
    meta = torch.device("meta")
    qwen, llama = ARCHITECTURES["qwen2.5-0.5b"], ARCHITECTURES["llama-3-8b-head"]
    student = qwen.student.build(meta, torch.bfloat16)
    assert student.num_parameters() == 494_032_768  # as published
    assert student.lm_head.weight is student.get_input_embeddings().weight and student.dtype == torch.bfloat16
    assert (qwen.student.vocab, qwen.teacher.vocab, qwen.teacher.hidden) == (151936, 152064, 3584)
    assert (llama.student.vocab, llama.student.hidden, llama.teacher.vocab) == (128256, 4096, 128256)
    assert {a.name for device in ("cpu", "cuda") for a in suite(device, False)} | {"tiny"} == ARCHITECTURES.keys()
    assert suite("cuda", True) == suite("cpu", True) == [TINY]
    for a in ARCHITECTURES.values():
        assert a.teacher.vocab >= a.student.vocab and 1 <= a.batch <= a.most
        ids = a.tokens(2, CPU)
        assert ids.shape == (2, a.length) and ids.min() >= 0 and ids.max() < a.student.vocab
        assert torch.equal(a.tokens(2, CPU), ids)


def found(memory, limit: float, first: int = 8, most: int = 1000, known: bool = True, **options) -> tuple[Search, int]:
    """A finished search over ``memory(batch)``, and how many batches it tried. Sizes over the limit may be unknown."""
    search, tried = Search(limit if known else None, first, most, **options), []
    while (batch := search.next()) is not None:
        assert 1 <= batch <= most and batch not in tried
        tried.append(batch)
        fits = memory(batch) <= limit
        search.tell(batch, memory(batch) if known or fits else None, fits)
        assert len(tried) < 50
    return search, len(tried)


MEMORIES = {
    "linear": lambda b: 100.0 + 2.9 * b,
    "no fixed part": lambda b: 7.0 * b,
    "chunk fills first": lambda b: 20.0 * min(b, 12) + 1.5 * b,
    "quadratic": lambda b: 50.0 + 0.03 * b * b,
    "steps": lambda b: 64.0 * -(-b // 24),
    "jump": lambda b: b + (5000.0 if b > 333 else 0.0),
}


@pytest.mark.parametrize("known", [True, False], ids=["sizes known", "sizes unknown"])
@pytest.mark.parametrize("name", MEMORIES)
def test_search_finds_the_exact_boundary(name: str, known: bool):
    memory = MEMORIES[name]
    for limit in (30.0, 103.0, 177.5, 480.0, 1003.0, 2500.0, 4100.0):
        for first in (1, 8, 400):
            truth = max((b for b in range(1, 1001) if memory(b) <= limit), default=0)
            search, _ = found(memory, limit, first, known=known)
            assert (search.fits, search.refused) == (truth, truth + 1 if truth < 1000 else None), (limit, first)


def test_search_over_random_monotone_memory():
    rng = random.Random(0)
    for _ in range(300):
        sizes = [0.0]
        while len(sizes) <= 300:
            sizes.append(sizes[-1] + rng.choice([0.0, rng.random(), 30 * rng.random() ** 4]))
        limit = rng.uniform(-1.0, 1.2 * sizes[-1])
        truth = max((b for b in range(1, 301) if sizes[b] <= limit), default=0)
        search, tries = found(lambda b, s=sizes: s[b], limit, rng.randint(1, 300), 300, known=rng.random() < 0.5)
        assert search.fits == truth and tries <= 20


def test_search_needs_few_trials_where_memory_is_linear():
    for fixed, slope in ((100, 3), (350, 5), (50, 100), (130, 12)):
        search, tries = found(lambda b, f=fixed, s=slope: f + s * b, 1000.0, 8)
        assert search.fits == (1000 - fixed) // slope and tries <= 5
        rough, fewer = found(lambda b, f=fixed, s=slope: f + s * b, 1000.0, 8, resolution=1 / 16)
        assert rough.refused - rough.fits <= max(1, rough.fits // 16) and fewer <= tries
        assert rough.fits <= search.fits < rough.refused


def test_search_limits():
    never, tries = found(lambda b: 2.0, 1.0)
    assert (never.fits, never.refused) == (0, 1) and tries <= 6
    always, tries = found(lambda b: 1.0, 2.0)
    assert (always.fits, always.refused) == (1000, None) and tries <= 9
    one, _ = found(lambda b: 1.0, 2.0, first=1, most=1)
    assert (one.fits, one.refused, one.next()) == (1, None, None)
    with pytest.raises(ValueError, match="first must be from 1 to most = 4, got 5"):
        Search(1.0, 5, 4)


def fake(trial: Trial, limit: float) -> dict:
    """fused_kd: 10 MB + 1 MB a sequence; eager: 3 MB a sequence; torch.compile breaks."""
    if trial.way == "torch.compile":
        return {"status": "failed", "reason": "InductorError: no compiler"}
    per, fixed, seconds = (1, 10, 0.5) if trial.way == "fused_kd" else (3, 0, 1.0)
    peak = 1_000_000 * (fixed + per * trial.batch)
    timed = {"loss": 0.25, "seconds": [seconds] * trial.rounds} if trial.rounds else {}
    return {"status": "ok", **({"peak": peak} if trial.memory else {}), **timed}


PAIR = TINY._replace(budget=50_000_000, most=1000)


def rows_of(monkeypatch, run, **options) -> dict[str, dict]:
    monkeypatch.setattr(end_to_end, "run_trial", run)
    ticks: list[str] = []
    rows = measure_end_to_end("cpu", tick=ticks.append, architectures=[PAIR], **options)
    assert len(ticks) == pieces(1, len(rows))
    json.dumps(rows, allow_nan=False)
    return {row["way"]: row for row in rows}


def test_rows_and_their_table(monkeypatch):
    rows = rows_of(monkeypatch, fake)
    assert tuple(rows) == WAYS
    fused, eager, broken = rows["fused_kd"], rows["eager"], rows["torch.compile"]
    assert (fused["largest_batch"], fused["refused_batch"]) == (40, 45) and len(fused["probes"]) <= 5
    assert (eager["largest_batch"], eager["refused_batch"]) == (16, 18)
    assert fused["probes"][0] == {"batch": 4, "peak": 14_000_000, "fits": True}
    assert (fused["N"], fused["tokens_per_s"], eager["tokens_per_s"]) == (64, 128.0, 64.0)
    assert len(fused["seconds"]) == TURNS * ROUNDS and (fused["loss"], fused["loss_eager"]) == (0.25, 0.25)
    assert (broken["status"], broken["reason"]) == ("failed", "InductorError: no compiler")
    assert "largest_batch" not in broken and "loss" in broken
    assert fused["command"] == "python -m bench.end_to_end --architecture tiny --way fused_kd --batch 4"

    text = markdown(list(rows.values()))
    assert "| tiny: 4 x 16 tokens | fused_kd | 128 | 2.00 | 0.014 | 1.17 | 0.25000 | 40 | 2.50 |" in text
    assert "| tiny: 4 x 16 tokens | torch.compile | failed: InductorError: no compiler |  |  |  |  |  |  |" in text
    assert "| tiny: 4 x 16 tokens | eager | 64 | 1.00 | 0.012 | 1.00 | 0.25000 | 16 | 1.00 |" in text
    assert all(row["command"] in text for row in rows.values())
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_a_batch_that_does_not_fit_is_searched_below(monkeypatch):
    def run(trial: Trial, limit: float) -> dict:
        if trial.batch > 2:
            return {"status": "out of memory", "reason": "OutOfMemoryError: CUDA out of memory"}
        return fake(trial, limit)

    row = rows_of(monkeypatch, run, ways=("fused_kd",))["fused_kd"]
    assert row["status"] == "out of memory" and (row["largest_batch"], row["refused_batch"]) == (2, 3)
    text = markdown([row])
    assert "out of memory: OutOfMemoryError" in text and "| 2 |" in text


def test_a_way_that_computes_another_loss_fails(monkeypatch):
    def run(trial: Trial, limit: float) -> dict:
        result = fake(trial, limit)
        return result | {"loss": 0.2501 if trial.way == "fused_kd" else 0.25} if trial.rounds else result

    row = rows_of(monkeypatch, run, ways=("fused_kd", "eager"))["fused_kd"]
    assert row["status"] == "failed" and "loss 0.2501 is further than 2.5e-06 from eager's 0.25" in row["reason"]
    undefined = rows_of(
        monkeypatch, lambda t, limit: fake(t, limit) | {"loss": float("nan")}, ways=("fused_kd", "eager")
    )
    assert all(row["status"] == "failed" for row in undefined.values())


def test_time_that_runs_out(monkeypatch):
    def run(trial: Trial, limit: float) -> dict:
        if trial.rounds:
            return fake(trial, limit)
        return {"status": "skipped", "reason": "stopped after 3 s"}

    row = rows_of(monkeypatch, run, ways=("eager",))["eager"]
    assert (row["status"], row["search_status"], row["largest_batch"]) == ("ok", "skipped", 4)
    assert "| at least 4 (skipped: stopped after 3 s) |" in markdown([row])
    row = rows_of(monkeypatch, run, ways=("eager",), deadline=Deadline(0.0))["eager"]
    assert (row["status"], row["reason"]) == ("skipped", "no time left in this run")
    assert "skipped: no time left" in markdown([row])


def test_unknown_memory_and_a_cap(monkeypatch):
    row = rows_of(monkeypatch, lambda t, limit: fake(t, limit) | {"peak": None}, ways=("eager",))["eager"]
    assert row["search_status"] == "missing" and "Linux" in markdown([row])
    row = rows_of(monkeypatch, lambda t, limit: fake(t, limit) | {"peak": 1}, ways=("eager",))["eager"]
    assert (row["largest_batch"], row["refused_batch"]) == (1000, None) and "| at least 1000 |" in markdown([row])


class Crash:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (3,)


@pytest.mark.skipif(sys.platform != "linux", reason="measures resident memory as Linux tells it")
def test_trials_in_processes_of_their_own(capfd, monkeypatch):
    monkeypatch.setattr(trial, "PRELOAD", trial.PRELOAD[:-1])  # nothing is compiled
    good = run_trial(Trial(TINY, "fused_kd", 2, "cpu", 2, True, 1), 300.0)
    assert good["status"] == "ok" and len(good["seconds"]) == 2 and good["peak"] > 4 * 1000 * 32
    again = run_trial(Trial(TINY, "eager", 2, "cpu", 1, False, 1), 300.0)
    assert abs(again["loss"] / good["loss"] - 1) < 1e-5
    # Gigabytes of ids: the system refuses at once.
    huge = run_trial(Trial(TINY, "eager", 10**12, "cpu", 0, True, 1), 300.0)
    assert huge["status"] == "out of memory" and huge["reason"].startswith("RuntimeError"), huge
    wrong = run_trial(Trial(TINY, "none", 2, "cpu", 1, False, 1), 300.0)
    assert wrong == {
        "status": "failed", "reason": "ValueError: way must be one of fused_kd, torch.compile, eager, got 'none'",
    }  # fmt: skip
    crashed = run_trial(Trial(TINY, Crash(), 2, "cpu", 1, False, 1), 300.0)
    assert crashed == {"status": "failed", "reason": "exit code 3: no output"}
    late = run_trial(Trial(TINY, "eager", 2, "cpu", 10**9, False, 1), 0.5)
    assert late == {"status": "skipped", "reason": "stopped after 0 s"}

    assert end_to_end.main(["--architecture", "tiny", "--way", "eager", "--batch", "2", "--device", "cpu"]) == 0
    out = capfd.readouterr().out
    assert "| tiny: 2 x 16 tokens | eager |" in out and "--architecture tiny --way eager --batch 2" in out


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes as Linux shows them")
def test_no_trial_outlives_a_killed_run():
    psutil = pytest.importorskip("psutil")
    code = (
        "from bench import architectures, trial; trial.PRELOAD = ('bench.trial',)\n"
        "tiny = architectures.ARCHITECTURES['tiny']\n"
        "trial.run_trial(trial.Trial(tiny, 'eager', 2, 'cpu', 10**9, False, 1), 600.0)"
    )
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    process = psutil.Process(run.pid)
    everyone: list = []
    children: list = []
    try:
        while len(everyone) <= len(children):  # a child's child is the trial
            assert run.poll() is None, "the run ended before its trial was seen"
            time.sleep(0.05)
            everyone, children = process.children(recursive=True), process.children()
    finally:
        run.kill()
        run.wait()
    _, alive = psutil.wait_procs(everyone, timeout=60)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--architecture", "nope"], "invalid choice: 'nope'"),
        (["--way", "nope"], "invalid choice: 'nope'"),
        (["--quick", "--architecture", "tiny"], "--quick has a pair of its own"),
        (["--device", "cpu", "--architecture", "qwen2.5-0.5b"], "qwen2.5-0.5b is not for --device cpu"),
        (["--architecture", "qwen2.5-0.5b", "qwen2.5-small"], "is not for --device"),
    ],
)
def test_command_line_errors(arguments: list[str], message: str, capsys):
    with pytest.raises(SystemExit, match="2"):
        end_to_end.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_gpus_pairs_say_so(capsys):
    assert end_to_end.main(["--architecture", "qwen2.5-0.5b"]) == 2
    assert capsys.readouterr().err == "bench.end_to_end: no NVIDIA GPU is available to torch\n"
    result = trial.guarded(lambda: trial.measure(Trial(TINY, "eager", 2, "cuda", 1, False, 1)), "status")
    assert result["status"] == "failed" and "CUDA" in result["reason"]
