"""MT-LLM (arXiv 2406.12739): an MT encoder stacked under an LLM by self-distillation, and what it transfers.

    python examples/mt_llm/mt_llm.py --preset tiny --data PATH_TO_MULTI30K --jobs 2 --output runs/mt_llm
    python examples/mt_llm/mt_llm.py --preset paper --task FOLDER --text PATH_OR_HUB_NAME --output runs/mt_llm

The first takes minutes on two cores, the second a GPU. The same command again goes on where it stopped; a changed
setting makes new only what depends on it. The output folder gets metrics.json and figures.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

# tiny models: threads that spin at barriers cost more than they give
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

import numpy as np
import torch
from captions import Translator, mt_rows, read_captions, tiny_mt, write_task
from safetensors.torch import load_file, save_file
from stacked import (
    WEIGHTS,
    Adaptation,
    Classifier,
    Embedder,
    StackedModel,
    TaskDistillation,
    fit_projection,
    frozen_with_adapters,
    load_body,
    load_seq2seq,
    unexplained,
    variance_of,
)
from torch import Tensor, nn
from transformers.utils import logging

import fused_kd as fk
from fused_kd.training.collate import Collator, padding_id
from fused_kd.training.fit import TRAINED, ModuleTrainer, fit, load_trained, training_arguments
from fused_kd.training.loading import load_pretrained, read_adapter_config
from fused_kd.training.models import (
    LoRA,
    language_id,
    load_model,
    load_tokenizer,
    model_content,
    threads_for,
    train_tokenizer,
)
from fused_kd.training.prompts import Rows
from fused_kd.training.reading import file_rows, read_rows, sound
from fused_kd.training.script import make_console, parse, run_script
from fused_kd.training.specs import parse_objective
from fused_kd.training.stage import Stages, helpers, read_json, read_lines, write_json, write_lines
from fused_kd.training.trainer import KDTrainer

CAPTIONS = "captions"
BEFORE = "before"  # in stage 1's folder: the weights that it began with
STATES = "states.safetensors"
HELD_OUT = 1000  # sentences of stage 1's text to measure on, at most a tenth of it


@dataclass(frozen=True)
class Arm:
    """A way of stage 3.

    Args:
        mse_weight: of the MSE to the task model's pooled states; the paper has this alone.
        objective: as of ``parse_objective``, through the task head; None for none. kd_weight: of it.
        adapted: start from stage 1; False: from a fresh projection and adapters.
    """

    mse_weight: float = 1.0
    objective: str | None = None
    kd_weight: float = 1.0
    adapted: bool = True

    def __post_init__(self) -> None:
        if self.objective is not None:
            parse_objective(self.objective)
        elif not self.mse_weight > 0:
            raise ValueError(f"mse_weight must be above 0 where there is no objective, got {self.mse_weight!r}")


@dataclass
class Config:
    """Everything that the numbers depend on; README.md tells more of each.

    Args:
        languages: those to transfer to. codes: the MT tokenizer's names of them and of English (NLLB: ``deu_Latn``);
            None where it has no such names, as the tiny model.
        mt: an encoder-decoder MT model, by folder or hub name; None: a tiny one, trained on the captions.
        llm: a causal LM, likewise. llm_adapters: LoRA adapters merged into it first (LLM2Vec's).
        bidirectional: let the LLM attend both ways (for one that was made for it, as LLM2Vec's are).
        tiny_mt: of the tiny MT model, as of ``M2M100Config``. mt_vocab, mt_noise: its tokens; the share of them that an
            English source lacks.
        tiny_llm: one of the presets. llm_vocab: its tokens.
        data: folder of parallel captions, for the tiny models and the captions task. tests: files of it, taken
            together. limit: captions of the training set.
        task: "captions", or a folder with ``train.jsonl``, ``test.LANGUAGE.jsonl`` and perhaps ``retrieval.jsonl``.
        text: English text of stage 1: a file or folder of JSON rows, or a hub name, with ``text`` or ``en``; None takes
            the task's ``text.jsonl``. text_limit: rows of it.
        train_mt, train_llm, adapt, train_task, distil: ``TrainingArguments`` of the tiny models and of stages 1 to 3.
        lora: adapters of the stacked model. task_lora: those of stage 2; None trains the whole body.
        projection_init: "random", or "least_squares" from ``projection_rows`` sentences.
        arms: the ways of stage 3, as of ``Arm``; None leaves out one of the preset.
        encoder_baselines: also train a head on the MT encoder, frozen and not, as stage 2 trains the LLM.
        max_length: tokens of a text. beams, max_new_tokens: of translate-test. eval_batch: sentences at once.
        dtype: of the loaded weights. activation_checkpointing: of the LLM in stages 1 and 3.
        seeds: of everything after the two models. pretraining_seed: of those.
    """

    languages: list[str]
    codes: dict | None = None
    mt: str | None = None
    llm: str | None = None
    llm_adapters: list[str] = field(default_factory=list)
    bidirectional: bool = False
    tiny_mt: dict = field(default_factory=dict)
    mt_vocab: int = 4000
    mt_noise: float = 0.15
    tiny_llm: str = "small-student"
    llm_vocab: int = 3000
    data: str | None = None
    tests: list[str] = field(default_factory=lambda: ["test_2016_flickr"])
    limit: int | None = None
    task: str = CAPTIONS
    text: str | None = None
    text_limit: int | None = None
    train_mt: dict = field(default_factory=dict)
    train_llm: dict = field(default_factory=dict)
    adapt: dict = field(default_factory=dict)
    train_task: dict = field(default_factory=dict)
    distil: dict = field(default_factory=dict)
    lora: dict = field(default_factory=dict)
    task_lora: dict | None = None
    projection_init: Literal["random", "least_squares"] = "random"
    projection_rows: int = 4000
    arms: dict = field(default_factory=lambda: {"mse": {}})
    encoder_baselines: bool = True
    max_length: int = 512
    beams: int = 1
    max_new_tokens: int = 128
    eval_batch: int = 64
    dtype: str = "auto"
    activation_checkpointing: bool = False
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    pretraining_seed: int = 0

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
        for name in ("max_length", "eval_batch", "beams", "max_new_tokens", "projection_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        self.ways: dict[str, Arm] = {k: _made(Arm, f"arms.{k}", v) for k, v in self.arms.items() if v is not None}
        if not self.ways or not self.seeds:
            raise ValueError(f"arms and seeds must be some, got {self.arms!r}, {self.seeds!r}")
        self.adapters = _made(LoRA, "lora", self.lora)
        self.task_adapters = None if self.task_lora is None else _made(LoRA, "task_lora", self.task_lora)

    def not_at_hand(self) -> list[str]:
        """One line for each data set, tokenizer or model that is missing; to be asked before any work."""
        from datasets import load_dataset_builder
        from transformers import AutoConfig

        wrong = []

        def check(key: str, name: str, *loads: Callable[..., object]) -> None:
            try:
                for load in loads:
                    load(name)
            except Exception as error:  # of many kinds: no such name, no connection, no such configuration
                wrong.append(f"{key}={name!r}: {str(error).strip().splitlines()[0]}")

        if self.data is not None and not Path(self.data).expanduser().is_dir():
            wrong.append(f"data={self.data!r}: no such folder; give one with parallel captions as --data PATH")
        if self.task != CAPTIONS:
            files = ["train.jsonl", *(f"test.{name}.jsonl" for name in ("en", *self.languages))]
            files += ["text.jsonl"] if self.text is None else []
            folder = Path(self.task).expanduser()
            wrong += [f"task={self.task!r}: no {name} there" for name in files if not (folder / name).is_file()]
        if self.text is not None and not Path(self.text).expanduser().exists():
            check("text", self.text, lambda name: load_dataset_builder(*name.split(":", 1)))
        for key, name in (("mt", self.mt), ("llm", self.llm)):
            if name is not None:
                check(key, name, partial(load_pretrained, AutoConfig), load_tokenizer)
        for name in self.llm_adapters:
            check("llm_adapters", name, read_adapter_config, _adapters)
        return wrong


@dataclass
class Running:
    """What changes no number.

    Args:
        output: folder of the stages, metrics.json and the figures.
        jobs: processes that share the work; 2 on two cores, for tiny models.
        worker: this process is one of them.
    """

    output: str = "runs/mt_llm"
    jobs: int = 1
    worker: bool = False


def _made(cls: Any, key: str, values: Mapping[str, Any]) -> Any:
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{key}: {error}") from error


def _adapters(name: str) -> None:
    from peft import PeftConfig

    PeftConfig.from_pretrained(name)


class Texts(list):
    """Rows with token ids under ``NAME_ids``, or with ``text``."""

    @property
    def lengths(self) -> list[int]:
        """Of each row's longest text: in tokens, or in characters."""
        return [max(len(value) for name, value in row.items() if name.endswith(("_ids", "text"))) for row in self]


@dataclass(frozen=True)
class Pad:
    """Collates :class:`Texts`: ``NAME_ids`` padded on the right, with ``NAME_mask`` beside them; the rest is stacked.

    Args:
        ids: the padding token of each ``NAME``.
        encode: for rows of ``text``, from texts to the token ids of each ``NAME``.
    """

    ids: Mapping[str, int]
    encode: Mapping[str, Callable[[list[str]], list[list[int]]]] = field(default_factory=dict)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in rows[0]}
        if self.encode:
            texts = columns.pop("text")
            columns = {f"{name}_ids": function(texts) for name, function in self.encode.items()}
        batch: dict[str, Tensor] = {}
        for name, values in columns.items():
            if not name.endswith("_ids"):
                batch[name] = torch.stack([torch.as_tensor(value) for value in values])
                continue
            stem, longest = name.removesuffix("_ids"), max(map(len, values))
            batch[name] = torch.tensor([[*ids, *[self.ids[stem]] * (longest - len(ids))] for ids in values])
            batch[f"{stem}_mask"] = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in values])
        return batch


def in_batches(
    texts: Sequence[Sequence[int]], pad_id: int, size: int, device: Any
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Token ids by length: of each batch the places of its texts, their ids and their mask, (N, L)."""
    pad, order = Pad({"text": pad_id}), sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        batch = pad([{"text_ids": texts[index]} for index in places])
        yield places, batch["text_ids"].to(device), batch["text_mask"].to(device)


def embed(function: Any, texts: Sequence[Sequence[int]], pad_id: int, size: int, device: Any = "cpu") -> Tensor:
    """``function(text_ids, text_mask)`` of every text, in their order, on the CPU: (N, ...) float32."""
    places, parts = [], []
    with torch.no_grad():
        for some, ids, mask in in_batches(texts, pad_id, size, device):
            places += some
            parts.append(function(ids, mask).float().cpu())
    return torch.cat(parts)[torch.tensor(places).argsort()]


def translate(model: Any, tokenizer: Any, texts: Sequence[Sequence[int]], size: int, **options: Any) -> list[str]:
    """The translations of encoded texts, in their order; options are those of ``generate``."""
    made = [""] * len(texts)
    for places, ids, mask in in_batches(texts, padding_id(tokenizer), size, model.device):
        output = model.eval().generate(input_ids=ids, attention_mask=mask, do_sample=False, **options)
        for place, text in zip(places, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True):
            made[place] = " ".join(text.split())
    return made


def encode_sources(tokenizer: Any, texts: Sequence[str], code: str | None, max_length: int) -> list[list[int]]:
    """Token ids as the MT model's encoder wants them; ``code`` is its tokenizer's name of the texts' language, if any.

    Raises:
        ValueError: a name for a tokenizer that takes none, none for one that needs one, or one it does not know.
    """
    takes = hasattr(tokenizer, "src_lang")
    if takes != (code is not None):
        raise ValueError(
            f"code={code!r}: {type(tokenizer).__name__} "
            + ("needs a name of the language: set codes" if takes else "has no names of languages: leave codes out")
        )
    if code is not None:
        language_id(tokenizer, code)
        tokenizer.src_lang = code
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    return ids


def retrieval_at_1(queries: Tensor, candidates: Tensor) -> float:
    """Share of the (N, H) queries whose nearest candidate by cosine is the one in their own row."""
    if queries.shape != candidates.shape:
        raise ValueError(f"queries {tuple(queries.shape)} and candidates {tuple(candidates.shape)} must be pairs")
    unit = [nn.functional.normalize(states.double(), dim=1) for states in (queries, candidates)]
    return float(((unit[0] @ unit[1].T).argmax(1) == torch.arange(len(queries))).double().mean())


def accuracies(predicted: Sequence[Any], labels: Sequence[Any]) -> dict[str, float]:
    """``accuracy``, and ``balanced``, the mean over the labels' classes of the share that is right."""
    p, y = np.asarray(predicted), np.asarray(labels)
    balanced = np.mean([(p[y == label] == label).mean() for label in np.unique(y)])
    return {"accuracy": float((p == y).mean()), "balanced": float(balanced)}


@dataclass(frozen=True)
class Source:
    """What stages read: where it lies, and what else a result that reads it depends on."""

    place: str
    needs: tuple[Path, ...] = ()
    files: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


class Recipe:
    """The stages, each a method that returns the folder of its finished work, and does it where it was not done."""

    def __init__(self, config: Config, stages: Stages) -> None:
        self.config, self.stages = config, stages
        self._tokenizers: dict[str, Any] = {}

    def stage(self, title: str, work: Callable[[Path], object], settings: Any, *reads: Source | Path) -> Path:
        """A stage of settings, and of the sources and the earlier stages' folders that it reads."""
        sources = [Source("", needs=(read,)) if isinstance(read, Path) else read for read in reads]
        settings = {"max_length": self.config.max_length, "dtype": self.config.dtype, **settings}
        for source in sources:
            settings |= source.settings
        needs = dict.fromkeys(folder for source in sources for folder in source.needs)
        return self.stages(title, work, settings, needs=list(needs), files=[f for s in sources for f in s.files])

    def fit(self, module: nn.Module, rows: Texts, collate: Pad, options: Mapping[str, Any], seed: int, out: Path) -> None:
        """Train a module; its tensors go to ``out / "model"``."""
        arguments = training_arguments(out, **{"seed": seed, **options})
        fit(ModuleTrainer(model=module, args=arguments, train_dataset=rows, data_collator=collate), out)
        load_trained(module, out / "model" / TRAINED)  # where it was trained before a kill

    # what there is before stage 1: the task and English text, and the two models, tiny ones made here

    @cached_property
    def task(self) -> Source:
        c = self.config
        if c.task != CAPTIONS:
            return Source(c.task, files=(c.task,))
        settings = {"languages": c.languages, "tests": c.tests, "limit": c.limit}
        folder = self.stages("task", lambda out: write_task(out, str(c.data), **settings), settings, files=[str(c.data)])
        return Source(str(folder), needs=(folder,))

    @property
    def text(self) -> Source:
        c = self.config
        return self.task if c.text is None else Source(c.text, files=(c.text,))

    @cached_property
    def mt(self) -> Source:
        c, seed, everyone = self.config, self.config.pretraining_seed, ["en", *self.config.languages]
        if c.mt is not None:
            return Source(c.mt, settings={"mt": [c.mt, model_content(c.mt)], "codes": c.codes})

        def work(out: Path) -> None:
            captions = read_captions(str(c.data), "train", everyone, c.limit)
            texts = (row[name] for row in captions for name in everyone)
            tokenizer, model = tiny_mt(texts, seed, c.mt_vocab, **c.tiny_mt)
            rows = Texts(mt_rows(tokenizer, captions, c.mt_noise, seed))
            pad = Pad(dict.fromkeys(("source", "target"), padding_id(tokenizer)))
            self.fit(Translator(model), rows, pad, c.train_mt, seed, out)
            for made in (model, tokenizer):
                made.save_pretrained(out / "mt")

        settings = {"sizes": c.tiny_mt, "vocab": c.mt_vocab, "noise": c.mt_noise, "fit": c.train_mt}
        settings |= {"languages": c.languages, "seed": seed, "limit": c.limit}
        folder = self.stages("mt", work, settings, files=[str(c.data)])
        return Source(str(folder / "mt"), needs=(folder,))

    @cached_property
    def llm(self) -> Source:
        c, seed = self.config, self.config.pretraining_seed
        if c.llm is not None:
            content = [[name, model_content(name)] for name in (c.llm, *c.llm_adapters)]
            return Source(c.llm, settings={"llm": content, "bidirectional": c.bidirectional})

        def work(out: Path) -> None:
            texts = [row["en"] for row in read_captions(str(c.data), "train", ["en"], c.limit)]
            tokenizer = train_tokenizer(texts, c.llm_vocab)
            ids = [[*row, tokenizer.eos_token_id] for row in tokenizer(texts)["input_ids"]]
            trainer = KDTrainer(
                load_model(c.tiny_llm, tokenizer, seed),
                None,
                fk.SFT(),
                args=training_arguments(out, **{"seed": seed, **c.train_llm}),
                train_dataset=Rows([{"input_ids": row, "labels": row} for row in ids]),
                data_collator=Collator(padding_id(tokenizer)),
                processing_class=tokenizer,
            )
            fit(trainer, out)

        settings = {"model": c.tiny_llm, "vocab": c.llm_vocab, "fit": c.train_llm, "seed": seed, "limit": c.limit}
        folder = self.stages("llm", work, settings, files=[str(c.data)])
        return Source(str(folder / "model"), needs=(folder,), settings={"bidirectional": c.bidirectional})

    # the three stages, and what they are compared with

    def adapt(self, seed: int) -> Path:
        """Stage 1: the stacked model learns the plain LLM's sentences, from English text alone."""
        c = self.config

        def work(out: Path) -> None:
            texts = self.texts()
            held = texts[: min(HELD_OUT, max(len(texts) // 10, 2))]
            rows = Texts({"text": text} for text in texts[len(held) :])
            pad = Pad(
                {"text": self.pad_id("mt"), "llm": self.pad_id("llm")},
                {"text": partial(self.encode, "mt"), "llm": partial(self.encode, "llm")},
            )
            stacked = self.stacked(seed).eval()
            target = self.embed(stacked.plain, "llm", held)
            record: dict[str, Any] = {"variance": variance_of(target)}
            if c.projection_init == "least_squares":
                some = rows[: c.projection_rows]
                batches = (pad(some[i : i + c.eval_batch]) for i in range(0, len(some), c.eval_batch))
                record["projection"] = fit_projection(stacked, batches)
            record["before"] = unexplained(self.embed(stacked, "mt", held), target)
            stacked.save(out / BEFORE, self.mt.place, self.llm.place)
            if c.activation_checkpointing:
                stacked.checkpoint_activations()
            self.fit(Adaptation(stacked, record["variance"]), rows, pad, c.adapt, seed, out)
            record["after"] = unexplained(self.embed(stacked.eval(), "mt", held), target)
            stacked.save(out, self.mt.place, self.llm.place)
            write_json(out / "adaptation.json", record)

        settings = {"seed": seed, "fit": c.adapt, "lora": c.adapters, "limit": c.text_limit}
        settings["projection"] = c.projection_rows if c.projection_init == "least_squares" else None
        return self.stage(f"adapt.s{seed}", work, settings, self.mt, self.llm, self.text)

    def train_classifier(self, name: str, seed: int) -> Path:
        """Stage 2, "task": the LLM and a head learn the English task. "encoder-...": the same without an LLM."""
        c, kind = self.config, "llm" if name == "task" else "mt"

        def work(out: Path) -> None:
            pad = Pad({"text": self.pad_id(kind)})
            self.fit(self.classifier(name, seed), self.training_rows(kind), pad, c.train_task, seed, out)

        settings = {"seed": seed, "fit": c.train_task}
        if name == "task":
            settings["lora"] = c.task_adapters
        return self.stage(f"{name}.s{seed}", work, settings, self.llm if name == "task" else self.mt, self.task)

    def states(self, seed: int) -> Path:
        """The task model's head, and its pooled states of the task's sentences."""
        taught = self.train_classifier("task", seed)

        def work(out: Path) -> None:
            model = self.classifier("task", seed, taught).eval()
            states = self.embed(model.embedder, "llm", self.items("train")[0])
            save_file({"states": states.contiguous(), "head": model.head.weight.detach().cpu()}, out / STATES)

        return self.stage(f"states.s{seed}", work, {"seed": seed}, taught, self.llm, self.task)

    def distil(self, name: str, seed: int) -> Path:
        """Stage 3: the stacked model learns the task model's sentences, and its decisions where the arm says so."""
        c, arm, states = self.config, self.config.ways[name], self.states(seed)
        adapted = self.adapt(seed) if arm.adapted else None

        def work(out: Path) -> None:
            made = load_file(states / STATES)
            stacked = self.stacked(seed, adapted)
            if c.activation_checkpointing:
                stacked.checkpoint_activations()
            pad, rows = Pad({"text": self.pad_id("mt")}), self.training_rows("mt", made["states"])
            self.fit(self.distillation(stacked, made["head"], arm), rows, pad, c.distil, seed, out)

        settings = {"seed": seed, "arm": arm, "fit": c.distil, "lora": c.adapters}
        reads = [self.mt, self.llm, self.task, states] + ([adapted] if adapted else [])
        return self.stage(f"distil-{name}.s{seed}", work, settings, *reads)

    @property
    def classifiers(self) -> list[str]:
        return ["task", *(["encoder-frozen", "encoder-tuned"] if self.config.encoder_baselines else [])]

    def trainings(self, seed: int) -> dict[str, Callable[[], Path]]:
        """What a seed's numbers are of, in an order in which two processes seldom wait for each other."""
        made = {name: partial(self.train_classifier, name, seed) for name in self.classifiers}
        made["adapt"] = partial(self.adapt, seed)
        return made | {f"distil-{name}": partial(self.distil, name, seed) for name in self.config.ways}

    def translations(self) -> Path:
        """The tests in English, for translate-test, and their BLEU."""
        import sacrebleu

        c = self.config

        def work(out: Path) -> None:
            tokenizer, references, scores = self.tokenizer("mt"), self.items("test.en")[0], {}
            model = load_seq2seq(self.mt.place, dtype=self.dtype).to(self.device)
            options = {"max_new_tokens": c.max_new_tokens, "num_beams": c.beams}
            if c.codes is not None:
                options["forced_bos_token_id"] = language_id(tokenizer, c.codes["en"])
            for language in c.languages:
                path, texts = out / f"{language}.txt", self.items(f"test.{language}")[0]
                if not path.is_file():
                    ids = self.encode("mt", texts, language)
                    write_lines(path, translate(model, tokenizer, ids, c.eval_batch, **options))
                if len(references) == len(texts):
                    scores[language] = round(sacrebleu.corpus_bleu(read_lines(path), [references]).score, 2)
            write_json(out / "bleu.json", scores)

        settings = {"beams": c.beams, "max_new_tokens": c.max_new_tokens, "languages": c.languages}
        return self.stage("translations", work, settings, self.mt, self.task)

    def evaluate(self, seed: int) -> Path:
        """One seed's numbers: every system's accuracy in every language, and retrieval before and after stage 1."""
        c, translated = self.config, self.translations()
        folders = {name: train() for name, train in self.trainings(seed).items()}

        def work(out: Path) -> None:
            metrics = {
                "accuracy": self.classify(seed, folders, translated, out),
                "retrieval": self.retrieve(seed, folders["adapt"]),
                "adaptation": read_json(folders["adapt"] / "adaptation.json"),
                "training": {name: read_json(folder / "training.json") for name, folder in folders.items()},
            }
            write_json(out / "metrics.json", metrics)

        settings = {"seed": seed, "arms": c.ways, "lora": c.adapters, "languages": c.languages}
        reads = [self.mt, self.llm, self.task, translated, *folders.values()]
        return self.stage(f"evaluate.s{seed}", work, settings, *reads)

    def classify(self, seed: int, folders: Mapping[str, Path], translated: Path, out: Path) -> dict[str, Any]:
        """``{system: {language: accuracies}}``; ``predictions.jsonl`` in ``out`` has the classes themselves."""
        c = self.config
        tests = {name: self.items(f"test.{name}") for name in ("en", *c.languages)}
        own = {name: (texts, name) for name, (texts, _) in tests.items()}
        english = {name: (read_lines(translated / f"{name}.txt"), "en") for name in c.languages}

        def predict(model: Any, kind: str, given: Mapping[str, tuple[list[str], str]]) -> dict[str, list[str]]:
            found = {name: self.embed(model.eval().logits, kind, *item).argmax(1) for name, item in given.items()}
            return {name: [self.classes[index] for index in indices] for name, indices in found.items()}

        task = self.classifier("task", seed, folders["task"])
        found = {"LLM alone": predict(task, "llm", own), "translate-test": predict(task, "llm", english)}
        for name in self.classifiers[1:]:
            model = self.classifier(name, seed, folders[name])
            found[f"MT {name.replace('-', ', ')}"] = predict(model, "mt", own)
        for name, arm in c.ways.items():
            module = self.distillation(self.stacked(seed), task.head.weight.detach(), arm)
            load_trained(module, folders[f"distil-{name}"] / "model" / TRAINED)
            found[f"MT-LLM, {name}"] = predict(module, "mt", own)
        lines = [
            json.dumps({"system": system, "language": name, "labels": predicted})
            for system, by_language in found.items()
            for name, predicted in by_language.items()
        ]
        write_lines(out / "predictions.jsonl", lines)
        return {
            system: {name: accuracies(predicted, tests[name][1]) for name, predicted in by_language.items()}
            for system, by_language in found.items()
        }

    def retrieve(self, seed: int, adapted: Path) -> dict[str, dict[str, float]]:
        """``{system: {language: retrieval@1}}``: sentences whose English one is nearest; empty without parallel rows.

        The stacked model's sentences are looked for among the plain LLM's English ones, those of the LLM and of the
        encoder alone among their own.
        """
        if not (Path(self.task.place).expanduser() / "retrieval.jsonl").is_file():
            return {}
        rows, languages = self.rows("retrieval"), self.config.languages
        texts = {name: [row[name] for row in rows] for name in ("en", *languages)}

        def scores(function: Any, kind: str, english: Tensor, names: Sequence[str]) -> dict[str, float]:
            return {name: retrieval_at_1(self.embed(function, kind, texts[name], name), english) for name in names}

        found = {}
        for title, folder in (("before stage 1", adapted / BEFORE), ("after stage 1", adapted)):
            model = self.stacked(seed, folder).eval()
            english = self.embed(model.plain, "llm", texts["en"])
            found[title] = scores(model, "mt", english, list(texts))
        found["LLM alone"] = scores(model.plain, "llm", english, languages)
        encoder = Embedder(model.encoder).eval()
        found["MT encoder alone"] = scores(encoder, "mt", self.embed(encoder, "mt", texts["en"]), languages)
        return found

    def metrics(self) -> dict[str, Any]:
        """Settings, the task's counts, each seed's numbers, and means over seeds of balanced accuracy and retrieval."""
        seeds = {str(seed): read_json(self.evaluate(seed) / "metrics.json") for seed in self.config.seeds}
        return {
            "config": asdict(self.config),
            "task": read_json(Path(self.task.place).expanduser() / "task.json"),
            "chance": 1 / len(self.classes),
            "bleu": read_json(self.translations() / "bleu.json"),
            "mean": {key: _means([scores_of(made, key) for made in seeds.values()]) for key in ("accuracy", "retrieval")},
            "seeds": seeds,
        }

    # texts, tokens and models, as the stages want them

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Of one of the task's files."""
        return [row.value for row in sound(file_rows(Path(self.task.place).expanduser() / f"{name}.jsonl", None))]

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
        path = Path(self.task.place).expanduser() / "text.jsonl" if c.text is None else c.text
        rows = read_rows(path, "train", text_of) if c.text else file_rows(path, None)
        for place, value in islice(rows, c.text_limit):
            if not isinstance(text := text_of(value), str):
                raise ValueError(f"{place}: expected a row with a text in 'text' or 'en', got {value!r}")
            found.append(text[: 16 * c.max_length])  # far more characters than can be tokens that count
        return found

    def training_rows(self, kind: str, states: Tensor | None = None) -> Texts:
        texts, labels = self.items("train")
        rows = Texts(
            {"text_ids": ids, "labels": self.classes.index(label)}
            for ids, label in zip(self.encode(kind, texts), labels, strict=True)
        )
        for row, state in zip(rows, [] if states is None else states, strict=states is not None):
            row["states"] = state
        return rows

    def tokenizer(self, kind: str) -> Any:
        """``"mt"``'s or ``"llm"``'s."""
        if kind not in self._tokenizers:
            self._tokenizers[kind] = load_tokenizer(self.mt.place if kind == "mt" else self.llm.place)
            self._tokenizers[kind].padding_side = "right"
        return self._tokenizers[kind]

    def pad_id(self, kind: str) -> int:
        return padding_id(self.tokenizer(kind))

    def encode(self, kind: str, texts: Sequence[str], language: str = "en") -> list[list[int]]:
        """Token ids of ``"mt"``'s or ``"llm"``'s tokenizer."""
        c, tokenizer = self.config, self.tokenizer(kind)
        if kind == "mt":
            return encode_sources(tokenizer, texts, c.codes and c.codes[language], c.max_length)
        ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=c.max_length)["input_ids"]
        return ids

    def embed(self, function: Any, kind: str, texts: Sequence[str], language: str = "en") -> Tensor:
        ids = self.encode(kind, texts, language)
        return embed(function, ids, self.pad_id(kind), self.config.eval_batch, self.device)

    @property
    def device(self) -> torch.device:
        return torch.accelerator.current_accelerator() or torch.device("cpu")

    @property
    def dtype(self) -> Any:
        return "auto" if self.config.dtype == "auto" else getattr(torch, self.config.dtype)

    def stacked(self, seed: int, folder: Path | None = None) -> StackedModel:
        """Fresh, or as it was saved in a folder."""
        c = self.config
        body = load_body(self.llm.place, adapters=c.llm_adapters, dtype=self.dtype)
        encoder = load_seq2seq(self.mt.place, dtype=self.dtype).get_encoder()
        model = StackedModel(encoder, body, c.adapters, bidirectional=c.bidirectional, seed=seed)
        if folder is not None:
            load_trained(model, folder / WEIGHTS)
        return model.to(self.device)

    def classifier(self, name: str, seed: int, folder: Path | None = None) -> Classifier:
        """Of stage 2, or a head on the MT encoder; fresh, or as it was trained in a folder."""
        c = self.config
        # in float32 where all of the weights are trained
        if name == "task":
            dtype = torch.float32 if c.task_adapters is None else self.dtype
            body = load_body(self.llm.place, adapters=c.llm_adapters, dtype=dtype)
            if c.task_adapters is not None:
                body = frozen_with_adapters(body, c.task_adapters, seed)
            embedder = Embedder(body, c.bidirectional)
        else:
            frozen = name == "encoder-frozen"
            model = load_seq2seq(self.mt.place, dtype=self.dtype if frozen else torch.float32)
            embedder = Embedder(model.get_encoder(), frozen=frozen)
        classifier = Classifier(embedder, len(self.classes), seed)
        if folder is not None:
            load_trained(classifier, folder / "model" / TRAINED)
        return classifier.to(self.device)

    def distillation(self, stacked: StackedModel, head: Tensor, arm: Arm) -> TaskDistillation:
        objective = None if arm.objective is None else parse_objective(arm.objective).objective
        weights = {"mse_weight": arm.mse_weight, "kd_weight": arm.kd_weight}
        return TaskDistillation(stacked, head, objective=objective, **weights).to(self.device)


def scores_of(seed: Mapping[str, Any], key: str) -> dict[str, dict[str, float]]:
    """A seed's retrieval@1, or its balanced accuracies: ``{system: {language: score}}``."""
    found: dict[str, dict[str, Any]] = seed[key]
    if key == "retrieval":
        return found
    return {system: {name: each["balanced"] for name, each in scores.items()} for system, scores in found.items()}


def _means(seeds: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        system: {name: sum(seed[system][name] for seed in seeds) / len(seeds) for name in scores}
        for system, scores in seeds[0].items()
    }


def report(metrics: Mapping[str, Any], folder: Path, show: Callable[[str], object]) -> None:
    """Tables, and ``adaptation.png`` (MSE and FVU over steps), ``accuracy.png`` and ``retrieval.png``."""
    import matplotlib

    matplotlib.use("Agg")
    import pandas as pd
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
    titles = {
        "accuracy": f"balanced accuracy, % (chance {100 * metrics['chance']:.1f})",
        "retrieval": "retrieval@1 of the English sentence, %",
    }
    for key, title in titles.items():
        if not metrics["mean"][key]:
            continue
        columns = ["en", *languages]
        mean, *seeds = (
            100 * pd.DataFrame.from_dict(scores, orient="index").reindex(columns=columns)
            for scores in (metrics["mean"][key], *(scores_of(made, key) for made in metrics["seeds"].values()))
        )
        table = mean.assign(mean=mean[languages].mean(axis=1))
        for name, frame in zip(metrics["seeds"], seeds, strict=True):
            table[f"seed {name}"] = frame[languages].mean(axis=1)
        show(f"{title}; means over {', '.join(languages)}\n" + table.to_string(float_format="%.1f", na_rep=""))

        figure, axis = plt.subplots(figsize=(2.5 + 1.25 * len(mean), 4.4), layout="tight")
        for place, name in enumerate(columns):
            x = np.arange(len(mean)) + (place - len(languages) / 2) * 0.8 / len(columns)
            axis.bar(x, mean[name], 0.8 / len(columns), label=name, color=plt.get_cmap("Set2")(place))
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
    if missing := config.not_at_hand():
        raise ValueError("not at hand:\n" + "\n".join(missing))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    threads = threads_for([] if config.llm else [config.tiny_llm])
    if threads and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)

    folder = Path(running.output)
    recipe = Recipe(config, Stages(folder))
    with helpers(__file__, argv, running.jobs, folder, helper=running.worker):
        pieces: dict[str, Callable[[], object]] = {"mt": lambda: recipe.mt, "llm": lambda: recipe.llm}
        for seed in config.seeds:
            pieces |= {f"{name}.s{seed}": train for name, train in recipe.trainings(seed).items()}
        recipe.stages.share(pieces | {"translations": recipe.translations})
        recipe.stages.share({f"evaluate.s{seed}": partial(recipe.evaluate, seed) for seed in config.seeds})
    if running.worker:
        return None
    metrics = {**recipe.metrics(), "versions": {"fused_kd": fk.__version__, "torch": torch.__version__}}
    write_json(folder / "metrics.json", metrics)
    report(metrics, folder, make_console().print)
    print(f"metrics.json, figures and the stages are in {folder}")
    return metrics


if __name__ == "__main__":
    run_script(main)
