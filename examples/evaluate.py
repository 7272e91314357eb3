"""Translate test sets with trained models: BLEU, chrF, optionally COMET, paired bootstrap against the first model.

    python examples/evaluate.py runs/forward_kd/model runs/self_evolution/model --data PATH \
        --directions de-en en-de cs-en en-cs --prompt paper --beams 1 --output runs/evaluation

The first model is the baseline of the significance test (†, ‡: p < 0.05). --similar-to MODEL adds how close each output
is to that model's own. --comet COMMAND runs that `comet-score` (pip install unbabel-comet, in another environment: it
asks for transformers < 5). What was translated is kept by the contents of model and test set: the same command again
does what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

import torch
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from fused_kd.training.data import Pair, load_pairs
from fused_kd.training.models import load_model, load_tokenizer, model_content
from fused_kd.training.prompts import PROMPTS, get_prompt
from fused_kd.training.score import ALPHA, paired_bootstrap, score, similarity, translate
from fused_kd.training.script import make_console, run_script
from fused_kd.training.stage import Stages, fingerprint, read_lines, write_json, write_lines

COMET = "Unbabel/wmt22-comet-da"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="+", help="folders or hub names; the first is the baseline")
    add("--data", required=True, help="as for training")
    add("--directions", nargs="+", required=True)
    add("--split", default="test")
    add("--limit", type=int)
    add("--prompt", choices=PROMPTS, default="paper")
    add("--beams", type=int, default=1)
    add("--length-penalty", type=float, default=1.0, help="of beam search; above 1 favours long outputs")
    add("--batch", type=int, default=32)
    add("--max-new-tokens", type=int, default=256)
    add("--similar-to", metavar="MODEL", help="such as the teacher")
    add("--comet", nargs="?", const="comet-score", metavar="COMMAND", help="such as comet-env/bin/comet-score")
    add("--output", default="runs/evaluation")
    return parser.parse_args(argv)


@lru_cache(maxsize=1)
def load(name: str, content: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model, kept until another is asked for, and its tokenizer."""
    tokenizer = load_tokenizer(name)
    return load_model(name, tokenizer, 0), tokenizer


def hypotheses(stages: Stages, args: argparse.Namespace, name: str, direction: str, pairs: list[Pair]) -> list[str]:
    """A model's translations of a test set, kept by the contents of both."""
    slug = re.sub(r"[^\w.-]+", "-", name).strip("-")[-100:]
    if not slug.strip("."):
        raise ValueError(f"models must have a name for a folder, got {name!r}: give its whole path")
    content, template = model_content(name), get_prompt(args.prompt)
    how = {"max_new_tokens": args.max_new_tokens, "num_beams": args.beams, "length_penalty": args.length_penalty}

    def work(folder: Path) -> None:
        made, _ = translate(*load(name, content), pairs, direction, template, batch_size=args.batch, **how)
        write_lines(folder / "hypotheses.txt", made)

    about = {"model": content, "template": template.template, "pairs": fingerprint(pairs), **how}
    return read_lines(stages(f"{slug}.{direction}", work, about) / "hypotheses.txt")


def comet(command: str, pairs: list[Pair], made: list[str]) -> float:
    """System score of COMET's own command."""
    with tempfile.TemporaryDirectory() as folder:
        texts = {"src": [pair.source for pair in pairs], "mt": made, "ref": [pair.target for pair in pairs]}
        for name, lines in texts.items():
            write_lines(Path(folder) / name, lines)
        call = [command, "-s", "src", "-t", "mt", "-r", "ref", "--model", COMET, "--to_json", "scores.json", "--quiet"]
        try:
            subprocess.run([*call, "--gpus", str(int(torch.cuda.is_available()))], cwd=folder, stdout=2, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ValueError(f"--comet {command} gave no scores; its messages are above ({error})") from error
        scores = [line["COMET"] for line in next(iter(json.loads((Path(folder) / "scores.json").read_text()).values()))]
    return sum(scores) / len(scores)


def main(argv: list[str] | None = None) -> dict:
    args = parse_arguments(argv)
    command = shutil.which(args.comet) if args.comet else None
    if args.comet and command is None:
        raise SystemExit(f"--comet: there is no command {args.comet}; see --help for how to install it")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = make_console()
    tests = {d: load_pairs(args.data, args.split, d, limit=args.limit) for d in args.directions}
    names = list(dict.fromkeys([*args.models, *filter(None, [args.similar_to])]))
    stages = Stages(args.output)
    made = {name: {d: hypotheses(stages, args, name, d, pairs) for d, pairs in tests.items()} for name in names}

    results: dict = {name: {} for name in args.models}
    for direction, pairs in tests.items():
        references = [pair.target for pair in pairs]
        compared = {name: made[name][direction] for name in args.models}
        differences = paired_bootstrap(compared, references, args.models[0]) if len(compared) > 1 else []
        for name in args.models:
            found: dict = dataclasses.asdict(score(compared[name], references))
            if args.similar_to:
                found["similarity"] = dataclasses.asdict(similarity(compared[name], made[args.similar_to][direction]))
            if command:
                found["comet"] = comet(os.path.abspath(str(command)), pairs, compared[name])
            own = [test for test in differences if test.system == name]
            found["p"] = {test.metric: test.p_value for test in own}
            found["mark"] = {t.metric: "" if t.p_value >= ALPHA else "†" if t.delta > 0 else "‡" for t in own}
            results[name][direction] = found
    write_json(stages.folder / "results.json", results)

    columns = ["bleu", "chrf", *(["similarity"] if args.similar_to else []), *(["comet"] if args.comet else [])]
    caption = f"†, ‡: higher, lower than {args.models[0]} with p < {ALPHA}; {found['bleu_signature']}"
    table = Table("model", "direction", *columns, caption=caption)
    for name, by_direction in results.items():
        for direction, found in by_direction.items():
            values = [found[c]["bleu"] if c == "similarity" else found[c] for c in columns]
            marks = [found["mark"].get(c, "") for c in columns]
            table.add_row(name, direction, *(f"{value:.2f}{mark}" for value, mark in zip(values, marks, strict=True)))
    console.print(table)
    return results


if __name__ == "__main__":
    run_script(main)
