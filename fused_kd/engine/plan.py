"""How many tokens a chunk holds."""

from __future__ import annotations

from typing import NamedTuple

# Smallest chunks that keep the GEMMs near their peak: below them the read-modify-write of the fp32 weight gradient
# shows (10-16 % at 1024 tokens on a GPU), above them only memory grows.
DEVICE_CHUNK = 2048
# A CPU's GEMM repacks the weights for every chunk, 5 % of its time at 512 tokens, 12 % at 256.
CPU_CHUNK = 512
CPU_LOGIT_BYTES = 256 << 20


def preferred_chunk(device_type: str, logit_bytes_per_token: int) -> int:
    """Tokens a chunk should hold where no budget says otherwise."""
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


class Plan(NamedTuple):
    """``chunk`` tokens at a time; ``workspace`` bytes beyond inputs, results and their gradients."""

    chunk: int
    workspace: int


def plan_chunks(N: int, *, bytes_per_token: int, fixed_bytes: int, preferred: int, memory_budget: int | None) -> Plan:
    """Choose a chunk for ``N`` tokens.

    Args:
        N: tokens to process.
        bytes_per_token: workspace that grows with the chunk (its logits above all).
        fixed_bytes: workspace that does not (fp32 accumulators, upcast slabs).
        preferred: chunk wanted where memory allows.
        memory_budget: bytes that the workspace may take, or None.

    Raises:
        BudgetTooSmall: where not even one token fits ``memory_budget``.
    """
    chunk = min(preferred, max(N, 1))
    if memory_budget is not None:
        affordable = (memory_budget - fixed_bytes) // bytes_per_token
        if affordable < 1:
            raise BudgetTooSmall(fixed_bytes + bytes_per_token, "one token at a time", memory_budget)
        chunk = min(chunk, affordable)
    # Equal chunks: a short last one wastes a full pass over the weights.
    count = -(-max(N, 1) // chunk)
    chunk = -(-max(N, 1) // count)
    return Plan(chunk, fixed_bytes + chunk * bytes_per_token)
