"""The stacked model: what is trained and what is not, losses against plain computations, resuming, its two folders."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

import fused_kd as fk  # noqa: E402
from fused_kd.training.lora import LoRA  # noqa: E402
from fused_kd.training.mt_llm.adaptation import Adaptation, fit_projection, unexplained, variance_of  # noqa: E402
from fused_kd.training.mt_llm.fitting import TRAINED, Fit, ModuleTrainer, Pad, Rows, fit  # noqa: E402
from fused_kd.training.mt_llm.stacked import (  # noqa: E402
    Embedder,
    StackedModel,
    load_body,
    load_encoder,
    load_trained,
    mean_pool,
    save_activation_memory,
    save_trained,
)
from fused_kd.training.mt_llm.task import Classifier, TaskDistillation  # noqa: E402

MT_VOCAB, LLM_VOCAB, PAD_ID, CLASSES = 41, 53, 1, 3
PAD = Pad({"text": PAD_ID, "llm": PAD_ID})
LINEAR = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
ADAPTED = {f"llm.base_model.model.layers.0.{m}.lora_{x}.default.weight" for m in LINEAR for x in "AB"}
TRAINABLE = {"projection.weight", "projection.bias"} | ADAPTED


def seq2seq(seed: int = 0) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    return transformers.M2M100ForConditionalGeneration(
        transformers.M2M100Config(
            vocab_size=MT_VOCAB, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, dropout=0.3, encoder_layerdrop=0.0,
            decoder_layerdrop=0.0, init_std=0.3, max_position_embeddings=64, pad_token_id=PAD_ID,
        )
    )  # fmt: skip


def llama(seed: int = 1) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=LLM_VOCAB, hidden_size=20, intermediate_size=28, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.3, pad_token_id=PAD_ID,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def stacked(bidirectional: bool = False, dropout: float = 0.0) -> StackedModel:
    """With adapters that do something."""
    body = llama().model
    model = StackedModel(seq2seq().get_encoder(), body, LoRA(r=2, dropout=dropout), bidirectional=bidirectional)
    torch.manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


def sentences(count: int, seed: int = 0) -> list[dict[str, object]]:
    """The same number of tokens on both sides is a coincidence here."""
    rng = np.random.default_rng(seed)
    return [
        {
            "text_ids": rng.integers(3, MT_VOCAB, rng.integers(2, 9)).tolist(),
            "llm_ids": rng.integers(3, LLM_VOCAB, rng.integers(2, 9)).tolist(),
        }
        for _ in range(count)
    ]


def labelled(count: int) -> Rows:
    rows = sentences(count)
    torch.manual_seed(3)
    return Rows(
        [{"text_ids": r["text_ids"], "labels": i % CLASSES, "states": torch.randn(20)} for i, r in enumerate(rows)]
    )


def head() -> torch.Tensor:
    return torch.randn(CLASSES, 20, generator=torch.Generator().manual_seed(4))


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def trainable(module: torch.nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


def test_what_each_stage_trains_by_name() -> None:
    assert trainable(Adaptation(stacked(), 1.0)) == {f"stacked.{name}" for name in TRAINABLE}
    body = llama().model
    everything = {f"embedder.body.{name}" for name, _ in body.named_parameters()}
    assert trainable(Classifier(Embedder(body), CLASSES)) == everything | {"head.weight"}
    assert trainable(TaskDistillation(stacked(), head())) == {f"embedder.{name}" for name in TRAINABLE}
    frozen = Classifier(Embedder(seq2seq().get_encoder(), frozen=True), CLASSES).train()
    assert trainable(frozen) == {"head.weight"} and not frozen.embedder.body.training and frozen.head.training


@pytest.mark.parametrize("bidirectional", [False, True])
def test_adapters_off_is_the_plain_llm(bidirectional: bool) -> None:
    model, plain = stacked(bidirectional, dropout=0.5).train(), Embedder(llama().model, bidirectional).eval()
    batch = PAD(sentences(5))
    with torch.no_grad():
        expected = plain(batch["llm_ids"], batch["llm_mask"])
        states = llama().model(input_ids=batch["llm_ids"], attention_mask=batch["llm_mask"]).last_hidden_state
    own = model.plain(batch["llm_ids"], batch["llm_mask"])
    assert torch.equal(own, expected) and not own.requires_grad
    assert torch.allclose(own, mean_pool(states, batch["llm_mask"]), atol=1e-5) == (not bidirectional)
    assert model.llm.training and not model.encoder.training, "modes are as they were"
    with torch.no_grad():
        adapted = model.llm(input_ids=batch["llm_ids"], attention_mask=batch["llm_mask"]).last_hidden_state
    assert not torch.allclose(mean_pool(adapted, batch["llm_mask"]), expected, atol=1e-2), "adapters are on again"


@pytest.mark.parametrize("bidirectional", [False, True])
def test_pooling_ignores_padding(bidirectional: bool) -> None:
    model, rows = stacked(bidirectional).eval(), sentences(6)
    batch = PAD(rows)
    assert len({len(row["text_ids"]) for row in rows}) > 1
    with torch.no_grad():
        padded = {"text": model(batch["text_ids"], batch["text_mask"])}
        padded["llm"] = model.plain(batch["llm_ids"], batch["llm_mask"])
        for index, row in enumerate(rows):
            for name, function in (("text", model), ("llm", model.plain)):
                ids = torch.tensor([row[f"{name}_ids"]])
                alone = function(ids, torch.ones_like(ids))[0]
                torch.testing.assert_close(alone, padded[name][index], atol=1e-5, rtol=1e-5)
    states = torch.randn(2, 3, 4)
    pooled = mean_pool(states, torch.tensor([[1, 1, 0], [1, 1, 1]]))
    np.testing.assert_allclose(pooled[0], states[0, :2].numpy().mean(0), rtol=1e-6)
    np.testing.assert_allclose(pooled[1], states[1].numpy().mean(0), rtol=1e-6, atol=1e-7)


def test_bidirectional_attention_is_eager_and_sdpa_alike_and_others_are_refused() -> None:
    batch, made = PAD(sentences(4)), []
    for kind in ("sdpa", "eager"):
        body = llama().model.eval()
        body.set_attn_implementation(kind)
        with torch.no_grad():
            made.append(Embedder(body, bidirectional=True)(batch["llm_ids"], batch["llm_mask"]))
    torch.testing.assert_close(*made, atol=1e-5, rtol=1e-5)
    body.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="bidirectional needs attn_implementation 'sdpa' or 'eager', got 'flash"):
        Embedder(body, bidirectional=True)


def test_mse_and_fvu_are_numpys() -> None:
    model, batch = stacked().eval(), PAD(sentences(7))
    out = {name: value.detach() for name, value in Adaptation(model, 2.5)(**batch).items()}
    with torch.no_grad():
        ours = model(batch["text_ids"], batch["text_mask"]).numpy().astype(np.float64)
    target = model.plain(batch["llm_ids"], batch["llm_mask"]).numpy().astype(np.float64)
    mse = np.mean((ours - target) ** 2)
    assert float(out["loss"]) == pytest.approx(mse, rel=1e-5) == float(out["mse"])
    assert float(out["fvu"]) == pytest.approx(mse / 2.5, rel=1e-5)
    variance = np.mean(np.var(target, axis=0))
    assert variance_of(torch.from_numpy(target)) == pytest.approx(variance)
    found = unexplained(torch.from_numpy(ours), torch.from_numpy(target))
    assert found["fvu"] == pytest.approx(mse / variance) and found["mse"] == pytest.approx(mse)
    # the mean of the targets explains nothing
    nothing = np.broadcast_to(target.mean(0), target.shape).copy()
    assert unexplained(torch.from_numpy(nothing), torch.from_numpy(target))["fvu"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="variance must be above 0"):
        Adaptation(model, 0.0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["adaptation", "distillation"])
def test_the_projection_gets_gradients_and_the_encoder_none(stage: str, checkpointing: bool) -> None:
    model = stacked()
    if checkpointing:
        save_activation_memory(model)
    if stage == "adaptation":
        module, batch = Adaptation(model, 1.0).train(), PAD(sentences(4))
    else:
        module, batch = TaskDistillation(model, head(), objective=fk.SelfEvolution()).train(), PAD(labelled(4).rows)
    module(**batch)["loss"].backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.abs().sum() > 0)) == (name in TRAINABLE), name
    if stage == "distillation":
        assert module.head.weight.grad is None


@pytest.mark.parametrize("stage", ["adaptation", "distillation"])
def test_only_projection_and_adapters_move(tmp_path: Path, stage: str) -> None:
    model = stacked(dropout=0.1)
    module = Adaptation(model, 1.0) if stage == "adaptation" else TaskDistillation(model, head())
    rows = Rows(sentences(16)) if stage == "adaptation" else labelled(16)
    before, losses = snapshot(model), [module.eval()(**PAD(rows.rows))["loss"].item()]
    record = fit(module, rows, PAD, Fit(1e-2, steps=10, batch=8), tmp_path)
    after, losses = snapshot(model), [*losses, module.eval()(**PAD(rows.rows))["loss"].item()]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == TRAINABLE
    assert record["trainable"] == sum(before[name].numel() for name in TRAINABLE) and record["steps"] == 10
    assert losses[1] < 0.9 * losses[0]
    for entry in record["log_history"]:
        assert entry["mse"] == pytest.approx(entry["loss"], abs=1e-3)
    if stage == "distillation":
        assert torch.equal(module.head.weight, head())


def test_least_squares_projection_is_numpys_optimum() -> None:
    model, rows = stacked(), Rows(sentences(40))
    xs, ys = [], []
    embeddings = model.llm.get_input_embeddings().weight.detach().double().numpy()
    for row in rows.rows:
        ids = torch.tensor([row["text_ids"]])
        xs.append(model.encode(ids, torch.ones_like(ids))[0].double().mean(0).numpy())
        ys.append(embeddings[row["llm_ids"]].mean(0))
    x, y = np.c_[np.array(xs), np.ones(40)], np.array(ys)
    # the encoder ends in a layer norm: its features add up to 0, but for float32's rounding
    assert np.linalg.svd(x, compute_uv=False)[-1] < 1e-5
    solution, *_ = np.linalg.lstsq(x, y, rcond=1e-6)
    found = fit_projection(model, rows, PAD, batch_size=7)
    optimum = np.mean((x @ solution - y) ** 2)
    assert found["mse_after"] == pytest.approx(optimum, rel=1e-6) and found["mse_after"] < 0.5 * found["mse_before"]
    np.testing.assert_allclose(model.projection.weight.detach().T, solution[:-1], atol=1e-4)
    np.testing.assert_allclose(model.projection.bias.detach(), solution[-1], atol=1e-4)


def test_stage_3_copies_the_head_and_its_losses_are_plain_torch() -> None:
    model, given = stacked().eval(), head()
    batch = PAD(labelled(6).rows)
    plain = TaskDistillation(model, given)
    assert torch.equal(plain.head.weight, given) and plain.head.bias is None and not plain.head.weight.requires_grad
    given_copy = given.clone()
    given.zero_()
    assert torch.equal(plain.head.weight, given_copy), "a copy, not a view"
    given.copy_(given_copy)
    with torch.no_grad():
        student = model(batch["text_ids"], batch["text_mask"]).double()
    teacher, labels = batch["states"].double(), batch["labels"]
    mse = ((student - teacher) ** 2).mean()
    assert float(plain(**batch)["loss"]) == pytest.approx(float(mse), rel=1e-5)
    q, p = ((states @ given.double().T).log_softmax(1) for states in (student, teacher))
    kl = (p.exp() * (p - q)).sum(1).mean()
    both = TaskDistillation(model, given, mse_weight=0.3, objective=fk.ForwardKD(lam=1.0), kd_weight=2.0)
    out = both(**batch)
    assert float(out["loss"]) == pytest.approx(float(0.3 * mse + 2.0 * kl), rel=1e-5)
    assert float(out["kd"]) == pytest.approx(float(kl), rel=1e-5)
    # Self-Evolution: the target mixed with the label, and where the student is far from it, the student mixed in
    target = 0.5 * torch.nn.functional.one_hot(labels, CLASSES) + 0.5 * p.exp()
    far = (target * (target.log() - q)).sum(1)
    mixed = (target * (target / (0.5 * q.exp() + 0.5 * target)).log()).sum(1)
    expected = torch.where(far > 0.4, mixed, far).mean()
    evolved = TaskDistillation(model, given, mse_weight=0.0, objective=fk.SelfEvolution())
    assert float(evolved(**batch)["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert bool((far > 0.4).any())


def test_a_classifier_trains_on_cross_entropy() -> None:
    model, batch = Classifier(Embedder(llama().model), CLASSES).eval(), PAD(sentences(5))
    labels = torch.tensor([0, 2, 1, 0, 1])
    loss = model(batch["llm_ids"], batch["llm_mask"], labels)["loss"]
    logits = model.logits(batch["llm_ids"], batch["llm_mask"])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels))
    assert model.head.bias is None and model.head.weight.shape == (CLASSES, 20)


@pytest.mark.parametrize("stage", ["adaptation", "distillation"])
def test_a_killed_training_ends_with_the_same_weights(tmp_path: Path, monkeypatch, stage: str) -> None:
    def run(folder: Path) -> dict[str, torch.Tensor]:
        model = stacked(dropout=0.2)  # random numbers go on where they were
        module = Adaptation(model, 1.0) if stage == "adaptation" else TaskDistillation(model, head())
        rows = Rows(sentences(20)) if stage == "adaptation" else labelled(20)
        fit(module, rows, PAD, Fit(1e-2, epochs=3, batch=8, micro_batch=4, warmup=0.2), folder, seed=5)
        return snapshot(model)

    whole = run(tmp_path / "whole")
    steps, step = [], ModuleTrainer.training_step

    def dying(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 12:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ModuleTrainer, "training_step", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    last = sorted((tmp_path / "cut" / "checkpoints").glob("checkpoint-*"))[-1]
    saved = {name for name, _ in _tensors(last / TRAINED)}
    assert {name.split(".", 1)[1] for name in saved if name != "head.weight"} == TRAINABLE, "nothing frozen is saved"
    assert not list(last.glob("model*.safetensors"))
    resumed = run(tmp_path / "cut")
    assert steps[12] > 3, "the second run begins in the second epoch"
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert (tmp_path / "cut" / TRAINED).read_bytes() == (tmp_path / "whole" / TRAINED).read_bytes()
    done = len(steps)
    again = run(tmp_path / "cut")
    assert len(steps) == done and all(torch.equal(again[name], whole[name]) for name in whole), "loaded, not trained"


def _tensors(file: Path) -> list[tuple[str, torch.Tensor]]:
    from safetensors.torch import load_file

    return list(load_file(file).items())


def test_saved_and_loaded_from_the_folders_of_both_models(tmp_path: Path) -> None:
    """The loading code of full-size models, on random ones; adapters of the LLM are merged first."""
    seq2seq().save_pretrained(tmp_path / "mt")
    llama().save_pretrained(tmp_path / "llm")
    extra = peft.get_peft_model(llama().model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, p in extra.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5)
    extra.save_pretrained(tmp_path / "adapter")
    encoder = load_encoder(str(tmp_path / "mt"))
    assert torch.equal(encoder.embed_tokens.weight, seq2seq().get_encoder().embed_tokens.weight)
    body = load_body(str(tmp_path / "llm"), adapters=[str(tmp_path / "adapter")]).eval()
    batch = PAD(sentences(3))
    with torch.no_grad():
        merged = Embedder(body)(batch["llm_ids"], batch["llm_mask"])
        expected = Embedder(extra.eval())(batch["llm_ids"], batch["llm_mask"])
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)
    assert not any("lora" in name for name, _ in body.named_parameters())

    model = StackedModel(
        encoder, load_body(str(tmp_path / "llm")), LoRA(r=3, target_modules=("q_proj",)), seed=7
    ).eval()
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    model.save(tmp_path / "stacked", str(tmp_path / "mt"), str(tmp_path / "llm"))
    loaded = StackedModel.load(tmp_path / "stacked").eval()
    with torch.no_grad():
        ours, theirs = (each(batch["text_ids"], batch["text_mask"]) for each in (model, loaded))
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"is of another model: .*lora"):
        load_trained(stacked(), tmp_path / "stacked" / "stacked.safetensors")
    with pytest.raises(ValueError, match=r"'./no-model' is no folder and no hub name at hand that gives AutoModel"):
        load_body("./no-model")


def test_a_seed_makes_the_fresh_parts_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    parts = [seq2seq().get_encoder(), llama().model]
    torch.random.set_rng_state(state)
    models = [StackedModel(*copy.deepcopy(parts), LoRA(r=2), seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(models[0].projection.weight, models[1].projection.weight)
    assert not torch.equal(models[0].projection.weight, models[2].projection.weight)
    fresh = models[0].eval()
    batch = PAD(sentences(2))
    with torch.no_grad():
        plain = fresh.llm(input_ids=batch["llm_ids"], attention_mask=batch["llm_mask"]).last_hidden_state
    torch.testing.assert_close(mean_pool(plain, batch["llm_mask"]), fresh.plain(batch["llm_ids"], batch["llm_mask"]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fit(1e-3), "give steps or epochs, got steps=None, epochs=None"),
        (lambda: Fit(1e-3, steps=1, epochs=1.0), "give steps or epochs"),
        (lambda: Fit(0.0, steps=1), "learning_rate must be above 0"),
        (lambda: Fit(1e-3, steps=1, batch=10, micro_batch=4), "batch must be a multiple of micro_batch=4, got 10"),
        (lambda: Fit(1e-3, steps=1, warmup=1.0), r"warmup must be in \[0, 1\)"),
        (
            lambda: TaskDistillation(stacked(), torch.zeros(3, 19)),
            r"head must have shape \(classes, 20\), got \(3, 19\)",
        ),
        (lambda: TaskDistillation(stacked(), head(), mse_weight=0.0), "something to learn"),
        (lambda: TaskDistillation(stacked(), head(), mse_weight=-1.0), "mse_weight=-1.0"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_file_of_other_tensors_is_refused(tmp_path: Path) -> None:
    save_trained(Classifier(Embedder(llama().model), CLASSES), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors differ \(head.weight\)"):
        load_trained(Classifier(Embedder(llama().model), CLASSES + 1), tmp_path / "a.safetensors")
