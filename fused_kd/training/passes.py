"""The memory of a model's forward and backward, counted without any: on fake tensors, which have shapes and no data."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fused_kd.integrations.bodies import hidden_states
from fused_kd.integrations.precision import trained_in_float32
from fused_kd.training.loading import gguf_of, safe_config
from fused_kd.training.models import PRESETS, LoRA, load_model, with_adapters


@dataclass(frozen=True)
class Passes:
    """Bytes of one micro-batch beyond the model's weights, without its output head.

    ``kept`` after the forward for the backward; ``forward`` and ``backward`` at the highest point of each. Gradients of
    the weights are in ``backward``, and with ``accumulated`` in ``forward`` too.
    """

    kept: int
    forward: int
    backward: int


@dataclass(frozen=True)
class Sizes:
    """Of a model: numbers in all and trained, bytes of the weights and of what is trained; of its head the sizes, the
    dtype, and whether it learns."""

    numbers: int
    trained: int
    weights: int
    trained_bytes: int
    hidden: int
    vocab: int
    dtype: torch.dtype
    head_learns: bool


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make within it, until each is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def count(self, tensor: torch.Tensor) -> None:
        """Take a tensor into account, whose storage counts once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_iter(out):
            if isinstance(each, torch.Tensor):
                self.count(each)
        return out


def model_without_data(
    name: str,
    tokenizer: Any,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    adapters: LoRA | None = None,
    student: bool = False,
) -> Any:
    """A model as :func:`fused_kd.training.models.load_model` gives it, on the meta device; no weights are read.

    A ``student`` is as it is trained: in float32 where its files are in half precision, with its adapters. Quantised
    files give a model that is not.

    Raises:
        ValueError, OSError: as of that function, for a name that is none.
    """
    with torch.device("meta"):
        if name in PRESETS:
            model = load_model(name, tokenizer, 0)
        else:
            model = _from_config(name, dtype, attn_implementation)
        if not student:
            return model
        return trained_in_float32(with_adapters(model, adapters, "CAUSAL_LM"))


def _from_config(name: str, dtype: str, attn_implementation: str | None) -> Any:
    from transformers import AutoModelForCausalLM

    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    folder, file = gguf_of(name)
    config = safe_config(folder, {**attention, **({} if file is None else {"gguf_file": file})})
    wanted = config.dtype if dtype == "auto" else getattr(torch, dtype, None)
    return AutoModelForCausalLM.from_config(config, dtype=wanted or torch.float32, **attention)


@contextmanager
def faked(model: Any) -> Iterator[Any]:
    """Within, a model of the meta device is one of fake tensors on the CPU, where autocast works; it stays one."""
    made: dict[int, torch.Tensor] = {}
    # what cannot be counted is told by the error
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode():
            for module in model.modules():
                for name, value in module._parameters.items():
                    if value is not None:
                        fake = made.setdefault(id(value), torch.empty(value.shape, dtype=value.dtype, device="cpu"))
                        if not isinstance(fake, torch.nn.Parameter):
                            made[id(value)] = fake = torch.nn.Parameter(fake, requires_grad=value.requires_grad)
                        module._parameters[name] = fake
                for name, value in module._buffers.items():
                    if value is not None:
                        module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cpu")
            yield model
    finally:
        logger.setLevel(level)


def sizes_of(model: Any) -> Sizes:
    """The sizes of a model, fake or not."""
    parameters = list(model.parameters())
    trained = [each for each in parameters if each.requires_grad]
    head = model.get_output_embeddings()
    return Sizes(
        numbers=sum(each.numel() for each in parameters),
        trained=sum(each.numel() for each in trained),
        weights=sum(each.numel() * each.element_size() for each in parameters),
        trained_bytes=sum(each.numel() * each.element_size() for each in trained),
        hidden=head.weight.shape[1],
        vocab=head.weight.shape[0],
        dtype=head.weight.dtype,
        head_learns=any(each.requires_grad for each in head.parameters()),
    )


def passes_of(
    model: Any,
    rows: int,
    length: int,
    *,
    train: bool = True,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
    accumulated: bool = False,
) -> Passes:
    """Run a model's body on ``rows`` x ``length`` tokens and count what is live.

    The counts are those of PyTorch's own operations with fused attention. They hold for a GPU as well, but for what its
    libraries take for themselves.

    Args:
        model: real or, within :func:`faked`, without data.
        train: with a backward; False: no gradient, as of a teacher, and ``kept`` are the hidden states.
        autocast: what the run computes in, where not in the weights' dtype.
        checkpointing: gradient checkpointing.
        accumulated: gradients of earlier micro-batches are there.
    """
    model.train(train)
    if train and checkpointing:
        # the first is the older name
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
        if hasattr(model, "peft_config"):
            model.enable_input_require_grads()
    device = next(model.parameters()).device
    ids = torch.zeros(rows, length, dtype=torch.long, device=device)
    live = LiveBytes()
    computed = nullcontext() if autocast is None else torch.autocast(device.type, autocast)
    for once in (False, True) if train and accumulated else (False,):
        live = LiveBytes()
        with live:
            for each in model.parameters():
                live.count(each)
            weights = live.now
            for each in model.parameters() if once else ():
                if each.grad is not None:
                    live.count(each.grad)
            held = live.now
            with computed, torch.set_grad_enabled(train):
                states = hidden_states(model, input_ids=ids)
            kept, forward = live.now - held, live.peak - weights
            live.peak = live.now
            if train:
                states.backward(torch.ones_like(states))
            backward = live.peak - weights
            del states
    return Passes(kept, forward, backward)
