"""A study of self-distillation from a resource-rich language as a configuration. What ``examples/sdrrl.py`` runs."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fused_kd.training.data.pairs import parse_direction
from fused_kd.training.generation import Decoding
from fused_kd.training.loading import load_pretrained
from fused_kd.training.presets import PRESETS
from fused_kd.training.sdrrl.code_switch import check_share
from fused_kd.training.sdrrl.quality import COMET_KIWI, Quality
from fused_kd.training.sdrrl.rows import Style
from fused_kd.training.sdrrl.tasks import Captions
from fused_kd.training.sdrrl.transfer_set import Arm, Wording
from fused_kd.training.stages import Settings


@dataclass(frozen=True)
class Instructions:
    """Data by path, for models that are there already.

    Args:
        data: Alpaca's JSON or JSONL in the rich language, or a hub name, as of ``load_instructions``.
        valid: the last of them, kept for validation.
        limit: at most this many are read.
        parallel: parallel text, as of ``load_pairs``.
        parallel_sentences: the first of them; the paper's 1,000.
        tests: an instruction file a language, answers scored by chrF, BLEU and exact match; None leaves the test out.
    """

    data: str
    parallel: str
    valid: int = 500
    limit: int | None = None
    parallel_sentences: int = 1000
    tests: dict[str, str] | None = None

    def __post_init__(self) -> None:
        for name in ("valid", "parallel_sentences"):
            if getattr(self, name) < 1:
                raise ValueError(f"instructions.{name} must be at least 1, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Training:
    """AdamW, linear decay; ``batch`` rows an optimizer step, ``micro_batch`` (default: all of them) held at once."""

    epochs: float
    learning_rate: float
    batch: int = 64
    micro_batch: int | None = None
    warmup: float = 0.03
    weight_decay: float = 0.0
    scheduler: str = "linear"
    bf16: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        self.settings(0, 1, "last")

    def settings(self, seed: int, processes: int, select: Literal["last", "best"]) -> Settings:
        """How ``train_stage`` trains in each of so many processes."""
        held = self.micro_batch or self.batch // processes
        if self.epochs <= 0 or self.learning_rate <= 0 or held < 1 or self.batch % (held * processes):
            raise ValueError(
                "expected epochs and learning_rate above 0, and batch a multiple of micro_batch x processes = "
                f"{held} x {processes}, got {self}"
            )
        return Settings(
            self.epochs,
            self.learning_rate,
            batch_size=held,
            accumulation=self.batch // (held * processes),
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            scheduler=self.scheduler,
            bf16=self.bf16,
            gradient_checkpointing=self.gradient_checkpointing,
            seed=seed,
            select=select,
        )


@dataclass(frozen=True)
class Translation:
    """The translator.

    Args:
        kind: "seq2seq" (NLLB-200, M2M-100: ``model`` and ``codes``), "causal" (a preset of ``PRESETS``, trained on the
            captions' pairs by ``pretraining``, or a trained model's folder) or "dictionary".
        model: a hub name, folder or preset.
        codes: a seq2seq model's own name of each language.
        decoding: default greedy, 128 new tokens.
        pretraining: of a preset.
    """

    kind: Literal["seq2seq", "causal", "dictionary"]
    model: str | None = None
    codes: dict[str, str] = field(default_factory=dict)
    decoding: Decoding = field(default_factory=Decoding)
    pretraining: Training | None = None

    def __post_init__(self) -> None:
        if self.kind != "dictionary" and self.model is None:
            raise ValueError(f"translator.model must be given for translator.kind={self.kind!r}")
        if self.kind == "causal" and self.model in PRESETS and self.pretraining is None:
            raise ValueError(f"translator.pretraining must be given for the preset {self.model!r}")


@dataclass(frozen=True)
class Recipe:
    """Everything that a study's numbers depend on; files in examples/configs/sdrrl.

    Args:
        source, target: the rich language and the other.
        model: a hub name or folder, or a preset that is first trained on ``captions`` by ``pretraining``.
        translator, quality: see there.
        dictionary: TSV of source and target words, for code-switching.
        training: sentence-level distillation: SFT on the answers, the best checkpoint by validation loss.
        arms: the models to train; the first is the one that the others are compared with.
        captions, instructions: one of them: a small study made of captions, or data by path.
        rows: training rows of every arm; None (default): as many as the whole recipe has.
        p: code-switching's share of question words.
        seeds: of the preset's pretraining, of code-switching, of ``fill`` and of the training.
        prompt: "alpaca" or, for tiny models, "tiny".
        wording: the language instructions.
        answers: how the model answers instructions, while collecting and in tests.
        test: the tasks that are scored: "test", or "dev" while settings are being chosen.
        max_length: tokens of prompt and answer.
        vocab: of the tokenizer that presets are trained with.
        dtype: a loaded model's; "auto" is that of its files.
    """

    source: str
    target: str
    model: str
    translator: Translation
    quality: Quality
    dictionary: str
    training: Training
    arms: dict[str, Arm]
    captions: Captions | None = None
    instructions: Instructions | None = None
    pretraining: Training | None = None
    rows: int | None = None
    p: float = 0.15
    seeds: tuple[int, ...] = (0,)
    prompt: Style = "alpaca"
    wording: Wording = field(default_factory=Wording)
    answers: Decoding = field(default_factory=Decoding)
    test: Literal["test", "dev"] = "test"
    max_length: int = 512
    vocab: int = 4000
    dtype: str = "auto"

    def __post_init__(self) -> None:
        parse_direction(f"{self.source}-{self.target}")
        check_share(self.p)
        if (self.captions is None) == (self.instructions is None):
            raise ValueError("expected either captions or instructions")
        small = self.model in PRESETS
        if small and (self.pretraining is None or self.captions is None):
            raise ValueError(f"pretraining and captions must be given for the preset model={self.model!r}")
        if not small and self.translator.model in PRESETS and self.captions is None:
            raise ValueError(f"captions must be given for the preset translator.model={self.translator.model!r}")
        if self.translator.model in PRESETS and self.translator.kind != "causal":
            raise ValueError(f"translator.kind must be 'causal' for a preset, got {self.translator.kind!r}")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows must be at least 1, or None, got {self.rows!r}")
        for name, values in (("arms", self.arms), ("seeds", self.seeds)):
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must have at least one, each once, got {list(values)!r}")
        if bad := [name for name in self.arms if not name.replace("_", "").replace("-", "").isalnum()]:
            raise ValueError(f"arms must have names of letters, digits, _ and -, got {', '.join(bad)}")
        references = [name for name, arm in self.arms.items() if arm.answers == "reference"]
        if references and self.captions is None:
            raise ValueError(
                f"arms {', '.join(references)}: reference answers need captions, which have both languages"
            )

    @property
    def languages(self) -> tuple[str, str]:
        return self.source, self.target

    def missing(self) -> list[str]:
        """What is asked for and not there, each as ``key=value``: paths, models (here or on the hub), CometKiwi.

        Of a model only its configuration is looked for.
        """
        paths: dict[str, str | None] = {"dictionary": self.dictionary}
        if self.captions is not None:
            paths["captions.data"] = self.captions.data
        if self.instructions is not None:
            tests = self.instructions.tests or {}
            paths |= {f"instructions.tests.{language}": path for language, path in tests.items()}
            paths |= {
                f"instructions.{name}": path
                for name, path in (("data", self.instructions.data), ("parallel", self.instructions.parallel))
                if path.endswith((".json", ".jsonl", ".gz")) or path.startswith((".", "/", "~"))
            }
        found = [f"{key}={path}" for key, path in paths.items() if path and not Path(path).expanduser().exists()]
        models = {"model": self.model, "translator.model": self.translator.model}
        found += [f"{key}={name}" for key, name in models.items() if name and name not in PRESETS and not _known(name)]
        if self.quality.scorer == COMET_KIWI:
            python = self.quality.python
            if python is None and importlib.util.find_spec("comet") is None:
                found.append("quality.python=null (the package unbabel-comet: install fused_kd[comet])")
            elif python is not None and shutil.which(python) is None:
                found.append(f"quality.python={python}")
        return found


def _known(name: str) -> bool:
    from transformers import AutoConfig

    try:
        load_pretrained(AutoConfig, name)
    except (OSError, ValueError):
        return False
    return True
