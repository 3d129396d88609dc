"""How the native kernels are to read a convolution: geometry, tiles and the mode of each pass.

A pass of a convolution reads source planes through taps. For the forward pass and the weight
gradient the source is x; with a stride it is split into one plane for each phase, after which
every tap has unit stride. For the input gradient the source is the output's gradient, and each
phase of x is computed by itself with the taps that reach it.

Modes, as in csrc/cpu/sparse_conv2d.h:
table   any geometry; pixels may be ordered so that tiles skip taps that read only padding
linear  source copied once into zero-padded planes, where a tap is a constant offset
direct  the same planes, read in place: where inputs are used too few times to repay packing, and
        for vectors of output channels, which load seldom

A 1x1 convolution with unit stride needs no zeros: its planes are the source itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

TABLE, LINEAR, DIRECT = 0, 1, 2
_NO_TAP = 1 << 29  # dy of a tap that reads nothing

# Vectors of pixels in a tile, by what fits registers and the L1 cache.
_VECTORS = {"packed": 4, "few-rows": 8, "direct": 12, "grad": 8, "generic": 4}
# Below so many nonzeros per column a packed panel is not worth its copies. Of x itself it is: its
# planes are pages apart, which copies with their prefetches bear best.
_FEW_PER_COLUMN = 7.0
_FEW_PER_FLAT = 0.0
_FEW_VECTORS_PER_FLAT = 4.0
_FEW_PER_PANEL = 30.0  # nonzeros per column below which panels are wide and lie in the L2 cache
_LEAST_FLAT = 256  # pixels of an image that is read as one row
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
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        return (
            (height + 2 * self.padding[0] - reach[0]) // self.stride[0] + 1,
            (width + 2 * self.padding[1] - reach[1]) // self.stride[1] + 1,
        )


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
    """One native call, as `ConvPlan` of csrc/cpu/sparse_conv2d_module.cpp takes it."""

    mode: int
    geometry: tuple[int, ...]  # problem, mode, vectors, regions, guarded
    taps: tuple[int, ...]  # of each: phase, dy, dx
    copy: tuple[int, ...]  # wanted, then the planes


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
    per_column: nonzeros per column: how often a packed input is used
    """
    batch, channels, height, width = source
    phases = stride[0] * stride[1]
    rows, columns = -(-height // stride[0]), -(-width // stride[1])
    live = [(dy, dx) for _, dy, dx in taps if dy != _NO_TAP]
    shape = Source(phases > 1, stride, 0, rows, columns, 0, 0)
    pixels = height * width
    mode, guarded = TABLE, False  # guarded: see csrc/cpu/sparse_conv2d.h
    if kind == "table" or len(live) < len(taps):
        pass
    elif live == [(0, 0)] and phases == 1 and out[1:] == (height, width) and pixels >= _LEAST_FLAT:
        # One row of pixels: no gaps, nothing to copy, but nothing behind the last pixel either.
        rows, columns, out, guarded = 1, pixels, (out[0], 1, pixels), True
        shape = Source(False, stride, 0, rows, columns, 0, 0)
        few = _FEW_PER_FLAT if vector == 1 else _FEW_VECTORS_PER_FLAT
        small = channels * pixels < 1 << 31
        mode = DIRECT if per_column < few and kind == "forward" and small else LINEAR
    elif len(taps) > 1 or phases > 1:
        padded = _padded(live, stride, rows, columns, out)
        waste = ((out[1] - 1) * padded.pitch + out[2]) / max(out[1] * out[2], 1)
        small = channels * phases * padded.plane_height * padded.pitch < 1 << 31
        grown = padded.plane_height * padded.pitch / max(rows * columns, 1)
        if per_column < _FEW_PER_COLUMN or (vector > 1 and kind == "forward"):
            in_vain = waste / max(_inside(live, rows, columns, out), 1e-9)
            packed = vector > 1 and in_vain > (1.7 if per_column >= 4.0 else 2.5)
            mode = DIRECT if small and waste < 1.5 and grown < 3 and not packed else TABLE
        elif (waste - 1) * per_column < 2.0 and grown < 2:
            mode = LINEAR
        if mode != TABLE:
            shape = padded
    vectors = _vectors(kind, mode, out[0] // groups, per_column, vector, isa)
    regions = mode == TABLE and _regions_pay(live, rows, columns, out)
    plane = (shape.plane_height, shape.pitch)
    origin = shape.lead + shape.top * shape.pitch if mode != TABLE else 0
    problem = (batch, channels, phases, *plane, origin, *out, groups, len(taps))
    return Pass(
        mode,
        (*problem, mode, vectors, int(regions), int(guarded)),
        tuple(number for tap in taps for number in tap),
        (
            int(shape.copy), batch * channels, height, width, *stride, shape.top, *plane,
            shape.lead, shape.slack,
        ),
    )  # fmt: skip


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


def _inside(
    live: list[tuple[int, int]], rows: int, columns: int, out: tuple[int, int, int]
) -> float:
    """The share of the taps' work that reads the image and not padding."""
    inside = sum(
        max(0, min(out[1], rows - dy) - max(0, -dy))
        * max(0, min(out[2], columns - dx) - max(0, -dx))
        for dy, dx in live
    )
    total = len(live) * out[1] * out[2]
    return inside / total if total else 1.0


def _regions_pay(
    live: list[tuple[int, int]], rows: int, columns: int, out: tuple[int, int, int]
) -> bool:
    """Whether a tenth of the taps' work reads only padding and could be skipped by ordering."""
    return _inside(live, rows, columns, out) < 0.9


def _vectors(kind: str, mode: int, rows: int, per_column: float, vector: int, isa: str) -> int:
    if isa == "generic":
        return _VECTORS["generic"]
    if vector > 1:
        return 6 if vector == 4 and isa == "avx512" else 3
    if kind != "forward":
        return _VECTORS["direct" if mode == DIRECT else "grad"]
    if mode == DIRECT:
        return _VECTORS["direct"]
    wide = rows <= _FEW_ROWS or per_column < _FEW_PER_PANEL or isa == "avx2"
    return _VECTORS["few-rows" if wide else "packed"]
