"""Memory of large outputs: used again when given back, never while in use, and bounded."""

from __future__ import annotations

import gc

import pytest
import torch

from sparsemtl.ops import memory, soft_threshold
from sparsemtl.ops.availability import native_module, why_not_native

pytestmark = pytest.mark.skipif(why_not_native() is not None, reason=str(why_not_native()))
LARGE = (33 << 20) // 4  # fp32 values of 33 MiB


@pytest.fixture(autouse=True)
def _released():
    gc.collect()
    memory.release()
    yield
    gc.collect()
    memory.release()


def test_memory_is_used_again_once_given_back():
    first = memory.empty_like(torch.empty(LARGE))
    address, mapped = first.data_ptr(), native_module().mapped_blocks()
    del first
    assert native_module().waiting_bytes() == 34 << 20  # whole huge pages
    second = memory.empty_like(torch.empty(LARGE))
    assert second.data_ptr() == address
    assert native_module().mapped_blocks() == mapped
    assert native_module().waiting_bytes() == 0


def test_memory_in_use_is_not_shared():
    kept = [memory.empty_like(torch.empty(LARGE)) for _ in range(3)]
    assert len({tensor.data_ptr() for tensor in kept}) == 3
    view = kept.pop()[5:]
    kept.append(memory.empty_like(torch.empty(LARGE)))
    assert view.untyped_storage().data_ptr() not in [t.data_ptr() for t in kept]


def test_what_waits_is_bounded_and_can_be_released():
    kept = [memory.empty_like(torch.empty(LARGE)) for _ in range(20)]
    del kept
    assert 0 < native_module().waiting_bytes() <= native_module().KEPT_BYTES
    assert memory.release() > 0
    assert native_module().waiting_bytes() == 0


def test_it_looks_like_what_torch_gives():
    like = torch.empty(2, 3, 1200, 1300).to(memory_format=torch.channels_last)
    found = memory.empty_like(like)
    expected = torch.empty_like(like)
    assert found.shape == expected.shape
    assert found.stride() == expected.stride()
    assert found.dtype is expected.dtype
    assert not found._is_view()
    assert found.isnan().all()  # poisoned as torch's own is
    small = memory.empty_like(torch.empty(7, dtype=torch.bfloat16))
    assert small.dtype is torch.bfloat16


def test_large_results_survive_in_place_use_copies_and_saving(tmp_path):
    weight = torch.linspace(-1, 1, LARGE, requires_grad=True)
    value = soft_threshold(weight, torch.tensor(0.5))
    doubled = value.mul_(2.0)
    doubled.sum().backward()
    assert weight.grad.data_ptr() != value.data_ptr()
    assert torch.equal(weight.grad, 2.0 * (weight.abs() > 0.5))
    copy = value.detach().clone()
    torch.save(value.detach(), tmp_path / "value.pt")
    assert torch.equal(torch.load(tmp_path / "value.pt"), copy)
