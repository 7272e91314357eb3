"""Deployments of SGLang and vLLM that return hidden states, as teachers.

Written from, and tried against, the engines' documented formats alone: SGLang's ``/generate`` with
``return_hidden_states`` and vLLM's ``/pooling`` with the task ``token_embed``. The head is read from the model's files.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_kd import LMHead, log_probs_at
from fused_kd.serving.client import RemoteTeacher
from fused_kd.serving.connection import Connection
from fused_kd.serving.head_files import head_of_files
from fused_kd.serving.wire import Request
from fused_kd.training.hidden_codes import HIDDEN_DTYPES, LONG_NAMES, check_states, name_of
from fused_kd.training.models import load_tokenizer, same_tokenizer
from fused_kd.training.stage import check_counts
from fused_kd.training.stored_head import moved

_LOG_PROB_ERROR = 0.25  # nats between the engine's own log-probabilities and those of its states in half precision


class EngineTeacher(RemoteTeacher):
    """What both engines' clients share.

    Args:
        url: of the deployment, ``http://HOST:PORT``.
        head: folder or hub name with the model's files, of which the head alone is read (and its tokenizer, where
            a trainer knows the student's).
        patience, timeout, token, ahead: as of :class:`fused_kd.serving.ServedTeacher`; ``token`` is the engine's API
            key.
        dtype: of hidden states and head: "bf16", "fp16" or "fp32"; None (default): that of the head's file.
        most_tokens: tokens of one request.

    Attributes:
        model: what the deployment calls its model. vocab_size: rows of the head. hidden_size: its columns.

    Raises:
        ValueError: an argument out of range, a model without readable files. ConnectionError: nobody there.
            PermissionError: another token is wanted.
    """

    def __init__(
        self,
        url: str,
        head: str,
        *,
        patience: float = 600.0,
        timeout: float = 300.0,
        token: str | None = None,
        dtype: str | None = None,
        most_tokens: int = 8192,
        ahead: int = 8,
    ) -> None:
        super().__init__(ahead)
        check_counts(most_tokens=most_tokens)
        if dtype is not None and dtype not in LONG_NAMES:
            raise ValueError(f"dtype must be one of {', '.join(map(repr, LONG_NAMES))} or None, got {dtype!r}")
        self.files, self.most_tokens = str(head), most_tokens
        self._connection = Connection(url, patience=patience, timeout=timeout, token=token)
        found = head_of_files(self.files)
        self.sent = dtype or name_of(found.weight.dtype)
        self.dtype = HIDDEN_DTYPES[self.sent]
        self._head: LMHead | None = moved(found, self.dtype)
        self.vocab_size, self.hidden_size = found.weight.shape
        self.model = self._ask_model()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_head": None}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._connection.url!r}, {self.model!r}, head={self.files!r}, {self.sent})"

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise unless the tokenizer beside the head's files is this one.

        Raises:
            ValueError: another one, or none there.
        """
        same_tokenizer(load_tokenizer(self.files), tokenizer, self.files)

    def read_head(self) -> LMHead:
        """The head of the files."""
        found, self._head = self._head, None
        return moved(head_of_files(self.files), self.dtype) if found is None else found

    def states_of(self, request: Request) -> Tensor:
        """(wanted, H) hidden states, on the CPU."""
        before = self._connection.outages
        parts = [self._checked(part, self._ask(part)) for part in request.split(self.most_tokens)]
        if self._connection.outages != before and (now := self._ask_model()) != self.model:
            raise ValueError(f"{self._connection.url} serves another model than before: {self.model!r}, now {now!r}")
        return torch.cat(parts)

    def _ask(self, rows: Request) -> Tensor:
        """(tokens, H) hidden states of all tokens."""
        raise NotImplementedError

    def _checked(self, rows: Request, states: Tensor) -> Tensor:
        wanted = states[rows.wanted]
        check_states(wanted)
        return wanted.to(self.dtype)

    def _ask_model(self) -> str:
        found = self._json("GET", "/v1/models")
        try:
            return str(found["data"][0]["id"])
        except (LookupError, TypeError) as error:
            raise ValueError(f"{self._connection.url}/v1/models names no model: {str(found)[:200]}") from error

    def _post(self, path: str, request: dict[str, Any]) -> bytes:
        body = json.dumps(request).encode()
        return self._connection.request("POST", path, body, kind="application/json").body

    def _json(self, method: str, path: str, request: dict[str, Any] | None = None) -> Any:
        body = self._connection.request(method, path).body if request is None else self._post(path, request)
        try:
            return json.loads(body)
        except ValueError as error:
            raise ValueError(f"{self._connection.url}{path} gave no JSON: {body[:200]!r}") from error


class SGLangTeacher(EngineTeacher):
    """A teacher that SGLang serves.

    Start it with ``--enable-return-hidden-states --disable-radix-cache --chunked-prefill-size -1``: of prompts that are
    cached or read in pieces it does not return all states. They come as JSON numbers, some 20 bytes each.

    Once, states and head are compared with the log-probabilities that SGLang itself gives for a short prompt.

    Arguments, attributes and errors are those of :class:`EngineTeacher`; also ``ValueError`` where states are missing,
    or do not belong to the head.
    """

    def __init__(self, url: str, head: str, **options: Any) -> None:
        super().__init__(url, head, **options)
        self._check_head(self._head or self.read_head())

    def _ask(self, rows: Request) -> Tensor:
        ids = [part.tolist() for part, _ in rows.apart()]
        answers = self._generate({"input_ids": ids})
        if len(answers) != len(ids):
            raise ValueError(f"{self._connection.url} gave {len(answers)} answers for {len(ids)} rows")
        return torch.cat([self._states(answer, len(row)) for answer, row in zip(answers, ids, strict=True)])

    def _generate(self, request: dict[str, Any]) -> list[Any]:
        sampling = {"max_new_tokens": 1, "temperature": 1.0}
        found = self._json("POST", "/generate", {**request, "sampling_params": sampling, "return_hidden_states": True})
        return found if isinstance(found, list) else [found]

    def _states(self, answer: Any, length: int) -> Tensor:
        """(length, H) float32 hidden states of a row."""
        try:
            about = answer["meta_info"]
            cached = int(about.get("cached_tokens", 0) or 0)
            states = torch.tensor(about["hidden_states"][0], dtype=torch.float32)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{self._connection.url}/generate gave no hidden states ({type(error).__name__}: {error}): start "
                "SGLang with --enable-return-hidden-states"
            ) from error
        if cached or states.shape != (length, self.hidden_size):
            raise ValueError(
                f"{self._connection.url}/generate gave states {tuple(states.shape)} with {cached} cached tokens, "
                f"expected {(length, self.hidden_size)} and none: start SGLang with --disable-radix-cache "
                "--chunked-prefill-size -1"
            )
        return states

    def _check_head(self, head: LMHead) -> None:
        ids = [index % self.vocab_size for index in range(1, 9)]
        (answer,) = self._generate({"input_ids": [ids], "return_logprob": True, "top_logprobs_num": 5})
        state = self._states(answer, len(ids))[-1:]
        listed = answer["meta_info"].get("output_top_logprobs") or [[]]
        if not listed[0]:
            return
        theirs = torch.tensor([entry[0] for entry in listed[0]], dtype=torch.float32)
        indices = torch.tensor([[int(entry[1]) for entry in listed[0]]])
        ours = log_probs_at(replace(moved(head, torch.float32), hidden=state), indices).log_probs[0]
        error = float((ours - theirs).abs().max())
        if not error <= _LOG_PROB_ERROR:
            raise ValueError(
                f"the hidden states of {self._connection.url} and head={self.files!r} must give the log-probabilities "
                f"that SGLang gives, but differ by {error:.3g}: is it this model, and are the states those after the "
                "final norm?"
            )


class VLLMTeacher(EngineTeacher):
    """A teacher that vLLM serves.

    Start it with ``vllm serve MODEL --runner pooling --convert embed --pooler-config.task token_embed``.
    Such a server gives no log-probabilities: that its states belong to ``head`` cannot be compared; give the same name
    or folder to both. States come as bytes, 2 H a token of the prompt in half precision.

    Arguments, attributes and errors are those of :class:`EngineTeacher`; also ``ValueError`` where states are missing
    or of length 1, which this client asks vLLM not to make them.
    """

    def _ask(self, rows: Request) -> Tensor:
        request = {
            "model": self.model,
            "input": [ids.tolist() for ids, _ in rows.apart()],
            "task": "token_embed",
            "use_activation": False,  # which would scale each state to length 1
            "encoding_format": "bytes_only",
            "embed_dtype": LONG_NAMES[self.sent],
            "endianness": "little",
        }
        body = self._post("/pooling", request)
        expected = rows.tokens * self.hidden_size * self.dtype.itemsize
        if len(body) != expected:
            raise ValueError(
                f"{self._connection.url}/pooling gave {len(body)} bytes, expected {expected}: {rows.tokens} states of "
                f"{self.hidden_size} numbers in {LONG_NAMES[self.sent]}; start vLLM with --runner pooling "
                "--convert embed --pooler-config.task token_embed"
            )
        states = torch.frombuffer(bytearray(body), dtype=self.dtype).view(rows.tokens, self.hidden_size)
        if self.hidden_size > 1 and bool(((states.float().norm(dim=-1) - 1).abs() < 1e-2).all()):
            raise ValueError(f"{self._connection.url}/pooling gave states of length 1: it does not heed use_activation")
        return states
