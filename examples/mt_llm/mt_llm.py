"""MT-LLM (arXiv 2406.12739): an MT encoder stacked under an LLM by self-distillation, and what it transfers.

    python examples/mt_llm/mt_llm.py --preset tiny --data PATH_TO_MULTI30K --jobs 2 --output runs/mt_llm
    python examples/mt_llm/mt_llm.py --preset paper --task FOLDER --text PATH_OR_HUB_NAME --output runs/mt_llm

The first takes minutes on two cores, the second a GPU. The same command again goes on where it stopped; a changed
setting makes new only what depends on it. The output folder gets metrics.json and figures.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

# tiny models: threads that spin at barriers cost more than they give
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

import numpy as np
import stacked
import torch
import transformers
from captions import Translator, mt_rows, read_captions, read_parallel, tiny_mt, write_task
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import M2M100Config, TrainingArguments
from transformers.utils import logging

import fused_kd as fk
from fused_kd.training import Collator, KDTrainer, LoRA, ModuleTrainer, Stages, helpers, models, parse, parse_objective
from fused_kd.training.collate import padding_id
from fused_kd.training.files import sound
from fused_kd.training.fit import TRAINED, fit, load_trained, training_arguments
from fused_kd.training.loading import load_pretrained, read_adapter_config
from fused_kd.training.reading import file_rows, read_rows
from fused_kd.training.script import build, make_console, run_script
from fused_kd.training.stage import read_json, read_lines, tell, write_json, write_lines

CAPTIONS = "captions"
HELD_OUT = 1000  # sentences of stage 1's text to measure on, at most a tenth of it


@dataclass(frozen=True)
class Arm:
    """A way of stage 3."""

    mse_weight: float = 1.0  # of the MSE to the task model's pooled states; the paper has this alone
    objective: str | None = None  # as of parse_objective, on the decisions through the task head; None: none
    kd_weight: float = 1.0  # of that
    adapted: bool = True  # start from stage 1; False: from a fresh projection and adapters

    def __post_init__(self) -> None:
        if self.objective is not None:
            parse_objective(self.objective)
        if min(self.mse_weight, self.kd_weight) < 0 or not self.mse_weight + self.kd_weight * bool(self.objective) > 0:
            raise ValueError(f"expected weights of at least 0, and something to learn, got {self}")


@dataclass
class Config:
    """Everything that the numbers depend on."""

    languages: list[str]  # those to transfer to
    codes: dict | None = None  # the MT tokenizer's names of them and of en (NLLB: deu_Latn); None: it has no such names
    mt: str | None = None  # folder or hub name of an encoder-decoder MT model; None: a tiny one, trained on captions
    llm: str | None = None  # of a causal LM; None: a tiny one, trained on English captions
    llm_adapters: list[str] = field(default_factory=list)  # LoRA adapters merged into it first (LLM2Vec's)
    bidirectional: bool = False  # let the LLM attend both ways (for one that was made for it, as LLM2Vec's are)
    tiny_mt: dict = field(default_factory=dict)  # of M2M100Config
    mt_vocab: int = 4000
    mt_noise: float = 0.15  # the share of its tokens that an English source lacks
    mt_captions: int | None = None  # training captions that the tiny MT model learns from; None: all
    mt_text: dict = field(default_factory=dict)  # and other parallel text: by language, a file of rows with it and "en"
    tiny_llm: str = "small-student"  # one of the presets
    llm_vocab: int = 3000
    data: str | None = None  # folder of parallel captions, for the tiny models and the captions task
    tests: list[str] = field(default_factory=lambda: ["test_2016_flickr"])  # files of it, taken together
    limit: int | None = None  # captions of its training set
    task: str = CAPTIONS  # or a folder with train.jsonl, test.LANGUAGE.jsonl and perhaps retrieval.jsonl
    text: str | None = None  # English text of stage 1: JSON rows or a hub name; None: the task's text.jsonl
    text_limit: int | None = None  # rows of it
    train_mt: dict = field(default_factory=dict)  # TrainingArguments: of the tiny models
    train_llm: dict = field(default_factory=dict)
    adapt: dict = field(default_factory=dict)  # of stage 1
    train_task: dict = field(default_factory=dict)  # of stage 2
    distil: dict = field(default_factory=dict)  # of stage 3
    lora: dict = field(default_factory=dict)  # the stacked model's adapters
    task_lora: dict | None = None  # those of stage 2; None: the whole body is trained
    least_squares: int = 0  # sentences from which to set the projection first; 0: leave it random
    arms: dict = field(default_factory=lambda: {"mse": {}})  # ways of stage 3; None leaves out one of the preset
    encoders: list[str] = field(default_factory=lambda: ["frozen", "tuned"])  # heads on the MT encoder to compare with
    max_length: int = 512  # tokens of a text
    translate: dict = field(default_factory=dict)  # options of generate, for translate-test
    eval_batch: int = 64
    dtype: str = "auto"  # of the loaded weights
    activation_checkpointing: bool = False  # of the LLM in stages 1 and 3
    seeds: list[int] = field(default_factory=lambda: [0, 1])  # of everything after the two models
    pretraining_seed: int = 0  # of those

    def __post_init__(self) -> None:
        if not self.languages or "en" in self.languages:
            raise ValueError(f"languages must be some, without the task's own 'en', got {self.languages!r}")
        if self.codes and (missing := [name for name in ("en", *self.languages) if name not in self.codes]):
            raise ValueError(f"codes must name {', '.join(missing)} as well, got {self.codes!r}")
        if self.codes and self.mt is None:
            raise ValueError(f"codes must be left out with the tiny mt, got {self.codes!r}")
        if self.data is None and (self.task == CAPTIONS or self.mt is None or self.llm is None):
            raise ValueError("data must name a folder of parallel captions for the captions task and the tiny models")
        if self.llm_adapters and self.llm is None:
            raise ValueError(f"llm_adapters are for an llm by name, got {self.llm_adapters!r} with the tiny one")
        if self.tiny_llm not in models.PRESETS:
            raise ValueError(f"tiny_llm must be one of {', '.join(models.PRESETS)}, got {self.tiny_llm!r}")
        for name, least in {"max_length": 1, "eval_batch": 1, "mt_captions": 0}.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")
        if unknown := sorted(self.mt_text.keys() - {*self.languages}):
            raise ValueError(f"mt_text must be of {', '.join(self.languages)}, got {unknown[0]!r}")
        if self.mt is None and self.mt_captions == 0 and not self.mt_text:
            raise ValueError("mt_captions=0 and no mt_text: the tiny MT model has nothing to learn from")
        trainings = dict.fromkeys(("train_mt", "train_llm", "adapt", "train_task", "distil"), TrainingArguments)
        for name, cls in {"tiny_mt": M2M100Config, **trainings}.items():
            known = inspect.signature(cls).parameters
            if unknown := sorted(getattr(self, name).keys() - known.keys()):
                raise ValueError(f"{name}: {cls.__name__} has no {unknown[0]!r}")
        self.ways: dict[str, Arm] = {k: build(Arm, f"arms.{k}", v) for k, v in self.arms.items() if v is not None}
        if not self.ways or not self.seeds:
            raise ValueError(f"arms and seeds must be some, got {self.arms!r}, {self.seeds!r}")
        if bad := [name for name in self.encoders if name not in ("frozen", "tuned")]:
            raise ValueError(f"encoders must be some of frozen, tuned, or none, got {bad[0]!r}")
        self.adapters = build(LoRA, "lora", self.lora)
        self.task_adapters = None if self.task_lora is None else build(LoRA, "task_lora", self.task_lora)

    def check_inputs(self) -> None:
        """Raise ``ValueError`` with a line for each data set, tokenizer or model that is not at hand."""
        from transformers import AutoConfig

        wrong = []

        def check(key: str, name: str | None, *loads: Callable[..., object]) -> None:
            try:
                for load in loads if name is not None else ():
                    load(name)
            except Exception as error:  # of many kinds: no such name, no connection, no such configuration
                wrong.append(f"{key}={name!r}: {str(error).strip().splitlines()[0]}")

        if self.data is not None and not Path(self.data).expanduser().is_dir():
            files = ", ".join(["train", *self.tests])
            wrong.append(f"data must be a folder with files of parallel captions ({files}), got {self.data!r}")
        files = ["train", *(f"test.{name}" for name in ("en", *self.languages)), *([] if self.text else ["text"])]
        for name in [] if self.task == CAPTIONS else files:
            check("task", f"{self.task}/{name}.jsonl", os.stat)
        for name, path in self.mt_text.items():
            check(f"mt_text.{name}", path, os.stat)
        if self.text is not None and not Path(self.text).exists():
            from datasets import load_dataset_builder

            check("text", self.text, lambda name: load_dataset_builder(*name.split(":", 1)))
        for key, model in (("mt", self.mt), ("llm", self.llm)):
            check(key, model, partial(load_pretrained, AutoConfig), models.load_tokenizer)
        for name in self.llm_adapters:
            check("llm_adapters", name, read_adapter_config)
        if wrong:
            raise ValueError("not at hand:\n" + "\n".join(wrong))


@dataclass
class Running:
    """What changes no number."""

    output: str = "runs/mt_llm"  # folder of the stages, metrics.json and the figures
    results: str | None = None  # folder of the small files: pieces.jsonl, metrics.json, figures; None: `output`
    jobs: int = 1  # processes that share the work; 2 on two cores, for tiny models
    worker: bool = False  # this process is one of them


class Recipe:
    """The stages, each a method that returns the folder of its finished work, and does it where it was not done."""

    def __init__(self, config: Config, stages: Stages, results: Path | None = None) -> None:
        self.config, self.stages, self.results = config, stages, results or stages.folder
        self.reading = {"max_length": config.max_length, "dtype": config.dtype, "bidirectional": config.bidirectional}
        self._tokenizers: dict[str, Any] = {}

    # what there is before stage 1: a task with English text, and the two models, tiny ones made here

    @cached_property
    def task(self) -> Path:
        """A folder with the task's files, or, of a task by name, what stands for their content."""
        c = self.config
        if c.task != CAPTIONS:
            return self.stages("task", lambda out: None, {}, files=[c.task])
        given = {"languages": c.languages, "tests": c.tests, "limit": c.limit}
        return self.stages("task", partial(write_task, data=str(c.data), **given), given, files=[str(c.data)])

    @cached_property
    def mt(self) -> Path:
        """The stage of the MT model."""
        c, seed, everyone = self.config, self.config.pretraining_seed, ["en", *self.config.languages]
        if c.mt is not None:
            return self.stages("mt", lambda out: None, {"mt": c.mt, "is": models.model_content(c.mt), "codes": c.codes})

        def work(out: Path) -> None:
            captions = read_captions(str(c.data), "train", everyone, c.limit)[: c.mt_captions]
            found = [captions, *(read_parallel(Path(path), ["en", name]) for name, path in c.mt_text.items())]
            texts = (text for rows in found for row in rows for text in row.values())
            tokenizer, model = tiny_mt(texts, seed, c.mt_vocab, **c.tiny_mt)
            longest = c.max_length if c.mt_text else None  # captions are short
            rows = stacked.Texts(row for part in found for row in mt_rows(tokenizer, part, c.mt_noise, seed, longest))
            pad = stacked.Pad(dict.fromkeys(("source", "target"), padding_id(tokenizer)))
            self.fit(Translator(model), rows, pad, c.train_mt, seed, out)
            for made in (model, tokenizer):
                made.save_pretrained(out / "mt")

        settings = {"sizes": c.tiny_mt, "vocab": c.mt_vocab, "noise": c.mt_noise, "fit": c.train_mt}
        settings |= {"languages": c.languages, "seed": seed, "limit": c.limit, "captions": c.mt_captions}
        if c.mt_text:
            settings |= {"text": sorted(c.mt_text), "max_length": c.max_length}
        return self.stages("mt", work, settings, files=[str(c.data), *(c.mt_text[name] for name in sorted(c.mt_text))])

    @cached_property
    def llm(self) -> Path:
        """The stage of the LLM."""
        c, seed = self.config, self.config.pretraining_seed
        if c.llm is not None:
            content = {name: models.model_content(name) for name in (c.llm, *c.llm_adapters)}
            return self.stages("llm", lambda out: None, {"llm": c.llm, "adapters": c.llm_adapters, "is": content})

        def work(out: Path) -> None:
            texts = [row["en"] for row in read_captions(str(c.data), "train", ["en"], c.limit)]
            tokenizer = models.train_tokenizer(texts, c.llm_vocab)
            ids = [[*row, tokenizer.eos_token_id] for row in tokenizer(texts)["input_ids"]]
            arguments = training_arguments(out, **{"seed": seed, **c.train_llm})
            rows = [{"input_ids": row, "labels": row} for row in ids]
            more = {"data_collator": Collator(padding_id(tokenizer)), "processing_class": tokenizer}
            model = models.load_model(c.tiny_llm, tokenizer, seed)
            fit(KDTrainer(model, None, fk.SFT(), args=arguments, train_dataset=rows, **more), out)

        settings = {"model": c.tiny_llm, "vocab": c.llm_vocab, "fit": c.train_llm, "seed": seed, "limit": c.limit}
        return self.stages("llm", work, settings, files=[str(c.data)])

    # the three stages, and what they are compared with

    def adapt(self, seed: int) -> Path:
        """Stage 1: the stacked model learns the plain LLM's sentences, from English text alone."""
        c, places = self.config, (self.place("mt"), self.place("llm"))

        def work(out: Path) -> None:
            texts = self.texts()
            held = texts[: min(HELD_OUT, max(len(texts) // 10, 2))]
            rows = stacked.Texts({"text": text} for text in texts[len(held) :])
            pad = self.pad(text="mt", llm="llm")
            model = self.stacked(seed).eval()
            target = self.embed(model.plain, "llm", held)
            record: dict[str, Any] = {"variance": stacked.variance_of(target)}
            if some := rows[: c.least_squares]:
                batches = (pad(some[start : start + c.eval_batch]) for start in range(0, len(some), c.eval_batch))
                record["projection"] = stacked.fit_projection(model, batches)
            record["before"] = stacked.unexplained(self.embed(model, "mt", held), target)
            model.save(out / "before", *places)
            self.fit(stacked.Adaptation(model, record["variance"]), rows, pad, c.adapt, seed, out)
            record["after"] = stacked.unexplained(self.embed(model.eval(), "mt", held), target)
            model.save(out / "after", *places)
            write_json(out / "adaptation.json", record)

        settings = {"seed": seed, "fit": c.adapt, "lora": c.adapters, "least_squares": c.least_squares}
        settings |= {"text": c.text, "limit": c.text_limit, **self.reading}
        needs, files = [self.mt, self.llm], [] if c.text is None else [c.text]
        return self.stages(f"adapt.s{seed}", work, settings, needs=needs if files else [*needs, self.task], files=files)

    def train_classifier(self, name: str, seed: int) -> Path:
        """Stage 2, "task": the LLM and a head learn the English task. "encoder-...": the MT encoder does."""
        c, kind = self.config, "llm" if name == "task" else "mt"

        def work(out: Path) -> None:
            model, rows = self.classifier(name, seed), self.training_rows(kind)
            self.fit(model, rows, self.pad(text=kind), c.train_task, seed, out)

        settings = {"seed": seed, "fit": c.train_task, **self.reading}
        settings |= {"lora": c.task_adapters} if kind == "llm" else {}
        return self.stages(f"{name}.s{seed}", work, settings, needs=[getattr(self, kind), self.task])

    def states(self, seed: int) -> Path:
        """The task model's head, and its pooled states of the task's sentences."""
        taught = self.train_classifier("task", seed)

        def work(out: Path) -> None:
            model = self.classifier("task", seed, taught).eval()
            states = self.embed(model.embedder, "llm", self.items("train")[0]).contiguous()
            save_file({"states": states, "head": model.head.weight.detach().cpu()}, out / "states.safetensors")

        return self.stages(f"states.s{seed}", work, {"seed": seed}, needs=[taught])

    def distil(self, name: str, seed: int) -> Path:
        """Stage 3: the stacked model learns the task model's sentences, and its decisions where the arm says so."""
        c, arm, states = self.config, self.config.ways[name], self.states(seed)
        adapted = self.adapt(seed) if arm.adapted else None

        def work(out: Path) -> None:
            made = load_file(states / "states.safetensors")
            module = self.distillation(arm, made["head"], seed, adapted and adapted / "after")
            self.fit(module, self.training_rows("mt", made["states"]), self.pad(text="mt"), c.distil, seed, out)

        settings = {"seed": seed, "arm": arm, "fit": c.distil, "lora": c.adapters, **self.reading}
        needs = [self.mt, self.llm, self.task, states] + ([adapted] if adapted else [])
        return self.stages(f"distil-{name}.s{seed}", work, settings, needs=needs)

    def trainings(self, seed: int) -> dict[str, Callable[[], Path]]:
        """What a seed's numbers are of."""
        names = ("task", *(f"encoder-{name}" for name in self.config.encoders))
        made: dict[str, Callable[[], Path]] = {name: partial(self.train_classifier, name, seed) for name in names}
        made["adapt"] = partial(self.adapt, seed)
        return made | {f"distil-{name}": partial(self.distil, name, seed) for name in self.config.ways}

    def tests(self, seed: int) -> dict[str, Callable[[], Path]]:
        """Accuracies of all that is trained on the task, in an order in which two processes seldom wait."""
        ways, encoders = self.config.ways, self.config.encoders
        names = ("task", *(f"distil-{name}" for name in ways), *(f"encoder-{name}" for name in encoders))
        return {name: partial(self.classify, name, seed) for name in names}

    def translations(self) -> Path:
        """The tests in English, for translate-test, and their BLEU."""
        import sacrebleu

        c = self.config

        def work(out: Path) -> None:
            tokenizer, references, scores = self.tokenizer("mt"), self.items("test.en")[0], {}
            model = stacked.load_seq2seq(self.place("mt"), dtype=self.dtype).to(self.device)
            forced = {} if c.codes is None else {"forced_bos_token_id": models.language_id(tokenizer, c.codes["en"])}
            for language in c.languages:
                path, texts = out / f"{language}.txt", self.items(f"test.{language}")[0]
                if not path.is_file():
                    ids = self.encode("mt", texts, language)
                    write_lines(path, translate(model, tokenizer, ids, c.eval_batch, **c.translate, **forced))
                if len(references) == len(texts):
                    scores[language] = round(sacrebleu.corpus_bleu(read_lines(path), [references]).score, 2)
            write_json(out / "bleu.json", scores)

        settings = {"translate": c.translate, "languages": c.languages, **self.reading}
        made = self.stages("translations", work, settings, needs=[self.mt, self.task])
        tell(self.results / "pieces.jsonl", "bleu", read_json(made / "bleu.json"))
        return made

    def evaluate(self, seed: int) -> Path:
        """One seed's numbers: every system's accuracy in every language, and retrieval before and after stage 1."""
        c = self.config
        folders = {name: train() for name, train in self.trainings(seed).items()}
        tests = [test() for test in self.tests(seed).values()]

        def work(out: Path) -> None:
            found = [read_json(folder / "scores.json") for folder in tests]
            metrics = {
                "accuracy": {system: scores for scores_of_one in found for system, scores in scores_of_one.items()},
                "retrieval": self.retrieve(seed, folders["adapt"]),
                "adaptation": read_json(folders["adapt"] / "adaptation.json"),
                "training": {name: read_json(folder / "training.json") for name, folder in folders.items()},
            }
            write_json(out / "metrics.json", metrics)

        settings = {"seed": seed, "arms": c.ways, "lora": c.adapters, "languages": c.languages}
        made = self.stages(f"evaluate.s{seed}", work, settings, needs=[self.task, *tests, *folders.values()])
        tell(self.results / "pieces.jsonl", f"seed {seed}", read_json(made / "metrics.json"))
        return made

    def classify(self, name: str, seed: int) -> Path:
        """Scores of what one training made: ``{system: {language: accuracies}}``; of "task" also translate-test's.

        ``predictions.jsonl`` has the classes themselves.
        """
        c, kind, arm = (
            self.config,
            "llm" if name == "task" else "mt",
            self.config.ways.get(name.removeprefix("distil-")),
        )
        trained, translated = self.trainings(seed)[name](), self.translations() if name == "task" else None
        taught = None if arm is None else self.states(seed)

        def work(out: Path) -> None:
            tests = {name: self.items(f"test.{name}") for name in ("en", *c.languages)}
            own = {name: (texts, name) for name, (texts, _) in tests.items()}
            if arm is not None and taught is not None:
                module: Any = self.distillation(arm, load_file(taught / "states.safetensors")["head"], seed)
                load_trained(module, trained / "model" / TRAINED)
            else:
                module = self.classifier(name, seed, trained)

            def predict(given: Mapping[str, tuple[list[str], str]]) -> dict[str, list[str]]:
                made = {key: self.embed(module.eval().logits, kind, *texts).argmax(1) for key, texts in given.items()}
                return {key: [self.classes[index] for index in indices] for key, indices in made.items()}

            if translated is None:
                system = f"MT {name.replace('-', ', ')}" if name.startswith("encoder") else name
                found = {system.replace("distil-", "MT-LLM, "): predict(own)}
            else:
                english = {key: (read_lines(translated / f"{key}.txt"), "en") for key in c.languages}
                found = {"LLM alone": predict(own), "translate-test": predict(english)}
            lines = [
                json.dumps({"system": system, "language": key, "labels": labels})
                for system, by_language in found.items()
                for key, labels in by_language.items()
            ]
            write_lines(out / "predictions.jsonl", lines)
            scores = {
                system: {key: accuracies(labels, tests[key][1]) for key, labels in by_language.items()}
                for system, by_language in found.items()
            }
            write_json(out / "scores.json", scores)

        settings = {"seed": seed, "languages": c.languages, **self.reading} | ({"lora": c.adapters} if arm else {})
        needs = [self.task, trained, *(folder for folder in (taught, translated) if folder is not None)]
        made = self.stages(f"test-{name}.s{seed}", work, settings, needs=needs)
        tell(self.results / "pieces.jsonl", f"test {seed} {name}", read_json(made / "scores.json"))
        return made

    def retrieve(self, seed: int, adapted: Path) -> dict[str, dict[str, float]]:
        """``{system: {language: retrieval@1}}``: sentences whose English one is nearest; empty without parallel rows.

        The stacked model's sentences are looked for among the plain LLM's English ones, those of the LLM and of the
        encoder alone among their own.
        """
        if not (self.place("task") / "retrieval.jsonl").is_file():
            return {}
        rows, languages = self.rows("retrieval"), self.config.languages

        def states(function: Any, kind: str, name: str) -> Tensor:
            return self.embed(function, kind, [row[name] for row in rows], name)

        def scores(function: Any, kind: str, english: Tensor, names: Sequence[str] = languages) -> dict[str, float]:
            return {name: retrieval_at_1(states(function, kind, name), english) for name in names}

        found = {}
        for when in ("before", "after"):
            model = self.stacked(seed, adapted / when).eval()
            english = states(model.plain, "llm", "en")
            found[f"{when} stage 1"] = scores(model, "mt", english, ["en", *languages])
        found["LLM alone"] = scores(model.plain, "llm", english)
        found["MT encoder alone"] = scores(model.encoder, "mt", states(model.encoder, "mt", "en"))
        return found

    def metrics(self) -> dict[str, Any]:
        """Settings, the task's counts, each seed's numbers, and means over seeds of balanced accuracy and retrieval."""
        seeds = {str(seed): read_json(self.evaluate(seed) / "metrics.json") for seed in self.config.seeds}
        return {
            "config": asdict(self.config),
            "task": read_json(self.place("task") / "task.json"),
            "chance": 1 / len(self.classes),
            "bleu": read_json(self.translations() / "bleu.json"),
            "mean": {key: means([scores_of(s, key) for s in seeds.values()]) for key in ("accuracy", "retrieval")},
            "seeds": seeds,
        }

    # texts, tokens and models, as the stages want them

    def place(self, kind: str) -> Any:
        """Where the task's files lie (a path), or what ``"mt"`` or ``"llm"`` is loaded from (a text)."""
        c = self.config
        if kind == "task":
            return self.task if c.task == CAPTIONS else Path(c.task)
        return (c.mt or str(self.mt / "mt")) if kind == "mt" else (c.llm or str(self.llm / "model"))

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Of one of the task's files."""
        return [row.value for row in sound(file_rows(self.place("task") / f"{name}.jsonl", None))]

    def items(self, name: str) -> tuple[list[str], list[str]]:
        """Texts and labels of one of the task's files."""
        rows = self.rows(name)
        return [str(row["text"]) for row in rows], [str(row["label"]) for row in rows]

    @cached_property
    def classes(self) -> list[str]:
        return sorted(set(self.items("train")[1]))

    def texts(self) -> list[str]:
        """The English text of stage 1."""

        def text_of(row: Any) -> Any:
            return row.get("text") or row.get("en") if isinstance(row, dict) else None

        c, found = self.config, []
        rows = read_rows(c.text, "train", text_of) if c.text else file_rows(self.place("task") / "text.jsonl", None)
        for place, value in islice(rows, c.text_limit):
            if not isinstance(text := text_of(value), str):
                raise ValueError(f"{place}: expected a row with a text in 'text' or 'en', got {value!r}")
            found.append(text[: 16 * c.max_length])  # far more characters than can be tokens that count
        return found

    def training_rows(self, kind: str, states: Tensor | None = None) -> stacked.Texts:
        texts, labels = self.items("train")
        columns = {"text_ids": self.encode(kind, texts), "labels": [self.classes.index(label) for label in labels]}
        if states is not None:
            columns["states"] = list(states)
        return stacked.Texts(dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))

    def tokenizer(self, kind: str) -> Any:
        """``"mt"``'s or ``"llm"``'s."""
        if kind not in self._tokenizers:
            self._tokenizers[kind] = models.load_tokenizer(self.place(kind))
            self._tokenizers[kind].padding_side = "right"
        return self._tokenizers[kind]

    def pad(self, **kinds: str) -> stacked.Pad:
        """For texts by name, in ``"mt"``'s or ``"llm"``'s tokens."""
        ids = {name: padding_id(self.tokenizer(kind)) for name, kind in kinds.items()}
        return stacked.Pad(ids, {name: partial(self.encode, kind) for name, kind in kinds.items()})

    def encode(self, kind: str, texts: Sequence[str], language: str = "en") -> list[list[int]]:
        """Token ids of ``"mt"``'s or ``"llm"``'s tokenizer."""
        codes = self.config.codes if kind == "mt" else None
        return encode(self.tokenizer(kind), texts, self.config.max_length, codes and codes[language])

    def embed(self, function: Any, kind: str, texts: Sequence[str], language: str = "en") -> Tensor:
        ids = self.encode(kind, texts, language)
        return stacked.embed(function, ids, padding_id(self.tokenizer(kind)), self.config.eval_batch, self.device)

    @property
    def device(self) -> torch.device:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    @property
    def dtype(self) -> Any:
        return "auto" if self.config.dtype == "auto" else getattr(torch, self.config.dtype)

    def encoder(self, dtype: Any) -> Any:
        return stacked.load_seq2seq(self.place("mt"), dtype=dtype).get_encoder()

    def body(self, dtype: Any) -> Any:
        return stacked.load_body(self.place("llm"), adapters=self.config.llm_adapters, dtype=dtype)

    def stacked(self, seed: int, folder: Path | None = None) -> stacked.StackedModel:
        """Fresh, or as it was saved in a folder."""
        c, encoder, body = self.config, self.encoder(self.dtype), self.body(self.dtype)
        model = stacked.StackedModel(encoder, body, c.adapters, bidirectional=c.bidirectional, seed=seed)
        if folder is not None:
            model.load_weights(folder)
        if c.activation_checkpointing:
            model.checkpoint_activations()
        return model.to(self.device)

    def classifier(self, name: str, seed: int, folder: Path | None = None) -> stacked.Classifier:
        """Of stage 2, or a head on the MT encoder; fresh, or as it was trained in a folder."""
        c, whole = self.config, name == "encoder-tuned" or (name == "task" and self.config.task_lora is None)
        dtype = torch.float32 if whole else self.dtype  # half precision would round most updates to nothing
        if name != "task":
            embedder = stacked.Embedder(self.encoder(dtype), frozen=not whole)
        else:
            body = self.body(dtype)
            body = body if whole else stacked.frozen_with_adapters(body, c.task_adapters, seed)
            embedder = stacked.Embedder(body, c.bidirectional)
        classifier = stacked.Classifier(embedder, len(self.classes), seed)
        if folder is not None:
            load_trained(classifier, folder / "model" / TRAINED)
        return classifier.to(self.device)

    def distillation(self, arm: Arm, head: Tensor, seed: int, folder: Path | None = None) -> stacked.TaskDistillation:
        objective = None if arm.objective is None else parse_objective(arm.objective).objective
        model = self.stacked(seed, folder)
        return stacked.TaskDistillation(model, head, arm.mse_weight, objective, arm.kd_weight).to(self.device)

    def fit(
        self, module: nn.Module, rows: stacked.Texts, pad: stacked.Pad, options: Mapping[str, Any], seed: int, out: Path
    ) -> None:
        """Train a module; its tensors go to ``out / "model"``."""
        arguments = training_arguments(out, **{"seed": seed, **options})
        fit(ModuleTrainer(model=module, args=arguments, train_dataset=rows, data_collator=pad), out)
        load_trained(module, out / "model" / TRAINED)  # where it was trained before a kill


def encode(tokenizer: Any, texts: Sequence[str], max_length: int, code: str | None = None) -> list[list[int]]:
    """Token ids; ``code`` is the tokenizer's name of the texts' language, for one that has such names.

    Raises:
        ValueError: a name for a tokenizer that takes none, none for one that needs one, or one it does not know.
    """
    takes = hasattr(tokenizer, "src_lang")
    if takes != (code is not None):
        what = "needs a name of the language: set codes" if takes else "has no names of languages: leave codes out"
        raise ValueError(f"code={code!r}: {type(tokenizer).__name__} {what}")
    if code is not None:
        models.language_id(tokenizer, code)
        tokenizer.src_lang = code
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    return ids


def translate(model: Any, tokenizer: Any, texts: Sequence[Sequence[int]], size: int, **options: Any) -> list[str]:
    """The translations of encoded texts, in their order; options are those of ``generate``."""
    made = [""] * len(texts)
    for places, ids, mask in stacked.in_batches(texts, padding_id(tokenizer), size, model.device):
        output = model.eval().generate(input_ids=ids, attention_mask=mask, do_sample=False, **options)
        for place, text in zip(places, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True):
            made[place] = " ".join(text.split())
    return made


def retrieval_at_1(queries: Tensor, candidates: Tensor) -> float:
    """Share of the (N, H) queries whose nearest of the (N, H) candidates by cosine is the one in their own row."""
    unit = [nn.functional.normalize(states.double(), dim=1) for states in (queries, candidates)]
    return float(((unit[0] @ unit[1].T).argmax(1) == torch.arange(len(queries))).double().mean())


def accuracies(predicted: Sequence[Any], labels: Sequence[Any]) -> dict[str, Any]:
    """``accuracy``; ``balanced``, the mean over the labels' classes of the share that is right; ``hits`` of each class,
    a digit an item, 1 where it is right."""
    p, y = np.asarray(predicted), np.asarray(labels)
    right = {str(label): p[y == label] == label for label in np.unique(y)}
    hits = {label: "".join(str(int(hit)) for hit in values) for label, values in right.items()}
    balanced = np.mean([values.mean() for values in right.values()])
    return {"accuracy": float((p == y).mean()), "balanced": float(balanced), "hits": hits}


def scores_of(seed: Mapping[str, Any], key: str) -> dict[str, dict[str, float]]:
    """A seed's retrieval@1, or its balanced accuracies: ``{system: {language: score}}``."""
    if key == "retrieval":
        return dict(seed[key])
    return {system: {name: s["balanced"] for name, s in scores.items()} for system, scores in seed[key].items()}


def means(seeds: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        system: {name: sum(seed[system][name] for seed in seeds) / len(seeds) for name in scores}
        for system, scores in seeds[0].items()
    }


def report(metrics: Mapping[str, Any], folder: Path, show: Callable[[str], object]) -> None:
    """Tables, and ``adaptation.png`` (MSE and FVU over steps), ``accuracy.png`` and ``retrieval.png``."""
    import matplotlib
    import pandas as pd

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="tight")
    for axis, key, label in zip(axes, ("mse", "fvu"), ("MSE", "fraction of variance unexplained"), strict=True):
        for seed, made in metrics["seeds"].items():
            log = pd.DataFrame(made["training"]["adapt"]["log_history"])
            axis.plot(log["step"], log[key], label=f"seed {seed}", linewidth=1.4)
        axis.set(xlabel="optimizer step of stage 1", ylabel=label, yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8)
    figure.savefig(folder / "adaptation.png", dpi=130)

    languages = metrics["config"]["languages"]
    columns, width = ["en", *languages], 0.8 / (1 + len(languages))
    accuracy = f"balanced accuracy, % (chance {100 * metrics['chance']:.1f})"
    for key, title in {"accuracy": accuracy, "retrieval": "retrieval@1 of the English sentence, %"}.items():
        if not metrics["mean"][key]:
            continue
        each = [metrics["mean"][key], *(scores_of(made, key) for made in metrics["seeds"].values())]
        mean, *seeds = (100 * pd.DataFrame.from_dict(scores, "index").reindex(columns=columns) for scores in each)
        table = mean.assign(**{f"mean of {', '.join(languages)}": mean[languages].mean(axis=1)})
        for name, frame in zip(metrics["seeds"], seeds, strict=True):
            table[f"seed {name}"] = frame[languages].mean(axis=1)
        show(f"{title}\n{table.to_string(float_format='%.1f', na_rep='')}")

        figure, axis = plt.subplots(figsize=(2.5 + 1.25 * len(mean), 4.4), layout="tight")
        for place, name in enumerate(columns):
            x = np.arange(len(mean)) + (place - len(languages) / 2) * width
            axis.bar(x, mean[name], width, label=name, color=plt.get_cmap("Set2")(place))
            for frame in seeds:
                axis.plot(x, frame[name], ".", color="black", markersize=3)
        if key == "accuracy":
            axis.axhline(100 * metrics["chance"], color="grey", linestyle="--", linewidth=1, label="chance")
        axis.set_xticks(range(len(mean)), mean.index.str.replace(", ", ",\n"), rotation=20, ha="right", fontsize=8)
        axis.set(ylabel=title, ylim=(0, 100))
        axis.legend(fontsize=8, ncols=len(columns) + 1, loc="upper center", bbox_to_anchor=(0.5, 1.12))
        figure.savefig(folder / f"{key}.png", dpi=130)
    if metrics["bleu"]:
        show("BLEU into English: " + ", ".join(f"{name} {score}" for name, score in metrics["bleu"].items()))


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    config, running = parse((Config, Running), argv, configs=Path(__file__).parent, description=__doc__)
    config.check_inputs()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if config.llm is None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(models.threads_for([config.tiny_llm]) or torch.get_num_threads())

    folder = Path(running.output)
    recipe = Recipe(config, Stages(folder), Path(running.results or folder))
    with helpers(__file__, argv, running.jobs, folder, helper=running.worker):
        pieces: dict[str, Callable[[], object]] = {"mt": lambda: recipe.mt, "llm": lambda: recipe.llm}
        for seed in config.seeds:
            pieces[f"adapt.s{seed}"] = partial(recipe.adapt, seed)
            pieces |= {f"{name}.s{seed}": test for name, test in recipe.tests(seed).items()}
        recipe.stages.share(pieces)
        recipe.stages.share({f"evaluate.s{seed}": partial(recipe.evaluate, seed) for seed in config.seeds})
    if running.worker:
        return None
    versions = {module.__name__: module.__version__ for module in (fk, torch, transformers)}
    metrics = {**recipe.metrics(), "versions": versions}
    write_json(recipe.results / "metrics.json", metrics)
    report(metrics, recipe.results, make_console().print)
    print(f"metrics.json and figures are in {recipe.results}, the stages in {folder}")
    return metrics


if __name__ == "__main__":
    run_script(main)
