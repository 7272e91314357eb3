"""Train one model from configurations: SFT or any distillation, in one process or under accelerate.

    python examples/train.py examples/configs/paper.yaml examples/configs/tiny.yaml examples/configs/methods/sft.yaml \
        student=tiny-teacher --output runs/teacher
    accelerate launch --config_file examples/accelerate/zero3.yaml examples/train.py examples/configs/paper.yaml \
        examples/configs/methods/self_evolution.yaml data=PATH teacher=runs/teacher/train/model --output runs/student

Later files and key=value override earlier ones; --show prints the result. The same command resumes. The model is in
OUTPUT/train/model; examples/evaluate.py translates with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

import torch
import yaml
from accelerate import PartialState
from transformers.utils import logging

from fused_kd.training.cache.index import read_index
from fused_kd.training.cache.teacher_cache import TeacherCache, fingerprint_rows
from fused_kd.training.command import make_console, run_script
from fused_kd.training.config import load_config
from fused_kd.training.data.prompts import render_sample, training_texts
from fused_kd.training.evaluation.difficulty import with_quantile_gamma
from fused_kd.training.presets import load_model, model_content, shared_tokenizer, threads_for
from fused_kd.training.recipe import Recipe
from fused_kd.training.runs import Run, fingerprint
from fused_kd.training.stages import train_stage


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="+", metavar="FILE.yaml | key=value", help="later ones override earlier ones")
    parser.add_argument("--output", required=True)
    parser.add_argument("--show", action="store_true", help="print the configuration and stop")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict | None:
    args = parse_arguments(argv)
    files = [text for text in args.config if "=" not in text]
    recipe = load_config(Recipe, files, [text for text in args.config if "=" in text])
    state = PartialState(cpu=not torch.accelerator.is_available())
    console = make_console(quiet=not state.is_main_process)
    if args.show:
        console.print(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True))
        return None
    settings = recipe.settings(state.num_processes)
    if recipe.cached_teacher is not None and recipe.gamma_quantile is not None:
        raise ValueError(f"gamma_quantile needs an online teacher, got teacher={recipe.teacher!r}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if (threads := threads_for(recipe.models)) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    run = Run(args.output, dataclasses.asdict(recipe))

    train = recipe.pairs("train", recipe.train_limit)
    texts = training_texts(recipe.template, train)
    with state.main_process_first():
        tokenizer = shared_tokenizer(recipe.models, run.stage("tokenizer"), texts, recipe.vocab)
    rows = recipe.training_rows(tokenizer, train)
    valid = recipe.rows(tokenizer, recipe.pairs("valid", recipe.valid_limit)) if recipe.select == "best" else None
    if state.is_main_process:
        run.bind(data=fingerprint_rows(rows), student=model_content(recipe.student))
        if valid is not None:
            run.bind(validation=fingerprint_rows(valid))
        if recipe.cached_teacher is not None and recipe.needs_teacher:
            run.bind(teacher=fingerprint(read_index(Path(recipe.cached_teacher))))
        elif recipe.needs_teacher:
            run.bind(teacher=model_content(str(recipe.teacher)))
    console.print(f"{rows}; the first:\n{render_sample(tokenizer, rows[0])}")
    console.print(
        f"global batch {recipe.global_batch} = {state.num_processes} processes x {settings.batch_size} sentences x "
        f"{settings.accumulation} steps"
    )

    def load(name: str) -> torch.nn.Module:
        attention = {"attn_implementation": recipe.attn_implementation} if recipe.attn_implementation else {}
        return load_model(name, tokenizer, recipe.seed, dtype=recipe.dtype, **attention)

    spec, data, teacher = recipe.spec, rows, lambda: load(str(recipe.teacher))
    if recipe.cached_teacher is not None and recipe.needs_teacher:
        cache = TeacherCache(recipe.cached_teacher, tail=recipe.cache_tail)
        cache.check(tokenizer=tokenizer, rows=rows, template=recipe.template.name)
        console.print(f"{cache}")
        data, teacher = cache.rows(rows), lambda: cache
    elif recipe.gamma_quantile is not None:
        models = load(recipe.student), teacher()
        objective = with_quantile_gamma(spec.objective, recipe.gamma_quantile, *models, rows, tokenizer)
        console.print(f"Γ = {objective.gamma:.4f}: the {recipe.gamma_quantile:g} quantile of the difficulties")
        spec = dataclasses.replace(spec, objective=objective)
    student = lambda: recipe.with_adapters(load(recipe.student))  # noqa: E731
    record = train_stage(run, "train", student, teacher, spec, data, tokenizer, settings, valid)
    console.print(f"{record['objective']}: {record['steps']} steps, model in {run.stage('train') / 'model'}")
    return record


if __name__ == "__main__":
    run_script(main)
