"""The settings of the plane of regimes, and the runs that they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_methods import REGIME_METHODS
from regimes_data import Documents

from fused_kd.training.prompts import get_prompt
from fused_kd.training.script import build, internal, parse


@dataclass(frozen=True)
class Start:
    """How a model comes to be: next-token loss on documents, then SFT on clean pairs with the prompt."""

    pretrain: dict[str, Any]  # TrainingArguments, over those of Config.train
    tune: dict[str, Any] = field(default_factory=dict)
    pairs: int | None = None  # the first so many of each direction that tune sees; None: all that it may see


@dataclass
class Config:
    """Everything that the numbers depend on; of each direction where there is a number of pairs."""

    data: str = "data/multi30k"
    alma: str | None = None  # more parallel text, for the pre-training alone
    directions: list[str] = field(default_factory=lambda: ["de-en", "en-de", "cs-en", "en-cs"])
    test: str = "test_2016_flickr"
    valid: str = "valid"
    train_limit: int | None = None
    alma_limit: int | None = None
    test_limit: int | None = None
    valid_limit: int | None = None
    prompt: str = "paper"
    max_length: int = 160
    max_new_tokens: int = 48
    batch_size: int = 64  # sentences that are translated together
    vocab: int = 4000
    held: int = 1500  # the last pairs: the distillation set, which no student has seen
    documents: dict = field(default_factory=dict)
    teacher: str = "medium-teacher"
    student: str = "tiny-student"
    train: dict = field(default_factory=dict)  # TrainingArguments of every training
    start_teacher: dict = field(default_factory=dict)
    strengths: dict = field(default_factory=dict)  # name: the fields of Start, weakest first
    distil: dict = field(default_factory=dict)  # TrainingArguments of every distillation
    rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3])
    noises: list[float] = field(default_factory=lambda: [0.0, 0.3, 0.6])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    paper: str = "language_model"  # the strength of the paper's regime, where every method is tried
    paper_methods: list[str] = field(default_factory=lambda: list(REGIME_METHODS))
    methods: list[str] = field(
        default_factory=lambda: ["sft", "forward_kd", "skew", "self_evolution", "floor_0.3"]
    )  # of the whole plane

    def __post_init__(self) -> None:
        get_prompt(self.prompt)
        if unknown := sorted({*self.methods, *self.paper_methods} - REGIME_METHODS.keys()):
            raise ValueError(f"methods must be of {', '.join(REGIME_METHODS)}, got {', '.join(unknown)}")
        if self.paper not in self.strengths:
            raise ValueError(f"paper must be one of {', '.join(self.strengths)}, got {self.paper!r}")
        for name in ("rates", "noises", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} must have at least one value")
        self.starts = {name: build(Start, f"strengths.{name}", value) for name, value in self.strengths.items()}
        self.starts["teacher"] = build(Start, "start_teacher", self.start_teacher)
        self.pretraining = build(Documents, "documents", self.documents)


@dataclass
class Running:
    """Where and how; the numbers do not depend on it."""

    output: str = "runs/regimes"
    results: str | None = None  # where results are written, small files alone; default: output
    jobs: int = 1  # processes that share the work; 2 on two cores, 12 on a GPU
    minutes: float | None = None  # no run begins after so long; None: all of them are done
    rehearse: bool = False  # the same path with everything shrunk, on a CPU
    worker: bool = False  # this process is a helper of another one
    until: float | None = internal(None)  # of a helper: the clock's time after which it begins no run


def rehearsed(config: Config) -> Config:
    """The same plane at a size that teaches nothing: random tiny models, two steps a training, a CPU."""
    two = {"max_steps": 2, "per_device_train_batch_size": 4}
    starts = {
        name: value | {key: {**value[key], **two} for key in ("pretrain", "tune") if value.get(key)}
        for name, value in {**config.strengths, "teacher": config.start_teacher}.items()
    }
    small = {"train_limit": 90, "alma_limit": 30, "test_limit": 3, "valid_limit": 3, "held": 8, "max_new_tokens": 6}
    few = {"rates": config.rates[:2], "noises": config.noises[:2], "seeds": config.seeds[:2]}
    models = {"vocab": 500, "teacher": "tiny-student", "student": "tiny-student"}
    return dataclasses.replace(
        config, **small, **few, **models, methods=config.methods[:2], documents=config.documents | {"parallel": 10},
        train=config.train | {"use_cpu": True}, start_teacher=starts.pop("teacher"), strengths=starts,
        distil=config.distil | two,
    )  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One distilled student."""

    strength: str
    noise: float
    method: str
    seed: int
    rate: float | None = None  # None: the chosen one

    def __str__(self) -> str:
        rate = "" if self.rate is None else f".lr{self.rate:g}"
        return f"{self.strength}.noise{self.noise:g}.{self.method}{rate}.seed{self.seed}"


def groups_of(config: Config) -> list[list[Trial]]:
    """The runs that count: seeds outermost, the paper's regime before the plane; the first alone are of use."""
    paper = [(config.paper, config.noises[0], method) for method in config.paper_methods]
    plane = [(s, n, m) for n in config.noises for s in config.strengths for m in config.methods]
    cells = [paper, [cell for cell in plane if cell not in paper]]
    return [[Trial(*cell, seed) for cell in part] for seed in config.seeds for part in cells]


def parse_arguments(argv: Sequence[str] | None = None, description: str | None = None) -> tuple[Config, Running]:
    config, running = parse(
        (Config, Running), argv, configs=Path(__file__).parent / "regimes_presets", description=description
    )
    return (rehearsed(config) if running.rehearse else config), running
