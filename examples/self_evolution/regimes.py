"""Where each method is best: a plane of student strength x share of wrong references x method.

    python examples/self_evolution/regimes.py --preset regimes-cpu --data PATH --output runs/regimes
    python examples/self_evolution/regimes.py --preset regimes-gpu --data PATH --alma PATH --jobs 12 --minutes 8

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
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

# tiny models: threads that spin at barriers cost more than they give
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

import numpy as np
import torch
import transformers
from kd_methods import REGIME_METHODS
from transformers import PrinterCallback

import fused_kd
from fused_kd.info import devices, versions
from fused_kd.integrations.labels import LABEL_PAD
from fused_kd.training.collate import Collator, padding_id
from fused_kd.training.data import Pair, load_directions, misalign, parse_direction
from fused_kd.training.fit import fit, training_arguments
from fused_kd.training.generate import generate
from fused_kd.training.models import load_model, on_accelerator, shared_tokenizer, threads_for
from fused_kd.training.prompts import (
    PromptTemplate,
    Rows,
    completion_rows,
    encode_prompts,
    get_prompt,
    tokenize_directions,
    training_texts,
)
from fused_kd.training.score import score
from fused_kd.training.script import parse, run_script
from fused_kd.training.stage import Stages, fingerprint, fingerprint_file, helpers, lock, read_json, write_json
from fused_kd.training.trainer import KDTrainer

Pairs = dict[str, list[Pair]]
DOCUMENT = PromptTemplate("document", "{source_language}: {source}\n{target_language}:")
HISTORY = ("step", "loss", "difficulty", "hard_fraction", "hard_fraction_t")
GRACE = 40.0  # seconds that the last runs are waited for


@dataclass(frozen=True)
class Start:
    """How a model comes to be: next-token loss on documents, then SFT on clean pairs with the prompt."""

    pretrain: dict[str, Any]  # TrainingArguments, over those of Config.train
    tune: dict[str, Any] = field(default_factory=dict)
    pairs: int | None = None  # the first so many of each direction that tune sees; None: all that it may see


@dataclass(frozen=True)
class Documents:
    """What language models are pre-trained on, from the pairs that students may see."""

    sentences: int = 4  # of one language in a document; a row of the corpus serves one language alone
    parallel: int = 4000  # documents of each direction with a sentence and a translation
    wrong: float = 0.5  # the share of them whose translation is another sentence's
    seed: int = 0


@dataclass
class Config:
    """Everything that the numbers depend on; of each direction where there is a number of pairs."""

    data: str = "data/multi30k"
    alma: str | None = None  # more parallel text, for the pre-training alone
    directions: list[str] = field(default_factory=lambda: ["de-en", "en-de", "cs-en", "en-cs"])
    test: str = "test_2016_flickr"
    valid: str = "valid"
    train_limit: int | None = None
    alma_limit: int | None = None
    test_limit: int | None = None
    valid_limit: int | None = None
    prompt: str = "paper"
    max_length: int = 160
    max_new_tokens: int = 48
    batch_size: int = 64  # sentences that are translated together
    vocab: int = 4000
    held: int = 1500  # the last pairs: the distillation set, which no student has seen
    documents: dict = field(default_factory=dict)
    teacher: str = "medium-teacher"
    student: str = "tiny-student"
    train: dict = field(default_factory=dict)  # TrainingArguments of every training
    start_teacher: dict = field(default_factory=dict)
    strengths: dict = field(default_factory=dict)  # name: the fields of Start, weakest first
    distil: dict = field(default_factory=dict)  # TrainingArguments of every distillation
    rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3])
    noises: list[float] = field(default_factory=lambda: [0.0, 0.3, 0.6])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    paper: str = "language_model"  # the strength of the paper's regime, where every method is tried
    paper_methods: list[str] = field(default_factory=lambda: list(REGIME_METHODS))
    methods: list[str] = field(
        default_factory=lambda: ["sft", "forward_kd", "skew", "self_evolution", "floor_0.3"]
    )  # of the whole plane

    def __post_init__(self) -> None:
        get_prompt(self.prompt)
        if unknown := sorted({*self.methods, *self.paper_methods} - REGIME_METHODS.keys()):
            raise ValueError(f"methods must be of {', '.join(REGIME_METHODS)}, got {', '.join(unknown)}")
        if self.paper not in self.strengths:
            raise ValueError(f"paper must be one of {', '.join(self.strengths)}, got {self.paper!r}")
        for name in ("rates", "noises", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} must have at least one value")
        self.starts = {name: build(Start, value, f"strengths.{name}") for name, value in self.strengths.items()}
        self.starts["teacher"] = build(Start, self.start_teacher, "start_teacher")
        self.pretraining = build(Documents, self.documents, "documents")


@dataclass
class Running:
    """Where and how; the numbers do not depend on it."""

    output: str = "runs/regimes"
    results: str | None = None  # where results are written, small files alone; default: output
    jobs: int = 1  # processes that share the work; 2 on two cores, 12 on a GPU
    minutes: float | None = None  # no run begins after so long; None: all of them are done
    rehearse: bool = False  # the same path with everything shrunk, on a CPU
    worker: bool = False  # this process is a helper of another one
    until: float | None = None  # of a helper: the clock's time after which it begins no run


def build(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass of a mapping. Raises ``ValueError`` that says where the mapping is wrong."""
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {str(error).replace(f'{kind.__name__}.__init__() ', '')}") from error


def rehearsed(config: Config) -> Config:
    """The same plane at a size that teaches nothing: random tiny models, two steps a training, a CPU."""
    two = {"max_steps": 2, "per_device_train_batch_size": 4}
    starts = {
        name: value | {key: {**value[key], **two} for key in ("pretrain", "tune") if value.get(key)}
        for name, value in {**config.strengths, "teacher": config.start_teacher}.items()
    }
    small = {"train_limit": 90, "alma_limit": 30, "test_limit": 3, "valid_limit": 3, "held": 8, "max_new_tokens": 6}
    few = {"rates": config.rates[:2], "noises": config.noises[:2], "seeds": config.seeds[:2]}
    models = {"vocab": 500, "teacher": "tiny-student", "student": "tiny-student"}
    return dataclasses.replace(
        config, **small, **few, **models, methods=config.methods[:2], documents=config.documents | {"parallel": 10},
        train=config.train | {"use_cpu": True}, start_teacher=starts.pop("teacher"), strengths=starts,
        distil=config.distil | two,
    )  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One distilled student."""

    strength: str
    noise: float
    method: str
    seed: int
    rate: float | None = None  # None: the chosen one

    def __str__(self) -> str:
        rate = "" if self.rate is None else f".lr{self.rate:g}"
        return f"{self.strength}.noise{self.noise:g}.{self.method}{rate}.seed{self.seed}"


def groups_of(config: Config) -> list[list[Trial]]:
    """The runs that count: seeds outermost, the paper's regime before the plane; the first alone are of use."""
    paper = [(config.paper, config.noises[0], method) for method in config.paper_methods]
    plane = [(s, n, m) for n in config.noises for s in config.strengths for m in config.methods]
    cells = [paper, [cell for cell in plane if cell not in paper]]
    return [[Trial(*cell, seed) for cell in part] for seed in config.seeds for part in cells]


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
            rows = make().rows
            columns = {
                "ids": np.array([token for row in rows for token in row["input_ids"]], np.int32),
                "lengths": np.array([len(row["input_ids"]) for row in rows]),
                "prompts": np.array([sum(label == LABEL_PAD for label in row["labels"]) for row in rows]),
            }
            np.savez(folder / "rows.npz", **columns)

        return self.stages(title, work, self.texts | about, needs=[self.tokenizer_folder])

    def documents(self) -> Path:
        about = dataclasses.asdict(self.config.pretraining)
        return self.stored("documents", self.pretraining_rows, documents=about)

    def clean_pairs(self, name: str) -> Path:
        """What a model is tuned on: the teacher on all pairs, students on those before the new ones."""
        texts, count = (self.train if name == "teacher" else self.seen), self.config.starts[name].pairs
        pairs = {direction: found[:count] for direction, found in texts.items()}
        who = "teacher" if name == "teacher" else "student"
        return self.stored(f"{who}.pairs", partial(self.rows, pairs), who=who, pairs=count)

    def pretraining_rows(self) -> Rows:
        """Documents of one language, and of a sentence with its translation, or with another's: loss on all tokens."""
        how, made = self.config.pretraining, []
        for texts in documents(self.corpora, self.config.directions, how.sentences):
            made += [
                {"input_ids": [*ids, self.tokenizer.eos_token_id]} for ids in encode_prompts(self.tokenizer, texts)
            ]
        for number, corpus in enumerate(self.corpora):
            for direction, pairs in corpus.items():
                some = random.Random(f"{how.seed}-{number}-{direction}").sample(pairs, min(how.parallel, len(pairs)))
                mixed = misalign(some, how.wrong, how.seed)
                prompts = [DOCUMENT.render(pair.source, direction) for pair in mixed]
                targets = [pair.target for pair in mixed]
                found = completion_rows(self.tokenizer, prompts, targets, self.config.max_length)
                made += [{"input_ids": row["input_ids"]} for row in found if row is not None]
        cut = [row["input_ids"][: self.config.max_length] for row in made]
        return Rows([{"input_ids": ids, "labels": ids} for ids in cut])

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
            what = {"model": self.model(name, seed), "objective": fused_kd.SFT(), "train_dataset": read_rows(rows)}
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
                self.keep({"trial": "references", "made": references})
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
            self.keep({"trial": str(trial), "made": made})
            self.tell(folder, {"kind": "run"} | about)

        return self.stages(str(trial), work, self.tested, needs=[trained])

    def tell(self, folder: Path, record: dict[str, Any]) -> None:
        """A finished piece, in its folder and as a line of runs.jsonl."""
        write_json(folder / "record.json", record)
        append(self.told / "runs.jsonl", line(record))

    def keep(self, translations: dict[str, Any]) -> None:
        append(self.told / "hypotheses.jsonl.gz", gzip.compress(line(translations)))

    def pieces(self) -> dict[str, Callable[[], object]]:
        """Every piece of work, in the order in which it is wanted."""
        starts = ["teacher", *self.config.strengths]
        found: dict[str, Callable[[], object]] = {f"{name}.start": partial(self.started, name) for name in starts}
        tuned = [name for name in starts if self.config.starts[name].tune]
        found |= {f"{name}.pairs": partial(self.clean_pairs, name) for name in tuned}  # while others pre-train
        for trials in groups_of(self.config):
            for trial in trials:
                if trial.seed == self.config.seeds[0]:
                    rates = (self.at_rate(trial, rate) for rate in self.config.rates)
                    found |= {f"{each}.trained": partial(self.trained, each) for each in rates}
            found |= {str(trial): partial(self.translated, trial) for trial in trials}
        return found


def read_rows(folder: Path) -> Rows:
    """What :meth:`Regimes.stored` wrote."""
    with np.load(folder / "rows.npz") as found:
        ids, ends, prompts = found["ids"].tolist(), found["lengths"].cumsum().tolist(), found["prompts"].tolist()
    rows = []
    for begin, end, prompt in zip([0, *ends[:-1]], ends, prompts, strict=True):
        own = ids[begin:end]
        rows.append({"input_ids": own, "labels": [LABEL_PAD] * prompt + own[prompt:]})
    return Rows(rows)


def documents(corpora: Sequence[Pairs], directions: Sequence[str], sentences: int) -> Iterator[list[str]]:
    """For each language, texts of so many sentences; no row of a corpus gives more than one language a sentence."""
    languages = sorted({language for direction in directions for language in parse_direction(direction)})
    for number, language in enumerate(languages):
        found: dict[str, None] = {}
        for corpus in corpora:
            for direction, pairs in corpus.items():
                if language in parse_direction(direction):
                    side = parse_direction(direction).index(language)
                    found |= dict.fromkeys(pair[side] for pair in pairs[number :: len(languages)])
        texts = list(found)
        random.Random(number).shuffle(texts)
        yield ["\n".join(texts[i : i + sentences]) for i in range(0, len(texts), sentences)]


def line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def append(path: Path, content: bytes) -> None:
    """At the end of a file, whole, whatever other processes write there."""
    with lock(path.with_name(f".{path.name}.lock")), open(path, "ab") as file:
        file.write(content)


def before(until: float | None, piece: Callable[[], object]) -> Callable[[], object]:
    """The piece, not begun after that time."""
    return lambda: piece() if until is None or time.time() < until else None


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[Config, Running]:
    config, running = parse((Config, Running), argv, configs=Path(__file__).parent, description=__doc__)
    return (rehearsed(config) if running.rehearse else config), running


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    began = time.time()
    config, running = parse_arguments(argv)
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
        plane.stages.share({name: before(until, piece) for name, piece in plane.pieces().items()})
        if running.worker:
            write_json(ended / f"{os.getpid()}.json", {})
            return None
        while until and len(list(ended.glob("*.json"))) < running.jobs - 1 and time.time() < until + GRACE:
            time.sleep(0.5)
    import regimes_report  # pandas and matplotlib: of the first process alone

    about = {"settings": dataclasses.asdict(config), "versions": versions(), "machine": devices()}
    write_json(plane.told / "about.json", about | {"seconds": round(time.time() - began)})
    if not (plane.told / "runs.jsonl").is_file():
        raise ValueError("minutes: no run was finished in that time; the same command goes on")
    results = regimes_report.collect(plane.told, tests=until is None)
    regimes_report.write_report(results, plane.told)
    print(f"results.json, results.md, figures, runs.jsonl and hypotheses.jsonl.gz are in {plane.told}")
    return results


if __name__ == "__main__":
    run_script(main)
