"""Options of ``examples/train.py`` beside those of ``transformers.TrainingArguments``, and what follows from both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from transformers import TrainingArguments

from fused_kd.integrations.parts import thresholded_part
from fused_kd.options import statistics_columns
from fused_kd.training.data import parse_direction
from fused_kd.training.fit import best_checkpoint
from fused_kd.training.models import LoRA
from fused_kd.training.named_teachers import CACHE, parse_teachers
from fused_kd.training.prompts import get_prompt
from fused_kd.training.reporting import check_reporters
from fused_kd.training.shards import read_index
from fused_kd.training.specs import parse_objective
from fused_kd.training.stage import check_counts
from fused_kd.training.trainer import BetaSchedule

# TRL's names of these options, and those of other scripts here
ALIASES = {
    "model_name_or_path": "student",
    "teacher_model_name_or_path": "teacher",
    "dataset_name": "data",
    "dataset_streaming": "streaming",
    "dataset_train_split": "split",
    "dataset_test_split": "eval_split",
    "direction": "directions",
    "output_dir": "output",
    "max_seq_length": "max_length",
    "chat_template_path": "chat_template",
    "torch_dtype": "dtype",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
}
# of transformers.TrainingArguments; the paper's (Song et al., 2025), which does not give the scheduler
TRAINING = {
    "learning_rate": 2e-5, "num_train_epochs": 3, "warmup_steps": 0.03, "weight_decay": 0.0,
    "lr_scheduler_type": "cosine", "per_device_train_batch_size": 4,
}  # fmt: skip
# what may change between a training and its resumption
_FREE = (
    "output", "show", "dry_run", "method", "teacher_token_file", "teacher_patience",
    "output_dir", "use_cpu", "report_to", "run_name", "project", "disable_tqdm", "local_rank", "fsdp", "deepspeed",
)  # fmt: skip
_FREE_PREFIXES = ("logging_", "log_", "save_", "hub_", "push_to_hub", "dataloader_", "ddp_", "trackio_", "fsdp_")
_EVALUATED = ("eval_data", "eval_split")
_T = TypeVar("_T")


@dataclass
class Train:
    """What is trained on what; how it is trained is in transformers.TrainingArguments."""

    output: str  # folder of the result
    data: str  # a JSON(L), Parquet or CSV file, a folder of them, a hub name, builtin, the prefix of two text files
    student: str  # a preset, path or hub name
    objective: str = "forward_kd"  # name, name:key=value,... or a sum of them: 0.5*sft+0.5*forward_kd
    # a model as the student's, cache:FOLDER of lists or hidden states, http://HOST:PORT of a server, the student itself
    # as own:adapters=false or own:decay=0.999; of several each as WEIGHT*TEACHER; not needed for SFT
    teacher: list[str] = field(default_factory=list)
    format: Literal["auto", "messages", "prompt_completion", "text", "alpaca", "pairs"] = "auto"  # of the rows
    split: str | None = None  # null: train; where there is eval_data, all rows of a file
    dataset_config: str | None = None  # of a hub name
    streaming: bool = False  # rows are read while the training goes on; needs max_steps
    eval_data: str | None = None  # null: the same as data
    eval_split: str | None = None  # null: valid; all rows of a file in eval_data
    chat_template: str | None = None  # a file or the text of a template; null: the tokenizer's
    turns: Literal["all", "last"] = "all"  # of chats, which assistant turns carry loss
    directions: list[str] = field(default_factory=lambda: ["en-de"])  # of translations, all in one training set
    instructions: str | None = None  # Alpaca JSON or JSONL whose rows are added
    method: str | None = None  # the name shown; default: the objective
    teacher_token_file: str | None = None  # a file with the token of a teacher's server
    teacher_patience: float | None = None  # seconds for which a server that is away is waited for; null: 600
    valid_teacher: str | None = None  # cache:FOLDER of the validation rows, where the teacher is a cache
    beta_schedule: dict | None = None  # type: ignore[type-arg]  # moves β: start, end, fraction, hold
    select: Literal["last", "best"] = "last"  # the kept checkpoint; the best by the loss on validation rows
    gamma_quantile: float | None = None  # Γ: this quantile of the tokens' difficulties before the first step
    prompt: str = "paper"  # of translations; or alpaca, tiny
    max_length: int = 1024  # tokens of prompt and response
    # rows an optimizer step; null: per_device_train_batch_size x gradient_accumulation_steps x processes
    global_batch: int | None = None
    packing: bool = False  # rows end to end without padding, each blind to the others
    average: Literal["tokens", "sequences"] = "tokens"  # what the loss is the mean over
    statistics: list[str] = field(default_factory=list)  # logged too: kl, entropy_t, top_1, ... (KDLoss.evaluate)
    use_peft: bool | None = None  # adapters on the student's body; null: where lora is given
    lora: dict | None = None  # type: ignore[type-arg]  # their r, alpha, dropout, target_modules
    temperature: float = 1.0
    memory_budget: int | None = None  # bytes for the loss's buffers
    backend: str | None = None  # torch, triton, cuda or native
    train_limit: int | None = None  # rows, of translations pairs of each direction
    valid_limit: int | None = None
    skip_bad: bool = False  # leave bad rows out, with a warning that counts them
    vocab: int = 4000  # tokens of the tokenizer trained where both models are presets
    attn_implementation: str | None = None  # sdpa, flash_attention_2, ...; null lets transformers choose
    dtype: str = "auto"  # of loaded models; a student in half precision is trained in float32, bf16 computes so
    cache_tail: Literal["renormalize", "uniform", "bucket", "listed"] | None = None  # what lists lack; null: bucket
    show: bool = False  # print the options and stop
    # true: print what would be trained and what memory it would take, and stop; step: also run one step and measure
    dry_run: Literal["false", "true", "step"] = "false"

    def __post_init__(self) -> None:
        for direction in self.directions:
            parse_direction(direction)
        if not self.directions:
            raise ValueError("directions must name at least one direction, got none")
        self.schedule = made_of(BetaSchedule, "beta_schedule", self.beta_schedule)
        self.spec, self.template = parse_objective(self.objective, self.schedule), get_prompt(self.prompt)
        if self.use_peft is not None:
            self.lora = (self.lora or {}) if self.use_peft else None
        self.adapters = made_of(LoRA, "lora", self.lora)
        for name in ("max_length", "train_limit", "valid_limit", "global_batch"):
            if getattr(self, name) is not None:
                check_counts(**{name: getattr(self, name)})
        if self.dataset_config is not None and ":" not in self.data:
            self.data, self.dataset_config = f"{self.data}:{self.dataset_config}", None
        given = [text for text in self.teacher if text not in ("null", "")]
        needed = self.spec.objective.spec.needs_teacher
        if needed and not given:
            raise ValueError(f"teacher must be given for objective={self.objective!r}; plain fine-tuning is sft")
        self.teachers = parse_teachers(given if needed else [])
        self.teacher = [teacher.text for teacher in self.teachers]
        self._check_teachers()
        self.models = [self.student, *(teacher.place for teacher in self.of_kind("model"))]

    def of_kind(self, kind: str) -> list[Any]:
        """The :class:`fused_kd.training.named_teachers.NamedTeacher` of a kind: "model", "cache", "server", "own"."""
        return [teacher for teacher in self.teachers if teacher.kind == kind]

    def source_of(self, part: str) -> tuple[str, str]:
        """Where the rows of "train" and "valid" come from: a source and a split of it."""
        learned = part == "train"
        source = self.data if learned or self.eval_data is None else self.eval_data
        given = self.split if learned else self.eval_split
        whole = self.eval_data is not None and Path(source).is_file()
        return source, given or ("all" if whole else part)

    def _check_teachers(self) -> None:
        shown = " ".join(self.teacher) or None
        caches, served = self.of_kind("cache"), self.of_kind("server")
        for name in ("teacher_token_file", "teacher_patience"):
            if getattr(self, name) is not None and not served:
                raise ValueError(f"{name} needs a teacher at http://HOST:PORT, got teacher={shown!r}")
        if self.teacher_patience is not None and not 0 <= self.teacher_patience < math.inf:
            raise ValueError(f"teacher_patience must be seconds, at least 0, got {self.teacher_patience}")
        if self.valid_teacher is not None and not (self.valid_teacher.startswith(CACHE) and len(caches) == 1):
            raise ValueError(f"valid_teacher must be cache:FOLDER, beside such a teacher, got {self.valid_teacher!r}")
        if self.gamma_quantile is not None:
            thresholded_part(self.spec.objective)
            if [teacher.kind for teacher in self.teachers] != ["model"]:
                raise ValueError(f"gamma_quantile needs an online teacher in this process, got teacher={shown!r}")
        statistics_columns(tuple(self.statistics), None, self.spec.objective.spec)
        if self.statistics and any(not keeps_states(each.place) for each in caches):
            raise ValueError(f"statistics need an online teacher or one's states, got teacher={shown!r}")
        if self.streaming and caches:
            raise ValueError(f"streaming must be false with a cache, whose rows are known, got teacher={shown!r}")
        if self.adapters is None and any(each.place == "adapters=false" for each in self.of_kind("own")):
            raise ValueError("teacher must not be own:adapters=false without adapters: give use_peft or lora")


def keeps_states(folder: str) -> bool:
    """Whether a folder is a cache of hidden states."""
    index = read_index(Path(folder))
    return index is not None and index["keep"] == "hidden"


def made_of(cls: type[_T], name: str, given: Mapping[str, Any] | None) -> _T | None:
    """An object of a dataclass whose fields are the keys of the option ``name``; None where that is not given.

    Raises:
        ValueError: an unknown key.
    """
    known = [each.name for each in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if given is not None and (unknown := [key for key in given if key not in known]):
        raise ValueError(f"{name} must have some of {', '.join(known)}, got {', '.join(map(str, unknown))}")
    return None if given is None else cls(**given)


def settle(train: Train, args: TrainingArguments) -> dict[str, Any]:
    """Fill in what follows from both; what the output folder is bound to.

    Raises:
        ValueError: values that are out of range or do not fit each other. ImportError: a reporter's package is missing.
    """
    args.output_dir = str(Path(train.output) / "checkpoints")
    _check_arguments(train, args)
    check_reporters([args.report_to] if isinstance(args.report_to, str) else args.report_to or [])
    if train.global_batch is not None:
        together = args.per_device_train_batch_size * args.world_size
        if train.global_batch % together:
            raise ValueError(
                f"global_batch must be a multiple of per_device_train_batch_size x processes = "
                f"{args.per_device_train_batch_size} x {args.world_size}, got {train.global_batch}"
            )
        args.gradient_accumulation_steps = train.global_batch // together
    if any(keeps_states(cache.place) for cache in train.of_kind("cache")) and args.dataloader_num_workers == 0:
        args.dataloader_num_workers = 1  # it reads the next batch while a step computes
    if train.streaming:
        args.train_sampling_strategy = "random"  # a stream keeps its order
        args.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]  # batches differ in length
    if train.select == "best":
        for name, value in best_checkpoint(args.num_train_epochs).items():
            setattr(args, name, value)
    if train.of_kind("cache") and args.eval_strategy != "no" and train.valid_teacher is None:
        raise ValueError("valid_teacher must be cache:FOLDER, the cache of the validation rows, or eval_strategy no")
    return _bound(train, args)


def _check_arguments(train: Train, args: TrainingArguments) -> None:
    """Raise for values that the Trainer would meet late, or take as they are."""
    check_counts(
        per_device_train_batch_size=args.per_device_train_batch_size,
        per_device_eval_batch_size=args.per_device_eval_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
    )
    if not 0 < args.num_train_epochs < math.inf:
        raise ValueError(f"num_train_epochs must be above 0, got {args.num_train_epochs}")
    for name in ("learning_rate", "weight_decay", "max_grad_norm"):
        if not 0 <= getattr(args, name) < math.inf:
            raise ValueError(f"{name} must be at least 0, got {getattr(args, name)}")
    if not args.warmup_steps >= 0:
        raise ValueError(f"warmup_steps must be at least 0, below 1 a share of the training, got {args.warmup_steps}")
    if train.streaming and args.max_steps < 1:
        raise ValueError(f"streaming needs max_steps, as a stream has no known end, got max_steps={args.max_steps}")
    if train.streaming and args.train_sampling_strategy == "batch_rebalance":
        raise ValueError("train_sampling_strategy must not be batch_rebalance with streaming")


def _bound(train: Train, args: TrainingArguments) -> dict[str, Any]:
    free = {*_FREE, *([] if args.eval_strategy != "no" else _EVALUATED)}
    how = {
        name: value
        for name, value in args.to_dict().items()
        if name not in free and not name.startswith((*_FREE_PREFIXES, "eval_"))
    }
    if train.global_batch is not None:
        del how["gradient_accumulation_steps"]
    own = {name: value for name, value in dataclasses.asdict(train).items() if name not in free}
    # a server may move
    own["teacher"] = ["a server" if each.kind == "server" else each.text for each in train.teachers]
    return {**own, **how}


def as_yaml(bound: Mapping[str, Any]) -> str:
    """What :func:`settle` gives, for people and for a file."""
    return str(yaml.safe_dump(dict(bound), sort_keys=False, allow_unicode=True))
