"""Soft threshold of groups of weights: a group shrinks and dies as a whole.

For a group g of n weights, with t = α √n / ‖W_g‖:

    S = W_g · max(0, 1 − t),   alive if RMS(W_g) > α, NaN included: not (‖W_g‖ / √n ≤ α)
    grad_W = B · [(1 − t) · g + t · û · (û·g)],   grad_α = −√n · Σ B · (û·g),   û = W_g / ‖W_g‖

α keeps the unit that it has for single weights, which are the case n = 1. Groups are tiles of
output by input channels at one tap (tiles.py); at the edge of a weight they have the n that is
there. Storage is float32, bfloat16, float16 or float64, arithmetic float32, or float64 for float64.

Source of the shrinkage: Yuan and Lin, group lasso, JRSS-B 2006, as a proximal step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsemtl.ops.availability import why_not_triton
from sparsemtl.ops.dispatch import Backend, Op, in_functorch, through_torch
from sparsemtl.ops.layout import dense, laid_out_like, ordered_like
from sparsemtl.ops.soft_threshold import _check, _check_value
from sparsemtl.ops.soft_threshold_backends import (
    to_arithmetic,
    why_not_groups,
    why_not_triton_values,
)
from sparsemtl.ops.tiles import (
    Tile,
    check_tile,
    grid,
    spread_tiles,
    tile_sizes,
    tile_sums,
)


def group_threshold(weight: Tensor, alpha: Tensor, tile: Tile | tuple[int, int]) -> Tensor:
    """Shrink the groups of a weight towards zero, differentiably in both arguments.

    weight:  [K, C, ...], strided, float32, bfloat16, float16 or float64
    alpha:   one value ≥ 0 of a floating type, on the weight's device
    tile:    output by input channels of a group; columns 0 takes whole rows, of all taps
    returns: like weight
    raises:  TypeError, ValueError for other arguments; BackendUnavailable
    """
    return group_threshold_component([weight], alpha, tile)[0]


def group_threshold_component(
    weights: Sequence[Tensor],
    alpha: Tensor,
    tile: Tile | tuple[int, int],
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Shrink every tensor of a component by one threshold.

    weights: n ≥ 1 tensors as in `group_threshold`, of one type, on one device
    alpha:   one value ≥ 0; its gradient is summed over the tensors in a fixed order
    dtype:   type of the values, rounded at the end; None: the weights'
    returns: n tensors, each like its weight
    raises:  TypeError, ValueError for other arguments; BackendUnavailable
    """
    weights, tile = list(weights), Tile(*tile)
    _check("group_threshold", weights, alpha, dtype)
    check_tile("group_threshold", tile)
    tracing = in_functorch() or through_torch(alpha, *weights)
    if tracing:  # torch sees and differentiates the reference itself
        values = (group_threshold_reference(weight, alpha, tile) for weight in weights)
        return tuple(value.to(dtype or value.dtype) for value in values)
    _check_value("group_threshold", alpha)
    if torch.is_grad_enabled() and (alpha.requires_grad or any(w.requires_grad for w in weights)):
        return _GroupThreshold.apply(alpha, tile, dtype, *weights)
    chosen = GROUP_THRESHOLD.choose(weights, alpha, tile, dtype)
    return chosen.forward(weights, alpha, tile, dtype)[0]


def group_threshold_reference(weight: Tensor, alpha: Tensor, tile: Tile) -> Tensor:
    """The meaning of group_threshold: any float dtype and device, differentiated by torch."""
    w = to_arithmetic(weight)
    squares = tile_sums(w * w, tile)  # [R, Q, T]
    roots = tile_sizes(weight.shape, tile).to(w).sqrt()
    a = alpha.reshape(()).to(w.dtype)
    alive = ~(squares.sqrt() / roots <= a)
    norms = torch.where(alive, squares, 1.0).sqrt()  # √0 has no gradient
    scale = torch.where(alive, 1.0 - a * roots / norms, 0.0)
    spread = spread_tiles(scale, weight.shape, tile)
    return torch.where(spread == 0.0, 0.0, w * spread).to(weight.dtype)


def group_norms(weights: Sequence[Tensor], tile: Tile) -> list[Tensor]:
    """‖W_g‖ of each group of each tensor: [R, Q, T], in the type of the arithmetic."""
    found = []
    for weight in weights:
        w = to_arithmetic(weight.detach())
        found.append(tile_sums(w * w, tile).sqrt_())
    return found


class _GroupThreshold(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, alpha: Tensor, tile: Tile, dtype: torch.dtype | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.backend = GROUP_THRESHOLD.choose(weights, alpha, tile, dtype)
        ctx.tile = tile
        values, ctx.norms = ctx.backend.forward(weights, alpha, tile, dtype)
        ctx.save_for_backward(alpha, *weights)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        alpha, *weights = ctx.saved_tensors
        used = [i for i, grad in enumerate(grads) if grad is not None]  # others add nothing
        found: list[Tensor | None] = [None] * len(weights)
        if not used:
            return (None, None, None, *found)
        given = [grad for grad in grads if grad is not None]
        norms = [ctx.norms[i] for i in used]
        some, grad_alpha = ctx.backend.backward(
            [weights[i] for i in used], alpha, ctx.tile, given, norms
        )
        for i, grad_weight in zip(used, some, strict=True):
            found[i] = grad_weight
        return (grad_alpha if ctx.needs_input_grad[0] else None, None, None, *found)


# Reference: the gradients written out.


def _reference(
    weights: Sequence[Tensor], alpha: Tensor, tile: Tile, dtype: torch.dtype | None = None
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    with torch.no_grad():
        values = tuple(
            laid_out_like(group_threshold_reference(weight, alpha, tile), dense(weight)).to(
                dtype or weight.dtype
            )
            for weight in weights
        )
    return values, group_norms(weights, tile)


def _reference_backward(
    weights: Sequence[Tensor],
    alpha: Tensor,
    tile: Tile,
    grads: Sequence[Tensor],
    norms: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], Tensor]:
    found, total = [], torch.zeros((), dtype=torch.float64, device=alpha.device)
    for weight, grad, norm in zip(weights, grads, norms, strict=True):
        w, g = to_arithmetic(weight), to_arithmetic(grad)
        roots = tile_sizes(weight.shape, tile).to(w).sqrt()
        a = alpha.reshape(()).to(w.dtype)
        alive = ~(norm / roots <= a)
        safe = torch.where(alive, norm, 1.0)
        t = a * roots / safe
        along = tile_sums(w * g, tile) / safe  # û · g
        total = total - (torch.where(alive, roots * along, 0.0)).sum(dtype=torch.float64)
        towards = spread_tiles(torch.where(alive, t * along / safe, 0.0), weight.shape, tile)
        keep = spread_tiles(torch.where(alive, 1.0 - t, 0.0), weight.shape, tile)
        there = spread_tiles(alive, weight.shape, tile)
        grad_weight = torch.where(there, keep * g + towards * w, 0.0).to(weight.dtype)
        found.append(laid_out_like(grad_weight, dense(weight)))
    return tuple(found), total.to(alpha.dtype).reshape(alpha.shape)


# Triton: kernels/group_threshold.py.


def _why_not_triton(
    weights: Sequence[Tensor] = (),
    alpha: Tensor | None = None,
    tile: Tile | None = None,
    dtype: torch.dtype | None = None,
) -> str | None:
    reason = why_not_triton(weights[0] if weights else None) or why_not_triton_values(dtype)
    if reason is not None or tile is None:
        return reason
    return why_not_groups(weights, tile)


def _triton(
    weights: Sequence[Tensor], alpha: Tensor, tile: Tile, dtype: torch.dtype | None = None
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    from sparsemtl.kernels.group_threshold import group_threshold_fwd

    weights = [dense(weight.detach()) for weight in weights]
    values = tuple(torch.empty_like(weight, dtype=dtype) for weight in weights)
    norms = [
        torch.empty(grid(w.shape, tile), dtype=torch.float32, device=w.device) for w in weights
    ]
    group_threshold_fwd(weights, alpha.detach().float(), values, norms, tuple(tile))
    return values, norms


def _triton_backward(
    weights: Sequence[Tensor],
    alpha: Tensor,
    tile: Tile,
    grads: Sequence[Tensor],
    norms: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], Tensor]:
    from sparsemtl.kernels.group_threshold import group_threshold_bwd

    weights = [dense(weight.detach()) for weight in weights]
    grads = [ordered_like(grad, weight) for grad, weight in zip(grads, weights, strict=True)]
    found = tuple(torch.empty_like(weight) for weight in weights)
    partials = group_threshold_bwd(
        weights, alpha.detach().float(), grads, norms, found, tuple(tile)
    )
    total = -partials.sum(dtype=torch.float64)  # one order for one shape, no atomics
    return found, total.to(alpha.dtype).reshape(alpha.shape)


GROUP_THRESHOLD = Op(
    "group_threshold",
    (
        Backend("triton", _triton, _triton_backward, _why_not_triton),
        Backend("reference", _reference, _reference_backward, lambda *_: None),
    ),
)
