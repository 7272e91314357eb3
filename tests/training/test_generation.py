"""Continuations: in batches as alone, on disk with the lists that belong to exactly their tokens, scored."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from fused_kd.training.data import Pair
from fused_kd.training.generate import Decoding, generate, generate_to
from fused_kd.training.prompts import encode_prompts, get_prompt
from fused_kd.training.score import score, translate

from .byte_level import make_tokenizer
from .tiny import tiny

TEXTS = ["A dog sees the cat.", "Ein Hund sieht die Katze.", "The old man sleeps in the garden today."]
PROMPTS = ["A dog", "The old man sleeps in the", "Ein Hund sieht die Katze. A dog sees", "cat", "the garden"]
K = 6


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TEXTS)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny(32, 0, vocab=len(tokenizer) + 5, layers=2).eval()  # a padded head


@pytest.fixture
def own(tokenizer):
    """A model that a test may change, on the tokenizer's vocabulary."""
    return tiny(32, 0, vocab=len(tokenizer), layers=2, attention_dropout=0.5)


def full_logits(model, prompt, ids):
    """One unpadded row, no cache: the logits from which each generated token was chosen."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0].double()
    return logits[len(prompt) - 1 : len(prompt) - 1 + len(ids)]


def test_lists_are_those_of_the_generated_tokens(tmp_path, model, tokenizer):
    made = generate_to(tmp_path, model, tokenizer, PROMPTS, Decoding(2, 7), k=K, dtype="fp32", progress=False)
    assert len(made) == len(PROMPTS)
    shifted = 0.0
    for prompt, generation in zip(encode_prompts(tokenizer, PROMPTS), made, strict=True):
        expected = full_logits(model, prompt, generation.ids)[:, : len(tokenizer)].log_softmax(-1)
        values, ids = (x.numpy() for x in expected.topk(K))
        assert generation.log_probs.shape == generation.indices.shape == (len(generation.ids), K)
        np.testing.assert_allclose(generation.log_probs, values, atol=2e-5)
        np.testing.assert_array_equal(generation.indices, ids)
        np.testing.assert_array_equal(generation.indices[:, 0], generation.ids)  # greedy takes the likeliest
        if len(generation.ids) > 1:
            shifted = max(shifted, np.abs(generation.log_probs[1:] - values[:-1]).max())
    assert shifted > 0.1  # lists of the neighbours would have been seen


def test_eos_ends_a_continuation_and_keeps_its_list(tmp_path, model, tokenizer):
    plain = generate_to(tmp_path / "plain", model, tokenizer, PROMPTS, Decoding(3, 8), k=K, progress=False)
    stop = plain[0].ids[2]  # a token that is made, as EOS
    own = tokenizer.eos_token_id, tokenizer.eos_token
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    try:
        made = generate_to(tmp_path / "eos", model, tokenizer, PROMPTS, Decoding(3, 8), k=K, progress=False)
    finally:
        tokenizer.eos_token = own[1]
    assert tokenizer.eos_token_id == own[0]
    for before, after in zip(plain, made, strict=True):
        ids = before.ids[: before.ids.index(stop) + 1] if stop in before.ids else before.ids
        assert after.ids == ids and after.finished == (stop in before.ids)
        np.testing.assert_allclose(after.log_probs, before.log_probs[: len(ids)], atol=1e-3)
    assert made[0].finished and len(made[0].ids) == plain[0].ids.index(stop) + 1


def test_texts_are_those_of_generate(tmp_path, model, tokenizer):
    for beams in (1, 3):
        texts = generate(model, tokenizer, PROMPTS, max_new_tokens=6, num_beams=beams, progress=False)
        ids = encode_prompts(tokenizer, PROMPTS)
        assert generate(model, tokenizer, ids, max_new_tokens=6, num_beams=beams, progress=False) == texts
        decoding = Decoding(2, 6, beams)
        made = generate_to(tmp_path / str(beams), model, tokenizer, PROMPTS, decoding, progress=False)
        assert [" ".join(text.split()) for text in made.texts()] == texts
        assert made[0].log_probs is None and made.k is None
        assert [generation.text for generation in made] == made.texts()


def test_a_kill_loses_one_batch_at_most(tmp_path, model, tokenizer, monkeypatch):
    whole = generate_to(tmp_path / "whole", model, tokenizer, PROMPTS, Decoding(2, 5), k=K, progress=False)
    calls, run = [], model.generate

    def dying(**inputs):
        calls.append(len(inputs["input_ids"]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(**inputs)

    monkeypatch.setattr(model, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        generate_to(tmp_path / "torn", model, tokenizer, PROMPTS, Decoding(2, 5), k=K, progress=False)
    made = generate_to(tmp_path / "torn", model, tokenizer, PROMPTS, Decoding(2, 5), k=K, progress=False)
    assert calls == [2, 2, 2, 1]  # the first batch is not made again
    for part in sorted((tmp_path / "whole" / "batches").glob("0*")):
        assert part.read_bytes() == (tmp_path / "torn" / "batches" / part.name).read_bytes()
    assert made.texts() == whole.texts()
    again = generate_to(tmp_path / "torn", model, tokenizer, PROMPTS, Decoding(2, 5), k=K, progress=False)
    assert calls == [2, 2, 2, 1] and again[3].ids == whole[3].ids


def test_samples_follow_the_temperature_and_their_seed(tmp_path, model, tokenizer):
    prompts, state = encode_prompts(tokenizer, PROMPTS[:1]) * 600, torch.random.get_rng_state()
    how = Decoding(300, 2, temperature=2.0, seed=3)
    made = generate_to(tmp_path / "a", model, tokenizer, prompts, how, k=K, dtype="fp32", progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    logits = full_logits(model, prompts[0], [5])[0]
    counts = np.bincount([generation.ids[0] for generation in made], minlength=len(logits))
    apart = {
        temperature: np.abs(counts / 600 - (logits / temperature).softmax(-1).numpy()).sum()
        for temperature in (0.5, 1.0, 2.0, 4.0)
    }
    assert min(apart, key=apart.__getitem__) == 2.0 and apart[1.0] > 1.5 * apart[2.0]
    listed = logits[: len(tokenizer)].log_softmax(-1).topk(K).values.numpy()  # whatever the temperature
    np.testing.assert_allclose(made[0].log_probs[0], listed, atol=2e-5)
    again = generate_to(tmp_path / "b", model, tokenizer, prompts, how, progress=False)
    assert [one.ids for one in again] == [one.ids for one in made]
    (tmp_path / "b" / "batches" / "000000.jsonl").unlink()  # a batch is the same again, and other than the next
    again = generate_to(tmp_path / "b", model, tokenizer, prompts, how, progress=False)
    assert [one.ids for one in again] == [one.ids for one in made] and made[0].ids + made[1].ids + made[2].ids != [
        token for each in (300, 301, 302) for token in made[each].ids
    ]
    other = generate_to(tmp_path / "c", model, tokenizer, prompts, replace(how, seed=4), progress=False)
    assert [one.ids for one in other] != [one.ids for one in made]


def test_line_separators_in_a_text_do_not_split_it(tmp_path, model, tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "decode", lambda *a, **k: "one\u2028two\nthree")
    made = generate_to(tmp_path, model, tokenizer, PROMPTS, Decoding(2, 2), progress=False)
    assert made.texts() == ["one\u2028two\nthree"] * len(PROMPTS)
    lines = (tmp_path / "batches" / "000000.jsonl").read_bytes().decode().split("\n")[:-1]
    assert [sorted(json.loads(line)) for line in lines] == [["finished", "ids", "index", "text"]] * 2


def test_ids_beyond_16_bits_survive(tmp_path):
    tokenizer = make_tokenizer(TEXTS)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(70_000)])
    model = tiny(8, 0, vocab=len(tokenizer)).eval()
    with torch.no_grad():
        model.lm_head.weight[:65_600] *= 0.01  # the likely tokens lie above
    made = generate_to(tmp_path, model, tokenizer, PROMPTS[:2], Decoding(2, 3), k=4, progress=False)
    assert min(generation.indices.min() for generation in made) > 65_535
    assert all(list(generation.indices[:, 0]) == generation.ids for generation in made)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 10**6}, "k=1000000"),
        ({"k": 3, "decoding": Decoding(num_beams=2)}, "num_beams=2"),
        ({"prompts": []}, "prompts is empty"),
    ],
)
def test_bad_requests(tmp_path, model, tokenizer, options, error):
    arguments = {"prompts": PROMPTS, "progress": False, **options}
    with pytest.raises(ValueError, match=error):
        generate_to(tmp_path / "run", model, tokenizer, **arguments)
    assert not (tmp_path / "run").exists()


def test_a_folder_is_bound_to_its_prompts(tmp_path, model, tokenizer):
    generate_to(tmp_path, model, tokenizer, PROMPTS[:1], Decoding(2, 2), progress=False)
    with pytest.raises(ValueError, match="other arguments"):
        generate_to(tmp_path, model, tokenizer, PROMPTS[1:2], Decoding(2, 2), progress=False)
    with pytest.raises(ValueError, match="other arguments"):
        generate_to(tmp_path, model, tokenizer, PROMPTS[:1], Decoding(2, 3), progress=False)


def test_settings_of_the_checkpoint_do_not_change_decoding(own, tokenizer) -> None:
    plain = generate(own, tokenizer, PROMPTS, max_new_tokens=8, progress=False)
    given = type(own.generation_config)(
        repetition_penalty=50.0, do_sample=True, temperature=9.0, num_beams=3, max_length=5, eos_token_id=40
    )
    own.generation_config = given
    assert generate(own, tokenizer, PROMPTS, max_new_tokens=8, progress=False) == plain
    assert own.generation_config is given


def test_modes_are_restored(own, tokenizer) -> None:
    own.train()
    own.model.layers[0].eval()
    before = [module.training for module in own.modules()]
    generate(own, tokenizer, PROMPTS[:2], max_new_tokens=2, progress=False)
    assert [module.training for module in own.modules()] == before and own.training
    own.generate = None
    with pytest.raises(TypeError):
        generate(own, tokenizer, PROMPTS[:2], max_new_tokens=2, progress=False)
    assert [module.training for module in own.modules()] == before


def test_beam_search_in_batches_is_beam_search_alone(own, tokenizer) -> None:
    expected = []
    for ids in encode_prompts(tokenizer, PROMPTS):
        row = torch.tensor([ids])
        output = own.eval().generate(
            row, attention_mask=torch.ones_like(row), do_sample=False, num_beams=4, max_new_tokens=4,
            pad_token_id=0, eos_token_id=2,
        )  # fmt: skip
        text = tokenizer.decode(output[0, len(ids) :].tolist(), skip_special_tokens=True)
        expected.append(" ".join(str(text).split()))
    made = generate(own, tokenizer, PROMPTS, max_new_tokens=4, num_beams=4, progress=False)
    assert made == expected
    assert made != generate(own, tokenizer, PROMPTS, max_new_tokens=4, progress=False)


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


def test_beam_search_ranks_by_the_penalised_length(own, tokenizer) -> None:
    """As many beams as tokens leave out nothing, so the best of all continuations must win."""
    eos, prompts = tokenizer.eos_token_id, encode_prompts(tokenizer, PROMPTS)
    with torch.no_grad():
        final = own.eval().model(torch.tensor([prompts[0]])).last_hidden_state[0, -1]
        own.lm_head.weight[eos] = final * 0.25
    empty = []
    for penalty in (-2.0, 1.0, 5.0):
        best = [best_continuation(own, ids, eos, penalty) for ids in prompts]
        expected = [" ".join(str(tokenizer.decode(ids, skip_special_tokens=True)).split()) for ids in best]
        options = {"max_new_tokens": 2, "num_beams": len(tokenizer), "length_penalty": penalty, "progress": False}
        assert generate(own, tokenizer, prompts, **options) == expected
        empty.append(best.count([eos]))
    assert empty[0] > empty[1] > empty[2]


def test_progress_bar_counts_sentences(own, tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    generate(own, tokenizer, PROMPTS[:3], batch_size=2, max_new_tokens=2)
    assert "3/3" in capsys.readouterr().err
    generate(own, tokenizer, PROMPTS[:3], max_new_tokens=2, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([], {}, ValueError, "prompts is empty"),
        ("one string", {}, TypeError, "one string"),
        (["a", [1, 2]], {}, TypeError, "both mixed"),
        ([[1], []], {}, ValueError, r"prompts\[1\] has no tokens"),
        (["a"], {"batch_size": 0}, ValueError, "batch_size must be an int of at least 1, got 0"),
        (["a"], {"num_beams": 1.5}, ValueError, "num_beams must be an int of at least 1, got 1.5"),
        (["a"], {"length_penalty": 0.5}, ValueError, "length_penalty=0.5, num_beams=1"),
        (["a"], {"length_penalty": float("nan"), "num_beams": 2}, ValueError, "length_penalty=nan"),
        (["a"], {"temperature": 0.0}, ValueError, "temperature=0.0, num_beams=1"),
        (["a"], {"temperature": 0.7, "num_beams": 2}, ValueError, "temperature=0.7, num_beams=2"),
        (["a"], {"length_penalty": "1", "num_beams": 2}, ValueError, "length_penalty='1'"),
    ],
)
def test_bad_prompts_and_decodings(
    own, tokenizer, prompts, options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        generate(own, tokenizer, prompts, **options)


def test_translate_renders_generates_and_scores(own, tokenizer) -> None:
    pytest.importorskip("sacrebleu")
    pairs = [Pair(text, text) for text in TEXTS]
    made, scores = translate(own, tokenizer, pairs, "en-de", "tiny", max_new_tokens=6, progress=False)
    prompts = [get_prompt("tiny").render(text, "en-de") for text in TEXTS]
    assert made == generate(own, tokenizer, prompts, max_new_tokens=6, progress=False)
    assert scores == score(made, TEXTS)
    options = {"max_new_tokens": 6, "num_beams": 3, "length_penalty": 0.0, "progress": False}
    beams, _ = translate(own, tokenizer, pairs, "en-de", "tiny", **options)
    assert beams == generate(own, tokenizer, prompts, **options) != made
    with pytest.raises(ValueError, match="length_penalty="):
        translate(own, tokenizer, pairs, "en-de", "tiny", length_penalty=0.5)
