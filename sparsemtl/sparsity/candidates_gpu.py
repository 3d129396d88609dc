"""The kernels that a convolution may run on a GPU, by name; choice_gpu.py measures them.

    ""                  torch's dense convolution
    "skip PASS i"       the dense one that skips padding taps, with the i-th tile
    "block PASS i"      the one over live blocks
    "single PASS"       the one over single live weights, of fixed masks that leave few
    "pair forward"      2:4 tensors, of 1x1 kernels

PASS is forward, input_grad or weight_grad.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsemtl.ops.block_pattern import BlockPattern
from sparsemtl.ops.pattern import Pattern, pack_pattern
from sparsemtl.ops.semi_structured import (
    SemiStructured,
    semi_structured_conv,
    why_not_semi_structured,
)
from sparsemtl.ops.sparse_conv2d_cuda import cuda as single
from sparsemtl.ops.sparse_conv2d_cuda import cuda_backward as single_backward
from sparsemtl.ops.sparse_conv2d_cuda import why_not_here as why_not_single
from sparsemtl.ops.sparse_conv2d_plan import Geometry
from sparsemtl.ops.sparse_conv2d_tiles import Tile, fitted, tiles_of
from sparsemtl.ops.sparse_conv2d_triton import (
    conv_blocks,
    conv_blocks_input_grad,
    conv_blocks_weight_grad,
    fits_groups,
)
from sparsemtl.sparsity.passes import PassChoice, dense_forward, dense_grads
from sparsemtl.sparsity.structure import ELEMENT, Structure

NO_TILE = Tile(0, 0, 0)
TILES = 3  # of each kind that are tried
FEW = 0.05  # density below which the kernel over single weights is tried
SMALLEST = 16  # sides of a block that the kernels walk
PASSES = ("forward", "input_grad", "weight_grad")


@dataclass
class GpuLayer:
    """What one layer keeps between its forward passes.

    group: sides of what a threshold shrinks where its gradient can pass through a weight gradient's
           epilogue: (1, 1) for single weights; None where it cannot
    """

    whole: BlockPattern
    blocks: BlockPattern | None
    fixed: bool
    single: Pattern | None = None  # of a fixed mask that leaves few weights
    group: tuple[int, int] | None = None
    pairs: SemiStructured | None = None  # of a 2:4 structure
    stamp: object = None  # of the weight's present values, equal while they are
    picked: PassChoice | None = None
    since: int = 0
    options: dict[str, Tile] = field(default_factory=dict)

    def pattern(self, name: str) -> BlockPattern:
        """The lists that a candidate walks."""
        if name.startswith("block"):
            assert self.blocks is not None
            return self.blocks
        return self.whole

    def carries_threshold(self, name: str) -> bool:
        """Whether this weight gradient's epilogue can go on through the threshold."""
        if self.fixed or self.group is None or not name.startswith(("skip", "block")):
            return False
        return self.group == (1, 1) or fits_groups(self.options[name], self.group)


def make_layer(weight: Tensor, groups: int, structure: Structure, mask: Tensor | None) -> GpuLayer:
    """The state of a layer of this effective weight.   mask: bool, where it is fixed"""
    tile, blocks, group = structure.tile, None, None
    if min(tile) >= SMALLEST:
        blocks = BlockPattern(weight if mask is None else mask, groups, (tile.rows, tile.columns))
        # A convolution's groups are cut into blocks one by one, a structure's along all channels.
        if groups == 1 or weight.shape[0] // groups % tile.rows == 0:
            group = (tile.rows, tile.columns)
    if structure == ELEMENT:
        group = (1, 1)
    few = None
    if mask is not None and why_not_single(weight, weight) is None:
        pattern = pack_pattern(weight.detach(), groups=groups, keep=mask)
        few = pattern if pattern.nonzeros <= FEW * weight.numel() else None
    pairs = SemiStructured() if structure.n_of_m == (2, 4) else None
    whole = BlockPattern(weight, groups, None)
    return GpuLayer(whole, blocks, mask is not None, few, group, pairs)


def options_of(layer: GpuLayer, x: Tensor, weight: Tensor, g: Geometry) -> dict[str, Tile]:
    """Names of the candidates and their tiles; the pass is part of the name."""
    found: dict[str, Tile] = {}
    count = 1 if os.environ.get("SPARSEMTL_AUTOTUNE") == "0" else TILES
    outputs, channels = weight.shape[0] // g.groups, weight.shape[1]
    for kind, pattern in (("skip", layer.whole), ("block", layer.blocks)):
        if pattern is None:
            continue
        block = pattern.block
        across = None if block is None else (block[1], block[0])
        for i, tile in enumerate(tiles_of(weight.dtype)[:count]):
            found[f"{kind} forward {i}"] = fitted(tile, outputs, channels, block)
            found[f"{kind} input_grad {i}"] = fitted(tile, channels, outputs, across)
        for i, tile in enumerate(tiles_of(weight.dtype, grad=True)[:count]):
            found[f"{kind} weight_grad {i}"] = fitted(tile, outputs, channels, block)
    if layer.single is not None:
        found |= {f"single {name}": NO_TILE for name in ("forward", "input_grad")}
    if layer.pairs is not None and why_not_semi_structured(x, weight, g) is None:
        found["pair forward"] = NO_TILE
    return found


def run_forward(
    layer: GpuLayer, name: str, x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry
) -> Tensor:
    """The forward pass by the candidate of that name."""
    if not name:
        return dense_forward(x, weight, bias, g)
    if name.startswith("single"):
        assert layer.single is not None
        return single(x, weight, layer.single, g, bias, None, None)
    if name.startswith("pair"):
        assert layer.pairs is not None
        return semi_structured_conv(x, layer.pairs.follow(weight, layer.stamp), bias)
    return conv_blocks(x, weight, layer.pattern(name), g, bias, tile=layer.options[name])


def run_input_grad(
    layer: GpuLayer, name: str, grad: Tensor, x: Tensor, weight: Tensor, g: Geometry
) -> Tensor | None:
    """The input's gradient."""
    if not name:
        return dense_grads(grad, x, weight, g, (True, False))[0]
    if name.startswith("single"):
        assert layer.single is not None
        return single_backward(grad, x, weight, layer.single, g, (True, False))[0]
    tile = layer.options[name]
    return conv_blocks_input_grad(grad, x, weight, layer.pattern(name), g, tile)


def run_weight_grad(
    layer: GpuLayer, name: str, grad: Tensor, x: Tensor, weight: Tensor, g: Geometry
) -> Tensor | None:
    """The gradient of the effective weight."""
    if not name:
        return dense_grads(grad, x, weight, g, (False, True))[1]
    tile = layer.options[name]
    found: Tensor = conv_blocks_weight_grad(grad, x, weight, layer.pattern(name), g, tile)
    return found


def run_threshold_grad(
    layer: GpuLayer,
    name: str,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    g: Geometry,
    through: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """The gradients of W and α, of which the weight is S(W, α).   through: W, α"""
    tile, grouped = layer.options[name], layer.group != (1, 1)
    found: tuple[Tensor, Tensor] = conv_blocks_weight_grad(
        grad, x, weight, layer.pattern(name), g, tile, through, grouped
    )
    return found


def names_of(choice: PassChoice) -> list[str]:
    """Names of the candidates that a choice holds, dense passes left out."""
    return [str(n) for n in (choice.forward, choice.input_grad, choice.weight_grad) if n]


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being made of this call: then nothing may be measured."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
