"""SDRRL: a model that answers well in one language teaches itself another (Zhang et al., arXiv 2402.12204).

    python examples/sdrrl/sdrrl.py --preset tiny --jobs 2 --output runs/sdrrl   # real captions, two CPU cores
    python examples/sdrrl/sdrrl.py --preset paper --instructions PATH --parallel PATH --dictionary PATH

The steps of the method are the methods of :class:`Study`, in their order. Each finished stage lies in a folder named
after what it is made of: the same command goes on where it stopped, another setting redoes what depends on it.
"""

from __future__ import annotations

import os
import sys

# tiny models: threads that spin at barriers cost more than they give
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import sacrebleu
import torch
import transfer
import transformers
from caption_tasks import COMPLETE, CaptionStudy, caption_files, score_answers
from sdrrl_report import BEFORE, gather, results_table, transfer_table, write_plots
from transfer import Arm, Row, read_rows, write_rows

import fused_kd
from fused_kd.integrations.precision import trained_in_float32
from fused_kd.training.collate import Collator, padding_id
from fused_kd.training.data import Instruction, Pair, load_instructions, load_pairs, parse_direction
from fused_kd.training.fit import best_checkpoint, fit, training_arguments
from fused_kd.training.generate import Decoding, generate_to
from fused_kd.training.models import (
    PRESETS,
    load_model,
    load_pretrained,
    load_tokenizer,
    on_accelerator,
    threads_for,
    train_tokenizer,
)
from fused_kd.training.prompts import Rows, concatenate, get_prompt, tokenize_pairs, tokenize_texts
from fused_kd.training.score import score
from fused_kd.training.script import build, parse, run_script
from fused_kd.training.stage import Stages, helpers, read_json, tell, write_json
from fused_kd.training.trainer import KDTrainer

HERE = Path(__file__).parent
TOLD = ("counts", "training", "scores")  # the JSON files of a stage that its results are


@dataclass
class Config:
    """What a study's numbers depend on; tiny.yaml and paper.yaml have its values, README.md says more."""

    model: str  # a hub name or folder, or a preset that is first trained on the captions by `pretraining`
    dictionary: str  # TSV of source and target words, for code-switching
    training: dict  # options of TrainingArguments; the best checkpoint by validation loss is kept
    arms: dict  # the models to train: by name, what differs from the whole recipe, fields of transfer.Arm; None: none
    tau: float  # a pair is kept where each of its texts scores at least this
    source: str = "en"  # the rich language
    target: str = "de"
    pretraining: dict | None = None  # options of TrainingArguments
    # either a folder of parallel captions, see caption_tasks.CaptionStudy
    captions: str | None = None
    # or Alpaca's JSON or JSONL in the rich language, or a hub name, and parallel text, as of load_pairs
    instructions: str | None = None
    parallel: str | None = None
    valid: int = 500  # of the instructions, the last, kept for validation
    limit: int | None = None  # of the instructions
    parallel_sentences: int = 1000  # the first of `parallel`, or of the captions
    tests: dict = field(default_factory=dict)  # an instruction file a language, answered before and after
    # seq2seq: NLLB-200, M2M-100. causal: a preset, trained on the captions, or a trained model's folder
    translator_kind: Literal["seq2seq", "causal", "dictionary"] = "seq2seq"
    translator: str | None = None
    translator_codes: dict = field(default_factory=dict)  # a seq2seq model's own name of each language
    translator_decoding: dict = field(default_factory=dict)  # fields of Decoding
    translator_training: dict | None = None  # options of TrainingArguments
    scorer: Literal["round_trip", "comet_kiwi"] = "round_trip"
    # a program that is started, and a model whose .ckpt file may be a pickle: only from where you would take a program
    comet: str = "comet-score"
    comet_model: str = "Unbabel/wmt22-cometkiwi-da"
    comet_batch_size: int = 16
    rows: int | None = None  # training rows of every arm; None: as many as the whole recipe has
    p: float = 0.15  # code-switching's share of question words
    seeds: list[int] = field(default_factory=lambda: [0])  # of pretraining, code-switching, order of rows and training
    prompt: Literal["alpaca", "tiny"] = "alpaca"
    answer_in: dict = field(default_factory=dict)  # "FROM-TO": language instruction after a question in FROM
    translate_as: dict = field(default_factory=dict)  # "FROM-TO": instruction above a sentence to translate
    answers: dict = field(default_factory=dict)  # fields of Decoding
    # the tasks that are scored; "dev" while settings are being chosen, or both, to choose by the one and tell the other
    test: Literal["test", "dev", "both"] = "test"
    max_length: int = 512  # tokens of prompt and answer
    vocab: int = 4000  # of the tokenizer that presets are trained with
    dtype: str = "auto"  # of a loaded model; "auto" is that of its files
    output: str = "runs/sdrrl"
    results: str | None = None  # folder of the small files: pieces.jsonl, metrics.json, plots; None: `output`
    until: Literal["start", "collect", "translate", "filter", "set", "train", "test"] = "test"  # the last step
    jobs: int = 1  # processes that share the work, for tiny models
    worker: bool = False

    def __post_init__(self) -> None:
        parse_direction(f"{self.source}-{self.target}")
        for name in ("p", "tau"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        for name in ("rows", "valid", "limit", "parallel_sentences", "jobs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        if (self.captions is None) == (self.instructions is None or self.parallel is None):
            raise ValueError("expected either captions, or instructions and parallel")
        if self.translator_kind != "dictionary" and self.translator is None:
            raise ValueError(f"translator must be given for translator_kind={self.translator_kind!r}")
        if self.translator in PRESETS and self.translator_kind != "causal":
            raise ValueError(f"translator_kind must be 'causal' for a preset, got {self.translator_kind!r}")
        for key, options in (("model", "pretraining"), ("translator", "translator_training")):
            name = getattr(self, key)
            if name in PRESETS and (self.captions is None or not getattr(self, options)):
                raise ValueError(f"{options} and captions must be given for the preset {key}={name!r}")
        if self.test != "test" and self.captions is None:
            raise ValueError(f"test={self.test!r}: there are dev tasks of captions alone")
        for name, values in (("arms", self.arms), ("seeds", self.seeds)):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must have at least one, each once, got {list(values)!r}")
        if bad := [name for name in self.arms if not name.replace("_", "").replace("-", "").isalnum()]:
            raise ValueError(f"arms must have names of letters, digits, _ and -, got {', '.join(bad)}")

    def missing(self) -> list[str]:
        """What is asked for and not there: paths, models (of each only its configuration is looked for), CometKiwi."""
        paths = {"dictionary": self.dictionary, "captions": self.captions}
        paths |= {f"tests.{language}": path for language, path in self.tests.items()}
        for name in ("instructions", "parallel"):
            path = getattr(self, name) or ""
            if path.startswith((".", "/", "~")) or path.endswith((".json", ".jsonl", ".gz")):  # no hub name
                paths[name] = path
        found = [f"{key}={path}" for key, path in paths.items() if path and not Path(path).expanduser().exists()]
        for key, name in (("model", self.model), ("translator", self.translator)):
            try:
                if name is not None and name not in PRESETS:
                    load_pretrained(transformers.AutoConfig, name)
            except (OSError, ValueError):
                found.append(f"{key}={name}")
        if self.scorer == "comet_kiwi" and shutil.which(self.comet) is None:
            found.append(f"comet={self.comet} (of the package unbabel-comet, in an environment of its own)")
        return found


class Study:
    """The steps of the method. Each returns the folder of its finished stage, and first does what that needs.

    ``own`` names the model before and its answers: "own-sSEED", or "own" for a loaded model, which answers alike for
    every seed. ``answers`` are "given" or such a name.
    """

    def __init__(self, config: Config, captions: CaptionStudy) -> None:
        self.c = c = config
        self.captions = captions
        self.languages = c.source, c.target
        given = {name: values for name, values in c.arms.items() if values is not None}
        self.arms = {name: build(Arm, f"arms.{name}", values) for name, values in given.items()}
        self.answers = build(Decoding, "answers", c.answers)
        self.decoding = build(Decoding, "translator_decoding", c.translator_decoding)
        kinds = {arm.answers for arm in self.arms.values()}
        if c.captions is None and "reference" in kinds:
            raise ValueError("arms with reference answers need captions, which have both languages")
        self.owns = {self.own(seed): seed for seed in c.seeds}
        self.kinds = [*(self.owns if "own" in kinds else ()), *(["given"] if "given" in kinds else ())]
        self.stages = Stages(c.output)
        self.results = Path(c.results or c.output)
        self.folders: dict[str, Path] = {}

    def own(self, seed: int) -> str:
        return f"own-s{seed}" if self.c.model in PRESETS else "own"

    def stage(self, title: str, work: Callable[[Path], object], settings: Mapping[str, Any], **inputs: Any) -> Path:
        if title not in self.folders:  # once: a large file is read for its fingerprint
            self.folders[title] = folder = self.stages(title, work, settings, **inputs)
            found = {name: read_json(folder / f"{name}.json") for name in TOLD if (folder / f"{name}.json").is_file()}
            if "training" in found:  # its log is long
                found["training"] = {k: v for k, v in found["training"].items() if k != "log_history"}
            if found:
                tell(self.results / "pieces.jsonl", title, found)
        return self.folders[title]

    # texts, tokenizer, models

    def tasks(self) -> Path:
        """``instructions``, ``validation``, ``parallel``, ``test``, and of captions also the other models' texts."""
        c = self.c

        def of_captions(out: Path) -> None:
            write_files(out, caption_files(c.captions, self.captions, c.parallel_sentences, self.languages))

        def of_files(out: Path) -> None:
            asked = as_tasks("instruction", c.source, load_instructions(c.instructions, "train", limit=c.limit))
            if len(asked) <= c.valid:
                raise ValueError(f"valid={c.valid}: expected less than the {len(asked)} instructions")
            pairs = load_pairs(c.parallel, "train", f"{c.source}-{c.target}", limit=c.parallel_sentences)
            tests = [as_tasks(f"test-{key}", key, load_instructions(path, "all")) for key, path in c.tests.items()]
            files = {"instructions": asked[: -c.valid], "validation": asked[-c.valid :], "test": [*chain(*tests)]}
            files["parallel"] = [{c.source: pair.source, c.target: pair.target} for pair in pairs]
            write_files(out, files)

        about: dict[str, Any] = {"languages": self.languages, "parallel": c.parallel_sentences}
        if c.captions is not None:
            return self.stage("tasks", of_captions, about | {"study": self.captions}, files=[c.captions])
        about |= {"valid": c.valid, "limit": c.limit, "tests": sorted(c.tests)}
        return self.stage("tasks", of_files, about, files=[c.instructions, c.parallel, *c.tests.values()])

    def read(self, name: str) -> list[Row]:
        return read_rows(self.tasks() / f"{name}.jsonl")

    def asked(self) -> list[Row]:
        """The transfer set's tasks, those for validation after the others."""
        return self.read("instructions") + self.read("validation")

    def tokens(self) -> Path:
        """The tokenizer of presets."""
        c = self.c

        def work(out: Path) -> None:
            texts = [text for name in ("translator", "base") for row in self.read(name) for text in row.values()]
            for a, b in (self.languages, self.languages[::-1]):
                texts += [transfer.answer_in(a, b, c.answer_in), transfer.translate_as(a, b, c.translate_as)]
            train_tokenizer(texts, c.vocab).save_pretrained(out)

        about = {"vocab": c.vocab, "answer_in": c.answer_in, "translate_as": c.translate_as}
        return self.stage("tokenizer", work, about, needs=[self.tasks()])

    def tokenizer(self, name: str) -> Any:
        return load_tokenizer(self.tokens() if name in PRESETS else name)

    def load(self, name: str, folder: Path | None, seed: int = 0) -> Any:
        """The model that a stage trained; without one the named model as it is, or a preset's random weights."""
        where = folder / "model" if folder is not None and (folder / "model").is_dir() else name
        return load_model(where, self.tokenizer(name), seed, dtype=torch.float32 if name in PRESETS else self.c.dtype)

    def generate(self, out: Path, name: str, folder: Path, prompts: list[str], decoding: Decoding) -> Any:
        model = on_accelerator(self.load(name, folder))
        return generate_to(out, model, self.tokenizer(name), prompts, decoding)

    def fit(self, out: Path, name: str, start: Path | None, options: dict, seed: int, *sets: Rows) -> None:
        """Cross-entropy on the answers, from a stage's model; with validation rows the best checkpoint is kept."""
        values = {"per_device_train_batch_size": 64, "warmup_steps": 0.03, "weight_decay": 0.0, "seed": seed, **options}
        # options are those of one process: of more, each takes a share of the accumulation, and a batch is the same
        steps, processes = values.get("gradient_accumulation_steps", 1), int(os.environ.get("WORLD_SIZE", "1"))
        if steps % processes:
            raise ValueError(
                f"gradient_accumulation_steps must be a multiple of the {processes} processes, got {steps}"
            )
        values["gradient_accumulation_steps"] = steps // processes
        if len(sets) > 1:
            values |= best_checkpoint(values.get("num_train_epochs", 3.0))
            values.setdefault("per_device_eval_batch_size", values["per_device_train_batch_size"])
        arguments = training_arguments(out, **values)  # first: it says how to load what will be sharded
        model, tokenizer = trained_in_float32(self.load(name, start, seed)), self.tokenizer(name)
        more: dict[str, Any] = dict(zip(("train_dataset", "eval_dataset"), sets, strict=False))
        more |= {"data_collator": Collator(padding_id(tokenizer)), "processing_class": tokenizer}
        fit(KDTrainer(model, objective="sft", args=arguments, **more), out)

    def start(self, own: str) -> Path:
        """The model before: a preset trained on texts of the captions, or one that is there."""
        c, seed = self.c, self.owns[own]

        def work(out: Path) -> None:
            found = self.read("base")
            # a caption alone has no prompt
            prompts = [render(row, c.prompt) if row["instruction"] else "" for row in found]
            rows = tokenize_texts(self.tokenizer(c.model), prompts, [row["output"] for row in found], c.max_length)
            self.fit(out, c.model, None, c.pretraining, seed, rows)

        if c.model not in PRESETS:
            return self.stage("model", lambda out: None, {}, files=[c.model])
        about = {"model": c.model, "training": c.pretraining, "max_length": c.max_length, "prompt": c.prompt}
        return self.stage(f"base-s{seed}", work, about | {"seed": seed}, needs=[self.tasks(), self.tokens()])

    # (i) the model answers the instructions itself

    def collect(self, own: str) -> Path:
        c = self.c

        def work(out: Path) -> None:
            tasks = self.asked()
            prompts = [render(task[c.source], c.prompt) for task in tasks]
            made = self.generate(out, c.model, self.start(own), prompts, self.answers)
            # an answer without an end, or of nothing but space, is none
            rows = [
                {"id": task["id"], **task[c.source], "output": answer.text.strip()}
                for task, answer in zip(tasks, made, strict=True)
                if answer.finished and answer.text.strip()
            ]
            write_rows(out / "answers.jsonl", rows)
            given = {task["id"]: task[c.source]["output"] for task in tasks}
            counts = {"asked": len(tasks), "unanswered": len(tasks) - len(rows)}
            counts["as_given"] = sum(row["output"] == given[row["id"]] for row in rows)
            write_json(out / "counts.json", counts)

        about = {"prompt": c.prompt, "answers": self.answers, "languages": self.languages}
        return self.stage(f"collect-{own}", work, about, needs=[self.tasks(), self.start(own)])

    def answered(self, answers: str) -> list[Row]:
        """Questions with their answers in the rich language."""
        if answers == "given":
            return [{"id": task["id"], **task[self.c.source]} for task in self.asked()]
        return read_rows(self.collect(answers) / "answers.jsonl")

    # (ii) questions and answers are translated

    def translator(self) -> Path:
        c = self.c

        def work(out: Path) -> None:
            tokenizer, found = self.tokenizer(c.translator), self.read("translator")
            rows = [
                tokenize_pairs(tokenizer, "tiny", [Pair(row[a], row[b]) for row in found], f"{a}-{b}", c.max_length)
                for a, b in (self.languages, self.languages[::-1])
            ]
            self.fit(out, c.translator, None, c.translator_training, 0, concatenate(rows))

        if c.translator in PRESETS:
            about = {"model": c.translator, "training": c.translator_training, "max_length": c.max_length}
            return self.stage("translator", work, about, needs=[self.tasks(), self.tokens()])
        file = c.dictionary if c.translator_kind == "dictionary" else c.translator
        about = {"kind": c.translator_kind, "codes": c.translator_codes}
        return self.stage("translator", lambda out: None, about, files=[file])

    def translate(self, out: Path, texts: list[str], a: str, b: str) -> dict[str, str]:
        """Each different text and its translation, "" where it has none; ``out`` keeps what is done."""
        c = self.c

        def sentences(pieces: list[str]) -> list[str]:
            if c.translator_kind == "dictionary":
                return transfer.translate_words(pieces, self.dictionaries()[a])
            if c.translator_kind == "seq2seq":
                return transfer.translate_seq2seq(out, c.translator, c.translator_codes, (a, b), pieces, self.decoding)
            prompts = [get_prompt("tiny").render(piece, f"{a}-{b}") for piece in pieces]
            made = self.generate(out, c.translator, self.translator(), prompts, self.decoding)
            return [answer.text if answer.finished else "" for answer in made]

        return transfer.translate_texts(texts, sentences)

    def dictionaries(self) -> dict[str, transfer.Senses]:
        """By the language of their words."""
        return dict(zip(self.languages, transfer.load_dictionary(self.c.dictionary), strict=True))

    def test_translator(self) -> Path:
        def work(out: Path) -> None:
            tasks = [task for task in self.read("dev") if task["kind"] != COMPLETE][:200]
            scores = {}
            for a, b in (self.languages, self.languages[::-1]):
                sources, references = ([task[language]["input"] for task in tasks] for language in (a, b))
                made = self.translate(out / f"{a}-{b}", sources, a, b)
                scores[f"{a}-{b}"] = asdict(score([made[text] for text in sources], references))
            write_json(out / "scores.json", scores)

        needs = [self.tasks(), self.translator()]
        return self.stage("translator-test", work, {"decoding": self.decoding}, needs=needs)

    def translated(self, what: str) -> Path:
        """Translations of "questions" or of answers, with scores of them: by the way back, or by CometKiwi."""
        c = self.c
        about: dict[str, Any] = {"decoding": self.decoding, "languages": self.languages}
        needs = [self.tasks(), self.translator()] + ([self.collect(what)] if what in self.owns else [])

        def translate(out: Path) -> None:
            if what == "questions":
                texts = [task[c.source][name] for task in self.asked() for name in ("instruction", "input")]
            else:
                texts = [row["output"] for row in self.answered(what)]
            made = self.translate(out, list(filter(None, texts)), c.source, c.target)
            write_rows(out / "pairs.jsonl", [{"text": text, "translation": found} for text, found in made.items()])

        def rate(out: Path) -> None:
            pairs = read_rows(there / "pairs.jsonl")
            done = {row["text"]: row["translation"] for row in pairs if row["translation"]}
            texts, translations = list(done), list(done.values())
            if c.scorer == "round_trip":
                back = self.translate(out, translations, c.target, c.source)
                scores = transfer.round_trip(texts, [back[text] for text in translations])
            else:
                comet = c.comet, c.comet_model, c.comet_batch_size
                scores = transfer.comet_kiwi(out, texts, translations, *comet) if done else []
            found = dict(zip(texts, scores, strict=True))
            write_rows(out / "scores.jsonl", [row | {"score": found.get(row["text"])} for row in pairs])

        there = self.stage(f"translate-{what}", translate, about, needs=needs)
        about = about if c.scorer == "round_trip" else {"model": c.comet_model}
        needs = [there] + ([self.translator()] if c.scorer == "round_trip" else [])
        return self.stage(f"score-{what}", rate, about | {"scorer": c.scorer}, needs=needs)

    # (iii) pairs of poor translations are left out

    def pairs(self, answers: str, tau: float | None) -> Path:
        """The answered questions in both languages whose texts all score at least ``tau``."""
        questions, outputs = self.translated("questions"), self.translated(answers)

        def work(out: Path) -> None:
            scored = [{row["text"]: row for row in read_rows(out / "scores.jsonl")} for out in (questions, outputs)]
            candidates = [transfer.pair_up(row, *scored) for row in self.answered(answers)]
            good, counts = transfer.kept(candidates, tau)
            write_rows(out / "pairs.jsonl", candidates if tau is None else good)
            write_json(out / "counts.json", counts)

        needs = [self.tasks(), questions, outputs] + ([self.collect(answers)] if answers in self.owns else [])
        return self.stage(f"pairs-{answers}" if tau is None else f"filter-{answers}", work, {"tau": tau}, needs=needs)

    # (iv) the four combinations, (v) code-switched questions, (vi) parallel sentences: an arm's rows

    def make_set(self, name: str, seed: int) -> Path:
        c, arm, own = self.c, self.arms[name], self.own(seed)
        found = whole = None
        if arm.answers != "reference":
            found = self.pairs(own if arm.answers == "own" else "given", c.tau if arm.quality_filter else None)
        if c.rows is None and own in self.kinds:
            whole = self.pairs(own, c.tau)  # what the whole recipe has is the measure of every arm

        def work(out: Path) -> None:
            held = {task["id"] for task in self.read("validation")}
            if found is None:
                pairs = [{"id": t["id"], "source": t[c.source], "target": t[c.target]} for t in self.asked()]
            else:
                # without a translation there is no pair, filter or not; the rich language alone asks for none
                alone = set(arm.combinations) == {"ss"}
                pairs = [row for row in read_rows(found / "pairs.jsonl") if row["scores"] or alone]
            parallel = self.read("parallel")
            dictionaries = self.dictionaries() if arm.code_switch else {}

            def switch(text: str, language: str, key: str) -> str:
                return transfer.code_switch(text, dictionaries.get(language, {}), p=c.p, seed=seed, key=key)

            train, valid = ([pair for pair in pairs if (pair["id"] in held) == part] for part in (False, True))
            rows = transfer.combine(train[: arm.pairs], arm.combinations, self.languages, c.answer_in, switch)
            if arm.parallel:
                rows += transfer.translation_rows(parallel, self.languages, c.translate_as)
            # held-out questions in the arm's own combinations, as they are
            valid = transfer.combine(valid, arm.combinations, self.languages, c.answer_in)
            if not rows or not valid:
                raise ValueError(
                    f"{len(rows)} training and {len(valid)} validation rows are left of {len(self.asked())} "
                    f"instructions: lower tau={c.tau}, or give more instructions"
                )
            count = c.rows or len(rows)
            if whole is not None:
                good = sum(row["id"] not in held for row in read_rows(whole / "pairs.jsonl"))
                count = len(transfer.COMBINATIONS) * good + 2 * len(parallel)
            filled = transfer.fill(rows, count, seed, arm.shares)
            write_rows(out / "train.jsonl", filled)
            write_rows(out / "valid.jsonl", valid)
            counts = {"rows": len(filled), "different": len(rows), "valid": len(valid)}
            write_json(out / "counts.json", counts | {"parts": Counter(row["part"] for row in filled)})

        about = {"arm": replace(arm, training=None), "seed": seed, "rows": c.rows, "languages": self.languages}
        about |= {"answer_in": c.answer_in, "translate_as": c.translate_as, "p": c.p if arm.code_switch else None}
        needs = list(dict.fromkeys(folder for folder in (self.tasks(), found, whole) if folder is not None))
        files = [c.dictionary] if arm.code_switch else []
        return self.stage(f"set-{name}-s{seed}", work, about, needs=needs, files=files)

    # (vii) training on all of it, and what has come of it in both languages

    def train(self, name: str, seed: int) -> Path:
        c = self.c
        rows, start = self.make_set(name, seed), self.start(self.own(seed))
        options = {**c.training, **(self.arms[name].training or {})}

        def work(out: Path) -> None:
            tokenizer, sets = self.tokenizer(c.model), []
            for part in ("train", "valid"):
                found = read_rows(rows / f"{part}.jsonl")
                prompts, outputs = [render(row, c.prompt) for row in found], [row["output"] for row in found]
                sets.append(tokenize_texts(tokenizer, prompts, outputs, c.max_length))
            self.fit(out, c.model, start, options, seed, *sets)

        about = {"training": options, "seed": seed, "prompt": c.prompt, "max_length": c.max_length, "dtype": c.dtype}
        return self.stage(f"train-{name}-s{seed}", work, about, needs=[rows, start])

    def test(self, which: str, name: str, seed: int) -> Path:
        """Answers and scores of an arm, or of the model before, on the tasks "dev" or "test"."""
        c, own = self.c, self.own(seed)
        model = self.start(own) if name == BEFORE else self.train(name, seed)

        def work(out: Path) -> None:
            scores = {}
            for language in self.languages:
                if tasks := [task for task in self.read(which) if language in task]:
                    prompts = [render(task[language], c.prompt) for task in tasks]
                    made = self.generate(out / language, c.model, model, prompts, self.answers).texts()
                    scores[language] = score_answers(tasks, made, language)
                    rows = [{"id": t["id"], **t[language], "answer": text} for t, text in zip(tasks, made, strict=True)]
                    write_rows(out / f"answers.{language}.jsonl", rows)
            write_json(out / "scores.json", scores)

        about = {"prompt": c.prompt, "answers": self.answers, "languages": self.languages, "test": which}
        title = f"{which}-{name}" + ("" if name == BEFORE and own == "own" else f"-s{seed}")
        return self.stage(title, work, about, needs=[self.tasks(), model])

    def steps(self) -> dict[str, dict[str, Callable[[], Path]]]:
        """The pieces of work of each step; several processes may share those of one."""
        arms = [(name, seed) for name in self.arms for seed in self.c.seeds]
        tests = [(BEFORE, seed) for seed in self.c.seeds] + arms if self.c.captions or self.c.tests else []
        sets = ("dev", "test") if self.c.test == "both" else (self.c.test,)
        start = {"translator": self.translator} | {own: partial(self.start, own) for own in self.owns}
        steps: dict[str, dict[str, Callable[[], Path]]] = {
            "start": start,
            "collect": {own: partial(self.collect, own) for own in self.kinds if own != "given"},
            "translate": {what: partial(self.translated, what) for what in ("questions", *self.kinds)},
            "filter": {answers: partial(self.pairs, answers, self.c.tau) for answers in self.kinds},
            "set": {f"{name}-s{seed}": partial(self.make_set, name, seed) for name, seed in arms},
            "train": {f"{name}-s{seed}": partial(self.train, name, seed) for name, seed in arms},
            "test": {"translator": self.test_translator} if self.c.translator in PRESETS else {},
        }
        for name, seed in tests:
            steps["test"] |= {f"{which}-{name}-s{seed}": partial(self.test, which, name, seed) for which in sets}
        return steps


def write_files(folder: Path, files: Mapping[str, Sequence[Row]]) -> None:
    for name, rows in files.items():
        write_rows(folder / f"{name}.jsonl", rows)
    write_json(folder / "counts.json", {name: len(rows) for name, rows in files.items()})


def as_tasks(name: str, language: str, texts: Sequence[Instruction]) -> list[Row]:
    """Instructions as tasks in one language."""
    return [{"id": f"{name}-{number}", "kind": "", language: text._asdict()} for number, text in enumerate(texts)]


def render(texts: Mapping[str, str], style: str) -> str:
    """The prompt: Alpaca's, or for tiny models input and instruction, each on a line of its own."""
    if style == "alpaca":
        return Instruction(texts["instruction"], texts["input"], "").prompt()
    return "".join(f"{text}\n" for text in (texts["input"], texts["instruction"]) if text)


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    config, captions = parse((Config, CaptionStudy), argv, configs=HERE, description=__doc__)
    study = Study(config, captions)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if missing := config.missing():
        raise ValueError(f"not there: {', '.join(missing)}; give each as --KEY VALUE")
    if (threads := threads_for([config.model, str(config.translator)])) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    folder = Path(config.output)
    packages = (fused_kd, torch, transformers, sacrebleu)
    about = {
        "config": asdict(config),
        "captions": asdict(captions) if config.captions else None,
        "versions": {package.__name__: package.__version__ for package in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    tell(study.results / "pieces.jsonl", "about", about)
    steps = study.steps()
    if config.until == "test" and steps["test"]:  # a test trains its arm, and need not wait for the other trainings
        steps = {name: pieces for name, pieces in steps.items() if name not in ("set", "train")}
    with helpers(__file__, argv, config.jobs, folder, helper=config.worker):
        for step, pieces in steps.items():
            study.stages.share(pieces)
            if step == config.until:
                break
    if config.until != "test" or config.worker:
        return None
    metrics = {**about, **gather(study.results, study.folders)}
    write_json(study.results / "metrics.json", metrics)
    write_plots(metrics, study.results)
    print(transfer_table(metrics), end="\n\n")
    if metrics["scores"]:
        print(results_table(metrics), end="\n\n")
    print(f"metrics.json and plots are in {study.results}, answers and models in {folder}")
    return metrics


if __name__ == "__main__":
    run_script(main)
