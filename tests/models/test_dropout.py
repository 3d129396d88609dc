"""Dropout from random bytes: nn.Dropout's distribution and gradient, whatever the layout."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from sparsemtl.models.dropout import Dropout, kept


@pytest.mark.parametrize("p", [0.5, 0.25, 0.1, 0.3, 0.99])
def test_the_share_and_the_mean_are_those_of_p(p):
    torch.manual_seed(0)
    y = Dropout(p)(torch.ones(400_000))
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=4e-3)
    assert y.double().mean().item() == pytest.approx(1.0, abs=4 * (p / (1 - p) / 400_000) ** 0.5)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()} or p in (
        0.1,
        0.3,
        0.99,
    )


def test_neighbours_and_draws_are_independent():
    torch.manual_seed(1)
    alive = kept(torch.empty(1_000_000), 2**15).double() - 0.5
    for lag in (1, 2, 7, 8, 16):
        assert abs((alive[lag:] * alive[:-lag]).mean().item()) < 2e-3
    again = kept(torch.empty(1_000_000), 2**15).double() - 0.5
    assert abs((alive * again).mean().item()) < 2e-3


def test_a_seed_drops_the_same_elements_in_every_memory_format():
    x = torch.randn(2, 5, 7, 3)
    torch.manual_seed(3)
    first = Dropout(0.5)(x)
    torch.manual_seed(3)
    last = Dropout(0.5)(x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(first, last)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.manual_seed(3)
    assert torch.equal(first, Dropout(0.5)(x.transpose(1, 2).contiguous().transpose(1, 2)))


def test_the_gradient_is_the_mask_times_the_scale():
    torch.manual_seed(4)
    x = torch.randn(3, 50, requires_grad=True)
    y = Dropout(0.25)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad == 0, y == 0)
    torch.testing.assert_close(y, grad * x)


@pytest.mark.parametrize("p", [0.0, 1.0, 1e-7])
def test_certain_outcomes_are_torchs(p):
    x = torch.randn(10)
    assert torch.equal(Dropout(p)(x), nn.Dropout(p)(x))


def test_evaluation_and_half_precision():
    x = torch.randn(100)
    assert Dropout(0.5).eval()(x) is x or torch.equal(Dropout(0.5).eval()(x), x)
    y = Dropout(0.5)(x.bfloat16())
    assert y.dtype is torch.bfloat16
    assert torch.equal(y[y != 0], 2 * x.bfloat16()[y != 0])
    assert Dropout(0.5)(torch.empty(0, 4)).shape == (0, 4)


def test_copies_and_compiles():
    layer = pickle.loads(pickle.dumps(copy.deepcopy(Dropout(0.5))))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert (compiled(torch.ones(1000)) == 0).any()
    torch.func.vmap(Dropout(0.5), randomness="different")(torch.ones(2, 8))
