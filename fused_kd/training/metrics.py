"""Running sums of a training, kept on the device between two log entries and inside checkpoints."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from fused_kd.integrations.distributed import sum_over_ranks

_SUMS = ("loss", "difficulty", "hard", "tokens")


def peak_memory_mb(device: torch.device) -> float:
    """Peak MiB so far: of the CUDA allocator on a GPU, else the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:  # ru_maxrss would be that of the process which started this one, where that was larger
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # not on Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class RunningMetrics(TrainerCallback, ExportableState):
    """Sums of loss, difficulty, hard tokens, valid tokens and statistics since the last log entry, and training time.

    ``statistics`` are told as means over tokens, ``per_step`` as means over optimizer steps, as the loss is.

    A checkpoint holds them (reading them there is the only host synchronisation besides logging), so a
    resumed training logs what an uninterrupted one would have logged, apart from times. With several processes
    each has its own sums; they meet in the log and in the checkpoint, which the first process writes.
    """

    def __init__(self, statistics: Sequence[str] = (), per_step: Sequence[str] = ()) -> None:
        self.statistics, self.per_step = tuple(statistics), tuple(per_step)
        self.sums = self._nothing()
        self.window_seconds = 0.0
        self.total_seconds = 0.0
        self._resumed_at: float | None = None

    def add(
        self,
        loss: torch.Tensor,
        difficulty: torch.Tensor,
        hard: torch.Tensor,
        tokens: torch.Tensor,
        *statistics: torch.Tensor,
    ) -> None:
        """Add this process's micro-batch: its share of the loss, sums over its valid tokens, its shares of what is told
        per step. Does not synchronise."""
        self.sums = self.sums.to(loss.device)
        values = (loss, difficulty, hard, tokens, *statistics)
        self.sums += torch.stack([value.detach().to(self.sums, non_blocking=True) for value in values])

    @property
    def _names(self) -> tuple[str, ...]:
        return (*_SUMS, *self.statistics, *self.per_step)

    def _nothing(self) -> torch.Tensor:
        return torch.zeros(len(self._names), dtype=torch.float32)

    def collect(self, accelerator: Accelerator) -> None:
        """Move the sums of all processes to the first one; to be called on each of them."""
        total = sum_over_ranks(accelerator, self.sums)
        self.sums = total if accelerator.is_main_process else torch.zeros_like(total)

    def take(self, steps: int, accelerator: Accelerator) -> dict[str, float]:
        """The log entry of all processes for the ``steps`` optimizer steps since the last one; resets the sums.

        To be called on each process; memory is that of this one.
        """
        sums = dict(zip(self._names, sum_over_ranks(accelerator, self.sums).tolist(), strict=True))
        self._tick()
        tokens = max(sums["tokens"], 1.0)
        entry = {
            "loss": sums["loss"] / max(steps, 1),
            "difficulty": sums["difficulty"] / tokens,
            "hard_fraction": sums["hard"] / tokens,
            "tokens_per_second": sums["tokens"] / max(self.window_seconds, 1e-9),
            "peak_memory_mb": peak_memory_mb(self.sums.device),
            **{name: sums[name] / tokens for name in self.statistics},
            **{name: sums[name] / max(steps, 1) for name in self.per_step},
        }
        self.sums = torch.zeros_like(self.sums)
        self.window_seconds = 0.0
        return entry

    def pause(self) -> None:
        """Stop the clock, as for an evaluation."""
        self._tick()
        self._resumed_at = None

    def resume(self) -> None:
        """Start the clock again."""
        self._resumed_at = time.perf_counter()

    def _tick(self) -> None:
        if self._resumed_at is None:
            return
        now = time.perf_counter()
        self.window_seconds += now - self._resumed_at
        self.total_seconds += now - self._resumed_at
        self._resumed_at = now

    def state(self) -> dict[str, Any]:
        self._tick()
        return {
            "args": {"statistics": list(self.statistics), "per_step": list(self.per_step)},
            "attributes": {
                "sums": self.sums.tolist(),
                "window_seconds": self.window_seconds,
                "total_seconds": self.total_seconds,
            },
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        restored: Any = state.stateful_callbacks if state.global_step and args.process_index == 0 else {}
        state_of = restored.get(type(self).__name__, {})
        saved = state_of.get("attributes", {})
        told = state_of.get("args", {})
        names = (*_SUMS, *told.get("statistics", ()), *told.get("per_step", ()))
        known = dict(zip(names, saved.get("sums", ()), strict=False))
        # those that the checkpoint does not have start here
        sums = [known.get(name, 0.0) for name in self._names]
        self.sums = torch.tensor(sums, dtype=torch.float32, device=args.device)
        self.window_seconds = saved.get("window_seconds", 0.0)
        self.total_seconds = saved.get("total_seconds", 0.0)
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
        self.resume()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pause()
