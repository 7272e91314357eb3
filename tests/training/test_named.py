"""KDTrainer with students and teachers by name: the same trainings as with the loaded ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file, save_file

from fused_kd.integrations.own import OwnTeacher
from fused_kd.training import load_student, load_teacher
from fused_kd.training.collate import Collator
from fused_kd.training.named import opened, tokenizer_of
from fused_kd.training.trainer import KDTrainer
from tests.serving.serving import serve, tokenizer
from tests.training.caching import write_hidden
from tests.training.test_trainer import assert_same_weights, weights
from tests.training.tiny import rows, tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a student in bf16, with its tokenizer, and of its teacher, without."""
    root = tmp_path_factory.mktemp("models")
    tiny(16, seed=1).to(torch.bfloat16).save_pretrained(root / "student")
    tokenizer().save_pretrained(root / "student")
    tiny(24, seed=2).save_pretrained(root / "teacher")
    return {name: str(root / name) for name in ("student", "teacher")}


def trained(folder: Path, student: Any, teacher: Any, data: Any = None, **options: Any) -> KDTrainer:
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=2, optim="sgd", learning_rate=0.5, per_device_train_batch_size=4, report_to=[],
        disable_tqdm=True, use_cpu=True, save_strategy="no", seed=0,
    )  # fmt: skip
    run = KDTrainer(
        student, teacher=teacher, objective="0.5*sft+0.5*generalized_jsd:beta=0.3", args=arguments,
        train_dataset=rows(8) if data is None else data, **options,
    )  # fmt: skip
    run.train()
    return run


def loaded(folder: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("kind", [str, Path])
def test_folders(tmp_path: Path, folders: dict[str, str], kind: Any) -> None:
    """Tokenizer, collator and dtypes are found; sums of objectives by their text."""
    run = trained(tmp_path, kind(folders["student"]), kind(folders["teacher"]))
    assert {value.dtype for value in run.model.parameters()} == {torch.float32}
    assert run.processing_class.get_vocab() == tokenizer().get_vocab()
    by_hand = trained(tmp_path, loaded(folders["student"]), loaded(folders["teacher"]), data_collator=Collator(0))
    assert by_hand.processing_class is None
    assert_same_weights(weights(run.model), weights(by_hand.model), 0.0)
    run.save_model(str(tmp_path / "saved"))
    assert tokenizer_of(tmp_path / "saved") is not None


def test_teachers_keep_their_dtype(tmp_path: Path, folders: dict[str, str]) -> None:
    assert load_teacher(folders["student"]).dtype == torch.bfloat16
    assert load_student(folders["student"]).dtype == torch.float32
    given = opened([(0.5, folders["student"]), (0.5, Path(folders["student"]))])
    assert given[0][1] is given[1][1] and given[0][0] == 0.5
    several = trained(tmp_path, folders["student"], [(0.5, folders["teacher"]), (0.5, tiny(8, seed=3))])
    assert len(several.teaching.models) == 2


def test_a_cache_and_a_server(tmp_path: Path, folders: dict[str, str]) -> None:
    model, data = tiny(24, seed=2), rows(8)
    local = trained(tmp_path, loaded(folders["student"]), model)
    expected, held_out = weights(local.model), local.evaluate(rows(5, seed=9))
    with serve(tiny(24, seed=2)) as server:
        served = trained(tmp_path, folders["student"], server.url)
        for name, value in served.evaluate(rows(5, seed=9)).items():
            if name in ("eval_loss", "eval_ce", "eval_perplexity", "eval_kl", "eval_top_1"):
                assert value == pytest.approx(held_out.pop(name), rel=1e-5)
    assert "eval_kl" not in held_out and "eval_top_1" not in held_out, "both were compared"
    assert_same_weights(weights(served.model), expected, 1e-5)
    cache = write_hidden(tmp_path / "cache", data, tiny(24, seed=2), dtype="fp32")
    for name in (f"cache:{tmp_path / 'cache'}", str(tmp_path / "cache")):
        run = trained(tmp_path, loaded(folders["student"]), name, cache.rows(data))
        assert_same_weights(weights(run.model), expected, 1e-5)


def test_no_code_and_no_missing_tensors(tmp_path: Path) -> None:
    tiny(16, seed=1).save_pretrained(tmp_path / "coded")
    config = json.loads((tmp_path / "coded" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (tmp_path / "coded" / "config.json").write_text(json.dumps(config))
    (tmp_path / "coded" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    tiny(16, seed=1).save_pretrained(tmp_path / "torn")
    file = tmp_path / "torn" / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "q_proj" not in name}, file, {"format": "pt"})
    for load in (load_student, load_teacher):
        with pytest.raises(ValueError, match="gives no causal LM"):
            load(tmp_path / "coded")
        with pytest.raises(ValueError, match=r"must hold every tensor of LlamaForCausalLM: 1 missing \(.*q_proj"):
            load(tmp_path / "torn")
    assert not (tmp_path / "ran").exists()
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny(16, seed=1), peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapters")
    with pytest.raises(ValueError, match="which holds adapters: load their base"):
        load_student(tmp_path / "adapters")


def test_what_is_not_needed_is_not_loaded(tmp_path: Path, folders: dict[str, str]) -> None:
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    run = KDTrainer(folders["student"], "./nowhere", "sft", args=arguments, eval_metrics=False)
    assert run.teaching is None
    with pytest.raises(ValueError, match=r"got '\./nowhere': there is no such folder"):
        KDTrainer(folders["student"], "./nowhere", "sft", args=arguments)


def test_default_collator(tmp_path: Path, folders: dict[str, str]) -> None:
    """Pads with the tokenizer's token; of data sets with other columns too, and of streams."""
    data = [{**row, "text": "unused"} for row in rows(8)]
    expected = weights(trained(tmp_path, loaded(folders["student"]), loaded(folders["teacher"]), rows(8)).model)
    for given in (data, Dataset.from_list(data), Dataset.from_list(data).with_format("torch")):
        run = trained(tmp_path, folders["student"], folders["teacher"], given)
        assert_same_weights(weights(run.model), expected, 0.0)
    stream = Dataset.from_list(rows(8)).to_iterable_dataset()
    assert trained(tmp_path, folders["student"], folders["teacher"], stream).state.global_step == 2


def test_texts_of_teachers_that_are_no_folders(tmp_path: Path, folders: dict[str, str]) -> None:
    """The student's own average, as by its object; a server without http:// is told what is missing."""
    text = trained(tmp_path, folders["student"], "own:decay=0.9")
    model = trained(tmp_path, folders["student"], OwnTeacher(decay=0.9))
    assert_same_weights(weights(text.model), weights(model.model), 0.0)
    assert text.teaching is not None and not text.teaching.models
    with pytest.raises(
        ValueError, match=r"teacher must say what it is: http://localhost:8400 for a server, got 'local"
    ):
        trained(tmp_path, folders["student"], "localhost:8400")
