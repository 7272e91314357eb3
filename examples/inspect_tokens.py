"""Show which tokens a student finds difficult, checkpoint by checkpoint: an HTML page, and the terminal.

    python examples/inspect_tokens.py --data pairs.jsonl.gz --direction en-de --teacher runs/teacher/model \
        --student runs/student/model runs/self_evolution/model --limit 20 --output inspect.html --terminal

Each response token is coloured by its difficulty KL(ỹ‖q), as the loss counts it, and marked where the objective calls
it hard; a tooltip has the student's and the teacher's most probable tokens.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.text import Text
from transformers.utils import logging

import fused_kd as fk
from fused_kd.engines.gemm import Projection
from fused_kd.integrations.labels import LABEL_PAD
from fused_kd.integrations.transformers import hidden_states, lm_head_of
from fused_kd.training.baseline import DEFAULT_GAMMA
from fused_kd.training.collate import Collator, padding_id
from fused_kd.training.data import load_pairs
from fused_kd.training.models import load_model, load_tokenizer
from fused_kd.training.prompts import PROMPTS, Rows, tokenize_pairs
from fused_kd.training.script import make_console, run_script
from fused_kd.training.specs import parse_objective
from fused_kd.training.stage import write_text

INCOMPLETE = "\ufffd"
TOP = 3  # of the most probable tokens that are shown

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Token difficulty</title><style>
:root { color-scheme: light dark } body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto }
td { padding: .3rem .8rem; vertical-align: top; border-top: 1px solid #8884 } .tokens { white-space: pre-wrap }
.t { color: #000; border-bottom: 3px solid transparent; border-radius: 3px; margin-right: 2px; padding: .1em }
.hard { border-color: currentColor; outline: 1px solid }
</style></head><body><h1>Token difficulty</h1>%s</body></html>
"""


@dataclass(frozen=True)
class Token:
    """One response token: what it spells, its difficulty in nats, and both models' most probable tokens."""

    text: str
    piece: str
    difficulty: float
    is_hard: bool
    probabilities: tuple[float, float]  # of this token, by student and teacher
    tops: tuple[list[tuple[str, float]], list[tuple[str, float]]]


@torch.no_grad()
def token_difficulties(student: Any, teacher: Any, rows: Rows, tokenizer: Any, objective: Any, batch: int = 8) -> list:
    """The loss's own view of every token with a label: of each row its tokens.

    Difficulty and hardness are those of ``fused_kd.kd_loss`` over all tokens of all rows in one call, which is what an
    objective that ranks tokens ranks. An objective without a gate marks tokens above Γ = 0.4, as the trainer's
    ``hard_fraction`` does.
    """
    heads = [head_on_targets(model.eval(), rows, padding_id(tokenizer), batch) for model in (student, teacher)]
    responses = [[label for label in row["labels"][1:] if label != LABEL_PAD] for row in rows]
    labels = torch.tensor([token for response in responses for token in response])
    sizes = {head.vocab for head in heads}
    vocab = len(tokenizer) if len(sizes) > 1 else sizes.pop()
    out = fk.kd_loss(*heads, labels, objective, reduction="none", vocab_size=vocab, validate=True)
    gamma = getattr(objective, "gamma", DEFAULT_GAMMA)
    hard = out.is_hard if objective.spec.gate else out.difficulty > gamma
    looked_up = zip(*(look_up(head, labels, vocab, tokenizer) for head in heads), strict=True)
    found = zip(out.difficulty.tolist(), hard.tolist(), looked_up, strict=True)
    views = []
    for response in responses:
        tokens = []
        for token, text in zip(response, spelled(tokenizer, response), strict=True):
            difficulty, is_hard, ((q, student_top), (p, teacher_top)) = next(found)
            tokens.append(Token(text, piece(tokenizer, token), difficulty, is_hard, (q, p), (student_top, teacher_top)))
        views.append(tokens)
    return views


def head_on_targets(model: Any, rows: Rows, pad: int, batch: int) -> fk.LMHead:
    """The model's head on the states that predict the labelled tokens, (N, H)."""
    kept = []
    for start in range(0, len(rows), batch):
        inputs = Collator(pad)(rows.rows[start : start + batch])
        valid = inputs.pop("labels")[:, 1:] != LABEL_PAD
        states = hidden_states(model, **{name: value.to(model.device) for name, value in inputs.items()})
        kept.append(states[:, :-1][valid.to(states.device)])
    return lm_head_of(model, torch.cat(kept))


def look_up(head: fk.LMHead, labels: torch.Tensor, vocab: int, tokenizer: Any) -> Iterator[tuple[float, list]]:
    """The probability of each label and the most probable tokens, from a few tokens' logits at a time."""
    projection = Projection(head.weight[:vocab], None if head.bias is None else head.bias[:vocab], head.hidden.dtype)
    for start in range(0, len(labels), 64):
        hidden = projection.operand(head.hidden[start : start + 64])
        logits = torch.empty(len(hidden), vocab, device=hidden.device)
        projection.logits(hidden, logits)
        logits *= head.logit_scale
        if head.softcap is not None:
            logits.div_(head.softcap).tanh_().mul_(head.softcap)
        probabilities = logits.softmax(-1).cpu()
        best = probabilities.topk(min(TOP, vocab))
        for row, label in enumerate(labels[start : start + 64].tolist()):
            top = zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True)
            yield float(probabilities[row, label]), [(piece(tokenizer, token), value) for token, value in top]


def spelled(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text; of several that spell one character together, the first has it."""
    texts: list[str] = []
    done = ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith(INCOMPLETE) and end < len(ids):
            continue
        texts += [text[len(done) :], *["·"] * (end - len(texts) - 1)]
        done = text
    return texts


def piece(tokenizer: Any, token: int) -> str:
    """A token alone, a part of a character by its name in the vocabulary."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False) if token < len(tokenizer) else f"<{token}>"
    return str(tokenizer.convert_ids_to_tokens(token)) if INCOMPLETE in text else text


def colour(difficulty: float, most: float) -> str:
    """White to orange, by the square root of the difficulty."""
    share = math.sqrt(min(max(difficulty, 0.0), most) / most)
    return f"#ff{255 - round(110 * share):02x}{255 - round(200 * share):02x}"


def visible(text: str) -> str:
    return "".join(c if c.isprintable() else {"\n": "⏎", "\t": "⇥"}.get(c, f"‹{ord(c):X}›") for c in text) or "·"


def figures(tokens: list[Token]) -> str:
    mean = sum(token.difficulty for token in tokens) / len(tokens)
    return f"{mean:.2f} nats, {sum(token.is_hard for token in tokens) / len(tokens):.0%} hard"


def as_html(token: Token, most: float) -> str:
    tops = (", ".join(f"{text!r} {value:.2g}" for text, value in top) for top in token.tops)
    tip = f"{token.piece!r}: {token.difficulty:.3f} nats\n" + "\n".join(
        f"{name} {value:.2g} of it; {top}"
        for name, value, top in zip(("student", "teacher"), token.probabilities, tops, strict=True)
    )
    style = f'style="background:{colour(token.difficulty, most)}"'
    kind = "t hard" if token.is_hard else "t"
    return f'<span class="{kind}" {style} title="{escape(tip)}">{escape(visible(token.text))}</span>'


def as_text(token: Token, most: float) -> Text:
    shown = visible(token.text)
    return Text(f"[{shown}]" if token.is_hard else shown, f"#000000 on {colour(token.difficulty, most)}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--student", nargs="+", required=True, metavar="PATH", help="checkpoints, in the order of the page's rows")
    add("--teacher", required=True, metavar="PATH", help="a folder or hub name; its tokenizer serves all models")
    add("--data", default="builtin", help="builtin, a JSONL(.gz) file, a folder of them, or a hub name")
    add("--direction", default="en-de")
    add("--split", default="valid", help="split, or file name stem in a folder")
    add("--limit", type=int, default=10, help="the first so many pairs of the split")
    add("--objective", default="self_evolution", metavar="SPEC", help="its target and its hard tokens")
    add("--prompt", choices=PROMPTS, default="tiny")
    add("--max-length", type=int, default=256, help="tokens of prompt and response")
    add("--batch", type=int, default=8, help="sentences at once")
    add("--scale-max", type=float, metavar="NATS", help="difficulty of the last colour; default: 98th percentile")
    add("--output", default="inspect.html", metavar="HTML")
    add("--terminal", action="store_true", help="print the sentences as well")
    args = parser.parse_args(argv)
    if args.limit < 1 or args.batch < 1 or len(set(args.student)) < len(args.student):
        parser.error("--limit and --batch must be at least 1, and --student each once")
    if args.scale_max is not None and not 0 < args.scale_max < math.inf:
        parser.error(f"--scale-max must be a positive number of nats, got {args.scale_max}")
    return args


def main(argv: list[str] | None = None) -> Path:
    args = parse_arguments(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = make_console()
    objective = parse_objective(args.objective).objective
    pairs = load_pairs(args.data, args.split, args.direction, limit=args.limit)
    tokenizer = load_tokenizer(args.teacher)
    rows = tokenize_pairs(tokenizer, args.prompt, pairs, args.direction, args.max_length, skip_long=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_model(args.teacher, tokenizer, seed=0).to(device)
    views = {}
    for path in track(args.student, "checkpoints", console=make_console(stderr=True)):
        student = load_model(path, tokenizer, seed=0).to(device)
        views[path] = token_difficulties(student, teacher, rows, tokenizer, objective, args.batch)

    everything = {path: [token for tokens in view for token in tokens] for path, view in views.items()}
    ordered = sorted(token.difficulty for tokens in everything.values() for token in tokens)
    most = args.scale_max or max(1.0, ordered[math.ceil(0.98 * (len(ordered) - 1))])
    body = [
        f"<p>{escape(repr(objective))}, teacher {escape(args.teacher)}; the last colour: {most:.2g} nats</p><table>"
    ]
    body += [f"<tr><td>{escape(path)}<td>{figures(tokens)}" for path, tokens in everything.items()]
    for path, tokens in everything.items():
        console.print(f"{path}: {figures(tokens)}")
    for number, pair in enumerate(pairs):
        body.append(f'</table><h2>{number + 1}</h2><p dir="auto">{escape(pair.source)}</p><table>')
        console.print(f"\n{number + 1}. {pair.source}" if args.terminal else "", end="\n" if args.terminal else "")
        for path, view in views.items():
            spans = "".join(as_html(token, most) for token in view[number])
            body.append(f'<tr><td>{escape(path)}<br>{figures(view[number])}<td class="tokens" dir="auto">{spans}')
            if args.terminal:
                console.print(Text(f"{path}: ", "dim") + Text.assemble(*(as_text(t, most) for t in view[number])))
    write_text(Path(args.output), PAGE % ("\n".join(body) + "</table>"))
    console.print(f"{len(pairs)} sentences of {len(views)} checkpoints are in {args.output}")
    return Path(args.output)


if __name__ == "__main__":
    run_script(main)
