"""What a run of CycleDistill goes by: its settings, the prompts, and the texts that it reads."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fused_kd.training import Pair, PromptTemplate
from fused_kd.training.data import load_pairs, parse_direction
from fused_kd.training.files import SUFFIXES, text_rows
from fused_kd.training.generate import Decoding
from fused_kd.training.models import PRESETS
from fused_kd.training.prompts import PROMPTS
from fused_kd.training.reading import read_rows
from fused_kd.training.reading import select as first_of
from fused_kd.training.specs import parse_objective

sys.path.insert(0, str(Path(__file__).parent))

from candidates import SCORERS

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
VARIANTS = ("hard", "greedy", "soft", "soft_self_evolution")


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
    shots: int = 4  # the first so many pairs are examples in the prompt; the rest trains the control
    keep_parallel: bool = False  # and that rest goes into every iteration
    candidates: int = 1  # translations of each sentence; 1 is greedy, more are sampled
    temperature: float = 0.5  # of the sampling
    scorers: list[str] = field(default_factory=list)  # some of SCORERS; the best is kept, without one the first
    prompt: str = "cycle_distill"
    variants: list[str] = field(default_factory=lambda: ["hard", "soft"])  # some of VARIANTS
    iterations: int = 3
    stop: bool = True  # an arm ends after the first iteration that does not raise chrF on the valid split
    restart_from_base: bool = False  # every iteration trains the base instead of the model that translated
    control: bool = True  # also train the base on the few real pairs, as many steps
    continued: bool = False  # of a preset: also on the documents of its pretraining, as many steps
    ceiling: bool = True  # and on the same sentences with their real references
    training: dict = field(default_factory=dict)  # options of TrainingArguments for every fine-tuning
    hard: dict = field(default_factory=dict)  # over training, for hard labels, those of control and ceiling too
    soft: dict = field(default_factory=dict)  # over training, for soft labels
    held_out: float = 0.0  # share of a soft variant's rows not trained on, for load_best_model_at_end
    alpha: float = 0.5
    k: int = 20  # entries of each generated token's list
    lists: Literal["fp16", "8bit"] = "fp16"
    self_evolution: str = "self_evolution:gamma=0.4,beta=0.5"  # that variant's objective; its lam is alpha
    lora: dict = field(default_factory=dict)  # r, alpha, dropout, target_modules; merged after each iteration
    # options of TrainingArguments with which a preset becomes a base: on plain text of both languages and pairs
    pretrain: dict = field(default_factory=dict)
    document: int = 3  # so many pairs one after another, as a web page would have them, each time among others
    repeats: int = 1  # so often an epoch has every pair; every sentence comes once
    web: int | None = None  # so many pairs after the sentences are read instead of ``pairs``
    both_ways: bool = False  # the pairs are read in both directions
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
        Decoding(temperature=self.temperature)
        if "greedy" in self.variants and self.candidates == 1:
            raise ValueError("variants: greedy is hard with one candidate, and candidates=1 makes hard the same")
        if len(set(self.scorers)) < len(self.scorers) or not set(self.scorers) <= {*SCORERS}:
            raise ValueError(f"scorers must name some of {', '.join(SCORERS)}, each once, got {self.scorers!r}")
        if "round_trip" in self.scorers and self.pretrain and not self.both_ways:
            raise ValueError(f"scorers={self.scorers!r} need both_ways: the base translates in one direction only")
        counts = ("sentences", "iterations", "k", "generation_batch", "max_new_tokens", "document", "repeats", "plain")
        counts += ("candidates", "web")
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
        for name, below in {"alpha": 1, "held_out": 0.99}.items():
            if not 0 <= (value := getattr(self, name)) <= below:
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


class Texts(NamedTuple):
    """``sentences`` are the sources to translate, with an empty target where no reference is known.

    ``web`` and ``plain``, empty without pretraining, are what a preset reads beside the sentences: pairs, and text of
    the target language, of other rows.
    """

    pairs: list[Pair]
    sentences: list[Pair]
    web: list[Pair]
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
    web: list[Pair] = []
    if config.pretrain:
        references, others = {pair.target for pair in sentences}, train[wanted:]
        web = others[: config.web] if config.web else train[: config.pairs]
        plain = [pair.target for pair in others[config.web or 0 :] if pair.target not in references][: config.plain]
        if not plain:
            raise ValueError(
                f"sentences={config.sentences}, pairs={config.pairs}: none of the {len(train)} training rows is left "
                "for plain text of the target language"
            )
    valid = load_pairs(config.data, config.valid, config.direction, limit=config.valid_limit)
    test = load_pairs(config.data, config.test, config.direction, limit=config.test_limit)
    return Texts(train[: config.pairs], sentences, web, plain, valid, test)


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
