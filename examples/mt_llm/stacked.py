"""A frozen MT encoder, a projection and an LLM's body with LoRA as one model, and the losses that train it.

A sentence is the mean of a model's last hidden states over its tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import fused_kd as fk
from fused_kd.integrations.bodies import eval_mode
from fused_kd.training.fit import load_trained, save_trained
from fused_kd.training.models import LoRA, load_adapters, load_pretrained, with_adapters
from fused_kd.training.stage import write_json


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
        if "text" in columns:
            columns = {f"{name}_ids": encode(columns["text"]) for name, encode in self.encode.items()}
        batch: dict[str, Tensor] = {}
        for name, values in columns.items():
            tensors = [torch.as_tensor(value) for value in values]
            if name.endswith("_ids"):
                stem = name.removesuffix("_ids")
                batch[name] = pad_sequence(tensors, batch_first=True, padding_value=self.ids[stem])
                batch[f"{stem}_mask"] = pad_sequence([torch.ones_like(ids) for ids in tensors], batch_first=True)
            else:
                batch[name] = torch.stack(tensors)
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


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """(N, L, H) states and (N, L) mask, 1 where a token is: each row's mean over its tokens, (N, H) in float32."""
    weights = mask.to(torch.float32)
    with torch.autocast(states.device.type, enabled=False):  # it would add in half precision
        total = torch.einsum("nlh,nl->nh", states.float(), weights)
    return total / weights.sum(1, keepdim=True).clamp(min=1.0)


def pooled(body: Any, mask: Tensor, bidirectional: bool, **inputs: Tensor) -> Tensor:
    """A body's last hidden states of ``inputs``, pooled; ``bidirectional`` lets a causal body attend both ways.

    Raises:
        ValueError: bidirectional with an attention that takes no mask of (N, 1, L, L).
    """
    attention = mask
    if bidirectional:
        if (kind := body.config._attn_implementation) != "sdpa":
            raise ValueError(f"bidirectional needs attn_implementation 'sdpa', got {kind!r}")
        attention = mask.bool()[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
    return mean_pool(body(attention_mask=attention, **inputs).last_hidden_state, mask)


def frozen_with_adapters(body: nn.Module, lora: LoRA, seed: int) -> Any:
    """``body`` frozen, with fresh adapters; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return with_adapters(body.requires_grad_(False), lora)


class Embedder(nn.Module):
    """Mean-pooled last hidden states of one model: an LLM's body, or an MT encoder.

    Args:
        body: returns ``last_hidden_state`` (N, L, H).
        bidirectional: let every token of a causal body see all of its sentence (as LLM2Vec does).
        frozen: train nothing of it, and have no dropout.
    """

    def __init__(self, body: Any, bidirectional: bool = False, frozen: bool = False) -> None:
        super().__init__()
        self.body = body.requires_grad_(False).eval() if frozen else body
        self.bidirectional, self.frozen = bidirectional, frozen

    @property
    def width(self) -> int:
        return int(self.body.config.hidden_size)

    def train(self, mode: bool = True) -> Embedder:
        """As a module's; a frozen body stays as it is."""
        super().train(mode)
        if self.frozen:
            self.body.eval()
        return self

    def forward(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """(N, L) token ids and mask: (N, H) float32."""
        return pooled(self.body, text_mask, self.bidirectional, input_ids=text_ids)


class StackedModel(nn.Module):
    """Frozen encoder, linear map with bias, LLM body with LoRA: sentences of many languages in the LLM's space.

    Only ``projection`` and the adapters are trainable; ``seed`` makes them.

    Args:
        encoder: of an encoder-decoder MT model.
        llm: a causal LM's body, without adapters.
        lora: the LLM's adapters.
        bidirectional: as of :class:`Embedder`, for both passes through the LLM.
    """

    def __init__(
        self, encoder: Any, llm: Any, lora: LoRA | None = None, *, bidirectional: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        self.lora = lora or LoRA()
        self.bidirectional = bidirectional
        self.encoder = Embedder(encoder, frozen=True)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.projection = nn.Linear(encoder.config.hidden_size, llm.config.hidden_size)
        self.llm = frozen_with_adapters(llm, self.lora, seed)

    @property
    def width(self) -> int:
        """Of the LLM, and of a pooled sentence."""
        return int(self.llm.config.hidden_size)

    def encode(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """The encoder's states (N, L, d), without a graph."""
        # no_grad, not inference_mode: its tensors could not be kept for the projection's backward
        with torch.no_grad():
            states: Tensor = self.encoder.body(input_ids=text_ids, attention_mask=text_mask).last_hidden_state
        return states

    def forward(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Token ids of the encoder's tokenizer and their mask, (N, L): pooled states (N, H) in float32."""
        states = self.encode(text_ids, text_mask).to(self.projection.weight.dtype)
        embeds = self.projection(states).to(self.llm.get_input_embeddings().weight.dtype)
        return pooled(self.llm, text_mask, self.bidirectional, inputs_embeds=embeds)

    def plain(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """The LLM as it was, adapters off and without a graph: its own tokens (N, L) to pooled states (N, H)."""
        with torch.no_grad(), eval_mode(self.llm), self.llm.disable_adapter():
            return pooled(self.llm, text_mask, self.bidirectional, input_ids=text_ids)

    def checkpoint_activations(self) -> None:
        """Compute the LLM's activations again in the backward instead of keeping them."""
        # transformers 6 drops the older name, 5.0 has no other
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next(getattr(self.llm, name) for name in names if hasattr(self.llm, name))
        enable({"use_reentrant": False})

    def save(self, folder: str | Path, encoder: str, llm: str) -> None:
        """What was trained in ``stacked.safetensors``, and in ``stacked.json`` the names of what it was trained on."""
        save_trained(self, Path(folder) / "stacked.safetensors")
        about = {"encoder": encoder, "llm": llm, "bidirectional": self.bidirectional, "lora": asdict(self.lora)}
        write_json(Path(folder) / "stacked.json", about)

    def load_weights(self, folder: str | Path) -> StackedModel:
        """What :meth:`save` wrote, into a model of the same form; this model."""
        load_trained(self, Path(folder) / "stacked.safetensors")
        return self

    @classmethod
    def load(cls, folder: str | Path, *, llm_adapters: Sequence[str] = (), dtype: Any = "auto") -> StackedModel:
        """What :meth:`save` wrote; encoder and LLM from the places that were named to it."""
        about = json.loads((Path(folder) / "stacked.json").read_text(encoding="utf-8"))
        encoder = load_seq2seq(about["encoder"], dtype=dtype).get_encoder()
        llm = load_body(about["llm"], adapters=llm_adapters, dtype=dtype)
        model = cls(encoder, llm, LoRA(**about["lora"]), bidirectional=about["bidirectional"])
        return model.load_weights(folder)


class Adaptation(nn.Module):
    """Stage 1: MSE between pooled states, of the LLM on its own tokens, adapters off, and of the stacked model.

    Args:
        stacked: its projection and adapters are trained.
        variance: of the LLM's pooled states, as of :func:`variance_of`; the logged ``fvu`` is MSE / variance.
    """

    def __init__(self, stacked: StackedModel, variance: float) -> None:
        super().__init__()
        if not variance > 0:
            raise ValueError(f"variance must be above 0, got {variance!r}: are all sentences the same?")
        self.stacked = stacked
        self.variance = variance

    def forward(self, text_ids: Tensor, text_mask: Tensor, llm_ids: Tensor, llm_mask: Tensor) -> dict[str, Tensor]:
        target = self.stacked.plain(llm_ids, llm_mask)
        mse = F.mse_loss(self.stacked(text_ids, text_mask), target)
        return {"loss": mse, "mse": mse.detach(), "fvu": mse.detach() / self.variance}


class Classifier(nn.Module):
    """Stage 2: a sentence embedder with a head without bias, trained by cross-entropy.

    ``embedder`` takes ``(text_ids, text_mask)`` to (N, H) and has ``width`` H; ``classes`` are the head's rows.
    """

    def __init__(self, embedder: Any, classes: int, seed: int = 0) -> None:
        super().__init__()
        self.embedder = embedder
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head = nn.Linear(embedder.width, classes, bias=False)
        self.criterion: Any = fk.KDLoss(fk.SFT())

    def logits(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """(N, classes)."""
        logits: Tensor = self.head(self.embedder(text_ids, text_mask))
        return logits

    def forward(self, text_ids: Tensor, text_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        states = self.embedder(text_ids, text_mask)
        return {"loss": self.criterion(fk.LMHead(states, self.head.weight), None, labels)}


class TaskDistillation(Classifier):
    """Stage 3: the stacked model learns a task model's sentences, by MSE to its pooled states and KD through its head.

    The head is the teacher's, copied and frozen: where the states agree, so do the decisions.

    Args:
        embedder: the stacked model; its projection and adapters are trained.
        head: the teacher's (classes, H) weight.
        mse_weight: of the mean squared error of pooled states; the paper has this alone.
        objective: any of ``fused_kd``'s, on the distributions over the classes; None for none. kd_weight: of it.
    """

    def __init__(
        self,
        embedder: StackedModel,
        head: Tensor,
        mse_weight: float = 1.0,
        objective: Any = None,
        kd_weight: float = 1.0,
    ) -> None:
        super().__init__(embedder, len(head))
        self.head.requires_grad_(False).weight.copy_(head)
        self.mse_weight, self.kd_weight = mse_weight, kd_weight
        self.criterion = None if objective is None else fk.KDLoss(objective)

    def forward(self, text_ids: Tensor, text_mask: Tensor, labels: Tensor, states: Tensor) -> dict[str, Tensor]:
        """``states`` (N, H) are the teacher's pooled ones of the same sentences."""
        student = self.embedder(text_ids, text_mask)
        mse = F.mse_loss(student, states)
        out = {"loss": self.mse_weight * mse, "mse": mse.detach()}
        if self.criterion is not None:
            weight = self.head.weight
            kd = self.criterion(fk.LMHead(student, weight), fk.LMHead(states, weight), labels)
            out |= {"loss": out["loss"] + self.kd_weight * kd, "kd": kd.detach()}
        return out


def variance_of(states: Tensor) -> float:
    """(N, H) states: the mean over dimensions of their variance over sentences."""
    return float(states.double().var(0, correction=0).mean())


def unexplained(predicted: Tensor, target: Tensor) -> dict[str, float]:
    """Of (N, H) states: ``mse``, and ``fvu``, the fraction of the target's variance that it makes up."""
    mse = float((predicted.double() - target.double()).square().mean())
    return {"mse": mse, "fvu": mse / variance_of(target)}


def fit_projection(stacked: StackedModel, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """Set the projection by least squares, from sentences collated to ``text_ids`` and ``llm_ids``, with their masks.

    It then maps a sentence's mean encoder state as near as a linear map can to the mean of the LLM's input embeddings;
    states and embeddings of one sentence do not align token by token, their means do.

    Returns:
        ``mse_before`` and ``mse_after``, of those means.
    """
    projection, table = stacked.projection, stacked.llm.get_input_embeddings()
    sources, targets = [], []
    with torch.no_grad():
        for batch in batches:
            batch = {name: value.to(projection.weight.device) for name, value in batch.items()}
            states = stacked.encode(batch["text_ids"], batch["text_mask"])
            sources.append(mean_pool(states, batch["text_mask"]).cpu())
            targets.append(mean_pool(table(batch["llm_ids"]), batch["llm_mask"]).cpu())
        x, y = torch.cat(sources).double(), torch.cat(targets).double()
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        before = torch.cat([projection.weight.T, projection.bias[None]]).double().cpu()
        # features of a layer norm are dependent but for float32's rounding, which must not be fitted
        after = torch.from_numpy(np.linalg.lstsq(x.numpy(), y.numpy(), rcond=1e-6)[0])
        projection.weight.copy_(after[:-1].T)
        projection.bias.copy_(after[-1])
    return {"mse_before": float(F.mse_loss(x @ before, y)), "mse_after": float(F.mse_loss(x @ after, y))}


def load_seq2seq(name: str, *, dtype: Any = "auto") -> Any:
    """An encoder-decoder MT model from a folder or the hub. Raises ``ValueError``, ``OSError`` where there is none."""
    from transformers import AutoModelForSeq2SeqLM

    return load_pretrained(AutoModelForSeq2SeqLM, name, dtype=dtype)


def load_body(name: str, *, adapters: Sequence[str] = (), dtype: Any = "auto") -> Any:
    """A causal LM without its head, from a folder or the hub, with LoRA adapters merged into it one after another.

    Raises:
        ValueError, OSError: nothing there that gives such a model. ImportError: adapters without peft.
    """
    from transformers import AutoModel

    body = load_pretrained(AutoModel, name, dtype=dtype)
    body.config.use_cache = False  # nothing is generated
    for adapter in adapters:
        body = load_adapters(body, adapter).merge_and_unload()
    return body
