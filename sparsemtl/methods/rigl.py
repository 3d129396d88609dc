"""RigL: sparse from the start; now and then drop small weights and grow large gradients.

Source: Evci et al., Rigging the Lottery, ICML 2020, Algorithm 1. An update takes the place of a
step: the batch's dense gradient, at the masked point, decides what grows; grown weights start at 0
with no optimizer memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsemtl.methods.base import StepState
from sparsemtl.methods.masked import MaskConfig, forget_moments, masks_of
from sparsemtl.methods.topology import TopologyMethod, cosine_rate, update_layer


@dataclass(frozen=True)
class RigLConfig(MaskConfig):
    """Densities per layer and the schedule of updates."""

    allocation: str = "erk"  # erk (paper's best) or uniform, on every layer
    power: float = 1.0  # of ERK
    update_every: int | None = None  # steps; None: a 200th of the schedule, at least 10
    update_until: float = 0.75  # share of the schedule
    drop_rate: float = 0.3  # α: share dropped at the first update; falls to 0 as a cosine

    def __post_init__(self) -> None:
        super().__post_init__()
        check_topology(self)
        self.check_share("drop_rate")


def check_topology(config: MaskConfig) -> None:
    """raises ValueError for a field of an update schedule that is out of range."""
    config.check_choice("allocation", ("erk", "uniform"))
    config.check_share("update_until")
    if config.update_every is not None:  # type: ignore[attr-defined]
        config.check_count("update_every")


class RigL(TopologyMethod):
    """Drop by |w|, grow by |∂L/∂w|."""

    name = "rigl"

    def updates_at(self, step: int) -> bool:
        """Whether the step after `step` finished ones is an update."""
        return 0 < step < self.end and step % self.every == 0

    def on_forward(self, state: StepState) -> None:
        # Dormant weights are 0: the open network is the masked one, with every weight's gradient.
        self.sparsity.open = self.updates_at(state.step)

    def on_backward(self, state: StepState) -> None:
        if not self.updates_at(state.step):
            return
        rate = cosine_rate(state.step, self.end, self.config.drop_rate)
        budgets = iter(self.budgets)
        old, new = masks_of(self.sparsity), []
        for group, masks in zip(self.weights, old, strict=True):
            new.append(
                [
                    update_layer(
                        w,
                        mask,
                        torch.zeros_like(w) if w.grad is None else w.grad,
                        next(budgets),
                        rate,
                        self.structure,
                    )
                    for w, mask in zip(group, masks, strict=True)
                ]
            )
        self.sparsity.fix_masks(new)
        for group, before, after in zip(self.weights, old, new, strict=True):
            for w, was, now in zip(group, before, after, strict=True):
                forget_moments(state.optimizer, w, ~(was & now))
        for parameter in state.model.parameters():
            parameter.grad = None  # the update stands in for this step
