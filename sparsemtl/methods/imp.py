"""Iterative magnitude pruning: each round removes a share of the weights that are left.

Source: Han et al., 2015; Frankle and Carbin, 2019, without rewinding. The learning-rate schedule
runs through; rounds lie evenly between `start` and `end` of it, and the last one takes exactly what
the budget asks for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsemtl.methods.base import StepState
from sparsemtl.methods.masked import MaskConfig, MaskMethod, step_of


@dataclass(frozen=True)
class IMPConfig(MaskConfig):
    """Share per round and when the rounds happen."""

    fraction: float = 0.2  # of the remaining weights, removed per round
    allocation: str = "global"  # global, uniform or erk
    power: float = 1.0  # of ERK
    start: float = 0.1  # share of the schedule before the first round
    end: float = 0.7  # and at the last round

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_allocation()
        if not 0.0 < self.fraction < 1.0:
            raise ValueError(f"IMPConfig: Expected fraction in (0, 1), got {self.fraction}")
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ValueError(
                f"IMPConfig: Expected 0 <= start <= end <= 1, got {self.start} and {self.end}"
            )


def remaining_after(rounds: int, fraction: float, sparsity: float) -> float:
    """Share of the weights left: (1 - fraction)^rounds, never less than the target leaves."""
    return max((1.0 - fraction) ** rounds, 1.0 - sparsity)


def rounds_to(sparsity: float, fraction: float) -> int:
    """Rounds until the target; the last may remove less than `fraction`."""
    if sparsity == 0.0:
        return 0
    return math.ceil(math.log(1.0 - sparsity) / math.log(1.0 - fraction) - 1e-9)


class IMP(MaskMethod):
    """|w|, in rounds."""

    name = "imp"

    def prepare(self, model: nn.Module, steps: int, batches: Any = ()) -> None:
        super().prepare(model, steps, batches)
        config, self.rounds = self.config, rounds_to(self.sparsity_target, self.config.fraction)
        first, last = step_of(config.start, steps), step_of(config.end, steps)
        gaps = max(1, self.rounds - 1)
        self.at = [round(first + (last - first) * i / gaps) for i in range(self.rounds)]

    def on_step(self, state: StepState) -> None:
        done = sum(step <= state.step for step in self.at)
        if done == sum(step < state.step for step in self.at):
            return
        config = self.config
        left = remaining_after(done, config.fraction, self.sparsity_target)
        # Pruned weights are 0, so they are the first to go again.
        sparsity = None if done == self.rounds else 1.0 - left
        self.prune(self.magnitudes(), sparsity, config.allocation, config.power)

    def describe(self, model: nn.Module) -> dict[str, Any]:
        return {**super().describe(model), "rounds": self.rounds}
