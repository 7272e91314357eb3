"""Batched generation against one-by-one generation, and scores against known values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from fused_kd.training.data import Pair
from fused_kd.training.generate import generate
from fused_kd.training.prompts import encode_prompts, get_prompt
from fused_kd.training.score import score, translate

from .byte_level import make_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = ["A dog sees the cat.", "Ein Hund sieht die Katze.", "The old man sleeps in the garden today."]
PROMPTS = ["A dog", "The old man sleeps in the", "Ein Hund sieht die Katze. A dog sees", "cat", "the garden"] * 2


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(TEXTS)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            attention_dropout=0.5,
            tie_word_embeddings=False,
        )
    )


def greedy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, ids: list[int], steps: int) -> str:
    """One prompt, no padding, no cache, no generate()."""
    model.eval()
    row, start = list(ids), len(ids)
    for _ in range(steps):
        with torch.no_grad():
            token = int(model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        row.append(token)
    return " ".join(str(tokenizer.decode(row[start:], skip_special_tokens=True)).split())


def test_batches_give_what_single_prompts_give(model, tokenizer) -> None:
    expected = [greedy(model, tokenizer, ids, 12) for ids in encode_prompts(tokenizer, PROMPTS)]
    assert len(set(expected)) == 5 and all(expected)
    made = generate(model, tokenizer, PROMPTS, batch_size=3, max_new_tokens=12, progress=False)
    assert made == expected
    ids = encode_prompts(tokenizer, PROMPTS)
    assert generate(model, tokenizer, ids, batch_size=32, max_new_tokens=12, progress=False) == expected


def test_generation_stops_at_eos(model, tokenizer) -> None:
    ids = encode_prompts(tokenizer, PROMPTS[:5])
    with torch.no_grad():
        model.eval()
        final = model.model(torch.tensor([ids[0]])).last_hidden_state[0, -1]
        # after this prompt EOS is the likeliest token by far
        model.lm_head.weight[tokenizer.eos_token_id] = final * 20
    expected = [greedy(model, tokenizer, row, 10) for row in ids]
    assert expected[0] == "" and any(expected)
    assert generate(model, tokenizer, ids, batch_size=5, max_new_tokens=10, progress=False) == expected


def test_settings_of_the_checkpoint_do_not_change_decoding(model, tokenizer) -> None:
    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=8, progress=False)
    own = type(model.generation_config)(
        repetition_penalty=50.0, do_sample=True, temperature=9.0, num_beams=3, max_length=5, eos_token_id=40
    )
    model.generation_config = own
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8, progress=False) == plain
    assert model.generation_config is own


def test_modes_are_restored(model, tokenizer) -> None:
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    generate(model, tokenizer, PROMPTS[:2], max_new_tokens=2, progress=False)
    assert [module.training for module in model.modules()] == before and model.training
    model.generate = None
    with pytest.raises(TypeError):
        generate(model, tokenizer, PROMPTS[:2], max_new_tokens=2, progress=False)
    assert [module.training for module in model.modules()] == before


def test_beam_search_in_batches_is_beam_search_alone(model, tokenizer) -> None:
    expected = []
    for ids in encode_prompts(tokenizer, PROMPTS[:5]):
        row = torch.tensor([ids])
        output = model.eval().generate(
            row, attention_mask=torch.ones_like(row), do_sample=False, num_beams=4, max_new_tokens=4,
            pad_token_id=0, eos_token_id=2,
        )  # fmt: skip
        text = tokenizer.decode(output[0, len(ids) :].tolist(), skip_special_tokens=True)
        expected.append(" ".join(str(text).split()))
    made = generate(model, tokenizer, PROMPTS[:5], max_new_tokens=4, num_beams=4, progress=False)
    assert made == expected
    assert made != generate(model, tokenizer, PROMPTS[:5], max_new_tokens=4, progress=False)


def best_continuation(model, ids: list[int], eos: int, penalty: float) -> list[int]:
    """Of all continuations of one token (EOS) or two, the one with the best log-probability / length ** penalty."""
    with torch.no_grad():
        first = model.eval()(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        rows = torch.tensor([[*ids, token] for token in range(len(first))])
        second = model(rows).logits[:, -1].log_softmax(-1)
    both = first[:, None] + second
    both[eos] = -torch.inf
    if first[eos] > both.max() / 2**penalty:
        return [eos]
    return list(divmod(int(both.argmax()), len(first)))


def test_beam_search_ranks_by_the_penalised_length(model, tokenizer) -> None:
    """As many beams as tokens leave out nothing, so the best of all continuations must win."""
    eos, prompts = tokenizer.eos_token_id, encode_prompts(tokenizer, PROMPTS[:5])
    with torch.no_grad():
        final = model.eval().model(torch.tensor([prompts[0]])).last_hidden_state[0, -1]
        model.lm_head.weight[eos] = final * 0.25
    empty = []
    for penalty in (-2.0, 1.0, 5.0):
        best = [best_continuation(model, ids, eos, penalty) for ids in prompts]
        expected = [" ".join(str(tokenizer.decode(ids, skip_special_tokens=True)).split()) for ids in best]
        options = {"max_new_tokens": 2, "num_beams": len(tokenizer), "length_penalty": penalty, "progress": False}
        assert generate(model, tokenizer, prompts, **options) == expected
        empty.append(best.count([eos]))
    assert empty[0] > empty[1] > empty[2]


def test_progress_bar_counts_sentences(model, tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    generate(model, tokenizer, PROMPTS[:3], batch_size=2, max_new_tokens=2)
    assert "3/3" in capsys.readouterr().err
    generate(model, tokenizer, PROMPTS[:3], max_new_tokens=2, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([], {}, ValueError, "prompts is empty"),
        ("one string", {}, TypeError, "one string"),
        (["a", [1, 2]], {}, TypeError, "both mixed"),
        ([[1], []], {}, ValueError, r"prompts\[1\] has no tokens"),
        (["a"], {"batch_size": 0}, ValueError, "batch_size=0"),
        (["a"], {"max_new_tokens": 0}, ValueError, "max_new_tokens=0"),
        (["a"], {"num_beams": 1.5}, TypeError, "num_beams"),
        (["a"], {"length_penalty": 0.5}, ValueError, "length_penalty=0.5, num_beams=1"),
        (["a"], {"length_penalty": float("nan"), "num_beams": 2}, ValueError, "length_penalty=nan"),
        (["a"], {"length_penalty": "1", "num_beams": 2}, TypeError, "length_penalty"),
    ],
)
def test_bad_arguments(model, tokenizer, prompts, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        generate(model, tokenizer, prompts, **options)


def test_translate_renders_generates_and_scores(model, tokenizer) -> None:
    pytest.importorskip("sacrebleu")
    pairs = [Pair(text, text) for text in TEXTS]
    made, scores = translate(model, tokenizer, pairs, "en-de", "tiny", max_new_tokens=6, progress=False)
    prompts = [get_prompt("tiny").render(text, "en-de") for text in TEXTS]
    assert made == generate(model, tokenizer, prompts, max_new_tokens=6, progress=False)
    assert scores == score(made, TEXTS)
    options = {"max_new_tokens": 6, "num_beams": 3, "length_penalty": 0.0, "progress": False}
    beams, _ = translate(model, tokenizer, pairs, "en-de", "tiny", **options)
    assert beams == generate(model, tokenizer, prompts, **options) != made
    with pytest.raises(ValueError, match="length_penalty="):
        translate(model, tokenizer, pairs, "en-de", "tiny", length_penalty=0.5)
