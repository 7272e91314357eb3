"""One implementation at one shape, in a process of its own: ``python -m bench.worker CASE ROWS PARENT``.

CASE is a :class:`Case` as JSON; every finished row is appended to the file ROWS as a line of JSON. PARENT is
the runner's process id."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_kd.rows import choose_backend

from .accuracy import relative_errors
from .bandwidth import measure_row
from .floor import Floor
from .implementations import IMPLEMENTATIONS, Implementation, preferred_chunk
from .inputs import Inputs, make_inputs
from .measure import Timer, interleaved, peak_memory
from .shapes import Shape
from .store import json_safe
from .tally import measured_flops, row_scratch_bytes

ROW_PREFIX = "row: "


@dataclass(frozen=True)
class Case:
    """``implementation`` is a key of IMPLEMENTATIONS, or ``row: <backend>`` for a row implementation alone.

    ``variants`` lists (tokens, chunk): which tokens are hard, and fused_kd's preferred chunk (None: the
    planner's; for a row alone, the rows of its chunk)."""

    shape: Shape
    implementation: str
    variants: tuple[tuple[str, int | None], ...]
    device: str
    dtype: str
    rounds: int
    warmup: int
    error_tokens: int

    def missing(self) -> str | None:
        """Why this machine cannot run it, or None."""
        if self.implementation.startswith(ROW_PREFIX):
            try:
                choose_backend(self.implementation.removeprefix(ROW_PREFIX), torch.device(self.device))
            except ValueError as error:
                return str(error)
            return None
        known = IMPLEMENTATIONS.get(self.implementation)
        return known.missing(self.device) if known else None

    def keys(self) -> list[tuple]:
        return [(self.shape.name, self.implementation, *variant) for variant in self.variants]

    def row(self, tokens: str, chunk: int | None, **fields: Any) -> dict[str, Any]:
        known = IMPLEMENTATIONS.get(self.implementation)
        return {
            "shape": self.shape._asdict(),
            "implementation": self.implementation,
            "tokens": tokens,
            "chunk": chunk,
            "device": self.device,
            "dtype": self.dtype,
            "objective": known.objective if known else None,
            **fields,
        }

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"shape": list(self.shape)})

    @staticmethod
    def from_json(text: str) -> Case:
        fields = json.loads(text)
        fields["shape"] = Shape(*fields["shape"])
        fields["variants"] = tuple((tokens, chunk) for tokens, chunk in fields["variants"])
        return Case(**fields)


def rows(case: Case) -> Iterator[dict[str, Any]]:
    """One row per variant; what cannot be measured says why instead of raising."""
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    if case.implementation.startswith(ROW_PREFIX):
        backend = case.implementation.removeprefix(ROW_PREFIX)
        chunk = case.variants[0][1] or case.shape.N
        kinds = [tokens for tokens, _ in case.variants]
        for found in measure_row(backend, chunk, case.shape.V, device, dtype, kinds, case.rounds):
            yield case.row(found.pop("tokens"), case.variants[0][1], status="ok", **found)
        return
    implementation = IMPLEMENTATIONS[case.implementation]
    inputs = implementation.prepare(make_inputs(case.shape, device, dtype))
    for tokens, rows_per_chunk in case.variants:
        gamma = inputs.gamma(tokens)
        measured = _guarded(partial(_measure, case, implementation, inputs, gamma, rows_per_chunk), "status")
        inputs.drop_gradients()
        about = {"gamma": gamma, "hard_fraction": inputs.hard_fraction(gamma), "top_k": inputs.top_k is not None}
        yield case.row(tokens, rows_per_chunk, **about, **measured)


def _measure(
    case: Case, implementation: Implementation, inputs: Inputs, gamma: float, chunk: int | None
) -> dict[str, Any]:
    with preferred_chunk(chunk):
        found = _speed_and_memory(case, implementation, inputs, gamma)
        inputs.drop_gradients()
        found |= _guarded(partial(_work, case, implementation, inputs, gamma), "work_status")
        inputs.drop_gradients()
        return found | _guarded(lambda: {"error": _errors(case, implementation, inputs, gamma)}, "error_status")


def _speed_and_memory(case: Case, implementation: Implementation, inputs: Inputs, gamma: float) -> dict[str, Any]:
    device = inputs.labels.device
    step = implementation.build(inputs, gamma)

    def call(labels: Tensor = inputs.labels) -> Tensor:
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

    calls: dict[str, Callable[[], object]] = {"step": call}
    if implementation.drops_ignored and device.type == "cpu":
        half = inputs.half_ignored()
        calls["half_ignored"] = lambda: call(half)
    return found | _time(case, calls, inputs)


def _time(case: Case, calls: dict[str, Callable[[], object]], inputs: Inputs) -> dict[str, Any]:
    timer = Timer(inputs.labels.device)

    def sample(what: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        interleaved(what, 1, timer, inputs.drop_gradients)
        return interleaved(what, case.rounds, timer, inputs.drop_gradients)

    found = _guarded(lambda: {"seconds": sample({"floor": Floor(inputs), **calls}), "interleaved": True}, "status")
    if "seconds" in found:
        return found
    # Beside the floor's buffers it did not fit; alone it may.
    found = {"interleaved": False, "seconds": sample(calls)}
    inputs.drop_gradients()
    alone = _guarded(lambda: sample({"floor": Floor(inputs)}), "floor_status")
    if "floor" in alone:
        found["seconds"] |= alone
    else:
        found |= {"floor_status": alone["floor_status"], "floor_reason": alone["reason"]}
    return found


def _work(case: Case, implementation: Implementation, inputs: Inputs, gamma: float) -> dict[str, Any]:
    """Counted from the algorithm, and tallied in one more call."""
    found: dict[str, Any] = {"counts": implementation.work(case.shape, inputs, inputs.hard_fraction(gamma))}
    step = implementation.build(inputs, gamma)

    def call() -> None:
        inputs.drop_gradients()
        step(inputs.labels).backward()

    if implementation.compiles:  # a counter would switch the compiled graph off
        return found
    return found | {"measured_flops": measured_flops(call), "row_scratch_bytes": row_scratch_bytes(call)}


def _errors(case: Case, implementation: Implementation, inputs: Inputs, gamma: float) -> dict[str, float | int]:
    n = min(case.error_tokens, case.shape.N)
    part = inputs.first(n)
    loss = implementation.build(part, gamma)(part.labels)
    loss.backward()
    assert part.hidden_s.grad is not None and part.weight_s.grad is not None
    errors = relative_errors(
        part,
        lambda z, teacher, y: implementation.truth(z, teacher, y, gamma),
        loss.detach(),
        part.hidden_s.grad,
        part.weight_s.grad,
    )
    return {**errors, "tokens": n}


def _guarded(call: Callable[[], dict[str, Any]], status: str) -> dict[str, Any]:
    """``call()``'s dict; where it raises, what happened under ``status`` and why under ``reason``."""
    try:
        return call()
    except Exception as error:
        text = str(error).strip()
        out_of_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text
        line = next((line.strip() for line in text.splitlines() if line.strip()), "")
        found = {
            status: "out of memory" if out_of_memory else "failed",
            "reason": f"{type(error).__name__}: {line}"[:300],
        }
    # Outside of the handler: there the traceback would keep every tensor alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def _die_with(parent: int) -> None:
    """Linux: a runner that is killed leaves no worker behind, holding memory and cores."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the runner is gone")


def main() -> None:
    _die_with(int(sys.argv[3]))
    case, path = Case.from_json(sys.argv[1]), Path(sys.argv[2])
    with path.open("a") as file:
        for row in rows(case):
            file.write(json.dumps(json_safe(row), allow_nan=False) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
