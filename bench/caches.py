"""``python -m bench caches``: what a teacher on disk costs in bytes a token, and in the student's gradient.

A language model reads a text; so does a student, which is the same model with noise on its weights, or any model of the
same vocabulary. Each form in which a cache can keep the teacher is stored, read back and compared with the teacher
itself: the gradients with respect to the student's hidden states and to its head's weight, and the mean loss. The
cosine is that of the two gradients, the error the norm of their difference over the norm of the online one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.objectives import Objective

from .cache_times import tables_of, times
from .environment import hardware, source, versions
from .stored import KS, Form, forms
from .tables import table

OBJECTIVES: dict[str, Objective] = {
    "ForwardKD(lam=1)": fk.ForwardKD(lam=1.0),
    "ReverseKD(lam=1)": fk.ReverseKD(lam=1.0),
    "SelfEvolution()": fk.SelfEvolution(),
}
# A teacher of the size of Llama 3's 8B, whose bytes stand beside the measured one's.
LARGE = (128_256, 4096)


class Problem(NamedTuple):
    """``student`` and ``teacher`` on the same N tokens, and their ``labels``."""

    student: fk.LMHead
    teacher: fk.LMHead
    labels: Tensor


class Found(NamedTuple):
    loss: float
    hard: Tensor
    d_hidden: Tensor
    d_weight: Tensor


def gradients(problem: Problem, teacher: fk.LMHead | fk.TopK, objective: Objective) -> Found:
    hidden = problem.student.hidden.detach().requires_grad_()
    weight = problem.student.weight.detach().requires_grad_()
    out = fk.kd_loss(replace(problem.student, hidden=hidden, weight=weight), teacher, problem.labels, objective)
    d_hidden, d_weight = torch.autograd.grad(out.loss, (hidden, weight))
    return Found(float(out.loss.detach()), out.is_hard, d_hidden, d_weight)


def measure(problem: Problem, which: Iterable[Form]) -> list[dict[str, Any]]:
    """A row for each objective and form, the teacher itself first; without the forms that an objective refuses."""
    V, H = problem.teacher.weight.shape
    online = {name: gradients(problem, problem.teacher, each) for name, each in OBJECTIVES.items()}
    rows = [_row("online", name, None, None, found, found) for name, found in online.items()]
    for form in which:
        teacher = form.teacher()
        for name, objective in OBJECTIVES.items():
            try:
                found = gradients(problem, teacher, objective)
            except ValueError as error:
                if "tail must be" not in str(error):
                    raise
                continue
            rows.append(_row(form.name, name, form.size(V, H), form.size(*LARGE), found, online[name]))
            print(f"{form.name}, {name}: {rows[-1]['d_hidden']}", file=sys.stderr)
    return rows


def _row(form: str, objective: str, size: int | None, large: int | None, found: Found, online: Found) -> dict[str, Any]:
    return {
        "form": form, "objective": objective, "bytes": size, "bytes_of_a_large_teacher": large, "loss": found.loss,
        "loss_online": online.loss, "d_hidden": apart(found.d_hidden, online.d_hidden),
        "d_weight": apart(found.d_weight, online.d_weight),
        "gates": float((found.hard != online.hard).float().mean()),
    }  # fmt: skip


def apart(found: Tensor, online: Tensor) -> dict[str, float]:
    own, norm, between = (_norm(x) for x in (found, online, found - online))
    return {"cosine": float((found * online).sum(dtype=torch.float64)) / (norm * own), "error": between / norm}


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


@torch.no_grad()
def problem_of(model: Any, student: Any, ids: Tensor) -> Problem:
    """``ids`` (rows, length + 1): all but the last are read, each has a label."""
    from fused_kd.integrations.transformers import hidden_states, lm_head_of

    heads = []
    for each in (student, model):
        hidden = [hidden_states(each, input_ids=row[None, :-1])[0] for row in ids]
        head = lm_head_of(each, torch.cat(hidden).float())
        heads.append(replace(head, weight=head.weight.detach()))
    return Problem(heads[0], heads[1], ids[:, 1:].flatten())


@torch.no_grad()
def with_noise(model: Any, share: float, seed: int) -> None:
    """Normal noise on every weight matrix, of a norm that is this share of its own."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.dim() > 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += noise * (share * parameter.norm() / noise.norm())


def about(problem: Problem) -> dict[str, Any]:
    """What teacher and student are to each other, and how much the largest entries hold."""
    found = {}
    for name, head in (("teacher", problem.teacher), ("student", problem.student)):
        found[f"cross_entropy_{name}"] = float(fk.kd_loss(head, None, problem.labels, fk.SFT()).loss)
    out = fk.kd_loss(
        problem.student, problem.teacher, problem.labels, fk.ForwardKD(lam=1.0), statistics=("kl", "entropy_t")
    )
    found |= {name: float(value.mean()) for name, value in out.statistics.items()}
    held = fk.top_k_of(problem.teacher, min(max(KS), problem.teacher.vocab)).log_probs.exp().cumsum(1).mean(0)
    return found | {"held": {str(k): float(held[k - 1]) for k in KS if k <= len(held)}}


HEAD = """\
# Teachers on disk: bytes a token beside the error of the student's gradient

{machine}, commit {commit}, torch {torch}, fp32, seed {seed}.

- teacher: {model}, cross-entropy {cross_entropy_teacher:.3f}, entropy {entropy_t:.3f}; {held}
- student: {student}, cross-entropy {cross_entropy_student:.3f}, KL(p || q) {kl:.3f}
- tokens: the first {tokens} of {text}, {length} read at a time
- dH: the gradient of the student's hidden states, token by token; dW: of its head's weight, the sum over all tokens, in
  which what is drawn evens out
- cosine: with the gradient by the teacher itself; error: the norm of the difference over that gradient's
- other gate: tokens that Self-Evolution takes for hard instead of easy, or the other way round
- bytes: ids in as few as a cache has them, and 4 for what a list leaves out; a large teacher has {large[0]:,} entries
  and hidden states of {large[1]:,} numbers
- the projection is the best one of these very tokens
"""


def markdown(record: dict[str, Any]) -> str:
    """The page of what :func:`run` keeps."""
    same = f"the teacher with normal noise of {record['noise']:.0%} of each weight matrix's norm"
    held = ", ".join(f"the {k} largest entries hold {share:.1%}" for k, share in record["held"].items())
    named = {
        "machine": record["hardware"]["cpu"], "commit": str(record["source"]["commit"])[:7],
        "torch": record["versions"]["torch"], "large": LARGE, "held": held,
        "student": same if record["student"] is None else "another model",
    }  # fmt: skip
    head = HEAD.format(**{**record, **named})
    note = f"\n{record['note']}\n" if record["note"] else ""
    timed = f"\n## A step\n\n{tables_of(record['times'])}\n" if record.get("times") else ""
    return f"{head}{note}\n{tables(record['rows'])}{timed}"


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown, one an objective."""
    texts = []
    for name in OBJECTIVES:
        own = [row for row in rows if row["objective"] == name]
        gated = name.startswith("SelfEvolution")
        head = ["form", "bytes a token", "of a large teacher", "loss", "cosine dH", "error dH", "cosine dW", "error dW"]
        lines = []
        for row in own:
            numbers = [row[side][what] for side in ("d_hidden", "d_weight") for what in ("cosine", "error")]
            line = [row["form"], *(str(row[x] or "") for x in ("bytes", "bytes_of_a_large_teacher"))]
            line += [f"{row['loss']:.4f}", *(f"{x:.4f}" for x in numbers)]
            lines.append([*line, f"{row['gates']:.1%}"] if gated else line)
        texts.append(f"## {name}\n\n{table([*head, 'other gate'] if gated else head, lines)}\n")
    return "\n".join(texts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench caches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the teacher: a folder or hub name")
    parser.add_argument("--gguf", metavar="FILE", help="of the model's folder, where its weights are such a file")
    parser.add_argument("--text", required=True, type=Path, help="plain text, UTF-8")
    parser.add_argument("--student", help="a folder or hub name (default: the teacher with noise)")
    parser.add_argument("--noise", type=float, default=0.12, help="of each weight's norm (default 0.12)")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text's beginning (default 4096)")
    parser.add_argument("--length", type=int, default=512, help="tokens read together (default 512)")
    parser.add_argument("--seed", type=int, default=0, help="of noise and draws (default 0)")
    parser.add_argument("--only", default="", metavar="WORD", help="forms with it in their names alone")
    parser.add_argument("--note", default="", help="for the page: what model and text are")
    parser.add_argument("--times", type=int, default=0, metavar="ROWS", help="also the time of a step of so many rows")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for caches.json and caches.md")
    return parser


def _timed(problem: Problem, model: Any, ids: Tensor) -> list[dict[str, Any]]:
    own = slice(0, ids[:, 1:].numel())
    student, teacher = (replace(head, hidden=head.hidden[own]) for head in (problem.student, problem.teacher))
    return times(student, teacher, problem.labels[own], model, ids)


def main(arguments: list[str] | None = None) -> int:
    return run(_parser().parse_args(arguments))


def run(args: argparse.Namespace) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {} if args.gguf is None else {"gguf_file": args.gguf}
    tokenizer = AutoTokenizer.from_pretrained(args.model, **options)
    ids = tokenizer(args.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    rows = min(args.tokens, len(ids) - 1) // args.length
    if rows < 1:
        print(f"bench caches: --text has {len(ids)} tokens, fewer than --length {args.length}", file=sys.stderr)
        return 2
    ids = ids[: rows * args.length + 1].unfold(0, args.length + 1, args.length)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **options).eval()
    if args.student is None:
        student = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **options).eval()
        with_noise(student, args.noise, args.seed)
    else:
        student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32).eval()
    problem = problem_of(model, student, ids)
    timed = _timed(problem, model, ids[: args.times]) if args.times else []
    del model, student
    measured = about(problem)
    found = measure(problem, (form for form in forms(problem.teacher, args.seed) if args.only in form.name))
    record = {
        "model": args.gguf or Path(args.model).name, "text": args.text.name, "student": args.student and "given",
        "note": args.note, "noise": args.noise, "tokens": len(problem.labels), "length": args.length,
        "seed": args.seed, "vocab_size": problem.teacher.vocab, "hidden_size": problem.teacher.weight.shape[1],
        **measured, "hardware": hardware("cpu"), "versions": versions(), "source": source(), "rows": found,
        "times": timed,
    }  # fmt: skip
    print(markdown(record))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "caches.md").write_text(markdown(record), encoding="utf-8")
        (args.out / "caches.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0
