"""examples/mt_llm: what is trained and what is not, losses against plain computations, the task, kills and resumes."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
for library in ("accelerate", "peft", "sacrebleu", "matplotlib", "pandas", "rich"):
    pytest.importorskip(library)
import peft  # noqa: E402

import fused_kd as fk  # noqa: E402
from fused_kd.training import LoRA, ModuleTrainer, Stages, parse  # noqa: E402
from fused_kd.training.models import train_tokenizer  # noqa: E402
from fused_kd.training.stage import tell  # noqa: E402

FOLDER = Path(__file__).parents[2] / "examples" / "mt_llm"
sys.path.insert(0, str(FOLDER))
import captions as tasks  # noqa: E402
import mt_llm  # noqa: E402
import mt_llm_report  # noqa: E402
import stacked  # noqa: E402

MT_VOCAB, LLM_VOCAB, PAD_ID, CLASSES = 41, 53, 1, 3
PAD = stacked.Pad({"text": PAD_ID, "llm": PAD_ID})
LINEAR = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
ADAPTED = {f"llm.base_model.model.layers.0.{m}.lora_{x}.default.weight" for m in LINEAR for x in "AB"}
TRAINABLE = {"projection.weight", "projection.bias"} | ADAPTED
TINY_MT = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
    "max_position_embeddings": 64, "init_std": 0.3, "dropout": 0.3,
}  # fmt: skip


def seq2seq() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.M2M100Config(vocab_size=MT_VOCAB, pad_token_id=PAD_ID, **TINY_MT)
    return transformers.M2M100ForConditionalGeneration(config)


def llama() -> transformers.PreTrainedModel:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=LLM_VOCAB, hidden_size=20, intermediate_size=28, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.3, pad_token_id=PAD_ID,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def small(bidirectional: bool = False, dropout: float = 0.0) -> stacked.StackedModel:
    """With adapters that do something."""
    lora = LoRA(r=2, dropout=dropout)
    model = stacked.StackedModel(seq2seq().get_encoder(), llama().model, lora, bidirectional=bidirectional)
    torch.manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


def sentences(count: int) -> list[dict[str, list[int]]]:
    """The same number of tokens on both sides is a coincidence here."""
    rng = np.random.default_rng(0)
    vocab = {"text_ids": MT_VOCAB, "llm_ids": LLM_VOCAB}
    return [{name: rng.integers(3, v, rng.integers(2, 9)).tolist() for name, v in vocab.items()} for _ in range(count)]


def labelled(count: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    rows = sentences(count)
    return PAD([{"text_ids": r["text_ids"], "labels": i % 3, "states": torch.randn(20)} for i, r in enumerate(rows)])


def head() -> torch.Tensor:
    return torch.randn(CLASSES, 20, generator=torch.Generator().manual_seed(4))


def trainable(module: torch.nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_each_stage_trains(checkpointing: bool) -> None:
    for stage in ("adaptation", "distillation"):
        model = small()
        if checkpointing:
            model.checkpoint_activations()
        module, batch = (stacked.Adaptation(model, 1.0), PAD(sentences(4)))
        if stage == "distillation":
            module, batch = stacked.TaskDistillation(model, head(), objective=fk.SelfEvolution()), labelled(4)
        assert {name.split(".", 1)[1] for name in trainable(module)} == TRAINABLE
        module.train()(**batch)["loss"].backward()
        for name, p in model.named_parameters():
            assert (p.grad is not None and bool(p.grad.abs().sum() > 0)) == (name in TRAINABLE), name
    body = llama().model
    everything = {f"embedder.body.{name}" for name, _ in body.named_parameters()}
    assert trainable(stacked.Classifier(stacked.Embedder(body), CLASSES)) == everything | {"head.weight"}
    frozen = stacked.Classifier(stacked.Embedder(seq2seq().get_encoder(), frozen=True), CLASSES).train()
    assert trainable(frozen) == {"head.weight"} and not frozen.embedder.body.training and frozen.head.training


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_plain_llm_and_pooling_without_padding(bidirectional: bool) -> None:
    model, plain = small(bidirectional, dropout=0.5).train(), stacked.Embedder(llama().model, bidirectional).eval()
    batch = PAD(sentences(6))
    ids, mask = batch["llm_ids"], batch["llm_mask"]
    own = model.plain(ids, mask)
    assert model.llm.training and not model.encoder.body.training, "modes are as they were"
    with torch.no_grad():
        expected = plain(ids, mask)
        one_way = stacked.mean_pool(llama().model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
        adapted = stacked.mean_pool(model.llm(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
    assert torch.equal(own, expected) and not own.requires_grad
    assert torch.allclose(own, one_way, atol=1e-5) == (not bidirectional)
    assert not torch.allclose(adapted, expected, atol=1e-2), "adapters are on again"
    for name, function in (("text", model.eval()), ("llm", model.plain)):
        ids, mask = batch[f"{name}_ids"], batch[f"{name}_mask"]
        assert not mask.all()
        with torch.no_grad():
            alone = [function(ids[i : i + 1, :n], mask[i : i + 1, :n]) for i, n in enumerate(mask.sum(1))]
            torch.testing.assert_close(torch.cat(alone), function(ids, mask), atol=1e-5, rtol=1e-5)
    states = torch.randn(2, 3, 4)
    pooled = stacked.mean_pool(states, torch.tensor([[1, 1, 0], [1, 1, 1]]))
    torch.testing.assert_close(pooled, torch.stack([states[0, :2].mean(0), states[1].mean(0)]))
    if bidirectional:
        plain.body.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="bidirectional needs attn_implementation 'sdpa', got 'flash"):
            plain(ids, mask)


def test_mse_and_fvu_are_numpys() -> None:
    model, batch = small().eval(), PAD(sentences(7))
    out = {name: value.detach() for name, value in stacked.Adaptation(model, 2.5)(**batch).items()}
    ours = model(batch["text_ids"], batch["text_mask"]).detach().double()
    target = model.plain(batch["llm_ids"], batch["llm_mask"]).double()
    mse, variance = np.mean((ours.numpy() - target.numpy()) ** 2), np.mean(np.var(target.numpy(), axis=0))
    assert float(out["loss"]) == pytest.approx(mse, rel=1e-5) == float(out["mse"])
    assert float(out["fvu"]) == pytest.approx(mse / 2.5, rel=1e-5)
    assert stacked.variance_of(target) == pytest.approx(variance)
    assert stacked.unexplained(ours, target) == pytest.approx({"mse": mse, "fvu": mse / variance})
    with pytest.raises(ValueError, match="variance must be above 0"):
        stacked.Adaptation(model, 0.0)


def test_least_squares_projection_is_numpys_optimum() -> None:
    model, rows = small(), sentences(40)
    table = model.llm.get_input_embeddings().weight.detach().double()
    alone = [(torch.tensor([row["text_ids"]]), torch.ones(1, len(row["text_ids"]), dtype=torch.int64)) for row in rows]
    x = torch.stack([model.encode(*one)[0].double().mean(0) for one in alone]).numpy()
    x, y = np.c_[x, np.ones(40)], torch.stack([table[row["llm_ids"]].mean(0) for row in rows]).numpy()
    # the encoder ends in a layer norm: its features add up to 0, but for float32's rounding
    assert np.linalg.svd(x, compute_uv=False)[-1] < 1e-5
    solution, *_ = np.linalg.lstsq(x, y, rcond=1e-6)
    found = stacked.fit_projection(model, [PAD(rows[start : start + 7]) for start in range(0, 40, 7)])
    optimum = np.mean((x @ solution - y) ** 2)
    assert found["mse_after"] == pytest.approx(optimum, rel=1e-6) and found["mse_after"] < 0.5 * found["mse_before"]
    np.testing.assert_allclose(model.projection.weight.detach().T, solution[:-1], atol=1e-4)
    np.testing.assert_allclose(model.projection.bias.detach(), solution[-1], atol=1e-4)


def test_losses_of_stages_2_and_3_are_plain_torchs() -> None:
    model, given, batch = small().eval(), head(), labelled(6)
    plain = stacked.TaskDistillation(model, given)
    given.zero_()
    given.copy_(head())
    assert torch.equal(plain.head.weight, given) and plain.head.bias is None, "a copy, not a view"
    student = model(batch["text_ids"], batch["text_mask"]).detach().double()
    teacher, labels = batch["states"].double(), batch["labels"]
    mse = float(((student - teacher) ** 2).mean())
    assert plain(**batch)["loss"].item() == pytest.approx(mse, rel=1e-5)
    q, p = ((states @ given.double().T).log_softmax(1) for states in (student, teacher))
    kl = float((p.exp() * (p - q)).sum(1).mean())
    out = stacked.TaskDistillation(model, given, 0.3, fk.ForwardKD(lam=1.0), kd_weight=2.0)(**batch)
    assert out["loss"].item() == pytest.approx(0.3 * mse + 2.0 * kl, rel=1e-5)
    assert float(out["kd"]) == pytest.approx(kl, rel=1e-5)
    # Self-Evolution: the target mixed with the label, and where the student is far from it, the student mixed in
    target = 0.5 * torch.nn.functional.one_hot(labels, CLASSES) + 0.5 * p.exp()
    far = (target * (target.log() - q)).sum(1)
    mixed = (target * (target / (0.5 * q.exp() + 0.5 * target)).log()).sum(1)
    evolved = stacked.TaskDistillation(model, given, mse_weight=0.0, objective=fk.SelfEvolution())
    expected = float(torch.where(far > 0.4, mixed, far).mean())
    assert bool((far > 0.4).any()) and evolved(**batch)["loss"].item() == pytest.approx(expected, rel=1e-5)
    classifier, llm = stacked.Classifier(stacked.Embedder(llama().model), CLASSES).eval(), PAD(sentences(6))
    ids = (llm["llm_ids"], llm["llm_mask"])
    expected = torch.nn.functional.cross_entropy(classifier.logits(*ids), labels)
    torch.testing.assert_close(classifier(*ids, labels)["loss"], expected)
    assert classifier.head.bias is None


def test_saved_and_loaded_from_the_folders_of_both_models(tmp_path: Path) -> None:
    """The loading code of full-size models, on random ones; adapters of the LLM are merged first."""
    mt, llm, adapter = (str(tmp_path / name) for name in ("mt", "llm", "adapter"))
    seq2seq().save_pretrained(mt)
    llama().save_pretrained(llm)
    extra = peft.get_peft_model(llama().model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).eval()
    for name, p in extra.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5)
    extra.save_pretrained(adapter)
    body, batch = stacked.load_body(llm, adapters=[adapter]).eval(), PAD(sentences(3))
    with torch.no_grad():
        merged, expected = (stacked.Embedder(x)(batch["llm_ids"], batch["llm_mask"]) for x in (body, extra))
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)
    assert not any("lora" in name for name, _ in body.named_parameters())

    state = torch.random.get_rng_state()
    lora = LoRA(r=3, target_modules=("q_proj",))
    encoder, bodies = stacked.load_seq2seq(mt).get_encoder(), [stacked.load_body(llm) for _ in range(3)]
    assert torch.equal(encoder.embed_tokens.weight, seq2seq().get_encoder().embed_tokens.weight)
    torch.random.set_rng_state(state)
    fresh = [stacked.StackedModel(encoder, b, lora, seed=seed) for b, seed in zip(bodies, (7, 7, 8), strict=True)]
    assert torch.equal(torch.random.get_rng_state(), state), "a seed makes the fresh parts alone"
    weights = [each.projection.weight for each in fresh]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    model = fresh[0].eval()
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    model.save(tmp_path / "stacked", mt, llm)
    loaded = stacked.StackedModel.load(tmp_path / "stacked").eval()
    with torch.no_grad():
        ours, theirs = (each(batch["text_ids"], batch["text_mask"]) for each in (model, loaded))
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"is of another model: .*lora"):
        small().load_weights(tmp_path / "stacked")


LABELS = {
    "A man is sitting on a bench.": "male/still", "Two WOMEN run.": "female/moving", "A man eats.": None,
    "A woman stands; the lady waits.": "female/still", "A man and a woman sit.": None, "A dog runs.": None,
    "A man sits while running.": None, "A mandolin and a standing lamp.": None,
}  # fmt: skip
WHO = {"man": ("Mann", "muž"), "boy": ("Junge", "kluk"), "woman": ("Frau", "žena"), "girl": ("Mädchen", "dívka")}
WHAT = {"sits": ("sitzt", "sedí"), "stands": ("steht", "stojí"), "runs": ("rennt", "běží"), "jumps": ("hüpft", "skáče")}
WHERE = {"park": ("Park", "parku"), "street": ("Straße", "ulici"), "snow": ("Schnee", "sněhu")}


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of parallel captions with everyone, everything and every place, and some without a label."""
    folder = tmp_path_factory.mktemp("captions")
    made = [
        {"en": f"A {who} {what} near the {where}.", "de": f"{WHO[who][0]} {WHAT[what][0]} {WHERE[where][0]}.",
         "cs": f"{WHO[who][1]} {WHAT[what][1]} {WHERE[where][1]}."}
        for who, what, where in itertools.product(WHO, WHAT, WHERE)
    ]  # fmt: skip
    made += [{"en": f"A dog in the {where}.", "de": f"Hund {d}.", "cs": f"Pes {c}."} for where, (d, c) in WHERE.items()]
    made += made[:5]  # classes of unequal size
    for name, rows in (("train", made), ("test_2016_flickr", made[::2]), ("other", made[1::4])):
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_task_is_balanced_and_aligned(captions: Path, tmp_path: Path) -> None:
    assert {caption: tasks.label_of(caption) for caption in LABELS} == LABELS
    about = tasks.write_task(tmp_path, captions, ["de", "cs"], ["test_2016_flickr", "other"])
    train = lines(tmp_path / "train.jsonl")
    counts = {name: sum(row["label"] == name for row in train) for name in about["classes"]}
    assert set(counts.values()) == {12} and about["train_unbalanced"]["male/still"] > 12
    assert all(tasks.label_of(row["text"]) == row["label"] for row in train)
    source = [row for name in ("test_2016_flickr", "other") for row in lines(captions / f"{name}.jsonl")]
    held = [row for row in source if "dog" not in row["en"]]
    for name in ("en", "de", "cs"):
        expected = [{"text": row[name], "label": tasks.label_of(row["en"])} for row in held]
        assert lines(tmp_path / f"test.{name}.jsonl") == expected
    assert [row["text"] for row in lines(tmp_path / "text.jsonl")] == [r["en"] for r in lines(captions / "train.jsonl")]
    assert lines(tmp_path / "retrieval.jsonl") == lines(captions / "test_2016_flickr.jsonl")
    assert about["best_single_word"]["accuracy"] <= 0.5, "no word tells more than two classes apart"
    assert tasks.best_single_word(["a b", "a c", "d c"], ["x", "x", "y"]) == {"word": "a", "accuracy": 1.0}
    with pytest.raises(ValueError, match="expected a text in each of en, fr, none in fr"):
        tasks.write_task(tmp_path, captions, ["fr"], ["other"])
    with pytest.raises(ValueError, match="no caption of female/still, female/moving"):
        tasks.write_task(tmp_path, captions, ["de"], ["other"], limit=20)


def test_a_translators_text(captions: Path, tmp_path: Path) -> None:
    rows = [{"en": "a b c d e f", "de": "x y"}, {"en": "a", "de": "x"}]
    tokenizer = train_tokenizer([text for row in rows for text in row.values()], 300)
    whole, short = (tasks.mt_rows(tokenizer, rows, 0.0, 0, most) for most in (None, 4))
    # both sides count, EOS too
    assert len(whole) == 4 and all(max(map(len, row.values())) <= 4 for row in short) and len(short) == 2
    assert tasks.mt_rows(tokenizer, [], 0.0, 0) == []
    write_rows(tmp_path / "news.jsonl", [{"en": "Zebra.", "de": "Zebra!"}])
    flags = arguments(
        captions, "--mt_captions=0", f"--mt_text={{de: {tmp_path}/news.jsonl}}", "--train_mt={max_steps: 1}"
    )
    config, _ = parse((mt_llm.Config, mt_llm.Running), flags, configs=FOLDER)
    made = mt_llm.Recipe(config, Stages(tmp_path / "run")).mt
    assert json.loads((made / "training.json").read_text())["rows"] == 2, "German and English into English, no caption"


def test_runs_with_several_translators_become_a_table(tmp_path: Path) -> None:
    def scores(hits: dict[str, dict[str, str]]) -> dict:
        right = {
            name: np.mean([np.mean(list(map(int, text))) for text in made.values()]) for name, made in hits.items()
        }
        return {name: {"balanced": float(right[name]), "hits": made} for name, made in hits.items()}

    good, bad = {"a": "11", "b": "1"}, {"a": "10", "b": "0"}
    for seed, mine in (("0", good), ("1", bad)):
        made = {
            "MT-LLM, mse": scores({"en": good, "de": mine, "cs": mine}),
            "translate-test": scores({"de": bad, "cs": bad}),
        }
        tell(tmp_path / "pieces.jsonl", f"test {seed} task", made)
    tell(tmp_path / "pieces.jsonl", "bleu", {"de": 1.0, "cs": 2.0})
    found = mt_llm_report.main([f"news={tmp_path}", "--output", str(tmp_path / "report")])
    rows = {row["system"]: row for row in found["summary"]}
    assert rows["MT-LLM, mse"]["by_seed"] == {"0": 100.0, "1": 25.0} and rows["MT-LLM, mse"]["en"] == 100.0
    assert rows["translate-test"]["others"] == 25.0 and rows["translate-test"]["en"] is None
    apart = found["paired"]["news"]
    assert apart["by_seed"] == {"0": 75.0, "1": 0.0} and apart["difference"] == 37.5
    assert apart["low"] == 25.0 and apart["high"] == 50.0, "class b has one item, class a two"
    assert (tmp_path / "report" / "translators.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="expected NAME=RESULTS"):
        mt_llm_report.main(["news", "--output", str(tmp_path)])


def test_scores_and_the_order_of_embeddings() -> None:
    queries = torch.tensor([[2.0, 0.1], [0.1, 3.0], [1.0, 1.0]])
    candidates = torch.tensor([[9.0, 0.0], [0.0, 0.1], [-1.0, -1.0]])
    assert mt_llm.retrieval_at_1(queries, candidates) == pytest.approx(2 / 3)
    assert mt_llm.accuracies(["a", "a", "a", "b"], ["a", "a", "a", "c"]) == {
        "accuracy": 0.75, "balanced": 0.5, "hits": {"a": "111", "c": "0"},
    }  # fmt: skip
    texts = [[5, 6, 7], [8], [9, 4], [3, 3, 3, 3], [7]]
    found = stacked.embed(lambda ids, mask: (ids * mask).sum(1, keepdim=True), texts, pad_id=1, size=2)
    assert found[:, 0].tolist() == [sum(ids) for ids in texts]


class NLLBLike:
    """A tokenizer that names its languages, as NLLB's does."""

    src_lang = "eng_Latn"
    pad_token_id, unk_token_id = 1, 3

    def __call__(self, texts, truncation, max_length):
        first = self.convert_tokens_to_ids(self.src_lang)
        return {"input_ids": [[first, *[10 + len(word) for word in text.split()], 2][:max_length] for text in texts]}

    def convert_tokens_to_ids(self, token):
        return {"eng_Latn": 38, "deu_Latn": 39}.get(token, 3)

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(str(int(token)) for token in row) for row in rows]


def test_translation_is_told_both_languages_and_keeps_the_order() -> None:
    tokenizer, model, texts = NLLBLike(), seq2seq(), ["ein Haus", "a b c d e", "Hunde", "der die das"]
    ids = mt_llm.encode(tokenizer, texts, 8, "deu_Latn")
    assert ids[2] == [39, 15, 2]
    options = {"size": 2, "max_new_tokens": 5, "forced_bos_token_id": 38}
    made = mt_llm.translate(model.train(), tokenizer, ids, **options)
    alone = [mt_llm.translate(model, tokenizer, [text], **options)[0] for text in ids]
    assert made == alone and len(set(made)) > 1
    assert all(text.split()[1] == "38" for text in made), "the target language is forced"
    with pytest.raises(ValueError, match="needs a name of the language"):
        mt_llm.encode(tokenizer, texts, 8)
    with pytest.raises(ValueError, match="'xxx_Latn' is no language"):
        mt_llm.encode(tokenizer, texts, 8, "xxx_Latn")


STEPS = {"max_steps": 2, "per_device_train_batch_size": 16}
EPOCH = {"num_train_epochs": 1, "per_device_train_batch_size": 32}
NO_ARMS = ("mse-kl", "mse-self_evolution", "cross-entropy")


def arguments(captions: Path, *more: str) -> list[str]:
    options = {
        "data": str(captions), "tiny_mt": TINY_MT | {"dropout": 0.1}, "mt_vocab": 300, "llm_vocab": 300,
        "tiny_llm": "tiny-student", "train_mt": STEPS, "train_llm": {"num_train_epochs": 1}, "adapt": STEPS,
        "train_task": EPOCH, "distil": EPOCH, "lora": {"r": 2}, "translate": {"max_new_tokens": 3}, "seeds": 0,
        "arms": dict.fromkeys(NO_ARMS),
    }  # fmt: skip
    made = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]
    return ["--preset", "tiny", "--languages", "de", "cs", "--tests", "test_2016_flickr", *made, *more]


class Killed(BaseException):
    pass


def test_from_captions_to_figures_and_killed_everywhere(captions: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    command = arguments(captions, "--arms={mse-unadapted: null}")
    metrics = mt_llm.main([*command, "--output", str(tmp_path / "whole")])
    shown = capsys.readouterr().out
    assert "translate-test" in shown and "after stage 1" in shown and "chance 25.0" in shown
    saved = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert saved == json.loads(json.dumps(metrics))
    systems = {"LLM alone", "translate-test", "MT encoder, frozen", "MT encoder, tuned", "MT-LLM, mse"}
    assert set(saved["mean"]["accuracy"]) == systems
    for system, scores in saved["mean"]["accuracy"].items():
        assert set(scores) == ({"de", "cs"} if system == "translate-test" else {"en", "de", "cs"})
        assert scores["de"] == saved["seeds"]["0"]["accuracy"][system]["de"]["balanced"]
    assert set(saved["mean"]["retrieval"]) == {"before stage 1", "after stage 1", "LLM alone", "MT encoder alone"}
    seed = saved["seeds"]["0"]
    assert seed["adaptation"]["after"]["fvu"] < seed["adaptation"]["before"]["fvu"]
    assert {"mse", "fvu", "loss"} <= set(seed["training"]["adapt"]["log_history"][0])
    for name in ("adaptation", "accuracy", "retrieval"):
        assert (tmp_path / "whole" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not any(path.suffix in (".pkl", ".bin", ".pt") for path in (tmp_path / "whole").rglob("*"))

    # killed once in each training and once at the end of each stage
    begun, ended = set(), set()
    step, call = transformers.Trainer.training_step, Stages.__call__

    def dying_step(self, *args, **kwargs):
        if self.state.global_step == 1 and self.args.output_dir not in begun:
            begun.add(self.args.output_dir)
            raise Killed
        return step(self, *args, **kwargs)

    def dying_call(self, title, work, *args, **kwargs):
        def dying_work(out):
            work(out)
            if title not in ended:
                ended.add(title)
                raise Killed

        return call(self, title, dying_work, *args, **kwargs)

    monkeypatch.setattr(mt_llm, "report", lambda *_: None)
    monkeypatch.setattr(transformers.Trainer, "training_step", dying_step)
    monkeypatch.setattr(Stages, "__call__", dying_call)
    again = None
    while again is None:
        try:
            again = mt_llm.main([*command, "--output", str(tmp_path / "killed")])
        except Killed:
            assert len(begun) + len(ended) < 30
    assert len(begun) == 6 and len(ended) == 15, "the LLM takes a single step"
    assert again["mean"] == metrics["mean"] and again["seeds"]["0"]["adaptation"] == seed["adaptation"]
    whole, killed = (
        next(tmp_path.glob(f"{run}/distil-mse.s0-*/model/trained.safetensors")) for run in ("whole", "killed")
    )
    assert whole.read_bytes() == killed.read_bytes()

    def refuse(*_, **__):
        raise AssertionError("a finished stage ran again")

    monkeypatch.setattr(ModuleTrainer, "train", refuse)
    folders = {path.name for path in (tmp_path / "killed").iterdir()}
    assert mt_llm.main([*command, "--output", str(tmp_path / "killed")])["mean"] == metrics["mean"]
    assert {path.name for path in (tmp_path / "killed").iterdir()} == folders


class Planned(Stages):
    """Does nothing of the work: names of the stages alone."""

    def __call__(self, title, work, settings, **reads):
        self.names = {**getattr(self, "names", {}), title: super().__call__(title, lambda out: None, settings, **reads)}
        return self.names[title]


def test_a_change_makes_new_only_what_depends_on_it(captions: Path, tmp_path: Path) -> None:
    def names(*changes: str, stage: str = "evaluate", of: tuple = ()) -> dict[str, Path]:
        stages = Planned(tmp_path)
        config, _ = parse((mt_llm.Config, mt_llm.Running), arguments(captions, *changes), configs=FOLDER)
        getattr(mt_llm.Recipe(config, stages), stage)(*of, 0)
        return stages.names

    base = names()
    assert len(base) == 17
    distilled = {title for title in base if "distil-" in title} | {"evaluate.s0"}
    encoders = {title for title in base if "encoder-" in title}
    adapted = {"adapt.s0", *(title for title in distilled if "unadapted" not in title)}
    for change, touched in {
        "--distil={learning_rate: 0.5}": distilled,
        "--arms={mse: {mse_weight: 2}}": {"distil-mse.s0", "test-distil-mse.s0", "evaluate.s0"},
        "--adapt={max_steps: 4}": adapted,
        "--least_squares=9": adapted,
        "--train_task={num_train_epochs: 2}": {"task.s0", "test-task.s0", "states.s0", *distilled, *encoders},
        "--translate={max_new_tokens: 4}": {"translations", "test-task.s0", "evaluate.s0"},
        "--lora={r: 4}": {"adapt.s0", *distilled},
        "--train_llm={num_train_epochs: 2}": set(base) - {"task", "mt", "translations", *encoders},
        "--train_mt={max_steps: 4}": set(base) - {"task", "llm", "task.s0", "states.s0"},
        "--mt_captions=9": set(base) - {"task", "llm", "task.s0", "states.s0"},
        f"--mt_text={{de: {captions}/train.jsonl}}": set(base) - {"task", "llm", "task.s0", "states.s0"},
        "--tests=other": set(base) - {"mt", "llm"},
        "--eval_batch=7": set(),
    }.items():
        changed = names(change)
        assert {title for title in base if changed[title] != base[title]} == touched, change
    alone = names(stage="train_classifier", of=("task",))
    assert set(alone) == {"task", "llm", "task.s0"}, "the MT model may still be in training"
    more = tmp_path / "more"
    more.mkdir()
    for path in captions.iterdir():
        (more / path.name).write_text(path.read_text() + ("\n" if path.stem == "train" else ""))
    assert set(names(f"--data={more}").values()).isdisjoint(base.values()), "files count by content"


def test_models_by_folder_as_in_the_paper(captions: Path, tmp_path: Path) -> None:
    """Both models from folders, LoRA in stage 2, both directions of attention, a task's own files, no retrieval."""
    texts = [row["en"] for row in lines(captions / "train.jsonl")]
    tokenizer = train_tokenizer(texts, 270)
    for name, model in (("mt", seq2seq()), ("llm", llama())):
        model.resize_token_embeddings(len(tokenizer))
        model.generation_config.decoder_start_token_id = tokenizer.bos_token_id
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    task = tmp_path / "task"
    task.mkdir()
    for name in ("train", "test.en", "test.de"):
        write_rows(task / f"{name}.jsonl", [{"text": text, "label": len(text) % 2} for text in texts[:24]])
    write_rows(tmp_path / "english.jsonl", [{"text": text} for text in texts])
    small = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "bf16": False}
    command = [
        "--preset", "paper", "--output", str(tmp_path / "run"), "--languages", "de", "--seeds", "3", "--dtype=float32",
        *(f"--{name}={json.dumps(small)}" for name in ("adapt", "train_task", "distil")), "--llm_adapters",
        "--llm", str(tmp_path / "llm"), "--text", str(tmp_path / "english.jsonl"), "--text_limit=30", "--max_length=20",
        "--least_squares=12", "--translate={max_new_tokens: 3}", "--task", str(task), "--mt",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"(?s)not at hand:\ntask='/nowhere/train.jsonl': .*No such.*mt='./no-mt': "):
        mt_llm.main([*command, "./no-mt", "--task", "/nowhere"])
    command.append(str(tmp_path / "mt"))
    with pytest.raises(ValueError, match="has no names of languages"):
        mt_llm.main(command)
    metrics = mt_llm.main([*command, "--codes=null"])
    made = metrics["seeds"]["3"]
    assert made["adaptation"]["projection"]["mse_after"] < made["adaptation"]["projection"]["mse_before"]
    assert made["retrieval"] == {} and metrics["chance"] == 0.5 and metrics["task"] is None
    assert {"MT-LLM, mse", "MT-LLM, mse-kl"} < set(made["accuracy"])
    from safetensors.torch import load_file

    saved = load_file(next((tmp_path / "run").glob("task.s3-*")) / "model" / "trained.safetensors")
    assert all("lora_" in name or name == "head.weight" for name in saved), "stage 2 trained adapters"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--languages=en", "languages must be some, without the task's own 'en'"),
        ("--data=null", "data must name a folder"),
        ("--codes={en: eng_Latn}", "codes must name de, cs as well"),
        ("--llm_adapters=x", "llm_adapters are for an llm by name"),
        ("--arms={a: {objective: nonsense}}", "arms.a: objective must be one of"),
        ("--arms={a: {mse_weight: 0}}", "arms.a: expected weights of at least 0, and something to learn"),
        ("--lora={rank: 1}", "lora must be a mapping of r, .*'rank': 1"),
        ("--adapt={learning_rat: 1}", "adapt: .*'learning_rat'"),
        ("--seeds", "arms and seeds must be some"),
        ("--eval_batch=0", "eval_batch must be at least 1, got 0"),
        ("--mt_captions=-1", "mt_captions must be at least 0, got -1"),
        ("--mt_captions=0", "nothing to learn from"),
        ("--mt_text={fr: x}", "mt_text must be of de, cs, got 'fr'"),
        ("--mt_text={de: ./none.jsonl}", "mt_text.de='./none.jsonl': .*No such file"),
        ("--encoders=cold", "encoders must be some of frozen, tuned, or none, got 'cold'"),
        ("--data=./nowhere", r"data must be a folder with .*test_2016_flickr\), got './nowhere'"),
        (f"--data={__file__}", r"data must be a folder with .*test_mt_llm.py'"),
    ],
)
def test_bad_settings(captions: Path, tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mt_llm.main([*arguments(captions, change), "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists(), "before any work"


def test_the_papers_values() -> None:
    paper, _ = parse((mt_llm.Config, mt_llm.Running), ["--preset", "paper"], configs=FOLDER)
    assert paper.adapters == LoRA(r=16, alpha=32, dropout=0.05) and paper.max_length == 512 and paper.bidirectional
    step = paper.adapt["per_device_train_batch_size"] * paper.adapt["gradient_accumulation_steps"]
    assert (step, paper.adapt["max_steps"], paper.adapt["learning_rate"]) == (256, 10_000, 2e-4)
    assert paper.distil["learning_rate"] == 1e-4 and paper.ways["mse"] == mt_llm.Arm()
    for more in ([], ["--rehearse"]):
        gpu, _ = parse((mt_llm.Config, mt_llm.Running), ["--preset", "gpu", *more], configs=FOLDER)
        assert gpu.train_mt["bf16"] and gpu.distil["bf16"] and gpu.tests != ["val"]
