"""Train one model: SFT or any distillation, in one process or under accelerate.

    python examples/train.py --student student --teacher FOLDER --data chat.jsonl --output runs/chat
    accelerate launch --config_file examples/accelerate/zero3.yaml examples/train.py examples/configs/paper.yaml \
        examples/configs/methods/self_evolution.yaml --data PATH --teacher runs/teacher/model --output runs/student

Options are those below and all of transformers.TrainingArguments, from YAML files and flags, later ones overriding
earlier ones; TRL's names of them are taken too. --show prints them, --dry_run what they would take. The same command
resumes. The model is in OUTPUT/model.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

import torch
from accelerate import PartialState
from transformers import set_seed
from transformers.utils import logging

from fused_kd.integrations.parts import thresholded_part
from fused_kd.integrations.precision import trained_in_float32
from fused_kd.serving import ServedTeacher
from fused_kd.training import dry_run
from fused_kd.training.chat_templates import ChatTemplate
from fused_kd.training.collate import Collator, PackingCollator, padding_id
from fused_kd.training.data import load_directions, parse_direction
from fused_kd.training.difficulty import with_quantile_gamma
from fused_kd.training.fingerprints import fingerprint_rows
from fused_kd.training.fit import DEFAULTS, finished, fit
from fused_kd.training.memory import memory_of
from fused_kd.training.models import PRESETS, load_model, model_content, shared_tokenizer, threads_for, with_adapters
from fused_kd.training.named_teachers import CACHE
from fused_kd.training.prompts import concatenate, render_sample, training_texts
from fused_kd.training.reading import is_divided
from fused_kd.training.reporting import report_options
from fused_kd.training.rows import load_rows
from fused_kd.training.script import make_console, parse, run_script
from fused_kd.training.shards import read_index
from fused_kd.training.stage import bind, fingerprint, has_work, is_main, remove_folder
from fused_kd.training.streams import Endless
from fused_kd.training.teacher_cache import TeacherCache
from fused_kd.training.train_options import ALIASES, HINTS, TRAINING, Arguments, Train, as_yaml, settle
from fused_kd.training.trainer import KDTrainer


def main(argv: list[str] | None = None) -> dict | None:
    cpu = {} if torch.accelerator.is_available() else {"use_cpu": True}  # else processes on CPUs would not meet
    defaults = {**DEFAULTS, **TRAINING, **cpu}
    train, args = parse((Train, Arguments), argv, defaults=defaults, aliases=ALIASES, hints=HINTS, description=__doc__)
    bound = settle(train, args)
    state = PartialState()
    console = make_console(quiet=not state.is_main_process, soft_wrap=True)
    if train.show:
        console.print(as_yaml(bound))
        return None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if (threads := threads_for(train.models)) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)

    output = Path(train.output)
    with state.main_process_first(), tokenizer_folder(train) as folder:
        tokenizer = shared_tokenizer(train.models, folder, texts_of(train), train.vocab)
    if train.chat_template is not None:  # saved with the model, which is to be asked as it was trained
        tokenizer.chat_template = ChatTemplate(tokenizer, train.chat_template).template
    rows = {"train": read_rows(train, tokenizer, "train")}
    if args.eval_strategy != "no":
        rows["valid"] = read_rows(train, tokenizer, "valid")
    served = {teacher.text: connect(train, teacher.place) for teacher in train.of_kind("server")}
    data_of = {} if train.streaming else {split: fingerprint_rows(found) for split, found in rows.items()}
    if train.dry_run == "false":
        bind(output, {**bound, **contents_of(train, data_of, served)})
        if (record := finished(output)) is not None:
            console.print(f"finished: model in {output / 'model'}")
            return record

    amounts = dry_run.amounts_of(train, args, rows["train"])
    sample = render_sample(tokenizer, next(iter(rows["train"])))
    console.print(f"{' '.join(train.source_of('train'))}: {rows['train']!r}; the first:\n{sample}")
    languages = parse_direction(train.directions[0]) if rows["train"].format == "pairs" else None
    if is_divided(*train.source_of("train"), languages):
        console.print("of its rows a hash keeps 5 % for valid and 5 % for test; --split all takes all of them")
    console.print("\n".join(dry_run.amounts_lines(args, amounts) + dry_run.advice(train, amounts)))
    if train.dry_run != "false":
        memory = memory_of(train, args, tokenizer, amounts.batch, list(served.values()))
        console.print("\n".join(dry_run.memory_lines(memory, amounts.batch)))
    if train.dry_run == "true":
        return None

    before = dry_run.resident(args.device)
    teacher, rows = open_teachers(train, tokenizer, rows, data_of, served, args.seed)
    if teacher is not None:
        console.print(f"teacher: {shown(teacher)}")
    student = load(train, train.student, tokenizer, args.seed)
    objective = train.spec.objective
    if train.gamma_quantile is not None:
        objective = with_quantile_gamma(objective, train.gamma_quantile, student, teacher, rows["train"], tokenizer)
        console.print(
            f"Γ = {thresholded_part(objective).gamma:.4f}: the {train.gamma_quantile:g} quantile of the difficulties"
        )
    if train.adapters is not None:
        set_seed(args.seed)
        student = with_adapters(student, train.adapters, "CAUSAL_LM")
    args.use_cache = getattr(student.config, "use_cache", True)  # the trainer would save another
    trainer = KDTrainer(
        trained_in_float32(student),
        teacher,
        objective,
        temperature=train.temperature,
        memory_budget=train.memory_budget,
        backend=train.backend,
        beta_schedule=train.spec.beta_schedule,
        average=train.average,
        statistics=train.statistics,
        args=dry_run.quiet(args) if train.dry_run == "step" else args,
        train_dataset=Endless(rows["train"]) if train.streaming else rows["train"],
        eval_dataset=rows.get("valid"),
        data_collator=PackingCollator() if train.packing else Collator(padding_id(tokenizer)),
        processing_class=tokenizer,
    )
    if train.dry_run == "step":
        found = dry_run.measured_step(trainer, amounts, before)
        console.print("\n".join(dry_run.measured_lines(found, amounts, memory, args)))
        return None
    report_options(trainer, bound, output / "tensorboard")
    record = fit(trainer, output, train.method or train.objective)
    console.print(f"{objective!r}: {record['steps']} steps, model in {output / 'model'}")
    return record


@contextmanager
def tokenizer_folder(train: Train) -> Iterator[Path]:
    """Where the tokenizer of two presets is kept, as long as work with it is; a dry run leaves nothing there."""
    if train.dry_run == "false":
        if is_main() and not has_work(Path(train.output)):  # it may be of another first try
            remove_folder(Path(train.output) / "tokenizer")
        yield Path(train.output) / "tokenizer"
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def texts_of(train: Train) -> Iterator[str]:
    """What a tokenizer of presets is trained on."""
    if any(name not in PRESETS for name in train.models):
        return
    if train.format not in ("auto", "pairs"):
        raise ValueError(f"format must be pairs for presets, whose tokenizer is made of them, got {train.format!r}")
    pairs = load_directions(
        *train.source_of("train"), train.directions, limit=train.train_limit, skip_bad=train.skip_bad
    )
    yield from training_texts(train.template, pairs)


def read_rows(train: Train, tokenizer: Any, split: str) -> Any:
    """The tokenised rows of the training, or of the validation."""
    learned = split == "train"
    how = {"max_length": train.max_length, "skip_bad": train.skip_bad, "chat_template": train.chat_template}
    how["turns"] = train.turns
    how["limit"] = train.train_limit if learned else train.valid_limit
    rows = load_rows(
        tokenizer,
        *train.source_of(split),
        format=train.format,
        prompt=train.prompt,
        directions=train.directions,
        streaming=train.streaming and learned,
        **how,
    )
    if not learned or train.instructions is None:
        return rows
    if train.streaming:
        raise ValueError(f"instructions must be null with streaming, got {train.instructions!r}")
    return concatenate([rows, load_rows(tokenizer, train.instructions, "train", format="alpaca", **how)])


def connect(train: Train, address: str) -> ServedTeacher:
    """The server at an address."""
    token = None if train.teacher_token_file is None else Path(train.teacher_token_file).read_text().strip()
    patience = {} if train.teacher_patience is None else {"patience": train.teacher_patience}
    return ServedTeacher(address, token=token, **patience)


def contents_of(train: Train, data_of: dict[str, str], served: dict[str, ServedTeacher]) -> dict[str, Any]:
    """What the run's names stand for now: its folder is bound to these too."""
    contents: dict[str, Any] = {f"{split} rows": found for split, found in data_of.items()}
    contents["student's content"] = model_content(train.student)
    of_kind = {
        "model": lambda teacher: model_content(teacher.place),
        "cache": lambda teacher: fingerprint(read_index(Path(teacher.place))),
        "server": lambda teacher: served[teacher.text].about["identity"],
        "own": lambda teacher: teacher.place,
    }
    found = [of_kind[teacher.kind](teacher) for teacher in train.teachers]
    if found:
        contents["teacher's content"] = found[0] if len(found) == 1 else found
    if train.valid_teacher is not None:
        contents["validation teacher's content"] = fingerprint(
            read_index(Path(train.valid_teacher.removeprefix(CACHE)))
        )
    return contents


def load(train: Train, name: str, tokenizer: Any, seed: int) -> Any:
    """A model in the run's dtype."""
    attention = {"attn_implementation": train.attn_implementation} if train.attn_implementation else {}
    return load_model(name, tokenizer, seed, dtype=train.dtype, **attention)


def open_teachers(
    train: Train, tokenizer: Any, rows: dict[str, Any], data_of: dict[str, str], served: dict[str, Any], seed: int
) -> tuple[Any, dict[str, Any]]:
    """What the trainer takes as its teacher, and the rows with what caches have for them."""
    templates = {split: train.template if found.format == "pairs" else None for split, found in rows.items()}
    rows, made = dict(rows), []

    def opened(folder: str, split: str, name: str | None) -> TeacherCache:
        cache = TeacherCache(folder, tail=train.cache_tail, name=name, verify=PartialState().is_main_process)
        rows[split] = cache.check(tokenizer=tokenizer, rows=rows[split], template=templates[split], data=data_of[split])
        return cache

    for number, teacher in enumerate(train.teachers):
        if teacher.kind == "cache":
            name = f"t{number}" if len(train.of_kind("cache")) > 1 else None
            made.append(opened(teacher.place, "train", name))
            if train.valid_teacher is not None and "valid" in rows:
                made[-1].check_head(opened(train.valid_teacher.removeprefix(CACHE), "valid", name))
        elif teacher.kind == "server":
            made.append(served[teacher.text])
        else:
            made.append(teacher.own if teacher.kind == "own" else load(train, teacher.place, tokenizer, seed))
    if len(made) < 2:
        return (made[0] if made else None), rows
    return [(teacher.weight, each) for teacher, each in zip(train.teachers, made, strict=True)], rows


def shown(teacher: Any) -> str:
    """A line about it, without a model's layers."""
    several = teacher if isinstance(teacher, list) else [(None, teacher)]
    names = [type(each).__name__ if isinstance(each, torch.nn.Module) else repr(each) for _, each in several]
    weights = ["" if weight is None else f"{weight:g} x " for weight, _ in several]
    return " + ".join(map("".join, zip(weights, names, strict=True)))


if __name__ == "__main__":
    run_script(main)
