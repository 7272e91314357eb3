"""A served teacher is the local one, whatever shares its server; and each error says what is wrong."""

from __future__ import annotations

import copy
import http.client
import json
import logging
import pickle
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save

import fused_kd as fk
from fused_kd.serving import ServedTeacher, batching
from fused_kd.serving.ahead import Answers
from fused_kd.serving.batching import Job, batches_of
from fused_kd.serving.rows import key_of
from fused_kd.serving.wire import IDENTITY, Request
from fused_kd.training.collate import PackingCollator
from tests.training.forking import ended, fork
from tests.training.tiny import VOCAB
from tests.training.tiny import rows as tiny_rows

from .serving import CPU, apart, batch_of, local, serve, targets_of, teacher, tokenizer

FAST = {"patience": 5.0, "timeout": 20.0}


@pytest.fixture(scope="module")
def server():
    with serve(batch_tokens=60) as made:
        yield made


@pytest.fixture
def client(server):
    return ServedTeacher(server.url, **FAST)


@pytest.fixture
def running():
    """Starts servers that end with the test."""
    made = []

    def start(*args, **options):
        made.append(serve(*args, **options))
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.mark.parametrize("side", ["right", "left"])
def test_states_are_those_of_the_local_model(server, client, side):
    batch, targets = batch_of(9, side=side)
    found = client.head(batch, targets, CPU)
    assert found.hidden.shape == (*targets.shape, 16) and not found.hidden[~targets].any()
    assert apart(found.hidden[targets], local(server.model, batch)[targets]) < 1e-6
    assert torch.equal(found.weight, server.model.lm_head.weight) and found.bias is None


def test_packed_rows(server, client):
    batch = dict(PackingCollator()(tiny_rows(7, 3)))
    targets = targets_of(batch)
    del batch["labels"]
    found = client.head(batch, targets, CPU)
    assert apart(found.hidden[targets], local(server.model, batch)[targets]) < 1e-6


@pytest.mark.parametrize("dtype, error", [("bf16", 5e-3), ("fp16", 1e-3), ("fp32", 1e-6), ("fp8", 4e-2)])
def test_dtypes_on_the_way(server, dtype, error):
    batch, targets = batch_of()
    client = ServedTeacher(server.url, dtype=dtype, **FAST)
    found = client.head(batch, targets, CPU)
    kept = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.bfloat16}[dtype]
    assert found.hidden.dtype == found.weight.dtype == kept and dtype in repr(client)
    assert apart(found.hidden[targets], local(server.model, batch)[targets]) < error


def test_a_bf16_teacher_is_sent_as_it_is(running):
    model = teacher().bfloat16()
    server = running(model)
    batch, targets = batch_of(1)
    found = ServedTeacher(server.url, **FAST).head(batch, targets, CPU)
    assert found.hidden.dtype == torch.bfloat16
    assert torch.equal(found.hidden[targets], local(model, batch)[targets])


def test_the_head_has_bias_scale_and_cap(running):
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    phi = transformers.PhiForCausalLM(transformers.PhiConfig(hidden_size=16, **sizes))
    torch.nn.init.normal_(phi.lm_head.bias)
    cohere = transformers.CohereForCausalLM(transformers.CohereConfig(hidden_size=16, logit_scale=0.3, **sizes))
    gemma = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            hidden_size=16, head_dim=8, num_key_value_heads=2, final_logit_softcapping=3.0, **sizes
        )
    )
    for model in (phi, cohere, gemma):
        batch, targets = batch_of()
        head = ServedTeacher(running(model.eval()).url, **FAST).head(batch, targets, CPU)
        logits = head.hidden @ head.weight.T + (0 if head.bias is None else head.bias)
        logits = logits * head.logit_scale
        logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
        with torch.no_grad():
            expected = model(**batch).logits
        assert apart(logits[targets], expected[targets]) < 1e-5, type(model)


def test_a_loss_is_that_of_the_local_teacher(server, client):
    batch, targets = batch_of()
    student = fk.LMHead(torch.randn(*targets.shape, 8, requires_grad=True), torch.randn(VOCAB, 8))
    labels = torch.where(targets, torch.randint(VOCAB, targets.shape), -100)
    local_head = fk.LMHead(local(server.model, batch), server.model.lm_head.weight.detach())
    criterion = fk.KDLoss(fk.SelfEvolution())
    gradients = []
    for given in (client.head(batch, targets, CPU), local_head):
        (gradient,) = torch.autograd.grad(criterion(student, given, labels), student.hidden)
        gradients.append(gradient)
    assert apart(*gradients) < 1e-5


def test_without_targets_nothing_is_asked(running):
    server = running()
    client = ServedTeacher(server.url, **FAST)
    batch, targets = batch_of()
    head = client.head(batch, torch.zeros_like(targets), CPU)
    assert not head.hidden.any() and server.batcher.requests == 0


def test_large_requests_are_split(running):
    server = running(most_tokens=15)
    batch, targets = batch_of(8)
    found = ServedTeacher(server.url, **FAST).head(batch, targets, CPU)
    assert apart(found.hidden[targets], local(server.model, batch)[targets]) < 1e-6
    server.batcher.close()
    assert server.batcher.requests > 3


# Batching.


def job(*lengths: int) -> Job:
    tokens = sum(lengths)
    return Job(Request(torch.zeros(tokens).int(), torch.tensor(lengths), torch.ones(tokens).bool()), "fp32")


def test_rows_of_several_requests_share_batches():
    jobs = [job(3, 9), job(8, 1, 1)]
    found = [[(jobs.index(row[0]), row[1], len(row[2])) for row in batch] for batch in batches_of(jobs, 18)]
    assert found == [[(0, 1, 9), (1, 0, 8)], [(0, 0, 3), (1, 1, 1), (1, 2, 1)]]
    assert [len(batch) for batch in batches_of(jobs, 1)] == [1] * 5


def slow(monkeypatch, seconds: float = 0.05, fault: Exception | None = None) -> list[int]:
    """The model takes its time; the rows of each of its batches."""
    real, sizes = batching.hidden_states, []

    def states(model, **inputs):
        sizes.append(len(inputs["input_ids"]))
        time.sleep(seconds)
        if fault is not None:
            raise fault
        return real(model, **inputs)

    monkeypatch.setattr(batching, "hidden_states", states)
    return sizes


def test_concurrent_clients_share_the_model(running, monkeypatch):
    sizes = slow(monkeypatch)
    server = running(batch_tokens=400)

    def ask(seed: int) -> float:
        batch, targets = batch_of(3, seed)
        found = ServedTeacher(server.url, **FAST).head(batch, targets, CPU)
        return apart(found.hidden[targets], local(server.model, batch)[targets])

    with ThreadPoolExecutor(12) as pool:
        assert max(pool.map(ask, range(12))) < 1e-6
    assert sum(sizes) <= 36 and len(sizes) < 12 and max(sizes) > 3


def test_a_full_queue_sends_clients_away_and_they_come_back(running, monkeypatch, caplog):
    slow(monkeypatch, 0.2)
    server = running(queue=1, batch_tokens=1)
    statuses = []
    real = http.client.HTTPConnection.getresponse

    def watched(self, *args):
        response = real(self, *args)
        statuses.append(response.status)
        return response

    monkeypatch.setattr(http.client.HTTPConnection, "getresponse", watched)
    batch, targets = batch_of(1)
    clients = [ServedTeacher(server.url, patience=60) for _ in range(5)]
    with ThreadPoolExecutor(5) as pool, caplog.at_level(logging.WARNING, "fused_kd"):
        heads = list(pool.map(lambda client: client.head(batch, targets, CPU), clients))
    assert 503 in statuses and all(torch.equal(head.hidden, heads[0].hidden) for head in heads)
    assert not caplog.records  # busy is not away


def test_a_failing_model_is_told_and_the_server_lives_on(running, monkeypatch):
    server = running()
    batch, targets = batch_of()
    client = ServedTeacher(server.url, patience=0.5)
    with monkeypatch.context() as patch:
        slow(patch, 0, torch.OutOfMemoryError("no memory for 3 GiB"))
        with pytest.raises(ConnectionError, match="the model failed: OutOfMemoryError: no memory for 3 GiB"):
            client.head(batch, targets, CPU)
    assert client.head(batch, targets, CPU).hidden.any()
    server.close()
    assert "failed), " in server.totals() and "(0 failed)" not in server.totals()


def test_states_that_cannot_be_sent_are_an_error_of_their_request_alone(running, monkeypatch):
    server = running(batch_tokens=1000)
    batch, targets = batch_of(2)
    real, bad = batching.hidden_states, int(batch["input_ids"][0, 0])

    def states(model, **inputs):
        """Of rows that begin with one token all too large for fp16."""
        time.sleep(0.2)
        return real(model, **inputs) * torch.where(inputs["input_ids"][:, :1] == bad, 1e6, 1.0)[..., None]

    monkeypatch.setattr(batching, "hidden_states", states)

    def ask(row: int) -> torch.Tensor:
        client = ServedTeacher(server.url, dtype="fp16", **FAST)
        return client.head({k: v[row : row + 1] for k, v in batch.items()}, targets[row : row + 1], CPU).hidden

    with ThreadPoolExecutor(5) as pool:
        found = [pool.submit(ask, row) for row in (1, 0, 1, 0, 1)]
        for row, future in zip((1, 0, 1, 0, 1), found, strict=True):
            if row:
                assert future.result().any()
                continue
            with pytest.raises(ValueError, match=r"422 .*must be finite numbers that fp16 holds, the largest is"):
                future.result()
    assert server.batcher.batches < 5


# Requests ahead.


def count_requests(client, monkeypatch) -> list[Request]:
    asked = []
    real = client.states_of

    def states_of(request):
        asked.append(request)
        return real(request)

    monkeypatch.setattr(client, "states_of", states_of)
    return asked


def test_prefetched_batches_are_asked_for_once(client, monkeypatch):
    asked = count_requests(client, monkeypatch)
    batches = [batch_of(seed=seed) for seed in range(4)]
    for batch in batches:
        client.prefetch(*batch)
    for batch, targets in batches * 2:  # a step may take a batch twice
        moved = {name: value.clone() for name, value in batch.items()}
        assert client.head(moved, targets.clone(), CPU).hidden[targets].any()
    assert len(asked) == 4
    other = batches[0][1].clone()
    other[other.nonzero()[0, 0], other.nonzero()[0, 1]] = False
    client.head(batches[0][0], other, CPU)
    assert len(asked) == 5  # other targets are another request


def test_answers_ahead_are_bounded_and_stale_ones_make_room(server, monkeypatch):
    client = ServedTeacher(server.url, ahead=2, **FAST)
    asked = count_requests(client, monkeypatch)
    batches = [batch_of(seed=seed) for seed in range(6)]
    for batch in batches[:4]:
        client.prefetch(*batch)
    heads = [client.head(*batch, CPU) for batch in batches[:4]]
    assert len(asked) == 4 and len(client._answers._known) == 2
    assert apart(heads[3].hidden[batches[3][1]], local(server.model, batches[3][0])[batches[3][1]]) < 1e-6
    for batch in batches[:2]:  # never used: another order than expected
        client.prefetch(*batch)
    client.head(*batches[5], CPU)
    client.prefetch(*batches[3])
    assert key_of(*batches[3]) in client._answers._known


def test_steps_use_the_room_again(server, monkeypatch):
    client = ServedTeacher(server.url, ahead=2, **FAST)
    asked = count_requests(client, monkeypatch)
    batches = [batch_of(seed=seed) for seed in range(6)]
    for step in (batches[:2], batches[2:4], batches[4:]):
        for batch in step:
            client.prefetch(*batch)
        assert {key_of(*batch) for batch in step} == set(client._answers._known)
        for batch in step:
            client.head(*batch, CPU)
    assert len(asked) == 6


def test_an_error_ahead_is_raised_where_the_batch_is_used(running):
    server = running()
    client = ServedTeacher(server.url, patience=0.2)
    batch, targets = batch_of()
    server.close()
    client.prefetch(batch, targets)
    with pytest.raises(ConnectionError, match=r"patience=0\.2"):
        client.head(batch, targets, CPU)


def test_what_failed_ahead_is_asked_for_again(running):
    """As by a run that is resumed with the client that it had when the server was away."""
    server = running()
    client = ServedTeacher(server.url, patience=0)
    batch, targets = batch_of()
    port = int(server.url.rsplit(":", 1)[1])
    server.close()
    client.prefetch(batch, targets)
    (failed,) = client._answers._known.values()
    assert isinstance(failed.exception(10), ConnectionError)
    running(port=port)
    client.prefetch(batch, targets)
    assert client.head(batch, targets, CPU).hidden[targets].any()


def test_workers_of_a_loader_ask_for_nothing(client, monkeypatch):
    asked = count_requests(client, monkeypatch)
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: object())
    client.prefetch(*batch_of())
    time.sleep(0.05)
    assert asked == [] and not client._answers._known


def test_copies_in_other_processes(server, client):
    batch, targets = batch_of()
    expected = client.head(batch, targets, CPU).hidden
    copied = pickle.loads(pickle.dumps(client))
    assert torch.equal(copied.head(batch, targets, CPU).hidden, expected) and copied.url == client.url
    copy.deepcopy(client)
    idle = client._connection._idle[0]
    client.prefetch(*batch_of(seed=9))
    locks = client._heads._lock, client._answers._lock, client._connection._lock
    for lock in locks:  # other threads are about something meanwhile
        lock.acquire()

    def child() -> None:
        signal.alarm(30)  # where it would wait for a lock that nobody holds here
        assert torch.equal(client.head(batch, targets, CPU).hidden, expected)

        assert client._connection._idle[0] is not idle

    assert ended(fork(child)) == 0
    for lock in locks:
        lock.release()
    assert torch.equal(client.head(batch, targets, CPU).hidden, expected)


# What is refused.


def test_the_tokenizer_is_compared(client):
    client.check_tokenizer(tokenizer())
    more = tokenizer()
    more.add_tokens(["new"])
    client.check_tokenizer(more)
    with pytest.raises(ValueError, match="another tokenizer"):
        client.check_tokenizer(tokenizer("other"))


def test_a_token_is_wanted(running):
    server = running(token="secret")
    for token in (None, "wrong", "secre", "secretx"):
        given = "without a token" if token is None else "with this token"
        with pytest.raises(PermissionError, match=f"{given}: 401 .* the token is that of the server's --token-file"):
            ServedTeacher(server.url, token=token, **FAST)
    client = ServedTeacher(server.url, token="secret", **FAST)
    batch, targets = batch_of()
    assert client.head(batch, targets, CPU).hidden.any()
    assert "secret" not in repr(client)
    copied = pickle.loads(pickle.dumps(client))
    assert copied.head(batch, targets, CPU).hidden.any()


def test_rows_that_the_teacher_cannot_read(running, client):
    batch, targets = batch_of()
    with pytest.raises(ValueError, match=rf"400 .*input_ids must be in \[0, {VOCAB - 1}\], got 99 at token 0"):
        client.head({**batch, "input_ids": batch["input_ids"].masked_fill(targets | ~targets, 99)}, targets, CPU)
    short = ServedTeacher(running(teacher(max_position_embeddings=6)).url, **FAST)
    with pytest.raises(ValueError, match="a row must have at most 6 tokens"):
        short.head(batch, targets, CPU)


def test_arguments_that_cannot_be(server):
    for options, message in (
        ({"url": "ftp://x"}, "url must be http://HOST:PORT"),
        ({"url": "localhost:80"}, "url must be"),
        ({"url": "http://host:99999"}, "url must be"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"patience": -1}, "patience must be a number of seconds"),
        ({"patience": float("nan")}, "patience must be"),
        ({"timeout": 0}, "timeout must be above 0"),
        ({"ahead": 0}, "ahead must be an int of at least 1"),
        ({"token": "two\nlines"}, "token must be printable"),
    ):
        with pytest.raises(ValueError, match=message):
            ServedTeacher(**{"url": server.url, **options})
    for options, message in (
        ({"token": " "}, "token must not be empty"),
        ({"queue": 0}, "queue must be"),
        ({"port": 1 << 16}, "port must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            serve(**options)


def test_only_decoders_are_served():
    import transformers

    config = transformers.T5Config(vocab_size=VOCAB, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4)
    with pytest.raises(ValueError, match="must be a decoder-only language model, got T5"):
        serve(transformers.T5ForConditionalGeneration(config))


# Servers that go away, and others that come in their place.


def test_a_server_that_is_back_goes_on_and_both_are_said_once(running, caplog):
    first = running()
    client = ServedTeacher(first.url, patience=60)
    batch, targets = batch_of()
    expected = client.head(batch, targets, CPU).hidden
    port = int(first.url.rsplit(":", 1)[1])
    first.close()
    threading.Timer(1.0, lambda: running(port=port)).start()
    with caplog.at_level(logging.WARNING, "fused_kd"):
        other = client.head(*batch_of(seed=1), CPU)
    assert other.hidden.any()
    client._answers = Answers(8)
    assert torch.equal(client.head(batch, targets, CPU).hidden, expected)
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2 and "does not answer" in texts[0] and "answers again" in texts[1]


def test_another_teacher_in_its_place_is_named(running):
    first = running()
    client = ServedTeacher(first.url, patience=20)
    batch, targets = batch_of()
    client.head(batch, targets, CPU)
    port = int(first.url.rsplit(":", 1)[1])
    first.close()
    second = running(teacher(seed=5), port=port)
    with pytest.raises(ValueError, match=r"another teacher than before: teacher_weights \(\w+ before, \w+ now\)$"):
        client.head(*batch_of(seed=1), CPU)
    second.close()
    running(teacher(hidden=20), port=port)
    with pytest.raises(ValueError, match=r"hidden_size \(16 before, 20 now\)"):
        client.head(*batch_of(seed=1), CPU)


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    start = time.monotonic()
    with pytest.raises(
        ConnectionError, match=r"has not answered GET /about for \d s .*resumed from its last checkpoint"
    ):
        ServedTeacher(url, patience=1.5)
    assert time.monotonic() - start < 4


class Liar(BaseHTTPRequestHandler):
    """Answers as told."""

    protocol_version = "HTTP/1.1"
    answers: ClassVar[list[tuple[int, bytes, dict[str, str]]]] = []

    def do_GET(self):
        status, body, headers = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = "Content-Length" in headers

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def liar():
    handler = type("Told", (Liar,), {"answers": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", tell=handler.answers.extend)
    server.shutdown()
    server.server_close()


def test_a_server_of_another_kind(liar):
    liar.tell([(200, b"<html>", {}), (200, b'{"protocol": "other"}', {}), (404, b"gone", {})])
    for message in ("is no teacher's server", "expected a server of the protocol", "404 Not Found: gone"):
        with pytest.raises(ValueError, match=message):
            ServedTeacher(liar.url, **FAST)


def test_answers_that_break_off_are_asked_for_again(liar, server):
    about = json.dumps(server.about).encode()
    mine = {IDENTITY: server.about["identity"]}
    batch, targets = batch_of()
    whole = save({"hidden": torch.ones(int(targets.sum()), 16)})
    head = save({"weight": torch.ones(VOCAB, 16)})
    cut = (200, whole[:50], {**mine, "Content-Length": str(len(whole))})
    liar.tell([(200, about, mine), cut, (502, b"bad gateway", {}), (200, whole, mine), (200, head, mine)])
    found = ServedTeacher(liar.url, **FAST).head(batch, targets, CPU)
    assert bool((found.hidden[targets] == 1).all())


def test_answers_that_cannot_be_are_named(liar, server):
    about = json.dumps(server.about).encode()
    mine = {IDENTITY: server.about["identity"]}
    batch, targets = batch_of()
    whole = save({"hidden": torch.ones(int(targets.sum()), 16)})
    for answers, message in (
        ([(200, save({"hidden": torch.ones(3, 16)}), mine)], "must have the tensors"),
        ([(200, b"garbage", mine)], "expected a safetensors file"),
        ([(200, whole, mine), (200, save({"weight": torch.ones(3, 16)}), mine)], "gave a head of the shapes"),
        ([(200, whole, {}), (200, about, mine)], "another teacher than before: its identity differs"),
    ):
        liar.tell([(200, about, mine), *answers])
        with pytest.raises(ValueError, match=message):
            ServedTeacher(liar.url, **FAST).head(batch, targets, CPU)
        del liar.tell.__self__[:]


def test_what_waiting_does_not_mend(server, monkeypatch):
    """A wrong address or protocol, and a token that is none, are said at once."""
    with pytest.raises(ValueError, match=r"a server without TLS is at http://"):
        ServedTeacher(server.url.replace("http://", "https://"), patience=60.0)
    with pytest.raises(ValueError, match="token must be text, the content of the server's token file"):
        ServedTeacher(server.url, token=b"secret")

    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ValueError, match=r"no such machine \(Name or service not known\)"):
        ServedTeacher("http://nobody.invalid:8400", patience=60.0)
