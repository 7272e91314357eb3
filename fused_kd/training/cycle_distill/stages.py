"""The stages of CycleDistill: texts, base, translations, synthetic rows, trainings, scores; each on disk, by content.

A model is a stage whose folder has ``model.json``, which says where the model lies.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from fused_kd.training.cache.teacher_cache import TeacherCache, fingerprint_teacher
from fused_kd.training.cycle_distill.adapters import merge
from fused_kd.training.cycle_distill.base import documents, plain_rows
from fused_kd.training.cycle_distill.few_shot import get_template, with_examples
from fused_kd.training.cycle_distill.filters import truncated
from fused_kd.training.cycle_distill.settings import CycleDistill, Training
from fused_kd.training.cycle_distill.synthetic import (
    Selection,
    read_rows,
    select,
    write_rows,
    write_selection,
    write_teacher,
)
from fused_kd.training.cycle_distill.texts import Texts, collect_texts, read_texts, write_texts
from fused_kd.training.data.pairs import Pair
from fused_kd.training.data.prompts import PairDataset, PromptTemplate, concatenate, encode_prompts, tokenize_pairs
from fused_kd.training.evaluation.evaluate import score
from fused_kd.training.generation import Generations, generate_to
from fused_kd.training.lora import with_adapters
from fused_kd.training.pipeline import Pipeline, Stage
from fused_kd.training.presets import load_model, load_tokenizer, shared_tokenizer
from fused_kd.training.runs import read_json, read_lines, write_json, write_lines
from fused_kd.training.specs import parse_objective
from fused_kd.training.stages import Settings, train_stage

CACHE_TAIL = "renormalize"  # p~ of the soft loss is the top k, renormalised


class CycleStages:
    """Makes the stages; the same arguments make the same stage. One process does them.

    Args:
        config: everything that they depend on.
        folder: where they lie.
    """

    def __init__(self, config: CycleDistill, folder: str | Path) -> None:
        self.config = config
        self.pipeline = Pipeline(folder)
        files = [config.data, *([config.monolingual] if config.monolingual else [])]
        about = config.some("direction", "pairs", "sentences", "valid", "valid_limit", "test", "test_limit")
        about |= {
            "plain": config.pretrain and (config.pretrain.plain or "all"),
            "monolingual": config.monolingual is not None,
        }
        self.texts_stage = self.pipeline.add(
            "texts", lambda out: write_texts(out, collect_texts(config)), about, files=files
        )
        self.tokenizer_stage: Stage | None = None
        if config.pretrain is not None:
            self.tokenizer_stage = self.pipeline.add(
                "tokenizer", self._train_tokenizer, config.some("vocab", "prompt"), needs=[self.texts_stage]
            )

    # what the stages share

    @cached_property
    def texts(self) -> Texts:
        return read_texts(self.pipeline.finish(self.texts_stage))

    @cached_property
    def template(self) -> PromptTemplate:
        """The prompt of generation and of training."""
        return with_examples(
            get_template(self.config.prompt), self.texts.pairs[: self.config.shots], self.config.direction
        )

    @cached_property
    def tokenizer(self) -> Any:
        if self.tokenizer_stage is None:
            return load_tokenizer(self.config.model)
        return load_tokenizer(self.pipeline.finish(self.tokenizer_stage) / "tokenizer")

    @property
    def real_pairs(self) -> list[Pair]:
        """The few real pairs that are not examples in the prompt."""
        return self.texts.pairs[self.config.shots :]

    def load(self, stage: Stage) -> Any:
        """The model of a stage, on the accelerator where there is one."""
        about = read_json(stage.folder / "model.json")
        name = about.get("name") or stage.folder / about["folder"]
        model: Any = load_model(name, self.tokenizer, 0, dtype=self.config.dtype)
        return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model

    def prompts(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """Token ids of the sentences' prompts."""
        return encode_prompts(self.tokenizer, [self.template.render(p.source, self.config.direction) for p in pairs])

    def rows(self, pairs: Sequence[Pair]) -> PairDataset:
        """Rows with real references."""
        config = self.config
        return tokenize_pairs(self.tokenizer, self.template, pairs, config.direction, config.max_length)

    # the stages

    def base(self, seed: int) -> Stage:
        """The model to start from: a name, or a preset after its pretraining."""
        config = self.config
        if config.pretrain is None:
            return self.pipeline.add("base", self._name_base, config.some("model"), files=[config.model])
        about = config.some("model", "pretrain", "prompt", "direction", "bf16") | {"seed": seed}
        needs = [self.texts_stage, *filter(None, [self.tokenizer_stage])]
        stage = self.pipeline.add(
            f"base-seed{seed}", lambda out: self._pretrain(stage, seed), about, needs=needs
        )  # fmt: skip
        return stage

    def translation(self, model: Stage, title: str, k: int | None) -> Stage:
        """A model's translations of the sentences, with lists of ``k``."""
        about = self.config.some("shots", "prompt", "direction", "generation_batch", "max_new_tokens") | {"k": k}
        about |= self.config.some("lists") if k is not None else {}

        def work(out: Path) -> None:
            loaded = self.load(model)
            write_json(out / "teacher.json", fingerprint_teacher(loaded))
            generate_to(
                out, loaded, self.tokenizer, self.prompts(self.texts.sentences), self.config.decoding, k=k,
                dtype=self.config.lists,
            )  # fmt: skip

        return self.pipeline.add(f"translations-{title}", work, about, needs=[self.texts_stage, model])

    def synthetic(self, translation: Stage, title: str, *, soft: bool) -> Stage:
        """The translations that pass the filters, as rows; with ``soft`` also their lists."""
        about = self.config.some("filters", "keep_parallel", "max_length") | {"soft": soft}
        return self.pipeline.add(
            f"synthetic-{title}", lambda out: self._select(translation, out, soft), about, needs=[translation]
        )

    def pairs_rows(self) -> Stage:
        """The few real pairs as rows: what the control sees."""
        about = self.config.some("shots", "prompt", "direction", "max_length")
        return self.pipeline.add(
            "rows-control", lambda out: write_rows(out, self.rows(self.real_pairs).rows), about,
            needs=self._of_texts(),
        )  # fmt: skip

    def reference_rows(self, synthetic: Stage, title: str) -> Stage:
        """The sentences that ``synthetic`` kept, with their real references: what the ceiling sees."""

        def work(out: Path) -> None:
            sentences = self.texts.sentences
            kept = [sentences[index] for index in _origins(synthetic.folder)]
            write_rows(out, self.rows(kept).rows)

        return self.pipeline.add(f"rows-{title}", work, {}, needs=[synthetic])

    def training(self, arm: str, title: str, start: Stage, rows: Stage, seed: int) -> Stage:
        """``start`` after one fine-tuning on the rows."""
        config = self.config
        about = config.some(
            "learning_rate", "warmup", "weight_decay", "scheduler", "lora", "bf16", "gradient_checkpointing", "dtype"
        )
        about |= {"objective": config.spec(arm).text, "training": config.training(arm), "seed": seed}
        stage = self.pipeline.add(
            f"model-{title}", lambda out: self._train(stage, arm, start, rows, seed), about, needs=[start, rows]
        )
        return stage

    def evaluation(self, model: Stage, title: str) -> Stage:
        """A model's translations of the valid and test split, and their scores, as they are and truncated."""
        about = self.config.some("shots", "prompt", "direction", "generation_batch", "max_new_tokens", "dtype")
        about["markers"] = self.config.filters.markers
        return self.pipeline.add(
            f"scores-{title}", lambda out: self._score(model, out), about, needs=[self.texts_stage, model]
        )

    # their work

    def _of_texts(self) -> list[Stage]:
        """What rows of real pairs depend on: the tokenizer is a stage, or that of a named base."""
        return [self.texts_stage, self.base(0) if self.tokenizer_stage is None else self.tokenizer_stage]

    def _train_tokenizer(self, out: Path) -> None:
        texts, template = self.texts, get_template(self.config.prompt)
        lines = [template.render(pair.source, self.config.direction) for pair in (*texts.pairs, *texts.sentences)]
        lines += [*(pair.target for pair in texts.pairs), *texts.plain]
        shared_tokenizer([], out / "tokenizer", lines, self.config.vocab)

    def _name_base(self, out: Path) -> None:
        write_json(out / "model.json", {"name": self.config.model})

    def _pretrain(self, stage: Stage, seed: int) -> None:
        config, texts, tokenizer = self.config, self.texts, self.tokenizer
        plan: Any = config.pretrain
        template = get_template(config.prompt)
        order = random.Random(seed)
        shuffled = [order.sample(texts.pairs, len(texts.pairs)) for _ in range(plan.repeats)]
        rows = concatenate([
            *(documents(tokenizer, template, pairs, config.direction, plan.document) for pairs in shuffled),
            plain_rows(tokenizer, [pair.source for pair in texts.sentences]),
            plain_rows(tokenizer, texts.plain),
        ])  # fmt: skip
        settings = Settings(plan.epochs, plan.learning_rate, batch_size=plan.batch_size, seed=seed, bf16=config.bf16)
        student = lambda: load_model(config.model, tokenizer, seed)  # noqa: E731
        sft = parse_objective("sft")
        train_stage(self.pipeline.run, stage.name, student, None, sft, rows, tokenizer, settings)
        write_json(stage.folder / "model.json", {"folder": "model"})

    def _select(self, translation: Stage, out: Path, soft: bool) -> None:
        config, texts = self.config, self.texts
        made, generations = self._selection(translation)
        if not made.rows:
            raise ValueError(f"{translation.name}: no translation passed the filters: {made.counts()['rejected']}")
        parallel = self.rows(self.real_pairs).rows if config.keep_parallel else []
        write_selection(out, made, texts.sentences, parallel)
        if soft:
            write_teacher(
                out / "lists", made, generations, read_rows(out), self.tokenizer, self.template,
                k=config.k, dtype=config.lists, made_from=read_json(translation.folder / "teacher.json"),
            )  # fmt: skip

    def _selection(self, translation: Stage) -> tuple[Selection, Generations]:
        config, sentences = self.config, self.texts.sentences
        generations = read_generations(translation.folder, translation.about["settings"]["k"])
        made = select(
            generations, self.prompts(sentences), sentences, self.tokenizer, config.direction, config.filters,
            config.max_length,
        )  # fmt: skip
        return made, generations

    def _train(self, stage: Stage, arm: str, start: Stage, source: Stage, seed: int) -> None:
        config, plan = self.config, self.config.training(arm)
        spec, rows = config.spec(arm), read_rows(source.folder)
        data: Any = rows
        teacher: Any = None
        if spec.objective.spec.divergence is not None:
            cache = TeacherCache(source.folder / "lists", tail=CACHE_TAIL)
            cache.check(tokenizer=self.tokenizer, rows=rows, template=self.template)
            data, teacher = cache.rows(rows), lambda: cache
        data, valid = held_out(data, plan.held_out, seed)
        settings = Settings(
            epochs_for(plan, len(data)), config.learning_rate, batch_size=plan.batch_size,
            accumulation=plan.accumulation, warmup=config.warmup, weight_decay=config.weight_decay, seed=seed,
            bf16=config.bf16, scheduler=config.scheduler, gradient_checkpointing=config.gradient_checkpointing,
            select=plan.select,
        )  # fmt: skip
        student = lambda: with_adapters(self.load(start), config.lora, "CAUSAL_LM")  # noqa: E731
        train_stage(
            self.pipeline.run, stage.name, student, teacher, spec, data, self.tokenizer, settings,
            valid if plan.select == "best" else None,
        )  # fmt: skip
        if config.lora is not None:
            merge(self.load(start), stage.folder / "model", self.tokenizer, stage.folder / "merged")
        write_json(stage.folder / "model.json", {"folder": "model" if config.lora is None else "merged"})

    def _score(self, model: Stage, out: Path) -> None:
        config, loaded, scores = self.config, self.load(model), {}
        for split in ("valid", "test"):
            pairs: list[Pair] = getattr(self.texts, split)
            made = generate_to(out / split, loaded, self.tokenizer, self.prompts(pairs), config.decoding)
            hypotheses = [truncated(text, config.filters.markers) for text in made.texts()]
            raw = [" ".join(text.split()) for text in made.texts()]
            references = [pair.target for pair in pairs]
            write_lines(out / f"{split}.txt", hypotheses)
            write_lines(out / f"{split}.raw.txt", raw)
            scores[split] = {
                **score(hypotheses, references).as_dict(),
                "raw": score(raw, references).as_dict(),
                "finished": sum(generation.finished for generation in made) / len(made),
            }
        write_json(out / "scores.json", scores)


def epochs_for(plan: Training, rows: int) -> float:
    """The epochs of which the Trainer makes exactly ``plan.steps`` optimizer steps."""
    an_epoch = max(math.ceil(math.ceil(rows / plan.batch_size) / plan.accumulation), 1)
    return (plan.steps - 0.5) / an_epoch  # it rounds up


def held_out(rows: Any, share: float, seed: int) -> tuple[Any, Any]:
    """``rows`` without a random share of them, and that share; both in their order. All and None for a share of 0."""
    count = round(share * len(rows))
    if count == 0:
        return rows, None
    if count == len(rows):
        raise ValueError(f"held_out={share}: none of {len(rows)} rows is left to train on")
    apart = set(random.Random(seed).sample(range(len(rows)), count))
    return Subset(rows, [i for i in range(len(rows)) if i not in apart]), Subset(rows, sorted(apart))


def read_generations(folder: Path, k: int | None) -> Generations:
    """What a finished ``generate_to`` wrote into a folder."""
    files = sorted((folder / "batches").glob("*.jsonl"))
    return Generations(folder, [[json.loads(line)["index"] for line in read_lines(file)] for file in files], k)


def _origins(folder: Path) -> list[int]:
    rows = map(json.loads, read_lines(folder / "rows.jsonl"))
    return [row["index"] for row in rows if "index" in row]
