"""Caches of drawn lists: against the teacher's own distribution, through the loss, resumed, damaged, mismatched."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file

transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")

import fused_kd as fk  # noqa: E402
from fused_kd.training import teacher_runs  # noqa: E402
from fused_kd.training.collate import Collator  # noqa: E402
from fused_kd.training.teacher_cache import TeacherCache  # noqa: E402

from .caching import VOCAB, files, model, rows, write  # noqa: E402
from .test_teacher_cache import truth  # noqa: E402

DRAWN = {"keep": "sampled", "k": None}


def dense(log_probs: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """(n, V) float64 probabilities of a row's lists."""
    return torch.zeros(len(indices), VOCAB, dtype=torch.float64).scatter_add_(1, indices, log_probs.double().exp())


@pytest.mark.parametrize("k, draws", [(0, 12), (4, 6)])
def test_lists_are_the_teachers_on_average(tmp_path: Path, k: int, draws: int) -> None:
    """Over the seeds; each list holds the k largest and an n-th of the rest for each draw."""
    teacher, seeds, found = model(0), 60, []
    for seed in range(seeds):
        cache = write(tmp_path / str(seed), **{**DRAWN, "k": k or None}, draws=draws, seed=seed, dtype="fp32")
        found.append([dense(*cache[index]) for index in range(len(cache))])
    assert (cache.keep, cache.k, cache.draws, cache.tail, cache.mass_mean) == ("sampled", k, draws, "renormalize", None)
    for index, row in enumerate(rows()):
        p = truth(row, teacher).exp()
        each = torch.stack([lists[index] for lists in found])
        assert each.shape[1:] == p.shape
        if not len(p):
            continue
        best = p.topk(k, 1).indices
        listed = torch.zeros_like(p, dtype=torch.bool).scatter_(1, best, True)
        rest = p.masked_fill(listed, 0.0).sum(1, keepdim=True)
        times = each.masked_fill(listed, 0.0) / rest * draws
        assert float((times - times.round()).abs().max()) < 1e-3
        assert float((each - p)[:, listed].abs().max()) < 1e-5 if k else True
        expected = (rest * p / (draws * seeds))[~listed].sum().sqrt()
        assert float((each.mean(0) - p)[~listed].norm() / expected) < 1.2


def test_bytes_a_token(tmp_path: Path) -> None:
    """6 bits an id of 53: 12 draws in 9 bytes, nothing else."""
    cache = write(tmp_path / "drawn", **DRAWN)
    arrays = load_file(tmp_path / "drawn" / "shards" / "00000.safetensors")
    assert {name: array.shape[1:] for name, array in arrays.items()} == {"offsets": (), "packed_ids": (9,)}
    assert cache.draws == 12 and "k=0 and 12 draws" in repr(cache) and "tail='renormalize'" in repr(cache)
    write(tmp_path / "both", **{**DRAWN, "k": 3}, draws=5, dtype="8bit")
    arrays = load_file(tmp_path / "both" / "shards" / "00000.safetensors")
    assert {name: array.shape[1:] for name, array in arrays.items()} == {
        "offsets": (), "packed_ids": (6,), "codes": (3,), "top": (), "span": ()
    }  # fmt: skip


def test_a_batch_teaches(tmp_path: Path) -> None:
    """The gradient of many seeds together is the online teacher's."""
    data = [row for row in rows() if row["labels"][0] == -100]
    seeds, student, total = 40, torch.randn(8, 12, VOCAB) * 2, 0.0
    for seed in range(seeds):
        cache = write(tmp_path / str(seed), data, **DRAWN, draws=20, seed=seed)
        batch = Collator(0)([cache.rows(data)[index] for index in range(8)])
        assert cache.columns == ("teacher_log_probs", "teacher_indices")
        length = batch["labels"].shape[1]
        z = student[:, :length].clone().requires_grad_()
        teacher = cache.head(batch, torch.ones(8, length, dtype=torch.bool), torch.device("cpu"))
        assert teacher.tail == "renormalize" and teacher.log_probs.shape == (8, length, 20)
        fk.kd_loss(z, teacher, batch["labels"], fk.NoEvo(), shift=True).loss.backward()
        total = total + z.grad / seeds
    with torch.no_grad():
        online = model(0)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[..., :VOCAB]
    z = student[:, :length].clone().requires_grad_()
    fk.kd_loss(z, online.float(), batch["labels"], fk.NoEvo(), shift=True).loss.backward()
    assert float((total - z.grad).norm() / z.grad.norm()) < 0.03


def test_draws_hang_on_seed_and_row_alone(tmp_path: Path, monkeypatch) -> None:
    """However the teacher's runs are put together, and after an interruption."""
    whole = write(tmp_path / "whole", **DRAWN)
    again = write(tmp_path / "again", **DRAWN, batch_size=1)
    other = write(tmp_path / "other", **DRAWN, seed=1)
    for index in range(10):
        assert torch.equal(again[index][1], whole[index][1])
    assert any(not torch.equal(other[index][1], whole[index][1]) for index in range(10))
    alike = write(tmp_path / "alike", [rows()[0]] * 2, **DRAWN)
    assert not torch.equal(alike[0][1], alike[1][1])
    calls, run = [], teacher_runs.hidden_states

    def dies(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_runs, "hidden_states", dies)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "killed", **DRAWN)
    with pytest.raises(ValueError, match=r"is not finished \(1 of 3 shards\)"):
        TeacherCache(tmp_path / "killed")
    write(tmp_path / "killed", **DRAWN)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    for given, message in (({"draws": 13}, "draws: 12 -> 13"), ({"seed": 2}, "seed: 0 -> 2"), ({"k": 1}, "k: 0 -> 1")):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "whole", **{**DRAWN, **given})


def test_damage_is_found(tmp_path: Path) -> None:
    """In a shard's layout at opening, in its values when they are read, in the index by name."""
    write(tmp_path, **{**DRAWN, "k": 3}, draws=4, dtype="fp32")
    shard = tmp_path / "shards" / "00000.safetensors"
    arrays, content = load_file(shard), shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"00000\.safetensors has"):
        TeacherCache(tmp_path)
    save_file({**arrays, "packed_ids": arrays["packed_ids"] | 0xFF}, shard)  # each id 63, and 53 are known
    size = json.loads((tmp_path / "index.json").read_text())["shards"][0]["bytes"]
    assert shard.stat().st_size == size
    with pytest.raises(ValueError, match="differs from its checksum"):
        TeacherCache(tmp_path)
    with pytest.raises(ValueError, match=r"row 0 of the teacher cache in .* expected ids below 53"):
        TeacherCache(tmp_path, verify=False)[0]
    shard.write_bytes(content)
    text = (tmp_path / "index.json").read_text()
    for name, value in (("draws", 0), ("draws", None), ("k", -1), ("k", 54), ("dtype", "bf16"),
                        ("keep", "drawn")):  # fmt: skip
        (tmp_path / "index.json").write_text(json.dumps({**json.loads(text), name: value}))
        with pytest.raises(ValueError, match=r"index\.json is damaged"):
            TeacherCache(tmp_path, verify=False)
    for name, value in (("draws", 6), ("k", 2)):
        (tmp_path / "index.json").write_text(json.dumps({**json.loads(text), name: value}))
        with pytest.raises(ValueError, match=r"00000\.safetensors has the arrays"):
            TeacherCache(tmp_path, verify=False)


def test_a_broken_teacher_is_no_cache(tmp_path: Path, monkeypatch) -> None:
    run = teacher_runs.hidden_states
    monkeypatch.setattr(teacher_runs, "hidden_states", lambda *args, **kwargs: run(*args, **kwargs) * torch.nan)
    with pytest.raises(ValueError, match="the teacher's logits must be numbers"):
        write(tmp_path, **DRAWN)


@pytest.mark.parametrize("options, message", [
    ({"draws": 0}, "draws must be an int of at least 1, got 0"),
    ({"draws": 1.5}, "draws must be an int of at least 1, got 1.5"),
    ({"k": 54}, "k=54: expected at most the 53 tokens"),
    ({"k": -1}, "k must be an int of at least 0 with keep='sampled', got -1"),
    ({"k": False}, "k must be an int of at least 0 with keep='sampled', got False"),
    ({"seed": "x"}, "seed must be an int, got 'x'"),
    ({"sample": 7}, "sample must be None with keep='sampled', got 7"),
    ({"keep": "lists", "k": 3, "draws": None, "seed": 5}, "seed must be None with keep='lists', got 5"),
    ({"dtype": "bf16"}, "dtype must be one of 'fp16', '8bit', 'fp32', got 'bf16'"),
    ({"project": 4}, "project must be None with keep='sampled', got 4"),
    ({"keep": "lists", "k": 3, "draws": 4}, "draws must be None with keep='lists', got 4"),
    ({"keep": "hidden", "draws": 4}, "draws must be None with keep='hidden', got 4"),
    ({"keep": "drawn"}, "keep must be one of 'lists', 'hidden', 'sampled', got 'drawn'"),
])  # fmt: skip
def test_bad_arguments(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        write(tmp_path, **{**DRAWN, **options})
    assert not list(tmp_path.iterdir())


def test_the_tail_is_theirs(tmp_path: Path) -> None:
    write(tmp_path, **DRAWN)
    assert TeacherCache(tmp_path, "renormalize").tail == "renormalize"
    for tail in ("bucket", "uniform", "listed"):
        with pytest.raises(ValueError, match=rf"tail must be 'renormalize' for the cache in .*, got '{tail}'"):
            TeacherCache(tmp_path, tail)


def test_caches_that_can_be_read_as_one_anothers(tmp_path: Path) -> None:
    """Other rows, seeds and dtypes may differ; what the loss is of may not."""
    data = rows(7, seed=3)
    first = write(tmp_path / "first", **DRAWN, draws=6)
    first.check_head(write(tmp_path / "second", data, **DRAWN, draws=6, seed=4, dtype="fp32"))
    listed = write(tmp_path / "lists", k=6)
    listed.check_head(write(tmp_path / "8bit", data, k=6, dtype="8bit"))
    for own, options, message in (
        (first, {**DRAWN, "draws": 7}, "must have draws 6, as .*first.* does, got 7"),
        (first, {**DRAWN, "k": 2, "draws": 6}, "must have k 0, as .*first.* does, got 2"),
        (first, {"k": 6}, "must keep 'sampled', as .*first.* does, got 'lists'"),
        (listed, {"k": 5}, "must have k 6, as .*lists.* does, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            own.check_head(write(tmp_path / "_".join(map(str, options.values())), data, **options))
    for part in ("teacher_weights", "teacher_config", "tokenizer"):
        folder = tmp_path / "second" / "index.json"
        index = json.loads(folder.read_text())
        folder.write_text(json.dumps({**index, "fingerprints": {**index["fingerprints"], part: "0" * 64}}))
        with pytest.raises(ValueError, match=rf"first.* and .*second.* were made from something else: {part} \("):
            first.check_head(TeacherCache(tmp_path / "second"))
        folder.write_text(json.dumps(index))
