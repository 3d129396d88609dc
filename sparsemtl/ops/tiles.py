"""Groups of weights that live or die together: tiles of output by input channels.

A weight [K, C, kh, kw], or [K, C], is cut into tiles of `rows` output channels by `columns` input
channels at one tap. Tiles at the edge are clipped and count the weights that they have. With
`columns` 0 a tile is whole rows: all input channels and all taps.

K, C: output, input channels. T: taps, kh · kw. R, Q: rows and columns of tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsemtl.ops.layout import dense


class Tile(NamedTuple):
    """Output channels by input channels of one group, at one tap; columns 0: all, of all taps."""

    rows: int
    columns: int


LARGEST_GROUP = 1 << 13  # weights that one Triton program holds in registers


def check_tile(who: str, tile: Tile) -> None:
    """raises ValueError unless rows ≥ 1 and columns ≥ 0."""
    rows, columns = tile
    if rows < 1 or columns < 0:
        raise ValueError(f"{who}: Expected a tile of rows ≥ 1 and columns ≥ 0, got {tuple(tile)}")


def grid(shape: tuple[int, ...] | torch.Size, tile: Tile) -> tuple[int, int, int]:
    """Tiles along output channels, input channels and taps: R, Q, T."""
    rows, columns, taps = _matrix(shape, tile)
    width = tile.columns or max(columns, 1)
    return -(-rows // tile.rows), -(-columns // width), taps


def tile_sums(values: Tensor, tile: Tile) -> Tensor:
    """Sum over each tile.   values: [K, C, kh, kw] or [K, C]   returns: [R, Q, T]"""
    rows, columns, taps = _matrix(values.shape, tile)
    r, q, _ = grid(values.shape, tile)
    width = tile.columns or max(columns, 1)
    found = values.reshape(rows, columns, taps)
    if (r * tile.rows, q * width) != (rows, columns):
        padded = found.new_zeros(r * tile.rows, q * width, taps)
        padded[:rows, :columns] = found
        found = padded
    return found.reshape(r, tile.rows, q, width, taps).sum((1, 3))


def tile_sizes(shape: tuple[int, ...] | torch.Size, tile: Tile) -> Tensor:
    """Weights of each tile: [R, Q, T] int64."""
    rows, columns, taps = _matrix(shape, tile)
    r, q, _ = grid(shape, tile)
    width = tile.columns or max(columns, 1)
    heights = (rows - tile.rows * torch.arange(r)).clamp(max=tile.rows)
    widths = (columns - width * torch.arange(q)).clamp(max=width)
    return (heights[:, None, None] * widths[None, :, None]).expand(r, q, taps).contiguous()


def spread_tiles(values: Tensor, shape: tuple[int, ...] | torch.Size, tile: Tile) -> Tensor:
    """Give every weight the value of its tile.   values: [R, Q, T]   returns: of `shape`"""
    rows, columns, _ = _matrix(shape, tile)
    width = tile.columns or max(columns, 1)
    found = values.repeat_interleave(tile.rows, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    return found.reshape(shape)


def group_size(rows: int, columns: int) -> int:
    """Places that a Triton program keeps for a group: its sides rounded up to powers of 2."""
    return (1 << max(rows - 1, 0).bit_length()) * (1 << max(columns - 1, 0).bit_length())


def why_not_strides(weight: Tensor, tile: Tile) -> str | None:
    """Why the Triton kernels over tiles cannot walk a weight's memory; None if they can."""
    if weight.dim() not in (2, 4):
        return f"a weight has {weight.dim()} axes, it takes 2 and 4"
    strides = dense(weight.detach()).stride()
    if weight.numel() > 0 and tile.columns == 0 and strides[0] * weight.shape[0] != weight.numel():
        return f"rows of a weight of strides {strides} are not in one piece"
    if weight.dim() == 4 and strides[2] != weight.shape[3] * strides[3] and weight.shape[2] > 1:
        return f"taps of a weight of strides {strides} are not evenly spaced"
    if weight.numel() >= 1 << 31:
        return f"a weight has {weight.numel()} values, it counts them in 32 bits"
    return None


def _matrix(shape: tuple[int, ...] | torch.Size, tile: Tile) -> tuple[int, int, int]:
    """Rows, columns and taps as the tile sees them."""
    rows = shape[0] if len(shape) else 1
    columns = shape[1] if len(shape) > 1 else 1
    taps = 1
    for size in shape[2:]:
        taps *= size
    return (rows, columns * taps, 1) if tile.columns == 0 else (rows, columns, taps)
