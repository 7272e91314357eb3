"""What a teacher cache was made from, as SHA-256 of each part."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from fused_kd.integrations.teacher_columns import OTHER_IDS, OTHER_LABELS
from fused_kd.training.cached_rows import AnyRows, without_caches
from fused_kd.training.prompts import PromptTemplate, get_prompt
from fused_kd.training.stage import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# what says where a config came from, and nothing about the function that the model computes
_CONFIG_NOISE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
# the columns of a row whose teacher reads another prompt
PROMPT_COLUMNS = (OTHER_IDS, OTHER_LABELS)
_MARK = b"\xff" * 8  # no row is so long
PARTS = {
    "tokenizer": "the tokens and their ids",
    "data": "the token ids and labels of the rows, and of their teacher's prompts, which follow from the data, the "
    "options split, limit, directions, prompt, chat_template, turns and max_length, and the tokenizer",
    "template": "the text of the prompt template, the option prompt",
    "teacher_config": "the teacher's config",
    "teacher_weights": "the teacher's weights",
}


def fingerprints_of(
    tokenizer: PreTrainedTokenizerBase, rows: AnyRows, template: PromptTemplate | str | None, data: str | None = None
) -> dict[str, str | None]:
    """SHA-256 of which token has which id, of the rows (``data``, if that is known already), and of the template's
    text, whose name does not matter, where there is one."""
    made = {} if template is None else {"template": fingerprint(get_prompt(template).template)}
    own = fingerprint_rows(rows) if data is None else data
    return {"tokenizer": fingerprint_tokenizer(tokenizer), "data": own, **made}


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase, below: int | None = None) -> str:
    """SHA-256 of which token has which id, of all ids or of those below a number."""
    return fingerprint([pair for pair in sorted(tokenizer.get_vocab().items()) if below is None or pair[1] < below])


def check_tokenizer(
    known: Mapping[str, str | None], tokenizer: PreTrainedTokenizerBase, below: int, fault: str
) -> None:
    """Raise unless a teacher with these fingerprints has this tokenizer; its tokens from the id ``below`` on, which
    were added since, do not count. ``fault`` begins the message."""
    if known.get("tokenizer") != fingerprint_tokenizer(tokenizer, below):
        check_parts(known, {"tokenizer": fingerprint_tokenizer(tokenizer)}, fault)


def check_parts(known: Mapping[str, str | None], given: Mapping[str, str | None], fault: str) -> None:
    """Raise ``ValueError`` where a part of ``given`` is not known or another one; ``fault`` begins the message."""
    faults = []
    for part, value in given.items():
        there = known.get(part)
        if there is None:
            faults.append(f"{part} (not known: {PARTS[part]})")
        elif there != value:
            faults.append(f"{part} ({PARTS[part]}: {there[:12]} there, {str(value)[:12]} here)")
    if faults:
        raise ValueError(f"{fault}: {', '.join(faults)}")


def fingerprint_rows(rows: AnyRows) -> str:
    """SHA-256 of all token ids and labels, in order, and of those of another prompt where rows have them."""
    data = without_caches(rows)
    digest = hashlib.sha256()
    for index in range(len(data)):
        row = data[index]
        for name in ("input_ids", "labels", *(name for name in PROMPT_COLUMNS if name in row)):
            array = np.asarray(row[name], dtype="<i8")
            if name in PROMPT_COLUMNS:
                digest.update(_MARK)
            digest.update(len(array).to_bytes(8, "little") + array.tobytes())
    return digest.hexdigest()


def fingerprint_teacher(teacher: PreTrainedModel) -> dict[str, str | None]:
    """``teacher_config`` and ``teacher_weights``: SHA-256 of what differs from the architecture's default config, and
    of all parameters and buffers that are saved, in the dtype in which they are loaded: some seconds per 10 GB."""
    config = {key: value for key, value in teacher.config.to_diff_dict().items() if key not in _CONFIG_NOISE}
    digest = hashlib.sha256()
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if (tensor.data_ptr(), tensor.shape) in seen:  # a tied weight
            continue
        seen.add((tensor.data_ptr(), tensor.shape))
        for part in tensor.detach().reshape(-1).split(1 << 26):
            digest.update(memoryview(part.cpu().contiguous().view(torch.uint8).numpy()))
    return {"teacher_config": fingerprint(config), "teacher_weights": digest.hexdigest()}
