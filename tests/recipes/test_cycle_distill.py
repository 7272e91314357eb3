"""CycleDistill: its rules and rows, stages and arms, kills, and whole runs with tiny models."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("sacrebleu")
pytest.importorskip("matplotlib")
pytest.importorskip("pandas")

from transformers import LlamaForCausalLM

from fused_kd.training import KDTrainer, Pair, Stages, TeacherCache, generate_to, models, parse, parse_objective
from fused_kd.training.cache import write_lists
from fused_kd.training.collate import Collator
from fused_kd.training.generate import Decoding, Generation, Generations
from fused_kd.training.prompts import LABEL_PAD, PROMPTS, Rows, encode_prompts, tokenize_pairs
from fused_kd.training.stage import read_json, write_json
from tests.training.byte_level import make_tokenizer
from tests.training.tiny import tiny

HERE = Path(__file__).parents[2] / "examples" / "cycle_distill"
sys.path.insert(0, str(HERE))

import cycle_distill as script  # noqa: E402
import cycle_report  # noqa: E402
import probe  # noqa: E402
from candidates import chrf_matrix, mbr_scores, mean_log_probs, standardised, summed  # noqa: E402
from cycle_options import load_sentences  # noqa: E402
from translations import RULES, Filters, Maker, broken_rule, lists_of, may_be, select, trim  # noqa: E402
from web import document_rows, plain_rows  # noqa: E402

SOURCE, GOOD = "A man and a dog are sitting on the grass.", "Ein Mann und ein Hund sitzen auf dem Gras."
NOUNS = {"dog": "Hund", "man": "Mann", "tree": "Baum", "bird": "Vogel", "king": "König", "wolf": "Wolf"}
VERBS = {"sees": "sieht", "likes": "mag", "finds": "findet", "hears": "hört"}
# a model this small makes little sense
LAX: dict[str, Any] = {"length_ratio": [0, 1000], "unique_words": 0, "loops": 1000, "identifier": "none"}
TINY = {
    "pretrain": '{"num_train_epochs": 15, "learning_rate": 1e-2, "per_device_train_batch_size": 16}',
    "document": 3, "repeats": 2, "plain": 99, "pairs": 90, "sentences": 24, "iterations": 2, "vocab": 420,
    "bootstrap": 20, "training": '{"per_device_train_batch_size": 4}', "hard": '{"max_steps": 3}',
    "soft": '{"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}',
    "valid": "valid", "valid_limit": 6, "test": "test", "test_limit": 8, "k": 6, "generation_batch": 8,
    "max_new_tokens": 16, "seeds": 0, **LAX,
}  # fmt: skip


def rule(text: str, whole: bool = True, **options: Any) -> str | None:
    return broken_rule(SOURCE, text, whole, ("en", "de"), Filters(**options))


def test_rules_and_their_bounds():
    texts = {
        GOOD: None,
        "": "empty",
        " ...": "empty",
        "a MAN, and a dog are sitting on the grass": "copy",
        "Ein Mann und ein": "length",
        GOOD + " Der Hund ist braun und der Mann liest ein Buch über Katzen.": "length",
        "Ein Mann Mann Mann sitzt mit Hund auf Gras.": "repetition",
        "Mann mit Hund auf dem Gras im Garten da da da": "repetition",
        "Ein Mann da da dazu und ein Hund auf dem Gras": None,  # no whole word comes three times
        "Ein Hund und ein Hund und ein Hund und ein": "repetition",
        "Einen Mann, der lachtlachtlachtlacht, mit Gras": "repetition",
        "The man is with his dog and sits at it.": "language",
        "Мужчина и собака сидят на зелёной траве.": "language",
    }
    assert {text: rule(text) for text in texts} == texts
    assert rule(GOOD, whole=False) == "unfinished" and rule("", whole=False) == "empty"  # the first rule counts
    short = "Mann, Hund, Gras."  # 17 of 41 characters
    assert rule(short) == "length" and rule(short, length_ratio=[0.4, 2.0]) is None
    doubled = "Ein Mann ein Mann ein Mann sitzt da am Gras"  # 6 different words of 10
    assert rule(doubled, loops=4) is None and rule(doubled, loops=4, unique_words=0.7) == "repetition"
    assert rule("Un homme et un chien sont assis dans le pré.", identifier="none") is None
    bad: dict[str, Any] = {"length_ratio": [2.0, 0.5], "unique_words": 1.5, "loops": 1, "markers": [""]}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=f"{name} must"):
            Filters(**{name: value})


def test_languages():
    texts = {
        "The man is with his dog.": "en", "Un homme est avec un chien dans la rue et les enfants.": "fr",
        "Muž se psem je na ulici, který si hraje.": "cs", "Собака бежит.": "ru uk", "Ο σκύλος τρέχει.": "el",
        "犬が走る。": "ja", "犬跑": "ja zh", "एक आदमी और कुत्ता": "hi", "Hund Katze": "en fr cs",
        "12 !": "en fr cs ru uk el ja zh hi",
    }  # fmt: skip
    codes = ("en", "fr", "cs", "ru", "uk", "el", "ja", "zh", "hi")
    assert {text: " ".join(code for code in codes if may_be(text, code)) for text in texts} == texts


class Plain:
    """A tokenizer whose tokens are the texts in a list."""

    tokens = ("<eos>", " Ein", " Hund", ".", "\n", "en", ".\n", "#", "d\n", " Hun")
    eos_token_id = 0

    def get_vocab(self):
        return {token: index for index, token in enumerate(self.tokens)}

    def convert_ids_to_tokens(self, token):
        return self.tokens[token]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.tokens[token] for token in ids if token)


@pytest.mark.parametrize(
    ("ids", "response"),
    [
        ([1, 2, 3, 0], ([1, 2, 3, 0], 4, "Ein Hund.", True, False)),
        ([1, 2, 3], ([1, 2, 3], 3, "Ein Hund.", False, False)),  # never ended
        ([1, 2, 3, 4, 5, 0], ([1, 2, 3, 0], 3, "Ein Hund.", True, True)),
        ([4, 1, 2, 4, 5], ([4, 1, 2, 0], 3, "Ein Hund", True, True)),  # a leading break is no end
        ([1, 2, 6, 5], ([1, 2, 3, 0], 2, "Ein Hund.", True, True)),  # ".\n" is one token: "." stands in, unlisted
        ([1, 2, 7, 7, 5], ([1, 2, 0], 2, "Ein Hund", True, True)),  # a marker of two tokens
        ([1, 9, 8, 5], ([1, 9, 0], 2, "Ein Hun", False, True)),  # "d" is no token: the last letter is lost
    ],
)
def test_trim_goes_by_token(ids, response):
    assert trim(Generation(ids, Plain().decode(ids), 0 in ids), Plain(), ("\n", "##")) == response


def test_every_rule_is_counted_once():
    tokenizer = make_tokenizer([GOOD, SOURCE])

    def made(text: str, finished: bool = True) -> Generation:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return Generation(ids + [2] * finished, text, finished)

    texts = ["", SOURCE, "Ein Mann", "Mann Mann Mann Mann Mann Hund", "The man is with his dog on it."]
    generations = [made(GOOD), made(f"{GOOD}\nen: A cat.", False), made(GOOD, False), *map(made, texts)]
    arguments = [[1, 5]] * 8, [Pair(SOURCE, "")] * 8
    kept, rejected = select(generations, *arguments, Maker(tokenizer, "en-de", Filters(), 256))
    found = script.count(kept, rejected)
    assert found == {"generated": 8, "kept": 2, "cut": 1, "rejected": dict.fromkeys(RULES, 1)}
    assert [(each["index"], each["labels"][:2], each["input_ids"][:2], each["labels"][-1]) for each in kept] == [
        (0, [LABEL_PAD] * 2, [1, 5], 2), (1, [LABEL_PAD] * 2, [1, 5], 2)
    ]  # fmt: skip
    maker = Maker(tokenizer, "en-de", Filters(), 5)
    assert select(generations, *arguments, maker)[0] == []  # too long for training: as if it had not ended


def test_prompts_with_examples_and_a_base_that_rambles():
    template = script.with_examples(PROMPTS["tiny"], [Pair("A {dog}.", "Ein {Hund}.")], "en-de")
    assert template.render("A {bird}.", "en-de") == "en: A {dog}.\nde:\nEin {Hund}.\nen: A {bird}.\nde:\n"
    text = script.TEMPLATES["cycle_distill"].render("A dog.", "en-hi")
    assert text.startswith("### Instruction: ") and "\n### Input: English Text: A dog.\n### Response:\n" in text
    tokenizer = make_tokenizer(["A dog\n", "Ein Hund\n"])
    pairs = [Pair("A dog", "Ein Hund"), Pair("A cat", "Die Katze"), Pair("A man", "Der Mann")]
    rows = document_rows(tokenizer, PROMPTS["tiny"], pairs, "en-de", 2) + plain_rows(tokenizer, ["A dog"])
    assert [tokenizer.decode(row["labels"]) for row in rows] == [
        "<s>en: A dog\nde:\nEin Hund\nen: A cat\nde:\nDie Katze</s>", "<s>en: A man\nde:\nDer Mann</s>", "<s>A dog</s>"
    ]  # fmt: skip


def test_monolingual_text(tmp_path):
    with gzip.open(tmp_path / "mono.en.gz", "wt", encoding="utf-8") as file:
        file.write("A  dog.\n\n A cat.\nA man.\n")
    assert load_sentences(str(tmp_path / "mono.en.gz"), "en", 2) == ["A dog.", "A cat."]
    rows = [{"en": "A dog.", "de": "x"}, {"text": "A cat."}, {"translation": {"en": "A man."}}, {"de": "y"}]
    (tmp_path / "mono.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match="skipped 1 bad rows"):
        assert load_sentences(str(tmp_path / "mono.jsonl"), "en", 9) == ["A dog.", "A cat.", "A man."]
    (tmp_path / "empty.txt").write_text("\n")
    for name, error in (("empty.txt", "no usable rows"), ("no-such", "no-such")):
        with pytest.raises(ValueError, match=error):
            load_sentences(str(tmp_path / name), "en", 1)


def a_token_within(made: Any, tokenizer: Any) -> str:
    """The text of a token that some continuation has after its first word: as a marker it cuts between tokens."""
    for generation in made:
        for place in range(1, len(generation.ids)):
            before, token = (tokenizer.decode(generation.ids[part]) for part in (slice(place), slice(place, place + 1)))
            if any(map(str.isalnum, before)) and token.strip() and token not in before and "\ufffd" not in token:
                return str(token)
    raise AssertionError("no such token")


@pytest.mark.parametrize(("dtype", "alpha", "more"), [("fp16", 0.5, 0), ("8bit", 0.3, 0), ("fp16", 0.5, 70_000)])
def test_the_soft_loss_is_the_papers(tmp_path, dtype, alpha, more):
    """(1 - alpha) CE + alpha KL(p~ || q) of lists that belong to the token predicted there, by id."""
    texts = ["A dog sees the cat.\n", "Ein Hund sieht die Katze.\n", "A man sleeps in the garden.\n"]
    tokenizer = make_tokenizer(texts)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(more)])  # more than 16 bits
    hidden, layers = (8, 1) if more else (32, 2)
    model, student = (tiny(hidden, seed, vocab=len(tokenizer), layers=layers).eval() for seed in (0 if more else 3, 4))
    with torch.no_grad():
        if more:
            model.lm_head.weight[:65_600] *= 0.01  # the likely tokens lie above
        else:
            model.lm_head.weight.mul_(0.4)
            model.lm_head.weight[2] *= 2.5  # so that some texts end
    sentences = [Pair(text.strip(), "") for text in (*texts, "The cat sleeps.", "Two dogs.", "A man sees a dog.")]
    template = script.with_examples(PROMPTS["tiny"], [Pair("A {cat}.", "Eine Katze.")], "en-de")
    prompts = encode_prompts(tokenizer, [template.render(pair.source, "en-de") for pair in sentences])
    generate_to(tmp_path / "made", model, tokenizer, prompts, Decoding(2, 12), k=5, dtype=dtype, progress=False)
    made = Generations(tmp_path / "made")
    filters = Filters(markers=[a_token_within(made, tokenizer)], **LAX)
    kept, _ = select(made, prompts, sentences, Maker(tokenizer, "en-de", filters, 256))
    assert len(kept) >= 3 and any(each["cut"] for each in kept)
    rows = [*kept, *tokenize_pairs(tokenizer, template, [Pair("A", "E")], "en-de", 99).rows]
    write_lists(
        tmp_path / "lists", lambda start, stop: ((i, *lists_of(rows[i], made, 5)) for i in range(start, stop)),
        tokenizer, Rows(rows), k=5, template=template, dtype=dtype, shard_rows=2, about={},
        made_from={"teacher_config": None, "teacher_weights": None}, progress=False,
    )  # fmt: skip
    cache = TeacherCache(tmp_path / "lists", tail="renormalize")
    losses: tuple[list[float], list[float]] = [], []
    apart = []
    for number, row in enumerate(rows):
        with torch.no_grad():
            logits, teacher = (m(torch.tensor([row["input_ids"]])).logits[0].double() for m in (student, model))
        log_probs, indices = cache[number]
        prompt = len(row["labels"]) - len(log_probs)
        for token in range(len(log_probs)):
            place, label = prompt - 1 + token, row["labels"][prompt + token]
            if token < row.get("listed", 0):
                values, ids = teacher[place].log_softmax(-1).topk(5)
                assert label == ids[0] and indices[token].tolist() == ids.tolist()
                np.testing.assert_allclose(log_probs[token], values, atol=0.1 if dtype == "8bit" else 5e-3)
                apart.append(float((teacher[place + 1].log_softmax(-1).topk(5).values - values).abs().max()))
            else:  # a cut row's EOS, a real pair
                assert log_probs[token, 0] == 0 and indices[token, 0] == label and log_probs[token, 1] == -math.inf
            log_q = logits[place].log_softmax(-1)
            for shift in (0, 1):
                other = (token + shift) % len(log_probs)
                p = log_probs[other].double().exp()
                p, chosen = p[p > 0] / p.sum(), indices[other][p > 0].long()
                kl = (p * (p.log() - log_q[chosen])).sum()
                losses[shift].append(float((1 - alpha) * -log_q[label] + alpha * kl))
    assert max(apart) > 0.1  # the same comparison one position on fails
    assert not more or max(max(row["labels"]) for row in rows) > 65_535
    objective = script.CycleDistill("x", "en-de", "folder", alpha=alpha).objective("soft")
    data = list(cache.rows(Rows(rows)))
    trainer = KDTrainer(
        student, cache, parse_objective(objective).objective, train_dataset=data,
        args=script.training_arguments(tmp_path / "run"), data_collator=Collator(0),
    )  # fmt: skip
    with torch.no_grad():
        loss = float(trainer.compute_loss(student, dict(Collator(0)(data))))
    assert loss == pytest.approx(np.mean(losses[0]), rel=1e-5) and abs(loss - np.mean(losses[1])) > 1e-2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no_evo", "no_evo:lam=0.2"),
        ("self_evolution:gamma=0.4+1e-4*z_loss", "self_evolution:lam=0.2,gamma=0.4+1e-4*z_loss"),
        ("0.5*self_evolution:gamma=0.4,beta_warmup=0.3", "0.5*self_evolution:lam=0.2,gamma=0.4,beta_warmup=0.3"),
    ],
)
def test_alpha_is_the_lam_of_the_first_objective(text: str, expected: str) -> None:
    recipe = script.CycleDistill("x", "en-de", "folder", alpha=0.2, self_evolution=text)
    assert recipe.objective("soft_self_evolution") == expected
    parse_objective(expected)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"shots": 5}, r"shots must be in \[0, 4\]"),
        ({"pairs": 2, "shots": 3}, "at most pairs"),
        ({"pairs": 4}, "pairs=4 are all examples"),
        ({"variants": ["soft", "nonsense"]}, "nonsense"),
        ({"seeds": []}, "seeds"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"alpha": 1.5}, "alpha"),
        ({"model": "tiny-student"}, "needs pretrain"),
        ({"pretrain": {"max_steps": 1}}, "has no place for pretrain"),
        ({"model": "tiny-student", "pretrain": {"max_steps": 1}, "monolingual": "x"}, "monolingual"),
        ({"self_evolution": "nonsense"}, "nonsense"),
        ({"scorers": ["nonsense"]}, "scorers must name some of log_prob"),
        ({"variants": ["greedy"]}, "greedy is hard with one candidate"),
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"candidates": 2, "temperature": 0.0}, "temperature"),
        ({"scorers": ["round_trip"], "model": "tiny-student", "pretrain": {"max_steps": 1}}, "both_ways"),
        ({"soft": {"load_best_model_at_end": True}}, "held_out"),
    ],
)
def test_bad_settings(changes, error):
    with pytest.raises(ValueError, match=error):
        script.CycleDistill(**{"data": "x", "direction": "en-de", "model": "folder", **changes})
    with pytest.raises(ValueError, match="none of 2 rows"):
        script.hold_out(range(2), 0.9, seed=0)


@pytest.fixture(scope="module", autouse=True)
def small_models() -> Iterator[None]:
    kept, threads = models.PRESETS["small-student"], torch.get_num_threads()
    models.PRESETS["small-student"] = dict(zip(kept, (32, 1, 2, 64), strict=True))
    yield
    models.PRESETS["small-student"] = kept
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rows = [
        {"en": f"The {one} {verb} the {other}.", "de": f"Der {NOUNS[one]} {VERBS[verb]} den {NOUNS[other]}."}
        for verb in VERBS
        for one in NOUNS
        for other in NOUNS
    ]
    rows.sort(key=lambda row: sum((i + 7) * ord(char) ** 2 for i, char in enumerate(row["en"])) % 10_007)
    for split, part in (("train", rows[:120]), ("valid", rows[120:130]), ("test", rows[130:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def command(data: Path, output: Path, **changes: Any) -> list[str]:
    given = ["--preset", "tiny", "--output", str(output), "--data", str(data)]
    for key, value in {**TINY, **changes}.items():
        given += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return given


def cycle_of(data: Path, output: Path, **changes: Any) -> Any:
    classes = (script.CycleDistill, Filters, script.Options)
    return script.Cycle(*parse(classes, command(data, output, **changes), configs=HERE)[:2], output)


class Pretended(Stages):
    """Stages that write what the arms read of them, without the work."""

    chrf: dict[str, float] = {}  # noqa: RUF012

    def __call__(self, title, work, settings, **inputs):
        def pretend(folder: Path) -> None:
            if title == "texts":
                work(folder)
            script.write_jsonl(folder / "rows.jsonl", [{"index": 0}])
            value = next((value for key, value in self.chrf.items() if title.startswith(f"scores-{key}")), 0.0)
            write_json(folder / "scores.json", {"valid": {"chrf": value}})

        return super().__call__(title, pretend, settings, **inputs)


def titles(data: Path, output: Path, **changes: Any) -> dict[str, str]:
    """The stages that a run makes, title to folder name."""
    cycle = cycle_of(data, output, **changes)
    cycle.stages, cycle.tell = Pretended(output), lambda *_: None
    cycle.work()
    return {path.parent.name.rpartition("-")[0]: path.parent.name for path in output.glob("*/done.json")}


def test_a_change_reaches_what_depends_on_it(data, tmp_path):
    before = titles(data, tmp_path / "before")

    def changed(**changes: Any) -> set[str]:
        after = titles(data, tmp_path / str(changes), **changes)
        return {title for title in before if after.get(title) != before[title]}

    later = {f"{kind}-seed0" for arm in ("hard", "soft") for kind in (f"translations-{arm}-1", f"synthetic-{arm}-2")}
    trained = {f"-{arm}-{i}-seed0" for arm in ("hard", "soft", "control", "ceiling") for i in (1, 2)}
    trained = {f"{kind}{title}" for kind in ("model", "scores") for title in trained}
    filtered = changed(unique_words=0.1)
    assert {"synthetic-hard-1-seed0", "synthetic-soft-2-seed0", "rows-ceiling-seed0"} <= filtered
    assert not {title for title in filtered if title.startswith(("translations-base", "model-control", "scores-base"))}
    assert changed(alpha=0.3) == {title for title in trained | later if "soft" in title}
    assert changed(training='{"weight_decay": 0.2}') == trained | later
    assert changed(shots=2) == set(before) - {"texts", "tokenizer", "base-seed0"}
    assert changed(sentences=20) == set(before)
    assert changed(bootstrap=0, samples=1) == set()


@pytest.mark.parametrize("restart", [False, True])
def test_chain_or_restart(data, tmp_path, restart):
    made = titles(data, tmp_path, restart_from_base=restart)

    def needs(title: str) -> list[str]:
        return [name.rpartition("-")[0] for name in read_json(tmp_path / made[title] / "stage.json")["needs"]]

    start = "base-seed0" if restart else "model-hard-1-seed0"
    assert needs("model-hard-1-seed0") == ["base-seed0", "synthetic-hard-1-seed0"]
    assert needs("model-hard-2-seed0") == [start, "synthetic-hard-2-seed0"]
    assert needs("synthetic-hard-2-seed0") == ["translations-hard-1-seed0"]  # either way M_1 translates
    assert needs("translations-hard-1-seed0")[1] == "model-hard-1-seed0"
    assert ("model-control-2-seed0" in made) is not restart


def test_an_arm_ends_when_chrf_stops_rising(data, tmp_path, monkeypatch):
    chrf = {"base": 20.0, "hard-1": 21.0, "hard-2": 21.0, "hard-3": 30.0, "soft-1": 19.0, "soft-2": 30.0}
    monkeypatch.setattr(Pretended, "chrf", chrf)

    def lengths(stop: bool) -> list[int]:
        made = titles(data, tmp_path / str(stop), iterations=3, stop=stop)
        return [sum(title.startswith(f"scores-{arm}") for title in made) for arm in ("hard", "soft", "control")]

    assert lengths(stop=True) == [2, 1, 2] and lengths(stop=False) == [3, 3, 3]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("cycle") / "run"
    script.main(command(data, output))
    return output


def folder_of(output: Path, title: str) -> Path:
    (found,) = (path for path in output.iterdir() if path.name.rpartition("-")[0] == title)
    return found


def test_everything_is_written(finished, data, monkeypatch):
    metrics = read_json(finished / "metrics.json")
    seed = metrics["seeds"]["0"]
    arms = seed["arms"]
    assert list(arms) == ["hard", "soft", "control", "ceiling"]
    assert set(seed["base"]["valid"]) >= {"bleu", "chrf", "raw", "finished", "chrf_signature"}
    for arm, rounds in arms.items():  # equal steps in all arms
        assert [(each["iteration"], each["steps"]) for each in rounds] == [(1, 3), (2, 3)]
        for each in rounds if arm in ("hard", "soft") else []:
            counts = each["counts"]
            assert counts["generated"] == 24 == counts["kept"] + sum(counts["rejected"].values())
            assert each["rows"] == counts["kept"] > 0 and len(each["samples"]) == 4
    assert arms["hard"][0]["counts"] == arms["soft"][0]["counts"]  # of the same translations
    assert arms["hard"][0]["counts"]["cut"] > 0  # the base was taught no end of a translation
    assert arms["control"][0]["rows"] == 90 and arms["ceiling"][0]["rows"] == arms["hard"][0]["rows"]
    assert {test["baseline"] for test in seed["tests"]} == {"base", "control"}
    mean = {(row["arm"], row["iteration"]): row for row in metrics["mean"]}
    assert mean["soft", 2]["each_chrf"] == pytest.approx([arms["soft"][1]["test"]["chrf"]])
    assert mean["base, raw", 0]["chrf"] == pytest.approx(seed["base"]["test"]["raw"]["chrf"])
    assert mean["hard", 1]["steps"] == 3 and (finished / "chrf.png").read_bytes().startswith(b"\x89PNG")
    texts = read_json(folder_of(finished, "texts") / "texts.json")
    rows = script.read_jsonl(data / "train.jsonl")
    assert [pair[0] for pair in texts["pairs"] + texts["sentences"]] == [row["en"] for row in rows[:114]]
    assert texts["plain"] == [row["de"] for row in rows[114:]]  # of other captions than the English sentences
    with monkeypatch.context() as patch:  # the same command again does nothing
        patch.setattr(script, "fit", None)
        patch.setattr(script, "generate_to", None)
        assert json.loads(json.dumps(script.main(command(data, finished)))) == metrics
    cycle = cycle_of(data, finished)  # the prompts of generation and training are the same
    prompts = cycle.prompts(cycle.texts.sentences)
    for row in script.read_jsonl(folder_of(finished, "synthetic-soft-2-seed0") / "rows.jsonl"):
        prompt = prompts[row["index"]]
        assert row["input_ids"][: len(prompt)] == prompt and row["labels"].count(LABEL_PAD) == len(prompt)


def test_killed_in_every_stage(finished, data, tmp_path, monkeypatch):
    """Each piece of work dies when it is first done, generation in its second batch: the results are the same."""
    for title in ("texts", "tokenizer", "base-seed0"):
        shutil.copytree(folder_of(finished, title), tmp_path / folder_of(finished, title).name)
    dead: set[str] = set()

    def dying(owner: Any, name: str, calls: int = 1) -> None:
        work, seen = getattr(owner, name), []

        def once(*args: Any, **kwargs: Any) -> Any:
            made = work(*args, **kwargs)
            seen.append(name)
            if len(seen) == calls:
                dead.add(name)
                raise KeyboardInterrupt
            return made

        monkeypatch.setattr(owner, name, once)

    names = {"fit", "generate_to", "write_jsonl", "write_lists", "score"}
    monkeypatch.setattr("cycle_report.write_plot", lambda *_: None)
    for name in names:
        dying(script, name)
    dying(LlamaForCausalLM, "generate", 4)  # after the base's valid and test sentences: the second batch of three
    dying(KDTrainer, "training_step", 2)
    for _ in range(len(names) + 3):
        with contextlib.suppress(KeyboardInterrupt):
            script.main(command(data, tmp_path, iterations=1, bootstrap=0))
            break
    assert dead == names | {"generate", "training_step"}
    for title in ("translations-base", "synthetic-soft-1", "scores-hard-1", "scores-soft-1", "scores-ceiling-1"):
        one, other = (folder_of(output, f"{title}-seed0") for output in (tmp_path, finished))
        files = {path.relative_to(one) for path in one.rglob("*") if path.is_file() and path.name != ".lock"}
        assert files and all((one / file).read_bytes() == (other / file).read_bytes() for file in files), title


def test_paper_preset_with_a_model_from_a_folder(finished, data, tmp_path):
    """LoRA, monolingual text of its own, few-shot prompt, best by held-out loss, 8-bit lists, Self-Evolution."""
    pytest.importorskip("peft")
    from safetensors.torch import load_file

    mono, run, own = tmp_path / "mono.en", tmp_path / "run", folder_of(finished, "base-seed0") / "model"
    mono.write_text("".join(f"The {one} hears the {other}.\n" for one in NOUNS for other in list(NOUNS)[:3]))
    values = {
        "output": run, "data": data, "monolingual": mono, "model": own, "direction": "en-de", "sentences": 12,
        "pairs": 12, "shots": 2, "iterations": 1, "hard": '{"max_steps": 2}', "soft": '{"max_steps": 2}',
        "training": '{"bf16": false, "gradient_checkpointing": false}', "dtype": "float32", "valid_limit": 2,
        "test_limit": 2, "max_new_tokens": 16, "lists": "8bit", "k": 4, "bootstrap": 0, "prompt": "tiny",
        "keep_parallel": True, "unique_words": 0, "loops": 1000, "identifier": "none",
    }  # fmt: skip
    given = [f"--{key}={value}" for key, value in values.items()]
    given += ["--variants", "hard", "soft_self_evolution", "--length_ratio", "0", "1000"]
    arms = script.main(["--preset", "paper", *given])["seeds"]["0"]["arms"]
    assert list(arms) == ["hard", "soft_self_evolution", "control"]  # no references, no ceiling
    (soft,) = arms["soft_self_evolution"]
    assert soft["objective"] == "self_evolution:lam=0.5,gamma=0.4,beta=0.5" and len(soft["validation"]) >= 1
    train, valid = script.hold_out(range(10), 0.2, seed=1)
    assert len(train) == 8 and sorted([*train, *valid]) == list(range(10))
    assert soft["rows"] == soft["counts"]["kept"] + 10 and soft["counts"]["parallel"] == 10
    folder = folder_of(run, "model-hard-1-seed0")
    options = read_json(folder / "stage.json")["settings"]["training"]
    assert (options["gradient_accumulation_steps"], options["warmup_steps"], options["learning_rate"]) == (8, 5, 2e-4)
    low = load_file(folder / "model" / "adapter_model.safetensors")
    base, merged = (LlamaForCausalLM.from_pretrained(path).state_dict() for path in (own, folder / "merged"))
    assert sum("lora_A" in name for name in low) == 7
    for name, value in base.items():  # W + (alpha / r) B A for each adapted matrix, all else as it was
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in low:
            value = value + 4 / 2 * low[f"{key}.lora_B.weight"] @ low[f"{key}.lora_A.weight"]
            assert not torch.equal(value, base[name])
        torch.testing.assert_close(merged[name], value, atol=1e-6, rtol=1e-5)


def test_what_is_missing_is_said_before_any_work(data, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = ["--direction", "en-de", "--data", str(data)]
    cases = {
        r"meta-llama/Llama-3\.1-8B": ["--preset", "paper", *given],
        r"no-such.*give parallel text as --data PATH": ["--preset", "tiny", "--data", "./no-such"],
        r"pairs=4000 leaves no sentences of the 120": ["--preset", "tiny", *given],
        "nonsense": [*command(data, tmp_path), "--nonsense", "1"],
        "lerning_rate": [*command(data, tmp_path), "--training", '{"lerning_rate": 1}'],
    }
    for number, (error, arguments) in enumerate(cases.items()):
        with pytest.raises(ValueError, match=error):
            script.main([*arguments, "--output", str(tmp_path / str(number))])
    assert not list(tmp_path.glob("*/*/done.json"))


def test_mbr_is_mean_chrf():
    sacrebleu = pytest.importorskip("sacrebleu")
    texts = ["Ein Mann sitzt im Gras.", "Ein Mann steht im Gras .", "Zwei Hunde", "ab", "a", "Ein Mann sitzt im Gras."]
    expected = [[sacrebleu.sentence_chrf(one, [other]).score for other in texts] for one in texts]
    np.testing.assert_allclose(chrf_matrix(texts), expected, atol=1e-9)
    np.testing.assert_allclose(mbr_scores(texts), np.mean(expected, axis=1), atol=1e-9)
    parts = [[np.array([1.0, 3.0])], [np.array([5.0, 5.0])]]
    assert summed(parts) == [[-1, 1]] and summed(parts[:1]) == [[1, 3]]
    assert standardised([1.0, 1.0]).tolist() == [0, 0] and standardised([1.0, 3.0]).tolist() == [-1, 1]


def test_mean_log_probs_of_a_batch_are_those_of_single_rows():
    tokenizer = make_tokenizer(["A dog sees the cat."])
    model = tiny(32, 3, vocab=len(tokenizer)).train()
    prompts, responses = [[1, 5, 6], [1, 7], [1, 8, 9, 10]], [[4, 2], [9, 8, 7, 2], [2]]
    found = mean_log_probs(model, tokenizer, prompts, responses, batch_size=2)
    assert model.training
    for value, prompt, response in zip(found, prompts, responses, strict=True):
        with torch.no_grad():
            log_probs = model.eval()(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
        each = [log_probs[len(prompt) - 1 + place, token] for place, token in enumerate(response)]
        assert value == pytest.approx(float(sum(each) / len(each)), abs=1e-5)


def test_the_best_candidate_of_each_sentence_is_kept():
    tokenizer = make_tokenizer([GOOD, SOURCE])
    texts = [
        ["", GOOD, "Ein Mann mit Hund sitzt auf dem Gras."], [SOURCE, "", "Mann"],
        [GOOD, "", "Ein Hund und ein Mann sitzen am Gras."],
    ]  # fmt: skip
    made = [
        Generation([*tokenizer(text, add_special_tokens=False)["input_ids"], 2], text, True)
        for group in texts
        for text in group
    ]
    given = made, [[1, 5]] * 3, [Pair(SOURCE, "")] * 3, Maker(tokenizer, "en-de", Filters(), 256)
    seen = []

    def last(groups: list[Any]) -> list[list[float]]:
        seen.extend([[row["text"] for row in group] for group in groups])
        return [[number + (group[0]["index"] == 2) for number in range(len(group))] for group in groups]

    kept, rejected = select(*given, last)
    assert seen == [texts[0][1:], [texts[2][0], texts[2][2]]]  # what passed the filters
    assert [(row["index"], row["made"], row["text"]) for row in kept] == [(0, 2, texts[0][2]), (2, 8, texts[2][2])]
    assert [(row["index"], row["rule"]) for row in rejected] == [(1, "copy")]
    assert [row["made"] for row in select(*given)[0]] == [1, 6]  # the first that passes


def test_candidates_by_the_model_itself(data, tmp_path):
    """Sampled candidates, chosen by MBR and round trip; a report of the run's rounds alone is the same."""
    changes = {
        "candidates": 3, "scorers": ["mbr", "round_trip"], "iterations": 1, "web": 60, "both_ways": True, "pairs": 20,
        "continued": True, "bootstrap": 0,
    }  # fmt: skip
    found = script.main(command(data, tmp_path / "run", stages=tmp_path / "stages", **changes))
    arms = found["seeds"]["0"]["arms"]
    assert list(arms) == ["hard", "soft", "control", "continued", "ceiling"]
    assert {arm: rounds[0]["rows"] for arm, rounds in arms.items() if arm not in ("hard", "soft", "ceiling")} == {
        "control": 20, "continued": 2 * 2 * 20
    }  # fmt: skip
    made = Generations(folder_of(tmp_path / "stages", "translations-base-seed0"))
    assert len(made) == 3 * 24 and any(made[i].ids != made[i + 1].ids for i in range(0, 72, 3))
    cycle_report.main([str(tmp_path / "run"), "--output", str(tmp_path / "again")])
    assert read_json(tmp_path / "again" / "metrics.json") == read_json(tmp_path / "run" / "metrics.json")
    (tmp_path / "run" / "rounds" / "ceiling-1-seed0.json").unlink()  # as if it had been killed before
    cycle_report.main([str(tmp_path / "run"), "--output", str(tmp_path / "part")])
    assert list(read_json(tmp_path / "part" / "metrics.json")["seeds"]["0"]["arms"]) == list(arms)[:-1]
    more = {"variants": "greedy", "control": False, "continued": False, "ceiling": False, "stages": tmp_path / "stages"}
    script.main(command(data, tmp_path / "greedy", **{**changes, **more}))  # another process of the same stages
    assert len(Generations(folder_of(tmp_path / "stages", "translations-greedy-base-seed0"))) == 24
    cycle_report.main([str(tmp_path / "greedy"), str(tmp_path / "run"), "--output", str(tmp_path / "both")])
    both = read_json(tmp_path / "both" / "metrics.json")
    assert list(both["seeds"]["0"]["arms"]) == ["hard", "greedy", "soft", "control", "continued"]
    assert both["seeds"]["0"]["arms"]["soft"] == arms["soft"]
    stages = {"stages": tmp_path / "stages", "output": tmp_path / "probe", "temperatures": [0.5]}
    with pytest.raises(ValueError, match=r"base-seed0-\w+: none of its 18 translations passed the filters"):
        probe.main(command(data, **{**changes, **stages, "length_ratio": [900, 1000]}))
    (probed,) = probe.main(command(data, **{**changes, **stages}))
    others = ("sample", "mbr", "log_prob + round_trip + mbr")
    assert probed["oracle"]["chrf"] >= max(probed[name]["chrf"] for name in others)
