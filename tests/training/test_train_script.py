"""examples/train.py, evaluate.py, cache_teacher.py and inspect_tokens.py as a reader would run them, on tiny models."""

from __future__ import annotations

import json
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fused_kd as fk
from fused_kd.training import fingerprints
from fused_kd.training.data import load_pairs, misalign
from fused_kd.training.generate import generate
from fused_kd.training.models import load_model, load_tokenizer
from fused_kd.training.named_teachers import parse_teachers
from fused_kd.training.prompts import tokenize_pairs
from fused_kd.training.shards import bytes_of_token, read_index, target_positions
from fused_kd.training.trainer import KDTrainer
from tests.training.scripts import apart, corpus, script, train, weights


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    record = train("sft", folder, student="tiny-student")
    assert record["steps"] == 3, "48 rows of two directions, 16 a step"
    assert len(record["validation"]) >= 2, "twice an epoch"
    return folder / "model"


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
    train("sft", tmp_path, student="tiny-student")
    kept = weights(tmp_path / "model")
    assert len(seen) > 1 and all(torch.equal(value, seen[0][name]) for name, value in kept.items())
    assert any(not torch.equal(kept[name], seen[-1][name]) for name in kept)


def test_distil_resume_and_evaluate(teacher: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = {"teacher": teacher, "student": teacher, "num_train_epochs": 2, "statistics": "kl"}
    train("self_evolution_quantile", tmp_path / "whole", **pair)
    text = capsys.readouterr().out
    assert "global batch 16 = 1 processes x 8 rows x 2 accumulated" in text
    assert "no loss (" in text and "loss    (" in text, "a sample with its loss mask"
    assert f"SelfEvolution(lam=0.5, beta=0.5, gamma={float(text.split('Γ = ')[1].split(':')[0]):g})" in text

    steps, step = [], KDTrainer.training_step

    def counted(self, *args, **kwargs):
        if len(steps) == 9:
            raise KeyboardInterrupt
        steps.append(self.state.global_step)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(KDTrainer, "training_step", counted)
    with pytest.raises(KeyboardInterrupt):
        train("self_evolution_quantile", tmp_path / "cut", **pair)
    monkeypatch.setattr(KDTrainer, "training_step", step)
    newest = max((tmp_path / "cut" / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    assert all(entry["kl"] >= 0.0 for entry in logged)
    (newest / "optimizer.pt").unlink()
    with pytest.warns(UserWarning, match=r"lacks optimizer\.pt: passed over"):
        train("self_evolution_quantile", tmp_path / "cut", **pair)
    ours, theirs = (weights(tmp_path / name / "model") for name in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    monkeypatch.setattr(KDTrainer, "training_step", None)
    capsys.readouterr()
    train("self_evolution_quantile", tmp_path / "cut", **pair)  # done already
    assert capsys.readouterr().out == f"finished: model in {tmp_path / 'cut' / 'model'}\n"
    with pytest.raises(ValueError, match=r"made with other arguments \(learning_rate: 0\.002 -> 0\.1\)"):
        train("self_evolution_quantile", tmp_path / "cut", **pair, learning_rate=0.1)

    models = [str(teacher), str(tmp_path / "whole" / "model")]
    evaluation = [*models, "--data", "builtin", "--directions", "en-de", "de-en", "--limit", "3", "--prompt", "tiny",
                  "--max-new-tokens", "6", "--similar-to", models[0], "--output", str(tmp_path / "eval")]  # fmt: skip
    results = script("evaluate").main(evaluation)
    assert results[models[0]]["en-de"]["similarity"]["equal"] == 1.0
    assert set(results[models[1]]["de-en"]["p"]) == {"bleu", "chrf"} and not results[models[0]]["de-en"]["p"]
    saved = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert saved == json.loads(json.dumps(results)) == json.loads(json.dumps(script("evaluate").main(evaluation)))


FAKE_COMET = f"""#!{sys.executable}
import json, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
read = lambda flag: open(options[flag]).read().split("\\n")[:-1]
scores = [(s, t, r) == ("A cat.", "x", "Eine Katze.") for s, t, r in zip(read("-s"), read("-t"), read("-r"))]
assert options["--model"] == "Unbabel/wmt22-comet-da" and len(scores) == 2
json.dump({{"mt": [{{"COMET": 0.5 + 0.25 * score}} for score in scores]}}, open(options["--to_json"], "w"))
"""


def test_what_is_kept_of_an_evaluation_and_comet(teacher: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    """What is kept by a model's path is kept by its content."""
    evaluate, model, data = script("evaluate"), tmp_path / "model", tmp_path / "test.jsonl"
    shutil.copytree(teacher, model)
    data.write_text("".join(json.dumps({"en": a, "de": b}) + "\n" for a, b in (("A cat.", "Eine Katze."), ("b", "c"))))
    command = [str(model), "--data", str(data), "--directions", "en-de", "--prompt", "tiny", "--max-new-tokens", "4",
               "--output", str(tmp_path / "eval")]  # fmt: skip

    def kept() -> set[str]:
        evaluate.main(command)
        return {path.name for path in (tmp_path / "eval").glob("*en-de*")}

    before = kept()
    (model / "README.md").write_text("Mine.")
    assert kept() == before and len(before) == 1
    save_file({name: value + 0.1 for name, value in weights(model).items()}, model / "model.safetensors")
    assert len(kept()) == 2, "another model"
    data.write_text(data.read_text().replace("Eine Katze.", "Die Katze."))
    assert len(kept()) == 3, "another reference"
    with pytest.raises(ValueError, match=r"models must have a name for a folder, got '\.\.'"):
        evaluate.main(["..", *command[1:]])

    data.write_text(data.read_text().replace("Die Katze.", "Eine Katze."))
    monkeypatch.setattr(evaluate, "translate", lambda *args, **kwargs: (["x", "y"], None))
    monkeypatch.chdir(tmp_path)
    fake = tmp_path / "comet-score"
    fake.write_text(FAKE_COMET)
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    command += ["--beams", "2", "--comet", "./comet-score"]
    assert evaluate.main(command)[str(model)]["en-de"]["comet"] == pytest.approx(0.625)
    fake.write_text(f"#!{sys.executable}\nraise SystemExit('no model')\n")
    with pytest.raises(ValueError, match="gave no scores; its messages are above"):
        evaluate.main(command)
    assert "no model" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="there is no command nowhere"):
        evaluate.main([*command, "--comet", "nowhere"])


def test_another_content_at_the_same_path_is_refused(teacher: Path, tmp_path: Path) -> None:
    model, tasks = tmp_path / "model", tmp_path / "train.json"
    shutil.copytree(teacher, model)
    tasks.write_text(json.dumps([{"instruction": "Count.", "output": "one"}] * 3))
    pair = {"teacher": model, "student": teacher, "instructions": tasks, "train_limit": 8}
    assert train("no_evo", tmp_path / "run", **pair)["rows"] == 19
    tasks.write_text(json.dumps([{"instruction": "Count.", "output": "two"}] * 3))
    with pytest.raises(ValueError, match=r"was made with other arguments .*train rows"):
        train("no_evo", tmp_path / "run", **pair)
    tasks.write_text(json.dumps([{"instruction": "Count.", "output": "one"}] * 3))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    with pytest.raises(ValueError, match=r"was made with other arguments .*teacher's content: sha256:"):
        train("no_evo", tmp_path / "run", **pair)


def test_packed_rows_train_as_padded_ones_do(teacher: Path, tmp_path: Path) -> None:
    for packing in (False, True):
        train("no_evo", tmp_path / str(packing), teacher=teacher, student=teacher, packing=packing)
    start, a, b = (weights(f) for f in (teacher, tmp_path / "False" / "model", tmp_path / "True" / "model"))
    # Adam divides by a gradient's size: rounding in a tiny one moves its weight
    assert apart(a, start) > 0.1 and apart(a, b) < 1e-2 * apart(a, start)


def test_a_student_in_half_precision_is_trained_in_float32(teacher: Path, tmp_path: Path) -> None:
    """At a late training's learning rate nearly every weight moves; of bf16 weights few would."""
    half = tmp_path / "half"
    load_model(teacher, load_tokenizer(teacher), 0, dtype=torch.bfloat16).save_pretrained(half)
    load_tokenizer(teacher).save_pretrained(half)
    half_precision = {"bf16": True, "dtype": "bfloat16"}
    train("no_evo", tmp_path, teacher=half, student=half, learning_rate=2e-5, warmup_steps=0, **half_precision)
    start, end = weights(half), weights(tmp_path / "model")
    assert {value.dtype for value in start.values()} == {torch.bfloat16}
    assert {value.dtype for value in end.values()} == {torch.float32}
    body = [name for name in start if "layers" in name]
    moved = sum(int((end[name] != start[name].float()).sum()) for name in body)
    assert moved > 0.9 * sum(start[name].numel() for name in body)


def test_a_tokenizer_without_padding_token_and_adapters(teacher: Path, tmp_path: Path) -> None:
    """As Llama 2's: the same weights as with one, and translations."""
    bare = tmp_path / "bare"
    tokenizer = load_tokenizer(teacher)
    load_model(teacher, tokenizer, 0).save_pretrained(bare)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(bare)
    assert load_tokenizer(bare).pad_token_id is None
    for name, models in (("with", teacher), ("without", bare)):
        train("no_evo", tmp_path / name, teacher=models, student=models, train_limit=8, lora="{r: 2, dropout: 0.0}")
    one, other = (load_file(tmp_path / n / "model" / "adapter_model.safetensors") for n in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    kept = tmp_path / "without" / "model"
    assert generate(load_model(kept, load_tokenizer(kept), 0), load_tokenizer(kept), ["en: a", "en: a cat"])


def test_training_from_a_cache(teacher: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    flags = (
        f"--data builtin --direction de-en en-de --prompt tiny --teacher {teacher} --limit 12 --k 8 --dtype 8bit "
        f"--shard-rows 8 --max-length 128 --device cpu --output {tmp_path / 'cache'}"
    ).split()
    cache = script("cache_teacher").main(flags)
    shown = capsys.readouterr().out
    assert "de-en: Rows(12 rows" in shown and "loss    (" in shown and f"{cache.bytes_per_token:.1f}" in shown
    each = bytes_of_token(read_index(tmp_path / "cache"))
    assert f" MB ({cache.tokens} tokens with loss x {each} bytes)\n" in shown
    assert "what the teacher thinks likely" in shown and "drawn" not in shown
    pair = {"teacher": f"cache:{tmp_path / 'cache'}", "student": teacher, "train_limit": 12}
    hashed: list[Any] = []
    known = fingerprints.without_caches
    monkeypatch.setattr(fingerprints, "without_caches", lambda data: hashed.append(data) or known(data))
    assert train("forward_kd", tmp_path / "student", **pair)["steps"] == 2
    assert len(hashed) == 1
    with pytest.raises(ValueError, match=r"was made from something else: data"):
        train("forward_kd", tmp_path / "other", **{**pair, "train_limit": 11})
    with pytest.raises(ValueError, match="needs an online teacher"):
        train("self_evolution_quantile", tmp_path / "third", **pair)

    with pytest.raises(ValueError, match=r"made with other arguments \(k: 8 -> 9\)"):
        script("cache_teacher").main([*flags, "--k", "9"])
    with pytest.raises(ValueError, match="max_length=4 leaves no room for a response"):
        script("cache_teacher").main([*flags, "--format", "pairs", "--max-length", "4"])
    for wrong, message in ((["--teacher", "tiny-teacher"], "random weights"), (["--kd-size", "13"], r"in \[1, 12\]")):
        with pytest.raises(SystemExit, match=message):
            script("cache_teacher").main([*flags, *wrong])

    tokenizer = load_tokenizer(teacher)
    pairs = misalign(load_pairs("builtin", "train", "en-de", limit=12)[-5:], 0.4, 3)
    rows = tokenize_pairs(tokenizer, "tiny", pairs, "en-de", 128)
    uniform = {str(i): {"logprob": -torch.tensor(float(len(tokenizer))).log().item()} for i in range(len(tokenizer))}
    path = tmp_path / "vllm.jsonl"
    path.write_text("".join(json.dumps([None] + [uniform] * (len(row["input_ids"]) - 1)) + "\n" for row in rows.rows))
    flags[flags.index("de-en") : flags.index("en-de") + 1] = ["en-de"]
    flags += ["--kd-size", "5", "--kd-noise", "0.4", "--seed", "3", "--from-vllm", str(path)]
    read = script("cache_teacher").main([*flags, "--output", str(tmp_path / "read")])
    assert read.mass_mean == pytest.approx(8 / len(tokenizer), rel=1e-2) and read.about["file"] == "vllm.jsonl"
    assert len(read[0][0]) == len(target_positions(rows[0]["labels"]))


def test_a_cache_and_a_training_have_the_same_defaults(teacher: Path, tmp_path: Path) -> None:
    """Of translations; what an option changes is told with the options that may have changed it."""
    data = tmp_path / "train.jsonl"
    pairs = load_pairs(corpus(), "train", "en-de", limit=8)
    data.write_text("".join(json.dumps({"en": pair.source, "de": pair.target}) + "\n" for pair in pairs))
    cache = f"cache:{tmp_path / 'cache'}"
    script("cache_teacher").main(
        ["--data", str(data), "--teacher", str(teacher), "--device", "cpu", "--output", str(tmp_path / "cache")]
    )
    given = ["--data", data, "--student", teacher, "--teacher", cache, "--max_steps", 1, "--use_cpu"]
    assert script("train").main([*map(str, [*given, "--output", tmp_path / "run"])])["steps"] == 1
    with pytest.raises(
        ValueError, match=r"made from something else: data \(.* options split, limit.*template \(.*prompt"
    ):
        script("train").main([*map(str, [*given, "--output", tmp_path / "other", "--prompt", "tiny"])])


def test_training_from_drawn_lists(teacher: Path, tmp_path: Path, capsys) -> None:
    flags = (
        f"--data builtin --directions en-de --prompt tiny --teacher {teacher} --limit 12 --keep sampled --draws 9 "
        f"--seed 3 --max-length 128 --device cpu --output {tmp_path / 'cache'}"
    ).split()
    cache = script("cache_teacher").main(flags)
    shown = capsys.readouterr().out
    assert (cache.keep, cache.k, cache.draws) == ("sampled", 0, 9) and "draws" in shown
    assert len(cache[0][0][0]) == 9 and f"{cache.bytes_per_token:.1f}" in shown
    assert "what was drawn" in shown and "what the teacher thinks" not in shown
    pair = {"teacher": f"cache:{tmp_path / 'cache'}", "student": teacher, "directions": "en-de", "train_limit": 12}
    assert train("forward_kd", tmp_path / "student", **pair)["steps"] == 1
    with pytest.raises(ValueError, match="tail must be 'renormalize' for the cache in"):
        train("forward_kd", tmp_path / "other", cache_tail="bucket", **pair)
    with pytest.raises(ValueError, match="tail must be 'uniform', 'bucket' or 'listed' for ReverseKD"):
        train("forward_kd", tmp_path / "reverse", objective="reverse_kd:lam=1", **pair)
    with pytest.raises(ValueError, match="draws must be None with keep='lists', got 9"):
        script("cache_teacher").main([*flags, "--keep", "lists"])
    with pytest.raises(ValueError, match="seed: 3 -> 4"):
        script("cache_teacher").main([*flags, "--seed", "4"])


def test_training_from_hidden_states(teacher: Path, tmp_path: Path, capsys) -> None:
    """The model of the online teacher, validated on a cache of the validation rows; read by a worker."""
    shared = f"--data {corpus()} --prompt tiny --teacher {teacher} --max-length 64 --device cpu --keep hidden"
    tokenizer = load_tokenizer(teacher)
    student = load_model("tiny-student", tokenizer, 0)
    start = {name: value.clone() for name, value in student.state_dict().items()}
    for each in (student, tokenizer):
        each.save_pretrained(tmp_path / "student")
    given = {"student": tmp_path / "student", "directions": "en-de", "max_length": 64, "eval_strategy": "epoch"}
    train("self_evolution", tmp_path / "online", teacher=teacher, statistics="kl", **given)
    online = weights(tmp_path / "online" / "model")
    moved = apart(online, start)
    make = script("cache_teacher").main
    folders = {}
    for name, more in (("fp32", "--dtype fp32"), ("fp8", "--dtype fp8 --project 60")):
        folders[name] = tmp_path / name, tmp_path / f"{name}-valid"
        flags = [*shared.split(), "--limit", "24", *more.split(), "--output", str(folders[name][0])]
        cache = make(flags)
        shown = capsys.readouterr().out
        assert "loss    (" in shown and f"{cache.bytes_per_token:.1f}" in shown and "KL" in shown and "MB" in shown
        each = cache.width * (1 if name == "fp8" else 4) + (4 if name == "fp8" else 0)
        assert f" MB ({cache.tokens} tokens with loss x {each} bytes) and the teacher's head\n" in shown
        flags[flags.index("--limit") + 1] = "4"
        flags[-1] = str(folders[name][1])
        if "--project" in flags:
            place = flags.index("--project")
            flags[place : place + 2] = ["--like", str(folders[name][0])]
        make([*flags, "--split", "valid"])
        paths = {"teacher": f"cache:{folders[name][0]}", "valid_teacher": f"cache:{folders[name][1]}"}
        record = train("self_evolution", tmp_path / f"{name}-run", statistics="kl", **paths, **given)
        assert "kl" in record["log_history"][0]
        assert record["validation"][0].keys() == {"step", "loss", "ce", "perplexity", "kl", "top_1"}
        found = apart(weights(tmp_path / f"{name}-run" / "model"), online)
        assert found < 1e-3 * moved if name == "fp32" else 1e-3 * moved < found < 0.5 * moved
    for changes, message in (
        ({}, "valid_teacher must be cache:FOLDER, the cache of the validation rows, or eval_strategy no"),
        ({"valid_teacher": f"cache:{folders['fp32'][0]}"}, "made from something else: data"),
        ({"valid_teacher": f"cache:{folders['fp8'][1]}"}, r"must have the head of .* write it with like="),
        ({"valid_teacher": paths["valid_teacher"], "cache_tail": "uniform"}, "tail must be None for the cache in"),
        ({"valid_teacher": str(folders["fp32"][1])}, "valid_teacher must be cache:FOLDER, beside such a teacher"),
    ):
        with pytest.raises(ValueError, match=message):
            train(
                "self_evolution", tmp_path / f"bad{len(message)}", teacher=f"cache:{folders['fp32'][0]}",
                **{**given, **changes},
            )  # fmt: skip
    for wrong, kind, message in (
        (["--k", "9"], ValueError, "k must be None with keep='hidden', got 9"),
        (["--from-vllm", "x"], SystemExit, "it needs --keep lists"),
        (["--from-vllm", "x", "--keep", "lists", "--draws", "3"], SystemExit, "without --draws, --project, --like"),
    ):
        with pytest.raises(kind, match=message):
            make([*shared.split(), "--output", str(tmp_path / "none"), *wrong])


def test_a_cache_is_checked_before_the_teacher_is_loaded(teacher: Path, tmp_path: Path, monkeypatch) -> None:
    """Loading takes minutes; a 70B teacher is not loaded for an option that nobody takes."""
    make = script("cache_teacher")
    flags = f"--data {corpus()} --prompt tiny --teacher {teacher} --limit 4 --device cpu --output".split()
    make.main([*flags, str(tmp_path / "made"), "--k", "8"])
    monkeypatch.setattr(make, "load_model", lambda *_, **__: pytest.fail("the teacher was loaded"))
    for wrong, message in (
        ("--keep hidden --dtype 8bit", r"dtype must be one of 'bf16', .*, got '8bit'"),
        ("--keep hidden --k 9", "k must be None with keep='hidden', got 9"),
        ("--keep hidden --like nothing", "like='nothing' must be the folder of a cache of hidden states"),
        (f"--keep hidden --like {tmp_path / 'made'}", "must be the folder of a cache of hidden states"),
        ("--keep hidden --project 0", "project must be an int of at least 1, got 0"),
        ("--keep hidden --project 100000", "--project must be at most the 64 numbers of a hidden state, got 100000"),
        ("--keep lists --dtype fp8", r"dtype must be one of 'fp16', .*, got 'fp8'"),
        ("--keep lists --project 9", "project must be None with keep='lists', got 9"),
        ("--keep lists --like nothing", "like must be None with keep='lists', got 'nothing'"),
        ("--keep lists --draws 9", "draws must be None with keep='lists', got 9"),
        ("--k 0", "k must be an int of at least 1, got 0"),
        ("--k 100000", "k=100000: expected at most the .* tokens of the tokenizer"),
        ("--keep sampled --draws 0", "draws must be an int of at least 1, got 0"),
        ("--keep sampled --k -1", "k must be an int of at least 0 with keep='sampled', got -1"),
        ("--shard-rows 0", "shard_rows must be an int of at least 1, got 0"),
        ("--batch 0", "batch_size must be an int of at least 1, got 0"),
        ("--device nothing", "device='nothing' cannot be used here"),
    ):
        with pytest.raises(ValueError, match=message):
            make.main([*flags, str(tmp_path / "new"), *wrong.split()])
    with pytest.raises(ValueError, match=r"made with other arguments \(k: 8 -> 9\)"):
        make.main([*flags, str(tmp_path / "made"), "--k", "9"])
    with pytest.raises(ValueError, match=r"made with other arguments \(data: .*; rows: 4 -> 3\)"):
        make.main([*flags, str(tmp_path / "made"), "--k", "8", "--limit", "3"])
    assert not (tmp_path / "new").exists()


def test_a_table_that_is_narrow(teacher: Path, tmp_path: Path) -> None:
    """At 80 columns no number is broken."""
    make = script("cache_teacher")
    flags = f"--data {corpus()} --prompt tiny --teacher {teacher} --limit 4 --device cpu --keep hidden".split()
    cache = make.main([*flags, "--output", str(tmp_path / "made")])
    console = make.make_console(width=80)
    with console.capture() as shown:
        console.print(make.table_of(cache, ["en-de", "de-en"]))
    head = f"{(tmp_path / 'made' / 'head.safetensors').stat().st_size / 1e6:.1f} MB"
    for item in (f"{cache.bytes_per_token:.1f}", head, f"{cache.error['logits']:.2%}", f"{cache.error['kl']:.2g}"):
        assert f" {item} " in shown.get()


def test_bad_configurations_stop_before_any_work(tmp_path: Path) -> None:
    cache = tmp_path / "states"
    cache.mkdir()
    (cache / "index.json").write_text("{}")
    assert all(parse_teachers([f"{way}{cache}"])[0].place == str(cache) for way in ("", "cache:"))
    for changes, message in (
        ({"per_device_train_batch_size": 5}, r"per_device_train_batch_size x processes = 5 x 1, got 16"),
        ({"learning_rat": 1}, "--learning_rat"),
        ({"teacher": "null"}, "teacher must be given"),
        ({"teacher": "127.0.0.1:8456"}, "teacher must say what it is: http://127.0.0.1:8456 for a server, got"),
        ({"teacher": "tiny-teacher", "teacher_patience": 3}, "teacher_patience needs a teacher at http://HOST:PORT"),
        ({"teacher": "http://127.0.0.1:1", "teacher_patience": -1}, "teacher_patience must be seconds, at least 0"),
        (
            {"teacher": "cache:none", "statistics": "kl"},
            "statistics need an online teacher or one's states, got teacher='cache",
        ),
        ({"teacher": "tiny-teacher", "statistics": "entropy"}, "statistics must be among .* got 'entropy'"),
        ({"lora": "{q: 1}"}, "lora must have some of r, alpha, dropout, target_modules, got q"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            train("forward_kd", tmp_path / "none", **{"student": "tiny-student", **changes})
    assert not (tmp_path / "none" / "model").exists()


def test_the_token_view(teacher: Path, tmp_path: Path, capsys) -> None:
    """Difficulties are the loss's own, and every text is shown as it is."""
    view = script("inspect_tokens")
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"en": "A <b>cat</b> & 猫.", "de": "Eine 猫 <i>."}) + "\n")
    page = tmp_path / "page.html"
    flags = ["--student", str(teacher), "--teacher", str(teacher), "--data", str(data), "--split", "all"]
    view.main([*flags, "--output", str(page), "--terminal", "--objective", "self_evolution:gamma=0.1"])
    html, shown = page.read_text(), capsys.readouterr().out
    assert "A &lt;b&gt;cat&lt;/b&gt; &amp; 猫." in html and "<i>." not in html and "A <b>cat</b> & 猫." in shown
    tokenizer = load_tokenizer(teacher)
    model, other = load_model(teacher, tokenizer, 0), load_model("tiny-student", tokenizer, 5)
    pairs = load_pairs(str(data), "all", "en-de")
    rows = tokenize_pairs(tokenizer, "tiny", pairs, "en-de", 128)
    objective = fk.SelfEvolution(lam=0.5, beta=0.5, gamma=2.0)
    (tokens,) = view.token_difficulties(other, model, rows, tokenizer, objective)
    assert "".join(token.text for token in tokens if token.text != "·") == f" {pairs[0].target}{tokenizer.eos_token}"
    ids = torch.tensor([rows[0]["input_ids"]])
    labels = [i for i in range(1, ids.shape[1]) if rows[0]["labels"][i] != -100]
    q, p = (m(ids).logits[0, [i - 1 for i in labels]].log_softmax(-1).exp() for m in (other, model))
    target = 0.5 * torch.nn.functional.one_hot(ids[0, labels], q.shape[-1]) + 0.5 * p
    expected = torch.special.xlogy(target, target / q).sum(-1)
    found = torch.tensor([token.difficulty for token in tokens])
    assert torch.allclose(found, expected.float(), atol=1e-4)
    assert [token.is_hard for token in tokens] == (found > 2.0).tolist()
    assert tokens[0].probabilities == pytest.approx(
        (float(q[0, ids[0, labels[0]]]), float(p[0, ids[0, labels[0]]])), rel=1e-4
    )
    assert tokens[0].tops[1][0][1] == pytest.approx(float(p[0].max()), rel=1e-4)
