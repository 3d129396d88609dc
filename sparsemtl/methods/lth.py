"""Lottery tickets: train, prune by magnitude, rewind what is left to the start, train again.

Source: Frankle and Carbin, 2019; Frankle et al., 2020, for rewinding to step k. AdapMTL's baseline
is the one-shot form ("train, prune to the target, reset"), the default here; `rounds=None` takes
as many rounds of `fraction` as the target needs. Each level runs a whole learning-rate schedule,
with a fresh optimizer; all levels together take the steps of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsemtl.methods.base import StepState
from sparsemtl.methods.imp import remaining_after, rounds_to
from sparsemtl.methods.masked import MaskConfig, MaskMethod


@dataclass(frozen=True)
class LTHConfig(MaskConfig):
    """Rounds, and where weights are rewound to."""

    rounds: int | None = 1  # prunings; None: as many of `fraction` as the target needs
    fraction: float = 0.2  # of the remaining weights, removed per round but the last
    rewind_to: float = 0.0  # share of a level's schedule; 0: to the initial weights
    allocation: str = "global"  # global, uniform or erk
    power: float = 1.0  # of ERK

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_allocation()
        if self.rounds is not None:
            self.check_count("rounds")
        if not 0.0 < self.fraction < 1.0:
            raise ValueError(f"LTHConfig: Expected fraction in (0, 1), got {self.fraction}")
        if not 0.0 <= self.rewind_to < 1.0:
            raise ValueError(f"LTHConfig: Expected rewind_to in [0, 1), got {self.rewind_to}")


class LTH(MaskMethod):
    """|w| after a whole training, then back to the start."""

    name = "lth"

    def prepare(self, model: nn.Module, steps: int, batches: Any = ()) -> None:
        super().prepare(model, steps, batches)
        target, config = self.sparsity_target, self.config
        needed = rounds_to(target, config.fraction)
        self.rounds = min(needed, 1) if config.rounds == 1 else needed
        if config.rounds is not None and config.rounds > 1 and target > 0.0:
            self.rounds = config.rounds
        # Levels of n steps, all but the first of which skip the first `rewind_to` of it.
        self.length = steps / (1.0 + self.rounds * (1.0 - config.rewind_to))
        if self.rounds and self.length * (1.0 - config.rewind_to) < 1.0:
            raise ValueError(
                f"lth: Expected at least {self.rounds + 1} steps for {self.rounds} rounds, "
                f"got {steps}"
            )
        self.rewind_step = round(config.rewind_to * self.length)
        later = self.length * (1.0 - config.rewind_to)
        self.ends = [round(self.length + later * i) for i in range(self.rounds)]
        self.start: dict[str, Tensor] | None = None

    def schedule_step(self, step: int) -> float:
        level = sum(end <= step for end in self.ends)
        inside = float(step) if level == 0 else self.rewind_step + step - self.ends[level - 1]
        return min(inside / self.length, 1.0) * self.steps

    def on_start(self, state: StepState) -> None:
        if self.rewind_step == 0:
            self.start = _copy(state.model)

    def on_step(self, state: StepState) -> None:
        if self.start is None and state.step == self.rewind_step:
            self.start = _copy(state.model)
        if state.step in self.ends:
            self._rewind(state, self.ends.index(state.step) + 1)

    def _rewind(self, state: StepState, done: int) -> None:
        assert self.start is not None
        config, target = self.config, self.sparsity_target
        last = done == self.rounds
        if config.rounds is None:
            left = remaining_after(done, config.fraction, target)
        else:
            left = (1.0 - target) ** (done / self.rounds)  # equal shares of what is left
        self.prune(self.magnitudes(), None if last else 1.0 - left, config.allocation, config.power)
        masks = self.sparsity.masks
        assert masks is not None
        with torch.no_grad():
            for name, value in state.model.state_dict().items():
                value.copy_(self.start[name])
        self.sparsity.fix_masks(masks)
        state.optimizer.state.clear()
        if last:
            self.start = None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "start": self.start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.start = state["start"]
        if self.start is not None:
            device = self.sparsity.theta.device
            self.start = {name: value.to(device) for name, value in self.start.items()}


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
