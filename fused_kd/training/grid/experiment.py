"""A grid of distillations: methods x seeds x conditions from one pretrained pair, every piece on disk and resumable.

Teacher and student are trained once; each run starts from that student (or from scratch) and sees the condition's
distillation set. Several processes may work on one folder: a job that another one holds is passed over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch

from fused_kd.training.beta_schedule import BetaSchedule
from fused_kd.training.cache.teacher_cache import TeacherCache
from fused_kd.training.cache.writer import write_cache
from fused_kd.training.config import load_config
from fused_kd.training.data.noise import misalign
from fused_kd.training.data.pairs import Pair, load_directions
from fused_kd.training.data.prompts import PairDataset, get_prompt, tokenize_directions, training_texts
from fused_kd.training.difficulty import with_quantile_gamma
from fused_kd.training.presets import load_model, model_content, shared_tokenizer
from fused_kd.training.runs import Run, fingerprint
from fused_kd.training.sharing import share
from fused_kd.training.specs import ObjectiveSpec, parse_objective
from fused_kd.training.stages import Settings, train_stage, translate_stage


@dataclass(frozen=True)
class Method:
    """How a student is distilled. ``method`` is the name shown; ``objective`` as of ``parse_objective``.

    Args:
        beta_schedule: moves β during the training.
        select: the checkpoint that is kept, "last" or the "best" by validation loss.
        gamma_quantile: Γ is this quantile of the distillation tokens' difficulties before the first step.
        cache_k: the teacher is a cache of its k largest log-probabilities.
    """

    method: str
    objective: str
    beta_schedule: BetaSchedule | None = None
    select: Literal["last", "best"] = "last"
    gamma_quantile: float | None = None
    cache_k: int | None = None

    def __post_init__(self) -> None:
        objective = parse_objective(self.objective).objective
        if self.gamma_quantile is not None and not 0 <= self.gamma_quantile <= 1:
            raise ValueError(f"gamma_quantile must be in [0, 1], got {self.gamma_quantile!r}")
        if self.gamma_quantile is not None and not hasattr(objective, "gamma"):
            raise ValueError(f"gamma_quantile needs an objective with a gamma, got {self.objective!r}")
        if self.cache_k is not None and self.cache_k < 1:
            raise ValueError(f"cache_k must be at least 1, got {self.cache_k!r}")

    @property
    def spec(self) -> ObjectiveSpec:
        return parse_objective(self.objective, self.beta_schedule)


@dataclass(frozen=True)
class Pretraining:
    """SFT of a model, by preset, path or hub name; 0 epochs take it as it is."""

    model: str
    epochs: float
    learning_rate: float
    batch: int = 64


@dataclass(frozen=True)
class Condition:
    """A distillation set: the last ``sentences`` of each direction, a share ``noise`` with wrong references.

    ``start`` is the pretrained "student", or "scratch". None for ``methods`` and ``seeds`` takes the experiment's.
    """

    sentences: int
    epochs: float
    learning_rate: float
    batch: int = 64
    noise: float = 0.0
    start: Literal["student", "scratch"] = "student"
    methods: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Sweep:
    """Runs of a method with other values of one parameter of its objective."""

    condition: str
    method: str
    parameter: str
    values: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Experiment:
    """Everything that its numbers depend on; files and defaults in examples/configs/experiments."""

    data: str
    directions: tuple[str, ...]
    teacher: Pretraining
    student: Pretraining
    conditions: dict[str, Condition]
    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    baseline: str = "forward_kd"
    sweeps: tuple[Sweep, ...] = ()
    prompt: str = "tiny"
    max_length: int = 128
    vocab: int = 4000
    test: str = "test"
    valid: str = "valid"
    train_limit: int | None = None
    test_limit: int | None = None
    valid_limit: int | None = None
    cache_dtype: Literal["fp16", "8bit"] = "fp16"
    cache_tail: Literal["renormalize", "uniform", "bucket"] = "bucket"

    def __post_init__(self) -> None:
        for name in self.conditions:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"conditions must have names of letters, digits, - and _, got {name!r}")
        for sweep in self.sweeps:
            if sweep.condition not in self.conditions:
                raise ValueError(
                    f"sweeps: condition must be one of {', '.join(self.conditions)}, got {sweep.condition!r}"
                )


@dataclass(frozen=True)
class Trial:
    """One distilled student."""

    condition: str
    method: str
    seed: int
    parameter: str | None = None
    value: float | None = None

    @property
    def name(self) -> str:
        """Its folder in the run."""
        sweep = f"~{self.parameter}={self.value:g}" if self.parameter is not None else ""
        return f"{self.condition}/{self.method}{sweep}/seed{self.seed}"


@dataclass(frozen=True)
class Job:
    """A piece of work, done once the jobs it ``needs`` are."""

    name: str
    work: Callable[[], object]
    needs: tuple[str, ...] = field(default=())


class Grid:
    """An experiment in a folder: its jobs, and what they share.

    Args:
        experiment: what to do.
        methods: one for each name that the experiment uses.
        folder: where everything goes; bound to the experiment and methods that it was first made with.

    Raises:
        ValueError: a name without a method, too few sentences, and as ``Run`` and ``load_pairs``.
    """

    def __init__(self, experiment: Experiment, methods: dict[str, Method], folder: str | Path) -> None:
        self.experiment, self.methods = experiment, methods
        used = {trial.method for trial in self.trials} | {experiment.baseline}
        if unknown := sorted(used - methods.keys()):
            raise ValueError(f"methods must have {', '.join(sorted(used))}, missing {', '.join(unknown)}")
        about = {name: dataclasses.asdict(methods[name]) for name in sorted(used)}
        self.run = Run(folder, dataclasses.asdict(experiment) | {"method_settings": about})
        self.template = get_prompt(experiment.prompt)

    @cached_property
    def trials(self) -> list[Trial]:
        """Every distillation: seeds outermost, so that a grid in progress has whole tables."""
        e = self.experiment
        found = [
            Trial(condition, method, seed)
            for seed in sorted({s for c in e.conditions.values() for s in c.seeds or e.seeds})
            for condition, c in e.conditions.items()
            if seed in (c.seeds or e.seeds)
            for method in c.methods or e.methods
        ]
        found += [
            Trial(s.condition, s.method, seed, s.parameter, value)
            for s in e.sweeps
            for seed in s.seeds
            for value in s.values
            if getattr(self.methods[s.method].spec.objective, s.parameter) != value
        ]
        return found

    def jobs(self) -> list[Job]:
        """In an order in which one process can do them."""
        cached = sorted({k for t in self.trials if (k := self.methods[t.method].cache_k) is not None})
        conditions = sorted({(t.condition, t.seed) for t in self.trials if self.methods[t.method].cache_k is not None})
        jobs = [Job(name, partial(self._pretrain, name)) for name in ("teacher", "student")]
        jobs += [
            Job(f"cache/{condition}/seed{seed}/k{k}", partial(self._cache, condition, seed, k), ("teacher",))
            for condition, seed in conditions
            for k in cached
        ]
        for trial in self.trials:
            method = self.methods[trial.method]
            needs = ["student"] if self.experiment.conditions[trial.condition].start == "student" else []
            if method.spec.objective.spec.divergence is not None:
                needs.append("teacher")
            if method.cache_k is not None:
                needs.append(f"cache/{trial.condition}/seed{trial.seed}/k{method.cache_k}")
            jobs.append(Job(trial.name, partial(self._distil, trial), tuple(needs)))
        return jobs

    def done(self, job: str) -> bool:
        return (self.run.stage(job) / "done").exists()

    def work(self, tell: Callable[[Job, int, int], None] = lambda job, done, total: None) -> Iterator[Job]:
        """Do what is left, yielding each job that this process finished; returns when all are done."""
        jobs = {job.name: job for job in self.jobs()}
        self.check()

        def do(job: Job) -> None:
            tell(job, sum(map(self.done, jobs)), len(jobs))
            job.work()
            (self.run.stage(job.name) / "done").touch()

        everything = list(jobs.values())
        yield from share(
            self.run,
            lambda: everything,
            done=lambda job: self.done(job.name),
            needs=lambda job: [jobs[name] for name in job.needs],
            do=do,
        )

    def check(self) -> None:
        """Raise ``ValueError`` unless data and models are there, and those that the folder was made with."""
        e = self.experiment
        self.run.bind(teacher=model_content(e.teacher.model), student=model_content(e.student.model))
        _ = self.train, self.tests

    @cached_property
    def train(self) -> dict[str, list[Pair]]:
        e = self.experiment
        pairs = load_directions(e.data, "train", e.directions, limit=e.train_limit)
        most = max(c.sentences for c in e.conditions.values())
        if most >= min(map(len, pairs.values())):
            shortest = min(map(len, pairs.values()))
            raise ValueError(f"sentences must be below the {shortest} training pairs of a direction, got {most}")
        self.run.bind(train=fingerprint(pairs))
        return pairs

    @cached_property
    def tests(self) -> dict[str, list[Pair]]:
        """The test set of each direction."""
        e = self.experiment
        pairs = load_directions(e.data, e.test, e.directions, limit=e.test_limit)
        self.run.bind(test=fingerprint(pairs))
        return pairs

    @cached_property
    def valid(self) -> PairDataset:
        e = self.experiment
        pairs = load_directions(e.data, e.valid, e.directions, limit=e.valid_limit)
        self.run.bind(valid=fingerprint(pairs))
        return self._rows(pairs)

    @cached_property
    def tokenizer(self) -> Any:
        names = [self.experiment.teacher.model, self.experiment.student.model]
        with self.run.lock("tokenizer"):
            texts = training_texts(self.template, self.train)
            return shared_tokenizer(names, self.run.stage("tokenizer"), texts, self.experiment.vocab)

    def model(self, name: str, seed: int = 0) -> Any:
        """A stage's model, or a fresh one by preset, path or hub name."""
        own = name in {"teacher", "student", *(trial.name for trial in self.trials)}
        where = self.run.stage(name) / "model" if own else name
        return load_model(where, self.tokenizer, seed, dtype=torch.float32)

    def distillation_rows(self, condition: str, seed: int) -> PairDataset:
        c = self.experiment.conditions[condition]
        return self._rows({d: misalign(pairs[-c.sentences :], c.noise, seed) for d, pairs in self.train.items()})

    def _rows(self, pairs: dict[str, list[Pair]]) -> PairDataset:
        return tokenize_directions(self.tokenizer, self.template, pairs, self.experiment.max_length)

    def _pretrain(self, name: str) -> None:
        plan: Pretraining = getattr(self.experiment, name)
        held = max(c.sentences for c in self.experiment.conditions.values() if c.start == "student")
        # the teacher has seen the distillation sets, the student has not
        pairs = self.train if name == "teacher" else {d: p[:-held] for d, p in self.train.items()}
        settings = Settings(plan.epochs, plan.learning_rate, batch_size=plan.batch)
        fresh = lambda: self.model(plan.model, seed=int(name == "student"))  # noqa: E731
        train_stage(self.run, name, fresh, None, parse_objective("sft"), self._rows(pairs), self.tokenizer, settings)
        translate_stage(self.run, name, self.tests, self.template, self.tokenizer)

    def _cache(self, condition: str, seed: int, k: int) -> None:
        write_cache(
            self.run.stage(f"cache/{condition}/seed{seed}/k{k}") / "lists",
            self.model("teacher"),
            self.tokenizer,
            self.distillation_rows(condition, seed),
            k=k,
            dtype=self.experiment.cache_dtype,
            template=self.template.name,
        )

    def _distil(self, trial: Trial) -> None:
        c, method = self.experiment.conditions[trial.condition], self.methods[trial.method]
        rows, spec = self.distillation_rows(trial.condition, trial.seed), method.spec
        fresh = c.start == "scratch"
        start = self.experiment.student.model if fresh else "student"
        student: Callable[[], Any] = lambda: self.model(start, seed=trial.seed)  # noqa: E731
        if trial.parameter is not None:
            changed = dataclasses.replace(spec.objective, **{trial.parameter: trial.value})
            spec = dataclasses.replace(spec, objective=changed)
        if method.gamma_quantile is not None:
            models = student(), self.model("teacher")
            changed = with_quantile_gamma(spec.objective, method.gamma_quantile, *models, rows, self.tokenizer)
            spec = dataclasses.replace(spec, objective=changed)
        settings = Settings(c.epochs, c.learning_rate, batch_size=c.batch, seed=trial.seed, select=method.select)
        teacher: Callable[[], Any] = lambda: self.model("teacher")  # noqa: E731
        data: Any = rows
        if method.cache_k is not None:
            folder = self.run.stage(f"cache/{trial.condition}/seed{trial.seed}/k{method.cache_k}") / "lists"
            cache = TeacherCache(folder, tail=self.experiment.cache_tail)
            cache.check(tokenizer=self.tokenizer, rows=rows, template=self.template.name)
            teacher, data = lambda: cache, cache.rows(rows)
        valid = self.valid if method.select == "best" else None
        train_stage(self.run, trial.name, student, teacher, spec, data, self.tokenizer, settings, valid)
        translate_stage(self.run, trial.name, self.tests, self.template, self.tokenizer)


def load_methods(folder: str | Path) -> dict[str, Method]:
    """One method a YAML file of ``folder``, by the file's stem."""
    return {path.stem: load_config(Method, [path]) for path in sorted(Path(folder).glob("*.yaml"))}
