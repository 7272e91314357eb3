"""examples/train.py on chats: TRL's names, streams, several teachers, the student as its own, reporters, mistakes."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from fused_kd.integrations.own import OwnTeacher
from fused_kd.training.collate import Collator
from fused_kd.training.models import load_model, load_tokenizer, train_tokenizer
from fused_kd.training.named_teachers import parse_teachers
from fused_kd.training.reporting import report_options
from fused_kd.training.script import parse, run_script
from fused_kd.training.train_options import ALIASES, HINTS, Arguments, Train, settle
from fused_kd.training.trainer import KDTrainer
from tests.training.scripts import ROOT, apart, script, train, weights
from tests.training.tiny import rows, tiny

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


class Chats:
    """A folder with chats, a teacher and a student."""

    def __init__(self, folder: Path) -> None:
        self.folder, rng = folder, random.Random(0)
        chats = []
        for _ in range(24):
            a, b = rng.randint(0, 50), rng.randint(0, 50)
            turns = [("user", f"What is {a} plus {b}?"), ("assistant", f"It is {a + b}.")]
            turns += [("user", "Really?"), ("assistant", "Yes, " + "really " * rng.randint(1, 6))] * rng.randint(0, 1)
            chats.append({"messages": [{"role": role, "content": text} for role, text in turns]})
        self.data = folder / "train.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in chats))
        (folder / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats[:6]))
        tokenizer = train_tokenizer((m["content"] for row in chats for m in row["messages"]), 400)
        tokenizer.chat_template = TEMPLATE
        for name, hidden in (("student", 32), ("teacher", 48), ("other", 16)):
            config = LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
                num_attention_heads=2, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            torch.manual_seed(hidden)
            LlamaForCausalLM(config).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)

    def command(self, output: Path, **options: object) -> list[str]:
        given = {"student": self.folder / "student", "teacher": self.folder / "teacher", "data": self.data}
        given |= {"output": output, "num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
        given |= {"use_cpu": True, **options}
        flags: list[str] = []
        for name, value in given.items():
            if value is not None:
                flags += [f"--{name}", *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
        return flags

    def train(self, output: Path, **options: object) -> dict:
        return script("train").main(self.command(output, **options))


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Chats:
    return Chats(tmp_path_factory.mktemp("chats"))


def options(*argv: object) -> tuple[Train, TrainingArguments]:
    return parse((Train, Arguments), [*map(str, argv), "--use_cpu"], aliases=ALIASES, hints=HINTS)


def test_a_chat_model_is_distilled_and_answers(chats: Chats, tmp_path: Path, capsys) -> None:
    """With the defaults; the model is asked as it was trained."""
    record = chats.train(tmp_path / "run", data=chats.folder, eval_strategy="epoch", num_train_epochs=2)
    told = capsys.readouterr().out
    assert f"{chats.folder} train: Rows(24 rows of messages, skipped=0, truncated=0)" in told
    assert "loss    (" in told and "What is" in told.split("no loss (")[1]
    assert record["steps"] == 12 and record["rows"] == 24 and len(record["validation"]) == 2
    assert record["log_history"][-1]["loss"] < record["log_history"][0]["loss"]
    kept = tmp_path / "run" / "model"
    assert json.loads((kept / "config.json").read_text())["use_cache"] is True, "as the student's"
    tokenizer = load_tokenizer(kept)
    model = load_model(kept, tokenizer, 0)
    question = [{"role": "user", "content": "What is 3 plus 4?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]


def test_a_first_try_that_failed_may_be_corrected(chats: Chats, tmp_path: Path) -> None:
    broken, output = tmp_path / "broken", tmp_path / "run"
    shutil.copytree(chats.folder / "teacher", broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        chats.train(output, teacher=broken)
    assert chats.train(output, max_steps=2)["steps"] == 2
    with pytest.raises(ValueError, match=r"other arguments \(max_steps: 2 -> 3\): give .*; a run is not made longer"):
        chats.train(output, max_steps=3)


def test_rows_kept_for_other_splits_are_told(chats: Chats, tmp_path: Path, capsys) -> None:
    rows = chats.data.read_text().splitlines()
    (tmp_path / "chat.jsonl").write_text("\n".join(rows))
    for split, kept in (("train", True), ("all", False)):
        chats.train(tmp_path / split, data=tmp_path / "chat.jsonl", split=split, dry_run="true")
        shown = capsys.readouterr().out
        assert ("a hash keeps 5 % for valid" in shown) == kept and ("Rows(24 rows" in shown) != kept


def test_a_tokenizer_of_a_failed_try_is_not_kept(tmp_path: Path) -> None:
    presets = {"student": "tiny-student", "max_steps": 1}
    with pytest.raises(ValueError, match="max_length=1"):
        train("sft", tmp_path, vocab=300, max_length=1, **presets)
    train("sft", tmp_path, vocab=350, **presets)
    assert len(load_tokenizer(tmp_path / "model")) == 350


@pytest.mark.parametrize("bar", [True, False])
def test_what_a_training_tells(chats: Chats, tmp_path: Path, bar: bool, capsys) -> None:
    told = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1, "max_steps": 4, "disable_tqdm": not bar}
    record = chats.train(tmp_path, data=chats.folder, statistics="kl", **told)
    out, err = capsys.readouterr()
    for entry in record["validation"]:
        line = ", ".join(f"{name} {entry[name]:.4g}" for name in ("loss", "ce", "perplexity", "kl", "top_1"))
        assert out.count(f"step {entry['step']}, held out: {line}\n") == 1
    lines = [line for line in out.splitlines() if line.startswith("step 3: ")]
    if bar:
        assert not lines and "loss=" in err and "hard_fraction" not in err, "forward_kd has no gate"
        return
    assert len(lines) == 1 and not err.strip()
    for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "kl"):
        assert f"{name} {record['log_history'][2][name]:.4g}" in lines[0]


def test_the_best_by_a_metric_that_is_less_when_better(chats: Chats, tmp_path: Path) -> None:
    best = ["--eval_strategy", "steps", "--eval_steps", 2, "--save_steps", 2, "--load_best_model_at_end", "true"]
    for name in ("ce", "eval_perplexity", "kl", "top_1"):
        command = [*chats.command(tmp_path / "run"), *map(str, best), "--metric_for_best_model", name]
        train_, args = parse((Train, Arguments), command, aliases=ALIASES)
        settle(train_, args)
        assert args.greater_is_better == (name == "top_1")


def test_the_output_is_no_model_s_own_folder(chats: Chats) -> None:
    before = sorted((chats.folder / "teacher").iterdir())
    with pytest.raises(ValueError, match=r"output='.*teacher' has config\.json of a model, and must be a folder of"):
        chats.train(chats.folder / "teacher")
    assert sorted((chats.folder / "teacher").iterdir()) == before


def test_trl_s_names_give_the_same_options(chats: Chats, tmp_path: Path) -> None:
    ours = ["--student", "s", "--teacher", "t", "--data", "d", "--output", "o", "--max_length", 9, "--use_peft", "true"]
    ours += ["--lora", "{r: 4, alpha: 8, target_modules: [q_proj, v_proj]}", "--streaming", "true", "--max_steps", 5]
    file = tmp_path / "trl.yaml"
    file.write_text("model_name_or_path: s\nteacher_model_name_or_path: t\nlora_r: 4\nmax_seq_length: 9\n")
    theirs = ["--config", file, "--dataset_name=d", "--output_dir", "o", "--use-peft", "true", "--lora_alpha", 8]
    theirs += ["--lora_target_modules", "q_proj", "v_proj", "--dataset-streaming", "true", "--max_steps", 5]
    assert options(*theirs) == options(*ours)
    assert options(*theirs)[0].adapters.target_modules == ["q_proj", "v_proj"]
    assert options(*ours, "--use_peft", "false")[0].adapters is None
    given = ["--student", "s", "--teacher", "t", "--output", "o"]
    assert options(*given, "--data", "name", "--dataset_config", "de-en")[0].data == "name:de-en"
    named = options(*given, "--data", "name", "--dataset_train_split", "a", "--dataset_test_split", "b")[0]
    assert [named.source_of(part) for part in ("train", "valid")] == [("name", "a"), ("name", "b")]
    assert options(*given, "--data", "d", "--direction", "de-en", "en-de")[0].directions == ["de-en", "en-de"]
    sources = (
        options(*given, "--data", chats.data, "--eval_data", chats.data)[0],
        options(*given, "--data", chats.data)[0],
    )
    assert [[each.source_of(part)[1] for part in ("train", "valid")] for each in sources] == [
        ["all", "all"],
        ["train", "valid"],
    ]


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("", ["--student", "a", "--model_name_or_path", "b"], "flags: student and model_name_or_path are one option"),
        ("data: a\ndataset_name: b", [], r"f\.yaml: data and dataset_name are one option: give one of them"),
        ("", ["--teacher_mode_name_or_path", "b"], r"did you mean --teacher_model_name_or_path\?"),
        ("", ["--lora_alpa", "b"], r"no option --lora_alpa: did you mean --lora_alpha\?"),
        ("base_model: b\nmicro_batch_size: 2", [], "did you mean student, per_device_train_batch_size"),
        ("sequence_len: 2\nsteps: x", [], "did you mean max_length, .*steps"),
        ("datset_name: b", [], r"unknown keys datset_name: did you mean dataset_name\?"),
    ],
)
def test_a_name_that_is_not_clear(tmp_path: Path, text: str, flags: list[str], message: str) -> None:
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        options(tmp_path / "f.yaml", *flags, "--output", "o")


def test_a_stream_trains_as_the_rows_do_and_resumes(chats: Chats, tmp_path: Path, capsys, monkeypatch) -> None:
    """The same rows in the same order give the same weights, a cut run too."""
    both = {"max_steps": 6, "global_batch": 8, "save_steps": 2, "train_sampling_strategy": "sequential"}
    chats.train(tmp_path / "rows", **both)
    stream = {**both, "streaming": "true", "train_sampling_strategy": "random"}
    record = chats.train(tmp_path / "stream", **stream)
    assert record["rows"] is None and "a stream of unknown length, 6 steps" in capsys.readouterr().out
    start, whole, stream_ = (
        weights(folder) for folder in (chats.folder / "student", tmp_path / "rows/model", tmp_path / "stream/model")
    )
    assert apart(whole, start) > 0.1 and apart(whole, stream_) < 1e-5 * apart(whole, start)

    step, steps = KDTrainer.training_step, []

    def counted(self, *args, **kwargs):
        if len(steps) == 9:
            raise KeyboardInterrupt
        steps.append(1)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(KDTrainer, "training_step", counted)
    with pytest.raises(KeyboardInterrupt):
        chats.train(tmp_path / "cut", **stream)
    monkeypatch.setattr(KDTrainer, "training_step", step)
    capsys.readouterr()
    chats.train(tmp_path / "cut", **stream)
    assert "forward_kd: resuming from checkpoint-4\n" in capsys.readouterr().out
    cut = weights(tmp_path / "cut" / "model")
    assert all(torch.equal(value, stream_[name]) for name, value in cut.items())
    with pytest.raises(ValueError, match="streaming needs max_steps"):
        chats.train(tmp_path / "none", streaming="true")


def test_two_processes_share_a_stream(chats: Chats, tmp_path: Path) -> None:
    both = {"max_steps": 3, "global_batch": 8, "streaming": "true"}
    chats.train(tmp_path / "one", **both)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "examples" / "train.py"), *chats.command(tmp_path / "two", **both)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "global batch 8 = 2 processes x 4 rows x 1 accumulated" in done.stdout
    start, one, two = (
        weights(folder) for folder in (chats.folder / "student", tmp_path / "one/model", tmp_path / "two/model")
    )
    assert apart(one, start) > 0.1 and apart(one, two) < 1e-4 * apart(one, start)


def test_several_teachers_and_caches(chats: Chats, tmp_path: Path, capsys) -> None:
    """A mixture of two models is the mixture of one with the other's cached states, and with both caches."""
    make = script("cache_teacher").main
    caches = {}
    for name in ("teacher", "other"):
        caches[name] = f"cache:{tmp_path / name}"
        flags = ["--data", chats.data, "--teacher", chats.folder / name, "--keep", "hidden", "--dtype", "fp32"]
        make([*map(str, flags), "--device", "cpu", "--output", str(tmp_path / name)])
    assert "messages: Rows(24 rows of messages" in capsys.readouterr().out
    models = [f"0.7*{chats.folder / 'teacher'}", f"0.3*{chats.folder / 'other'}"]
    runs = {
        "online": models,
        "one": [models[0], f"0.3*{caches['other']}"],
        "both": [f"0.7*{caches['teacher']}", f"0.3*{caches['other']}"],
        "unequal": [f"0.3*{chats.folder / 'teacher'}", f"0.7*{chats.folder / 'other'}"],
    }
    found = {}
    for name, teachers in runs.items():
        chats.train(tmp_path / f"run-{name}", teacher=teachers, seed=3)
        found[name] = weights(tmp_path / f"run-{name}" / "model")
    assert "0.3 x LlamaForCausalLM + 0.7 x LlamaForCausalLM" in capsys.readouterr().out
    moved = apart(found["online"], weights(chats.folder / "student"))
    assert all(apart(found[name], found["online"]) < 1e-3 * moved for name in ("one", "both"))
    assert apart(found["unequal"], found["online"]) > 1e-2 * moved
    with pytest.raises(ValueError, match="teacher's content"):
        chats.train(tmp_path / "run-one", teacher=[models[0], f"0.3*{caches['teacher']}"], seed=3)


def test_the_student_as_its_own_teacher(chats: Chats, tmp_path: Path) -> None:
    given = {"objective": "no_evo", "lora": "{r: 2, dropout: 0.0}"}
    for teacher in ("own:adapters=false", "own:decay=0.9"):
        record = chats.train(tmp_path / teacher[4:9], teacher=teacher, **given)
        assert record["steps"] == 6
    chats.train(tmp_path / "model", teacher=chats.folder / "student", **given)
    ours, theirs = (
        (tmp_path / name / "model" / "adapter_model.safetensors").read_bytes() for name in ("adapt", "model")
    )
    assert ours == theirs, "without its adapters the student is what it began as"


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        (["0.5*a", "b"], r"teacher must be WEIGHT\*TEACHER for each of several, got 'b'"),
        (["0.5*a"], "teacher must have no weight where it is the only one, got '0.5"),
        (["0*a", "1*b"], r"teacher must have a weight above 0, got '0\*a'"),
        (["0..5*a", "1*b"], r"teacher must have a weight above 0, got '0\.\.5\*a'"),
        (["own:"], "teacher must be own:adapters=false or own:decay=NUMBER"),
        (["own:adapters=true"], "teacher must be own:adapters=false or own:decay=NUMBER"),
        (["own:decay=x"], "teacher must be own:adapters=false or own:decay=NUMBER"),
        (["own:decay=2"], "decay must be above 0 and at most 1"),
        (["0.5*a", "0.5*127.0.0.1:80"], "teacher must say what it is: http://127.0.0.1:80 for a server"),
    ],
)
def test_teachers_that_are_none(teachers: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_teachers(teachers)


def test_teachers_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "0.5*a").mkdir()
    texts = ["1e-1*cache:a*b", "0.2*https://x:1", "0.3*own:decay=0.5", "0.4*a/b"]
    found = parse_teachers(texts)
    assert [(each.kind, each.place, each.weight) for each in found] == [
        ("cache", "a*b", 0.1), ("server", "https://x:1", 0.2), ("own", "decay=0.5", 0.3), ("model", "a/b", 0.4),
    ]  # fmt: skip
    assert found[2].own == OwnTeacher(decay=0.5)
    assert parse_teachers([str(tmp_path / "0.5*a")])[0].kind == "model", "a folder of that name"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "nowhere.jsonl"}, "source='nowhere.jsonl': no such file"),
        ({"format": "chat"}, "argument --format: invalid choice: 'chat'"),
        ({"data": "BAD"}, "bad.jsonl, line 2: "),
        ({"eval_strategy": "epoch", "eval_data": "none.jsonl"}, "source='none.jsonl': no such file"),
        ({"max_length": 0}, "max_length must be an int of at least 1, got 0"),
        ({"num_train_epochs": -1}, "num_train_epochs must be above 0, got -1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be an int of at least 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be an int of at least 1, got 0"),
        ({"learning_rate": -1}, "learning_rate must be at least 0, got -1"),
        ({"learning_rate": "high"}, "argument --learning_rate/--learning-rate: invalid float value: 'high'"),
        ({"optim": "adam"}, "argument --optim: invalid choice: 'adam' (choose from 'adamw_torch'"),
        ({"lora_ranks": 3}, "no option --lora_ranks"),
        ({"lora": "{rank: 3}"}, "lora must have some of r, alpha, dropout, target_modules, got rank"),
        ({"beta_schedule": "{begin: 3}"}, "beta_schedule must have some of start, end, fraction, hold, got begin"),
        ({"objective": "forward_k"}, "forward_k"),
        ({"teacher": None}, "teacher must be given for objective='forward_kd'; plain fine-tuning is sft"),
        ({"teacher": "own:adapters=false"}, "teacher must not be own:adapters=false without adapters"),
        ({"teacher": "STRANGE"}, "student and teacher must share one tokenizer"),
        ({"report_to": "tensorbord"}, "report_to must be some of"),
        ({"report_to": "wandb"}, "report_to=wandb needs a package: pip install wandb"),
        ({"report_to": "mlflow"}, "report_to=mlflow needs a package: pip install mlflow"),
        ({"student": "tiny-student", "teacher": "tiny-teacher", "format": "text"}, "format must be pairs for presets"),
        ({"chat_template": "{% bad"}, "the chat template does not take the conversation: TemplateSyntaxError"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(chats: Chats, tmp_path: Path, change: dict, message: str, capsys, monkeypatch) -> None:
    """Exit code 2, before any model is loaded, and nothing is left in the output folder."""
    train = script("train")
    monkeypatch.setattr(train, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    if "needs a package" in message and importlib.util.find_spec(change["report_to"]):
        pytest.skip("it is installed")
    if change.get("data") == "BAD":
        bad = tmp_path / "bad.jsonl"
        bad.write_text(chats.data.read_text().splitlines()[0] + '\n{"messages": [{"role": "user", "content": "x"}]}\n')
        change = {"data": bad, "split": "all"}
    if change.get("teacher") == "STRANGE":
        train_tokenizer(["another text"], 300).save_pretrained(tmp_path / "strange")
        change = {"teacher": tmp_path / "strange"}
    with pytest.raises(SystemExit) as ended:
        run_script(partial(train.main, chats.command(tmp_path / "run", **change)))
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and message in lines[-1] and not any("Traceback" in line for line in lines)
    assert not (tmp_path / "run").exists()


def test_no_room_and_other_settings_are_one_line(chats: Chats, tmp_path: Path, capsys, monkeypatch) -> None:
    from fused_kd.training import checkpoints

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_free", lambda folder: 1000)
        with pytest.raises(SystemExit) as ended:
            run_script(partial(script("train").main, chats.command(tmp_path / "full")))
    assert ended.value.code == 2 and "error: output: two checkpoints take" in capsys.readouterr().err
    chats.train(tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        run_script(partial(script("train").main, chats.command(tmp_path / "run", learning_rate=0.5)))
    assert ended.value.code == 2 and "(learning_rate: 0.01 -> 0.5)" in capsys.readouterr().err


def test_tensorboard_gets_the_numbers_and_the_options(chats: Chats, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    chats.train(tmp_path / "run", report_to="tensorboard", logging_steps=1)
    (file,) = (tmp_path / "run" / "tensorboard").glob("events.*")
    events = EventAccumulator(str(file)).Reload()
    assert len(events.Scalars("train/loss")) == 6
    text = events.Tensors("options/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "objective: forward_kd" in text and "learning_rate: 0.01" in text


def test_options_reach_every_reporter(tmp_path: Path) -> None:
    """The reporters are stand-ins: each gets the options when the training begins, after its own run is open."""

    class Board(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.tb_writer = SimpleNamespace(add_text=lambda *texts: told.append(texts))

    class Service(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            config = SimpleNamespace(update=lambda options, allow_val_change: told.append((options, allow_val_change)))
            self._wandb = SimpleNamespace(config=config)

    told: list[tuple] = []
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = KDTrainer(
        tiny(8, 0), tiny(12, 1), args=args, train_dataset=rows(8), data_collator=Collator(0), callbacks=[Board, Service]
    )
    report_options(trainer, {"objective": "sft"}, tmp_path)
    trainer.train()
    assert told == [("options", "```yaml\nobjective: sft\n```"), ({"objective": "sft"}, True)]


def test_a_missing_reporter_is_told_before_the_data_is_read(chats: Chats, tmp_path: Path, monkeypatch) -> None:
    from fused_kd.training import reporting

    monkeypatch.setattr(reporting, "get_available_reporting_integrations", list)
    with pytest.raises(ImportError, match=r"tensorboard needs a package: pip install tensorboard \(or .*\[report\]"):
        settle(*options(*chats.command(tmp_path, report_to="tensorboard")))
