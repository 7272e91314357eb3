"""The client of a served teacher: what a trainer takes as ``teacher`` in place of a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from fused_kd import LMHead
from fused_kd.serving.ahead import Answers
from fused_kd.serving.connection import Answer, Connection
from fused_kd.serving.rows import key_of, requested_rows
from fused_kd.serving.wire import IDENTITY, Request, check_about, read_states, read_tensors, write_request
from fused_kd.training.fingerprints import check_tokenizer
from fused_kd.training.hidden_codes import HIDDEN_DTYPES
from fused_kd.training.stage import check_counts
from fused_kd.training.stored_head import HeadOnDevices, bare_head, moved

T = TypeVar("T")


class RemoteTeacher:
    """What all clients share: batches to rows, requests ahead of their step, states to their places.

    A subclass gives :meth:`states_of` and :meth:`read_head`.

    Args:
        ahead: answers of batches that are kept at once; requests made ahead are bounded by it.
    """

    columns: tuple[str, ...] = ()
    vocab_size: int
    hidden_size: int
    dtype: torch.dtype  # of hidden states and head

    def __init__(self, ahead: int) -> None:
        check_counts(ahead=ahead)
        self.ahead = ahead
        self._begin()

    def _begin(self) -> None:
        """Have no answers and no heads: those of another process, and its locks, are that one's."""
        self._process = os.getpid()
        self._answers: Answers[tuple[Tensor, Tensor]] = Answers(self.ahead)
        self._heads = HeadOnDevices(lambda device: moved(self.read_head(), device))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_answers": None, "_heads": None, "_process": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def states_of(self, request: Request) -> Tensor:
        """(wanted, H) hidden states in ``dtype``, on the CPU."""
        raise NotImplementedError

    def read_head(self) -> LMHead:
        """The head on no hidden states, in ``dtype``, on the CPU."""
        raise NotImplementedError

    def head(self, batch: Mapping[str, Any], targets: Tensor, device: torch.device) -> LMHead:
        """The teacher of a batch.

        Args:
            batch: ``input_ids`` (rows, length) with ``attention_mask`` or ``position_ids``, see
                :func:`fused_kd.serving.rows.requested_rows`; best on the CPU: on an accelerator they are waited for.
            targets: (rows, length) bool: the positions whose next token carries loss; likewise.
            device: where the result shall be.

        Returns:
            Hidden states (rows, length, H), zero where ``targets`` is False, and the head.

        Raises:
            ValueError: a batch that cannot be sent or that the server refuses, an answer that cannot be.
            ConnectionError: no answer in time. PermissionError: another token is wanted.
        """
        self._own()
        shape = batch["input_ids"].shape
        hidden = torch.zeros(shape.numel(), self.hidden_size, dtype=self.dtype, device=device)
        if bool(targets.any()):
            places, states = self._answers.take(key_of(batch, targets), lambda: self._ask_for(batch, targets))
            hidden.index_copy_(0, _on(places, hidden.device), _on(states, hidden.device))
        return self._heads.on(hidden.view(*shape, self.hidden_size))

    def prefetch(self, batch: Mapping[str, Any], targets: Tensor) -> None:
        """Start the request of a batch in the background; nothing in a worker of a DataLoader.

        An error of it is raised by :meth:`head`.
        """
        if torch.utils.data.get_worker_info() is not None:
            return
        self._own()
        if bool(targets.any()):
            self._answers.start(key_of(batch, targets), lambda: self._ask_for(batch, targets))

    def _own(self) -> None:
        """Begin anew where the process is a fork of the one that began."""
        if self._process != os.getpid():
            self._begin()

    def _ask_for(self, batch: Mapping[str, Any], targets: Tensor) -> tuple[Tensor, Tensor]:
        """The places of a batch that carry loss, and their states."""
        request, places = requested_rows(batch, targets)
        return places, self.states_of(request)


def _on(value: Tensor, device: torch.device) -> Tensor:
    """Bring a host tensor to a device; to a GPU from pinned memory, so that the host does not wait for its work."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


class ServedTeacher(RemoteTeacher):
    """A teacher that another process or machine runs (``python -m fused_kd.serve MODEL``).

    Give it to a trainer as ``teacher``. Per target token 2 H bytes come over the network (H the teacher's hidden size;
    4 H of a float32 teacher, H + 4 with "fp8"), the head once. A server that goes away is waited for; when it is back
    the run goes on where it was.

    Args:
        url: as the server printed it, ``http://HOST:PORT``.
        patience: seconds for which a request is tried again where the server is away, overloaded or broken; also for
            the first one, so that the server may be started later.
        timeout: seconds without a byte after which a try has failed and is repeated.
        dtype: of the hidden states on the way: "bf16", "fp16", "fp32", or "fp8" (e4m3 with a scale a token: half of
            bf16's bytes, an error of some 2 % of a state's norm). None (default): that of the teacher's head, exactly
            what it computed.
        token: what the server was started with.
        ahead: answers of batches that are kept at once; requests made ahead are bounded by it.

    Attributes:
        about: what the server says of itself. fingerprints: SHA-256 of ``tokenizer``, ``teacher_config`` and
            ``teacher_weights``. vocab_size: rows of the head. hidden_size: H.

    Raises:
        ValueError: an argument out of range, a server of another kind. ConnectionError: none there. PermissionError:
            it wants another token.
    """

    def __init__(
        self,
        url: str,
        *,
        patience: float = 600.0,
        timeout: float = 300.0,
        dtype: str | None = None,
        token: str | None = None,
        ahead: int = 8,
    ) -> None:
        super().__init__(ahead)
        if dtype is not None and dtype not in HIDDEN_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(repr, HIDDEN_DTYPES))} or None, got {dtype!r}")
        self._connection = Connection(url, patience=patience, timeout=timeout, token=token)
        self.about = self._ask_about()
        self.sent = dtype or str(self.about["dtype"])
        self.dtype = torch.bfloat16 if self.sent == "fp8" else HIDDEN_DTYPES[self.sent]
        self.vocab_size, self.hidden_size = int(self.about["vocab_size"]), int(self.about["hidden_size"])
        self.fingerprints: dict[str, str | None] = dict(self.about["fingerprints"])

    @property
    def url(self) -> str:
        """The server's address."""
        return self._connection.url

    def __repr__(self) -> str:
        return (
            f"ServedTeacher({self.url!r}, {self.about['model']!r}, hidden_size={self.hidden_size}, "
            f"vocab_size={self.vocab_size}, {self.sent})"
        )

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise unless the teacher reads the ids of this tokenizer; tokens that were added to it since do not count.

        Raises:
            ValueError: another one.
        """
        below = self.about.get("tokens", self.vocab_size)
        fault = f"the teacher at {self.url} ({self.about['model']}) has another tokenizer"
        check_tokenizer(self.fingerprints, tokenizer, below, fault)

    def states_of(self, request: Request) -> Tensor:
        """(wanted, H) hidden states, on the CPU; in several requests where the server wants no more at once."""
        parts = [self._states(part) for part in request.split(self.about["most_tokens"])]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _states(self, request: Request) -> Tensor:
        answer = self._connection.request("POST", f"/states?dtype={self.sent}", write_request(request))
        self._check_same(answer)
        return self._read(answer, lambda body: read_states(body, request.count, self.hidden_size, self.sent))

    def read_head(self) -> LMHead:
        """The head as the server has it, in the dtype of the states."""
        answer = self._connection.request("GET", "/head")
        self._check_same(answer)
        found = self._read(answer, read_tensors)
        shapes = {name: tuple(value.shape) for name, value in found.items()}
        wanted = {"weight": (self.vocab_size, self.hidden_size), "bias": (self.vocab_size,)}
        if "weight" not in found or any(wanted.get(name) != shape for name, shape in shapes.items()):
            raise ValueError(f"{self.url} gave a head of the shapes {str(shapes)[:200]}, expected {wanted}")
        scale, softcap = float(self.about["logit_scale"]), self.about.get("softcap")
        head = bare_head(found["weight"], found.get("bias"), logit_scale=scale, softcap=softcap)
        return moved(head, self.dtype)

    def _read(self, answer: Answer, read: Callable[[bytes], T]) -> T:
        try:
            return read(answer.body)
        except ValueError as error:
            raise ValueError(f"the teacher at {self.url} gave an answer that cannot be: {error}") from error

    def _ask_about(self) -> dict[str, Any]:
        answer = self._connection.request("GET", "/about")
        try:
            return check_about(json.loads(answer.body))
        except ValueError as error:
            raise ValueError(f"{self.url} is no teacher's server: {error}") from error

    def _check_same(self, answer: Answer) -> None:
        """Raise unless the server, which may have been started anew, has the teacher that it had."""
        if answer.headers.get(IDENTITY) == self.about["identity"]:
            return
        now = self._ask_about()
        known = {**self.about, **self.about["fingerprints"]}
        given = {**now, **now["fingerprints"]}
        passing = ("identity", "fingerprints", "most_tokens", "longest", "protocol")
        names = [name for name in known if name not in passing and known[name] != given.get(name)]
        faults = [f"{name} ({str(known[name])[:40]} before, {str(given.get(name))[:40]} now)" for name in names]
        raise ValueError(
            f"{self.url} serves another teacher than before: {', '.join(faults) or 'its identity differs'}"
        )
