"""Task weightings: from the tasks' losses to the factors they are summed with.

T: tasks. The total loss is Σ_t factor_t · λ_t · L_t; λ is fixed by the configuration, the factors
come from here.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsemtl.errors import unknown_choice
from sparsemtl.training.scalarized import SCALARIZERS, Scalarized


@dataclass(frozen=True)
class WeightingConfig:
    """How the tasks are balanced. Step counts of None scale with the schedule, as in the paper."""

    name: str = "adaptive"  # adaptive (Eq. 6), adaptive-released, fixed (λ), or of SCALARIZERS
    scale: float = 5.0  # λ of Eq. 6
    window: int | None = None  # losses in the sliding window; paper 400 of 20 000 steps
    warmup: int | None = None  # steps with all factors 1; paper 5 000 of 20 000
    most: float = 10.0  # no factor exceeds this many times its neutral value

    def __post_init__(self) -> None:
        known = (*WEIGHTINGS, *SCALARIZERS)
        if self.name not in known:
            raise ValueError(unknown_choice("weighting", self.name, known))
        for field, least in (("window", 2), ("warmup", 0)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise ValueError(
                    f"WeightingConfig: Expected {field} >= {least} or None, got {value}"
                )
        if not 0.0 < self.scale < math.inf or not self.most >= 1.0:
            raise ValueError(
                f"WeightingConfig: Expected scale > 0 and most >= 1, got {self.scale}, {self.most}"
            )


class Fixed:
    """Every factor is 1: the loss is Σ λ_t · L_t."""

    def __init__(
        self, config: WeightingConfig, tasks: Sequence[str], steps: int, ratio: float
    ) -> None:
        self.tasks = tuple(tasks)

    def parameters(self) -> list[nn.Parameter]:
        """What the weighting learns."""
        return []

    def __call__(self, losses: Mapping[str, float]) -> dict[str, float]:
        """The factors for this step.   losses: the tasks' losses, finite"""
        return dict.fromkeys(self.tasks, 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Adaptive(Fixed):
    """Eq. 6: the steadier a task's loss, the larger its factor.

    β_t = [ (σ_t / L_t) / mean_u (σ_u / L_u) ]⁻¹ · λ · |W_backbone| / Σ_u |W_head,u|

    σ_t is the mean absolute deviation of task t's loss from its mean in the sliding window, L_t its
    present loss. All factors are 1 during the warm-up.
    source: AdapMTL, Eq. 6; "average deviation" is read as the mean absolute one.
    """

    def __init__(
        self, config: WeightingConfig, tasks: Sequence[str], steps: int, ratio: float
    ) -> None:
        super().__init__(config, tasks, steps, ratio)
        self.most = config.most
        self.neutral = config.scale * ratio
        self.window = config.window if config.window is not None else max(2, round(0.02 * steps))
        self.warmup = config.warmup if config.warmup is not None else round(0.25 * steps)
        self.seen = 0
        self.history: dict[str, deque[float]] = {t: deque(maxlen=self.window) for t in tasks}

    def __call__(self, losses: Mapping[str, float]) -> dict[str, float]:
        self.seen += 1
        for task in self.tasks:
            self.history[task].append(losses[task])
        filled = min(len(h) for h in self.history.values()) >= 2
        if self.seen <= self.warmup or not filled:
            return dict.fromkeys(self.tasks, 1.0)
        return self._factors({t: self._fluctuation(t, losses[t]) for t in self.tasks})

    def _fluctuation(self, task: str, loss: float) -> float:
        values = self.history[task]
        mean = math.fsum(values) / len(values)
        deviation = math.fsum(abs(v - mean) for v in values) / len(values)
        return _relative(deviation, loss)

    def _factors(self, fluctuation: Mapping[str, float]) -> dict[str, float]:
        mean = math.fsum(fluctuation.values()) / len(fluctuation)
        if mean == 0.0:  # nothing fluctuates: nothing to tell the tasks apart
            return dict.fromkeys(self.tasks, self.neutral)
        floor = mean / self.most
        return {t: mean / max(f, floor) * self.neutral for t, f in fluctuation.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "history": {t: list(h) for t, h in self.history.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"]
        self.history = {t: deque(state["history"][t], maxlen=self.window) for t in self.tasks}


class AdaptiveReleased(Adaptive):
    """The released code's variant: the larger the fluctuation, the larger the factor.

    Mean |L_{i−1} − L_i| / L_i over the window; the factors sum to the number of tasks (the release
    has 3 hard-coded). No λ, no parameter ratio, no inverse.
    source: MitchellX/AdapMTL; paper text, appendix C.2 for its example's direction.
    """

    def _fluctuation(self, task: str, loss: float) -> float:
        values = list(self.history[task])
        steps = [_relative(a - b, b) for a, b in itertools.pairwise(values)]
        return math.fsum(steps) / len(steps) if steps else 0.0

    def _factors(self, fluctuation: Mapping[str, float]) -> dict[str, float]:
        total = math.fsum(fluctuation.values())
        if total == 0.0:
            return dict.fromkeys(self.tasks, 1.0)
        return {t: f * len(self.tasks) / total for t, f in fluctuation.items()}


def _relative(change: float, loss: float) -> float:
    """|change| / |loss|, 0 for a loss of 0, and bounded: a loss near 0 is no infinite change."""
    return min(abs(change) / abs(loss), 1e6) if loss != 0.0 else 0.0


Weighting = Fixed | Scalarized

WEIGHTINGS: dict[str, type[Fixed]] = {
    "fixed": Fixed,
    "adaptive": Adaptive,
    "adaptive-released": AdaptiveReleased,
}


def build_weighting(
    config: WeightingConfig,
    tasks: Sequence[str],
    steps: int,
    ratio: float,
    loss_weights: Mapping[str, float] | None = None,
    epoch: int = 1,
) -> Weighting:
    """ratio: |W_backbone| / Σ|W_head|, parameter counts   loss_weights: λ   epoch: its steps"""
    if config.name in SCALARIZERS:
        return Scalarized(config, tasks, loss_weights or {}, epoch)
    return WEIGHTINGS[config.name](config, tasks, steps, ratio)
