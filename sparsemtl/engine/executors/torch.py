"""Plain torch, node by node: what a graph means, and who runs what nobody else can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparsemtl.engine.graph import Graph, Node
from sparsemtl.engine.ops import compute


class TorchExecutor:
    """Runs any graph on the device of its inputs; weights must be there too."""

    name = "torch"

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._drop_after = last_reads(graph)

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The graph's outputs.   inputs: as the graph declares them"""
        values = dict(zip(self.graph.inputs, inputs, strict=True))
        with torch.no_grad():
            run_nodes(self.graph.nodes, values, self._drop_after)
        return {task: values[name] for task, name in self.graph.outputs.items()}


def run_nodes(
    nodes: Sequence[Node], values: dict[str, Tensor], drop_after: Mapping[str, tuple[str, ...]]
) -> None:
    """Run nodes over `values`, in place; after each node, forget what nobody reads again."""
    for node in nodes:
        found = compute(node, *(values[name] for name in node.inputs))
        values.update(zip(node.outputs, found, strict=True))
        for name in drop_after.get(node.name, ()):
            del values[name]


def last_reads(graph: Graph) -> dict[str, tuple[str, ...]]:
    """Node → the values that it is the last to touch and that are no output."""
    last = {name: node.name for node in graph.nodes for name in (*node.inputs, *node.outputs)}
    kept = set(graph.outputs.values())
    drop: dict[str, tuple[str, ...]] = {}
    for name, node_name in last.items():
        if name not in kept:
            drop[node_name] = (*drop.get(node_name, ()), name)
    return drop
