"""Self-Evolution KD (Song et al., COLING 2025): the paper's table of methods, from texts to figures.

    python examples/self_evolution/self_evolution.py --preset tiny --output runs/tiny       # toy text, minutes
    python examples/self_evolution/self_evolution.py --preset multi30k --data PATH --jobs 2 --output runs/table

A teacher and a student learn to translate; then the student is distilled with every method, seed and condition,
translates the test set and is compared with the baseline's student. The same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

# tiny models: threads that spin at barriers cost more than they give
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

import paper_table
import torch
import transformers
from kd_methods import METHODS
from transformers import TrainingArguments

import fused_kd
from fused_kd.info import devices, versions
from fused_kd.training.cache import write_cache
from fused_kd.training.collate import Collator, padding_id
from fused_kd.training.data import Pair, load_directions, misalign
from fused_kd.training.difficulty import with_quantile_gamma
from fused_kd.training.fit import best_checkpoint, fit, training_arguments
from fused_kd.training.models import load_model, model_content, shared_tokenizer, threads_for
from fused_kd.training.prompts import Rows, get_prompt, tokenize_directions, training_texts
from fused_kd.training.score import paired_bootstrap, similarity, translate
from fused_kd.training.script import build, parse, run_script
from fused_kd.training.stage import Stages, fingerprint, helpers, read_json, read_lines, write_json, write_lines
from fused_kd.training.teacher_cache import TeacherCache
from fused_kd.training.trainer import KDTrainer

HISTORY = ("step", "loss", "difficulty", "hard_fraction", "beta")


@dataclass(frozen=True)
class Condition:
    """A distillation set and how the students learn from it."""

    sentences: int  # the last so many pairs of each direction
    noise: float = 0.0  # the share of them that gets a wrong reference
    start: Literal["student", "scratch"] = "student"  # the trained student, or random weights
    train: dict[str, Any] = field(default_factory=dict)  # TrainingArguments, over those of Config.distil
    methods: list[str] | None = None  # default: those of Config
    seeds: list[int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.sentences, bool) or not isinstance(self.sentences, int) or self.sentences < 1:
            raise ValueError(f"sentences must be a whole number of at least 1, got {self.sentences!r}")
        if self.start not in ("student", "scratch"):
            raise ValueError(f"start must be 'student' or 'scratch', got {self.start!r}")


@dataclass(frozen=True)
class Sweep:
    """Students of one method with other values of a parameter of its objective."""

    condition: str
    values: list[float]
    seeds: list[int] = field(default_factory=lambda: [0])


@dataclass
class Config:
    """Everything that the numbers depend on; of each direction where there is a number of pairs."""

    data: str = "builtin"  # builtin, a JSON(L)(.gz) file, a folder of them, the prefix of text files, or a hub name
    directions: list[str] = field(default_factory=lambda: ["en-de", "de-en"])
    test: str = "test"  # the split to translate
    valid: str = "valid"  # for the methods that keep their best checkpoint
    train_limit: int | None = None
    test_limit: int | None = None
    valid_limit: int | None = None
    prompt: str = "tiny"  # or alpaca, paper
    max_length: int = 128  # tokens of prompt and response
    vocab: int = 4000  # tokens of the tokenizer trained where both models are presets
    teacher: str = "tiny-teacher"  # a preset, path or hub name
    student: str = "tiny-student"
    train_teacher: dict = field(default_factory=dict)  # TrainingArguments; num_train_epochs 0 takes it as it is
    train_student: dict = field(default_factory=dict)
    distil: dict = field(default_factory=dict)  # TrainingArguments of every distillation
    conditions: dict = field(default_factory=dict)  # name: the fields of Condition
    methods: list[str] = field(default_factory=lambda: list(METHODS)[:10])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    baseline: str = "forward_kd"  # the method that the others are compared with
    sweeps: dict = field(default_factory=dict)  # method.parameter: the fields of Sweep
    cache_dtype: Literal["fp16", "8bit"] = "fp16"
    cache_tail: Literal["renormalize", "uniform", "bucket", "listed"] = "bucket"  # of tokens that a list lacks

    def __post_init__(self) -> None:
        get_prompt(self.prompt)
        self.conditions_of = {name: build(Condition, f"conditions.{name}", v) for name, v in self.conditions.items()}
        self.sweeps_of = {name: build(Sweep, f"sweeps.{name}", v) for name, v in self.sweeps.items()}
        named = [(f"conditions.{name}.methods", c.methods or []) for name, c in self.conditions_of.items()]
        for where, methods in [("methods", self.methods), ("baseline", [self.baseline]), *named]:
            if unknown := [method for method in methods if method not in METHODS]:
                raise ValueError(f"{where} must be of {', '.join(METHODS)}, got {', '.join(unknown)}")
        for key, sweep in self.sweeps_of.items():
            method, _, parameter = key.partition(".")
            loss = METHODS[method].loss if method in METHODS else None
            if loss is None or parameter not in dataclasses.asdict(loss):
                raise ValueError(f"sweeps.{key}: expected METHOD.PARAMETER of one of {', '.join(METHODS)}")
            if sweep.condition not in self.conditions:
                raise ValueError(
                    f"sweeps.{key}: condition must be one of {', '.join(self.conditions)}, got {sweep.condition!r}"
                )
        known = {option.name for option in dataclasses.fields(TrainingArguments)}
        trains = {f"conditions.{name}.train": c.train for name, c in self.conditions_of.items()}
        own = {name: getattr(self, name) for name in ("train_teacher", "train_student", "distil")}
        for where, options in (own | trains).items():
            if unknown := sorted(options.keys() - known):
                raise ValueError(f"{where}: {', '.join(unknown)} is no option of transformers.TrainingArguments")


@dataclass
class Running:
    """Where and how; the numbers do not depend on it."""

    output: str = "runs/self_evolution"
    jobs: int = 1  # processes that share the work; 2 on two cores, for tiny models
    worker: bool = False  # this process is a helper of another one


@dataclass(frozen=True)
class Trial:
    """One distilled student."""

    condition: str
    method: str
    seed: int
    parameter: str | None = None
    value: float | None = None

    def __str__(self) -> str:
        sweep = "" if self.parameter is None else f".{self.parameter}={self.value:g}"
        return f"{self.condition}.{self.method}{sweep}.seed{self.seed}"


def trials_of(config: Config) -> list[Trial]:
    """Every distillation; seeds outermost, so that a table in progress has whole columns, and sweeps last."""
    seeds_of = {name: config.seeds if c.seeds is None else c.seeds for name, c in config.conditions_of.items()}
    found = [
        Trial(name, method, seed)
        for seed in sorted({seed for seeds in seeds_of.values() for seed in seeds})
        for name, condition in config.conditions_of.items()
        if seed in seeds_of[name]
        for method in (config.methods if condition.methods is None else condition.methods)
    ]
    for key, sweep in config.sweeps_of.items():
        method, _, parameter = key.partition(".")
        found += [
            Trial(sweep.condition, method, seed, parameter, value)
            for seed in sweep.seeds
            for value in sweep.values
            if value != getattr(METHODS[method].loss, parameter)  # the method's own run
        ]
    return found


class PaperTable:
    """The table in a folder. Most methods return the folder of a finished stage, whose work they do if need be.

    Raises:
        ValueError: data or models that are not there, too few pairs for the distillation sets.
    """

    def __init__(self, config: Config, stages: Stages) -> None:
        self.config, self.stages, self.template = config, stages, get_prompt(config.prompt)
        self.models = [config.teacher, config.student]
        self.trials = trials_of(config)
        self.train = load_directions(config.data, "train", config.directions, limit=config.train_limit)
        self.tests = load_directions(config.data, config.test, config.directions, limit=config.test_limit)
        self.valid: dict[str, list[Pair]] = {}
        if any(METHODS[trial.method].best for trial in self.trials):
            self.valid = load_directions(config.data, config.valid, config.directions, limit=config.valid_limit)
        sets = config.conditions_of.values()
        most, shortest = max((c.sentences for c in sets), default=0), min(map(len, self.train.values()))
        if most >= shortest:
            raise ValueError(f"sentences must be below the {shortest} training pairs of a direction, got {most}")
        self.held = max((c.sentences for c in sets if c.start == "student"), default=0)
        self.contents = {name: model_content(name) for name in self.models}
        prompt = dataclasses.asdict(self.template)
        self.texts = {"prompt": prompt, "max_length": config.max_length, "pairs": fingerprint(self.train)}
        self.tested = {"prompt": prompt, "test": fingerprint(self.tests)}

    @cached_property
    def tokenizer_folder(self) -> Path:
        def work(folder: Path) -> None:
            texts = training_texts(self.template, self.train)
            shared_tokenizer(self.models, folder, texts, self.config.vocab)

        return self.stages("tokenizer", work, self.texts | {"vocab": self.config.vocab, "models": self.contents})

    @cached_property
    def tokenizer(self) -> Any:
        return shared_tokenizer(self.models, self.tokenizer_folder, (), self.config.vocab)

    def model(self, name: str | Path, seed: int = 0) -> Any:
        """A preset with the seed's weights, or a loaded model, in float32."""
        return load_model(name, self.tokenizer, seed, dtype=torch.float32)

    def rows(self, pairs: dict[str, list[Pair]]) -> Rows:
        return tokenize_directions(self.tokenizer, self.template, pairs, self.config.max_length)

    def pretrained(self, name: str) -> Path:
        """The "teacher", trained on every pair, or the "student", which has not seen the distillation sets."""
        start, options = getattr(self.config, name), {"seed": 0, **getattr(self.config, f"train_{name}")}
        held, seed = (0, 0) if name == "teacher" else (self.held, 1)

        def work(folder: Path) -> None:
            rows = self.rows({direction: pairs[: len(pairs) - held] for direction, pairs in self.train.items()})
            self.fit(folder, name, options, model=self.model(start, seed), objective=fused_kd.SFT(), train_dataset=rows)

        settings = self.texts | {"model": self.contents[start], "train": options, "held": held}
        return self.stages(name, work, settings, needs=[self.tokenizer_folder])

    def distillation_rows(self, trial: Trial) -> Rows:
        condition = self.config.conditions_of[trial.condition]
        last = {direction: pairs[-condition.sentences :] for direction, pairs in self.train.items()}
        return self.rows({d: misalign(pairs, condition.noise, trial.seed) for d, pairs in last.items()})

    def distillation_settings(self, trial: Trial) -> dict[str, Any]:
        condition = self.config.conditions_of[trial.condition]
        return self.texts | {"sentences": condition.sentences, "noise": condition.noise, "seed": trial.seed}

    def cached_teacher(self, trial: Trial) -> Path:
        """The teacher's k largest log-probabilities at each token of a distillation set."""
        k, dtype, teacher = METHODS[trial.method].cache_k, self.config.cache_dtype, self.pretrained("teacher")

        def work(folder: Path) -> None:
            rows = self.distillation_rows(trial)
            model = self.model(teacher / "model")
            write_cache(folder / "lists", model, self.tokenizer, rows, k=k, dtype=dtype, template=self.template.name)

        settings = self.distillation_settings(trial) | {"k": k, "dtype": dtype}
        return self.stages(f"{trial.condition}.cache{k}.seed{trial.seed}", work, settings, needs=[teacher])

    def distilled(self, trial: Trial) -> Path:
        """A student, trained with one method on one distillation set."""
        config, method = self.config, METHODS[trial.method]
        condition = config.conditions_of[trial.condition]
        scratch = condition.start == "scratch"
        start = config.student if scratch else self.pretrained("student") / "model"
        needs = {"tokenizer": self.tokenizer_folder} if scratch else {"student": self.pretrained("student")}
        if method.needs_teacher:
            needs["teacher"] = self.pretrained("teacher")
        if method.cache_k is not None:
            needs["cache"] = self.cached_teacher(trial)
        options = {**config.distil, **condition.train, "seed": trial.seed}
        changes = {} if trial.parameter is None else {trial.parameter: trial.value}

        def work(folder: Path) -> None:
            rows: Any = self.distillation_rows(trial)
            teacher, loss = None, dataclasses.replace(method.loss, **changes)
            if method.cache_k is not None:
                teacher = TeacherCache(needs["cache"] / "lists", tail=config.cache_tail)
                teacher.check(tokenizer=self.tokenizer, rows=rows, template=self.template.name)
                rows = teacher.rows(rows)
            elif method.needs_teacher:
                teacher = self.model(needs["teacher"] / "model")
            if method.gamma_quantile is not None:
                fresh = self.model(start, trial.seed)
                loss = with_quantile_gamma(loss, method.gamma_quantile, fresh, teacher, rows, self.tokenizer)
            valid = self.rows(self.valid) if method.best else None
            what = {"model": self.model(start, trial.seed), "teacher": teacher, "train_dataset": rows}
            self.fit(folder, str(trial), options, valid, objective=loss, beta_schedule=method.schedule, **what)

        settings = self.distillation_settings(trial) | {
            "method": dataclasses.asdict(method) | {"label": None},
            "changes": changes,
            "start": self.contents[config.student] if scratch else None,
            "train": options,
            "tail": None if method.cache_k is None else config.cache_tail,
            "valid": fingerprint(self.valid) if method.best else None,
        }
        return self.stages(str(trial), work, settings, needs=list(needs.values()))

    def fit(self, folder: Path, title: str, options: dict[str, Any], valid: Rows | None = None, **what: Any) -> None:
        """Train into ``folder / "model"``; with ``valid`` the checkpoint with the least loss there is kept."""
        if valid is not None:
            batch = options.get("per_device_train_batch_size", 8)
            best = best_checkpoint(options.get("num_train_epochs", 3.0))
            options = options | best | {"per_device_eval_batch_size": batch}
        arguments, collator = training_arguments(folder, **options), Collator(padding_id(self.tokenizer))
        more = {"data_collator": collator, "processing_class": self.tokenizer, "eval_dataset": valid}
        trainer = KDTrainer(**what, args=arguments, **more)
        schedule = what.get("beta_schedule")
        about = {"objective": repr(what["objective"]), "beta_schedule": schedule and dataclasses.asdict(schedule)}
        write_json(folder / "objective.json", about)  # of what was trained: its Γ may come from the data
        fit(trainer, folder, title)

    def trained(self, what: str | Trial) -> Path:
        """The "teacher", the "student" or a trial's student."""
        return self.pretrained(what) if isinstance(what, str) else self.distilled(what)

    def translated(self, what: str | Trial) -> Path:
        """Greedy translations of the test set by what :meth:`trained` gives, and their scores."""
        model = self.trained(what)

        def work(folder: Path) -> None:
            scores = read_json(folder / "scores.json") or {}
            loaded = self.model(model / "model")
            for direction, pairs in self.tests.items():
                if direction not in scores:
                    made, score = translate(loaded, self.tokenizer, pairs, direction, self.template, batch_size=64)
                    write_lines(folder / f"hypotheses.{direction}.txt", made)
                    scores[direction] = dataclasses.asdict(score)
                    write_json(folder / "scores.json", scores)

        return self.stages(f"{what}.translations", work, self.tested, needs=[model])

    def compared(self, what: str | Trial) -> Path:
        """How close its translations are to the teacher's own; whether they score higher than the baseline's."""
        output, teacher, baseline = self.translated(what), self.translated("teacher"), None
        if isinstance(what, Trial) and what.parameter is None and what.method != self.config.baseline:
            base = Trial(what.condition, self.config.baseline, what.seed)
            baseline = self.translated(base) if base in self.trials else None

        def work(folder: Path) -> None:
            found: dict[str, dict[str, Any]] = {}
            for direction, pairs in self.tests.items():
                name = f"hypotheses.{direction}.txt"
                ours = read_lines(output / name)
                close = similarity(ours, read_lines(teacher / name))
                found[direction] = {"similarity": close.bleu, "equal": close.equal, "tests": {}}
                if baseline is not None:
                    systems = {"baseline": read_lines(baseline / name), "system": ours}
                    for test in paired_bootstrap(systems, [pair.target for pair in pairs], "baseline"):
                        found[direction]["tests"][test.metric] = {"delta": test.delta, "p": test.p_value}
            write_json(folder / "comparison.json", found)

        needs = [output, teacher, *([] if baseline is None else [baseline])]
        return self.stages(f"{what}.comparison", work, self.tested, needs=needs)

    def record(self, what: str | Trial) -> dict[str, Any]:
        """Objective, sizes, seconds, log and scores by direction of one model."""
        trained = self.trained(what)
        record = read_json(trained / "training.json") | read_json(trained / "objective.json")
        kept = ("objective", "beta_schedule", "parameters", "rows", "steps", "seconds", "validation")
        history = [{k: round(e[k], 5) for k in HISTORY if k in e} for e in record["log_history"]]
        scores = read_json(self.translated(what) / "scores.json")
        if what != "teacher":
            for direction, found in read_json(self.compared(what) / "comparison.json").items():
                scores[direction] |= {"similarity": found["similarity"], "equal": found["equal"]}
        return {key: record[key] for key in kept} | {"history": history, "scores": scores}

    def results(self, trials: Sequence[Trial]) -> dict[str, Any]:
        """All that tables and figures are made of, as JSON values."""
        pretrained = {name: self.record(name) for name in ("teacher", "student")}
        some = next(iter(pretrained["teacher"]["scores"].values()))
        runs, tests = [], []
        for trial in trials:
            about = {"condition": trial.condition, "method": trial.method, "seed": trial.seed}
            sweep = None if trial.parameter is None else {"parameter": trial.parameter, "value": trial.value}
            record = self.record(trial)
            runs.append(about | {"sweep": sweep} | record)
            for parameter in self.swept(trial):  # the method's own run is a point too
                value = getattr(METHODS[trial.method].loss, parameter)
                runs.append(about | {"sweep": {"parameter": parameter, "value": value}} | record)
            for direction, found in read_json(self.compared(trial) / "comparison.json").items():
                where = about | {"direction": direction}
                tests += [where | {"metric": metric} | test for metric, test in found["tests"].items()]
        return {
            "settings": dataclasses.asdict(self.config),
            "versions": versions(),
            "machine": devices(),
            "directions": self.config.directions,
            "signatures": {metric: some[f"{metric}_signature"] for metric in ("bleu", "chrf")},
            "baseline": self.config.baseline,
            **{name: record.pop("scores") for name, record in pretrained.items()},
            "pretraining": pretrained,
            "labels": {name: m.label for name, m in METHODS.items() if name in {t.method for t in self.trials}},
            "runs": runs,
            "significance": tests,
        }

    def swept(self, trial: Trial) -> Iterator[str]:
        """The parameters in whose sweeps a method's own run is a point."""
        for key, sweep in self.config.sweeps_of.items():
            method, _, parameter = key.partition(".")
            own = trial.parameter is None and (trial.condition, trial.method) == (sweep.condition, method)
            if own and trial.seed in sweep.seeds and getattr(METHODS[method].loss, parameter) in sweep.values:
                yield parameter


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[Config, Running]:
    return parse((Config, Running), argv, configs=Path(__file__).parent, description=__doc__)


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    config, running = parse_arguments(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if (threads := threads_for([config.teacher, config.student])) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    folder = Path(running.output)
    stages = Stages(folder)
    table = PaperTable(config, stages)
    results, done = None, []
    with helpers(__file__, argv, running.jobs, folder, helper=running.worker):
        # a report after each seed
        for _, group in groupby(table.trials, key=lambda trial: (trial.parameter is not None, trial.seed)):
            done += group
            wanted = ["teacher", "student", *done]
            pieces = {str(what): partial(table.translated, what) for what in wanted}
            pieces |= {f"{what}.comparison": partial(table.compared, what) for what in wanted}
            stages.share(pieces)
            if not running.worker:
                results = table.results(done)
                write_json(folder / "results.json", results)
                paper_table.write_report(results, folder)
    if results is not None:
        found = paper_table.Results(results)
        for condition in found.conditions:
            shown = paper_table.Table(found, condition, "bleu")
            print(f"\n{condition}\n\n{shown.markdown()}\n\n{shown.caption()}\n")
        print(f"results.json, results.md, results.csv, figures, translations and models are in {folder}")
    return results


if __name__ == "__main__":
    run_script(main)
