"""The settings of ``examples/mt_llm.py``, and what has to be at hand before its first stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fused_kd.training.adapter_config import read_adapter_config
from fused_kd.training.lora import LoRA
from fused_kd.training.mt_llm.fitting import Fit
from fused_kd.training.mt_llm.pretraining import TinyLM, TinyMT
from fused_kd.training.mt_llm.stacked import from_pretrained
from fused_kd.training.specs import parse_objective

CAPTIONS = "captions"


@dataclass(frozen=True)
class Arm:
    """A way of stage 3.

    Args:
        mse_weight: of the MSE to the task model's pooled states; the paper has this alone.
        objective: as of ``parse_objective``, through the task head; None for none.
        kd_weight: of that objective.
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


@dataclass(frozen=True)
class MTLLM:
    """Everything that the numbers depend on; values are the paper's where it has them.

    Args:
        languages: those to transfer to.
        mt: an encoder-decoder MT model, by folder or hub name; or how to train a tiny one on the captions.
        llm: a causal LM, likewise.
        llm_adapters: folders or hub names of LoRA adapters merged into the LLM first (LLM2Vec's).
        bidirectional: let the LLM attend both ways (for an LLM that was made for it, as LLM2Vec's are).
        codes: the MT tokenizer's name of each language, English too (NLLB: ``deu_Latn``); None where it has
            no such names, as the tiny model.
        data: folder of parallel captions, for the tiny models and the captions task.
        task: "captions", or a folder with ``train.jsonl`` and ``test.LANGUAGE.jsonl`` of ``{"text", "label"}`` (English
            among the languages), and optionally ``retrieval.jsonl`` of ``{LANGUAGE: text}``.
        text: English text of stage 1: a file or folder of JSON rows, or a hub name, with ``text`` or ``en``; None takes
            the task's ``text.jsonl``.
        tests, valid: files of ``data``; the tests are taken together.
        limit: captions of the training set. text_limit: rows of the text.
        adapt, task_fit, distil: how stages 1, 2 and 3 train.
        lora: adapters of the stacked model.
        task_lora: adapters of stage 2; None trains the whole body.
        projection_init: "random", or "least_squares" from ``projection_rows`` sentences.
        arms: the ways of stage 3; None leaves out one of the preset.
        encoder_baselines: also train a head on the MT encoder, frozen and not, as stage 2 trains the LLM.
        max_length: tokens of a text. beams, max_new_tokens: of translate-test.
        dtype: of the loaded weights; "auto" as in their files. bf16: autocast.
        gradient_checkpointing: of the LLM in stages 1 and 3.
    """

    languages: tuple[str, ...]
    mt: str | TinyMT
    llm: str | TinyLM
    adapt: Fit
    task_fit: Fit
    distil: Fit
    llm_adapters: tuple[str, ...] = ()
    bidirectional: bool = False
    codes: dict[str, str] | None = None
    data: str | None = None
    task: str = CAPTIONS
    text: str | None = None
    tests: tuple[str, ...] = ("test_2016_flickr",)
    valid: str = "valid"
    limit: int | None = None
    text_limit: int | None = None
    lora: LoRA = field(default_factory=LoRA)
    task_lora: LoRA | None = None
    projection_init: Literal["random", "least_squares"] = "random"
    projection_rows: int = 4000
    arms: dict[str, Arm | None] = field(default_factory=lambda: {"mse": Arm()})
    encoder_baselines: bool = True
    max_length: int = 512
    beams: int = 1
    max_new_tokens: int = 128
    eval_batch: int = 64
    dtype: str = "auto"
    bf16: bool = False
    gradient_checkpointing: bool = False
    seeds: tuple[int, ...] = (0, 1)
    pretraining_seed: int = 0

    def __post_init__(self) -> None:
        if not self.languages or "en" in self.languages:
            raise ValueError(f"languages must be some, without the task's own 'en', got {self.languages!r}")
        if self.codes and (missing := [name for name in ("en", *self.languages) if name not in self.codes]):
            raise ValueError(f"codes must name {', '.join(missing)} as well, got {self.codes!r}")
        if self.codes and not isinstance(self.mt, str):
            raise ValueError(f"codes must be left out with the tiny mt, got {self.codes!r}")
        if self.data is None and (self.task == CAPTIONS or not isinstance(self.mt, str)):
            raise ValueError("data must name a folder of parallel captions for the captions task and the tiny mt")
        if self.data is None and not isinstance(self.llm, str):
            raise ValueError("data must name a folder of parallel captions for the tiny llm")
        if not self.ways or not self.seeds:
            raise ValueError(f"arms and seeds must be some, got {self.arms!r}, {self.seeds!r}")
        if wrong := [name for name in self.arms if not all(char.isalnum() or char in "-_." for char in name)]:
            raise ValueError(f"arms must be named by letters, digits and -_., got {wrong[0]!r}")
        if self.llm_adapters and not isinstance(self.llm, str):
            raise ValueError(f"llm_adapters are for an llm by name, got {self.llm_adapters!r} with the tiny one")
        for name in ("max_length", "eval_batch", "beams", "max_new_tokens", "projection_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")

    def code(self, language: str) -> str | None:
        """The MT tokenizer's name of a language."""
        return None if self.codes is None else self.codes[language]

    @property
    def ways(self) -> dict[str, Arm]:
        """The arms that are not left out."""
        return {name: arm for name, arm in self.arms.items() if arm is not None}

    def missing_inputs(self) -> list[str]:
        """One line for each data set, tokenizer or model that is not at hand; to be asked before any work."""
        from transformers import AutoConfig, AutoTokenizer

        wrong = []
        if self.data is not None and not Path(self.data).expanduser().is_dir():
            wrong.append(f"data={self.data!r}: no such folder; give one with parallel captions as data=PATH")
        if self.task != CAPTIONS:
            files = ["train.jsonl", *(f"test.{name}.jsonl" for name in ("en", *self.languages))]
            files += ["text.jsonl"] if self.text is None else []
            lacking = [name for name in files if not (Path(self.task).expanduser() / name).is_file()]
            wrong += [f"task={self.task!r}: no {name} there" for name in lacking]
        if self.text is not None and not Path(self.text).expanduser().exists():
            wrong += _missing_text(self.text)
        for key, name in (("mt", self.mt), ("llm", self.llm)):
            for loader in (AutoConfig, AutoTokenizer) if isinstance(name, str) else ():
                try:
                    from_pretrained(loader, str(name))
                except ValueError as error:
                    wrong.append(f"{key}: {error}")
                    break
        for adapter in self.llm_adapters:
            try:
                from peft import PeftConfig
            except ImportError as error:
                raise ImportError("llm_adapters need the 'peft' package: install fused_kd[lora]") from error
            try:
                read_adapter_config(adapter)
                PeftConfig.from_pretrained(adapter)
            except (OSError, ValueError, TypeError) as error:
                wrong.append(f"llm_adapters: {error}")
        return wrong


def _missing_text(name: str) -> list[str]:
    from datasets import load_dataset_builder

    try:
        load_dataset_builder(*name.split(":", 1))
    except Exception as error:  # of many kinds: no such name, no connection, no such configuration
        return [f"text={name!r}: no such path, and no data set of that name on the hub at hand: {type(error).__name__}"]
    return []
