"""Where each method is best: a plane of student strength x share of wrong references x method.

    python examples/self_evolution/regimes.py --preset cpu --data PATH --output runs/regimes
    python examples/self_evolution/regimes.py --preset gpu --data PATH --alma PATH --jobs 12 --minutes 8

Tiny language models are pre-trained on text of all languages and on noisy parallel documents; a larger one learns all
clean pairs and becomes the teacher. Students of several strengths, from a briefly pre-trained one to a trained
translator, then learn new pairs with every method. The learning rate of every cell of the plane is chosen from one grid
on validation text, with the first seed; the test set is translated at the chosen rate with every seed. Each finished
run is a line of runs.jsonl; the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import gc
import gzip
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

# tiny models: threads that spin at barriers cost more than they give
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

import torch
import transformers
from kd_methods import REGIME_METHODS
from regimes_config import Config, Trial, groups_of, parse_arguments
from regimes_data import DOCUMENT, Pairs, pretraining_rows, read_rows, write_rows
from transformers import PrinterCallback

import fused_kd
from fused_kd.info import devices, versions
from fused_kd.training.collate import Collator, padding_id
from fused_kd.training.data import load_directions, misalign
from fused_kd.training.fit import fit, training_arguments
from fused_kd.training.generate import generate
from fused_kd.training.models import load_model, on_accelerator, shared_tokenizer, threads_for
from fused_kd.training.prompts import (
    PromptTemplate,
    Rows,
    get_prompt,
    tokenize_directions,
    training_texts,
)
from fused_kd.training.score import score
from fused_kd.training.script import run_script
from fused_kd.training.stage import Stages, fingerprint, fingerprint_file, helpers, lock, read_json, write_json
from fused_kd.training.trainer import KDTrainer

HISTORY = ("step", "loss", "difficulty", "hard_fraction", "hard_fraction_t")
GRACE = 40.0  # seconds that the last runs are waited for
PAUSE = 3.0  # seconds after a failure


class Regimes:
    """The plane in a folder. Most methods return the folder of a finished stage, whose work they do if need be."""

    def __init__(self, config: Config, stages: Stages, results: str | Path | None = None) -> None:
        self.told = Path(results or stages.folder)
        self.told.mkdir(parents=True, exist_ok=True)
        self.config, self.stages, self.template = config, stages, get_prompt(config.prompt)
        load = partial(load_directions, config.data, directions=config.directions)
        self.train: Pairs = load(split="train", limit=config.train_limit)
        self.valid: Pairs = load(split=config.valid, limit=config.valid_limit)
        self.tests: Pairs = load(split=config.test, limit=config.test_limit)
        if config.held >= (fewest := min(map(len, self.train.values()))):
            raise ValueError(f"held must be below the {fewest} training pairs of a direction, got {config.held}")
        self.seen = {direction: pairs[: -config.held] for direction, pairs in self.train.items()}
        self.new = {direction: pairs[-config.held :] for direction, pairs in self.train.items()}
        alma = sorted(Path(config.alma).glob("train*")) if config.alma else []
        prompt = dataclasses.asdict(self.template)
        files = {path.name: fingerprint_file(path) for path in alma}
        self.texts = {
            "prompt": prompt,
            "max_length": config.max_length,
            "texts": fingerprint([self.train, config.held]),
            "alma": [files, config.alma_limit],
        }
        self.kept: dict[Any, Any] = {}  # rows and models that the next run needs too

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    @cached_property
    def corpora(self) -> list[Pairs]:
        """What students may see of the data, and the text that is for the pre-training alone."""
        config, found = self.config, [self.seen]
        if config.alma is not None:
            found.append(load_directions(config.alma, "train", config.directions, limit=config.alma_limit))
        return found

    @cached_property
    def tokenizer_folder(self) -> Path:
        def work(folder: Path) -> None:
            some = {direction: pairs[::10] for direction, pairs in self.seen.items()}  # the prompt's words, often
            sides = (side for corpus in self.corpora for pairs in corpus.values() for pair in pairs for side in pair)
            texts = chain(training_texts(self.template, some), dict.fromkeys(sides))
            shared_tokenizer(["tiny-student"], folder, texts, config.vocab)

        config = self.config
        return self.stages("tokenizer", work, self.texts | {"vocab": config.vocab})

    @cached_property
    def tokenizer(self) -> Any:
        return shared_tokenizer(["tiny-student"], self.tokenizer_folder, (), self.config.vocab)

    def model(self, name: str | Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
        return load_model(name, self.tokenizer, seed, dtype=dtype)

    @cached_property
    def half(self) -> torch.dtype:
        """Of teachers and of students that translate."""
        return torch.bfloat16 if self.config.train.get("bf16") else torch.float32

    def rows(self, pairs: Pairs) -> Rows:
        return tokenize_directions(self.tokenizer, self.template, pairs, self.config.max_length)

    def stored(self, title: str, make: Callable[[], Rows], **about: Any) -> Path:
        """Tokenised rows, which several trainings read."""

        def work(folder: Path) -> None:
            write_rows(folder / "rows.npz", make())

        return self.stages(title, work, self.texts | about, needs=[self.tokenizer_folder])

    def documents(self) -> Path:
        """What language models are pre-trained on."""
        how, length = self.config.pretraining, self.config.max_length

        def make() -> Rows:
            return pretraining_rows(self.tokenizer, self.corpora, how, length)

        return self.stored("documents", make, documents=dataclasses.asdict(how))

    def clean_pairs(self, name: str) -> Path:
        """What a model is tuned on: the teacher on all pairs, students on those before the new ones."""
        texts, count = (self.train if name == "teacher" else self.seen), self.config.starts[name].pairs
        pairs = {direction: found[:count] for direction, found in texts.items()}
        who = "teacher" if name == "teacher" else "student"
        return self.stored(f"{who}.pairs", partial(self.rows, pairs), who=who, pairs=count)

    def arguments(self, folder: Path, *options: Mapping[str, Any]) -> Any:
        given: dict[str, Any] = {}
        for more in (self.config.train, *options):
            given |= more
        return training_arguments(folder, **{"disable_tqdm": True, **given})

    def trainer(self, folder: Path, options: Sequence[Mapping[str, Any]], **what: Any) -> KDTrainer:
        more = {"data_collator": Collator(padding_id(self.tokenizer)), "processing_class": self.tokenizer}
        return KDTrainer(**what, args=self.arguments(folder, *options), eval_metrics=False, **more)

    def fitted(self, title: str, name: str | Path, seed: int, options: dict, rows: Path) -> Path:
        """A model, trained with the next-token loss of stored rows."""

        def work(folder: Path) -> None:
            found = read_rows(rows / "rows.npz")
            what = {"model": self.model(name, seed), "objective": fused_kd.SFT(), "train_dataset": found}
            fit(self.trainer(folder, [options, {"seed": seed}], **what), folder, title)

        preset = isinstance(name, str)
        settings = {"train": self.config.train, "options": options, "seed": seed, "model": name if preset else None}
        return self.stages(title, work, settings, needs=[rows, *([] if preset else [Path(name).parent])])

    def start(self, name: str) -> Path:
        """The "teacher", which has seen all pairs, or the student of a strength, which has seen all but the new."""
        how = self.config.starts[name]
        who, seed = ("teacher", 0) if name == "teacher" else ("student", 1)
        folder = self.fitted(f"{who}.pretrained", getattr(self.config, who), seed, how.pretrain, self.documents())
        if how.tune:
            folder = self.fitted(f"{name}.tuned", folder / "model", seed, how.tune, self.clean_pairs(name))
        return folder

    def translate(
        self, model: Any, pairs: Pairs, template: PromptTemplate
    ) -> tuple[dict[str, list[str]], dict[str, Any]]:
        """Greedy translations, all directions in the same batches, and their scores by direction."""
        prompts = [template.render(pair.source, direction) for direction, found in pairs.items() for pair in found]
        how = {"batch_size": self.config.batch_size, "max_new_tokens": self.config.max_new_tokens}
        lines, made = iter(generate(model, self.tokenizer, prompts, progress=False, **how)), {}
        for direction, found in pairs.items():
            made[direction] = [next(lines) for _ in found]
        scores = {d: score(made[d], [pair.target for pair in found]).as_dict() for d, found in pairs.items()}
        return made, {d: {key: found[key] for key in ("bleu", "chrf")} for d, found in scores.items()}

    def started(self, name: str) -> Path:
        """The scores of a start or of the teacher, by the prompt and in the form of the documents."""
        trained = self.start(name)

        def work(folder: Path) -> None:
            model = on_accelerator(self.model(trained / "model", dtype=self.half))
            by_prompt, by_document = (self.translate(model, self.tests, t)[1] for t in (self.template, DOCUMENT))
            steps = {key: read_json(trained / "training.json")[key] for key in ("parameters", "steps", "seconds")}
            about = {"kind": "start", "strength": name, "scores": by_prompt, "document_scores": by_document, **steps}
            if name == "teacher":
                references = {d: [pair.target for pair in pairs] for d, pairs in self.tests.items()}
                self.keep("references", "references", references)
            self.tell(folder, about)

        return self.stages(f"{name}.start", work, self.tested, needs=[trained])

    @cached_property
    def tested(self) -> dict[str, Any]:
        new, bf16 = self.config.max_new_tokens, bool(self.config.train.get("bf16"))
        return self.texts | {"test": fingerprint(self.tests), "max_new_tokens": new, "bf16": bf16}

    def needs(self, trial: Trial) -> list[Path]:
        needed = [trial.strength, *(["teacher"] if REGIME_METHODS[trial.method].needs_teacher else [])]
        return [self.start(name) for name in needed]

    def settings(self, trial: Trial) -> dict[str, Any]:
        method = dataclasses.asdict(REGIME_METHODS[trial.method]) | {"label": None}
        train = self.config.train | self.config.distil
        return dataclasses.asdict(trial) | {"objective": method, "train": train, "held": self.config.held}

    def distil(self, trial: Trial, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The trained weights, and what is known of the training."""
        needed = self.needs(trial)
        rows = self.once(
            ("rows", trial.noise, trial.seed),
            lambda: self.rows({d: misalign(pairs, trial.noise, trial.seed) for d, pairs in self.new.items()}),
        )
        teacher = None
        if len(needed) > 1:
            teacher = self.once("teacher", lambda: on_accelerator(self.model(needed[1] / "model", dtype=self.half)))
        options = [self.config.distil, {"learning_rate": trial.rate, "seed": trial.seed, "save_strategy": "no"}]
        loss = REGIME_METHODS[trial.method].loss
        what = {"model": self.model(needed[0] / "model"), "teacher": teacher, "objective": loss, "train_dataset": rows}
        trainer = self.trainer(folder, options, **what)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        history = [{k: round(e[k], 4) for k in HISTORY if k in e} for e in trainer.state.log_history if "loss" in e]
        about = {"steps": trainer.state.global_step, "seconds": round(trainer.metrics.total_seconds, 2)}
        weights = {name: value.to("cpu", self.half) for name, value in trainer.model.state_dict().items()}
        return weights, about | {"history": history}

    def trained(self, trial: Trial) -> Path:
        """A student at one learning rate, and of the first seed its scores on validation text."""

        def work(folder: Path) -> None:
            began = time.time()
            weights, about = self.distil(trial, folder)
            about["wall"] = round(time.time() - began, 2)
            if trial.seed == self.config.seeds[0]:
                about["valid"] = self.translate(self.decoder(weights), self.valid, self.template)[1]
                about["valid_wall"] = round(time.time() - began - about["wall"], 2)
            torch.save(weights, folder / "weights.pt")
            write_json(folder / "trained.json", about)
            gc.collect()

        settings = self.tested | self.settings(trial) | {"valid": fingerprint(self.valid)}
        return self.stages(str(trial), work, settings, needs=self.needs(trial))

    def decoder(self, weights: dict[str, torch.Tensor]) -> Any:
        """A student with these weights that translates."""
        fresh = self.once(
            "decoder", lambda: on_accelerator(self.model(self.config.student, dtype=self.half).to(self.half))
        )
        fresh.load_state_dict(weights)
        return fresh

    def at_rate(self, trial: Trial, rate: float) -> Trial:
        return dataclasses.replace(trial, seed=self.config.seeds[0], rate=rate)

    def chosen(self, trial: Trial) -> tuple[float, dict[float, float]]:
        """The rate with the highest chrF on validation text, and what each rate has there.

        chrF, as BLEU is near 0 and rough where students hardly translate.
        """
        found = {}
        for rate in self.config.rates:
            valid = read_json(self.trained(self.at_rate(trial, rate)) / "trained.json")["valid"]
            found[rate] = sum(scores["chrf"] for scores in valid.values()) / len(valid)
        return max(found, key=lambda rate: found[rate]), found

    def translated(self, trial: Trial) -> Path:
        """The test set by a student at its cell's rate."""
        rate, valid = self.chosen(trial)
        trained = self.trained(dataclasses.replace(trial, rate=rate))

        def work(folder: Path) -> None:
            began, weights = time.time(), torch.load(trained / "weights.pt", weights_only=True)
            made, scores = self.translate(self.decoder(weights), self.tests, self.template)
            about = dataclasses.asdict(trial) | read_json(trained / "trained.json")
            about |= {"rate": rate, "valid_chrf": {f"{r:g}": round(v, 3) for r, v in valid.items()}, "scores": scores}
            about["test_wall"] = round(time.time() - began, 2)
            about.pop("valid", None)
            self.keep(f"{trial.strength}.noise{trial.noise:g}", str(trial), made)
            self.tell(folder, {"kind": "run"} | about)

        grid = {"rates": self.config.rates}  # the record has the validation's numbers of all of them
        return self.stages(str(trial), work, self.tested | grid, needs=[trained])

    def tell(self, folder: Path, record: dict[str, Any]) -> None:
        """A finished piece, in its folder and as a line of runs.jsonl."""
        write_json(folder / "record.json", record)
        self.append("runs.jsonl", line(record))

    def keep(self, cell: str, name: str, made: dict[str, list[str]]) -> None:
        """Translations, for the bootstraps; a file a cell."""
        self.append(f"hypotheses.{cell}.jsonl.gz", gzip.compress(line({"trial": name, "made": made})))

    def append(self, name: str, content: bytes) -> None:
        """At the end of a file of the results, whole, whatever other processes write there."""
        with lock(self.stages.folder / ".locks" / name), open(self.told / name, "ab") as file:
            file.write(content)

    def pieces(self) -> dict[str, Callable[[], object]]:
        """Every piece of work, in the order in which it is wanted."""
        starts = ["teacher", *self.config.strengths]
        found: dict[str, Callable[[], object]] = {f"{name}.start": partial(self.started, name) for name in starts}
        tuned = [name for name in starts if self.config.starts[name].tune]
        found |= {f"{name}.pairs": partial(self.clean_pairs, name) for name in tuned}  # while others pre-train
        waiting: list[Trial] = []  # a block's test sets come after the next block's trainings: nobody waits for them
        for trials in groups_of(self.config):
            for _, block in groupby(trials, key=lambda trial: (trial.strength, trial.noise)):
                own = list(block)
                first = [trial for trial in own if trial.seed == self.config.seeds[0]]
                rates = (self.at_rate(trial, rate) for trial in first for rate in self.config.rates)
                found |= {f"{each}.trained": partial(self.trained, each) for each in rates}
                found |= {str(trial): partial(self.translated, trial) for trial in waiting}
                waiting = own
        found |= {str(trial): partial(self.translated, trial) for trial in waiting}
        return found


def line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def work_until(stages: Stages, pieces: Mapping[str, Callable[[], object]], until: float | None) -> None:
    """All pieces, none begun after that time; with a time, one that fails, as for lack of memory, is tried again."""
    failed: list[str] = []

    def guarded(name: str, piece: Callable[[], object]) -> None:
        if until is None:
            piece()
        elif time.time() < until:
            try:
                piece()
            except RuntimeError:
                traceback.print_exc()
                failed.append(name)
                time.sleep(PAUSE)

    while True:
        failed.clear()
        stages.share({name: partial(guarded, name, piece) for name, piece in pieces.items()})
        if not failed:
            return


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    began = time.time()
    config, running = parse_arguments(argv, __doc__)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if (threads := threads_for([config.teacher, config.student])) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    folder, ended = Path(running.output), Path(running.output) / "ended"
    until = began + 60 * running.minutes if running.minutes is not None and running.until is None else running.until
    given = [*(sys.argv[1:] if argv is None else argv), *([] if until is None else [f"--until={until}"])]
    if not running.worker:
        for old in ended.glob("*"):
            old.unlink()
    with helpers(__file__, given, running.jobs, folder, helper=running.worker):
        plane = Regimes(config, Stages(folder), running.results)
        about = {"settings": dataclasses.asdict(config), "versions": versions(), "machine": devices()}
        if not running.worker:  # before the work: a killed run has its report too
            write_json(plane.told / "about.json", about)
        work_until(plane.stages, plane.pieces(), until)
        if running.worker:
            write_json(ended / f"{os.getpid()}.json", {})
            return None
        while until and len(list(ended.glob("*.json"))) < running.jobs - 1 and time.time() < until + GRACE:
            time.sleep(0.5)
    import regimes_report  # pandas and matplotlib: of the first process alone

    write_json(plane.told / "about.json", about | {"seconds": round(time.time() - began)})
    if not (plane.told / "runs.jsonl").is_file():
        raise ValueError("minutes: no run was finished in that time; the same command goes on")
    results = regimes_report.collect(plane.told, tests=until is None)
    regimes_report.write_report(results, plane.told)
    print(f"results.json, results.md, figures, runs.jsonl and hypotheses are in {plane.told}")
    return results


if __name__ == "__main__":
    run_script(main)
