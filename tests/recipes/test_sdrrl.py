"""SDRRL: texts to rows, translators, the caption tasks, and the script end to end with micro models."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

for library in ("transformers", "accelerate", "sacrebleu", "tokenizers", "pandas", "tabulate", "matplotlib"):
    pytest.importorskip(library)

import torch  # noqa: E402
import transformers  # noqa: E402

from fused_kd.training.generate import Decoding  # noqa: E402
from fused_kd.training.script import parse  # noqa: E402
from fused_kd.training.stage import Stages, tell  # noqa: E402

from ..training.byte_level import make_tokenizer  # noqa: E402
from ..training.tiny import tiny  # noqa: E402

HERE = Path(__file__).parents[2] / "examples" / "sdrrl"
sys.path.append(str(HERE))

import sdrrl  # noqa: E402
import sdrrl_report  # noqa: E402
import transfer  # noqa: E402
from caption_tasks import CaptionStudy, caption_files, concept_of, make_tasks, score_answers  # noqa: E402

EN_DE = ("en", "de")
TSV = "dog\thund\ndog\tköter\nred\trot\ncat\tkatze\nshirt\themd\nball\tball\nt-shirt\tt-shirt\n\nice\teis\n"
ANSWER_IN = {"en-de": "Answer in German.", "de-en": "Antworte auf Englisch."}


def texts(instruction: str, given: str, output: str) -> dict[str, str]:
    return {"instruction": instruction, "input": given, "output": output}


PAIR = {
    "id": "one",
    "source": texts("Which colour?", "A red dog.", "red"),
    "target": texts("Welche Farbe?", "Ein roter Hund.", "rot"),
    "scores": {"instruction": 1.0, "input": 0.8, "output": 0.5},
}

# code-switching


@pytest.fixture
def both(tmp_path):
    with gzip.open(tmp_path / "en-de.tsv.gz", "wt", encoding="utf-8") as file:
        file.write(TSV)
    return transfer.load_dictionary(str(tmp_path / "en-de.tsv.gz"))


def test_dictionary_is_read_in_both_directions(both, tmp_path):
    forward, backward = both
    assert forward == {"dog": ["hund", "köter"], "red": ["rot"], "cat": ["katze"], "shirt": ["hemd"], "ice": ["eis"]}
    assert backward["hund"] == ["dog"] == backward["köter"] and "ball" not in backward
    with pytest.raises(ValueError, match="cannot be read"):
        transfer.load_dictionary(str(tmp_path / "none.tsv"))
    for text, error in (("dog\thund\nred rot\n", "line 2"), ("dog\t\n", "line 1"), ("ball\tball\n", "no pairs")):
        (tmp_path / "bad.tsv").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=error):
            transfer.load_dictionary(str(tmp_path / "bad.tsv"))


def test_whole_words_are_switched_in_their_case(both):
    def switch_all(text, senses):
        return transfer.code_switch(text, senses, p=1.0, seed=0, key="row")

    forward, backward = both
    assert switch_all("red cat,  (Red) CAT!\n«cat» rEd", forward) == "rot katze,  (Rot) KATZE!\n«katze» rot"
    assert switch_all("rotes Eis, rot", backward) == "rotes Ice, red"
    # parts of words, and words that are not there, stay
    plain = "reddish cats catalogue hot-dog dog's T-Shirt i_cat 3cat cat3 x"
    assert switch_all(plain, forward) == plain
    assert transfer.translate_words(["A dog's DOG, a bird"], forward) == ["A dog's HUND, a bird"]


def test_rate_senses_and_independence_of_words(both):
    words: Counter = Counter()
    pairs: Counter = Counter()
    for row in range(4000):
        made = transfer.code_switch("dog other dog", both[0], p=0.15, seed=3, key=f"row{row}").split()
        words[made[0]] += 1
        pairs[made[0] != "dog", made[2] != "dog"] += 1
        assert made[1] == "other"
    # 4,000 draws: a deviation of 0.0056; the two senses share what is switched
    assert words["hund"] + words["köter"] == pytest.approx(600, abs=70)
    assert words["hund"] == pytest.approx(words["köter"], abs=75)
    assert pairs[True, True] / 4000 == pytest.approx(0.15**2, abs=0.008)


def test_a_row_is_switched_by_seed_and_key_alone(both):
    forward, text = both[0], "dog red cat shirt ice " * 8
    row = transfer.code_switch(text, forward, p=0.5, seed=1, key="row")
    assert transfer.code_switch(text, forward, p=0.5, seed=2, key="row") != row
    assert transfer.code_switch(text, forward, p=0.5, seed=1, key="other") != row
    # a word that the dictionary learns changes no other word
    fewer = {word: senses for word, senses in forward.items() if word != "cat"}
    assert transfer.code_switch(text, fewer, p=0.5, seed=1, key="row") == re.sub("katze", "cat", row) != row
    # a fixed value, so that a change of the draws is seen: stages on disk would not know of it
    assert transfer.code_switch("dog red cat shirt ice", forward, p=0.5, seed=0, key="a") == "dog rot katze hemd ice"


# pairs and rows


def test_combinations_and_their_language_instructions():
    rows = transfer.combine([PAIR], transfer.COMBINATIONS, EN_DE, ANSWER_IN)
    assert rows == [
        {"id": "one", "part": "ss", **texts("Which colour?", "A red dog.", "red")},
        {"id": "one", "part": "st", **texts("Which colour? Answer in German.", "A red dog.", "rot")},
        {"id": "one", "part": "ts", **texts("Welche Farbe? Antworte auf Englisch.", "Ein roter Hund.", "red")},
        {"id": "one", "part": "tt", **texts("Welche Farbe?", "Ein roter Hund.", "rot")},
    ]
    # answers and language instructions are not switched
    row = transfer.combine([PAIR], ("ts",), EN_DE, {}, lambda text, language, key: f"{language}|{text}|{key}")[0]
    assert row["instruction"] == "de|Welche Farbe?|one ts instruction Answer in English." and row["output"] == "red"
    assert transfer.translation_rows([{"en": "A dog.", "de": "Ein Hund."}], EN_DE, {"en-de": "Into German:"}) == [
        {"id": "parallel-0", "part": "en-de", **texts("Into German:", "A dog.", "Ein Hund.")},
        {"id": "parallel-0", "part": "de-en",
         **texts("Translate the following text from German to English.", "Ein Hund.", "A dog.")},
    ]  # fmt: skip


def test_filter_takes_the_worst_text_and_its_threshold():
    assert transfer.round_trip(["abc", "red", "red"], ["abd", "red", ""]) == pytest.approx([7 / 18, 1.0, 0.0])  # chrF
    scores = [PAIR["scores"], {"input": 0.6, "output": 0.6}, {"input": 0.59999, "output": 1.0}, {}]
    found = [PAIR | {"id": str(number), "scores": score} for number, score in enumerate(scores)]
    good, counts = transfer.kept(found, 0.6)
    assert [row["id"] for row in good] == ["1"]
    assert counts == {"candidates": 4, "untranslated": 1, "below_tau": 2, "kept": 1}
    assert transfer.kept(found, None)[1] == {"candidates": 4, "untranslated": 1, "below_tau": 0, "kept": 3}
    known = {text: {"translation": text.upper(), "score": 0.7} for text in ("Q", "I", "A")}
    row = {"id": "x", **texts("Q", "", "A")}
    assert transfer.pair_up(row, known, known)["target"] == texts("Q", "", "A")
    assert transfer.pair_up(row, known, known)["scores"] == {"instruction": 0.7, "output": 0.7}
    assert transfer.pair_up(row, known, {"A": {"translation": "", "score": None}})["scores"] == {}


def test_comet_kiwi_is_asked_without_references(tmp_path):
    command = tmp_path / "comet-score"
    command.write_text(
        f"#!{sys.executable}\nimport json, sys\na = sys.argv\n"
        "assert '-r' not in a and a[a.index('--model') + 1] == 'm'\n"
        "lines = [open(a[a.index(f) + 1]).read().splitlines() for f in ('-s', '-t')]\n"
        "rows = [{'src': s, 'mt': t, 'COMET': len(s) / 10 + len(t)} for s, t in zip(*lines, strict=True)]\n"
        "json.dump({'t': rows}, open(a[a.index('--to_json') + 1], 'w'))\n"
    )
    command.chmod(0o755)
    assert transfer.comet_kiwi(tmp_path, ["a\nb", "c"], ["d", "ee"], str(command), "m", 2) == [1.3, 2.1]
    with pytest.raises(ValueError, match="comet='no-such-command' gave no scores"):
        transfer.comet_kiwi(tmp_path, ["a"], ["b"], "no-such-command", "m", 2)


def test_fill_makes_counts_equal():
    for size in (3, 7, 10, 24):
        times = Counter(transfer.fill(list(range(size)), 10, seed=1))
        assert times.total() == 10 and max(times.values()) - min(times[row] for row in range(size)) <= 1
    assert transfer.fill([1, 2, 3], 9, seed=1) == transfer.fill([1, 2, 3], 9, seed=1) != transfer.fill([1, 2, 3], 9, 2)


def test_shares_weigh_parts_and_pairs_are_cut():
    rows = [{"id": str(n), "part": part} for part in ("ss", "tt", "en-de", "de-en") for n in range(5)]
    shares = {"ss": 1, "tt": 3, "parallel": 2}
    filled = transfer.fill(rows, 60, 1, shares)
    parts = Counter(row["part"] for row in filled)
    assert (parts["ss"], parts["tt"], parts["en-de"] + parts["de-en"]) == (10, 30, 20)
    times = Counter((row["id"], row["part"]) for row in filled if row["part"] != "ss")
    assert set(times.values()) == {2, 6}  # evenly within a part
    assert [row["part"] for row in filled[:30]].count("tt") not in (0, 30)  # and in random order
    assert len(transfer.fill(rows, 7, 1, shares)) == 7
    for values, error in (
        ({"shares": {"ss": 1}}, "shares="),
        ({"shares": dict.fromkeys([*transfer.COMBINATIONS, "parallel"], 0)}, "shares="),
        ({"pairs": 0}, "pairs must be at least 1"),
    ):
        with pytest.raises(ValueError, match=error):
            transfer.Arm(**values)


# translators


def test_texts_are_divided_at_lines_and_sentence_ends():
    text = 'One e.g. two. Three? "Four!" Five\n\n- six. Seven'
    pieces = ["One e.g. two.", "Three?", '"Four!" Five', "- six.", "Seven"]
    assert transfer.divide(text)[::2] == pieces and "".join(transfer.divide(text)) == text
    asked: list[str] = []

    def upper(texts):
        asked.extend(texts)
        return ["" if "bad" in text else f" {text.upper()}\n" for text in texts]

    made = transfer.translate_texts([text, "Seven", "fine. Bad bad", "", text], upper)
    assert made == {text: text.upper(), "Seven": "SEVEN", "fine. Bad bad": "", "": ""}
    assert asked == [*pieces, "fine.", "Bad bad"]


CODES = {"en": "eng_Latn", "de": "deu_Latn"}
TEXTS = ["a dog", "the cat sees a dog here", "cat", "a cat and the old dog", "dogs"]


@pytest.fixture(scope="module")
def nllb(tmp_path_factory):
    """A tiny M2M100 with NLLB's own tokenizer class, saved as on the hub."""
    folder = tmp_path_factory.mktemp("nllb")
    letters = ["<s>", "<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = {token: number for number, token in enumerate(letters)}
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
    return str(folder), tokenizer, model


def by_hand(tokenizer, model, text: str, direction: tuple[str, str], most: int) -> str:
    """Greedy, one text, no cache: language, text and EOS in; EOS, language out, and what the model says then."""
    start, language = (tokenizer.convert_tokens_to_ids(CODES[code]) for code in direction)
    encoded = torch.tensor([[start, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])
    ids = [tokenizer.eos_token_id, language]
    with torch.no_grad():
        while len(ids) <= most and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(input_ids=encoded, decoder_input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids, skip_special_tokens=True) if ids[-1] == tokenizer.eos_token_id else ""


def test_seq2seq_is_the_models_own_greedy_translation_after_a_kill_too(tmp_path, nllb, monkeypatch):
    folder, tokenizer, model = nllb
    generate, sizes = transformers.M2M100ForConditionalGeneration.generate, []

    def dying(self, **inputs):
        sizes.append(len(inputs["input_ids"]))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return generate(self, **inputs)

    monkeypatch.setattr(transformers.M2M100ForConditionalGeneration, "generate", dying)
    there = tmp_path / "there", folder, CODES, EN_DE, TEXTS, Decoding(2, 12)
    with pytest.raises(KeyboardInterrupt):
        transfer.translate_seq2seq(*there)
    made = transfer.translate_seq2seq(*there)
    assert made == [by_hand(tokenizer, model, text, EN_DE, 12) for text in TEXTS] and "" in made and any(made)
    assert sizes == [2, 2, 2, 1]  # the first batch is not made again
    back = transfer.translate_seq2seq(tmp_path / "back", folder, CODES, ("de", "en"), TEXTS, Decoding(2, 12))
    assert back == [by_hand(tokenizer, model, text, ("de", "en"), 12) for text in TEXTS] != made

    for name, codes, direction, error in (
        (folder, CODES, ("fr", "de"), "no code for the language 'fr'"),
        (folder, CODES | {"de": "deu_Latin"}, EN_DE, "'deu_Latin' is no language"),
        ("none", CODES, EN_DE, "translator='none' is neither a folder nor a hub name"),
    ):
        with pytest.raises(ValueError, match=error):
            transfer.translate_seq2seq(tmp_path, name, codes, direction, TEXTS, Decoding())


# caption tasks


def test_what_captions_say():
    for kind, en, de, concept in (
        ("colour", "A man in a red shirt.", "Ein Mann in einem roten Hemd.", "red"),
        ("colour", "A red and blue kite.", "Ein rot-blauer Drachen in Rot und Blau.", None),
        ("number", "Two boys run.", "Zwei Jungen rennen.", "two"),
        ("animal", "Dogs play.", "Hunde spielen.", "dog"),
        ("place", "People in the street.", "Leute auf der Straße.", "outdoors"),
        ("person", "A young woman.", "Eine junge Frau.", "woman"),  # "junge" is no boy
        ("person", "A boy.", "Ein Junge.", "boy"),
    ):
        assert concept_of(kind, en, "en") == concept_of(kind, de, "de") == concept


def captions(count: int) -> list[dict[str, str]]:
    colours = [("red", "roten"), ("blue", "blauen"), ("green", "grünen")]
    animals = [("dog", "Hund"), ("dog", "Hund"), ("horse", "Pferd")]
    return [
        {
            "en": f"The {colours[n % 3][0]} {animals[n // 3 % 3][0]} number {n} is over there.",
            "de": f"Beim {colours[n % 3][1]} {animals[n // 3 % 3][1]} Nummer {n} sind wir jetzt.",
        }
        for n in range(count)
    ]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_tasks_are_asked_where_both_captions_agree():
    rows = [*captions(30), {"en": "A red dog and some more words here.", "de": "Ein blauer Hund und noch mehr Worte."}]
    tasks = make_tasks(EN_DE, "x", rows, 9, 5)
    assert Counter(task["kind"] for task in tasks) == {"colour": 9, "animal": 9, "completion": 5}
    answers = Counter(task["de"]["output"] for task in tasks if task["kind"] == "animal")
    assert answers == {"Hund": 5, "Pferd": 4}  # drawn in turn, though dogs are twice as many
    for task in tasks:
        number = int(task["id"].rsplit("-", 1)[1])
        assert not (task["kind"] == "colour" and number == 30)
        whole = [task["de"]["input"], *([task["de"]["output"]] if task["kind"] == "completion" else [])]
        assert " ".join(whole) == rows[number]["de"]
    assert make_tasks(EN_DE, "x", rows, 9, 5) == tasks


def test_parts_of_a_study_share_no_captions(tmp_path):
    rows = captions(160)
    for name, part in (("train", rows[:100]), ("val", rows[100:130]), ("test_a", [*rows[130:], rows[0]])):
        write_lines(tmp_path / f"{name}.jsonl", part)
    study = CaptionStudy(
        transfer_captions=30, questions=10, completions=8, base_questions=50, base_completions=9, base_source=11,
        base_target=15, term_repeats=2, test_questions=40, test_completions=40, test_files=["test_a"],
    )  # fmt: skip
    files = caption_files(str(tmp_path), study, 20, EN_DE)
    assert len(files["instructions"]) == 25 and len(files["validation"]) == 3 and len(files["parallel"]) == 20
    assert len(files["translator"]) == 35 + 2 * (6 + 30)

    def numbers(*names: str) -> set[int]:
        shown = json.dumps([files[name] for name in names], ensure_ascii=False)
        return {int(number) for number in re.findall(r"(?:number|Nummer) (\d+)", shown)}

    groups = [numbers("instructions", "validation"), *map(numbers, ("parallel", "translator", "dev", "test"))]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert 0 not in numbers("test") and len(numbers("test")) == 30  # row 0 is in train too
    plain = [row["output"] for row in files["base"] if not row["instruction"]]
    assert len(plain) == 26 and sum(text.startswith("Beim") for text in plain) == 15
    assert not any(row["output"] in ("Hund", "rot") for row in files["base"])  # no tasks in the target language
    with pytest.raises(ValueError, match="too few"):
        caption_files(str(tmp_path), CaptionStudy(transfer_captions=90), 20, EN_DE)
    with pytest.raises(ValueError, match="no such folder"):
        caption_files("no/such/folder", study, 20, EN_DE)
    with pytest.raises(ValueError, match="two languages"):
        caption_files(str(tmp_path), study, 20, ("en", "fr"))


def test_scores_of_answers():
    red, grass = ("colour", "rot", "red"), ("completion", "auf dem Gras.", "on the grass.")
    words = [red, ("colour", "blau", "blue"), ("animal", "Hund", "dog"), grass, red, red]
    tasks = [
        {"id": str(n), "kind": k, "de": texts("", "", a), "en": texts("", "", b)} for n, (k, a, b) in enumerate(words)
    ]
    scores = score_answers(tasks, ["Rot.", "blue", " hund", "auf dem Gras.", "grün", "rot"], "de")
    # two of four colours, one of one animal: the mean over kinds
    assert scores["accuracy_by_kind"] == {"animal": 100.0, "colour": 50.0} and scores["accuracy"] == 75.0
    assert scores["hits"] == {"animal": "1", "colour": "1001"}
    assert scores["elsewhere"] == 12.5 and scores["majority"] == pytest.approx((75 + 100) / 2)
    assert scores["chrf"] == pytest.approx(100) and scores["exact"] == 100 and scores["completions"] == 1
    plain = score_answers([tasks[3] | {"kind": ""}], ["etwas anderes"], "de")
    assert plain["accuracy"] is None and plain["chrf"] < 30 and plain["questions"] == 0


# the script

# every word of the captions, and one that does not come back: green is blue
SMALL_TSV = "red\troten\nblue\tblauen\ngreen\tblauen\ndog\thund\nhorse\tpferd\nthe\tbeim\nnumber\tnummer\n"
SMALL_TSV += "is\tsind\nover\twir\nthere\tjetzt\n"
SMALL = """
{captions: FOLDER, transfer_captions: 30, held_out: 0.3, questions: 8, completions: 4, parallel_sentences: 6,
 base_questions: 30, base_completions: 5, base_source: 10, base_target: 5, term_repeats: 1, test_questions: 4,
 test_completions: 3, test_files: [test_a], dictionary: FOLDER/en-de.tsv, translator_kind: dictionary, tau: 0.0,
 model: tiny-student, pretraining: {num_train_epochs: 8, learning_rate: 4e-3, per_device_train_batch_size: 16},
 training: {num_train_epochs: 1, learning_rate: 1e-3, per_device_train_batch_size: 16}, prompt: tiny,
 answers: {batch_size: 64, max_new_tokens: 12}, max_length: 128, vocab: 400, p: 0.5,
 arms: {sdrrl: {}, sft: {answers: given, combinations: [ss], code_switch: false, parallel: false}}}
"""


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> Path:
    folder, rows = tmp_path_factory.mktemp("preset"), captions(150)
    for name, part in (("train", rows[:100]), ("val", rows[100:125]), ("test_a", rows[125:])):
        write_lines(folder / f"{name}.jsonl", part)
    (folder / "en-de.tsv").write_text(SMALL_TSV, encoding="utf-8")
    (folder / "small.yaml").write_text(SMALL.replace("FOLDER", str(folder)), encoding="utf-8")
    return folder / "small.yaml"


@pytest.fixture(scope="module")
def finished(preset, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("sdrrl") / "run"
    return output, sdrrl.main([str(preset), "--output", str(output)])


def make_study(preset: Path, output: Path, *flags: str) -> sdrrl.Study:
    return sdrrl.Study(*parse((sdrrl.Config, CaptionStudy), [str(preset), "--output", str(output), *flags]))


def test_script_from_captions_to_table(preset, finished, monkeypatch):
    output, metrics = finished
    assert json.loads((output / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert Counter((row["arm"], row["language"]) for row in metrics["scores"]) == dict.fromkeys(
        [(arm, language) for arm in ("before", "sdrrl", "sft") for language in EN_DE], 1
    )
    for row in metrics["scores"]:
        assert row["questions"] == 8 and row["completions"] == 3 and 0 <= row["accuracy"] <= 100 and row["seed"] == 0
    assert metrics["transfer"]["own-s0"]["asked"] == 20
    assert metrics["transfer"]["given"] == {"candidates": 20, "untranslated": 0, "below_tau": 0, "kept": 20}
    for title, counts in metrics["sets"].items():
        assert (
            metrics["training"][title]["steps"] == -(-counts["rows"] // 16) and metrics["training"][title]["validation"]
        )
    assert "log_history" not in (output / "pieces.jsonl").read_text(encoding="utf-8")
    whole, sft = metrics["sets"]["sdrrl-s0"], metrics["sets"]["sft-s0"]
    assert whole["rows"] == sft["rows"] == whole["different"] > sft["different"]
    for name in ("accuracy", "chrf"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "| sdrrl" in sdrrl_report.results_table(metrics)
    # the same command again does nothing, and says the same
    monkeypatch.setattr(sdrrl, "load_model", None)
    assert sdrrl.main([str(preset), "--output", str(output)]) == metrics


def test_a_kill_at_the_end_of_any_stage_changes_nothing(preset, finished, tmp_path, monkeypatch):
    stage, killed = sdrrl.Study.stage, set()

    def dying(self, title, work, *args, **kwargs):
        def cut(out):
            work(out)
            if title not in killed:
                killed.add(title)
                raise KeyboardInterrupt

        return stage(self, title, cut, *args, **kwargs)

    monkeypatch.setattr(sdrrl.Study, "stage", dying)
    monkeypatch.setattr(sdrrl, "write_plots", lambda *_: None)
    metrics = None
    while metrics is None:
        try:
            metrics = sdrrl.main([str(preset), "--output", str(tmp_path)])
        except KeyboardInterrupt:
            assert len(killed) < 30
    assert len(killed) == sum(path.is_file() for path in tmp_path.glob("*/done.json")) == 20
    for key in ("scores", "sets", "transfer"):
        assert metrics[key] == finished[1][key]


class Planned(Stages):
    """Does nothing of the work: names of the stages alone."""

    def __call__(self, title, work, settings, **reads):
        return super().__call__(title, lambda out: None, settings, **reads)


def test_a_change_redoes_what_depends_on_it(preset, tmp_path):
    def names(*flags):
        made = make_study(preset, tmp_path, *flags)
        made.stages = Planned(tmp_path)
        for piece in itertools.chain(*(pieces.values() for pieces in made.steps().values())):
            piece()
        return made.folders

    base = names()
    scored = {"score", "filter", "set", "train", "test"}
    for key, value, redone in (
        ("tau", "0.3", {"filter", "set", "train", "test"}),
        ("p", "0.3", {"set", "train", "test"}),
        ("training", "{learning_rate: 1}", {"train", "test"}),
        ("translator_decoding", "{max_new_tokens: 41}", {"translate", *scored}),
        ("answers", "{max_new_tokens: 13}", {"collect", "translate", *scored}),
        ("pretraining", "{seed: 1}", {"base", "collect", "translate", *scored}),
    ):
        changed = names(f"--{key}", value)
        titles = {title for title in base if changed[title] != base[title]}
        assert {title.split("-")[0] for title in titles} == redone, key
        assert ("translate-questions" in titles) == (key == "translator_decoding")


def test_arms_change_exactly_what_they_name(preset, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    arms = {
        "no_switch": {"code_switch": False},
        "no_parallel": {"parallel": False},
        "given": {"answers": "given"},
        "no_source": {"combinations": ["tt"]},
        "reference": {"answers": "reference", "combinations": ["tt"], "code_switch": False, "parallel": False},
        "few": {"pairs": 3, "training": {"learning_rate": 1e-5}},
    }
    made = make_study(preset, tmp_path / "run", "--arms", json.dumps(arms))
    rows, sizes = {}, set()
    for name in made.arms:
        found = transfer.read_rows(made.make_set(name, 0) / "train.jsonl")
        sizes.add(len(found))
        rows[name] = {(row["id"], row["part"], row["input"] if "-" in row["part"] else ""): row for row in found}
        held = {row["id"] for row in transfer.read_rows(made.make_set(name, 0) / "valid.jsonl")}
        assert (
            held
            and held <= {row["id"] for row in made.read("validation")}
            and not held & {key[0] for key in rows[name]}
        )
    full = rows["sdrrl"]
    parts = Counter(part for _, part, _ in full)
    assert parts["ss"] == parts["st"] == parts["ts"] == parts["tt"] > 0 and parts["en-de"] == parts["de-en"] == 6
    assert sizes == {4 * parts["ss"] + 12}  # equal data counts
    # code-switching: questions of the same rows, and no answer
    assert rows["no_switch"].keys() == full.keys()
    changed = [key for key in full if full[key] != rows["no_switch"][key]]
    assert changed and all("-" not in part for _, part, _ in changed)
    assert all(full[key]["output"] == rows["no_switch"][key]["output"] for key in full)
    # parallel text and combinations: rows of these parts, the others as they were
    assert rows["no_parallel"] == {key: row for key, row in full.items() if "-" not in key[1]}
    assert rows["no_source"] == {key: row for key, row in full.items() if key[1] == "tt" or "-" in key[1]}
    # few pairs: the first ones
    few = {row["id"] for key, row in rows["few"].items() if "-" not in key[1]}
    assert len(few) == 3 and few < {key[0] for key in full}
    # given answers: those of the data, in both languages of the data's text where they are references
    tasks = {row["id"]: row for row in made.asked()}
    assert all(row["output"] == tasks[key[0]]["en"]["output"] for key, row in rows["given"].items() if key[1] == "ss")
    assert all(row.items() >= tasks[key[0]]["de"].items() for key, row in rows["reference"].items())


def test_a_report_of_what_is_there(preset, finished, tmp_path):
    pieces = (finished[0] / "pieces.jsonl").read_bytes()
    # killed while a line was written, and gone on with
    (tmp_path / "pieces.jsonl").write_bytes(pieces + b'\n{"title": "test-sft-s1", "va')
    tell(tmp_path / "pieces.jsonl", "test-sdrrl-s1", {"scores": {}})
    found = sdrrl_report.main([str(tmp_path), "--output", str(tmp_path / "report")])
    assert found["scores"] == finished[1]["scores"] and {row["tasks"] for row in found["scores"]} == {"test"}
    assert found["sets"] == finished[1]["sets"]
    assert (tmp_path / "report" / "accuracy.png").is_file()
    assert set(found["comparisons"]) == {f"sdrrl {arm} {language}" for arm in ("before", "sft") for language in EN_DE}


def test_dev_chooses_and_test_tells(preset, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    arms = {"sft": None, "sdrrl": None, "sdrrl-lo": {}, "sdrrl-hi": {"training": {"learning_rate": 9e-3}}}
    flags = ["--output", str(tmp_path / "run"), "--test", "both", "--arms", json.dumps(arms)]
    metrics = sdrrl.main([str(preset), *flags])
    assert Counter((row["arm"], row["tasks"]) for row in metrics["scores"]) == {
        (arm, tasks): 2 for arm in ("before", "sdrrl-lo", "sdrrl-hi") for tasks in ("dev", "test")
    }
    best = {("dev", "sdrrl-lo", "de"), ("test", "sdrrl-hi", "de"), ("dev", "sdrrl-hi", "en")}
    for row in metrics["scores"]:  # test would choose the other, and so would English
        row["accuracy"] = 60.0 if (row["tasks"], row["arm"], row["language"]) in best else 50.0
    assert sdrrl_report.chosen(metrics, "de") == {"before": "before", "sdrrl": "sdrrl-lo"}
    easier = {"arm": "sdrrl-hi", "tasks": "dev", "language": "de", "seed": 1, "accuracy": 99.0}
    unequal = metrics | {"scores": [*metrics["scores"], easier]}
    assert sdrrl_report.chosen(unequal, "de")["sdrrl"] == "sdrrl-lo"  # a seed that the other setting lacks says nothing
    told = sdrrl_report.of_chosen(metrics, "de")
    assert [(row["arm"], row["tasks"]) for row in told["scores"]] == [("before", "test")] * 2 + [("sdrrl", "test")] * 2
    assert set(told["sets"]) == {"sdrrl-s0"}
    assert {row["tasks"] for row in sdrrl_report.scored(metrics)} == {"test"}


def test_paired_differences_are_of_the_same_questions():
    def row(arm, seed, colour, animal):
        return {"arm": arm, "seed": seed, "language": "de", "hits": {"animal": animal, "colour": colour}}

    scores = [
        row("a", 0, "1111", "10"),
        row("b", 0, "1100", "10"),
        row("a", 1, "1110", "10"),
        row("b", 1, "1110", "00"),
    ]
    found = sdrrl_report.paired([*scores, row("b", 2, "0000", "00")], "a", "b", "de")
    # seed 0: colours 50, animals 0; seed 1: 0 and 50
    assert found["by_seed"] == {"0": 25.0, "1": 25.0} and found["difference"] == 25.0
    assert found["low"] < 25 < found["high"] and found["low"] >= 0
    assert sdrrl_report.paired(scores, "b", "a", "de")["high"] == -found["low"]
    assert sdrrl_report.paired(scores, "a", "c", "de") is None
    names = {"sdrrl": "11", "sft": "10", "sdrrl_9": "10", "translate_sft_9": "00"}
    made = [row(arm, 0, hits, hits) for arm, hits in names.items()]
    apart = sdrrl_report.comparisons({"scores": made})
    assert {name: value["difference"] for name, value in apart.items()} == {
        "sdrrl sft de": 50.0, "sdrrl_9 translate_sft_9 de": 50.0,
    }  # fmt: skip
    assert sdrrl_report.comparisons_table(apart).count("+50.0") == 4
    # no spread where nothing differs in a way that drawing could change
    sure = sdrrl_report.paired([row("a", 0, "1111", "11"), row("b", 0, "0000", "00")], "a", "b", "de")
    assert sure["low"] == sure["high"] == 100.0


def test_models_and_data_by_path_and_a_trained_translator(tmp_path, monkeypatch):
    tokenizer = make_tokenizer(["Name the colour of the dog. Nenne die Farbe. red rot green"])
    tokenizer.save_pretrained(tmp_path / "model")
    tiny(32, 0, vocab=len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path / "model")
    asked = [{"instruction": f"Name the colour of dog {n}.", "output": ["red", "green"][n % 2]} for n in range(9)]
    (tmp_path / "data.json").write_text(json.dumps(asked), encoding="utf-8")
    write_lines(tmp_path / "train.jsonl", [{"en": "The dog.", "de": "Der Hund."}])
    (tmp_path / "test.json").write_text(json.dumps([{"instruction": "Sag rot.", "output": "rot"}]), encoding="utf-8")
    (tmp_path / "en-de.tsv").write_text("red\trot\ngreen\tgrün\ndog\thund\nthe\tder\n", encoding="utf-8")
    arm = {"answers": "given", "combinations": ["tt"], "code_switch": False}
    values = {
        "model": f"{tmp_path}/model", "instructions": f"{tmp_path}/data.json", "parallel": f"{tmp_path}/train.jsonl",
        "valid": 2, "limit": 8, "tests": {"de": f"{tmp_path}/test.json"}, "dictionary": f"{tmp_path}/en-de.tsv",
        "translator_kind": "dictionary", "tau": 0.9, "answers": {"batch_size": 4, "max_new_tokens": 5},
        "training": {"num_train_epochs": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        "arms": {"translate_sft": arm}, "output": f"{tmp_path}/run",
    }  # fmt: skip
    flags = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
    metrics = sdrrl.main(flags)
    counts, kept = metrics["sets"]["translate_sft-s0"], metrics["transfer"]["given"]["kept"]
    assert kept == metrics["tasks"]["instructions"] + 2 and counts["parts"] == {"tt": kept - 2, "en-de": 1, "de-en": 1}
    assert metrics["training"]["translate_sft-s0"]["steps"] == -(-counts["rows"] // 4)
    assert {(row["arm"], row["language"]) for row in metrics["scores"]} == {("before", "de"), ("translate_sft", "de")}
    rows = transfer.read_rows(next((tmp_path / "run").glob("set-*")) / "train.jsonl")
    assert {row["output"] for row in rows if row["part"] == "tt"} <= {"rot", "grün"}
    # several processes share a batch
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="must be a multiple of the 3 processes, got 2"):
        sdrrl.main([*flags, "--seeds", "1"])


def test_a_preset_learns_to_translate(preset, tmp_path):
    training = "{num_train_epochs: 1, per_device_train_batch_size: 32}"
    flags = ["--translator_kind", "causal", "--translator", "tiny-student", "--translator_training", training]
    flags += ["--translator_decoding", "{max_new_tokens: 4}"]
    made = make_study(preset, tmp_path, *flags)
    scores = json.loads((made.test_translator() / "scores.json").read_text())
    assert set(scores) == {"en-de", "de-en"} and scores["en-de"]["chrf"] >= 0
    record = json.loads((made.translator() / "training.json").read_text())
    # both directions of 59 pairs, 6 sentences and 30 answer words
    assert record["rows"] == 2 * (59 + 36) and record["steps"] == 6
    assert all(row["text"] for row in transfer.read_rows(made.translated("questions") / "scores.jsonl"))


def test_presets_have_their_values(tmp_path):
    paper, _ = parse((sdrrl.Config, CaptionStudy), ["--preset", "paper"], configs=HERE)
    t = paper.training
    assert t["per_device_train_batch_size"] * t["gradient_accumulation_steps"] == 128 and t["learning_rate"] == 2e-5
    assert (t["num_train_epochs"], paper.p, paper.tau, paper.scorer) == (3, 0.15, 0.8, "comet_kiwi")
    assert paper.parallel_sentences == 1000 and paper.translator_codes["en"] == "eng_Latn"
    small, _ = parse((sdrrl.Config, CaptionStudy), ["--preset", "tiny"], configs=HERE)
    assert len(small.seeds) >= 2 and small.parallel_sentences == 1000 and small.test == "test"
    assert {values.get("answers", "own") for values in small.arms.values()} == {"own", "given", "reference"}
    gpu, study = parse((sdrrl.Config, CaptionStudy), ["--preset", "gpu"], configs=HERE)
    assert len(gpu.seeds) >= 3 and gpu.test == "both" and gpu.training["bf16"] and study.base_parallel > 0
    rehearsed, _ = parse((sdrrl.Config, CaptionStudy), ["--preset", "gpu", "--rehearse"], configs=HERE)
    assert rehearsed.arms.keys() == gpu.arms.keys() and rehearsed.training["bf16"] and rehearsed.rows < gpu.rows
    bare, study = parse((sdrrl.Config, CaptionStudy), ["--preset", "gpu", str(HERE / "no_german.yaml")], configs=HERE)
    assert study.base_target == study.base_parallel == 0 and bare.training == gpu.training and bare.rows == gpu.rows
    assert {name for name, values in bare.arms.items() if values is not None} == {"sdrrl-hi", "translate_sft-hi"}
    with pytest.raises(ValueError, match=r"not there: dictionary=.* model=meta.*translator=facebook/nllb.* comet="):
        sdrrl.main(["--preset", "paper", "--output", str(tmp_path / "run")])
    assert not list(tmp_path.glob("run/*/done.json"))


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--p 2", "p must be in"),
        ("--tau 80", "tau must be in"),
        ("--translator_kind causal --translator tiny-student", "translator_training and captions must be given"),
        ("--translator_kind seq2seq --translator tiny-student", "translator_kind must be 'causal'"),
        ("--translator_kind seq2seq", "translator must be given"),
        ("--held_out 1.0", "held_out must be in"),
        ("--seeds 1 1", "seeds must have at least one, each once"),
        ("--arms {bad:{combinations:[sx]}}", "combinations="),
        ("--arms {bad:{answer:own}}", "arms.bad must be a mapping of answers, .*answer': 'own"),
        ("--answers {beams:2}", "answers must be a mapping of .*beams"),
        ("--arms {a/b:{}}", "arms must have names"),
        ("--captions null", "either captions, or instructions"),
        (
            "--captions null --instructions x --parallel y --model x --translator_kind dictionary --test dev",
            "test='dev'",
        ),
        ("--scorer bleu", "scorer"),
    ],
)
def test_bad_options(preset, tmp_path, flags, error):
    with pytest.raises(ValueError, match=error):
        make_study(preset, tmp_path, *(flag.replace(":", ": ") for flag in flags.split()))
