"""A training ends in the same weights whatever became of its newest checkpoint."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fused_kd as fk
from fused_kd.training import checkpoints, fit
from fused_kd.training.checkpoints import MANIFEST, check_room, fault_of, last_checkpoint, seal
from fused_kd.training.collate import Collator
from fused_kd.training.trainer import KDTrainer
from tests.training.tiny import rows, tiny

DAMAGE: dict[str, Callable[[Path], object]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "removed": lambda path: path.unlink(),
}


def training(folder: Path, **options: object) -> KDTrainer:
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, lr_scheduler_type="cosine",
        save_steps=2, save_total_limit=2, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False, **options,
    )  # fmt: skip
    data = {"train_dataset": rows(12), "eval_dataset": rows(4, seed=9), "data_collator": Collator(0)}
    made = KDTrainer(tiny(8, seed=1, attention_dropout=0.2), tiny(8, seed=2), fk.NoEvo(), args=arguments, **data)
    made.remove_callback(transformers.trainer_callback.PrinterCallback)
    return made


def weights(run: KDTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in run.model.named_parameters()}


def cut(run: transformers.Trainer, step: int, train: Callable[[], object] | None = None) -> None:
    """Train until ``step``'s checkpoint is written."""

    class Kill(transformers.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    run.add_callback(Kill())
    with pytest.raises(KeyboardInterrupt):
        (train or run.train)()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    run = training(tmp_path_factory.mktemp("whole"))
    run.train()
    return weights(run)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    cut(training(folder), 4)
    return folder


def assert_ends_the_same(folder: Path, whole: dict[str, torch.Tensor], start: int) -> None:
    torch.manual_seed(99)  # another process would start elsewhere
    run = training(folder)
    checkpoint = run.last_checkpoint()
    assert (0 if checkpoint is None else int(checkpoint.split("-")[-1])) == start
    run.train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(value, whole[name]) for name, value in weights(run).items())


def test_any_file_of_the_newest(interrupted: Path, tmp_path: Path) -> None:
    names = [path.name for path in (interrupted / "checkpoint-4").iterdir()]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} < set(names)
    for name in names:
        for kind, damage in DAMAGE.items():
            folder = tmp_path / f"{name}-{kind}"
            shutil.copytree(interrupted, folder)
            damage(folder / "checkpoint-4" / name)
            with pytest.warns(UserWarning, match=rf"checkpoint-4 .*{name}.*: passed over for the checkpoint before it"):
                assert last_checkpoint(folder) == folder / "checkpoint-2"


def test_the_same_weights(interrupted: Path, whole: dict, tmp_path: Path) -> None:
    shutil.copytree(interrupted, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.warns(UserWarning, match=r"checkpoint-4 .*optimizer\.pt"):
        assert_ends_the_same(tmp_path / "run", whole, start=2)
    assert fault_of(tmp_path / "run" / "checkpoint-4") is None, "written again"


def test_all_torn_starts_again(interrupted: Path, whole: dict, tmp_path: Path) -> None:
    shutil.copytree(interrupted, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").write_text("[]")
    (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.warns(UserWarning, match="trainer_state.json instead of"):
        assert_ends_the_same(tmp_path / "run", whole, start=0)


def test_killed_while_sealing(whole: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of checkpoint-4 is written, but for the manifest."""
    flush = checkpoints.flush

    def killed(path: Path) -> None:
        if path.name == "checkpoint-4":
            raise KeyboardInterrupt
        flush(path)

    monkeypatch.setattr(checkpoints, "flush", killed)
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path).train()
    monkeypatch.undo()
    with pytest.warns(UserWarning, match=f"checkpoint-4 has no {MANIFEST}"):
        assert_ends_the_same(tmp_path, whole, start=2)


def worse(self: KDTrainer, *args: object, **kwargs: object) -> dict[str, float]:
    """A validation loss that grows, which makes the first checkpoint the best one."""
    metrics = {"eval_loss": float(self.state.global_step)}
    self.log(metrics)
    self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
    return metrics


BEST = {
    "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss",
    "greater_is_better": False,
}  # fmt: skip


def test_the_best_must_be_whole_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KDTrainer, "evaluate", worse)
    run = training(tmp_path / "whole", **BEST)
    run.train()
    wanted = weights(run)
    cut(training(tmp_path / "cut", **BEST), 4)
    (tmp_path / "cut" / "checkpoint-2" / "model.safetensors").write_bytes(b"")
    again = training(tmp_path / "cut", **BEST)
    with pytest.warns(UserWarning, match="checkpoint-4 needs the best one, checkpoint-2, which has 0 bytes of model"):
        again.train(resume_from_checkpoint=again.last_checkpoint())
    assert all(torch.equal(value, wanted[name]) for name, value in weights(again).items())


def test_resume_names_what_is_wrong(interrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no whole checkpoint in"):
        training(tmp_path).train(resume_from_checkpoint=True)
    shutil.copytree(interrupted, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-4' lacks optimizer\.pt: give a whole one, or"):
        training(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_last_checkpoint(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    for name in ("checkpoint-9", "checkpoint-10"):
        seal(tmp_path / name)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / MANIFEST).write_text("[" * 100_000)
    with pytest.warns(UserWarning, match=f"checkpoint-10 has no {MANIFEST}"):
        assert last_checkpoint(tmp_path, set_aside=True) == tmp_path / "checkpoint-9"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-9", "checkpoint-best", "damaged-checkpoint-10",
    ]  # fmt: skip


@pytest.mark.parametrize("best", ["", "..", 5, ["a"], "checkpoint-" + "9" * 300])
def test_a_best_checkpoint_that_cannot_be(tmp_path: Path, best: object) -> None:
    for name, state in (("checkpoint-4", {}), ("checkpoint-5", {"best_model_checkpoint": best})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(json.dumps(state))
        seal(tmp_path / name)
    with pytest.warns(UserWarning, match="checkpoint-5 has a best_model_checkpoint that is no checkpoint's path"):
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_the_best_of_a_moved_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best checkpoint is the one beside, though another lies where the run was."""
    monkeypatch.setattr(KDTrainer, "evaluate", worse)
    cut(training(tmp_path / "old", **BEST), 4)
    wanted = load_file(tmp_path / "old" / "checkpoint-2" / "model.safetensors")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    other = tmp_path / "old" / "checkpoint-2"
    save_file({n: v + 1 for n, v in wanted.items()}, other / "model.safetensors", metadata={"format": "pt"})
    seal(other)
    run = training(tmp_path / "new", **BEST)
    run.train(resume_from_checkpoint=True)
    assert run.state.best_model_checkpoint == str(tmp_path / "new" / "checkpoint-2")
    assert (tmp_path / "new" / "checkpoint-2").is_dir(), "the best one is kept"
    assert all(torch.equal(value, wanted[name]) for name, value in weights(run).items() if name in wanted)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    model = tiny(8, seed=1)
    check_room(tmp_path / "run" / "checkpoints", model)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 100))
        with pytest.raises(ValueError, match=r"two checkpoints take 0\.0 GB, and the disk of .* has 0\.0 GB free"):
            check_room(tmp_path / "run" / "checkpoints", model)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"checkpoint-2 could not be written, with \d+ bytes free there .*No space left"):
        training(tmp_path).train()
    assert last_checkpoint(tmp_path) is None


class Line(torch.nn.Module):
    """A module of any kind, half of it frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)
        self.last = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = ((self.last(self.frozen(x)) - y) ** 2).mean()
        return {"loss": loss, "twice": 2 * loss}


def test_fit_of_a_module(tmp_path: Path) -> None:
    """Trained once, killed in the middle to the same bits, and only what is trained is kept."""
    generator = torch.Generator().manual_seed(3)
    data = [{"x": torch.randn(4, generator=generator), "y": torch.randn(1, generator=generator)} for _ in range(24)]

    def make(folder: Path, rows: list = data) -> fit.ModuleTrainer:
        options = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 0.1, "save_steps": 3}
        return fit.ModuleTrainer(Line(), fit.training_arguments(folder, **options), train_dataset=rows)

    record = fit.fit(make(tmp_path / "whole"), tmp_path / "whole", "line")
    assert (record["steps"], record["parameters"], record["rows"]) == (12, 25, 24)
    assert all(entry["twice"] == pytest.approx(2 * entry["loss"], rel=1e-3) for entry in record["log_history"])
    kept = load_file(tmp_path / "whole" / "model" / fit.TRAINED)
    assert sorted(kept) == ["last.bias", "last.weight"] and not (tmp_path / "whole" / "checkpoints").exists()
    run = make(tmp_path / "cut")
    cut(run, 6, lambda: fit.fit(run, tmp_path / "cut"))
    assert fit.fit(make(tmp_path / "cut"), tmp_path / "cut")["steps"] == 12
    again = load_file(tmp_path / "cut" / "model" / fit.TRAINED)
    assert all(torch.equal(again[name], kept[name]) for name in kept)
    module = Line()
    fit.load_trained(module, tmp_path / "cut" / "model" / fit.TRAINED)
    assert torch.equal(module.last.weight, kept["last.weight"])
    assert fit.fit(make(tmp_path / "whole", data[:4]), tmp_path / "whole") == record, "done already"
    saved = tmp_path / "cut" / "model" / fit.TRAINED
    saved.write_bytes(saved.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="instead of .*: trained again"):
        fit.fit(make(tmp_path / "cut"), tmp_path / "cut")
    assert all(torch.equal(value, kept[name]) for name, value in load_file(saved).items())
    module.last = torch.nn.Linear(3, 1)
    with pytest.raises(ValueError, match=r"is of another model: 1 tensors differ \(last\.weight\)"):
        fit.load_trained(module, tmp_path / "cut" / "model" / fit.TRAINED)
    run = make(tmp_path / "none")
    run.model.requires_grad_(False)
    with pytest.raises(ValueError, match="line: no parameter is trainable"):
        fit.fit(run, tmp_path / "none", "line")
