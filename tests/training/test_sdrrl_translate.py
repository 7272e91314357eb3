"""Translators: pieces put together again, an NLLB as the hub has it but tiny and random, and a kill between batches."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from fused_kd.training.generation import Decoding  # noqa: E402
from fused_kd.training.sdrrl.dictionary import Dictionary  # noqa: E402
from fused_kd.training.sdrrl.translate import (  # noqa: E402
    CausalTranslator,
    DictionaryTranslator,
    Seq2SeqTranslator,
    divide,
    translate_texts,
)

from .byte_level import make_tokenizer  # noqa: E402
from .tiny import tiny  # noqa: E402

CODES = {"en": "eng_Latn", "de": "deu_Latn"}
TEXTS = ["a dog", "the cat sees a dog here", "cat", "a cat and the old dog", "dogs"]


class Upper:
    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, folder, texts, source, target):
        self.asked.append(list(texts))
        return ["" if "bad" in text else f" {text.upper()}\n" for text in texts]


def test_texts_are_divided_at_lines_and_sentence_ends(tmp_path):
    text = 'One e.g. two. Three? "Four!" Five\n\n- six. Seven'
    assert divide(text)[::2] == ["One e.g. two.", "Three?", '"Four!" Five', "- six.", "Seven"]
    assert "".join(divide(text)) == text and divide("") == [""]
    upper = Upper()
    made = translate_texts(tmp_path, [text, "Seven", "fine. Bad bad", "", text], upper, "en", "de")
    assert made == {text: text.upper(), "Seven": "SEVEN", "fine. Bad bad": "", "": ""}
    assert upper.asked == [["One e.g. two.", "Three?", '"Four!" Five', "- six.", "Seven", "fine.", "Bad bad"]]


def test_dictionary_translator(tmp_path):
    engine = DictionaryTranslator({"en-de": Dictionary({"dog": ("hund", "köter"), "a": ("ein",)})})
    assert engine(tmp_path, ["A dog's DOG, a bird"], "en", "de") == ["Ein dog's HUND, ein bird"]


@pytest.fixture(scope="module")
def nllb(tmp_path_factory):
    """A tiny M2M100 with NLLB's own tokenizer class, saved as on the hub."""
    folder = tmp_path_factory.mktemp("nllb")
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = {token: number for number, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters])}
    tokenizer = transformers.NllbTokenizer(vocab=vocab, merges=[], extra_special_tokens=["eng_Latn", "deu_Latn"])
    torch.manual_seed(57)  # some of its translations end, some do not
    model = transformers.M2M100ForConditionalGeneration(
        transformers.M2M100Config(
            vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
            pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, init_std=1.0,
        )
    ).eval()  # fmt: skip
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder, tokenizer, model


def by_hand(tokenizer, model, text: str, codes: tuple[str, str], most: int) -> str:
    """Greedy, one text, no cache: language, text and EOS in; EOS, language out, and what the model says then."""
    start, language = (tokenizer.convert_tokens_to_ids(code) for code in codes)
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    encoded = torch.tensor([[start, *plain, tokenizer.eos_token_id]])
    ids = [tokenizer.eos_token_id, language]
    with torch.no_grad():
        while len(ids) <= most and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(input_ids=encoded, decoder_input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    ended = ids[-1] == tokenizer.eos_token_id
    return tokenizer.decode(ids, skip_special_tokens=True) if ended else ""


def test_seq2seq_is_the_models_own_greedy_translation(tmp_path, nllb):
    folder, tokenizer, model = nllb
    engine = Seq2SeqTranslator(str(folder), CODES, Decoding(2, 12))
    there = engine(tmp_path / "there", TEXTS, "en", "de")
    assert there == [by_hand(tokenizer, model, text, ("eng_Latn", "deu_Latn"), 12) for text in TEXTS]
    back = engine(tmp_path / "back", TEXTS, "de", "en")
    assert back == [by_hand(tokenizer, model, text, ("deu_Latn", "eng_Latn"), 12) for text in TEXTS]
    assert there != back and "" in there and any(there)


def test_seq2seq_goes_on_after_a_kill(tmp_path, nllb, monkeypatch):
    folder = nllb[0]
    engine = Seq2SeqTranslator(str(folder), CODES, Decoding(2, 6))
    whole = engine(tmp_path / "whole", TEXTS, "en", "de")
    generate, sizes = transformers.M2M100ForConditionalGeneration.generate, []

    def dying(self, **inputs):
        sizes.append(len(inputs["input_ids"]))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return generate(self, **inputs)

    monkeypatch.setattr(transformers.M2M100ForConditionalGeneration, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        engine(tmp_path / "cut", TEXTS, "en", "de")
    assert engine(tmp_path / "cut", TEXTS, "en", "de") == whole
    assert engine(tmp_path / "cut", TEXTS, "en", "de") == whole
    assert sizes == [2, 2, 2, 1]  # the first batch is not made again
    with pytest.raises(ValueError, match="other arguments"):
        engine(tmp_path / "cut", TEXTS[:2], "en", "de")


def test_seq2seq_errors_name_what_is_wrong(tmp_path, nllb):
    folder = str(nllb[0])
    with pytest.raises(ValueError, match="no code for the language 'fr'"):
        Seq2SeqTranslator(folder, CODES)(tmp_path / "a", TEXTS, "fr", "de")
    with pytest.raises(ValueError, match="'deu_Latin' is no language"):
        Seq2SeqTranslator(folder, CODES | {"de": "deu_Latin"})(tmp_path / "b", TEXTS, "en", "de")
    with pytest.raises(ValueError, match=r"translator\.model='.*none' is neither a folder nor a hub name"):
        Seq2SeqTranslator(str(tmp_path / "none"), CODES)(tmp_path / "c", TEXTS, "en", "de")


def test_causal_translator_has_the_training_prompt_and_wants_an_end(tmp_path, monkeypatch):
    from fused_kd.training.generation import Generation
    from fused_kd.training.sdrrl import translate

    seen = {}

    def made(folder, model, tokenizer, prompts, decoding):
        seen.update(prompts=prompts, decoding=decoding)
        return [Generation([1], "eins", True), Generation([1], "zwei", False)]

    tokenizer = make_tokenizer(TEXTS)
    engine = CausalTranslator(lambda: (tiny(8, 0, vocab=len(tokenizer)), tokenizer), decoding=Decoding(2, 3))
    assert len(engine(tmp_path, ["one", "two"], "en", "de")) == 2  # the real model, whatever it says
    monkeypatch.setattr(translate, "generate_to", made)
    assert engine(tmp_path, ["one", "two"], "en", "de") == ["eins", ""]
    assert seen["prompts"] == ["en: one\nde:\n", "en: two\nde:\n"] and seen["decoding"] == Decoding(2, 3)
