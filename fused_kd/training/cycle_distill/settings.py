"""What a CycleDistill run depends on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fused_kd.training.cycle_distill.few_shot import MAX_SHOTS, get_template
from fused_kd.training.cycle_distill.filters import Filters
from fused_kd.training.data.pairs import parse_direction
from fused_kd.training.generation import Decoding
from fused_kd.training.lora import LoRA
from fused_kd.training.presets import PRESETS
from fused_kd.training.specs import ObjectiveSpec, parse_objective

Variant = Literal["hard", "soft", "soft_self_evolution"]


@dataclass(frozen=True)
class Pretraining:
    """How a preset with random weights becomes a base that translates poorly: plain text of both languages and the few
    pairs, ``document`` of them one after another as a web page would have them. In each epoch every sentence comes
    once, every pair ``repeats`` times, each time among others. ``plain`` is the most sentences of the target language;
    None takes all."""

    epochs: float
    learning_rate: float
    batch_size: int = 64
    document: int = 3
    repeats: int = 1
    plain: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "document", "repeats", "plain"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")


@dataclass(frozen=True)
class Training:
    """One fine-tuning: ``steps`` of ``batch_size`` x ``accumulation`` rows.

    A share ``held_out`` of the rows is not trained on; with ``select`` "best" the checkpoint with the lowest loss on
    them is kept.
    """

    steps: int
    batch_size: int
    accumulation: int = 1
    held_out: float = 0.0
    select: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if not 0 <= self.held_out < 1 or (self.select == "best" and self.held_out == 0):
            raise ValueError(
                f"held_out={self.held_out!r}, select={self.select!r}: expected a share in [0, 1), above 0 for 'best'"
            )


@dataclass(frozen=True)
class CycleDistill:
    """Everything that the numbers depend on. Defaults are the paper's or its public code's (arXiv 2506.19952).

    Args:
        data: parallel text as of ``load_pairs``, with the splits "train", ``valid`` and ``test``.
        direction: such as "en-hi".
        model: the base, a path or hub name; or a preset, with ``pretrain``.
        monolingual: source sentences: a text file of one a line, or JSON or a hub data set with the language's code or
            "text" as a column. None (default): the source side of ``data``'s training rows after the pairs, whose
            references only the ceiling sees.
        sentences: at most so many of them.
        pairs: the few real pairs: the first rows of the training split.
        shots: so many of them, the first, are examples in every prompt, 0 to 4. The rest trains the control, and goes
            into every iteration with ``keep_parallel``.
        variants: "hard" (cross-entropy), "soft" ((1-alpha) CE + alpha KL), "soft_self_evolution".
        iterations: at most so many; with ``stop`` an arm ends after the first that does not raise chrF on the valid
            split.
        restart_from_base: every iteration trains the base instead of the model that translated.
        control: also train the base on the few real pairs, as many steps. ceiling: on the same sentences with their
            real references.
        k, lists: entries of each generated token's list and how they are stored, "fp16" or "8bit".
        self_evolution: that variant's objective; its lam is ``alpha``.
        warmup: steps; below 1 a share of them.
        generation_batch, max_new_tokens: of every greedy decoding.
        max_length: tokens of a training row.
        valid, test: splits to score on; ``valid_limit``, ``test_limit``: at most so many rows.
        vocab: tokens of the tokenizer that is trained for a preset.
        bootstrap: samples of the paired bootstrap on the test set; 0 leaves it out.
        samples: translations shown an iteration.

    Raises:
        ValueError: a value out of range, a name that is unknown, a preset without ``pretrain`` or the reverse.
    """

    data: str
    direction: str
    model: str
    pretrain: Pretraining | None = None
    monolingual: str | None = None
    sentences: int = 20_000
    pairs: int = 100
    shots: int = 4
    prompt: str = "cycle_distill"
    variants: tuple[Variant, ...] = ("hard", "soft")
    iterations: int = 3
    stop: bool = True
    restart_from_base: bool = False
    keep_parallel: bool = False
    control: bool = True
    ceiling: bool = True
    hard: Training = field(default_factory=lambda: Training(100, 1, 8))
    soft: Training = field(default_factory=lambda: Training(120, 2, 16, held_out=0.2, select="best"))
    alpha: float = 0.5
    k: int = 20
    lists: Literal["fp16", "8bit"] = "fp16"
    self_evolution: str = "self_evolution:gamma=0.4,beta=0.5"
    learning_rate: float = 2e-4
    warmup: float = 5
    weight_decay: float = 0.01
    scheduler: str = "linear"
    lora: LoRA | None = None
    filters: Filters = field(default_factory=Filters)
    generation_batch: int = 32
    max_new_tokens: int = 64
    max_length: int = 1024
    valid: str = "valid"
    test: str = "test"
    valid_limit: int | None = None
    test_limit: int | None = None
    vocab: int = 2000
    seeds: tuple[int, ...] = (0,)
    dtype: str = "auto"
    bf16: bool = False
    gradient_checkpointing: bool = False
    bootstrap: int = 1000
    samples: int = 4

    def __post_init__(self) -> None:
        parse_direction(self.direction)
        get_template(self.prompt)
        for name in ("sentences", "iterations", "k", "generation_batch", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if not 0 <= self.shots <= min(MAX_SHOTS, self.pairs):
            raise ValueError(
                f"shots must be in [0, {MAX_SHOTS}] and at most pairs, got shots={self.shots!r}, pairs={self.pairs!r}"
            )
        if not self.variants or len(set(self.variants)) < len(self.variants):
            raise ValueError(f"variants must name at least one, each once, got {self.variants!r}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must have at least one, each once, got {self.seeds!r}")
        if (self.control or self.keep_parallel) and self.pairs == self.shots:
            raise ValueError(
                f"pairs={self.pairs!r} are all examples with shots={self.shots!r}: control and keep_parallel "
                "need more, or false"
            )
        if (self.pretrain is None) == (self.model in PRESETS):
            needed = "needs" if self.pretrain is None else "has no place for"
            raise ValueError(f"model={self.model!r} {needed} pretrain: only a preset ({', '.join(PRESETS)}) is trained")
        if self.pretrain is not None and self.monolingual is not None:
            raise ValueError(f"monolingual={self.monolingual!r}: with pretrain the plain text comes from data")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha!r}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate!r}")
        for variant in ("hard", "soft", "soft_self_evolution"):
            self.spec(variant)

    @property
    def soft_lists(self) -> int | None:
        """Entries of each token's list where any variant asks for lists."""
        return self.k if any(variant != "hard" for variant in self.variants) else None

    @property
    def has_references(self) -> bool:
        """Whether there is a ceiling to train."""
        return self.ceiling and self.monolingual is None

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.generation_batch, self.max_new_tokens)

    def spec(self, arm: str) -> ObjectiveSpec:
        """The objective of a variant; of the other arms, which have no teacher, cross-entropy."""
        if arm == "soft":
            return parse_objective(f"forward_kd:lam={self.alpha}")
        if arm == "soft_self_evolution":
            between = "," if ":" in self.self_evolution else ":"
            return parse_objective(f"{self.self_evolution}{between}lam={self.alpha}")
        return parse_objective("sft")

    def training(self, arm: str) -> Training:
        return self.soft if arm.startswith("soft") else self.hard

    def some(self, *names: str) -> dict[str, Any]:
        """These settings by name, for a stage that depends on them."""
        return {name: getattr(self, name) for name in names}
