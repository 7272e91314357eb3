"""The LMHead read from a model, written out, equals the model's own logits."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

transformers = pytest.importorskip("transformers")

from fused_kd.integrations.transformers import (  # noqa: E402
    check_head_module,
    check_lm_head,
    hidden_states,
    lm_head_of,
    logit_options,
    route_head_loss,
    rows_of,
)

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
GPT2_SIZES = {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama-tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**SIZES),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, final_logit_softcapping=0.5),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, final_logit_softcapping=0.5),
    "cohere": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.0625),
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


def tiny(name: str) -> transformers.PreTrainedModel:
    if name == "hyperclovax" and not hasattr(transformers, "HyperCLOVAXConfig"):
        pytest.skip("this transformers has no HyperCLOVAX")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():  # initial biases and norms are 0 and 1, which would hide a missing one
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def written_out(head) -> torch.Tensor:
    logits = head.hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@pytest.mark.parametrize("name", CONFIGS)
def test_head_gives_the_models_logits(name: str) -> None:
    model = tiny(name)
    with torch.no_grad():
        expected = model(**batch()).logits
        actual = written_out(lm_head_of(model, hidden_states(model, **batch())))
    assert expected.std() > 0.01
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    check_lm_head(model)


def test_options_are_used() -> None:
    assert lm_head_of(tiny("gemma2"), torch.zeros(1, 16)).softcap == 0.5
    assert lm_head_of(tiny("cohere"), torch.zeros(1, 16)).logit_scale == 0.0625
    assert lm_head_of(tiny("granite"), torch.zeros(1, 16)).logit_scale == 0.125
    phi = tiny("phi")
    assert lm_head_of(phi, torch.zeros(1, 16)).bias is phi.lm_head.bias
    tied = tiny("llama-tied")
    assert lm_head_of(tied, torch.zeros(1, 16)).weight is tied.get_input_embeddings().weight


def test_no_logits_are_computed() -> None:
    model = tiny("llama")

    def refuse(*_: object) -> None:
        raise AssertionError("the head ran")

    model.lm_head.register_forward_hook(refuse)
    hidden = hidden_states(model, **batch())
    assert hidden.shape == (2, 7, 16) and hidden.requires_grad


def test_unknown_multiplier_is_found() -> None:
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


def test_unused_config_field_is_found() -> None:
    # MPT has the field but its code does not apply it
    config = transformers.MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=61, logit_scale=0.5)
    with pytest.raises(ValueError, match="differs from"):
        check_lm_head(transformers.MptForCausalLM(config))


def test_text_config_of_a_multimodal_model() -> None:
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**SIZES, final_logit_softcapping=3.0).to_dict()
    )
    assert logit_options(config) == (1.0, 3.0)


def test_bad_multiplier() -> None:
    config = transformers.MptConfig(logit_scale="inv_sqrt_d_model")
    with pytest.raises(ValueError, match="logit_scale must be a positive number, got 'inv_sqrt_d_model'"):
        logit_options(config)


def test_quantised_head() -> None:
    model = tiny("llama")
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(61, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"float weight.*int8"):
        lm_head_of(model, torch.zeros(1, 16))


def test_head_with_an_adapter() -> None:
    model = tiny("llama")
    model.lm_head.lora_A = torch.nn.Linear(16, 2, bias=False)
    with pytest.raises(TypeError, match=r"plain linear map, it also has lora_A\.weight"):
        lm_head_of(model, torch.zeros(1, 16))


def test_models_that_do_not_fit() -> None:
    headless = transformers.AutoModel.from_config(CONFIGS["llama"]())
    with pytest.raises(ValueError, match="must have an output head"):
        lm_head_of(headless, torch.zeros(1, 16))
    with pytest.raises(TypeError, match="no body apart from its head"):
        hidden_states(headless, **batch())
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=61, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="encoder-decoder"):
        hidden_states(t5, **batch())
    with pytest.raises(ValueError, match="labels must not be passed"):
        hidden_states(tiny("llama"), **batch(), labels=batch()["input_ids"])


@pytest.mark.parametrize("name", CONFIGS)
def test_routed_head_gives_the_models_logits(name: str) -> None:
    model = tiny(name)
    with torch.no_grad():
        expected = model(**batch()).logits
        route_head_loss(model)
        routed = model(**batch(), head_loss=lambda head: {"logits": written_out(head)})["logits"]
        torch.testing.assert_close(routed, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(**batch()).logits, expected), "other calls stay as they are"
    check_lm_head(model)


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
    model = tiny("llama")
    before, expected = inspect.signature(model.forward), model.generate(**batch(), max_new_tokens=3, do_sample=False)
    route_head_loss(model)
    assert inspect.signature(model.forward) == before
    assert torch.equal(model.generate(**batch(), max_new_tokens=3, do_sample=False), expected)
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
