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
    shape: tuple[int, int, int, int]
    groups: int
    pattern: Pattern

    @property
    def nonzeros(self) -> int:
        return self.pattern.nonzeros

    @property
    def per_column(self) -> float:
        return self.pattern.per_column(vectors=True)

    @property
    def vector(self) -> int:
        return self.pattern.vector

    def packed(self, *, whole: bool) -> tuple[list[int], list[np.ndarray]]:
        """Sizes and arrays of the list, as csrc/engine/module.cpp reads them.

        whole: all of an output channel's nonzeros together, for kernels that read in place
        """
        found = self.pattern.forward_list(whole=whole)
        return found.sizes, [a.numpy() for a in (*found.arrays.values(), found.values)]


def pack_weight(weight: Tensor, groups: int = 1, structure: str = "element") -> PackedWeight:
    """Find the nonzeros of a weight.

    weight:    [K, C / groups, kh, kw], or [K, C] of a linear layer; float32
    structure: "element", or "vector(V)" with V = 4, 8, 16
    """
    with torch.no_grad():
        four = weight if weight.dim() == 4 else weight[:, :, None, None]
        pattern = pack_pattern(four.contiguous(), groups=groups, structure=structure)
        rows, channels, height, width = four.shape
        return PackedWeight(structure, (rows, channels, height, width), groups, pattern)


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
