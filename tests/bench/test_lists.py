"""What lists made from a head cost beside its GEMM: a table a shape."""

from __future__ import annotations

import re

import pytest

from bench import __main__ as bench


@pytest.mark.parametrize("more", [[], ["--one-thread"]])
def test_a_line_a_call(capsys, more):
    options = [
        "--device",
        "cpu",
        "--backend",
        "torch",
        "--rounds",
        "2",
        "--shape",
        "6",
        "8",
        "40",
        "--shape",
        "3",
        "4",
        "9",
    ]
    assert bench.main(["lists", "1", "5", *options, *more]) == 0
    printed = capsys.readouterr().out
    assert printed.count("(N, H, V) = (") == 2
    lines = [line for line in printed.splitlines() if re.search(r"\| \d+\.\d{3} \|$", line)]
    names = ["top_k_of, k 1", "top_k_of, k 5", "log_probs_at, k 5", "PyTorch, k 5"]
    assert [line.split(" | ")[0] for line in lines] == [f"| {name}" for name in names * 2]


def test_what_does_not_fit_is_a_line(capsys):
    assert bench.main(["lists", "10", "--device", "cpu", "--backend", "torch", "--shape", "3", "4", "9"]) == 2
    assert "bench lists: k must be in [1, 9]" in capsys.readouterr().err
