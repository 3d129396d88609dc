"""Every case of `make gpu` with its floor: the least time that its FLOP or bytes can take."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.gpu_common import RATES
from sparsemtl.ops.sparse_conv2d_pixels import pixel_order
from sparsemtl.ops.sparse_conv2d_plan import Geometry

COPY, PEAK = 4.3e12, 790e12  # bytes and bfloat16 FLOP per second of an H200, assumed for floors
WEIGHTS = 90_651_648  # of the 72 convolutions of the 3-task DeepLab-ResNet34


def in_bounds(rate: int, size: int) -> float:
    """Share of a 3x3 convolution's taps that read the map."""
    g = Geometry((1, 1), (rate, rate), (rate, rate), (3, 3), 1)
    order = pixel_order(g, 1, (size, size), 1, False, torch.device("cpu"))
    return order.tile_taps / (9 * size * size)


def plan() -> Iterator[tuple[str, float | None]]:
    """Every case and its floor in milliseconds: FLOP that remain at the peak, or bytes."""
    yield "G1 threshold_adam, 90.7 M weights", 1e3 * WEIGHTS * (28 + 2 + 1 / 8) / COPY
    work = 2 * 512 * 1024 * 9 * 41 * 41
    share = sum(in_bounds(rate, 41) for rate in RATES)
    for batch in (1, 16):
        yield f"G2 dense ASPP 3x3, four rates, b{batch}", 1e3 * batch * work * share / PEAK
    for block, density in ((64, 0.1), (64, 0.05), (32, 0.1)):
        for name in ("forward", "input-grad", "weight-grad"):
            floor = 1e3 * 16 * work * share * density / PEAK
            yield f"G3 block {block}x{block} at {1 - density:.0%}, {name}, b16", floor
    for density in (0.1, 0.06, 0.04, 0.02, 0.01):
        yield (
            f"G4 unstructured at {1 - density:.0%}, 512→1024 3x3, b16",
            (1e3 * 16 * work * share / 4 * density / 16.7e12),
        )
    yield "G5 inference, heads in blocks of 64, b1", 1e3 * 24.8e9 / PEAK
    yield "G5 inference, heads in blocks of 64, b16", 1e3 * 16 * 24.8e9 / PEAK
    yield "G6 training step, block 64 at 90 %, b16", 1e3 * 3 * 16 * 221e9 * 0.1 / PEAK
