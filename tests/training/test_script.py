"""How scripts begin and end: options, texts shown as they are, errors as one line, signals after which they go on."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, make_dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from fused_kd.training.field_help import field_comments
from fused_kd.training.fit import training_arguments
from fused_kd.training.script import build, internal, make_console, parse, run_script, stoppable
from fused_kd.training.trainer import KDTrainer
from tests.training.scripts import CONFIGS, ROOT, script
from tests.training.test_checkpoints import training, weights

SFT = [CONFIGS / "tiny.yaml", CONFIGS / "methods" / "sft.yaml", "--student", "tiny-student", "--train_limit", "20"]

EVALUATED = ["--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "4", "--load_best_model_at_end", "true"]


@dataclass
class Options:
    data: str
    directions: list[str] = field(default_factory=lambda: ["en-de"])
    limit: int | None = 5
    rate: float = 1.0
    flag: bool = True
    kind: Literal["one", "two"] = "one"
    pretrain: dict = field(default_factory=lambda: {"epochs": 1, "rate": 1.0})
    sweeps: list[dict] = field(default_factory=list)
    numbers: list[int] | None = None


def test_files_and_flags_override_in_order(tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_text("data: x\npretrain: {rate: 2e-5}\nsweeps: [{a: [1]}, {b: 2}]\nlimit: 7\n")
    file = tmp_path / "more.yaml"
    file.write_text("limit: null\nflag: false\nlearning_rate: 2e-3\npretrain: {inner: {deep: yes}}\n")
    flags = ["--directions", "de-en", "en-de", "--pretrain", "{epochs: 3}", "--kind=two", "--report_to", "wandb"]
    argv = ["--preset", "big", str(file), *flags]
    options, arguments = parse((Options, TrainingArguments), argv, configs=tmp_path, defaults={"use_cpu": True})
    expected = {"epochs": 3, "rate": 2e-5, "inner": {"deep": True}}
    assert options == Options("x", ["de-en", "en-de"], None, 1.0, False, "two", expected, [{"a": [1]}, {"b": 2}])
    assert arguments.learning_rate == 2e-3 and arguments.report_to == ["wandb"] and arguments.use_cpu
    assert parse(Options, ["--data", "x", "--sweeps"])[0] == Options("x"), "defaults are not changed by a parse"


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("", [], "--data"),
        ("data: x\nlimt: 1", [], r"f\.yaml: unknown keys limt: did you mean limit\?$"),
        ("data: x\ndata: y", [], r"f\.yaml cannot be read: the key 'data' is there twice .line 2"),
        ("no: x", [], "the key 'no' is read as bool, not text: quote it"),
        ("data: [", [], r"f\.yaml cannot be read: not YAML"),
        ("data: " + "[" * 2000, [], r"f\.yaml cannot be read: not YAML"),
        ("pretrain: &x\n  b: *x", [], r"f\.yaml cannot be read: aliases are not taken .line 2"),
        ("[1]", [], r"f\.yaml cannot be read: expected a mapping of keys to values, got '\[1\]'"),
        ("data: x\nlimit: many", [], r"f\.yaml: argument --limit: invalid int value: 'many'"),
        ("data: x\nlimit: 3", ["--limit", "many"], "^argument --limit: invalid int value: 'many'"),
        ("data: x\nkind: three", [], "--kind: invalid choice: 'three'"),
        ("data: x\npretrain: 5", [], "--pretrain: expected a mapping of keys to values, got '5'"),
        ("data: x", ["--limt", "1"], r"no option --limt: did you mean --limit\?$"),
        ("data: x", ["--limit", "1", "y"], "no option takes y: each is --NAME VALUE"),
        ("qqqq: x", [], "unknown keys qqqq: --help lists all of them"),
        ("data: x", ["--flag", "maybe"], "--flag: must be true or false, got 'maybe'"),
        ("data: x", ["--preset", "huge"], r"--preset must be one of f, got 'huge'"),
        ("data: x", ["--rehearse"], "--rehearse: there is no rehearse.yaml in"),
        ("data: x", ["--numbers", "[0, a]"], "--numbers: invalid int value: 'a'"),
        ("data: x", ["--numbers", "[0,"], "argument --numbers: not YAML"),
        ("data: x", ["--numbers=[0] 1"], "argument --numbers: not YAML"),
        ("data: x", ["--numbers", "[0,", "1]"], r"^--numbers \[0, 1\]: give numbers as --numbers A B, or quoted"),
    ],
)
def test_bad_options(tmp_path: Path, text: str, flags: list[str], message: str) -> None:
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(Options, [str(tmp_path / "f.yaml"), *flags], configs=tmp_path)


@pytest.mark.parametrize(
    ("flags", "numbers", "directions"),
    [
        (["--numbers", "[0]"], [0], ["en-de"]),
        (["--numbers=[0, -1]", "--flag", "false"], [0, -1], ["en-de"]),
        (["--numbers", "[]", "--directions", "[de-en, en-cs]"], [], ["de-en", "en-cs"]),
        (["--numbers", "2", "3", "--directions", "[a", "b]"], [2, 3], ["[a", "b]"]),
        (["--directions", "[a"], None, ["[a"]),
    ],
)
def test_a_list_may_be_one_text(flags: list[str], numbers: list[int] | None, directions: list[str]) -> None:
    (options,) = parse(Options, ["--data", "[x]", *flags])
    assert (options.data, options.numbers, options.directions) == ("[x]", numbers, directions)


def test_a_file_s_texts_stay_texts(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text('data: x\ndirections: ["[a, b]"]\nsweeps: [{a: [1]}]\n')
    assert parse(Options, [str(tmp_path / "f.yaml")])[0].directions == ["[a, b]"]
    assert parse(Options, [str(tmp_path / "f.yaml"), "--sweeps", "[{a: 1}, {b: 2}]"])[0].sweeps == [{"a": 1}, {"b": 2}]


@dataclass
class Base:
    share: float = 0.3  # 30 % of them, with a # in it
    again: str = "base"  # of the base


@dataclass
class Commented(Base):
    """Notes: none of a docstring's lines is a field."""

    several: list[str] = field(
        default_factory=lambda: ["so many names that they do not fit one line", "of the file", "a", "b"]
    )  # behind the last of its lines
    bare: int = 1
    told: int = field(default=2, metadata={"help": "of its metadata"})  # not this
    again: str = "here"  # overridden
    until: float | None = internal(None)  # for helpers
    worker: bool = False  # for helpers too


def test_help_is_the_comment_behind_a_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "big.yaml").write_text("share: 1\n")
    with pytest.raises(SystemExit):
        parse(Commented, ["--help"], configs=tmp_path)
    shown = " ".join(capsys.readouterr().out.split())
    assert "[--preset {big}] [--rehearse] [FILE.yaml ...]" in shown
    for text in ("30 % of them, with a # in it (default: 0.3)", "behind the last of its lines", "of its metadata"):
        assert text in shown
    assert "--again AGAIN overridden (default: here)" in shown and "--bare" in shown
    for text in ("not this", "of the base", "until", "worker", "Notes"):
        assert text not in shown
    (options,) = parse(Commented, ["--worker", "--until", "3", "--share", "1"])
    assert options.worker and options.until == 3, "hidden, and taken"


def test_without_source_there_is_no_help() -> None:
    assert field_comments(make_dataclass("Made", [("a", int)])) == {}


def test_a_rehearsal_is_a_file_behind_the_preset(tmp_path: Path) -> None:
    (tmp_path / "gpu.yaml").write_text("data: x\nlimit: 7\nrate: 2\nkind: two\n")
    (tmp_path / "rehearse.yaml").write_text("limit: 1\nrate: 3\n")
    (tmp_path / "mine.yaml").write_text("rate: 4\n")
    argv = [str(tmp_path / "mine.yaml"), "--preset", "gpu"]
    (options,) = parse(Options, [*argv, "--rehearse", "--numbers", "5"], configs=tmp_path)
    assert (options.limit, options.rate, options.kind, options.numbers) == (1, 4, "two", [5])
    assert parse(Options, argv, configs=tmp_path)[0].limit == 7
    with pytest.raises(ValueError, match="preset must be one of gpu, mine, got 'rehearse'"):
        parse(Options, ["--preset", "rehearse"], configs=tmp_path)
    with pytest.raises(ValueError, match="no option --rehearse"):
        parse(Options, ["--data", "x", "--rehearse"])
    own = make_dataclass("Own", [("rehearse", bool, False)])
    options, running = parse((Options, own), ["--preset", "gpu", "--rehearse"], configs=tmp_path)
    assert options.limit == 7 and running.rehearse, "the script's own option"


@dataclass
class Part:
    size: int
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size!r}")


def test_a_part_of_the_settings_is_built() -> None:
    assert build(Part, "parts.a", {"size": 2}) == Part(2)
    for values, message in (
        (3, "^parts.a must be a mapping of size, share, got 3$"),
        ({"size": 1, "siz": 2}, "^parts.a must be a mapping of size, share, got {'size': 1, 'siz': 2}$"),
        ({"share": 1}, "^parts.a: missing 1 required positional argument: 'size'$"),
        ({"size": 0}, "^parts.a: size must be at least 1, got 0$"),
        ({"size": "x"}, "^parts.a: '<' not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            build(Part, "parts.a", values)


def test_every_option_of_a_training_may_come_from_a_file(tmp_path: Path) -> None:
    """The configurations that are shipped, with their methods."""
    train = script("train")
    for method in sorted((CONFIGS / "methods").glob("*.yaml")):
        if "cache_k" in method.read_text():
            continue  # of the table alone
        argv = [CONFIGS / "paper.yaml", CONFIGS / "tiny.yaml", method, "--output", tmp_path, "--use_cpu"]
        options, arguments = parse((train.Train, train.Arguments), [*map(str, argv)])
        bound = train.settle(options, arguments)
        assert arguments.learning_rate == 2e-3 and bound["prompt"] == "tiny" and not arguments.bf16
        assert (options.select == "best") == arguments.load_best_model_at_end


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda path: path.stem)
def test_every_script_ends_this_way(path: Path) -> None:
    if "\ndef main(" in (text := path.read_text()) and path.stem != "quickstart":  # that needs torch alone
        assert text.endswith('if __name__ == "__main__":\n    run_script(main)\n') or path.stem.startswith("trl_")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--student", "./nowhere"], "error: './nowhere': no such folder or file"),
        (["--data", "./nowhere.jsonl"], "error: source='./nowhere.jsonl': no such file"),
        (["--lr_scheduler_type", "cosin"], "error: argument --lr_scheduler_type"),
        (["--global_batch", "33"], "error: global_batch must be a multiple of per_device_train_batch_size"),
        (["--objective", "forward_kd", "--teacher", "null"], "error: teacher must be given for objective='forward_kd'"),
        (["--objective", "reverse_kdd"], "got 'reverse_kdd' in 'reverse_kdd': did you mean reverse_kd?"),
        (["--output", "/proc/run"], "error: [Errno 2]"),
        ([*EVALUATED, "--metric_for_best_model", "foo"], "must be one of loss, ce, perplexity here, got 'foo'"),
        ([*EVALUATED, "--metric_for_best_model", "kl"], "must be one of loss, ce, perplexity here, got 'kl'"),
        (
            [*EVALUATED, "--eval_steps", "3"],
            "the saving steps to be a round multiple of the evaluation steps, but",
        ),
        (["--lr_scheduler_kwargs", "notjson"], "lr_scheduler_kwargs: expected a mapping of keys to values, got"),
        (["--lr_scheduler_kwargs", "{a: 1}"], "lr_scheduler_kwargs={'a': 1} does not fit"),
        (["--gradient_checkpointing_kwargs", "x"], "gradient_checkpointing_kwargs: expected a mapping"),
        (["--eval_steps", "0"], "eval_steps must be above 0, got 0"),
        (["--save_steps", "0"], "save_steps must be above 0, got 0"),
        (["--save_total_limit", "0"], "save_total_limit must be above 0, got 0"),
        (["--max_steps", "0"], "max_steps must be above 0, or -1 for whole epochs, got 0"),
        (["--bf16", "auto"], "--bf16: must be true or false, got 'auto'"),
        (["--resume_from_checkpoint", "x"], "the same command goes on from its last whole checkpoint"),
        (["--base_model", "x"], "no option --base_model: did you mean --student?"),
    ],
)
def test_a_user_s_error_is_one_line(tmp_path: Path, change: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: script("train").main([*map(str, SFT), "--output", str(tmp_path / "run"), *change]))
    lines = capsys.readouterr().err.strip().splitlines()
    assert not (tmp_path / "run" / "arguments.json").exists(), "before any work"
    assert ended.value.code == 2 and message in lines[-1] and not any("Traceback" in line for line in lines)


def test_a_warning_is_one_line(recwarn: pytest.WarningsRecorder) -> None:
    shown = []

    def main() -> None:
        warnings.warn("2 rows are bad", UserWarning, stacklevel=1)
        shown.extend(warnings.formatwarning(w.message, w.category, w.filename, w.lineno) for w in recwarn.list)
        shown.append(warnings.formatwarning("old", FutureWarning, "file.py", 3))

    run_script(main)
    assert shown[0].endswith(": 2 rows are bad\n") and shown[0].count("\n") == 1 and ".py:" not in shown[0][12:]
    assert shown[1].startswith("file.py:3: FutureWarning: old")


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
    path = "m[/b] [red]x fused_kd[train] :smile:"
    console = make_console(width=200)
    console.print(path)
    console.rule(path)
    assert capsys.readouterr().out.count(path) == 2


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell's ``&`` starts its command with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_ends_the_step_and_the_run_goes_on(tmp_path: Path, capsys) -> None:
    """Between two checkpoints, to the same weights."""

    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), number)

    def train(run: KDTrainer) -> dict[str, torch.Tensor]:
        with stoppable(run):
            run.train(run.last_checkpoint())
        return weights(run)

    theirs = train(training(tmp_path / "whole"))
    for number in (signal.SIGINT, signal.SIGTERM):
        cut = training(tmp_path / number.name)
        cut.add_callback(Signal())
        with pytest.raises(SystemExit) as ended:
            run_script(partial(train, cut))
        assert ended.value.code == 128 + number and "stopping after this step" in capsys.readouterr().err
        again = training(tmp_path / number.name)
        assert again.last_checkpoint() == str(tmp_path / number.name / "checkpoint-3")
        ours = train(again)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_bar_is_shown_whatever_transformers_logs(tmp_path: Path) -> None:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        assert training_arguments(tmp_path).disable_tqdm is False
        assert training_arguments(tmp_path, disable_tqdm=True).disable_tqdm is True
    finally:
        transformers_logging.set_verbosity(level)
