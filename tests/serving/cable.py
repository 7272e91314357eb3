"""Two machines on one: two network namespaces, a TUN device in each, and a cable between them that can be pulled.

    unshare -rn python -m tests.serving.cable FOLDER TOKEN_FILE

The server runs in one namespace, the client in the other. Printed is how far the client's states are from the local
model's: once, and for a request that is made while the cable is pulled.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

SERVER, CLIENT = "10.99.0.2", "10.99.0.1"
PORT = "8400"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_NEWNET = 0x40000000
_PULLED_SECONDS = 1.5


def end_of_cable(handle: int, own: str, other: str) -> None:
    """Carry the packets of this namespace's device to the cable and back; SIGUSR1 pulls it, and plugs it in again."""
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", b"cable", _IFF_TUN | _IFF_NO_PI))
    for command in (f"addr add {own} peer {other} dev cable", "link set cable up", "link set lo up"):
        subprocess.run(["ip", *command.split()], check=True)
    plugged = [True]
    signal.signal(signal.SIGUSR1, lambda *_: plugged.__setitem__(0, not plugged[0]))
    cable = socket.socket(fileno=handle)
    cable.send(b"ready")
    while True:
        ready, _, _ = select.select([device, cable], [], [])
        if device in ready:
            packet = os.read(device, 1 << 16)
            if plugged[0]:
                cable.send(packet)
        if cable in ready and (packet := cable.recv(1 << 16)) != b"ready" and plugged[0]:
            os.write(device, packet)


def start_end(handle: int, own: str, other: str, before: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    arguments = ["end", str(handle), own, other]
    return subprocess.Popen([*before, sys.executable, "-m", "tests.serving.cable", *arguments], pass_fds=[handle])


def main(folder: str, token_file: str) -> int:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ends = [
        start_end(here.fileno(), CLIENT, SERVER),
        start_end(there.fileno(), SERVER, CLIENT, ["unshare", "-n"]),
    ]
    from fused_kd import serve

    from . import serving  # noqa: F401  # what both sides need, before they part

    time.sleep(0.5)  # both devices are up
    server = os.fork()
    if server == 0:
        enter(ends[1].pid)
        os._exit(serve.main([folder, "--host", SERVER, "--port", PORT, "--token-file", token_file]))
    try:
        ask(lambda: ends[0].send_signal(signal.SIGUSR1))
    finally:
        os.kill(server, signal.SIGTERM)
        code = os.waitstatus_to_exitcode(os.waitpid(server, 0)[1])
        for end in ends:
            end.kill()
    return code


def enter(process: int) -> None:
    """Go to the network namespace of another process."""
    with open(f"/proc/{process}/ns/net") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


def ask(toggle: Callable[[], None]) -> None:
    from fused_kd.serving import ServedTeacher

    from .serving import CPU, apart, batch_of, local, teacher

    model = teacher()
    client = ServedTeacher(f"http://{SERVER}:{PORT}", token="secret", patience=100, timeout=1.0)

    def compare(seed: int) -> None:
        batch, targets = batch_of(seed=seed)
        found = client.head(batch, targets, CPU).hidden
        print("apart", apart(found[targets], local(model, batch)[targets]), flush=True)

    compare(0)
    toggle()
    threading.Timer(_PULLED_SECONDS, toggle).start()
    compare(1)


if __name__ == "__main__":
    if sys.argv[1] == "end":
        end_of_cable(int(sys.argv[2]), *sys.argv[3:])
    else:
        raise SystemExit(main(*sys.argv[1:]))
