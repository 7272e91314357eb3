"""What a run would take: tokens and steps as the run counts them, memory as real passes and a real process take it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, TrainingArguments

from fused_kd import ops
from fused_kd.engines import chunked
from fused_kd.training import dry_run
from fused_kd.training.memory import MicroBatch
from fused_kd.training.models import LoRA, load_tokenizer, with_adapters
from fused_kd.training.passes import Passes, faked, model_without_data, passes_of, sizes_of
from tests.training.scripts import ROOT, script
from tests.training.test_chat_script import Chats


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Chats:
    return Chats(tmp_path_factory.mktemp("chats"))


@pytest.mark.parametrize("lora", [None, LoRA(r=4)], ids=["whole", "adapters"])
@pytest.mark.parametrize(
    "options",
    [{}, {"checkpointing": True}, {"autocast": torch.bfloat16}, {"accumulated": True}, {"train": False}],
    ids=["plain", "checkpointing", "bf16", "accumulated", "teacher"],
)
def test_passes_without_data_are_as_large_as_real_ones(tmp_path: Path, options: dict, lora: LoRA | None) -> None:
    """Within 12 %: without data attention copies its output, and gives no compact mask."""
    config = LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4
    )
    real = LlamaForCausalLM(config)
    real.save_pretrained(tmp_path)
    counted = model_without_data(str(tmp_path), None, adapters=lora, student=True)
    with faked(counted):
        found = passes_of(counted, 4, 64, **options)
    real = with_adapters(real, lora, "CAUSAL_LM")
    expected = passes_of(real, 4, 64, **options)
    assert sizes_of(counted) == sizes_of(real)
    for name in Passes.__dataclass_fields__:
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert 0.95 * theirs <= ours <= 1.12 * theirs, (name, found, expected)


ALL_ROWS = {"per_device_train_batch_size": 24, "global_batch": 24}


def test_a_model_that_needs_data_to_be_counted(chats: Chats, tmp_path: Path, capsys) -> None:
    """Its weights are told, and what is missing."""
    tokenizer = tokenizer_of(chats)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    config._experts_implementation = "eager"
    MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    tokenizer.save_pretrained(tmp_path / "experts")
    script("train").main(chats.command(tmp_path / "run", dry_run="true", teacher=tmp_path / "experts"))
    told = capsys.readouterr().out
    assert parts_of(told)["teacher's weights"] > 0 and "teacher's forward" not in told
    assert "experts cannot be counted without data and are not in the peak: " in told


def test_half_precision_is_counted_as_it_is_trained(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    student, teacher = (model_without_data(str(tmp_path), None, student=learns) for learns in (True, False))
    assert sizes_of(student).weights == 2 * sizes_of(teacher).weights == 4 * sizes_of(teacher).numbers
    assert sizes_of(model_without_data(str(tmp_path), None, dtype="float32")).weights == sizes_of(student).weights


def test_what_would_be_trained(chats: Chats, tmp_path: Path, capsys) -> None:
    """Nothing is loaded and nothing is written; the counts are those of the run."""
    train = script("train")
    train.load_model = lambda *_, **__: pytest.fail("a model was loaded")
    given = {"global_batch": 8, "num_train_epochs": 2, "max_length": 40}
    assert train.main(chats.command(tmp_path / "run", dry_run="true", **given)) is None
    told = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    rows = train.read_rows(
        train.Train("o", str(chats.data), "s", teacher=["t"], max_length=40), tokenizer_of(chats), "train"
    )
    tokens = sum(len(row["input_ids"]) for row in rows.rows)
    targets = sum(label != -100 for row in rows.rows for label in row["labels"])
    assert rows.truncated > 2, "some are cut"
    assert f"24 rows, {rows.truncated} truncated, 0 skipped\n{tokens} tokens, {targets} with loss; padding" in told
    assert f"6 steps of {tokens / 3:.0f} tokens on average" in told
    assert f"{rows.truncated} of 24 rows are cut at max_length=40: more keeps them" in told
    assert "loss    (" in told and "expected memory with 4 x 40 tokens" in told
    parts = ["student's weights", "gradients", "optimizer (adamw_torch_fused)", "activations for the backward"]
    parts += ["teacher's weights", "teacher's forward", "loss (chunked)", "gradients of the loss", "peak"]
    assert list(parts_of(told)) == parts
    assert "loss, chunked:" in told and "loss, streaming:" in told and "full logits, which" in told
    assert chats.train(tmp_path / "run", **given)["steps"] == 6


def test_rows_that_are_dropped_are_not_counted(chats: Chats, tmp_path: Path, capsys) -> None:
    given = {"global_batch": 5, "per_device_train_batch_size": 5, "num_train_epochs": 2}
    given |= {"dataloader_drop_last": "true"}
    script("train").main(chats.command(tmp_path / "run", dry_run="true", **given))
    told = capsys.readouterr().out
    tokens = int(re.search(r"skipped\n(\d+) tokens, ", told)[1])
    assert f"8 steps of {tokens * 20 / 24 / 4:.0f} tokens on average" in told
    assert chats.train(tmp_path / "run", **given)["steps"] == 8
    few = given | {"global_batch": 25, "per_device_train_batch_size": 25, "dry_run": "true"}
    with pytest.raises(ValueError, match="dataloader_drop_last must be off: 24 rows are fewer than the 25"):
        script("train").main(chats.command(tmp_path / "few", **few))


@pytest.mark.parametrize("packing", [False, True])
def test_the_largest_batch_has_the_most_targets(tmp_path: Path, packing: bool) -> None:
    """The longest rows need not be those with the most loss."""
    made = [([5] * 100, [-100] * 99 + [5])] * 8 + [([5] * 95, [-100] + [5] * 94)] * 8
    rows = SimpleNamespace(rows=[{"input_ids": ids, "labels": labels} for ids, labels in made], truncated=0, skipped=0)
    train = SimpleNamespace(streaming=False, packing=packing, max_length=100)
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=8, use_cpu=True, report_to=[])
    found = dry_run.amounts_of(train, args, rows).batch
    assert found == (MicroBatch(1, 800, 8 * 94) if packing else MicroBatch(8, 100, 8 * 94))


def tokenizer_of(chats: Chats):
    return load_tokenizer(chats.folder / "student")


def parts_of(told: str) -> dict[str, float]:
    found = re.findall(r"^  (\S.*?) {2,}([\d.e+-]+) (MB|GB)", told, re.MULTILINE)
    return {name: float(size) * (1e9 if unit == "GB" else 1e6) for name, size, unit in found}


@pytest.mark.parametrize(
    ("options", "part", "factor"),
    [
        ({"optim": "adafactor"}, "optimizer (adafactor)", None),
        ({"optim": "adamw_torch"}, "optimizer (adamw_torch)", 2.0),
        ({"optim": "adamw_8bit"}, "optimizer (adamw_8bit)", 0.5),
        ({"teacher": None, "objective": "sft"}, "teacher's weights", None),
        ({"teacher": "own:decay=0.9"}, "teacher's weights", 1.0),
        ({"gradient_checkpointing": "true", "per_device_train_batch_size": 8}, "peak", None),
    ],
)
def test_memory_follows_the_options(chats: Chats, tmp_path: Path, options: dict, part: str, factor, capsys) -> None:
    """``factor``: of the student's weights; None: the part is not there, or is less than without the option."""
    script("train").main(chats.command(tmp_path, dry_run="true", **options))
    found = parts_of(capsys.readouterr().out)
    if factor is not None:
        assert found[part] == pytest.approx(factor * found["student's weights"], rel=0.01)
        return
    if part in found:
        options = {name: value for name, value in options.items() if name != "gradient_checkpointing"}
        script("train").main(chats.command(tmp_path, dry_run="true", **options))
        assert found[part] < parts_of(capsys.readouterr().out)[part]


@pytest.mark.parametrize("options", [{}, {"bf16": "true"}, {"use_peft": "true"}], ids=["fp32", "bf16", "lora"])
def test_the_loss_is_planned_as_it_runs(chats: Chats, tmp_path: Path, options: dict, monkeypatch, capsys) -> None:
    """Of a batch of all rows. The student is trained in float32, whatever autocast computes in."""
    script("train").main(chats.command(tmp_path / "dry", dry_run="true", **ALL_ROWS, **options))
    told = capsys.readouterr().out
    found, targets = parts_of(told), int(re.search(r"(\d+) of them with loss", told)[1])
    plans, heads = [], []
    plan_chunks, run = chunked.plan_chunks, ops.run

    def recorded(problem):
        result = run(problem)
        hidden = result.d_source[0].nbytes * targets
        heads.append(hidden + (0 if result.d_weight is None else result.d_weight.nbytes))
        return result

    monkeypatch.setattr(chunked, "plan_chunks", lambda *a, **k: plans.append(plan_chunks(*a, **k)) or plans[-1])
    monkeypatch.setattr(ops, "run", recorded)
    chats.train(tmp_path / "run", **ALL_ROWS, **options)
    assert found["loss (chunked)"] == pytest.approx(plans[0].workspace, rel=0.05)
    assert found["gradients of the loss"] == pytest.approx(heads[0], rel=0.05)


def test_processes_share_what_they_shard(chats: Chats, tmp_path: Path, monkeypatch, capsys) -> None:
    """ZeRO-2 divides gradients and optimizer, FSDP2 and ZeRO-3 the weights too."""
    from fused_kd.training import memory

    args = script("train").parse(
        (script("train").Train, script("train").Arguments), chats.command(tmp_path), aliases={}
    )[1]
    monkeypatch.setattr(type(args), "world_size", 4)
    assert memory._shards(args) == {"weights": 1, "gradients": 1, "optimizer": 1, "masters": 0}
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    assert memory._shards(args) == {"weights": 1, "gradients": 4, "optimizer": 4, "masters": 0}
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert memory._shards(args)["weights"] == 4


def test_padding_and_advice(chats: Chats, tmp_path: Path, capsys) -> None:
    """Rows of very different lengths in one batch: packing computes no padding, and is said to."""
    given = {"dry_run": "true", "per_device_train_batch_size": 24, "train_sampling_strategy": "random"}
    script("train").main(chats.command(tmp_path, **given))
    told = capsys.readouterr().out
    share = int(re.search(r"padding (\d+)%", told)[1])
    assert share > 20 and f"{share}% of the batches is padding: --packing true computes none" in told
    script("train").main(chats.command(tmp_path, packing="true", **given))
    told = capsys.readouterr().out
    assert "padding 0%" in told and "--packing" not in told


def test_a_measured_step(chats: Chats, tmp_path: Path, capsys) -> None:
    script("train").main(chats.command(tmp_path / "run", dry_run="step", eval_strategy="no", save_steps=1))
    told = capsys.readouterr().out
    assert re.search(r"measured: [\d.e-]+ s a step of \d+ tokens, \d+ tokens/s\nall 6 steps: about", told)
    assert "measured peak:" in told and "resident memory, which is coarse; expected" in told
    assert not (tmp_path / "run").exists()


def test_the_expected_peak_is_a_real_process_s(tmp_path: Path, chats: Chats) -> None:
    """Within a quarter and 100 MB: resident memory has imported code, the allocator's reserves and copies in it.

    A process of its own, as a resident set has no way down.
    """
    tokenizer = tokenizer_of(chats)
    for name, layers in (("student", 6), ("teacher", 3)):
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1536, num_hidden_layers=layers,
            num_attention_heads=8,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    models = {"student": tmp_path / "student", "teacher": tmp_path / "teacher"}
    command = chats.command(tmp_path / "run", dry_run="step", per_device_train_batch_size=2, **models)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    told = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "train.py"), *command],
        env=environment, capture_output=True, text=True, timeout=600, check=True,
    ).stdout  # fmt: skip
    found = re.search(r"measured peak: ([\d.]+) (MB|GB) .* expected ([\d.]+) (MB|GB)", told)
    measured, expected = (float(found[n]) * (1e3 if found[n + 1] == "GB" else 1) for n in (1, 3))
    print(f"measured {measured} MB, expected {expected} MB")
    assert expected > 300 and 0.75 * expected - 100 < measured < 1.25 * expected + 100


def test_durations() -> None:
    assert [dry_run.duration(seconds) for seconds in (5.4, 130, 7260)] == ["5 s", "2 min", "2 h 01 min"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_peak_is_of_the_process_itself() -> None:
    """Not of the larger one that started it, as ru_maxrss has it."""
    held = bytearray(1 << 30)
    held[::4096] = b"x" * len(held[::4096])
    code = "import torch; from fused_kd.training.metrics import peak_memory_mb as p; print(p(torch.device('cpu')))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 50 < float(told.stdout) < 900
