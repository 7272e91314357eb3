"""Distil a translation model: teacher SFT, student pre-training, then one student per objective on a KD set.

    python examples/distill.py                                     # the built-in toy corpus, minutes on a CPU
    python examples/distill.py --data pairs.jsonl.gz --objective forward_kd self_evolution:floor=0.3

Everything goes to --output. The same command again skips finished stages and resumes an interrupted one.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

# tiny models: threads that spin at barriers cost more than they give
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

import torch
import transformers
from distill_report import PRETRAINED, compare, table, verdict, write_plots

import fused_kd as fk
from fused_kd.info import devices, versions
from fused_kd.training.collate import Collator, padding_id
from fused_kd.training.data import Pair, load_pairs, misalign
from fused_kd.training.fit import fit, training_arguments
from fused_kd.training.models import (
    PRESETS,
    load_model,
    model_content,
    on_accelerator,
    shared_tokenizer,
    threads_for,
)
from fused_kd.training.prompts import PROMPTS, Rows, get_prompt, render_sample, tokenize_pairs, training_texts
from fused_kd.training.score import translate
from fused_kd.training.script import run_script
from fused_kd.training.specs import parse_objective
from fused_kd.training.stage import Stages, fingerprint, helpers, read_json, read_lines, write_json, write_lines
from fused_kd.training.trainer import KDTrainer

BUNDLES: dict[str, dict] = {
    "demo": {"kd_noise": 0.3, "kd_lr": 4e-3, "test_limit": 500, "jobs": 2},
    "quick": {
        "train_limit": 3000, "kd_size": 200, "test_limit": 50, "jobs": 2,
        "teacher_epochs": 3, "student_epochs": 2, "kd_epochs": 4, "kd_noise": 0.3,
    },
    "multi30k": {
        "test_split": "test_2016_flickr", "train_limit": None, "test_limit": None, "vocab": 2000, "batch": 64,
        "teacher": "small-teacher", "teacher_epochs": 6, "teacher_lr": 1e-3,
        "student": "small-student", "student_epochs": 10, "student_lr": 3e-3,
        "kd_size": 3000, "kd_epochs": 8, "kd_lr": 1e-3,
    },
}  # fmt: skip


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--preset", choices=BUNDLES, help="defaults for the arguments below; demo for builtin data")
    add("--data", default="builtin", help="builtin, a JSONL(.gz) file, a folder of them, or a hub name")
    add("--direction", default="en-de")
    add("--test-split", default="test", help="split, or file name stem in a folder, to translate")
    add("--teacher", default="demo-teacher", help=f"a path, a hub name, or one of {', '.join(PRESETS)}")
    add("--student", default="demo-student", help="as --teacher")
    specs = f"name, name:key=value,... or a sum, 0.5*sft+0.5*forward_kd; of {', '.join(fk.OBJECTIVES)}"
    specs += "; beta_warmup=0.3 anneals beta from 1; self_evolution without a floor is the paper's form"
    add("--objective", nargs="+", default=["self_evolution:floor=0.3", "forward_kd"], metavar="SPEC", help=specs)
    add("--prompt", choices=PROMPTS, default="tiny")
    add("--output", default="runs/distill")
    add("--seed", type=int, default=0)
    add("--vocab", type=int, default=1600, help="tokens of the BPE tokenizer trained for presets")
    add("--max-length", type=int, default=256, help="tokens of prompt and response")
    add("--train-limit", type=int, default=12_000, help="training pairs in all; the teacher sees them all")
    add("--kd-size", type=int, help="the last of them: the KD set, new to the student; default: a third")
    add("--kd-noise", type=float, default=0.0, help="share of the KD set that gets a wrong reference")
    add("--test-limit", type=int, default=300)
    add("--teacher-epochs", type=float, default=5, help="0 takes the teacher as it is")
    add("--student-epochs", type=float, default=3, help="0 takes the student as it is")
    add("--kd-epochs", type=float, default=4)
    add("--teacher-lr", type=float, default=2.5e-3)
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
    add("--jobs", type=int, default=1, help="processes that share the stages; 2 on two cores, for tiny models")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    bundle, _ = parser.parse_known_args(argv)
    parser.set_defaults(**BUNDLES.get(bundle.preset or ("demo" if bundle.data == "builtin" else ""), {}))
    args = parser.parse_args(argv)
    if args.accumulation < 1 or args.batch < 1 or args.batch % args.accumulation:
        parser.error(f"--batch {args.batch} must be a multiple of --accumulation {args.accumulation}")
    return args


class Distillation:
    """One run: its data, and its models, each a stage that is done once.

    Raises:
        ValueError: data, models or stages that are not there, a KD set that is no part of the training pairs.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        sft = parse_objective("sft")
        students = {spec.slug: spec for spec in map(parse_objective, ["sft", *args.objective])}
        self.specs = {"teacher": sft, "student": sft} | students
        self.wanted = self._wanted()
        for option, limit in {"--train-limit": args.train_limit, "--test-limit": args.test_limit}.items():
            if limit is not None and limit < 1:
                raise ValueError(f"{option} must be at least 1, got {limit}")
        if not 0 <= args.kd_noise <= 1:
            raise ValueError(f"--kd-noise must be in [0, 1], got {args.kd_noise:g}")
        self.pairs = load_pairs(args.data, "train", args.direction, limit=args.train_limit)
        self.test = load_pairs(args.data, args.test_split, args.direction, limit=args.test_limit)
        size = len(self.pairs) // 3 if args.kd_size is None else args.kd_size
        if not 0 < size < len(self.pairs):
            limits = f"[1, {len(self.pairs) - 1}] for {len(self.pairs)} training pairs"
            raise ValueError(f"--kd-size must be in {limits}, got {size}")
        self.own_pairs, self.right = self.pairs[:-size], self.pairs[-size:]
        self.kd_pairs = misalign(self.right, args.kd_noise, args.seed)
        self.template, self.stages = get_prompt(args.prompt), Stages(args.output)
        pairs = fingerprint([self.pairs, self.test])
        self.texts = {"direction": args.direction, "prompt": args.prompt, "pairs": pairs}
        self.contents = {name: model_content(name) for name in (args.teacher, args.student)}

    def _wanted(self) -> list[str]:
        """The stages of ``--only`` and those that they start from."""
        specs, asked = self.specs, self.args.only or self.specs
        only = {name if name in specs else _slug(name) for name in asked}
        if unknown := sorted(only - specs.keys()):
            raise ValueError(f"--only must name stages of {', '.join(specs)}, got {', '.join(unknown)}")
        return [name for name in specs if name in only or (name in PRETRAINED and only - {*PRETRAINED})]

    @cached_property
    def tokens(self) -> Path:
        """The tokenizer's folder."""
        settings = self.texts | {"vocab": self.args.vocab, "models": self.contents}
        return self.stages("tokenizer", self._tokenizer_in, settings)

    @cached_property
    def tokenizer(self) -> Any:
        return self._tokenizer_in(self.tokens)

    def _tokenizer_in(self, folder: Path) -> Any:
        rendered = training_texts(self.template, {self.args.direction: self.pairs})
        return shared_tokenizer(list(self.contents), folder, rendered, self.args.vocab)

    def model(self, name: str | Path, seed: int = 0) -> Any:
        return load_model(name, self.tokenizer, seed, dtype=torch.float32)

    def rows(self, pairs: Sequence[Pair]) -> Rows:
        return tokenize_pairs(self.tokenizer, self.template, pairs, self.args.direction, self.args.max_length)

    def needs(self, name: str) -> list[str]:
        """What a stage starts from, then its teacher."""
        taught = self.specs[name].objective.spec.needs_teacher
        return [] if name in PRETRAINED else ["student", *(["teacher"] if taught else [])]

    def recipe(self, name: str) -> tuple[list[Pair], float, float]:
        """Pairs, epochs and learning rate of a stage."""
        args = self.args
        if name == "teacher":
            return self.pairs, args.teacher_epochs, args.teacher_lr
        if name == "student":
            return self.own_pairs, args.student_epochs, args.student_lr
        return self.kd_pairs, args.kd_epochs, args.kd_lr

    def trained(self, name: str) -> Path:
        """The folder of a model that is trained, has translated the test set and is scored."""
        args, spec, folders = self.args, self.specs[name], [self.trained(need) for need in self.needs(name)]
        (own, epochs, rate), taught = self.recipe(name), len(folders) == 2
        start = folders[0] / "model" if folders else getattr(args, name)
        options = {
            "num_train_epochs": epochs, "learning_rate": rate, "seed": args.seed, "bf16": args.bf16,
            "per_device_train_batch_size": args.batch // args.accumulation,
            "gradient_accumulation_steps": args.accumulation, "save_steps": 0.1,
        }  # fmt: skip
        loss = {"temperature": args.temperature, "memory_budget": args.memory_budget, "backend": args.backend}

        def work(folder: Path) -> None:
            rows = self.rows(own)
            print(f"{rows}; the first:\n{render_sample(self.tokenizer, rows[0])}" if name in PRETRAINED else rows)
            trainer = KDTrainer(
                self.model(start, args.seed + (name == "student")),
                self.model(folders[1] / "model") if taught else None, spec.objective, **loss,
                beta_schedule=spec.beta_schedule, args=training_arguments(folder, **options), train_dataset=rows,
                data_collator=Collator(padding_id(self.tokenizer)), processing_class=self.tokenizer,
            )  # fmt: skip
            fit(trainer, folder, name)
            model = on_accelerator(self.model(folder / "model"))
            test = self.test, args.direction, self.template
            hypotheses, scores = translate(model, self.tokenizer, *test, batch_size=64)
            write_lines(folder / f"hypotheses.{args.direction}.txt", hypotheses)
            write_json(folder / "scores.json", dataclasses.asdict(scores))

        about = {"objective": spec.text, "start": self.contents.get(str(start)), "own": fingerprint(own)}
        settings = self.texts | about | options | loss | {"max_length": args.max_length}
        return self.stages(name, work, settings, needs=[self.tokens, *folders])

    @cached_property
    def wrong(self) -> list[int]:
        """Which pairs of the KD set have a wrong reference."""
        return [number for number, pair in enumerate(self.kd_pairs) if pair != self.right[number]]

    def sample(self) -> str:
        """A row of the KD set, one with a wrong reference where there is one, which is said."""
        size = len(self.kd_pairs)
        if not self.wrong:
            return f"distillation set, {size:,} pairs; the first:\n{self._shown(self.kd_pairs[0])}"
        number = self.wrong[0]
        return (
            f"distillation set, {size:,} pairs; {len(self.wrong):,} of them, chosen at random, have the reference of "
            f"another pair, which is WRONG (--kd-noise {self.args.kd_noise:g}). One of these:\n"
            f"source: {self.right[number].source}\nWRONG:  {self.kd_pairs[number].target}\n"
            f"right:  {self.right[number].target}\nas the student sees it, {self._shown(self.kd_pairs[number])}"
        )

    def _shown(self, pair: Pair) -> str:
        return render_sample(self.tokenizer, self.rows([pair])[0])

    def metrics(self) -> dict[str, Any]:
        """All that the table and the plots are made of, as JSON values."""
        folders = {name: self.trained(name) for name in self.wanted}
        made = {name: read_lines(folder / f"hypotheses.{self.args.direction}.txt") for name, folder in folders.items()}
        against, stages = compare(made, self.test), {}
        for name, folder in folders.items():
            about = {"stage": name, "objective": repr(self.specs[name].objective), "folder": str(folder)}
            scores = {"scores": read_json(folder / "scores.json")}
            stages[name] = about | read_json(folder / "training.json") | scores
            if name in against:
                stages[name]["against"] = against[name]
        sizes = {"train_pairs": len(self.pairs), "kd_pairs": len(self.kd_pairs), "test_pairs": len(self.test)}
        return {
            "arguments": vars(self.args),
            "seed": self.args.seed,
            "versions": versions(),
            "machine": devices(),
            "data": sizes | {"wrong": len(self.wrong)},
            "stages": stages,
        }


def _slug(name: str) -> str:
    try:
        return parse_objective(name).slug
    except ValueError:  # no objective: no stage of that name either
        return name


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    args = parse_arguments(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where installed, warns of none
    if threads := args.threads or threads_for([args.teacher, args.student]):
        torch.set_num_threads(threads)
    run, folder = Distillation(args), Path(args.output)
    distils = bool(set(run.wanted) - {*PRETRAINED})
    with helpers(__file__, argv, args.jobs, folder, helper=args.worker):
        if distils and not args.worker:
            print(run.sample())
        if args.jobs > 1 and not args.worker:
            print(f"{args.jobs} processes share the stages; the others tell what they do in {folder}/worker-*.log")
        run.stages.share({name: partial(run.trained, name) for name in run.wanted})
        if args.worker:
            return None
    metrics = run.metrics()
    write_json(folder / "metrics.json", metrics)
    write_plots(metrics, folder)
    print(f"\n{table(metrics)}\n")
    if distils:
        print(f"{verdict(metrics)}\n")
    print(f"metrics.json, plots, hypotheses and models are in {folder}")
    return metrics


if __name__ == "__main__":
    run_script(main)
