"""Serve a teacher's hidden states to training runs on this or other machines.

    python -m fused_kd.serve PATH_OR_HUB_NAME --dtype bf16 --port 8400
    python -m fused_kd.serve PATH_OR_HUB_NAME --host 0.0.0.0 --port 8400 --token-file token.txt

Prints one line with the address when it is ready. SIGINT or SIGTERM ends it: what was accepted is answered first.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    from fused_kd.training.hidden_codes import LONG_NAMES, long_name

    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m fused_kd.serve", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("model", help="a folder or hub name of a causal LM, with its tokenizer")
    add("--host", default="127.0.0.1", help="address to listen at; default: this machine alone")
    add("--port", type=int, default=0, help="default: a free one")
    add("--dtype", type=long_name, default="auto", choices=("auto", *LONG_NAMES.values()),
        help="or bf16, fp16, fp32; default: that of the files")  # fmt: skip
    add("--device", help="default: cuda where there is one, else cpu")
    add("--attn-implementation", help="sdpa, flash_attention_2, ...; default: transformers' choice")
    add("--batch-tokens", type=int, default=8192, help="tokens of a batch of the model, with padding")
    add("--queue", type=int, default=64, help="requests that may wait; more are told to come back")
    add("--most-tokens", type=int, default=1 << 17, help="tokens of one request")
    add("--token-file", type=Path, help="a file with the token that requests must bring; default: none")
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

    try:
        token = None if args.token_file is None else args.token_file.read_text(encoding="utf-8").strip()
        tokenizer = load_tokenizer(args.model)
        options: dict[str, Any] = (
            {} if args.attn_implementation is None else {"attn_implementation": args.attn_implementation}
        )
        model: Any = load_model(args.model, tokenizer, 0, dtype=args.dtype, **options)
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        server = TeacherServer(
            model.to(device), tokenizer, name=args.model, host=args.host, port=args.port, token=token,
            batch_tokens=args.batch_tokens, queue=args.queue, most_tokens=args.most_tokens,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"python -m fused_kd.serve: {error}", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if token is None and args.host not in LOOPBACK:
        print(f"warning: everybody who reaches {args.host} may use this teacher: --token-file", file=sys.stderr)
    about = server.about
    print(
        f"{server.url} serves {about['model']}: {about['dtype']}, hidden size {about['hidden_size']}, "
        f"{about['vocab_size']} tokens, on {device}",
        flush=True,
    )
    end.wait()
    server.close()
    print(f"ended: {server.totals()}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
