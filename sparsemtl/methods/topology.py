"""Drop and grow at a fixed density per layer: what RigL and DiSparse-dynamic share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsemtl.methods.base import StepState
from sparsemtl.methods.masked import MaskMethod, step_of
from sparsemtl.sparsity.allocation import (
    check_reached,
    check_room,
    layer_budgets,
    masks_by_layer,
    random_scores,
)
from sparsemtl.sparsity.mask import kept_count
from sparsemtl.sparsity.structure import Structure


def cosine_rate(step: int, end: int, first: float) -> float:
    """Share of a layer's weights that is dropped at `step`: `first` at 0, 0 at `end`."""
    return 0.5 * first * (1.0 + math.cos(math.pi * min(step, end) / end))


def kept_in_drop(budget: int, rate: float) -> int:
    """How many of a layer's `budget` weights a drop leaves: all but the rounded-down share."""
    return budget - int(rate * budget)


def drop(weight: Tensor, mask: Tensor, kept: int, structure: Structure) -> Tensor:
    """The `kept` largest |w| among those alive now (whole groups, while they fit).

    weight, mask: of one layer   returns: bool, like the weight, within `mask`
    """
    alive = torch.where(mask, weight.detach().abs().float() + torch.finfo().tiny, 0.0)
    return _best(alive, mask, kept, structure)


def grow(gradient: Tensor, mask: Tensor, count: int, structure: Structure) -> Tensor:
    """The `count` largest |gradient| outside `mask`; never one whose gradient is 0.

    returns: bool, like the weight, outside `mask`
    """
    outside = torch.where(mask, 0.0, gradient.detach().abs().float())
    return _best(outside, ~mask & (outside > 0), count, structure)


def _best(scores: Tensor, allowed: Tensor, count: int, structure: Structure) -> Tensor:
    able = int(allowed.sum())
    chosen = structure.masks([[scores]], min(count, able))[0][0][0]
    return chosen & allowed


def update_layer(
    weight: Tensor, mask: Tensor, gradient: Tensor, budget: int, rate: float, structure: Structure
) -> Tensor:
    """Drop the smallest weights and grow the largest gradients; the layer keeps its budget.

    A position without gradient is never grown: what it would replace is not dropped instead.
    """
    growable = int(((gradient != 0) & ~mask).sum())
    kept = max(kept_in_drop(budget, rate), budget - growable)
    survivors = drop(weight, mask, kept, structure)
    return survivors | grow(gradient, survivors, budget - int(survivors.sum()), structure)


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
        shapes = [tuple(w.shape) for group in self.weights for w in group]
        numel = sum(math.prod(shape) for shape in shapes)
        self.budgets = layer_budgets(
            shapes, kept_count(numel, self.sparsity_target), config.allocation, config.power
        )

    def on_start(self, state: StepState) -> None:
        scores = random_scores(self.weights, state.seed)
        check_room(self.name, scores, self.sparsity_target, self.structure)
        masks = masks_by_layer(scores, self.budgets, self.structure)
        check_reached(self.name, masks, self.sparsity_target, self.structure)
        # Whole groups may miss a layer's budget: what a layer has now is what it keeps.
        self.budgets = [int(m.sum()) for group in masks for m in group]
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
