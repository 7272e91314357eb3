"""Presets, tokenizers, and model folders that others made: no code of theirs runs, nobody is asked."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from fused_kd.training import loading
from fused_kd.training.checkpoints import fault_of
from fused_kd.training.loading import load_pretrained
from fused_kd.training.models import (
    BOS,
    EOS,
    PAD,
    PRESETS,
    LoRA,
    language_id,
    load_adapters,
    load_any,
    load_model,
    load_tokenizer,
    merge,
    model_content,
    shared_tokenizer,
    train_tokenizer,
    with_adapters,
)

TEXTS = ["Der alte Mann geht über die Straße.", "The old man walks across the street.", "Größe, Übung, naïve – 5 €"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    load_model("tiny-student", tokenizer, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def ask(*args: object) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr(builtins, "input", ask)
    return Path(shutil.copytree(sound, tmp_path / "model"))


def test_a_trained_tokenizer(tokenizer, tmp_path: Path) -> None:
    for text in [*TEXTS, "日本語 😀", "a\nb"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == (PAD, BOS, EOS)
    assert 259 < len(tokenizer) <= 300
    first, within = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Mann", "Der Mann"))
    assert within[-len(first) :] == first, "a word has one spelling"
    assert train_tokenizer(iter(TEXTS), 300).get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded(TEXTS[0])["input_ids"] == tokenizer(TEXTS[0])["input_ids"]
    with pytest.raises(ValueError, match=r"vocab_size must be at least 260.*got 100"):
        train_tokenizer(TEXTS, 100)
    loaded.add_tokens(["deu_Latn", "__fr__"])
    assert [language_id(loaded, code) for code in ("deu_Latn", "fr")] == [len(loaded) - 2, len(loaded) - 1]
    with pytest.raises(ValueError, match="codes: 'xx' is no language of"):
        language_id(loaded, "xx")


def test_presets(tokenizer) -> None:
    state = torch.random.get_rng_state()
    for name, preset in PRESETS.items():
        model = load_model(name, tokenizer, seed=3)
        assert model.config.vocab_size == len(tokenizer) and model.config.eos_token_id == tokenizer.eos_token_id
        assert preset.items() <= model.config.to_dict().items()
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    first, again, other = (load_model("tiny-student", tokenizer, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator must be left alone"


def test_load_from_folder(tokenizer, tmp_path: Path) -> None:
    model = load_model("tiny-student", tokenizer, 1)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer files: none of tokenizer\.json"):
        load_model(tmp_path, tokenizer, 0)  # no tokenizer beside it
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path, tokenizer, 0).lm_head.weight, model.lm_head.weight)
    assert load_model(tmp_path, tokenizer, 0, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="student and teacher must share one tokenizer"):
        load_model(tmp_path, train_tokenizer(["ganz andere Wörter, other words"] * 5, 290), 0)
    larger = load_tokenizer(tmp_path)
    larger.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=r"differs from the other model's in 1 tokens \('<new>'\)"):
        load_model(tmp_path, larger, 0)
    larger.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="fewer than the"):
        load_model(tmp_path, larger, 0)


def test_what_is_not_there(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """A path is no hub name; without a network the hub is not tried again and again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    loading._has_hub.cache_clear()
    monkeypatch.setattr(loading, "getproxies", dict)
    monkeypatch.setattr(loading.socket, "getaddrinfo", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    for load in (load_tokenizer, load_any):
        for name in ("./nowhere", "/no-such/model", "~/model", "model.gguf", "runs/a/model"):
            with pytest.raises(ValueError, match=r"^'[^']*': no such folder or file$"):
                load(name)
        with pytest.raises(ValueError, match=r"^'models/mine': no such folder, and not on the hub: "):
            load("models/mine")
        with pytest.raises(ValueError, match=r"^'no-such-model' is neither a preset \(tiny-teacher, tiny-student"):
            load("no-such-model")
    loading._has_hub.cache_clear()
    assert not caplog.records


def test_shared_tokenizer(tokenizer, tmp_path: Path) -> None:
    presets = ["tiny-teacher", "tiny-student"]
    first = shared_tokenizer(presets, tmp_path / "trained", TEXTS, 300)
    assert first.get_vocab() == tokenizer.get_vocab()
    kept = shared_tokenizer(presets, tmp_path / "trained", ["other texts"], 270)
    assert kept.get_vocab() == first.get_vocab(), "the tokenizer of a resumed run must not change"
    train_tokenizer(["ganz andere Wörter"] * 5, 290).save_pretrained(tmp_path / "other")
    paths = [str(tmp_path / "trained"), str(tmp_path / "other")]
    assert shared_tokenizer(["tiny-teacher", paths[0]], tmp_path, [], 0).get_vocab() == first.get_vocab()
    with pytest.raises(ValueError, match="student and teacher must share one tokenizer"):
        shared_tokenizer(paths, tmp_path, [], 0)


def test_content_is_that_of_the_files(folder: Path) -> None:
    before = model_content(folder)
    (folder / "README.md").write_text("Mine.")
    (folder / ".hidden").write_text("")
    assert model_content(folder) == before and model_content("tiny-student") == "tiny-student"
    change(folder / "config.json", rms_norm_eps=1e-5)
    assert model_content(folder) != before


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def load_body(folder: str | Path) -> Any:
    return load_pretrained(AutoModel, str(folder))


def without(folder: Path, part: str, replacement: torch.Tensor | None = None) -> Path:
    """The model in ``folder`` without the tensors of that name, or with another in their place."""
    (file,) = folder.glob("*model.safetensors")
    tensors = {name: replacement if part in name else value for name, value in load_file(file).items()}
    save_file({n: v for n, v in tensors.items() if v is not None}, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("part", "replacement", "message"),
    [
        ("layers.1", None, r"9 missing \(model.layers.1.input_layernorm.weight, .*, \.\.\.\)"),
        ("embed_tokens", None, r"2 missing \(lm_head.weight, model.embed_tokens.weight"),
        ("model.norm", torch.ones(3), r"1 of another shape \(model.norm.weight: \(3,\), not \(64,\)\)"),
    ],
    ids=["missing", "tied", "shape"],
)
def test_files_that_lack_tensors_are_refused(folder: Path, tokenizer, part: str, replacement, message: str) -> None:
    with pytest.raises(ValueError, match=f"must hold every tensor of LlamaForCausalLM: {message}"):
        load_model(without(folder, part, replacement), tokenizer, 0)


EVIL = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tokenizer
"""


def test_code_beside_a_model_is_an_error(folder: Path, tokenizer) -> None:
    (folder / "evil.py").write_text(EVIL)
    sound_config = (folder / "config.json").read_text()
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoModel": "evil.Model"}
    change(folder / "config.json", auto_map=code, model_type="evil")
    for load in (lambda name: load_model(name, tokenizer, 0), load_body):
        with pytest.raises(ValueError, match="custom code"):
            load(folder)
    model_content(folder)
    (folder / "config.json").write_text(sound_config)
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
    asked: list[str] = []

    def fetch(name: str, *args: object, **options: object) -> None:
        asked.append(name)
        raise ValueError("fetched")

    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", fetch)
    for module in ("integrations.hub_kernels", "modeling_utils"):
        monkeypatch.setattr(f"transformers.{module}.is_kernels_available", lambda *_: True)
    return asked


@pytest.mark.parametrize("case", KERNELS)
def test_a_kernel_of_the_hub_is_an_error(folder: Path, tokenizer, fetched: list[str], case: str) -> None:
    change(folder / "config.json", **KERNELS[case])
    with pytest.raises(ValueError, match=r"its (attn|experts)_implementation is .*code from the hub"):
        load_model(folder, tokenizer, 0)
    assert not fetched
    if case in ("public", "alias", "package"):  # the caller's own choice counts
        model = load_model(folder, tokenizer, 0, attn_implementation="eager")
        assert model.config._attn_implementation == "eager" and not fetched
        with pytest.raises((ValueError, ImportError)):  # what was asked for
            load_model(folder, tokenizer, 0, attn_implementation="someone/kernel")
        assert fetched == ["someone/kernel"]


def test_an_installed_package_may_be_named(folder: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    change(folder / "config.json", attn_implementation="flash_attention_2")
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    with pytest.raises((ValueError, ImportError), match="FlashAttention2 has been toggled on"):  # from transformers
        load_model(folder, tokenizer, 0)


def test_the_check_changes_nothing_of_a_model(folder: Path, tokenizer) -> None:
    model = load_model(folder, tokenizer, 0, dtype=torch.bfloat16)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    checked = load_pretrained(AutoModelForCausalLM, str(folder), dtype="auto")
    assert checked.config.to_dict() == plain.config.to_dict() and checked.dtype == plain.dtype
    assert checked.generation_config.to_dict() == plain.generation_config.to_dict()
    assert all(torch.equal(a, b) for a, b in zip(checked.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '{"model_type": "llama", "hidden_size": "wide"}', ""])
def test_damaged_files_are_errors(folder: Path, tokenizer, text: str) -> None:
    weights, config = folder / "model.safetensors", (folder / "config.json").read_text()
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"model' gives no AutoTokenizer|model' gives no AutoModelForCausalLM"):
        load_model(folder, tokenizer, 0)
    (folder / "config.json").write_text(config)
    weights.write_bytes(weights.read_bytes()[:-1] if text else b"")
    with pytest.raises(ValueError, match=r"model' gives no AutoModelForCausalLM: its files are damaged"):
        load_model(folder, tokenizer, 0)


def adapt(model: Any, folder: Path, task_type: str | None = None) -> Any:
    """The model with adapters that change it, which are saved in the folder."""
    pytest.importorskip("peft")
    made = with_adapters(model, LoRA(r=2, dropout=0.0), task_type)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    made.save_pretrained(folder)
    return made.eval()


@pytest.fixture
def adapters(folder: Path) -> Path:
    adapt(load_body(folder), folder.with_name("adapters"))
    return folder.with_name("adapters")


BAD_ADAPTERS: dict[str, tuple[dict[str, Any] | str, str]] = {
    "module": ({"megatron_config": {"x": 1}, "megatron_core": "adapters.evil"}, "'adapters.evil' and megatron_config"),
    "module alone": ({"megatron_core": "adapters.evil"}, "neither may be set"),
    "kind": ({"peft_type": "PROMPT_TUNING"}, "peft_type must be 'LORA', got 'PROMPT_TUNING'"),
    "empty": ("", "must be JSON"),
    "list": ("[]", r"must be a JSON object, got \[\]"),
    "deep": ("[" * 100_000, "must be JSON"),
    "bytes": ("\xff", "must be JSON"),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_bad_adapter_configs(folder: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    content, message = BAD_ADAPTERS[case]
    (adapters / "evil.py").write_text(EVIL)
    if isinstance(content, str):
        (adapters / "adapter_config.json").write_text(content, encoding="latin-1")
    else:
        change(adapters / "adapter_config.json", **content)
    monkeypatch.syspath_prepend(str(folder.parent))
    body = load_body(folder)
    loaders: tuple[Callable[[], object], ...] = (
        lambda: load_adapters(body, adapters),
        lambda: load_body(adapters),
        lambda: load_body(shutil.copytree(folder, adapters, dirs_exist_ok=True)),  # a model with adapters beside
    )
    for load in loaders:
        with pytest.raises(ValueError, match=f"adapter_config.json of .*{message}"):
            load()
    assert not (adapters / "ran").exists()


def test_adapters_that_are_not_whole(folder: Path, adapters: Path) -> None:
    body = load_body(folder)
    with pytest.raises(ValueError, match=r"is no folder and no hub name at hand with an adapter_config\.json"):
        load_adapters(body, folder)
    without(adapters, "layers.1")
    with pytest.raises(ValueError, match=r"the adapters of .* must be whole: Found missing adapter keys.*layers.1"):
        load_adapters(body, adapters)


def test_the_base_of_adapters_is_checked(folder: Path, adapters: Path, fetched: list[str]) -> None:
    assert type(load_body(adapters)).__name__ == "LlamaModel"
    change(folder / "config.json", **KERNELS["alias"])
    with pytest.raises(ValueError, match="its attn_implementation is 'someone/kernel'"):
        load_body(adapters)
    assert not fetched
    change(adapters / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ValueError, match="must name a model as base_model_name_or_path, got None"):
        load_body(adapters)


def test_merging_adapters(folder: Path, tmp_path: Path, tokenizer) -> None:
    made = adapt(load_model(folder, tokenizer, 0), tmp_path / "adapters", "CAUSAL_LM")
    base = load_model(folder, tokenizer, 0)
    ids = torch.arange(3, 9)[None]
    merge(load_model(folder, tokenizer, 0, dtype=torch.bfloat16), tmp_path / "adapters", tokenizer, tmp_path / "half")
    merge(base, tmp_path / "adapters", tokenizer, tmp_path / "whole")
    merged = load_model(tmp_path / "whole", load_tokenizer(tmp_path / "whole"), 0)
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, made(ids).logits, atol=1e-5)
    assert load_model(tmp_path / "half", tokenizer, 0).dtype == torch.bfloat16
    assert fault_of(tmp_path / "whole") is None and not (tmp_path / "whole.partial").exists()
