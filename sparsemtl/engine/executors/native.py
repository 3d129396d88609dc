"""The native executor: stretches of the graph run in one call each, torch takes what is left."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsemtl.engine.deferred import density
from sparsemtl.engine.executors.dense import DenseExecutor
from sparsemtl.engine.executors.forms import Form
from sparsemtl.engine.executors.homes import Segment
from sparsemtl.engine.executors.merge import merge_parallel
from sparsemtl.engine.executors.steps import lower
from sparsemtl.engine.executors.support import why_not
from sparsemtl.engine.graph import Graph, Node
from sparsemtl.ops.availability import native_module

# Denser convolutions have arithmetic enough to hide what gathering their input costs.
_MERGED_DENSITY = 0.15


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step.   node: whose it is   what: what the step does for it"""

    node: str
    what: str
    seconds: float


def is_depthwise(node: Node, graph: Graph) -> bool:
    """Whether a convolution has a group for each input channel, so that there is nothing to sum."""
    if node.op != "conv2d":
        return False
    channels = graph.shape(node.inputs[0])[1]
    return node.attrs["groups"] == channels and channels > 1


def packable(node: Node, graph: Graph) -> bool:
    """Whether the native executor runs a node from a packed weight."""
    return node.op in ("conv2d", "linear") and not is_depthwise(node, graph)


def prepared(graph: Graph, apart: Collection[str] = ()) -> Graph:
    """The graph as the native executor runs it: convolutions of one input and geometry merged.

    apart: names of nodes that stay as they are
    """

    def wanted(node: Node) -> bool:
        if node.name in apart:
            return False
        sparse = density(node.weights["weight"]) <= _MERGED_DENSITY
        return sparse and packable(node, graph) and why_not(node, graph) is None

    return merge_parallel(graph, wanted)


class NativeExecutor:
    """Runs a graph on the CPU; safe to call from several threads at once.

    forms:   how conv2d and linear nodes run; those that it does not name run through torch
    """

    name = "native"

    def __init__(self, graph: Graph, forms: Mapping[str, Form]) -> None:
        self._torch: list[DenseExecutor | None] = []
        segments = _segments(graph, forms)
        self._drop = _last_reads(graph, segments)
        self._programs: list[Any] = []
        self._labels: list[list[tuple[str, str]]] = []
        for is_native, segment in segments:
            if not is_native:
                self._torch.append(DenseExecutor(graph, segment.nodes))
                self._programs.append(None)
                self._labels.append([])
                continue
            self._torch.append(None)
            lowered = lower(graph, segment, forms)
            program = native_module().EngineProgram(lowered.arena, lowered.externals, lowered.steps)
            self._programs.append(program)
            self._labels.append(lowered.labels)
        # Weights are packed, or torch's, by now.
        self.segments = [(is_native, segment.bare()) for is_native, segment in segments]
        self.graph = graph.bare()

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The graph's outputs.   inputs: as the graph declares them"""
        return self._run(inputs, None)

    def profile(self, *inputs: Tensor) -> list[StepTime]:
        """Run once and time every native step."""
        times: list[StepTime] = []
        self._run(inputs, times)
        return times

    @property
    def peak_bytes(self) -> int:
        """Memory of one call: arenas and scratch of all segments, and what passes between them."""
        threads = torch.get_num_threads()
        inside = sum(p.bytes(threads) for p in self._programs if p is not None)
        given = {name for _, s in self.segments for name in s.writes}
        return inside + sum(self.graph.values[name].bytes for name in given)

    def _run(self, inputs: tuple[Tensor, ...], times: list[StepTime] | None) -> dict[str, Tensor]:
        values = dict(zip(self.graph.inputs, inputs, strict=True))
        with torch.no_grad():
            for i, (_, segment) in enumerate(self.segments):
                torch_part = self._torch[i]
                if torch_part is None:
                    self._run_native(i, segment, values, times)
                else:
                    begin = time.perf_counter()
                    torch_part.run(values)
                    if times is not None:
                        names = ", ".join(node.name for node in segment.nodes)
                        times.append(StepTime(names, "torch", time.perf_counter() - begin))
                for name in self._drop[i]:
                    del values[name]
        return {task: values[name].contiguous() for task, name in self.graph.outputs.items()}

    def _run_native(
        self, i: int, segment: Segment, values: dict[str, Tensor], times: list[StepTime] | None
    ) -> None:
        reads = [values[name].contiguous() for name in segment.reads]  # alive for the call
        shapes = [self.graph.values[name] for name in segment.writes]
        writes = [torch.empty(v.shape, dtype=v.dtype, device="cpu") for v in shapes]
        addresses = [tensor.data_ptr() for tensor in (*reads, *writes)]
        threads = torch.get_num_threads()
        if times is None:
            self._programs[i].run(addresses, threads)
        else:
            seconds = self._programs[i].profile(addresses, threads)
            labelled = zip(self._labels[i], seconds, strict=True)
            times += [StepTime(node, what, s) for (node, what), s in labelled]
        values.update(zip(segment.writes, writes, strict=True))


def _segments(graph: Graph, forms: Mapping[str, Form]) -> list[tuple[bool, Segment]]:
    """Stretches of nodes that run natively and that do not, in an order that makes few of them."""
    native = {
        node.name: why_not(node, graph) is None
        and (node.name in forms or not packable(node, graph))
        for node in graph.nodes
    }
    waiting, have = list(graph.nodes), set(graph.inputs)
    stretches: list[tuple[bool, list[Node]]] = []
    wanted = any(native.values())
    while waiting:
        now, later = [], []
        for node in waiting:
            if native[node.name] is wanted and have.issuperset(node.inputs):
                now.append(node)
                have.update(node.outputs)
            else:
                later.append(node)
        if now:
            stretches.append((wanted, now))
        waiting, wanted = later, not wanted
    return [(kind, _segment(graph, nodes)) for kind, nodes in stretches]


def _segment(graph: Graph, nodes: list[Node]) -> Segment:
    names = {node.name for node in nodes}
    written = {name for node in nodes for name in node.outputs}
    reads = {name: None for node in nodes for name in node.inputs if name not in written}
    outside = {name for node in graph.nodes if node.name not in names for name in node.inputs}
    outside.update(graph.outputs.values())
    writes = {name: None for node in nodes for name in node.outputs if name in outside}
    return Segment(tuple(nodes), tuple(reads), tuple(writes))


def _last_reads(graph: Graph, segments: list[tuple[bool, Segment]]) -> list[tuple[str, ...]]:
    """After each segment, the values that nobody needs again."""
    last: dict[str, int] = dict.fromkeys(graph.inputs, 0)
    for i, (is_native, segment) in enumerate(segments):
        written = (
            segment.writes
            if is_native
            else tuple(name for node in segment.nodes for name in node.outputs)
        )
        last.update(dict.fromkeys((*segment.reads, *written), i))
    kept = set(graph.outputs.values())
    return [
        tuple(name for name, at in last.items() if at == i and name not in kept)
        for i in range(len(segments))
    ]
