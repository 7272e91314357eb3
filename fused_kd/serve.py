"""Serve a teacher's hidden states to training runs on this or other machines.

    python -m fused_kd.serve PATH_OR_HUB_NAME --dtype bf16 --port 8400
    python -m fused_kd.serve PATH_OR_HUB_NAME --host 0.0.0.0 --port 8400 --token-file token.txt

Prints one line with the address when it is ready. SIGINT or SIGTERM ends it: what was accepted is answered first.
"""

from __future__ import annotations

import argparse
import errno
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

EVERYWHERE = ("", "0.0.0.0", "::")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    from fused_kd.training.hidden_codes import LONG_NAMES, long_name

    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m fused_kd.serve", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("model", help="a folder or hub name of a causal LM, with its tokenizer")
    add("--host", default="127.0.0.1", help="address to listen at; default %(default)s: this machine alone")
    add("--port", type=int, default=0, help="default: a free one")
    add("--dtype", type=long_name, default="auto", choices=("auto", *LONG_NAMES.values()),
        help="or bf16, fp16, fp32; default %(default)s: that of the files")  # fmt: skip
    add("--device", help="default: cuda where there is one, else cpu")
    add("--attn-implementation", help="sdpa, flash_attention_2, ...; default: transformers' choice")
    add("--batch-tokens", type=int, default=8192,
        help="tokens of a batch of the model, with padding; default %(default)s")  # fmt: skip
    add("--queue", type=int, default=64,
        help="requests that may wait; more are told to come back; default %(default)s")  # fmt: skip
    add("--most-tokens", type=int, default=1 << 17, help="tokens of one request; default %(default)s")
    add("--token-file", type=Path, help="a file with the token that requests must bring; default: none is needed")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal comes; returns the exit code."""
    args = parse_arguments(argv)
    import torch

    from fused_kd.serving.server import LOOPBACK, TeacherServer
    from fused_kd.training.models import load_model, load_tokenizer

    end = threading.Event()

    def stop(number: int, _: FrameType | None) -> None:
        if end.is_set():  # a second one: at once
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        end.set()

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        token = check(args, device)
        tokenizer = load_tokenizer(args.model)
        options: dict[str, Any] = (
            {} if args.attn_implementation is None else {"attn_implementation": args.attn_implementation}
        )
        model: Any = load_model(args.model, tokenizer, 0, dtype=args.dtype, **options)
        server = TeacherServer(
            model.to(device), tokenizer, name=args.model, host=args.host, port=args.port, token=token,
            batch_tokens=args.batch_tokens, queue=args.queue, most_tokens=args.most_tokens,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:  # since it was tried
            text = address_fault(args, error)
        print(f"python -m fused_kd.serve: {text}", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if token is None and args.host not in LOOPBACK:
        print(f"warning: everybody who reaches {args.host} may use this teacher: --token-file", file=sys.stderr)
    about = server.about
    port = server.url.rpartition(":")[2]
    elsewhere = f" (http://{socket.gethostname()}:{port} on other machines)" if args.host in EVERYWHERE else ""
    print(
        f"{server.url}{elsewhere} serves {about['model']}: {about['dtype']}, hidden size {about['hidden_size']}, "
        f"{about['vocab_size']} tokens, on {device}",
        flush=True,
    )
    end.wait()
    server.close()
    print(f"ended: {server.totals()}", flush=True)
    return 0


def check(args: argparse.Namespace, device: str) -> str | None:
    """The token, once everything is checked that can be without the model, whose loading may take minutes.

    Raises:
        ValueError: an option that cannot be; it names it.
    """
    from fused_kd.training.models import check_device

    for name in ("batch_tokens", "queue", "most_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.port < 1 << 16:
        raise ValueError(f"--port must be in [0, 65535], got {args.port}")
    check_device(device)
    token = None if args.token_file is None else read_token(args.token_file)
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
        with socket.socket(family) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            tried.bind((args.host, args.port))
    except OSError as error:
        raise ValueError(address_fault(args, error)) from error
    return token


def read_token(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ValueError(f"--token-file {path} cannot be read: {error}") from error
    if not token:
        raise ValueError(f"--token-file {path} has no token in it")
    return token


def address_fault(args: argparse.Namespace, error: OSError) -> str:
    return f"cannot listen at --host {args.host} --port {args.port}: {error.strerror or error}"


if __name__ == "__main__":
    raise SystemExit(main())
