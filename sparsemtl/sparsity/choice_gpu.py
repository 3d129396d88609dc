"""Which kernel computes each pass of a convolution on a GPU: whichever was measured faster there.

Candidates are cuDNN's dense convolution, the dense one that skips padding taps, for blocks of at
least 16x16 the block-sparse one, and for fixed masks that leave few weights the one over single
weights; the second and third with a few tiles each. A layer is measured once
for each density bucket, on the tensors at hand; choices are kept where those of the CPU are
(choice.py), so a resumed run decides as before. `SPARSEMTL_AUTOTUNE=0` leaves one tile of each.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsemtl.ops.block_pattern import BlockPattern
from sparsemtl.ops.dispatch import requested_backend, through_torch
from sparsemtl.ops.pattern import Pattern, pack_pattern
from sparsemtl.ops.sparse_conv2d_cuda import cuda as single
from sparsemtl.ops.sparse_conv2d_cuda import cuda_backward as single_backward
from sparsemtl.ops.sparse_conv2d_cuda import why_not_here as why_not_single
from sparsemtl.ops.sparse_conv2d_plan import Geometry
from sparsemtl.ops.sparse_conv2d_triton import (
    Tile,
    conv_blocks,
    conv_blocks_input_grad,
    conv_blocks_weight_grad,
    fitted,
    tiles_of,
    why_not_geometry,
    why_not_here,
)
from sparsemtl.sparsity.choice import (
    BUDGET,
    CHOICES,
    DENSE,
    MARGIN,
    ROUNDS,
    PassChoice,
    dense_forward,
    dense_grads,
    density_bucket,
    layer_key,
)
from sparsemtl.sparsity.structure import Structure
from sparsemtl.timing import interleave

EVERY = 100  # forward passes after which an open mask's density is looked at again
NO_TILE = Tile(0, 0, 0)
TILES = 3  # of each kind that are tried
FEW = 0.05  # density below which the kernel over single weights is tried
SMALLEST = 16  # sides of a block that the kernels walk


@dataclass
class GpuLayer:
    """What one layer keeps between its forward passes."""

    whole: BlockPattern
    blocks: BlockPattern | None
    fixed: bool
    single: Pattern | None = None  # of a fixed mask that leaves few weights
    picked: PassChoice | None = None
    since: int = 0
    options: dict[str, Tile] = field(default_factory=dict)

    def pattern(self, name: str) -> BlockPattern:
        """The lists that a candidate walks."""
        if name.startswith("block"):
            assert self.blocks is not None
            return self.blocks
        return self.whole


def why_not_on_gpu(x: Tensor, weight: Tensor, g: Geometry) -> str | None:
    """Why a layer cannot use these kernels; None if it can."""
    if x.dim() != 4 or through_torch(x):
        return "x is not a plain batch of images"
    if requested_backend() not in (None, "triton"):
        return f"the backend {requested_backend()!r} was asked for"
    return why_not_here(x, weight) or why_not_geometry(x, g)


def convolve(
    layer: GpuLayer, x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry
) -> Tensor:
    """The convolution with the effective weight, each pass by the kernel that was measured best."""
    if layer.picked is None or (not layer.fixed and layer.since >= EVERY):
        layer.picked, layer.since = _choose(layer, x, weight, bias, g), 0
    layer.since += 1
    names = (layer.picked.forward, layer.picked.input_grad, layer.picked.weight_grad)
    if not any(names):
        return dense_forward(x, weight, bias, g)
    if layer.blocks is not None and not layer.fixed and any("block" in str(n) for n in names):
        layer.blocks.follow(weight)  # a block may have come back to life
    y: Tensor = _Chosen.apply(x, weight, bias, g, layer, layer.picked)
    return y


def make_layer(weight: Tensor, groups: int, structure: Structure, mask: Tensor | None) -> GpuLayer:
    """The state of a layer of this effective weight.   mask: bool, where it is fixed"""
    tile, blocks = structure.tile, None
    if min(tile) >= SMALLEST:
        blocks = BlockPattern(weight if mask is None else mask, groups, (tile.rows, tile.columns))
    single = None
    if mask is not None and why_not_single(weight, weight) is None:
        pattern = pack_pattern(weight.detach(), groups=groups, keep=mask)
        single = pattern if pattern.nonzeros <= FEW * weight.numel() else None
    return GpuLayer(BlockPattern(weight, groups, None), blocks, mask is not None, single)


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        g: Geometry,
        layer: GpuLayer,
        picked: PassChoice,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.g, ctx.layer, ctx.picked = g, layer, picked
        if not picked.forward:
            return dense_forward(x, weight, bias, g)
        return _forward(layer, str(picked.forward), x, weight, bias, g)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        layer, picked, g = ctx.layer, ctx.picked, ctx.g
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            name = str(picked.input_grad or "")
            grad_x = _input_grad(layer, name, grad, x, weight, g)
        if ctx.needs_input_grad[1]:
            name = str(picked.weight_grad or "")
            grad_weight = _weight_grad(layer, name, grad, x, weight, g)
        grad_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None


def _forward(
    layer: GpuLayer, name: str, x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry
) -> Tensor:
    if not name:
        return dense_forward(x, weight, bias, g)
    if name.startswith("single"):
        assert layer.single is not None
        return single(x, weight, layer.single, g, bias, None, None)
    return conv_blocks(x, weight, layer.pattern(name), g, bias, tile=layer.options[name])


def _input_grad(
    layer: GpuLayer, name: str, grad: Tensor, x: Tensor, weight: Tensor, g: Geometry
) -> Tensor | None:
    if not name:
        return dense_grads(grad, x, weight, g, (True, False))[0]
    if name.startswith("single"):
        assert layer.single is not None
        return single_backward(grad, x, weight, layer.single, g, (True, False))[0]
    tile = layer.options[name]
    return conv_blocks_input_grad(grad, x, weight, layer.pattern(name), g, tile)


def _weight_grad(
    layer: GpuLayer, name: str, grad: Tensor, x: Tensor, weight: Tensor, g: Geometry
) -> Tensor | None:
    if not name:
        return dense_grads(grad, x, weight, g, (False, True))[1]
    tile = layer.options[name]
    found: Tensor = conv_blocks_weight_grad(grad, x, weight, layer.pattern(name), g, tile)
    return found


def _choose(
    layer: GpuLayer, x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry
) -> PassChoice:
    layer.options = _options(layer, weight, g)
    density = 1.0
    if layer.single is not None:
        density = layer.single.nonzeros / max(1, weight.numel())
    elif layer.blocks is not None:
        if not layer.fixed:
            layer.blocks.follow(weight)
        rows, columns = layer.blocks.block or (1, 1)
        density = float(layer.blocks.occupied(rows, columns).float().mean())
    bucket = density_bucket(density)
    device = torch.cuda.get_device_name(x.device) if x.is_cuda else "interpreter"
    shape = layer_key(x, weight, g, -1 if bucket is None else bucket, layer.fixed)
    # Above the buckets one measurement serves all: there the blocks hardly matter.
    level = "any density" if bucket is None else ""
    kind = "single" if layer.single is not None else ""
    key = f"{device} {x.dtype} {layer.blocks and layer.blocks.block} {kind}{level} {shape}"
    known = CHOICES.find(key)
    if known is not None and all(n in layer.options for n in _names(known)):
        return known
    return CHOICES.keep(key, measure(layer, x, weight, bias, g))


def _names(choice: PassChoice) -> list[str]:
    return [str(n) for n in (choice.forward, choice.input_grad, choice.weight_grad) if n]


def _options(layer: GpuLayer, weight: Tensor, g: Geometry) -> dict[str, Tile]:
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
    return found


def measure(
    layer: GpuLayer, x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry
) -> PassChoice:
    """Time every candidate of the passes that will run, on these very tensors."""
    training, x_needs_grad = torch.is_grad_enabled(), x.requires_grad
    x, weight = x.detach(), weight.detach()
    shift = None if bias is None else bias.detach()
    picked: dict[str, str] = {}
    with torch.no_grad():
        y = dense_forward(x, weight, shift, g)
        grad = torch.ones_like(y, memory_format=torch.preserve_format)
        refresh = 0.0
        if layer.blocks is not None and not layer.fixed:
            calls: dict[str, Callable[[], object]] = {"": partial(layer.blocks.follow, weight)}
            refresh = interleave(calls, ROUNDS, 1, x.device, BUDGET)[""].best
        for name in ("forward", "input_grad", "weight_grad"):
            if name != "forward" and not (training and (name == "weight_grad" or x_needs_grad)):
                continue
            calls = {"": _call(layer, name, "", x, weight, shift, grad, g)}
            for option in layer.options:
                if name in option:
                    calls[option] = _call(layer, name, option, x, weight, shift, grad, g)
            seconds = {n: t.best for n, t in interleave(calls, ROUNDS, 1, x.device, BUDGET).items()}
            # Lists of a mask that still moves are made anew each step, for all passes together.
            cost = {n: s + (refresh if n.startswith("block") else 0.0) for n, s in seconds.items()}
            best = min(cost, key=lambda n: cost[n])
            if cost[best] < MARGIN * seconds[""]:
                picked[name] = best
    return PassChoice(**picked) if picked else DENSE


def _call(
    layer: GpuLayer,
    name: str,
    option: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    g: Geometry,
) -> Callable[[], object]:
    if name == "input_grad":
        return partial(_input_grad, layer, option, grad, x, weight, g)
    if name == "weight_grad":
        return partial(_weight_grad, layer, option, grad, x, weight, g)
    return partial(_forward, layer, option, x, weight, bias, g)
