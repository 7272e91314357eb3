"""Configurations from YAML files and overrides, and the recipe that they fill."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import fused_kd as fk
from fused_kd.training.beta_schedule import BetaSchedule
from fused_kd.training.config import load_config
from fused_kd.training.grid.experiment import Experiment, load_methods
from fused_kd.training.lora import LoRA
from fused_kd.training.recipe import Recipe

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
METHODS = sorted(path.stem for path in (CONFIGS / "methods").glob("*.yaml"))


@dataclass(frozen=True)
class Inner:
    depth: int = 1
    rate: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = Inner()
    values: tuple[float, ...] = ()
    mode: Literal["a", "b"] = "a"
    maybe: int | None = 3
    table: dict[str, Inner] | None = None


@dataclass(frozen=True)
class Pair:
    left: Inner
    right: Inner


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_later_files_and_overrides_win_key_by_key(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "name: x\ninner: {depth: 2, rate: 2e-5}\nvalues: [1, 2.5]\n")
    second = write(tmp_path, "b.yaml", "inner: {depth: 4}\ntable: {one: {depth: 7}}\n")
    found = load_config(Outer, [first, second], ["mode=b", "maybe=null", "inner.rate=1"])
    assert found == Outer("x", Inner(4, 1.0), (1.0, 2.5), "b", None, {"one": Inner(7)})
    assert load_config(Outer, [first]).inner == Inner(2, 2e-5), "YAML reads 2e-5 as text"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("name: x\ndeepth: 3", [], r"unknown keys deepth \(.*a.yaml\): expected name, inner"),
        ("maybe: 3", [], "missing keys name"),
        ("name: 3", [], "name must be str, got 3"),
        ("name: x", ["inner.depth=1.5"], "depth must be int, got 1.5"),
        ("name: x", ["inner.depth=true"], "depth must be int, got True"),
        ("name: x", ["values=[1, no]"], r"values\[1\] must be float, got False"),
        ("name: x", ["mode=c"], "mode must be .*'a', 'b'.*, got 'c'"),
        ("name: x", ["maybe"], "override 'maybe': expected key=value"),
        ("name: x", ["maybe=[1"], "the value is not YAML"),
        ("- 1", [], "expected a mapping"),
        ("a: [", [], "cannot be read as YAML"),
        ("a: " + "[\n" * 3000, [], r"a\.yaml cannot be read as YAML: nested too deeply"),
        ("a: 2021-13-45", [], r"a\.yaml cannot be read as YAML: month must be"),
        ("a: " + "1" * 5000, [], r"a\.yaml cannot be read as YAML: Exceeds the limit"),
        ("&a [*a]", [], "more than 10000 values"),
        ("name: x\nname: y", [], "the key 'name' is there twice"),
        ("#" * 300_000, [], "more than 65536 characters"),
        ("name: x", ["values=[.nan]"], r"values\[0\] must be float, got nan"),
        ("name: x", ["values=[1e999]"], r"values\[0\] must be float, got '1e999'"),
        ("name: x", ["values=" + "[\n" * 3000], "the value is not YAML: nested too deeply"),
        ("name: \0", [], r"a\.yaml cannot be read as YAML: unacceptable character #x0000"),
        ("name: x", ["values=\0"], "the value is not YAML: unacceptable character #x0000"),
        ("table: {1: 1, 0x1: 2}", [], "the key '1' is read as int, not as text: quote it"),
        ("table: {yes: 1, true: 2}", [], "the key 'yes' is read as bool"),
        ("table: {1.0: 1, 1: 2}", [], r"the key '1\.0' is read as float"),
        ("table: {no: {}, de: {}}", [], "the key 'no' is read as bool, not as text: quote it"),
        ("table: {? [a] : {}}", [], "the key of several values is read as seq"),
        ("name: x", ["table={null: {}}"], "the key 'null' is read as null"),
        ("name: x\nmaybe: 0x" + "f" * 4000, [], "maybe must have at most 64 bits, got a number of 16000 bits"),
        ("name: 0b" + "1" * 20_000, [], "name must have at most 64 bits, got a number of 20000 bits"),
        ("name: x\nmaybe: 1" + ":1" * 3000, [], "maybe must have at most 64 bits"),
        ("name: x", ["values=[0x" + "f" * 4000 + "]"], r"values\[0\] must have at most 64 bits"),
        ("name: [0x" + "f" * 4000 + "]", [], r"name must be str, got \[a number of 16000 bits\]"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors_name_the_key(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(Outer, [write(tmp_path, "a.yaml", text)], overrides)
    with pytest.raises(ValueError, match=r"nowhere\.yaml cannot be read"):
        load_config(Outer, [tmp_path / "nowhere.yaml"])


@pytest.mark.parametrize("key", ["name", "maybe", "values", "inner", "unknown", "<<"])
def test_aliases_cannot_explode(tmp_path: Path, key: str) -> None:
    bomb = "\n".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 10))
    if key == "<<":
        bomb = "\n".join(f"x{n}: &x{n} {{<<: [{', '.join([f'*x{n - 1}'] * 9)}]}}" for n in range(1, 10))
    start = "x0: &x0 {a: 1}" if key == "<<" else "x0: &x0 [lol]"
    path = write(tmp_path, "a.yaml", f"{start}\n{bomb}\n{key}: *x9\n")
    with pytest.raises(ValueError, match=r"a\.yaml cannot be read as YAML: more than 10000 values") as raised:
        load_config(Outer, [path])
    assert len(str(raised.value)) < 500
    wide = write(tmp_path, "b.yaml", f"a: &a [{'x, ' * 900}]\n{key}: [*a, *a, *a, *a, *a, *a, *a, *a]\n")
    with pytest.raises(ValueError) as raised:
        load_config(Outer, [wide])
    assert len(str(raised.value)) < 1000


def test_an_override_changes_one_place(tmp_path: Path) -> None:
    """Also where an alias stands for the same mapping in another."""
    path = write(tmp_path, "a.yaml", "left: &x {depth: 1}\nright: *x\n")
    made = load_config(Pair, [path], ["left.depth=5"])
    assert (made.left.depth, made.right.depth) == (5, 1)


def test_quoted_keys_are_text(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "name: x\ntable: {'no': {depth: 2}, \"1\": {}, !!str 2: {}}\n")
    assert load_config(Outer, [path], ["table.no.rate=1"]).table == {"no": Inner(2, 1.0), "1": Inner(), "2": Inner()}


def test_paper_configs_have_the_paper_s_values() -> None:
    expected = {
        "sft": fk.SFT(),
        "forward_kd": fk.ForwardKD(lam=0.5),
        "reverse_kd": fk.ReverseKD(lam=0.5),
        "no_evo": fk.NoEvo(lam=0.5),
        "skew": fk.Skew(lam=0.5, beta=0.5),
        "skew_teacher": fk.SkewTeacher(lam=0.5, beta=0.9),
        "self_evolution": fk.SelfEvolution(lam=0.5, beta=0.5, gamma=0.4),
        "self_evolution_top_k": fk.SelfEvolutionTopK(lam=0.5, beta=0.5, fraction=0.5),
        "progressive_beta": fk.SelfEvolution(lam=0.5, beta=0.5, gamma=0.4),
    }
    for name, objective in expected.items():
        recipe = load_config(Recipe, [CONFIGS / "paper.yaml", CONFIGS / "methods" / f"{name}.yaml"])
        assert recipe.spec.objective == objective
        assert (recipe.epochs, recipe.global_batch, recipe.max_length) == (3.0, 128, 512)
        assert (recipe.learning_rate, recipe.warmup, recipe.prompt) == (2e-5, 0.03, "paper")
        assert recipe.directions == ("de-en", "en-de", "cs-en", "en-cs")
        assert recipe.select == ("best" if name == "sft" else "last")
    schedule = recipe.spec.beta_schedule
    assert schedule == BetaSchedule(0.5, 1.0, 1.0)
    assert [schedule.beta(x, end=0.5) for x in (0.0, 0.5, 1.0)] == [0.5, 0.75, 1.0]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_usable(name: str) -> None:
    method = load_methods(CONFIGS / "methods")[name]
    assert method.spec.objective.lam == 0.5 if name != "sft" else method.select == "best"


@pytest.mark.parametrize("path", sorted((CONFIGS / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_loads(path: Path) -> None:
    experiment = load_config(Experiment, [path])
    known = load_methods(CONFIGS / "methods")
    assert {*experiment.methods, experiment.baseline} <= known.keys()


def recipe(**changes) -> Recipe:
    return Recipe(
        **{"data": "builtin", "directions": ("en-de",), "student": "tiny-student", "objective": "sft", **changes}
    )


def test_global_batch_by_world_size() -> None:
    assert [recipe(micro_batch=4).accumulation(n) for n in (1, 2, 8)] == [32, 16, 4]
    assert recipe(micro_batch=4).settings(8).accumulation == 4
    with pytest.raises(ValueError, match="global_batch must be a multiple of micro_batch x processes = 4 x 3, got 128"):
        recipe(micro_batch=4).accumulation(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"directions": ("en",)}, "direction='en'"),
        ({"directions": ()}, "at least one direction"),
        ({"micro_batch": 0}, "micro_batch must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "must be above 0"),
        ({"objective": "forward_kd"}, "teacher must be given for objective='forward_kd'"),
        ({"prompt": "nice"}, "prompt 'nice' is unknown"),
    ],
)
def test_bad_recipes(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


def test_teacher_names() -> None:
    assert recipe(teacher="big").models == ["tiny-student"], "SFT loads no teacher"
    assert recipe(objective="no_evo", teacher="big").models == ["tiny-student", "big"]
    cached = recipe(objective="no_evo", teacher="cache:some/folder")
    assert cached.models == ["tiny-student"] and cached.cached_teacher == "some/folder"


def test_rows_of_all_directions(tmp_path: Path) -> None:
    from fused_kd.training.presets import train_tokenizer

    both = recipe(directions=("en-de", "de-en"), prompt="tiny", max_length=256)
    pairs = both.pairs("train", 5)
    tokenizer = train_tokenizer((pair.source for pair in pairs["en-de"]), 300)
    rows = both.rows(tokenizer, pairs)
    assert len(rows) == 10
    assert [tokenizer.decode(rows[i]["input_ids"]).split(":")[0].split()[-1] for i in (0, 9)] == ["en", "de"]


def test_lora_leaves_the_head_alone() -> None:
    pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = recipe(lora=LoRA(r=2, alpha=4, dropout=0.0)).with_adapters(LlamaForCausalLM(config))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 14 and not any("lm_head" in name for name in trainable)  # A and B of seven projections
