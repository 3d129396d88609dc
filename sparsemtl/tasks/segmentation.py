"""Semantic segmentation: cross-entropy, mean IoU and pixel accuracy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from sparsemtl.tasks.base import POOLINGS, Task, TaskMetrics, mean_terms
from sparsemtl.tasks.constant import ConstantPredictor, most_frequent_class
from sparsemtl.tasks.pictures import check_picture, paint_invalid, palette, to_numpy
from sparsemtl.tasks.resize import resize_nearest

MIOU_CONVENTIONS = ("all", "released")
_IGNORE = -100  # torch's own; invalid pixels get it inside the loss only


@dataclass(frozen=True)
class Segmentation(Task):
    """Cross-entropy over `channels` classes; targets are labels 0 .. channels - 1.

    miou_convention: "all" averages over every class that occurs in a target or a prediction
                     (a class in neither is 0/0 and left out); "released" leaves out every class
                     without a true positive, as the code of AdaShare and its heirs does
    pooling:         "pixels", or "batches": the releases' mean of per-batch pixel accuracies,
                     weighted by batch size (mIoU is always from one confusion matrix)
    class_weights:   one factor ≥ 0 per class for the loss; empty for none
    """

    miou_convention: str = "all"
    pooling: str = "pixels"
    class_weights: tuple[float, ...] = ()

    kind: ClassVar[str] = "segmentation"
    target_channels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "class_weights", tuple(self.class_weights))
        self._check_option("miou_convention", self.miou_convention, MIOU_CONVENTIONS)
        self._check_option("pooling", self.pooling, POOLINGS)
        if self.channels < 2:
            raise ValueError(f"{self.name}: Expected channels ≥ 2 classes, got {self.channels}")
        bad = [w for w in self.class_weights if not (isfinite(w) and w >= 0.0)]
        if self.class_weights and (len(self.class_weights) != self.channels or bad):
            raise ValueError(
                f"{self.name}: Expected class_weights to be {self.channels} numbers ≥ 0, got "
                f"{self.class_weights}"
            )

    @property
    def higher_is_better(self) -> dict[str, bool]:
        return {"miou": True, "pixel_accuracy": True}

    def metrics(self) -> SegmentationMetrics:
        return SegmentationMetrics(self)

    def check_target(self, target: Tensor, valid: Tensor) -> None:
        labels = target.long()  # a uint8 cannot be compared with 256 classes
        wrong = labels[valid & ((labels < 0) | (labels >= self.channels))]
        if wrong.numel() > 0:
            raise ValueError(
                f"{self.name}: Expected valid labels in 0..{self.channels - 1}, got "
                f"{int(wrong[0])} ({wrong.numel()} such pixels)"
            )

    def _masked_loss(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        # Rows of pixels: torch has no deterministic CUDA kernel for the two-dimensional form.
        scores = torch.where(valid[:, None], prediction, 0.0).permute(0, 2, 3, 1)
        scores = scores.reshape(-1, self.channels)  # [B·h·w, C]
        labels = torch.where(valid, target.long(), _IGNORE).reshape(-1)
        weights = None
        if self.class_weights:
            weights = torch.tensor(self.class_weights, dtype=scores.dtype, device=scores.device)
            chosen = torch.where(valid, weights[labels.clamp(min=0)].view_as(valid), 0.0)
            total = chosen.sum()
        else:
            total = valid.sum()
        loss = F.cross_entropy(scores, labels, weights, ignore_index=_IGNORE, reduction="sum")
        return loss / torch.where(total > 0, total, 1)

    def constant_predictor(self, targets: Iterable[tuple[Tensor, Tensor]]) -> ConstantPredictor:
        """Fit the most frequent class, the lowest of equals; value is one-hot."""
        labels = (self._labels(target, valid) for target, valid in targets)
        return ConstantPredictor(most_frequent_class(self.name, self.channels, labels))

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
        if tensor.dim() == 3 and tensor.is_floating_point():
            check_picture(self.name, tensor, self.channels, valid)
            tensor = tensor.argmax(dim=0)
        elif tensor.dim() != 2 or tensor.is_floating_point():
            raise ValueError(
                f"{self.name}: Expected picture tensor of scores [{self.channels}, H, W] or "
                f"integer labels [H, W], got {list(tensor.shape)} of {tensor.dtype}"
            )
        check_picture(self.name, tensor[None], 1, valid)
        labels = to_numpy(tensor).astype(np.int64)
        known = (labels >= 0) & (labels < self.channels)
        picture = palette(self.channels)[np.where(known, labels, 0)]
        shown = known if valid is None else known & to_numpy(valid)
        return paint_invalid(picture, shown)


class SegmentationMetrics(TaskMetrics):
    """`miou` and `pixel_accuracy`, fractions in 0..1; higher is better."""

    task: Segmentation

    def __init__(self, task: Segmentation) -> None:
        super().__init__(task)
        self.add_count("confusion", task.channels, task.channels)  # [target, predicted]
        self.add_sum("accuracy_total")
        self.add_sum("accuracy_weight")

    def accumulate(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        # The largest score does not depend on the size, so only labels are resized.
        size = (target.shape[-2], target.shape[-1])
        predicted = resize_nearest(prediction.argmax(dim=1), size, self.task.resize_rule)[valid]
        labels = target[valid].long()
        self.confusion += multiclass_confusion_matrix(
            predicted, labels, self.task.channels, validate_args=False
        ).to(self.device)
        hits = predicted == labels
        total, weight = mean_terms(hits, target.shape[0], self.task.pooling)
        self.accuracy_total += total.to(self.device)
        self.accuracy_weight += weight.to(self.device)

    def values(self) -> dict[str, Tensor]:
        hits = self.confusion.diagonal().double()
        union = self.confusion.sum(0) + self.confusion.sum(1) - self.confusion.diagonal()
        counted = union > 0 if self.task.miou_convention == "all" else hits > 0
        iou = torch.where(counted, hits / union.clamp(min=1), 0.0)
        miou = iou.sum() / counted.sum().clamp(min=1)
        seen = self.confusion.sum() > 0
        return {
            "miou": torch.where(seen, miou, float("nan")),
            "pixel_accuracy": self.accuracy_total / self.accuracy_weight,
        }
