"""What ``python -m bench training`` measures: pairs of models, how they are trained, and in which order."""

from __future__ import annotations

from typing import NamedTuple

from .end_to_end import Model
from .registry import KL, SELF_EVOLUTION, SFT


class Setting(NamedTuple):
    """Student and teacher, how they are trained, and what a card may hold.

    ``weights`` "bf16": the student's weights, gradients and optimizer state are bf16; "fp32": they are fp32, under
    autocast to bf16. The teacher is bf16 always. All ways are timed with ``batch`` sequences of ``length`` tokens.
    ``limit`` bytes of allocated memory, models and optimizer state among them, are what a largest batch may take.
    """

    name: str
    student: Model
    teacher: Model
    length: int
    batch: int
    limit: float
    weights: str = "bf16"
    checkpointing: bool = False


QWEN = Setting(
    "Qwen2.5",
    Model("qwen2", 151936, 896, 24, 4864, 14, 2, tied=True), Model("qwen2", 151936, 1536, 28, 8960, 12, 2, tied=True),
    length=2048, batch=4, limit=80e9,
)  # fmt: skip
SMOLLM2 = Setting(
    "SmolLM2",
    Model("llama", 49152, 576, 30, 1536, 9, 3, tied=True), Model("llama", 49152, 2048, 24, 8192, 32, 32, tied=True),
    length=2048, batch=4, limit=24e9,
)  # fmt: skip
TINY = Setting(
    "tiny", Model("qwen2", 1000, 32, 2, 64, 2, 1, tied=True), Model("qwen2", 1000, 48, 2, 64, 2, 1, tied=True),
    length=16, batch=2, limit=1e12,  # of the whole process there
)  # fmt: skip
SETTINGS = {
    setting.name: setting
    for setting in (
        QWEN,
        SMOLLM2,
        QWEN._replace(name="Qwen2.5, fp32 weights", weights="fp32"),
        QWEN._replace(name="Qwen2.5, checkpointing", checkpointing=True, limit=24e9, batch=1),
    )
}
REHEARSED = {
    name: TINY._replace(name=name, weights=setting.weights, checkpointing=setting.checkpointing)
    for name, setting in SETTINGS.items()
}


class Part(NamedTuple):
    """Rows that are measured one after the other: a setting, an objective, a kind ("step" or "largest"), the ways."""

    setting: str
    group: str
    kind: str
    ways: tuple[str, ...]


MAIN, COMPILED = ("fused_kd", "eager", "Liger fused"), ("torch.compile", "Liger chunked")
PLAN = (
    Part("Qwen2.5", KL, "step", MAIN),
    Part("Qwen2.5", KL, "largest", MAIN),
    Part("Qwen2.5", SFT, "step", MAIN),
    Part("SmolLM2", KL, "step", MAIN),
    Part("SmolLM2", KL, "largest", MAIN),
    Part("SmolLM2", SFT, "step", MAIN),
    Part("Qwen2.5", KL, "step", COMPILED),  # what is compiled takes long to begin
    Part("Qwen2.5", KL, "largest", COMPILED),
    Part("Qwen2.5, checkpointing", KL, "step", (*MAIN, "torch.compile")),
    Part("Qwen2.5, checkpointing", KL, "largest", (*MAIN, "torch.compile")),
    Part("Qwen2.5, fp32 weights", KL, "step", (*MAIN, "torch.compile")),
    Part("Qwen2.5, fp32 weights", SELF_EVOLUTION, "step", ("fused_kd", "eager", "torch.compile")),
    Part("SmolLM2", KL, "step", COMPILED),
    Part("SmolLM2", KL, "largest", COMPILED),
)
"""The most telling first: a run that is cut has a table of what came before."""
