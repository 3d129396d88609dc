"""A task: the loss, the metrics and the pictures of one output of a multitask network.

B batch, C channels, (h, w) the prediction's size, (H, W) the label's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from sparsemtl.errors import unknown_choice
from sparsemtl.tasks.constant import ConstantPredictor
from sparsemtl.tasks.resize import resize_bilinear, resize_nearest

RESOLUTIONS = ("prediction", "released", "full")
POOLINGS = ("pixels", "batches")


@dataclass(frozen=True)
class Task(ABC):
    """One output: a name, a kind of target and a number of channels.

    resolution: where the loss is computed. "prediction": labels are nearest-resized down to the
                prediction and metrics see it nearest-resized up, pixel centres on pixel centres.
                "released": the same by torch's `nearest`, which rounds indices down and so is half
                a cell off (AdaShare, DiSparse, AdapMTL). "full": loss and metrics see the
                prediction upsampled bilinearly (MTAN).
    """

    name: str
    channels: int
    resolution: str = "prediction"

    kind: ClassVar[str]
    target_channels: ClassVar[bool] = True  # targets are [B, C, H, W] floats, else [B, H, W] ints

    def __post_init__(self) -> None:
        self._check_option("resolution", self.resolution, RESOLUTIONS)

    @property
    def resize_rule(self) -> str:
        """Torch's name of the nearest rule between labels and predictions."""
        return "nearest" if self.resolution == "released" else "nearest-exact"

    @property
    @abstractmethod
    def higher_is_better(self) -> dict[str, bool]:
        """Metric name → direction: the metrics that enter Δ, in the papers' order."""

    @abstractmethod
    def metrics(self) -> TaskMetrics:
        """Return a fresh accumulator of this task's metrics."""

    @abstractmethod
    def constant_predictor(self, targets: Iterable[tuple[Tensor, Tensor]]) -> ConstantPredictor:
        """Fit the best constant prediction: the score that a network has to beat.

        targets: batches of (target, valid) of the training set; read once, never kept
        raises:  ValueError if no pixel is valid
        """

    @abstractmethod
    def to_picture(
        self,
        tensor: Tensor,
        valid: Tensor | None = None,
        limits: tuple[float, float] | None = None,
    ) -> np.ndarray:
        """Paint one target or prediction.

        tensor:  [C, H, W]; for segmentation scores [C, H, W] or labels [H, W]
        valid:   [H, W], bool; other pixels become grey
        limits:  values of the darkest and brightest colour, for tasks with a scale; default the
                 extremes of the picture. Give a prediction those of its target to compare them.
        returns: uint8 [H, W, 3], RGB
        """

    @abstractmethod
    def _masked_loss(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """Mean loss over the valid pixels; all three have one size, prediction ≥ float32."""

    @abstractmethod
    def check_target(self, target: Tensor, valid: Tensor) -> None:
        """Raise ValueError where a valid target lies outside the task's range."""

    def loss(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """Mean loss over the valid pixels.

        prediction: [B, C, h, w], floating point; computed in float32 at least
        target:     [B, C, H, W] floating point, or [B, H, W] integer for segmentation
        valid:      [B, H, W], bool; whatever stands in other pixels has no influence
        returns:    scalar; exactly 0 with a zero gradient where no pixel is valid
        raises:     ValueError for other shapes or targets out of range, TypeError for dtypes
        """
        self.check_shapes(prediction, target, valid)
        if not torch.compiler.is_compiling():
            self.check_target(target, valid)
        if prediction.dtype in (torch.float16, torch.bfloat16):
            prediction = prediction.float()
        if self.resolution == "full":
            size = (target.shape[-2], target.shape[-1])
            prediction = resize_bilinear(prediction, size)
        size = (prediction.shape[-2], prediction.shape[-1])
        rule = self.resize_rule
        target, valid = resize_nearest(target, size, rule), resize_nearest(valid, size, rule)
        return self._masked_loss(prediction, target, valid)

    def check_shapes(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        """Raise ValueError or TypeError unless the three belong together."""
        if prediction.dim() != 4 or prediction.shape[1] != self.channels:
            raise ValueError(
                f"{self.name}: Expected prediction of shape [B, {self.channels}, h, w], got "
                f"{list(prediction.shape)}"
            )
        if not prediction.is_floating_point():
            raise TypeError(
                f"{self.name}: Expected prediction of a floating-point dtype, got "
                f"{prediction.dtype}"
            )
        self.check_target_shapes(target, valid)
        if target.shape[0] != prediction.shape[0]:
            raise ValueError(
                f"{self.name}: Expected target with the prediction's batch size "
                f"{prediction.shape[0]}, got {target.shape[0]}"
            )
        if 0 in prediction.shape[2:] or 0 in target.shape[-2:]:
            raise ValueError(
                f"{self.name}: Expected maps with at least one pixel, got prediction "
                f"{list(prediction.shape)} and target {list(target.shape)}"
            )

    def check_target_shapes(self, target: Tensor, valid: Tensor) -> None:
        """Raise ValueError or TypeError unless target and valid belong together."""
        # Texts are made where they are raised: torch.compile cannot trace every f-string.
        if self.target_channels:
            shape_fits = target.dim() == 4 and target.shape[1] == self.channels
            dtype_fits = target.is_floating_point()
        else:
            shape_fits = target.dim() == 3
            dtype_fits = not (
                target.is_floating_point() or target.is_complex() or target.dtype == torch.bool
            )
        if not shape_fits:
            shape = f"[B, {self.channels}, H, W]" if self.target_channels else "[B, H, W]"
            raise ValueError(
                f"{self.name}: Expected target of shape {shape}, got {list(target.shape)}"
            )
        if not dtype_fits:
            dtype = "a floating-point" if self.target_channels else "an integer"
            raise TypeError(f"{self.name}: Expected target of {dtype} dtype, got {target.dtype}")
        expected = [target.shape[0], *target.shape[-2:]]
        if list(valid.shape) != expected:
            raise ValueError(
                f"{self.name}: Expected valid of shape {expected}, got {list(valid.shape)}"
            )
        if valid.dtype != torch.bool:
            raise TypeError(f"{self.name}: Expected valid of dtype torch.bool, got {valid.dtype}")

    def _check_option(self, option: str, got: str, choices: tuple[str, ...]) -> None:
        if got not in choices:
            raise ValueError(f"{self.name}: {unknown_choice(option, got, choices)}")


class TaskMetrics(Metric):  # type: ignore[misc]  # torchmetrics is not followed by mypy
    """Metrics of one task, accumulated over a data set and joined over ranks by torchmetrics.

    `update(prediction, target, valid)` takes what `Task.loss` takes; `compute()` returns
    metric name → float. Sums are kept in float64, counts in int64, on the metric's own device.
    Every value is NaN where no pixel was valid, or where a prediction of a valid pixel was NaN
    or inf: an evaluation at the end of a long run never fails, and never flatters.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.add_count("broken")  # valid pixels whose prediction is not finite

    def add_sum(self, name: str, *shape: int) -> None:
        """Add a float64 state that is summed over batches and ranks."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def add_count(self, name: str, *shape: int) -> None:
        """Add an int64 state that is summed over batches and ranks."""
        self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        """Accumulate one batch; shapes and errors as in `Task.loss`."""
        self.task.check_shapes(prediction, target, valid)
        self.task.check_target(target, valid)
        size = (target.shape[-2], target.shape[-1])
        if self.task.resolution == "full":
            prediction = resize_bilinear(prediction.float(), size)
        finite = resize_nearest(prediction.isfinite().all(dim=1), size, self.task.resize_rule)
        self.broken += (valid & ~finite).sum().to(self.device)
        self.accumulate(prediction, target, valid & finite)

    def accumulate(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        """Add one checked batch; the prediction may still be smaller than the target."""
        raise NotImplementedError

    def values(self) -> dict[str, Tensor]:
        """Return the metrics of what was accumulated, NaN for 0/0."""
        raise NotImplementedError

    def compute(self) -> dict[str, float]:
        """Return metric name → value, in the order of `Task.higher_is_better`."""
        broken = bool(self.broken > 0)
        return {k: float("nan") if broken else float(v) for k, v in self.values().items()}


def mean_terms(values: Tensor, batch: int, pooling: str) -> tuple[Tensor, Tensor]:
    """Return the (numerator, denominator) that one batch adds to a mean; float64 scalars.

    values:  [N], of the batch's valid pixels; a batch with none adds nothing
    batch:   its number of samples
    pooling: "pixels" weighs every pixel alike; "batches" weighs the batch's mean by `batch`
    """
    total = values.double().sum()
    count = torch.full_like(total, values.numel())
    if pooling == "pixels" or values.numel() == 0:
        return total, count
    return batch * total / count, torch.full_like(total, batch)
