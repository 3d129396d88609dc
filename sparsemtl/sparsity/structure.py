"""Structures: the shape of a group of weights that lives or dies together.

    element        one weight
    vector(V)      V output channels of one input channel, at one tap
    block(BO, BI)  BO output channels by BI input channels, at one tap
    channel        all weights of an output channel
    N:M            at most N of each M consecutive input channels, at one tap; written 2:4

A group's magnitude is the root mean square of its weights, so that α has one unit in all
structures: a group is alive if its magnitude is above α. A group at the edge of a weight counts the
weights that it has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsemtl.ops.tiles import Tile, grid, spread_tiles, tile_sizes, tile_sums
from sparsemtl.sparsity.mask import top_masks

ONE = Tile(1, 1)
FORMS = ("element", "vector(V)", "block(BO, BI)", "channel", "N:M")


@dataclass(frozen=True)
class Structure:
    """What `parse_structure` returns; equal structures have equal names.

    tile:   output by input channels of a group
    n_of_m: (N, M), or None: how many of M neighbouring input channels may live
    """

    name: str
    tile: Tile = ONE
    n_of_m: tuple[int, int] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def grouped(self) -> bool:
        """Whether a group holds more than one weight."""
        return self.tile != (1, 1)

    def sizes(self, shape: tuple[int, ...] | torch.Size) -> Tensor:
        """Weights of each group of a weight of this shape: [R, Q, T] int64."""
        return tile_sizes(shape, self.tile)

    def norms(self, weight: Tensor) -> Tensor:
        """‖W_g‖ of each group: [R, Q, T] float32, float64 for float64."""
        wide = weight.detach() if weight.dtype is torch.float64 else weight.detach().float()
        return tile_sums(wide * wide, self.tile).sqrt_()

    def magnitudes(self, weight: Tensor) -> Tensor:
        """‖W_g‖ / √n of each group, what α is compared with: [R, Q, T].

        For N:M a weight that is not among the N largest of its M has magnitude 0.
        """
        if not self.grouped:
            return self.scores(weight.detach().abs().float())
        return self.norms(weight) / self.sizes(weight.shape).to(weight.device).sqrt()

    def scores(self, scores: Tensor) -> Tensor:
        """The mean of single weights' scores over each group: [R, Q, T].

        scores: like the weight, ≥ 0.   For N:M those outside the N largest of their M become 0.
        """
        if self.n_of_m is not None:
            scores = torch.where(n_of_m_mask(scores, *self.n_of_m), scores, 0.0)
        if not self.grouped:
            return scores.reshape(grid(scores.shape, self.tile))
        return tile_sums(scores, self.tile) / self.sizes(scores.shape).to(scores.device)

    def expand(self, groups: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
        """Give each weight what its group has.   groups: [R, Q, T]   returns: of `shape`"""
        if not self.grouped:
            return groups.reshape(shape)
        return spread_tiles(groups, shape, self.tile)

    def masks(
        self, scores: Sequence[Sequence[Tensor]], kept: int
    ) -> tuple[list[list[Tensor]], float]:
        """Masks that keep `kept` weights in whole groups, those of the largest mean score.

        scores:  per threshold group, per layer: like the weight, ≥ 0
        kept:    weights to keep. Whole groups are taken in the order of their scores while they
                 fit; what then remains goes to the next smaller groups that still fit. So the
                 count is met exactly, or missed by less than the smallest group left out.
        returns: bool masks in the same nesting, and a bound between what is kept and what is not:
                 no score of a group that was kept is below it
        raises:  ValueError for NaN, or if N:M cannot keep so many
        """
        grouped = [[self.scores(layer) for layer in group] for group in scores]
        shapes = [[tuple(layer.shape) for layer in group] for group in scores]
        return self.masks_of_groups(grouped, shapes, kept)

    def masks_of_groups(
        self,
        grouped: Sequence[Sequence[Tensor]],
        shapes: Sequence[Sequence[tuple[int, ...]]],
        kept: int,
    ) -> tuple[list[list[Tensor]], float]:
        """As `masks`, from scores that are already those of groups: [R, Q, T] each."""
        if self.n_of_m is not None:
            able = sum(int((layer > 0).sum()) for group in grouped for layer in group)
            if kept > able:
                raise ValueError(
                    f"Structure: Expected at most {able} weights to keep with {self.name}, "
                    f"got {kept}"
                )
        if self.grouped:
            taken, cut = self._take_groups(grouped, shapes, kept)
        else:
            taken, cut = top_masks(grouped, kept)
        masks = [
            [self.expand(layer, shape) for layer, shape in zip(layers, of, strict=True)]
            for layers, of in zip(taken, shapes, strict=True)
        ]
        return masks, cut

    def _take_groups(
        self,
        grouped: Sequence[Sequence[Tensor]],
        shapes: Sequence[Sequence[tuple[int, ...]]],
        kept: int,
    ) -> tuple[list[list[Tensor]], float]:
        layers = [layer for group in grouped for layer in group]
        flat = torch.cat([layer.detach().reshape(-1).float() for layer in layers])
        counts = [self.sizes(shape).reshape(-1) for group in shapes for shape in group]
        sizes = torch.cat(counts).to(flat.device)
        if not 0 <= kept <= int(sizes.sum()):
            raise ValueError(f"Structure: Expected kept in [0, {int(sizes.sum())}], got {kept}")
        if torch.isnan(flat).any():
            raise ValueError("Structure: Expected scores without NaN, got NaN")
        keep = take_largest(flat, sizes, kept)
        left = float(flat[~keep].max()) if not bool(keep.all()) else 0.0
        cut = min(left, float(flat[keep].min())) if bool(keep.any()) else left
        found = iter(keep.split([layer.numel() for layer in layers]))
        return [[next(found).reshape(layer.shape) for layer in group] for group in grouped], cut


def take_largest(scores: Tensor, sizes: Tensor, budget: int) -> Tensor:
    """Which groups to take: by falling score, ties by index, each only while it still fits.

    scores: [G] float   sizes: [G] int64   returns: [G] bool, sizes of True summing to ≤ budget
    """
    keep = torch.zeros_like(scores, dtype=torch.bool)
    order = torch.argsort(scores, descending=True, stable=True)
    while budget > 0 and order.numel() > 0:
        order = order[sizes[order] <= budget]
        fits = torch.cumsum(sizes[order], 0) <= budget  # a prefix
        taken = order[fits]
        keep[taken] = True
        budget -= int(sizes[taken].sum())
        order = order[taken.numel() :]
    return keep


def n_of_m_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """True for the N largest of each M consecutive input channels, ties by the lower channel.

    scores: [K, C, ...], ≥ 0; the last C % M channels compete among themselves for up to N places
    """
    if scores.dim() < 2 or scores.numel() == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    rows, channels = scores.shape[:2]
    lanes = scores.reshape(rows, channels, -1)
    missing = -channels % m
    padded = torch.nn.functional.pad(lanes, (0, 0, 0, missing), value=-1.0)
    padded = padded.reshape(rows, -1, m, lanes.shape[-1])
    places = torch.argsort(padded, dim=2, descending=True, stable=True)
    keep = torch.zeros_like(padded, dtype=torch.bool)
    keep.scatter_(2, places[:, :, :n], True)
    return keep.reshape(rows, channels + missing, -1)[:, :channels].reshape(scores.shape)


ELEMENT = Structure("element")
CHANNEL = Structure("channel", Tile(1, 0))


def parse_structure(text: str | Structure) -> Structure:
    """Read a structure's name, blanks ignored.

    raises: TypeError for what is no text, ValueError for a text of another form
    """
    if isinstance(text, Structure):
        return text
    if not isinstance(text, str):
        raise TypeError(f"parse_structure: Expected a str, got {type(text).__name__}")
    plain = re.sub(r"\s+", "", text)
    if plain == "element":
        return ELEMENT
    if plain == "channel":
        return CHANNEL
    if found := re.fullmatch(r"vector\((\d+)\)", plain):
        size = int(found[1])
        if size >= 1:
            return Structure(f"vector({size})", Tile(size, 1))
    if found := re.fullmatch(r"block\((\d+),(\d+)\)", plain):
        rows, columns = int(found[1]), int(found[2])
        if rows >= 1 and columns >= 1:
            return Structure(f"block({rows},{columns})", Tile(rows, columns))
    if found := re.fullmatch(r"(\d+):(\d+)", plain):
        n, m = int(found[1]), int(found[2])
        if 1 <= n <= m:
            return Structure(f"{n}:{m}", n_of_m=(n, m))
    raise ValueError(
        f"parse_structure: Expected one of {', '.join(FORMS)} with sizes ≥ 1, got {text!r}"
    )
