"""The best constant prediction of a task, fitted in one pass with bounded memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_DROPPED_BITS = 12  # of float32's 23 mantissa bits; 11 are kept
_BINS = 1 << (32 - _DROPPED_BITS)
_SIGN = 1 << 31
_ALL = (1 << 32) - 1


@dataclass(frozen=True)
class ConstantPredictor:
    """Predicts the same vector everywhere.

    value: [C], float32
    """

    value: Tensor

    def __call__(self, batch: int, height: int, width: int) -> Tensor:
        """Return [batch, C, height, width], a view of the one value."""
        return self.value[None, :, None, None].expand(batch, -1, height, width)


def most_frequent_class(
    name: str, classes: int, labels: Iterable[Tensor], what: str = "pixel"
) -> Tensor:
    """One-hot float32 [C] of the class met most often, the lowest of equals.

    labels: of one batch each, any shape, valid ones only, in 0 .. classes - 1
    raises: ValueError naming the task if there is none; what: what has a label
    """
    counts = torch.zeros(classes, dtype=torch.int64)
    for batch in labels:
        counts += torch.bincount(batch.long().cpu().flatten(), minlength=classes)
    if int(counts.sum()) == 0:
        raise ValueError(f"{name}: Expected at least one valid {what}, got none")
    return F.one_hot(counts.argmax(), classes).float()


class StreamingMedian:
    """Median of any number of float32 values in 8 MiB.

    A histogram over the upper 20 bits of the values, whose order is that of the numbers. The
    lower median is returned, cut towards zero by less than 2⁻¹¹ of itself (denormals by 6e-42).
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.int64)

    def update(self, values: Tensor) -> None:
        """Add values of any shape, without NaN."""
        flat = values.detach().to("cpu", torch.float32).flatten() + 0.0  # -0.0 becomes 0.0
        bits = flat.view(torch.int32).to(torch.int64) & _ALL
        ordered = torch.where(bits >= _SIGN, _ALL - bits, bits + _SIGN)
        self.counts += torch.bincount(ordered >> _DROPPED_BITS, minlength=_BINS)

    def compute(self) -> float:
        """Return the median; NaN without values."""
        count = int(self.counts.sum())
        if count == 0:
            return float("nan")
        rank = (count + 1) // 2
        index = int(torch.searchsorted(self.counts.cumsum(0), rank))
        edge = index << _DROPPED_BITS
        last = edge + (1 << _DROPPED_BITS) - 1
        # The end of the bin that lies nearer to zero.
        bits = edge - _SIGN if edge >= _SIGN else _ALL - last
        return float(np.array(bits, dtype=np.uint32).view(np.float32))
