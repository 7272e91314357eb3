"""One training step of whole models, with and without fused_kd: tokens a second, and the largest batch that fits.

On a CPU: ``python -m bench end_to_end --architecture X --way Y --batch Z`` measures a row of the report again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_kd as fk

from .measure import peak_memory, seconds_of
from .problems import BETA, IGNORE, LAM
from .registry import SELF_EVOLUTION, objective_of, self_evolution
from .session import Lines, Row, Stage, run_stages
from .tables import fixed, over, size, table
from .worker import guarded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WAYS = ("fused_kd", "torch.compile", "eager")
# Random weights: every token is hard, the branch that costs a row the most.
GAMMA = 0.4
TRIAL_SECONDS = 300.0
# Processes of each way, and timed steps in each.
TURNS, ROUNDS = 2, 2
# A largest batch is known to this share of itself.
RESOLUTION = 1 / 8
# Of the first step's loss, relative: what rounding may cost in fp32.
AGREEMENT = 1e-5
SEED = 0
GB = 10**9


class Model(NamedTuple):
    """``family`` is transformers' model_type; a head of ``vocab`` rows by ``hidden`` columns over ``layers`` layers."""

    family: str
    vocab: int
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    tied: bool = False

    def build(self) -> PreTrainedModel:
        """Random weights; logits of standard deviation about 1, so that a label one token off changes the loss."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            self.family,
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            tie_word_embeddings=self.tied,
            initializer_range=1.0 / math.sqrt(self.hidden),
        )
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    def __str__(self) -> str:
        body = f"{self.family}, {self.layers} layers of {self.hidden} and {self.intermediate}, vocabulary {self.vocab}"
        return body + (", tied" if self.tied else "")


class Pair(NamedTuple):
    """Student and teacher.

    Sequences have ``length`` tokens. ``batch`` sequences are timed with every way. ``budget`` bytes over models and
    optimizer state are what the largest batch may take; ``most`` is the largest tried.
    """

    name: str
    student: Model
    teacher: Model
    length: int
    batch: int
    budget: int
    most: int

    def tokens(self, batch: int) -> Tensor:
        """Random token ids (batch, length), known to both vocabularies."""
        return torch.randint(self.student.vocab, (batch, self.length), generator=torch.Generator().manual_seed(SEED))


# Depth and width of the body leave a token's activations about as far below its logits as in Llama 3 8B.
PAIRS = {
    pair.name: pair
    for pair in (
        Pair(
            "llama-3-small",
            Model("llama", 128256, 128, 16, 1024, 4, 2), Model("llama", 128256, 256, 2, 1024, 8, 2),
            length=32, batch=4, budget=3 * GB // 4, most=1024,
        ),
        Pair(
            "tiny",
            Model("qwen2", 1000, 32, 2, 64, 2, 1, tied=True), Model("qwen2", 1024, 48, 2, 64, 2, 1),
            length=16, batch=4, budget=GB // 20, most=16,
        ),
    )
}  # fmt: skip


class Training:
    """A pair of models, an optimizer and a loss; calling it is one step."""

    def __init__(self, pair: Pair, way: str) -> None:
        if way not in WAYS:
            raise ValueError(f"way must be one of {', '.join(WAYS)}, got {way!r}")
        torch.manual_seed(SEED)  # the same numbers in every process
        self.student = pair.student.build().train()
        self.teacher = pair.teacher.build().eval().requires_grad_(False)
        parameters = list(self.student.parameters())
        # AdamW's pass over the embeddings would take a larger share than it does below a GPU's batches.
        self.optimizer = torch.optim.SGD(parameters, lr=1e-3)
        self.gradient_bytes = sum(p.numel() * p.element_size() for p in parameters)
        self.vocab = pair.student.vocab
        objective = objective_of(SELF_EVOLUTION, GAMMA)
        self.criterion = fk.KDLoss(objective, shift=True, vocab_size=self.vocab)
        self.gamma = torch.tensor(GAMMA)
        losses: dict[str, Callable[[Tensor], Tensor]] = {
            "fused_kd": self._fused,
            "torch.compile": partial(self._eager, _compiled),
            "eager": partial(self._eager, self_evolution),
        }
        self.loss = losses[way]

    def __call__(self, ids: Tensor) -> Tensor:
        """Both forwards, loss, backward and the optimizer's step; ids (batch, length); the loss, detached."""
        self.drop_gradients()
        loss = self.loss(ids)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def gate(self, gamma: float) -> None:
        """Tokens more difficult than ``gamma`` are hard from now on."""
        self.criterion.objective = objective_of(SELF_EVOLUTION, gamma)
        self.gamma.fill_(gamma)

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad()

    def peak(self, ids: Tensor) -> int | None:
        """Bytes of a step over models and optimizer state, gradients included; None where they are not known."""
        self(ids[:1])
        memory = peak_memory(partial(self, ids), self.drop_gradients, self.gradient_bytes, ids.device)
        return None if memory is None else memory.over_inputs

    def heads(self, ids: Tensor) -> tuple[fk.LMHead, fk.LMHead]:
        """Hidden states (batch, length, H) and head of student and teacher."""
        from fused_kd.integrations.transformers import hidden_states, lm_head_of

        with torch.no_grad():
            hidden_t = hidden_states(self.teacher, input_ids=ids)
        hidden_s = hidden_states(self.student, input_ids=ids)
        return lm_head_of(self.student, hidden_s), lm_head_of(self.teacher, hidden_t)

    def _fused(self, ids: Tensor) -> Tensor:
        return self.criterion(*self.heads(ids), ids)

    def _eager(self, loss: Callable[..., Tensor], ids: Tensor) -> Tensor:
        """The loss makes the logits itself, as ``model(...).logits`` would, and holds them no longer than it must."""
        student, teacher = self.heads(ids)
        labels = F.pad(ids[:, 1:], (0, 1), value=IGNORE).flatten()
        hidden_s, hidden_t = student.hidden.flatten(0, 1), teacher.hidden.flatten(0, 1)
        return loss(hidden_s, student.weight, hidden_t, teacher.weight[: self.vocab], labels, self.gamma, LAM, BETA)


def _compiled(hidden_s: Tensor, weight_s: Tensor, hidden_t: Tensor, weight_t: Tensor, labels: Tensor, *rest) -> Tensor:
    """The same under torch.compile, for any number of tokens: code is kept from one batch, and process, to the next."""
    for x in (hidden_s, hidden_t, labels):
        torch._dynamo.maybe_mark_dynamic(x, 0)
    return torch.compile(self_evolution)(hidden_s, weight_s, hidden_t, weight_t, labels, *rest)


def largest_batch(fits: Callable[[int], bool], first: int, most: int) -> tuple[int, int | None]:
    """The largest batch seen to fit (0: none) and the smallest seen not to (None: all did), at most
    :data:`RESOLUTION` of the first, and one at least, apart; by doubling from ``first``, then by halving what is
    between."""
    low, high = 0, None
    batch = first
    while True:
        if fits(batch):
            low = batch
        else:
            high = batch
        if low >= most or (high is not None and high - low <= max(1, int(low * RESOLUTION))):
            return low, high
        batch = min(2 * low, most) if high is None else (low + high) // 2


def measure(pair: Pair, way: str, batch: int, threads: int, search: bool) -> Row:
    """Seconds of :data:`ROUNDS` steps, the ``loss`` of the very first one, in which no token is hard, and its ``peak``
    memory; with ``search`` the largest batch. What fails says so."""
    torch.set_num_threads(threads)
    training = Training(pair, way)

    def timed() -> Row:
        ids = pair.tokens(batch)
        training.gate(math.inf)  # a skewed loss is bounded and would hide a wrong label
        loss = float(training(ids))
        training.gate(GAMMA)
        seconds = [seconds_of(partial(training, ids)) for _ in range(ROUNDS)]
        return {"status": "ok", "loss": loss, "seconds": seconds, "peak": training.peak(ids)}

    def searched() -> Row:
        probes: list[Row] = []

        def fits(batch: int) -> bool:
            found = guarded(lambda: {"peak": training.peak(pair.tokens(batch))}, "status")
            if found.get("status") == "failed":
                raise RuntimeError(found["reason"])
            peak: Any = found.get("peak")
            fitting = "status" not in found and peak <= pair.budget
            probes.append({"batch": batch, "peak": peak, "fits": fitting})
            return fitting

        low, high = largest_batch(fits, pair.batch, pair.most)
        return {"search_status": "ok", "probes": probes, "largest_batch": low, "refused_batch": high}

    found = guarded(timed, "status")
    if not search or found["status"] not in ("ok", "out of memory"):
        return found
    if "peak" in found and found["peak"] is None:
        return found | {"search_status": "missing", "search_reason": "peak resident memory is measured on Linux only"}
    more = guarded(searched, "search_status")
    return found | {"search_reason" if name == "reason" else name: value for name, value in more.items()}


def measure_pair(pair: Pair, ways: tuple[str, ...], lines: Lines, batch: int | None = None) -> list[Row]:
    """A row for each way, from the records of ``lines``; what they lack is measured.

    The ways' processes take turns; the last of each looks for the largest batch, unless a ``batch`` is given.
    """
    size = batch or pair.batch
    for turn in range(1, TURNS + 1):
        for way in ways:
            stage = _stage(pair, way, size, turn)
            trial = [pair.name, way, size, torch.get_num_threads(), turn == TURNS and batch is None]
            given = json.dumps([str(lines.path), lines.code, stage, *trial])
            command = [sys.executable, "-m", "bench.end_to_end", "--trial", given]
            if "trial" not in lines.finished(stage) and importlib.util.find_spec("transformers"):
                run_stages([Stage(stage, TRIAL_SECONDS, command)], lines, math.inf, lines.path.parent / "logs")
    records = lines.rows()
    return _agreed([_row(pair, way, size, records) for way in ways])


def _stage(pair: Pair, way: str, batch: int, turn: int) -> str:
    return f"end-to-end:{pair.name}:{way}:{batch}:{turn}"


def _row(pair: Pair, way: str, batch: int, records: dict[tuple[str, str], Row]) -> Row:
    row: Row = {
        "architecture": pair.name,
        "student": pair.student._asdict(),
        "teacher": pair.teacher._asdict(),
        "way": way,
        "dtype": "float32",
        "optimizer": "SGD",
        "length": pair.length,
        "batch": batch,
        "N": batch * pair.length,
        "budget": pair.budget,
        "command": f"python -m bench.end_to_end --architecture {pair.name} --way {way} --batch {batch}",
        "seconds": [],
        "status": "ok",
    }
    if importlib.util.find_spec("transformers") is None:
        return row | {"status": "missing", "reason": "transformers is not installed"}
    for turn in range(1, TURNS + 1):
        stage = _stage(pair, way, batch, turn)
        found = records.get((stage, "trial"))
        if found is None:
            ended = records[stage, "stage"]
            found = {"status": "skipped" if ended["status"] == "cut" else "failed", "reason": ended.get("reason", "")}
        if found["status"] == "skipped" and row["seconds"]:
            continue  # a later turn that is cut takes nothing from an earlier one
        if row["status"] == "ok":
            row |= {name: found[name] for name in FOUND if name in found}
        row["seconds"] += found.get("seconds", [])
    if row["seconds"]:
        row["tokens_per_s"] = row["N"] / statistics.median(row["seconds"])
    return row


FOUND = (
    "status",
    "reason",
    "loss",
    "peak",
    "search_status",
    "search_reason",
    "probes",
    "largest_batch",
    "refused_batch",
)


def _agreed(rows: list[Row]) -> list[Row]:
    """The same step: the first losses, on the same weights and tokens, agree with eager's."""
    eager = next((float(row["loss"]) for row in rows if row["way"] == "eager" and row["status"] == "ok"), None)
    for row in rows:
        row["loss_eager"] = eager
        if eager is None or row["status"] != "ok":
            continue
        allowed, loss = AGREEMENT * abs(eager), float(row["loss"])
        if not abs(loss - eager) <= allowed:
            reason = f"the first step's loss {loss:.7g} is further than {allowed:.1e} from eager's {eager:.7g}"
            row |= {"status": "failed", "reason": reason}
    return rows


def markdown(rows: list[Row]) -> str:
    """A table of every row of a pair, how it came about, and the command of each."""
    eager = next((row for row in rows if row["way"] == "eager"), {})
    lines = []
    for row in rows:

        def beside(name: str, row: Row = row) -> str:
            return fixed(over(row.get(name), eager.get(name)))

        cells = [f"{row['architecture']}: {row['batch']} x {row['length']} tokens", row["way"]]
        if row["status"] == "ok":
            cells += [f"{row['tokens_per_s']:.0f}", beside("tokens_per_s"), size(row["peak"]), beside("peak")]
            cells.append(f"{row['loss']:.5f}")
        else:
            cells += [f"{row['status']}: {row['reason']}", *[""] * 4]
        lines.append([*cells, _largest(row), beside("largest_batch")])
    head = ["pair, step", "way", "tokens/s", "/ eager", "peak GB", "/ eager", "first loss", "largest batch", "/ eager"]
    commands = "\n".join(row["command"] for row in rows)
    return f"{table(head, lines)}\n\n{_METHOD}\n\n{_pair(rows[0])}\n\n```\n{commands}\n```"


_METHOD = f"""\
A step is the student's forward, the teacher's without gradients, the Self-Evolution loss (lam {LAM}, beta {BETA},
gamma {GAMMA}; with random weights every token is hard), backward and the optimizer. Weights and tokens are the same
for all ways, and their first losses, of a step in which no token is hard, must agree. Each way runs in {TURNS}
processes of its own, in turn with the others', {ROUNDS} timed steps in each; medians. "eager" is plain PyTorch's loss
of `bench/registry.py`, "torch.compile" the same compiled, with the heads in it. Peak: over models and optimizer state,
gradients included. Largest batch: in sequences; what is given was seen to fit, and {RESOLUTION:.0%} more (one sequence
at least) not to. Commands with that batch measure its peak. Below the Llama heads are fewer layers than in the whole
model: there the activations take less of the memory, and the largest batches lie further apart."""


def _pair(row: Row) -> str:
    """What the pair is, and what its largest batch may take."""
    how = f"{row['dtype']}, {row['optimizer']}; limit of the largest batch: {row['budget'] / 1e9:g} GB"
    return f"- {row['architecture']}: student {Model(**row['student'])}; teacher {Model(**row['teacher'])}; {how}"


def _largest(row: Row) -> str:
    if row.get("search_status", "ok") != "ok":
        return f"{row['search_status']}: {row['search_reason']}"
    if "largest_batch" not in row:
        return ""
    return ("at least " if row["refused_batch"] is None else "") + str(row["largest_batch"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench end_to_end", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--architecture", choices=PAIRS, default="llama-3-small", help="(default llama-3-small)")
    parser.add_argument("--way", nargs="+", choices=WAYS, help="default: all")
    parser.add_argument("--batch", type=int, help="sequences; then the largest batch is not looked for")
    parser.add_argument("--trial", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.trial is not None:
        path, code, stage, name, *trial = json.loads(args.trial)
        sys.stdin.readline()
        found = guarded(partial(measure, PAIRS[name], *trial), "status")
        Lines(Path(path), code).put(stage, "trial", found.pop("status"), **found)
        return 0
    if args.batch is not None and args.batch < 1:
        parser.error(f"--batch must be at least 1, got {args.batch}")
    with tempfile.TemporaryDirectory() as folder:
        lines = Lines(Path(folder, "lines.jsonl"))
        rows = measure_pair(PAIRS[args.architecture], tuple(args.way or WAYS), lines, args.batch)
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
