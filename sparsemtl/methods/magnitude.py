"""One-shot magnitude pruning: train dense, keep the largest weights once, train on.

Source: Han et al., Learning both Weights and Connections, 2015; AdapMTL's released second recipe
(global magnitude over conv weights, then finetune).
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsemtl.methods.base import StepState
from sparsemtl.methods.masked import MaskConfig, MaskMethod, step_of


@dataclass(frozen=True)
class MagnitudeConfig(MaskConfig):
    """When to prune, and how the budget is spread over the layers."""

    allocation: str = "global"  # global, uniform or erk
    power: float = 1.0  # of ERK
    prune_at: float = 0.5  # share of the schedule that is trained dense; 0: prune at the start

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_allocation()
        self.check_share("prune_at")


class Magnitude(MaskMethod):
    """|w|, once."""

    name = "magnitude"

    def on_start(self, state: StepState) -> None:
        if self.config.prune_at == 0.0:
            self._prune()

    def on_step(self, state: StepState) -> None:
        if not self.sparsity.frozen and state.step >= step_of(self.config.prune_at, self.steps):
            self._prune()

    def _prune(self) -> None:
        config = self.config
        self.prune(self.magnitudes(), allocation=config.allocation, power=config.power)
