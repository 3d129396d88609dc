"""Keypoint and edge maps: masked L1 and the mean absolute error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsemtl.tasks.base import TaskMetrics, mean_terms
from sparsemtl.tasks.l1 import L1Task
from sparsemtl.tasks.resize import resize_nearest


@dataclass(frozen=True)
class _Map(L1Task):
    @property
    def higher_is_better(self) -> dict[str, bool]:
        return {"abs_err": False}

    def metrics(self) -> MapMetrics:
        return MapMetrics(self)


@dataclass(frozen=True)
class Keypoints(_Map):
    """How strongly each pixel is a keypoint, in the units of the data set."""

    kind: ClassVar[str] = "keypoints"


@dataclass(frozen=True)
class Edges(_Map):
    """How strongly each pixel is an edge, in the units of the data set."""

    kind: ClassVar[str] = "edges"


class MapMetrics(TaskMetrics):
    """`abs_err`: mean absolute error in the target's units; lower is better."""

    task: _Map

    def __init__(self, task: _Map) -> None:
        super().__init__(task)
        self.add_sum("abs_total")
        self.add_sum("abs_weight")

    def accumulate(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        size = (target.shape[-2], target.shape[-1])
        predicted = resize_nearest(prediction[:, 0], size, self.task.resize_rule)[valid].double()
        error = (predicted - target[:, 0][valid].double()).abs()
        total, weight = mean_terms(error, target.shape[0], self.task.pooling)
        self.abs_total += total.to(self.device)
        self.abs_weight += weight.to(self.device)

    def values(self) -> dict[str, Tensor]:
        return {"abs_err": self.abs_total / self.abs_weight}
