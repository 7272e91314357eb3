"""Caches of what vLLM's server says, against those of the model itself; and files of something else."""

from __future__ import annotations

import functools
import gzip
import json
import math
import random
from pathlib import Path

import pytest
import torch

from fused_kd.training import vllm as vllm_logprobs

transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from fused_kd.training import with_context  # noqa: E402
from fused_kd.training.cache import convert_vllm  # noqa: E402
from fused_kd.training.teacher_cache import TeacherCache  # noqa: E402
from fused_kd.training.vllm import read_prompt_logprobs  # noqa: E402

from .caching import VOCAB, Words, files, model, rows, write  # noqa: E402


@functools.cache
def answered() -> str:
    """What vLLM's server says of the rows: the token at each position is listed, beyond the 5 largest if it must be."""
    teacher, answers = model(0), []
    for row in rows():
        with torch.no_grad():
            logits = teacher(input_ids=torch.tensor([row["input_ids"]])).logits[0][:, :VOCAB]
        entries: list[dict | None] = [None]
        for token, log_probs in zip(row["input_ids"][1:], logits.log_softmax(-1), strict=False):
            order = log_probs.argsort(descending=True).tolist()
            wanted = [token, *(i for i in order[:5] if i != token)]
            said = [{"logprob": float(log_probs[i]), "rank": order.index(i) + 1, "decoded_token": "x"} for i in wanted]
            entries.append(dict(zip(map(str, wanted), said, strict=True)))
        answers.append({"prompt_token_ids": row["input_ids"], "prompt_logprobs": entries, "text": ""})
    return json.dumps(answers)


def lines(items: list) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def convert(folder: Path, path: Path, **options) -> TeacherCache:
    options = {"k": 5, "template": "tiny", "shard_rows": 4, "dtype": "fp32", "progress": False, **options}
    return convert_vllm(folder, path, Words(), rows(), **options)


def test_vllm_of_longer_prompts(tmp_path: Path) -> None:
    """Of rows with a context the server was asked with the context: it is the longer row that its tokens must be."""
    rng = random.Random(0)
    data, path = with_context(rows(), None, [9, 10]), tmp_path / "rows.jsonl"
    ids = [data[number]["teacher_input_ids"] for number in range(len(data))]
    made = [[None, *({str(token): -0.1 - rng.random(), "52": -9.0} for token in row[1:])] for row in ids]
    path.write_text(lines([{"prompt_logprobs": m, "prompt_token_ids": i} for m, i in zip(made, ids, strict=True)]))
    options = {"k": 2, "template": "tiny", "dtype": "fp32", "progress": False}
    cache = convert_vllm(tmp_path / "cache", path, Words(), data, **options)
    for number, row in enumerate(rows()):
        wanted = [label for label in row["labels"][1:] if label != -100]
        assert len(wanted) == len(cache[number][0])
        listed = made[number][len(ids[number]) - len(row["labels"]) + 1 :]
        found = [entry[str(t)] for entry, t in zip(listed, row["labels"][1:], strict=True) if t != -100]
        assert cache[number][0][:, 0].tolist() == pytest.approx(found)
    with pytest.raises(ValueError, match="prompt_token_ids are not the row's input_ids"):
        convert_vllm(tmp_path / "plain", path, Words(), rows(), **options)


def test_vllm_in_every_wrapping(tmp_path: Path) -> None:
    answers = json.loads(answered())
    assert {len(entry) for a in answers for entry in a["prompt_logprobs"] if entry} == {5, 6}
    bare = [a["prompt_logprobs"] for a in answers]
    choices = [{"index": i, **{k: v for k, v in a.items() if k != "text"}} for i, a in enumerate(answers)]
    batches = [{"custom_id": str(i), "response": {"status_code": 200, "body": a}} for i, a in enumerate(answers)]
    whole = write(tmp_path / "model", dtype="fp32")
    for name, text in {
        "rows.jsonl": lines(answers),
        "bare.jsonl": lines(bare),
        "array.json": json.dumps(answers, indent=2),
        "nested.json": json.dumps(bare),
        "completion.json": json.dumps({"choices": choices[::-1]}, indent=1),
        "batch.jsonl.gz": lines(batches) + "\n",
    }.items():
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        cache = convert(tmp_path / f"{name}.cache", path)
        for index in range(10):
            for ours, theirs in zip(cache[index], whole[index], strict=True):
                assert torch.allclose(ours.double(), theirs.double(), atol=1e-5)
    cache.check(tokenizer=Words(), rows=rows(), template="tiny")
    with pytest.raises(ValueError, match=r"teacher_config \(not known"):
        cache.check(tokenizer=Words(), rows=rows(), template="tiny", teacher=model(0))


def test_vllm_short_lists_and_stand_ins(tmp_path: Path) -> None:
    answers = json.loads(answered())
    entry = answers[0]["prompt_logprobs"][-1]
    token = str(rows()[0]["input_ids"][-1])
    entry.clear()
    entry[token] = {"logprob": -0.5, "rank": 1, "decoded_token": "x"}
    entry["57"] = {"logprob": -1.5, "rank": 2, "decoded_token": "padding of the head"}
    entry["51" if token != "51" else "50"] = {"logprob": -9999.0, "rank": 3, "decoded_token": "-inf"}
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(answers))
    log_probs, indices = convert(tmp_path / "cache", path)[0]
    assert log_probs[-1].tolist() == [-0.5] + [-math.inf] * 4 and indices[-1].tolist() == [int(token), 0, 0, 0, 0]


def damaged(how: str) -> list:
    answers = json.loads(answered())
    first = answers[0]["prompt_logprobs"]
    if how == "ids":
        answers[1]["prompt_token_ids"] = [52, *answers[1]["prompt_token_ids"][1:]]
    elif how == "shift":  # one entry early, as if entry t were the distribution after token t
        answers = [{"prompt_logprobs": [*a["prompt_logprobs"][1:], None]} for a in answers]
        for a in answers:
            a["prompt_logprobs"][0] = None
    elif how == "short":
        del first[-1]
    elif how == "few":
        del answers[-1]
    elif how == "many":
        answers.append(answers[0])
    elif how == "null":
        next(iter(first[-1].values()))["logprob"] = None
    elif how == "object":
        answers[3] = {"text": "no log-probabilities"}
    return answers


@pytest.mark.parametrize(
    "how, message",
    [
        ("ids", r"line 2: prompt_token_ids are not the row's input_ids: 52 instead of \d+ at position 0"),
        ("shift", r"line 1: the entry at position \d+ does not list the row's token"),
        ("short", r"line 1: \d+ entries for a row of \d+ tokens"),
        ("few", "has 9 rows, the data 10"),
        ("many", "has more rows than the data's 10"),
        ("null", r"line 1, the entry at position \d+: logprob must be a number, got None"),
        ("object", "line 4: expected prompt_logprobs"),
    ],
)
def test_vllm_of_something_else(tmp_path: Path, how: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(damaged(how)))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "cache", path)
    with pytest.raises(ValueError, match=r"holds no teacher cache|is not finished"):
        TeacherCache(tmp_path / "cache")


def test_vllm_goes_on_with_the_same_file_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(json.loads(answered())))
    convert(tmp_path / "cache", path)
    whole = files(tmp_path / "cache")
    (tmp_path / "cache" / "shards" / "00001.safetensors").unlink()
    convert(tmp_path / "cache", path)
    assert files(tmp_path / "cache") == whole
    with pytest.raises(ValueError, match=r"k=7: .* lists at most 6 entries a token"):
        convert(tmp_path / "wide", path, k=7)
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match=r"made with other arguments \(file: "):
        convert(tmp_path / "cache", path)
    path.write_text(path.read_text() + "{")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 12: not JSON"):
        list(read_prompt_logprobs(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"choices": [1]}', "line 1: expected prompt_logprobs, a list that starts with null, got {'choices'"),
        ('{"response": "x"}', "line 1: expected prompt_logprobs, a list that starts with null, got {'response'"),
        ('{"response": [1]}', "line 1: expected prompt_logprobs"),
        ("[[[[5]]]]", "line 1, item 1, item 1, item 1, item 1: expected prompt_logprobs"),
        ('[null, ["2"]]', r"line 1: the entry at position 1 must be an object or null, got \['2'\]"),
        ('{"prompt_logprobs": [null, {}, "2"]}', "line 1: the entry at position 2 must be an object or null, got '2'"),
        ("[[null], [null, 5]]", "line 1, item 2: the entry at position 1 must be an object or null, got 5"),
        ('{"prompt_logprobs": [null], "prompt_token_ids": 5}', "prompt_token_ids must be a list of ints, got 5"),
        ("\n\n{\n", "line 3: not JSON"),
        ("[\nnull,\n{},,\n]", "array from line 1: not JSON: .*line 3"),
        ('{"choices": [{"index": null}, {"index": null}]}', "expected prompt_logprobs"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_answers_of_another_shape(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"rows\.jsonl, (line 1: )?{message}"):
        list(read_prompt_logprobs(path))


ODD = [{"x": -2}, {"-5": -2}, {"\u0662": -2}, {"2": [1]}, {"2": {"logprob": None}}, {"2": True}, {"2": 10**400}]


@pytest.mark.parametrize("entry", ODD, ids=lambda entry: str(entry)[:20])
def test_entries_that_cannot_be(entry: dict) -> None:
    answer = vllm_logprobs.PromptLogprobs("f, line 1", [None, {"2": -1} | entry], None)
    message = (
        r"token ids must be decimal digits, got '(x|-5|\u0662)'|logprob must be a number, got (\[1\]|None|True|10+)"
    )
    with pytest.raises(ValueError, match=rf"^f, line 1, the entry at position 1: ({message})"):
        vllm_logprobs.row_lists(answer, {"input_ids": [1, 2], "labels": [-100, 2]}, 2, 100)


def test_a_bare_list_on_many_lines(tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    path.write_text("\n" + json.dumps([None, {"2": -1.0}], indent=1))
    assert [*read_prompt_logprobs(path)] == [(f"{path}, line 2", [None, {"2": -1.0}], None)]
    path.write_text("\n")
    assert [*read_prompt_logprobs(path)] == []
