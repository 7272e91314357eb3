"""The server of a served teacher: a causal LM's last hidden states and its head over HTTP."""

from __future__ import annotations

import hmac
import json
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import torch
from safetensors.torch import save
from torch import Tensor

from fused_kd import LMHead
from fused_kd.integrations.transformers import check_head_module, check_lm_head, labels_need_shift, lm_head_of
from fused_kd.serving.batching import Batcher, QueueFull, Unsendable
from fused_kd.serving.wire import IDENTITY, PROTOCOL, read_rows
from fused_kd.training.fingerprints import fingerprint_teacher
from fused_kd.training.hidden_codes import HIDDEN_DTYPES, name_of
from fused_kd.training.stage import check_counts, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_GRACE_SECONDS = 30.0  # for answers that are being sent when the server ends
_RETRY_SECONDS = 1


class TeacherServer:
    """Serves a causal LM to :class:`fused_kd.serving.ServedTeacher`; ``python -m fused_kd.serve`` runs one.

    Args:
        model: on the device where it shall run; put into eval mode.
        tokenizer: whose tokens and ids clients are told; its text is not needed.
        name: for people.
        host: the address that is listened at, default "127.0.0.1": this machine alone.
        port: default 0, a free one.
        batch_tokens: tokens of a batch of the model, with padding; rows of several requests run together.
        queue: requests that may wait; further ones are told to come back (503).
        most_tokens: of one request; bounds the memory of a request and of its answer.
        token: what requests must bring as ``Authorization: Bearer``; None: nothing.

    Attributes:
        url: where it is. about: what ``GET /about`` says.

    Raises:
        ValueError: a model that is no decoder-only LM with a plain head, a number out of range, an empty token.
        OSError: the address cannot be had.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "",
        host: str = "127.0.0.1",
        port: int = 0,
        batch_tokens: int = 8192,
        queue: int = 64,
        most_tokens: int = 1 << 17,
        token: str | None = None,
    ) -> None:
        check_counts(batch_tokens=batch_tokens, queue=queue, most_tokens=most_tokens)
        if token is not None and not token.strip():
            raise ValueError("token must not be empty: None serves everybody")
        if not labels_need_shift(model):
            raise ValueError(f"model must be a decoder-only language model, got {type(model).__name__}")
        self.model = model.eval()
        check_lm_head(model)
        self.about = describe(model, tokenizer, name, most_tokens)
        self.token = token
        self.largest_body = 17 * most_tokens + (1 << 16)  # ids, which of them are wanted, lengths of rows; names
        if not 0 <= port < 1 << 16:
            raise ValueError(f"port must be in [0, 65535], got {port}")
        self._http = _Server(host, port, self)
        self.batcher = Batcher(model, batch_tokens, queue)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._http.server_address[1]}"
        self._active = 0
        self._idle = threading.Condition()
        self.closing = False
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.1,), name="server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Accept nothing more, finish and answer the requests that are here, and end."""
        self.closing = True
        self._http.shutdown()
        self._http.server_close()
        self.batcher.close()
        with self._idle:
            self._idle.wait_for(lambda: self._active == 0, timeout=_GRACE_SECONDS)

    def totals(self) -> str:
        """What has been done, in words."""
        done = self.batcher
        return (
            f"{done.requests} requests ({done.failed} failed), {done.tokens} tokens, {done.states} hidden states in "
            f"{done.batches} batches, {done.seconds:.1f} s of the model"
        )

    def __enter__(self) -> TeacherServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def head(self) -> dict[str, Tensor]:
        """The head's tensors, on the CPU."""
        head = empty_head(self.model)
        named = (("weight", head.weight), ("bias", head.bias))
        return {name: value.detach().cpu().contiguous() for name, value in named if value is not None}

    def begin(self) -> None:
        with self._idle:
            self._active += 1

    def end(self) -> None:
        with self._idle:
            self._active -= 1
            self._idle.notify_all()


@torch.no_grad()
def empty_head(model: Any) -> LMHead:
    """The model's head on no hidden states."""
    module = check_head_module(model, plain=True)
    weight = module.weight
    dtype = weight.dtype if weight.is_floating_point() else model.dtype
    width = getattr(module, "in_features", weight.shape[1])
    return lm_head_of(model, torch.empty(0, width, dtype=dtype, device=weight.device))


def describe(model: Any, tokenizer: Any, name: str, most_tokens: int) -> dict[str, Any]:
    """What ``GET /about`` says, see :data:`fused_kd.serving.wire.ABOUT`."""
    head = empty_head(model)
    tokens = sorted(tokenizer.get_vocab().items())
    fingerprints = {"tokenizer": fingerprint(tokens), **fingerprint_teacher(model)}
    about = {
        "hidden_size": int(head.weight.shape[1]),
        "vocab_size": int(head.weight.shape[0]),
        "input_size": int(model.get_input_embeddings().weight.shape[0]),
        "tokens": 1 + max((index for _, index in tokens), default=-1),
        "dtype": name_of(head.weight.dtype),
        "logit_scale": head.logit_scale,
        "softcap": head.softcap,
        "fingerprints": fingerprints,
    }
    return {
        "protocol": PROTOCOL,
        "identity": fingerprint(about),
        "model": name or type(model).__name__,
        **about,
        "longest": int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0),
        "most_tokens": most_tokens,
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, teacher: TeacherServer) -> None:
        self.teacher = teacher
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks a name server for this machine's name

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # a client that has gone is no fault here
            print(f"{time.strftime('%H:%M:%S')} {client_address}: {error!r}", file=sys.stderr, flush=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 600  # a connection that says nothing
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        self._answer({"/about": self._about, "/head": self._head})

    def do_POST(self) -> None:
        self._answer({"/states": self._states})

    def _answer(self, known: Mapping[str, Any]) -> None:
        teacher = self.server.teacher
        teacher.begin()
        try:
            path = urlsplit(self.path).path
            allowed = self._allowed()
            body = self._body(teacher.largest_body if allowed else 1 << 16)
            if not allowed:
                self._error(HTTPStatus.UNAUTHORIZED, "a token is needed: Authorization: Bearer TOKEN")
            elif isinstance(body, str):
                self._error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, body)
            elif teacher.closing:
                self._error(HTTPStatus.SERVICE_UNAVAILABLE, "the server is ending")
            elif path not in known:
                self._error(HTTPStatus.NOT_FOUND, f"{self.command} {path[:80]} is unknown here")
            else:
                known[path](body)
        finally:
            teacher.end()

    def _allowed(self) -> bool:
        token = self.server.teacher.token
        given = self.headers.get("Authorization", "")
        return token is None or hmac.compare_digest(given.encode(), f"Bearer {token}".encode())

    def _body(self, largest: int) -> bytes | str:
        """The request's body, or why it is not read; the connection ends then."""
        given = self.headers.get("Content-Length", "0")
        if self.headers.get("Transfer-Encoding") is not None or not (given.isascii() and given.isdigit()):
            self.close_connection = True
            return "a body must have a Content-Length"
        if int(given[:20]) > largest:
            self.close_connection = True
            return f"a body must have at most {largest} bytes, got {given[:20]}"
        body = self.rfile.read(int(given))
        if len(body) < int(given):
            self.close_connection = True
            return f"a body of {given} bytes ended after {len(body)}"
        return body

    def _about(self, _: bytes) -> None:
        self._json(HTTPStatus.OK, self.server.teacher.about)

    def _head(self, _: bytes) -> None:
        try:
            tensors = self.server.teacher.head()
        except Exception as error:
            self._error(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")
            return
        self._tensors(tensors)

    def _states(self, body: bytes) -> None:
        teacher, about = self.server.teacher, self.server.teacher.about
        dtype = parse_qs(urlsplit(self.path).query).get("dtype", [about["dtype"]])[0]
        if dtype not in HIDDEN_DTYPES:
            self._error(HTTPStatus.BAD_REQUEST, f"dtype must be one of {', '.join(HIDDEN_DTYPES)}, got {dtype[:80]!r}")
            return
        try:
            rows = read_rows(body, **{name: about[name] for name in ("input_size", "longest", "most_tokens")})
        except ValueError as error:
            self._error(HTTPStatus.BAD_REQUEST, str(error))
            return
        try:
            job = teacher.batcher.add(rows, dtype)
        except QueueFull:
            text, headers = f"{teacher.batcher.waiting} requests wait already", {"Retry-After": str(_RETRY_SECONDS)}
            self._error(HTTPStatus.SERVICE_UNAVAILABLE, text, headers)
            return
        try:
            tensors = job.result()
        except Unsendable as error:
            self._error(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
            return
        except Exception as error:
            self._error(HTTPStatus.INTERNAL_SERVER_ERROR, f"the model failed: {type(error).__name__}: {error}")
            return
        self._tensors(tensors)

    def _tensors(self, tensors: dict[str, Tensor]) -> None:
        self._send(HTTPStatus.OK, save(tensors), "application/octet-stream")

    def _error(self, status: HTTPStatus, text: str, headers: Mapping[str, str] | None = None) -> None:
        self._json(status, {"error": text[:2000]}, headers)

    def _json(self, status: HTTPStatus, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", headers)

    def _send(self, status: HTTPStatus, body: bytes, kind: str, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header(IDENTITY, self.server.teacher.about["identity"])
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.close_connection or self.server.teacher.closing:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: one line a request would be one a training step."""

    def version_string(self) -> str:
        return "fused_kd"
