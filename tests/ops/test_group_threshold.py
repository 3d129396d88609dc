"""group_threshold on every backend against float64, its gradients by torch and by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sparsemtl.ops import GROUP_THRESHOLD, group_threshold, soft_threshold_reference, use_backend
from sparsemtl.ops.group_threshold import group_threshold_component, group_threshold_reference
from sparsemtl.ops.tiles import Tile, spread_tiles, tile_sizes, tile_sums
from tests.ops.support import backends_of, skip_if_unusable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = {  # shapes of a component's weights, tile, α
    "single-weights": ([(7, 5, 3, 3)], (1, 1), 0.5),
    "blocks": ([(70, 33, 3, 3)], (32, 16), 1.0),
    "clipped": ([(9, 5, 1, 1)], (4, 4), 0.9),
    "not-a-power-of-2": ([(7, 10, 2, 2)], (3, 5), 0.9),
    "vectors": ([(33, 6, 3, 3)], (8, 1), 1.0),
    "channels": ([(6, 5, 3, 3), (4, 9)], (1, 0), 1.0),
    "component": ([(17, 3, 3, 3), (0, 4), (1, 1, 1, 1), (20, 20)], (8, 8), 0.9),
    "all-dead": ([(7, 5, 3, 3)], (4, 4), 99.0),
    "all-alive": ([(7, 5, 3, 3)], (4, 4), 0.0),
    "larger-than-the-weight": ([(3, 2, 3, 3)], (64, 64), 0.9),
}


def make(case, device, dtype):
    shapes, tile, alpha = case
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=rng).to(device, dtype) for shape in shapes]
    grads = [torch.randn(shape, generator=rng).to(device, dtype) for shape in shapes]
    return weights, grads, Tile(*tile), torch.tensor(alpha, device=device)


def expect(weights, alpha, tile, grads):
    wide = [w.detach().cpu().double().requires_grad_() for w in weights]
    a = alpha.detach().cpu().double().requires_grad_()
    values = [group_threshold_reference(w, a, tile) for w in wide]
    found = torch.autograd.grad(values, [*wide, a], [g.cpu().double() for g in grads])
    return [v.detach() for v in values], found[:-1], found[-1]


def assert_near(found, expected, storage):
    """A rounding of the storage type, and of a sum over the group in fp32."""
    assert found.dtype is storage
    rtol = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[storage]
    atol = rtol * max(expected.abs().max().item() if expected.numel() else 0.0, 1e-6)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", backends_of(GROUP_THRESHOLD))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_values_and_gradients_match_the_reference(case, dtype, backend, layout, device):
    weights, grads, tile, alpha = make(case, device, dtype)
    if layout == "channels-last":
        weights = [
            w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w for w in weights
        ]
    skip_if_unusable(GROUP_THRESHOLD, backend, weights, alpha, tile)
    weights = [w.requires_grad_() for w in weights]
    alpha.requires_grad_()
    with use_backend(backend):
        values = group_threshold_component(weights, alpha, tile)
    *found, grad_alpha = torch.autograd.grad(values, [*weights, alpha], grads)
    expected = expect(weights, alpha, tile, grads)
    for value, grad, weight, s, g in zip(values, found, weights, *expected[:2], strict=True):
        assert value.stride() == weight.stride()
        assert torch.equal(value == 0, s.to(value.device) == 0)
        assert_near(value, s, dtype)
        assert_near(grad, g, dtype)
    sizes = [g.abs().float() * math.sqrt(tile.rows * max(tile.columns, 1)) for g in grads]
    total = sum(s.sum().item() for s in sizes)
    assert abs(grad_alpha.item() - expected[2].item()) <= 1e-5 * total + 1e-6


@pytest.mark.parametrize("tile", [(1, 1), (2, 3), (4, 1), (1, 0), (3, 2)])
def test_the_formulas_pass_gradcheck(tile):
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 4, 2, 1, dtype=torch.float64, generator=rng).requires_grad_()
    alpha = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    norms = tile_sums(weight.detach() ** 2, Tile(*tile)).sqrt()
    roots = tile_sizes(weight.shape, Tile(*tile)).double().sqrt()
    assert ((norms / roots - 0.6).abs() > 1e-3).all()  # away from the kink
    assert torch.autograd.gradcheck(lambda w, a: group_threshold(w, a, tile), (weight, alpha))
    assert torch.autograd.gradcheck(
        lambda w, a: group_threshold_reference(w, a, Tile(*tile)), (weight, alpha)
    )


@pytest.mark.parametrize("backend", backends_of(GROUP_THRESHOLD))
def test_groups_of_one_are_the_soft_threshold(backend, device):
    weights, _, _, alpha = make(CASES["single-weights"], device, torch.float32)
    skip_if_unusable(GROUP_THRESHOLD, backend, weights, alpha, Tile(1, 1))
    with use_backend(backend):
        found = group_threshold(weights[0], alpha, (1, 1))
    torch.testing.assert_close(
        found, soft_threshold_reference(weights[0], alpha), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("backend", backends_of(GROUP_THRESHOLD))
def test_zero_groups_die_and_nan_survives(backend, device):
    weight = torch.ones(4, 4, device=device)
    weight[:2, :2] = 0.0
    weight[2:, 2:] = float("nan")
    alpha = torch.zeros((), device=device, requires_grad=True)
    weight.requires_grad_()
    skip_if_unusable(GROUP_THRESHOLD, backend, [weight], alpha, Tile(2, 2))
    with use_backend(backend):
        value = group_threshold(weight, alpha, (2, 2))
    found, _ = torch.autograd.grad(value[:2].sum(), (weight, alpha))
    assert torch.equal(value[:2].detach(), weight[:2].detach())
    assert value[2:, 2:].isnan().all()
    assert not found[:2, :2].any()  # 0 / 0 was not formed
    torch.testing.assert_close(found[:2, 2:], torch.ones(2, 2, device=device))


def test_a_group_by_hand():
    weight = torch.tensor([[3.0, 4.0]], requires_grad=True)  # ‖W‖ = 5, n = 2
    alpha = torch.tensor(math.sqrt(2.0), requires_grad=True)  # t = 2 / 5
    value = group_threshold(weight, alpha, (1, 2))
    torch.testing.assert_close(value, torch.tensor([[1.8, 2.4]]))
    found, grad_alpha = torch.autograd.grad(value, (weight, alpha), torch.tensor([[1.0, 0.0]]))
    # (1 − t) g + t û (û·g) = 0.6 (1, 0) + 0.4 · 0.6 (0.6, 0.8)
    torch.testing.assert_close(found, torch.tensor([[0.744, 0.192]]))
    torch.testing.assert_close(grad_alpha, torch.tensor(-math.sqrt(2.0) * 0.6))


def test_tiles_go_there_and_back():
    values = torch.randn(5, 7, 2, 3)
    tile = Tile(2, 3)
    means = tile_sums(values, tile) / tile_sizes(values.shape, tile)
    again = tile_sums(spread_tiles(means, values.shape, tile), tile)
    torch.testing.assert_close(again, tile_sums(values, tile))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="a tile of rows ≥ 1 and columns ≥ 0"):
        group_threshold(torch.ones(2, 2), torch.tensor(0.1), (0, 1))
    with pytest.raises(ValueError, match="alpha ≥ 0"):
        group_threshold(torch.ones(2, 2), torch.tensor(-0.1), (1, 1))


def test_a_compiled_call_agrees():
    weight = torch.randn(6, 6, 3, 3, requires_grad=True)
    alpha = torch.tensor(0.9, requires_grad=True)

    def call(w, a):
        return group_threshold(w, a, (4, 4)) * 2.0

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight, alpha), call(weight, alpha))
