"""An HTTP server whose requests, answers and connections are bounded in memory and in time."""

from __future__ import annotations

import contextlib
import hmac
import io
import json
import select
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

_READ_SECONDS = 30.0  # from one answer to the head of the next request, and again for its body
_SEND_SECONDS = 60.0  # for each piece of an answer
_PIECE = 1 << 20
_UNKNOWN_BODY = 1 << 16  # bytes that are read of a request without the token
_RETRY = {"Retry-After": "1"}  # seconds


class Reply(NamedTuple):
    """What a request is answered with; ``body`` may be a memory map that several answers share."""

    status: HTTPStatus
    body: Any
    kind: str = "application/octet-stream"
    headers: Mapping[str, str] = {}


class Asked(NamedTuple):
    """A request that has been read; ``gone()`` says whether its client has left since."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    body: bytes
    gone: Callable[[], bool]


class Refused(Exception):
    """A request that is answered with an error.

    ``ends``: the connection is closed, as its next bytes are none of a new request. ``retry``: the client is told when
    to come back.
    """

    def __init__(self, status: HTTPStatus, text: str, *, ends: bool = False, retry: bool = False) -> None:
        super().__init__(text)
        self.ends = ends
        self.reply = as_json({"error": text[:2000]}, status, _RETRY if retry else {})


def as_json(value: Any, status: HTTPStatus = HTTPStatus.OK, headers: Mapping[str, str] | None = None) -> Reply:
    return Reply(status, json.dumps(value).encode(), "application/json", headers or {})


class HttpServer(ThreadingHTTPServer):
    """Answers requests, each connection in a thread of its own.

    Args:
        host, port: where it listens.
        answer: makes the reply to a request, or raises :class:`Refused`, or ``OSError`` where its client has left.
        token: what requests must bring as ``Authorization: Bearer``; None: nothing.
        largest_body: bytes of a request's body.
        connections: open at once; further ones are told to come back (503).
        headers: of each answer.

    Raises:
        OSError: the address cannot be had.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        host: str,
        port: int,
        answer: Callable[[Asked], Reply],
        *,
        token: str | None,
        largest_body: int,
        connections: int,
        headers: Mapping[str, str],
    ) -> None:
        self.answer, self.token, self.largest_body, self.headers = answer, token, largest_body, headers
        self.connections = connections
        self.ending = False
        self._open = self._active = 0
        self._changed = threading.Condition()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    @property
    def keeps_connections(self) -> bool:
        """Whether a connection stays open after an answer: idle ones must not take the places of others."""
        return not self.ending and 2 * self._open <= self.connections

    def stop(self) -> None:
        """Accept no further connection or request."""
        self.ending = True
        self.shutdown()
        self.server_close()

    def finish(self, seconds: float) -> None:
        """Wait until all requests are answered, for some seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._active == 0, timeout=seconds)

    def count(self, *, opened: int = 0, active: int = 0) -> None:
        with self._changed:
            self._open += opened
            self._active += active
            self._changed.notify_all()

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks a name server for this machine's name

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._open >= self.connections:
            _turn_away(request, self.connections)
            self.shutdown_request(request)
            return
        self.count(opened=1)
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self.count(opened=-1)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.count(opened=-1)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # a client that has gone is no fault here
            print(f"{time.strftime('%H:%M:%S')} {client_address}: {error!r}", file=sys.stderr, flush=True)


def _turn_away(connection: socket.socket, most: int) -> None:
    """Say 503 without waiting for anything: this is the thread that accepts."""
    body = json.dumps({"error": f"{most} connections are open already"}).encode()
    head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Length: {len(body)}\r\nRetry-After: {_RETRY['Retry-After']}"
    connection.setblocking(False)
    with contextlib.suppress(OSError):
        connection.send(f"{head}\r\nConnection: close\r\n\r\n".encode() + body)


class _Received(io.RawIOBase):
    """What a client sends, until a time."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._until = 0.0

    def allow(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        seconds = self._until - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("the client sends too slowly")
        self._connection.settimeout(seconds)
        return self._connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HttpServer

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._received = _Received(self.connection)
        self.rfile = io.BufferedReader(self._received)

    def handle_one_request(self) -> None:
        self._received.allow(_READ_SECONDS)
        super().handle_one_request()

    def do_GET(self) -> None:
        self.server.count(active=1)
        try:
            try:
                reply = self._reply()
            except Refused as refused:
                self.close_connection |= refused.ends
                reply = refused.reply
            self._send(reply)
        finally:
            self.server.count(active=-1)

    do_POST = do_GET

    def _reply(self) -> Reply:
        if not self._allowed():
            ends = False
            try:
                self._body(_UNKNOWN_BODY)
            except Refused:
                ends = True
            raise Refused(HTTPStatus.UNAUTHORIZED, "a token is needed: Authorization: Bearer TOKEN", ends=ends)
        body = self._body(self.server.largest_body)
        if self.server.ending:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "the server is ending")
        url = urlsplit(self.path)
        return self.server.answer(Asked(self.command, url.path, parse_qs(url.query), body, self._gone))

    def _allowed(self) -> bool:
        token = self.server.token
        given = self.headers.get("Authorization", "")
        return token is None or hmac.compare_digest(given.encode(), f"Bearer {token}".encode())

    def _body(self, largest: int) -> bytes:
        length = self._length(largest)
        self._received.allow(_READ_SECONDS)
        body = bytearray()  # grows with what has come: a length alone takes no memory
        while len(body) < length:
            piece = self.rfile.read(min(_PIECE, length - len(body)))
            if not piece:
                text = f"a body of {length} bytes ended after {len(body)}"
                raise Refused(HTTPStatus.BAD_REQUEST, text, ends=True)
            body += piece
        return bytes(body)

    def _length(self, largest: int) -> int:
        """Of the body, at most ``largest``."""
        given = self.headers.get_all("Content-Length", ["0"] if self.command == "GET" else [])
        text = given[0].strip() if len(given) == 1 else ""
        if not (text.isascii() and text.isdigit()) or self.headers.get("Transfer-Encoding") is not None:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "a body must have a Content-Length", ends=True)
        text = text.lstrip("0") or "0"
        # a number of very many digits is not even read as one
        if len(text) > len(str(largest)) or int(text) > largest:
            text = f"a body must have at most {largest} bytes, got {text[:20]}"
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text, ends=True)
        return int(text)

    def _gone(self) -> bool:
        try:
            poll = select.poll()
            poll.register(self.connection, select.POLLIN)
            return bool(poll.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _send(self, reply: Reply) -> None:
        self.connection.settimeout(_SEND_SECONDS)
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.kind)
        self.send_header("Content-Length", str(len(reply.body)))
        for name, value in {**self.server.headers, **reply.headers}.items():
            self.send_header(name, value)
        if self.close_connection or not self.server.keeps_connections:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        with memoryview(reply.body) as view:
            for start in range(0, len(view), _PIECE):  # each piece has its own time
                self.wfile.write(view[start : start + _PIECE])

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: one line a request would be one a training step."""

    def version_string(self) -> str:
        return "fused_kd"
