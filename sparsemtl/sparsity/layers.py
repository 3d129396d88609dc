"""Sparse layers: torch's own layers, computing with S(W, α) in place of W.

`weight` stays the dense master weight under its ordinary state-dict key. What the layer computes
with comes from its `reparam` (a `Sparsity` module that owns thresholds and masks), so a layer
without one is exactly its torch parent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsemtl.models.component import Component

if TYPE_CHECKING:
    from sparsemtl.sparsity.sparsify import Slot


class SparseLayer(nn.Module):
    """What SparseConv2d and SparseLinear share: where the effective weight comes from."""

    weight: nn.Parameter
    slot: Slot | None

    def effective_weight(self) -> Tensor:
        """S(W, α), or the masked weight once frozen; like `weight` in shape and dtype."""
        slot = self.__dict__.get("slot")
        return self.weight if slot is None else slot.effective_weight(self.weight)


class SparseConv2d(SparseLayer, nn.Conv2d):  # type: ignore[misc]  # weight: the same in both
    """nn.Conv2d whose weight is shrunk by its component's threshold. [B, C, H, W] → [B, K, h, w]"""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.effective_weight(), self.bias)


class SparseLinear(SparseLayer, nn.Linear):  # type: ignore[misc]  # weight: the same in both
    """nn.Linear whose weight is shrunk by its component's threshold. [..., C] → [..., K]"""

    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.functional.linear(input, self.effective_weight(), self.bias)


SPARSE_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: SparseConv2d,
    nn.Linear: SparseLinear,
}
DENSE_LAYERS = {sparse: dense for dense, sparse in SPARSE_LAYERS.items()}


def unique_layers(component: Component) -> list[tuple[str, nn.Module]]:
    """The layers of a component, one for each distinct weight."""
    first = {id(module.weight): (name, module) for name, module in reversed(component.layers)}
    return [pair for pair in component.layers if first[id(pair[1].weight)][0] == pair[0]]
