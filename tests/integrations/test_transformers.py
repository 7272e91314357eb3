"""The LMHead read from a model, written out, equals the model's own logits."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

transformers = pytest.importorskip("transformers")

import fused_kd as fk  # noqa: E402
from fused_kd.integrations.transformers import (  # noqa: E402
    check_head_module,
    check_lm_head,
    common_vocab_size,
    hidden_states,
    labels_need_shift,
    lm_head_of,
    logit_options,
    route_head_loss,
    rows_of,
)
from fused_kd.reference import reference_kd_loss  # noqa: E402

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BART_SIZES = {
    "vocab_size": 61,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "max_position_embeddings": 32,
}
T5_SIZES = {
    "vocab_size": 61,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
GPT2_SIZES = {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama-tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**SIZES),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, final_logit_softcapping=0.5),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, final_logit_softcapping=0.5),
    "recurrent-gemma": lambda: transformers.RecurrentGemmaConfig(
        **{**SIZES, "num_hidden_layers": 3}, logits_soft_cap=0.5
    ),
    "cohere": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.0625),
    "cohere2": lambda: transformers.Cohere2Config(**SIZES, logit_scale=0.25),
    "granite": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=8.0),
    "hyperclovax": lambda: transformers.HyperCLOVAXConfig(**SIZES, logits_scaling=8.0),
    "gpt2": lambda: transformers.GPT2Config(**GPT2_SIZES),
    "phi": lambda: transformers.PhiConfig(**SIZES),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=61,
        hidden_size=16,
        word_embed_proj_dim=8,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    ),
}


def gemma3_with_images() -> transformers.PreTrainedModel:
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**SIZES).to_dict(),
        vision_config={**vision, "image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=59,
        eoi_token_index=58,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def t5_with_a_head_of_its_own() -> transformers.PreTrainedModel:
    """T5 v1.1 and Flan-T5: checkpoints with a head of their own and no scale."""
    config = transformers.T5Config(**T5_SIZES, tie_word_embeddings=False, feed_forward_proj="gated-gelu")
    model = transformers.T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


SEQ2SEQ_CONFIGS = {
    "t5": lambda: transformers.T5Config(**T5_SIZES),
    "mt5": lambda: transformers.MT5Config(**T5_SIZES),
    "umt5": lambda: transformers.UMT5Config(**T5_SIZES),
    "m2m100": lambda: transformers.M2M100Config(**BART_SIZES),  # NLLB too
    "bart": lambda: transformers.BartConfig(**BART_SIZES),
    "mbart": lambda: transformers.MBartConfig(**BART_SIZES),
    "marian": lambda: transformers.MarianConfig(**BART_SIZES),
    "pegasus": lambda: transformers.PegasusConfig(**BART_SIZES),
    "t5gemma": lambda: transformers.T5GemmaConfig(
        encoder=transformers.T5GemmaModuleConfig(**SIZES).to_dict(),
        decoder=transformers.T5GemmaModuleConfig(**SIZES, final_logit_softcapping=0.5).to_dict(),
        vocab_size=61,
    ),
}
BUILT = {"gemma3-multimodal": gemma3_with_images, "t5-untied": t5_with_a_head_of_its_own}
ENCODER_DECODERS = [*SEQ2SEQ_CONFIGS, "t5-untied"]
NAMES = [*CONFIGS, *SEQ2SEQ_CONFIGS, *BUILT]


def tiny(name: str) -> transformers.PreTrainedModel:
    if name == "hyperclovax" and not hasattr(transformers, "HyperCLOVAXConfig"):
        pytest.skip("this transformers has no HyperCLOVAX")
    if name == "t5gemma" and not hasattr(transformers, "T5GemmaModuleConfig"):
        pytest.skip("this transformers has no T5Gemma")
    torch.manual_seed(0)
    if name in BUILT:
        model = BUILT[name]()
    elif name in CONFIGS:
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    else:
        model = transformers.AutoModelForSeq2SeqLM.from_config(SEQ2SEQ_CONFIGS[name]())
    with torch.no_grad():  # initial biases and norms are 0 and 1, which would hide a missing one
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model.eval()


def batch(name: str = "llama") -> dict[str, torch.Tensor]:
    """With labels for an encoder-decoder, whose decoder's inputs are made from them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 57, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    # T5Gemma's decoder masks padding only where it fills no cache, as in training
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if name in ENCODER_DECODERS:
        labels = torch.randint(3, 61, (2, 5), generator=generator)
        labels[1, 3:] = -100
        inputs["labels"] = labels
    return inputs


def written_out(head) -> torch.Tensor:
    logits = head.hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    error = (actual - expected).norm() / expected.norm()
    assert error <= tolerance, f"relative difference {error:.2e}"


@pytest.mark.parametrize("name", NAMES)
def test_head_gives_the_models_logits_and_gradients(name: str) -> None:
    """Forward against the model's own logits, by hand and routed; gradients against autograd of the oracle on them."""
    model, inputs, shift = tiny(name), batch(name), name not in ENCODER_DECODERS
    assert labels_need_shift(model) == shift
    labels = inputs.get("labels")
    if labels is None:
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    teacher = torch.randn(*labels.shape, 61) * 2
    parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}

    logits = model(**inputs).logits
    difficulty = reference_kd_loss(logits, teacher, labels, fk.NoEvo(), shift=shift).difficulty
    objective = fk.SelfEvolution(gamma=difficulty[difficulty > 0].quantile(0.5, interpolation="midpoint").item())
    expected = reference_kd_loss(logits, teacher, labels, objective, shift=shift)
    truth = torch.autograd.grad(expected.loss, list(parameters.values()), allow_unused=True)
    assert 0 < expected.is_hard.sum() < (labels != -100).sum(), "both branches must be taken"

    head = lm_head_of(model, hidden_states(model, **inputs))
    assert logits.std() > 0.01
    assert_near(written_out(head), logits, 1e-5)
    loss = fk.KDLoss(objective, shift=shift)(head, teacher, labels)
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    assert abs(loss.item() - expected.loss.item()) <= 1e-5 * expected.loss.item()
    assert [grad is None for grad in grads] == [grad is None for grad in truth]
    pairs = [(grad, real) for grad, real in zip(grads, truth, strict=True) if grad is not None]
    assert_near(*(torch.cat([grad.flatten() for grad in side]) for side in zip(*pairs, strict=True)), 1e-5)
    index = next(i for i, value in enumerate(parameters.values()) if value is check_head_module(model).weight)
    assert truth[index].norm() > 0
    assert_near(grads[index], truth[index], 1e-5)

    check_lm_head(model)
    route_head_loss(model)
    with torch.no_grad():
        routed = model(**inputs, head_loss=lambda head: {"logits": written_out(head)})["logits"]
        assert_near(routed, logits, 1e-5)
    assert torch.equal(model(**inputs).logits, logits), "other calls stay as they are"
    check_lm_head(model)


ZEROS = torch.zeros(1, 16)


def test_options_are_used() -> None:
    assert lm_head_of(tiny("gemma2"), ZEROS).softcap == 0.5
    scales = {"cohere": 0.0625, "granite": 0.125, "t5": 0.25, "t5-untied": 1.0, "mt5": 1.0}
    assert {name: lm_head_of(tiny(name), ZEROS).logit_scale for name in scales} == scales
    phi, tied = tiny("phi"), tiny("llama-tied")
    assert lm_head_of(phi, ZEROS).bias is phi.lm_head.bias
    assert lm_head_of(tied, ZEROS).weight is tied.get_input_embeddings().weight
    text = transformers.Gemma3TextConfig(**SIZES, final_logit_softcapping=3.0).to_dict()
    assert logit_options(transformers.Gemma3Config(text_config=text)) == (1.0, 3.0)
    with pytest.raises(ValueError, match="logit_scale must be a positive number, got 'inv_sqrt_d_model'"):
        logit_options(transformers.MptConfig(logit_scale="inv_sqrt_d_model"))


def test_what_a_model_does_to_its_logits_beside_is_found() -> None:
    class Shouting(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.5
            return out

    torch.manual_seed(0)
    model = Shouting(CONFIGS["llama"]())
    with pytest.raises(ValueError, match="does more to its logits"):
        check_lm_head(model)
    assert model.training, "the mode must be restored"
    # MPT has the field but its code does not apply it
    config = transformers.MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=61, logit_scale=0.5)
    with pytest.raises(ValueError, match="differs from"):
        check_lm_head(transformers.MptForCausalLM(config))
    wrong = tiny("mt5")
    wrong.config.scale_decoder_outputs = True
    with pytest.raises(ValueError, match=r"does more to its logits than weight, bias, scale 0.25"):
        check_lm_head(wrong)


def test_models_that_do_not_fit() -> None:
    headless = transformers.AutoModel.from_config(CONFIGS["llama"]())
    with pytest.raises(ValueError, match="must have an output head"):
        lm_head_of(headless, ZEROS)
    with pytest.raises(TypeError, match="no body apart from its head"):
        hidden_states(headless, **batch())
    with pytest.raises(ValueError, match="decoder_input_ids or decoder_inputs_embeds must be given for BartFor"):
        hidden_states(tiny("bart"), **batch())
    startless = tiny("m2m100")
    startless.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match=r"config.decoder_start_token_id of M2M100.* must be a token id.*got None"):
        hidden_states(startless, **batch("m2m100"))
    with pytest.raises(TypeError, match="must be a linear map with a weight"):
        broken = tiny("llama")
        broken.lm_head = torch.nn.Identity()
        check_head_module(broken)
    with pytest.raises(ValueError, match="labels must not be passed"):
        hidden_states(tiny("llama"), **batch(), labels=batch()["input_ids"])
    adapted = tiny("llama")
    adapted.lm_head.lora_A = torch.nn.Linear(16, 2, bias=False)
    with pytest.raises(TypeError, match=r"plain linear map, it also has lora_A\.weight"):
        lm_head_of(adapted, ZEROS)
    adapted.lm_head.weight = torch.nn.Parameter(torch.zeros(61, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"float weight.*int8"):
        lm_head_of(adapted, ZEROS)


def test_decoder_inputs() -> None:
    """Ids and embeddings given for the decoder are used as they are, and an encoder that has run is not run again."""
    for name in ("t5", "bart"):
        model, inputs = tiny(name), batch(name)
        labels = inputs.pop("labels")
        given = {**inputs, "decoder_input_ids": labels.clamp(min=0), "decoder_attention_mask": (labels > 0).long()}
        expected = model(**given).logits
        assert_near(written_out(lm_head_of(model, hidden_states(model, **given, labels=labels))), expected, 1e-5)
        del given["use_cache"], inputs["use_cache"]
        encoded = model.get_encoder()(**inputs, return_dict=True)
        given["decoder_inputs_embeds"] = model.get_decoder().embed_tokens(given.pop("decoder_input_ids"))
        mask = given["attention_mask"]
        rest = {key: value for key, value in given.items() if key.startswith("decoder")}
        model.get_encoder().forward = None
        states = hidden_states(model, encoder_outputs=encoded, attention_mask=mask, **rest)
        assert_near(written_out(lm_head_of(model, states)), expected, 1e-5)


def test_final_bias_in_half_precision() -> None:
    """BART's buffer keeps its digits beside half-precision heads (as under FSDP2), and takes no gradient."""
    model, inputs = tiny("bart"), batch("bart")
    model.to(torch.bfloat16)
    model.final_logits_bias = model.final_logits_bias.float()
    head = lm_head_of(model, hidden_states(model, **inputs))
    assert head.bias.dtype == torch.float32 and head.bias.shape == (61,) and not head.bias.requires_grad
    teacher = torch.randn(2, 5, 61)
    loss = fk.KDLoss(fk.NoEvo())(head, teacher, inputs["labels"])
    expected = reference_kd_loss(head, teacher, inputs["labels"], fk.NoEvo()).loss
    assert abs(loss.item() - expected.item()) <= 1e-3 * expected.item()
    loss.backward()


def test_cap_is_found_where_the_logits_are_small() -> None:
    """An untrained model's logits are far from a cap, which must be found all the same."""
    config = CONFIGS["gemma2"]()
    config.final_logit_softcapping = 30.0
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config)
    logits = model(**batch()).logits
    assert logits.abs().max() < 2
    check_lm_head(model)

    class Renamed(transformers.Gemma2ForCausalLM):
        def forward(self, *args, **kwargs):
            out = transformers.LlamaForCausalLM.forward(self, *args, **kwargs)
            out.logits = 30 * torch.tanh(out.logits / 30)
            return out

    config.final_logit_softcapping = None
    model.__class__ = Renamed
    with pytest.raises(ValueError, match="does more to its logits"):
        check_lm_head(model)


def test_unequal_vocabularies_of_one_tokenizer() -> None:
    class Tokenizer:
        def __len__(self) -> int:
            return 60

    class Processor:
        tokenizer = Tokenizer()

    padded = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "vocab_size": 64}))
    for given in (Tokenizer(), Processor()):
        assert common_vocab_size(tiny("llama"), padded, None, given) == 60
    with pytest.raises(ValueError, match="vocabularies of 61 and 64: give vocab_size"):
        common_vocab_size(tiny("llama"), padded, None, None)


def test_route_runs_inside_the_calls_of_model_and_head() -> None:
    """Where hooks gather sharded weights, and where a wrapper looks for the graph."""
    model = tiny("llama-tied")
    route_head_loss(model)
    calls: list[str] = []
    for name, module in (("model", model), ("body", model.model), ("head", model.lm_head)):
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(f"{name} in"))
        module.register_forward_hook(lambda *_, name=name: calls.append(f"{name} out"))

    def loss(head):
        calls.append("loss")
        assert head.weight is model.get_input_embeddings().weight
        return {"loss": written_out(head).logsumexp(-1).sum()}

    model(**batch(), head_loss=loss)["loss"].backward()
    assert calls == ["model in", "body in", "body out", "head in", "loss", "head out", "model out"]
    routed = model.lm_head.weight.grad.clone()
    model.zero_grad()
    model(**batch()).logits.logsumexp(-1).sum().backward()
    assert (routed - model.lm_head.weight.grad).norm() / model.lm_head.weight.grad.norm() <= 1e-6


def test_route_nests_and_leaves_nothing_behind() -> None:
    outer, inner = tiny("llama"), tiny("gpt2")
    for model in (outer, inner, outer):  # twice is as good as once
        route_head_loss(model)
    seen = []

    def loss(teacher):
        def inside(student):
            seen.append((written_out(teacher), written_out(student)))
            return {"sum": student.hidden.sum()}

        with torch.enable_grad():
            seen.append(inner(**batch(), head_loss=inside)["sum"].requires_grad)
        return {}

    with torch.no_grad():
        assert outer(**batch(), head_loss=loss) == {}
        torch.testing.assert_close(seen[0][0], outer(**batch()).logits)
    torch.testing.assert_close(seen[0][1], inner(**batch()).logits)
    assert seen[1] is True

    def fail(head):
        raise RuntimeError("in the loss")

    with pytest.raises(RuntimeError, match="in the loss"):
        outer(**batch(), head_loss=fail)
    assert "forward" not in outer.lm_head.__dict__
    with pytest.raises(ValueError, match="labels must not be passed"):
        outer(**batch(), labels=batch()["input_ids"], head_loss=loss)


def test_route_keeps_signature_generation_and_copies() -> None:
    model, inputs = tiny("llama"), batch()
    before, expected = inspect.signature(model.forward), model.generate(**inputs, max_new_tokens=3, do_sample=False)
    route_head_loss(model)
    assert inspect.signature(model.forward) == before
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), expected)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
        logits = twin(**batch(), head_loss=lambda head: {"logits": written_out(head)})["logits"]
    assert logits.abs().max() == 0, "a copy must call its own head"


def test_structure_is_checked_without_weights() -> None:
    model = tiny("llama")
    weight = model.lm_head.weight
    assert check_head_module(model) is model.lm_head and rows_of(weight) == 61
    partitioned = torch.nn.Parameter(torch.empty(0))  # ZeRO-3's placeholder
    partitioned.ds_shape = weight.shape
    assert rows_of(partitioned) == 61
    assert check_head_module(model.to("meta")) is model.lm_head
