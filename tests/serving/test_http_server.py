"""What requests and clients may cost the server: bytes, memory, connections and time."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from fused_kd.serving import ServedTeacher, batching, http_server
from fused_kd.serving import server as server_module
from fused_kd.serving.rows import requested_rows
from fused_kd.serving.wire import write_request
from tests.training.tiny import tiny

from .serving import CPU, batch_of, serve


@pytest.fixture
def server() -> Iterator[Any]:
    with serve() as made:
        yield made


def opened(server: Any, sent: bytes = b"") -> socket.socket:
    made = socket.create_connection((server.url.split("/")[-1].split(":")[0], int(server.url.rsplit(":", 1)[1])), 10)
    made.sendall(sent)
    return made


def wait_for(what: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def raw(server, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read().decode(errors="replace")
    connection.close()
    return response.status, content


def test_requests_that_cannot_be(server):
    for method, path, body, headers, status, message in (
        ("GET", "/nothing", None, {}, 404, "GET /nothing is unknown"),
        ("POST", "/about", b"", {}, 404, "POST /about is unknown"),
        ("POST", "/states?dtype=int4", b"x", {}, 400, "dtype must be one of bf16, fp8, fp16, fp32, got 'int4'"),
        ("POST", "/states", b"not tensors", {}, 400, "expected a safetensors file"),
        ("POST", "/states", None, {"Content-Length": str(10**9)}, 413, "at most"),
        ("POST", "/states", None, {"Content-Length": "9" * 60}, 413, "at most"),
        ("POST", "/states", None, {"Content-Length": "9" * 6000}, 413, "at most"),
        ("POST", "/states", None, {"Content-Length": "0" * 20 + "500000000"}, 413, "bytes, got 500000000"),
        ("POST", "/states", b"not tensors", {"Content-Length": "0" * 30 + "11"}, 400, "expected a safetensors file"),
        ("POST", "/states", None, {"Content-Length": ""}, 411, "must have a Content-Length"),
        ("POST", "/states", None, {"Content-Length": "1_0"}, 411, "must have a Content-Length"),
        ("POST", "/states", None, {"Content-Length": "-1"}, 411, "must have a Content-Length"),
        ("POST", "/states", b"x", {"Transfer-Encoding": "chunked"}, 411, "must have a Content-Length"),
    ):
        found = raw(server, method, path, body, **headers)
        assert found[0] == status and message in found[1], found
    assert raw(server, "GET", "/about")[0] == 200


def test_without_the_token():
    """A small body is read, so that the connection can be used again; of a large one the connection ends."""
    with serve(token="secret") as server:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
        for size, kept in ((0, True), (1 << 16, True), ((1 << 16) + 1, False)):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request("POST", "/states", b"x" * size)
            response = connection.getresponse()
            assert response.status == 401 and response.will_close != kept
            response.read()


def test_the_end_closes_what_nobody_uses(server):
    client = ServedTeacher(server.url, patience=0)
    idle = opened(server)
    wait_for(lambda: len(server._http._open) == 2)
    server.close()
    assert idle.recv(1) == b""
    wait_for(lambda: not server._http._open)
    port = int(server.url.rsplit(":", 1)[1])
    with serve(port=port):  # and not the old one answers, that it is ending
        assert client.head(*batch_of(), CPU).hidden.any()


def test_a_length_alone_takes_no_memory(server):
    """The body of a client that says much and sends little grows with what it sends."""
    largest = server._http.largest_body
    server._http.largest_body = 1 << 40
    with opened(server, f"POST /states HTTP/1.1\r\nContent-Length: {1 << 39}\r\n\r\n".encode()) as client:
        client.sendall(b"x" * 100)
        client.shutdown(socket.SHUT_WR)
        assert b"400 Bad Request" in client.recv(1 << 16)
    server._http.largest_body = largest
    assert raw(server, "GET", "/about")[0] == 200


@pytest.mark.parametrize(
    "sent", [b"", b"GET /about HTTP/1.1\r\nX-More: ", b"POST /states HTTP/1.1\r\nContent-Length: 99\r\n\r\n"]
)
@pytest.mark.parametrize("drips", [False, True])
def test_who_sends_nothing_or_little_is_left(sent, drips, server, monkeypatch):
    monkeypatch.setattr(http_server, "_READ_SECONDS", 0.3)
    with opened(server, sent) as client:
        start = time.monotonic()
        client.settimeout(0.05)
        while time.monotonic() < start + 8:
            try:
                if drips:
                    client.sendall(b"x")
                if not client.recv(1 << 16):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        assert 0.2 < time.monotonic() - start < 5
    wait_for(lambda: len(server._http._open) == 0)


def test_a_connection_that_was_left_is_opened_again(server, monkeypatch, caplog):
    monkeypatch.setattr(http_server, "_READ_SECONDS", 0.2)
    client = ServedTeacher(server.url, patience=0)
    client.head(*batch_of(), CPU)
    wait_for(lambda: len(server._http._open) == 0)
    assert client.head(*batch_of(seed=1), CPU).hidden.any() and not caplog.records


def test_connections_are_bounded(monkeypatch):
    monkeypatch.setattr(server_module, "_MORE_CONNECTIONS", 3)
    with serve(queue=1) as server:
        batch, targets = batch_of()
        client = ServedTeacher(server.url, patience=20)
        idle = [opened(server) for _ in range(4 - len(server._http._open))]
        wait_for(lambda: len(server._http._open) == 4)
        client._connection.close()
        wait_for(lambda: len(server._http._open) == 3)
        idle.append(opened(server))
        wait_for(lambda: len(server._http._open) == 4)
        with opened(server) as refused:
            answer = refused.recv(1 << 16).decode()
        assert answer.startswith("HTTP/1.1 503 ") and "Retry-After: 1" in answer and "4 connections are open" in answer
        client.prefetch(batch, targets)
        time.sleep(0.3)
        idle.pop().close()
        assert client.head(batch, targets, CPU).hidden.any() and client._connection.outages == 0
        # more than half of them are taken: none is kept for a client that may not come back
        wait_for(lambda: len(server._http._open) == 3)
        assert not client._connection._idle
        for each in idle:
            each.close()
        wait_for(lambda: len(server._http._open) == 0)
        client.head(*batch_of(seed=1), CPU)
        assert len(client._connection._idle) == 1


def own_memory() -> int:
    """Bytes of this process that are not a file's."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def test_clients_that_do_not_read_the_head_hold_no_copy_of_it():
    model = tiny(512, 1, layers=1, vocab=20_000).eval()
    size = model.lm_head.weight.nbytes
    with serve(model) as server:
        before = own_memory()
        clients = [opened(server, b"GET /head HTTP/1.1\r\n\r\n") for _ in range(4)]
        assert all(client.recv(9) == b"HTTP/1.1 " for client in clients)
        assert own_memory() - before < size
        found = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
        found.request("GET", "/head")
        assert torch.equal(load(found.getresponse().read())["weight"], model.lm_head.weight)
        found.close()
        for client in clients:
            client.close()


def test_requests_of_clients_that_left_are_not_computed(server, monkeypatch):
    real, sizes = batching.hidden_states, []

    def states(model, **inputs):
        sizes.append(len(inputs["input_ids"]))
        time.sleep(0.5)
        return real(model, **inputs)

    monkeypatch.setattr(batching, "hidden_states", states)
    body = write_request(requested_rows(*batch_of(3))[0])
    head = f"POST /states HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    stays = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    stays.request("POST", "/states", body)
    wait_for(lambda: sizes)
    leave = [opened(server, head + body) for _ in range(3)]
    wait_for(lambda: len(server.batcher._jobs) == 3)
    for client in leave:
        client.close()
    first = stays.getresponse().read()
    stays.request("POST", "/states", body)
    assert stays.getresponse().read() == first
    stays.close()
    wait_for(lambda: len(server._http._open) == 0)
    assert len(sizes) == 2 and server.batcher.gone == 3
