"""Low-rank adapters on a model's body."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fused_kd.training.adapter_config import read_adapter_config


@dataclass(frozen=True)
class LoRA:
    """Adapters on the student's body, as of ``peft.LoraConfig``."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: str | tuple[str, ...] = "all-linear"


def with_adapters(model: nn.Module, lora: LoRA | None, task_type: str | None = None) -> Any:
    """``model`` with fresh adapters that change nothing yet, if any; a head is left alone: the loss needs it whole.

    ``task_type`` as of ``peft.LoraConfig``: "CAUSAL_LM" for a model with a head, None for a body.

    Raises:
        ImportError: no peft.
    """
    if lora is None:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("lora needs the 'peft' package: install fused_kd[lora]") from error
    targets = lora.target_modules
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type=task_type,
    )
    return get_peft_model(model, config)


def load_adapters(model: Any, name: str | Path) -> Any:
    """``model`` as a PEFT model with the adapters of a folder or hub name.

    Raises:
        ValueError: no adapters there, or a configuration that :func:`read_adapter_config` refuses; tensors of the
            adapters are missing. ImportError: no peft.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError("adapters need the 'peft' package: install fused_kd[lora]") from error
    if read_adapter_config(name) is None:
        raise ValueError(f"{str(name)!r} is no folder and no hub name at hand with an adapter_config.json")
    missing = "Found missing adapter keys"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", missing)
            return PeftModel.from_pretrained(model, str(name))
    except UserWarning as error:
        raise ValueError(f"the adapters of {str(name)!r} must be whole: {str(error)[:500]}") from error
