"""Caches of hidden states: against the teacher's own states and float64, projected, killed, damaged, mismatched."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")

import fused_kd as fk  # noqa: E402
from fused_kd.integrations.transformers import hidden_states, lm_head_of  # noqa: E402
from fused_kd.training import teacher_runs  # noqa: E402
from fused_kd.training.collate import Collator  # noqa: E402
from fused_kd.training.hidden_cache import _sampled  # noqa: E402
from fused_kd.training.hidden_codes import decode_states, encode_states  # noqa: E402
from fused_kd.training.projection import Moments, error_of, fit, scaling_of  # noqa: E402
from fused_kd.training.teacher_cache import TeacherCache  # noqa: E402

from .caching import PADDED, VOCAB, Words, files, model, rows, states, write, write_hidden  # noqa: E402
from .forking import ended, fork  # noqa: E402
from .test_teacher_cache import NASTY, copy, places  # noqa: E402

CPU = torch.device("cpu")
# relative, of a state: half a step of the format
STEP = {"fp32": 1e-6, "fp16": 2.0**-11, "bf16": 2.0**-8, "fp8": 2.0**-4}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hidden") / "whole"
    write_hidden(folder, dtype="fp8", project=6)
    return folder


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize("dtype", STEP)
def test_states_are_the_models_own(tmp_path: Path, dtype: str) -> None:
    cache, teacher = write_hidden(tmp_path, dtype=dtype), model(0)
    assert (cache.keep, cache.dtype, cache.width, cache.k, cache.tail) == ("hidden", dtype, 16, None, None)
    assert (cache.vocab_size, len(cache), cache.tokens, cache.columns) == (PADDED, 10, 38, ("teacher_hidden",))
    for index, row in enumerate(rows()):
        expected, found = states(row, teacher), cache[index]
        assert found.dtype == {"fp32": torch.float32, "fp16": torch.float16}.get(dtype, torch.bfloat16)
        assert found.shape == expected.shape
        slack = expected.abs().amax(1, keepdim=True).expand_as(expected) * 2e-5 if dtype == "fp8" else 1e-6
        assert ((found.float() - expected).abs() <= STEP[dtype] * expected.abs() + slack).all()
    assert cache.error is not None and cache.error["tokens"] > 0
    assert cache.error["kl"] < {"fp32": 1e-10, "fp16": 1e-6, "bf16": 1e-4, "fp8": 1e-2}[dtype]
    assert (cache.error["kl"] == 0) == (dtype == "fp32")
    assert "10 rows, 38 tokens, hidden states of 16 numbers" in repr(cache)
    stored = load_file(tmp_path / "head.safetensors")
    assert stored.keys() == {"weight"} and torch.equal(stored["weight"], teacher.lm_head.weight)


def test_fp8_keeps_its_bound_at_any_size() -> None:
    """States with channels a thousand times the others, at sizes from 1e-30 to 1e30, and a token of zeros."""
    torch.manual_seed(0)
    exact = torch.randn(60, 256) * torch.logspace(-30, 30, 60)[:, None]
    exact[:, 7] *= 1e3
    exact[5] = 0
    stored = encode_states(exact, "fp8")
    found = decode_states(stored)
    assert stored["hidden"].dtype == torch.float8_e4m3fn and found.dtype == torch.bfloat16
    exponents = stored["scale"].log2()
    assert torch.equal(exponents, exponents.round()), "a power of two"
    exactly = stored["hidden"].double() * stored["scale"].double()[:, None]
    assert torch.equal(found.double(), exactly), "bf16 holds what was stored"
    bound = exact.double().abs() / 16 + stored["scale"].double()[:, None] / 1024
    assert ((found.double() - exact.double()).abs() <= bound * (1 + 1e-6)).all()
    assert (stored["hidden"].float().abs().amax(1)[torch.arange(60) != 5] > 200).all(), "the range is used"


def test_int8_of_states_with_large_numbers(tmp_path: Path) -> None:
    """Numbers far from 0 and far larger than others: nearer to the teacher than fp8, with a head that is exact."""
    torch.manual_seed(0)
    hidden = torch.randn(3000, 32) * torch.logspace(0, 2.5, 32)
    hidden[:, -1] += 4000
    head = fk.LMHead(hidden, torch.randn(101, 32) / torch.logspace(0, 2, 32), None)
    moments = Moments(32, torch.device("cpu"))
    moments.add(hidden[:1000])
    scaling = scaling_of(moments)
    assert torch.equal(scaling.scale.log2(), scaling.scale.log2().round()) and scaling.scale.max() == 4
    stored = scaling.head(head)
    assert torch.equal(stored.weight / scaling.scale.float(), head.weight), "powers of two"
    exact = replace(stored, hidden=scaling.states(hidden))
    assert error_of(head, exact, 1 << 26)["kl"] < 1e-5
    codes = encode_states(exact.hidden, "int8")
    found = decode_states(codes)
    assert codes["hidden"].dtype == torch.int8 and found.dtype == torch.bfloat16
    assert codes["hidden"].abs().amax(1).eq(127).all(), "the range is used"
    slack = codes["scale"][:, None] / 2 + found.float().abs() * 2.0**-8
    assert ((found.float() - exact.hidden).abs() <= slack).all()
    ours = error_of(head, replace(stored, hidden=found.float()), 1 << 26)
    theirs = error_of(head, replace(head, hidden=decode_states(encode_states(hidden, "fp8")).float()), 1 << 26)
    assert ours["logits"] < theirs["logits"] / 3, (ours, theirs)
    nothing = encode_states(torch.zeros(2, 4), "int8")
    assert not decode_states(nothing).any() and nothing["scale"].isfinite().all()

    cache, data = write_hidden(tmp_path / "one", dtype="int8", shard_rows=4), rows(6, seed=5)
    assert cache.error is not None and cache.error["kl"] < 1e-3 and cache[0].dtype == torch.bfloat16
    assert cache[3].shape == (0, 16) and cache.dtype == "int8" and "16 numbers, int8" in repr(cache)
    before = files(tmp_path / "one")
    for name in ("projection", "head", "shards/00001"):
        (tmp_path / "one" / f"{name}.safetensors").write_bytes(b"x")
    write_hidden(tmp_path / "one", dtype="int8")
    assert files(tmp_path / "one") == before
    valid = write_hidden(tmp_path / "valid", data, dtype="int8", like=tmp_path / "one")
    cache.check_head(valid)
    with pytest.raises(ValueError, match="must have the head of"):
        cache.check_head(write_hidden(tmp_path / "alone", data, dtype="int8"))
    for dtype, like in (("bf16", cache), ("int8", write_hidden(tmp_path / "plain"))):
        like.check_head(write_hidden(tmp_path / f"like {dtype}", data, dtype=dtype, like=like.folder))
    projected = write_hidden(tmp_path / "projected", dtype="int8", project=6)
    assert projected[0].shape[1] == 6 and write_hidden(tmp_path / "projected", dtype="int8", project=6).width == 6


@pytest.mark.parametrize(
    "dtype, value", [("int8", math.inf), ("bf16", math.inf), ("fp8", math.nan), ("fp16", 7e4), ("fp32", -math.inf)]
)
def test_states_that_cannot_be_stored(dtype: str, value: float) -> None:
    hidden = torch.ones(3, 4)
    hidden[1, 2] = value
    with pytest.raises(ValueError, match=f"hidden states of token 1 must be finite numbers that {dtype} holds"):
        encode_states(hidden, dtype)


def test_broken_teacher_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hidden(tmp_path)
    (tmp_path / "shards" / "00001.safetensors").unlink()
    run = teacher_runs.hidden_states
    monkeypatch.setattr(teacher_runs, "hidden_states", lambda *a, **k: run(*a, **k) * math.nan)
    with pytest.raises(ValueError, match="rows 4 to 7: hidden states of token 0 must be finite"):
        write_hidden(tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "fp16", "fp32"])
def test_states_at_the_end_of_fp16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Rounded up they would leave the head's dtype."""
    teacher, run = model(0).half(), teacher_runs.hidden_states

    def large(*args: Any, **kwargs: Any) -> torch.Tensor:
        return run(*args, **kwargs).index_fill(-1, torch.tensor([3]), 65500.0).index_fill(-1, torch.tensor([5]), -65500)

    monkeypatch.setattr(teacher_runs, "hidden_states", large)
    cache = write_hidden(tmp_path, teacher=teacher, dtype=dtype)
    batch = Collator(0)([cache.rows(rows())[0]])
    head, at = cache.head(batch, None, CPU), batch["labels"][0, 1:] != -100
    hidden = head.hidden[0, :-1][at]
    assert hidden.dtype == head.weight.dtype == torch.float16 and math.isfinite(cache.error["kl"])
    assert ((hidden[:, 3] > 65000) & (hidden[:, 5] < -65000) & (hidden.abs() <= 65504).all(1)).all()


class Oracle:
    """Loss and gradients of a student in float64, from whole logits."""

    def __init__(self, batch: dict, teacher: Any, student: Any, temperature: float) -> None:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        valid = batch["labels"][:, 1:] != -100
        with torch.no_grad():
            t = teacher.double()(**inputs).logits[:, :-1][valid]
        student = student.double()
        self.hidden = hidden_states(student, **inputs)
        self.hidden.retain_grad()
        q = (student.lm_head(self.hidden)[:, :-1][valid] / temperature).log_softmax(-1)
        p = (t / temperature).log_softmax(-1)
        loss = (q.exp() * (q - p)).sum(-1).mean()
        loss.backward()
        self.numbers = [loss.detach(), self.hidden.grad, student.lm_head.weight.grad]


@pytest.mark.parametrize(
    "dtype, side, tolerance",
    [("fp32", "left", 3e-6), ("bf16", "right", 8e-3), ("fp8", "right", 0.1), ("int8", "right", 0.03)],
)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_float64(tmp_path: Path, dtype: str, side: str, tolerance: float, temperature: float) -> None:
    """KL(q||p), which lists make infinite, at any temperature; position i holds the state before the token at i + 1."""
    data = [row for row in rows() if row["labels"][0] == -100]
    cache = write_hidden(tmp_path, data, dtype=dtype)
    cached = cache.rows(data)
    batch = Collator(0, side=side, pad_to_multiple_of=5)([cached[i] for i in range(len(cached))])  # type: ignore[arg-type]
    assert batch["teacher_hidden"].dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
    expected = Oracle(batch, model(0).eval(), model(1, hidden=8), temperature).numbers
    student = model(1, hidden=8)
    hidden = hidden_states(student, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    hidden.retain_grad()

    def found(columns: dict) -> list:
        student.zero_grad()
        hidden.grad = None
        target = cache.head(columns, batch["labels"] != -100, CPU)
        assert isinstance(target, fk.LMHead) and target.weight.dtype == target.hidden.dtype == torch.float32
        loss = fk.kd_loss(
            lm_head_of(student, hidden), target, batch["labels"], fk.ReverseKD(lam=1.0), shift=True,
            temperature=temperature,
        ).loss  # fmt: skip
        loss.backward(retain_graph=True)
        return [loss.detach(), hidden.grad, student.lm_head.weight.grad]

    for ours, theirs in zip(found(batch), expected, strict=True):
        assert relative(ours, theirs) < tolerance
    shifted = {**batch, "teacher_hidden": batch["teacher_hidden"].roll(1, 1)}
    wrong = [relative(ours, theirs) for ours, theirs in zip(found(shifted), expected, strict=True)]
    assert max(wrong) > 0.15 and min(wrong) > tolerance


def test_the_head_has_the_teachers_options(tmp_path: Path) -> None:
    """Bias, scale and cap, read once for a device; an adapted head with its further columns; a bf16 teacher."""
    gpt = transformers.GPTJConfig(vocab_size=PADDED, n_embd=16, n_layer=1, n_head=2, n_positions=32, rotary_dim=4)
    torch.manual_seed(0)
    teacher = transformers.GPTJForCausalLM(gpt).bfloat16()  # its head has a bias
    cache = write_hidden(tmp_path / "bias", teacher=teacher)
    batch = Collator(0)([cache.rows(rows())[i] for i in range(4)])
    head = cache.head(batch, batch["labels"] != -100, CPU)
    assert head.weight.dtype == head.hidden.dtype == torch.bfloat16 and head.bias.dtype == torch.float32
    assert torch.equal(head.bias, teacher.lm_head.bias.float()) and cache.error["kl"] == 0
    assert cache.head(batch, batch["labels"] != -100, CPU).weight is head.weight
    capped = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=PADDED, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=8, final_logit_softcapping=5.0,
        )
    )  # fmt: skip
    for project in (None, 16):
        cache = write_hidden(tmp_path / f"cap{project}", teacher=capped, dtype="fp32", project=project)
        assert cache.head(Collator(0)([cache.rows(rows())[0]]), None, CPU).softcap == 5.0
        assert cache.error["kl"] < 1e-7 and cache.error["logits"] < 1e-5


def test_an_adapted_head(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    teacher = peft.get_peft_model(model(0), peft.LoraConfig(r=3, target_modules=["lm_head", "q_proj"]))
    with torch.no_grad():
        for name, value in teacher.named_parameters():
            if "lora_B" in name:
                value.normal_()
    cache = write_hidden(tmp_path, teacher=teacher, dtype="fp32")
    assert cache.width == 16 + 3 and cache.error["kl"] < 1e-10
    row = rows()[0]
    batch = Collator(0)([cache.rows(rows())[0]])
    head = cache.head(batch, None, CPU)
    with torch.no_grad():
        expected = teacher(input_ids=torch.tensor([row["input_ids"]])).logits
    valid = batch["labels"][:, 1:] != -100
    assert relative((head.hidden @ head.weight.T)[:, :-1][valid], expected[:, :-1][valid]) < 1e-5


def metric_of(states: torch.Tensor, weight: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """(H, H) from each token's own matrices: the Hessian of KL(p || changed p), and a tenth of the logits' change."""
    total = torch.zeros(16, 16, dtype=torch.float64)
    for h in states.double():

        def divergence(d: torch.Tensor, h: torch.Tensor = h) -> torch.Tensor:
            capped = lambda z: z if softcap is None else softcap * torch.tanh(z / softcap)  # noqa: E731
            p, q = (capped(scale * (weight @ each)).log_softmax(0) for each in (h, h + d))
            return (p.exp() * (p - q)).sum()

        total += torch.autograd.functional.hessian(divergence, torch.zeros(16, dtype=torch.float64)) / scale**2
    total /= len(states)
    centred = weight if softcap is not None else weight - weight.mean(0)
    plain = centred.T @ centred
    return total + 0.1 * total.trace() / plain.trace() * plain


@pytest.mark.parametrize("r, scale, softcap", [(1, 1.0, None), (5, 0.5, None), (5, 1.0, 4.0), (16, 1.0, None)])
def test_no_projection_of_that_rank_is_better(r: int, scale: float, softcap: float | None) -> None:
    """Eckart and Young: the best approximation of rank r in a metric is that of the singular values there."""
    torch.manual_seed(0)
    teacher = model(0)
    hidden = torch.randn(200, 16) @ torch.randn(16, 16) * torch.logspace(0, -2, 16) + torch.randn(16)
    weight = teacher.lm_head.weight.detach()
    head = fk.LMHead(hidden, weight, logit_scale=scale, softcap=softcap)
    moments = Moments(16, CPU)
    moments.add(hidden[:90])
    moments.add(hidden[90:])
    found = fit(moments, head, r, 1 << 14)
    root = torch.linalg.cholesky(metric_of(hidden, weight.double(), scale, softcap)).T
    exact = (hidden.double() - hidden.double().mean(0)) @ root.T
    ours = (hidden.double() - found.mean) @ found.down @ found.up.T @ root.T
    values = torch.linalg.svdvals(exact)
    missed, least = float((ours - exact).norm()), float(values[r:].norm())
    assert missed == pytest.approx(least, rel=1e-5, abs=1e-6 * float(values[0]))
    stored = replace(found.head(head), hidden=found.states(hidden))
    capped = lambda z: scale * z if softcap is None else softcap * torch.tanh(scale * z / softcap)  # noqa: E731
    ours, theirs = capped(stored.hidden @ stored.weight.T + stored.bias), capped(hidden @ weight.T)
    error = relative(ours - ours.mean(1, keepdim=True), theirs - theirs.mean(1, keepdim=True))
    measured = error_of(head, stored, 1 << 20)
    assert measured["logits"] == pytest.approx(error, rel=1e-3, abs=2e-6) and measured["tokens"] == 200
    p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    assert measured["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3, abs=1e-6)
    assert measured["top_1"] == pytest.approx(float((p.argmax(1) == q.argmax(1)).float().mean()), abs=1e-6)


@pytest.mark.parametrize("dtype, limit", [("float16", 1e-3), ("bfloat16", 1e-2), ("float32", 1e-6)])
@pytest.mark.parametrize("margin", [1, 20, 40, 80])
def test_a_projection_of_all_numbers_of_a_certain_teacher(dtype: str, limit: float, margin: float) -> None:
    """Whatever the sizes of probabilities: weight and states stay where the dtype is fine, and no direction is lost."""
    torch.manual_seed(0)
    weight = torch.nn.functional.normalize(torch.randn(PADDED, 16), dim=1).to(getattr(torch, dtype))
    hidden = weight[torch.randint(PADDED, (300,))] * margin + (0.1 * torch.randn(300, 16)).to(weight.dtype)
    head, moments = fk.LMHead(hidden, weight), Moments(16, CPU)
    moments.add(hidden)
    found = fit(moments, head, 16)
    stored = replace(found.head(head), hidden=found.states(hidden).to(weight.dtype))
    kept = stored.hidden.float()
    assert torch.allclose(kept.std(0), torch.ones(16), rtol=0.05) and float(kept.abs().max()) < 20
    assert float(stored.weight.abs().max()) < 2 * margin
    measured = error_of(head, stored, 1 << 20)
    assert measured["kl"] < limit and measured["logits"] < 5 * torch.finfo(weight.dtype).eps


def test_states_of_equal_tokens_project_to_finite_ones() -> None:
    """Directions without variance, some of them and all."""
    torch.manual_seed(0)
    weight = torch.randn(PADDED, 16)
    alike = torch.randn(1, 16).expand(200, 16)
    for hidden in (torch.randn(200, 3) @ torch.randn(3, 16), alike, torch.ones(200, 16), torch.zeros(200, 16)):
        head, moments = fk.LMHead(hidden, weight), Moments(16, CPU)
        moments.add(hidden)
        found = fit(moments, head, 16)
        stored = replace(found.head(head), hidden=found.states(hidden))
        assert stored.hidden.isfinite().all() and error_of(head, stored, 1 << 20)["kl"] < 1e-6


def test_padded_columns_count(tmp_path: Path) -> None:
    """What is trained on has the whole head, so have error and metric."""
    teacher, data = model(0), rows(40)
    with torch.no_grad():
        teacher.lm_head.weight[VOCAB:] *= 3
    cache = write_hidden(tmp_path, data, teacher=teacher, dtype="fp32", project=4)
    held_out = _sampled(data, 1 << 16)[1]
    batch = Collator(0)([cache.rows(data)[row] for row in held_out])
    stored = cache.head(batch, None, CPU)
    at = torch.cat([batch["labels"][:, 1:] != -100, torch.zeros(len(batch["labels"]), 1, dtype=torch.bool)], 1)
    q = (stored.hidden[at] @ stored.weight.T + stored.bias).log_softmax(-1)
    p = (torch.cat([states(data[row], teacher) for row in held_out]) @ teacher.lm_head.weight.T).log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean().detach())
    assert cache.error["kl"] == pytest.approx(kl, rel=1e-4) and kl > 0.01


def test_teachers_without_directions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, run = model(0), teacher_runs.hidden_states
    with torch.no_grad():
        teacher.lm_head.weight.zero_()
    with pytest.raises(ValueError, match="project=4: the teacher's head must not give every token the same logit"):
        write_hidden(tmp_path / "zeros", teacher=teacher, project=4)
    monkeypatch.setattr(teacher_runs, "hidden_states", lambda *a, **k: run(*a, **k) * math.nan)
    with pytest.raises(ValueError, match="project=4: the teacher's hidden states must be finite numbers"):
        write_hidden(tmp_path / "nan", project=4)


@pytest.mark.parametrize("count, sample", [(1, 10), (2, 100), (40, 10_000), (400, 300)])
def test_errors_are_measured_on_other_rows(count: int, sample: int) -> None:
    """Wherever there are two; and what is run for the directions has about as many tokens as asked for."""
    data = [{"input_ids": [1] * 11, "labels": [-100, *[1] * 10]} for _ in range(count)]
    data.insert(1, {"input_ids": [1, 1], "labels": [-100, -100]})
    fitted, held_out = _sampled(data, sample)
    assert fitted and held_out and 1 not in {*fitted, *held_out}
    assert set(fitted).isdisjoint(held_out) or count == 1
    if count == 400:
        assert 250 <= 10 * len(fitted) <= 300 and max(fitted) > 350 and max(held_out) > 300


def test_states_are_kept_evenly_spread() -> None:
    """However they come in, every n-th of them, n a power of two."""
    moments = Moments(1, CPU)
    numbers = torch.arange(50_000.0)[:, None]
    for part in numbers.split([1, 7, 5000, 8191, 13, 30_000, 6788]):
        moments.add(part)
    assert torch.equal(moments.states, numbers[::8]) and moments.count == 50_000


def test_the_error_falls_with_the_rank(tmp_path: Path) -> None:
    data = rows(40)
    found = [write_hidden(tmp_path / str(r), data, dtype="fp32", project=r).error for r in (2, 6, 11, 16)]
    for name in ("logits", "kl"):
        errors = [each[name] for each in found]
        assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 and errors[-1] < 1e-5
    assert found[0]["top_1"] < found[-1]["top_1"] == 1.0
    cache = TeacherCache(tmp_path / "6")
    assert cache.width == 6 and "hidden states of 6 of 16 numbers" in repr(cache) and "logits off by" in repr(cache)
    assert cache.bytes_per_token < TeacherCache(tmp_path / "16").bytes_per_token - 35


def test_killed_and_resumed_gives_the_same_files(finished: Path, tmp_path: Path, monkeypatch) -> None:
    folder, calls, run = tmp_path / "killed", [], teacher_runs.hidden_states
    first = os.getpid()
    # five batches before the shards (an error's rows, the projection's), two a shard: within the second shard
    before = 0

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        if os.getpid() != first and len(calls) == before + 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(*args, **kwargs)

    monkeypatch.setattr(teacher_runs, "hidden_states", counted)
    write_hidden(tmp_path / "counted", dtype="fp8", project=6)
    before = len(calls) - 5
    assert before >= 2
    calls.clear()
    assert ended(fork(lambda: write_hidden(folder, dtype="fp8", project=6))) == -signal.SIGKILL
    kept = {name: (folder / name).stat().st_mtime_ns for name in files(folder) if name.endswith(".safetensors")}
    assert kept.keys() == {"head.safetensors", "projection.safetensors", "shards/00000.safetensors"}
    with pytest.raises(ValueError, match=r"is not finished \(1 of 3 shards\)"):
        TeacherCache(folder)
    (folder / "head.safetensors.123.partial").write_bytes(b"torn")
    write_hidden(folder, dtype="fp8", project=6)
    assert len(calls) == 3, "head, projection and finished shards are kept"
    assert all((folder / name).stat().st_mtime_ns == written for name, written in kept.items())
    assert files(folder) == files(finished)


@pytest.mark.parametrize("name", ["head.safetensors", "projection.safetensors", "shards/00001.safetensors"])
def test_damage_is_found_and_mended(finished: Path, tmp_path: Path, name: str) -> None:
    whole = files(finished)
    torn = whole[name]
    for number, damage in enumerate((torn[:-1], torn[:-9] + bytes([torn[-9] ^ 1]) + torn[-8:], None)):
        folder = copy(finished, tmp_path / str(number))
        (folder / name).unlink()
        if damage is not None:
            (folder / name).write_bytes(damage)
        if name == "projection.safetensors":
            TeacherCache(folder)  # which reads states as they are stored
        else:
            message = ("bytes instead of", "differs from its checksum", "is missing")[number]
            with pytest.raises(ValueError, match=rf"is damaged: {name} .*{message}.*; run the command that made it"):
                TeacherCache(folder)
        write_hidden(folder, dtype="fp8", project=6)
        assert files(folder) == whole


def test_a_projection_that_comes_out_otherwise_loses_nothing(finished: Path, tmp_path: Path, monkeypatch) -> None:
    """As on another device: the shards would be read with a head that is not theirs."""
    folder = copy(finished, tmp_path / "other")
    (folder / "projection.safetensors").write_bytes(b"torn")
    run = teacher_runs.hidden_states
    monkeypatch.setattr(teacher_runs, "hidden_states", lambda *a, **k: run(*a, **k) * 1.001)
    with pytest.raises(ValueError, match=r"projection.safetensors was damaged and cannot be made again as it was"):
        write_hidden(folder, dtype="fp8", project=6)
    left = files(folder)
    assert {**left, "projection.safetensors": files(finished)["projection.safetensors"]} == files(finished)
    monkeypatch.undo()
    write_hidden(folder, dtype="fp8", project=6)
    assert files(folder) == files(finished)


def test_other_arguments_do_not_go_on(finished: Path, tmp_path: Path) -> None:
    folder = copy(finished, tmp_path / "cache")
    for options, message in (
        ({"project": 6}, "dtype: fp8 -> bf16"),
        ({"dtype": "fp8", "project": 5}, "project: 6 -> 5"),
        ({"dtype": "fp8"}, "project: 6 -> None"),
        ({"dtype": "fp8", "project": 6, "teacher": model(1)}, "teacher_weights: "),
    ):
        with pytest.raises(ValueError, match=rf"made with other arguments \({message}"):
            write_hidden(folder, **options)
    with pytest.raises(ValueError, match="keep: hidden -> lists"):
        write(folder)
    assert files(folder) == files(finished)
    cache = TeacherCache(folder)
    cache.check(tokenizer=Words(), rows=rows(), template="tiny", teacher=model(0))
    cache.check_tokenizer(Words(VOCAB + 3))
    for wrong in (Words(prefix="u"), Words(VOCAB - 1)):
        with pytest.raises(ValueError, match="something else: tokenizer"):
            cache.check_tokenizer(wrong)
    with pytest.raises(ValueError, match="something else: data"):
        cache.rows(rows()[:-1])


def test_a_second_cache_of_the_same_head(finished: Path, tmp_path: Path) -> None:
    """For other rows, with the projection of the first; alone, another one would come out."""
    first, data = TeacherCache(finished), rows(6, seed=5)
    alone = write_hidden(tmp_path / "alone", data, dtype="fp8", project=6)
    with pytest.raises(ValueError, match=r"must have the head of .*whole.* write it with like="):
        first.check_head(alone)
    folder = tmp_path / "like"
    second = write_hidden(folder, data, dtype="bf16", like=finished)
    first.check_head(second)
    assert second.width == 6 and second.error["tokens"] > 0
    for name in ("head.safetensors", "projection.safetensors"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes()
        before = files(folder)
        (folder / name).write_bytes(b"torn")
        write_hidden(folder, data, dtype="bf16", like=finished)
        assert files(folder) == before
    with pytest.raises(ValueError, match=r"like: [0-9a-f]+ -> None"):
        write_hidden(folder, data, dtype="bf16", project=6)
    with pytest.raises(ValueError, match=r"something else: teacher_config .*teacher_weights"):
        first.check_head(write_hidden(tmp_path / "other", data, teacher=model(1, hidden=12)))
    with pytest.raises(ValueError, match=r"must keep 'hidden', as .* does, got 'lists'"):
        first.check_head(write(tmp_path / "lists"))
    bf16 = write_hidden(tmp_path / "bf16", data, dtype="bf16")
    bf16.check_head(write_hidden(tmp_path / "fp32", dtype="fp32"))
    with pytest.raises(ValueError, match="must have the head of"):
        bf16.check_head(first)
    for options, message in (
        ({"like": tmp_path / "lists"}, "like=.*must be the folder of a cache of hidden states"),
        ({"like": finished, "teacher": model(1)}, "like=.* was made from something else: teacher_weights"),
        ({"like": finished, "project": 4}, "project must be None with like, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            write_hidden(tmp_path / "bad", data, **options)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keep": "states"}, "keep must be one of 'lists', 'hidden', 'sampled', got 'states'"),
        ({"dtype": "8bit"}, "dtype must be one of 'bf16', 'fp8', 'fp16', 'fp32', 'int8', got '8bit'"),
        ({"k": 4}, "k must be None with keep='hidden', got 4"),
        ({"project": 0}, "project must be an int of at least 1, got 0"),
        ({"sample": 0}, "sample must be"),
        ({"seed": 5}, "seed must be None with keep='hidden', got 5"),
        ({"keep": "lists", "k": 4, "sample": 7}, "sample must be None with keep='lists', got 7"),
        ({"keep": "lists", "k": 4, "project": 4}, "project must be None with keep='lists', got 4"),
        ({"keep": "lists", "k": 4, "like": "x"}, "like must be None with keep='lists', got 'x'"),
        ({"keep": "lists"}, "k must be an int of at least 1, got None"),
        ({"data": []}, "rows is empty"),
    ],
)
def test_bad_arguments(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_hidden(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_bad_arguments_of_a_reader(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"project must be at most the 16 numbers .* got 17"):
        write_hidden(tmp_path, project=17)
    with pytest.raises(ValueError, match=r"tail must be None for the cache in .*, which is of hidden states, got 'bu"):
        TeacherCache(finished, tail="bucket")
    for name in ("a b", "", "a\n", 3):
        with pytest.raises(ValueError, match=re.escape(f"name must be letters, digits and _, or None, got {name!r}")):
            TeacherCache(finished, name=name)
    with pytest.raises(ValueError, match="batch must have teacher_hidden for the cached teacher TeacherCache"):
        TeacherCache(finished).head({}, torch.ones(1, 1), CPU)


def test_any_entry_gives_an_error_or_the_right_states(finished: Path, tmp_path: Path) -> None:
    folder = copy(finished, tmp_path / "cache")
    text, whole = (folder / "index.json").read_text(), TeacherCache(finished)
    batch = Collator(0)([whole.rows(rows())[0]])
    weight, refused = whole.head(batch, None, CPU).weight, 0
    for path, value in product(places(json.loads(text)), NASTY):
        index = entry = json.loads(text)
        for key in path[:-1]:
            entry = entry[key]
        entry[path[-1]] = value
        (folder / "index.json").write_text(json.dumps(index))
        try:
            cache = TeacherCache(folder, verify=False)
            if "logit_scale" not in path and "softcap" not in path:
                assert torch.equal(cache.head(batch, None, CPU).weight, weight)
            repr(cache)
        except ValueError as error:
            refused += 1
            assert str(folder) in str(error) and len(str(error)) < 1000
            continue
        assert (cache.vocab_size, len(cache), cache.tokens) == (PADDED, 10, whole.tokens), (path, value)
        assert all(torch.equal(cache[row], whole[row]) for row in range(10))
    assert refused > 200


def test_a_state_that_cannot_be(finished: Path, tmp_path: Path) -> None:
    folder = copy(finished, tmp_path / "cache")
    path = folder / "shards" / "00002.safetensors"
    stored = load_file(path)
    stored["scale"] = stored["scale"] * math.inf
    save_file(stored, path)
    with pytest.raises(ValueError, match=r"row 9 .*, row 1 of shards/00002\.safetensors: hidden states of token 0"):
        TeacherCache(folder, verify=False)[9]
    assert np.isfinite(TeacherCache(folder, verify=False)[0].float().numpy()).all()
