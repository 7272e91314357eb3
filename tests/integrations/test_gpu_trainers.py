"""The losses of a few steps on a GPU beside those on the CPU, a case a form of teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import fused_kd as fk  # noqa: E402
from fused_kd.integrations.own import OwnTeacher  # noqa: E402
from fused_kd.training.cache import write_cache  # noqa: E402
from fused_kd.training.collate import Collator, PackingCollator  # noqa: E402
from fused_kd.training.contexts import with_context  # noqa: E402
from fused_kd.training.trainer import KDTrainer  # noqa: E402
from tests.training.caching import Words  # noqa: E402
from tests.training.tiny import VOCAB, rows, tiny  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
WORDS = Words(VOCAB)


def teacher() -> Any:
    return tiny(24, 1)


def own(**options: Any) -> Callable[[], Any]:
    return lambda: OwnTeacher(**options)


def mixed() -> Any:
    return [(0.3, teacher()), (0.7, tiny(16, 2))]


def by_row() -> Any:
    return [teacher(), tiny(16, 2)]


def adapted() -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0)
    return peft.get_peft_model(tiny(16, 7), config)


def with_ids() -> Any:
    return [{**row, "teacher_id": i % 2} for i, row in enumerate(rows(32))]


def with_words() -> Any:
    return list(with_context(rows(32), None, lambda row: [5, 6, 7]))


BF16 = 3e-2
CASES: dict[str, dict[str, Any]] = {
    "model": {},
    "bf16 autocast": {"bf16": True, "limit": BF16},
    "bf16 teacher": {"teacher": lambda: teacher().bfloat16(), "limit": BF16},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "packing": {"data_collator": PackingCollator()},
    "statistics": {"statistics": ("kl", "entropy_t", "top_1", "overlap")},
    "sum": {"objective": "0.5*sft+0.5*generalized_jsd"},
    "ranked": {"objective": "self_evolution_top_k"},
    "sequences": {"average": "sequences"},
    "student's lists": {"lists": fk.Lists(8, chosen_by="student")},
    "temperature": {"temperature": 2.0},
    "mixture": {"teacher": mixed},
    "each row's own": {"teacher": by_row, "data": with_ids},
    "average": {"teacher": own(decay=0.9)},
    "average of bf16": {"teacher": own(decay=0.9), "student": lambda: tiny(16, 7).bfloat16(), "limit": BF16},
    "adapters off": {"teacher": own(adapters=False), "student": adapted},
    "context": {"data": with_words},
    **{f"hidden states in {dtype}": {"cache": {"keep": "hidden", "dtype": dtype}} for dtype in ("fp32", "bf16")},
    **{f"hidden states in {dtype}": {"cache": {"keep": "hidden", "dtype": dtype}} for dtype in ("fp8", "int8")},
    "a worker reads": {"cache": {"keep": "hidden", "dtype": "int8"}, "dataloader_num_workers": 1},
    "lists": {"cache": {"k": 8}},
}


def losses(folder: Path, case: dict[str, Any], use_cpu: bool) -> list[float]:
    """Of four steps, and of an evaluation where rows need no teacher's columns."""
    case = {"teacher": teacher, "student": lambda: tiny(16, 7), "data": lambda: rows(32), **case}
    given, data = case.pop("teacher"), case.pop("data")()
    named = ("objective", "statistics", "average", "lists", "temperature", "data_collator")
    options = {name: case.pop(name) for name in named if name in case}
    student, cached = case.pop("student")(), case.pop("cache", None)
    if cached is not None:
        held = write_cache(folder / "cache", teacher(), WORDS, data, template="tiny", progress=False, **cached)
        given, data = (lambda: held), held.check(tokenizer=WORDS, rows=data, template="tiny")
    args = transformers.TrainingArguments(
        **{
            "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "optim": "sgd",
            "gradient_accumulation_steps": 2, "learning_rate": 0.05, "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
            "use_cpu": use_cpu, "seed": 3, **case,
        }
    )  # fmt: skip
    options = {"objective": "self_evolution", "data_collator": Collator(0), **options}
    plain = isinstance(data, list) and not {"teacher_id", "teacher_input_ids"} & data[0].keys()
    evaluated = rows(8, 9) if plain else None
    trainer = KDTrainer(student, given(), args=args, train_dataset=data, eval_dataset=evaluated, **options)
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return found + ([trainer.evaluate()["eval_loss"]] if trainer.eval_dataset is not None else [])


@pytest.mark.parametrize("name", CASES)
def test_a_gpu_trains_as_the_cpu_does(name: str, tmp_path: Path) -> None:
    case = dict(CASES[name])
    limit = case.pop("limit", 1e-5)
    expected, found = (losses(tmp_path / str(use_cpu), case, use_cpu) for use_cpu in (True, False))
    assert len(found) == len(expected) >= 4
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    assert worst <= limit, f"relative difference of losses {worst:.1e}"
