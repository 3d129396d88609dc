"""The order in which the GPU kernels take pixels: those that read the same taps together.

Along one axis the live taps of a pixel change only at a few places, so a map has a few rectangles
of constant tap set (at most 3x3 for a dilated 3x3 convolution of stride 1). Pixels are listed
rectangle by rectangle over the whole batch, the list is cut into tiles, and a tile walks the union
of its pixels' taps. What is skipped reads only padding: exact zeros. docs/kernels.md counts.

A pass goes from destination pixels to source pixels: outputs to inputs in the forward pass, inputs
to outputs in the input gradient. Where a tap is live, the source of a destination pixel (y, x) is
base(y, x) + offset(tap), one subtraction of linear indices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sparsemtl.ops.sparse_conv2d_plan import Geometry

MOST_TAPS = 63  # a bit for each in an int64, the sign left alone


@dataclass(frozen=True, eq=False)  # one is made for each shape, and is a key
class PixelOrder:
    """Pixels of one pass in tile order.

    bases:   [M] int32, source pixel to which a tap's offset is added
    dests:   [M] int32, destination pixel; -1 fills up the tiles
    live:    [M] int64, bit t set where tap t reads the map
    classes: [tiles] int32, index into `tap_sets`
    tap_sets: the different unions of taps that tiles walk, a bit for each tap
    steps:   dil_y, div_y, dil_x, div_x, pitch, sign of an offset; see `tap_offset`
    """

    bases: Tensor
    dests: Tensor
    live: Tensor
    classes: Tensor
    tap_sets: tuple[int, ...]
    steps: tuple[int, int, int, int, int, int]

    @property
    def tile_taps(self) -> int:
        """(tile, tap) pairs that are executed; times the tile, pixels per tap."""
        counts = torch.bincount(self.classes.cpu(), minlength=len(self.tap_sets)).tolist()
        return sum(n * bin(taps).count("1") for n, taps in zip(counts, self.tap_sets, strict=True))

    def class_taps(self, taps: int) -> Tensor:
        """Whether each class of tiles walks each tap: [classes, taps] bool on the device."""
        table = torch.tensor(self.tap_sets, dtype=torch.int64)
        return (((table[:, None] >> torch.arange(taps)) & 1) != 0).to(self.classes.device)


def tap_offset(tap: int, kernel_width: int, steps: tuple[int, ...]) -> int:
    """Source pixels from the base to what the tap reads."""
    dil_y, div_y, dil_x, div_x, pitch, sign = steps
    i, j = divmod(tap, kernel_width)
    return i * dil_y // div_y * pitch + j * dil_x // div_x * sign


@lru_cache(maxsize=256)  # a model has few shapes
def pixel_order(
    g: Geometry,
    batch: int,
    size: tuple[int, int],
    tile: int,
    transposed: bool,
    device: torch.device,
) -> PixelOrder:
    """The order of one pass.

    size:       height and width of the convolution's input
    tile:       pixels of a tile
    transposed: False: from outputs to inputs; True: the input gradient
    """
    rows, columns = _axis(g, 0, size[0], transposed), _axis(g, 1, size[1], transposed)
    source = g.output_size(*size) if transposed else size
    base = rows.base[:, None] * source[1] + columns.base[None, :]  # [dest height, dest width]
    sets = _outer(rows.taps, columns.taps, g.kernel[1])
    plane = source[0] * source[1]
    batches = torch.arange(batch)
    bases = (base.reshape(1, -1) + batches[:, None] * plane).reshape(-1)
    live = sets.reshape(1, -1).expand(batch, -1).reshape(-1)
    order = _snake(rows.places, columns.places, batch)
    bases, live = bases[order], live[order]
    filled = min(
        (_flat(live, tile), _pure(live, tile)), key=lambda places: _executed(live, places, tile)
    )
    there = filled >= 0
    bases = torch.where(there, bases[filled], 0)
    dests = torch.where(there, order[filled], -1)
    live = torch.where(there, live[filled], 0)
    unions = _unions(live, tile)
    # Tiles with the most taps first: the last wave of programs is then a short one.
    first = torch.argsort(_popcount(unions), descending=True, stable=True)
    tap_sets, classes = torch.unique(unions[first], return_inverse=True)

    def in_order(table: Tensor, dtype: torch.dtype) -> Tensor:
        return table.reshape(-1, tile)[first].reshape(-1).to(device, dtype)

    pitch, sign = (-source[1], -1) if transposed else (source[1], 1)
    div = g.stride if transposed else (1, 1)
    return PixelOrder(
        in_order(bases, torch.int32),
        in_order(dests, torch.int32),
        in_order(live, torch.int64),
        classes.to(device, torch.int32),
        tuple(tap_sets.tolist()),
        (g.dilation[0], div[0], g.dilation[1], div[1], pitch, sign),
    )


def why_not_pixels(g: Geometry, batch: int, size: tuple[int, int]) -> str | None:
    """Why the tables cannot hold this convolution; None if they can."""
    out = g.output_size(*size)
    # A base may lie before the first source pixel, or behind the last, by the kernel's reach.
    reach = max(p + d * k for p, d, k in zip(g.padding, g.dilation, g.kernel, strict=True))
    most = batch * max(size[0] * size[1], out[0] * out[1]) + reach * (max(size) + max(out) + 1)
    if most >= 1 << 31:
        return f"{most} pixels, it counts them in 32 bits"
    return None


@dataclass(frozen=True)
class _Axis:
    base: Tensor  # [n] source coordinate
    taps: Tensor  # [n] int64, bit i set where tap i is live
    places: Tensor  # [n] int64, rank of the stretch of equal (phase, taps) that n belongs to


def _axis(g: Geometry, axis: int, size: int, transposed: bool) -> _Axis:
    """Base and live taps of every destination coordinate."""
    s, p, d, k = (v[axis] for v in (g.stride, g.padding, g.dilation, g.kernel))
    out = (size + 2 * p - d * (k - 1) - 1) // s + 1
    taps = torch.arange(k)
    if transposed:
        reached = torch.arange(size)[:, None] + p - taps[None, :] * d  # [n, k], times the stride
        alive = (reached % s == 0) & (reached >= 0) & (reached < out * s)
        base = (torch.arange(size) + p) // s
    else:
        base = torch.arange(out) * s - p
        reached = base[:, None] + taps[None, :] * d
        alive = (reached >= 0) & (reached < size)
    bits = (alive.long() << taps).sum(1)
    _, places = torch.unique_consecutive(bits, return_inverse=True)
    if s > 1 and transposed:  # phases alternate: stretches are those of a phase
        phases = torch.arange(size) % s
        _, places = torch.unique(phases * (1 << 40) + bits, return_inverse=True)
    return _Axis(base, bits, places)


def _outer(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Bits of both axes' taps, i · width + j: [height, width] int64."""
    found = torch.zeros(len(rows), len(columns), dtype=torch.int64)
    for i in range(int(rows.max()).bit_length()):
        found |= ((rows >> i) & 1)[:, None] * (columns << (i * width))[None, :]
    return found


def _snake(rows: Tensor, columns: Tensor, batch: int) -> Tensor:
    """Destination pixels stretch by stretch, so that neighbours in the list differ little."""
    wide = int(columns.max()) + 1
    along = torch.where(rows[:, None] % 2 == 0, columns[None, :], wide - 1 - columns[None, :])
    key = (rows[:, None] * wide + along).reshape(1, -1).expand(batch, -1).reshape(-1)
    return torch.argsort(key, stable=True)


def _flat(live: Tensor, tile: int) -> Tensor:
    """Places in the list in tile order, -1 at the end of the last tile."""
    tiles = -(-len(live) // tile)
    places = torch.full((tiles * tile,), -1)
    places[: len(live)] = torch.arange(len(live))
    return places


def _pure(live: Tensor, tile: int) -> Tensor:
    """The same with every tile of one tap set."""
    _, runs = torch.unique_consecutive(live, return_counts=True)
    ends = torch.cumsum(runs, 0)
    starts = ends - runs
    padded = -(-runs // tile) * tile
    shift = torch.cumsum(padded, 0) - padded - starts
    places = torch.full((int(padded.sum()),), -1)
    positions = torch.arange(len(live))
    places[positions + torch.repeat_interleave(shift, runs)] = positions
    return places


def _executed(live: Tensor, places: Tensor, tile: int) -> int:
    here = torch.where(places >= 0, live[places], 0)
    return int(_popcount(_unions(here, tile)).sum())


def _unions(live: Tensor, tile: int) -> Tensor:
    """Taps that some pixel of each tile reads: [tiles] int64."""
    tiles = live.reshape(-1, tile)
    found = torch.zeros(len(tiles), dtype=torch.int64)
    for t in range(tile):
        found |= tiles[:, t]
    return found


def _popcount(sets: Tensor) -> Tensor:
    return ((sets[:, None] >> torch.arange(MOST_TAPS)) & 1).sum(1)
