"""Presets, loading by path, and the shared tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from fused_kd.training.data import misalign
from fused_kd.training.data import Pair
from fused_kd.training.models import PRESETS, load_model, load_tokenizer, shared_tokenizer, train_tokenizer
from fused_kd.training.presets import BOS, EOS, PAD
from fused_kd.training.runs import Run
from fused_kd.training.stage import read_json, write_json
from fused_kd.integrations.sampling import LengthGroupedEpochs
from fused_kd.training.specs import parse_objective

TEXTS = [
    "Der alte Mann geht über die Straße.",
    "The old man walks across the street.",
    "Größe, Übung, naïve – 5 €",
] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def test_tokenizer_keeps_every_text(tokenizer) -> None:
    for text in [*TEXTS, "日本語 😀", "a\nb"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == (PAD, BOS, EOS)
    assert 259 < len(tokenizer) <= 300
    assert len(tokenizer("Der alte Mann geht")["input_ids"]) < len("Der alte Mann geht")


def test_a_word_has_one_spelling(tokenizer) -> None:
    first = tokenizer("Mann", add_special_tokens=False)["input_ids"]
    within = tokenizer("Der Mann", add_special_tokens=False)["input_ids"]
    assert within[-len(first) :] == first


def test_tokenizer_is_deterministic_and_saved(tokenizer, tmp_path: Path) -> None:
    assert train_tokenizer(iter(TEXTS), 300).get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded(TEXTS[0])["input_ids"] == tokenizer(TEXTS[0])["input_ids"]
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    with pytest.raises(ValueError, match=r"vocab_size must be at least 260.*got 100"):
        train_tokenizer(TEXTS, 100)


@pytest.mark.parametrize("name", PRESETS)
def test_preset(tokenizer, name: str) -> None:
    model = load_model(name, tokenizer, seed=3)
    preset = PRESETS[name]
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.hidden_size == preset.hidden_size and len(model.model.layers) == preset.layers
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_teachers_are_larger(tokenizer) -> None:
    for size in ("tiny", "small"):
        teacher, student = (load_model(f"{size}-{role}", tokenizer, 0) for role in ("teacher", "student"))
        assert teacher.num_parameters() > 2 * student.num_parameters()


def test_seed_decides_the_weights(tokenizer) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (load_model("tiny-student", tokenizer, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator must be left alone"


def test_load_from_folder(tokenizer, tmp_path: Path) -> None:
    model = load_model("tiny-student", tokenizer, 1)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"neither a preset.*nor a folder or hub name"):
        load_model(tmp_path, tokenizer, 0)  # no tokenizer beside it
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, tokenizer, 0)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert load_model(tmp_path, tokenizer, 0, dtype=torch.bfloat16).dtype == torch.bfloat16
    other = train_tokenizer(["ganz andere Wörter, other words"] * 5, 290)
    with pytest.raises(ValueError, match="student and teacher must share one tokenizer"):
        load_model(tmp_path, other, 0)
    larger = load_tokenizer(tmp_path)
    larger.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=r"differs from the other model's in 1 tokens \('<new>'\)"):
        load_model(tmp_path, larger, 0)
    larger.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="fewer than the"):
        load_model(tmp_path, larger, 0)


def test_unknown_name(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"'./no-such-model' is neither a preset \(tiny-teacher, tiny-student"):
        load_model("./no-such-model", tokenizer, 0)


def test_parse_objective() -> None:
    spec = parse_objective("self_evolution:gamma=0.3,beta=0.7,beta_warmup=0.25")
    assert repr(spec.objective) == "SelfEvolution(lam=0.5, beta=0.7, gamma=0.3)"
    assert spec.beta_schedule is not None
    assert (spec.beta_schedule.start, spec.beta_schedule.end, spec.beta_schedule.fraction) == (
        1.0,
        None,
        0.25,
    )
    assert spec.slug == "self_evolution-gamma=0.3-beta=0.7-beta_warmup=0.25"
    assert parse_objective("sft").beta_schedule is None


@pytest.mark.parametrize(
    "text,message",
    [
        ("evolution", "objective must be one of sft, forward_kd, .*got 'evolution'"),
        ("forward_kd:beta=0.5", "expected key=value once for each of lam, got 'beta=0.5'"),
        ("sft:lam=0.5", "for each of no key, got 'lam=0.5'"),
        ("no_evo:lam", "got 'lam'"),
        ("no_evo:lam=0.1,lam=0.2", "once for each"),
        ("no_evo:lam=half", "lam must be a number, got 'half'"),
        ("skew:beta=1.5", r"beta must be in \[0, 1\], got 1.5"),
        ("skew:beta_warmup=2", r"fraction must be in \(0, 1\], got 2.0"),
    ],
)
def test_bad_objectives(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_objective(text)


def test_length_grouped_epochs() -> None:
    lengths = [(7 * i) % 50 + 1 for i in range(403)]
    sampler = LengthGroupedEpochs(lengths, 8, seed=5)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == list(range(403)) == sorted(orders[1])
    batches = [[lengths[i] for i in orders[1][start : start + 8]] for start in range(0, 400, 8)]
    spread = sum(max(batch) - min(batch) for batch in batches) / len(batches)
    assert spread < 8, "a random batch of 8 spreads about 39"
    longest = [max(batch) for batch in batches]
    assert longest != sorted(longest, reverse=True), "batches must come in random order"
    assert list(LengthGroupedEpochs(lengths, 8, seed=6)) != orders[0]


def test_run_refuses_other_arguments(tmp_path: Path) -> None:
    Run(tmp_path / "run", {"lr": 0.1, "objective": ["sft"], "limit": None})
    Run(tmp_path / "run", {"lr": 0.1, "objective": ["sft"], "limit": None})
    with pytest.raises(ValueError, match=r"made with other arguments \(limit: None -> 5; lr: 0.1 -> 0.2\)"):
        Run(tmp_path / "run", {"lr": 0.2, "objective": ["sft"], "limit": 5})


def test_run_refuses_another_content(tmp_path: Path) -> None:
    Run(tmp_path, {}).bind(data="one", teacher="two")
    run = Run(tmp_path, {})
    run.bind(data="one", student="three")
    with pytest.raises(ValueError, match="was made with another teacher: its content is four now, it was two"):
        run.bind(teacher="four")


@pytest.mark.parametrize("name", ["..", ".", "", "a/../../b", "/tmp"])
def test_stages_stay_within_their_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="names no folder within output="):
        Run(tmp_path, {}).stage(name)


def test_json_survives_a_kill(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "value.json", {"x": "ü"})
    assert read_json(tmp_path / "a" / "value.json") == {"x": "ü"} and read_json(tmp_path / "none.json") is None
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["value.json"]
    for text in ("", '{"x', "[" * 100_000, "1" * 5000):
        (tmp_path / "torn.json").write_text(text)
        with pytest.warns(UserWarning, match="torn.json is damaged and taken as missing"):
            assert read_json(tmp_path / "torn.json") is None


def test_misalign() -> None:
    pairs = [Pair(f"s{i}", f"t{i}") for i in range(100)]
    mixed = misalign(pairs, 0.3, seed=4)
    assert [pair.source for pair in mixed] == [pair.source for pair in pairs]
    assert sorted(pair.target for pair in mixed) == sorted(pair.target for pair in pairs)
    assert sum(new != old for new, old in zip(mixed, pairs, strict=True)) == 30
    assert misalign(pairs, 0.3, seed=4) == mixed != misalign(pairs, 0.3, seed=5)
    assert misalign(pairs, 0.0) == pairs == misalign(pairs, 0.01)
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], got 1.2"):
        misalign(pairs, 1.2)


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


def without(folder: Path, change) -> Path:
    """The model in ``folder`` after a change of its tensors."""
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*model.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def drop(part: str):
    def change(tensors: dict) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def reshape(tensors: dict) -> None:
    tensors["model.norm.weight"] = torch.ones(3)


@pytest.mark.parametrize(
    "change, message",
    [
        (drop("layers.1"), r"9 missing \(model.layers.1.input_layernorm.weight, .*, \.\.\.\)"),
        (drop("embed_tokens"), r"2 missing \(lm_head.weight, model.embed_tokens.weight"),
        (reshape, r"1 of another shape \(model.norm.weight: \(3,\), not \(64,\)\)"),
    ],
    ids=["missing", "tied", "shape"],
)
def test_files_that_lack_tensors_are_refused(tmp_path: Path, tokenizer, change, message: str) -> None:
    load_model("tiny-student", tokenizer, 0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    load_model(tmp_path, tokenizer, 0)
    with pytest.raises(ValueError, match=f"must hold every tensor of LlamaForCausalLM: {message}"):
        load_model(without(tmp_path, change), tokenizer, 0)


def test_code_of_a_folder_is_not_run(tmp_path: Path, tokenizer) -> None:
    load_model("tiny-student", tokenizer, 0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(
        tmp_path / "config.json",
        {**config, "model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}},
    )
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(tmp_path, tokenizer, 0)
    assert not (tmp_path / "ran").exists()


def test_adapters_that_lack_tensors_are_refused(tmp_path: Path, tokenizer) -> None:
    pytest.importorskip("peft")
    from fused_kd.training.models import LoRA, load_adapters, with_adapters

    with_adapters(load_model("tiny-student", tokenizer, 0), LoRA(), "CAUSAL_LM").save_pretrained(tmp_path)
    load_adapters(load_model("tiny-student", tokenizer, 0), tmp_path)
    without(tmp_path, drop("layers.1"))
    with pytest.raises(ValueError, match=r"the adapters of .* must be whole: Found missing adapter keys.*layers.1"):
        load_adapters(load_model("tiny-student", tokenizer, 0), tmp_path)
