"""CycleDistill: a model bootstraps its own translation from monolingual text (arXiv 2506.19952).

    python examples/cycle_distill.py --preset tiny --jobs 2 --output runs/cycle       # two CPU cores, real captions
    python examples/cycle_distill.py --preset paper model=HUB_NAME direction=en-hi data=PATH monolingual=sentences.txt \
        --output runs/hindi
    python examples/cycle_distill.py --preset tiny --plan keep_parallel=true --output runs/cycle      # what it would do

Everything goes to --output. The same command again skips finished stages and resumes an interrupted one; other settings
do again what depends on them, beside what is there. docs/cycle_distill.md has every option.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# tiny models: threads that spin at barriers cost more than they give
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

import torch
from transformers.utils import logging

from fused_kd.training.command import make_console, run_script
from fused_kd.training.config import load_config
from fused_kd.training.cycle_distill.iterations import Cycle
from fused_kd.training.cycle_distill.report import describe, metrics, results_table, write_plot
from fused_kd.training.cycle_distill.settings import CycleDistill
from fused_kd.training.data.prompts import render_sample
from fused_kd.training.presets import threads_for
from fused_kd.training.runs import write_json
from fused_kd.training.sharing import helpers

CONFIGS = Path(__file__).parent / "configs" / "cycle_distill"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*", metavar="FILE.yaml | key=value", help="later ones override earlier ones")
    parser.add_argument("--preset", choices=sorted(path.stem for path in CONFIGS.glob("*.yaml")), default="tiny")
    parser.add_argument("--output", default="runs/cycle_distill")
    parser.add_argument("--plan", action="store_true", help="print every stage and its state, and stop")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the work; 2 on two cores")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--restart-from-base", action="store_true", help="the same as restart_from_base=true")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict | None:
    args = parse_arguments(argv)
    files = [CONFIGS / f"{args.preset}.yaml", *(text for text in args.config if "=" not in text)]
    overrides = [text for text in args.config if "=" in text]
    overrides += ["restart_from_base=true"] if args.restart_from_base else []
    config = load_config(CycleDistill, files, overrides)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = make_console()
    if (threads := threads_for([config.model])) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    cycle = Cycle(config, args.output)
    if args.plan:
        for state, name in cycle.plan():
            console.print(f"{state:7} {name}")
    cycle.check()
    if args.plan:
        return None

    shown = cycle.stages.rows(cycle.stages.real_pairs or cycle.stages.texts.valid[:1])[0]
    console.print("a row:", render_sample(cycle.stages.tokenizer, shown))

    with helpers(__file__, argv, args.jobs, Path(args.output), helper=args.worker) as check:
        for stage in cycle.work(tell=lambda stage: console.rule(stage.name)):
            check()
            for each in cycle.scored_by(stage):
                console.print(describe(cycle, each))
    if args.worker:
        return None
    found = metrics(cycle)
    write_json(Path(args.output) / "metrics.json", found)
    write_plot(found, Path(args.output) / "chrf.png")
    console.print(results_table(found))
    console.print(f"metrics.json, chrf.png and a folder a stage are in {args.output}")
    return found


if __name__ == "__main__":
    run_script(main)
