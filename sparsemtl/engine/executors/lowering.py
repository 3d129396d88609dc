"""What lowering a segment gathers: homes of values, and steps that will read and write them.

Homes in memory are found first, node by node, and steps are noted; only then are buffers placed and
steps written down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparsemtl.engine.executors.buffers import View, place
from sparsemtl.engine.executors.forms import Form, Reads, geometry_of, reads_of
from sparsemtl.engine.executors.homes import MAPS, Home, Homes, Segment
from sparsemtl.engine.graph import Graph, Node

ACTIVATIONS = {"": 0, "relu": 1, "relu6": 2}

NativeStep = tuple[str, list[list[int]], list[float], list[np.ndarray]]


@dataclass(frozen=True)
class Lowered:
    """What a native program is built from.

    labels:  the node of each step, and what the step does for it
    """

    arena: int
    externals: list[int]
    steps: list[NativeStep]
    labels: list[tuple[str, str]]


class Lowering:
    """A segment on its way: homes of values, and steps that will read and write them.

    forms: how each conv2d and linear node runs, by its name
    """

    def __init__(self, graph: Graph, segment: Segment, forms: Mapping[str, Form]) -> None:
        self.graph, self.segment, self.forms = graph, segment, forms
        self.reads = {
            node.name: self._reads(node)
            for node in segment.nodes
            if node.op == "conv2d" and node.name in forms
        }
        self.homes = Homes(graph, segment, self.reads)
        self.pending: list[tuple[str, str, Callable[[], NativeStep]]] = []
        self.copies: dict[tuple[object, ...], Home] = {}  # for convolutions that want them

    def finish(self) -> Lowered:
        """Place the buffers and write the steps down."""
        for name in self.segment.writes:
            home = self.homes[name]
            if home.buffer.slot != self.homes.slots[name]:
                self.map(name, "output", home, self.homes.outside(name))
        arena = place(self.homes.buffers)
        steps = [build() for _, _, build in self.pending]
        labels = [(node, what) for node, what, _ in self.pending]
        return Lowered(arena, self.homes.external_sizes, steps, labels)

    def step(
        self, node: str, what: str, homes: Sequence[Home], build: Callable[[], NativeStep]
    ) -> None:
        for home in homes:
            home.buffer.touch(len(self.pending))
        self.pending.append((node, what, build))

    def inputs(self, node: Node) -> list[Home]:
        return [self.homes[name] for name in node.inputs]

    def map(
        self, node: str, what: str, x: Home, y: Home, bounds: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        code = float(MAPS.get(what, 0))

        def build() -> NativeStep:
            views = [x.view(), y.view()]
            if not any(view.has_gaps for view in views):
                views = cut([view.flat() for view in views])
            return "map", [view.numbers for view in views], [code, *bounds], []

        self.step(node, what, [x, y], build)

    def _reads(self, node: Node) -> Reads:
        source, out = self.graph.shape(node.inputs[0]), self.graph.shape(node.outputs[0])
        padded = self.forms[node.name].padded
        return reads_of(geometry_of(node), (source[2], source[3]), (out[2], out[3]), padded)


def cut(views: list[View]) -> list[View]:
    """A long flat row as planes, so that threads can share it; whole where it divides unevenly."""
    floats = views[0].floats
    for parts in (64, 32, 16, 8, 4, 2):
        if floats % parts == 0 and floats // parts >= 1024:
            size = floats // parts
            return [View(v.slot, v.offset, (1, parts, 1, size), floats, size, size) for v in views]
    return views
