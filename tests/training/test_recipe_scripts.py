"""examples/train.py and examples/evaluate.py as a reader would run them, on tiny models."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from fused_kd.training.generation import generate
from fused_kd.training.presets import load_model, load_tokenizer
from fused_kd.training.trainer import KDTrainer

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = EXAMPLES / "configs"
TINY = [str(CONFIGS / "paper.yaml"), str(CONFIGS / "tiny.yaml")]
SMALL = ["train_limit=24", "valid_limit=4", "vocab=400", "global_batch=16", "micro_batch=8", "epochs=2"]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_script", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(method: str, output: Path, *changes: str) -> dict:
    return script("train").main(
        [*TINY, str(CONFIGS / "methods" / f"{method}.yaml"), *SMALL, *changes, "--output", str(output)]
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    record = train("sft", folder, "student=tiny-student")
    assert record["steps"] == 6, "48 rows of two directions, 16 a step, twice"
    assert [round(entry["step"] / 6, 2) for entry in record["validation"]] == pytest.approx([0.33, 0.67, 1.0], abs=0.2)
    return folder / "train" / "model"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_sft_keeps_the_best_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation loss that grows makes the first checkpoint the best one."""
    seen = []

    def worse(self, *args, **kwargs):
        seen.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
        metrics = {"eval_loss": float(len(seen))}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    monkeypatch.setattr(KDTrainer, "evaluate", worse)
    train("sft", tmp_path, "student=tiny-student")
    kept = weights(tmp_path / "train" / "model")
    assert len(seen) > 2
    for name, value in kept.items():
        assert torch.equal(value, seen[0][name])
    assert any(not torch.equal(kept[name], seen[-1][name]) for name in kept)


def test_distil_resume_and_evaluate(teacher: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = (f"teacher={teacher}", f"student={teacher}")
    whole = train("self_evolution_quantile", tmp_path / "whole", *pair)
    text = capsys.readouterr().out
    assert "global batch 16 = 1 processes x 8 sentences x 2 steps" in text
    assert "no loss (" in text and "loss    (" in text, "a sample with its loss mask"
    gamma = float(text.split("Γ = ")[1].split(":")[0])
    assert whole["objective"] == f"SelfEvolution(lam=0.5, beta=0.5, gamma={gamma:g})"

    steps, step = [], KDTrainer.training_step

    def counted(self, *args, **kwargs):
        if len(steps) == 9:
            raise KeyboardInterrupt
        steps.append(self.state.global_step)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(KDTrainer, "training_step", counted)
    with pytest.raises(KeyboardInterrupt):
        train("self_evolution_quantile", tmp_path / "cut", *pair)
    monkeypatch.setattr(KDTrainer, "training_step", step)
    newest = max((tmp_path / "cut" / "train" / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    (newest / "optimizer.pt").unlink()
    with pytest.warns(UserWarning, match=r"lacks optimizer\.pt: passed over"):
        train("self_evolution_quantile", tmp_path / "cut", *pair)
    ours, theirs = (weights(tmp_path / name / "train" / "model") for name in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    finished = tmp_path / "cut" / "train" / "model" / "model.safetensors"
    finished.write_bytes(finished.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="instead of .*: trained again"):
        train("self_evolution_quantile", tmp_path / "cut", *pair)
    again = weights(tmp_path / "cut" / "train" / "model")
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)

    models = [str(teacher), str(tmp_path / "whole" / "train" / "model")]
    command = [*models, "--data", "builtin", "--directions", "en-de", "de-en", "--limit", "3", "--prompt", "tiny",
               "--max-new-tokens", "6", "--similar-to", models[0], "--output", str(tmp_path / "eval")]  # fmt: skip
    results = script("evaluate").main(command)
    assert results[models[0]]["en-de"]["similarity"]["equal"] == 1.0
    assert set(results[models[1]]["de-en"]["p"]) == {"bleu", "chrf"} and not results[models[0]]["de-en"]["p"]
    saved = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert saved == json.loads(json.dumps(results)) == json.loads(json.dumps(script("evaluate").main(command)))


def test_another_model_at_the_same_path(teacher: Path, tmp_path: Path) -> None:
    """What is kept by a model's path is kept by its content."""
    model = tmp_path / "model"
    shutil.copytree(teacher, model)
    data = tmp_path / "test.jsonl"
    data.write_text(json.dumps({"en": "A dog.", "de": "Ein Hund."}) + "\n")

    def evaluate() -> dict:
        command = [str(model), "--data", str(data), "--directions", "en-de", "--prompt", "tiny"]
        return script("evaluate").main([*command, "--max-new-tokens", "4", "--output", str(tmp_path / "eval")])

    def kept() -> set[str]:
        return {path.name for path in (tmp_path / "eval").glob("*en-de*")}

    evaluate()
    before = kept()
    evaluate()
    (model / "README.md").write_text("Mine.")
    evaluate()
    assert kept() == before and len(before) == 1
    names = load_file(model / "model.safetensors")
    save_file({name: value + 0.1 for name, value in names.items()}, model / "model.safetensors", {"format": "pt"})
    evaluate()
    assert len(kept()) == 2, "another model"
    data.write_text(json.dumps({"en": "A dog.", "de": "Der Hund."}) + "\n")
    evaluate()
    assert len(kept()) == 3, "another reference"
    with pytest.raises(ValueError, match=r"models must have a name for a folder, got '\.\.'"):
        script("evaluate").main(
            ["..", "--data", str(data), "--directions", "en-de", "--output", str(tmp_path / "eval")]
        )


def test_another_content_at_the_same_path_is_refused(teacher: Path, tmp_path: Path) -> None:
    model, tasks = tmp_path / "model", tmp_path / "train.json"
    shutil.copytree(teacher, model)
    tasks.write_text(json.dumps([{"instruction": "Count.", "output": "one"}] * 3))
    pair = (f"teacher={model}", f"student={teacher}", "epochs=1", f"instructions={tasks}")
    train("no_evo", tmp_path / "run", *pair)
    train("no_evo", tmp_path / "run", *pair)
    tasks.write_text(json.dumps([{"instruction": "Count.", "output": "two"}] * 3))
    with pytest.raises(ValueError, match="was made with another data: its content is"):
        train("no_evo", tmp_path / "run", *pair)
    tasks.write_text(json.dumps([{"instruction": "Count.", "output": "one"}] * 3))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    with pytest.raises(ValueError, match="was made with another teacher: its content is sha256:"):
        train("no_evo", tmp_path / "run", *pair)


def test_packing_and_instructions(teacher: Path, tmp_path: Path) -> None:
    """Packed rows train as padded ones do, and Alpaca's rows are trained on."""
    tasks = tmp_path / "train.json"
    tasks.write_text(json.dumps([{"instruction": f"Count to {n}.", "output": " ".join("123"[:n])} for n in (1, 2, 3)]))
    pair = (f"teacher={teacher}", f"student={teacher}", "epochs=1", f"instructions={tasks}", "max_length=256")
    padded, packed = (train("no_evo", tmp_path / text, *pair, f"packing={text}") for text in ("false", "true"))
    assert padded["sentences"] == packed["sentences"] == 51
    start, a, b = (weights(f) for f in (teacher, *(tmp_path / text / "train" / "model" for text in ("false", "true"))))
    moved = sum(float((a[name] - start[name]).norm() ** 2) for name in a) ** 0.5
    apart = sum(float((a[name] - b[name]).norm() ** 2) for name in a) ** 0.5
    # Adam divides by a gradient's size: rounding in a tiny one moves its weight
    assert moved > 0.1 and apart < 1e-2 * moved


@pytest.mark.parametrize("changes", [(), ("bf16=true", "dtype=bfloat16")], ids=["auto", "bf16"])
def test_a_student_in_half_precision_is_trained_in_float32(teacher: Path, tmp_path: Path, changes: tuple) -> None:
    """At a late training's learning rate nearly every weight moves; of bf16 weights few would."""
    half = tmp_path / "half"
    load_model(teacher, load_tokenizer(teacher), 0, dtype=torch.bfloat16).save_pretrained(half)
    load_tokenizer(teacher).save_pretrained(half)
    train(
        "no_evo", tmp_path / "out", f"teacher={half}", f"student={half}", "learning_rate=2e-5", "epochs=1", "warmup=0",
        *changes,
    )  # fmt: skip
    start, end = weights(half), weights(tmp_path / "out" / "train" / "model")
    assert {value.dtype for value in start.values()} == {torch.bfloat16}
    assert {value.dtype for value in end.values()} == {torch.float32}
    body = [name for name in start if "layers" in name]
    moved = sum(int((end[name] != start[name].float()).sum()) for name in body)
    assert moved > 0.95 * sum(start[name].numel() for name in body)


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_tokenizer_without_padding_token(teacher: Path, tmp_path: Path, packing: str) -> None:
    """As Llama 2's: the same weights as with one, and translations."""
    bare = tmp_path / "bare"
    tokenizer = load_tokenizer(teacher)
    load_model(teacher, tokenizer, 0).save_pretrained(bare)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(bare)
    assert load_tokenizer(bare).pad_token_id is None
    changes = (f"packing={packing}", "epochs=1")
    for name, models in (("with", teacher), ("without", bare)):
        train("self_evolution_quantile", tmp_path / name, f"teacher={models}", f"student={models}", *changes)
    expected, found = (weights(tmp_path / name / "train" / "model") for name in ("with", "without"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    kept = tmp_path / "without" / "train" / "model"
    assert generate(load_model(kept, load_tokenizer(kept), 0), load_tokenizer(kept), ["en: a", "en: a cat"])


def test_two_processes_are_one(teacher: Path, tmp_path: Path) -> None:
    """Under torchrun the global batch is divided, and the same model comes out."""
    pair = (f"teacher={teacher}", f"student={teacher}", "epochs=1", "directions=[de-en]")
    train("self_evolution_top_k", tmp_path / "one", *pair)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(EXAMPLES / "train.py"), *TINY, str(CONFIGS / "methods" / "self_evolution_top_k.yaml"), *SMALL, *pair,
        "micro_batch=4", "--output", str(tmp_path / "two"),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "global batch 16 = 2 processes x 4 sentences x 2 steps" in done.stdout
    start, one, two = (weights(f) for f in (teacher, *(tmp_path / n / "train" / "model" for n in ("one", "two"))))
    moved = sum(float((one[name] - start[name]).norm() ** 2) for name in one) ** 0.5
    apart = sum(float((one[name] - two[name]).norm() ** 2) for name in one) ** 0.5
    assert moved > 0.1 and apart < 1e-3 * moved


def test_training_from_a_cache_needs_its_own_rows(teacher: Path, tmp_path: Path) -> None:
    cached = [
        "--data", "builtin", "--direction", "de-en", "en-de", "--teacher", str(teacher), "--prompt", "tiny",
        "--max-length", "128", "--limit", "24", "--k", "8", "--output", str(tmp_path / "cache"),
    ]  # fmt: skip
    script("cache_teacher").main(cached)
    pair = (f"teacher=cache:{tmp_path / 'cache'}", f"student={teacher}")
    record = train("forward_kd", tmp_path / "student", *pair)
    assert record["steps"] == 6 and record["objective"] == "ForwardKD(lam=0.5)"
    with pytest.raises(ValueError, match="data"):
        train("forward_kd", tmp_path / "other", *pair, "train_limit=23")
    with pytest.raises(ValueError, match="needs an online teacher"):
        train("self_evolution_quantile", tmp_path / "third", *pair)


def test_bad_configurations_stop_before_any_work(tmp_path: Path) -> None:
    for changes, message in (
        (("micro_batch=5",), "global_batch must be a multiple of micro_batch x processes = 5 x 1, got 16"),
        (("learning_rat=1",), "unknown keys learning_rat"),
        (("teacher=null",), "teacher must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            train("forward_kd", tmp_path / "none", *changes)
    assert not (tmp_path / "none").exists()
