"""Train one model: SFT or any distillation, in one process or under accelerate.

    python examples/train.py examples/configs/paper.yaml examples/configs/tiny.yaml examples/configs/methods/sft.yaml \
        --student tiny-teacher --output runs/teacher
    accelerate launch --config_file examples/accelerate/zero3.yaml examples/train.py examples/configs/paper.yaml \
        examples/configs/methods/self_evolution.yaml --data PATH --teacher runs/teacher/model --output runs/student

Options are those below and all of transformers.TrainingArguments; later files and flags override earlier ones; --show
prints the result. The same command resumes. The model is in OUTPUT/model; examples/evaluate.py translates with it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

import torch
import yaml
from accelerate import PartialState
from transformers import TrainingArguments, set_seed
from transformers.utils import logging

from fused_kd.integrations.parts import thresholded_part
from fused_kd.integrations.precision import trained_in_float32
from fused_kd.options import statistics_columns
from fused_kd.serving import ServedTeacher
from fused_kd.training.collate import Collator, PackingCollator, padding_id
from fused_kd.training.data import load_directions, load_instructions, parse_direction
from fused_kd.training.difficulty import with_quantile_gamma
from fused_kd.training.fingerprints import fingerprint_rows
from fused_kd.training.fit import DEFAULTS, best_checkpoint, finished, fit
from fused_kd.training.models import LoRA, load_model, model_content, shared_tokenizer, threads_for, with_adapters
from fused_kd.training.prompts import (
    concatenate,
    get_prompt,
    render_sample,
    tokenize_directions,
    tokenize_instructions,
    training_texts,
)
from fused_kd.training.script import make_console, parse, run_script
from fused_kd.training.shards import INDEX, read_index
from fused_kd.training.specs import parse_objective
from fused_kd.training.stage import bind, fingerprint
from fused_kd.training.teacher_cache import TeacherCache
from fused_kd.training.trainer import BetaSchedule, KDTrainer

CACHE = "cache:"
SERVED = ("http://", "https://")
# the paper's (Song et al., 2025), of transformers.TrainingArguments; it does not give the scheduler
PAPER = {
    "learning_rate": 2e-5, "num_train_epochs": 3, "warmup_steps": 0.03, "weight_decay": 0.0,
    "lr_scheduler_type": "cosine", "per_device_train_batch_size": 4,
}  # fmt: skip
# what of TrainingArguments may change between a training and its resumption
FREE = ("output_dir", "use_cpu", "report_to", "run_name", "project", "disable_tqdm", "local_rank", "fsdp", "deepspeed")
FREE_PREFIXES = (
    "logging_",
    "log_",
    "save_",
    "hub_",
    "push_to_hub",
    "dataloader_",
    "ddp_",
    "trackio_",
    "fsdp_",
    "eval_",
)


@dataclass
class Train:
    """What is trained on what; how it is trained is in transformers.TrainingArguments."""

    output: str  # folder of the result
    data: str  # builtin, a JSON(L)(.gz) file, a folder of them, the prefix of two text files, or a hub name
    student: str  # a preset, path or hub name
    objective: str  # name, name:key=value,... or a sum of them: 0.5*sft+0.5*forward_kd
    directions: list[str] = field(default_factory=lambda: ["en-de"])  # all of them in one training set
    instructions: str | None = None  # Alpaca JSON or JSONL whose rows are added
    method: str | None = None  # the name shown; default: the objective
    # as the student, or cache:FOLDER of lists or hidden states, or http://HOST:PORT of a server; not needed for SFT
    teacher: str | None = None
    teacher_token_file: str | None = None  # a file with the token of a teacher's server
    teacher_patience: float | None = None  # seconds for which a server that is away is waited for; null: 600
    valid_teacher: str | None = None  # cache:FOLDER of the validation rows, where the teacher is a cache
    beta_schedule: dict | None = None  # moves β: start, end, fraction, hold
    select: Literal["last", "best"] = "last"  # the kept checkpoint; the best by the loss on validation rows
    gamma_quantile: float | None = None  # Γ: this quantile of the tokens' difficulties before the first step
    prompt: str = "paper"  # or alpaca, tiny
    max_length: int = 512  # tokens of prompt and response
    global_batch: int | None = 128  # sentences an optimizer step; null: as gradient_accumulation_steps says
    packing: bool = False  # rows end to end without padding, each blind to the others
    average: Literal["tokens", "sequences"] = "tokens"  # what the loss is the mean over
    statistics: list[str] = field(default_factory=list)  # logged too: kl, entropy_t, top_1, ... (KDLoss.evaluate)
    lora: dict | None = None  # adapters on the student's body: r, alpha, dropout, target_modules
    temperature: float = 1.0
    memory_budget: int | None = None  # bytes for the loss's buffers
    backend: str | None = None  # torch, triton, cuda or native
    train_limit: int | None = None  # pairs of each direction
    valid_limit: int | None = None
    skip_bad: bool = False  # leave bad rows out, with a warning that counts them
    vocab: int = 4000  # tokens of the tokenizer trained where both models are presets
    attn_implementation: str | None = None  # sdpa, flash_attention_2, ...; null lets transformers choose
    dtype: str = "auto"  # of loaded models; a student in half precision is trained in float32, bf16 computes so
    cache_tail: Literal["renormalize", "uniform", "bucket", "listed"] | None = None  # what lists lack; null: bucket
    show: bool = False  # print the options and stop

    def __post_init__(self) -> None:
        for direction in self.directions:
            parse_direction(direction)
        if not self.directions:
            raise ValueError("directions must name at least one direction, got none")
        spec = parse_objective(self.objective, BetaSchedule(**self.beta_schedule) if self.beta_schedule else None)
        self.spec, self.template = spec, get_prompt(self.prompt)
        if not spec.objective.spec.needs_teacher:
            self.teacher = None
        elif self.teacher is None:
            raise ValueError(f"teacher must be given for objective={self.objective!r}")
        self.cached = _folder_of(self.teacher)
        self.valid_cached = _folder_of(self.valid_teacher)
        self.served = self.teacher is not None and self.teacher.startswith(SERVED)
        if (meant := _form_meant(self.teacher)) is not None:
            raise ValueError(f"teacher must say what it is: {meant}, got {self.teacher!r}")
        for name in ("teacher_token_file", "teacher_patience"):
            if getattr(self, name) is not None and not self.served:
                raise ValueError(f"{name} needs a teacher at http://HOST:PORT, got teacher={self.teacher!r}")
        if self.teacher_patience is not None and not 0 <= self.teacher_patience < math.inf:
            raise ValueError(f"teacher_patience must be seconds, at least 0, got {self.teacher_patience}")
        if (self.valid_cached is None) != (self.valid_teacher is None) or (self.valid_cached and not self.cached):
            raise ValueError(f"valid_teacher must be cache:FOLDER, beside such a teacher, got {self.valid_teacher!r}")
        if self.gamma_quantile is not None:
            thresholded_part(spec.objective)
        if (self.cached is not None or self.served) and self.gamma_quantile is not None:
            raise ValueError(f"gamma_quantile needs an online teacher in this process, got teacher={self.teacher!r}")
        statistics_columns(tuple(self.statistics), None, spec.objective.spec)
        if self.statistics and self.cached is not None and not self.keeps_states:
            raise ValueError(f"statistics need an online teacher or one's states, got teacher={self.teacher!r}")
        here = self.teacher is not None and self.cached is None and not self.served
        self.models = [self.student, *([self.teacher] if here else [])]

    @property
    def keeps_states(self) -> bool:
        """Whether the teacher is a cache of hidden states."""
        index = None if self.cached is None else read_index(Path(self.cached))
        return index is not None and index["keep"] == "hidden"

    def load(self, name: str, tokenizer: Any, seed: int) -> Any:
        attention = {"attn_implementation": self.attn_implementation} if self.attn_implementation else {}
        return load_model(name, tokenizer, seed, dtype=self.dtype, **attention)

    def connect(self) -> ServedTeacher | None:
        """The server that is the teacher, if it is one."""
        if not self.served:
            return None
        token = None if self.teacher_token_file is None else Path(self.teacher_token_file).read_text().strip()
        patience = {} if self.teacher_patience is None else {"patience": self.teacher_patience}
        return ServedTeacher(self.teacher, token=token, **patience)


def _folder_of(teacher: str | None) -> str | None:
    return teacher[len(CACHE) :] if teacher is not None and teacher.startswith(CACHE) else None


def _form_meant(teacher: str | None) -> str | None:
    """How a cache or a server that was named as if it were a model is named."""
    if teacher is None or teacher.startswith((CACHE, *SERVED)):
        return None
    if (Path(teacher) / INDEX).is_file() and not (Path(teacher) / "config.json").is_file():
        return f"{CACHE}{teacher} for the cache in this folder"
    if re.fullmatch(r"[\w.-]+:\d+/?|\[[\da-fA-F:]+\]:\d+/?", teacher) and not Path(teacher).exists():
        return f"http://{teacher} for a server"
    return None


def opened(folder: str, rows: Any, data: str, tokenizer: Any, train: Train, verify: bool) -> tuple[TeacherCache, Any]:
    """A cache that was made for these rows, of which ``data`` is the fingerprint, and the rows with what it holds."""
    cache = TeacherCache(folder, tail=train.cache_tail, verify=verify)
    return cache, cache.check(tokenizer=tokenizer, rows=rows, template=train.template.name, data=data)


def settle(train: Train, args: TrainingArguments) -> dict[str, Any]:
    """Fill in what follows from both; what the output folder is bound to."""
    args.output_dir = str(Path(train.output) / "checkpoints")
    if train.global_batch is not None:
        together = args.per_device_train_batch_size * args.world_size
        if train.global_batch % together:
            raise ValueError(
                f"global_batch must be a multiple of per_device_train_batch_size x processes = "
                f"{args.per_device_train_batch_size} x {args.world_size}, got {train.global_batch}"
            )
        args.gradient_accumulation_steps = train.global_batch // together
    if train.keeps_states and args.dataloader_num_workers == 0:
        args.dataloader_num_workers = 1  # it reads the next batch while a step computes
    if train.select == "best":
        for name, value in best_checkpoint(args.num_train_epochs).items():
            setattr(args, name, value)
    if train.cached is not None and args.eval_strategy != "no" and train.valid_cached is None:
        raise ValueError("valid_teacher must be cache:FOLDER, the cache of the validation rows, or eval_strategy no")
    how = {
        name: value for name, value in args.to_dict().items() if name not in FREE and not name.startswith(FREE_PREFIXES)
    }
    if train.global_batch is not None:
        del how["gradient_accumulation_steps"]
    # a server may move
    left_out = (
        "output",
        "show",
        "method",
        "teacher_token_file",
        "teacher_patience",
        *(["teacher"] if train.served else []),
    )
    return {**{k: v for k, v in dataclasses.asdict(train).items() if k not in left_out}, **how}


def main(argv: list[str] | None = None) -> dict | None:
    cpu = {} if torch.accelerator.is_available() else {"use_cpu": True}  # else processes on CPUs would not meet
    train, args = parse((Train, TrainingArguments), argv, defaults={**DEFAULTS, **PAPER, **cpu}, description=__doc__)
    bound = settle(train, args)
    state = PartialState()
    console = make_console(quiet=not state.is_main_process)
    if train.show:
        console.print(yaml.safe_dump(bound, sort_keys=False, allow_unicode=True))
        return None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if (threads := threads_for(train.models)) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    output, spec, template, seed = Path(train.output), train.spec, train.template, args.seed

    limits = {"train": train.train_limit, "valid": train.valid_limit}
    pairs = {
        split: load_directions(train.data, split, train.directions, limit=limit, skip_bad=train.skip_bad)
        for split, limit in limits.items()
        if split == "train" or args.eval_strategy != "no"
    }
    with state.main_process_first():
        texts = training_texts(template, pairs["train"])
        tokenizer = shared_tokenizer(train.models, output / "tokenizer", texts, train.vocab)
    rows = {split: tokenize_directions(tokenizer, template, found, train.max_length) for split, found in pairs.items()}
    if train.instructions is not None:
        found = load_instructions(train.instructions, "train", limit=train.train_limit, skip_bad=train.skip_bad)
        rows["train"] = concatenate([rows["train"], tokenize_instructions(tokenizer, found, train.max_length)])
    data_of = {split: fingerprint_rows(found) for split, found in rows.items()}
    contents = {f"{split} rows": found for split, found in data_of.items()}
    contents["student's content"] = model_content(train.student)
    served = train.connect()
    if served is not None:
        contents["teacher's content"] = served.about["identity"]
    elif train.teacher:
        index = fingerprint(read_index(Path(train.cached))) if train.cached else model_content(train.teacher)
        contents["teacher's content"] = index
    if train.valid_cached:
        contents["validation teacher's content"] = fingerprint(read_index(Path(train.valid_cached)))
    bind(output, {**bound, **contents})
    if (record := finished(output)) is not None:
        console.print(f"finished: model in {output / 'model'}", soft_wrap=True)
        return record
    console.print(f"{rows['train']}; the first:\n{render_sample(tokenizer, rows['train'][0])}")
    console.print(
        f"global batch {args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps} = "
        f"{args.world_size} processes x {args.per_device_train_batch_size} sentences x "
        f"{args.gradient_accumulation_steps} steps"
    )

    objective, data, teacher = spec.objective, rows["train"], None
    if train.cached is not None:
        verify = state.is_main_process  # once is enough
        teacher, data = opened(train.cached, data, data_of["train"], tokenizer, train, verify)
        console.print(f"{teacher}")
        if train.valid_cached is not None and "valid" in rows:
            found, own = rows["valid"], data_of["valid"]
            other, rows["valid"] = opened(train.valid_cached, found, own, tokenizer, train, verify)
            teacher.check_head(other)
    elif served is not None:
        teacher = served
        console.print(f"{teacher}")
    elif train.teacher is not None:
        teacher = train.load(train.teacher, tokenizer, seed)
    student = train.load(train.student, tokenizer, seed)
    if train.gamma_quantile is not None:
        objective = with_quantile_gamma(objective, train.gamma_quantile, student, teacher, rows["train"], tokenizer)
        console.print(
            f"Γ = {thresholded_part(objective).gamma:.4f}: the {train.gamma_quantile:g} quantile of the difficulties"
        )
    if train.lora is not None:
        set_seed(seed)
        student = with_adapters(student, LoRA(**train.lora), "CAUSAL_LM")
    trainer = KDTrainer(
        trained_in_float32(student),
        teacher,
        objective,
        temperature=train.temperature,
        memory_budget=train.memory_budget,
        backend=train.backend,
        beta_schedule=spec.beta_schedule,
        average=train.average,
        statistics=train.statistics,
        args=args,
        train_dataset=data,
        eval_dataset=rows.get("valid"),
        data_collator=PackingCollator() if train.packing else Collator(padding_id(tokenizer)),
        processing_class=tokenizer,
    )
    record = fit(trainer, output, train.method or train.objective)
    console.print(f"{objective!r}: {record['steps']} steps, model in {output / 'model'}")
    return record


if __name__ == "__main__":
    run_script(main)
