"""How scripts begin and end: texts shown as they are, errors as one line, signals after which they go on."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from collections import namedtuple
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import TrainerCallback

from fused_kd.training import checkpoints
from fused_kd.training.checkpoints import check_room
from fused_kd.training.command import make_console, run_script, stoppable
from fused_kd.training.report import results_table
from fused_kd.training.runs import Run
from fused_kd.training.trainer import KDTrainer
from tests.training.test_checkpoints import training, weights
from tests.training.tiny import tiny

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"
SFT = [CONFIGS / "tiny.yaml", CONFIGS / "methods" / "sft.yaml", "student=tiny-student", "vocab=300", "select=last"]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: object) -> int:
    """A script's exit code."""
    try:
        run_script(lambda: script(name).main([*map(str, arguments)]))
    except SystemExit as error:
        assert isinstance(error.code, int)
        return error.code
    return 0


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_every_script_ends_this_way(path: Path) -> None:
    ends = path.read_text().endswith('if __name__ == "__main__":\n    run_script(main)\n')
    assert ends or path.stem.startswith("trl_")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("student=./nowhere", "error: './nowhere' is neither a preset"),
        ("data=./nowhere.jsonl", "error: source='./nowhere.jsonl': no such file"),
        ("scheduler=cosin", "error: cosin is not a valid SchedulerType"),
        ("epochs=-1", "error: learning_rate and epochs must be above 0"),
        ("nowhere.yaml", "error: nowhere.yaml cannot be read as YAML"),
    ],
)
def test_a_user_s_error_is_one_line(
    tmp_path: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", *SFT, "train_limit=20", change, "--output", tmp_path / "run") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and not any("Traceback" in line for line in lines)


def test_a_traceback_on_request_and_for_what_is_no_user_s_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("a bug"), KeyError("a bug")):
        with pytest.raises(type(error)):
            run_script(partial(fail, error))
    with pytest.raises(TypeError):
        run_script(partial(len, 3))
    monkeypatch.setenv("FUSED_KD_TRACEBACK", "1")
    with pytest.raises(ValueError, match="wrong"):
        run_script(partial(fail, ValueError("wrong")))


def fail(error: BaseException) -> None:
    raise error


def test_texts_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    path = "m[/b] [red]x fused_kd[comet] :smile:"
    console = make_console(width=200)
    console.print(path)
    console.rule(path)
    stage = {"objective": path, "parameters": 1, "steps": 1, "seconds": 1, "scores": None}
    console.print(results_table({"arguments": {"direction": path}, "seed": 0, "stages": {path: stage}}))
    assert capsys.readouterr().out.count(path) == 5


def test_a_path_with_markup_reaches_every_script_s_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    folder = tmp_path / "m[/b]"
    assert run("train", *SFT, "train_limit=20", "epochs=1", "--output", folder) == 0
    model = folder / "train" / "model"
    assert str(model) in capsys.readouterr().out
    command = [model, "--data", "builtin", "--directions", "en-de", "--limit", "2", "--prompt", "tiny"]
    assert run("evaluate", *command, "--max-new-tokens", "2", "--output", folder / "eval") == 0
    assert str(model) in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sdrrl", "mt_llm", "cycle_distill", "experiment"])
def test_a_plan_with_something_missing_fails(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["captions.data=./nowhere" if name == "sdrrl" else "data=./nowhere"]
    if name == "experiment":
        changes = [CONFIGS / "experiments" / "multi30k.yaml", *changes]
    assert run(name, *changes, "--plan", "--output", tmp_path / "run") == 2
    shown = capsys.readouterr()
    assert "to do" in shown.out and "nowhere" in shown.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_the_step_and_the_run_goes_on(
    tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between two checkpoints, to the same weights."""

    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), number)

    def train(run: KDTrainer) -> dict[str, torch.Tensor]:
        with stoppable(run):
            run.train(run.last_checkpoint())
        return weights(run)

    cut = training(tmp_path / "cut")
    cut.add_callback(Signal())
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: train(cut))
    assert ended.value.code == 128 + number and "stopping after this step" in capsys.readouterr().err
    again = training(tmp_path / "cut")
    assert again.last_checkpoint() == str(tmp_path / "cut" / "checkpoint-3")
    ours, theirs = train(again), train(training(tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output='.*file' cannot be written to: File exists"):
        Run(tmp_path / "file", {})
    with pytest.raises(ValueError, match="output='/proc/run' cannot be written to"):
        Run("/proc/run", {})


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
    assert checkpoints.last_checkpoint(tmp_path) is None
