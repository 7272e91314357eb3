"""One training step of whole models, with and without fused_kd: tokens a second, and the largest batch that fits.

python -m bench end_to_end                                           # every pair of this device, every way
python -m bench end_to_end --architecture X --way Y --batch Z        # one row again
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

from . import environment
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
WARMUP = {"cpu": 1, "cuda": 3}
TRIAL_SECONDS = 300.0
# Processes of each way, and timed steps in each.
TURNS, ROUNDS = 2, 2
# A largest batch is known to this share of itself.
RESOLUTION = 1 / 8
# Of the first step's loss, relative: what rounding may cost in fp32, and in bf16, whose logits eager rounds.
AGREEMENT = {"cpu": 1e-5, "cuda": 1e-3}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
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

    def build(self, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
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
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)

    def __str__(self) -> str:
        body = f"{self.family}, {self.layers} layers of {self.hidden} and {self.intermediate}, vocabulary {self.vocab}"
        return body + (", tied" if self.tied else "")


class Architecture(NamedTuple):
    """A pair on one kind of ``device`` (None: on any).

    Sequences have ``length`` tokens. ``batch`` sequences are timed with every way. ``budget`` bytes over models and
    optimizer state are what the largest batch may take (None: what the device has); ``most`` is the largest tried.
    """

    name: str
    device: str | None
    student: Model
    teacher: Model
    length: int
    batch: int
    budget: int | None
    most: int

    def tokens(self, batch: int, device: torch.device) -> Tensor:
        """Random token ids (batch, length), known to both vocabularies."""
        g = torch.Generator().manual_seed(SEED)
        return torch.randint(self.student.vocab, (batch, self.length), generator=g).to(device)


# Scaled from the GPU's pairs: of those the one keeps a head with little below it, the other a deep body below a tied
# head. Depth and width of the body leave a token's activations about as far below its logits as there.
ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture(
            "llama-3-8b-head", "cuda",
            Model("llama", 128256, 4096, 2, 14336, 32, 8), Model("llama", 128256, 8192, 2, 28672, 64, 8),
            length=512, batch=4, budget=None, most=4096,
        ),
        Architecture(
            "qwen2.5-0.5b", "cuda",
            Model("qwen2", 151936, 896, 24, 4864, 14, 2, tied=True), Model("qwen2", 152064, 3584, 2, 18944, 28, 4),
            length=512, batch=4, budget=None, most=4096,
        ),
        Architecture(
            "llama-3-small", "cpu",
            Model("llama", 128256, 128, 16, 1024, 4, 2), Model("llama", 128256, 256, 2, 1024, 8, 2),
            length=32, batch=4, budget=3 * GB // 4, most=1024,
        ),
        Architecture(
            "tiny", None,
            Model("qwen2", 1000, 32, 2, 64, 2, 1, tied=True), Model("qwen2", 1024, 48, 2, 64, 2, 1),
            length=16, batch=4, budget=GB // 20, most=16,
        ),
    )
}  # fmt: skip


def suite(device: str, quick: bool) -> list[Architecture]:
    """Those of this kind of device, or with ``quick`` the tiny one."""
    return [a for a in ARCHITECTURES.values() if a.device == (None if quick else device)]


class Training:
    """A pair of models, an optimizer and a loss; calling it is one step."""

    def __init__(self, architecture: Architecture, way: str, device: torch.device) -> None:
        if way not in WAYS:
            raise ValueError(f"way must be one of {', '.join(WAYS)}, got {way!r}")
        dtype = DTYPES[device.type]
        torch.manual_seed(SEED)  # the same numbers in every process
        self.student = architecture.student.build(device, dtype).train()
        self.teacher = architecture.teacher.build(device, dtype).eval().requires_grad_(False)
        parameters = list(self.student.parameters())
        if device.type == "cuda":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
        else:  # AdamW's pass over the embeddings would take a larger share than it does below a GPU's batches
            self.optimizer = torch.optim.SGD(parameters, lr=1e-3)
        self.gradient_bytes = sum(p.numel() * p.element_size() for p in parameters)
        self.vocab = architecture.student.vocab
        objective = objective_of(SELF_EVOLUTION, GAMMA)
        self.criterion = fk.KDLoss(objective, shift=True, vocab_size=self.vocab).to(device)
        self.gamma = torch.tensor(GAMMA, device=device)
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


def measure(architecture: Architecture, way: str, batch: int, device: str, threads: int, search: bool) -> Row:
    """Seconds of :data:`ROUNDS` steps, the ``loss`` of the very first one, in which no token is hard, and its ``peak``
    memory; with ``search`` the largest batch. What fails says so."""
    torch.set_num_threads(threads)
    where = torch.device(device)
    training = Training(architecture, way, where)

    def timed() -> Row:
        ids = architecture.tokens(batch, where)
        training.gate(math.inf)  # a skewed loss is bounded and would hide a wrong label
        loss = float(training(ids))
        training.gate(GAMMA)
        for _ in range(WARMUP[device] - 1):
            training(ids)
        seconds = [seconds_of(partial(training, ids)) for _ in range(ROUNDS)]
        return {"status": "ok", "loss": loss, "seconds": seconds, "peak": training.peak(ids)}

    def searched() -> Row:
        probes: list[Row] = []

        def fits(batch: int) -> bool:
            found = guarded(lambda: {"peak": training.peak(architecture.tokens(batch, where))}, "status")
            if found.get("status") == "failed":
                raise RuntimeError(found["reason"])
            peak: Any = found.get("peak")
            fitting = "status" not in found and peak <= (architecture.budget or math.inf)
            probes.append({"batch": batch, "peak": peak, "fits": fitting})
            return fitting

        low, high = largest_batch(fits, architecture.batch, architecture.most)
        return {"search_status": "ok", "probes": probes, "largest_batch": low, "refused_batch": high}

    found = guarded(timed, "status")
    if not search or found["status"] not in ("ok", "out of memory"):
        return found
    if "peak" in found and found["peak"] is None:
        return found | {"search_status": "missing", "search_reason": "peak resident memory is measured on Linux only"}
    more = guarded(searched, "search_status")
    return found | {"search_reason" if name == "reason" else name: value for name, value in more.items()}


def measure_pairs(
    architectures: list[Architecture],
    ways: tuple[str, ...],
    device: str,
    lines: Lines,
    end: float = math.inf,
    batch: int | None = None,
) -> list[Row]:
    """A row for each way of each architecture, from the records of ``lines``; what they lack is measured until ``end``.

    The ways' processes take turns; the last of each looks for the largest batch, unless a ``batch`` is given.
    """
    rows = []
    for architecture in architectures:
        size = batch or architecture.batch
        for turn in range(1, TURNS + 1):
            for way in ways:
                stage = _stage(architecture, way, size, turn)
                trial = [architecture.name, way, size, device, torch.get_num_threads(), turn == TURNS and batch is None]
                given = json.dumps([str(lines.path), lines.code, stage, *trial])
                command = [sys.executable, "-m", "bench.end_to_end", "--trial", given]
                if "trial" not in lines.finished(stage) and importlib.util.find_spec("transformers"):
                    run_stages([Stage(stage, TRIAL_SECONDS, command)], lines, end, lines.path.parent / "logs")
        records = lines.rows()
        rows += _agreed([_row(architecture, way, size, device, records) for way in ways])
    return rows


def _stage(architecture: Architecture, way: str, batch: int, turn: int) -> str:
    return f"end-to-end:{architecture.name}:{way}:{batch}:{turn}"


def _row(architecture: Architecture, way: str, batch: int, device: str, records: dict[tuple[str, str], Row]) -> Row:
    row: Row = {
        "architecture": architecture.name,
        "student": architecture.student._asdict(),
        "teacher": architecture.teacher._asdict(),
        "way": way,
        "device": device,
        "dtype": str(DTYPES[device]).removeprefix("torch."),
        "optimizer": "AdamW" if device == "cuda" else "SGD",
        "length": architecture.length,
        "batch": batch,
        "N": batch * architecture.length,
        "budget": architecture.budget,
        "command": f"python -m bench.end_to_end --architecture {architecture.name} --way {way} --batch {batch}",
        "seconds": [],
        "status": "ok",
    }
    if importlib.util.find_spec("transformers") is None:
        return row | {"status": "missing", "reason": "transformers is not installed"}
    for turn in range(1, TURNS + 1):
        stage = _stage(architecture, way, batch, turn)
        found = records.get((stage, "trial"))
        if found is None:
            ended = records[stage, "stage"]
            late = ended["status"] in ("cut", "not reached")
            found = {"status": "skipped" if late else "failed", "reason": ended.get("reason", "")}
        if found["status"] == "skipped" and row["seconds"]:
            continue  # a later turn that finds no time takes nothing from an earlier one
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
        allowed, loss = AGREEMENT[row["device"]] * abs(eager), float(row["loss"])
        if not abs(loss - eager) <= allowed:
            reason = f"the first step's loss {loss:.7g} is further than {allowed:.1e} from eager's {eager:.7g}"
            row |= {"status": "failed", "reason": reason}
    return rows


def markdown(rows: list[Row]) -> str:
    """A table of every row, how it came about, and the command of each."""
    eager = {row["architecture"]: row for row in rows if row["way"] == "eager"}
    lines = []
    for row in rows:
        base = eager.get(row["architecture"], {})

        def beside(name: str, row: Row = row, base: Row = base) -> str:
            return fixed(over(row.get(name), base.get(name)))

        cells = [f"{row['architecture']}: {row['batch']} x {row['length']} tokens", row["way"]]
        if row["status"] == "ok":
            cells += [f"{row['tokens_per_s']:.0f}", beside("tokens_per_s"), size(row["peak"]), beside("peak")]
            cells.append(f"{row['loss']:.5f}")
        else:
            cells += [f"{row['status']}: {row['reason']}", *[""] * 4]
        lines.append([*cells, _largest(row), beside("largest_batch")])
    head = ["pair, step", "way", "tokens/s", "/ eager", "peak GB", "/ eager", "first loss", "largest batch", "/ eager"]
    commands = "\n".join(row["command"] for row in rows)
    return f"{table(head, lines)}\n\n{_METHOD}\n\n{_pairs(rows)}\n\n```\n{commands}\n```"


_METHOD = f"""\
A step is the student's forward, the teacher's without gradients, the Self-Evolution loss (lam {LAM}, beta {BETA},
gamma {GAMMA}; with random weights every token is hard), backward and the optimizer. Weights and tokens are the same
for all ways, and their first losses, of a step in which no token is hard, must agree. Each way runs in {TURNS}
processes of its own, in turn with the others', {ROUNDS} timed steps in each; medians. "eager" is plain PyTorch's loss
of `bench/registry.py`, "torch.compile" the same compiled, with the heads in it. Peak: over models and optimizer state,
gradients included. Largest batch: in sequences; what is given was seen to fit, and {RESOLUTION:.0%} more (one sequence
at least) not to. Commands with that batch measure its peak. Below the Llama heads are fewer layers than in the whole
model: there the activations take less of the memory, and the largest batches lie further apart."""


def _pairs(rows: list[Row]) -> str:
    """What each pair is, and what its largest batch may take."""
    lines = []
    for row in {row["architecture"]: row for row in rows}.values():
        limit = "the GPU's memory" if row["budget"] is None else f"{row['budget'] / 1e9:g} GB"
        how = f"{row['dtype']}, {row['optimizer']}; limit of the largest batch: {limit}"
        student, teacher = Model(**row["student"]), Model(**row["teacher"])
        lines.append(f"- {row['architecture']}: student {student}; teacher {teacher}; {how}")
    return "\n".join(lines)


def _largest(row: Row) -> str:
    if row.get("search_status", "ok") != "ok":
        return f"{row['search_status']}: {row['search_reason']}"
    if "largest_batch" not in row:
        return ""
    return ("at least " if row["refused_batch"] is None else "") + str(row["largest_batch"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench end_to_end", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--architecture", nargs="+", choices=list(ARCHITECTURES), help="default: all of the device")
    parser.add_argument("--way", nargs="+", choices=WAYS, help="default: all")
    parser.add_argument("--batch", type=int, help="sequences; then the largest batch is not looked for")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the architecture's, or what there is")
    parser.add_argument("--quick", action="store_true", help="a tiny pair: does it work?")
    parser.add_argument("--trial", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.trial is not None:
        path, code, stage, name, *trial = json.loads(args.trial)
        sys.stdin.readline()
        found = guarded(partial(measure, ARCHITECTURES[name], *trial), "status")
        Lines(Path(path), code).put(stage, "trial", found.pop("status"), **found)
        return 0
    if args.batch is not None and args.batch < 1:
        parser.error(f"--batch must be at least 1, got {args.batch}")
    named = [ARCHITECTURES[name] for name in args.architecture or ()]
    if args.quick and named:
        parser.error("--quick has a pair of its own: leave out --architecture")
    devices = {a.device for a in named if a.device is not None}
    here = "cpu" if environment.unsupported() else "cuda"
    device: str = args.device or (devices.pop() if len(devices) == 1 else here)
    if misplaced := [a.name for a in named if a.device not in (device, None)]:
        parser.error(f"--architecture {misplaced[0]} is not for --device {device}")
    if device == "cuda" and (reason := environment.unsupported()):
        print(f"bench end_to_end: {reason}", file=sys.stderr)
        return 2
    environment.use_threads(1 if args.quick and device == "cpu" else None)
    with tempfile.TemporaryDirectory() as folder:
        lines = Lines(Path(folder, "lines.jsonl"))
        chosen = named or suite(device, args.quick)
        rows = measure_pairs(chosen, tuple(args.way or WAYS), device, lines, batch=args.batch)
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
