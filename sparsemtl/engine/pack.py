"""Weights as the native executor walks them: packed once, in the structure that their zeros have.

K, C: output, input channels. V: output channels that share their live positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsemtl.ops.pattern import STRUCTURES, Pattern, live_mask, pack_pattern

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
    live = int(torch.count_nonzero(weight))
    found = {"element": 1.0}
    if live == 0 or weight.shape[0] < groups:
        return found
    four = weight if weight.dim() == 4 else weight[:, :, None, None]
    for name, vector in STRUCTURES.items():
        if vector == 1 or four.shape[0] // groups < vector:
            continue
        fill = int(live_mask(four, groups, vector).sum()) / live
        if fill <= _MOST_FILL:
            found[name] = fill
    return found
