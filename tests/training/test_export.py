"""Exported folders: what transformers reads back bit for bit, under names that vLLM and llama.cpp know."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from fused_kd import export as command  # noqa: E402
from fused_kd.training import export  # noqa: E402
from fused_kd.training.models import LoRA, load_model, train_tokenizer, with_adapters  # noqa: E402
from fused_kd.training.script import run_script  # noqa: E402

from .test_shrink import make  # noqa: E402

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = train_tokenizer(["The old man walks across the street.", "naïve – 5 €"] * 4, 300)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def run(tokenizer: Any, tmp_path: Path) -> Path:
    """A training's folder as the trainer leaves it."""
    model = load_model("tiny-student", tokenizer, 0)
    model.config.use_cache = False
    model.save_pretrained(tmp_path / "run" / "model")
    tokenizer.save_pretrained(tmp_path / "run" / "model")
    for name in ("training_args.bin", "manifest.json"):
        (tmp_path / "run" / "model" / name).write_text("{}")
    (tmp_path / "run" / "training.json").write_text("{}")
    return tmp_path / "run"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


IDS = torch.arange(3, 40)[None]


@torch.no_grad()
def test_a_trained_model(run: Path, tmp_path: Path) -> None:
    made = export(run, tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32" and config["use_cache"]
    known = set(transformers.LlamaConfig().to_dict())
    assert config.keys() <= known and not any(key.startswith("_") for key in config)
    saved = tensors(tmp_path / "out")
    assert "model.embed_tokens.weight" in saved and "lm_head.weight" not in saved, "tied weights are stored once"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(run / "model")
    assert again.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in again.state_dict().items())
    assert torch.equal(again(IDS).logits, theirs(IDS).logits) and torch.equal(made(IDS).logits, theirs(IDS).logits)
    read = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert read.chat_template == TEMPLATE and max(read.get_vocab().values()) < again.config.vocab_size
    assert not list(tmp_path.glob("*.partial"))


def test_another_dtype(run: Path, tmp_path: Path) -> None:
    command.main([str(run), "--dtype", "bf16", "--output", str(tmp_path / "out")])
    assert {value.dtype for value in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    command.main([str(run), "--output", str(tmp_path / "out")])  # an older export is replaced
    assert {value.dtype for value in tensors(tmp_path / "out").values()} == {torch.float32}


@torch.no_grad()
@pytest.mark.parametrize("named", [True, False], ids=["named base", "given base"])
def test_adapters(run: Path, tokenizer: Any, tmp_path: Path, named: bool) -> None:
    pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(run / "model")
    adapted = with_adapters(base, LoRA(r=2, dropout=0.0), "CAUSAL_LM").eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    folder = tmp_path / "adapters"
    adapted.save_pretrained(folder / "model")
    want = adapted(IDS).logits
    assert float((want - AutoModelForCausalLM.from_pretrained(run / "model")(IDS).logits).norm()) > 0.1
    if not named:
        file = folder / "model" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
        with pytest.raises(ValueError, match=r"base must be given: the adapters of .* do not name"):
            export(folder, tmp_path / "out")
    command.main([str(folder), *([] if named else ["--base", str(run / "model")]), "--output", str(tmp_path / "out")])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert float((again(IDS).logits - want).norm() / want.norm()) < 1e-5
    assert tensors(tmp_path / "out").keys() == tensors(run / "model").keys(), "no adapter is left"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()


MISTAKES: dict[str, tuple[list[str], str]] = {
    "nothing": (["no-such-folder"], "neither a preset"),
    "no folder": (["./no-such-folder"], "'./no-such-folder': no such folder or file"),
    "no model": (["."], r"has no config.json and no adapter_config.json, nor has its model folder; .*checkpoint-3"),
    "base": (["run", "--base", "run/model"], "base='run/model' is for adapters"),
    "itself": (["run/model", "--output", "run/model"], "output='run/model' holds the model that is read"),
    "above": (["run", "--output", "run"], "output='run' holds the model that is read"),
    "another": (["run", "--output", "checkpoint-3"], "output='checkpoint-3' exists and is no model folder"),
    "dtype": (["run", "--dtype", "int8"], "argument --dtype"),
    "tokens": (["run", "--tokens", "3"], "unrecognized arguments: --tokens 3"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(
    run: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    Path("checkpoint-3").mkdir()
    Path("checkpoint-3/notes.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["export.py", *words, *([] if "--output" in words else ["--output", "out"])])
    before = tensors(run / "model")
    with pytest.raises(SystemExit) as stopped:
        run_script(command.main)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("export.py: error: ") and re.search(message, error), error
    assert not Path("out").exists() and Path("checkpoint-3/notes.txt").exists()
    assert before.keys() == tensors(run / "model").keys()


def test_more_tokens_than_embeddings(run: Path, tokenizer: Any, tmp_path: Path) -> None:
    larger = AutoTokenizer.from_pretrained(run / "model")
    larger.add_tokens([f"<{i}>" for i in range(10)])
    larger.save_pretrained(run / "model")
    with pytest.raises(ValueError, match=r"has \d+ embeddings, fewer than the \d+ tokens"):
        export(run, tmp_path / "out")


def test_sentencepiece_goes_along(run: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "model" / "tokenizer.model").write_bytes(b"pieces")
    export(run, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"


# As llama.cpp's converter names them; its table is the one of the package gguf.
ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma2": "GEMMA2", "gemma3_text": "GEMMA3",
                 "phi3": "PHI3", "mixtral": "LLAMA", "qwen3_moe": "QWEN3MOE", "smollm3": "SMOLLM3"}  # fmt: skip


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_llama_cpp_knows_every_tensor(family: str, tokenizer: Any, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    options = {"mlp_only_layers": []} if family == "qwen3_moe" else {}  # llama.cpp wants experts in every layer
    model = make(family, vocab_size=len(tokenizer) + 8, **options)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out")
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, ARCHITECTURES[family]), model.config.num_hidden_layers)
    unknown = [name for name in tensors(tmp_path / "out") if names.get_name(name, (".weight", ".bias")) is None]
    assert not [name for name in unknown if ".experts." not in name]  # those the converter stacks first
    assert all(name.endswith(".weight") for name in unknown)
