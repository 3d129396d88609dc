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
from sparsemtl.ops.availability import INTERPRETING
from sparsemtl.ops.dispatch import through_torch
from sparsemtl.ops.sparse_conv2d import SPARSE_CONV2D
from sparsemtl.ops.sparse_conv2d_plan import Geometry

if TYPE_CHECKING:
    from sparsemtl.sparsity.sparsify import Slot


class SparseLayer(nn.Module):
    """What SparseConv2d and SparseLinear share: where the effective weight comes from."""

    weight: nn.Parameter
    slot: Slot | None = None

    def effective_weight(self) -> Tensor:
        """S(W, α), or the masked weight once frozen; like `weight` in shape and dtype."""
        return self.weight if self.slot is None else self.slot.effective_weight(self.weight)


class SparseConv2d(SparseLayer, nn.Conv2d):  # type: ignore[misc]  # weight: the same in both
    """nn.Conv2d whose weight is shrunk by its component's threshold. [B, C, H, W] → [B, K, h, w]"""

    def forward(self, input: Tensor) -> Tensor:
        slot = self.slot
        plain = isinstance(self.padding, tuple) and self.padding_mode == "zeros"
        if slot is not None and plain and (INTERPRETING or not input.is_cpu):
            y = slot.convolve_on_gpu(
                input, self.effective_weight(), self.bias, self._geometry(), self.weight
            )
            if y is not None:
                return y
        if slot is not None and slot.sparse_kernels and self._sparse_fits(input):
            return slot.convolve(input, self.weight, self.bias, self._geometry())
        return self._conv_forward(input, self.effective_weight(), self.bias)

    def _sparse_fits(self, input: Tensor) -> bool:
        """Whether the sparse kernels take this layer and input at all."""
        return (
            not through_torch(input)
            and isinstance(self.padding, tuple)
            and self.padding_mode == "zeros"
            and input.dim() == 4
            and input.device.type == "cpu"
            and input.dtype is self.weight.dtype is torch.float32
            and not torch.is_autocast_enabled("cpu")
            and SPARSE_CONV2D.choose(input, self.weight).name == "native"
        )

    def _geometry(self) -> Geometry:
        stride, padding, dilation = self.stride, self.padding, self.dilation
        assert isinstance(padding, tuple)
        return Geometry(
            (stride[0], stride[1]),
            (padding[0], padding[1]),
            (dilation[0], dilation[1]),
            (self.kernel_size[0], self.kernel_size[1]),
            self.groups,
        )


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
