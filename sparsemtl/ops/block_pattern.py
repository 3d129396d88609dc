"""Which blocks of a convolution's weight are alive, as the lists that the GPU kernels walk.

Everything is computed on the weight's device by operations of fixed shapes, so that nothing waits
for the GPU and a CUDA graph can hold it; lists have room for every block. An entry is
tap · Q + block of source channels. A list may hold more than what is alive, never less.

K, C: output, input channels of all groups. T: taps. R: blocks of destination channels, of all
groups. Q: blocks of source channels of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sparsemtl.ops.pattern import Pattern
from sparsemtl.ops.sparse_conv2d_pixels import PixelOrder


def occupied_blocks(alive: Tensor, groups: int, rows: int, columns: int) -> Tensor:
    """Blocks of `rows` output by `columns` input channels that hold something alive.

    alive:   [K, C / groups, kh, kw] bool
    returns: [R, T, Q] bool, blocks counted within each group
    """
    outputs, channels = alive.shape[0] // groups, alive.shape[1]
    taps = alive.shape[2] * alive.shape[3]
    r, q = -(-outputs // rows), -(-channels // columns)
    found = alive.reshape(groups, outputs, channels, taps)
    if (r * rows, q * columns) != (outputs, channels):
        padded = found.new_zeros(groups, r * rows, q * columns, taps)
        padded[:, :outputs, :channels] = found
        found = padded
    found = found.reshape(groups, r, rows, q, columns, taps).any(4).any(2)  # [groups, r, q, T]
    return found.transpose(2, 3).reshape(groups * r, taps, q)


def transpose_blocks(occupied: Tensor, groups: int) -> Tensor:
    """The same blocks by input channels: [R, T, Q] → [groups · Q, T, R / groups]."""
    rows, taps, q = occupied.shape
    found = occupied.reshape(groups, rows // groups, taps, q).permute(0, 3, 2, 1)
    return found.reshape(groups * q, taps, rows // groups)


def block_lists(occupied: Tensor, order: PixelOrder) -> tuple[Tensor, Tensor, Tensor]:
    """Lists for each class of tiles: what is alive and read by some pixel of the tile.

    returns: entries [classes, R, T · Q] int32, counts [classes, R] int32, and rows [R] int32, the
             blocks of destination channels in the order of falling work
    """
    taps = order.class_taps(occupied.shape[1])  # [classes, T]
    live = (occupied[None] & taps[:, None, :, None]).flatten(2)  # [classes, R, T · Q]
    entries, counts = _compact(live)
    rows = torch.argsort(counts.sum(0), descending=True, stable=True)
    return entries, counts, rows.to(torch.int32)


def panel_lists(
    occupied: Tensor, order: PixelOrder, panel: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For the weight gradient: a row's live blocks by the panel, and the tiles each panel reads.

    returns: entries [R, T · Q], counts [R], tile lists [R, panels, tiles], their counts; int32
    """
    rows, taps, q = occupied.shape
    entries, counts = _compact(occupied.flatten(1))
    panels = -(-taps * q // panel)
    places = torch.arange(panels * panel, device=occupied.device)
    there = places[None, :] < counts[:, None]  # [R, panels · panel]
    tap = torch.nn.functional.pad(entries, (0, panels * panel - taps * q)) // q
    uses = (tap[..., None] == torch.arange(taps, device=tap.device)) & there[..., None]
    uses = uses.reshape(rows, panels, panel, taps).any(2)  # [R, panels, T]
    classes = order.class_taps(taps)  # [classes, T]
    reads = (uses[:, :, None, :] & classes).any(3)  # [R, panels, classes]
    tile_lists, tile_counts = _compact(reads[..., order.classes.long()])
    return entries, counts, tile_lists, tile_counts


def _compact(live: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of what is True first, in order, along the last axis; and how many: int32 both."""
    live = live.contiguous()  # kernels take the results by address
    order = torch.argsort((~live).to(torch.uint8), dim=-1, stable=True)
    return order.to(torch.int32), live.sum(-1, dtype=torch.int32)


class BlockPattern:
    """The live blocks of one weight and the lists made of them, each made when first asked for.

    shape, groups: of the weight and its convolution
    rows, columns: output by input channels of a block; None: the weight is dense
    """

    def __init__(self, weight: Tensor, groups: int, block: tuple[int, int] | None) -> None:
        self.shape, self.groups, self.block = tuple(weight.shape), groups, block
        self.device = weight.device
        self._alive: Tensor | None = None
        self._made: dict[Any, Any] = {}
        if block is not None:
            self.follow(weight)

    def follow(self, weight: Tensor) -> None:
        """Take the live blocks of a new weight; a bool tensor is a mask of what is alive.

        Lists that exist are written anew in their place, so that a captured CUDA graph that walks
        them sees the new ones.
        """
        self._alive = weight.detach() if weight.dtype is torch.bool else weight.detach() != 0
        before, self._made = self._made, {}
        for key, (make, tensors) in before.items():
            for old, new in zip(tensors, make(), strict=True):
                old.copy_(new)
            self._made[key] = (make, tensors)

    def occupied(self, rows: int, columns: int) -> Tensor:
        """Live blocks of this size: [R, T, Q] bool."""
        return self._get((rows, columns), lambda: (self._find(rows, columns),))[0]

    def lists(
        self, order: PixelOrder, rows: int, columns: int, transposed: bool
    ) -> tuple[Tensor, ...]:
        """`block_lists` of blocks of `rows` destination by `columns` source channels."""

        def make() -> tuple[Tensor, ...]:
            if transposed:
                found = transpose_blocks(self.occupied(columns, rows), self.groups)
            else:
                found = self.occupied(rows, columns)
            return block_lists(found, order)

        return self._get(("lists", order, rows, columns, transposed), make)

    def panels(self, order: PixelOrder, rows: int, columns: int, panel: int) -> tuple[Tensor, ...]:
        """`panel_lists` of blocks of `rows` output by `columns` input channels."""
        return self._get(
            ("panels", order, rows, columns, panel),
            lambda: panel_lists(self.occupied(rows, columns), order, panel),
        )

    def _get(self, key: Any, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if key not in self._made:
            self._made[key] = (make, make())
        return self._made[key][1]

    def _find(self, rows: int, columns: int) -> Tensor:
        outputs, channels, height, width = self.shape
        if self._alive is not None:
            return occupied_blocks(self._alive, self.groups, rows, columns)
        r, q = self.groups * -(-(outputs // self.groups) // rows), -(-channels // columns)
        return torch.ones(r, height * width, q, dtype=torch.bool, device=self.device)


_of_pattern: WeakIdKeyDictionary = WeakIdKeyDictionary()


def blocks_of(pattern: Pattern) -> BlockPattern:
    """The blocks of a pattern's weights; made anew when the pattern has changed."""
    known: tuple[Tensor, BlockPattern] | None = _of_pattern.get(pattern)
    if known is None or known[0] is not pattern._bits:
        mask = pattern.mask()
        known = (pattern._bits, BlockPattern(mask, pattern.groups, (1, 1)))
        _of_pattern[pattern] = known
    return known[1]
