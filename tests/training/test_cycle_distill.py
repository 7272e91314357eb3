"""CycleDistill end to end with tiny models: results, resuming in mid-iteration, what a changed setting does again."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("sacrebleu")
pytest.importorskip("tokenizers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import torch
from transformers import LlamaForCausalLM

from fused_kd.training import presets
from fused_kd.training.config import load_config
from fused_kd.training.cycle_distill import stages as cycle_stages
from fused_kd.training.cycle_distill.iterations import Cycle
from fused_kd.training.cycle_distill.settings import CycleDistill
from fused_kd.training.pipeline import Pipeline
from fused_kd.training.runs import read_json, read_lines, write_json
from fused_kd.training.trainer import KDTrainer

SCRIPT = Path(__file__).parents[2] / "examples" / "cycle_distill.py"
CONFIGS = SCRIPT.parent / "configs" / "cycle_distill"
NOUNS = {"dog": "Hund", "man": "Mann", "tree": "Baum", "bird": "Vogel", "king": "König", "wolf": "Wolf"}
VERBS = {"sees": "sieht", "likes": "mag", "finds": "findet", "hears": "hört"}
PRESET = presets.ModelPreset(hidden_size=32, layers=1, heads=2, intermediate_size=64)
TINY = {
    "pretrain": "{epochs: 40, learning_rate: 1e-2, batch_size: 16, document: 3, repeats: 2, plain: 99}",
    "pairs": "90", "sentences": "24", "shots": "0", "iterations": "2", "vocab": "420", "bootstrap": "20",
    "hard": "{steps: 3, batch_size: 4}", "soft": "{steps: 3, batch_size: 2, accumulation: 2}",
    "valid": "valid", "test": "test", "valid_limit": "6", "test_limit": "8", "k": "6", "generation_batch": "8",
    "max_new_tokens": "16", "seeds": "[0]",
    # a model this small makes little sense
    "filters": "{length_ratio: [0, 100], unique_words: 0, loops: 1000, identifier: none}",
}  # fmt: skip


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("cycle_distill", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    threads = torch.get_num_threads()
    spec.loader.exec_module(module)
    yield module
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
    rows.sort(key=lambda row: hash_of(row["en"]))
    for split, part in (("train", rows[:120]), ("valid", rows[120:130]), ("test", rows[130:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def hash_of(text: str) -> int:
    return sum((i + 7) * ord(char) ** 2 for i, char in enumerate(text)) % 10_007


def arguments(data: Path, output: Path, **changes: str) -> list[str]:
    values = {**TINY, **changes}
    return ["--preset", "tiny", "--output", str(output), f"data={data}", *(f"{k}={v}" for k, v in values.items())]


@pytest.fixture(scope="module")
def finished(script, data, tmp_path_factory) -> Path:
    presets.PRESETS["small-student"], kept = PRESET, presets.PRESETS["small-student"]
    try:
        output = tmp_path_factory.mktemp("cycle") / "run"
        script.main(arguments(data, output))
        yield output
    finally:
        presets.PRESETS["small-student"] = kept


def only_base(finished: Path, output: Path) -> Path:
    """A folder that has a finished run's texts, tokenizer and base, and no more."""
    for folder in finished.iterdir():
        if folder.name.startswith(("texts-", "tokenizer-", "base-", "arguments")):
            (shutil.copytree if folder.is_dir() else shutil.copy)(folder, output / folder.name)
    return output


def folder_of(output: Path, title: str) -> Path:
    (found,) = (path for path in output.iterdir() if path.name.rpartition("-")[0] == title)
    return found


def test_everything_is_written(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    seed = metrics["seeds"]["0"]
    assert list(seed["arms"]) == ["hard", "soft", "control", "ceiling"]
    assert {arm: len(rounds) for arm, rounds in seed["arms"].items()} == dict.fromkeys(seed["arms"], 2)
    assert set(seed["base"]["valid"]) >= {"bleu", "chrf", "raw", "finished", "chrf_signature"}
    for arm, rounds in seed["arms"].items():
        for number, each in enumerate(rounds, start=1):
            assert (each["iteration"], each["steps"]) == (number, 3)  # equal steps in all arms
            assert 0 <= each["test"]["chrf"] <= 100 and len(each["samples"]) == 4
            counts = each["counts"]
            if arm in ("hard", "soft"):
                assert counts["generated"] == 24 == counts["kept"] + sum(counts["rejected"].values())
                assert each["rows"] == counts["kept"] > 0
    assert seed["arms"]["soft"][0]["objective"] == "ForwardKD(lam=0.5)"
    assert [seed["arms"][arm][0]["objective"] for arm in ("hard", "control", "ceiling")] == ["SFT()"] * 3
    assert seed["arms"]["hard"][0]["counts"] == seed["arms"]["soft"][0]["counts"]  # of the same translations
    assert seed["arms"]["control"][0]["rows"] == 90
    assert seed["arms"]["ceiling"][0]["rows"] == seed["arms"]["hard"][0]["rows"]
    assert {test["baseline"] for test in seed["tests"]} == {"base", "control"}
    assert metrics["mean"]["soft"][1]["each_chrf"] == [seed["arms"]["soft"][1]["test"]["chrf"]]
    assert metrics["versions"]["torch"] == torch.__version__
    content = (finished / "chrf.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 5000


def test_the_base_rambles_and_its_end_is_learnt(finished: Path) -> None:
    """The base was taught no end of a translation: raw it goes on, truncated it does not."""
    seed = json.loads((finished / "metrics.json").read_text())["seeds"]["0"]
    raw = read_lines(folder_of(finished, "scores-base-seed0") / "test.raw.txt")
    cut = read_lines(folder_of(finished, "scores-base-seed0") / "test.txt")
    assert len(raw) == len(cut) == 8 and sum(map(len, raw)) > sum(map(len, cut))
    assert seed["arms"]["hard"][0]["counts"]["cut"] > 0


def test_texts_are_apart(finished: Path, data: Path) -> None:
    folder = folder_of(finished, "texts")
    parts = {
        p: [json.loads(line) for line in read_lines(folder / f"{p}.jsonl")] for p in ("pairs", "sentences", "plain")
    }
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    assert [row["source"] for row in parts["pairs"]] == [row["en"] for row in rows[:90]]
    assert [row["source"] for row in parts["sentences"]] == [row["en"] for row in rows[90:114]]
    # plain German of other captions than the English sentences
    assert {row["text"] for row in parts["plain"]} == {row["de"] for row in rows[114:]}
    assert not {row["text"] for row in parts["plain"]} & {row["target"] for row in parts["sentences"]}


def check_prompts(config: CycleDistill, output: Path, translations: str, synthetic: list[str]) -> None:
    """By id: the prompts that a folder of translations is bound to, of its rows, and of rows of real pairs."""
    stages = Cycle(config, output).stages
    prompts = stages.prompts(stages.texts.sentences)
    for example in stages.texts.pairs[: config.shots]:
        plain = stages.tokenizer.decode(prompts[0]).replace(" ", "")
        assert plain.count(example.source.replace(" ", "")) == plain.count(example.target.replace(" ", "")) == 1
    made = json.loads((folder_of(output, translations) / "arguments.json").read_text())
    assert made["prompts"] == hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    for title in synthetic:
        rows = [json.loads(line) for line in read_lines(folder_of(output, title) / "rows.jsonl")]
        rows = [row for row in rows if "index" in row]
        assert rows and all(row["ids"][: row["prompt"]] == prompts[row["index"]] for row in rows)
    parallel, begin = stages.rows(stages.real_pairs)[0], stages.prompts(stages.real_pairs[:1])[0]
    assert parallel["input_ids"][: len(begin)] == begin and len(stages.real_pairs) == config.pairs - config.shots


def test_prompts_of_generation_and_training_are_the_same(finished: Path, data: Path) -> None:
    config = load_config(CycleDistill, [CONFIGS / "tiny.yaml"], arguments(data, finished)[4:])
    check_prompts(config, finished, "translations-base-seed0", ["synthetic-hard-1-seed0", "synthetic-soft-2-seed0"])


def test_models_start_where_they_should(finished: Path) -> None:
    """M_2 from M_1, M_1 from the base: a three-step training moves a little from its start."""

    def head(title: str) -> torch.Tensor:
        return LlamaForCausalLM.from_pretrained(folder_of(finished, title) / "model").lm_head.weight

    base, first, second = head("base-seed0"), head("model-hard-1-seed0"), head("model-hard-2-seed0")
    assert 0 < (first - base).norm() < 0.2 * base.norm()
    assert 0 < (second - first).norm() < (second - base).norm()


def test_again_skips_what_is_done(script, finished: Path, data: Path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a finished stage was done again")

    monkeypatch.setattr(KDTrainer, "train", refuse)
    monkeypatch.setattr(LlamaForCausalLM, "generate", refuse)
    before = json.loads((finished / "metrics.json").read_text())
    assert json.loads(json.dumps(script.main(arguments(data, finished)))) == before


def test_the_plan_does_nothing(script, data: Path, tmp_path: Path, capsys) -> None:
    assert script.main([*arguments(data, tmp_path / "run"), "--plan"]) is None
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {"to"}
    titles = [line.split()[-1].rpartition("-")[0] for line in lines]
    assert titles[:4] == ["texts", "tokenizer", "base-seed0", "scores-base-seed0"]
    assert {"synthetic-soft-2-seed0", "model-ceiling-2-seed0", "scores-control-1-seed0"} <= set(titles)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["arguments.json"]


def test_a_kill_in_an_iteration_loses_one_batch_at_most(script, finished, data, tmp_path, monkeypatch) -> None:
    sizes: list[int] = []
    run = LlamaForCausalLM.generate

    def dying(self, **inputs):
        sizes.append(len(inputs["input_ids"]))
        if len(sizes) == 4:  # after the base's valid and test sentences: the second batch of three
            raise KeyboardInterrupt
        return run(self, **inputs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", dying)
    command = arguments(data, only_base(finished, tmp_path), iterations="1", stop="true")
    with pytest.raises(KeyboardInterrupt):
        script.main(command)
    torn = folder_of(tmp_path, "translations-base-seed0")
    assert len(list((torn / "batches").glob("*.jsonl"))) == 1 and not (torn / "done.json").exists()
    script.main(command)
    assert sizes[:6] == [6, 8, 8, 8, 8, 8] and sizes.count(8) == 1 + 4 + 4  # torn batch again, the first one not
    whole = folder_of(finished, "translations-base-seed0")
    assert torn.name == whole.name
    for title in ("translations-base-seed0", "synthetic-soft-1-seed0", "scores-soft-1-seed0", "scores-control-1-seed0"):
        assert content(folder_of(tmp_path, title)) == content(folder_of(finished, title)), title


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def names(data: Path, output: Path, **changes: str) -> dict[str, str]:
    config = load_config(CycleDistill, [CONFIGS / "tiny.yaml"], arguments(data, output, **changes)[4:])
    return {name.rpartition("-")[0]: name for _, name in Cycle(config, output).plan()}


def test_a_change_reaches_what_depends_on_it(data: Path, tmp_path: Path) -> None:
    before = names(data, tmp_path)

    def changed(**changes: str) -> set[str]:
        after = names(data, tmp_path, **changes)
        return {title for title in before if after.get(title) != before[title]}

    arms = ("hard", "soft", "control", "ceiling")
    models = {f"{kind}-{arm}-{i}-seed0" for kind in ("model", "scores") for arm in arms for i in (1, 2)}
    filtered = changed(filters="{unique_words: 0.1}")
    assert {
        "synthetic-hard-1-seed0",
        "synthetic-soft-2-seed0",
        "rows-ceiling-seed0",
        "model-ceiling-2-seed0",
    } <= filtered
    assert not {title for title in filtered if title.startswith(("translations-base", "model-control", "scores-base"))}
    assert changed(alpha="0.3") == {
        *(f"{kind}-soft-{i}-seed0" for kind in ("model", "scores") for i in (1, 2)),
        "translations-soft-1-seed0", "synthetic-soft-2-seed0",
    }  # fmt: skip
    assert changed(learning_rate="1e-4") == models | {
        f"{kind}-{arm}-{i}-seed0" for arm in ("hard", "soft") for kind, i in (("translations", 1), ("synthetic", 2))
    }
    everything = set(before) - {"texts", "tokenizer", "base-seed0"}
    assert changed(shots="2") == everything
    assert changed(sentences="20") == set(before)
    assert changed(k="5") == {title for title in before if "soft" in title} | {
        "translations-base-seed0", "synthetic-hard-1-seed0", "rows-ceiling-seed0",
        *(title for title in before if "hard" in title or "model-ceiling" in title or "scores-ceiling" in title),
    }  # fmt: skip
    assert changed(bootstrap="0", iterations="2", stop="false", samples="1") == set()


@pytest.mark.parametrize("restart", [False, True])
def test_chain_or_restart(data: Path, tmp_path: Path, restart: bool) -> None:
    config = load_config(
        CycleDistill, [CONFIGS / "tiny.yaml"], arguments(data, tmp_path, restart_from_base=str(restart).lower())[4:]
    )
    cycle = Cycle(config, tmp_path)
    (base, _), (first, second) = cycle.bases[0], cycle.arms[0]["hard"]
    assert first.model.needs[0].name == base.name
    assert second.model.needs[0].name == (base.name if restart else first.model.name)
    # either way M_1 translates for the second iteration
    assert second.rows.needs[0].needs[1].name == first.model.name
    assert len(cycle.arms[0]["control"]) == (1 if restart else 2)


def test_an_arm_ends_when_chrf_stops_rising(data: Path, tmp_path: Path, monkeypatch) -> None:
    chrf = {"base": 20.0, "hard-1": 21.0, "hard-2": 21.0, "hard-3": 30.0, "soft-1": 19.0, "soft-2": 30.0}

    def do(self, stage, tell):
        value = next((chrf[key] for key in chrf if f"scores-{key}" in stage.name), 0.0)
        write_json(stage.folder / "scores.json", {"valid": {"chrf": value}})
        write_json(stage.folder / "done.json", {})

    monkeypatch.setattr(Pipeline, "_do", do)

    def lengths(**changes: str) -> dict[str, int]:
        config = load_config(
            CycleDistill, [CONFIGS / "tiny.yaml"], arguments(data, tmp_path, iterations="3", **changes)[4:]
        )
        cycle = Cycle(config, tmp_path)
        list(cycle.work())
        found = {arm: len(rounds) for arm, rounds in cycle.rounds(0).items()}
        assert all(each.scores.done for rounds in cycle.rounds(0).values() for each in rounds)
        assert found == {arm: sum(each.scores.done for each in cycle.arms[0][arm]) for arm in found}, (
            "nothing beyond what was wanted"
        )
        return found

    assert lengths(stop="true") == {"hard": 2, "soft": 1, "control": 2, "ceiling": 2}
    assert lengths(stop="false") == {"hard": 3, "soft": 3, "control": 3, "ceiling": 3}


def test_paper_preset_with_a_model_from_a_folder(script, finished: Path, data: Path, tmp_path: Path) -> None:
    """LoRA, monolingual text of its own, few-shot prompt, best by held-out loss, 8-bit lists, Self-Evolution."""
    pytest.importorskip("peft")
    mono = tmp_path / "mono.en"
    mono.write_text("".join(f"The {one} hears the {other}.\n" for one in NOUNS for other in list(NOUNS)[:3]))
    own = folder_of(finished, "base-seed0") / "model"
    command = [
        "--preset", "paper", "--output", str(tmp_path / "run"), f"data={data}", f"monolingual={mono}",
        f"model={own}", "direction=en-de", "sentences=12", "pairs=12", "shots=2", "iterations=2", "stop=false",
        "hard.steps=2", "soft.steps=2", "variants=[hard,soft_self_evolution]", "dtype=float32", "bf16=false",
        "valid_limit=2", "test_limit=2", "max_new_tokens=16", "lists=8bit", "k=4", "bootstrap=0",
        "prompt=tiny", "keep_parallel=true", f"filters={TINY['filters']}",
    ]  # fmt: skip
    found = script.main(command)
    config = load_config(CycleDistill, [CONFIGS / "paper.yaml"], command[4:])
    check_prompts(config, tmp_path / "run", "translations-base", ["synthetic-hard-1", "synthetic-soft-1"])
    arms = found["seeds"]["0"]["arms"]
    assert list(arms) == ["hard", "soft_self_evolution", "control"]  # no references, no ceiling
    first, second = arms["soft_self_evolution"]
    assert first["objective"] == "SelfEvolution(lam=0.5, beta=0.5, gamma=0.4)" and len(first["validation"]) >= 1
    assert first["rows"] == first["counts"]["kept"] + 10 and first["counts"]["parallel"] == 10
    training = read_json(folder_of(tmp_path / "run", "model-hard-1-seed0") / "training.json")
    assert (training["settings"]["batch_size"], training["settings"]["accumulation"]) == (1, 8)
    assert training["settings"]["warmup"] == 5 and training["settings"]["learning_rate"] == 2e-4
    folder = folder_of(tmp_path / "run", "model-hard-1-seed0")
    adapters = read_json(folder / "model" / "adapter_config.json")
    assert (adapters["r"], adapters["lora_alpha"], adapters["lora_dropout"], len(adapters["target_modules"])) == (
        2,
        4,
        0,
        7,
    )
    merged = LlamaForCausalLM.from_pretrained(folder / "merged").state_dict()
    assert all(torch.isfinite(value).all() for value in merged.values())
    check_merged(LlamaForCausalLM.from_pretrained(own).state_dict(), folder / "model", merged)
    third = LlamaForCausalLM.from_pretrained(folder_of(tmp_path / "run", "model-hard-2-seed0") / "merged").state_dict()
    assert second["steps"] == 2 and any(not torch.equal(third[name], merged[name]) for name in merged)


def check_merged(base: dict, adapters: Path, merged: dict) -> None:
    """W + (alpha / r) B A for each adapted matrix, all else as it was."""
    from safetensors.torch import load_file

    low = load_file(adapters / "adapter_model.safetensors")
    moved = 0
    for name, value in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        expected = value
        if f"{key}.lora_A.weight" in low:
            expected = value + 4 / 2 * low[f"{key}.lora_B.weight"] @ low[f"{key}.lora_A.weight"]
            moved += not torch.equal(expected, value)
        torch.testing.assert_close(merged[name], expected, atol=1e-6, rtol=1e-5)
    assert moved >= 7


def test_what_is_missing_is_said_before_any_work(script, data: Path, tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(cycle_stages, "generate_to", refuse)
    monkeypatch.setattr(KDTrainer, "train", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    paper = ["--preset", "paper", "--output", str(tmp_path / "run"), "direction=en-de", f"data={data}"]
    with pytest.raises(ValueError, match=r"meta-llama/Llama-3\.1-8B"):
        script.main([*paper, "monolingual=null", "pairs=20"])
    with pytest.raises(ValueError, match=r"no-such.*give parallel text as data=PATH"):
        script.main(["--preset", "tiny", "--output", str(tmp_path / "b"), "data=./no-such"])
    with pytest.raises(ValueError, match=r"pairs=4000 leaves no sentences of the 120 training rows"):
        script.main(["--preset", "tiny", "--output", str(tmp_path / "c"), f"data={data}"])
    with pytest.raises(ValueError, match="nonsense"):
        script.main([*arguments(data, tmp_path / "d"), "nonsense=1"])
