"""Kept translations as rows: each list belongs to the token that training predicts there, by id, up to the loss."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fused_kd.training.cache.teacher_cache import TeacherCache
from fused_kd.training.cycle_distill.base import documents, plain_rows
from fused_kd.training.cycle_distill.few_shot import get_template, with_examples
from fused_kd.training.cycle_distill.filters import Filters
from fused_kd.training.cycle_distill.settings import CycleDistill, Pretraining, Training
from fused_kd.training.cycle_distill.stages import epochs_for, held_out, read_generations
from fused_kd.training.cycle_distill.synthetic import (
    read_counts,
    read_rows,
    select,
    trim,
    write_rows,
    write_selection,
    write_teacher,
)
from fused_kd.training.cycle_distill.texts import load_sentences
from fused_kd.training.data.pairs import Pair
from fused_kd.training.data.prompts import LABEL_PAD, Collator, encode_prompts, tokenize_pairs
from fused_kd.training.generation import Decoding, Generation, generate_to
from fused_kd.training.runs import read_lines

from .byte_level import make_tokenizer
from .test_trainer import trainer
from .tiny import tiny

TEXTS = ["A dog sees the cat.\n", "Ein Hund sieht die Katze.\n", "A man sleeps in the garden.\n"]
SENTENCES = [Pair(text.strip(), "") for text in (*TEXTS, "The cat sleeps.", "Two dogs.", "A man sees a dog.")]
PROMPT = with_examples(get_template("tiny"), [Pair("A {cat}.", "Eine Katze.")], "en-de")
LAX = Filters(markers=("q",), length_ratio=(0, 1e9), unique_words=0, loops=10**6, identifier="none")
K = 5


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TEXTS)


def eager(seed: int, vocab: int, hidden: int = 32) -> torch.nn.Module:
    """A random model that likes EOS well enough to end some of its texts."""
    model = tiny(hidden, seed, vocab=vocab, layers=2).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.4)
        model.lm_head.weight[2] *= 2.5
    return model


@pytest.fixture(scope="module")
def model(tokenizer):
    return eager(3, len(tokenizer))


def made_to(folder: Path, model, tokenizer, *, filters: Filters = LAX, dtype: str = "fp32", extra=(), k: int = K):
    """Translations, the kept ones as rows, and their cache."""
    prompts = encode_prompts(tokenizer, [PROMPT.render(pair.source, "en-de") for pair in SENTENCES])
    made = generate_to(
        folder / "made", model, tokenizer, prompts, Decoding(2, 12), k=k, dtype=dtype, progress=False
    )  # fmt: skip
    again = read_generations(folder / "made", k)
    assert [g.ids for g in again] == [g.ids for g in made]
    selection = select(again, prompts, SENTENCES, tokenizer, "en-de", filters, 256)
    write_selection(folder, selection, SENTENCES, extra)
    rows = read_rows(folder)
    cache = write_teacher(
        folder / "lists", selection, again, rows, tokenizer, PROMPT, k=k, dtype=dtype,
        made_from={"teacher_config": None, "teacher_weights": None}, shard_rows=2,
    )  # fmt: skip
    return prompts, made, selection, rows, cache


def a_token_within(made, tokenizer) -> str:
    """The text of a token that some continuation has after its first word: as a marker it cuts between tokens."""
    for generation in made:
        for place in range(1, len(generation.ids)):
            before, token = (tokenizer.decode(generation.ids[part]) for part in (slice(place), slice(place, place + 1)))
            if any(map(str.isalnum, before)) and token.strip() and token not in before and "\ufffd" not in token:
                return token
    raise AssertionError("no such token")


def greedy_logits(model, row) -> torch.Tensor:
    """(length, V) float64 logits as training has them: the whole row at once, no cache."""
    with torch.no_grad():
        return model(torch.tensor([row["input_ids"]])).logits[0].double()


def test_a_list_belongs_to_the_token_predicted_at_its_position(tmp_path, model, tokenizer):
    prompts, made, selection, rows, cache = made_to(tmp_path, model, tokenizer)
    assert len(rows) >= 3 and sum(generation.finished for generation in made) >= 1
    batch = Collator(0)(list(cache.rows(rows)))
    apart = []
    for number, row in enumerate(rows):
        prompt = prompts[selection.origins[number]]
        assert row["input_ids"][: len(prompt)] == prompt  # the prompt of generation, by id
        assert row["labels"] == [LABEL_PAD] * len(prompt) + row["input_ids"][len(prompt) :]
        values, ids = greedy_logits(model, row).log_softmax(-1).topk(K)
        for token in range(selection.listed[number]):
            place = len(prompt) - 1 + token
            assert batch["labels"][number, place + 1] == row["input_ids"][place + 1] == ids[place, 0]
            assert batch["teacher_indices"][number, place].tolist() == ids[place].tolist()
            np.testing.assert_allclose(batch["teacher_log_probs"][number, place], values[place], atol=2e-5)
            apart.append((batch["teacher_log_probs"][number, place] - values[place + 1]).abs().max())
    assert max(apart) > 0.1  # the same comparison one position on fails


def test_a_cut_row_ends_with_a_sure_eos(tmp_path, model, tokenizer):
    uncut = made_to(tmp_path / "a", model, tokenizer)[1]
    filters = Filters(**{**vars(LAX), "markers": (a_token_within(uncut, tokenizer),)})
    _, made, selection, rows, cache = made_to(tmp_path / "b", model, tokenizer, filters=filters)
    assert selection.cut >= 1
    for number, origin in enumerate(selection.origins):
        response = [label for label in rows[number]["labels"] if label != LABEL_PAD]
        log_probs, indices = cache[number]
        listed, generation = selection.listed[number], made[origin]
        assert response[:listed] == generation.ids[:listed] and response[-1] == tokenizer.eos_token_id
        np.testing.assert_allclose(log_probs[:listed], generation.log_probs[:listed], atol=1e-5)
        if listed < len(response):  # cut: what stood there was the marker's list
            assert log_probs[-1, 0] == 0 and indices[-1, 0] == tokenizer.eos_token_id
            assert (log_probs[-1, 1:] == -math.inf).all()
    assert read_counts(tmp_path / "b") == {**selection.counts(), "parallel": 0}


class Plain:
    """A tokenizer whose tokens are the texts in a list."""

    eos_token_id = 0

    def __init__(self, *tokens: str) -> None:
        self.tokens = ["<eos>", *tokens]

    def get_vocab(self):
        return {token: index for index, token in enumerate(self.tokens)}

    def convert_ids_to_tokens(self, token):
        return self.tokens[token]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.tokens[token] for token in ids if token)

    def response(self, ids: list[int], *markers: str):
        return trim(Generation(ids, self.decode(ids), 0 in ids), self, markers or ("\n", "##"))  # type: ignore[arg-type]


def test_trim_goes_by_token():
    words = Plain(" Ein", " Hund", ".", "\n", "en", ".\n", "#", "d\n", " Hun")
    assert words.response([1, 2, 3, 0]) == ([1, 2, 3, 0], 4, "Ein Hund.", True, False)
    assert words.response([1, 2, 3]) == ([1, 2, 3], 3, "Ein Hund.", False, False)  # never ended
    assert words.response([1, 2, 3, 4, 5, 0]) == ([1, 2, 3, 0], 3, "Ein Hund.", True, True)
    assert words.response([4, 1, 2, 4, 5]) == ([4, 1, 2, 0], 3, "Ein Hund", True, True)  # a leading break is no end
    # ".\n" is one token: "." stands in, without a list
    assert words.response([1, 2, 6, 5]) == ([1, 2, 3, 0], 2, "Ein Hund.", True, True)
    # a marker of two tokens
    assert words.response([1, 2, 7, 7, 5]) == ([1, 2, 0], 2, "Ein Hund", True, True)
    # "d" is no token: the last letter is lost, so the translation is not whole
    assert words.response([1, 9, 8, 5]) == ([1, 9, 0], 2, "Ein Hun", False, True)


def test_trim_with_a_byte_level_tokenizer(tokenizer):
    ids = tokenizer("Ein Hund sieht die Katze.\nen: A dog", add_special_tokens=False)["input_ids"]
    response = trim(Generation(ids, tokenizer.decode(ids), False), tokenizer, ("\n",))
    assert response.cut and response.whole and response.text == "Ein Hund sieht die Katze."
    assert tokenizer.decode(response.ids[:-1]) == "Ein Hund sieht die Katze." and response.ids[-1] == 2
    assert response.ids[: response.listed] == ids[: response.listed] and response.listed >= len(response.ids) - 2


def test_every_rule_is_counted_once(tmp_path, tokenizer):
    def continuation(text: str, finished: bool = True) -> Generation:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return Generation(ids + [2] * finished, text, finished)

    sentences = [Pair("A man and a dog sit on grass.", "")] * 8
    good = "Ein Mann und ein Hund sitzen im Gras."
    made = [
        continuation(good),
        continuation(f"{good}\nen: A cat.", finished=False),
        continuation(""),
        continuation(good, finished=False),
        continuation(sentences[0].source),
        continuation("Ein Mann"),
        continuation("Mann Mann Mann Mann und Hund"),
        continuation("The man is with his dog on it."),
    ]
    selection = select(made, [[1, 5]] * 8, sentences, tokenizer, "en-de", Filters(), 256)  # type: ignore[arg-type]
    rejected = dict.fromkeys(("empty", "unfinished", "copy", "length", "repetition", "language"), 1)
    assert selection.counts() == {"generated": 8, "kept": 2, "cut": 1, "rejected": rejected}
    write_selection(tmp_path, selection, sentences)
    lines = [json.loads(line) for line in read_lines(tmp_path / "rejected.jsonl")]
    assert [(line["index"], line["rule"]) for line in lines] == list(zip(range(2, 8), rejected, strict=True))
    assert [row["labels"][:2] for row in read_rows(tmp_path)] == [[LABEL_PAD] * 2] * 2
    # too long for training: as if it had not ended
    assert len(select(made, [[1] * 250] * 8, sentences, tokenizer, "en-de", Filters(), 255).rows) == 0  # type: ignore[arg-type]


def soft_loss(model, rows, cache, alpha: float, shift: int = 0) -> float:
    """(1 - alpha) CE + alpha KL(p~ || q) in float64, from the stored lists: the mean over response tokens."""
    total, count = 0.0, 0
    for number, row in enumerate(rows):
        logits = greedy_logits(model, row)
        log_probs, indices = cache[number]
        prompt = sum(label == LABEL_PAD for label in row["labels"])
        for token in range(len(log_probs)):
            log_q = logits[prompt - 1 + token].log_softmax(-1)
            other = (token + shift) % len(log_probs)
            p = log_probs[other].double().exp()
            p = p / p.sum()
            listed = p > 0
            kl = (p[listed] * (p[listed].log() - log_q[indices[other]][listed])).sum()
            total += float((1 - alpha) * -log_q[row["input_ids"][prompt + token]] + alpha * kl)
            count += 1
    return total / count


@pytest.mark.parametrize(("dtype", "alpha"), [("fp16", 0.5), ("8bit", 0.3)])
def test_the_soft_loss_is_the_papers(tmp_path, model, tokenizer, dtype, alpha):
    parallel = tokenize_pairs(tokenizer, PROMPT, [Pair("A cat.", "Eine Katze.")], "en-de", 256).rows
    _, _, selection, rows, cache = made_to(tmp_path, model, tokenizer, dtype=dtype, extra=parallel)
    assert len(rows) == len(selection.rows) + 1 and (cache[len(rows) - 1][0][:, 0] == 0).all()
    student = eager(4, len(tokenizer))
    spec = config(alpha=alpha).spec("soft")
    cached = TeacherCache(tmp_path / "lists", tail="renormalize")
    data = list(cached.rows(rows))
    run = trainer(tmp_path / "run", student, spec.objective, data, teacher=cached, kd={"vocab_size": len(tokenizer)})
    batch = Collator(0)(data)
    with torch.no_grad():
        loss = float(run.compute_loss(student, dict(batch)))
    assert loss == pytest.approx(soft_loss(student, rows, cached, alpha), rel=1e-5)
    assert abs(loss - soft_loss(student, rows, cached, alpha, shift=1)) > 1e-2


def test_ids_beyond_16_bits_reach_the_loss(tmp_path):
    tokenizer = make_tokenizer(TEXTS)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(70_000)])
    model = tiny(8, 0, vocab=len(tokenizer)).eval()
    with torch.no_grad():
        model.lm_head.weight[:65_600] *= 0.01  # the likely tokens lie above
    prompt = encode_prompts(tokenizer, [PROMPT.render(SENTENCES[0].source, "en-de")])
    probe = generate_to(tmp_path / "probe", model, tokenizer, prompt, Decoding(2, 12), progress=False)
    filters = Filters(**{**vars(LAX), "markers": (a_token_within(probe, tokenizer),)})
    *_, rows, cache = made_to(tmp_path, model, tokenizer, filters=filters, k=4)
    data = list(cache.rows(rows))
    seen = torch.cat([row["teacher_indices"].flatten() for row in data])
    assert seen.max() > 65_535 and max(max(row["input_ids"]) for row in rows) > 65_535
    student = tiny(8, 1, vocab=len(tokenizer)).eval()
    run = trainer(tmp_path / "run", student, config().spec("soft").objective, data, teacher=cache)
    with torch.no_grad():
        loss = float(run.compute_loss(student, dict(Collator(0)(data))))
    assert loss == pytest.approx(soft_loss(student, rows, cache, 0.5), rel=1e-5)


def config(**changes) -> CycleDistill:
    return CycleDistill(**{"data": "x", "direction": "en-de", "model": "folder", **changes})


def test_objectives_of_the_variants():
    assert repr(config().spec("soft").objective) == "ForwardKD(lam=0.5)"
    assert repr(config(alpha=0.3).spec("soft_self_evolution").objective) == (
        "SelfEvolution(lam=0.3, beta=0.5, gamma=0.4)"
    )
    assert [config().spec(arm).text for arm in ("hard", "control", "ceiling")] == ["sft"] * 3
    assert config().training("soft").steps == 120 and config().training("control") == config().hard


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"shots": 5}, r"shots must be in \[0, 4\]"),
        ({"pairs": 2, "shots": 3}, "at most pairs"),
        ({"pairs": 4}, "pairs=4 are all examples"),
        ({"variants": ()}, "variants"),
        ({"variants": ("hard", "hard")}, "each once"),
        ({"seeds": ()}, "seeds"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"alpha": 1.5}, "alpha"),
        ({"prompt": "nonsense"}, "nonsense"),
        ({"direction": "en-en"}, "en-en"),
        ({"model": "tiny-student"}, "needs pretrain"),
        ({"pretrain": Pretraining(1, 1e-3)}, "has no place for pretrain"),
        ({"model": "tiny-student", "pretrain": Pretraining(1, 1e-3), "monolingual": "x"}, "monolingual"),
        ({"self_evolution": "nonsense"}, "nonsense"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_bad_settings(changes, error):
    with pytest.raises(ValueError, match=error):
        config(**changes)
    with pytest.raises(ValueError, match="steps must be"):
        Training(0, 1)
    with pytest.raises(ValueError, match=r"held_out=0\.0, select='best'"):
        Training(1, 1, select="best")


@pytest.mark.parametrize("batch,accumulation", [(1, 8), (2, 16), (3, 2), (64, 1)])
def test_the_trainer_makes_as_many_steps_as_asked(batch, accumulation):
    for rows in (1, 7, 64, 1000, 19_999):
        for steps in (1, 3, 100, 333):
            batches = (rows + batch - 1) // batch
            a_pass = batches // accumulation + (batches % accumulation > 0)  # as transformers' Trainer counts
            assert math.ceil(epochs_for(Training(steps, batch, accumulation), rows) * a_pass) == steps


def test_held_out_rows_are_apart():
    rows = [{"input_ids": [i]} for i in range(10)]
    train, valid = held_out(rows, 0.2, seed=1)
    assert len(train) == 8 and len(valid) == 2
    assert sorted(row["input_ids"][0] for part in (train, valid) for row in part) == list(range(10))
    assert held_out(rows, 0.0, seed=1) == (rows, None)
    assert [r["input_ids"] for r in held_out(rows, 0.2, seed=2)[1]] != [r["input_ids"] for r in valid]
    with pytest.raises(ValueError, match="none of 2 rows"):
        held_out(rows[:2], 0.9, 0)


def test_the_base_reads_pairs_as_running_text(tokenizer):
    template = get_template("tiny")
    pairs = [Pair("A dog", "Ein Hund"), Pair("A cat", "Die Katze"), Pair("A man", "Der Mann")]
    rows = documents(tokenizer, template, pairs, "en-de", 2)
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == [
        "<s>en: A dog\nde:\nEin Hund\nen: A cat\nde:\nDie Katze</s>",
        "<s>en: A man\nde:\nDer Mann</s>",
    ]
    prompt = encode_prompts(tokenizer, [template.render("A dog", "en-de")])[0]
    assert rows[0]["input_ids"][: len(prompt)] == prompt and rows[0]["labels"] == rows[0]["input_ids"]
    plain = plain_rows(tokenizer, ["A dog sees"])[0]
    assert tokenizer.decode(plain["input_ids"]) == "<s>A dog sees</s>" and plain["labels"] == plain["input_ids"]


def test_monolingual_text_of_every_form(tmp_path):
    with gzip.open(tmp_path / "mono.en.gz", "wt", encoding="utf-8") as file:
        file.write("A  dog.\n\n A cat.\nA man.\n")
    assert load_sentences(str(tmp_path / "mono.en.gz"), "en", 2) == ["A dog.", "A cat."]
    rows = [{"en": "A dog.", "de": "x"}, {"text": "A cat."}, {"translation": {"en": "A man."}}, {"de": "y"}]
    (tmp_path / "mono.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match="skipped 1 bad rows"):
        assert load_sentences(str(tmp_path / "mono.jsonl"), "en", 10) == ["A dog.", "A cat.", "A man."]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="has no text"):
        load_sentences(str(tmp_path / "empty.txt"), "en", 1)
    with pytest.raises(ValueError, match="no-such"):
        load_sentences(str(tmp_path / "no-such"), "en", 1)


def test_rows_survive_their_file(tmp_path, tokenizer):
    rows = tokenize_pairs(tokenizer, PROMPT, [Pair("A\u2028cat.", "Eine Katze.")], "en-de", 256).rows
    write_rows(tmp_path, rows)
    assert read_rows(tmp_path).rows == rows
