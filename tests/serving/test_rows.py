"""What of a batch is sent, and where the states that come back belong."""

from __future__ import annotations

import pytest
import torch

from fused_kd.serving.rows import key_of, requested_rows
from fused_kd.serving.wire import Request, read_request, read_states, save, write_request
from fused_kd.training.hidden_codes import encode_states

LIMITS = {"input_size": 50, "longest": 8, "most_tokens": 20}


def bools(*rows: str) -> torch.Tensor:
    return torch.tensor([[x == "1" for x in row] for row in rows])


def given(rows: Request) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), wanted.int().tolist()) for ids, wanted in rows.apart()]


@pytest.mark.parametrize("mask", [("11110", "11111", "11000"), ("01111", "11111", "00011")], ids=["right", "left"])
def test_padding_and_what_follows_the_last_target_stay_here(mask):
    ids = torch.arange(15).view(3, 5)
    keep = bools(*mask)
    right = mask[0][0] == "1"
    targets = bools("01100", "00000", "10000") if right else bools("00110", "00000", "00010")
    rows, places = requested_rows({"input_ids": ids, "attention_mask": keep.long()}, targets)
    assert given(rows) == ([([0, 1, 2], [0, 1, 1]), ([10], [1])] if right else [([1, 2, 3], [0, 1, 1]), ([13], [1])])
    assert places.tolist() == targets.flatten().nonzero()[:, 0].tolist()


def test_packed_rows_are_cut():
    ids = torch.arange(10)[None]
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 0]])
    rows, places = requested_rows({"input_ids": ids, "position_ids": positions}, bools("0100000100"))
    assert given(rows) == [([0, 1], [0, 1]), ([5, 6, 7], [0, 0, 1])]
    assert places.tolist() == [1, 7]


def test_without_a_mask_rows_are_whole_and_without_targets_there_are_none():
    ids = torch.arange(6).view(2, 3)
    assert given(requested_rows({"input_ids": ids}, bools("010", "100"))[0]) == [([0, 1], [0, 1]), ([3], [1])]
    rows, places = requested_rows({"input_ids": ids, "attention_mask": torch.zeros(2, 3)}, bools("000", "000"))
    assert rows.tokens == 0 and len(places) == 0


@pytest.mark.parametrize(
    "batch, message",
    [
        ({"attention_mask": bools("10110")}, "a gap in row 0"),
        ({"attention_mask": bools("11000")}, "targets has position 2 of row 0"),
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, "attention_mask must have the shape"),
        ({"position_ids": torch.zeros(5)}, "position_ids must have the shape"),
        ({"seq_idx": torch.zeros(1, 5)}, "packed rows must have position_ids"),
        ({"input_ids": torch.zeros(5)}, "one shape"),
    ],
)
def test_a_batch_that_cannot_be_sent(batch, message):
    with pytest.raises(ValueError, match=message):
        requested_rows({"input_ids": torch.arange(5)[None], **batch}, bools("00100"))


def rows(ids=(1, 2, 3, 4), lengths=(1, 3), wanted=(1, 0, 1, 1)) -> Request:
    return Request(torch.tensor(ids).int(), torch.tensor(lengths).int(), torch.tensor(wanted).bool())


def test_rows_go_there_and_back():
    assert given(read_request(write_request(rows()), **LIMITS)) == [([1], [1]), ([2, 3, 4], [0, 1, 1])]


def test_keys_stand_for_content():
    ids, mask, targets = torch.arange(6).view(2, 3), bools("111", "110"), bools("010", "100")
    keys = [
        key_of({"input_ids": ids, "attention_mask": mask}, targets),
        key_of({"input_ids": ids + 1, "attention_mask": mask}, targets),
        key_of({"input_ids": ids.T.reshape(3, 2), "attention_mask": mask.reshape(3, 2)}, targets.reshape(3, 2)),
        key_of({"input_ids": ids, "attention_mask": ~mask}, targets),
        key_of({"input_ids": ids, "position_ids": mask}, targets),
        key_of({"input_ids": ids}, targets),
        key_of({"input_ids": ids}, bools("010", "000")),
    ]
    assert len(set(keys)) == 7
    strided = torch.arange(12).view(2, 6)[:, ::2] // 2
    assert key_of({"input_ids": strided, "attention_mask": mask.clone(), "more": ids}, targets) == keys[0]


def test_rows_are_split_between_requests():
    many = rows(tuple(range(10)), (3, 1, 4, 2), (1,) * 10)
    parts = many.split(4)
    assert [part.lengths.tolist() for part in parts] == [[3, 1], [4], [2]]
    assert torch.cat([part.input_ids for part in parts]).tolist() == list(range(10))
    assert [part.lengths.tolist() for part in many.split(1)] == [[3], [1], [4], [2]]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ids": (1, 2, 3, 50)}, r"input_ids must be in \[0, 49\], got 50 at token 3"),
        ({"ids": (1, -2, 3, 4)}, "got -2 at token 1"),
        ({"lengths": (2, 3)}, "lengths must add up to the 4 input_ids"),
        ({"lengths": (4, 0)}, "lengths must be at least 1"),
        ({"lengths": ()}, "of at least one row"),
        ({"wanted": (0, 0, 0, 0)}, "at least one True"),
        ({"wanted": (1, 0)}, "one entry a token"),
        ({"ids": range(9), "lengths": (9,), "wanted": (1,) * 9}, "at most 8 tokens, got 9 in row 0"),
        ({"ids": range(21), "lengths": (7, 7, 7), "wanted": (1,) * 21}, "at most 20 tokens in one request, got 21"),
    ],
)
def test_a_request_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        read_request(write_request(rows(**changes)), **LIMITS)


def test_a_request_of_another_form():
    wide = {"lengths": torch.tensor([2**62, 2**62, 2**62, 2**62 + 4]), "input_ids": torch.arange(4).int()}
    for tensors, message in (
        ({"input_ids": torch.arange(3)}, "must have the tensors"),
        ({**vars(rows()), "input_ids": torch.rand(4)}, "input_ids must be of torch.int32 or torch.int64"),
        ({**vars(rows()), "wanted": torch.ones(4).int()}, "wanted must be of torch.bool"),
        ({**vars(rows()), "lengths": torch.ones(2, 2).int()}, r"with one dimension, got torch.int32 \(2, 2\)"),
        ({**vars(rows()), **wide}, "add up to"),  # their sum wraps around to 4
    ):
        with pytest.raises(ValueError, match=message):
            read_request(save(tensors), **LIMITS)
    for body in (b"", b"x" * 100, write_request(rows())[:-3]):
        with pytest.raises(ValueError, match="expected a safetensors file"):
            read_request(body, **LIMITS)


@pytest.mark.parametrize("dtype, error", [("fp32", 0.0), ("fp16", 3e-4), ("bf16", 3e-3), ("fp8", 4e-2)])
def test_states_go_there_and_back(dtype, error):
    states = torch.randn(40, 64) * torch.logspace(-4, 4, 40)[:, None] + (torch.arange(64) == 3) * 100
    states[7] = 0
    states = states.clamp(-6e4, 6e4)
    found = read_states(save(encode_states(states, dtype)), 40, 64, dtype).float()
    assert float(((found - states).norm(dim=1) / states.norm(dim=1).clamp_min(1e-9)).max()) <= error
    size = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}[dtype]
    assert sum(value.nbytes for value in encode_states(states, dtype).values()) == 40 * (64 * size + 4 * (size == 1))


def test_an_answer_that_cannot_be():
    states = torch.randn(3, 4)

    def with_fifth(value: float) -> torch.Tensor:
        return torch.where(torch.arange(12).view(3, 4) == 5, value, states)

    for tensors, message in (
        ({"hidden": states.half()}, "must have the tensors"),
        ({"hidden": states[:2]}, "must have the tensors"),
        ({"hidden": states, "more": states.clone()}, "must have the tensors"),
        (
            {"hidden": with_fifth(float("nan"))},
            r"token 1 must be finite numbers, the largest is nan \(1 of 3 tok",
        ),
        ({"hidden": with_fifth(float("inf"))}, "states of token 1 must be finite"),
        ({"hidden": with_fifth(-float("inf"))}, "states of token 1 must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            read_states(save({k: v.contiguous() for k, v in tensors.items()}), 3, 4, "fp32")
