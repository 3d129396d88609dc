"""Soft threshold of a component's weights, S(W, α) = sign(W) · max(|W| − α, 0)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ThresholdStats(NamedTuple):
    values: tuple[Tensor, ...]
    nonzeros: Tensor
    bitmasks: tuple[Tensor, ...] | None


def soft_threshold(weight: Tensor, alpha: Tensor) -> Tensor:
    """Shrink towards zero; weight: any shape, alpha: scalar."""
    return soft_threshold_reference(weight, alpha)


def soft_threshold_component(weights: Sequence[Tensor], alpha: Tensor) -> tuple[Tensor, ...]:
    """Shrink every weight of a component by one threshold."""
    return tuple(soft_threshold_reference(weight, alpha) for weight in weights)


def soft_threshold_stats(
    weights: Sequence[Tensor], alpha: Tensor, *, bitmask: bool = False
) -> ThresholdStats:
    """Values and number of live weights, without autograd."""
    with torch.no_grad():
        values = soft_threshold_component(weights, alpha)
        nonzeros = torch.tensor([int((weight.abs() > alpha).sum()) for weight in weights])
    return ThresholdStats(values, nonzeros, None)


def soft_threshold_reference(weight: Tensor, alpha: Tensor) -> Tensor:
    """The meaning of soft_threshold: any float dtype and device, differentiated by torch itself."""
    alpha = alpha.to(weight.dtype)
    return torch.where(weight.abs() <= alpha, 0.0, weight - alpha * weight.sign())
