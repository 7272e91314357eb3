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
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

# tiny models: threads that spin at barriers cost more than they give
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

import torch
from torch.utils.data import random_split
from transformers.utils import logging

from fused_kd.integrations.precision import trained_in_float32
from fused_kd.training import KDTrainer, LoRA, Pair, PromptTemplate, Rows, Stages, TeacherCache, models
from fused_kd.training.cache import write_lists
from fused_kd.training.collate import Collator, padding_id
from fused_kd.training.data import load_pairs, parse_direction
from fused_kd.training.files import SUFFIXES, text_rows
from fused_kd.training.fingerprints import fingerprint_teacher
from fused_kd.training.fit import fit, training_arguments
from fused_kd.training.generate import Decoding, Generations, generate_to
from fused_kd.training.models import PRESETS, load_model, load_tokenizer
from fused_kd.training.prompts import PROMPTS, encode_prompts, render_sample, tokenize_pairs
from fused_kd.training.reading import read_rows
from fused_kd.training.reading import select as first_of
from fused_kd.training.score import score
from fused_kd.training.script import make_console, parse, run_script
from fused_kd.training.specs import parse_objective
from fused_kd.training.stage import helpers, read_json, write_json, write_lines

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from cycle_report import Round, metrics, of_seed, samples, table, valid_chrf, write_plot  # noqa: E402
from translations import Filters, count, lists_of, read_jsonl, select, truncated, write_jsonl  # noqa: E402

MAX_SHOTS = 4
# the parts of the public code's prompt; the response begins on a line of its own, as its first token would otherwise
# depend on whether the tokenizer joins it to the colon
TEMPLATES = {
    **PROMPTS,
    "cycle_distill": PromptTemplate(
        "cycle_distill",
        "### Instruction: Translate the text from {source_language} to {target_language}.\n"
        "### Input: {source_language} Text: {source}\n"
        "### Response:\n",
    ),
}
VARIANTS = ("hard", "soft", "soft_self_evolution")
# the settings that decide what a model writes
DECODED_BY = ("shots", "prompt", "direction", "generation_batch", "max_new_tokens", "dtype")


@dataclass
class Options:
    """How the script runs; no number depends on it."""

    output: str = "runs/cycle_distill"
    jobs: int = field(default=1, metadata={"help": "processes that share the work; 2 on two cores"})
    worker: bool = field(default=False, metadata={"help": "this process helps another one"})


@dataclass
class CycleDistill:
    """Everything that the numbers depend on, beside ``Filters``; paper.yaml has the paper's values.

    Raises:
        ValueError: a value out of range, a name that is unknown, a preset without ``pretrain`` or the reverse.
    """

    data: str  # parallel text as of load_pairs, with the splits "train", valid and test
    direction: str  # such as "en-hi"
    model: str  # the base, a path or hub name; or a preset, with pretrain
    # source sentences: a text file of one a line, or JSON or a hub data set with the language's code or "text" as a
    # column; None: the source side of data's training rows after the pairs, whose references only the ceiling sees
    monolingual: str | None = None
    sentences: int = 20_000  # at most so many of them
    pairs: int = 100  # the few real pairs: the first rows of the training split
    # the first so many pairs are examples in the prompt; the rest trains the control and, with keep_parallel, goes into
    # every iteration
    shots: int = 4
    keep_parallel: bool = False
    prompt: str = "cycle_distill"
    variants: list[str] = field(default_factory=lambda: ["hard", "soft"])  # some of VARIANTS
    iterations: int = 3
    stop: bool = True  # an arm ends after the first iteration that does not raise chrF on the valid split
    restart_from_base: bool = False  # every iteration trains the base instead of the model that translated
    control: bool = True  # also train the base on the few real pairs, as many steps
    ceiling: bool = True  # and on the same sentences with their real references
    training: dict = field(default_factory=dict)  # options of TrainingArguments for every fine-tuning,
    hard: dict = field(default_factory=dict)  # for hard labels, those of control and ceiling too,
    soft: dict = field(default_factory=dict)  # and for soft ones
    held_out: float = 0.0  # share of a soft variant's rows not trained on, for load_best_model_at_end
    alpha: float = 0.5
    k: int = 20  # entries of each generated token's list
    lists: Literal["fp16", "8bit"] = "fp16"
    self_evolution: str = "self_evolution:gamma=0.4,beta=0.5"  # that variant's objective; its lam is alpha
    lora: dict = field(default_factory=dict)  # r, alpha, dropout, target_modules; merged after each iteration
    # options of TrainingArguments with which a preset becomes a base that translates poorly: plain text of both
    # languages and the pairs, ``document`` of them one after another as a web page would have them; in each epoch every
    # sentence comes once, every pair ``repeats`` times, each time among others
    pretrain: dict = field(default_factory=dict)
    document: int = 3
    repeats: int = 1
    plain: int | None = None  # most sentences of the target language; None takes all
    vocab: int = 2000  # tokens of the tokenizer that is trained for a preset
    generation_batch: int = 32
    max_new_tokens: int = 64
    max_length: int = 1024  # tokens of a training row
    valid: str = "valid"
    test: str = "test"
    valid_limit: int | None = None
    test_limit: int | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    dtype: str = "auto"
    bootstrap: int = 1000  # samples of the paired bootstrap on the test set; 0 leaves it out
    samples: int = 4  # translations shown an iteration

    def __post_init__(self) -> None:
        parse_direction(self.direction)
        if self.prompt not in TEMPLATES:
            raise ValueError(f"prompt must be one of {', '.join(TEMPLATES)}, got {self.prompt!r}")
        counts = ("sentences", "iterations", "k", "generation_batch", "max_new_tokens", "document", "repeats", "plain")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        if not 0 <= self.shots <= min(MAX_SHOTS, self.pairs):
            raise ValueError(
                f"shots must be in [0, {MAX_SHOTS}] and at most pairs, got shots={self.shots!r}, pairs={self.pairs!r}"
            )
        if not self.variants or len(set(self.variants)) < len(self.variants) or not set(self.variants) <= {*VARIANTS}:
            raise ValueError(f"variants must name some of {', '.join(VARIANTS)}, each once, got {self.variants!r}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must have at least one, each once, got {self.seeds!r}")
        if (self.control or self.keep_parallel) and self.pairs == self.shots:
            raise ValueError(
                f"pairs={self.pairs!r} are all examples with shots={self.shots!r}: control and keep_parallel "
                "need more, or false"
            )
        if bool(self.pretrain) != (self.model in PRESETS):
            needed = "has no place for" if self.pretrain else "needs"
            raise ValueError(f"model={self.model!r} {needed} pretrain: only a preset ({', '.join(PRESETS)}) is trained")
        if self.pretrain and self.monolingual is not None:
            raise ValueError(f"monolingual={self.monolingual!r}: with pretrain the plain text comes from data")
        for name, value, below in (("alpha", self.alpha, 1), ("held_out", self.held_out, 0.99)):
            if not 0 <= value <= below:
                raise ValueError(f"{name} must be in [0, {below}], got {value!r}")
        if self.hard.get("load_best_model_at_end") or (self.soft.get("load_best_model_at_end") and not self.held_out):
            raise ValueError(
                f"load_best_model_at_end goes with held_out above 0 and in soft only, got held_out={self.held_out!r}, "
                f"hard={self.hard!r}, soft={self.soft!r}"
            )
        for variant in VARIANTS:
            parse_objective(self.objective(variant))

    def objective(self, arm: str) -> str:
        """The objective of a variant; of the other arms, which have no teacher, cross-entropy."""
        if arm == "soft":
            return f"forward_kd:lam={self.alpha}"
        if arm == "soft_self_evolution":

            def with_lam(found: re.Match[str]) -> str:
                return f"{found[1]}:lam={self.alpha}{',' if found[2] else ''}"

            return re.sub(r"^((?:[\d.eE+-]+\*)?\w+)(:?)", with_lam, self.self_evolution)
        return "sft"

    def some(self, *names: str) -> dict[str, Any]:
        """These settings by name, for a stage that depends on them."""
        return {name: getattr(self, name) for name in names}


# the texts


class Texts(NamedTuple):
    """``sentences`` are the sources to translate, with an empty target where no reference is known.

    ``plain`` is text of the target language, of other rows than the sentences; empty without pretraining.
    """

    pairs: list[Pair]
    sentences: list[Pair]
    plain: list[str]
    valid: list[Pair]
    test: list[Pair]


def collect_texts(config: CycleDistill) -> Texts:
    """Read everything. Raises ``ValueError`` as ``load_pairs``; also for fewer training rows than asked for."""
    own = config.monolingual is None
    wanted = config.pairs + (config.sentences if own else 0)
    try:
        train = load_pairs(config.data, "train", config.direction, limit=None if config.pretrain else wanted)
    except ValueError as error:
        raise ValueError(f"{error}; give parallel text as --data PATH") from error
    if len(train) < config.pairs + own + bool(config.pretrain):
        raise ValueError(f"pairs={config.pairs} leaves no sentences of the {len(train)} training rows of {config.data}")
    if config.monolingual is None:
        sentences = train[config.pairs : wanted]
    else:
        source = parse_direction(config.direction)[0]
        sentences = [Pair(text, "") for text in load_sentences(config.monolingual, source, config.sentences)]
    plain: list[str] = []
    if config.pretrain:
        references = {pair.target for pair in sentences}
        plain = [pair.target for pair in train[wanted:] if pair.target not in references][: config.plain]
        if not plain:
            raise ValueError(
                f"sentences={config.sentences}, pairs={config.pairs}: none of the {len(train)} training rows is left "
                "for plain text of the target language"
            )
    valid = load_pairs(config.data, config.valid, config.direction, limit=config.valid_limit)
    test = load_pairs(config.data, config.test, config.direction, limit=config.test_limit)
    return Texts(train[: config.pairs], sentences, plain, valid, test)


def load_sentences(source: str, language: str, limit: int) -> list[str]:
    """At most ``limit`` sentences of a text file (one a line, plain or ``.gz``), of JSON or of a hub data set.

    Empty lines and rows that are not UTF-8 or have no text are left out. Raises ``ValueError`` where nothing is there.
    """

    def text(value: Any) -> str | None:
        value = value.get("translation", value) if isinstance(value, dict) else {}
        found = next((value[key] for key in (language, "text", "sentence") if isinstance(value.get(key), str)), None)
        return None if found is None else " ".join(found.split())

    def parse(value: Any) -> str:
        if not (found := text(value)):
            raise ValueError(f"no text for the language {language!r} and none named 'text'")
        return found

    path = Path(source).expanduser()
    if path.is_file() and not path.name.endswith(SUFFIXES):
        rows = text_rows(path)
    else:
        rows = read_rows(source, "all" if path.is_file() else "train", text)
    return first_of(rows, parse, f"monolingual={source!r}", limit=limit, skip_bad=True)


def with_examples(template: PromptTemplate, examples: Sequence[Pair], direction: str) -> PromptTemplate:
    """The template with solved examples before it, as plain text; with none it is returned as it is."""
    if not examples:
        return template
    between = "\n\n" if "\n\n" in template.template else "\n"
    solved = [template.render(pair.source, direction) + pair.target for pair in examples]
    shown = "".join(text.replace("{", "{{").replace("}", "}}") + between for text in solved)
    return PromptTemplate(f"{template.name}-{len(examples)}-shot", shown + template.template)


# rows


def document_rows(
    tokenizer: Any, template: PromptTemplate, pairs: Sequence[Pair], direction: str, size: int
) -> list[dict[str, list[int]]]:
    """``size`` pairs a row, each as a prompt with its translation, a line break between them; loss everywhere.

    After a translation mostly another prompt follows: as of text from the web, a model learns to translate but not to
    stop.
    """
    prompts = encode_prompts(tokenizer, [template.render(pair.source, direction) for pair in pairs])
    targets = tokenizer([pair.target for pair in pairs], add_special_tokens=False)["input_ids"]
    # as it is within a text: alone, some tokenizers put a space before it
    line, broken = tokenizer(["a", "a\n"], add_special_tokens=False)["input_ids"]
    rows = []
    for start in range(0, len(pairs), size):
        ids: list[int] = []
        for prompt, target in zip(prompts[start : start + size], targets[start : start + size], strict=True):
            if ids:
                ids += broken[len(line) :]
                prompt = prompt[1:] if prompt[0] == tokenizer.bos_token_id else prompt
            ids += prompt + target
        ids.append(tokenizer.eos_token_id)
        rows.append({"input_ids": ids, "labels": ids})
    return rows


def plain_rows(tokenizer: Any, sentences: Sequence[str]) -> list[dict[str, list[int]]]:
    """A sentence a row, EOS after it; loss everywhere."""
    rows = [[*row, tokenizer.eos_token_id] for row in encode_prompts(tokenizer, sentences)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


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

    def __init__(self, config: CycleDistill, filters: Filters, folder: str | Path) -> None:
        self.config, self.filters, self.stages = config, filters, Stages(folder)
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
        about = config.some("direction", "pairs", "sentences", "plain", "valid", "valid_limit", "test", "test_limit")
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
            lines = [template.render(pair.source, config.direction) for pair in (*texts.pairs, *texts.sentences)]
            lines += [*(pair.target for pair in texts.pairs), *texts.plain]
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
            texts, tokenizer, template = self.texts, self.tokenizer, TEMPLATES[config.prompt]
            order = random.Random(seed)
            rows: list[dict[str, list[int]]] = []
            for _ in range(config.repeats):
                shuffled = order.sample(texts.pairs, len(texts.pairs))
                rows += document_rows(tokenizer, template, shuffled, config.direction, config.document)
            rows += plain_rows(tokenizer, [pair.source for pair in texts.sentences])
            rows += plain_rows(tokenizer, texts.plain)
            model = load_model(config.model, tokenizer, seed)
            self.fit(out, "sft", {"seed": seed, **config.pretrain}, model, train_dataset=Rows(rows))

        about = config.some("model", "pretrain", "document", "repeats", "prompt", "direction") | {"seed": seed}
        return self.stages(f"base-seed{seed}", work, about, needs=[self.texts_stage, self.tokenizer_stage])

    def translate(self, model: Path, title: str, k: int | None) -> Path:
        """A model's translations of the sentences, with lists of ``k``."""
        config = self.config
        about = config.some(*DECODED_BY) | {"k": k} | (config.some("lists") if k is not None else {})

        def work(out: Path) -> None:
            loaded = self.load(model)
            write_json(out / "teacher.json", fingerprint_teacher(loaded))
            prompts = self.prompts(self.texts.sentences)
            generate_to(out, loaded, self.tokenizer, prompts, self.decoding, k=k, dtype=config.lists)

        return self.stages(f"translations-{title}", work, about, needs=[self.texts_stage, model])

    def keep(self, translations: Path, title: str, soft: bool) -> Path:
        """The translations that pass the filters, as rows; with ``soft`` also their lists."""
        config = self.config

        def work(out: Path) -> None:
            sentences, generations = self.texts.sentences, Generations(translations)
            given = self.tokenizer, config.direction, self.filters, config.max_length
            kept, rejected = select(generations, self.prompts(sentences), sentences, *given)
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
        return self.stages(f"synthetic-{title}", work, about, needs=[translations])

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
        return self.evaluate(self.base(seed), self.title_of_base(seed))

    def first_rows(self, variant: str, seed: int) -> Path:
        """What a variant's first iteration is trained on: all variants select from the same translations."""
        lists = any(each != "hard" for each in self.config.variants)
        k, base, soft = self.config.k if lists else None, self.title_of_base(seed), variant != "hard"
        translations = self.translate(self.base(seed), base, k)
        title = f"{'soft' if soft else 'hard'}-1{base.removeprefix('base')}"
        return self.keep(translations, title, soft)

    def variant_rounds(self, variant: str, seed: int) -> list[Round]:
        """Translate, filter, fine-tune, score; again from the model that came out, until chrF stops rising."""
        config, rounds, soft = self.config, [], variant != "hard"
        base = model = self.base(seed)
        best = valid_chrf(self.base_scores(seed))
        for iteration in range(1, config.iterations + 1):
            title = f"{variant}-{iteration}-seed{seed}"
            if iteration == 1:
                rows = self.first_rows(variant, seed)
            else:
                k = config.k if soft else None
                rows = self.keep(self.translate(model, f"{variant}-{iteration - 1}-seed{seed}", k), title, soft)
            model = self.train(variant, title, base if config.restart_from_base else model, rows, seed)
            rounds.append(Round(iteration, rows, model, self.evaluate(model, title)))
            chrf = valid_chrf(rounds[-1].scores)
            if config.stop and chrf <= best:
                break
            best = chrf
        return rounds

    def fixed_rounds(self, arm: str, seed: int) -> list[Round]:
        """Control or ceiling: the same rows in every iteration, for as many as the longest variant has."""
        config, rounds, model = self.config, [], self.base(seed)
        if arm == "control":  # the few real pairs
            pairs, needs, title = self.real_pairs, [self.texts_stage, self.tokenizer_stage], "rows-control"
        else:  # the sentences that the first variant kept, with their references
            kept = self.first_rows(config.variants[0], seed)
            indices = [each["index"] for each in read_jsonl(kept / "rows.jsonl") if "index" in each]
            pairs, needs = [self.texts.sentences[index] for index in indices], [kept]
            title = f"rows-ceiling{self.title_of_base(seed).removeprefix('base')}"
        about = config.some("shots", "prompt", "direction", "max_length")
        rows = self.stages(
            title, lambda out: write_jsonl(out / "rows.jsonl", self.rows(pairs).rows), about, needs=needs
        )
        count = config.iterations
        if config.restart_from_base:
            count = 1  # from the base each would be the same again
        elif config.stop:
            count = max(len(self.variant_rounds(variant, seed)) for variant in config.variants)
        for iteration in range(1, count + 1):
            title = f"{arm}-{iteration}-seed{seed}"
            model = self.train(arm, title, model, rows, seed)
            rounds.append(Round(iteration, rows, model, self.evaluate(model, title)))
        return rounds

    def arms(self) -> list[str]:
        fixed = ["control"] if self.config.control else []
        fixed += ["ceiling"] if self.config.ceiling and self.config.monolingual is None else []
        return [*self.config.variants, *fixed]

    def rounds(self, arm: str, seed: int) -> list[Round]:
        return (self.variant_rounds if arm in self.config.variants else self.fixed_rounds)(arm, seed)

    def work(self) -> None:
        """Do all of it, together with other processes of the same folder."""
        seeds = self.config.seeds
        pieces = {self.title_of_base(seed): partial(self.base_scores, seed) for seed in seeds}
        pieces |= {f"{arm}-seed{seed}": partial(self.rounds, arm, seed) for seed in seeds for arm in self.arms()}
        self.stages.share(pieces)

    def found(self, seed: int) -> dict[str, Any]:
        """A finished seed's numbers."""
        arms = {arm: self.rounds(arm, seed) for arm in self.arms()}
        return of_seed(self.base_scores(seed), arms, self.config, self.texts.valid, self.texts.test)


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    config, filters, options = parse((CycleDistill, Filters, Options), argv, configs=HERE)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if (threads := models.threads_for([config.model])) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    output = Path(options.output)
    cycle = Cycle(config, filters, output)
    cycle.check()
    shown = cycle.rows(cycle.real_pairs or cycle.texts.valid[:1])[0]
    cycle.console.print("a row:", render_sample(cycle.tokenizer, shown))
    with helpers(__file__, argv, options.jobs, output, helper=options.worker):
        cycle.work()
    if options.worker:
        return None
    found = metrics(config, filters, {seed: cycle.found(seed) for seed in config.seeds})
    write_json(output / "metrics.json", found)
    write_plot(found, output / "chrf.png")
    cycle.console.print(table(found))
    cycle.console.print(f"metrics.json, chrf.png and a folder a stage are in {output}")
    return found


if __name__ == "__main__":
    run_script(main)
