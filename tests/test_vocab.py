"""Vocabulary maps: columns that say the same, whatever the tokenizers call them."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_kd as fk
from fused_kd import vocab
from fused_kd.vocab import VocabMap, vocab_map

from .small_tokenizers import (
    byte_fallback,
    byte_level,
    decoders,
    fast,
    metaspace,
    models,
    normalizers,
    numbered,
    pre_tokenizers,
    word_piece,
)

KINDS = {"byte level": byte_level, "metaspace": metaspace, "word piece": word_piece}


def entries(tokenizer: Any) -> dict[str, int]:
    return tokenizer.get_vocab()


def named(made: VocabMap, student: Any, teacher: Any) -> dict[str, str]:
    """Entries of the student and of the teacher that are one."""
    ours, theirs = ({index: text for text, index in entries(each).items()} for each in (student, teacher))
    return {ours[j]: theirs[int(c)] for j, c in enumerate(made.columns) if c >= 0}


def said(core: Any, text: str) -> str | None:
    """What a token adds to a text, as the tokenizer decodes it; None where that is no text."""
    anchor, index = next((i for t, i in entries(core).items() if t == "x"), None), core.token_to_id(text)
    assert anchor is not None
    whole = core.decode([anchor, index], skip_special_tokens=False)
    told = whole.removeprefix("x")
    if isinstance(core.model, models.WordPiece) and re.fullmatch(r" [!-/:-@\[-`{-~，。你好世界]", told):
        told = told[1:]  # it puts a space before what has none in any text
    return None if "\ufffd" in told else told


@pytest.mark.parametrize("kind", KINDS)
def test_one_tokenizer_is_the_identity(kind: str) -> None:
    core = KINDS[kind]()
    size = core.get_vocab_size()
    made = vocab_map(core, core)
    assert torch.equal(made.columns, torch.arange(size)) and made.teacher_size == size
    assert repr(made) == f"VocabMap({size} of {size} student columns, {size} of {size} teacher columns)"
    padded = vocab_map(fast(core), fast(core), student_size=size + 24, teacher_size=size + 8)
    assert torch.equal(padded.columns[:size], torch.arange(size)) and bool((padded.columns[size:] == -1).all())
    assert padded.teacher_size == size + 8 and vocab_map(core, core, student_size=9).columns.tolist() == [*range(9)]


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_are_the_students_own(kind: str) -> None:
    core = KINDS[kind]()
    student, teacher = fast(core), fast(type(core).from_str(core.to_str()))
    size = len(teacher)
    student.add_tokens(["<new>"])
    student.add_special_tokens({"additional_special_tokens": ["<|newer|>"]})
    made = vocab_map(student, teacher)
    assert torch.equal(made.columns, torch.cat([torch.arange(size), torch.tensor([-1, -1])]))
    assert torch.equal(vocab_map(teacher, student).columns, torch.arange(size))


def test_another_end_of_text_in_one_family() -> None:
    """The base model ends with one token, the chat model with another; both vocabularies have both."""
    core = byte_level()
    base, chat = fast(core, eos_token="<|end|>"), fast(core, eos_token="<|pad|>")
    made = vocab_map(base, chat)
    assert torch.equal(made.columns, torch.arange(len(base))) and made.by_role == 0


def test_shuffled_ids() -> None:
    texts = [*"abc", "▁the", "▁", "x"]
    order = torch.randperm(len(texts)).tolist()
    made = vocab_map(metaspace([texts[i] for i in order]), metaspace(texts))
    assert made.columns.tolist() == order


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_equal_text_is_one_column(first: str, second: str) -> None:
    """By what the tokenizers decode themselves, which the map does not ask."""
    if first == second:
        return
    student, teacher = KINDS[first](), KINDS[second]()
    made = vocab_map(student, teacher)
    pairs = named(made, student, teacher)
    assert len(pairs) > 25
    for ours, theirs in pairs.items():
        assert said(student, ours) == said(teacher, theirs), (ours, theirs)
    # and none is left out: what both say is mapped once
    special = ("<", "[")
    known = {said(teacher, t) for t in entries(teacher) if not (t.startswith(special) and len(t) > 1)} - {None, ""}
    both = {s for t in entries(student) if (s := said(student, t)) in known and not (t[0] in special and len(t) > 1)}
    assert {said(student, ours) for ours in pairs} - {None} >= both


PIECES = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="▁"), min_size=1, max_size=4), unique=True)


@settings(max_examples=60, deadline=None)
@given(common=PIECES, data=st.data())
def test_spellings_of_any_text(common: list[str], data: st.DataObject) -> None:
    """The same pieces spelled in two ways are one column each, whatever else there is."""
    extra = [f"{piece}{piece}zz" for piece in common[:3]]
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ours = data.draw(st.permutations([*common, *extra]))
    theirs = data.draw(st.permutations(common))
    student = byte_level(["q0", *("".join(part for part, _ in byte.pre_tokenize_str(piece)) for piece in ours)])
    teacher = byte_fallback(["q1", *(piece.replace(" ", "▁") for piece in theirs)])
    made = vocab_map(student, teacher)
    wanted = [theirs.index(piece) + 1 if piece in theirs else -1 for piece in ours]
    assert made.columns.tolist() == [-1, *wanted]


def test_bytes_and_spaces_of_sentencepiece() -> None:
    """Bytes of what has no token match as bytes; a token of its own goes before its byte."""
    hexed = [f"<0x{byte:02X}>" for byte in range(256)]
    teacher = byte_fallback(["<unk>", *hexed, "▁", "A", "▁the", "é"])
    student = byte_level(["Ċ", "Ġ", "A", "Ġthe", "Ã©", "Ã", "©"])
    pairs = named(vocab_map(student, teacher), student, teacher)
    assert pairs == {
        **{"Ċ": "<0x0A>", "Ġ": "▁", "A": "A", "Ġthe": "▁the"},
        **{"Ã©": "é", "Ã": "<0xC3>", "©": "<0xA9>"},
    }
    back = vocab_map(teacher, student)
    assert named(back, teacher, student) == {theirs: ours for ours, theirs in pairs.items()}
    assert back.ambiguous == 3 and "3 ambiguous" in repr(back)  # "▁" and <0x20>, <0x41> beside "A"


def test_beginnings_of_words() -> None:
    """WordPiece's word has a space before it; marks, digits' neighbours and Chinese characters have none."""
    teacher = word_piece(["[UNK]", "the", "##the", ",", "你", "7", "##7", "€", "+", "«"])
    student = byte_level(["the", "Ġthe", ",", "Ġ,", "ä½ł", "7", "Ġ7", "ĠâĤ¬", "+", "Â«"])
    pairs = named(vocab_map(student, teacher), student, teacher)
    assert pairs == {
        "the": "##the",
        "Ġthe": "the",
        ",": ",",
        "ä½ł": "你",
        "7": "##7",
        "Ġ7": "7",
        "ĠâĤ¬": "€",
        "+": "+",
        "Â«": "«",
    }


def test_ends_of_words() -> None:
    """CLIP's ``</w>`` is a space after the word."""
    core = byte_level(["cat", "x"])
    core.model = type(core.model)({"cat</w>": 0, "cat": 1}, [], end_of_word_suffix="</w>")
    plain = byte_level(["cat", "catĠ"])
    assert vocab_map(core, plain).columns.tolist() == [1, 0]


def test_equal_bytes_without_equal_entries() -> None:
    """The lower id, and one only; the others are counted."""
    student, teacher = word_piece(["[UNK]", "##.", "."]), byte_level([".", "x"])
    assert vocab_map(student, teacher).columns.tolist() == [-1, -1, 0]  # "." is the entry that both have
    both = vocab_map(byte_fallback([".", "<0x2E>"]), word_piece(["##.", "."]))
    assert both.columns.tolist() == [1, -1] and both.ambiguous == 1
    fallback = byte_fallback(["<0xC3>", "Q", "<0xc3>"])
    made = vocab_map(fallback, byte_level(["Z", "Ã"]))
    assert made.columns.tolist() == [1, -1, -1] and made.ambiguous == 2


def test_special_tokens() -> None:
    """By equal entries, then by role; never with text that looks alike."""
    texts = ["a", "b", "<s>", "<|x|>"]
    student = fast(
        byte_level(["<s>", "</s>", "<|x|>", "a", "<pad>"]), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    teacher = fast(
        byte_level([*texts, "<begin>", "<stop>"]), bos_token="<begin>", eos_token="<stop>", pad_token="<stop>"
    )
    student.add_special_tokens({"additional_special_tokens": ["<|x|>"]})
    made = vocab_map(student, teacher)
    # a teacher's column that is both eos and pad is eos; "<s>" and "<|x|>" are plain text to the teacher
    assert named(made, student, teacher) == {"</s>": "<stop>", "<s>": "<begin>", "a": "a"}
    assert made.by_role == 2 and ", 2 by role" in repr(made)
    teacher.add_special_tokens({"additional_special_tokens": ["<|x|>"]})
    assert named(vocab_map(student, teacher), student, teacher)["<|x|>"] == "<|x|>"


def test_a_token_that_one_of_two_calls_special() -> None:
    """Equal ids and entries of one family are one token."""
    student, teacher = fast(byte_level(["a", "<think>", "b"])), byte_level(["a", "<think>", "c"])
    student.add_special_tokens({"additional_special_tokens": ["<think>"]})
    assert vocab_map(student, teacher).columns.tolist() == [0, 1, -1]
    assert vocab_map(teacher, student).columns.tolist() == [0, 1, -1]


@pytest.mark.parametrize("part", ["decoder", "pre_tokenizer", "normalizer"])
def test_spaces_are_read_from_what_there_is(part: str) -> None:
    core = byte_fallback(["_the", "▁the"])
    full = {"decoder": decoders.Metaspace("_"), "pre_tokenizer": pre_tokenizers.Metaspace("_")}
    full["normalizer"] = normalizers.Replace(" ", "_")
    for name in ("decoder", "pre_tokenizer", "normalizer"):
        setattr(core, name, full[name] if name == part else None)
    assert vocab_map(core, byte_level(["a", "Ġthe"])).columns.tolist() == [1, -1]


def test_an_added_token_of_text() -> None:
    """Runs of spaces as GPT-NeoX adds them are text, spelled as it is."""
    student, teacher = fast(byte_level(["a", "ĠĠ", "Ġ"])), fast(byte_level(["a", "b"]))
    teacher.add_tokens(["  ", "Ġ"])
    assert named(vocab_map(student, teacher), student, teacher) == {"a": "a", "ĠĠ": "  "}


class Plain:
    """What only has a vocabulary."""

    def __init__(self, texts: list[Any], **fields: Any) -> None:
        self.texts = texts
        self.__dict__.update(fields)

    def get_vocab(self) -> dict[Any, int]:
        return numbered(self.texts)


def test_other_tokenizers() -> None:
    teacher = byte_level(["Ġthe", "▁the", "the", "Ċ"])
    found = {
        "entries": vocab_map(Plain(["the", "▁the"]), Plain(["▁the", "the"])),
        "bytes": vocab_map(Plain([b" the", b"\n"]), teacher),
        "slow byte level": vocab_map(Plain(["Ċ", "Ġthe"], byte_decoder={}), teacher),
        "sentencepiece": vocab_map(Plain(["▁the", "<0x0A>"], sp_model=None), teacher),
        "processor": vocab_map(SimpleNamespace(tokenizer=teacher), fast(teacher)),
        "none": vocab_map(Plain(["one"]), Plain(["other"])),
    }
    assert {name: made.columns.tolist() for name, made in found.items()} == {
        **{"entries": [1, 0], "bytes": [0, 3], "slow byte level": [3, 0], "sentencepiece": [0, 3]},
        **{"processor": [0, 1, 2, 3], "none": [-1]},
    }
    holes = Plain([])
    holes.get_vocab = lambda: {"a": 5, "b": 2}  # type: ignore[method-assign]
    assert vocab_map(holes, holes).columns.tolist() == [-1, -1, 2, -1, -1, 5]
    for wrong in ("gpt2", SimpleNamespace(tokenizer=3)):
        with pytest.raises(TypeError, match=r"student_tokenizer must have get_vocab\(\)"):
            vocab_map(wrong, teacher)
    with pytest.raises(ValueError, match="teacher_size must be at least 1, got 0"):
        vocab_map(teacher, teacher, teacher_size=0)
    with pytest.raises(TypeError, match=r"student_size must be an integer at least 1, got 2\.0"):
        vocab_map(teacher, teacher, student_size=2.0)  # type: ignore[arg-type]


MAP = VocabMap.of_columns([4, -1, 0, 2], 6)


def test_ids_there_and_back() -> None:
    ids = torch.tensor([[4, 1], [2, -100]], dtype=torch.int32)
    assert MAP.labels(ids).tolist() == [[0, -100], [3, -100]] and MAP.labels(ids).dtype == torch.int64
    assert MAP.labels(ids, missing=-1).tolist() == [[0, -1], [3, -1]]
    assert MAP.teacher_ids(torch.tensor([3, 0])).tolist() == [2, 4]
    assert MAP.teacher_ids(torch.tensor([3, 1, -100]), missing=-7).tolist() == [2, -7, -7]
    assert MAP.student_columns.tolist() == [2, -1, 3, -1, 0, -1]
    assert MAP.mapped.tolist() == [True, False, True, False, True, False]
    assert MAP.coverage([0, 2, 3, -100]) == pytest.approx(2 / 3)
    on_meta = MAP.to("meta")
    assert on_meta.columns.device.type == "meta" and MAP.to("cpu").columns.tolist() == [4, -1, 0, 2]


@pytest.mark.parametrize(
    "error, message, call",
    [
        (ValueError, r"columns must be in \[0, 6\) or -1, got 6 at 1", lambda: VocabMap.of_columns([0, 6], 6)),
        (ValueError, r"columns must be in \[0, 6\) or -1, got -2 at 0", lambda: VocabMap.of_columns([-2], 6)),
        (ValueError, "got 3 at 0 and at 2", lambda: VocabMap.of_columns([3, -1, 3, -1], 6)),
        (ValueError, r"columns must have shape \(V_s,\)", lambda: VocabMap.of_columns([[1]], 6)),  # type: ignore[list-item]
        (TypeError, "columns must be integers", lambda: VocabMap.of_columns([1.0], 6)),  # type: ignore[list-item]
        (TypeError, "columns must be an int64 tensor, got list", lambda: VocabMap([1], 6)),  # type: ignore[arg-type]
        (TypeError, "teacher_size must be an integer", lambda: VocabMap.of_columns([1], True)),
        (ValueError, "ids must be below 6, got 6", lambda: MAP.labels(torch.tensor([6]))),
        (TypeError, "ids must be int64 or int32", lambda: MAP.labels(torch.tensor([6.0]))),
        (ValueError, "student id 1 has none", lambda: MAP.teacher_ids(torch.tensor([0, 1]))),
        (ValueError, "ids must be below 4, got 4", lambda: MAP.teacher_ids(torch.tensor([4]))),
        (ValueError, "at least one id", lambda: MAP.coverage([-100])),
        (ValueError, "head must have the teacher's 6 columns, got 5", lambda: MAP.mass(torch.zeros(2, 5))),
        (TypeError, "head must be a tensor", lambda: MAP.mass(3)),  # type: ignore[arg-type]
        (ValueError, r"size must be in \[1, 6\], got 7", lambda: VocabMap.most_frequent([[1]], 7, 6)),
        (ValueError, "size must be at least 2", lambda: VocabMap.most_frequent([[1]], 1, 6, always=[1, 2])),
        (ValueError, r"always must be ids in \[0, 5\], got 6", lambda: VocabMap.most_frequent([[1]], 3, 6, [1, 6])),
        (ValueError, "offsets must have shape", lambda: VocabMap.from_offsets(torch.zeros(2, 2).long(), 6)),
    ],
)
def test_errors(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_drafts_vocabulary() -> None:
    text = [torch.tensor([[7, 7, 3], [5, 5, -100]]), [7, 1, 3, 9]]
    made = VocabMap.most_frequent(text, 4, 10, always=(0,))
    assert made.columns.tolist() == [0, 3, 5, 7]  # 1 and 9 are rarer, 0 is always in
    assert VocabMap.most_frequent(torch.tensor([9]), 3, 10).columns.tolist() == [0, 1, 9]
    offsets = made.columns - torch.arange(4)
    again = VocabMap.from_offsets(offsets, 10)
    assert torch.equal(again.columns, made.columns)
    assert made.mapped.nonzero().flatten().tolist() == made.columns.tolist()  # EAGLE-3's t2d
    assert made.labels(torch.tensor([3, 4, 7])).tolist() == [1, -100, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.5, "softcap": 5.0}], ids=["plain", "scaled"])
def test_mass_is_that_of_the_softmax(dtype: torch.dtype, options: dict[str, float], monkeypatch: Any) -> None:
    torch.manual_seed(0)
    V, H = 101, 16
    columns = torch.randperm(V)[:40]
    made = VocabMap.of_columns(torch.where(torch.arange(40) % 4 == 0, -1, columns), V)
    hidden, weight, bias = torch.randn(3, 5, H), torch.randn(V, H), torch.randn(V)
    head = fk.LMHead(*(x.to(dtype) for x in (hidden, weight, bias)), **options)
    z = head.hidden.double() @ head.weight.double().T + head.bias.double()
    z = z * options.get("logit_scale", 1.0)
    z = z if "softcap" not in options else 5.0 * torch.tanh(z / 5.0)
    kept = made.columns[made.columns >= 0]
    expected = z.softmax(-1)[..., kept].sum(-1)
    held = []
    logits = vocab._logits
    monkeypatch.setattr(vocab, "_TILE", 7)
    monkeypatch.setattr(vocab, "_logits", lambda *given: (held.append(logits(*given).shape), logits(*given))[1])
    torch.testing.assert_close(made.mass(head).double(), expected, rtol=2e-6, atol=0)
    assert max(rows * width for rows, width in held) == 49  # a tile, never N x V
    torch.testing.assert_close(made.mass(z.float()).double(), expected, rtol=2e-6, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(made.mass(head).double(), expected, rtol=2e-6, atol=0)


def test_mass_of_excluded_columns() -> None:
    made = VocabMap.of_columns([0, 1], 4)
    z = torch.tensor([[-torch.inf, -torch.inf, 0.0, 1.0], [3.0, 1.0, -torch.inf, -torch.inf], [0.0, 0.0, 0.0, 0.0]])
    assert made.mass(z).tolist() == pytest.approx([0.0, 1.0, 0.5])
    assert made.mass(torch.zeros(4)).shape == () and made.mass(torch.zeros(0, 4)).shape == (0,)


def test_a_map_keeps_its_columns():
    """Whatever becomes of the tensor that it was made from."""
    source = torch.tensor([5, -1, 0, 3])
    made = VocabMap.of_columns(source, 8)
    source[0] = 9
    assert made.columns.tolist() == [5, -1, 0, 3]


@pytest.mark.parametrize("exact", [True, False])
def test_lists_of_a_teacher_as_lists_of_a_draft(exact):
    """As the draft's bucket of a head: what it cannot write is of the rest."""
    torch.manual_seed(0)
    z_t, m = torch.randn(5, 12) * 2, VocabMap.of_columns([2, 7, 3, -1, 11], 12)
    top = fk.top_k_of(z_t, 6)
    if not exact:
        top = fk.TopK(top.log_probs, top.indices, "bucket")
    found = m.lists(top)
    log_p = z_t.log_softmax(-1)
    rest = []
    for row, values, ids, old in zip(log_p, found.log_probs, found.indices, top.indices, strict=True):
        kept = [int(i) for i in old if int(m.student_columns[i]) >= 0]
        listed = {int(i): float(v) for i, v in zip(ids, values, strict=True) if v > -torch.inf}
        assert listed == {int(m.student_columns[i]): pytest.approx(float(row[i]), abs=1e-5) for i in kept}
        rest.append(1 - sum(float(row[i].exp()) for i in kept))
    if exact:
        assert torch.allclose(found.log_rest.exp(), torch.tensor(rest), atol=1e-6)
    draft = torch.randn(5, 5)
    loss = fk.kd_loss(draft, found, torch.zeros(5, dtype=torch.int64), fk.GeneralizedJSD(0.5)).loss
    assert 0 < float(loss) < 1
