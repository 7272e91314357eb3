"""One implementation at one shape: every number of its rows. Also the process that measures cases for ``bench run``."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .measure import Calls, Floor, Flush, interleaved, peak_memory, relative_errors
from .problems import Inputs, Shape, Variant, make_inputs
from .registry import IMPLEMENTATIONS, Implementation
from .session import Lines

MIN_ROUNDS = 3


@dataclass(frozen=True)
class Case:
    """``implementation`` is a key of IMPLEMENTATIONS.

    As many ``rounds`` as fit ``seconds``, but three. Errors are those of the first ``error_tokens`` tokens.
    ``purpose`` says what the row is for: "table", or the curve ("N", "V", "valid") it is a point of.
    """

    shape: Shape
    implementation: str
    variants: tuple[Variant, ...]
    device: str
    dtype: str
    rounds: int
    warmup: int
    error_tokens: int
    seconds: float = 60.0
    purpose: str = "table"

    def missing(self) -> str | None:
        """Why this machine cannot run it, or None."""
        return IMPLEMENTATIONS[self.implementation].missing(self.device)

    def row(self, variant: Variant, **fields: Any) -> dict[str, Any]:
        known = IMPLEMENTATIONS[self.implementation]
        return {
            "shape": self.shape._asdict(),
            "implementation": self.implementation,
            **variant._asdict(),
            "purpose": self.purpose,
            "device": self.device,
            "dtype": self.dtype,
            "objective": known.objective,
            "group": known.group,
            **fields,
        }

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Case:
        fields = json.loads(text)
        variants = tuple(Variant(*variant) for variant in fields["variants"])
        return Case(**fields | {"shape": Shape(*fields["shape"]), "variants": variants})


def rows(case: Case) -> Iterator[dict[str, Any]]:
    """One row per variant; what cannot be measured says why instead of raising."""
    inputs: Inputs | None = None
    teacher = ""
    for variant in case.variants:
        found, inputs = row(case, variant, inputs if variant.teacher == teacher else None)
        teacher = variant.teacher
        yield found


def row(case: Case, variant: Variant, inputs: Inputs | None = None) -> tuple[dict[str, Any], Inputs | None]:
    """The row of one variant, and the inputs, to be given back for the next one with the same teacher."""
    found = guarded(partial(_row, case, variant, inputs), "status")
    if "row" in found:
        return found["row"], found["inputs"]
    return case.row(variant, **found), None


def _row(case: Case, variant: Variant, inputs: Inputs | None) -> dict[str, Any]:
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    implementation = IMPLEMENTATIONS[case.implementation]
    if inputs is None:
        inputs = implementation.prepare(make_inputs(case.shape, device, dtype, teacher=variant.teacher))
    gamma = inputs.gamma(variant.tokens)
    measured = guarded(partial(_measure, case, implementation, inputs, gamma, variant), "status")
    inputs.drop_gradients()
    about = {"gamma": gamma, "hard_fraction": inputs.hard_fraction(gamma), "top_k": inputs.top_k is not None}
    return {"row": case.row(variant, **about, **measured), "inputs": inputs}


def _measure(
    case: Case, implementation: Implementation, inputs: Inputs, gamma: float, variant: Variant
) -> dict[str, Any]:
    found = _speed_and_memory(case, implementation, inputs, gamma, variant)
    inputs.drop_gradients()
    tokens = round(variant.valid * case.shape.N)
    part = inputs if tokens == case.shape.N else inputs.first(tokens)
    shape, hard = case.shape._replace(N=tokens), inputs.hard_fraction(gamma)
    found |= guarded(lambda: {"counts": implementation.work(shape, part, hard)}, "work_status")
    if case.error_tokens == 0:
        return found
    return found | guarded(lambda: {"error": _errors(case, implementation, inputs, gamma)}, "error_status")


def _labels(inputs: Inputs, implementation: Implementation, valid: float) -> Tensor:
    """On the host where that lets an implementation drop what is ignored."""
    if valid == 1.0:
        return inputs.labels
    labels = inputs.ignoring(valid)
    return labels.cpu() if implementation.drops_ignored else labels


def _speed_and_memory(
    case: Case, implementation: Implementation, inputs: Inputs, gamma: float, variant: Variant
) -> dict[str, Any]:
    device = inputs.labels.device
    step = implementation.build(inputs, gamma)
    labels = _labels(inputs, implementation, variant.valid)

    def call(labels: Tensor = labels) -> Tensor:
        loss = step(labels)
        loss.backward()
        return loss

    for _ in range(case.warmup):
        inputs.drop_gradients()
        loss = call()
    found: dict[str, Any] = {"status": "ok", "loss": float(loss.detach())}
    del loss

    gradients = sum(x.grad.numel() * x.grad.element_size() for x in inputs[:2] if x.grad is not None)
    memory = peak_memory(call, inputs.drop_gradients, gradients, device)
    if memory is not None:
        found["memory"] = memory._asdict() | {
            "over_inputs": memory.over_inputs,
            "over_inputs_and_gradients": memory.over_inputs_and_gradients,
        }

    calls: Calls = {"step": call}
    if case.purpose == "table" and variant == Variant():
        calls["forward"] = torch.no_grad()(lambda: step(labels))
        calls["forward"]()  # torch.compile makes a graph of its own for it
        if implementation.drops_ignored:
            half = _labels(inputs, implementation, 0.5)
            calls["half_ignored"] = lambda: call(half)
    tokens = round(variant.valid * case.shape.N)
    return found | _time(case, calls, inputs, partial(Floor, inputs, implementation.teacher, tokens))


def _time(case: Case, calls: Calls, inputs: Inputs, make_floor: Callable[[], Floor]) -> dict[str, Any]:
    flush = Flush(inputs.labels.device)

    def before() -> None:
        inputs.drop_gradients()
        flush()

    def sample(what: Calls, warm: Calls) -> dict[str, list[float]]:
        """The step has run before; the floor runs once here, and both say how long a round takes."""
        tried = interleaved(warm | {"step": what["step"]}, 1, before)
        each = sum(s for samples in tried.values() for s in samples) / len(tried)
        rounds = min(case.rounds, max(MIN_ROUNDS, int(case.seconds / max(each * len(what), 1e-9))))
        return interleaved(what, rounds, before)

    def with_floor() -> dict[str, Any]:
        floor = make_floor()
        first: Calls = {"forward_floor": floor.forward} if "forward" in calls else {}
        others = {name: call for name, call in calls.items() if name != "step"}
        # What a step is divided by comes just before it.
        turns = first | others | {"floor": floor, "step": calls["step"]}
        return {"seconds": sample(turns, {"floor": floor}), "interleaved": True}

    found = guarded(with_floor, "status")
    if "seconds" in found:
        return found
    # Beside the floor's buffers it did not fit; alone it may.
    found = {"interleaved": False, "seconds": sample(calls, {})}
    inputs.drop_gradients()
    alone = guarded(lambda: interleaved({"floor": make_floor()}, case.rounds, before), "floor_status")
    if "floor" in alone:
        found["seconds"] |= alone
    else:
        found |= {"floor_status": alone["floor_status"], "floor_reason": alone["reason"]}
    return found


def _errors(case: Case, implementation: Implementation, inputs: Inputs, gamma: float) -> dict[str, float | int]:
    n = min(case.error_tokens, case.shape.N)
    part = inputs.first(n)
    loss = implementation.build(part, gamma)(part.labels)
    loss.backward()
    assert part.hidden_s.grad is not None and part.weight_s.grad is not None
    truth = partial(implementation.truth, gamma=gamma)
    return {**relative_errors(part, truth, loss.detach(), part.hidden_s.grad, part.weight_s.grad), "tokens": n}


def guarded(call: Callable[[], dict[str, Any]], status: str) -> dict[str, Any]:
    """``call()``'s dict; where it raises, what happened under ``status`` and why under ``reason``."""
    try:
        return call()
    except Exception as error:
        text = str(error).strip()
        out_of_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text
        line = next((line.strip() for line in text.splitlines() if line.strip()), "")
        reason = f"{type(error).__name__}: {line}"[:300]
        found = {status: "out of memory" if out_of_memory else "failed", "reason": reason}
    # Outside of the handler: there the traceback would keep every tensor alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def main(arguments: list[str]) -> int:
    """``python -m bench.worker LINES CODE STAGE CASE...``: rows of the cases into a file of lines."""
    path, code, stage, *cases = arguments
    sys.stdin.readline()
    lines = Lines(Path(path), code)
    for case in map(Case.from_json, cases):
        for found in rows(case):
            lines.put(stage, f"{case.shape.name} {Variant.of(found)}", found.pop("status"), **found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
