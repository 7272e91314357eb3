"""A study of self-distillation with micro models: the script end to end, stages named after what they are made of."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

for library in ("transformers", "accelerate", "sacrebleu", "tokenizers", "rich", "matplotlib"):
    pytest.importorskip(library)

import torch  # noqa: E402
import transformers  # noqa: E402

from fused_kd.training import stages  # noqa: E402
from fused_kd.training.config import load_config  # noqa: E402
from fused_kd.training.sdrrl.code_switch import WORD  # noqa: E402
from fused_kd.training.sdrrl.recipe import Recipe  # noqa: E402
from fused_kd.training.sdrrl.study import Study  # noqa: E402
from fused_kd.training.sdrrl.transfer_set import Arm  # noqa: E402

from .byte_level import make_tokenizer  # noqa: E402
from .test_sdrrl_transfer import captions  # noqa: E402
from .tiny import tiny  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = EXAMPLES / "configs" / "sdrrl"
# every word of the captions, and one that does not come back: green is blue
TSV = "red\troten\nblue\tblauen\ngreen\tblauen\ndog\thund\nhorse\tpferd\nthe\tbeim\nnumber\tnummer\n"
TSV += "is\tsind\nover\twir\nthere\tjetzt\n"
SMALL = """
source: en
target: de
captions: {data: DATA, transfer: 30, valid: 0.3, per_kind: 8, completions: 4, parallel: 6, base_per_kind: 30,
           base_completions: 5, base_source: 10, base_target: 5, term_repeats: 1, test_per_kind: 4,
           test_completions: 3, tests: [test_a]}
dictionary: DICTIONARY
model: tiny-student
pretraining: {epochs: 8, learning_rate: 4e-3, batch: 16}
translator: {kind: dictionary}
quality: {tau: 0.0}
training: {epochs: 1, learning_rate: 1e-3, batch: 16}
prompt: tiny
answers: {batch_size: 64, max_new_tokens: 12}
max_length: 128
vocab: 400
p: 0.5
arms: {sdrrl: {}, sft: {answers: given, combinations: [ss], code_switch: false, parallel: false}}
"""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("sdrrl_script", EXAMPLES / "sdrrl.py")
    module = importlib.util.module_from_spec(spec)
    threads = torch.get_num_threads()
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("preset")
    rows = captions(150)
    for name, part in (("train", rows[:100]), ("val", rows[100:125]), ("test_a", rows[125:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    (folder / "en-de.tsv").write_text(TSV, encoding="utf-8")
    text = SMALL.replace("DATA", str(folder)).replace("DICTIONARY", str(folder / "en-de.tsv"))
    (folder / "small.yaml").write_text(text, encoding="utf-8")
    return folder / "small.yaml"


@pytest.fixture(scope="module")
def finished(script, preset, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("sdrrl") / "run"
    return output, script.main(["--preset", str(preset), "--output", str(output)])


def study(preset: Path, output: Path, *changes: str, arms: dict[str, Arm] | None = None) -> Study:
    recipe = load_config(Recipe, [preset], changes)
    return Study(recipe if arms is None else dataclasses.replace(recipe, arms=arms), output)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_script_from_captions_to_table(script, preset, finished, monkeypatch, capsys):
    output, metrics = finished
    assert json.loads((output / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert list(metrics["arms"]) == ["before", "sdrrl", "sft"]
    for name, entry in metrics["arms"].items():
        run = entry["seeds"]["0"]
        for language in ("en", "de"):
            scores = run["scores"][language]
            assert scores["questions"] == 8 and scores["completions"] == 3 and 0 <= scores["accuracy"] <= 100
            assert entry["mean"][language]["accuracy"] == scores["accuracy"] and "version:" in scores["bleu_signature"]
        if name != "before":
            assert run["training"]["steps"] == -(-run["set"]["rows"] // 16) and run["training"]["validation"]
    sets = [metrics["arms"][name]["seeds"]["0"]["set"] for name in ("sdrrl", "sft")]
    assert sets[0]["rows"] == sets[1]["rows"] == sets[0]["different"] > sets[1]["different"]
    assert metrics["transfer"]["own-s0"]["collected"]["asked"] == 20
    assert metrics["transfer"]["given"]["filter"] == {"candidates": 20, "untranslated": 0, "below_tau": 0, "kept": 20}
    assert metrics["tasks"]["parallel"] == 6 and sets[0]["rows"] > 40
    for name in ("accuracy", "chrf", "validation"):
        content = (output / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000
    # the same command again does nothing, and says the same
    monkeypatch.setattr(stages, "load_model", None)
    capsys.readouterr()
    assert json.loads(json.dumps(script.main(["--preset", str(preset), "--output", str(output)]))) == json.loads(
        json.dumps(metrics)
    )
    assert script.main(["--preset", str(preset), "--output", str(output), "--plan"]) is None
    plan = capsys.readouterr().out
    assert "to do" not in plan.split("metrics.json")[1] and "  done   train-sdrrl-s0-" in plan


def test_a_changed_threshold_redoes_filter_and_training_alone(preset, finished):
    changed = study(preset, finished[0], "quality.tau=0.3")
    titles = {state: {stage.title for stage in changed.stages if (stage.done) == (state == "done")} for state in
              ("done", "to do")}  # fmt: skip
    again = {f"{kind}-{arm}-s0" for kind in ("set", "train", "test") for arm in ("sdrrl", "sft")}
    assert titles["to do"] == again | {"filter-own-s0", "filter-given"}
    assert {"collect-own-s0", "translate-answers-own-s0", "back-questions", "score-questions"} <= titles["done"]
    fewer = changed.p.finish(changed.transfer.filtered["given"])
    pairs = read(changed.transfer.pairs["given"].folder / "candidates.jsonl")
    good = {row["id"] for row in pairs if row["scores"] and min(row["scores"].values()) >= 0.3}
    assert {row["id"] for row in read(fewer / "candidates.jsonl")} == good
    assert (
        {row["id"] for row in pairs} - good
        == {row["id"] for row in pairs if row["source"]["output"] == "green"}
        > set()
    )
    counts = json.loads((fewer / "counts.json").read_text())
    assert counts["candidates"] == len(pairs) == 20 and counts["kept"] == len(good)
    assert counts["kept"] + counts["below_tau"] + counts["untranslated"] == 20


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ("p=0.3", {"set", "train", "test"}),
        ("training.learning_rate=1", {"train", "test"}),
        ("test=dev", {"test"}),
        ("translator.decoding.max_new_tokens=41", {"translate", "back", "score", "pairs", "filter", "set",
                                                   "train", "test"}),
        ("answers.max_new_tokens=13", {"collect", "translate", "back", "score", "pairs", "filter", "set", "train",
                                       "test"}),
    ],
)  # fmt: skip
def test_a_change_reaches_what_depends_on_it(preset, finished, change, redone):
    changed = study(preset, finished[0], change)
    left = {stage.title for stage in changed.stages if not stage.done}
    assert {title.split("-")[0] for title in left} == redone
    assert not {"tasks", "tokenizer", "translator", "base-s0"} & left


def test_a_preset_learns_to_translate(preset, finished, tmp_path):
    change = "translator={kind: causal, model: tiny-student, decoding: {batch_size: 64, max_new_tokens: 4}, " \
             "pretraining: {epochs: 1, learning_rate: 4e-3, batch: 32}}"  # fmt: skip
    made = study(preset, tmp_path, change)
    back = next(stage for stage in made.stages if stage.title == "back-questions")
    there = read(made.p.finish(back).parent / back.needs[0].name / "pairs.jsonl")
    tasks = made.shop.asked()
    texts = {text for task in tasks for text in (task.texts["en"].instruction, task.texts["en"].input)}
    assert {row["text"] for row in there} == texts and made.shop.translator.done
    training = json.loads((made.shop.translator.folder / "training.json").read_text())
    # both directions of 59 pairs, 6 sentences and 30 answer words
    assert training["sentences"] == 2 * (59 + 36) and training["steps"] == 6
    scores = json.loads((made.p.finish(made.shop.translator_test) / "scores.json").read_text())
    assert set(scores) == {"en-de", "de-en"} and scores["en-de"]["chrf"] >= 0


def test_flags_change_exactly_what_they_name(preset, finished):
    arms = {
        "sdrrl": Arm(),
        "no_switch": Arm(code_switch=False),
        "no_parallel": Arm(parallel=False),
        "given": Arm(answers="given"),
        "no_source": Arm(combinations=("tt",)),
        "plain": Arm(combinations=("tt",), code_switch=False, parallel=False),
        "reference": Arm("reference", ("tt",), False, False, False),
    }
    made = study(preset, finished[0], arms=arms)
    rows: dict[str, dict[tuple, dict]] = {}
    sizes = set()
    for name in arms:
        found = read(made.p.finish(made.sets[name, 0]) / "train.jsonl")
        sizes.add(len(found))
        rows[name] = {(row["id"], row["part"], row["input"] if "-" in row["part"] else ""): row for row in found}
    assert len(sizes) == 1  # equal data counts
    full = rows["sdrrl"]
    parts = Counter(part for _, part, _ in full)
    assert parts["ss"] == parts["st"] == parts["ts"] == parts["tt"] > 0 and parts["en-de"] == parts["de-en"] == 6
    assert sizes == {4 * parts["ss"] + 12}
    # code-switching: questions of the same rows, and no answer
    assert rows["no_switch"].keys() == full.keys()
    changed = [key for key in full if full[key] != rows["no_switch"][key]]
    assert changed and all("-" not in part for _, part, _ in changed)
    assert all(full[key]["output"] == rows["no_switch"][key]["output"] for key in full)
    known = {word for line in TSV.splitlines() for word in line.split("\t")}
    for key in changed:
        words = [WORD.findall(row["input"] + " " + row["instruction"]) for row in (rows["no_switch"][key], full[key])]
        assert len(words[0]) == len(words[1])
        pairs = {(a.lower(), b.lower()) for a, b in zip(*words, strict=True) if a != b}
        assert all({a, b} <= known for a, b in pairs)
    # parallel text and combinations: rows of these parts, the others as they were
    assert rows["no_parallel"] == {key: row for key, row in full.items() if "-" not in key[1]}
    assert rows["no_source"] == {key: row for key, row in full.items() if key[1] == "tt" or "-" in key[1]}
    assert rows["plain"] == {key: row for key, row in rows["no_switch"].items() if key[1] == "tt"}
    # given answers: those of the data, in both languages of the data's text where they are references
    tasks = {row["id"]: row for row in read(made.shop.tasks.folder / "instructions.jsonl")}
    for (name, part, _), row in rows["given"].items():
        if part == "ss":
            assert row["output"] == tasks[name]["en"]["output"]
    for (name, _, _), row in rows["reference"].items():
        assert {key: row[key] for key in ("instruction", "input", "output")} == tasks[name]["de"]
    held = {row["id"] for row in read(made.shop.tasks.folder / "validation.jsonl")}
    for name in arms:
        valid = read(made.sets[name, 0].folder / "valid.jsonl")
        assert valid and {row["id"] for row in valid} <= held and not held & {key[0] for key in rows[name]}
        assert not any("-" in row["part"] for row in valid)


# models that are there: data by path


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A folder with a random model, instructions, parallel text, a test, and a preset for them."""
    folder = tmp_path_factory.mktemp("hub")
    tokenizer = make_tokenizer(["Name the colour of the dog. Nenne die Farbe. red rot green"])
    tokenizer.save_pretrained(folder / "model")
    tiny(32, 0, vocab=len(tokenizer), max_position_embeddings=512).save_pretrained(folder / "model")
    texts = [{"instruction": f"Name the colour of dog {n}.", "output": ["red", "green"][n % 2]} for n in range(9)]
    (folder / "data.json").write_text(json.dumps(texts), encoding="utf-8")
    (folder / "train.jsonl").write_text(json.dumps({"en": "The dog.", "de": "Der Hund."}) + "\n", encoding="utf-8")
    (folder / "test.de.json").write_text(json.dumps([{"instruction": "Sag rot.", "output": "rot"}]), encoding="utf-8")
    (folder / "en-de.tsv").write_text("red\trot\ngreen\tgrün\ndog\thund\nthe\tder\n", encoding="utf-8")
    (folder / "hub.yaml").write_text(
        f"""
source: en
target: de
model: {folder}/model
instructions: {{data: {folder}/data.json, valid: 2, parallel: {folder}/train.jsonl,
                tests: {{de: {folder}/test.de.json}}}}
dictionary: {folder}/en-de.tsv
translator: {{kind: dictionary}}
quality: {{tau: 0.9}}
training: {{epochs: 1, learning_rate: 1e-3, batch: 4, micro_batch: 2}}
answers: {{batch_size: 4, max_new_tokens: 5}}
arms: {{translate_sft: {{answers: given, combinations: [tt], code_switch: false}}}}
""",
        encoding="utf-8",
    )
    return folder / "hub.yaml"


def test_models_and_data_by_path(script, hub, tmp_path):
    metrics = script.main(["--preset", str(hub), "--output", str(tmp_path), "instructions.limit=8"])
    arm = metrics["arms"]["translate_sft"]["seeds"]["0"]
    # instructions without a split in their name are divided by a hash: however many, all but two are trained on
    kept = metrics["transfer"]["given"]["filter"]
    assert kept["kept"] == kept["candidates"] == metrics["tasks"]["instructions"] + 2
    assert arm["set"]["parts"] == {"tt": kept["kept"] - 2, "en-de": 1, "de-en": 1}
    assert arm["training"]["steps"] == -(-arm["set"]["rows"] // 4)
    assert list(arm["scores"]) == ["de"] and arm["scores"]["de"]["completions"] == 1
    rows = read(next(tmp_path.glob("set-*")) / "train.jsonl")
    assert {row["output"] for row in rows if row["part"] == "tt"} <= {"rot", "grün"}
    assert any(row["instruction"].startswith("Name der colour of hund") for row in rows)


def test_collection_goes_on_after_a_kill(hub, tmp_path, monkeypatch):
    recipe = load_config(Recipe, [hub], ["arms={sdrrl: {}}"])
    whole = Study(recipe, tmp_path / "whole")
    folder = whole.p.finish(whole.transfer.collected["own"])
    generate, sizes = transformers.LlamaForCausalLM.generate, []

    def dying(self, **inputs):
        sizes.append(len(inputs["input_ids"]))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return generate(self, **inputs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", dying)
    cut = Study(recipe, tmp_path / "cut")
    stage = cut.transfer.collected["own"]
    with pytest.raises(KeyboardInterrupt):
        cut.p.finish(stage)
    assert dict(map(reversed, cut.p.plan()))[stage.name] == "begun"
    cut.p.finish(stage)
    asked = json.loads((folder / "counts.json").read_text())["asked"]
    assert sum(sizes) - sizes[1] == asked  # the batch that died is made again, the one before it is not
    for name in ("answers.jsonl", "counts.json", "batches/000000.jsonl"):
        assert (folder / name).read_bytes() == (stage.folder / name).read_bytes()


# presets and mistakes


def test_presets_have_their_values(script, tmp_path, capsys):
    paper = load_config(Recipe, [CONFIGS / "paper.yaml"])
    t = paper.training
    assert (t.learning_rate, t.batch, t.epochs, paper.p, paper.quality.tau) == (2e-5, 128, 3, 0.15, 0.8)
    assert paper.quality.scorer == "comet_kiwi" and paper.translator.kind == "seq2seq"
    assert paper.instructions.parallel_sentences == 1000 and paper.translator.codes["en"] == "eng_Latn"
    assert t.settings(0, 8, "best").accumulation * 8 * t.micro_batch == 128
    small = load_config(Recipe, [CONFIGS / "tiny.yaml"])
    assert len(small.seeds) >= 2 and small.captions.parallel == 1000 and small.test == "test"
    assert {arm.answers for arm in small.arms.values()} == {"own", "given", "reference"}
    for plan in (["--plan"], []):
        with pytest.raises(ValueError, match=r"not there: .*dictionary=") as raised:
            script.main(["--preset", "paper", "--output", str(tmp_path / "run"), *plan])
        for name in ("model=meta-llama/", "translator.model=facebook/nllb-200", "quality.python="):
            assert name in str(raised.value)
        assert ("to do  collect-own-" in capsys.readouterr().out) == bool(plan)
    assert not list(tmp_path.glob("run/*/done.json"))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (["p=2"], "p must be in"),
        (["quality.tau=80"], "quality.tau must be in"),
        (["pretraining=null"], "pretraining and captions must be given"),
        (["translator={kind: causal, model: tiny-student}"], "translator.pretraining must be given"),
        (["translator={kind: seq2seq, model: tiny-student}"], "translator.kind must be 'causal'"),
        (["translator.kind=seq2seq"], "translator.model must be given"),
        (["captions.valid=1.0"], "captions.valid must be in"),
        (["seeds=[1,1]"], "seeds must have at least one, each once"),
        (["arms.bad={combinations: [sx]}"], "combinations="),
        (["arms.a/b={}"], "arms must have names"),
        (["captions=null"], "either captions or instructions"),
        (["quality.scorer=bleu"], "scorer must be"),
        (["training.batch=0"], "expected epochs and learning_rate above 0"),
    ],
)
def test_bad_recipes(preset, tmp_path, changes, error):
    with pytest.raises(ValueError, match=error):
        Study(load_config(Recipe, [preset], changes), tmp_path).recipe.training.settings(0, 1, "best")
