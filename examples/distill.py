"""Distil a translation model: teacher SFT, student pre-training, then one student per objective on a KD set.

    python examples/distill.py                                     # the built-in toy corpus, minutes on a CPU
    python examples/distill.py --data pairs.jsonl.gz --objective forward_kd self_evolution:gamma=0.4,beta=0.5

Everything goes to --output. The same command again skips finished stages and resumes an interrupted one.
"""

from __future__ import annotations

import argparse
import os
import sys

# tiny models: threads that spin at barriers cost more than they give
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

import fused_kd as fk
from fused_kd.training.command import make_console, run_script
from fused_kd.training.data.noise import misalign
from fused_kd.training.data.pairs import load_pairs
from fused_kd.training.data.prompts import PROMPTS, get_prompt, render_sample, tokenize_pairs, training_texts
from fused_kd.training.plots import write_plots
from fused_kd.training.presets import PRESETS, load_model, model_content, shared_tokenizer, threads_for
from fused_kd.training.report import collect, results_table
from fused_kd.training.runs import Run, fingerprint, write_json
from fused_kd.training.specs import parse_objective
from fused_kd.training.stages import Settings, train_stage, translate_stage

BUNDLES: dict[str, dict] = {
    "demo": {"kd_noise": 0.3},
    "quick": {
        "train_limit": 3000, "kd_size": 200, "test_limit": 50,
        "teacher_epochs": 3, "student_epochs": 2, "kd_epochs": 4, "kd_noise": 0.3,
    },
    "multi30k": {
        "test_split": "test_2016_flickr", "train_limit": None, "test_limit": None, "vocab": 2000, "batch": 64,
        "teacher": "small-teacher", "teacher_epochs": 6, "teacher_lr": 1e-3,
        "student": "small-student", "student_epochs": 10, "student_lr": 3e-3,
        "kd_size": 3000, "kd_epochs": 8, "kd_lr": 1e-3,
    },
}  # fmt: skip


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--preset", choices=BUNDLES, help="defaults for the arguments below; demo for builtin data")
    add("--data", default="builtin", help="builtin, a JSONL(.gz) file, a folder of them, or a hub name")
    add("--direction", default="en-de")
    add("--test-split", default="test", help="split, or file name stem in a folder, to translate")
    add("--teacher", default="tiny-teacher", help=f"a path, a hub name, or one of {', '.join(PRESETS)}")
    add("--student", default="tiny-student", help="as --teacher")
    specs = f"name or name:key=value,...; of {', '.join(fk.OBJECTIVES)}; beta_warmup=0.3 anneals beta from 1"
    add("--objective", nargs="+", default=["forward_kd", "self_evolution"], metavar="SPEC", help=specs)
    add("--prompt", choices=PROMPTS, default="tiny")
    add("--output", default="runs/distill")
    add("--seed", type=int, default=0)
    add("--vocab", type=int, default=1600, help="tokens of the BPE tokenizer trained for presets")
    add("--max-length", type=int, default=256, help="tokens of prompt and response")
    add("--train-limit", type=int, default=12_000, help="training pairs in all; the teacher sees them all")
    add("--kd-size", type=int, default=500, help="the last of them: the KD set, new to the student")
    add("--kd-noise", type=float, default=0.0, help="share of the KD set that gets a wrong reference")
    add("--test-limit", type=int, default=300)
    add("--teacher-epochs", type=float, default=4, help="0 takes the teacher as it is")
    add("--student-epochs", type=float, default=2.5, help="0 takes the student as it is")
    add("--kd-epochs", type=float, default=12)
    add("--teacher-lr", type=float, default=4e-3)
    add("--student-lr", type=float, default=4e-3)
    add("--kd-lr", type=float, default=1e-3)
    add("--batch", type=int, default=32, help="sentences an optimizer step")
    add("--accumulation", type=int, default=1, help="micro-batches that make up one --batch")
    add("--temperature", type=float, default=1.0)
    add("--memory-budget", type=int, help="bytes for the loss's buffers")
    add("--backend", choices=["torch", "triton", "native"])
    add("--bf16", action="store_true", help="bf16 autocast")
    add("--threads", type=int, help="CPU threads; default: the preset's best, else PyTorch's")
    add("--only", nargs="+", metavar="STAGE", help="of teacher, student, sft and the objectives' SPECs")
    bundle, _ = parser.parse_known_args(argv)
    parser.set_defaults(**BUNDLES.get(bundle.preset or ("demo" if bundle.data == "builtin" else ""), {}))
    args = parser.parse_args(argv)
    if args.accumulation < 1 or args.batch < 1 or args.batch % args.accumulation:
        parser.error(f"--batch {args.batch} must be a multiple of --accumulation {args.accumulation}")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_arguments(argv)
    specs = {spec.slug: spec for spec in map(parse_objective, ["sft", *args.objective])}
    sft = specs["sft"]
    phases = {"teacher": "pretraining", "student": "pretraining", **dict.fromkeys(specs, "distillation")}
    only = [name if name in phases else parse_objective(name).slug for name in args.only or phases]
    if unknown := sorted(set(only) - phases.keys()):
        raise SystemExit(f"--only must name stages of {', '.join(phases)}, got {', '.join(unknown)}")

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = make_console()
    if threads := args.threads or threads_for([args.teacher, args.student]):
        torch.set_num_threads(threads)
    free = ("output", "only", "threads", "preset", "objective")
    run = Run(args.output, {key: value for key, value in vars(args).items() if key not in free})

    train = load_pairs(args.data, "train", args.direction, limit=args.train_limit)
    test = load_pairs(args.data, args.test_split, args.direction, limit=args.test_limit)
    if not 0 < args.kd_size < len(train):
        limits = f"[1, {len(train) - 1}] for {len(train)} training pairs"
        raise SystemExit(f"--kd-size must be in {limits}, got {args.kd_size}")
    run.bind(data=fingerprint([train, test]), teacher=model_content(args.teacher), student=model_content(args.student))
    template = get_prompt(args.prompt)
    texts = training_texts(template, {args.direction: train})
    with run.lock("tokenizer"):
        tokenizer = shared_tokenizer([args.teacher, args.student], run.stage("tokenizer"), texts, args.vocab)

    def model(name: object, seed: int = 0) -> PreTrainedModel:
        return load_model(str(name), tokenizer, seed, dtype=torch.float32)

    def settings(epochs: float, learning_rate: float) -> Settings:
        return Settings(
            epochs, learning_rate, batch_size=args.batch // args.accumulation, accumulation=args.accumulation,
            seed=args.seed, bf16=args.bf16, temperature=args.temperature, memory_budget=args.memory_budget,
            backend=args.backend,
        )  # fmt: skip

    trained = {name: run.stage(name) / "model" for name in ("teacher", "student")}
    kd_pairs = misalign(train[-args.kd_size :], args.kd_noise, args.seed)
    for name in phases:
        if name not in only:
            continue
        console.rule(name)
        if name == "teacher":
            pairs, how, spec = train, settings(args.teacher_epochs, args.teacher_lr), sft
        elif name == "student":
            pairs, how, spec = train[: -args.kd_size], settings(args.student_epochs, args.student_lr), sft
        else:
            pairs, how, spec = kd_pairs, settings(args.kd_epochs, args.kd_lr), specs[name]
            for needed in ("student", "teacher")[: 1 if spec is sft else 2]:
                if not trained[needed].is_dir():
                    raise SystemExit(f"--only {name}: run {needed} first")
        rows = tokenize_pairs(tokenizer, template, pairs, args.direction, args.max_length)
        console.print(f"{rows}; the first:\n{render_sample(tokenizer, rows[0])}")
        start = {"teacher": args.teacher, "student": args.student}.get(name, trained["student"])
        seed = args.seed + (name == "student")
        student = lambda start=start, seed=seed: model(start, seed)  # noqa: E731
        train_stage(run, name, student, lambda: model(trained["teacher"]), spec, rows, tokenizer, how)
        translate_stage(run, name, {args.direction: test}, template, tokenizer)
        metrics = collect(run, phases, vars(args))
        write_json(run.folder / "metrics.json", metrics)

    write_plots(metrics, run.folder)
    console.print(results_table(metrics))
    console.print(f"metrics.json, plots, hypotheses and models are in {run.folder}")
    return metrics


if __name__ == "__main__":
    run_script(main)
