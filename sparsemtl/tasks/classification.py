"""Classification of whole images: cross-entropy and accuracy.

An image's class is a label map of one pixel, [B, 1, 1], so that classification meets data sets,
losses and metrics as every other task does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_stat_scores

from sparsemtl.tasks.base import Task, TaskMetrics
from sparsemtl.tasks.constant import ConstantPredictor, most_frequent_class
from sparsemtl.tasks.pictures import check_picture, paint_invalid, palette, to_numpy

_IGNORE = -100  # torch's own; invalid samples get it inside the loss only


@dataclass(frozen=True)
class Classification(Task):
    """Cross-entropy over `channels` classes; targets are labels 0 .. channels - 1, [B, 1, 1]."""

    kind: ClassVar[str] = "classification"
    target_channels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels < 2:
            raise ValueError(f"{self.name}: Expected channels ≥ 2 classes, got {self.channels}")

    @property
    def higher_is_better(self) -> dict[str, bool]:
        return {"accuracy": True}

    def metrics(self) -> ClassificationMetrics:
        return ClassificationMetrics(self)

    def check_target_shapes(self, target: Tensor, valid: Tensor) -> None:
        super().check_target_shapes(target, valid)
        if tuple(target.shape[-2:]) != (1, 1):
            raise ValueError(
                f"{self.name}: Expected target of shape [B, 1, 1], got {list(target.shape)}"
            )

    def check_shapes(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        super().check_shapes(prediction, target, valid)
        if tuple(prediction.shape[-2:]) != (1, 1):
            raise ValueError(
                f"{self.name}: Expected prediction of shape [B, {self.channels}, 1, 1], got "
                f"{list(prediction.shape)}; classification needs heads on pooled features "
                "(model.head=joint)"
            )

    def check_target(self, target: Tensor, valid: Tensor) -> None:
        labels = target.long()
        wrong = labels[valid & ((labels < 0) | (labels >= self.channels))]
        if wrong.numel() > 0:
            raise ValueError(
                f"{self.name}: Expected valid labels in 0..{self.channels - 1}, got "
                f"{int(wrong[0])} ({wrong.numel()} such samples)"
            )

    def _masked_loss(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        scores = torch.where(valid[:, None], prediction, 0.0).reshape(-1, self.channels)  # [B, C]
        labels = torch.where(valid, target.long(), _IGNORE).reshape(-1)
        loss = F.cross_entropy(scores, labels, ignore_index=_IGNORE, reduction="sum")
        return loss / valid.sum().clamp(min=1)

    def constant_predictor(self, targets: Iterable[tuple[Tensor, Tensor]]) -> ConstantPredictor:
        """Fit the most frequent class, the lowest of equals; value is one-hot."""
        labels = (self._labels(target, valid) for target, valid in targets)
        return ConstantClass(most_frequent_class(self.name, self.channels, labels, "sample"))

    def _labels(self, target: Tensor, valid: Tensor) -> Tensor:
        self.check_target_shapes(target, valid)
        self.check_target(target, valid)
        return target[valid]

    def to_picture(
        self,
        tensor: Tensor,
        valid: Tensor | None = None,
        limits: tuple[float, float] | None = None,
    ) -> np.ndarray:
        """The class's colour; scores [C, H, W] or labels [H, W] of any size."""
        if tensor.is_floating_point():
            check_picture(self.name, tensor, self.channels, valid)
            tensor = tensor.argmax(dim=0)
        check_picture(self.name, tensor[None], 1, valid)
        labels = to_numpy(tensor).astype(np.int64)
        known = (labels >= 0) & (labels < self.channels)
        picture = palette(self.channels)[np.where(known, labels, 0)]
        return paint_invalid(picture, known if valid is None else known & to_numpy(valid))


class ConstantClass(ConstantPredictor):
    """One class for every image."""

    def __call__(self, batch: int, height: int, width: int) -> Tensor:
        """Return [batch, C, 1, 1], whatever the image's size."""
        return super().__call__(batch, 1, 1)


class ClassificationMetrics(TaskMetrics):
    """`accuracy`, the fraction of samples whose class is right."""

    task: Classification

    def __init__(self, task: Classification) -> None:
        super().__init__(task)
        self.add_count("right")
        self.add_count("total")

    def accumulate(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        predicted = prediction.argmax(dim=1)[valid]
        if predicted.numel() == 0:
            return
        right, _, _, _, total = multiclass_stat_scores(
            predicted, target[valid].long(), self.task.channels, average="micro"
        ).to(self.device)
        self.right += right
        self.total += total

    def values(self) -> dict[str, Tensor]:
        return {"accuracy": self.right.double() / self.total}
