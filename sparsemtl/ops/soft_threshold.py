"""Soft threshold of a component's weights, S(W, α) = sign(W) · max(|W| − α, 0).

A weight is dead if |w| ≤ α and alive otherwise, NaN included: B = not (|W| ≤ α), so that a NaN
shows instead of becoming a zero. Gradients are exact: grad_W = g · B and
grad_α = −Σ g · sign(W) · B, the sum over every tensor of the component. Storage is float32,
bfloat16, float16 or float64; arithmetic is float32, or float64 for float64.

P: number of weights of one tensor. n: number of tensors in the component.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsemtl.ops import soft_threshold_backends as backends
from sparsemtl.ops.availability import why_not_cuda, why_not_native, why_not_triton
from sparsemtl.ops.dispatch import (
    Backend,
    Op,
    in_functorch,
    is_batched,
    require_reference,
    through_torch,
)
from sparsemtl.ops.tiles import Tile, check_tile, tile_sums

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ThresholdStats(NamedTuple):
    """S(W) of a component's tensors, with what is alive in them. R, Q, T: see tiles.py.

    values:   n tensors, each like its weight
    nonzeros: [n] int64 on the weights' device, live weights of each tensor
    bitmasks: n tensors [⌈P / 8⌉] uint8, or None. Bit i % 8 (lowest first) of byte i // 8 is the
              i-th weight in the order of the values' memory; the last byte is padded with zeros
    norms:    n tensors [R, Q, T] float32, ‖W_g‖ of each tile, where tiles were asked for
    tiles:    n tensors [R, Q, T] int32, live weights of each tile, where they were counted
    """

    values: tuple[Tensor, ...]
    nonzeros: Tensor
    bitmasks: tuple[Tensor, ...] | None
    norms: tuple[Tensor, ...] | None = None
    tiles: tuple[Tensor, ...] | None = None


def soft_threshold(weight: Tensor, alpha: Tensor) -> Tensor:
    """Shrink a weight towards zero, differentiably in both arguments.

    weight:  any shape, strided, float32, bfloat16, float16 or float64; its memory format is kept
    alpha:   one value ≥ 0 of a floating type, on the weight's device
    returns: like weight
    raises:  TypeError, ValueError for other arguments; BackendUnavailable
    """
    _check("soft_threshold", [weight], alpha)
    if through_torch(weight, alpha):
        return torch.ops.sparsemtl.soft_threshold(weight, alpha)
    return _eager([weight], alpha)[0]


def soft_threshold_component(
    weights: Sequence[Tensor], alpha: Tensor, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Shrink every tensor of a component by one threshold, in one backend call.

    weights: n ≥ 1 tensors as in `soft_threshold`, of one type, on one device
    alpha:   one value ≥ 0; its gradient is summed over the tensors in their order, with the same
             bits at any number of threads
    dtype:   type of the values, rounded after the subtraction; None: the weights'
    returns: n tensors, each like its weight
    raises:  TypeError, ValueError for other arguments; BackendUnavailable
    """
    weights = list(weights)
    _check("soft_threshold_component", weights, alpha, dtype)
    if through_torch(alpha, *weights):
        found = torch.ops.sparsemtl.soft_threshold_component(weights, alpha)
        return tuple(value.to(dtype or value.dtype) for value in found)
    return _eager(weights, alpha, dtype)


def soft_threshold_stats(
    weights: Sequence[Tensor],
    alpha: Tensor,
    *,
    bitmask: bool = False,
    dtype: torch.dtype | None = None,
    tile: Tile | tuple[int, int] | None = None,
) -> ThresholdStats:
    """Shrink as `soft_threshold_component` does and count the live weights; without autograd.

    bitmask: whether to return one bit per weight as well
    dtype:   type of the values; None: the weights'
    tile:    output by input channels, both ≥ 1: count the live weights of each tile as well, and
             give the norm of all its weights; not together with bitmask
    """
    who, weights = "soft_threshold_stats", [weight.detach() for weight in weights]
    _check(who, weights, alpha, dtype)
    _check_value(who, alpha)
    if tile is not None:
        tile = Tile(*tile)
        check_tile(who, tile)
        if tile.columns == 0 or bitmask or any(w.dim() not in (2, 4) for w in weights):
            raise ValueError(
                f"{who}: Expected tile of columns ≥ 1, on weights of 2 or 4 axes, without bitmask, "
                f"got {tuple(tile)} on {[w.dim() for w in weights]} axes"
            )
    with torch.no_grad():
        arguments = (weights, alpha.detach(), bitmask, dtype or weights[0].dtype, tile)
        return SOFT_THRESHOLD_STATS.choose(*arguments).forward(*arguments)


def soft_threshold_reference(weight: Tensor, alpha: Tensor) -> Tensor:
    """The meaning of soft_threshold: any float dtype and device, differentiated by torch itself."""
    w, a = backends.to_arithmetic(weight), alpha.reshape(())
    a = a.to(w.dtype)
    return torch.where(w.abs() <= a, 0.0, w - a * w.sign()).to(weight.dtype)


def soft_threshold_bytes(weights: Sequence[Tensor]) -> int:
    """Memory traffic of forward and backward together: W read twice, S, g and grad_W once each.

    An elementwise op has no multiply-adds to count: torch's FlopCounterMode gives such ops 0, and
    so do we. Bytes are what bounds it.
    """
    return sum(5 * weight.numel() * weight.element_size() for weight in weights)


def _check(
    who: str, weights: Sequence[Tensor], alpha: Tensor, dtype: torch.dtype | None = None
) -> None:
    if dtype is not None and dtype not in _FLOATS:
        raise TypeError(f"{who}: Expected dtype in {list(_FLOATS)} or None, got {dtype}")
    if not isinstance(alpha, Tensor):
        raise TypeError(f"{who}: Expected alpha to be a Tensor, got {type(alpha).__name__}")
    if not weights:
        raise ValueError(f"{who}: Expected weights to hold at least one tensor, got none")
    for weight in weights:
        if not isinstance(weight, Tensor):
            raise TypeError(f"{who}: Expected weight to be a Tensor, got {type(weight).__name__}")
        if weight.dtype not in _FLOATS or weight.layout is not torch.strided:
            raise TypeError(
                f"{who}: Expected weight to be strided float32, bfloat16, float16 or float64, "
                f"got {weight.layout} {weight.dtype}"
            )
        if weight.device != weights[0].device or weight.dtype is not weights[0].dtype:
            raise ValueError(
                f"{who}: Expected weights to share one device and dtype, got "
                f"{weights[0].dtype} on {weights[0].device} and {weight.dtype} on {weight.device}"
            )
    device = weights[0].device
    if alpha.numel() != 1 or alpha.device != device or not alpha.is_floating_point():
        raise ValueError(
            f"{who}: Expected alpha to be one floating value on {device}, "
            f"got {alpha.dtype} of shape {list(alpha.shape)} on {alpha.device}"
        )


def _check_value(who: str, alpha: Tensor) -> None:
    # On a GPU this would wait for everything before it; there a negative alpha grows weights.
    if alpha.device.type == "cpu" and alpha.item() < 0:
        raise ValueError(f"{who}: Expected alpha ≥ 0, got {alpha.item()}")


def _eager(
    weights: list[Tensor], alpha: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Call the backend without torch's dispatcher, through autograd only where it is needed."""
    if in_functorch():
        require_reference(SOFT_THRESHOLD)
        return _reference(weights, alpha, dtype)
    _check_value("soft_threshold", alpha)
    if torch.is_grad_enabled() and (alpha.requires_grad or any(w.requires_grad for w in weights)):
        return _SoftThreshold.apply(alpha, dtype, *weights)
    return SOFT_THRESHOLD.choose(weights, alpha, dtype).forward(weights, alpha, dtype)


class _SoftThreshold(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, alpha: Tensor, dtype: torch.dtype | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(alpha, *weights)
        # A backward may run in another thread.
        ctx.backend = SOFT_THRESHOLD.choose(weights, alpha, dtype)
        return ctx.backend.forward(weights, alpha, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        alpha, *weights = ctx.saved_tensors
        used = [i for i, grad in enumerate(grads) if grad is not None]  # others add nothing
        if not used:
            return (None,) * (2 + len(weights))
        given = [grad for grad in grads if grad is not None]
        # Plain torch where the gradient stands for many or will be differentiated itself.
        plain = torch.is_grad_enabled() or any(map(is_batched, given))
        backward = backends.reference_backward if plain else ctx.backend.backward
        found, grad_alpha = backward([weights[i] for i in used], alpha, given)
        grad_weights: list[Tensor | None] = [None] * len(weights)
        for i, grad_weight in zip(used, found, strict=True):
            grad_weights[i] = grad_weight if ctx.needs_input_grad[2 + i] else None
        return (grad_alpha if ctx.needs_input_grad[0] else None, None, *grad_weights)


# torch.library: what torch.compile, torch.export and dispatch modes see.


@torch.library.custom_op("sparsemtl::soft_threshold_component", mutates_args=())
def _component(weights: list[Tensor], alpha: Tensor) -> list[Tensor]:
    _check_value("soft_threshold", alpha)
    return list(SOFT_THRESHOLD.choose(weights, alpha).forward(weights, alpha))


@torch.library.custom_op("sparsemtl::soft_threshold_component_backward", mutates_args=())
def _component_backward(
    weights: list[Tensor], alpha: Tensor, grads: list[Tensor]
) -> tuple[list[Tensor], Tensor]:
    chosen = SOFT_THRESHOLD.choose(weights, alpha)
    assert chosen.backward is not None
    grad_weights, grad_alpha = chosen.backward(weights, alpha, grads)
    return list(grad_weights), grad_alpha


@torch.library.custom_op("sparsemtl::soft_threshold", mutates_args=())
def _single(weight: Tensor, alpha: Tensor) -> Tensor:
    return _component._init_fn([weight], alpha)[0]


@torch.library.custom_op("sparsemtl::soft_threshold_backward", mutates_args=())
def _single_backward(weight: Tensor, alpha: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    grad_weights, grad_alpha = _component_backward._init_fn([weight], alpha, [grad])
    return grad_weights[0], grad_alpha


@_component.register_fake
def _(weights: list[Tensor], alpha: Tensor) -> list[Tensor]:
    return [torch.empty_like(weight) for weight in weights]


@_component_backward.register_fake
def _(weights: list[Tensor], alpha: Tensor, grads: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    return [torch.empty_like(weight) for weight in weights], torch.empty_like(alpha)


@_single.register_fake
def _(weight: Tensor, alpha: Tensor) -> Tensor:
    return torch.empty_like(weight)


@_single_backward.register_fake
def _(weight: Tensor, alpha: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(alpha)


def _save_component(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    weights, alpha = inputs
    ctx.save_for_backward(alpha, *weights)


def _differentiate_component(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, Any]:
    alpha, *weights = ctx.saved_tensors
    dense = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads, strict=True)]
    return torch.ops.sparsemtl.soft_threshold_component_backward(weights, alpha, dense)


def _save_single(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_single(ctx: Any, grad: Tensor) -> tuple[Any, Any]:
    return torch.ops.sparsemtl.soft_threshold_backward(*ctx.saved_tensors, grad)


_component.register_autograd(_differentiate_component, setup_context=_save_component)
_single.register_autograd(_differentiate_single, setup_context=_save_single)


def _never(*_: Any) -> None:
    return None


def _reference(
    weights: Sequence[Tensor], alpha: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    values = (soft_threshold_reference(weight, alpha) for weight in weights)
    return tuple(value.to(dtype or value.dtype) for value in values)


def _reference_stats(
    weights: Sequence[Tensor],
    alpha: Tensor,
    bitmask: bool,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> ThresholdStats:
    counted = backends.count_reference(weights, alpha, bitmask)
    values = _reference(weights, alpha, dtype)
    if tile is None:
        return ThresholdStats(values, *counted)
    wide = [backends.to_arithmetic(weight) for weight in weights]
    norms = tuple(tile_sums(w * w, tile).sqrt_().float() for w in wide)
    alive = (~(w.abs() <= alpha.reshape(()).to(w.dtype)) for w in wide)
    tiles = tuple(tile_sums(a.to(torch.int32), tile).to(torch.int32) for a in alive)
    return ThresholdStats(values, *counted, norms, tiles)


SOFT_THRESHOLD = Op(
    "soft_threshold",
    (
        Backend(
            "triton",
            backends.triton,
            backends.triton_backward,
            backends.unless_type(why_not_triton),
        ),
        Backend("cuda", backends.cuda, backends.cuda_backward, backends.unless_type(why_not_cuda)),
        Backend(
            "native",
            backends.native,
            backends.native_backward,
            backends.unless_type(why_not_native),
        ),
        Backend("reference", _reference, backends.reference_backward, _never),
    ),
)
SOFT_THRESHOLD_STATS = Op(
    "soft_threshold_stats",
    (
        Backend(
            "triton",
            backends.triton_stats,
            None,
            backends.unless_values(why_not_triton, tiles=True),
        ),
        Backend("native", backends.native_stats, None, backends.unless_values(why_not_native)),
        Backend("reference", _reference_stats, None, _never),
    ),
)
