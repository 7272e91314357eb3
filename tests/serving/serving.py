"""A small teacher, batches, and servers of it in a thread and in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fused_kd.integrations.transformers import hidden_states
from fused_kd.serving.server import TeacherServer
from fused_kd.training.collate import Collator
from tests.training.tiny import VOCAB, rows, tiny

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SLOW = """
import sys, time
from fused_kd.serving import batching
real = batching.hidden_states
def states(*args, **inputs):
    time.sleep({})
    return real(*args, **inputs)
batching.hidden_states = states
from fused_kd.serve import main
sys.exit(main(sys.argv[1:]))
"""


def tokenizer(prefix: str = "t") -> PreTrainedTokenizerFast:
    vocab = {f"{prefix}{i}": i for i in range(VOCAB)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token=f"{prefix}0")),
        pad_token=f"{prefix}0",
        bos_token=f"{prefix}1",
        eos_token=f"{prefix}2",
    )


def teacher(seed: int = 1, hidden: int = 16, **options: object) -> PreTrainedModel:
    return tiny(hidden, seed, layers=2, **options).eval()


def serve(model: PreTrainedModel | None = None, **options: object) -> TeacherServer:
    return TeacherServer(teacher() if model is None else model, tokenizer(), **options)


def targets_of(batch: dict[str, Tensor]) -> Tensor:
    return torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))


def batch_of(count: int = 6, seed: int = 0, side: str = "right") -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of a model, and the positions that are targets."""
    batch = Collator(0, side=side)(rows(count, seed))
    targets = targets_of(batch)
    return {name: value for name, value in batch.items() if name != "labels"}, targets


@torch.no_grad()
def local(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    return hidden_states(model, **batch)


def apart(found: Tensor, expected: Tensor) -> float:
    """The relative norm of the difference."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def saved(folder: Path, model: PreTrainedModel | None = None) -> Path:
    (teacher() if model is None else model).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


class Process:
    """``python -m fused_kd.serve`` on this machine; ``slow``: seconds that a call of its model takes longer."""

    def __init__(self, folder: Path, *options: str, slow: float = 0.0) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        run = ["-c", SLOW.format(slow)] if slow else ["-m", "fused_kd.serve"]
        self.popen = subprocess.Popen(
            [sys.executable, *run, str(folder), *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        )  # fmt: skip
        assert self.popen.stdout is not None
        self.line = self.popen.stdout.readline()
        self.url = self.line.split(" ")[0]

    @property
    def port(self) -> str:
        return self.url.rsplit(":", 1)[1]

    def end(self) -> tuple[int, str, str]:
        """SIGTERM; the exit code and what was printed since."""
        if self.popen.poll() is None:
            self.popen.terminate()
        out, err = self.popen.communicate(timeout=60)
        return self.popen.returncode, out, err

    def kill(self) -> None:
        self.popen.kill()
        self.popen.communicate()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.popen.poll() is None:
            self.kill()
