"""The controller: brings a model to exactly the requested sparsity, on time, whatever the schedule.

The thresholds' common level is solved, their differences are learned: θ_c = θ̄ + δ_c. Every few
steps θ̄ is moved so that the overall sparsity follows a ramp; between solves the common drift is
taken out again, so only differences remain of what the optimizer did. At `freeze_at` the mask is
fixed at the exact count: the weights with the largest |w| / α_c, ties by index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsemtl.sparsity.mask import check_sparsity, kept_count
from sparsemtl.sparsity.sparsify import Sparsity
from sparsemtl.sparsity.stats import MagnitudeHistogram, count_dead, overall_sparsity

CONTROLS = ("exact", "free")
LOWEST, HIGHEST = -120.0, 60.0  # of θ: α from below every float32 weight to exactly 1


@dataclass(frozen=True)
class ControllerConfig:
    """When and how fast. Fractions are of the schedule's length."""

    control: str = "exact"  # "exact": this controller; "free": the paper's own dynamics
    ramp_start: float = 0.1  # dense before
    freeze_at: float = 0.7  # the ramp ends and the mask is fixed; the rest trains the survivors
    solves: int = 200  # times the common level is solved along the ramp, at most every step
    floor: float = 0.1  # every group keeps at least this share of the overall density; 0: none

    def __post_init__(self) -> None:
        who = type(self).__name__
        if self.control not in CONTROLS:
            raise ValueError(f"{who}: Expected control in {list(CONTROLS)}, got {self.control!r}")
        if not 0.0 <= self.ramp_start < self.freeze_at <= 1.0:
            raise ValueError(
                f"{who}: Expected 0 <= ramp_start < freeze_at <= 1, "
                f"got {self.ramp_start} and {self.freeze_at}"
            )
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"{who}: Expected floor in [0, 1], got {self.floor}")
        if self.solves < 1:
            raise ValueError(f"{who}: Expected solves >= 1, got {self.solves}")


def cubic_ramp(progress: float, target: float) -> float:
    """Sparsity at `progress` in [0, 1] of the ramp: fast first, when there is most to spare.

    source: Zhu and Gupta, 2017, Eq. 1.
    """
    return target * (1.0 - (1.0 - min(max(progress, 0.0), 1.0)) ** 3)


class Controller:
    """Steers `sparsity.theta` of one model to `target` within `steps` steps."""

    def __init__(
        self, config: ControllerConfig, sparsity: Sparsity, target: float, steps: int
    ) -> None:
        check_sparsity("Controller", "target", target)
        if steps < 1:
            raise ValueError(f"Controller: Expected steps >= 1, got {steps}")
        self.config, self.sparsity, self.target, self.steps = config, sparsity, target, steps
        self.start = int(config.ramp_start * steps)
        self.end = max(1, min(steps, math.ceil(config.freeze_at * steps)))
        self.every = max(1, (self.end - self.start) // config.solves)
        self._common: float | None = None  # θ̄ as last solved
        self._histograms: tuple[int, list[MagnitudeHistogram]] | None = None

    @property
    def steering(self) -> bool:
        """Whether the ramp has begun and the mask is still open."""
        return self._common is not None and not self.sparsity.frozen

    def on_step(self, step: int) -> None:
        """After the optimizer's step number `step` (from 1)."""
        if self.sparsity.frozen:
            return
        if self.config.control == "free":
            reached = overall_sparsity(count_dead(self.sparsity)) >= self.target > 0.0
            if reached or step >= self.steps:
                freeze_survivors(self.sparsity)
            return
        if step >= self.end:
            freeze_exactly(self.sparsity, self.target, self.config.floor)
        elif step > self.start:
            if self.solves_at(step) or self._common is None:
                self._solve(
                    step, cubic_ramp((step - self.start) / (self.end - self.start), self.target)
                )
            else:
                self._hold_common_level()

    def solves_at(self, step: int) -> bool:
        """Whether the common level is solved after this step."""
        return (step - self.start) % self.every == 0

    def histograms(self, step: int) -> list[MagnitudeHistogram]:
        """Of each group's weights after this step, made once a step."""
        if self._histograms is None or self._histograms[0] != step:
            groups = range(len(self.sparsity.groups))
            found = [
                MagnitudeHistogram.of(self.sparsity.weights(g), structure=self.sparsity.structure)
                for g in groups
            ]
            self._histograms = (step, found)
        return self._histograms[1]

    def _solve(self, step: int, sparsity: float) -> None:
        histograms = self.histograms(step)
        theta = self.sparsity.theta.detach().double().cpu()
        most = 1.0 - self.config.floor * (1.0 - sparsity)
        solved = solve_common_shift(histograms, theta, sparsity, most)
        with torch.no_grad():
            self.sparsity.theta.copy_(solved)
        self._common = self.sparsity.theta.detach().mean().item()

    def _hold_common_level(self) -> None:
        assert self._common is not None
        with torch.no_grad():
            self.sparsity.theta.add_(self._common - self.sparsity.theta.mean().item())

    def state_dict(self) -> dict[str, Any]:
        return {"common": self._common}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._common = state["common"]


def solve_common_shift(
    histograms: list[MagnitudeHistogram], theta: Tensor, sparsity: float, most: float = 1.0
) -> Tensor:
    """Shift every θ by one number so that a fraction `sparsity` of all weights is dead.

    theta:   [G] float64, on the CPU
    most:    no group's own sparsity may exceed this: its θ stops there, the others make up for it
    returns: [G] the shifted θ, by bisection on the histograms; exact to one bin (0.4 %)
    """
    total = sum(h.numel for h in histograms)

    def dead(shift: float) -> float:
        alpha = torch.sigmoid(theta + shift).tolist()
        return sum(
            min(h.count_below(a), most * h.numel) for h, a in zip(histograms, alpha, strict=True)
        )

    shift = _bisect(
        lambda middle: dead(middle) >= sparsity * total,
        LOWEST - float(theta.max()),
        HIGHEST - float(theta.min()),
    )
    ceilings = [_ceiling(h, most) for h in histograms]
    return torch.minimum(theta + shift, torch.tensor(ceilings, dtype=theta.dtype))


def _ceiling(histogram: MagnitudeHistogram, most: float) -> float:
    """The θ at which a fraction `most` of one group is dead."""
    enough = most * histogram.numel
    return _bisect(
        lambda theta: histogram.count_below(1.0 / (1.0 + math.exp(-theta))) >= enough,
        LOWEST,
        HIGHEST,
    )


def _bisect(enough: Callable[[float], bool], low: float, high: float) -> float:
    """Where a monotone condition turns true, between `low` and `high`."""
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return 0.5 * (low + high)


def freeze_exactly(sparsity: Sparsity, target: float, floor: float = 0.0) -> None:
    """Fix the mask at exactly `target`, keeping the split that the thresholds have learned.

    The survivors are the weights with the largest |w| / α_c: what one more common shift of the
    thresholds would leave, cut at the exact count. A group that would keep less than `floor` of the
    overall density keeps that much, and the others give it up.
    """
    groups = range(len(sparsity.groups))
    with torch.no_grad():
        alpha = torch.sigmoid(sparsity.theta.double()).clamp_min(1e-300)
        alpha = alpha / alpha.max()  # only ratios matter; near 1, float32 scores keep their range
        scores = [
            [
                sparsity.structure.magnitudes(w).float() / alpha[g].item()
                for w in sparsity.weights(g)
            ]
            for g in groups
        ]
        shapes = [[tuple(w.shape) for w in sparsity.weights(g)] for g in groups]
        sizes = [sum(w.numel() for w in sparsity.weights(g)) for g in groups]
        kept = kept_count(sum(sizes), target)
        least = [int(floor * kept * size / sum(sizes)) for size in sizes]

        def top(chosen: list[int], budget: int) -> tuple[list[list[Tensor]], float]:
            return sparsity.structure.masks_of_groups(
                [scores[g] for g in chosen], [shapes[g] for g in chosen], budget
            )

        masks, cuts = split_masks(top, len(scores), kept, least)
        # A hair below the cut, so that rounding leaves no survivor at exactly 0, ties included.
        final = alpha.cpu() * torch.tensor(cuts, dtype=torch.float64) * (1.0 - 1e-6)
    sparsity.freeze(masks, final.float().to(sparsity.theta.device))


def split_masks(
    top: Callable[[list[int], int], tuple[list[list[Tensor]], float]],
    groups: int,
    kept: int,
    least: list[int],
) -> tuple[list[list[Tensor]], list[float]]:
    """Masks that keep `kept` weights, and of group g at least `least[g]`, as the structure allows.

    top:     groups and how many of their weights to keep → masks of the best, largest left out
    returns: the masks, and per group the largest score that was left out
    """
    held: dict[int, tuple[list[Tensor], float]] = {}  # groups that stop at their least
    while True:
        free = [g for g in range(groups) if g not in held]
        # Whole groups of weights may hold a little less than their least.
        budget = kept - sum(int(m.sum()) for masks, _ in held.values() for m in masks)
        masks, cut = top(free, budget)
        short = [
            g
            for g, group in zip(free, masks, strict=True)
            if sum(int(m.sum()) for m in group) < least[g]
        ]
        if not short:
            break
        for g in short:
            own, own_cut = top([g], least[g])
            held[g] = (own[0], own_cut)
    held |= {g: (group, cut) for g, group in zip(free, masks, strict=True)}
    return [held[g][0] for g in range(groups)], [held[g][1] for g in range(groups)]


def freeze_survivors(sparsity: Sparsity) -> None:
    """Fix the mask at whatever is alive now (the paper's way: control="free")."""
    structure = sparsity.structure
    with torch.no_grad():
        alpha = torch.sigmoid(sparsity.theta)
        masks = [
            [
                structure.expand(~(structure.magnitudes(w) <= alpha[g]), w.shape)
                for w in sparsity.weights(g)
            ]
            for g in range(len(sparsity.groups))
        ]
    sparsity.freeze(masks, alpha.detach().clone())
