"""How the GPU kernels of sparse_conv2d are cut: tiles by type of arithmetic, and split sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsemtl.ops.block_pattern import BlockPattern
from sparsemtl.ops.sparse_conv2d_plan import Geometry

_SMALLEST, _LARGEST = 16, 128  # sides of a block that tl.dot takes and that registers hold
_PROGRAMS = 264  # two for each of an H100's 132 processors: below, work is split further
_MOST_PARTIALS = 1 << 26  # float32 values, 256 MiB


@dataclass(frozen=True)
class Tile:
    """How one pass is cut: pixels, destination and source channels; and how it is launched."""

    pixels: int
    dest: int
    source: int
    warps: int = 4
    stages: int = 3
    panel: int = 1  # blocks of the weight gradient that share the output's gradient


# Candidates of a pass, the first the default. Blocks smaller than a tile's sides replace them. The
# compiler spends every other stage on the entry that the next loads depend on: 5 make 3 buffers.
NARROW = (  # bfloat16, float16
    Tile(128, 128, 64, 8, 5),
    Tile(128, 64, 64, 4, 5),
    Tile(64, 128, 64, 4, 5),
    Tile(64, 64, 64, 4, 5),
    Tile(256, 64, 64, 8, 5),
    Tile(128, 32, 32, 4, 5),
    Tile(128, 16, 16, 4, 5),
)
WIDE = (  # float32 through tf32
    Tile(128, 64, 32, 8, 5),
    Tile(64, 64, 32, 4, 5),
    Tile(128, 32, 32, 4, 5),
    Tile(64, 16, 16, 4, 5),
)
RAGGED = Tile(64, 64, 32, 4, 5)  # bfloat16, float16 where a tile does not divide the channels
EXACT = (Tile(64, 32, 16, 4, 3), Tile(32, 32, 16, 4, 3), Tile(32, 16, 16, 4, 3))  # float32
GRAD_NARROW = (
    Tile(64, 64, 64, 8, 5, 2),
    Tile(64, 128, 64, 8, 5, 2),
    Tile(32, 64, 64, 8, 5, 4),
    Tile(64, 32, 32, 8, 5, 4),
    Tile(64, 16, 16, 8, 5, 8),
)
GRAD_WIDE = (Tile(32, 64, 32, 8, 5, 2), Tile(32, 32, 32, 8, 5, 4), Tile(32, 16, 16, 4, 5, 4))
GRAD_EXACT = (Tile(16, 32, 16, 4, 3, 2), Tile(16, 16, 16, 4, 3, 2))


def precision() -> str:
    """How products of float32 are formed: "tf32" where torch lets cuDNN, else "ieee"."""
    convolutions = getattr(torch.backends.cudnn, "conv", None)
    if convolutions is not None:  # `allow_tf32` raises once the newer setting was used
        return "tf32" if convolutions.fp32_precision == "tf32" else "ieee"
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


def tiles_of(
    dtype: torch.dtype, *, grad: bool = False, products: str | None = None
) -> tuple[Tile, ...]:
    """Candidates for the forward pass and input gradient, or for the weight gradient.

    products: "tf32" or "ieee", of float32; by default what `precision` says
    """
    if dtype is not torch.float32:
        return GRAD_NARROW if grad else NARROW
    if (products or precision()) == "tf32":
        return GRAD_WIDE if grad else WIDE
    return GRAD_EXACT if grad else EXACT


def fitted(tile: Tile, dest: int, source: int, block: tuple[int, int] | None) -> Tile:
    """A tile no larger than the channels or the block, dest by source, that it serves."""
    sides = []
    for wanted, channels, side in ((tile.dest, dest, 0), (tile.source, source, 1)):
        limit = channels if block is None else min(channels, block[side])
        power = 1 << max(limit - 1, 0).bit_length()
        if block is not None:  # a divisor of the block, so that no tile is alive in part
            power = min(power, block[side] & -block[side]) if block[side] >= _SMALLEST else power
        sides.append(min(wanted, max(power, _SMALLEST), _LARGEST))
    return Tile(tile.pixels, sides[0], sides[1], tile.warps, tile.stages, tile.panel)


def default_tile(
    weight: Tensor, blocks: BlockPattern, g: Geometry, transposed: bool = False, grad: bool = False
) -> Tile:
    """The first candidate, fitted to the channels of a group and to the blocks."""
    dest, source = weight.shape[0] // g.groups, weight.shape[1]
    block = blocks.block
    if block == (1, 1):
        block = None  # single weights: tiles as the channels allow
    if transposed:
        dest, source = source, dest
        block = None if block is None else (block[1], block[0])
    tile = fitted(tiles_of(weight.dtype, grad=grad)[0], dest, source, block)
    whole = dest % tile.dest == 0 and source % tile.source == 0
    if whole or grad or weight.dtype is torch.float32:
        return tile
    return fitted(RAGGED, dest, source, block)


def splits(programs: int, steps: int, size: int) -> int:
    """Into how many parts the sum of a tile is cut, by shapes alone: 1, 2, 4 or 8."""
    split = 1
    while (
        split < 8
        and programs * split < _PROGRAMS
        and steps >= 16 * split
        and 2 * split * size <= _MOST_PARTIALS
    ):
        split *= 2
    return split
