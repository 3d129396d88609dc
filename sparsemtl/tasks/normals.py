"""Surface normals: one minus the mean cosine, and angles in degrees.

Two spaces exist and must never be compared: "decoded" components in [-1, 1], and "encoded"
8-bit components 0..255 that published NYUv2 results use undecoded. In encoded space every vector
is positive, so no angle exceeds about 70.5° and all scores look better. Metrics in encoded space
carry the suffix `_encoded`, so that Δ across the two fails instead of misleading.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemtl.tasks.base import Task, TaskMetrics
from sparsemtl.tasks.constant import ConstantPredictor
from sparsemtl.tasks.pictures import check_picture, paint_invalid, to_numpy
from sparsemtl.tasks.resize import resize_nearest

SPACES = ("decoded", "encoded")
WITHIN = (11.25, 22.5, 30.0)  # degrees
BIN = 0.001  # degrees; the median is exact to half of it, whatever the number of pixels
_BINS = round(180.0 / BIN) + 1
_SHORTEST = 1e-6  # vectors below this length have no direction; keeps the gradient bounded


@dataclass(frozen=True)
class Normals(Task):
    """One minus the mean cosine between predicted and true vectors, both L2-normalised.

    normals_space: "decoded" or "encoded": what the targets are. It names the metrics.
    """

    normals_space: str = "decoded"

    kind: ClassVar[str] = "normals"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_option("normals_space", self.normals_space, SPACES)
        if self.channels != 3:
            raise ValueError(f"{self.name}: Expected channels = 3, got {self.channels}")

    @property
    def higher_is_better(self) -> dict[str, bool]:
        names = {"mean": False, "median": False, **{f"within_{a:g}": True for a in WITHIN}}
        return {self.metric_name(name): higher for name, higher in names.items()}

    def metric_name(self, name: str) -> str:
        """Return the metric's name in this task's space."""
        return name if self.normals_space == "decoded" else f"{name}_encoded"

    def metrics(self) -> NormalsMetrics:
        return NormalsMetrics(self)

    def check_target(self, target: Tensor, valid: Tensor) -> None:
        shown = torch.where(valid[:, None], target, 0.0)
        if shown.numel() == 0:
            return
        low, high = (float(v) for v in torch.aminmax(shown))
        if not (isfinite(low) and isfinite(high)):
            raise ValueError(f"{self.name}: Expected finite valid normals, got {low}..{high}")
        if self.normals_space == "encoded" and low < 0.0:
            raise ValueError(
                f"{self.name}: Expected encoded normals with components ≥ 0, got {low:.4g}. "
                "Decode them and use normals_space='decoded', or check the reader"
            )
        if self.normals_space == "decoded" and low >= 0.0 and high > 1.001:
            raise ValueError(
                f"{self.name}: Expected decoded normals with components in [-1, 1], got "
                f"{low:.4g}..{high:.4g}, which looks encoded. Decode them or use "
                "normals_space='encoded'"
            )

    def _masked_loss(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        where = valid[:, None]
        predicted = F.normalize(torch.where(where, prediction, 0.0), dim=1, eps=_SHORTEST)
        true = F.normalize(torch.where(where, target.to(prediction.dtype), 0.0), dim=1)
        count = valid.sum()
        return (count - (predicted * true).sum()) / count.clamp(min=1)

    def constant_predictor(self, targets: Iterable[tuple[Tensor, Tensor]]) -> ConstantPredictor:
        """Fit the normalised mean of the normalised vectors, the best under the loss."""
        total, count = torch.zeros(3, dtype=torch.float64), 0
        for target, valid in targets:
            self.check_target_shapes(target, valid)
            self.check_target(target, valid)
            vectors = target.permute(0, 2, 3, 1)[valid].double()  # [N, 3]
            total += F.normalize(vectors, dim=1).sum(0).cpu()
            count += vectors.shape[0]
        if count == 0:
            raise ValueError(f"{self.name}: Expected at least one valid pixel, got none")
        return ConstantPredictor(F.normalize(total, dim=0).float())

    def to_picture(
        self,
        tensor: Tensor,
        valid: Tensor | None = None,
        limits: tuple[float, float] | None = None,
    ) -> np.ndarray:
        """Paint the normalised vectors: (n + 1) / 2 decoded, n itself encoded."""
        check_picture(self.name, tensor, 3, valid)
        unit = to_numpy(F.normalize(tensor.detach().float(), dim=0)).transpose(1, 2, 0)
        unit = np.nan_to_num(unit)
        shown = (unit + 1.0) / 2.0 if self.normals_space == "decoded" else unit
        picture = np.rint(np.clip(shown, 0.0, 1.0) * 255).astype(np.uint8)
        return paint_invalid(picture, None if valid is None else to_numpy(valid))


class NormalsMetrics(TaskMetrics):
    """Mean and median angle (degrees, lower is better), % within 11.25°, 22.5° and 30°.

    Pooled over all valid pixels. The median comes from a histogram of 0.001° bins, so memory
    stays at 1.4 MiB and the value is within 0.0005° of the exact one. "Within" includes the
    bound. A vector without length is 90° from everything (its cosine is 0).
    """

    task: Normals

    def __init__(self, task: Normals) -> None:
        super().__init__(task)
        self.add_sum("angle_total")
        self.add_count("histogram", _BINS)
        self.add_count("within", len(WITHIN))

    def accumulate(self, prediction: Tensor, target: Tensor, valid: Tensor) -> None:
        size = (target.shape[-2], target.shape[-1])
        predicted = resize_nearest(prediction, size, self.task.resize_rule).permute(0, 2, 3, 1)[
            valid
        ]  # [N, 3]
        angle = angle_between(predicted, target.permute(0, 2, 3, 1)[valid])
        self.angle_total += angle.sum().to(self.device)
        bins = torch.round(angle / BIN).long()
        self.histogram += torch.bincount(bins, minlength=_BINS).to(self.device)
        bounds = torch.tensor(WITHIN, dtype=angle.dtype, device=angle.device)
        self.within += (angle[:, None] <= bounds).sum(0).to(self.device)

    def values(self) -> dict[str, Tensor]:
        count = self.histogram.sum()
        ranks = torch.stack([(count + 1) // 2, count // 2 + 1])  # the two middle ones, or twice it
        middle = torch.searchsorted(self.histogram.cumsum(0), ranks).double() * BIN
        median = torch.where(count > 0, middle.mean(), float("nan"))
        shares = 100.0 * self.within.double() / count
        values = {"mean": self.angle_total / count, "median": median}
        values |= {f"within_{a:g}": share for a, share in zip(WITHIN, shares, strict=True)}
        return {self.task.metric_name(name): value for name, value in values.items()}


def angle_between(first: Tensor, second: Tensor) -> Tensor:
    """Angle between vectors of any length, exact near 0° and 180° where arccos is not.

    first, second: [N, 3]
    returns:       [N], float64, degrees in [0, 180]; 90 where either vector is shorter than 1e-12
    """
    first, second = first.double(), second.double()
    sine = torch.linalg.vector_norm(torch.linalg.cross(first, second), dim=1)
    cosine = (first * second).sum(1)
    angle = torch.rad2deg(torch.atan2(sine, cosine))
    shortest = torch.minimum(first.norm(dim=1), second.norm(dim=1))
    return torch.where(shortest < 1e-12, 90.0, angle)
