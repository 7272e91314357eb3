"""The CPU's product of the hidden gradient: few shapes, whatever the number of tokens, and exact all the same."""

from __future__ import annotations

import pytest
import torch

import fused_kd as fk
from fused_kd.engines import gemm
from fused_kd.engines.plan import Workspace, plan_chunks, rounded_rows
from fused_kd.reference import reference_kd_loss

from ..problems import gradients, problem, relative

needs_onednn = pytest.mark.skipif(not gemm._HAS_ONEDNN, reason="needs oneDNN")


def test_rounded_rows_are_few_and_near():
    found = {n: rounded_rows(n) for n in range(1, 513)}
    assert all(n <= rows <= n * 9 / 8 for n, rows in found.items())
    assert len(set(found.values())) == 56


def test_room_is_made_where_the_budget_has_it():
    def planned(N: int, budget: int | None):
        return plan_chunks(N, workspace=Workspace(10, 0, 7), preferred=512, memory_budget=budget, rounded=True)

    assert planned(300, None) == (300, 3207, 300, 320)
    assert planned(300, 3207) == (300, 3207, 300, 320)
    assert planned(300, 3206) == (300, 3007, 300, 0)
    assert planned(1000, None) == (500, 5127, 500, 512)


@needs_onednn
def test_steps_with_other_numbers_of_tokens_bring_few_new_shapes(monkeypatch):
    seen, real = [], gemm._with_rows_behind
    monkeypatch.setattr(gemm, "_HAS_AVX512", True)
    monkeypatch.setattr(gemm, "_with_rows_behind", lambda a: seen.append(tuple(real(a).shape)) or real(a))
    for valid in range(100, 200, 3):
        p = problem(N=210, V=37, H=8, ignored=0.0)
        p.labels[valid:] = -100
        loss = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo()).loss
        expected = reference_kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo()).loss
        for a, r in zip(gradients(loss, p.leaves), gradients(expected, p.leaves), strict=True):
            assert relative(a, r) < 4e-6
    assert len(seen) == 34 and len(set(seen)) <= 10


@needs_onednn
def test_what_lies_behind_a_chunk_does_not_matter(monkeypatch):
    monkeypatch.setattr(gemm, "_HAS_AVX512", True)
    buffer, weight = torch.full((40, 50), torch.nan), torch.randn(50, 12)
    buffer[:33] = torch.randn(33, 50)
    a = buffer[:33]
    assert gemm._with_rows_behind(a).shape == (36, 50)
    assert relative(gemm._product(a, weight), a.double() @ weight.double()) < 1e-6
    for other in (buffer[7:40], buffer[:33, :40].clone(), torch.randn(50, 33).t(), buffer[:33].expand(33, 50).clone()):
        assert gemm._with_rows_behind(other) is other, "nothing lies behind it"
