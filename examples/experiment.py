"""A table of the paper from data to figures: pretrain a pair, distil with every method, translate, test, draw.

    python examples/experiment.py examples/configs/experiments/multi30k.yaml data=PATH --jobs 2 --output runs/multi30k

The same command again goes on where it stopped, and ends with results.json, results.md, results.csv and figures in
--output. With --report they are made of what there is.
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
from fused_kd.training.grid.collect import collect_results
from fused_kd.training.grid.experiment import Experiment, Grid, Job, load_methods
from fused_kd.training.grid.results import print_tables, write_report
from fused_kd.training.presets import threads_for
from fused_kd.training.runs import write_json
from fused_kd.training.sharing import helpers

METHODS = Path(__file__).parent / "configs" / "methods"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("config", nargs="+", metavar="FILE.yaml | key=value", help="later ones override earlier ones")
    add("--output", default="runs/experiment")
    add("--methods", default=str(METHODS), help="folder with a YAML file a method")
    add("--jobs", type=int, default=1, help="processes that share the work; 2 on two cores, for tiny models")
    add("--threads", type=int, help="CPU threads a process; default: the preset's best, else PyTorch's")
    add("--report", action="store_true", help="train nothing: results and figures of what there is")
    add("--plan", action="store_true", help="print the jobs and stop")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict | None:
    args = parse_arguments(argv)
    files = [text for text in args.config if "=" not in text]
    experiment = load_config(Experiment, files, [text for text in args.config if "=" in text])
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if threads := args.threads or threads_for([experiment.teacher.model, experiment.student.model]):
        torch.set_num_threads(threads)
    console = make_console()
    grid = Grid(experiment, load_methods(args.methods), args.output)
    if args.plan:
        for job in grid.jobs():
            console.print(f"{'done   ' if grid.done(job.name) else 'to do  '} {job.name}")
        grid.check()
        return None

    def tell(job: Job, done: int, total: int) -> None:
        console.rule(f"{job.name}   ({done} of {total} done)")

    if not args.report:
        with helpers(__file__, argv, args.jobs, grid.run.folder, helper=args.worker) as check:
            for _ in grid.work(tell):
                check()
    if args.worker:
        return None
    results = collect_results(grid)
    write_json(grid.run.folder / "results.json", results)
    write_report(results, grid.run.folder)
    print_tables(results, console)
    console.print(f"results.json, results.md, results.csv, figures, hypotheses and models are in {grid.run.folder}")
    return results


if __name__ == "__main__":
    run_script(main)
