"""Masking at the speed of memory is torch.where."""

from __future__ import annotations

import pytest
import torch

from sparsemtl.ops.masking import mask_, mask_into, mask_weight, masked

SHAPES = [(0,), (1,), (17,), (5, 3, 3, 3), (40_001,), (3, 1, 7)]


def make(shape, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=rng).to(dtype)
    return x, torch.rand(shape, generator=rng) < 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_where(shape, dtype):
    x, keep = make(shape, dtype)
    expected = torch.where(keep, x, torch.zeros((), dtype=dtype))
    assert torch.equal(masked(x, keep), expected)
    assert torch.equal(mask_weight(x, keep), expected)
    out = torch.full_like(x, 7.0)
    assert mask_into(x, keep, out) is out
    assert torch.equal(out, expected)
    assert out._version == torch.full_like(x, 7.0)._version  # the write is not counted
    assert mask_(x, keep) is x
    assert torch.equal(x, expected)


def test_what_is_left_out_becomes_zero_whatever_it_was():
    x = torch.tensor([float("nan"), float("inf"), -1.0, float("nan"), -0.0] * 9)
    keep = torch.tensor([False, False, False, True, True] * 9)
    found = masked(x, keep)
    assert torch.equal(found[~keep], torch.zeros(27))
    assert found[keep].isnan().sum() == 9


@pytest.mark.parametrize("which", ["both", "weight", "mask"])
def test_memory_formats_may_differ(which):
    x, keep = make((6, 5, 3, 3))
    expected = torch.where(keep, x, 0.0)
    last = torch.channels_last
    x = x if which == "mask" else x.contiguous(memory_format=last)
    keep = keep if which == "weight" else keep.contiguous(memory_format=last)
    assert torch.equal(masked(x, keep), expected)
    assert masked(x, keep).stride() == x.stride()
    assert torch.equal(mask_into(x, keep, torch.ones(x.shape)), expected)
    assert torch.equal(mask_(x.clone(), keep), expected)
    assert torch.equal(masked(x[::2], keep[::2]), expected[::2])


def test_the_gradient_is_masked_and_has_one_of_its_own():
    x, keep = make((4, 3, 3, 3))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(mask_weight(x, keep).square().sum(), x, create_graph=True)
    assert torch.equal(grad, torch.where(keep, 2 * x, 0.0))
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert torch.equal(second, 2.0 * keep)
    many = torch.func.vmap(lambda w: mask_weight(w, keep))(torch.stack([x, 2 * x]).detach())
    assert torch.equal(many[1], torch.where(keep, 2 * x, 0.0))


def test_threads_do_not_change_it():
    x, keep = make((100_003,))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(masked(x, keep), torch.where(keep, x, 0.0))
    finally:
        torch.set_num_threads(threads)
