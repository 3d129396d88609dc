"""Weights as the native executor walks them: packed once, in the structure that their zeros have.

K, C: output, input channels. V: output channels that share their live positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsemtl.engine.deferred import values
from sparsemtl.ops.pattern import STRUCTURES, Pattern, live_vectors, pack_pattern

# A vector list computes its zeros too; beyond this many times the live weights it cannot win.
_MOST_FILL = 3.0


@dataclass(frozen=True)
class Lists:
    """What a kernel walks: sizes and arrays in the order in which csrc/engine/module.cpp reads."""

    sizes: list[int]
    arrays: list[np.ndarray]


class PackedWeight:
    """A weight [K, C / groups, kh, kw] in one structure.

    per_column: nonzero vectors per column: how often a packed input is used
    vector:     output channels that share their live positions
    """

    def __init__(self, weight: Tensor, groups: int, structure: str) -> None:
        pattern = pack_pattern(weight, groups=groups, structure=structure)
        rows, channels, height, width = weight.shape
        self.shape, self.groups, self.structure = (rows, channels, height, width), groups, structure
        self.per_column = pattern.per_column(vectors=True)
        self.vector = pattern.vector
        self._source: tuple[Tensor, Pattern] | None = (weight, pattern)
        self._lists: tuple[tuple[bool, int], Lists] | None = None

    def lists(self, *, whole: bool = False, parts: int = 1) -> Lists:
        """The nonzeros, packed.

        whole: all of an output channel's nonzeros together, for kernels that read in place
        parts: cut the output channels into so many, for threads to share; without groups only
        """
        if self._lists is not None and self._lists[0] == (whole, parts):
            return self._lists[1]
        assert self._source is not None  # settled for other lists
        weight, pattern = self._source
        if parts > 1:  # each part is packed as if it were a group, and then reads all channels
            pattern = pack_pattern(weight, groups=parts, structure=self.structure)
        found = pattern.forward_list(whole=whole)
        arrays = [a.numpy() for a in (*found.arrays.values(), found.values)]
        if parts > 1:
            arrays[0][:, _GROUP] = 0
        return Lists(found.sizes, arrays)

    def settle(self, *, whole: bool, parts: int) -> None:
        """Keep these lists and let go of the weight: no others can be had from now on."""
        self._lists = (whole, parts), self.lists(whole=whole, parts=parts)
        self._source = None


_GROUP = 4  # PatternPart::group of csrc/cpu/pack_pattern.h


def pack_weight(weight: Tensor, groups: int = 1, structure: str = "element") -> PackedWeight:
    """Find the nonzeros of a weight.

    weight:    [K, C / groups, kh, kw], or [K, C] of a linear layer; float32, deferred or not
    structure: "element", or "vector(V)" with V = 4, 8, 16
    """
    with torch.no_grad():
        return PackedWeight(_four(weight).contiguous(), groups, structure)


def _four(weight: Tensor) -> Tensor:
    weight = values(weight).detach()
    return weight if weight.dim() == 4 else weight[:, :, None, None]


def structures_of(weight: Tensor, groups: int = 1) -> dict[str, float]:
    """Structures in which a weight may be worth packing, and the weights stored for a live one."""
    four = _four(weight).contiguous()
    rows = four.shape[0] // groups
    found, live = {"element": 1.0}, live_vectors(four, groups, 1)[0]
    for name, vector in STRUCTURES.items():
        if live == 0 or vector > rows:
            break
        count, in_last = live_vectors(four, groups, vector)
        clipped = -rows % vector  # rows that the last vector of a group lacks
        fill = (count * vector - in_last * clipped) / live
        if fill > _MOST_FILL:
            break  # wider ones store more
        found[name] = fill
    return found
