"""What a cache puts into rows and batches, under which names, and what a batch's teacher is then."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from torch.utils._python_dispatch import TorchDispatchMode

from fused_kd.integrations.sampling import MaskedTail, lengths_of
from fused_kd.integrations.teacher_columns import is_per_target
from fused_kd.training.cached_rows import CachedRows
from fused_kd.training.collate import Collator, PackingCollator
from fused_kd.training.fingerprints import fingerprint_rows
from fused_kd.training.teacher_cache import TeacherCache

from .caching import VOCAB, Words, model, rows, states, write, write_hidden

CPU = torch.device("cpu")


def test_two_caches_two_names_and_rows_of_several_teachers(tmp_path: Path) -> None:
    """Padded and packed: lists of one and states of another, each in its columns; a row's teacher by its number."""
    data = rows()
    lists, states_ = write(tmp_path / "lists"), write_hidden(tmp_path / "states")
    math_ = TeacherCache(tmp_path / "states", name="math")
    assert math_.columns == ("teacher_math_hidden",) and lists.columns[2] == "teacher_log_rest"
    assert "name='math'" in repr(math_)
    both = math_.rows(lists.rows(data))
    assert both.lengths == [len(row["input_ids"]) for row in data]
    with pytest.raises(ValueError, match="name must be another for each cache, got None twice"):
        states_.rows(lists.rows(data))
    items = [{**both[i], "teacher_id": i % 3} for i in range(len(data))]
    padded, packed = Collator(0)(items), PackingCollator()(items)
    assert padded["teacher_id"].tolist() == [i % 3 for i in range(10)] and padded["teacher_id"].dtype == torch.int64
    expected = [i % 3 for i, row in enumerate(data) for _ in row["input_ids"]]
    assert packed["teacher_id"].tolist() == [expected]
    valid, own = padded["labels"][:, 1:] != -100, packed["labels"][:, 1:] != -100
    for name in (*lists.columns, *math_.columns):
        assert torch.equal(padded[name][:, :-1][valid], packed[name][:, :-1][own])
    assert torch.equal(padded["teacher_math_hidden"][:, :-1][valid], torch.cat([math_[i] for i in range(10)]))
    assert not padded["teacher_math_hidden"][:, :-1][~valid].any() and not padded["teacher_math_hidden"][:, -1].any()
    rest = torch.cat([lists.row(i)["log_rest"] for i in range(10)])
    assert torch.equal(padded["teacher_log_rest"][:, :-1][valid], rest)
    target = lists.head(padded, valid, CPU)
    assert target.tail == "bucket" and target.log_rest is padded["teacher_log_rest"]
    copied = pickle.loads(pickle.dumps(both))
    assert torch.equal(copied[4]["teacher_math_hidden"], both[4]["teacher_math_hidden"])
    for wrong, message in (
        ([both[0], data[1]], r"_(hidden|log_probs) must be in every row of a batch or in none, rows\[1\] lacks it"),
        (
            [items[0] | {"teacher_math_hidden": items[0]["teacher_math_hidden"][:-1]}],
            r"teacher_math_hidden of rows\[0\] has \d+ entries for",
        ),
        (
            [items[0], items[1], {**data[3], "teacher_id": 0}],
            r"in every row with teacher_id 0 of a batch or in none, rows\[2\] lacks it",
        ),
        ([{**row, "teacher_id": 0} for row in data[:1]] + data[1:2], "teacher_id must be in every row of a batch"),
    ):
        for collate in (Collator(0), PackingCollator()):
            with pytest.raises(ValueError, match=message):
                collate(wrong)


def test_a_row_of_another_teacher_needs_nothing_of_a_cache(tmp_path: Path) -> None:
    """Where each row says whose it is, a batch holds what there is, zeros or a list of nobody elsewhere."""
    data = rows()
    states_ = write_hidden(tmp_path / "states").rows(data)
    items = [{**(states_[0] if i == 0 else data[i]), "teacher_id": i} for i in range(3)]
    padded, packed, alone = Collator(0)(items), PackingCollator()(items), Collator(0)(items[:1])
    length = len(data[0]["input_ids"])
    assert torch.equal(padded["teacher_hidden"][0, :length], alone["teacher_hidden"][0])
    assert alone["teacher_hidden"].any() and not padded["teacher_hidden"][1:].any()
    assert torch.equal(packed["teacher_hidden"][0, :length], alone["teacher_hidden"][0])
    assert packed["teacher_hidden"].shape[1] == packed["input_ids"].shape[1]


def test_columns_of_users_are_no_teachers() -> None:
    """Whatever their names end in."""
    own = {
        "vision_hidden": torch.ones(2, 4),
        "ref_log_probs": [-1.0, -2.0],
        "image_indices": [3],
        "our_teacher_hidden": 1,
    }
    bare = rows()
    data = [{**row, **own} for row in bare]
    for collate in (Collator(0), PackingCollator()):
        assert collate(data).keys() == collate(bare).keys()
    masked = MaskedTail([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], **own}])[1]
    assert {name: masked[name] for name in own} == own and masked["labels"] == [-100] * 3
    assert [name for name in (*own, "teacher_hidden", "teacher_a_b_indices", "teacher_id", "teacher_hidden_2")
            if is_per_target(name)] == ["teacher_hidden", "teacher_a_b_indices"]  # fmt: skip


def test_packing_copies_no_padding() -> None:
    """One long row among short ones: what is held on the way is of the size of the result."""
    torch.manual_seed(0)
    data: list[dict] = []
    for length in (2000, *[20] * 60):
        ids = torch.randint(9, (length,)).tolist()
        hidden = torch.randn(length - 1, 64).bfloat16()
        data.append({"input_ids": ids, "labels": [3, *ids[1:]], "teacher_hidden": hidden})
    made: list[int] = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.dtype == torch.bfloat16:
                made.append(found.nbytes)
            return found

    with Counted():
        batch = PackingCollator(separator_id=7)(data)
    assert max(made) <= 1.01 * batch["teacher_hidden"].nbytes
    starts = torch.tensor([len(row["input_ids"]) for row in data]).cumsum(0)
    between = torch.zeros(int(starts[-1]), dtype=torch.bool)
    between[starts - 1] = True
    assert torch.equal(batch["teacher_hidden"][0, ~between], torch.cat([row["teacher_hidden"] for row in data]))
    assert not batch["teacher_hidden"][0, between].any()


def test_lengths_are_known_without_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What groups rows by length must not read all states first."""
    cache = write_hidden(tmp_path)
    cached = cache.rows(rows())
    monkeypatch.setattr(TeacherCache, "row", lambda *_: pytest.fail("read"))
    for data in (cached, MaskedTail(cached), MaskedTail(rows()), rows()):
        assert lengths_of(data) == [len(row["input_ids"]) for row in rows()]


@pytest.mark.parametrize("given", [0.7, "1", "math", None, [1], True], ids=str)
def test_a_teacher_is_named_by_an_integer(given: Any) -> None:
    for collate in (Collator(0), PackingCollator()):
        with pytest.raises(TypeError, match=r"teacher_id of rows\[1\] must be an integer, got"):
            collate([{**row, "teacher_id": value} for row, value in zip(rows()[:2], (0, given), strict=True)])


def test_lists_keep_what_they_leave_out(tmp_path: Path) -> None:
    """Exact beside the rounded entries, also where they hold almost all."""
    with torch.no_grad():
        teacher = model(0)
        teacher.lm_head.weight.mul_(30)
    data = rows()
    cache = write_hidden(tmp_path, teacher=teacher, keep="lists", k=5, dtype="8bit")
    for index, row in enumerate(data):
        logits = states(row, teacher).double() @ teacher.lm_head.weight[:VOCAB].double().T
        exact, found = logits.log_softmax(-1), cache.row(index)
        others = exact.scatter(1, found["indices"], -torch.inf).logsumexp(-1)
        assert torch.allclose(found["log_rest"].double(), others, rtol=1e-4, atol=1e-4)
    assert min(cache.row(i)["log_rest"].min() for i in range(2)) < -10


def test_another_format_is_to_be_made_again(tmp_path: Path) -> None:
    cache = write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    assert "packed" not in index and cache.columns[2] == "teacher_log_rest"
    for form, message in (
        ("fused_kd teacher cache 1", r"made by another version \('fused_kd teacher cache 1', .*make it again"),
        ("a picture", r"index\.json is damaged \(ValueError: expected the format"),
    ):
        (tmp_path / "index.json").write_text(json.dumps({**index, "format": form}))
        for opened in (lambda: TeacherCache(tmp_path), lambda: write(tmp_path)):
            with pytest.raises(ValueError, match=message):
                opened()


class Read(torch.utils.data.Dataset):
    """Rows that count how often they are read."""

    def __init__(self, data: list) -> None:
        self.data, self.count = data, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        self.count += 1
        return self.data[index]


def test_rows_are_compared_once(tmp_path: Path) -> None:
    """``check`` gives the rows, and takes a fingerprint that is known."""
    cache, data = write(tmp_path), Read(rows())
    given = {"tokenizer": Words(), "rows": data, "template": "tiny"}
    cached = cache.check(**given)
    assert data.count == len(data) and torch.equal(cached[4]["teacher_indices"], cache[4][1])
    known, data.count = fingerprint_rows(data), 0
    assert isinstance(cache.check(**given, data=known), CachedRows) and data.count == 0
    with pytest.raises(ValueError, match="was made from something else: data"):
        cache.check(**given, data=known[::-1])
    with pytest.raises(ValueError, match="name must be another for each cache, got None twice"):
        cache.check(**{**given, "rows": cached})
