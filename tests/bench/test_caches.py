"""What a teacher on disk costs in bytes and in the gradient: a table an objective, from a model and a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

import fused_kd as fk  # noqa: E402
from bench import __main__ as bench  # noqa: E402
from bench import caches, stored  # noqa: E402

WORDS = 97


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A model's folder and a text."""
    folder, text = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("text") / "text.txt"
    vocab = {f"w{i}": i for i in range(WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(25)
    model.save_pretrained(folder)
    text.write_text(" ".join(f"w{i}" for i in torch.randint(WORDS, (90,)).tolist()))
    return folder, text


def test_a_table_an_objective(made, tmp_path, capsys):
    folder, text = made
    options = ["--model", str(folder), "--text", str(text), "--tokens", "80", "--length", "20", "--out", str(tmp_path)]
    options += ["--times", "2"]
    assert bench.main(["caches", *options]) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "caches.json").read_text())
    assert record["tokens"] == 80 and record["text"] == "text.txt" and set(record["held"]) == {"16", "64"}
    assert str(folder) not in (tmp_path / "caches.json").read_text()
    assert printed.strip() == (tmp_path / "caches.md").read_text().strip()
    timed = {row["form"]: row for row in record["times"]}
    assert timed["online"]["teacher"] > 0 == timed["hidden states"]["teacher"] and "## A step" in printed
    assert all(row["loss"] > 0 for row in timed.values()) and len(timed) == 9
    rows = {(row["form"], row["objective"]): row for row in record["rows"]}
    assert {name for _, name in rows} == set(caches.OBJECTIVES)
    assert all(("64 entries, fp16, renormalize", name) not in rows for name in caches.OBJECTIVES if "Reverse" in name)
    error = {form: row["d_hidden"]["error"] for (form, name), row in rows.items() if name == "ForwardKD(lam=1)"}
    assert error["online"] == 0 and error["hidden states, bf16"] > 0
    assert error["hidden states, bf16"] < error["hidden states, 8 bits, scaled"] < error["hidden states, 8 bits"]
    assert error["64 entries, fp16, bucket"] < error["16 entries, fp16, bucket"] < error["16 entries, fp16, listed"]
    assert error["50 draws"] < error["12 draws"]
    draws, online = rows["12 draws", "ForwardKD(lam=1)"], rows["online", "ForwardKD(lam=1)"]
    assert draws["loss_online"] == online["loss"] < draws["loss"]
    bucket = rows["16 entries, fp16, bucket", "ForwardKD(lam=1)"]
    assert bucket["loss"] < online["loss"] and 0.5 < bucket["d_weight"]["cosine"] <= 1 + 1e-9
    assert printed.count("| online |") == 4 and "| other gate |" in printed


def test_some_forms_alone(made, capsys):
    folder, text = made
    options = ["--model", str(folder), "--text", str(text), "--tokens", "20", "--length", "20", "--only", "hidden"]
    assert bench.main(["caches", *options, "--note", "Of a test."]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| hidden states, bf16 |") == 3 and "draws" not in printed.split("## ")[1]
    assert "\nOf a test.\n" in printed


def test_bytes_a_token():
    """17 bits an id of 128,256."""
    size = {form.name: form.size(*caches.LARGE) for form in stored.forms(fk.LMHead(torch.randn(3, 32), HEAD), 0)}
    assert size["hidden states, bf16"] == 8192 and size["hidden states, 8 bits"] == 4100
    assert size["hidden states, 8 bits, scaled"] == 4100
    assert size["projected to H/2, bf16"] == 4096 and size["projected to H/2, 8 bits"] == 2052
    assert size["64 entries, fp16, bucket"] == 136 + 128 + 4 and size["64 entries, 8bit, listed"] == 136 + 64 + 8 + 4
    assert size["12 draws"] == 26 and size["8 entries, fp16, and 12 draws"] == 43 + 16
    assert size["16 entries, 8bit, and 50 draws"] == 141 + 16 + 8


HEAD = torch.randn(300, 32)


def test_a_text_that_is_too_short_is_a_line(made, capsys):
    folder, text = made
    assert bench.main(["caches", "--model", str(folder), "--text", str(text), "--length", "300"]) == 2
    assert "bench caches: --text has 90 tokens, fewer than --length 300" in capsys.readouterr().err
