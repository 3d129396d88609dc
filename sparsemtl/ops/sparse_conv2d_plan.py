"""How the native kernels are to read a convolution: geometry, tiles and the mode of each pass.

A pass of a convolution reads source planes through taps. For the forward pass and the weight
gradient the source is x; with a stride it is split into one plane for each phase, after which
every tap has unit stride. For the input gradient the source is the output's gradient, and each
phase of x is computed by itself with the taps that reach it.

Modes, as in csrc/cpu/sparse_conv2d.h:
table   any geometry; pixels may be ordered so that tiles skip taps that read only padding
linear  source copied once into zero-padded planes, where a tap is a constant offset
direct  the same planes, read in place: where inputs are used too few times to repay packing
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sparsemtl.ops.availability import native_module

TABLE, LINEAR, DIRECT = 0, 1, 2
_NO_TAP = 1 << 29  # dy of a tap that reads nothing

# Vectors of pixels in a tile, by what fits registers and the L1 cache.
_VECTORS = {"packed": 4, "few-rows": 8, "direct": 12, "grad": 8, "generic": 4}
# Below so many nonzeros per column a packed panel is not worth its copies.
_FEW_PER_COLUMN = 8.0
_FEW_ROWS = 160  # output channels whose sums stay in the L1 cache beside a panel


@dataclass(frozen=True)
class Geometry:
    """A convolution's integers; pairs are (vertical, horizontal)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    kernel: tuple[int, int]
    groups: int

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output; below 1 where the kernel does not fit."""
        sizes = zip(
            (height, width), self.stride, self.padding, self.dilation, self.kernel, strict=True
        )
        out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, s, p, d, k in sizes]
        return out[0], out[1]


@dataclass(frozen=True)
class Source:
    """Planes that a pass reads: the tensor itself, or a copy with zeros around and phases apart.

    copy: whether a copy is needed; then it has phases of [plane_height, pitch] from row `top` on
    """

    copy: bool
    stride: tuple[int, int]
    top: int
    plane_height: int
    pitch: int
    lead: int  # zeros before the first plane, for taps left of the first pixel
    slack: int  # floats after the last, which a last tile may read and drop


@dataclass(frozen=True)
class Pass:
    """One native call."""

    source: Source
    mode: int
    geometry: list[int]  # of csrc/cpu/sparse_conv2d_module.cpp: problem, mode, vectors, regions
    taps: Tensor  # [T, 3] int32: phase, dy, dx


Taps = tuple[tuple[int, int, int], ...]  # phase, dy, dx


@lru_cache(maxsize=1024)
def taps_of_forward(g: Geometry) -> Taps:
    """Phase of x, dy and dx of each tap."""
    taps = []
    for i in range(g.kernel[0]):
        for j in range(g.kernel[1]):
            y, x = i * g.dilation[0] - g.padding[0], j * g.dilation[1] - g.padding[1]
            phase = y % g.stride[0] * g.stride[1] + x % g.stride[1]
            taps.append((phase, y // g.stride[0], x // g.stride[1]))
    return tuple(taps)


@lru_cache(maxsize=1024)
def taps_of_input_grad(g: Geometry, phase: tuple[int, int]) -> Taps:
    """The same into the output's gradient, for the pixels of x of one phase."""
    taps = []
    for i in range(g.kernel[0]):
        for j in range(g.kernel[1]):
            y = phase[0] + g.padding[0] - i * g.dilation[0]
            x = phase[1] + g.padding[1] - j * g.dilation[1]
            if y % g.stride[0] or x % g.stride[1]:
                taps.append((0, _NO_TAP, 0))
            else:
                taps.append((0, y // g.stride[0], x // g.stride[1]))
    return tuple(taps)


@lru_cache(maxsize=4096)
def plan_pass(
    kind: str,
    taps: Taps,
    stride: tuple[int, int],
    source: tuple[int, int, int, int],
    out: tuple[int, int, int],
    groups: int,
    per_column: float,
    vector: int,
    isa: str,
) -> Pass:
    """Choose mode and tiles.

    kind:       "forward" (input gradients too); "grad", the weight gradient; "table", the weight
                gradient by tables only
    source:     batch, channels, height, width before phases are split
    out:        channels, height, width
    per_column: nonzeros per column, rounded: how often a packed input is used
    """
    batch, channels, height, width = source
    phases = stride[0] * stride[1]
    rows, columns = -(-height // stride[0]), -(-width // stride[1])
    live = [(dy, dx) for _, dy, dx in taps if dy != _NO_TAP]
    mode, shape = TABLE, Source(phases > 1, stride, 0, rows, columns, 0, 0)
    wanted = kind != "table" and (len(taps) > 1 or phases > 1)
    if wanted and len(live) == len(taps):
        padded = _padded(live, stride, rows, columns, out)
        waste = ((out[1] - 1) * padded.pitch + out[2]) / max(out[1] * out[2], 1)
        small = channels * phases * padded.plane_height * padded.pitch < 1 << 31
        grown = padded.plane_height * padded.pitch / max(rows * columns, 1)
        if kind == "forward" and per_column < _FEW_PER_COLUMN and vector == 1:
            mode = DIRECT if small and waste < 1.5 and grown < 3 else TABLE
        elif (waste - 1) * per_column < 2.0 and grown < 2:
            mode = LINEAR
        if mode != TABLE:
            shape = padded
    vectors = _vectors(kind, mode, out[0] // groups, per_column, vector, isa)
    regions = mode == TABLE and _regions_pay(live, rows, columns, out)
    plane = (shape.plane_height, shape.pitch)
    origin = shape.lead + shape.top * shape.pitch if mode != TABLE else 0
    problem = [batch, channels, phases, *plane, origin, *out, groups, len(taps)]
    table = torch.tensor(taps, dtype=torch.int32).reshape(-1, 3)
    return Pass(shape, mode, [*problem, mode, vectors, int(regions)], table)


def _padded(
    live: list[tuple[int, int]],
    stride: tuple[int, int],
    rows: int,
    columns: int,
    out: tuple[int, int, int],
) -> Source:
    """Planes in which each tap of each output pixel reads a zero or its value."""
    top = max(0, -min(dy for dy, _ in live))
    bottom = max(0, out[1] - 1 + max(dy for dy, _ in live) - (rows - 1))
    left = max(0, -min(dx for _, dx in live))
    right = max(0, out[2] - 1 + max(dx for _, dx in live) - (columns - 1))
    pitch = max(columns + max(left, right), out[2])
    # A tile may start at the last pixel and read a tile's width beyond, through the last tap.
    slack = 256 + max(0, max(dx for _, dx in live)) + pitch
    return Source(True, stride, top, top + rows + bottom, pitch, -(-left // 16) * 16, slack)


def _regions_pay(
    live: list[tuple[int, int]], rows: int, columns: int, out: tuple[int, int, int]
) -> bool:
    """Whether a tenth of the taps' work reads only padding and could be skipped by ordering."""
    inside = sum(
        max(0, min(out[1], rows - dy) - max(0, -dy))
        * max(0, min(out[2], columns - dx) - max(0, -dx))
        for dy, dx in live
    )
    return inside < 0.9 * len(live) * out[1] * out[2]


def _vectors(kind: str, mode: int, rows: int, per_column: float, vector: int, isa: str) -> int:
    if isa == "generic":
        return _VECTORS["generic"]
    if vector > 1:
        return 6 if vector == 4 and isa == "avx512" else 3
    if kind != "forward":
        return _VECTORS["grad" if per_column >= _FEW_PER_COLUMN else "direct"]
    if mode == DIRECT:
        return _VECTORS["direct"]
    return _VECTORS["few-rows" if rows <= _FEW_ROWS or isa == "avx2" else "packed"]


_KEPT = 64 << 20  # floats: larger buffers are allocated for each call
_local = threading.local()


def workspace(name: str, floats: int) -> Tensor:
    """Return uninitialised float32 memory of at least this size, kept for the thread's next call.

    Fresh memory costs a page fault for every 4 KiB, which is more than a small convolution.
    """
    buffers: dict[str, Tensor] = _local.__dict__.setdefault("buffers", {})
    kept = buffers.get(name)
    if kept is None or kept.numel() < floats:
        kept = torch.empty(floats, dtype=torch.float32)
        if floats <= _KEPT:
            buffers[name] = kept
    return kept


def read_source(x: Tensor, source: Source) -> tuple[Tensor, bool]:
    """Return the planes that a pass reads and whether they are known to be finite.

    x: [B, C, H, W] float32, contiguous
    """
    if not source.copy:
        return x, False
    batch, channels, height, width = x.shape
    phases = source.stride[0] * source.stride[1]
    plane = source.plane_height * source.pitch
    size = batch * channels * phases * plane
    planes = workspace("planes", source.lead + size + source.slack)
    planes[: source.lead] = 0.0
    planes[source.lead + size : source.lead + size + source.slack] = 0.0
    shape = [batch * channels, height, width, *source.stride]
    finite = native_module().sparse_conv2d_planes(
        x.data_ptr(),
        [*shape, source.top, source.plane_height, source.pitch],
        planes.data_ptr() + 4 * source.lead,
        torch.get_num_threads(),
    )
    return planes, finite
