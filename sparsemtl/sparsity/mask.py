"""Masks of an exact size: keep the best-scored weights, ties by index.

The order of ties is component, layer, then flat index: the same bits on each machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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

    By bisection over the bit patterns, which order like the values when ≥ 0: 31 counting passes,
    no sort and no copy, whatever the size.
    """
    bits = values.view(torch.int32)
    low, high = -1, 0x7F800000  # count(bits ≤ low) < k ≤ count(bits ≤ high)
    while high - low > 1:
        middle = (low + high) // 2
        if int((bits <= middle).sum()) >= k:
            high = middle
        else:
            low = middle
    return torch.tensor(high, dtype=torch.int32).view(torch.float32).item()
