"""How the thresholds' differences are learned: what each pruned weight costs, compared jointly.

Adam normalises each scalar θ by itself: only the sign of its gradient survives, so every θ moves
by the learning rate, whatever its component's sensitivity. `JointSplit` keeps one second moment for
all θ and compares costs per pruned weight, r_c = (dL/dθ_c) / (dN_c/dθ_c). Where all r_c are equal,
no exchange of weights between components lowers the loss: the stationary point of minimising L at
a fixed total count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsemtl.sparsity.stats import MagnitudeHistogram

SPLITS = ("joint", "adam")


class JointSplit:
    """Moves θ by `−rate · m̂ / √v̂`, with v one number for all groups."""

    def __init__(self, groups: int, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        self.betas = betas
        self.mean = torch.zeros(groups, dtype=torch.float64)
        self.square = 0.0
        self.count = 0

    def step(self, theta: Tensor, gradient: Tensor, slopes: Tensor, rate: float) -> None:
        """Update `theta` in place.   theta, gradient, slopes: [G]   slopes: dN_c/dθ_c, > 0"""
        gradient = gradient.detach().double().cpu()
        common = gradient.sum() / slopes.sum()  # moves that keep the total count
        cost = gradient / slopes - common
        first, second = self.betas
        self.count += 1
        self.mean.mul_(first).add_(cost, alpha=1.0 - first)
        self.square = second * self.square + (1.0 - second) * float((cost * cost).mean())
        mean = self.mean / (1.0 - first**self.count)
        scale = (self.square / (1.0 - second**self.count)) ** 0.5
        if scale > 0.0:
            with torch.no_grad():
                theta -= (rate * mean / scale).to(theta)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.clone(), "square": self.square, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean.copy_(state["mean"])
        self.square, self.count = state["square"], state["count"]


def pruning_slopes(histograms: list[MagnitudeHistogram], theta: Tensor) -> Tensor:
    """dN_c/dθ_c: weights that die per unit of θ, by a central difference; at least 0.1 % of each.

    theta: [G]   returns: [G] float64
    """
    reach = 0.25  # in θ: α by a quarter either way, wide enough to smooth single bins
    alphas = [torch.sigmoid(theta.detach().double().cpu() + d).tolist() for d in (-reach, reach)]
    slopes = [
        max(h.count_below(b) - h.count_below(a), 2.0 * reach * 1e-3 * h.numel) / (2.0 * reach)
        for h, a, b in zip(histograms, *alphas, strict=True)
    ]
    return torch.tensor(slopes, dtype=torch.float64)
