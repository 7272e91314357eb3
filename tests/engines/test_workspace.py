"""Large CPU buffers: reused once nothing refers to them, never before."""

from __future__ import annotations

import mmap
import threading

import pytest
import torch

import fused_kd as fk
from fused_kd import workspace
from fused_kd.workspace import MIN_BYTES, empty

CPU = torch.device("cpu")
N = MIN_BYTES // 4
pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no huge pages to ask for")


def held() -> list[int]:
    return [len(block) for blocks in (workspace._workspace, workspace._results) for block in blocks.held]


@pytest.fixture(autouse=True)
def nothing_kept():
    fk.empty_cache()
    before = held()  # of other tests' live tensors
    yield
    fk.empty_cache()
    assert held() == before


def test_a_block_is_reused_when_its_last_view_is_gone():
    x = empty((2, N), torch.float32, CPU)
    address, view = x.data_ptr(), x[1, 5:]
    del x
    assert empty((2, N), torch.float32, CPU).data_ptr() != address
    del view
    assert empty((2, N), torch.float32, CPU).data_ptr() == address


def test_another_shape_dtype_or_a_smaller_size_will_do():
    address = empty((10, N), torch.float32, CPU).data_ptr()
    smaller = empty((5 * N, 2), torch.bfloat16, CPU)
    assert smaller.data_ptr() == address and smaller.shape == (5 * N, 2) and smaller.dtype == torch.bfloat16


def test_much_smaller_ones_and_results_waste_no_large_block():
    before = held()
    del [empty((10, N), torch.float32, CPU)][0]
    result = empty((9, N), torch.float32, CPU, result=True)
    assert sorted(held()) == sorted([*before, 40 * N, 36 * N])
    small = empty((2, N), torch.float32, CPU)
    assert sorted(held()) == sorted([*before, 8 * N, 36 * N])
    assert small.shape == (2, N) and result.shape == (9, N)


def test_what_is_in_use_stays_and_what_is_not_goes():
    x = empty((N,), torch.float32, CPU).fill_(1.0)
    y = empty((N,), torch.float32, CPU).fill_(2.0)
    del y
    fk.empty_cache()
    z = empty((N,), torch.float32, CPU).fill_(3.0)
    assert (x == 1).all() and (z == 3).all()


def test_a_request_that_nothing_fits_drops_what_is_free():
    before = held()
    del [empty((2, N), torch.float32, CPU)][0]
    x = empty((40, N), torch.float32, CPU)
    assert sorted(held()) == sorted([*before, 160 * N]) and x.shape == (40, N)


def test_small_ones_are_torch_s():
    before = held()
    small = empty((N - 1,), torch.float32, CPU)
    assert small.shape == (N - 1,) and held() == before


def test_threads_never_share_a_block():
    wrong = []

    def work(value: float) -> None:
        for _ in range(30):
            x = empty((N,), torch.float32, CPU).fill_(value)
            if not (x == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gradients_outlive_the_next_call():
    """A weight gradient lies in such a block; the next step must not write over it."""
    H, V = 16, MIN_BYTES // 32
    hidden, weight = torch.randn(8, H), torch.randn(V, H, requires_grad=True)
    first, second = torch.randint(V, (2, 8))

    def gradient(labels):
        return torch.autograd.grad(fk.kd_loss(fk.LMHead(hidden, weight), None, labels, fk.SFT()).loss, weight)[0]

    a = gradient(first)
    copy = a.clone()
    b = gradient(second)
    assert torch.equal(a, copy) and not torch.equal(a, b)
