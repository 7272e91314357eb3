"""Self-distillation from a resource-rich language: the model's own answers, translated, filtered, combined, trained on.

    python examples/sdrrl.py --preset tiny --jobs 2 --output runs/sdrrl   # real captions, tiny models, two CPU cores
    python examples/sdrrl.py --preset paper instructions.data=PATH dictionary=PATH --output runs/paper --plan

key=value overrides the preset; --plan prints the stages and stops. Every stage is kept in a folder named after what it
is made of: the same command goes on where it stopped, another setting redoes what depends on it. See docs/sdrrl.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path

# tiny models: threads that spin at barriers cost more than they give
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

import torch
from accelerate import PartialState
from transformers.utils import logging

from fused_kd.training.command import make_console, run_script
from fused_kd.training.config import load_config
from fused_kd.training.pipeline import Stage
from fused_kd.training.presets import threads_for
from fused_kd.training.report import environment
from fused_kd.training.runs import write_json
from fused_kd.training.sdrrl.recipe import Recipe
from fused_kd.training.sdrrl.report import collect_metrics, results_table, transfer_table, write_plots
from fused_kd.training.sdrrl.study import Study
from fused_kd.training.sharing import helpers

CONFIGS = Path(__file__).parent / "configs" / "sdrrl"
UNTIL = ("collect", "translate", "filter", "set", "train", "test")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("changes", nargs="*", metavar="key=value", help="settings in place of the preset's")
    add("--preset", default="tiny", help="tiny, paper, or a YAML file")
    add("--output", default="runs/sdrrl")
    add("--until", choices=UNTIL, default="test", help="stop after these stages; `train` for accelerate launch")
    add("--plan", action="store_true", help="print the stages and their state, and stop")
    add("--jobs", type=int, default=1, help="processes that share the work; 2 on two cores, for tiny models")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict | None:
    args = parse_arguments(argv)
    file = Path(args.preset) if args.preset.endswith((".yaml", ".yml")) else CONFIGS / f"{args.preset}.yaml"
    recipe = load_config(Recipe, [file], args.changes)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if (threads := threads_for([recipe.model, str(recipe.translator.model)])) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    state = PartialState(cpu=not torch.accelerator.is_available())
    console = make_console(quiet=not state.is_main_process)
    study = Study(recipe, args.output, state.num_processes)
    if args.plan:
        for number, (condition, name) in enumerate(study.p.plan(), start=1):
            console.print(f"{number:3d}  {condition:<5s}  {name}")
    if missing := recipe.missing():
        raise ValueError(f"not there: {', '.join(missing)}; give each as key=PATH")
    if args.plan:
        return None

    begun = time.perf_counter()

    def tell(stage: Stage) -> None:
        left = sum(not other.done for other in study.stages)
        console.rule(f"{stage.name}   ({left} to do, {(time.perf_counter() - begun) / 60:.1f} min)")

    with helpers(__file__, argv, args.jobs, study.p.run.folder, helper=args.worker) as check:
        for _ in study.p.work(lambda: study.until(args.until), tell):
            check()
    if args.until != "test" or args.worker:
        return None
    metrics = {"recipe": dataclasses.asdict(recipe), **environment(), **collect_metrics(study)}
    write_json(study.p.run.folder / "metrics.json", metrics)
    write_plots(metrics, study.p.run.folder)
    console.print(transfer_table(metrics))
    console.print(results_table(metrics))
    console.print(f"metrics.json, plots, answers and models are in {study.p.run.folder}")
    return metrics


if __name__ == "__main__":
    run_script(main)
