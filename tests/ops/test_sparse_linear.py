"""sparse_linear: a 1x1 sparse_conv2d over rows."""

from __future__ import annotations

import pytest
import torch

from sparsemtl.ops import pack_linear, sparse_linear, sparse_linear_reference


@pytest.mark.parametrize("shape", [(5,), (1, 5), (33, 5), (2, 3, 5), (0, 5)])
@pytest.mark.parametrize("packed", [False, True])
def test_value_and_gradients_match_the_reference(shape, packed):
    torch.manual_seed(0)
    weight = (torch.randn(7, 5) * (torch.rand(7, 5) < 0.5)).requires_grad_()
    bias = torch.randn(7, requires_grad=True)
    x = torch.randn(shape, requires_grad=True)
    pattern = pack_linear(weight) if packed else None
    y = sparse_linear(x, weight, bias, pattern=pattern)
    expected = sparse_linear_reference(x, weight, bias, pattern=pattern)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, weight, bias), grad)
    wanted = torch.autograd.grad(expected, (x, weight, bias), grad)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w)


def test_a_changed_weight_is_seen():
    x, weight = torch.randn(3, 5), torch.randn(7, 5)
    pattern = pack_linear(weight)
    first = sparse_linear(x, weight, pattern=pattern)
    weight.mul_(-1.0)
    torch.testing.assert_close(sparse_linear(x, weight, pattern=pattern), -first)


BAD = {
    "weight": ((torch.ones(3, 5), torch.ones(7, 5, 1)), ValueError, r"weight to be \[K, C\]"),
    "features": ((torch.ones(3, 4), torch.ones(7, 5)), ValueError, "x to have 5 features"),
    "scalar": ((torch.ones(()), torch.ones(7, 5)), ValueError, "x to have 5 features"),
    "kind": (([1.0], torch.ones(7, 5)), TypeError, "x to be a Tensor, got list"),
    "weight-kind": ((torch.ones(3, 5), None), TypeError, "weight to be a Tensor"),
}


@pytest.mark.parametrize(("arguments", "error", "text"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(arguments, error, text):
    with pytest.raises(error, match=text):
        sparse_linear(*arguments)
