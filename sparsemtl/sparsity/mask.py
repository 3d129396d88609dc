"""Masks of an exact size: keep the best-scored weights, ties by index.

The order of ties is component, layer, then flat index: the same bits on each machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOWER_BITS = 15  # left out of the first count: 2^16 bins, each 0.4 % wide


def kept_count(numel: int, sparsity: float) -> int:
    """How many of `numel` weights survive at `sparsity`, rounded to the nearest count.

    raises: ValueError if sparsity is outside [0, 1).
    """
    check_sparsity("kept_count", "sparsity", sparsity)
    return numel - round(sparsity * numel)


def check_sparsity(who: str, name: str, sparsity: float) -> None:
    """raises ValueError unless 0 ≤ sparsity < 1 (a fraction of zeros; NaN is refused)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise TypeError(f"{who}: Expected {name} to be a number in [0, 1), got {sparsity!r}")
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"{who}: Expected {name} in [0, 1) (a fraction of zeros), got {sparsity}")


def top_masks(scores: Sequence[Sequence[Tensor]], kept: int) -> tuple[list[list[Tensor]], float]:
    """Masks that keep exactly `kept` of all scores, the largest ones.

    scores:  per group, per layer; any shapes, ≥ 0.
    returns: bool masks in the same nesting, and the largest score left out (0.0 if none is).
    """
    flat = torch.cat([s.detach().reshape(-1).float() for group in scores for s in group])
    if not 0 <= kept <= flat.numel():
        raise ValueError(f"top_masks: Expected kept in [0, {flat.numel()}], got {kept}")
    if torch.isnan(flat).any():
        raise ValueError("top_masks: Expected scores without NaN, got NaN")
    dropped = flat.numel() - kept
    if dropped == 0:
        keep, cut = torch.ones_like(flat, dtype=torch.bool), 0.0
    else:
        cut = kth_smallest(flat, dropped)
        keep = flat > cut
        ties = (flat == cut).nonzero().squeeze(1)
        keep[ties[: kept - int(keep.sum())]] = True
    masks: list[list[Tensor]] = []
    start = 0
    for group in scores:
        masks.append([])
        for layer in group:
            masks[-1].append(keep[start : start + layer.numel()].reshape(layer.shape).clone())
            start += layer.numel()
    return masks, cut


def kth_smallest(values: Tensor, k: int) -> float:
    """The k-th smallest (from 1) of a flat, non-negative float32 tensor.

    The bit patterns of such floats order like their values: one pass counts them by their upper
    bits, a second one selects within the one bin that holds the k-th.
    """
    bits = values.view(torch.int32)
    upper = bits >> LOWER_BITS
    seen = torch.cumsum(torch.bincount(upper), 0)
    bin_ = int(torch.searchsorted(seen, k))
    before = int(seen[bin_ - 1]) if bin_ > 0 else 0
    return values[upper == bin_].kthvalue(k - before).values.item()
