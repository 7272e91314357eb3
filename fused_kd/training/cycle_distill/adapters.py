"""Adapters merged into what they were trained on, so that the next iteration starts there.

The sum is made in float32 and kept in the base's dtype.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fused_kd.training.checkpoints import seal
from fused_kd.training.lora import load_adapters
from fused_kd.training.runs import remove_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def merge(base: PreTrainedModel, adapters: Path, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the base with the adapters of that folder added, whole or not at all."""
    dtype = base.dtype
    merged = load_adapters(base.float(), adapters).merge_and_unload(safe_merge=True).to(dtype)
    partial = folder.with_name(f"{folder.name}.partial")
    remove_folder(partial)
    merged.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    seal(partial)
    remove_folder(folder)
    os.replace(partial, folder)
