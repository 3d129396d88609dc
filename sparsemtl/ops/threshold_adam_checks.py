"""Checks of threshold_adam's arguments, once, at the public boundary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsemtl.ops.tiles import Tile, check_tile, grid

if TYPE_CHECKING:
    from sparsemtl.ops.soft_threshold import ThresholdStats

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_state(state: list[list[Tensor]], rules: int) -> None:
    """Weights, gradients and moments must be alike, as many as there are rules."""
    who, count = "threshold_adam", len(state[0])
    names, counts = ("grads", "means", "squares", "rules"), [*map(len, state[1:]), rules]
    for name, found in zip(names, counts, strict=True):
        if found != count:
            raise ValueError(f"{who}: Expected {name} to hold {count} entries, got {found}")
    if not count:
        return
    first = state[0][0]
    for name, tensors in zip(("weights", "grads", "means", "squares"), state, strict=True):
        for tensor, weight in zip(tensors, state[0], strict=True):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{who}: Expected {name} of Tensors, got {type(tensor).__name__}")
            if tensor.dtype not in _FLOATS or tensor.layout is not torch.strided:
                raise TypeError(
                    f"{who}: Expected {name} to be strided float32, bfloat16, float16 or "
                    f"float64, got {tensor.layout} {tensor.dtype}"
                )
            same = name == "grads" or tensor.dtype is first.dtype
            if tensor.shape != weight.shape or tensor.device != first.device or not same:
                raise ValueError(
                    f"{who}: Expected {name} like the weights, {first.dtype} of shape "
                    f"{list(weight.shape)} on {first.device}, got {tensor.dtype} of shape "
                    f"{list(tensor.shape)} on {tensor.device}"
                )
    changed = [t for tensors in (state[0], *state[2:]) for t in tensors if t.numel() > 0]
    if len({id(t) for t in changed}) != len(changed):
        raise ValueError(f"{who}: Expected weights, means and squares to differ, got one twice")


def check_alpha(weights: list[Tensor], alpha: Tensor | None, owners: list[int]) -> None:
    """Thresholds ≥ 0, and an owner for every weight."""
    who = "threshold_adam"
    if alpha is None:
        if owners:
            raise ValueError(f"{who}: Expected no owners without alpha, got {len(owners)}")
        return
    if not isinstance(alpha, Tensor):
        raise TypeError(f"{who}: Expected alpha to be a Tensor, got {type(alpha).__name__}")
    device = weights[0].device if weights else alpha.device
    if alpha.dim() != 1 or alpha.device != device or not alpha.is_floating_point():
        raise ValueError(
            f"{who}: Expected alpha to be floating values [G] on {device}, "
            f"got {alpha.dtype} of shape {list(alpha.shape)} on {alpha.device}"
        )
    if len(owners) != len(weights):
        raise ValueError(
            f"{who}: Expected owners to hold {len(weights)} entries, got {len(owners)}"
        )
    wrong = [owner for owner in owners if not 0 <= owner < len(alpha)]
    if wrong:
        raise ValueError(f"{who}: Expected owners in [0, {len(alpha)}), got {wrong[0]}")
    # On a GPU this would wait for everything before it; there a negative alpha grows weights.
    if alpha.device.type == "cpu" and bool((alpha < 0).any()):
        raise ValueError(f"{who}: Expected alpha ≥ 0, got {alpha.min().item()}")


def check_groups(tile: Tile | None, alpha: Tensor | None, bitmask: bool) -> None:
    """Groups need a threshold, and have no bit for each weight."""
    if tile is None:
        return
    check_tile("threshold_adam", tile)
    if alpha is None or bitmask:
        raise ValueError(
            "threshold_adam: Expected tile together with alpha and without bitmask, "
            f"got {'bitmask' if bitmask else 'no alpha'}"
        )


def check_out(
    weights: list[Tensor],
    out: ThresholdStats,
    dtype: torch.dtype | None,
    bitmask: bool,
    tile: Tile | None = None,
) -> None:
    """An earlier result must fit in number, shape and type."""
    fits = (
        len(out.values) == len(out.nonzeros) == len(weights)
        and (out.bitmasks is None or len(out.bitmasks) == len(weights))
        and (out.bitmasks is not None or not bitmask)
        and all(
            v.shape == w.shape and v.dtype is (dtype or w.dtype) and v.device == w.device
            for v, w in zip(out.values, weights, strict=True)
        )
        and (out.norms is None) == (tile is None)
        and (
            out.norms is None
            or tile is None
            or [tuple(n.shape) for n in out.norms] == [grid(w.shape, tile) for w in weights]
        )
    )
    if not fits:
        raise ValueError(
            "threshold_adam: Expected out to be an earlier result for these weights, "
            f"got {len(out.values)} values for {len(weights)} weights, or of other shapes or types"
        )
