"""Instructions in Alpaca's format: loading, the two prompts, rows and masks."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest

from fused_kd.training.data.instructions import Instruction, load_instructions, tokenize_instructions
from fused_kd.training.data.pairs import Pair
from fused_kd.training.data.prompts import concatenate, encode_prompts, render_sample, tokenize_pairs

from .byte_level import make_tokenizer

ALONE = Instruction("Name two\ncolours.", "", "Red,\nblue.")
WITH = Instruction("Translate {this}.", "A dog", "Ein Hund")
ROWS = [
    {"instruction": " Name two\ncolours. ", "input": "", "output": "Red,\nblue.\n"},
    {"instruction": "Translate {this}.", "input": "A dog", "output": "Ein Hund"},
]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("form", ["lines", "array"])
@pytest.mark.parametrize("missing", [{"input": ""}, {"input": None}, {"input": " \n"}, {}])
def test_rows_are_read(tmp_path: Path, form: str, missing: dict) -> None:
    rows = [{**{key: ROWS[0][key] for key in ("instruction", "output")}, **missing}, ROWS[1]]
    text = json.dumps(rows, indent=1) if form == "array" else "\n".join(map(json.dumps, rows))
    path = write(tmp_path / "train.json", text)
    assert load_instructions(path, "train") == [ALONE, WITH]
    assert load_instructions(str(tmp_path), "train", limit=1) == [ALONE]


def test_a_file_without_a_split_name_is_divided(tmp_path: Path) -> None:
    rows = [{"instruction": f"Count to {i}.", "input": "", "output": str(i)} for i in range(1_000)]
    # the same task with another answer must not be on both sides
    rows += [{**row, "output": "more"} for row in rows]
    path = write(tmp_path / "alpaca_data.json", json.dumps(rows))
    parts = {split: load_instructions(path, split) for split in ("train", "valid", "test")}
    assert sum(map(len, parts.values())) == 2_000 and all(60 < len(parts[split]) < 160 for split in ("valid", "test"))
    tasks = [{row.instruction for row in part} for part in parts.values()]
    assert not tasks[0] & tasks[1] and not tasks[0] & tasks[2] and not tasks[1] & tasks[2]
    everything = load_instructions(path, "all", seed=5)
    assert sorted(everything) == sorted(chain(*parts.values()))
    assert load_instructions(path, "all", seed=5, limit=9) == everything[:9]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"instruction": "x"}', r"line 3: no text for 'output' \(columns: instruction\)"),
        ('{"instruction": "x", "output": ["y"]}', "line 3: no text for 'output'"),
        ('{"instruction": "x", "input": 3, "output": "y"}', "line 3: no text for 'input'"),
        ('{"instruction": " ", "output": "y"}', "line 3: the text for 'instruction' is empty"),
        ('{"instruction": "x", "output": ""}', "line 3: the text for 'output' is empty"),
        ('{"en": "x", "de": "y"}', "line 3: no text for 'instruction'"),
        ('["x"]', "line 3: expected an object with instruction, input and output"),
        ('{"instruction": ', "line 3: not JSON"),
    ],
)
@pytest.mark.parametrize("name", ["train.jsonl", "tasks.jsonl"])
def test_bad_rows_name_file_and_line_or_are_skipped(tmp_path: Path, name: str, bad: str, message: str) -> None:
    good = json.dumps(ROWS[1])
    path = write(tmp_path / name, f"{good}\n\n{bad}\n{good}\n")
    with pytest.raises(ValueError, match=message) as caught:
        load_instructions(path, "train")
    assert path in str(caught.value)
    with pytest.warns(UserWarning, match=r"skipped 1 bad rows of \d.*line 3"):
        made = load_instructions(path, "all", skip_bad=True)
    assert made == [WITH] * 2


def test_bad_arguments(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", json.dumps(ROWS[0]))
    for options, error in (({"limit": 0}, ValueError), ({"seed": 1.0}, TypeError)):
        with pytest.raises(error, match=r"limit|seed"):
            load_instructions(path, "train", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no instructions"):
        load_instructions("builtin", "train")
    with pytest.raises(ValueError, match="no such file or directory"):
        load_instructions(str(tmp_path / "none"), "train")
    with pytest.raises(ValueError, match=r"split='test': no file fits"):
        load_instructions(str(tmp_path), "test")


def test_prompts_are_alpacas() -> None:
    assert ALONE.prompt() == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName two\ncolours.\n\n### Response:"
    )
    assert WITH.prompt() == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nTranslate {this}.\n\n### Input:\nA dog\n\n### Response:"
    )


def test_rows_carry_loss_on_the_output_alone() -> None:
    tokenizer = make_tokenizer([*ALONE, *WITH])
    rows = tokenize_instructions(tokenizer, [ALONE, WITH], 2_000)
    assert (len(rows), rows.skipped, rows.truncated) == (2, 0, 0)
    for row, instruction in zip(rows.rows, (ALONE, WITH), strict=True):
        (prompt,) = encode_prompts(tokenizer, [instruction.prompt()])
        assert row["input_ids"][: len(prompt)] == prompt and prompt[0] == tokenizer.bos_token_id
        answer = row["input_ids"][len(prompt) :]
        assert row["labels"] == [-100] * len(prompt) + answer
        assert answer[-1] == tokenizer.eos_token_id and tokenizer.decode(answer[:-1]) == instruction.output
    assert "loss    (" in render_sample(tokenizer, rows[0])
    both = concatenate([rows, tokenize_pairs(tokenizer, "tiny", [Pair("A dog", "Ein Hund")], "en-de", 2_000)])
    assert len(both) == 3


def test_long_instructions() -> None:
    tokenizer = make_tokenizer([*ALONE, *WITH])
    lengths = [len(ids) for ids in encode_prompts(tokenizer, [ALONE.prompt(), WITH.prompt()])]
    assert lengths[0] < lengths[1]
    rows = tokenize_instructions(tokenizer, [ALONE, WITH], lengths[0] + 1)
    assert (len(rows), rows.skipped, rows.truncated) == (1, 1, 1)
    with pytest.raises(ValueError, match=r"leaves no room .*Instruction\(instruction='Translate"):
        tokenize_instructions(tokenizer, [ALONE, WITH], lengths[0] + 1, skip_long=False)
    with pytest.raises(ValueError, match="no rows: 1 pairs"):
        tokenize_instructions(tokenizer, [WITH], lengths[1])
