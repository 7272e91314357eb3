"""Model folders that others made: no code of theirs runs, nobody is asked, and what is wrong is said."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fused_kd.training.loading import read_adapter_config
from fused_kd.training.loading import load_pretrained
from fused_kd.training.models import LoRA, load_adapters, with_adapters
from fused_kd.training.mt_llm.stacked import load_body, load_seq2seq
from fused_kd.training.models import load_model, load_tokenizer, model_content, train_tokenizer

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
    assert not list(folder.parent.rglob("ran"))


def test_code_beside_a_tokenizer_is_an_error(folder: Path) -> None:
    (folder / "evil.py").write_text(EVIL)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer"] * 2}, tokenizer_class="Evil")
    with pytest.raises(ValueError, match="custom code"):
        load_tokenizer(folder)
    assert not list(folder.parent.rglob("ran"))


KERNELS: dict[str, dict[str, Any]] = {
    "public": {"attn_implementation": "someone/kernel"},
    "private": {"_attn_implementation": "someone/kernel"},
    "alias": {"attribute_map": {"foo": "_attn_implementation"}, "foo": "someone/kernel"},
    "stored alias": {"attribute_map": {"foo": "_attn_implementation_internal"}, "foo": "someone/kernel"},
    "renamed": {"attribute_map": {"_attn_implementation": "foo"}, "foo": "someone/kernel"},
    "by part": {"attn_implementation": {"": "someone/kernel"}},
    "within a list": {"parts": [{"attn_implementation": "someone/kernel"}]},
    "package": {"attn_implementation": "flash_attention_2"},
    "experts": {"experts_implementation": "sonicmoe"},
}


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels that transformers asks the hub for, as where the package ``kernels`` is installed."""
    import transformers.integrations.hub_kernels as hub
    import transformers.modeling_utils as utils

    asked: list[str] = []

    def fetch(name: str, *args: object, **options: object) -> None:
        asked.append(name)
        raise ValueError("fetched")

    monkeypatch.setattr(hub, "get_kernel", fetch)
    monkeypatch.setattr(hub, "is_kernels_available", lambda *_: True)
    monkeypatch.setattr(utils, "is_kernels_available", lambda *_: True)
    return asked


@pytest.mark.parametrize("case", KERNELS)
def test_a_kernel_of_the_hub_is_an_error(folder: Path, fetched: list[str], case: str) -> None:
    change(folder / "config.json", **KERNELS[case])
    for loader in ("model", "body"):
        with pytest.raises(ValueError, match=r"its (attn|experts)_implementation is .*code from the hub"):
            LOADERS[loader](str(folder))
    assert not fetched


@pytest.mark.parametrize("case", ["public", "alias", "stored alias", "package"])
def test_the_caller_s_attention_counts(folder: Path, fetched: list[str], case: str) -> None:
    change(folder / "config.json", **KERNELS[case])
    model = load_model(folder, load_tokenizer(folder), 0, attn_implementation="eager")
    assert model.config._attn_implementation == "eager" and not fetched
    with pytest.raises((ValueError, ImportError)):  # what was asked for
        load_model(folder, load_tokenizer(folder), 0, attn_implementation="someone/kernel")
    assert fetched == ["someone/kernel"]


def test_an_installed_package_may_be_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    change(folder / "config.json", attn_implementation="flash_attention_2")
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    with pytest.raises((ValueError, ImportError), match="FlashAttention2 has been toggled on"):  # from transformers
        LOADERS["model"](str(folder))


def test_the_base_of_adapters_is_checked(folder: Path, fetched: list[str]) -> None:
    adapters = folder.with_name("adapters")
    save_adapters(folder, adapters)
    assert type(load_body(str(adapters))).__name__ == "LlamaModel"
    for case in ("public", "alias"):
        change(folder / "config.json", **KERNELS[case])
        with pytest.raises(ValueError, match="its attn_implementation is 'someone/kernel'"):
            load_body(str(adapters))
    assert not fetched
    change(adapters / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ValueError, match="must name a model as base_model_name_or_path, got None"):
        load_body(str(adapters))


def save_adapters(base: Path, folder: Path) -> None:
    pytest.importorskip("peft")
    with_adapters(load_body(str(base)), LoRA(r=2)).save_pretrained(folder)


@pytest.mark.parametrize("dtype", ["auto", torch.float16, None])
def test_the_check_changes_nothing_of_a_model(folder: Path, dtype: torch.dtype | str | None) -> None:
    model = load_model(folder, load_tokenizer(folder), 0, dtype=torch.bfloat16)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    checked = load_pretrained(AutoModelForCausalLM, str(folder), dtype=dtype)
    assert checked.config.to_dict() == plain.config.to_dict() and checked.dtype == plain.dtype
    assert checked.generation_config.to_dict() == plain.generation_config.to_dict()
    assert all(torch.equal(a, b) for a, b in zip(checked.parameters(), plain.parameters(), strict=True))


BAD_ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "module": ({"megatron_config": {"x": 1}, "megatron_core": "adapters.evil"}, "'adapters.evil' and megatron_config"),
    "module alone": ({"megatron_core": "adapters.evil"}, "neither may be set"),
    "kind": ({"peft_type": "PROMPT_TUNING"}, "peft_type must be 'LORA', got 'PROMPT_TUNING'"),
    "nested": ({"target_modules": r"([a-z_]+)+\.!"}, "target_modules has .*, a pattern with a repeated group"),
    "other key": ({"exclude_modules": "(a|a)*!"}, "exclude_modules has .*, a pattern with a repeated group"),
    "within": ({"rank_pattern": {"(a|a)*!": 1}}, "rank_pattern has .*, a pattern with a repeated group"),
    "long": ({"target_modules": "a" * 1001}, "a pattern of more than 1000 characters"),
    "many": ({"target_modules": ".*" * 7 + "!"}, "a pattern with more than 6 repeats"),
    "optional": ({"target_modules": "a?" * 30}, "a pattern with more than 6 repeats"),
    "large": ({"x": "a" * (1 << 20)}, "must have at most 1048576 bytes"),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_bad_adapter_configs(folder: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    values, message = BAD_ADAPTERS[case]
    adapters = folder.with_name("adapters")
    save_adapters(folder, adapters)
    (adapters / "evil.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    change(adapters / "adapter_config.json", **values)
    monkeypatch.syspath_prepend(str(folder.parent))
    body = load_body(str(folder))
    loaders: tuple[Callable[[], object], ...] = (
        lambda: load_adapters(body, adapters),
        lambda: load_body(str(adapters)),
        lambda: load_body(str(shutil.copytree(folder, adapters, dirs_exist_ok=True))),  # a model with adapters beside
    )
    for load in loaders:
        with pytest.raises(ValueError, match=f"adapter_config.json of .*{message}"):
            load()
    assert not (adapters / "ran").exists()


@pytest.mark.parametrize("pattern", ["all-linear", r".*layers\.[0-9]+\.self_attn\.(?:q_proj|v_proj)"])
def test_usual_patterns_of_adapters(folder: Path, pattern: str) -> None:
    adapters = folder.with_name("adapters")
    save_adapters(folder, adapters)
    change(adapters / "adapter_config.json", target_modules=pattern)
    assert read_adapter_config(adapters)["target_modules"] == pattern  # type: ignore[index]


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "\xff"])
def test_damaged_adapter_configs(folder: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"is no folder and no hub name at hand with an adapter_config\.json"):
        load_adapters(load_body(str(folder)), folder)
    (folder / "adapter_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"adapter_config\.json of .* must be"):
        load_adapters(load_body, folder)


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
