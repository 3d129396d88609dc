"""Which forms of a convolution are worth timing on a device, each under its name.

dense                 cuDNN, what follows in place
dense fused           cuDNN with bias, residual and ReLU in one kernel
dense skip MxNxK      our dense kernel by tiles of pixels, output and input channels; where at least
                      a twentieth of the taps read padding
block64 MxNxK         the same over live blocks of 64x64, or 32 or 16, where enough are dead
single                our kernel over single live weights, where a twentieth or less is alive
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from sparsemtl.engine.executors.device_forms import Blocks, Dense, Form, Fused, Single
from sparsemtl.engine.executors.forms import geometry_of
from sparsemtl.engine.graph import Graph, Node
from sparsemtl.ops.block_pattern import BlockPattern, occupied_blocks
from sparsemtl.ops.sparse_conv2d_plan import Geometry
from sparsemtl.ops.sparse_conv2d_single import why_not_single
from sparsemtl.ops.sparse_conv2d_triton import (
    Tile,
    default_tile,
    fitted,
    tiles_of,
    why_not_geometry,
    why_not_here,
)

DENSE, FUSED, SINGLE = "dense", "dense fused", "single"
SIDES = (64, 32, 16)
TILES = 4  # of each kind that are tried
WORTH = 0.95  # share of the taps, read or alive, above which skipping gains nothing
FEW = 0.05  # share of live weights up to which single ones are tried


@dataclass(frozen=True)
class Layer:
    """A convolution that is about to be placed.

    shares: block side → share of live blocks, of the sides worth walking
    live:   share of live weights
    """

    node: Node
    graph: Graph
    shares: dict[int, float]
    live: float
    inside: float  # share of the taps that read the map

    @property
    def key(self) -> str:
        """All that its times depend on, but for the machine."""
        weight = self.node.weights["weight"]
        shapes = [list(self.graph.shape(name)) for name in self.node.inputs]
        attrs = sorted((k, v) for k, v in self.node.attrs.items() if k != "dynamic")
        tf32 = weight.dtype is torch.float32 and torch.backends.cudnn.allow_tf32
        shares = {side: math.ceil(20 * share) / 20 for side, share in self.shares.items()}
        live = f"{self.live:.2f}" if self.live <= FEW else ""
        kind = f"{weight.dtype}{' tf32' if tf32 else ''}"
        return f"{kind} {shapes} {list(weight.shape)} {attrs} {shares} {live}"


def look_at(node: Node, graph: Graph) -> Layer:
    """What decides which forms a convolution may take."""
    weight = node.weights["weight"]
    alive, g = weight != 0, geometry_of(node)
    shares: dict[int, float] = {}
    least = WORTH
    widest = max(weight.shape[0] // g.groups, weight.shape[1])
    for side in SIDES:
        if side > widest and side != SIDES[-1]:
            continue
        share = float(occupied_blocks(alive, g.groups, side, side).float().mean())
        if share < least:  # smaller blocks run slower: only if clearly fewer are alive
            shares[side] = share
            least = 0.8 * share
    live = float(alive.float().mean())
    return Layer(node, graph, shares, live, taps_inside(g, graph.shape(node.inputs[0])[2:]))


def taps_inside(g: Geometry, size: tuple[int, ...]) -> float:
    """Share of (pixel, tap) pairs that read the map and not its padding."""
    share, out = 1.0, g.output_size(size[0], size[1])
    for axis in (0, 1):
        s, p, d, k = (v[axis] for v in (g.stride, g.padding, g.dilation, g.kernel))
        read = sum(0 <= o * s - p + i * d < size[axis] for o in range(out[axis]) for i in range(k))
        share *= read / max(1, out[axis] * k)
    return share


def candidates(layer: Layer) -> dict[str, Callable[[], Form]]:
    """Name → makes the form; "dense" first."""
    node = layer.node
    weight = node.weights["weight"]
    found: dict[str, Callable[[], Form]] = {DENSE: partial(Dense, node)}
    if weight.is_cuda and node.attrs["activation"] == "relu":
        found[FUSED] = partial(Fused, node)
    if why_not_blocks(layer) is None:
        if layer.inside <= WORTH:
            found |= tiled(layer, None)
        for side in layer.shares:
            found |= tiled(layer, side)
    if layer.live <= FEW and why_not_single(_like_input(layer), weight) is None:
        found[SINGLE] = partial(Single, node)
    return found


def why_not_blocks(layer: Layer) -> str | None:
    """Why the Triton kernel cannot take the layer; None if it can."""
    x = _like_input(layer)
    return why_not_here(x, layer.node.weights["weight"]) or why_not_geometry(
        x, geometry_of(layer.node)
    )


def tiled(layer: Layer, side: int | None) -> dict[str, Callable[[], Form]]:
    """Forms over blocks of a side, or over all blocks, by tiles that fit."""
    node, weight = layer.node, layer.node.weights["weight"]
    blocks = BlockPattern(weight, geometry_of(node).groups, None if side is None else (side, side))
    kind = "dense skip" if side is None else f"block{side}"
    return {
        f"{kind} {tile.pixels}x{tile.dest}x{tile.source}": partial(Blocks, node, blocks, tile)
        for tile in tiles_for(node, blocks)
    }


def tiles_for(node: Node, blocks: BlockPattern) -> list[Tile]:
    """The default and a few others, none twice. `SPARSEMTL_AUTOTUNE=0`: the default alone."""
    weight, g = node.weights["weight"], geometry_of(node)
    first = default_tile(weight, blocks, g)
    if os.environ.get("SPARSEMTL_AUTOTUNE") == "0":
        return [first]
    outputs, channels = weight.shape[0] // g.groups, weight.shape[1]
    others = [fitted(tile, outputs, channels, blocks.block) for tile in tiles_of(weight.dtype)]
    unique: dict[tuple[int, int, int], Tile] = {}
    for tile in (first, *others):
        unique.setdefault((tile.pixels, tile.dest, tile.source), tile)
    return list(unique.values())[:TILES]


def _like_input(layer: Layer) -> torch.Tensor:
    """Shape and type of what it reads, without memory."""
    value = layer.graph.values[layer.node.inputs[0]]
    return torch.empty(value.shape, dtype=value.dtype, device="meta")
