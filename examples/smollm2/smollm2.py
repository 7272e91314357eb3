"""A real language model distilled into a part of its own layers: which objective helps, and at which learning rate.

    pip install 'fused_kd[train,real]'
    python examples/smollm2/smollm2.py --preset cpu --text news.jsonl.gz --output runs/smollm2      # two CPU cores
    python examples/smollm2/smollm2.py --preset gpu --jobs 6 --text news.jsonl.gz --output runs/smollm2
    python examples/smollm2/smollm2.py --preset gpu --rehearse --output runs/rehearsal    # does all of it run?
    python examples/smollm2/smollm2.py --preset tiny --output runs/tiny       # random models, built-in text

The teacher is SmolLM2-135M-Instruct, or any --teacher. Some of its layers are the student, which a short distillation
heals. From this one start every arm trains equally long, at each learning rate; validation text chooses the rate, and
further seeds and the test text judge it. results.json has what is finished after every arm; the same command goes on
where it stopped.
"""

from __future__ import annotations

import os
import sys
import time

# few threads: those that spin at barriers cost more than they give
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from smollm2_options import Config, Running, Trial, rehearsed
from smollm2_study import Study

from fused_kd.training.prompts import render_sample
from fused_kd.training.script import make_console, parse, run_script
from fused_kd.training.stage import helpers, lock, write_json


class Work:
    """A process's share of a study's arms, until its time is over; after each of them the results are written."""

    def __init__(self, study: Study, running: Running) -> None:
        self.study, self.running = study, running
        self.locks, self.folder = Path(running.output) / ".locks", Path(running.results or running.output)

    def over(self) -> bool:
        return self.running.until is not None and time.time() > self.running.until

    def arm(self, trial: Trial) -> None:
        """Train it, unless it is finished or its time has come too late; one that another process trains is awaited."""
        with lock(self.locks / f"arm.{trial}"):
            if self.study.finished(trial) is not None or self.over():
                return
            self.study.trained(trial)
        self.report()

    def report(self) -> dict[str, Any]:
        """Write results.json of what is finished by now."""
        with lock(self.locks / "results"):
            if not self.running.keep_models:
                self.study.prune()
            results = self.study.results()
            write_json(self.folder / "results.json", results)
        return results

    def all(self) -> None:
        """The healing, the first seed's arms, and the others' at the rates that these have chosen."""
        share = self.study.stages.share
        share(self.study.before())
        for trials in (self.study.first_trials, self.study.further_trials):
            share({str(trial): partial(self.arm, trial) for trial in trials()})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    config, running = parse((Config, Running), argv, configs=Path(__file__).parent, description=__doc__)
    if running.rehearse:
        config = rehearsed(config)
    if running.minutes is not None and running.until is None:
        running.until = time.time() + 60 * running.minutes
    given = [
        *(sys.argv[1:] if argv is None else argv),
        *([] if running.until is None else ["--until", f"{running.until}"]),
    ]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console, folder = make_console(), Path(running.output)
    with helpers(__file__, given, running.jobs, folder, helper=running.worker):
        study = Study(config, running)
        work = Work(study, running)
        if not running.worker:
            rows = ", ".join(f"{len(rows)} {name}" for name, rows in study.rows.items())
            console.print(f"rows of {config.length} tokens: {rows}; the first:")
            console.print(render_sample(study.tokenizer, {k: v[:16] for k, v in study.rows["heal"][0].items()}))
        work.all()
        if running.worker:
            return {}
        results = work.report()
    if results["unfinished"]:
        console.print(f"not finished in time: {len(results['unfinished'])} arms; the same command goes on with them")
    if results["runs"]:
        import smollm2_report  # pandas and matplotlib, without which results.json is there all the same

        smollm2_report.write(results, work.folder)
        print(smollm2_report.tables(results))
    console.print(f"results.json, results.md and curves.png are in {work.folder}, the students in {running.output}")
    return results


if __name__ == "__main__":
    run_script(main)
