"""Values of another type than the weights', tiles, and Adam's step with group thresholds."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from sparsemtl.ops import (
    SOFT_THRESHOLD,
    SOFT_THRESHOLD_STATS,
    THRESHOLD_ADAM,
    AdamRule,
    BackendUnavailable,
    soft_threshold_component,
    soft_threshold_reference,
    soft_threshold_stats,
    threshold_adam,
    threshold_adam_reference,
    use_backend,
)
from sparsemtl.ops.group_threshold import group_norms, group_threshold_component
from sparsemtl.ops.tiles import Tile
from tests.ops.support import backends_of, skip_if_unusable

INTERPRETER = pytest.mark.interpreter


@pytest.mark.parametrize("backend", backends_of(SOFT_THRESHOLD))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_values_of_another_type_are_rounded_last(backend, dtype, device):
    """One rounding of S from float32, and the gradients of both arguments through it."""
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=rng).to(device) for s in ((33, 20, 3, 3), (16,), (7,))]
    alpha = torch.tensor(0.4, device=device)
    skip_if_unusable(SOFT_THRESHOLD, backend, weights, alpha, dtype)
    leaves = [w.clone().requires_grad_() for w in weights]
    a = alpha.clone().requires_grad_()
    with use_backend(backend):
        values = soft_threshold_component(leaves, a, dtype=dtype)
    grads = [torch.randn(w.shape, generator=rng).to(device, dtype) for w in weights]
    found = torch.autograd.grad(values, [*leaves, a], grads)
    wanted = [w.clone().requires_grad_() for w in weights]
    b = alpha.clone().requires_grad_()
    expected = [soft_threshold_reference(w, b).to(dtype) for w in wanted]
    for value, e in zip(values, expected, strict=True):
        assert value.dtype is dtype
        assert torch.equal(value, e)
    sums = torch.autograd.grad(expected, [*wanted, b], grads)
    for f, e in zip(found, sums, strict=True):
        assert f.dtype is torch.float32
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="Expected dtype in"):
        soft_threshold_component(weights, alpha, dtype=torch.int32)


TILES = {  # shapes, tile
    "whole": ([(32, 48, 3, 3)], (16, 16)),
    "clipped": ([(33, 20, 3, 3), (5, 70)], (16, 32)),
    "uneven": ([(9, 5, 2, 3)], (3, 5)),
    "larger": ([(3, 2, 1, 1)], (16, 16)),
    "empty": ([(0, 4, 3, 3), (4, 4)], (2, 2)),
}


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=INTERPRETER)])
@pytest.mark.parametrize("case", TILES.values(), ids=TILES.keys())
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_tiles_are_counted_and_measured(backend, case, layout, device):
    shapes, tile = case[0], Tile(*case[1])
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=rng).to(device) for s in shapes]
    if layout == "channels-last":
        weights = [
            w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w for w in weights
        ]
    alpha = torch.tensor(0.8, device=device)
    skip_if_unusable(SOFT_THRESHOLD_STATS, backend, weights, alpha, False, torch.float32, tile)
    with use_backend(backend):
        found = soft_threshold_stats(weights, alpha, tile=tile)
        plain = soft_threshold_stats(weights, alpha)
    assert torch.equal(found.nonzeros, plain.nonzeros)
    assert found.bitmasks is None
    for i, weight in enumerate(weights):
        assert torch.equal(found.values[i], plain.values[i])
        taps = weight.reshape(*weight.shape[:2], weight[0, 0].numel() if weight.numel() else 9)
        for place, live in ndenumerate(found.tiles[i]):
            r, q, t = place
            part = taps[r * tile[0] : (r + 1) * tile[0], q * tile[1] : (q + 1) * tile[1], t]
            assert live == int((part.abs() > 0.8).sum())
            norm = part.double().square().sum().sqrt().item()
            assert abs(found.norms[i][place].item() - norm) <= 1e-6 * max(norm, 1.0)


def ndenumerate(values):
    """Places and values of a tensor."""
    for place in product(*map(range, values.shape)):
        yield place, int(values[place])


def test_what_tiles_cannot_be_is_refused():
    weight, alpha = torch.ones(4, 4), torch.tensor(0.5)
    for options in ({"tile": (2, 0)}, {"tile": (2, 2), "bitmask": True}):
        with pytest.raises(ValueError, match="Expected tile of columns ≥ 1"):
            soft_threshold_stats([weight], alpha, **options)
    with pytest.raises(ValueError, match="on \\[1\\] axes"):
        soft_threshold_stats([weight[0]], alpha, tile=(2, 2))
    with pytest.raises(ValueError, match="rows ≥ 1"):
        soft_threshold_stats([weight], alpha, tile=(0, 2))
    with use_backend("native"), pytest.raises(BackendUnavailable, match="does not count tiles"):
        soft_threshold_stats([weight], alpha, tile=(2, 2))


GROUPS = {  # shapes, tile
    "blocks": ([(33, 20, 3, 3), (16, 48)], (16, 16)),
    "uneven": ([(9, 5, 2, 3)], (3, 5)),
    "channels": ([(6, 5, 3, 3), (4, 9)], (1, 0)),
    "empty": ([(0, 4), (4, 4)], (2, 2)),
}
RULES = {
    "coupled": {"weight_decay": 1e-2},
    "decoupled": {"weight_decay": 1e-2, "decoupled": True, "betas": (0.3, 0.9)},
}


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=INTERPRETER)])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("case", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_step_of_adam_shrinks_groups(backend, case, rule, dtype, device):
    """The step is that of single weights; S and norms are group_threshold's of what it leaves."""
    shapes, tile = case[0], Tile(*case[1])
    rng = torch.Generator().manual_seed(0)
    draw = [[torch.randn(s, generator=rng).to(device) for s in shapes] for _ in range(3)]
    state = [*draw, [torch.rand(s, generator=rng).to(device) for s in shapes]]
    plain = [[t.clone() for t in group] for group in state]
    rules = [AdamRule(lr=0.05, step=2, **rule)] * len(shapes)
    alpha, owners = torch.tensor([0.7, 1.1], device=device), [i % 2 for i in range(len(shapes))]
    skip_if_unusable(THRESHOLD_ADAM, backend, *state, rules, alpha, owners, None, tile)
    with use_backend(backend):
        out = threshold_adam(*state, rules, alpha, owners, dtype=dtype, tile=tile)
        same = threshold_adam(
            *[[t.clone() for t in group] for group in plain],
            *(rules, alpha, owners), dtype=dtype, tile=tile, out=out,
        )  # fmt: skip
    assert same is out
    threshold_adam_reference(*plain, rules)
    for found, expected in zip(state, plain, strict=True):
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-7)
    assert out.bitmasks is None
    for i, weight in enumerate(state[0]):
        (value,) = group_threshold_component([weight], alpha[owners[i]], tile, dtype=dtype)
        torch.testing.assert_close(out.values[i], value, rtol=2e-3, atol=1e-5)
        torch.testing.assert_close(out.norms[i], group_norms([weight], tile)[0])
        assert int(out.nonzeros[i]) == int((value != 0).sum())


def test_groups_without_a_threshold_are_refused():
    state = [[torch.ones(4, 4)] for _ in range(4)]
    with pytest.raises(ValueError, match="got no alpha"):
        threshold_adam(*state, [AdamRule()], tile=(2, 2))
    alpha = torch.ones(1)
    with pytest.raises(ValueError, match="got bitmask"):
        threshold_adam(*state, [AdamRule()], alpha, [0], tile=(2, 2), bitmask=True)
    out = threshold_adam(*state, [AdamRule()], alpha, [0], tile=(2, 2))
    with pytest.raises(ValueError, match="an earlier result"):
        threshold_adam(*state, [AdamRule()], alpha, [0], tile=(4, 4), out=out)
