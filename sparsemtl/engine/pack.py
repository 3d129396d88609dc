"""Weights as the native executor walks them: packed once, in the structure that their zeros have.

K, C: output, input channels. V: output channels that share their live positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsemtl.ops.pattern import STRUCTURES, Pattern, pack_pattern

# A vector list computes its zeros too; beyond this many times the live weights it cannot win.
_MOST_FILL = 3.0


@dataclass(frozen=True)
class PackedWeight:
    """A weight [K, C / groups, kh, kw] in one structure.

    nonzeros:   stored weights, those zeros included that share a vector with others
    per_column: nonzero vectors per column: how often a packed input is used
    """

    structure: str
    groups: int
    weight: Tensor
    pattern: Pattern

    @property
    def shape(self) -> tuple[int, int, int, int]:
        rows, channels, height, width = self.weight.shape
        return rows, channels, height, width

    @property
    def nonzeros(self) -> int:
        return self.pattern.nonzeros

    @property
    def per_column(self) -> float:
        return self.pattern.per_column(vectors=True)

    @property
    def vector(self) -> int:
        return self.pattern.vector

    def packed(self, *, whole: bool = False, parts: int = 1) -> tuple[list[int], list[np.ndarray]]:
        """Sizes and arrays of the list, as csrc/engine/module.cpp reads them.

        whole: all of an output channel's nonzeros together, for kernels that read in place
        parts: cut the output channels into so many, for threads to share; without groups only
        """
        pattern = self.pattern
        if parts > 1:  # each part is packed as if it were a group, and then reads all channels
            pattern = pack_pattern(self.weight, groups=parts, structure=self.structure)
        found = pattern.forward_list(whole=whole)
        arrays = [a.numpy() for a in (*found.arrays.values(), found.values)]
        if parts > 1:
            arrays[0][:, _GROUP] = 0
        return found.sizes, arrays


_GROUP = 4  # PatternPart::group of csrc/cpu/pack_pattern.h


def pack_weight(weight: Tensor, groups: int = 1, structure: str = "element") -> PackedWeight:
    """Find the nonzeros of a weight.

    weight:    [K, C / groups, kh, kw], or [K, C] of a linear layer; float32
    structure: "element", or "vector(V)" with V = 4, 8, 16
    """
    with torch.no_grad():
        four = weight if weight.dim() == 4 else weight[:, :, None, None]
        four = four.contiguous()
        pattern = pack_pattern(four, groups=groups, structure=structure)
        return PackedWeight(structure, groups, four, pattern)


def density(weight: Tensor) -> float:
    """Share of weights that are not zero; 0 for an empty weight."""
    return int(torch.count_nonzero(weight)) / max(1, weight.numel())


def structures_of(weight: Tensor, groups: int = 1) -> dict[str, float]:
    """Structures in which a weight may be worth packing, and the weights stored for a live one."""
    four = weight if weight.dim() == 4 else weight[:, :, None, None]
    rows = four.shape[0] // groups
    found = {"element": 1.0}
    merged, width = (four != 0).reshape(groups, rows, -1), 1  # [G, vectors, C · kh · kw]
    live = int(merged.sum())
    for name, vector in STRUCTURES.items():
        if live == 0 or vector > rows:
            break
        while width < vector:
            merged, width = _pairs(merged), 2 * width
        counts = merged.sum(2)  # [G, vectors]; the last may have fewer rows
        clipped = merged.shape[1] * vector - rows
        fill = (int(counts.sum()) * vector - int(counts[:, -1].sum()) * clipped) / live
        if fill > _MOST_FILL:
            break  # wider ones store more
        found[name] = fill
    return found


def _pairs(live: Tensor) -> Tensor:
    """Where a row or the next is alive.   live: [G, rows, columns]"""
    even, odd = live[:, ::2], live[:, 1::2]
    if even.shape[1] == odd.shape[1]:
        return even | odd
    return torch.cat([even[:, :-1] | odd, even[:, -1:]], 1)
