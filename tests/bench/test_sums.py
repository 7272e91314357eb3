"""What a sum costs beside its terms: which these are, and a table of both."""

from __future__ import annotations

import re

import pytest

from bench import __main__ as bench
from bench.sums import SUMS, terms_of


def test_terms_stand_alone():
    assert terms_of("0.5*sft+0.5*generalized_jsd") == ["sft", "generalized_jsd"]
    assert terms_of("self_evolution:gamma=0,floor=0.3,gate=kl") == ["self_evolution:gamma=0.0,gate=kl"]
    assert terms_of("2*sft+sft") == ["sft"]
    assert all(text not in terms_of(text) for text in SUMS)


@pytest.mark.parametrize("steps", [False, True])
def test_a_line_a_sum(capsys, steps):
    given = ["0.5*sft+0.5*generalized_jsd", "self_evolution:gamma=0,floor=0.3"]
    options = ["--device", "cpu", "--backend", "torch", "--rounds", "2", "--shape", "6", "8", "8", "40"]
    assert bench.main(["sums", *given, *options, *["--steps"] * steps]) == 0
    lines = capsys.readouterr().out.splitlines()[4:]
    assert [line.split(" | ")[0] for line in lines] == [f"| {text}" for text in given]
    assert all(re.search(r"\| \d+\.\d{3} \|$", line) for line in lines)


def test_what_is_no_sum_is_a_line(capsys):
    assert bench.main(["sums", "0.5*sfd"]) == 2
    assert "bench sums: objective must be one of sft" in capsys.readouterr().err
