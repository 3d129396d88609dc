"""How a convolution of the native executor runs: its packed weight, mode and tile."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from sparsemtl.engine.graph import Graph, Node
from sparsemtl.engine.pack import PackedWeight
from sparsemtl.ops.availability import native_module
from sparsemtl.ops.sparse_conv2d_plan import (
    DIRECT,
    LINEAR,
    TABLE,
    Geometry,
    Taps,
    plan_pass,
    taps_of_forward,
)

_SHARES = 16  # pieces of work that a layer should at least have
_LEAST_PER_COLUMN = 8  # each part gathers its input anew, which so many nonzeros repay
MODES = {"table": TABLE, "linear": LINEAR, "direct": DIRECT}


@dataclass(frozen=True)
class Form:
    """One way to run a convolution.

    mode:    "table", "linear" or "direct", see csrc/cpu/sparse_conv2d.h
    vectors: registers of pixels in a tile
    regions: whether pixels are ordered by the taps that they need; table mode only
    """

    weight: PackedWeight
    mode: str
    vectors: int
    regions: bool

    @property
    def padded(self) -> bool:
        """Whether zeros must stand around the input."""
        return self.mode != "table"

    @property
    def whole(self) -> bool:
        """Whether kernels want all of an output channel's nonzeros together."""
        return self.mode == "direct"

    def parts(self, batch: int, pixels: int) -> int:
        """Into how many parts output channels are cut, for maps too small to keep threads busy.

        pixels: of one image's output. Independent of the number of threads, as bits must be.
        """
        lanes = native_module().vector_lanes()
        tiles = batch * -(-pixels // (self.vectors * lanes))
        parts, rows = 1, self.weight.shape[0]
        if self.mode == "direct" or self.weight.groups > 1:  # shared out by rows, and by groups
            return parts
        while (
            tiles * parts < _SHARES
            and rows % (2 * parts) == 0
            and self.weight.per_column >= 2 * parts * _LEAST_PER_COLUMN
        ):
            parts *= 2
        return parts

    def settle(self, node: Node, graph: Graph) -> None:
        """Pack the weight for this node and let go of it as it was."""
        batch, pixels = _batch_and_pixels(node, graph)
        self.weight.settle(whole=self.whole, parts=self.parts(batch, pixels))


def _batch_and_pixels(node: Node, graph: Graph) -> tuple[int, int]:
    shape = graph.shape(node.outputs[0])
    if node.op == "linear":
        return 1, prod(shape[:-1])
    return shape[0], shape[2] * shape[3]


def geometry_of(node: Node) -> Geometry:
    """Geometry of a conv2d node."""
    a: dict[str, Any] = node.attrs
    weight = node.weights["weight"]
    return Geometry(
        tuple(a["stride"]),
        tuple(a["padding"]),
        tuple(a["dilation"]),
        (weight.shape[2], weight.shape[3]),
        a["groups"],
    )


def default_form(node: Node, graph: Graph, weight: PackedWeight) -> Form:
    """What the op `sparse_conv2d` would do, which measures nothing."""
    if node.op == "linear":
        return Form(weight, "table", _plan_linear(node, graph, weight), False)
    g = geometry_of(node)
    source, out = graph.shape(node.inputs[0]), graph.shape(node.outputs[0])
    plan = plan_pass(
        "forward",
        taps_of_forward(g),
        g.stride,
        (source[0], source[1], source[2], source[3]),
        (weight.shape[0], out[2], out[3]),
        g.groups,
        weight.per_column,
        weight.vector,
        native_module().isa(),
    )
    mode, vectors, regions, _ = plan.geometry[-4:]
    name = next(key for key, value in MODES.items() if value == mode)
    return Form(weight, name, vectors, bool(regions))


def _plan_linear(node: Node, graph: Graph, weight: PackedWeight) -> int:
    shape, (_, pixels) = graph.shape(node.inputs[0]), _batch_and_pixels(node, graph)
    out, per_column = (weight.shape[0], 1, pixels), weight.per_column
    plan = plan_pass(
        "forward", ((0, 0, 0),), (1, 1), (1, shape[-1], 1, pixels), out, 1, per_column,
        weight.vector, native_module().isa(),
    )  # fmt: skip
    return int(plan.geometry[-3])


@dataclass(frozen=True)
class Reads:
    """What a convolution reads of its input, split into phases by the stride.

    taps:   (phase, dy, dx) of each tap, phases numbered among those in use
    phases: the first in use and how many
    gaps:   rows and columns of zeros that the planes must have around them, where padded
    size:   height and width of a phase's plane
    """

    taps: Taps
    phases: tuple[int, int]
    gaps: tuple[int, int]
    size: tuple[int, int]


def reads_of(g: Geometry, source: tuple[int, int], out: tuple[int, int], padded: bool) -> Reads:
    """source, out: height and width of input and output"""
    taps = taps_of_forward(g)
    used = {phase for phase, _, _ in taps}
    phases = (min(used), 1) if len(used) == 1 else (0, g.stride[0] * g.stride[1])
    size = (-(-source[0] // g.stride[0]), -(-source[1] // g.stride[1]))
    renumbered = tuple((phase - phases[0], dy, dx) for phase, dy, dx in taps)
    gaps = (0, 0)
    if padded:
        gaps = (_gap(taps, 1, size[0], out[0]), _gap(taps, 2, size[1], out[1]))
    return Reads(renumbered, phases, gaps, size)


def _gap(taps: Taps, axis: int, size: int, out: int) -> int:
    """Zeros that the taps reach over, before the first pixel or after the last."""
    shifts = [tap[axis] for tap in taps]
    return max(0, -min(shifts), out - 1 + max(shifts) - (size - 1))
