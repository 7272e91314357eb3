"""How many tokens a chunk holds, and of how many the logit gradients wait for one product."""

from __future__ import annotations

from typing import NamedTuple

# On a GPU where every chunk adds to the weight gradient: below it the read-modify-write shows (10-16 % at 1024 tokens
# by the performance model), above it only memory grows.
DEVICE_CHUNK = 2048
# A CPU's GEMM repacks the weights for every chunk, 5 % of its time at 512 tokens, 12 % at 256.
CPU_CHUNK = 512
CPU_LOGIT_BYTES = 256 << 20


def preferred_chunk(device_type: str, logit_bytes_per_token: int) -> int:
    """Tokens a chunk should hold where no budget says otherwise and each chunk adds to the weight gradient."""
    if device_type != "cpu":
        return DEVICE_CHUNK
    return max(128, min(CPU_CHUNK, CPU_LOGIT_BYTES // max(1, logit_bytes_per_token)))


class BudgetTooSmall(ValueError):
    """Not even the smallest piece of work fits ``memory_budget``; ``minimum`` bytes would."""

    def __init__(self, minimum: int, piece: str, memory_budget: int) -> None:
        super().__init__(
            f"memory_budget must be at least {minimum} bytes for these shapes ({piece}), got {memory_budget}"
        )
        self.minimum = minimum


class Workspace(NamedTuple):
    """Bytes of workspace.

    ``token`` of each token of a chunk (its logits above all), ``grouped`` of each token of a group (its dlogits, where
    they have a buffer of their own), ``accumulator`` of the fp32 weight gradient that chunks or groups add to,
    ``fixed`` of what depends on none of them.
    """

    token: int
    grouped: int = 0
    accumulator: int = 0
    fixed: int = 0

    def of(self, chunk: int, group: int, whole: bool) -> int:
        """Bytes at these sizes; ``whole``: one group holds all tokens, so that nothing is added up."""
        return self.fixed + chunk * self.token + group * self.grouped + (0 if whole else self.accumulator)


class Plan(NamedTuple):
    """``chunk`` tokens of logits at a time; ``workspace`` bytes beyond inputs, results and their gradients; the dlogits
    of ``group`` tokens wait for the gradients' GEMMs. The student's buffer has ``rows`` where they are more than a
    chunk's."""

    chunk: int
    workspace: int
    group: int
    rows: int = 0

    def groups(self, N: int) -> list[list[slice]]:
        """The chunks of N tokens, group by group."""
        return [
            [slice(at, min(at + self.chunk, first + self.group, N)) for at in range(first, last, self.chunk)]
            for first in range(0, N, self.group)
            for last in [min(first + self.group, N)]
        ]


def rounded_rows(rows: int) -> int:
    """Few different numbers, each at most an eighth above ``rows``."""
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


def plan_chunks(
    N: int,
    *,
    workspace: Workspace,
    preferred: int,
    memory_budget: int | None,
    grouped: int = 0,
    rounded: bool = False,
) -> Plan:
    """Choose a chunk and a group for ``N`` tokens.

    Args:
        N: tokens to process.
        workspace: what they take.
        preferred: chunk wanted where memory allows and every chunk is a group.
        memory_budget: bytes that the workspace may take, or None.
        grouped: where positive, groups may hold several chunks of at most so many tokens: all tokens where that takes
            no more than chunks of ``preferred`` tokens and an accumulator would (or ``memory_budget``), so that memory
            does not grow with N; else as many as that allows.
        rounded: where memory allows, leave room in the student's buffer for :func:`rounded_rows` of a chunk.

    Raises:
        BudgetTooSmall: where not even one token fits ``memory_budget``.
    """
    N = max(N, 1)
    added = _added(N, workspace, preferred, memory_budget)
    if not grouped:
        if added is None:
            assert memory_budget is not None
            raise BudgetTooSmall(workspace.of(1, 1, False), "one token at a time", memory_budget)
        rows = rounded_rows(added.chunk)
        needed = workspace.of(rows, rows, False)
        if rounded and (memory_budget is None or needed <= memory_budget):
            return added._replace(workspace=needed, rows=rows)
        return added
    chunk = min(grouped, preferred, N)
    limit = workspace.of(preferred, preferred, False) if memory_budget is None else memory_budget
    whole = (limit - workspace.of(0, N, True)) // workspace.token
    if whole >= chunk:
        return _even(N, chunk, N, workspace)
    group = (limit - workspace.of(chunk, 0, False)) // workspace.grouped
    if group > chunk:
        return _even(N, chunk, group, workspace)
    if added is not None:
        return added
    assert memory_budget is not None
    if whole < 1:
        least = min(workspace.of(1, 1, False), workspace.of(1, N, True))
        raise BudgetTooSmall(least, "one token at a time", memory_budget)
    return _even(N, whole, N, workspace)


def _added(N: int, workspace: Workspace, preferred: int, memory_budget: int | None) -> Plan | None:
    """Every chunk a group; None where no token fits."""
    chunk = min(preferred, N)
    if memory_budget is not None:
        chunk = min(chunk, (memory_budget - workspace.of(0, 0, False)) // (workspace.token + workspace.grouped))
    if chunk < 1:
        return None
    chunk = _equal(N, chunk)
    return Plan(chunk, workspace.of(chunk, chunk, False), chunk)


def _even(N: int, chunk: int, group: int, workspace: Workspace) -> Plan:
    group = _equal(N, group)
    chunk = _equal(group, chunk)
    return Plan(chunk, workspace.of(chunk, group, group >= N), group)


def _equal(size: int, most: int) -> int:
    """The size of equal pieces of at most ``most``: a short last one wastes a full pass over the weights."""
    return -(-size // -(-size // min(most, size)))
