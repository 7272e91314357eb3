"""The teacher's side of a served teacher: rows of several requests in one batch, one thread that runs the model."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fused_kd.integrations.transformers import hidden_states
from fused_kd.serving.wire import Request
from fused_kd.training.hidden_codes import encode_states


class QueueFull(Exception):
    """There are as many requests as may wait."""


class ClientGone(ConnectionError):
    """The client has left before its request was begun."""


class Unsendable(ValueError):
    """Hidden states that are not finite, or larger than their dtype on the way can hold."""


@dataclass(eq=False)
class Job:
    """A request on its way through the model; ``gone()`` says whether its client has left."""

    request: Request
    dtype: str
    gone: Callable[[], bool] = lambda: False
    parts: list[dict[str, Tensor]] = field(default_factory=list)  # of each row, on the CPU
    unfinished: int = 0
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.unfinished = len(self.request.lengths)
        self.parts = [{} for _ in range(self.unfinished)]

    def result(self) -> dict[str, Tensor]:
        """Wait for the states of all wanted tokens; raises what the model raised."""
        self.done.wait()
        if self.error is not None:
            raise self.error
        if len(self.parts) == 1:
            return self.parts[0]
        return {name: torch.cat([part[name] for part in self.parts]) for name in self.parts[0]}

    def fail(self, error: Exception) -> None:
        self.error = error
        self.done.set()


# a row: its job, its number there, its ids and what of them is wanted
_Row = tuple[Job, int, Tensor, Tensor]


class Batcher:
    """Runs the model over the requests that wait, in its own thread.

    Rows are padded on the right. Those of several requests run together, those of similar length in one batch, of at
    most ``batch_tokens`` tokens with padding, or of one longer row.

    Args:
        model: a causal LM on its device, in eval mode.
        batch_tokens: tokens of a batch.
        waiting: requests that may wait.

    Attributes:
        requests, tokens, states, batches: what has been done. seconds: of the model. failed: requests whose model call
            raised. gone: requests that were not begun, as their clients had left.
    """

    def __init__(self, model: Any, batch_tokens: int, waiting: int) -> None:
        self.model, self.batch_tokens, self.waiting = model, batch_tokens, waiting
        self.requests = self.tokens = self.states = self.batches = self.failed = self.gone = 0
        self.seconds = 0.0
        self._jobs: deque[Job] = deque()
        self._news = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="teacher", daemon=True)
        self._thread.start()

    def add(self, request: Request, dtype: str, gone: Callable[[], bool] = lambda: False) -> Job:
        """Let a request wait for the model; raises :class:`QueueFull` where as many as may do."""
        job = Job(request, dtype, gone)
        with self._news:
            if len(self._jobs) >= self.waiting or self._closing:
                raise QueueFull
            self._jobs.append(job)
            self._news.notify()
        return job

    def close(self) -> None:
        """Finish what waits, and end the thread."""
        with self._news:
            self._closing = True
            self._news.notify()
        self._thread.join()

    def _run(self) -> None:
        while jobs := self._take():
            for batch in batches_of(jobs, self.batch_tokens):
                self._forward([row for row in batch if row[0].error is None])
            for job in jobs:
                self.requests += 1
                self.failed += job.error is not None

    def _take(self) -> list[Job]:
        """Requests for about one batch, at least one; none where there will be no more."""
        taken: list[Job] = []
        tokens = 0
        with self._news:
            while not taken:
                self._news.wait_for(lambda: self._jobs or self._closing)
                if not self._jobs:
                    break
                while self._jobs and (not taken or tokens + self._jobs[0].request.tokens <= self.batch_tokens):
                    job = self._jobs.popleft()
                    if job.gone():
                        self.gone += 1
                        job.fail(ClientGone("the client has left"))
                        continue
                    taken.append(job)
                    tokens += job.request.tokens
        return taken

    def _forward(self, batch: list[_Row]) -> None:
        if not batch:
            return
        start = time.perf_counter()
        try:
            made = self._encoded(batch)
        except Exception as error:  # such as too little memory: the next batch may fit
            for job, *_ in batch:
                job.fail(error)
            return
        finally:
            self.seconds += time.perf_counter() - start
        self.batches += 1
        for (job, number, ids, wanted), part in zip(batch, made, strict=True):
            if isinstance(part, Unsendable):
                job.fail(part)
                continue
            job.parts[number] = part
            job.unfinished -= 1
            self.tokens += len(ids)
            self.states += int(wanted.sum())
            if job.unfinished == 0:
                job.done.set()

    @torch.inference_mode()
    def _encoded(self, batch: list[_Row]) -> list[dict[str, Tensor] | Unsendable]:
        """The wanted states of each row as they are sent, on the CPU."""
        ids = pad_sequence([row[2].long() for row in batch], batch_first=True)
        mask = pad_sequence([torch.ones(len(row[2]), dtype=torch.int64) for row in batch], batch_first=True)
        wanted = pad_sequence([row[3] for row in batch], batch_first=True).flatten().nonzero()[:, 0]
        device = self.model.get_input_embeddings().weight.device
        hidden = hidden_states(self.model, input_ids=ids.to(device), attention_mask=mask.to(device))
        hidden = hidden.flatten(0, 1)[wanted.to(hidden.device)]
        counts = [int(row[3].sum()) for row in batch]
        encoded = {dtype: _encoded_apart(hidden, counts, dtype) for dtype in {row[0].dtype for row in batch}}
        return [encoded[row[0].dtype][number] for number, row in enumerate(batch)]


def _encoded_apart(hidden: Tensor, counts: list[int], dtype: str) -> list[dict[str, Tensor] | Unsendable]:
    """The states of several rows as they are sent; together, and where one cannot be, each by itself."""
    try:
        parts = {name: value.cpu().split(counts) for name, value in encode_states(hidden, dtype).items()}
        return [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]
    except ValueError as error:
        if len(counts) == 1:
            return [Unsendable(error)]
        return [made for part in hidden.split(counts) for made in _encoded_apart(part, [len(part)], dtype)]


def batches_of(jobs: list[Job], batch_tokens: int) -> list[list[_Row]]:
    """The rows of jobs in batches, the longest rows first."""
    rows = [(job, number, *row) for job in jobs for number, row in enumerate(job.request.apart())]
    rows.sort(key=lambda row: -len(row[2]))
    found: list[list[_Row]] = []
    for row in rows:
        if not found or (len(found[-1]) + 1) * len(found[-1][0][2]) > batch_tokens:
            found.append([])
        found[-1].append(row)
    return found
