"""What a trainer says of arguments, models and rows that it cannot use."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fused_kd.training.collate import Collator, PackingCollator  # noqa: E402
from fused_kd.training.models import train_tokenizer  # noqa: E402
from fused_kd.training.trainer import KDTrainer  # noqa: E402
from tests.integrations.test_transformers_mixin import collator  # noqa: E402
from tests.training.distributed_worker import Cache, with_top_k  # noqa: E402
from tests.training.tiny import rows, tiny  # noqa: E402


def arguments(folder: Path) -> Any:
    return transformers.TrainingArguments(
        str(folder), max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no"
    )


def prompt_tuned(kind: str) -> Any:
    peft = pytest.importorskip("peft")
    config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    return peft.get_peft_model(tiny(16, 1), config(task_type="CAUSAL_LM", num_virtual_tokens=3))


class Tokens:
    def __len__(self) -> int:
        return 62


BUILT: dict[str, tuple[type[Exception], str, Any]] = {
    "list": (
        TypeError,
        r"teacher must be .* a list of \(weight, teacher\), or .* a list with a LlamaForCausalLM in place of a pair",
        lambda: {"teacher": [(0.5, tiny(16, 2)), tiny(16, 3)]},
    ),
    "name": (
        ValueError, r"teacher must be a model, or its folder or name, got '\./models/teacher': there is no such folder",
        lambda: {"teacher": "./models/teacher"},
    ),
    "folder": (
        ValueError, "got 'tests', which gives no causal LM: Unrecognized model", lambda: {"teacher": Path("tests")},
    ),
    "cache": (ValueError, "folder='tests' holds no teacher cache", lambda: {"teacher": "cache:tests"}),
    "server": (ValueError, "url must be http://HOST:PORT", lambda: {"teacher": "http://127.0.0.1:1x"}),
    "a cache as model": (
        ValueError, "model must be a causal LM, got 'cache:tests', .* is it the teacher",
        lambda: {"model": "cache:tests"},
    ),
    "frozen": (
        ValueError, "model must have a parameter to train, all of LlamaForCausalLM are frozen",
        lambda: {"model": tiny(16, 1).requires_grad_(False), "train_dataset": rows(2)},
    ),
    "text": (
        ValueError, "train_dataset must have input_ids and labels in its rows, got messages: .*load_rows",
        lambda: {"train_dataset": [{"messages": []}]},
    ),
    "rows as lists": (
        TypeError, r"eval_dataset\['test'\] must have dicts of input_ids and labels as rows, got list",
        lambda: {"eval_dataset": {"test": [[5, 6]]}},
    ),
    "arguments": (TypeError, r"got TrainingArguments: .* args=\.\.\.", lambda: {"teacher": arguments(Path("none"))}),
    "model_init": (
        ValueError, "model_init must be None: give model", lambda: {"model": None, "model_init": lambda: tiny(16, 1)},
    ),
    "no model": (ValueError, "model must be given, got None", lambda: {"model": None}),
    "model's name": (
        ValueError, r"model must be a model, or its folder or name, got '\./student': there is no such folder",
        lambda: {"model": "./student"},
    ),
    "prompt": (ValueError, "not have a tuned prompt .PROMPT_TUNING", lambda: {"model": prompt_tuned("prompt")}),
    "added tokens": (
        ValueError,
        "vocabularies of 64 and 61, and the tokenizer 62 tokens: those from 61 on .* Give vocab_size=61",
        lambda: {"model": tiny(16, 1, vocab=64), "processing_class": Tokens()},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BUILT)
def test_arguments(tmp_path: Path, case: str) -> None:
    error, message, change = BUILT[case]
    given = {"model": tiny(16, 1), "teacher": tiny(24, 2), "args": arguments(tmp_path), **change()}
    with pytest.raises(error, match=message):
        KDTrainer(given.pop("model"), given.pop("teacher"), "forward_kd", **given)


IDS = {"input_ids": [5, 6, 7]}
ROWS: dict[str, tuple[type[Exception], str, list, Any, bool]] = {
    "lists": (TypeError, r"rows\[0\] must be a dict of input_ids and labels, got list", [[5, 6]], Collator(0), False),
    "no labels": (ValueError, r"rows\[0\] must have input_ids and labels, got input_ids", [IDS], Collator(0), False),
    "longer": (
        ValueError, r"as many labels as input_ids, got 4 and 3", [{**IDS, "labels": [5, 6, 7, 8]}], Collator(0), False,
    ),
    "shorter, packed": (
        ValueError, r"as many labels as input_ids, got 2 and 3", [{**IDS, "labels": [5, 6]}], PackingCollator(), False,
    ),
    "collator of another": (
        ValueError, "batch must have labels, got input_ids: .*Collator pads", [IDS],
        transformers.default_data_collator, False,
    ),
    "images": (
        ValueError, "data_collator must be given for rows with position_ids: the default one pads",
        [{**IDS, "labels": [5, 6, 7], "position_ids": [0, 1, 2]}], None, False,
    ),
    "another over cached rows": (
        ValueError, r"batch must have teacher_log_probs .* put those of cache.rows", rows(4), collator(), True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_rows(tmp_path: Path, case: str) -> None:
    error, message, data, collate, cached = ROWS[case]
    run = KDTrainer(
        tiny(16, 1),
        Cache() if cached else tiny(24, 2),
        "forward_kd",
        args=arguments(tmp_path),
        train_dataset=with_top_k(data) if cached else data * 8,
        data_collator=collate,
    )
    with pytest.raises(error, match=message):
        run.train()


def test_prefix_tuning_trains(tmp_path: Path) -> None:
    student = prompt_tuned("prefix")
    before = {name: value.detach().clone() for name, value in student.named_parameters() if value.requires_grad}
    args = arguments(tmp_path)
    KDTrainer(student, tiny(24, 2), "forward_kd", args=args, train_dataset=rows(8), data_collator=Collator(0)).train()
    after = dict(student.named_parameters())
    assert before and all(not torch.equal(after[name], value) for name, value in before.items())


def test_equal_sizes_of_different_tokenizers(tmp_path: Path) -> None:
    """Found by the files that the teacher came from."""
    ours, theirs = (train_tokenizer([text] * 9, 300) for text in ("the old man walks", "Übung naïve Größe"))
    size = len(ours)
    teacher = tiny(24, 2, vocab=300)
    for name, tokenizer in (("same", ours), ("other", theirs)):
        teacher.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)

    def build(name: str, **options: Any) -> Any:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        return KDTrainer(tiny(16, 1, vocab=300), loaded, "forward_kd", args=arguments(tmp_path), **options)

    assert size > 260 and build("same", processing_class=ours) and build("other")
    with pytest.raises(ValueError, match=r"must be one, \d+ of \d+ ids are other tokens \(\d+: .*fused_kd\.vocab_map"):
        build("other", processing_class=ours)
    with pytest.raises(ValueError, match="must be one"):
        build("other", processing_class=SimpleNamespace(tokenizer=ours))


class KnowingCache(Cache):
    """As TeacherCache does."""

    def check_tokenizer(self, tokenizer: Any) -> None:
        if len(tokenizer) != 62:
            raise ValueError("something else")


def test_a_cache_of_another_tokenizer(tmp_path: Path) -> None:
    """One that knows its tokenizer is asked; one that does not, or a trainer without one, trains."""

    def build(cache: Any, **options: Any) -> Any:
        return KDTrainer(tiny(16, 1), cache, "forward_kd", args=arguments(tmp_path), **options)

    class Given(Tokens):
        size = 62

        def __len__(self) -> int:
            return self.size

        def get_vocab(self) -> dict[str, int]:
            return {}

    other = Given()
    other.size = 61
    for tokenizer in (other, SimpleNamespace(tokenizer=other)):
        with pytest.raises(ValueError, match="something else"):
            build(KnowingCache(), processing_class=tokenizer)
        assert build(Cache(), processing_class=tokenizer)
    assert build(KnowingCache(), processing_class=Given()) and build(KnowingCache())
