"""MT-LLM (arXiv 2406.12739): an MT encoder stacked under an LLM by self-distillation, and what it transfers.

    python examples/mt_llm.py --preset tiny data=PATH_TO_MULTI30K --jobs 2 --output runs/mt_llm   # minutes on two cores
    python examples/mt_llm.py --preset paper task=FOLDER text=PATH_OR_HUB_NAME --output runs/mt_llm   # on a GPU

key=value go before the preset's; --plan prints the stages, and what is not at hand, and stops. The same command again
goes on where it stopped; a changed setting makes new only what depends on it. --output gets metrics.json and figures.
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
from fused_kd.training.mt_llm.config import MTLLM
from fused_kd.training.mt_llm.experiment import Experiment
from fused_kd.training.mt_llm.results import print_tables, write_plots
from fused_kd.training.presets import threads_for
from fused_kd.training.report import environment
from fused_kd.training.runs import write_json
from fused_kd.training.sharing import helpers

CONFIGS = Path(__file__).parent / "configs" / "mt_llm"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="settings in place of the preset's")
    add("--preset", choices=("tiny", "paper"), default="tiny", help="a file in examples/configs/mt_llm")
    add("--output", default="runs/mt_llm")
    add("--plan", action="store_true", help="print each stage with its state and stop")
    add("--jobs", type=int, default=1, help="processes that share the work; 2 on two cores, for tiny models")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> dict | None:
    args = parse_arguments(argv)
    config = load_config(MTLLM, [CONFIGS / f"{args.preset}.yaml"], args.overrides)
    console = make_console()
    missing = config.missing_inputs()
    experiment = Experiment(config, args.output)
    if args.plan:
        lines = [f"{state:6} {name}" for state, name in experiment.pipeline.plan()]
        console.print("\n".join(lines))
    if missing:
        raise ValueError("not at hand:\n" + "\n".join(missing))
    if args.plan:
        return None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tiny = [] if isinstance(config.llm, str) else [config.llm.model]
    if (threads := threads_for(tiny)) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)

    with helpers(__file__, argv, args.jobs, Path(args.output), helper=args.worker) as check:
        for _ in experiment.pipeline.work(tell=lambda stage: console.rule(stage.name)):
            check()
    if args.worker:
        return None
    metrics = {**experiment.collect(), **environment()}
    write_json(Path(args.output) / "metrics.json", metrics)
    write_plots(metrics, args.output)
    print_tables(metrics, console)
    console.print(f"metrics.json, figures and the stages are in {args.output}")
    return metrics


if __name__ == "__main__":
    run_script(main)
