"""CycleDistill: a model bootstraps its own translation from monolingual text (arXiv 2506.19952).

    python examples/cycle_distill/cycle_distill.py --preset tiny --jobs 2 --output runs/cycle    # two CPU cores
    python examples/cycle_distill/cycle_distill.py --preset paper --model HUB_NAME --direction en-hi --data PATH \
        --monolingual sentences.txt --output runs/hindi

Everything goes to --output. The same command again skips finished stages and resumes an interrupted one; other settings
do again what depends on them, beside what is there. README.md has every option.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

# tiny models: threads that spin at barriers cost more than they give
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

import numpy as np
import torch
from torch.utils.data import random_split
from transformers.utils import logging

from fused_kd.integrations.precision import trained_in_float32
from fused_kd.training import KDTrainer, LoRA, Pair, PromptTemplate, Rows, Stages, TeacherCache, models
from fused_kd.training.cache import write_lists
from fused_kd.training.collate import Collator, padding_id
from fused_kd.training.fingerprints import fingerprint_teacher
from fused_kd.training.fit import fit, training_arguments
from fused_kd.training.generate import Decoding, Generations, generate_to
from fused_kd.training.models import load_model, load_tokenizer
from fused_kd.training.prompts import LABEL_PAD, encode_prompts, render_sample, tokenize_pairs
from fused_kd.training.score import score
from fused_kd.training.script import make_console, parse, run_script
from fused_kd.training.specs import parse_objective
from fused_kd.training.stage import helpers, read_json, write_json, write_lines

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from candidates import mbr_scores, mean_log_probs, summed  # noqa: E402
from cycle_options import TEMPLATES, CycleDistill, Texts, collect_texts, with_examples  # noqa: E402
from cycle_report import FIXED, Round, of_run, record, samples, table, valid_chrf, write_report  # noqa: E402
from translations import Filters, Maker, count, lists_of, read_jsonl, select, truncated, write_jsonl  # noqa: E402
from web import document_rows, flipped, plain_rows, reverse  # noqa: E402

# the settings that decide how a base reads its pairs, and what a model writes
READ_AS = ("document", "repeats", "both_ways")
DECODED_BY = ("shots", "prompt", "direction", "generation_batch", "max_new_tokens", "dtype")


@dataclass
class Options:
    """How the script runs; no number depends on it."""

    output: str = "runs/cycle_distill"
    stages: str | None = field(
        default=None, metadata={"help": "folder of the stages, if not output; runs can share it"}
    )
    jobs: int = field(default=1, metadata={"help": "processes that share the work; 2 on two cores"})
    worker: bool = field(default=False, metadata={"help": "this process helps another one"})


# rows


def read_rows_of(folder: Path) -> Rows:
    """The rows of a stage, without what else is in its ``rows.jsonl``."""
    return Rows([{name: row[name] for name in ("input_ids", "labels")} for row in read_jsonl(folder / "rows.jsonl")])


def hold_out(rows: Any, share: float, seed: int) -> tuple[Any, Any]:
    """``rows`` without a random share of them, and that share; all and None for a share of 0."""
    held = round(share * len(rows))
    if held == 0:
        return rows, None
    if held == len(rows):
        raise ValueError(f"held_out={share}: none of {len(rows)} rows is left to train on")
    return tuple(random_split(rows, [len(rows) - held, held], torch.Generator().manual_seed(seed)))


# the stages


class Cycle:
    """The stages and arms of a configuration. Each stage is a folder named after everything that it was made from."""

    def __init__(
        self, config: CycleDistill, filters: Filters, folder: str | Path, output: str | Path | None = None
    ) -> None:
        self.config, self.filters, self.stages = config, filters, Stages(folder)
        self.output = Path(output or folder)
        self.decoding = Decoding(config.generation_batch, config.max_new_tokens)
        self.console = make_console()

    def check(self) -> None:
        """Find what is missing before any work: options of the trainings, the base's tokenizer, texts.

        Raises:
            ValueError: no such option, model, hub name, file or split; the message names it.
        """
        config = self.config
        try:
            for options in (config.training | config.hard, config.training | config.soft, config.pretrain):
                training_arguments(self.stages.folder, **options)
            LoRA(**config.lora)
        except TypeError as error:
            raise ValueError(f"training, hard, soft, pretrain or lora has an unknown option: {error}") from error
        if not config.pretrain and self.tokenizer.eos_token_id is None:
            raise ValueError(f"model={config.model!r}: its tokenizer has no EOS token")
        _ = self.texts

    # what the stages share

    @cached_property
    def texts_stage(self) -> Path:
        config = self.config
        about = config.some(
            "direction", "pairs", "sentences", "web", "plain", "valid", "valid_limit", "test", "test_limit"
        )
        about |= {"pretrain": bool(config.pretrain), "monolingual": config.monolingual is not None}
        files = [config.data, *([config.monolingual] if config.monolingual else [])]
        return self.stages(
            "texts", lambda out: write_json(out / "texts.json", collect_texts(config)._asdict()), about, files=files
        )

    @cached_property
    def texts(self) -> Texts:
        found = read_json(self.texts_stage / "texts.json")
        plain = found.pop("plain")
        return Texts(plain=plain, **{part: [Pair(*pair) for pair in pairs] for part, pairs in found.items()})

    @cached_property
    def tokenizer_stage(self) -> Path:
        """That of a preset is trained; a named base has its own."""
        config = self.config
        if not config.pretrain:
            return self.base(0)

        def work(out: Path) -> None:
            texts, template = self.texts, TEMPLATES[config.prompt]
            lines = [template.render(pair.source, config.direction) for pair in (*texts.web, *texts.sentences)]
            lines += [*(pair.target for pair in texts.web), *texts.plain]
            models.train_tokenizer(lines, config.vocab).save_pretrained(out / "tokenizer")

        return self.stages("tokenizer", work, config.some("vocab", "prompt"), needs=[self.texts_stage])

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.tokenizer_stage / "tokenizer" if self.config.pretrain else self.config.model)

    @cached_property
    def template(self) -> PromptTemplate:
        """The prompt of generation and of training: one template renders both, so they cannot differ."""
        examples = self.texts.pairs[: self.config.shots]
        return with_examples(TEMPLATES[self.config.prompt], examples, self.config.direction)

    @property
    def real_pairs(self) -> list[Pair]:
        """The few real pairs that are not examples in the prompt."""
        return self.texts.pairs[self.config.shots :]

    def prompts(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """Token ids of the sentences' prompts."""
        return encode_prompts(self.tokenizer, [self.template.render(p.source, self.config.direction) for p in pairs])

    def rows(self, pairs: Sequence[Pair]) -> Rows:
        """Rows with real references."""
        return tokenize_pairs(self.tokenizer, self.template, pairs, self.config.direction, self.config.max_length)

    def load(self, model: Path) -> Any:
        """The model of a stage, on the accelerator where there is one."""
        own = next((path for name in ("merged", "model") if (path := model / name).is_dir()), self.config.model)
        loaded: Any = load_model(own, self.tokenizer, 0, dtype=self.config.dtype)
        return loaded.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else loaded

    # each stage

    @cached_property
    def named_base(self) -> Path:
        return self.stages("base", lambda out: None, self.config.some("model"), files=[self.config.model])

    def base(self, seed: int) -> Path:
        """The model to start from: a name, or a preset after its pretraining."""
        config = self.config
        if not config.pretrain:
            return self.named_base

        def work(out: Path) -> None:
            texts, tokenizer = self.texts, self.tokenizer
            rows = self.web_rows(seed)
            rows += plain_rows(tokenizer, [pair.source for pair in texts.sentences])
            rows += plain_rows(tokenizer, texts.plain)
            model = load_model(config.model, tokenizer, seed)
            self.fit(out, "sft", {"seed": seed, **config.pretrain}, model, train_dataset=Rows(rows))

        about = config.some("model", "pretrain", "prompt", "direction", *READ_AS) | {"seed": seed}
        return self.stages(f"base-seed{seed}", work, about, needs=[self.texts_stage, self.tokenizer_stage])

    def web_rows(self, seed: int) -> list[dict[str, list[int]]]:
        """The documents of an epoch of a base."""
        config, order, rows = self.config, random.Random(seed), []
        ways = [(config.direction, self.texts.web)]
        if config.both_ways:
            ways.append((reverse(config.direction), flipped(self.texts.web)))
        for direction, pairs in ways:
            template = TEMPLATES[config.prompt]
            if config.document == 1:  # the same rows whatever the order, and the trainer shuffles them
                rows += document_rows(self.tokenizer, template, pairs, direction, 1) * config.repeats
                continue
            for _ in range(config.repeats):
                shuffled = order.sample(pairs, len(pairs))
                rows += document_rows(self.tokenizer, template, shuffled, direction, config.document)
        return rows

    def translate(self, model: Path, title: str, k: int | None, seed: int, candidates: int) -> Path:
        """A model's translations of the sentences, ``candidates`` of each, with lists of ``k``."""
        config, decoding = self.config, self.decoding
        about = config.some(*DECODED_BY) | {"k": k} | (config.some("lists") if k is not None else {})
        if candidates > 1:
            decoding = replace(decoding, temperature=config.temperature, seed=seed)
            about |= config.some("temperature") | {"candidates": candidates, "seed": seed}

        def work(out: Path) -> None:
            loaded = self.load(model)
            write_json(out / "teacher.json", fingerprint_teacher(loaded))
            prompts = [each for each in self.prompts(self.texts.sentences) for _ in range(candidates)]
            generate_to(out, loaded, self.tokenizer, prompts, decoding, k=k, dtype=config.lists)

        return self.stages(f"translations-{title}", work, about, needs=[self.texts_stage, model])

    def keep(self, variant: str, model: Path, iteration: int, seed: int) -> Path:
        """A model's translations of which a variant's iteration is trained on those that pass the filters, as rows.

        A soft variant has their lists beside them. In the first iteration all variants go by the same translations.
        """
        config, base = self.config, self.title_of_base(seed)
        soft, first = variant.startswith("soft"), iteration == 1
        lists = soft or (first and variant != "greedy" and any(each.startswith("soft") for each in config.variants))
        candidates = 1 if variant == "greedy" else config.candidates
        of = base if first else f"{variant}-{iteration - 1}-seed{seed}"
        of = f"greedy-{of}" if first and variant == "greedy" else of
        translations = self.translate(model, of, config.k if lists else None, seed, candidates)
        kind = "soft" if soft else variant
        title = f"{kind}-1{base.removeprefix('base')}" if first else f"{variant}-{iteration}-seed{seed}"
        scored = bool(config.scorers) and candidates > 1

        def work(out: Path) -> None:
            sentences, generations = self.texts.sentences, Generations(translations)
            maker = Maker(self.tokenizer, config.direction, self.filters, config.max_length)
            score = partial(self.scores_of, model, seed) if scored else None
            prompts = self.prompts(sentences)
            kept, rejected = select(generations, prompts, sentences, maker, score)
            counts = count(kept, rejected)
            dropped = ", ".join(f"{rule} {number}" for rule, number in counts["rejected"].items() if number) or "none"
            if not kept:
                raise ValueError(f"{translations.name}: no translation passed the filters: {dropped}")
            parallel = self.rows(self.real_pairs).rows if config.keep_parallel else []
            rows = [*kept, *parallel]
            write_jsonl(out / "rows.jsonl", rows)
            write_jsonl(out / "rejected.jsonl", rejected)
            write_json(out / "counts.json", {**counts, "parallel": len(parallel)})
            shares = f"{counts['kept']} of {counts['generated']} ({counts['cut']} of them cut at a marker)"
            self.console.print(f"  kept {shares}; dropped: {dropped}")
            if soft:
                write_lists(
                    out / "lists",
                    lambda start, stop: ((i, *lists_of(rows[i], generations, config.k)) for i in range(start, stop)),
                    self.tokenizer, read_rows_of(out), k=config.k, template=self.template, dtype=config.lists,
                    shard_rows=1024, made_from=read_json(translations / "teacher.json"),
                    about={"teacher": "its own translations"}, progress=False,
                )  # fmt: skip

        about = config.some("keep_parallel", "max_length") | {"filters": self.filters, "soft": soft}
        needs = [translations]
        if scored:
            about |= config.some("scorers")
            needs += [model, self.base(seed)]
        return self.stages(f"synthetic-{title}", work, about, needs=needs)

    def scores_of(self, model: Path, seed: int, groups: list[list[dict[str, Any]]]) -> list[list[float]]:
        """A score of each of the sentences' candidates, by the ``scorers``."""
        return summed([self.score_by(scorer, model, seed, groups) for scorer in self.config.scorers])

    def score_by(self, scorer: str, model: Path, seed: int, groups: list[list[dict[str, Any]]]) -> list[np.ndarray]:
        """One scorer's scores of the candidates."""
        if scorer == "mbr":
            return [np.array(mbr_scores([row["text"] for row in group])) for group in groups]
        if scorer == "log_prob":
            return self.by_model(model, groups)
        return self.by_model(self.base(seed), groups, back=True)  # whose other direction no iteration has touched

    def by_model(self, model: Path, groups: list[list[dict[str, Any]]], *, back: bool = False) -> list[np.ndarray]:
        """Mean log-probability a token of each candidate, or with ``back`` of its source, translated from it."""
        rows = [row for group in groups for row in group]
        if back:
            direction, shown = reverse(self.config.direction), flipped(self.texts.pairs[: self.config.shots])
            template = with_examples(TEMPLATES[self.config.prompt], shown, direction)
            prompts = encode_prompts(self.tokenizer, [template.render(row["text"], direction) for row in rows])
            sources = self.tokenizer([row["source"] for row in rows], add_special_tokens=False)["input_ids"]
            responses = [[*source, self.tokenizer.eos_token_id] for source in sources]
        else:
            begins = [row["labels"].count(LABEL_PAD) for row in rows]
            prompts = [row["input_ids"][:begin] for row, begin in zip(rows, begins, strict=True)]
            responses = [row["labels"][begin:] for row, begin in zip(rows, begins, strict=True)]
        size = min(self.config.generation_batch, 512)
        scores = mean_log_probs(self.load(model), self.tokenizer, prompts, responses, size)
        return np.split(np.array(scores), np.cumsum([len(group) for group in groups])[:-1])

    def train(self, arm: str, title: str, start: Path, source: Path, seed: int) -> Path:
        """``start`` after one fine-tuning on the rows of a stage."""
        config, soft = self.config, arm.startswith("soft")
        options = {"seed": seed, **config.training, **(config.soft if soft else config.hard)}
        share = config.held_out if soft else 0.0

        def work(out: Path) -> None:
            rows: Any = read_rows_of(source)
            cache = None
            if soft:
                cache = TeacherCache(source / "lists", tail="renormalize")  # p~ of the soft loss is the top k
                cache.check(tokenizer=self.tokenizer, rows=rows, template=self.template)
                rows = cache.rows(rows)
            rows, valid = hold_out(rows, share, seed)
            lora = LoRA(**config.lora) if config.lora else None
            student = models.with_adapters(self.load(start), lora, "CAUSAL_LM")
            valid = valid if options.get("load_best_model_at_end") else None
            more = {"teacher": cache, "train_dataset": rows, "eval_dataset": valid}
            self.fit(out, config.objective(arm), options, student, **more)
            if lora is not None:  # into what they were trained on, so that the next iteration starts there
                models.merge(self.load(start), out / "model", self.tokenizer, out / "merged")

        about = config.some("lora", "dtype") | {"objective": config.objective(arm)}
        about |= {"training": options, "held_out": share, "seed": seed}
        return self.stages(f"model-{title}", work, about, needs=[start, source])

    def fit(self, out: Path, objective: str, options: dict[str, Any], model: Any, **more: Any) -> None:
        """Train a model by the loss that an objective's text names; ``more`` as of ``KDTrainer``."""
        more |= {"data_collator": Collator(padding_id(self.tokenizer)), "processing_class": self.tokenizer}
        loss, arguments = parse_objective(objective).objective, training_arguments(out, **options)
        trainer = KDTrainer(trained_in_float32(model), objective=loss, args=arguments, **more)
        fit(trainer, out)

    def evaluate(self, model: Path, title: str) -> Path:
        """A model's translations of the valid and test split, and their scores, as they are and truncated."""
        config, markers = self.config, self.filters.markers

        def work(out: Path) -> None:
            loaded, scores = self.load(model), {}
            for split in ("valid", "test"):
                pairs: list[Pair] = getattr(self.texts, split)
                made = generate_to(out / split, loaded, self.tokenizer, self.prompts(pairs), self.decoding)
                references = [pair.target for pair in pairs]
                cut = [truncated(text, markers) for text in made.texts()]
                raw = [" ".join(text.split()) for text in made.texts()]
                write_lines(out / f"{split}.txt", cut)
                write_lines(out / f"{split}.raw.txt", raw)
                finished = sum(generation.finished for generation in made) / len(made)
                found = score(cut, references).as_dict()
                scores[split] = {**found, "raw": score(raw, references).as_dict(), "finished": finished}
                self.console.print(f"  {title}, {split}: chrF {found['chrf']:.2f} BLEU {found['bleu']:.2f}")
            for sample in samples(out, self.texts.valid, config.samples):
                self.console.print(f"  {sample['source']}\n  > {sample['translation']}")
            write_json(out / "scores.json", scores)

        about = config.some(*DECODED_BY) | {"markers": markers}
        return self.stages(f"scores-{title}", work, about, needs=[self.texts_stage, model])

    # the arms

    def title_of_base(self, seed: int) -> str:
        """A named base translates alike for all seeds."""
        return f"base-seed{seed}" if self.config.pretrain else "base"

    def base_scores(self, seed: int) -> Path:
        scores = self.evaluate(self.base(seed), self.title_of_base(seed))
        self.tell("base", seed, Round(0, None, self.base(seed), scores))
        return scores

    def tell(self, arm: str, seed: int, each: Round) -> None:
        """Write a finished round where the report is made from, at once: what comes after may be killed."""
        file = self.output / "rounds" / f"{arm}-{each.iteration}-seed{seed}.json"
        if (read_json(file) or {}).get("stage") != each.scores.name:
            given = self.config.objective(arm), self.texts.valid, self.config.samples
            write_json(file, record(arm, seed, each, *given))

    def variant_rounds(self, variant: str, seed: int) -> list[Round]:
        """Translate, filter, fine-tune, score; again from the model that came out, until chrF stops rising."""
        config, rounds = self.config, []
        base = model = self.base(seed)
        best = valid_chrf(self.base_scores(seed))
        for iteration in range(1, config.iterations + 1):
            title = f"{variant}-{iteration}-seed{seed}"
            rows = self.keep(variant, model, iteration, seed)
            model = self.train(variant, title, base if config.restart_from_base else model, rows, seed)
            rounds.append(Round(iteration, rows, model, self.evaluate(model, title)))
            self.tell(variant, seed, rounds[-1])
            chrf = valid_chrf(rounds[-1].scores)
            if config.stop and chrf <= best:
                break
            best = chrf
        return rounds

    def fixed_rounds(self, arm: str, seed: int) -> list[Round]:
        """Control or ceiling: the same rows in every iteration, for as many as the longest variant has."""
        config, rounds, model = self.config, [], self.base(seed)
        about = config.some("shots", "prompt", "direction", "max_length")
        needs, title = [self.texts_stage, self.tokenizer_stage], f"rows-{arm}"
        if arm == "control":  # the few real pairs
            make = lambda: self.rows(self.real_pairs).rows  # noqa: E731
        elif arm == "continued":  # what the base has read
            title, about = f"{title}-seed{seed}", config.some("prompt", "direction", *READ_AS) | {"seed": seed}
            make = partial(self.web_rows, seed)
        else:  # the sentences that the first variant kept, with their references
            kept = self.keep(config.variants[0], self.base(seed), 1, seed)
            indices = [each["index"] for each in read_jsonl(kept / "rows.jsonl") if "index" in each]
            needs, title = [kept], f"{title}{self.title_of_base(seed).removeprefix('base')}"
            make = lambda: self.rows([self.texts.sentences[index] for index in indices]).rows  # noqa: E731
        rows = self.stages(title, lambda out: write_jsonl(out / "rows.jsonl", make()), about, needs=needs)
        count = config.iterations
        if config.restart_from_base:
            count = 1  # from the base each would be the same again
        elif config.stop:
            count = max(len(self.variant_rounds(variant, seed)) for variant in config.variants)
        for iteration in range(1, count + 1):
            title = f"{arm}-{iteration}-seed{seed}"
            model = self.train(arm, title, model, rows, seed)
            rounds.append(Round(iteration, rows, model, self.evaluate(model, title)))
            self.tell(arm, seed, rounds[-1])
        return rounds

    def arms(self) -> list[str]:
        wanted = {name: getattr(self.config, name) for name in FIXED}
        wanted["continued"] &= bool(self.config.pretrain)
        wanted["ceiling"] &= self.config.monolingual is None
        return [*self.config.variants, *(name for name in FIXED if wanted[name])]

    def rounds(self, arm: str, seed: int) -> list[Round]:
        return (self.variant_rounds if arm in self.config.variants else self.fixed_rounds)(arm, seed)

    def work(self) -> None:
        """Do all of it, together with other processes of the same folder."""
        seeds = self.config.seeds
        pieces = {self.title_of_base(seed): partial(self.base_scores, seed) for seed in seeds}
        pieces |= {f"{arm}-seed{seed}": partial(self.rounds, arm, seed) for seed in seeds for arm in self.arms()}
        self.stages.share(pieces)

    def about(self) -> dict[str, Any]:
        """What the report says beside the rounds."""
        arguments = asdict(self.config) | {"filters": asdict(self.filters)}
        return of_run(arguments, self.arms(), [pair.target for pair in self.texts.test])

    def records(self) -> list[dict[str, Any]]:
        """The finished rounds of all arms and seeds."""
        found = []
        for seed in self.config.seeds:
            self.base_scores(seed)
            rounds = {"base": [0], **{arm: [each.iteration for each in self.rounds(arm, seed)] for arm in self.arms()}}
            names = [f"{arm}-{iteration}-seed{seed}.json" for arm, each in rounds.items() for iteration in each]
            found += [read_json(self.output / "rounds" / name) for name in names]
        return found


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    config, filters, options = parse((CycleDistill, Filters, Options), argv, configs=HERE)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if (threads := models.threads_for([config.model])) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    output = Path(options.output)
    cycle = Cycle(config, filters, options.stages or output, output)
    cycle.check()
    write_json(output / "run.json", cycle.about())
    shown = cycle.rows(cycle.real_pairs or cycle.texts.valid[:1])[0]
    cycle.console.print("a row:", render_sample(cycle.tokenizer, shown))
    with helpers(__file__, argv, options.jobs, output, helper=options.worker):
        cycle.work()
    if options.worker:
        return None
    found = write_report(cycle.about(), cycle.records(), output)
    cycle.console.print(table(found))
    cycle.console.print(f"metrics.json, chrf.png and a folder a stage are in {output}")
    return found


if __name__ == "__main__":
    run_script(main)
