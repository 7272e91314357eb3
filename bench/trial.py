"""Training steps of one pair, in one way, in a process of their own."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_kd as fk

from .architectures import Architecture
from .eager import self_evolution
from .inputs import BETA, IGNORE, LAM
from .measure import peak_memory, seconds_of
from .process import why
from .worker import guarded

WAYS = ("fused_kd", "torch.compile", "eager")
# Random weights: every token is hard, the branch that costs a row the most.
GAMMA = 0.4
WARMUP = {"cpu": 1, "cuda": 3}
# A process that has answered may tidy up for so long.
LEAVE_SECONDS = 5.0
# What processes start with: importing it anew would take longer than most of them run.
PRELOAD = (
    "bench.trial",
    "fused_kd.integrations.transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "torch._inductor.compile_fx",
)


def dtype_on(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


class Trial(NamedTuple):
    """Steps of one ``way`` with ``batch`` sequences: ``rounds`` timed ones, and with ``memory`` one for its peak."""

    architecture: Architecture
    way: str
    batch: int
    device: str
    rounds: int
    memory: bool
    threads: int


class Training:
    """A pair of models, an optimizer and a loss; calling it is one step."""

    def __init__(self, architecture: Architecture, way: str, device: torch.device) -> None:
        if way not in WAYS:
            raise ValueError(f"way must be one of {', '.join(WAYS)}, got {way!r}")
        self.student, self.teacher = architecture.build(device, dtype_on(device.type))
        parameters = list(self.student.parameters())
        if device.type == "cuda":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
        else:  # AdamW's pass over the embeddings would take a larger share than it does below a GPU's batches
            self.optimizer = torch.optim.SGD(parameters, lr=1e-3)
        self.gradient_bytes = sum(p.numel() * p.element_size() for p in parameters)
        self.vocab = architecture.student.vocab
        self.criterion = fk.KDLoss(_objective(GAMMA), shift=True, vocab_size=self.vocab).to(device)
        self.gamma = torch.tensor(GAMMA, device=device)
        losses: dict[str, Callable[[Tensor], Tensor]] = {
            "fused_kd": self._fused,
            "torch.compile": partial(self._eager, _compiled),
            "eager": partial(self._eager, self_evolution),
        }
        self.loss = losses[way]

    def __call__(self, ids: Tensor) -> Tensor:
        """Both forwards, loss, backward and the optimizer's step; ids (batch, length); the loss, detached."""
        self.drop_gradients()
        loss = self.loss(ids)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def gate(self, gamma: float) -> None:
        """Tokens more difficult than ``gamma`` are hard from now on."""
        self.criterion.objective = _objective(gamma)
        self.gamma.fill_(gamma)

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad()

    def heads(self, ids: Tensor) -> tuple[fk.LMHead, fk.LMHead]:
        """Hidden states (batch, length, H) and head of student and teacher."""
        from fused_kd.integrations.transformers import hidden_states, lm_head_of

        with torch.no_grad():
            hidden_t = hidden_states(self.teacher, input_ids=ids)
        hidden_s = hidden_states(self.student, input_ids=ids)
        return lm_head_of(self.student, hidden_s), lm_head_of(self.teacher, hidden_t)

    def _fused(self, ids: Tensor) -> Tensor:
        return self.criterion(*self.heads(ids), ids)

    def _eager(self, loss: Callable[..., Tensor], ids: Tensor) -> Tensor:
        """The loss makes the logits itself, as ``model(...).logits`` would, and holds them no longer than it must."""
        student, teacher = self.heads(ids)
        labels = F.pad(ids[:, 1:], (0, 1), value=IGNORE).flatten()
        hidden_s, hidden_t = student.hidden.flatten(0, 1), teacher.hidden.flatten(0, 1)
        return loss(hidden_s, student.weight, hidden_t, teacher.weight[: self.vocab], labels, self.gamma, LAM, BETA)


def _objective(gamma: float) -> fk.SelfEvolution:
    return fk.SelfEvolution(lam=LAM, beta=BETA, gamma=gamma)


def _compiled(hidden_s: Tensor, weight_s: Tensor, hidden_t: Tensor, weight_t: Tensor, labels: Tensor, *rest) -> Tensor:
    """The same under torch.compile, for any number of tokens: code is kept from one batch, and process, to the next."""
    for x in (hidden_s, hidden_t, labels):
        torch._dynamo.maybe_mark_dynamic(x, 0)
    return torch.compile(self_evolution)(hidden_s, weight_s, hidden_t, weight_t, labels, *rest)


def measure(trial: Trial) -> dict[str, Any]:
    """With rounds their ``seconds``, and the ``loss`` of the very first step, in which no token is hard.

    With memory ``peak`` bytes of one step over models and optimizer state, gradients included (None: unknown here), and
    on a GPU the ``capacity`` it has over models and optimizer state. Without rounds one sequence warms up.
    """
    torch.set_num_threads(trial.threads)
    device = torch.device(trial.device)
    training = Training(trial.architecture, trial.way, device)
    ids = trial.architecture.tokens(trial.batch, device)
    found: dict[str, Any] = {"status": "ok"}
    if trial.rounds:
        training.gate(math.inf)  # a skewed loss is bounded and would hide a wrong label
        found["loss"] = float(training(ids))
        training.gate(GAMMA)
        for _ in range(WARMUP[trial.device] - 1):
            training(ids)
        found["seconds"] = [seconds_of(partial(training, ids)) for _ in range(trial.rounds)]
    else:
        training(ids[:1])
    if trial.memory:
        memory = peak_memory(partial(training, ids), training.drop_gradients, training.gradient_bytes, device)
        found["peak"] = None if memory is None else memory.over_inputs
        if memory is not None and device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            found["capacity"] = total - memory.baseline + memory.gradients
    return found


def run_trial(trial: Trial, limit: float) -> dict[str, Any]:
    """:func:`measure` in a process of its own; ``status`` and ``reason`` where it failed, crashed or took too long."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(list(PRELOAD))
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder, receiver:
        log = Path(folder, "log")
        log.touch()
        process = context.Process(target=_child, args=(trial, sender, str(log)))
        process.start()
        sender.close()
        try:
            if not receiver.poll(limit):
                return {"status": "skipped", "reason": f"stopped after {limit:.0f} s"}
            found = receiver.recv()
            process.join(LEAVE_SECONDS)
            return found
        except EOFError:
            process.join()
            return {"status": "failed", "reason": why(process.exitcode, log.read_text())}
        finally:
            with contextlib.suppress(ProcessLookupError):  # with the compilers that it may have started
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()


def _child(trial: Trial, sender: multiprocessing.connection.Connection, log: str) -> None:
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    file = os.open(log, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sender.send(guarded(partial(measure, trial), "status"))


def _end_with_parent() -> None:
    """A run that is killed leaves no trial behind, holding memory and cores."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)
