"""Depth in metres: masked L1, absolute and relative error, δ accuracies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsemtl.tasks.base import TaskMetrics, mean_terms
from sparsemtl.tasks.l1 import L1Task
from sparsemtl.tasks.resize import resize_nearest

DELTA_RULES = ("positive", "released")
RATIO = 1.25
POWERS = (1, 2, 3)
_DELTA_NAMES = ("delta_1.25", "delta_1.25^2", "delta_1.25^3")


@dataclass(frozen=True)
class Depth(L1Task):
    """Mean absolute error; targets are ≥ 0.

    delta_rule: which predictions p of a true depth g are right: "positive": p > 0 and
                max(p/g, g/p) < 1.25^k; "released": max(p/g, g/p) ≤ 1.25^k alone, which every
                negative prediction satisfies
    """

    delta_rule: str = "positive"

    kind: ClassVar[str] = "depth"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_option("delta_rule", self.delta_rule, DELTA_RULES)

    @property
    def higher_is_better(self) -> dict[str, bool]:
        return {"abs_err": False, "rel_err": False, **dict.fromkeys(_DELTA_NAMES, True)}

    def metrics(self) -> DepthMetrics:
        return DepthMetrics(self)

    def check_target(self, target: Tensor, valid: Tensor) -> None:
        super().check_target(target, valid)
        wrong = target[:, 0][valid & (target[:, 0] < 0)]
        if wrong.numel() > 0:
            raise ValueError(
                f"{self.name}: Expected valid depths ≥ 0, got {float(wrong[0])} "
                f"({wrong.numel()} such pixels)"
            )


class DepthMetrics(TaskMetrics):
    """`abs_err` (metres) and `rel_err`, lower is better; % with δ < 1.25, 1.25², 1.25³.

    The ratios are taken where the true depth is above 0; the δ shares are always pooled.
    """

    task: Depth

    def __init__(self, task: Depth) -> None:
        super().__init__(task)
        for name in ("abs", "rel"):
            self.add_sum(f"{name}_total")
            self.add_sum(f"{name}_weight")
        self.add_count("close", len(POWERS))
        self.add_count("ratios")

    def accumulate(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        size = (target.shape[-2], target.shape[-1])
        predicted = resize_nearest(prediction[:, 0], size, self.task.resize_rule)[
            valid
        ].double()  # [N]
        true = target[:, 0][valid].double()
        error = (predicted - true).abs()
        self._add("abs", error, target.shape[0])
        positive = true > 0
        predicted, true, error = predicted[positive], true[positive], error[positive]
        self._add("rel", error / true, target.shape[0])
        ratio = torch.maximum(predicted / true, true / predicted)[:, None]
        bounds = RATIO ** torch.tensor(POWERS, dtype=torch.float64, device=ratio.device)
        if self.task.delta_rule == "released":
            right = ratio <= bounds
        else:
            right = (predicted[:, None] > 0) & (ratio < bounds)
        self.close += right.sum(0).to(self.device)
        self.ratios += true.numel()

    def _add(self, name: str, values: Tensor, batch: int) -> None:
        total, weight = mean_terms(values, batch, self.task.pooling)
        setattr(self, f"{name}_total", getattr(self, f"{name}_total") + total.to(self.device))
        setattr(self, f"{name}_weight", getattr(self, f"{name}_weight") + weight.to(self.device))

    def values(self) -> dict[str, Tensor]:
        shares = 100.0 * self.close.double() / self.ratios
        return {
            "abs_err": self.abs_total / self.abs_weight,
            "rel_err": self.rel_total / self.rel_weight,
            **dict(zip(_DELTA_NAMES, shares, strict=True)),
        }
