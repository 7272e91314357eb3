"""Model folders that others made: no code of theirs runs, nobody is asked, and what is wrong is said."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fused_kd.training.mt_llm.stacked import load_body, load_seq2seq
from fused_kd.training.presets import load_model, load_tokenizer, model_content, train_tokenizer
from fused_kd.training.sdrrl.recipe import _known

EVIL = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tokenizer
"""
CODE = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoModelForSeq2SeqLM": "evil.Model"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    tokenizer = train_tokenizer(["a b c"] * 3, 300)
    load_model("tiny-student", tokenizer, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def ask(*args: object) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr(builtins, "input", ask)
    return Path(shutil.copytree(sound, tmp_path / "model"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


LOADERS: dict[str, Callable[[str], object]] = {
    "model": lambda name: load_model(name, load_tokenizer(name), 0),
    "content": model_content,
    "body": load_body,
    "seq2seq": load_seq2seq,
}


@pytest.mark.parametrize("loader", ["model", "body", "seq2seq"])
def test_code_beside_a_model_is_an_error(folder: Path, loader: str) -> None:
    (folder / "evil.py").write_text(EVIL)
    change(folder / "config.json", auto_map=CODE | {"AutoModel": "evil.Model"}, model_type="evil")
    with pytest.raises(ValueError, match="custom code"):
        LOADERS[loader](str(folder))
    assert not _known(str(folder)) and not list(folder.parent.rglob("ran"))


def test_code_beside_a_tokenizer_is_an_error(folder: Path) -> None:
    (folder / "evil.py").write_text(EVIL)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer"] * 2}, tokenizer_class="Evil")
    with pytest.raises(ValueError, match="custom code"):
        load_tokenizer(folder)
    assert not list(folder.parent.rglob("ran"))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_of_the_hub_is_an_error(folder: Path, key: str) -> None:
    change(folder / "config.json", **{key: "someone/kernel"})
    for loader in ("model", "body"):
        with pytest.raises(ValueError, match=f"its {key} is 'someone/kernel', code from the hub"):
            LOADERS[loader](str(folder))


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '{"model_type": "llama", "hidden_size": "wide"}', ""])
def test_a_damaged_config_is_an_error(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="model' is neither a preset"):
        LOADERS["model"](str(folder))


def test_damaged_weights_are_an_error(folder: Path) -> None:
    weights = folder / "model.safetensors"
    for content in (b"", weights.read_bytes()[:-1]):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=r"model' is neither a preset .*: its files are damaged"):
            LOADERS["model"](str(folder))
