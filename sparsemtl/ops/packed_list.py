"""Lists of nonzeros as the kernels walk them; csrc/cpu/pack_pattern.h describes their arrays.

Z: nonzeros, or vectors of V output channels for the structure vector(V).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparsemtl.ops.availability import native_module

# Nonzeros of an output channel in a block: enough to repay loading and storing its sums. Where
# columns are so empty that their panel leaves the L1 cache anyway, fewer and larger blocks.
_PER_BLOCK = 13
_PER_BLOCK_OF_EMPTY = 34
_EMPTY = 0.03  # density
_PER_BLOCK_OF_FEW = 8  # where channels are few
_PER_BLOCK_OF_VECTORS = 1000  # whose inputs are loaded so seldom that the L2 cache will do
_LARGEST_BLOCK = 1 << 16  # columns: positions in a block are 16 bits
# From so many channels on, blocks hold channels of one tap; below, all taps of some channels.
_CHANNELS_BY_TAP = 288
_SMALLEST_BLOCK = 144  # columns: with four vectors of pixels, 36 KiB of the L1 cache's 48
_SMALLEST_OF_FEW = 80  # the same with eight, which few output channels leave room for


@dataclass(frozen=True)
class PackedList:
    """Nonzeros in the order of the kernels."""

    arrays: dict[str, Tensor]  # parts, blocks, first_nonzero, columns, rows, counts, positions
    sources: Tensor  # [Z] int32, where each nonzero stands in the flat weight
    values: Tensor  # [(Z + 3) · V] float32
    shape: list[int]  # PackShape of csrc/cpu/pack_pattern.h
    sizes: list[int]  # parts, blocks, nonzeros, vector, columns of the widest block
    addresses: list[int]

    @property
    def nonzeros(self) -> int:
        return self.sizes[2]

    def refresh(self, weight: Tensor) -> None:
        """Take the values of a weight with the same nonzeros; float32, contiguous."""
        native_module().refresh_values(
            self.shape,
            weight.data_ptr(),
            self.sources.data_ptr(),
            self.nonzeros,
            self.values.data_ptr(),
            torch.get_num_threads(),
        )


def pack_list(
    weight_shape: tuple[int, ...],
    groups: int,
    weight: Tensor,
    bits: Tensor,
    count: int,
    *,
    vector: int,
    transposed: bool,
    whole: bool,
) -> PackedList:
    """Build the list of the nonzeros that bits tell.

    weight:     float32, contiguous   bits: of `pattern_bits`   count: how many are set
    transposed: by input channel   whole: one block, as far as positions of 16 bits reach
    """
    rows, channels, kh, kw = weight_shape
    group_rows, taps = rows // groups, kh * kw
    list_rows = channels if transposed else -(-group_rows // vector)
    list_channels = group_rows if transposed else channels
    columns = list_channels * taps
    by_tap = list_channels >= _CHANNELS_BY_TAP
    ends = _block_ends(list_channels, taps, count / max(groups * list_rows * columns, 1), vector)
    if whole and columns > 0:
        pieces = -(-columns // _LARGEST_BLOCK)
        ends = [columns * (piece + 1) // pieces for piece in range(pieces)]
    blocks = groups * len(ends)
    int32 = partial(torch.empty, dtype=torch.int32, device="cpu")  # whatever the defaults are
    arrays = {
        "parts": int32(groups, 5),
        "blocks": int32(blocks, 5),
        "first_nonzero": torch.empty(blocks, dtype=torch.int64, device="cpu"),
        "columns": int32(groups * columns),
        "rows": int32(blocks * list_rows),
        "counts": int32(blocks * list_rows),
        "positions": torch.zeros(count + 3, dtype=torch.int16, device="cpu"),
    }
    values = torch.zeros((count + 3) * vector, dtype=torch.float32, device="cpu")
    sources = int32(count)
    addresses = [array.data_ptr() for array in arrays.values()] + [values.data_ptr()]
    shape = [groups, rows, channels, taps, vector, transposed, not by_tap]
    native_module().pack_pattern(
        shape,
        weight.data_ptr(),
        bits.data_ptr(),
        ends,
        [*addresses, sources.data_ptr()],
        torch.get_num_threads(),
    )
    widest = int(arrays["blocks"][:, 1].max()) if blocks > 0 else 0
    sizes = [groups, blocks, count, vector, widest]
    return PackedList(arrays, sources, values, shape, sizes, addresses)


def _block_ends(channels: int, taps: int, density: float, vector: int) -> list[int]:
    """Where blocks of columns end, in the order that csrc/cpu/pack_pattern.h describes."""
    columns = channels * taps
    if columns == 0:
        return []
    smallest = _SMALLEST_BLOCK if channels >= _CHANNELS_BY_TAP else _SMALLEST_OF_FEW
    wanted = _PER_BLOCK if density >= _EMPTY else _PER_BLOCK_OF_EMPTY
    if vector > 1:
        wanted = _PER_BLOCK_OF_VECTORS
    elif channels < _CHANNELS_BY_TAP:
        wanted = _PER_BLOCK_OF_FEW
    width = min(max(int(wanted / max(density, 1e-9)), smallest), _LARGEST_BLOCK)
    if channels >= _CHANNELS_BY_TAP:
        pieces = max(1, round(channels / width), -(-channels // _LARGEST_BLOCK))
        return [
            tap * channels + channels * (piece + 1) // pieces
            for tap in range(taps)
            for piece in range(pieces)
        ]
    pieces = max(1, round(columns / width), -(-columns // _LARGEST_BLOCK))
    return [columns * (piece + 1) // pieces for piece in range(pieces)]
