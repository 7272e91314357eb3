"""DDP, FSDP2 and ZeRO-3 in two processes against one process: losses, gradients, weights, kill -9 and resume."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fused_kd.training.models import load_model, load_tokenizer
from tests.training import distributed_worker as worker
from tests.training.scripts import ROOT, apart, command, train, weights

CONFIGS = ROOT / "examples" / "accelerate"
ENGINES = ["ddp", "fsdp2", "zero3"]
# relative to the norm; the order of sums costs 1e-7, and a first step may be a thousand times smaller than its weights
LOSS, WEIGHTS, GRADIENT = 1e-5, 1e-6, 1e-3
ACCUMULATED = {"gradient_accumulation_steps": 2}
CASES: list[dict[str, Any]] = [
    # 19 rows in micro-batches of 2 x 2: the last one is short, and so is the epoch's last step
    {
        "name": "configured",
        "pretrained": True,
        "objective": "self_evolution:gamma=2.0,floor=0.3+0.5*reverse_kd",
        "statistics": ["kl", "overlap"],
        "arguments": {**ACCUMULATED, "train_sampling_strategy": "group_by_length"},
    },
    # 10 rows: the second process has no valid token in the epoch's last step
    {
        "name": "tied",
        "tied": True,
        "rows": 10,
        "objective": "self_evolution_top_k:fraction=0.3",
        "arguments": {"gradient_checkpointing": True},
    },
    {
        "name": "own base",
        "lora": True,
        "own_base": True,
        "objective": "forward_kd",
        "arguments": {**ACCUMULATED, "gradient_checkpointing": True},
    },
    {
        "name": "cached",
        "cached": True,
        "objective": "self_evolution_top_k:fraction=0.3",
        "arguments": ACCUMULATED,
    },
    # each process keeps an average of its own
    {"name": "own average", "own": {"decay": 0.7}, "engines": ["ddp"], "objective": "no_evo", "arguments": ACCUMULATED},
    {"name": "own prompt", "own": {}, "context": [9, 8, 7], "rows": 10, "objective": "forward_kd", "arguments": {}},
    # a process whose rows are all of one teacher runs the other one too, where it is sharded
    {"name": "each its own", "several": "by row", "rows": 10, "objective": "forward_kd", "arguments": ACCUMULATED},
    {"name": "mixture", "several": "mixture", "cached": True, "objective": "forward_kd", "arguments": {}},
    {
        "name": "states",
        "states": True,
        "objective": "self_evolution:gamma=2.0+0.5*reverse_kd",
        "arguments": ACCUMULATED,
    },
    # their modules are not called, so nothing would gather them
    {
        "name": "head adapted",
        "lora": True,
        "adapters": {"target_modules": ["q_proj", "lm_head"]},
        "engines": ["ddp"],
        "objective": "self_evolution:gamma=2.0",
        "arguments": ACCUMULATED,
    },
    {
        "name": "head copied",
        "lora": True,
        "adapters": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "engines": ["ddp"],
        "objective": "forward_kd",
        "arguments": {},
    },
    {
        "name": "experts",
        "experts": True,
        "engines": ["ddp", "fsdp2"],
        "rows": 20,
        "objective": "forward_kd",
        "arguments": {"train_sampling_strategy": "sequential"},
    },
    {"name": "bf16", "objective": "no_evo", "arguments": {"bf16": True, "learning_rate": 0.1}},
]
LONG: dict[str, Any] = {
    "dropout": 0.1,
    "objective": "self_evolution_top_k",
    "arguments": {
        **ACCUMULATED,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "max_steps": 7,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "train_sampling_strategy": "group_by_length",
    },
}


# of examples/train.py
SCRIPT: dict[str, Any] = {"directions": "de-en", "student": "tiny-student"}


def missing(engine: str = "", case: str = "") -> str | None:
    for key, package in (
        ("zero3", "deepspeed"), ("own base", "peft"), ("head adapted", "peft"), ("head copied", "peft")
    ):  # fmt: skip
        if key in (engine, case) and importlib.util.find_spec(package) is None:
            return package
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs every engine once, killed and resumed, and leaves results there."""
    folder = tmp_path_factory.mktemp("distributed")
    launches: list[dict[str, Any]] = []
    worker.tiny(16, seed=1).save_pretrained(folder / "student")
    worker.tiny(24, seed=2).save_pretrained(folder / "teacher")
    for engine in ENGINES:
        if missing(engine):
            continue
        (folder / engine).mkdir()
        there = [each for each in CASES[1:] if engine in each.get("engines", ENGINES)]
        cases = [case for case in there if not missing(case=case["name"])]
        full = {"state_dict": "FULL_STATE_DICT", "output": "whole"} if engine == "fsdp2" else {}
        cases += [{"name": "whole", **LONG, **full}, {"name": "killed", "kill": 6, **LONG}]
        again = [{"name": "killed", "resume": "last", **LONG}]
        if full:
            again.append({"name": "full-resumed", "resume": "checkpoint-4", **LONG, **full})
        launch = {"engine": engine, "folder": str(folder / engine)}
        launches += [{**launch, "name": "first", "cases": cases}, {**launch, "name": "second", "cases": again}]
        launches.append({**launch, "name": "third", "cases": CASES[:1], "config": str(CONFIGS / f"{engine}.yaml")})
    flags = command("self_evolution_top_k", folder / "script", **SCRIPT, per_device_train_batch_size=4)
    launches.append({"engine": "ddp", "name": "script", "folder": str(folder / "ddp"), "train": flags})
    plan = folder / "plan.json"
    plan.write_text(json.dumps(launches))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    call = [sys.executable, "-m", "tests.training.distributed_worker", str(plan)]
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory):
    """One process on the same batches, trained once a case."""
    folder = tmp_path_factory.mktemp("single")
    known: dict[str, dict[str, Any]] = {}

    def of(case: dict[str, Any]) -> dict[str, Any]:
        if case["name"] not in known:
            known[case["name"]] = worker.run_case({**case, "pretrained": False}, folder, "ddp", 1)
        return known[case["name"]]

    return of


def result(folder: Path, engine: str, name: str) -> dict[str, Any]:
    if missing(engine, name):
        pytest.skip(f"needs {missing(engine, name)}")
    file = folder / engine / f"{name}.pt"
    logs = [path.read_text()[-3000:] for path in sorted((folder / engine).glob("*.log"))]
    assert file.exists(), "\n".join(logs)
    return torch.load(file, weights_only=False)


def difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of a parameter."""
    assert left.keys() == right.keys()
    return max(float((left[name] - value).norm() / value.norm().clamp_min(1e-12)) for name, value in right.items())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES[:-1], ids=lambda case: case["name"])
def test_equals_one_process(folder: Path, truth, engine: str, case: dict[str, Any]) -> None:
    """The first case: launched as the documented configurations do, models read from files."""
    if engine not in case.get("engines", ENGINES):
        pytest.skip("refused there")
    ours, expected = result(folder, engine, case["name"]), truth(case)
    assert len(ours["logs"]) == len(expected["logs"]) == 3
    for mine, theirs in zip(ours["logs"], expected["logs"], strict=True):
        told = [name for name in ("hard_fraction_t", "router_loss") if name in theirs]
        for key in ("loss", "difficulty", "hard_fraction", "grad_norm", *told, *case.get("statistics", ())):
            assert mine[key] == pytest.approx(theirs[key], rel=LOSS), key
    trained = [name for name, start in expected["weights"][0].items() if (expected["weights"][1][name] != start).any()]
    assert trained

    def first_step(run: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {name: run["weights"][1][name] - run["weights"][0][name] for name in trained}

    # plain SGD: the first step is the gradient, up to a factor
    assert difference(first_step(ours), first_step(expected)) <= GRADIENT
    assert len(ours["weights"]) == 3
    assert difference(ours["weights"][-1], expected["weights"][-1]) <= WEIGHTS
    assert difference(expected["weights"][-1], expected["weights"][0]) > 1e-2
    assert expected["evaluated"]["kl"] is not None or "cached" in case
    for key, value in expected["evaluated"].items():
        assert ours["evaluated"][key] == (None if value is None else pytest.approx(value, rel=LOSS)), key


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize("name", ["whole", "tied"])
def test_teacher_stays_sharded(folder: Path, engine: str, name: str) -> None:
    """Between forwards a process holds its share, heads and embeddings included."""
    whole = sum(each.numel() for each in worker.tiny(24, seed=2, tied=name == "tied").parameters())
    share = result(folder, engine, name)["teacher_held"] / whole
    assert share <= (0.52 if engine == "fsdp2" else 0.0), "ZeRO-3 keeps its share apart from the parameters"


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16(folder: Path, truth, engine: str) -> None:
    ours = result(folder, engine, "bf16")
    expected = truth({**CASES[-1], "name": "fp32", "arguments": {"learning_rate": 0.1}})
    for mine, theirs in zip(ours["logs"], expected["logs"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
    assert difference(ours["weights"][-1], expected["weights"][-1]) <= 1e-2
    # what the Trainer got of the model was not rounded to 8 bits on its way
    assert ours["train_loss"] == pytest.approx(sum(entry["loss"] for entry in ours["logs"]) / 3, rel=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_killed_and_resumed(folder: Path, engine: str) -> None:
    """SIGKILL while a checkpoint is written, in the second epoch, with dropout."""
    killed, whole = result(folder, engine, "killed"), result(folder, engine, "whole")
    codes = json.loads((folder / "plan.codes").read_text())
    assert codes[f"{engine} first"][1] == -9 and codes[f"{engine} second"] == [0, 0]
    assert killed["resumed"] == "checkpoint-4", "the torn checkpoint-6 must not count"
    assert difference(killed["weights"][-1], whole["weights"][-1]) == 0.0
    for mine, theirs in zip(killed["logs"], whole["logs"], strict=True):
        for key in ("step", "loss", "difficulty", "hard_fraction"):
            assert mine[key] == theirs[key]


def test_fsdp2_resumes_from_a_full_state_dict(folder: Path) -> None:
    """Also: the first process alone has the weights (``cpu_ram_efficient_loading``)."""
    resumed, whole = (result(folder, "fsdp2", name) for name in ("full-resumed", "whole"))
    assert resumed["resumed"] == "checkpoint-4"
    assert difference(resumed["weights"][-1], whole["weights"][-1]) == 0.0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["whole", "tied"])
def test_saved_model_is_whole(folder: Path, engine: str, name: str) -> None:
    """What ``save_model`` writes, sharded or not, opens without an engine and has the trained weights."""
    import transformers

    weights = result(folder, engine, name)["weights"][-1]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / engine / f"{name}.saved")
    assert difference({key: value.detach() for key, value in model.named_parameters()}, weights) == 0.0


def test_a_script_in_two_processes_is_one(folder: Path, tmp_path: Path) -> None:
    """The global batch is divided, and the same model comes out."""
    train("self_evolution_top_k", tmp_path, **SCRIPT)
    assert json.loads((folder / "plan.codes").read_text())["ddp script"] == [0, 0]
    shown = (folder / "ddp" / "script.0.log").read_text()
    assert "global batch 16 = 2 processes x 4 rows x 2 accumulated" in shown
    one, two = (weights(each / "model") for each in (tmp_path, folder / "script"))
    start = load_model("tiny-student", load_tokenizer(tmp_path / "model"), 0).state_dict()
    assert apart(one, start) > 0.1 and apart(one, two) < 1e-3 * apart(one, start)
