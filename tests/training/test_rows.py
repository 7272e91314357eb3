"""Data sets of every format and from every kind of source, as tokenised rows."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import TrainingArguments

from fused_kd import ForwardKD
from fused_kd.training import (
    KDTrainer,
    PackingCollator,
    Rows,
    StreamedRows,
    formats,
    load_rows,
    pack_rows,
    render_sample,
)
from fused_kd.training.data import Instruction, Pair, load_instructions, load_pairs
from fused_kd.training.files import csv_rows, parquet_rows
from fused_kd.training.prompts import tokenize_instructions, tokenize_pairs
from fused_kd.training.reading import is_divided, read_rows

from .byte_level import make_tokenizer
from .chat_families import FAMILIES, TOOLS, WORDS
from .tiny import tiny

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def chat(number: int) -> dict[str, Any]:
    turns = [("user", f"What is {number}?"), ("assistant", f"It is {number}."), ("user", "And?"), ("assistant", "No.")]
    return {"messages": [{"role": role, "content": content} for role, content in turns[: 2 + 2 * (number % 2)]]}


CHATS = [chat(number) for number in range(12)]
FORMATS: dict[str, list[dict[str, Any]]] = {
    "messages": CHATS,
    "prompt_completion": [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(5)],
    "text": [{"text": f"A text\nof {n} words."} for n in range(5)],
    "alpaca": [{"instruction": f"Count to {n}.", "input": "", "output": f"1 to {n}"} for n in range(5)],
    "pairs": [{"translation": {"en": f"Line {n}.", "de": f"Zeile {n}."}} for n in range(5)],
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return FAMILIES["chatml"].tokenizer()


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".parquet"):
        pq = pytest.importorskip("pyarrow.parquet")
        pa = pytest.importorskip("pyarrow")
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    elif ".csv" in path.name:
        opener: Any = gzip.open if path.name.endswith(".gz") else open
        with opener(path, "wt", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0].keys())
            table.writeheader()
            for row in rows:
                table.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
    else:
        text = json.dumps(rows) if ".json" in path.name and ".jsonl" not in path.name else ""
        text = text or "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.name.endswith(".gz") else text.encode())
    return str(path)


def loss_text(tokenizer: Any, row: dict[str, list[int]]) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != -100], clean_up_tokenization_spaces=False)


def test_loss_of_every_format(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    expected = {
        "messages": "It is 3.<|im_end|>No.<|im_end|>",
        "prompt_completion": " 4<|im_end|>",
        "text": "<s>A text\nof 3 words.<|im_end|>",
        "alpaca": "1 to 3<|im_end|>",
        "pairs": "Zeile 3.<|im_end|>",
    }
    for name, values in FORMATS.items():
        source = write(tmp_path / name / "train.jsonl", values)
        rows = load_rows(tokenizer, source)
        assert isinstance(rows, Rows)
        assert repr(rows) == f"Rows({len(values)} rows of {name}, skipped=0, truncated=0)"
        assert loss_text(tokenizer, rows[3]) == expected[name]
        assert load_rows(tokenizer, source, format=name).rows == rows.rows
        assert rows[3]["input_ids"].count(tokenizer.bos_token_id) == (name != "messages")
    assert rows.rows == load_rows(tokenizer, tmp_path / "pairs", directions=["en-de"]).rows
    pairs = [Pair(**{"source": f"Line {n}.", "target": f"Zeile {n}."}) for n in range(5)]
    turned = [Pair(b, a) for a, b in pairs]
    both = load_rows(tokenizer, tmp_path / "pairs", directions=["en-de", "de-en"], prompt="tiny", limit=4)
    made = [
        tokenize_pairs(tokenizer, "tiny", each[:4], d, 1024).rows for each, d in ((pairs, "en-de"), (turned, "de-en"))
    ]
    assert both.rows == made[0] + made[1]
    tasks = [Instruction(**row) for row in FORMATS["alpaca"]]
    assert (
        load_rows(tokenizer, tmp_path / "alpaca" / "train.jsonl").rows
        == tokenize_instructions(tokenizer, tasks, 1024).rows
    )
    built_in = load_rows(tokenizer, "builtin", "valid", limit=3, prompt="tiny")
    assert (
        built_in.rows
        == tokenize_pairs(tokenizer, "tiny", load_pairs("builtin", "valid", "en-de", limit=3), "en-de", 1024).rows
    )


SOURCES = ["train.jsonl", "train.jsonl.gz", "train.json", "train.json.gz", "train.csv", "train.csv.gz", "train.parquet"]


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_file(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str, streaming: bool) -> None:
    expected = load_rows(tokenizer, write(tmp_path / "lines" / "train.jsonl", CHATS)).rows
    path = write(tmp_path / name, CHATS)
    for source in (path, tmp_path):
        rows = load_rows(tokenizer, source, streaming=streaming)
        assert isinstance(rows, StreamedRows if streaming else Rows)
        assert list(rows) == expected
        if streaming:
            assert list(rows) == expected, "a second pass"
            assert repr(rows) == "StreamedRows(12 rows of messages so far, skipped=0, truncated=0)"


@pytest.mark.parametrize("name", ["train.txt", "notes.txt.gz"])
def test_a_text_file_that_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str) -> None:
    """A row a line; in a folder it is no data."""
    lines = "\ufeffA text.\r\n\n \nOf two lines.".encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    rows = load_rows(tokenizer, path, "all")
    assert repr(rows) == "Rows(2 rows of text, skipped=0, truncated=0)"
    assert [loss_text(tokenizer, row) for row in rows] == ["<s>A text.<|im_end|>", "<s>Of two lines.<|im_end|>"]
    assert list(load_rows(tokenizer, path, "all", streaming=True)) == rows.rows
    with pytest.raises(ValueError, match="no file fits in"):
        load_rows(tokenizer, tmp_path)
    with pytest.raises(ValueError, match="of parallel text the path without the language"):
        load_pairs(str(path), "all", "en-de")
    (tmp_path / "bad.txt").write_bytes(b"Sound.\n\n\xff\n")
    with pytest.raises(ValueError, match=r"bad\.txt, line 3: not UTF-8: byte 0xff"):
        load_rows(tokenizer, tmp_path / "bad.txt", "bad")


def test_tables_fill_up_what_rows_lack(tmp_path: Path) -> None:
    """Parquet has every field in every row: None is not there, at any depth."""
    tokenizer = replace(FAMILIES["chatml"], template=TOOLS).tokenizer()
    call = [{"type": "function", "function": {"name": "f", "arguments": {"city": "Ulm"}}}]
    other = [{"type": "function", "function": {"name": "g", "arguments": {"day": 3}}}]
    turns = [{"role": "assistant", "tool_calls": calls} for calls in (call, other)]
    values = [{"messages": [{"role": "user", "content": "a"}, turn]} for turn in turns]
    rows = load_rows(tokenizer, write(tmp_path / "train.parquet", values)).rows
    assert rows == load_rows(tokenizer, write(tmp_path / "lines" / "train.jsonl", values)).rows
    assert loss_text(tokenizer, rows[1]) == '<tool_call>g {"day": 3}</tool_call><|im_end|>'


def test_folders(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    expected = load_rows(tokenizer, write(tmp_path / "lines" / "train.jsonl", CHATS)).rows
    for folder in ("shards", "clone/data"):  # as hub repositories have them
        write(tmp_path / folder / "train-00001-of-00002.jsonl", CHATS[7:])
        write(tmp_path / folder / "train-00000-of-00002.jsonl", CHATS[:7])
        write(tmp_path / folder / "test-00000-of-00001.jsonl", CHATS[:2])
    for folder in ("shards", "clone"):
        assert load_rows(tokenizer, tmp_path / folder).rows == expected
        assert load_rows(tokenizer, tmp_path / folder, "test").rows == expected[:2]
    many = [chat(number) for number in range(600)]
    one = write(tmp_path / "one" / "chats.jsonl", many)
    for part, values in enumerate((many[:250], many[250:])):
        write(tmp_path / "parts" / f"part{part}.jsonl", values)
    whole = load_rows(tokenizer, one, "all").rows
    assert load_rows(tokenizer, tmp_path / "parts", "all").rows == whole
    parts = {split: load_rows(tokenizer, tmp_path / "parts", split).rows for split in ("train", "valid", "test")}
    assert sum(map(len, parts.values())) == 600 and 10 < len(parts["valid"]) < 60 and 10 < len(parts["test"]) < 60
    for split, rows in parts.items():
        assert load_rows(tokenizer, one, split).rows == rows
        assert list(load_rows(tokenizer, one, split, streaming=True)) == rows
    with pytest.raises(ValueError, match="split='tset': no file fits in"):
        load_rows(tokenizer, tmp_path / "parts", "tset")


def test_the_same_question_is_in_one_split(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [chat(n) for n in range(300)]
    again = [{"messages": [*row["messages"][:1], {"role": "assistant", "content": "Other."}]} for row in rows]
    path = write(tmp_path / "chats.jsonl", rows + again)

    def questions(split: str) -> set[str]:
        found = load_rows(tokenizer, path, split).rows
        return {tokenizer.decode(row["input_ids"]).split("<|im_end|>")[0] for row in found}

    assert not questions("train") & (questions("valid") | questions("test"))


def test_data_sets_of_the_hub_and_saved_ones(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    expected = load_rows(tokenizer, write(tmp_path / "repo" / "train.jsonl", CHATS)).rows
    write(tmp_path / "repo" / "validation.jsonl", CHATS[:2])
    names_of, load = datasets.get_dataset_split_names, datasets.load_dataset
    asked: list[bool] = []

    def loaded(name: str, config: str | None, **options: Any) -> Any:
        asked.append(options.get("streaming", False))
        return load(str(tmp_path / "repo"), **options)

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: names_of(str(tmp_path / "repo")))
    monkeypatch.setattr(datasets, "load_dataset", loaded)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert load_rows(tokenizer, "owner/chats").rows == expected and not any(asked)
    streamed = load_rows(tokenizer, "owner/chats:default", "valid", streaming=True)
    asked.clear()
    assert list(streamed) == expected[:2] and asked == [True]
    bad = [*CHATS[:2], {"messages": [{"role": "user", "content": "a"}]}]
    write(tmp_path / "repo" / "train.jsonl", bad)
    with pytest.raises(ValueError, match=r"owner/chats \(train\), row 2: messages has no assistant turn"):
        list(load_rows(tokenizer, "owner/chats", streaming=True))
    whole = datasets.Dataset.from_list(CHATS)
    whole.save_to_disk(tmp_path / "saved")
    assert load_rows(tokenizer, tmp_path / "saved", "all").rows == expected
    datasets.DatasetDict({"train": whole, "validation": whole.select(range(2))}).save_to_disk(tmp_path / "dict")
    assert load_rows(tokenizer, tmp_path / "dict", "valid").rows == expected[:2]
    with pytest.raises(ValueError, match=r"split='test': .*dict has train, validation"):
        load_rows(tokenizer, tmp_path / "dict", "test")
    with pytest.raises(ValueError, match="split='tset': expected train, valid, test or all"):
        load_rows(tokenizer, tmp_path / "saved", "tset")


LONG = {"messages": [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "b"}]}
TURNS = CHATS[0]["messages"]
BAD: list[tuple[str, Any, str]] = [
    ("messages", {"messages": [{**TURNS[0], "role": "a<|im_end|>"}, TURNS[1]]}, r"turn 1 \(a<.*>\): its text has"),
    ("messages", {"messages": TURNS, "tools": [{"name": "<|im_end|>"}]}, "tools: its text has the special token"),
    ("messages", {"messages": TURNS, "chat_template_kwargs": {"day": "<|im_end|>"}},
        "chat_template_kwargs: its text has the special token"),
    ("messages", {"prompt": "a", "completion": "b"}, "expected messages or conversations, .* prompt, completion"),
    ("messages", {"messages": [{"role": "user", "content": "a"}]}, "messages has no assistant turn"),
    ("messages", {"messages": [{"role": "assistant", "content": "a"}]}, r"turn 1 \(assistant\): the conversation"),
    ("messages", LONG, r"no token with loss is among the first 64 of its \d+ \(max_length=64\)"),
    ("prompt_completion", {"prompt": "a"}, "expected prompt and completion, got the columns prompt"),
    ("prompt_completion", {"prompt": "word " * 60, "completion": "b"}, "the prompt alone fills max_length=64"),
    ("prompt_completion", {"prompt": [{"role": "user", "content": "<|im_end|>"}], "completion": [
        {"role": "assistant", "content": "a"}]}, r"turn 1 \(user\): its text has the special token '<\|im_end\|>'"),
    ("text", {"txt": "a"}, "expected a text, got the columns txt"),
    ("text", {"text": " "}, "the text is empty"),
    ("alpaca", {"instruction": "a"}, "no text for 'output'"),
    ("alpaca", {"instruction": "word " * 90, "output": "b"}, "the prompt alone fills max_length=256"),
    ("pairs", {"translation": {"en": "a"}}, "no text for the language 'de'"),
    ("pairs", {"en": "word " * 90, "de": "b"}, "the prompt alone fills max_length=256"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "bad", "message"), BAD, ids=[f"{name}{n}" for n, (name, *_) in enumerate(BAD)])
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_are_named_or_skipped(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str, bad: Any, message: str, streaming: bool
) -> None:
    good = FORMATS[name][:3]
    length = next((length for length in (64, 256) if str(length) in message), 1024)
    options: dict[str, Any] = {"max_length": length, "streaming": streaming}
    expected = list(load_rows(tokenizer, write(tmp_path / "good" / "train.jsonl", good), **options))
    path = write(tmp_path / "train.jsonl", [*good[:2], bad, good[2], bad])
    with pytest.raises(ValueError, match=rf"train\.jsonl, line 3: {message}"):
        list(load_rows(tokenizer, path, **options))
    rows = load_rows(tokenizer, path, skip_bad=True, **options) if streaming else None
    with pytest.warns(UserWarning, match=rf"skipped 2 bad rows of 5; the first: .*train\.jsonl, line 3: {message}"):
        rows = load_rows(tokenizer, path, skip_bad=True, **options) if rows is None else rows
        assert list(rows) == expected
    assert rows.skipped == 2


def test_options_and_sources_that_cannot_be(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", CHATS)
    odd = write(tmp_path / "odd.jsonl", [{"question": "a", "answer": "b"}])
    broken = str(tmp_path / "broken.jsonl")
    Path(broken).write_text("{\n" + json.dumps(CHATS[0]) + "\n")
    for options, message in (
        ({"format": "chat"}, "format='chat': expected one of auto, messages, prompt_completion, text, alpaca, pairs"),
        ({"max_length": 1}, "max_length=1: expected an int of at least 2"),
        ({"limit": 0}, "limit must be an int of at least 1, got 0"),
        ({"directions": "en-de"}, r"directions='en-de': expected a list, each once, such as \['en-de'\]"),
        ({"directions": ["en-de", "en-de"]}, "directions="),
        ({"turns": "none"}, "turns='none': expected 'all' or 'last'"),
        ({"split": "test"}, "holds the train split by its name"),
        ({"source": "builtin", "format": "text"}, "source='builtin': the built-in corpus has pairs alone"),
        ({"source": odd}, r"odd\.jsonl, line 1: format='auto' knows no format of the columns question, answer: "),
        ({"source": broken, "split": "all"}, r"broken\.jsonl, line 1: not JSON"),
        ({"source": str(tmp_path / "none.jsonl")}, "no such file or directory"),
        ({"chat_template": "none.jinja"}, r"chat_template='none\.jinja': expected a Jinja template, or a file"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_rows(tokenizer, **{"source": path, **options})
    with pytest.warns(UserWarning, match="skipped 1 bad rows of 2"):
        assert len(load_rows(tokenizer, broken, "all", skip_bad=True)) == 1
    bare = make_tokenizer(WORDS)
    with pytest.raises(ValueError, match="has no chat template: give chat_template="):
        load_rows(bare, path)
    chats = write(
        tmp_path / "pc" / "train.jsonl",
        [{"prompt": c["messages"][:1], "completion": c["messages"][1:2]} for c in CHATS],
    )
    with pytest.raises(ValueError, match="has no chat template: give chat_template="):
        load_rows(bare, chats, skip_bad=True)
    assert len(load_rows(bare, chats, chat_template=FAMILIES["zephyr"].template)) == 12
    write(tmp_path / "empty" / "train.jsonl", [])
    for streaming in (False, True):
        with pytest.raises(ValueError, match="no usable rows"):
            list(load_rows(tokenizer, tmp_path / "empty", streaming=streaming, format="messages"))


def test_what_the_first_row_decided_is_told(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Of a folder of two kinds of rows, and of a file whose hash leaves a split empty."""
    write(tmp_path / "mixed" / "a.jsonl", [{"instruction": "Say a.", "output": "a"}])
    write(tmp_path / "mixed" / "b.jsonl", [chat(1)])
    wrong = r"b\.jsonl, line 1: .* \(read as alpaca, which .*a\.jsonl, line 1 is\)"
    with pytest.raises(ValueError, match=wrong):
        load_rows(tokenizer, tmp_path / "mixed", "all")
    one = write(tmp_path / "one.jsonl", [chat(1)])
    assert is_divided(one, "valid") and not is_divided(one, "all") and not is_divided(tmp_path / "train.jsonl", "train")
    for options in ({}, {"format": "messages"}):
        with pytest.raises(
            ValueError, match=r"a hash of each row says of which .*no usable rows|no usable rows \(a hash"
        ):
            load_rows(tokenizer, one, "valid", **options)


def test_truncation_is_counted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name in ("messages", "prompt_completion", "text"):
        path = write(tmp_path / name / "train.jsonl", FORMATS[name])
        whole = load_rows(tokenizer, path).rows
        longest = max(len(row["input_ids"]) for row in whole)
        for length in (longest, longest - 1):
            rows = load_rows(tokenizer, path, max_length=length)
            assert rows.truncated == sum(len(row["input_ids"]) > length for row in whole)
            assert rows.rows == [{name: ids[:length] for name, ids in row.items()} for row in whole]
            streamed = load_rows(tokenizer, path, max_length=length, streaming=True)
            assert list(streamed) == rows.rows and streamed.truncated == rows.truncated


def test_loss_on_the_first_token_alone_is_none() -> None:
    """Nothing predicts it."""
    with pytest.raises(ValueError, match="no token with loss"):
        formats._cut(8, {"input_ids": [5, 6], "labels": [5, -100]})
    assert not formats._cut(8, {"input_ids": [5, 6], "labels": [-100, 6]}).cut


def test_nothing_is_read_ahead(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: Any) -> None:
    path = write(tmp_path / "train.jsonl", CHATS)
    read: list[int] = []

    def counting(*args: Any, **options: Any) -> Iterator[Any]:
        for number, row in enumerate(read_rows(*args, **options)):
            read.append(number)
            yield row

    monkeypatch.setattr("fused_kd.training.rows.read_rows", counting)
    rows = load_rows(tokenizer, path, streaming=True)
    assert read == [0], "the format is that of the first row"
    read.clear()
    for number, _ in enumerate(iter(rows)):
        assert read == list(range(number + 1))
    assert len(read) == 12 and rows.tally.given == 12
    read.clear()
    assert len(list(load_rows(tokenizer, path, streaming=True, limit=5, format="messages"))) == 5 == len(read)


@pytest.mark.parametrize("limit", [None, 7])
def test_workers_share_a_stream(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, limit: int | None) -> None:
    path = write(tmp_path / "train.jsonl", CHATS)
    expected = load_rows(tokenizer, path, limit=limit).rows
    rows = load_rows(tokenizer, path, streaming=True, limit=limit)
    loader = torch.utils.data.DataLoader(rows, batch_size=None, num_workers=2)  # type: ignore[arg-type]
    assert sorted(row["input_ids"] for row in loader) == sorted(row["input_ids"] for row in expected)


def test_csv_and_parquet_name_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text('text,n\n"two\nlines",1\nshort\nb,2\n')
    places, values = zip(*csv_rows(path), strict=True)
    assert [place.rpartition(", ")[2] for place in places] == ["line 2", "line 4", "line 5"]
    assert values[0] == {"text": "two\nlines", "n": "1"} and str(values[1]) == "expected 2 columns (text, n), got 1"
    for text, message in (
        ("", "line 1: expected the names"),
        ("a,a\n", "each once"),
        ('a,b\n"c"d,e\n', "line 2: not CSV"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            list(csv_rows(path))
    path.write_bytes(b"text\ngood\nb\xff\n")
    assert str(list(csv_rows(path))[1].value).startswith("not UTF-8: byte 0xff")
    pytest.importorskip("pyarrow")
    (tmp_path / "train.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"train\.parquet cannot be read: "):
        list(parquet_rows(tmp_path / "train.parquet"))


def test_chat_rows_are_packed(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The same loss in one row as in a batch of several: each is blind to the others, no target is lost."""
    rows = load_rows(tokenizer, write(tmp_path / "train.jsonl", CHATS[:4])).rows
    batch = PackingCollator()(rows)
    assert batch["input_ids"].shape == (1, sum(len(row["input_ids"]) for row in rows))
    model = tiny(8, 0, vocab=len(tokenizer)).eval()
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        alone = torch.cat([model(torch.tensor([row["input_ids"]])).logits[0] for row in rows])
    torch.testing.assert_close(packed, alone)
    targets = [label for row in rows for label in row["labels"][1:] if label != -100]
    assert [label for label in batch["labels"][0].tolist() if label != -100] == targets


def test_packs_are_filled_and_nothing_is_lost() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 60) for _ in range(500)]
    rows = [{"input_ids": [n] * length, "labels": [-100] + [n] * (length - 1)} for n, length in enumerate(lengths)]
    packs = pack_rows(rows, 64)
    assert sorted(number for pack in packs.packs for number in pack) == list(range(500))
    sums = [sum(lengths[number] for number in pack) for pack in packs.packs]
    assert max(sums) <= 64 and sum(lengths) / (len(packs) * 64) > 0.95
    filled = f"{sum(lengths) / len(packs) / 64:.1%} filled"
    assert repr(packs) == f"PackedRows(500 rows in {len(packs)} packs of 64 tokens, {filled})"
    two = [rows[number] for pack in (0, 7) for number in packs.packs[pack]]
    batch, alone = PackingCollator()([packs[0], packs[7]]), PackingCollator()(two)
    assert all(torch.equal(batch[name], alone[name]) for name in alone) and batch.keys() == alone.keys()
    with pytest.raises(ValueError, match=r"max_tokens=59: expected .* the longest row's 60 tokens \(rows\[\d+\]\)"):
        pack_rows(rows, 59)
    with pytest.raises(ValueError, match="rows are empty"):
        pack_rows([], 64)


def test_a_trainer_takes_packs(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The loss of a batch of packs is that of their rows, and so is the student after a step."""
    rows = load_rows(tokenizer, write(tmp_path / "train.jsonl", CHATS)).rows
    packs, losses = pack_rows(rows, 60), []
    order = [number for pack in packs.packs for number in pack]
    for data, size in ((packs, len(packs)), ([rows[number] for number in order], len(rows))):
        arguments = TrainingArguments(
            str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=size, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no", logging_steps=1, seed=0,
        )  # fmt: skip
        student, teacher = tiny(8, 0, vocab=len(tokenizer)), tiny(12, 1, vocab=len(tokenizer))
        trainer = KDTrainer(
            student, teacher, ForwardKD(), args=arguments, train_dataset=data, data_collator=PackingCollator()
        )
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] > 0


def test_samples_of_chats_are_readable(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = load_rows(tokenizer, write(tmp_path / "train.jsonl", [*CHATS[:2], LONG]), format="messages")
    lines = render_sample(tokenizer, rows[1]).split("\n")
    assert [line[:7] for line in lines[1:]] == ["no loss", "loss   ", "no loss", "loss   ", "no loss"]
    assert lines[1].endswith(r"'<|im_start|>user\nWhat is 1?<|im_end|>\n<|im_start|>assistant\n'")
    assert lines[4].endswith(f"<|im_end|>[{tokenizer.eos_token_id}]")
    long = render_sample(tokenizer, rows[2])
    assert "more tokens" in long and len(long) < 1_500
    count = len(rows[2]["input_ids"])
    assert long.startswith(f"{count} tokens, 2 with loss")


def test_instructions_in_a_csv_file(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", FORMATS["alpaca"])
    assert load_instructions(path, "train") == [Instruction(**row) for row in FORMATS["alpaca"]]
