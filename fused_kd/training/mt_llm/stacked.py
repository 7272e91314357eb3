"""A frozen MT encoder, a projection and an LLM's body with LoRA, in one model; sentences are mean-pooled states."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fused_kd.training.config import build
from fused_kd.training.loading import load_pretrained
from fused_kd.training.lora import LoRA, load_adapters, with_adapters
from fused_kd.training.runs import flush, write_json

WEIGHTS = "stacked.safetensors"
SETTINGS = "stacked.json"


def frozen_with_adapters(body: nn.Module, lora: LoRA, seed: int) -> Any:
    """``body`` frozen, with fresh adapters; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return with_adapters(body.requires_grad_(False), lora)


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """(N, L, H) states and (N, L) mask, 1 where a token is: each row's mean over its tokens, (N, H) in float32."""
    weights = mask.to(torch.float32)
    total = torch.einsum("nlh,nl->nh", states.float(), weights)
    return total / weights.sum(1, keepdim=True).clamp(min=1.0)


class Embedder(nn.Module):
    """Mean-pooled last hidden states of one model: an LLM's body, or an MT encoder.

    Args:
        body: returns ``last_hidden_state`` (N, L, H).
        bidirectional: let every token of a causal body see all of its sentence (as LLM2Vec does); attention must then
            be "sdpa" or "eager". Default False: as the body was made.
        frozen: train nothing of it, and have no dropout.
    """

    def __init__(self, body: Any, bidirectional: bool = False, frozen: bool = False) -> None:
        super().__init__()
        self.body = body.requires_grad_(False).eval() if frozen else body
        self.bidirectional, self.frozen = bidirectional, frozen
        if bidirectional:
            attention_mask_for(body, torch.ones(1, 1, dtype=torch.int64), True)

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
        attention = attention_mask_for(self.body, text_mask, self.bidirectional)
        states = self.body(input_ids=text_ids, attention_mask=attention).last_hidden_state
        return mean_pool(states, text_mask)


class StackedModel(nn.Module):
    """Frozen encoder, linear map with bias, LLM body with LoRA: sentences of many languages in the LLM's space.

    Only ``projection`` and the adapters are trainable. The encoder stays in eval mode.

    Args:
        encoder: of an encoder-decoder MT model; ``config.hidden_size`` is its width.
        llm: a causal LM's body, without adapters.
        lora: the LLM's adapters.
        bidirectional: as of :class:`Embedder`, for both passes through the LLM.
        seed: of the projection and the adapters.

    Raises:
        ValueError: bidirectional with an attention that takes no such mask. ImportError: no peft.
    """

    def __init__(
        self, encoder: Any, llm: Any, lora: LoRA | None = None, *, bidirectional: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        self.lora = lora or LoRA()
        self.bidirectional = bidirectional
        self.encoder = encoder.requires_grad_(False).eval()
        if bidirectional:
            attention_mask_for(llm, torch.ones(1, 1, dtype=torch.int64), True)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.projection = nn.Linear(encoder.config.hidden_size, llm.config.hidden_size)
        self.llm = frozen_with_adapters(llm, self.lora, seed)

    @property
    def width(self) -> int:
        """Of the LLM, and of a pooled sentence."""
        return int(self.llm.config.hidden_size)

    def train(self, mode: bool = True) -> StackedModel:
        """As a module's, but the frozen encoder has no dropout ever."""
        super().train(mode)
        self.encoder.eval()
        return self

    def encode(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """The encoder's states (N, L, d), without a graph."""
        # no_grad, not inference_mode: its tensors could not be kept for the projection's backward
        with torch.no_grad():
            found = self.encoder(input_ids=text_ids, attention_mask=text_mask)
        return cast(Tensor, found.last_hidden_state)

    def forward(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Token ids of the encoder's tokenizer and their mask, (N, L): pooled states (N, H) in float32."""
        states = self.encode(text_ids, text_mask)
        embeds = self.projection(states.to(self.projection.weight.dtype)).to(self._embeddings.dtype)
        attention = attention_mask_for(self.llm, text_mask, self.bidirectional)
        states = self.llm(inputs_embeds=embeds, attention_mask=attention).last_hidden_state
        return mean_pool(states, text_mask)

    def plain(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """The LLM as it was, adapters off and without a graph: its own tokens (N, L) to pooled states (N, H)."""
        with torch.no_grad(), _in_eval_mode(self.llm), self.llm.disable_adapter():
            attention = attention_mask_for(self.llm, text_mask, self.bidirectional)
            states = self.llm(input_ids=text_ids, attention_mask=attention).last_hidden_state
            return mean_pool(states, text_mask)

    @property
    def _embeddings(self) -> Tensor:
        return cast(Tensor, self.llm.get_input_embeddings().weight)

    def save(self, folder: str | Path, encoder: str, llm: str) -> None:
        """What was trained in ``stacked.safetensors``, and in ``stacked.json`` the names of what it was trained on."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_trained(self, folder / WEIGHTS)
        about = {"encoder": encoder, "llm": llm, "bidirectional": self.bidirectional}
        write_json(folder / SETTINGS, about | {"lora": dataclasses.asdict(self.lora)})

    @classmethod
    def load(cls, folder: str | Path, *, llm_adapters: Sequence[str] = (), dtype: Any = "auto") -> StackedModel:
        """What :meth:`save` wrote; encoder and LLM from the places that were named to it."""
        about = json.loads((Path(folder) / SETTINGS).read_text(encoding="utf-8"))
        encoder = load_encoder(about["encoder"], dtype=dtype)
        llm = load_body(about["llm"], adapters=llm_adapters, dtype=dtype)
        model = cls(encoder, llm, build(LoRA, about["lora"]), bidirectional=about["bidirectional"])
        load_trained(model, Path(folder) / WEIGHTS)
        return model


def save_activation_memory(model: StackedModel) -> None:
    """Compute the LLM's activations again in the backward instead of keeping them."""
    # transformers 6 drops the older name, 5.0 has no other
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(model.llm, name) for name in names if hasattr(model.llm, name))
    enable({"use_reentrant": False})


def attention_mask_for(body: Any, mask: Tensor, bidirectional: bool) -> Tensor:
    """The mask (N, L) itself, or as (N, 1, L, L) the one with which a causal body attends both ways."""
    if not bidirectional:
        return mask
    kind = body.config._attn_implementation
    if kind not in ("sdpa", "eager"):
        raise ValueError(f"bidirectional needs attn_implementation 'sdpa' or 'eager', got {kind!r}")
    seen = mask.bool()[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
    if kind == "sdpa":
        return seen
    dtype = body.get_input_embeddings().weight.dtype
    return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(~seen, torch.finfo(dtype).min)


def load_seq2seq(name: str, *, dtype: Any = "auto") -> Any:
    """An encoder-decoder MT model from a folder or the hub. Raises ``ValueError`` where there is none."""
    from transformers import AutoModelForSeq2SeqLM

    return from_pretrained(AutoModelForSeq2SeqLM, name, dtype=dtype)


def load_encoder(name: str, *, dtype: Any = "auto") -> Any:
    """The encoder alone, as :func:`load_seq2seq`."""
    return load_seq2seq(name, dtype=dtype).get_encoder()


def load_body(name: str, *, adapters: Sequence[str] = (), dtype: Any = "auto") -> Any:
    """A causal LM without its head, from a folder or the hub.

    Args:
        name: folder or hub name.
        adapters: folders or hub names of LoRA adapters, merged into the weights one after another (LLM2Vec's).
        dtype: of the weights; default ``"auto"``, that of the files.

    Raises:
        ValueError: nothing there that gives such a model. ImportError: adapters without peft.
    """
    from transformers import AutoModel

    body = from_pretrained(AutoModel, name, dtype=dtype)
    body.config.use_cache = False  # nothing is generated
    for adapter in adapters:
        body = load_adapters(body, adapter).merge_and_unload()
    return body


def from_pretrained(loader: Any, name: str, **options: Any) -> Any:
    """:func:`load_pretrained`, whose many ways to fail become one ``ValueError``."""
    try:
        return load_pretrained(loader, name, **options)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name!r} is no folder and no hub name at hand that gives {loader.__name__}: {first}"
        ) from error


def trained_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training made of a model, by name: its trainable parameters, and its task head where it has one."""
    named = dict(model.named_parameters())
    return {name: p for name, p in named.items() if p.requires_grad or name == "head.weight"}


def save_trained(model: nn.Module, file: Path) -> None:
    """:func:`trained_tensors` as safetensors, written atomically."""
    from safetensors.torch import save_file

    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    save_file({name: p.detach().cpu().contiguous() for name, p in trained_tensors(model).items()}, partial)
    flush(partial)
    os.replace(partial, file)


def load_trained(model: nn.Module, file: Path) -> None:
    """Into a model of the same form.

    Raises:
        ValueError: the file has other tensors than the model trains; the message names some.
    """
    from safetensors.torch import load_file

    saved, own = load_file(file), trained_tensors(model)
    differing = sorted(
        name for name in saved.keys() | own.keys()
        if name not in saved or name not in own or saved[name].shape != own[name].shape
    )  # fmt: skip
    if differing:
        raise ValueError(f"{file} is of another model: {len(differing)} tensors differ ({', '.join(differing[:3])})")
    with torch.no_grad():
        for name, value in saved.items():
            own[name].copy_(value)


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    was = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in was:
            part.training = training
