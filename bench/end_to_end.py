"""One training step of real architectures, with and without fused_kd: tokens a second, and the largest batch that fits.

python -m bench.end_to_end                                           # every pair of this device, every way
python -m bench.end_to_end --architecture X --way Y --batch Z        # one row again
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

from . import environment
from .architectures import ARCHITECTURES, Architecture, suite
from .inputs import BETA, LAM
from .largest import Search
from .progress import progress
from .runner import LEAST_SECONDS, Deadline
from .store import json_safe
from .tables import fixed, over, size, table
from .trial import GAMMA, WAYS, Trial, dtype_on, run_trial

TRIAL_SECONDS = 300.0
# Processes of each way, and timed steps in each.
TURNS, ROUNDS = 2, 2
# A largest batch is known to this share of itself.
RESOLUTION = 1 / 8
# Of the first step's loss, relative: what rounding may cost in fp32, and in bf16, whose logits eager rounds.
AGREEMENT = {"cpu": 1e-5, "cuda": 1e-3}


def measure_end_to_end(
    device: str,
    quick: bool = False,
    tick: Callable[[str], None] = lambda what: None,
    deadline: Deadline | None = None,
    *,
    architectures: list[Architecture] | None = None,
    ways: tuple[str, ...] = WAYS,
    batch: int | None = None,
) -> list[dict[str, Any]]:
    """A row for each way of each architecture (None: all of the device), JSON-safe.

    The ways' processes take turns. ``batch``: that many sequences, and no search for the largest. What fails or finds
    no time says so in its row. ``tick`` is called :func:`pieces` times.
    """
    deadline = deadline or Deadline(None)
    rows: list[dict[str, Any]] = []
    for architecture in suite(device, quick) if architectures is None else architectures:
        here = {way: _row(architecture, way, batch or architecture.batch, device) for way in ways}
        for turn in range(TURNS):
            for way, row in here.items():
                tick(f"{architecture.name}, {way}, turn {turn + 1}")
                if row["status"] == "ok":
                    trial = _trial(row, architecture, row["batch"], ROUNDS, memory=turn == 0)
                    _add(row, _run(trial, deadline))
        _compare(list(here.values()))
        for way, row in here.items():
            tick(f"{architecture.name}, {way}, largest batch")
            if batch is None and row["status"] in ("ok", "out of memory"):
                row |= _largest(row, architecture, deadline)
        rows += here.values()
    return [json_safe(row) for row in rows]


def pieces(architectures: int, ways: int) -> int:
    """How many pieces of work :func:`measure_end_to_end` makes of so many architectures and ways."""
    return architectures * ways * (TURNS + 1)


def _row(architecture: Architecture, way: str, batch: int, device: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "architecture": architecture.name,
        **architecture.about(),
        "way": way,
        "device": device,
        "dtype": str(dtype_on(device)).removeprefix("torch."),
        "optimizer": "AdamW" if device == "cuda" else "SGD",
        "length": architecture.length,
        "batch": batch,
        "N": batch * architecture.length,
        "budget": architecture.budget,
        "command": f"python -m bench.end_to_end --architecture {architecture.name} --way {way} --batch {batch}",
        "seconds": [],
        "peak": None,
        "status": "ok",
    }
    if importlib.util.find_spec("transformers") is None:
        row |= {"status": "missing", "reason": "transformers is not installed"}
    return row


def _trial(row: dict[str, Any], architecture: Architecture, batch: int, rounds: int, memory: bool) -> Trial:
    return Trial(architecture, row["way"], batch, row["device"], rounds, memory, torch.get_num_threads())


def _run(trial: Trial, deadline: Deadline) -> dict[str, Any]:
    if deadline.left() < LEAST_SECONDS:
        return {"status": "skipped", "reason": "no time left in this run"}
    return run_trial(trial, min(TRIAL_SECONDS, deadline.left()))


def _add(row: dict[str, Any], found: dict[str, Any]) -> None:
    """Another turn's findings. A later turn that finds no time takes nothing from an earlier one."""
    if row["seconds"] and found["status"] == "skipped":
        return
    row |= {name: found[name] for name in ("status", "reason", "peak", "capacity") if name in found}
    row.setdefault("loss", found.get("loss"))
    row["seconds"] += found.get("seconds", [])
    if row["seconds"]:
        row["tokens_per_s"] = row["N"] / statistics.median(row["seconds"])


def _compare(rows: list[dict[str, Any]]) -> None:
    """The same step: the first losses, on the same weights and tokens, agree with eager's."""
    eager = next((row["loss"] for row in rows if row["way"] == "eager" and row["status"] == "ok"), None)
    for row in rows:
        row["loss_eager"] = eager
        if eager is None or row["status"] != "ok":
            continue
        allowed = AGREEMENT[row["device"]] * abs(eager)
        if not abs(row["loss"] - eager) <= allowed:
            reason = f"the first step's loss {row['loss']:.7g} is further than {allowed:.1e} from eager's {eager:.7g}"
            row |= {"status": "failed", "reason": reason}


def _largest(row: dict[str, Any], architecture: Architecture, deadline: Deadline) -> dict[str, Any]:
    """Fields of the row: the largest batch that fits, the smallest seen that does not, every probe on the way."""
    budget = architecture.budget
    if row["status"] == "ok" and row["peak"] is None:
        return {"search_status": "missing", "search_reason": "peak resident memory is measured on Linux only"}
    search = Search(budget or row.get("capacity"), architecture.batch, architecture.most, RESOLUTION)
    probes: list[dict[str, Any]] = []
    found: dict[str, Any] = {"search_status": "ok", "probes": probes}

    def tell(batch: int, result: dict[str, Any]) -> None:
        peak = result.get("peak")
        fits = result["status"] == "ok" and (budget is None or (peak is not None and peak <= budget))
        search.tell(batch, peak, fits)
        probes.append({"batch": batch, "peak": peak, "fits": fits})

    tell(row["batch"], row)
    while (batch := search.next()) is not None:
        result = _run(_trial(row, architecture, batch, 0, memory=True), deadline)
        if result["status"] not in ("ok", "out of memory"):
            found |= {"search_status": result["status"], "search_reason": result["reason"]}
            break
        tell(batch, result)
    return found | {"largest_batch": search.fits, "refused_batch": search.refused}


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of every row, how it came about, and the command of each."""
    eager = {row["architecture"]: row for row in rows if row["way"] == "eager"}
    lines = []
    for row in rows:
        base = eager.get(row["architecture"], {})
        cells = [f"{row['architecture']}: {row['batch']} x {row['length']} tokens", row["way"]]
        if row["status"] == "ok":
            speed, peak = row["tokens_per_s"], row["peak"]
            cells += [f"{speed:.0f}", _ratio(speed, base.get("tokens_per_s")), size(peak)]
            cells += [_ratio(peak, base.get("peak")), f"{row['loss']:.5f}"]
        else:
            cells += [f"{row['status']}: {row['reason']}", *[""] * 4]
        lines.append([*cells, _batch(row), _ratio(row.get("largest_batch"), base.get("largest_batch"))])
    head = [
        "pair, step", "way", "tokens/s", "/ eager", "peak GB", "/ eager", "first loss", "largest batch", "/ eager",
    ]  # fmt: skip
    commands = "\n".join(row["command"] for row in rows)
    return f"{table(head, lines)}\n\n{_METHOD}\n\n{_pairs(rows)}\n\n```\n{commands}\n```"


_METHOD = f"""\
A step is the student's forward, the teacher's without gradients, the Self-Evolution loss (lam {LAM}, beta {BETA},
gamma {GAMMA}; with random weights every token is hard), backward and the optimizer. Weights and tokens are the same
for all ways, and their first losses, of a step in which no token is hard, must agree. Each way runs in {TURNS}
processes of its own, in turn with the others', {ROUNDS} timed steps in each; medians. "eager" is the loss of
`bench/eager.py`, "torch.compile" the same compiled, with the heads in it. Peak: over models and optimizer state,
gradients included. Largest batch: in sequences, each trial in a fresh process; what is given was seen to fit, and
{RESOLUTION:.0%} more (one sequence at least) not to. Commands with that batch measure its peak. Below the Llama heads
are fewer layers than in the whole model: there the activations take less of the memory, and the largest batches lie
further apart."""


def _pairs(rows: list[dict[str, Any]]) -> str:
    """What each pair is, and what its largest batch may take."""
    lines = []
    for row in {row["architecture"]: row for row in rows}.values():
        student, teacher = _model(row["student"]), _model(row["teacher"])
        limit = "the GPU's memory" if row["budget"] is None else f"{row['budget'] / 1e9:g} GB"
        how = f"{row['dtype']}, {row['optimizer']}; limit of the largest batch: {limit}"
        lines.append(f"- {row['architecture']}: student {student}; teacher {teacher}; {how}")
    return "\n".join(lines)


def _model(of: dict[str, Any]) -> str:
    body = f"{of['layers']} layers of {of['hidden']} and {of['intermediate']}"
    return f"{of['family']}, {body}, vocabulary {of['vocab']}{', tied' if of['tied'] else ''}"


def _batch(row: dict[str, Any]) -> str:
    if "search_status" not in row:
        return ""
    why = "" if row["search_status"] == "ok" else f"{row['search_status']}: {row['search_reason']}"
    if "largest_batch" not in row:
        return why
    if why or row["refused_batch"] is None:
        return f"at least {row['largest_batch']}" + (f" ({why})" if why else "")
    return str(row["largest_batch"])


def _ratio(value: float | None, base: float | None) -> str:
    return fixed(over(value, base))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.end_to_end", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--architecture", nargs="+", choices=list(ARCHITECTURES), help="default: all of the device")
    parser.add_argument("--way", nargs="+", choices=WAYS, help="default: all")
    parser.add_argument("--batch", type=int, help="sequences; then the largest batch is not looked for")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the architecture's, or what there is")
    parser.add_argument("--quick", action="store_true", help="a tiny pair: does it work?")
    args = parser.parse_args(arguments)
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
        print(f"bench.end_to_end: {reason}", file=sys.stderr)
        return 2
    environment.use_threads(1 if args.quick and device == "cpu" else None)
    chosen = named or suite(device, args.quick)
    ways = tuple(args.way or WAYS)
    with progress(f"end to end, {device}", pieces(len(chosen), len(ways))) as tick:
        rows = measure_end_to_end(device, args.quick, tick, architectures=chosen, ways=ways, batch=args.batch)
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
