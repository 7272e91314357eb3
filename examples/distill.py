"""Distil a translation model: teacher SFT, student pre-training, then one student per objective on a KD set.

    python examples/distill.py                                     # the built-in toy corpus, minutes on a CPU
    python examples/distill.py --data pairs.jsonl.gz --objective forward_kd self_evolution:gamma=0.4,beta=0.5

Everything goes to --output. The same command again skips finished stages and resumes an interrupted one.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

# tiny models: threads that spin at barriers cost more than they give
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

import pandas as pd
import torch
import transformers
from matplotlib.figure import Figure

import fused_kd as fk
from fused_kd.info import devices, versions
from fused_kd.training.collate import Collator, padding_id
from fused_kd.training.data import Pair, load_pairs, misalign
from fused_kd.training.fit import fit, training_arguments
from fused_kd.training.models import PRESETS, load_model, model_content, shared_tokenizer, threads_for
from fused_kd.training.prompts import PROMPTS, get_prompt, render_sample, tokenize_pairs, training_texts
from fused_kd.training.score import translate
from fused_kd.training.script import run_script
from fused_kd.training.specs import parse_objective
from fused_kd.training.stage import Stages, fingerprint, read_json, write_json, write_lines
from fused_kd.training.trainer import KDTrainer

PRETRAINED = ("teacher", "student")
CURVES = {"loss": "loss, nats a token", "hard_fraction": "share of hard tokens", "difficulty": "mean difficulty, nats"}
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
    specs = f"name, name:key=value,... or a sum, 0.5*sft+0.5*forward_kd; of {', '.join(fk.OBJECTIVES)}"
    specs += "; beta_warmup=0.3 anneals beta from 1"
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
    add("--backend", choices=["torch", "native", "triton", "cuda"])
    add("--bf16", action="store_true", help="bf16 autocast")
    add("--threads", type=int, help="CPU threads; default: the preset's best, else PyTorch's")
    add("--only", nargs="+", metavar="STAGE", help="of teacher, student, sft and the objectives' SPECs")
    bundle, _ = parser.parse_known_args(argv)
    parser.set_defaults(**BUNDLES.get(bundle.preset or ("demo" if bundle.data == "builtin" else ""), {}))
    args = parser.parse_args(argv)
    if args.accumulation < 1 or args.batch < 1 or args.batch % args.accumulation:
        parser.error(f"--batch {args.batch} must be a multiple of --accumulation {args.accumulation}")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_arguments(argv)
    sft = parse_objective("sft")
    specs = {"teacher": sft, "student": sft} | {s.slug: s for s in map(parse_objective, ["sft", *args.objective])}
    taught = [name for name, spec in specs.items() if spec.objective.spec.needs_teacher]
    only = [name if name in specs else parse_objective(name).slug for name in args.only or specs]
    if unknown := sorted(set(only) - specs.keys()):
        raise ValueError(f"--only must name stages of {', '.join(specs)}, got {', '.join(unknown)}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if threads := args.threads or threads_for([args.teacher, args.student]):
        torch.set_num_threads(threads)

    pairs = load_pairs(args.data, "train", args.direction, limit=args.train_limit)
    test = load_pairs(args.data, args.test_split, args.direction, limit=args.test_limit)
    if not 0 < args.kd_size < len(pairs):
        limits = f"[1, {len(pairs) - 1}] for {len(pairs)} training pairs"
        raise ValueError(f"--kd-size must be in {limits}, got {args.kd_size}")
    kd_pairs = misalign(pairs[-args.kd_size :], args.kd_noise, args.seed)
    template, stages = get_prompt(args.prompt), Stages(args.output)
    texts = {"direction": args.direction, "prompt": args.prompt, "pairs": fingerprint([pairs, test])}
    contents = {name: model_content(name) for name in (args.teacher, args.student)}

    def tokenizer_in(folder: Path) -> Any:
        rendered = training_texts(template, {args.direction: pairs})
        return shared_tokenizer(list(contents), folder, rendered, args.vocab)

    tokens = stages("tokenizer", tokenizer_in, texts | {"vocab": args.vocab, "models": contents})
    tokenizer = tokenizer_in(tokens)

    def model(name: str | Path, seed: int = 0) -> Any:
        return load_model(name, tokenizer, seed, dtype=torch.float32)

    def stage(name: str, start: str | Path, own: list[Pair], epochs: float, rate: float, *needs: Path) -> Path:
        """The folder of a model that is trained, has translated the test set and is scored; teacher: the last need."""
        spec, seed = specs[name], args.seed + (name == "student")
        options = {
            "num_train_epochs": epochs, "learning_rate": rate, "seed": args.seed, "bf16": args.bf16,
            "per_device_train_batch_size": args.batch // args.accumulation,
            "gradient_accumulation_steps": args.accumulation,
        }  # fmt: skip
        loss = {"temperature": args.temperature, "memory_budget": args.memory_budget, "backend": args.backend}

        def work(folder: Path) -> None:
            rows = tokenize_pairs(tokenizer, template, own, args.direction, args.max_length)
            print(f"{rows}; the first:\n{render_sample(tokenizer, rows[0])}")
            trainer = KDTrainer(
                model(start, seed), model(needs[-1] / "model") if name in taught else None, spec.objective, **loss,
                beta_schedule=spec.beta_schedule, args=training_arguments(folder, **options), train_dataset=rows,
                data_collator=Collator(padding_id(tokenizer)), processing_class=tokenizer,
            )  # fmt: skip
            fit(trainer, folder, name)
            trained = model(folder / "model")
            hypotheses, scores = translate(trained, tokenizer, test, args.direction, template, batch_size=64)
            write_lines(folder / f"hypotheses.{args.direction}.txt", hypotheses)
            write_json(folder / "scores.json", dataclasses.asdict(scores))

        about = {"objective": spec.text, "start": contents.get(str(start)), "own": fingerprint(own)}
        settings = texts | about | options | loss | {"max_length": args.max_length}
        return stages(name, work, settings, needs=[tokens, *needs])

    folder, made = Path(args.output), {}
    about = {"arguments": vars(args), "seed": args.seed, "versions": versions(), "machine": devices()}
    metrics: dict[str, Any] = about | {"stages": {}}
    for name, spec in specs.items():
        if name not in only and (name not in PRETRAINED or set(only) <= set(PRETRAINED)):
            continue
        if name == "teacher":
            made[name] = stage(name, args.teacher, pairs, args.teacher_epochs, args.teacher_lr)
        elif name == "student":
            made[name] = stage(name, args.student, pairs[: -args.kd_size], args.student_epochs, args.student_lr)
        else:
            needs = [made["student"], *([made["teacher"]] if name in taught else [])]
            made[name] = stage(name, made["student"] / "model", kd_pairs, args.kd_epochs, args.kd_lr, *needs)
        about = {"objective": repr(spec.objective), "folder": str(made[name])}
        scores = {"scores": read_json(made[name] / "scores.json")}
        metrics["stages"][name] = {"stage": name} | about | read_json(made[name] / "training.json") | scores
        write_json(folder / "metrics.json", metrics)
    write_plots(metrics, folder)
    table = pd.json_normalize(list(metrics["stages"].values()))
    columns = ["stage", "objective", "parameters", "steps", "seconds", "scores.bleu", "scores.chrf"]
    print(table[columns].to_markdown(index=False, floatfmt=".1f"))
    print(f"metrics.json, plots, hypotheses and models are in {folder}")
    return metrics


def write_plots(metrics: dict[str, Any], folder: Path) -> None:
    """``loss.png``, ``hard_fraction.png``, ``difficulty.png`` and ``bleu.png``, from ``metrics.json`` alone."""
    stages = metrics["stages"]
    for key, label in CURVES.items():
        figure = Figure(figsize=(10.4, 3.6), layout="tight")
        for axis, pretraining in zip(figure.subplots(1, 2), (True, False), strict=True):
            for name in [name for name in stages if (name in PRETRAINED) == pretraining]:
                log = pd.DataFrame(stages[name]["log_history"], columns=["step", key]).dropna()
                axis.plot(log.step, log[key], label=name)
                axis.legend(fontsize=8)
            axis.set(title="pretraining" if pretraining else "distillation", xlabel="optimizer step", ylabel=label)
        figure.savefig(folder / f"{key}.png", dpi=130)
    figure = Figure(figsize=(1.6 + 1.1 * len(stages), 3.8), layout="tight")
    axis = figure.subplots()
    axis.bar_label(axis.bar(list(stages), [stage["scores"]["bleu"] for stage in stages.values()]), fmt="%.1f")
    axis.tick_params(axis="x", rotation=25)
    axis.set_ylabel("BLEU")
    figure.savefig(folder / "bleu.png", dpi=130)


if __name__ == "__main__":
    run_script(main)
