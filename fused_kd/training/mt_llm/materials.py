"""What the stages of MT-LLM read and start from: texts, tokenizers, models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_kd.training.data.prompts import padding_id
from fused_kd.training.data.reading import sound
from fused_kd.training.data.sources import file_rows, read_rows
from fused_kd.training.mt_llm.config import MTLLM, Arm
from fused_kd.training.mt_llm.evaluation import embed
from fused_kd.training.mt_llm.fitting import TRAINED, Rows
from fused_kd.training.mt_llm.stacked import (
    Embedder,
    StackedModel,
    frozen_with_adapters,
    load_body,
    load_encoder,
    load_trained,
)
from fused_kd.training.mt_llm.task import Classifier, TaskDistillation
from fused_kd.training.mt_llm.translate import encode_sources
from fused_kd.training.presets import load_tokenizer
from fused_kd.training.specs import parse_objective


class Materials:
    """Everything by the settings and three places.

    Args:
        config: the settings.
        mt, llm: folder or hub name of the MT model and of the LLM.
        task: folder of the task's files.
    """

    def __init__(self, config: MTLLM, mt: str, llm: str, task: str | Path) -> None:
        self.config = config
        self.mt, self.llm, self.task = mt, llm, Path(task).expanduser()
        self._tokenizers: dict[str, Any] = {}

    @cached_property
    def device(self) -> torch.device:
        return torch.accelerator.current_accelerator() or torch.device("cpu")

    def tokenizer(self, kind: str) -> Any:
        """``"mt"``'s or ``"llm"``'s, which need not both be there yet."""
        if kind not in self._tokenizers:
            tokenizer = load_tokenizer(self.mt if kind == "mt" else self.llm)
            tokenizer.padding_side = "right"
            self._tokenizers[kind] = tokenizer
        return self._tokenizers[kind]

    def encode(self, kind: str, texts: Sequence[str], language: str = "en") -> list[list[int]]:
        """Token ids of ``"mt"``'s or ``"llm"``'s tokenizer."""
        longest = self.config.max_length
        if kind == "mt":
            return encode_sources(self.tokenizer("mt"), texts, self.config.code(language), longest)
        ids: list[list[int]] = self.tokenizer("llm")(list(texts), truncation=True, max_length=longest)["input_ids"]
        return ids

    def pad_id(self, kind: str) -> int:
        return padding_id(self.tokenizer(kind))

    def items(self, name: str) -> tuple[list[str], list[str]]:
        """Texts and labels of one of the task's files."""
        rows = [row.value for row in sound(file_rows(self.task / f"{name}.jsonl", None))]
        return [str(row["text"]) for row in rows], [str(row["label"]) for row in rows]

    @cached_property
    def classes(self) -> list[str]:
        return sorted(set(self.items("train")[1]))

    def texts(self) -> list[str]:
        """The English text of stage 1."""
        c = self.config
        key: Callable[[Any], Any] = (  # noqa: E731
            lambda value: value.get("text") or value.get("en") if isinstance(value, dict) else None
        )
        path = self.task / "text.jsonl"
        rows = file_rows(path, None) if c.text is None else read_rows(c.text, "train", key)
        found: list[str] = []
        for place, value in rows:
            text = key(value)
            if not isinstance(text, str):
                raise ValueError(f"{place}: expected a row with a text in 'text' or 'en', got {value!r}")
            # far more characters than can be tokens that count
            found.append(text[: 16 * c.max_length])
            if len(found) == c.text_limit:
                break
        return found

    def body(self, trained: bool = False) -> Any:
        """The LLM's; in float32 where all of its weights are trained."""
        dtype = torch.float32 if trained else self.dtype
        return load_body(self.llm, adapters=self.config.llm_adapters, dtype=dtype)

    def stacked(self, seed: int, weights: Path | None = None) -> StackedModel:
        c = self.config
        encoder = load_encoder(self.mt, dtype=self.dtype)
        model = StackedModel(encoder, self.body(), c.lora, bidirectional=c.bidirectional, seed=seed)
        if weights is not None:
            load_trained(model, weights)
        return model.to(self.device)

    def classifier(self, seed: int, folder: Path | None = None) -> Classifier:
        """The task model of stage 2; fresh, or as it was trained."""
        c = self.config
        body = self.body(trained=c.task_lora is None)
        if c.task_lora is not None:
            body = frozen_with_adapters(body, c.task_lora, seed)
        return self._classifier(Embedder(body, c.bidirectional), seed, folder)

    def encoder_classifier(self, seed: int, tuned: bool, folder: Path | None = None) -> Classifier:
        """The baseline without an LLM: a head on the MT encoder."""
        encoder = load_encoder(self.mt, dtype=torch.float32 if tuned else self.dtype)
        return self._classifier(Embedder(encoder, frozen=not tuned), seed, folder)

    def _classifier(self, embedder: Embedder, seed: int, folder: Path | None) -> Classifier:
        model = Classifier(embedder, len(self.classes), seed)
        if folder is not None:
            load_trained(model, folder / TRAINED)
        return model.to(self.device)

    @property
    def dtype(self) -> Any:
        dtype = self.config.dtype
        return dtype if dtype == "auto" else getattr(torch, dtype)

    def training_rows(self, kind: str, **columns: Tensor) -> Rows:
        texts, labels = self.items("train")
        ids = self.encode(kind, texts)
        return Rows(
            [
                {"text_ids": ids[i], "labels": self.classes.index(labels[i]), **{k: v[i] for k, v in columns.items()}}
                for i in range(len(ids))
            ]
        )

    def embed(
        self, function: Callable[[Tensor, Tensor], Tensor], kind: str, texts: Sequence[str], language: str = "en"
    ) -> Tensor:
        ids = self.encode(kind, texts, language)
        return embed(function, ids, self.pad_id(kind), batch_size=self.config.eval_batch, device=self.device)

    def distillation(self, stacked: StackedModel, head: Tensor, arm: Arm) -> TaskDistillation:
        objective = None if arm.objective is None else parse_objective(arm.objective).objective
        module = TaskDistillation(
            stacked, head, mse_weight=arm.mse_weight, objective=objective, kd_weight=arm.kd_weight
        )
        return module.to(self.device)
