"""Write what a teacher says of every target token to a folder, to train without it: its k largest log-probabilities, a
few entries that are drawn, or its last hidden state and, once, its head.

    python examples/cache_teacher.py --data chat.jsonl --teacher PATH_OR_HUB_NAME --k 64 --output caches/chat
    python examples/cache_teacher.py --data pairs.jsonl.gz --directions en-de de-en --teacher PATH_OR_HUB_NAME \
        --k 64 --output caches/teacher
    python examples/cache_teacher.py --data pairs.jsonl.gz --directions en-de de-en --teacher PATH_OR_HUB_NAME \
        --keep hidden --dtype fp8 --project 1024 --output caches/states
    python examples/cache_teacher.py --data pairs.jsonl.gz --directions en-de de-en --teacher PATH_OR_HUB_NAME \
        --keep sampled --k 16 --draws 16 --dtype 8bit --output caches/drawn
    python examples/cache_teacher.py --data pairs.jsonl.gz --directions en-de --teacher PATH_OR_HUB_NAME \
        --from-vllm prompt_logprobs.jsonl.gz --k 20 --output caches/vllm

The same command again goes on where an interrupted one stopped; what is finished is verified and kept.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from typing import Any

if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

import torch
from rich.table import Table
from transformers.utils import logging

import fused_kd as fk
from fused_kd.training.cache import check_options, convert_vllm, write_cache
from fused_kd.training.codes import DTYPES
from fused_kd.training.data import load_pairs, misalign
from fused_kd.training.formats import FORMATS
from fused_kd.training.hidden_codes import CACHE_DTYPES, LONG_NAMES, long_name
from fused_kd.training.loading import safe_config
from fused_kd.training.models import PRESETS, check_device, load_model, load_tokenizer
from fused_kd.training.prompts import PROMPTS, concatenate, render_sample, tokenize_pairs
from fused_kd.training.rows import load_rows
from fused_kd.training.script import make_console, run_script
from fused_kd.training.shards import HEAD, KEPT, bytes_of_token, target_positions
from fused_kd.training.teacher_cache import TeacherCache


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add(
        "--data",
        default="builtin",
        help="builtin, a JSON(L)(.gz), CSV or Parquet file, a folder of them, or a hub name",
    )
    add("--format", choices=["auto", *FORMATS], default="auto", help="of the rows, as of train.py")
    add("--chat-template", help="a file or the text of a template; default: the tokenizer's")
    add("--turns", choices=["all", "last"], default="all", help="of chats, which assistant turns carry loss")
    add(
        "--directions",
        "--direction",
        nargs="+",
        default=["en-de"],
        help="of pairs; the rows of each direction follow each other",
    )
    add("--split", default="train", help="split, or file name stem in a folder")
    add("--skip-bad", action="store_true", help="leave out rows that cannot be read, instead of stopping")
    add("--limit", type=int, help="pairs of each direction; default all")
    add("--kd-size", type=int, help="only the last of them: the KD set of distill.py; default all")
    add("--kd-noise", type=float, default=0.0, help="share of these that gets a wrong reference, as in distill.py")
    add("--seed", type=int, default=0, help="of --kd-noise, and of what is drawn")
    add("--teacher", required=True, help="a path or a hub name; with --from-vllm its tokenizer alone is loaded")
    add("--prompt", choices=PROMPTS, default="paper", help="of pairs; the default is train.py's")
    add("--max-length", type=int, default=1024, help="tokens of prompt and response; the default is train.py's")
    add("--keep", choices=KEPT, default="lists", help="of each token")
    add("--k", type=int, help="lists: entries a token, default 64; sampled: those beside the draws, default 0")
    add("--draws", type=int, help="sampled: entries that are drawn, default 12; for objectives linear in p")
    add("--project", type=int, help="hidden: only so many numbers a state, those that say most")
    add(
        "--like",
        metavar="FOLDER",
        help="hidden: that cache's projection or scaling, for a training's validation rows",
    )
    add("--dtype", choices=[*DTYPES, *(name for name in CACHE_DTYPES if name not in DTYPES)],
        help="lists, sampled: fp16 (default), 8bit or fp32; hidden: bf16 (default), fp8, int8, fp16, fp32")  # fmt: skip
    add("--shard-rows", type=int, help="rows a file; an interruption loses one at most; default 1024, hidden: 128")
    add("--batch", type=int, default=16, help="rows the teacher runs at once")
    add("--teacher-dtype", type=long_name, choices=["auto", *LONG_NAMES.values()], default="auto",
        help="or bf16, fp16, fp32; default: that of the files")  # fmt: skip
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
    if args.from_vllm and (args.keep != "lists" or any(v is not None for v in (args.draws, args.project, args.like))):
        raise SystemExit("--from-vllm has log-probabilities: it needs --keep lists, without --draws, --project, --like")
    if not args.from_vllm:
        check_device(args.device)
    console = make_console()

    tokenizer = load_tokenizer(args.teacher)
    parts = read_parts(args, tokenizer)
    for name, part in parts.items():
        console.print(f"{name}: {part}")
    rows = concatenate(list(parts.values()))
    console.print(f"the first row:\n{render_sample(tokenizer, rows[0])}")
    k = 64 if args.k is None and args.keep == "lists" else args.k
    how = {
        "template": args.prompt if rows.format in (None, "pairs") else None,
        "dtype": args.dtype,
        "shard_rows": args.shard_rows,
        "k": k,
    }
    if args.from_vllm:
        given = {name: value for name, value in how.items() if value is not None}
        cache = convert_vllm(args.output, args.from_vllm, tokenizer, rows, teacher=args.teacher, **given)
    else:
        how |= {"keep": args.keep, "project": args.project, "like": args.like, "draws": args.draws}
        how |= {"seed": args.seed if args.keep == "sampled" else None, "batch_size": args.batch}
        settings, _ = check_options(args.output, tokenizer, rows, **how)
        console.print(expected(settings, rows, args.teacher))
        teacher = load_model(args.teacher, tokenizer, 0, dtype=args.teacher_dtype).to(args.device)
        cache = write_cache(args.output, teacher, tokenizer, rows, **how)

    console.print("\n".join(likely(cache, tokenizer, rows[0])))
    console.print(table_of(cache, parts))
    return cache


def read_parts(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """The rows: of translations those of each direction, of other data one part by the name of its format."""
    how: dict[str, Any] = {"skip_bad": args.skip_bad, "limit": args.limit, "max_length": args.max_length}
    how |= {"chat_template": args.chat_template, "turns": args.turns, "directions": args.directions}
    found = args.format
    if found == "auto":
        found = load_rows(tokenizer, args.data, args.split, **{**how, "limit": 1, "prompt": args.prompt}).format
    if found != "pairs":
        if args.kd_size is not None or args.kd_noise:
            raise SystemExit(f"--kd-size and --kd-noise are of pairs, got {found} in {args.data}")
        return {found: load_rows(tokenizer, args.data, args.split, format=found, **how)}
    parts = {}
    for direction in args.directions:
        pairs = load_pairs(args.data, args.split, direction, limit=args.limit, skip_bad=args.skip_bad)
        if args.kd_size is not None and not 0 < args.kd_size <= len(pairs):
            raise SystemExit(f"--kd-size must be in [1, {len(pairs)}] for {len(pairs)} pairs, got {args.kd_size}")
        pairs = misalign(pairs[-args.kd_size :] if args.kd_size else pairs, args.kd_noise, args.seed)
        parts[direction] = tokenize_pairs(
            tokenizer, args.prompt, pairs, direction, args.max_length, skip_long=args.skip_bad
        )
    return parts


def expected(settings: dict[str, Any], rows: Any, teacher: str) -> str:
    """How large the cache will be, in words."""
    if settings["keep"] == "hidden":
        width = safe_config(teacher, {}).get_text_config().hidden_size
        if (settings["project"] or 0) > width:
            raise ValueError(
                f"--project must be at most the {width} numbers of a hidden state, got {settings['project']}"
            )
        settings = {**settings, "width": settings["project"] or width}
    tokens = sum(len(target_positions(row["labels"])) for row in rows)
    each = bytes_of_token(settings)
    head = " and the teacher's head" if settings["keep"] == "hidden" else ""
    size = tokens * each
    written = f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
    return f"to write: {written} ({tokens} tokens with loss x {each} bytes){head}"


def likely(cache: TeacherCache, tokenizer: Any, row: Any, count: int = 5) -> list[str]:
    """The first targets of a row, the cache's first, each with what the teacher thinks most likely; of drawn lists with
    what was drawn."""
    if cache.keep != "hidden":
        log_probs, indices = cache[0]
        order = log_probs.argsort(dim=1, descending=True, stable=True)  # what is drawn is in the order of ids
        found = log_probs.gather(1, order), indices.gather(1, order)
    else:
        head = cache.head({cache.columns[0]: cache[0][:count]}, torch.ones(count), torch.device("cpu"))
        made = fk.top_k_of(head, count, vocab_size=len(tokenizer))
        found = made.log_probs, made.indices
    tokens = [row["input_ids"][position + 1] for position in target_positions(row["labels"])[:count]]
    title = "next tokens, and what the teacher thinks likely:"
    if cache.keep == "sampled":
        title = "next tokens, and what was drawn, with its share of the list (the teacher's probabilities on average):"
    lines = [title]
    for token, log_probs, indices in zip(tokens, *(part[:count] for part in found), strict=True):
        listed = zip(log_probs.exp()[:count], indices[:count], strict=True)
        entries = [f"{tokenizer.convert_ids_to_tokens(int(i))} {p:.3f}" for p, i in listed if p > 0]
        lines.append(f"  {tokenizer.convert_ids_to_tokens(token)}: {', '.join(entries)}")
    return lines


def table_of(cache: TeacherCache, directions: Iterable[str]) -> Table:
    """What the cache holds, a line an item: of lists the mass, of hidden states what storing them changed."""
    items = {
        "directions or format": " ".join(directions),
        "rows": str(len(cache)),
        "tokens with loss": str(cache.tokens),
    }
    items |= {"entries a token": str(cache.k)} if cache.width is None else {"numbers a token": str(cache.width)}
    if cache.draws is not None:
        items["draws a token"] = str(cache.draws)
    items |= {"dtype": cache.dtype, "bytes a token": f"{cache.bytes_per_token:.1f}"}
    if cache.keep == "lists":
        items |= {"mean mass of a list": f"{cache.mass_mean:.4f}", "least": f"{cache.mass_min:.4f}"}
    elif cache.keep == "hidden":
        head = (cache.folder / HEAD).stat().st_size
        items |= {"head": f"{head / 1e6:.1f} MB", "KL(teacher, cache)": f"{cache.error['kl']:.2g}"}
        items |= {"logits off by": f"{cache.error['logits']:.2%}", "same likeliest": f"{cache.error['top_1']:.2%}"}
    table = Table(title=str(cache.folder), show_header=False)
    for name, value in items.items():
        table.add_row(name, value)
    return table


if __name__ == "__main__":
    run_script(main)
