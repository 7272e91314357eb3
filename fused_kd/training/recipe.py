"""One training as a configuration: data, models, objective, optimisation. What ``examples/train.py`` runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fused_kd.training.beta_schedule import BetaSchedule
from fused_kd.training.data.instructions import load_instructions, tokenize_instructions
from fused_kd.training.data.pairs import Pair, load_directions, parse_direction
from fused_kd.training.data.prompts import PairDataset, PromptTemplate, concatenate, get_prompt, tokenize_directions
from fused_kd.training.lora import LoRA, with_adapters
from fused_kd.training.specs import ObjectiveSpec, parse_objective
from fused_kd.training.stages import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CACHE = "cache:"


@dataclass(frozen=True)
class Recipe:
    """Values of a training; defaults are the paper's (Song et al., 2025) where it gives one.

    Args:
        data: as of ``load_pairs``: a folder, a file, text files' prefix, a hub name, or "builtin".
        directions: all of them in one training set, such as ``("de-en", "en-de")``.
        instructions: Alpaca JSON or JSONL whose rows are added to the training set, as of ``load_instructions``.
        student, teacher: a preset, path or hub name; a teacher may be ``cache:FOLDER``, or None for SFT.
        objective: as of ``parse_objective``.
        method: the name shown; default: the objective's text.
        beta_schedule: moves β; None leaves it to the objective's text.
        select: the kept checkpoint: "last", or the "best" by the loss on validation rows.
        gamma_quantile: Γ is this quantile of the training tokens' difficulties before the first step.
        prompt: a name in ``PROMPTS``.
        max_length: tokens of prompt and response.
        epochs: passes over the training set.
        global_batch: sentences of an optimizer step, over all processes and accumulation steps.
        micro_batch: sentences that a process holds at once.
        learning_rate, warmup, weight_decay, scheduler: of AdamW; ``warmup`` is a share of the steps.
        gradient_checkpointing: recompute activations in the backward.
        packing: rows end to end without padding, each blind to the others.
        average: the loss is the mean over the step's "tokens", or over its "sequences" of each one's mean.
        train_limit, valid_limit: at most this many pairs of each direction.
        skip_bad: leave out bad rows, with a warning that counts them, instead of stopping at the first.
        vocab: tokens of the tokenizer trained where both models are presets.
        attn_implementation: "sdpa", "flash_attention_2" (extra ``flash``), ...; None lets transformers choose.
        dtype: of loaded models, "auto" that of their files; a student whose trained weights are in half precision is
            trained in float32, and ``bf16`` computes in bf16.
        cache_tail: what a cached teacher's list says of the other tokens.
    """

    data: str
    directions: tuple[str, ...]
    student: str
    objective: str
    instructions: str | None = None
    method: str | None = None
    teacher: str | None = None
    beta_schedule: BetaSchedule | None = None
    select: Literal["last", "best"] = "last"
    gamma_quantile: float | None = None
    prompt: str = "paper"
    max_length: int = 512
    epochs: float = 3.0
    global_batch: int = 128
    micro_batch: int = 4
    learning_rate: float = 2e-5
    warmup: float = 0.03
    weight_decay: float = 0.0
    scheduler: str = "cosine"
    seed: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    packing: bool = False
    average: Literal["tokens", "sequences"] = "tokens"
    lora: LoRA | None = None
    temperature: float = 1.0
    memory_budget: int | None = None
    backend: str | None = None
    train_limit: int | None = None
    valid_limit: int | None = None
    skip_bad: bool = False
    vocab: int = 4000
    attn_implementation: str | None = None
    dtype: str = "auto"
    cache_tail: Literal["renormalize", "uniform", "bucket"] = "bucket"

    def __post_init__(self) -> None:
        for direction in self.directions:
            parse_direction(direction)
        if not self.directions:
            raise ValueError("directions must name at least one direction, got none")
        for name in ("global_batch", "micro_batch", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.learning_rate <= 0 or self.epochs <= 0:
            raise ValueError(f"learning_rate and epochs must be above 0, got {self.learning_rate!r}, {self.epochs!r}")
        if self.needs_teacher and self.teacher is None:
            raise ValueError(f"teacher must be given for objective={self.objective!r}")
        get_prompt(self.prompt)

    @property
    def spec(self) -> ObjectiveSpec:
        return parse_objective(self.objective, self.beta_schedule)

    @property
    def needs_teacher(self) -> bool:
        return self.spec.objective.spec.divergence is not None

    @property
    def cached_teacher(self) -> str | None:
        """The folder of a teacher given as ``cache:FOLDER``."""
        return self.teacher[len(CACHE) :] if self.teacher and self.teacher.startswith(CACHE) else None

    @property
    def template(self) -> PromptTemplate:
        return get_prompt(self.prompt)

    @property
    def models(self) -> list[str]:
        """The names of the models that are loaded."""
        loads_teacher = self.needs_teacher and self.cached_teacher is None
        return [self.student, *([str(self.teacher)] if loads_teacher else [])]

    def accumulation(self, processes: int) -> int:
        """Micro-batches of each process that make up one global batch.

        Raises:
            ValueError: ``global_batch`` is no multiple of ``micro_batch * processes``.
        """
        together = self.micro_batch * processes
        if self.global_batch % together:
            raise ValueError(
                f"global_batch must be a multiple of micro_batch x processes = {self.micro_batch} x {processes}, "
                f"got {self.global_batch}"
            )
        return self.global_batch // together

    def settings(self, processes: int) -> Settings:
        """How ``train_stage`` trains in each of so many processes."""
        same = (
            "epochs", "learning_rate", "warmup", "weight_decay", "seed", "bf16", "temperature", "memory_budget",
            "backend", "scheduler", "gradient_checkpointing", "packing", "average",
            "select",
        )  # fmt: skip
        return Settings(
            batch_size=self.micro_batch,
            accumulation=self.accumulation(processes),
            **{name: getattr(self, name) for name in same},
        )

    def pairs(self, split: str, limit: int | None) -> dict[str, list[Pair]]:
        """The parallel text of each direction."""
        return load_directions(self.data, split, self.directions, limit=limit, skip_bad=self.skip_bad)

    def rows(self, tokenizer: PreTrainedTokenizerBase, pairs: dict[str, list[Pair]]) -> PairDataset:
        """All directions as one set."""
        return tokenize_directions(tokenizer, self.template, pairs, self.max_length)

    def training_rows(self, tokenizer: PreTrainedTokenizerBase, pairs: dict[str, list[Pair]]) -> PairDataset:
        """:meth:`rows`, and the instructions after them."""
        rows = self.rows(tokenizer, pairs)
        if self.instructions is None:
            return rows
        found = load_instructions(self.instructions, "train", limit=self.train_limit, skip_bad=self.skip_bad)
        return concatenate([rows, tokenize_instructions(tokenizer, found, self.max_length)])

    def with_adapters(self, model: PreTrainedModel) -> Any:
        """The student with its LoRA adapters, if any."""
        return with_adapters(model, self.lora, "CAUSAL_LM")
