"""A small teacher, rows and a cache of them."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import transformers

from fused_kd.integrations.transformers import hidden_states
from fused_kd.training import cache
from fused_kd.training.teacher_cache import TeacherCache

VOCAB, PADDED = 53, 59


class Words:
    """As much of a tokenizer as a cache needs."""

    pad_token_id = 0

    def __init__(self, size: int = VOCAB, prefix: str = "t") -> None:
        self.vocab = {f"{prefix}{i}": i for i in range(size)}

    def __len__(self) -> int:
        return len(self.vocab)

    def get_vocab(self) -> dict[str, int]:
        return self.vocab


def model(seed: int, hidden: int = 16, **options) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    config = {"vocab_size": PADDED, "hidden_size": hidden, "intermediate_size": 24, "num_hidden_layers": 1}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, "num_attention_heads": 2, **options}))
    with torch.no_grad():
        made.lm_head.weight.mul_(20)  # peaked, so that entries differ
    return made


def rows(count: int = 10, seed: int = 0) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        ids = [rng.randrange(VOCAB) for _ in range(rng.randint(3, 12))]
        prompt = rng.randint(1, 3)
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    made[2] = {"input_ids": [4, 5, 6], "labels": [4, 5, -100]}  # the first label has no prediction
    made[3] = {"input_ids": [7, 8], "labels": [-100, -100]}
    return made


def write(folder: Path, data: list | None = None, **options) -> TeacherCache:
    options = {"k": 5, "template": "tiny", "shard_rows": 4, "batch_size": 3, "progress": False, **options}
    return cache.write_cache(folder, model(0), Words(), rows() if data is None else data, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_hidden(folder: Path, data: list | None = None, teacher: object = None, **options) -> TeacherCache:
    """Of hidden states."""
    options = {"keep": "hidden", "template": "tiny", "shard_rows": 4, "batch_size": 3, "progress": False, **options}
    given = model(0) if teacher is None else teacher
    return cache.write_cache(folder, given, Words(), rows() if data is None else data, **options)


@torch.no_grad()
def states(row: dict, teacher: transformers.PreTrainedModel) -> torch.Tensor:
    """The teacher's hidden states of a row, one a position whose next label is valid."""
    hidden = hidden_states(teacher.eval(), input_ids=torch.tensor([row["input_ids"]]))[0, :-1]
    return hidden[torch.tensor([label != -100 for label in row["labels"][1:]], dtype=torch.bool)]
