"""What the tasks with a masked L1 loss share: depth, keypoints and edges."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsemtl.tasks.base import POOLINGS, Task
from sparsemtl.tasks.constant import ConstantPredictor, StreamingMedian
from sparsemtl.tasks.pictures import check_picture, paint_scale, to_numpy

STATISTICS = ("median", "mean")


@dataclass(frozen=True)
class L1Task(Task):
    """One channel, mean absolute error over the valid pixels.

    pooling:  "pixels", or "batches": the releases' mean of per-batch errors, weighted by batch
              size
    constant: what the constant predictor fits: "median" (the best under an absolute error) or
              "mean"
    """

    pooling: str = "pixels"
    constant: str = "median"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_option("pooling", self.pooling, POOLINGS)
        self._check_option("constant", self.constant, STATISTICS)
        if self.channels != 1:
            raise ValueError(f"{self.name}: Expected channels = 1, got {self.channels}")

    def check_target(self, target: Tensor, valid: Tensor) -> None:
        wrong = target[:, 0][valid & ~target[:, 0].isfinite()]
        if wrong.numel() > 0:
            raise ValueError(
                f"{self.name}: Expected finite valid targets, got {float(wrong[0])} "
                f"({wrong.numel()} such pixels)"
            )

    def _masked_loss(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        error = torch.where(valid[:, None], prediction - target.to(prediction.dtype), 0.0)
        return error.abs().sum() / valid.sum().clamp(min=1)

    def constant_predictor(self, targets: Iterable[tuple[Tensor, Tensor]]) -> ConstantPredictor:
        median, total, count = StreamingMedian(), 0.0, 0
        for target, valid in targets:
            self.check_target_shapes(target, valid)
            self.check_target(target, valid)
            values = target[:, 0][valid]
            count += values.numel()
            if self.constant == "median":
                median.update(values)
            else:
                total += float(values.double().sum())
        if count == 0:
            raise ValueError(f"{self.name}: Expected at least one valid pixel, got none")
        value = median.compute() if self.constant == "median" else total / count
        return ConstantPredictor(torch.tensor([value], dtype=torch.float32))

    def to_picture(
        self,
        tensor: Tensor,
        valid: Tensor | None = None,
        limits: tuple[float, float] | None = None,
    ) -> np.ndarray:
        check_picture(self.name, tensor, 1, valid)
        return paint_scale(to_numpy(tensor)[0], limits, None if valid is None else to_numpy(valid))
