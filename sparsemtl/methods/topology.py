"""Drop and grow at a fixed density per layer: what RigL and DiSparse-dynamic share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsemtl.methods.base import StepState
from sparsemtl.methods.masked import MaskMethod, step_of
from sparsemtl.sparsity.allocation import allocated_masks, random_scores
from sparsemtl.sparsity.mask import top_masks
from sparsemtl.sparsity.structure import Structure

# Weights of a group → how many such groups of a layer live. Groups at a layer's edge are smaller;
# one is replaced by another of its size only, so that an update keeps the layer's exact count.
Budget = Mapping[int, int]


def cosine_rate(step: int, end: int, first: float) -> float:
    """Share of a layer's weights that is dropped at `step`: `first` at 0, 0 at `end`."""
    return 0.5 * first * (1.0 + math.cos(math.pi * min(step, end) / end))


def kept_in_drop(budget: int, rate: float) -> int:
    """How many of `budget` weights or groups a drop leaves: all but the rounded-down share."""
    return budget - int(rate * budget)


def budget_of(mask: Tensor, structure: Structure) -> Budget:
    """How many groups of each size are True throughout."""
    live = structure.scores((~mask).float()) == 0
    sizes = structure.sizes(mask.shape).to(mask.device)
    return {int(size): int((live & (sizes == size)).sum()) for size in sizes.unique()}


def short_of(budget: Budget, mask: Tensor, structure: Structure) -> Budget:
    """What a mask lacks of a budget, nowhere below 0."""
    found = budget_of(mask, structure)
    return {size: max(0, count - found[size]) for size, count in budget.items()}


def drop(weight: Tensor, mask: Tensor, kept: Budget, structure: Structure) -> Tensor:
    """The `kept` groups of the largest mean |w| among those alive now.

    weight, mask: of one layer   returns: bool, like the weight, within `mask`
    """
    alive = torch.where(mask, weight.detach().abs().float() + torch.finfo().tiny, 0.0)
    return _best(alive, kept, structure)


def grow(gradient: Tensor, mask: Tensor, count: Budget, structure: Structure) -> Tensor:
    """The `count` groups of the largest mean |gradient| outside `mask`.

    A group is never grown in which a weight has no gradient: it would stay 0, a zero too many.
    returns: bool, like the weight, outside `mask`
    """
    return _best(torch.where(mask, 0.0, gradient.detach().abs().float()), count, structure)


def _best(scores: Tensor, count: Budget, structure: Structure) -> Tensor:
    """The best of each size among the groups in which every score is above 0."""
    whole = structure.scores((scores <= 0).float()) == 0
    grouped = torch.where(whole, structure.scores(scores), 0.0)
    sizes = structure.sizes(scores.shape).to(scores.device)
    chosen = torch.zeros_like(grouped, dtype=torch.bool)
    for size, wanted in count.items():
        places = sizes == size
        able = grouped[places]
        kept = min(wanted, int((able > 0).sum()))
        chosen[places] = top_masks([[able]], kept)[0][0][0]
    return structure.expand(chosen, scores.shape)


def update_layer(
    weight: Tensor,
    mask: Tensor,
    gradient: Tensor,
    budget: Budget,
    rate: float,
    structure: Structure,
) -> Tensor:
    """Drop the smallest weights and grow the largest gradients; the layer keeps its budget.

    What has no gradient is never grown: what it would replace is not dropped instead.
    """
    growable = budget_of((gradient != 0) & ~mask, structure)
    kept = {n: max(kept_in_drop(b, rate), b - growable[n]) for n, b in budget.items()}
    survivors = drop(weight, mask, kept, structure)
    return survivors | grow(gradient, survivors, short_of(budget, survivors, structure), structure)


class TopologyMethod(MaskMethod):
    """Random masks at fixed densities from the start; their places change at every update."""

    keep_dormant = False  # what pruned weights hold in W survives until they are grown again

    def prepare(self, model: nn.Module, steps: int, batches: Any = ()) -> None:
        if self.structure.n_of_m is not None:
            raise ValueError(
                f"{self.name}: Expected a structure of whole groups, got {self.structure}: a "
                "regrown weight cannot respect N:M; prune with snip or magnitude"
            )
        super().prepare(model, steps, batches)
        config = self.config
        self.every = config.update_every or max(10, round(steps / 200))
        self.end = step_of(config.update_until, steps)
        self.budgets: list[Budget] = []  # per layer, from the start on

    def on_start(self, state: StepState) -> None:
        scores = random_scores(self.weights, state.seed)
        config = self.config
        masks = allocated_masks(
            *(self.name, scores, self.sparsity_target, self.structure),
            *(config.allocation, config.power),
        )
        # Whole groups may miss a layer's budget: what a layer has now is what it keeps.
        self.budgets = [budget_of(m, self.structure) for group in masks for m in group]
        self.sparsity.fix_masks(masks, keep_dormant=self.keep_dormant)

    def layers(self, values: Sequence[Tensor]) -> list[list[Tensor]]:
        """A flat list, one value per layer, nested as the weights are."""
        rest = iter(values)
        return [[next(rest) for _ in group] for group in self.weights]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "budgets": list(self.budgets)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.budgets = list(state["budgets"])
