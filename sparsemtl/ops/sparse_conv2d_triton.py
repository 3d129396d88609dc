"""How Triton computes sparse_conv2d: tables and lists on the device, then kernels/sparse_conv2d.py.

Tensors are brought to NHWC; what is channels_last already is not copied, and results are
channels_last. Arithmetic is fp32 accumulation of products of the storage type; those of float32
are tf32 where torch allows cuDNN that, else exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsemtl.ops.availability import why_not_triton
from sparsemtl.ops.block_pattern import BlockPattern, blocks_of
from sparsemtl.ops.dispatch import BackendUnavailable, requested_backend
from sparsemtl.ops.pattern import Pattern
from sparsemtl.ops.sparse_conv2d_backends import ACTIVATIONS, reference, reference_backward
from sparsemtl.ops.sparse_conv2d_pixels import MOST_TAPS, PixelOrder, pixel_order, why_not_pixels
from sparsemtl.ops.sparse_conv2d_plan import Geometry
from sparsemtl.ops.sparse_conv2d_tiles import Tile as Tile
from sparsemtl.ops.sparse_conv2d_tiles import default_tile as default_tile
from sparsemtl.ops.sparse_conv2d_tiles import fitted as fitted
from sparsemtl.ops.sparse_conv2d_tiles import precision, splits
from sparsemtl.ops.sparse_conv2d_tiles import tiles_of as tiles_of

if TYPE_CHECKING:
    from sparsemtl.kernels.sparse_conv2d import Channels, Pixels


def why_not_here(x: Tensor | None = None, weight: Tensor | None = None) -> str | None:
    """Why Triton cannot run here, or cannot take these tensors; None if it can."""
    reason = why_not_triton(weight)
    if reason is not None or x is None or weight is None:
        return reason
    if x.dtype is not weight.dtype:
        return f"x is {x.dtype} and weight {weight.dtype}, it takes one type"
    if x.numel() == 0 or weight.numel() == 0:
        return "x or weight is empty"
    if weight.numel() >= 1 << 31:
        return f"weight has {weight.numel()} values, it counts them in 32 bits"
    taps = weight.shape[2] * weight.shape[3]
    return f"the kernel has {taps} taps, it takes up to {MOST_TAPS}" if taps > MOST_TAPS else None


def why_not_geometry(x: Tensor, g: Geometry) -> str | None:
    """Why the tables cannot hold this convolution; None if they can."""
    return why_not_pixels(g, x.shape[0], (x.shape[2], x.shape[3]))


def _left_to_reference(x: Tensor, g: Geometry) -> bool:
    reason = why_not_geometry(x, g)
    if reason is not None and requested_backend() == "triton":
        raise BackendUnavailable(f"sparse_conv2d cannot run on 'triton': {reason}")
    return reason is not None


def triton(
    x: Tensor,
    weight: Tensor,
    pattern: Pattern,
    g: Geometry,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    if _left_to_reference(x, g):
        return reference(x, weight, pattern, g, bias, residual, activation)
    return conv_blocks(x, weight, blocks_of(pattern), g, bias, residual, activation)


def triton_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    pattern: Pattern,
    g: Geometry,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    if _left_to_reference(x, g):
        return reference_backward(grad, x, weight, pattern, g, needs)
    blocks = blocks_of(pattern)
    grad_x = conv_blocks_input_grad(grad, x, weight, blocks, g) if needs[0] else None
    if not needs[1]:
        return grad_x, None
    grad_weight = conv_blocks_weight_grad(grad, x, weight, blocks, g)
    # Blocks hold dead weights too; theirs is zero by definition.
    return grad_x, torch.where(pattern.mask(), grad_weight, 0.0)


def conv_blocks(
    x: Tensor,
    weight: Tensor,
    blocks: BlockPattern,
    g: Geometry,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """act(conv2d(x, weight) + bias + residual) on live blocks; nothing is checked.

    x: [B, C, H, W]   weight: [K, C / groups, kh, kw], zero in dead blocks
    returns: [B, K, OH, OW], channels_last
    """
    from sparsemtl.kernels.sparse_conv2d import Epilogue

    height, width = g.output_size(x.shape[2], x.shape[3])
    source, w = nhwc(x), nhwc(weight)
    y = empty_nhwc(x, (x.shape[0], weight.shape[0], height, width))
    extra = None if residual is None else nhwc(residual)
    epilogue = Epilogue(bias, extra, ACTIVATIONS[activation])
    _launch(source, w, y, blocks, g, (x.shape[2], x.shape[3]), False, epilogue, tile)
    return y


def conv_blocks_input_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    blocks: BlockPattern,
    g: Geometry,
    tile: Tile | None = None,
) -> Tensor:
    """The gradient of x, channels_last.   grad: [B, K, OH, OW]"""
    from sparsemtl.kernels.sparse_conv2d import Epilogue

    grad_x = empty_nhwc(x, tuple(x.shape))
    size = (x.shape[2], x.shape[3])
    _launch(nhwc(grad), nhwc(weight), grad_x, blocks, g, size, True, Epilogue(), tile)
    return grad_x


def conv_blocks_weight_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    blocks: BlockPattern,
    g: Geometry,
    tile: Tile | None = None,
    threshold: tuple[Tensor, Tensor] | None = None,
    grouped: bool = False,
) -> Any:
    """The gradient of weight, zero outside of live blocks.

    threshold: W in float32 and α, of which weight is S(W, α): then the gradients of both are
               returned, of their own types. Blocks must hold all that is alive in weight
    grouped:   S is that of groups, which are the tile's blocks; see `fits_groups`
    """
    from sparsemtl.kernels.sparse_conv2d import Tiling
    from sparsemtl.kernels.sparse_conv2d_weight_grad import (
        ELEMENTS,
        GROUPS,
        Panels,
        Threshold,
        sparse_conv2d_weight_grad,
    )

    tile = tile or default_tile(weight, blocks, g, grad=True)
    order = pixel_order(g, x.shape[0], (x.shape[2], x.shape[3]), tile.pixels, False, x.device)
    lists = Panels(*blocks.panels(order, tile.dest, tile.source, tile.panel))
    rows, panels, tiles = lists.tile_lists.shape
    kind = weight.dtype if threshold is None else threshold[0].dtype
    found = torch.zeros_like(weight, dtype=kind, memory_format=torch.channels_last)
    split = splits(rows * panels, tiles, rows * panels * tile.dest * tile.panel * tile.source)
    partials = None
    if split > 1:
        shape = (split, rows, panels, tile.dest, tile.panel * tile.source)
        partials = torch.empty(shape, dtype=torch.float32, device=x.device)
    given = None
    if threshold is not None:
        shares = torch.zeros(rows, panels, dtype=torch.float32, device=x.device)
        master, alpha = nhwc(threshold[0].detach().float()), threshold[1].detach().float()
        given = Threshold(GROUPS if grouped else ELEMENTS, master, alpha, shares)
    tiling = Tiling(tile.pixels, tile.dest, tile.source, tile.warps, tile.stages, tile.panel)
    sparse_conv2d_weight_grad(
        nhwc(x), nhwc(grad), found, _pixels(order), lists, channels_of(weight, g, False),
        g.kernel[1], tiling, precision(), partials, given,
    )  # fmt: skip
    if given is None or threshold is None:
        return found
    alpha = threshold[1]
    total = given.shares.sum(dtype=torch.float64)  # one order for one shape, no atomics
    return found, (-total).to(alpha.dtype).reshape(alpha.shape)


def fits_groups(tile: Tile, group: tuple[int, int]) -> bool:
    """Whether every group is one block of the tile, so that a program sees all of it."""
    return (tile.dest, tile.source) == group


def _launch(
    source: Tensor,
    weight: Tensor,
    dest: Tensor,
    blocks: BlockPattern,
    g: Geometry,
    size: tuple[int, int],
    transposed: bool,
    epilogue: Any,
    tile: Tile | None,
) -> None:
    from sparsemtl.kernels.sparse_conv2d import Lists, Tiling, sparse_conv2d

    tile = tile or default_tile(weight, blocks, g, transposed=transposed)
    order = pixel_order(g, dest.shape[0], size, tile.pixels, transposed, dest.device)
    lists = Lists(*blocks.lists(order, tile.dest, tile.source, transposed))
    tiles, entries = len(order.classes), lists.entries.shape[2]
    channels = channels_of(weight, g, transposed)
    split = splits(tiles * len(lists.rows), entries, tiles * tile.pixels * dest.shape[1])
    partials = None
    if split > 1:
        shape = (split, tiles * tile.pixels, dest.shape[1])
        partials = torch.empty(shape, dtype=torch.float32, device=dest.device)
    tiling = Tiling(tile.pixels, tile.dest, tile.source, tile.warps, tile.stages)
    sparse_conv2d(
        source, weight, dest, _pixels(order), lists, channels, g.kernel[1], tiling, epilogue,
        precision(), partials,
    )  # fmt: skip


def _pixels(order: PixelOrder) -> Pixels:
    from sparsemtl.kernels.sparse_conv2d import Pixels

    return Pixels(order.bases, order.dests, order.live, order.classes, order.steps)


def channels_of(weight: Tensor, g: Geometry, transposed: bool) -> Channels:
    """Channels and strides for a weight [K, C / groups, kh, kw] in NHWC memory."""
    from sparsemtl.kernels.sparse_conv2d import Channels

    outputs, source = weight.shape[0] // g.groups, weight.shape[1]
    row = source * weight.shape[2] * weight.shape[3]
    if transposed:
        return Channels(outputs, source, g.groups, outputs * row, 1, row, source)
    return Channels(source, outputs, g.groups, outputs * row, row, 1, source)


def nhwc(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous(memory_format=torch.channels_last)


def empty_nhwc(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(
        tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )
