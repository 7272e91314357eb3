"""The scripts in examples/ as modules, and examples/train.py on small tasks."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file

from fused_kd.training.data import load_pairs

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"
SMALL = {
    "train_limit": 24, "valid_limit": 4, "vocab": 400, "global_batch": 16, "per_device_train_batch_size": 8,
    "num_train_epochs": 1,
}  # fmt: skip


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "examples" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@functools.cache
def corpus() -> str:
    """A folder with the first pairs of the built-in corpus, which takes a second to read."""
    folder = Path(tempfile.mkdtemp(prefix="fused_kd-pairs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for split in ("train", "valid"):
        pairs = load_pairs("builtin", split, "en-de", limit=40)
        lines = (json.dumps({"en": pair.source, "de": pair.target}) + "\n" for pair in pairs)
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return str(folder)


def command(method: str, output: Path, **changes: object) -> list[str]:
    """The arguments of examples/train.py."""
    files = [CONFIGS / "paper.yaml", CONFIGS / "tiny.yaml", CONFIGS / "methods" / f"{method}.yaml"]
    options = {**SMALL, "data": corpus(), "output": output, **changes}
    return [*map(str, files), *(f"--{key}={value}" for key, value in options.items())]


def train(method: str, output: Path, **changes: object) -> dict:
    return script("train").main(command(method, output, **changes))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum(float((one[name] - other[name]).norm() ** 2) for name in one) ** 0.5
