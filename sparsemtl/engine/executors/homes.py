"""Where each value of a segment stands: in a buffer, or in some channels of one.

The inputs of a concatenation are computed where it wants them, a residual's sum takes the place of
the residual, and what a padded convolution reads stands between zeros already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from sparsemtl.engine.executors.buffers import Buffer, View, four
from sparsemtl.engine.executors.forms import Reads
from sparsemtl.engine.graph import Graph, Node

MAPS = {"copy": 0, "relu": 1, "relu6": 2, "clamp": 3, "sigmoid": 4, "silu": 5, "hardswish": 6}
Shape = tuple[int, int, int, int]
_NONE = (0, 0)


@dataclass
class Home:
    """Channels [channel, channel + shape[1]) of a buffer."""

    buffer: Buffer
    channel: int
    shape: Shape

    def view(self) -> View:
        return self.buffer.view(self.channel, self.shape[1])


@dataclass(frozen=True)
class Segment:
    """Nodes that one program runs.   reads, writes: values that it takes and gives, in order"""

    nodes: tuple[Node, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    def bare(self) -> Segment:
        """Without weights."""
        return replace(self, nodes=tuple(node.bare() for node in self.nodes))


class Homes:
    """Homes of a segment's values, found node by node, in order.

    reads: what each convolution without dense taps reads, by its node's name
    """

    def __init__(self, graph: Graph, segment: Segment, reads: Mapping[str, Reads]) -> None:
        self.graph, self.segment = graph, segment
        self.buffers: list[Buffer] = []
        self.slots = {name: 1 + i for i, name in enumerate((*segment.reads, *segment.writes))}
        self._homes: dict[str, Home] = {}
        self._gaps = _find_gaps(segment, reads)
        self._slices = self._find_slices()
        self._last_read = {
            name: place for place, node in enumerate(segment.nodes) for name in node.inputs
        }
        for name in segment.reads:
            self._homes[name] = self.outside(name)

    def __getitem__(self, name: str) -> Home:
        return self._homes[name]

    def shape(self, name: str) -> Shape:
        return four(self.graph.shape(name))

    @property
    def external_sizes(self) -> list[int]:
        """Floats of the caller's tensors, in the order of slots."""
        values = (self.graph.values[name] for name in self.slots)
        return [prod(value.shape) * value.dtype.itemsize // 4 for value in values]

    def new(self, shape: Shape, **details: Any) -> Home:
        """A home in a buffer of its own."""
        buffer = Buffer(shape, **details)
        self.buffers.append(buffer)
        return Home(buffer, 0, shape)

    def outside(self, name: str) -> Home:
        """The caller's tensor of this name."""
        return self.new(self.shape(name), slot=self.slots[name])

    def enter(self, node: Node, place: int) -> None:
        """Find the homes of what a node writes.   place: its position in the segment"""
        if len(node.outputs) > 1:
            self._share(node)
        elif node.output not in self._homes:  # else begun by the first input of a concatenation
            name = node.output
            home = self._in_slice(name) or self._in_place(node, place) or self._alone(name, [name])
            self._homes[name] = home
            self._widen(home, name)

    def _alone(self, name: str, family: Sequence[str]) -> Home:
        """A buffer for a value, for which those that stand in it want zeros around or not."""
        if name in self.slots and all(self._gaps.get(n, _NONE) == _NONE for n in family):
            return self.outside(name)
        return self.new(self.shape(name), packed=len(self.graph.shape(name)) < 4)

    def _share(self, node: Node) -> None:
        """The outputs of a merged convolution are channels of one buffer."""
        shapes = [self.shape(name) for name in node.outputs]
        batch, _, height, width = shapes[0]
        whole = self.new((batch, sum(shape[1] for shape in shapes), height, width))
        channel = 0
        for name, shape in zip(node.outputs, shapes, strict=True):
            self._homes[name] = Home(whole.buffer, channel, shape)
            self._widen(whole, name)
            channel += shape[1]

    def _find_slices(self) -> dict[str, tuple[Node, int]]:
        """Values that are computed where a concatenation wants them, and from which channel on."""
        free = {node.outputs[0] for node in self.segment.nodes if len(node.outputs) == 1}
        free -= set(self.slots)
        slices: dict[str, tuple[Node, int]] = {}
        for node in self.segment.nodes:
            if node.op != "concat" or len(self.graph.shape(node.output)) != 4:
                continue
            channel = 0
            for name in node.inputs:
                if name in free and name not in slices and node.inputs.count(name) == 1:
                    slices[name] = (node, channel)
                channel += self.graph.shape(name)[1]
        return slices

    def _in_slice(self, name: str) -> Home | None:
        if name not in self._slices:
            return None
        node, channel = self._slices[name]
        whole = self._homes.get(node.output)
        if whole is None:
            whole = self._in_slice(node.output) or self._alone(node.output, self._family(node))
            self._homes[node.output] = whole
            self._widen(whole, node.output)
        return Home(whole.buffer, whole.channel + channel, self.shape(name))

    def _family(self, node: Node) -> list[str]:
        """A concatenation and what is computed into it, at any depth."""
        names = [node.output]
        for name in names:
            names += [n for n, (into, _) in self._slices.items() if into.output == name]
        return names

    def _in_place(self, node: Node, place: int) -> Home | None:
        """The home of an input that nobody reads after this node, where it may be overwritten."""
        if node.output in self.slots:
            return None
        for name in _overwritten(node):
            home = self._homes[name]
            same = self.graph.shape(name) == self.graph.shape(node.output)
            dead = self._last_read[name] == place and node.inputs.count(name) == 1
            if same and dead and home.buffer.slot == 0 and name not in self.slots:
                return home
        return None

    def _widen(self, home: Home, name: str) -> None:
        gaps, wanted = home.buffer.gaps, self._gaps.get(name, _NONE)
        if wanted != _NONE:
            home.buffer.gaps = (max(gaps[0], wanted[0]), max(gaps[1], wanted[1]))


def _find_gaps(segment: Segment, reads: Mapping[str, Reads]) -> dict[str, tuple[int, int]]:
    """Zeros that convolutions without a stride want around a value."""
    gaps: dict[str, tuple[int, int]] = {}
    for node in segment.nodes:
        if node.name in reads and node.attrs["stride"] == (1, 1):
            y, x = gaps.get(node.inputs[0], _NONE)
            wanted = reads[node.name].gaps
            gaps[node.inputs[0]] = (max(y, wanted[0]), max(x, wanted[1]))
    return gaps


def _overwritten(node: Node) -> Sequence[str]:
    """Inputs in whose place the output may be computed: pixel by pixel, read before written."""
    if node.op == "conv2d":
        return node.inputs[1:]
    if node.op in ("add", "mul", "sum"):
        return node.inputs
    return node.inputs[:1] if node.op in MAPS else ()
