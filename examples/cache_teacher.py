"""Write a teacher's k largest log-probabilities of every target token to a folder, to train without the teacher.

    python examples/cache_teacher.py --data pairs.jsonl.gz --direction en-de de-en --teacher PATH_OR_HUB_NAME \
        --prompt paper --k 64 --output caches/teacher
    python examples/cache_teacher.py --data pairs.jsonl.gz --direction en-de --teacher PATH_OR_HUB_NAME \
        --from-vllm prompt_logprobs.jsonl.gz --k 20 --output caches/vllm

The same command again goes on where an interrupted one stopped; what is finished is verified and kept.
"""

from __future__ import annotations

import argparse
import os
import sys

if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

import torch
from rich.table import Table
from transformers.utils import logging

from fused_kd.training.cache import convert_vllm, write_cache
from fused_kd.training.codes import DTYPES
from fused_kd.training.data import load_pairs, misalign
from fused_kd.training.models import PRESETS, load_model, load_tokenizer
from fused_kd.training.prompts import PROMPTS, concatenate, render_sample, tokenize_pairs
from fused_kd.training.script import make_console, run_script
from fused_kd.training.teacher_cache import TeacherCache, target_positions


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--data", default="builtin", help="builtin, a JSON(L)(.gz) file, a folder of them, or a hub name")
    add("--direction", nargs="+", default=["en-de"], help="the rows of each direction follow each other")
    add("--split", default="train", help="split, or file name stem in a folder")
    add("--skip-bad", action="store_true", help="leave out rows that cannot be read, instead of stopping")
    add("--limit", type=int, help="pairs of each direction; default all")
    add("--kd-size", type=int, help="only the last of them: the KD set of distill.py; default all")
    add("--kd-noise", type=float, default=0.0, help="share of these that gets a wrong reference, as in distill.py")
    add("--seed", type=int, default=0, help="of --kd-noise")
    add("--teacher", required=True, help="a path or a hub name; with --from-vllm its tokenizer alone is loaded")
    add("--prompt", choices=PROMPTS, default="tiny")
    add("--max-length", type=int, default=256, help="tokens of prompt and response")
    add("--k", type=int, default=64, help="entries a token")
    add("--dtype", choices=DTYPES, default="fp16", help="of the stored log-probabilities")
    add("--shard-rows", type=int, default=1024, help="rows a file; an interruption loses one file at most")
    add("--batch", type=int, default=16, help="rows the teacher runs at once")
    add("--teacher-dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--from-vllm", metavar="FILE", help="JSON(L)(.gz) of vLLM's prompt_logprobs of the rows' input_ids, in order")
    add("--output", required=True, help="folder of the cache")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> TeacherCache:
    args = parse_arguments(argv)
    if args.teacher in PRESETS:
        raise SystemExit(f"--teacher {args.teacher} has random weights: give a trained model")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = make_console()

    tokenizer = load_tokenizer(args.teacher)
    parts = {}
    for direction in args.direction:
        pairs = load_pairs(args.data, args.split, direction, limit=args.limit, skip_bad=args.skip_bad)
        if args.kd_size is not None and not 0 < args.kd_size <= len(pairs):
            raise SystemExit(f"--kd-size must be in [1, {len(pairs)}] for {len(pairs)} pairs, got {args.kd_size}")
        pairs = misalign(pairs[-args.kd_size :] if args.kd_size else pairs, args.kd_noise, args.seed)
        parts[direction] = tokenize_pairs(tokenizer, args.prompt, pairs, direction, args.max_length)
        console.print(f"{direction}: {parts[direction]}")
    rows = concatenate(list(parts.values()))
    console.print(f"the first row:\n{render_sample(tokenizer, rows[0])}")

    how = {"k": args.k, "template": args.prompt, "dtype": args.dtype, "shard_rows": args.shard_rows}
    if args.from_vllm:
        cache = convert_vllm(args.output, args.from_vllm, tokenizer, rows, teacher=args.teacher, **how)
    else:
        teacher = load_model(args.teacher, tokenizer, 0, dtype=args.teacher_dtype).to(args.device)
        cache = write_cache(args.output, teacher, tokenizer, rows, batch_size=args.batch, **how)

    tokens = [rows[0]["input_ids"][position + 1] for position in target_positions(rows[0]["labels"])]
    for token, log_probs, indices in list(zip(tokens, *cache[0], strict=True))[:5]:
        listed = zip(log_probs.exp()[:5], indices[:5], strict=True)
        entries = [f"{tokenizer.convert_ids_to_tokens(int(i))} {p:.3f}" for p, i in listed]
        console.print(f"{tokenizer.convert_ids_to_tokens(token)}: {', '.join(entries)}")
    table = Table(title=str(cache.folder))
    for column in ("directions", "rows", "tokens", "k", "dtype", "bytes/token", "mass", "least"):
        table.add_column(column, justify="left" if column == "directions" else "right", overflow="fold")
    table.add_row(
        " ".join(parts), str(len(cache)), str(cache.tokens), str(cache.k), cache.dtype,
        f"{cache.bytes_per_token:.1f}", f"{cache.mass_mean:.4f}", f"{cache.mass_min:.4f}",
    )  # fmt: skip
    console.print(table)
    return cache


if __name__ == "__main__":
    run_script(main)
