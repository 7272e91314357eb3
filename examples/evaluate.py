"""Translate test sets with trained models: BLEU, chrF, optionally COMET, paired bootstrap against the first model.

    python examples/evaluate.py runs/forward_kd/train/model runs/self_evolution/train/model --data PATH \
        --directions de-en en-de cs-en en-cs --prompt paper --beams 1 --output runs/evaluation

The first model is the baseline of the significance test (†, ‡: p < 0.05). --similar-to MODEL adds how close each output
is to that model's own. What was translated is kept by the contents of model and test set: the same command again does
what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from functools import lru_cache, partial
from pathlib import Path

if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_MININTERVAL", "10")

from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from fused_kd.training.cache.teacher_cache import fingerprint_template
from fused_kd.training.command import make_console, run_script
from fused_kd.training.data.pairs import Pair, load_pairs
from fused_kd.training.data.prompts import PROMPTS, get_prompt
from fused_kd.training.evaluation.comet import comet_scores
from fused_kd.training.evaluation.evaluate import score, similarity, translate
from fused_kd.training.evaluation.significance import ALPHA, Comparison, paired_bootstrap
from fused_kd.training.grid.aggregate import HIGHER, LOWER
from fused_kd.training.pipeline import Pipeline
from fused_kd.training.presets import load_model, load_tokenizer, model_content
from fused_kd.training.runs import fingerprint, read_lines, write_json, write_lines


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
    add("--comet", action="store_true", help="Unbabel/wmt22-comet-da; needs the extra comet")
    add("--comet-python", metavar="PATH", help="the Python of an environment that has it")
    add("--output", default="runs/evaluation")
    return parser.parse_args(argv)


def mark(test: Comparison) -> str:
    """† or ‡ where a system is significantly better or worse."""
    return "" if test.p_value >= ALPHA else HIGHER if test.delta > 0 else LOWER


@lru_cache(maxsize=1)
def load(name: str, content: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model, kept until another is asked for, and its tokenizer."""
    tokenizer = load_tokenizer(name)
    return load_model(name, tokenizer, 0), tokenizer


def add_stages(pipeline: Pipeline, args: argparse.Namespace, name: str, tests: dict[str, list[Pair]]) -> dict:
    """By direction, a model's translations of the test set; named after the contents of both."""
    slug = re.sub(r"[^\w.-]+", "-", name).strip("-")[-100:]
    if not slug.strip("."):
        raise ValueError(f"models must have a name for a folder, got {name!r}: give its whole path")
    content, template = model_content(name), get_prompt(args.prompt)
    how = {"max_new_tokens": args.max_new_tokens, "num_beams": args.beams, "length_penalty": args.length_penalty}

    def work(folder: Path, direction: str) -> None:
        model, tokenizer = load(name, content)
        made, _ = translate(model, tokenizer, tests[direction], direction, template, batch_size=args.batch, **how)
        write_lines(folder / "hypotheses.txt", made)

    about = {"model": content, "template": fingerprint_template(template), **how}
    return {
        d: pipeline.add(f"{slug}.{d}", partial(work, direction=d), about | {"pairs": fingerprint(pairs)})
        for d, pairs in tests.items()
    }


def main(argv: list[str] | None = None) -> dict:
    args = parse_arguments(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = make_console()
    tests = {d: load_pairs(args.data, args.split, d, limit=args.limit) for d in args.directions}
    names = list(dict.fromkeys([*args.models, *filter(None, [args.similar_to])]))
    pipeline = Pipeline(args.output)
    stages = {name: add_stages(pipeline, args, name, tests) for name in names}
    for name in names:
        for stage in stages[name].values():
            pipeline.finish(stage, lambda stage: console.rule(stage.title))

    results: dict = {name: {} for name in args.models}
    for direction, pairs in tests.items():
        references, sources = [pair.target for pair in pairs], [pair.source for pair in pairs]
        outputs = {name: read_lines(stages[name][direction].folder / "hypotheses.txt") for name in names}
        compared = {name: outputs[name] for name in args.models}
        tests_of = paired_bootstrap(compared, references, args.models[0]) if len(args.models) > 1 else []
        for name in args.models:
            found: dict = score(outputs[name], references).as_dict()
            if args.similar_to:
                found["similarity"] = dataclasses.asdict(similarity(outputs[name], outputs[args.similar_to]))
            if args.comet:
                found["comet"] = comet_scores(sources, outputs[name], references, python=args.comet_python).system
            own = [test for test in tests_of if test.system == name]
            found["p"] = {test.metric: test.p_value for test in own}
            found["mark"] = {test.metric: mark(test) for test in own}
            results[name][direction] = found
    write_json(pipeline.run.folder / "results.json", results)

    columns = ["bleu", "chrf", *(["similarity"] if args.similar_to else []), *(["comet"] if args.comet else [])]
    table = Table(
        "model",
        "direction",
        *columns,
        caption=f"†, ‡: higher, lower than {args.models[0]} with p < 0.05; {found['bleu_signature']}",
    )
    for name, by_direction in results.items():
        for direction, found in by_direction.items():
            values = [found[c]["bleu"] if c == "similarity" else found[c] for c in columns]
            marks = [found["mark"].get(c, "") for c in columns]
            table.add_row(name, direction, *(f"{value:.2f}{mark}" for value, mark in zip(values, marks, strict=True)))
    console.print(table)
    return results


if __name__ == "__main__":
    run_script(main)
