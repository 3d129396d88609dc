"""How a convolution of the device executor runs: cuDNN's dense one, or one of our kernels.

Every form computes activation(conv2d(x) + bias + residual) from weights that it holds; x and the
residual are best channels_last, and so is what most return. A form allocates its result alone, so
that a CUDA graph can hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemtl.engine.executors.forms import geometry_of
from sparsemtl.engine.graph import Node
from sparsemtl.ops.block_pattern import BlockPattern
from sparsemtl.ops.sparse_conv2d_grouped import LateTable, conv_branches
from sparsemtl.ops.sparse_conv2d_single import SingleConv2d
from sparsemtl.ops.sparse_conv2d_triton import Tile, conv_blocks


def finish_(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """activation(y + residual), in place of y."""
    if residual is not None:
        y.add_(residual)
    if activation == "relu":
        y.relu_()
    elif activation == "relu6":
        y.clamp_(0.0, 6.0)
    return y


class Dense:
    """torch's convolution, then what follows it, in place."""

    def __init__(self, node: Node) -> None:
        a: dict[str, Any] = node.attrs
        self.weight, self.bias = node.weights["weight"], node.weights.get("bias")
        self.geometry = (a["stride"], a["padding"], a["dilation"], a["groups"])
        self.activation: str = a["activation"]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, *self.geometry)
        return finish_(y, residual, self.activation)


class Fused(Dense):
    """cuDNN's convolution with bias, residual and ReLU in one kernel."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return torch.cudnn_convolution_relu(x, self.weight, self.bias, *self.geometry)
        return torch.cudnn_convolution_add_relu(
            x, self.weight, residual, 1.0, self.bias, *self.geometry
        )


class Blocks:
    """Our Triton kernel over live blocks, or over all blocks, skipping taps on padding."""

    def __init__(self, node: Node, blocks: BlockPattern, tile: Tile) -> None:
        self.g, self.blocks, self.tile = geometry_of(node), blocks, tile
        self.weight, self.bias = node.weights["weight"], node.weights.get("bias")
        self.activation = str(node.attrs["activation"]) or None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return conv_blocks(
            x, self.weight, self.blocks, self.g, self.bias, residual, self.activation, self.tile
        )


class Single:
    """Our kernel over single live weights; its maps are NCHW, so both are reordered."""

    def __init__(self, node: Node) -> None:
        activation, summed = str(node.attrs["activation"]), len(node.inputs) > 1
        self.after = activation if summed else ""  # the kernel knows no residual
        weight, bias = node.weights["weight"], node.weights.get("bias")
        own = None if summed or not activation else activation
        self._conv = SingleConv2d(weight, bias, geometry_of(node), own)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self._conv(x).contiguous(memory_format=torch.channels_last)
        return finish_(y, residual, self.after)


Form = Dense | Blocks | Single


class Branches:
    """Equal parallel branches in one launch; `after_capture` must follow a capture of it."""

    def __init__(self, members: Sequence[Blocks], reads: int) -> None:
        self.members, self.reads = list(members), reads
        self._table = LateTable()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Results of the members.   inputs: `reads` of each member: x, and perhaps a residual"""
        first = self.members[0]
        has_bias = first.bias is not None
        found = conv_branches(
            inputs[:: self.reads],
            [m.weight for m in self.members],
            [m.blocks for m in self.members],
            [m.g for m in self.members],
            [m.bias for m in self.members if m.bias is not None] if has_bias else None,
            inputs[1 :: self.reads] if self.reads == 2 else None,
            first.activation,
            first.tile,
            self._table,
        )
        return tuple(found)

    def after_capture(self) -> None:
        self._table.write()
