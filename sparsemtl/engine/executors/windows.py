"""Tables of pooling and resizing, one entry for each output row or column.

They are what torch computes: the same bounds, divisors and interpolation weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Windows:
    """Output i is scale[i] · the sum over [start[i], stop[i]) along one axis."""

    start: np.ndarray
    stop: np.ndarray
    scale: np.ndarray

    @property
    def arrays(self) -> list[np.ndarray]:
        return [self.start, self.stop, self.scale]


def pool_windows(
    size: int, out: int, kernel: int, stride: int, padding: int, count_padding: bool
) -> Windows:
    """avg_pool2d along one axis; a window's end is cut at the far padding, as ceil_mode has it."""
    begin = np.arange(out) * stride - padding
    end = np.minimum(begin + kernel, size + padding)
    start, stop = np.maximum(begin, 0), np.minimum(end, size)
    count = end - begin if count_padding else stop - start
    return _windows(start, np.maximum(stop, start), count)


def adaptive_windows(size: int, out: int) -> Windows:
    """adaptive_avg_pool2d along one axis; with out = 1 the mean."""
    index = np.arange(out)
    start, stop = index * size // out, -(-(index + 1) * size // out)
    return _windows(start, stop, stop - start)


def _windows(start: np.ndarray, stop: np.ndarray, count: np.ndarray) -> Windows:
    scale = (1.0 / np.maximum(count, 1)).astype(np.float32)
    return Windows(start.astype(np.int32), stop.astype(np.int32), scale)


@dataclass(frozen=True)
class Neighbours:
    """Output i is x[low[i]] + weight[i] · (x[high[i]] − x[low[i]]) along one axis."""

    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray

    @property
    def arrays(self) -> list[np.ndarray]:
        return [self.low, self.high, self.weight]


def nearest(size: int, out: int) -> Neighbours:
    """interpolate(mode="nearest"): the floor of i · size / out, in float32 as torch has it."""
    scale = np.float32(size) / np.float32(out)
    low = np.minimum((np.arange(out, dtype=np.float32) * scale).astype(np.int32), size - 1)
    return Neighbours(low, low, np.zeros(out, dtype=np.float32))


def bilinear(size: int, out: int, align_corners: bool) -> Neighbours:
    """interpolate(mode="bilinear") along one axis, in float32 as torch has it."""
    index = np.arange(out, dtype=np.float32)
    if align_corners:
        scale = np.float32((size - 1) / (out - 1)) if out > 1 else np.float32(0)
        at = index * scale
    else:
        scale = np.float32(size / out)
        at = np.maximum((index + np.float32(0.5)) * scale - np.float32(0.5), np.float32(0))
    low = np.minimum(at.astype(np.int32), size - 1)
    high = np.minimum(low + 1, size - 1).astype(np.int32)
    weight = np.clip(at - low.astype(np.float32), 0.0, 1.0).astype(np.float32)
    return Neighbours(low, high, weight)
