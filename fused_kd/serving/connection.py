"""HTTP requests that outlast a server that is away for a while."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import math
import os
import random
import socket
import ssl
import threading
import time
from email.message import Message
from typing import Any, NamedTuple
from urllib.parse import urlsplit

_LOG = logging.getLogger("fused_kd.serving")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 3.0  # seconds


class Answer(NamedTuple):
    """The answer to a request that was served: status 200."""

    body: bytes
    headers: Message


class _Trouble(Exception):
    """A fault that may be gone at the next try; ``pause``: the server said when."""

    def __init__(self, text: str, pause: float | None = None) -> None:
        super().__init__(text)
        self.pause = pause


class Connection:
    """Sends requests to one server, from any thread and process; connections stay open.

    Args:
        url: ``http://HOST:PORT`` or ``https://HOST:PORT``, with or without a path before the requests' own.
        patience: seconds for which a request is tried again where the server cannot be reached, breaks off, or says
            that it is overloaded or broken (5xx).
        timeout: seconds without a byte after which a try has failed.
        token: sent as ``Authorization: Bearer``.

    Attributes:
        outages: how often the server has been away.

    Raises:
        ValueError: a url, time or token that cannot be.
    """

    def __init__(self, url: str, *, patience: float = 600.0, timeout: float = 300.0, token: str | None = None) -> None:
        parts = urlsplit(str(url))
        try:
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            sound = False
        if not sound or parts.query or parts.fragment or parts.username is not None:
            raise ValueError(f"url must be http://HOST:PORT or https://HOST:PORT, got {str(url)[:200]!r}")
        for name, value in (("patience", patience), ("timeout", timeout)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of seconds of at least 0, got {value!r}")
        if not timeout:
            raise ValueError(f"timeout must be above 0, got {timeout!r}")
        if token is not None and not isinstance(token, str):
            raise ValueError(f"token must be text, the content of the server's token file, got {token!r}")
        if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token and token):
            raise ValueError("token must be printable ASCII without blanks around it, or None")
        self.url, self.patience, self.timeout = str(url).rstrip("/"), float(patience), float(timeout)
        self._token = token
        self.outages = 0
        self._known = False
        self._begin()

    def _begin(self) -> None:
        """Have no open connections: those of another process are that one's."""
        self._process = os.getpid()
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        self._away = False

    def __getstate__(self) -> dict[str, object]:
        return {"url": self.url, "patience": self.patience, "timeout": self.timeout, "token": self._token}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Connection.__init__(self, **state)

    def request(
        self, method: str, path: str, body: bytes | None = None, *, kind: str = "application/octet-stream"
    ) -> Answer:
        """The answer, after as many tries as it takes.

        Raises:
            ValueError: the server refuses the request (4xx), in its own words. PermissionError: it wants another token.
            ConnectionError: it has not answered for ``patience`` seconds.
        """
        if self._process != os.getpid():
            self._begin()
        start, tries, pause = time.monotonic(), 0, _FIRST_PAUSE
        while True:
            tries += 1
            try:
                answer = self._try(method, path, body, kind)
            except _Trouble as trouble:
                waited = time.monotonic() - start
                wait = (trouble.pause if trouble.pause is not None else pause) * random.uniform(0.8, 1.2)
                if waited + wait > self.patience:
                    raise ConnectionError(
                        f"{self.url} has not answered {method} {path} for {waited:.0f} s ({tries} tries, patience="
                        f"{self.patience:g}); the last: {trouble}. When it is back, the run can be resumed from its "
                        "last checkpoint"
                    ) from trouble
                if trouble.pause is None:
                    self._say(trouble)
                    pause = min(2 * pause, _LONGEST_PAUSE)
                time.sleep(wait)
                continue
            self._say(None)
            self._known = True  # it has been there
            return answer

    def _try(self, method: str, path: str, body: bytes | None, kind: str) -> Answer:
        connection, fresh = self._connection()
        headers = {"Content-Type": kind} if body is not None else {}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            # a server that turns a request away before it has read it says why all the same
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, urlsplit(self.url).path + path, body, headers)
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            # between two requests the server may have closed it
            if not fresh and isinstance(error, ConnectionError):
                return self._try(method, path, body, kind)
            if isinstance(error, ssl.SSLError):
                raise ValueError(f"{self.url}: {error}; a server without TLS is at http://") from error
            if isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME and not self._known:
                raise ValueError(f"{self.url}: no such machine ({error.strerror})") from error
            raise _Trouble(f"{type(error).__name__}: {error}") from error
        if response.will_close:
            connection.close()
        else:
            with self._lock:
                self._idle.append(connection)
        if response.status == 200:
            return Answer(content, response.headers)
        text = f"{response.status} {response.reason}: {_error_of(content)}"
        if response.status in (401, 403):
            given = "without a token" if self._token is None else "with this token"
            raise PermissionError(
                f"{self.url} refuses {method} {path} {given}: {text}; the token is that of the server's --token-file "
                "(ServedTeacher(..., token=), train.py --teacher_token_file)"
            )
        if response.status == 503 and response.headers.get("Retry-After", "").isdigit():
            raise _Trouble(text, pause=float(response.headers["Retry-After"]))
        if response.status >= 500 or response.status in (408, 429):
            raise _Trouble(text)
        raise ValueError(f"{self.url} refuses {method} {path}: {text}")

    def _connection(self) -> tuple[http.client.HTTPConnection, bool]:
        """A connection that nobody uses, and whether it is new."""
        with self._lock:
            if self._idle:
                return self._idle.pop(), False
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(str(parts.hostname), parts.port, timeout=self.timeout), True

    def close(self) -> None:
        """Close the connections that nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _say(self, trouble: Exception | None) -> None:
        """Log once when the server goes away, and once when it is back."""
        with self._lock:
            changed, self._away = self._away != (trouble is not None), trouble is not None
            self.outages += changed and trouble is not None
        if changed and trouble is not None:
            _LOG.warning(
                "%s does not answer (%s): trying again for %g s; nothing is lost", self.url, trouble, self.patience
            )
        elif changed:
            _LOG.warning("%s answers again", self.url)


def _error_of(content: bytes) -> str:
    """The text of an error's body."""
    try:
        found = json.loads(content)
        error = found["error"] if "error" in found else found.get("detail", found)
        error = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError, TypeError):
        error = content[:500].decode(errors="replace")
    return str(error)[:2000]
