"""Weights as the native executor walks them: packed once, in the structure that their zeros have.

K, C: output, input channels. V: output channels that share their live positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsemtl.ops.pattern import STRUCTURES, PackedList, live_mask, pack_pattern

# A vector list computes its zeros too; beyond this many times the live weights it cannot win.
_MOST_FILL = 3.0


@dataclass(frozen=True)
class PackedWeight:
    """A weight [K, C / groups, kh, kw] in one structure.

    nonzeros:   stored weights, those zeros included that share a vector with others
    per_column: nonzero vectors per column in use: how often a packed input is used
    """

    structure: str
    shape: tuple[int, int, int, int]
    groups: int
    packed: PackedList

    @property
    def nonzeros(self) -> int:
        return self.packed.nonzeros * self.packed.sizes[3]

    @property
    def per_column(self) -> float:
        return self.packed.per_column

    @property
    def vector(self) -> int:
        return self.packed.sizes[3]

    def arrays(self) -> list[np.ndarray]:
        """As csrc/engine/module.cpp reads them."""
        return [array.numpy() for array in (*self.packed.arrays.values(), self.packed.values)]

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())


def pack_weight(weight: Tensor, groups: int = 1, structure: str = "element") -> PackedWeight:
    """Pack the nonzeros of a weight.

    weight:    [K, C / groups, kh, kw], or [K, C] of a linear layer; float32
    structure: "element", or "vector(V)" with V = 4, 8, 16
    """
    with torch.no_grad():
        four = weight if weight.dim() == 4 else weight[:, :, None, None]
        pattern = pack_pattern(four.contiguous(), groups=groups, structure=structure)
        rows, channels, height, width = four.shape
        return PackedWeight(
            structure, (rows, channels, height, width), groups, pattern.forward_list()
        )


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
