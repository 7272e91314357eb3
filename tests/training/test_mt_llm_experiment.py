"""The captions task, evaluation, translation, and examples/mt_llm.py from data to figures on micro models."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
for library in ("accelerate", "peft", "sacrebleu", "matplotlib", "rich"):
    pytest.importorskip(library)

from fused_kd.training.config import load_config  # noqa: E402
from fused_kd.training.mt_llm.captions_task import best_single_word, label_of, write_task  # noqa: E402
from fused_kd.training.mt_llm.config import MTLLM, Arm  # noqa: E402
from fused_kd.training.mt_llm.evaluation import accuracies, embed, retrieval_at_1  # noqa: E402
from fused_kd.training.mt_llm.experiment import Experiment  # noqa: E402
from fused_kd.training.mt_llm.fitting import ModuleTrainer  # noqa: E402
from fused_kd.training.mt_llm.translate import encode_sources, translate  # noqa: E402
from fused_kd.training.presets import train_tokenizer  # noqa: E402

from .test_mt_llm import llama, seq2seq  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = EXAMPLES / "configs" / "mt_llm"
WHO = {"man": ("Mann", "muž"), "boy": ("Junge", "kluk"), "woman": ("Frau", "žena"), "girl": ("Mädchen", "dívka")}
WHAT = {
    "sits": ("sitzt", "sedí"),
    "stands": ("steht", "stojí"),
    "runs": ("rennt", "běží"),
    "jumps": ("springt", "skáče"),
}
WHERE = {"park": ("Park", "parku"), "street": ("Straße", "ulici"), "snow": ("Schnee", "sněhu")}


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of parallel captions with everyone, everything and every place, and some without a label."""
    folder = tmp_path_factory.mktemp("captions")
    made = [
        {"en": f"A {who} {what} near the {where}.", "de": f"{WHO[who][0]} {WHAT[what][0]} {WHERE[where][0]}.",
         "cs": f"{WHO[who][1]} {WHAT[what][1]} {WHERE[where][1]}."}
        for who, what, where in itertools.product(WHO, WHAT, WHERE)
    ]  # fmt: skip
    made += [{"en": f"A dog in the {where}.", "de": f"Hund {d}.", "cs": f"Pes {c}."} for where, (d, c) in WHERE.items()]
    made += made[:5]  # classes of unequal size
    for name, rows in (("train", made), ("val", made[::3]), ("test_2016_flickr", made[::2]), ("other", made[1::4])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("caption", "label"),
    [
        ("A man is sitting on a bench.", "male/still"),
        ("Two WOMEN run.", "female/moving"),
        ("A woman stands; the lady waits.", "female/still"),
        ("A man and a woman sit.", None),
        ("A man sits while running.", None),
        ("A man eats.", None),
        ("A dog runs.", None),
        ("A mandolin and a standing lamp.", None),
    ],
)
def test_labels_follow_the_rule(caption: str, label: str | None) -> None:
    assert label_of(caption) == label


def test_the_task_is_balanced_and_aligned(captions: Path, tmp_path: Path) -> None:
    about = write_task(tmp_path, captions, ["de", "cs"], valid="val", tests=["test_2016_flickr", "other"], retrieval=9)
    train = lines(tmp_path / "train.jsonl")
    counts = {name: sum(row["label"] == name for row in train) for name in about["classes"]}
    assert set(counts.values()) == {12} and about["train_unbalanced"]["male/still"] > 12
    assert all(label_of(row["text"]) == row["label"] for row in train)
    tests = {name: lines(tmp_path / f"test.{name}.jsonl") for name in ("en", "de", "cs")}
    source = [row for name in ("test_2016_flickr", "other") for row in lines(captions / f"{name}.jsonl")]
    held = [row for row in source if "dog" not in row["en"]]
    for name, rows in tests.items():
        assert [row["text"] for row in rows] == [row[name] for row in held]
        assert [row["label"] for row in rows] == [label_of(row["en"]) for row in held]
    assert [row["text"] for row in lines(tmp_path / "text.jsonl")] == [r["en"] for r in lines(captions / "train.jsonl")]
    assert lines(tmp_path / "retrieval.jsonl") == lines(captions / "test_2016_flickr.jsonl")[:9]
    # no word tells more than two classes apart
    assert about["best_single_word"]["accuracy"] <= 0.5
    assert json.loads((tmp_path / "task.json").read_text())["test"] == about["test"]
    with pytest.raises(ValueError, match="expected a text in each of en, fr, none in fr"):
        write_task(tmp_path, captions, ["fr"], valid="val")
    with pytest.raises(ValueError, match="no caption of female/still, female/moving"):
        write_task(tmp_path, captions, ["de"], valid="val", limit=20)


def test_the_best_single_word() -> None:
    found = best_single_word(["a b", "a c", "d c", "d b"], ["x", "x", "y", "y"])
    assert found == {"word": "a", "accuracy": 1.0}
    assert best_single_word(["a b", "a c", "d c", "d b"], ["1", "2", "3", "4"])["accuracy"] == 0.5


def test_retrieval_and_accuracies() -> None:
    queries = torch.tensor([[2.0, 0.1], [0.1, 3.0], [1.0, 1.0]])
    assert retrieval_at_1(queries, torch.tensor([[9.0, 0.0], [0.0, 0.1], [-1.0, -1.0]])) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="must be pairs"):
        retrieval_at_1(queries, queries[:2])
    found = accuracies([0, 0, 0, 1], [0, 0, 0, 2])
    assert found == {"accuracy": 0.75, "balanced": 0.5}


def test_embeddings_come_in_the_order_of_the_texts() -> None:
    texts = [[5, 6, 7], [8], [9, 4], [3, 3, 3, 3], [7]]
    found = embed(lambda ids, mask: (ids * mask).sum(1, keepdim=True), texts, pad_id=1, batch_size=2)
    assert found[:, 0].tolist() == [sum(ids) for ids in texts]


class NLLBLike:
    """A tokenizer that names its languages, as NLLB's does."""

    src_lang = "eng_Latn"
    pad_token_id, unk_token_id = 1, 3

    def __call__(self, texts, truncation, max_length):
        first = self.convert_tokens_to_ids(self.src_lang)
        return {"input_ids": [[first, *[10 + len(word) for word in text.split()], 2][:max_length] for text in texts]}

    def convert_tokens_to_ids(self, token):
        return {"eng_Latn": 38, "deu_Latn": 39}.get(token, 3)

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(str(int(token)) for token in row) for row in rows]


def test_translation_is_told_both_languages_and_keeps_the_order() -> None:
    tokenizer, model, texts = NLLBLike(), seq2seq(), ["ein Haus", "a b c d e", "Hunde", "der die das"]
    options = {"source": "deu_Latn", "target": "eng_Latn", "max_new_tokens": 5}
    made = translate(model.train(), tokenizer, texts, batch_size=2, **options)
    assert model.training
    alone = [translate(model, tokenizer, [text], **options)[0] for text in texts]
    assert made == alone and len(set(made)) > 1
    assert all(text.split()[1] == "38" for text in made), "the target language is forced"
    assert encode_sources(tokenizer, ["Hund"], "deu_Latn", 8) == [[39, 14, 2]]
    with pytest.raises(ValueError, match="needs a name of the language"):
        encode_sources(tokenizer, texts, None, 8)
    with pytest.raises(ValueError, match="'xxx_Latn' is no language"):
        encode_sources(tokenizer, texts, "xxx_Latn", 8)
    with pytest.raises(ValueError, match="has no names of languages"):
        encode_sources(train_tokenizer(texts, 300), texts, "deu_Latn", 8)


def script():
    spec = importlib.util.spec_from_file_location("mt_llm_script", EXAMPLES / "mt_llm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MICRO = [
    "languages=[de,cs]", "tests=[test_2016_flickr]", "mt.fit.steps=3", "mt.fit.batch=16", "mt.hidden_size=16",
    "mt.layers=1", "mt.heads=2", "mt.vocab=300", "llm.model=tiny-student", "llm.epochs=1", "llm.vocab=300",
    "adapt.steps=3", "adapt.batch=16", "task_fit.epochs=1", "distil.epochs=1", "lora.r=2", "max_new_tokens=3",
    "arms.mse-kl=null", "arms.mse-self_evolution=null", "arms.cross-entropy=null",
]  # fmt: skip


def titles(experiment: Experiment) -> dict[str, str]:
    return {stage.title: stage.name for stage in experiment.pipeline.stages}


def test_script_from_captions_to_figures(captions: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    main = script().main
    command = ["--output", str(tmp_path / "run"), f"data={captions}", *MICRO]
    main([*command, "--plan"])
    planned = capsys.readouterr().out
    assert planned.count("to do") == 4 + 2 * 8 and "adapt.s1-" in planned
    assert not list((tmp_path / "run").glob("*/done.json"))

    metrics = main([*command, "seeds=[0,1]"])
    shown = capsys.readouterr().out
    assert "translate-test" in shown and "after stage 1" in shown and "chance 25.0" in shown
    saved = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert saved == json.loads(json.dumps(metrics))
    systems = set(saved["mean"]["accuracy"])
    arms = {"mse", "mse-unadapted"}
    assert systems == {
        "LLM alone",
        "translate-test",
        "MT encoder, frozen",
        "MT encoder, tuned",
        *(f"MT-LLM, {a}" for a in arms),
    }
    for system, scores in saved["mean"]["accuracy"].items():
        assert set(scores) == ({"de", "cs"} if system == "translate-test" else {"en", "de", "cs"})
        each = [saved["seeds"][seed]["accuracy"][system]["de"]["balanced"] for seed in "01"]
        assert scores["de"] == pytest.approx(np.mean(each))
    assert set(saved["mean"]["retrieval"]) == {"before stage 1", "after stage 1", "LLM alone", "MT encoder alone"}
    for seed in saved["seeds"].values():
        assert seed["adaptation"]["after"]["fvu"] < seed["adaptation"]["before"]["fvu"]
        assert {"mse", "fvu", "loss"} <= set(seed["training"]["adapt"]["log_history"][0])
    for name in ("adaptation", "accuracy", "retrieval"):
        assert (tmp_path / "run" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    folders = {path.name for path in (tmp_path / "run").iterdir()}
    assert not any(path.suffix in (".pkl", ".bin", ".pt") for path in (tmp_path / "run").rglob("*"))

    def refuse(*_, **__):
        raise AssertionError("a finished stage ran again")

    monkeypatch.setattr(ModuleTrainer, "train", refuse)
    assert main([*command, "seeds=[0,1]"])["mean"] == metrics["mean"]
    assert {path.name for path in (tmp_path / "run").iterdir()} == folders


def test_a_change_makes_new_only_what_depends_on_it(captions: Path, tmp_path: Path) -> None:
    def names(*changes: str) -> dict[str, str]:
        overrides = [f"data={captions}", *MICRO, "seeds=[0]", *changes]
        return titles(Experiment(load_config(MTLLM, [CONFIGS / "tiny.yaml"], overrides), tmp_path))

    base = names()
    distilled = {title for title in base if title.startswith("distil-")} | {"evaluate.s0"}
    taught = {"task.s0", "states.s0", *distilled, "encoder-frozen.s0", "encoder-tuned.s0"}
    for change, touched in {
        "distil.learning_rate=0.5": distilled,
        "arms.mse.mse_weight=2": {"distil-mse.s0", "evaluate.s0"},
        "adapt.steps=4": {"adapt.s0", *distilled - {"distil-mse-unadapted.s0"}},
        "projection_init=least_squares": {"adapt.s0", *distilled - {"distil-mse-unadapted.s0"}},
        "task_fit.epochs=2": taught,
        "max_new_tokens=4": {"translations", "evaluate.s0"},
        "lora.r=4": {"adapt.s0", *distilled},
        "llm.epochs=2": set(base) - {"task", "mt", "translations", "encoder-frozen.s0", "encoder-tuned.s0"},
        "mt.fit.steps=4": set(base) - {"task", "lm", "task.s0", "states.s0"},
        "tests=[other]": set(base) - {"mt", "lm"},
        "eval_batch=7": set(),
    }.items():
        changed = names(change)
        assert {title for title in base if changed[title] != base[title]} == touched, change
    (captions / "other.jsonl").touch()
    assert names() == base, "files count by content"


def test_a_stage_reads_nothing_beyond_what_it_needs(captions: Path, tmp_path: Path) -> None:
    """Another process may do it while the MT model is still being trained."""
    experiment = Experiment(load_config(MTLLM, [CONFIGS / "tiny.yaml"], [f"data={captions}", *MICRO]), tmp_path)
    experiment.pipeline.finish(experiment.trainings[0]["task"])
    done = {stage.title for stage in experiment.pipeline.stages if stage.done}
    assert done == {"task", "lm", "task.s0"}


def test_models_by_folder_as_in_the_paper(captions: Path, tmp_path: Path) -> None:
    """Both models from folders, LoRA in stage 2, both directions of attention, a task's own files, no retrieval."""
    texts = [row["en"] for row in lines(captions / "train.jsonl")]
    tokenizer = train_tokenizer(texts, 270)
    for name, model in (("mt", seq2seq()), ("llm", llama())):
        model.resize_token_embeddings(len(tokenizer))
        model.generation_config.decoder_start_token_id = tokenizer.bos_token_id
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    task = tmp_path / "task"
    task.mkdir()
    rows = [{"text": text, "label": len(text) % 2} for text in texts[:24]]
    for name in ("train", "test.en", "test.de"):
        (task / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "english.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    small = "adapt.steps=2 adapt.batch=8 adapt.micro_batch=4 task_fit.epochs=1 distil.epochs=1 dtype=float32 bf16=false"
    command = [
        "--preset", "paper", "--output", str(tmp_path / "run"), *small.split(), "languages=[de]", "seeds=[3]",
        f"llm={tmp_path / 'llm'}", "llm_adapters=[]", f"text={tmp_path / 'english.jsonl'}", "text_limit=30",
        "projection_init=least_squares", "max_new_tokens=3", "max_length=20", f"task={task}",
    ]  # fmt: skip
    main = script().main
    with pytest.raises(ValueError, match=r"(?s)not at hand:.*mt: './no-mt' is no folder"):
        main([*command, "mt=./no-mt"])
    with pytest.raises(ValueError, match=r"task='/nowhere': no train.jsonl there"):
        main([*command, "task=/nowhere", "mt=./no-mt"])
    command += [f"mt={tmp_path / 'mt'}"]
    with pytest.raises(ValueError, match="has no names of languages"):
        main(command)
    metrics = main([*command, "codes=null"])
    made = metrics["seeds"]["3"]
    assert made["adaptation"]["projection"]["mse_after"] < made["adaptation"]["projection"]["mse_before"]
    assert made["retrieval"] == {} and metrics["chance"] == 0.5 and metrics["task"] is None
    assert set(made["accuracy"]) == {
        "LLM alone", "translate-test", "MT encoder, frozen", "MT encoder, tuned", "MT-LLM, mse", "MT-LLM, mse-kl"
    }  # fmt: skip
    saved = next((tmp_path / "run").glob("task.s3-*")) / "trained.safetensors"
    from safetensors.torch import load_file

    assert all("lora_" in name or name == "head.weight" for name in load_file(saved)), "stage 2 trained adapters"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("languages=[en]", "languages must be some, without the task's own 'en'"),
        ("languages=[]", "languages must be some"),
        ("data=null", "data must name a folder"),
        ("codes={en: eng_Latn}", "codes must name de, cs, fr as well"),
        ("llm_adapters=[x]", "llm_adapters are for an llm by name"),
        ("arms={a+b: {}}", r"arms must be named by letters, digits and -_\., got 'a\+b'"),
        ("arms={a: {objective: nonsense}}", "objective must be one of"),
        ("arms={a: {mse_weight: 0}}", "mse_weight must be above 0"),
        ("seeds=[]", "arms and seeds must be some"),
        ("beams=0", "beams must be at least 1, got 0"),
        ("adapt.epochs=1", "give steps or epochs"),
        ("projection_init=zero", "projection_init must be"),
    ],
)
def test_bad_settings(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(MTLLM, [CONFIGS / "tiny.yaml"], [change])


def test_missing_data_is_said_first(tmp_path: Path) -> None:
    config = load_config(MTLLM, [CONFIGS / "tiny.yaml"], [f"data={tmp_path / 'no'}"])
    assert (
        len(config.missing_inputs()) == 1
        and "give one with parallel captions as data=PATH" in config.missing_inputs()[0]
    )
    with pytest.raises(ValueError, match="not at hand"):
        script().main([f"data={tmp_path / 'no'}", "--output", str(tmp_path / "run")])
    assert not list((tmp_path / "run").glob("*/stage.json"))


def test_the_papers_values() -> None:
    config = load_config(MTLLM, [CONFIGS / "paper.yaml"])
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (16, 32, 0.05)
    assert config.lora.target_modules == "all-linear" and config.max_length == 512 and config.bidirectional
    a = config.adapt
    assert (a.steps, a.batch, a.learning_rate, a.warmup, a.weight_decay) == (10_000, 256, 2e-4, 0.01, 0.01)
    assert (config.distil.learning_rate, config.distil.warmup) == (1e-4, 0.1) and config.arms["mse"] == Arm()
