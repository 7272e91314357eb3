"""A small teacher, batches, and servers of it in a thread and in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from fused_kd import serve as serve_module
from fused_kd.integrations.transformers import hidden_states
from fused_kd.serving import batching
from fused_kd.serving.server import TeacherServer
from fused_kd.training.collate import Collator
from tests.training.tiny import VOCAB, rows, tiny

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


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
    """``fused_kd.serve`` in a process of its own, forked from one that has imported what is slow to import.

    Args:
        folder, options: its arguments.
        slow: seconds that a call of its model takes longer.

    Attributes:
        line: the first one printed. url: from it.
    """

    def __init__(self, folder: Path, *options: str, slow: float = 0.0) -> None:
        self._printed = Path(tempfile.mkdtemp(prefix="fused_kd-serve-"))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        arguments = ([str(folder), *options], slow, str(self._printed))
        self.process = context.Process(target=_serve_alone, args=arguments, daemon=True)
        self.process.start()
        self.line = self._first_line()
        self.url = self.line.split(" ")[0]

    def _first_line(self) -> str:
        while self.process.exitcode is None:
            if (found := self._read("out")).endswith("\n"):
                return found
            time.sleep(0.01)
        raise AssertionError(self._read("err"))

    def _read(self, name: str) -> str:
        path = self._printed / name
        return path.read_text() if path.exists() else ""

    @property
    def port(self) -> str:
        return self.url.rsplit(":", 1)[1]

    def end(self) -> tuple[int | None, str, str]:
        """SIGTERM; the exit code and what was printed since."""
        self.process.terminate()
        self.process.join(60)
        return self.process.exitcode, self._read("out").removeprefix(self.line), self._read("err")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        shutil.rmtree(self._printed, ignore_errors=True)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _serve_alone(arguments: list[str], slow: float, printed: str) -> None:
    for name, handle in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{printed}/{name}", os.O_WRONLY | os.O_CREAT, 0o600), handle)
    torch.set_num_threads(1)
    disable_progress_bar()
    real = batching.hidden_states

    def states(*given: object, **inputs: object) -> Tensor:
        time.sleep(slow)
        return real(*given, **inputs)

    batching.hidden_states = states
    sys.exit(serve_module.main(arguments))
