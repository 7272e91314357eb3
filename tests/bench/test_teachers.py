"""A line a form of teacher, each a loss of its own."""

from __future__ import annotations

import re

import torch

from bench import __main__ as bench
from bench.problems import Shape, make_inputs
from bench.teachers import ONE, steps_of


def test_a_line_a_form(capsys):
    assert bench.main(["teachers", "--device", "cpu", "--rounds", "2", "--shape", "16", "8", "12", "70"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if re.search(r"\| \d+\.\d{3} \|$", line)]
    assert len(lines) == 8 and lines[0].startswith(f"| {ONE} | ")


def test_forms_differ():
    losses = {
        name: loss().item()
        for name, loss in steps_of(make_inputs(Shape("s", 16, 8, 12, 70), torch.device("cpu"), torch.float32)).items()
    }
    assert len(set(losses.values())) == len(losses) == 6
