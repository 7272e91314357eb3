"""Teacher caches: against the model's own logits, through the loss, killed, damaged, mismatched."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import signal
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")

import fused_kd as fk  # noqa: E402
from fused_kd.integrations.transformers import hidden_states, lm_head_of  # noqa: E402
from fused_kd.training import shards, teacher_runs  # noqa: E402
from fused_kd.training.cache import write_cache, write_lists  # noqa: E402
from fused_kd.training.codes import id_dtype  # noqa: E402
from fused_kd.training.collate import Collator  # noqa: E402
from fused_kd.training.fingerprints import fingerprint_teacher  # noqa: E402
from fused_kd.training.teacher_cache import TeacherCache  # noqa: E402

from .caching import VOCAB, Words, files, model, rows, write  # noqa: E402
from .forking import ended, fork  # noqa: E402


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "whole"
    write(folder)
    return folder


def copy(finished: Path, folder: Path) -> Path:
    for name, content in files(finished).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@torch.no_grad()
def truth(row: dict, teacher: transformers.PreTrainedModel) -> torch.Tensor:
    """(n, V) float64 log-probabilities of the positions with a valid next label, from the model's own logits."""
    logits = teacher(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()[:, :VOCAB]
    return logits[:-1][torch.tensor([label != -100 for label in row["labels"][1:]], dtype=torch.bool)].log_softmax(-1)


@pytest.mark.parametrize(("k", "memory"), [(5, 1 << 12), (VOCAB, 256 << 20)])
def test_lists_are_the_models_own(tmp_path: Path, k: int, memory: int) -> None:
    cache = write(tmp_path, k=k, dtype="fp32", memory=memory)
    teacher, total = model(0), []
    for index, row in enumerate(rows()):
        expected = truth(row, teacher)
        log_probs, indices = cache[index]
        assert log_probs.dtype == torch.float32 and indices.dtype == torch.int64
        assert log_probs.shape == indices.shape == (len(expected), k)
        top = expected.topk(k).values
        assert torch.allclose(log_probs.double(), top, rtol=1e-5, atol=1e-5)
        assert torch.allclose(expected.gather(1, indices), top, rtol=1e-5, atol=1e-5)
        total += top.exp().sum(1).tolist()
    assert len(cache) == 10 and cache.tokens == len(total) and cache.k == k and cache.vocab_size == VOCAB
    assert cache.mass_mean == pytest.approx(np.mean(total), abs=1e-5)
    assert cache.mass_min == pytest.approx(min(total), abs=1e-5)
    size = sum(path.stat().st_size for path in (tmp_path / "shards").glob("*.safetensors"))
    assert cache.bytes_per_token == size / len(total)


def training(data: list, batch: dict, cache: TeacherCache | None, tail: str = "renormalize") -> tuple:
    """Loss and gradients of a fixed student on a batch; without a cache, of the online teacher."""
    teacher, student = model(0).eval(), model(1, hidden=8)
    hidden = hidden_states(student, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    hidden.retain_grad()
    if cache is None:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            target: object = lm_head_of(teacher, hidden_states(teacher, **inputs))
    else:
        target = fk.TopK(batch["teacher_log_probs"], batch["teacher_indices"], tail=tail)
    out = fk.kd_loss(
        lm_head_of(student, hidden), target, batch["labels"], fk.SelfEvolution(gamma=2.0), shift=True, vocab_size=VOCAB
    )
    out.loss.backward()
    return out.loss.detach(), hidden.grad, student.lm_head.weight.grad


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    "dtype, tolerance, side", [("fp32", 3e-6, "left"), ("fp16", 1e-3, "right"), ("8bit", 1e-2, "right")]
)
def test_whole_vocabulary_is_the_online_teacher(tmp_path: Path, dtype: str, tolerance: float, side: str) -> None:
    data = [row for row in rows() if row["labels"][0] == -100]
    cache = write(tmp_path, data, k=VOCAB, dtype=dtype)
    cached = cache.rows(data)
    collate = Collator(0, side=side, pad_to_multiple_of=5)
    batch = collate([cached[i] for i in range(len(cached))])
    expected = training(data, batch, None)
    for tail in ("renormalize", "uniform", "bucket", "listed"):
        for ours, theirs in zip(training(data, batch, cache, tail), expected, strict=True):
            assert relative(ours, theirs) < tolerance
    shifted = {**batch, **{n: batch[n].roll(1, 1) for n in ("teacher_log_probs", "teacher_indices")}}
    wrong = training(data, shifted, cache)
    assert all(relative(ours, theirs) > 0.05 for ours, theirs in zip(wrong, expected, strict=True))


def test_rows_collate_and_travel(finished: Path) -> None:
    cache, data = TeacherCache(finished, tail="bucket"), rows()
    cached = cache.rows(data)
    assert len(cached) == len(data) and cached[1]["input_ids"] == data[1]["input_ids"]
    assert "10 rows" in repr(cache) and "tail='bucket'" in repr(cached) and cache.tail == "bucket"
    assert torch.equal(cached[9]["teacher_indices"], cache[9][1])
    copied = pickle.loads(pickle.dumps(cached))  # as a data loader's workers get it
    assert all(torch.equal(copied[i]["teacher_log_probs"], cached[i]["teacher_log_probs"]) for i in range(10))
    loader = torch.utils.data.DataLoader(cached, batch_size=4, collate_fn=Collator(0))
    assert [batch["teacher_indices"].shape[0] for batch in loader] == [4, 4, 2]
    with pytest.raises(IndexError, match="row 10 of a teacher cache of 10 rows"):
        cache[10]


def test_killed_and_resumed_gives_the_same_files(finished: Path, tmp_path: Path, monkeypatch) -> None:
    folder, calls, run = tmp_path / "killed", [], teacher_runs.hidden_states

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4 and os.getpid() != first:  # two batches a shard of four rows: within the second shard
            os.kill(os.getpid(), signal.SIGKILL)
        return run(*args, **kwargs)

    first = os.getpid()
    monkeypatch.setattr(teacher_runs, "hidden_states", counted)
    assert ended(fork(lambda: write(folder))) == -signal.SIGKILL
    kept = folder / "shards" / "00000.safetensors"
    written = kept.stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"is not finished \(1 of 3 shards\)"):
        TeacherCache(folder)
    # what a kill in the middle of a write leaves
    (folder / "shards" / "00001.safetensors.123.partial").write_bytes(b"torn")
    (folder / "index.json.123.partial").write_bytes(b"{")
    write(folder)
    assert kept.stat().st_mtime_ns == written and len(calls) == 2 + 1, "finished shards must be kept"
    assert files(folder) == files(finished)


def test_shard_that_the_index_does_not_know(finished: Path, tmp_path: Path, monkeypatch) -> None:
    """Killed between a shard and the index: the shard is made again."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_json", die)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path)
    assert (tmp_path / "shards" / "00000.safetensors").is_file() and not (tmp_path / "index.json").exists()
    with pytest.raises(ValueError, match=r"holds no teacher cache: there is no index\.json"):
        TeacherCache(tmp_path)
    write(tmp_path)
    assert files(tmp_path) == files(finished)


def test_damage_is_found_at_opening_and_mended(finished: Path, tmp_path: Path) -> None:
    whole = files(finished)
    name = "shards/00001.safetensors"
    torn = whole[name]
    for damage, message, size_tells in (
        (torn[:-1], rf"{name} has {len(torn) - 1} bytes instead of {len(torn)}", True),
        (torn[:-9] + bytes([torn[-9] ^ 1]) + torn[-8:], f"{name} differs from its checksum", False),
        (None, f"{name} is missing", True),
    ):
        folder = copy(finished, tmp_path / f"damage{damage and len(damage)}{size_tells}")
        if damage is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(damage)
        with pytest.raises(ValueError, match=message):
            TeacherCache(folder)
        if size_tells:
            with pytest.raises(ValueError, match=message):
                TeacherCache(folder, verify=False)
        else:
            TeacherCache(folder, verify=False)
        write(folder)
        assert files(folder) == whole
    (folder / "index.json").write_bytes(whole["index.json"][:-40])
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        TeacherCache(folder)
    (folder / "index.json").write_text('{"format": "fused_kd teacher cache 0"}')
    with pytest.raises(ValueError, match=r"made by another version .'fused_kd teacher cache 0', .*: remove it"):
        TeacherCache(folder)


def changed(index: int, key: str, position: int, value: int) -> list:
    data = rows()
    data[index] = {**data[index], key: list(data[index][key])}
    data[index][key][position] = value
    return data


def other_teacher(**options) -> transformers.PreTrainedModel:
    teacher = model(0, **options)
    if not options:
        with torch.no_grad():
            teacher.model.norm.weight[3] += 1e-6
    return teacher


@pytest.mark.parametrize(
    "culprit, given",
    [
        ("tokenizer", lambda: {"tokenizer": Words(VOCAB + 1)}),
        ("tokenizer", lambda: {"tokenizer": Words(prefix="u")}),
        ("data", lambda: {"rows": rows()[:-1]}),
        ("data", lambda: {"rows": rows()[::-1]}),
        ("data", lambda: {"rows": changed(0, "input_ids", 0, 52)}),
        ("data", lambda: {"rows": changed(0, "labels", -1, -100)}),
        ("template", lambda: {"template": "paper"}),
        (
            "teacher_config",
            lambda: {"teacher": other_teacher(rope_parameters={"rope_type": "default", "rope_theta": 2e4})},
        ),
        ("teacher_weights", lambda: {"teacher": other_teacher()}),
    ],
)
def test_mismatch_names_the_culprit(finished: Path, culprit: str, given) -> None:
    cache, given = TeacherCache(finished), given()
    right = {"tokenizer": Words(), "rows": rows(), "template": "tiny", "teacher": model(0)}
    cache.check(**right)
    cache.check(**{**right, "teacher": None})
    with pytest.raises(ValueError, match=f"was made from something else: {culprit}") as caught:
        cache.check(**{**right, **given})
    others = {"tokenizer", "data", "template", "teacher_config", "teacher_weights"} - {culprit}
    assert not any(f"{other} (" in str(caught.value) for other in others)
    if culprit == "data":
        with pytest.raises(ValueError, match="something else: data"):
            cache.rows(given["rows"])


def test_rows_without_a_template(finished: Path, tmp_path: Path) -> None:
    cache = write_cache(tmp_path, model(0), Words(), rows(), k=5, progress=False)
    given = {"tokenizer": Words(), "rows": rows(), "teacher": model(0)}
    cache.check(**given)
    TeacherCache(finished).check(**given)
    assert "template" not in cache.fingerprints and cache.about["template"] is None
    with pytest.raises(ValueError, match="was made from something else: data"):
        cache.check(**{**given, "rows": rows()[::-1]})
    with pytest.raises(ValueError, match=r"something else: template \(not known"):
        cache.check(**given, template="tiny")
    assert write_cache(tmp_path, model(0), Words(), rows(), k=5, progress=False).fingerprints == cache.fingerprints


def test_the_tokenizer_alone(finished: Path) -> None:
    """Tokens that a student has beyond the teacher's do not count."""
    cache = TeacherCache(finished)
    cache.check_tokenizer(Words())
    cache.check_tokenizer(Words(VOCAB + 1))
    for other in (Words(prefix="u"), Words(VOCAB - 1), Words(VOCAB + 1, prefix="u")):
        with pytest.raises(ValueError, match="was made from something else: tokenizer"):
            cache.check_tokenizer(other)


def test_fingerprints_survive_saving(tmp_path: Path) -> None:
    teacher = model(0, tie_word_embeddings=True)
    teacher.save_pretrained(tmp_path)
    assert fingerprint_teacher(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)) == fingerprint_teacher(
        teacher
    )


def test_other_arguments_do_not_go_on(finished: Path, tmp_path: Path) -> None:
    folder = copy(finished, tmp_path)
    with pytest.raises(ValueError, match=r"made with other arguments \(k: 5 -> 6\)"):
        write(folder, k=6)
    with pytest.raises(ValueError, match=r"other arguments \(data: [0-9a-f]+ -> [0-9a-f]+\): give another folder"):
        write(folder, changed(0, "labels", -1, -100))
    with pytest.raises(ValueError, match=r"other arguments \(teacher_weights: [0-9a-f]+ -> [0-9a-f]+\)"):
        write_cache(folder, other_teacher(), Words(), rows(), k=5, template="tiny", shard_rows=4)
    assert files(folder) == files(finished)


@pytest.mark.parametrize("size, kind", [(65536, np.uint16), (65537, np.int32)])
def test_ids_never_wrap(tmp_path: Path, size: int, kind: type) -> None:
    ids = np.array([[size - 1, 0, min(65535, size - 2)], [1, min(65536, size - 2), 7]])
    values = np.log(np.array([[0.5, 0.25, 0.125], [0.75, 0.125, 0.0625]], dtype=np.float32))
    data = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]
    options = {"k": 3, "template": "tiny", "dtype": "8bit", "shard_rows": 1, "made_from": {}, "about": {}}
    source = lambda start, stop: iter([(0, values, ids)])  # noqa: E731
    cache = write_lists(tmp_path, source, Words(size), data, progress=False, **options)
    assert id_dtype(size) == kind
    assert np.array_equal(cache[0][1].numpy(), ids)
    assert cache.bytes_per_token > 3 * (1 + np.dtype(kind).itemsize) + 8
    bad = lambda start, stop: iter([(0, values, np.where(ids == 7, size, ids))])  # noqa: E731
    with pytest.raises(ValueError, match=rf"row 0: ids must be in \[0, {size - 1}\]"):
        write_lists(tmp_path / "bad", bad, Words(size), data, progress=False, **options)
    twice = lambda start, stop: iter([(0, values, np.where(ids == 7, 1, ids))])  # noqa: E731
    with pytest.raises(ValueError, match="row 0: expected the ids of a token once each, got 1 twice"):
        write_lists(tmp_path / "twice", twice, Words(size), data, progress=False, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k": 0}, "k must be an int of at least 1, got 0"),
        ({"k": VOCAB + 1}, "k=54: expected at most the 53 tokens"),
        ({"shard_rows": 0}, "shard_rows must be an int of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"memory": 0}, "memory must be"),
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"data": []}, "rows is empty"),
        ({"template": "papper"}, "'papper' is unknown"),
    ],
)
def test_bad_arguments(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_bad_tail_and_small_head(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="tail must be one of 'renormalize', 'uniform', 'bucket', 'listed', got 'ignore'"
    ):
        TeacherCache(finished, tail="ignore")
    with pytest.raises(ValueError, match="head has 59 rows, fewer than the 60 tokens"):
        write_cache(tmp_path, model(0), Words(60), rows(), k=1, template="tiny")


def test_broken_teacher_is_not_stored(tmp_path: Path, monkeypatch) -> None:
    run = teacher_runs.hidden_states
    monkeypatch.setattr(teacher_runs, "hidden_states", lambda *a, **k: run(*a, **k) * math.nan)
    with pytest.raises(ValueError, match="rows 0 to 3: log_probs of token 0"):
        write(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 10**12, "shards": []}, r"is not finished \(0 of 250000000000 shards\)"),
        ({"rows": 10**30}, "rows must be an int of at least 1, got 1000"),
        ({"rows": 9}, "no shard can be .*00002"),
        ({"k": 4}, r"00000\.safetensors has the arrays .*\[13, 5\].*, expected .*\[13, 4\]"),
        ({"k": 60}, "no cache has k=60 of 53 tokens"),
        ({"vocab_size": 10**6}, r"has the arrays .*\[13, 4\].*, expected .*'U8', \[13, 13\]"),
        ({"dtype": "8bit"}, "has the arrays .*log_probs.*, expected .*codes"),
        ({"fingerprints": []}, "is damaged .*about and fingerprints must be objects"),
        ({"about": None}, "is damaged .*about and fingerprints must be objects"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_index_that_cannot_be(finished: Path, tmp_path: Path, change: dict, message: str) -> None:
    folder = copy(finished, tmp_path / "cache")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match=message):
        TeacherCache(folder, verify=False)


def replace(folder: Path, number: int, name: str, change) -> None:
    """Another array in a shard, with a size and a checksum that fit it."""
    file, index = folder / "shards" / f"{number:05d}.safetensors", json.loads((folder / "index.json").read_text())
    arrays = load_file(file)
    arrays[name] = change(arrays.get(name, arrays["offsets"]))
    save_file(arrays, file)
    index["shards"][number] |= {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("offsets", lambda a: a[::-1].copy(), "offsets that do not rise from 0"),
        ("offsets", lambda a: a + 1, "offsets that do not rise from 0"),
        ("offsets", lambda a: a.astype("int32"), "has the arrays .*'I32'"),
        ("packed_ids", lambda a: a[:-1].copy(), "has the arrays"),
        ("packed_ids", lambda a: a | 255, "row 9 of the teacher cache in .*: expected ids below 53"),
        ("log_probs", lambda a: a * float("nan"), "row 9 .*log-probabilities of at most 0, got .* nan"),
        ("log_probs", lambda a: a + 9, "row 9 .*log-probabilities of at most 0"),
        ("more", lambda a: a, "has the arrays .*more"),
        ("log_probs", lambda a: a * 0 - 0.1, r"row 9 .*, row 1 of shards/00002\.safetensors: .*at most 1, got 4\.5"),
        ("log_probs", lambda a: a - np.float16(np.inf), r"row 9 .*add up to more than 0 and at most 1, got 0\.0"),
        ("packed_ids", lambda a: a * 0, "row 9 .*: expected the ids of a token once each, got 0 twice"),
    ],
)
def test_a_shard_that_cannot_be(finished: Path, tmp_path: Path, name: str, change, message: str) -> None:
    folder = copy(finished, tmp_path / "cache")
    replace(folder, 2, name, change)
    with pytest.raises(ValueError, match=message):
        TeacherCache(folder)[9]


NASTY = [None, True, -1, 1.5, 10**30, float("inf"), "\ud800", "../x", [None], {"k": 1}]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def test_any_entry_gives_an_error_or_the_right_lists(finished: Path, tmp_path: Path) -> None:
    folder = copy(finished, tmp_path / "cache")
    text, whole = (folder / "index.json").read_text(), TeacherCache(finished)
    refused = 0
    for path, value in product(places(json.loads(text)), NASTY):
        index = entry = json.loads(text)
        for key in path[:-1]:
            entry = entry[key]
        entry[path[-1]] = value
        (folder / "index.json").write_text(json.dumps(index))
        try:
            cache = TeacherCache(folder, verify=False)
        except ValueError as error:
            refused += 1
            assert str(folder) in str(error) and len(str(error)) < 1000
            continue
        assert (cache.k, cache.vocab_size, len(cache), cache.tokens) == (5, 53, 10, whole.tokens), (path, value)
        assert all(torch.equal(cache[row][1], whole[row][1]) for row in range(10))
    assert refused > 200
