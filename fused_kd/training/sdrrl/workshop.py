"""What a study's stages share: its data, tokenizer, models, translator and dictionaries."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from fused_kd.training.data.instructions import Instruction, load_instructions
from fused_kd.training.data.pairs import Pair, load_pairs
from fused_kd.training.data.prompts import PairDataset, concatenate, tokenize_pairs, tokenize_texts
from fused_kd.training.evaluation.evaluate import score
from fused_kd.training.pipeline import Pipeline, Stage
from fused_kd.training.presets import PRESETS, load_model, load_tokenizer, train_tokenizer
from fused_kd.training.runs import write_json
from fused_kd.training.sdrrl.dictionary import Dictionary, load_dictionary
from fused_kd.training.sdrrl.recipe import Recipe, Training
from fused_kd.training.sdrrl.rows import Task, dump, read_jsonl, read_tasks, render, write_rows
from fused_kd.training.sdrrl.tasks import write_captions
from fused_kd.training.sdrrl.translate import (
    CausalTranslator,
    DictionaryTranslator,
    Seq2SeqTranslator,
    Translator,
    translate_texts,
)
from fused_kd.training.specs import parse_objective
from fused_kd.training.stages import train_stage


class Workshop:
    """Data and models of a recipe, as stages of a pipeline.

    Args:
        recipe: what to do.
        p: where its stages lie.
        processes: of the distributed run that trains.

    Attributes:
        tasks: the stage of the data.
        translator: the stage that trains the translator, or stands for one that is there.
        translator_test: its scores on captions; None for one that is there.
    """

    def __init__(self, recipe: Recipe, p: Pipeline, processes: int = 1) -> None:
        self.recipe, self.p, self.processes = recipe, p, processes
        self.tasks = self._tasks()
        presets = [name for name in (recipe.model, recipe.translator.model) if name in PRESETS]
        about = {"vocab": recipe.vocab, "wording": recipe.wording}
        self.tokens = p.add("tokenizer", self._train_tokenizer, about, needs=[self.tasks]) if presets else None
        self.translator = self._translator()
        self.translator_test = self._translator_test()

    def _tasks(self) -> Stage:
        r = self.recipe
        if r.captions is not None:
            settings = dataclasses.asdict(r.captions) | {"languages": r.languages}
            return self.p.add("tasks", self._write_captions, settings, files=[settings.pop("data")])
        settings = dataclasses.asdict(cast(Any, r.instructions)) | {"languages": r.languages}
        tests = settings.pop("tests") or {}
        files = [settings.pop("data"), settings.pop("parallel"), *tests.values()]
        return self.p.add("tasks", self._read_instructions, settings | {"tests": sorted(tests)}, files=files)

    def _write_captions(self, out: Path) -> None:
        write_json(out / "counts.json", write_captions(out, cast(Any, self.recipe.captions), *self.recipe.languages))

    def _read_instructions(self, out: Path) -> None:
        about, (source, target) = cast(Any, self.recipe.instructions), self.recipe.languages
        found = load_instructions(about.data, "train", limit=about.limit)
        if len(found) <= about.valid:
            raise ValueError(f"instructions.valid={about.valid}: expected less than the {len(found)} instructions")
        tasks = [Task(f"instruction-{number}", "", {source: text}) for number, text in enumerate(found)]
        pairs = load_pairs(about.parallel, "train", f"{source}-{target}", limit=about.parallel_sentences)
        tests = [
            Task(f"test-{language}-{number}", "", {language: text})
            for language, path in (about.tests or {}).items()
            for number, text in enumerate(load_instructions(path, "all"))
        ]
        files = {
            "instructions": [dump(task) for task in tasks[: -about.valid]],
            "validation": [dump(task) for task in tasks[-about.valid :]],
            "parallel": [{source: pair.source, target: pair.target} for pair in pairs],
            "test": [dump(task) for task in tests],
        }
        write_rows(out, files)
        write_json(out / "counts.json", {name: len(rows) for name, rows in files.items()})

    def read(self, name: str) -> list[Task]:
        """Tasks of the data: "instructions", "validation", "dev", "test"."""
        return read_tasks(self.tasks.folder / f"{name}.jsonl")

    def asked(self) -> list[Task]:
        """The transfer set's tasks, those for validation after the others."""
        return self.read("instructions") + self.read("validation")

    # models

    def _train_tokenizer(self, out: Path) -> None:
        r = self.recipe
        texts = [text for row in read_jsonl(self.tasks.folder / "translator.jsonl") for text in row.values()]
        texts += [text for row in read_jsonl(self.tasks.folder / "base.jsonl") for text in row.values()]
        for a, b in (r.languages, r.languages[::-1]):
            texts += [r.wording.answer(a, b), r.wording.translation(a, b)]
        train_tokenizer(texts, r.vocab).save_pretrained(out)

    def tokenizer(self, name: str) -> Any:
        """That of a model by name: the study's own where it is a preset."""
        return load_tokenizer(self.tokens.folder if self.tokens is not None and name in PRESETS else name)

    def model(self, name: str, stage: Stage | None, seed: int = 0) -> Any:
        """The model that a stage trained; without one the named model as it is, or a preset's random weights."""
        where = name if stage is None or not (stage.folder / "model").is_dir() else stage.folder / "model"
        dtype = torch.float32 if name in PRESETS else self.recipe.dtype
        return load_model(where, self.tokenizer(name), seed, dtype=dtype)

    def generator(self, name: str, stage: Stage) -> tuple[Any, Any]:
        """The same model on the device where it generates, and its tokenizer."""
        model = self.model(name, stage)
        return model.cuda() if torch.cuda.is_available() else model, self.tokenizer(name)

    @property
    def pretrains(self) -> bool:
        """Whether the model before is made here, one for each seed."""
        return self.recipe.model in PRESETS

    def start(self, seed: int) -> Stage:
        """The stage that trains the model before, or stands for one that is there."""
        r = self.recipe
        if not self.pretrains:
            # named once, so that a large file is read for its fingerprint once
            return self.p.add("model", lambda out: None, {"model": r.model}, files=[r.model])
        about = {"model": r.model, "pretraining": r.pretraining, "seed": seed, "max_length": r.max_length}
        needs = [self.tasks, cast(Stage, self.tokens)]
        work = lambda out: self._train_base(stage, seed)  # noqa: E731
        stage: Stage = self.p.add(f"base-s{seed}", work, about | {"prompt": r.prompt}, needs=needs)
        return stage

    def _train_base(self, stage: Stage, seed: int) -> None:
        r = self.recipe
        found = [Instruction(**row) for row in read_jsonl(self.tasks.folder / "base.jsonl")]
        # a caption alone has no prompt
        prompts = [render(i, r.prompt) if i.instruction else "" for i in found]
        rows = tokenize_texts(self.tokenizer(r.model), prompts, [i.output for i in found], r.max_length)
        self.fit(stage, r.model, None, rows, None, cast(Training, r.pretraining), seed)

    def fit(
        self,
        stage: Stage,
        name: str,
        start: Stage | None,
        rows: PairDataset,
        valid: PairDataset | None,
        training: Training,
        seed: int,
    ) -> None:
        """Cross-entropy on the answers, from a stage's model; with ``valid`` the best checkpoint is kept."""
        settings = training.settings(seed, self.processes, "last" if valid is None else "best")
        student = lambda: self.model(name, start, seed)  # noqa: E731
        spec, tokenizer = parse_objective("sft"), self.tokenizer(name)
        train_stage(self.p.run, stage.name, student, None, spec, rows, tokenizer, settings, valid)

    # translation

    def _translator(self) -> Stage:
        t = self.recipe.translator
        if t.model not in PRESETS:
            file = self.recipe.dictionary if t.kind == "dictionary" else cast(str, t.model)
            return self.p.add("translator", lambda out: None, {"kind": t.kind, "codes": t.codes}, files=[file])
        about = {"model": t.model, "pretraining": t.pretraining, "max_length": self.recipe.max_length}
        needs = [self.tasks, cast(Stage, self.tokens)]
        stage: Stage = self.p.add("translator", lambda out: self._train_translator(stage), about, needs=needs)
        return stage

    def _train_translator(self, stage: Stage) -> None:
        r, name = self.recipe, cast(str, self.recipe.translator.model)
        tokenizer, pairs = self.tokenizer(name), read_jsonl(self.tasks.folder / "translator.jsonl")
        rows = [
            tokenize_pairs(tokenizer, "tiny", [Pair(row[a], row[b]) for row in pairs], f"{a}-{b}", r.max_length)
            for a, b in (r.languages, r.languages[::-1])
        ]
        self.fit(stage, name, None, concatenate(rows), None, cast(Training, r.translator.pretraining), 0)

    def _translator_test(self) -> Stage | None:
        if self.recipe.translator.model not in PRESETS:
            return None
        about = {"decoding": self.recipe.translator.decoding}
        return self.p.add("translator-test", self._test_translator, about, needs=[self.tasks, self.translator])

    def _test_translator(self, out: Path) -> None:
        """chrF and BLEU on the captions of the development tasks."""
        tasks = [task for task in self.read("dev") if task.kind != "completion"][:200]
        scores = {}
        for a, b in (self.recipe.languages, self.recipe.languages[::-1]):
            sources, references = ([task.texts[language].input for task in tasks] for language in (a, b))
            made = self.translate(out / f"{a}-{b}", sources, a, b)
            scores[f"{a}-{b}"] = score([made[text] for text in sources], references).as_dict()
        write_json(out / "scores.json", scores)

    def translate(self, folder: Path, texts: list[str], source: str, target: str) -> dict[str, str]:
        """As ``translate_texts``, by the recipe's translator."""
        return translate_texts(folder, texts, self._engine(), source, target)

    def _engine(self) -> Translator:
        t = self.recipe.translator
        if t.kind == "dictionary":
            return DictionaryTranslator(self.dictionaries())
        name = cast(str, t.model)
        if t.kind == "seq2seq":
            return Seq2SeqTranslator(name, t.codes, t.decoding)
        return CausalTranslator(partial(self.generator, name, self.translator), "tiny", t.decoding)

    def dictionaries(self) -> dict[str, Dictionary]:
        """Of both directions, by ``"FROM-TO"``."""
        forward, backward = load_dictionary(self.recipe.dictionary)
        source, target = self.recipe.languages
        return {f"{source}-{target}": forward, f"{target}-{source}": backward}
