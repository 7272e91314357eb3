"""Server and client in processes of their own: kills within a request, a clear end, two network namespaces."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from fused_kd import serve as serve_module
from fused_kd.serving import ServedTeacher
from fused_kd.training import models

from .serving import CPU, ROOT, Process, apart, batch_of, local, saved, teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("served") / "model")


def test_it_serves_until_it_is_told_to_end(folder, tmp_path):
    (tmp_path / "token").write_text("secret\n")
    with Process(folder, "--token-file", str(tmp_path / "token")) as process:
        assert re.fullmatch(
            rf"http://127\.0\.0\.1:\d+ serves {folder}: fp32, hidden size 16, 61 tokens, on \w+\n", process.line
        )
        batch, targets = batch_of()
        client = ServedTeacher(process.url, token="secret", patience=5)
        found = client.head(batch, targets, CPU).hidden
        assert apart(found[targets], local(teacher(), batch)[targets]) < 1e-6
        code, out, err = process.end()
    tokens, states = int(batch["attention_mask"].sum()), int(targets.sum())
    counts = re.fullmatch(r"ended: 1 requests \(0 failed\), (\d+) tokens, (\d+) hidden states in 1 batches, .*\n", out)
    assert code == 0 and counts and not err, (code, out, err)
    assert states == int(counts[2]) <= int(counts[1]) < tokens


def test_a_request_that_runs_is_answered_before_the_end(folder):
    with Process(folder, slow=1) as process:
        client = ServedTeacher(process.url, patience=0)  # one try
        batch, targets = batch_of()
        client.prefetch(batch, targets)
        time.sleep(0.5)
        code, out, err = process.end()
        assert code == 0 and "1 requests (0 failed)" in out and not err, (code, out, err)
        found = client._answers.take(next(iter(client._answers._known)), lambda: pytest.fail("asked again"))
        assert apart(found, local(teacher(), batch)[targets]) < 1e-6


def test_a_killed_server_that_is_started_again(folder, caplog):
    """kill -9 in the middle of a request: the client waits, asks the new one, and has what it would have had."""
    batch, targets = batch_of()
    restarted = []
    with Process(folder, slow=1) as first:
        client = ServedTeacher(first.url, patience=120)

        def replace() -> None:
            time.sleep(0.5)
            first.kill()
            restarted.append(Process(folder, "--port", first.port))

        thread = threading.Thread(target=replace)
        thread.start()
        try:
            found = client.head(batch, targets, CPU).hidden
        finally:
            thread.join()
    with restarted[0]:
        assert apart(found[targets], local(teacher(), batch)[targets]) < 1e-6
        texts = [record.getMessage() for record in caplog.records]
        assert len(texts) == 2 and "does not answer" in texts[0] and "answers again" in texts[1], texts


def test_what_it_cannot_serve(folder, tmp_path, capsys, monkeypatch):
    """Options that are wrong are found before the model, whose loading takes minutes, is touched."""
    assert serve_module.main(["nowhere"]) == 2
    assert "neither a preset" in capsys.readouterr().err
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(models, "load_tokenizer", lambda *_: pytest.fail("the tokenizer was loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (tmp_path / "empty").write_text("\n")
        for arguments, message in (
            (
                ["--token-file", str(tmp_path / "missing")],
                f"--token-file {tmp_path / 'missing'} cannot be read: .*No such",
            ),
            (["--token-file", str(tmp_path / "empty")], f"--token-file {tmp_path / 'empty'} has no token"),
            (["--port", str(port)], f"cannot listen at --host 127.0.0.1 --port {port}: .*in use"),
            (["--port", "65536"], r"--port must be in \[0, 65535\], got 65536"),
            (["--host", "no.such.host.invalid"], "cannot listen at --host no.such.host.invalid --port 0: "),
            (["--host", "192.0.2.1"], "cannot listen at --host 192.0.2.1 --port 0: .*assign"),
            (["--batch-tokens", "0"], "--batch-tokens must be at least 1, got 0"),
            (["--queue", "-1"], "--queue must be at least 1, got -1"),
            (["--device", "nothing"], "device='nothing' cannot be used here: "),
            (["--device", "cuda:99"], "device='cuda:99' cannot be used here: "),
        ):
            assert serve_module.main([str(folder), *arguments]) == 2
            found = capsys.readouterr().err
            assert re.fullmatch(rf"python -m fused_kd\.serve: {message}.*\n", found), found


def test_an_address_that_is_taken_while_the_model_is_loaded(folder, capsys, monkeypatch):
    load, taken = models.load_model, socket.socket()

    def slow(*given, **options):
        taken.bind(("127.0.0.1", port))
        taken.listen()
        return load(*given, **options)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(models, "load_model", slow)
    with taken:
        assert serve_module.main([str(folder), "--port", str(port)]) == 2
    assert f"cannot listen at --host 127.0.0.1 --port {port}: " in capsys.readouterr().err


def test_it_warns_of_a_host_that_everybody_reaches(folder):
    with Process(folder, "--host", "0.0.0.0") as process:
        assert f"(http://{socket.gethostname()}:{process.port} on other machines) serves" in process.line
        assert ServedTeacher(f"http://127.0.0.1:{process.port}", patience=5).hidden_size == 16
        code, _, err = process.end()
    assert code == 0
    assert "everybody who reaches 0.0.0.0 may use this teacher: --token-file" in err


def test_interrupted_twice_it_ends_at_once(folder):
    with Process(folder, slow=60) as process:
        client = ServedTeacher(process.url, patience=0)
        client.prefetch(*batch_of())
        time.sleep(0.5)
        process.popen.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.popen.poll() is None
        process.popen.send_signal(signal.SIGINT)
        assert process.popen.wait(20) == -signal.SIGINT


def namespaces() -> bool:
    """Whether two of them can be made and joined here."""
    if not all(shutil.which(name) for name in ("unshare", "ip", "nsenter")):
        return False
    tried = "ip tuntap add dev cable mode tun && unshare -n true"
    return subprocess.run(["unshare", "-rn", "sh", "-c", tried], capture_output=True).returncode == 0


def test_two_machines(folder, tmp_path):
    if not namespaces():
        pytest.skip("no right to make network namespaces here; the tests above have two processes")
    (tmp_path / "token").write_text("secret")
    command = ["unshare", "-rn", sys.executable, "-m", "tests.serving.cable", str(folder), str(tmp_path / "token")]
    environment = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200, env=environment)
    found = [float(x) for x in re.findall(r"^apart (\S+)$", done.stdout, re.MULTILINE)]
    assert done.returncode == 0 and len(found) == 2 and max(found) < 1e-6, done.stdout + done.stderr
    assert re.search(r"ended: \d requests \(0 failed\)", done.stdout)
    assert "does not answer" in done.stderr and "answers again" in done.stderr
