"""The pass over a finished gradient, in Triton's interpreter: by the factor, or not at all."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from fused_kd.engines import hand_over


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 4096, 5000, 3 * 4096 + 7])
def test_every_element_once(size, dtype, monkeypatch):
    """Also where programs take several blocks in turn."""
    monkeypatch.setattr(hand_over, "PROGRAMS", 2)
    x = torch.randn(size + 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = (x[:size].float() * 0.75).to(dtype)
    beyond, factor = x[size:].clone(), torch.tensor(0.75)
    hand_over.scale_in_place(x[:size], factor)
    # The interpreter truncates to bf16 where a GPU rounds.
    assert torch.allclose(x[:size].float(), expected.float(), rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)
    assert torch.equal(x[size:], beyond)


@pytest.mark.parametrize("factor", [0.0, float("inf"), float("nan"), -1.0])
def test_unusual_factors(factor):
    x = torch.tensor([1.0, -2.0, 0.5])
    expected = x * factor
    hand_over.scale_in_place(x, torch.tensor(factor))
    assert torch.equal(x, expected) or (expected.isnan().all() and x.isnan().all())


def test_a_factor_of_one_writes_nothing(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    written = []
    store = InterpreterBuilder.create_masked_store
    monkeypatch.setattr(
        InterpreterBuilder, "create_masked_store", lambda self, *a: written.append(a) or store(self, *a)
    )
    x = torch.randn(100)
    before = x.clone()
    hand_over.scale_in_place(x, torch.tensor(1.0))
    assert torch.equal(x, before) and not written
    hand_over.scale_in_place(x, torch.tensor(2.0))
    assert torch.equal(x, 2 * before) and written


def test_nothing_to_scale():
    hand_over.scale_in_place(torch.empty(0, 7), torch.tensor(2.0))


def test_only_where_triton_works_and_is_not_refused(monkeypatch):
    from fused_kd import ops

    gpu = torch.device("cuda")
    hand_over.works.cache_clear()
    assert not ops._by_kernel(torch.device("cpu"), "triton") and not ops._by_kernel(gpu, "torch")
    monkeypatch.setattr(hand_over, "works", lambda device: False)
    assert not ops._by_kernel(gpu, "triton")
    monkeypatch.setattr(hand_over, "works", lambda device: True)
    assert ops._by_kernel(gpu, "triton") and ops._by_kernel(gpu, "cuda")
    monkeypatch.setattr(ops, "installed", lambda package: False)
    assert not ops._by_kernel(gpu, "triton")


def test_what_cannot_be_launched_does_not_work(monkeypatch):
    hand_over.works.cache_clear()
    assert hand_over.works(torch.device("cpu"))
    hand_over.works.cache_clear()
    monkeypatch.setattr(hand_over, "scale_kernel", None)
    assert not hand_over.works(torch.device("cpu"))
    hand_over.works.cache_clear()
